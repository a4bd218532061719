"""Does ``slowlens why`` name what was wrong? Each case starts the application and makes one thing slow from outside.

    python benchmarks/diagnosis.py                # every case
    python benchmarks/diagnosis.py padding cpu_hog

Prints, for each case, what was done and which causes were named, and ends with status 1 where a verdict was wrong: the
right cause must come first, and a healthy run must name nothing. Needs Linux and port 8000; a case takes a minute.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from throughput import Server, running

HERE = Path(__file__).parent
SECONDS, RATE = 24.0, 6.0
SHORT = "the river ran quietly under an old stone bridge"


@dataclass(frozen=True)
class Case:
    truth: str
    """The cause that must come first; empty where none may be named."""
    what: str
    drive: Callable[[], None]
    args: dict[str, Any] = field(default_factory=dict)
    config: str = "../serve_config.yaml"
    autoscaling: dict[str, Any] = field(default_factory=dict)
    """Of the deployment Model."""


# --- traffic ---------------------------------------------------------------------------------------------------------


def post(text: str, pause_s: float = 0.0) -> None:
    """One request. With a pause between the halves of its body."""
    body = json.dumps({"input": [text]}).encode()
    connection = http.client.HTTPConnection("127.0.0.1", 8000, timeout=60)
    with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
        connection.putrequest("POST", "/v1/embeddings")
        connection.putheader("Content-Type", "application/json")
        connection.putheader("Content-Length", str(len(body)))
        connection.endheaders()
        connection.send(body[: len(body) // 2])
        time.sleep(pause_s)
        connection.send(body[len(body) // 2 :])
        connection.getresponse().read()


def together(*works: Callable[[], None]) -> None:
    threads = [threading.Thread(target=work) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def steady(odd: Callable[[], None] | None = None) -> None:
    """A request every so often, whatever became of the one before; every 15th is an odd one."""
    begin, sent = time.monotonic(), []
    for number in range(int(SECONDS * RATE)):
        work = odd if odd is not None and number % 15 == 14 else lambda: post(SHORT)
        sent.append(threading.Thread(target=work))
        time.sleep(max(0.0, begin + number / RATE - time.monotonic()))
        sent[-1].start()
    for thread in sent:
        thread.join()


def clients(count: int, text: str, seconds: float) -> None:
    """So many that each wait for their answer and ask again."""
    end = time.monotonic() + seconds

    def one() -> None:
        while time.monotonic() < end:
            post(text)

    together(*[one] * count)


def hogs() -> None:
    """Four busy loops before the replicas in priority, for a part of the time."""
    loops = [subprocess.Popen(["nice", "-n", "5", sys.executable, "-c", "while True: pass"]) for _ in range(4)]
    time.sleep(SECONDS / 8)
    for loop in loops:
        loop.kill()
        loop.wait()


def later(work: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:
        time.sleep(SECONDS / 2)
        work()

    return run


IN_ORDER = {"batching": {"grouping_window": 1}}
CASES = {
    "healthy": Case("", "6 short requests a second", steady),
    "saturated_device": Case(
        "device_queue",
        "64 clients at once for a quarter of the time",
        lambda: together(steady, later(lambda: clients(64, SHORT, SECONDS / 4))),
    ),
    "batch_timer": Case("batch_fill", "batching.max_wait_ms: 300", steady, {"batching": {"max_wait_ms": 300}}),
    "long_inputs": Case(
        "long_input", "every 15th request has 250 words", lambda: steady(lambda: post(" ".join([SHORT] * 28)))
    ),
    "padding": Case(
        "padding",
        "in order of arrival, 15 clients with short inputs beside one with 360 words",
        lambda: together(lambda: clients(15, SHORT, SECONDS), lambda: clients(1, "a long one " * 120, SECONDS)),
        IN_ORDER,
    ),
    "odd_input": Case(
        "tokenization",
        "every 15th request has 190,000 characters that the tokenizer must take apart",
        lambda: steady(lambda: post("\ufdfa " * 95_000)),
    ),
    "slow_upload": Case(
        "slow_upload", "every 15th client pauses 0.4 s in its body", lambda: steady(lambda: post(SHORT, 0.4))
    ),
    "cold_start": Case(
        "cold_start",
        "scaled to zero before the first request",
        lambda: together(steady, lambda: post(SHORT)),
        config="scale_from_zero.yaml",
        autoscaling={"downscale_delay_s": 1, "downscale_to_zero_delay_s": 1},
    ),
    "cpu_hog": Case(
        "device_contention", "four busy loops for an eighth of the time", lambda: together(steady, later(hogs))
    ),
}


# --- a case ----------------------------------------------------------------------------------------------------------


def verdict_on(case: Case) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.yaml"
        config.write_text(changed((HERE / case.config).read_text(), case))
        command = [str(Path(sys.executable).parent / "serve"), "run", str(config)]
        server = Server("slowlens", command, 8000, {"RAY_USAGE_STATS_ENABLED": "0"}, HERE.parent)
        with running(server, Path(folder) / "log"):
            wait_until_quiet(case)
            begun = time.time()
            case.drive()
            time.sleep(2)
        store = Path(folder) / "slowlens"
        seconds = f"{int(time.time() - begun) + 1}s"
        why = [str(Path(sys.executable).parent / "slowlens"), "why", "--source", str(store), "--since", seconds]
        print(subprocess.run(why, capture_output=True, text=True).stdout, file=sys.stderr)
        output = subprocess.run([*why, "--format", "json"], capture_output=True, text=True, check=True).stdout
        findings: list[dict[str, Any]] = json.loads(output)["findings"]
        return findings


def wait_until_quiet(case: Case) -> None:
    """The replicas' first requests set things up; a case that scales to zero waits for that."""
    if case.autoscaling:
        time.sleep(20)
    else:
        for _ in range(20):
            post(SHORT)


def changed(text: str, case: Case) -> str:
    document = yaml.safe_load(text)
    application = document["applications"][0]
    args = application.setdefault("args", {})
    for section, values in case.args.items():
        args[section] = args.get(section, {}) | values
    for deployment in application["deployments"]:
        if deployment["name"] == "Model" and case.autoscaling:
            deployment["autoscaling_config"] |= case.autoscaling
    return yaml.safe_dump(document)


def main() -> int:
    wrong = 0
    rows: list[tuple[str, str, str]] = []
    for name in sys.argv[1:] or CASES:
        case = CASES[name]
        named = [finding["cause"] for finding in verdict_on(case)]
        right = named[:1] == [case.truth] if case.truth else not named
        wrong += not right
        rows.append((case.truth or "nothing", ", ".join(named) or "nothing", "right" if right else "WRONG"))
        print(f"{name}: {case.what}: {rows[-1]}", flush=True)
    print("\n| case | what was done | truth | named | |\n| --- | --- | --- | --- | --- |")
    for name, (truth, named_, right_) in zip(sys.argv[1:] or CASES, rows, strict=True):
        print(f"| {name} | {CASES[name].what} | `{truth}` | {named_} | {right_} |")
    return int(wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main())
