"""A real run on this machine with the fake engine, compared with the replay of its traces."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import yaml

from deployments.autoscaling.settings import POLICY
from deployments.explain.traces.files import TraceFiles
from deployments.simulate.recording import record
from deployments.simulate.replay import Replayed
from deployments.simulate.what_if import what_if
from deployments.telemetry import names

URL = "http://127.0.0.1:8000"
BATCH, RUN_S, TARGET_S = 8, 0.4, 0.5
PATTERN = [0.25] * 40 + [1.0] * 80 + [0.25] * 120
PEAK = 60.0
"""Requests per second: enough work for three replicas."""
MAX_REPLICAS = 6
_SCALING = {
    "min_replicas": 1,
    "max_replicas": MAX_REPLICAS,
    "metrics_interval_s": 0.5,
    "look_back_period_s": 2,
    "upscale_delay_s": 0,
    "downscale_delay_s": 0,
    "policy": {"policy_function": POLICY, "policy_kwargs": {"target_queue_wait_ms": TARGET_S * 1e3, "quiet_s": 60}},
}
CONFIG: dict[str, Any] = {
    "http_options": {"host": "127.0.0.1", "port": 8000},
    "logging_config": {"enable_access_log": False, "log_level": "WARNING"},
    "applications": [
        {
            "name": "slowlens",
            "import_path": "deployments.app:build",
            "args": {
                "model": {"engine": "fake", "fake": {"base_ms": RUN_S * 1e3}},
                "batching": {"max_batch_size": BATCH},
            },
            "deployments": [
                {
                    "name": "Model",
                    "autoscaling_config": _SCALING,
                    "max_ongoing_requests": 4000,
                    "ray_actor_options": {"num_cpus": 0.05},
                }
            ],
        }
    ],
}


@dataclass(slots=True)
class Seen:
    requests: int = 0
    failed: int = 0
    late: int = 0
    replica_s: float = 0.0
    start_s: float = 0.0
    decisions: list[str] = field(default_factory=list)
    replayed: Replayed = field(default_factory=Replayed)


def compare() -> str:
    seen = measure()
    done = seen.replayed
    late = done.refused + sum(
        outcome.replica_wait_ns + outcome.queue_ns > TARGET_S * 1e9 for _, outcome in done.answered
    )
    requests = len(done.answered) + done.refused
    ordered = max((int(one.split()[-1]) for one in seen.decisions), default=1)
    return "\n".join(
        [
            "| | real | replayed |",
            "| --- | --- | --- |",
            f"| requests | {seen.requests} ({seen.failed} failed) | {requests} ({done.refused} refused) |",
            f"| late | {seen.late / max(1, seen.requests):.1%} | {late / max(1, requests):.1%} |",
            f"| replicas at most | {ordered} | {done.replicas} |",
            f"| replica-seconds | {seen.replica_s:.0f} | {done.replica_seconds:.0f} |",
            f"| start of a replica | {seen.start_s:.1f} s | the same |",
        ]
    )


def measure() -> Seen:
    seen = Seen()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with serving(CONFIG, folder):
            began = time.time()
            waits = asyncio.run(send(PATTERN, PEAK))
            time.sleep(3)
        read_decisions(folder / "slowlens", seen, began, began + len(PATTERN))
        seen.replayed = what_if(record(TraceFiles(folder / "slowlens"), round(began * 1e9)), {}).replayed
    seen.requests, seen.failed = len(waits), waits.count(None)
    seen.late = sum(wait is not None and wait > TARGET_S * 1e3 for wait in waits)
    return seen


@contextlib.contextmanager
def serving(content: dict[str, Any], folder: Path) -> Iterator[None]:
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(content))
    environment = {**os.environ, "XDG_STATE_HOME": str(folder), "RAY_USAGE_STATS_ENABLED": "0"}
    program = str(Path(sys.executable).with_name("serve"))
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [program, "run", str(config)],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        while not healthy():
            if process.poll() is not None:
                raise SystemExit((folder / "log").read_text()[-3000:])
            time.sleep(0.2)
        yield
    finally:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def healthy() -> bool:
    try:
        with urllib.request.urlopen(f"{URL}/healthz", timeout=5):
            return True
    except OSError:
        return False


async def send(pattern: Sequence[float], peak: float, long_share: float = 0.0) -> list[float | None]:
    """Send requests at random times, at the rate of the pattern, without waiting for earlier ones (open loop).

    Returns the wait of each before the device in milliseconds, or None if it failed.
    """
    waits: list[float | None] = []
    draw = random.Random(1)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as client:

        async def ask(text: str) -> None:
            async with client.post(f"{URL}/v1/embeddings", json={"input": text}) as answer:
                await answer.read()
            timing = dict(
                part.split(";dur=") for part in answer.headers.get("Server-Timing", "queue;dur=0").split(", ")
            )
            waits.append(float(timing["queue"]) if answer.status == 200 else None)

        tasks, began, at = [], time.monotonic(), 0.0
        while at < len(pattern):
            at += draw.expovariate(pattern[min(int(at), len(pattern) - 1)] * peak)
            await asyncio.sleep(max(0.0, began + at - time.monotonic()))
            tasks.append(asyncio.create_task(ask("a " * 200 if draw.random() < long_share else "a b c")))
        await asyncio.gather(*tasks)
    return waits


def read_decisions(store: Path, seen: Seen, begin_s: float, end_s: float) -> None:
    """Add the replica-seconds ordered, the decisions, and the longest replica start time to ``seen``."""
    steps: list[tuple[float, int, int, float]] = []
    for path in store.glob("traces-autoscaler*"):
        for line in path.read_text().splitlines():
            for span in json.loads(line)["resourceSpans"][0]["scopeSpans"][0]["spans"]:
                attributes = {pair["key"]: next(iter(pair["value"].values())) for pair in span["attributes"]}
                if span["name"] == names.SCALING_DECISION:
                    steps.append(_step(span, attributes))
    steps.sort()
    at_s, replicas = begin_s, 1
    for decided_s, before, after, start_s in steps:
        if begin_s <= decided_s <= end_s:
            seen.replica_s += replicas * (decided_s - at_s)
            at_s, replicas = decided_s, after
            seen.start_s = max(seen.start_s, start_s)
            seen.decisions.append(f"{decided_s - begin_s:.1f} s: {before} to {after}")
    seen.replica_s += replicas * (end_s - at_s)


def _step(span: dict[str, Any], attributes: dict[str, Any]) -> tuple[float, int, int, float]:
    before, after = (int(attributes[f"ai.autoscaling.{which}_replicas"]) for which in ("from", "to"))
    return int(span["endTimeUnixNano"]) / 1e9, before, after, float(attributes["ai.autoscaling.start_ms"]) / 1e3
