"""Does ``slowlens what-if`` predict what a setting does? Each change is predicted, and then made.

    python benchmarks/what_if.py                      # every change
    python benchmarks/what_if.py rate-1.3 replicas-2
    python benchmarks/what_if.py -o FILE              # writes the table
    python benchmarks/what_if.py --keep FOLDER        # keeps the traces
    python benchmarks/what_if.py --again FOLDER       # predicts again from kept traces

Texts of 4 to 60 words come at random times, the same for every change. The application is served once as it is, its
traces are replayed with each change, and then it is served with that change. The model is the fake engine, which sleeps
for as long as a run takes (``--model`` takes the real one): what is tested is the replay, not the evenness of the host.
Prints p50 and p99 as predicted and as measured, and how far they are apart. Needs port 8000; a change takes a minute.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from diagnosis import changed, until_healthy
from load import Asked, Load, text_of
from slowdowns import HERE, Setup
from throughput import Server, running

from deployments.explain.traces.files import TraceFiles
from deployments.simulate.recording import Recording, record
from deployments.simulate.what_if import document, what_if

PROGRAMS = Path(sys.executable).parent
SEED, WARM_UP_S = 5, 3.0
FAKE = {"engine": "fake", "fake": {"base_ms": 30.0, "per_token_us": 300.0}}
BASE: dict[str, Any] = {"batching": {"max_batch_size": 8}}
RATE = 35.0
BEGUN = "begun"


@dataclass(frozen=True)
class Change:
    settings: dict[str, Any] = field(default_factory=dict)
    """By key, without ``batching.``."""
    replicas: int = 1
    rate: float = 1.0


CHANGES = {
    "batch-size-4": Change({"max_batch_size": 4}),
    "batch-size-16": Change({"max_batch_size": 16}),
    "batch-tokens-512": Change({"max_batch_tokens": 512}),
    "batch-tokens-256": Change({"max_batch_tokens": 256}),
    "in-order": Change({"grouping_window": 1}),
    "wait-50": Change({"max_wait_ms": 50}),
    "wait-150": Change({"max_wait_ms": 150}),
    "run-100": Change({"max_run_ms": 100}),
    "replicas-2": Change(replicas=2),
    "rate-0.6": Change(rate=0.6),
    "rate-1.3": Change(rate=1.3),
    "rate-1.8-replicas-2": Change(replicas=2, rate=1.8),
    "rate-1.3-batch-size-16": Change({"max_batch_size": 16}, rate=1.3),
}


def asked(number: int) -> Asked:
    words = random.Random(number).randint(4, 60)
    return Asked("/v1/embeddings", json.dumps({"input": text_of(words, number)}).encode())


def served(change: Change, model: dict[str, Any], seconds: float, keep: Path) -> None:
    """Serve the load with a change, and keep the traces."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        args = {"model": model, "batching": {**BASE["batching"], **change.settings}}
        fixed = {
            "autoscaling_config": {"min_replicas": change.replicas, "max_replicas": change.replicas},
            # Two of them must find room on two cores.
            "ray_actor_options": {"num_cpus": 0.5},
        }
        config = folder / "config.yaml"
        config.write_text(changed((HERE.parent / "serve_config.yaml").read_text(), Setup(args, {"Model": fixed})))
        command = [str(PROGRAMS / "serve"), "run", str(config)]
        server = Server("slowlens", command, 8000, {"RAY_USAGE_STATS_ENABLED": "0"}, HERE.parent)
        with running(server, folder / "log", until_healthy):
            with Load(asked, per_s=5.0):
                # Until its second replica is there, too.
                time.sleep(WARM_UP_S * change.replicas**2)
            begun = time.time()
            with Load(asked, per_s=RATE * change.rate, seed=SEED):
                time.sleep(seconds / change.rate)
            time.sleep(2)
        shutil.copytree(folder / "slowlens", keep)
        (keep / BEGUN).write_text(str(begun))


def recorded(folder: Path) -> Recording:
    """Without the warm-up, whose last request may end a moment after the load's first has begun."""
    return record(TraceFiles(folder), int((float((folder / BEGUN).read_text()) + 0.2) * 1e9))


def keys_of(change: Change) -> dict[str, Any]:
    found: dict[str, Any] = {f"batching.{key}": value for key, value in change.settings.items()}
    return found | ({"deployments.Model.num_replicas": change.replicas} if change.replicas != 1 else {})


def measured(recording: Recording) -> tuple[float, float]:
    took = sorted(one.latency_ns / 1e6 for one in recording.answered)
    return took[len(took) // 2], took[int(len(took) * 0.99)]


def table(rows: Sequence[tuple[str, dict[str, Any], tuple[float, float]]]) -> str:
    lines = [
        "| change | p50 ms, predicted | measured | off | p99 ms, predicted | measured | off |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    off: list[list[float]] = [[], []]
    for name, told, (p50, p99) in rows:
        cells = []
        for number, (said, was) in enumerate(((told["predicted"]["p50"], p50), (told["predicted"]["p99"], p99))):
            off[number].append(abs(said / was - 1))
            cells += [f"{said:.0f}", f"{was:.0f}", f"{said / was - 1:+.0%}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    medians = [f"{statistics.median(one):.0%}" for one in off]
    lines.append(f"| median | | | {medians[0]} | | | {medians[1]} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("changes", nargs="*", metavar="CHANGE", help=f"any of {', '.join(CHANGES)}; default: all")
    parser.add_argument("--seconds", type=float, default=40.0, help="of the load")
    parser.add_argument("--model", action="store_true", help="serve the real model")
    parser.add_argument("-o", dest="output", type=Path, metavar="FILE")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="folder in which to keep the traces")
    parser.add_argument("--again", type=Path, metavar="FOLDER", help="predict again from the traces in this folder")
    options = parser.parse_args()
    if unknown := set(options.changes) - set(CHANGES):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    with tempfile.TemporaryDirectory() as name:
        folder = options.again or options.keep or Path(name)
        model = {} if options.model else FAKE
        if options.again is None:
            served(Change(), model, options.seconds, folder / "as-it-is")
        before = recorded(folder / "as-it-is")
        began = time.monotonic()
        same = document(what_if(before, {"batching.max_batch_size": 8}))
        print(f"{len(before.requests)} requests, two replays in {time.monotonic() - began:.1f} s", flush=True)
        print(yaml.safe_dump({key: same[key] for key in ("measured", "replayed", "stages")}), flush=True)
        rows = [("as it is", same, measured(before))]
        for name_of_it in options.changes or CHANGES:
            change = CHANGES[name_of_it]
            told = document(what_if(before, keys_of(change), change.rate))
            if options.again is None:
                served(change, model, options.seconds, folder / name_of_it)
            rows.append((name_of_it, told, measured(recorded(folder / name_of_it))))
            print(table(rows).splitlines()[-2], flush=True)
    print(f"\n{table(rows)}")
    if options.output is not None:
        options.output.write_text(table(rows) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
