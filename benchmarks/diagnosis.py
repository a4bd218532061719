"""Does ``slowlens why`` name the true cause? Each case starts the application and slows it down from outside.

    python benchmarks/diagnosis.py                        # every case
    python benchmarks/diagnosis.py padding cpu_hog
    python benchmarks/diagnosis.py --rounds 3 -o FILE     # writes a table of the true and the named causes
    python benchmarks/diagnosis.py padding --keep FOLDER  # keeps the traces for later inspection
    python benchmarks/diagnosis.py --again FOLDER         # judges kept traces again
    python benchmarks/diagnosis.py padding --fix          # runs it again with the setting that is proposed

Prints each verdict, and exits with status 1 if one is wrong: the first cause must be a true one, all true causes must
be named, and a healthy run must have none. Needs Linux, ports 8000 and 14318, a C compiler for one case, and root for
four (cpu_limit, slow_replica, slow_disk: control groups; chats_slow_reader: the kernel's socket buffers). A case takes
about a minute.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import yaml
from slowdowns import HERE, SLOWDOWNS, Setup, Slowdown, fills, short
from throughput import Server, running

PROGRAMS = Path(sys.executable).parent
BEGUN = "begun"
"""Name of the file beside kept traces that holds the start time of the traffic, in Unix seconds."""


Report = dict[str, Any]
"""As ``slowlens why --format json`` prints it."""
_CHANGE = re.compile(
    r"((?:deployments|batching|limits|generation)\.[\w.]+):\s(?:[\w.]+\s->\s)?(\d+(?:\.\d+)?)", re.MULTILINE
)
_P99 = re.compile(r"(predicted|at\sbest)\sp99\s(\d+)\s->\s(\d+)")


def report_on(case: Slowdown, keep: Path | None = None, fix: tuple[str, float] | None = None) -> Report:
    """Run a case and report on it. Copy the traces to ``keep``, if given.

    Args:
        fix: a setting to change first, and its value.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        setup = case.setup(folder)
        config = folder / "config.yaml"
        text = changed((HERE / setup.config).read_text(), setup)
        config.write_text(with_setting(text, *fix) if fix is not None else text)
        command = [*setup.prefix, str(PROGRAMS / "serve"), "run", str(config)]
        environment = {"RAY_USAGE_STATS_ENABLED": "0", **setup.environment}
        server = Server("slowlens", command, 8000, environment, HERE.parent)
        with running(server, folder / "log", until_healthy):
            get_going(case)
            begun = time.time()
            case.drive(folder)
            time.sleep(2)
            report = verdict_on(folder / "slowlens", begun)
        if keep is not None:
            shutil.copytree(folder / "slowlens", keep)
            (keep / BEGUN).write_text(str(begun))
        return report


def verdict_on(store: Path, begun: float) -> Report:
    since = f"{int(time.time() - begun) + 1}s"
    why = [str(PROGRAMS / "slowlens"), "why", "--source", str(store), "--since", since]
    print(subprocess.run(why, capture_output=True, text=True).stdout, file=sys.stderr, flush=True)
    verdict = subprocess.run([*why, "--format", "json"], capture_output=True, text=True, check=True).stdout
    report: Report = json.loads(verdict)
    return report


def is_right(report: Report, case: Slowdown) -> bool:
    """Whether the first cause is a true one and all true causes are named; for a healthy run, whether none is named."""
    named, findings = causes(report), report["findings"]
    if not case.truth:
        return not named
    told = " ".join(one["summary"] + one["fix"] for one in findings if one["cause"] == case.truth[0])
    return named[:1] != [] and named[0] in case.truth and set(case.truth) <= set(named) and case.says in told


def causes(report: Report) -> list[str]:
    return [finding["cause"] for finding in report["findings"]]


def proposed(report: Report) -> tuple[str, float, float | None] | None:
    """The first setting that the first finding proposes, its value, and the p99 that is predicted for it, if any is."""
    fix = report["findings"][0]["fix"] if report["findings"] else ""
    setting, p99 = _CHANGE.search(fix), _P99.search(fix)
    if setting is None:
        return None
    return setting[1], float(setting[2]), float(p99[3]) if p99 is not None else None


def with_setting(text: str, key: str, value: float) -> str:
    document = yaml.safe_load(text)
    application = document["applications"][0]
    section, *path, last = key.split(".")
    if section == "deployments":
        name, *path = path
        place = next(one for one in application["deployments"] if one["name"] == name)
    else:
        place = application.setdefault("args", {}).setdefault(section, {})
    for part in path:
        place = place.setdefault(part, {})
    place[last] = int(value) if value.is_integer() else value
    if last == "min_replicas":
        # Serve refuses fewer at first.
        place.pop("initial_replicas", None)
    return yaml.safe_dump(document)


