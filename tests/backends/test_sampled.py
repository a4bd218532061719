"""What ``why`` says of the traces that the shipped Collector keeps, compared with all of them."""

from __future__ import annotations

import json
import random
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from deployments.explain.traces.open import source_at
from deployments.explain.traces.otlp import Span
from deployments.explain.traces.servers.http_api import Api
from deployments.explain.traces.servers.jaeger import Jaeger, OlderJaeger
from deployments.explain.traces.survey import survey
from deployments.telemetry import names
from deployments.telemetry.sampling.threshold import BITS
from tests.backends.running import collector, jaeger
from tests.support.made import SKEW, ident_of, moved, otlp, request

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


def window(count: int = REQUESTS) -> list[Span]:
    """Some minutes until now: 2 % of the requests fail, 5 % have long inputs and take more than half a second."""
    chance = random.Random(11)
    failed, slow = count * FAILED // REQUESTS, count * SLOW // REQUESTS
    kinds = ["failed"] * failed + ["slow"] * slow + ["ordinary"] * (count - failed - slow)
    chance.shuffle(kinds)
    spans: list[Span] = []
    for number, kind in enumerate(kinds):
        unusual: dict[str, dict[str, Any]] = {
            "failed": {"error": "model_failed"},
            "slow": {"tokens": chance.randint(1000, 2000)},
            "ordinary": {},
        }
        usual: dict[str, Any] = {
            "tokens": chance.randint(5, 60),
            "busy": chance.random() * 20,
            "there": 1 + chance.random(),
        }
        spans += identified(number, request(number, number * TOTAL_MS / count, **usual | unusual[kind]), chance)
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
            running.settle()
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


def test_what_is_stored_is_for_the_kept(kept: Kept) -> None:
    """A run without a request that was kept explains nothing."""
    source = source_at(kept.url)
    found = survey(source.roots(time.time_ns() - 900 * 10**9), 0.05)
    roots, spans = found.known, list(source.spans(found))
    answered = {trace_id for trace_id, _ in found.slow | found.ordinary}
    runs = [span for span in spans if span.name == names.BATCH_FORWARD]
    idle = [run for run in runs if not any(trace_id in roots for trace_id, _ in run.links)]

    assert {trace_id for run in runs for trace_id, _ in run.links} >= answered
    assert len(idle) <= len(roots) / 20
    # What is kept of a trace is all of it.
    stored = {span.trace_id for span in spans}
    assert len({span.key for span in spans}) == len([span for span in kept.every if span.trace_id in stored])


def test_more_traces_within_a_second_than_a_search_returns_are_read_whole(tmp_path: Path) -> None:
    count, now_ns = 20_000, time.time_ns()
    chance = random.Random(3)
    (root,) = (span for span in request(0, 0.0) if span.name == names.PREDICT)
    begin_ns = now_ns - 20 * 10**9
    starts_ns = [begin_ns + number * 10**9 // count for number in range(count)]
    spans = [
        replace(root, trace_id=f"{chance.getrandbits(128):032x}", start_ns=start_ns, end_ns=start_ns + 10**7)
        for start_ns in starts_ns
    ]
    with jaeger(tmp_path) as store:
        with collector(tmp_path, store.endpoint, samples=False) as running:
            running.take(spans)
            running.settle()
        source = source_at(store.url)
        found = {root.key for root in source.roots(now_ns - 60 * 10**9)}
        assert (len(found), source.cut) == (count, 0)


def test_what_the_replicas_decided_themselves_is_not_sampled_again(tmp_path: Path) -> None:
    spans = [
        replace(span, resource={**span.resource, "slowlens.telemetry.sampling.mode": "retroactive"})
        for span in window(200)
    ]
    with jaeger(tmp_path) as store:
        with collector(tmp_path, store.endpoint) as running:
            running.take(spans)
            running.settle()
        found = {span.key for span in source_at(store.url).traces({span.trace_id for span in spans})}
    assert found == {(span.trace_id, ident_of(span.span_id)) for span in spans}


def test_both_apis_of_jaeger_say_the_same(kept: Kept) -> None:
    since_ns = time.time_ns() - 900 * 10**9
    newer, older = source_at(kept.url), OlderJaeger(Api(kept.url))
    assert type(newer) is Jaeger
    found = [
        {root.key: (root.weight, root.error, root.number) for root in source.roots(since_ns)}
        for source in (newer, older)
    ]
    assert found[0] == found[1]
    (some, *_) = found[0]
    spans = [{span.key: span for span in source.trace(some[0])} for source in (newer, older)]
    assert spans[0].keys() == spans[1].keys()
    assert [span.links for span in spans[0].values()] == [spans[1][key].links for key in spans[0]]
