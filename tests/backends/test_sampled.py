"""What ``why`` says of the traces that the shipped Collector keeps, compared with all of them."""

from __future__ import annotations

import json
import random
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest

from deployments.explain.traces.otlp import Span
from deployments.telemetry import names
from deployments.telemetry.sampling.threshold import BITS
from tests.backends.running import collector, jaeger
from tests.support.made import SKEW, moved, otlp, request

REQUESTS, FAILED, SLOW = 5_000, 100, 250
TOTAL_MS = 500_000.0
RANDOM = (1 << BITS) - 1


@dataclass
class Kept:
    every: list[Span]
    everything: str
    """A file of all spans."""
    url: str
    """A Jaeger with those that the Collector kept."""


def window() -> list[Span]:
    """Some minutes until now: 2 % of the requests fail, 5 % have long inputs and take more than half a second."""
    chance = random.Random(11)
    kinds = ["failed"] * FAILED + ["slow"] * SLOW + ["ordinary"] * (REQUESTS - FAILED - SLOW)
    chance.shuffle(kinds)
    spans: list[Span] = []
    for number, kind in enumerate(kinds):
        unusual = {"failed": {"error": "model_failed"}, "slow": {"tokens": chance.randint(1000, 2000)}, "ordinary": {}}
        usual = {"tokens": chance.randint(5, 60), "busy": chance.random() * 20, "there": 1 + chance.random()}
        spans += identified(number, request(number, number * TOTAL_MS / REQUESTS, **usual | unusual[kind]), chance)
    last_ns = max(span.end_ns for span in spans)
    return moved(spans, time.time_ns() - 10**9 - last_ns)


def identified(number: int, spans: Iterator[Span], chance: random.Random) -> Iterator[Span]:
    """The same by clocks that agree, with ids as the recorder gives them: a run has the randomness of its request."""
    own, run = f"{number:032x}", f"{number + 10**6:032x}"
    low = chance.getrandbits(BITS)
    ids = {one: f"{chance.getrandbits(128 - BITS) << BITS | low:032x}" for one in (own, run)}
    for span in spans:
        more: dict[str, Any] = {names.W3C_TRACESTATE: "ot=th:0"}
        if span.name == names.PREDICT:
            more[names.AI_REQUEST_NUMBER] = number + 1
        skew_ns = round(SKEW[span.service.removeprefix("slowlens.")] * 1e6)
        yield replace(
            span,
            start_ns=span.start_ns - skew_ns,
            end_ns=span.end_ns - skew_ns,
            trace_id=ids[span.trace_id],
            links=tuple((ids[trace_id], span_id) for trace_id, span_id in span.links),
            attributes=span.attributes | more,
        )


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kept]:
    folder = tmp_path_factory.mktemp("sampled")
    every = window()
    (folder / "all.jsonl").write_text(otlp(every))
    with jaeger(folder) as store:
        with collector(folder, store.endpoint) as running:
            running.take(every)
            # It decides on what it still holds.
            running.stop()
        yield Kept(every, str(folder / "all.jsonl"), store.url)


def why(source: str, *more: str) -> Any:
    command = ["slowlens", "why", "--source", source, "--since", "15m", "--format", "json", *more]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def test_the_numbers_are_those_of_all_requests(kept: Kept) -> None:
    whole, sample = why(kept.everything), why(kept.url)

    assert (whole["requests"], whole["sampling"]["weights"]) == (REQUESTS, "none")
    assert sample["sampling"]["weights"] == "known"
    assert sample["sampling"]["kept"] == pytest.approx(FAILED + SLOW + (REQUESTS - FAILED - SLOW) / 10, rel=0.1)
    assert sample["requests"] == pytest.approx(REQUESTS, rel=0.03)
    assert sample["errors"] == whole["errors"] == {"model_failed": FAILED}
    for name, ms in whole["latency_ms"].items():
        assert sample["latency_ms"][name] == pytest.approx(ms, rel=0.05), name
    for name, (least, most) in sample["sampling"]["latency_ms_interval"].items():
        assert least <= whole["latency_ms"][name] <= most, name
    causes = [[finding["cause"] for finding in found["findings"]] for found in (sample, whole)]
    assert causes[0] == causes[1]
    assert causes[0][0] == "long_input"