def until_healthy(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(1200):
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=5):
                return
        except urllib.error.HTTPError as error:
            # Scaled to zero: the ingress is up, the model is not.
            if b"no replica is ready: model" in error.read():
                return
        except OSError:
            pass
        if process.poll() is not None:
            break
        time.sleep(0.1)
    raise SystemExit(f"the application did not start:\n{log.read_text()[-3000:]}")


def get_going(case: Slowdown) -> None:
    """Send warm-up requests."""
    if case.warm_up is not None:
        case.warm_up()
    else:
        for _ in range(20):
            short()
            fills(1, 5)()


def changed(text: str, setup: Setup) -> str:
    # The JSON round trip copies what YAML anchors share, so that a change affects one deployment only.
    document = json.loads(json.dumps(yaml.safe_load(text)))
    application = document["applications"][0]
    merge(application.setdefault("args", {}), setup.args)
    for deployment in application["deployments"]:
        merge(deployment, setup.deployments.get(deployment["name"], {}))
    return yaml.safe_dump(document)


def merge(into: dict[str, Any], changes: dict[str, Any]) -> None:
    for key, value in changes.items():
        if isinstance(value, dict):
            merge(into.setdefault(key, {}), value)
        else:
            into[key] = value


def table(results: dict[str, list[Report]]) -> str:
    lines = ["| case | what was done | truth | named, by round | right |", "| --- | --- | --- | --- | --- |"]
    for name, rounds in results.items():
        case = SLOWDOWNS[name]
        truth = " and ".join(f"`{cause}`" for cause in case.truth) or "nothing"
        named = "; ".join(", ".join(causes(report)) or "nothing" for report in rounds)
        right = sum(is_right(report, case) for report in rounds)
        lines.append(f"| {name} | {case.what} | {truth} | {named} | {right} of {len(rounds)} |")
    return "\n".join(lines)


FIXES = """\
| case | change | p99 ms before | predicted | measured | of the predicted gain |
| --- | --- | --- | --- | --- | --- |"""


def fixed(name: str, report: Report) -> str | None:
    """Run a case again with what its report proposes: a line of a table; None if that is no setting."""
    found = proposed(report)
    if found is None:
        return None
    key, value, predicted = found
    before, after = report["latency_ms"]["p99"], report_on(SLOWDOWNS[name], fix=(key, value))["latency_ms"]["p99"]
    gained = f"{(before - after) / (before - predicted):.0%}" if predicted is not None else ""
    told = f"{predicted:.0f}" if predicted is not None else ""
    return f"| {name} | `{key}: {value:g}` | {before:.0f} | {told} | {after:.0f} | {gained} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"any of {', '.join(SLOWDOWNS)}; default: all")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("-o", dest="output", type=Path, metavar="FILE")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="folder in which to keep the traces of each case")
    parser.add_argument("--fix", action="store_true", help="run each case again with the setting that is proposed")
    parser.add_argument(
        "--again", type=Path, metavar="FOLDER", help="judge the traces kept in this folder, of as many rounds as it has"
    )
    options = parser.parse_args()
    if unknown := set(options.cases) - set(SLOWDOWNS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    fixes: list[str] = []
    results: dict[str, list[Report]] = {name: [] for name in options.cases or SLOWDOWNS}
    for number in range(1, options.rounds + 1):
        for name, rounds in results.items():
            kept = (options.again or options.keep or Path()) / f"{name}-{number}"
            if options.again is not None:
                if not kept.exists():
                    continue
                rounds.append(verdict_on(kept, float((kept / BEGUN).read_text())))
            else:
                rounds.append(report_on(SLOWDOWNS[name], kept if options.keep is not None else None))
            right = "right" if is_right(rounds[-1], SLOWDOWNS[name]) else "WRONG"
            print(f"round {number}: {name}: {', '.join(causes(rounds[-1])) or 'nothing'}: {right}", flush=True)
            if options.fix and (line := fixed(name, rounds[-1])) is not None:
                print(line, flush=True)
                fixes.append(line)
    tables = "\n".join([table(results), *(["", FIXES, *fixes] if fixes else [])])
    print(f"\n{tables}")
    if options.output is not None:
        options.output.write_text(tables + "\n")
    return int(any(not is_right(report, SLOWDOWNS[name]) for name in results for report in results[name]))


if __name__ == "__main__":
    raise SystemExit(main())
