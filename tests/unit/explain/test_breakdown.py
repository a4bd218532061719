"""What a request's time was spent on: worked examples, and the invariant that no time is lost or counted twice."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.explain.requests.breakdown import NoRoot, break_down, length, union, without
from deployments.explain.traces.otlp import Span
from deployments.telemetry import names, span_specs

SKEW = 3_600_000
"""Milliseconds by which another host's clock is ahead."""


def span(ident: str, parent: str, name: str, start_ms: float, end_ms: float, **attributes: Any) -> Span:
    named = {key.replace("__", "."): value for key, value in attributes.items()}
    return Span("t" * 32, ident, parent, name, "", "", round(start_ms * 1e6), round(end_ms * 1e6), named, (), False)


def request() -> list[Span]:
    return [
        span("root", "caller", names.PREDICT, 0, 100),
        span("v", "root", names.VALIDATE, 0, 5),
        span("ht", "root", names.HOP_TOKENIZER, 5, 15),
        span("t", "ht", names.PREPROCESS, SKEW, SKEW + 4),
        span("hm", "root", names.HOP_MODEL, 15, 85),
        span("m", "hm", names.BATCHED_PREDICT, -SKEW, -SKEW + 60),
        span("q", "m", names.QUEUE, -SKEW + 1, -SKEW + 40, ai__queue__device_busy_ms=30.0, ai__queue__fill_wait_ms=9.0),
        span("f", "m", names.FORWARD_PASS, -SKEW + 40, -SKEW + 60),
        span("hp", "root", names.HOP_POSTPROCESSOR, 85, 95, **{"ai.hop.transit_ms": 8.0}),
        span("r", "root", names.RESPOND, 95, 99),
    ]


def parts(trace: list[Span]) -> dict[str, float]:
    return {name: took / 1e6 for name, took in asdict(break_down(trace)).items() if took}


WHOLE = {
    "validation": 5,
    "tokenization": 4,
    "transit": 6 + 10 + 8,
    "device_busy": 30,
    "batch_fill": 9,
    "forward": 20,
    "postprocessing": 2,
    "response": 4,
    # 1 ms before the queue, 1 ms after the response was made.
    "unaccounted": 2,
}


def test_the_parts_do_not_depend_on_the_host_clocks() -> None:
    assert parts(request()) == WHOLE
    assert break_down(request()).latency_ns == 100_000_000


def test_duplicate_and_out_of_order_spans_count_once() -> None:
    trace = request()
    assert parts([*reversed(trace), *trace]) == WHOLE


@pytest.mark.parametrize(
    ("missing", "changed"),
    [
        # Where the stage's own span was lost, the caller still knows how long the stage held the request.
        ("t", {"tokenization": 0, "unaccounted": 2 + 10, "transit": 24 - 6}),
        ("hp", {"postprocessing": 0, "transit": 24 - 8, "unaccounted": 2 + 10}),
        ("v", {"validation": 0, "unaccounted": 2 + 5}),
        ("q", {"device_busy": 0, "batch_fill": 0, "unaccounted": 2 + 39}),
        ("f", {"forward": 0, "unaccounted": 2 + 20}),
        ("m", {"device_busy": 0, "batch_fill": 0, "forward": 0, "transit": 24 - 10, "unaccounted": 1 + 70}),
    ],
)
def test_the_time_of_a_missing_span_is_unaccounted(missing: str, changed: dict[str, float]) -> None:
    expected = {name: took for name, took in (WHOLE | changed).items() if took}
    assert parts([s for s in request() if s.span_id != missing]) == expected


def test_the_transit_to_a_replica_that_was_not_ready_is_a_cold_start() -> None:
    trace = request()
    trace[5] = replace(trace[5], attributes={"ai.model.load_type": "cold"})
    assert parts(trace) == WHOLE | {"cold_start": 10, "transit": 24 - 10}


def test_the_wait_for_a_replica_is_what_the_call_states() -> None:
    trace = request()
    trace[4] = replace(trace[4], attributes={"ai.hop.wait_ms": 7.0})
    assert parts(trace) == WHOLE | {"replica_wait": 7, "transit": 24 - 7}
    trace[5] = replace(trace[5], attributes={"ai.model.load_type": "cold"})
    assert parts(trace) == WHOLE | {"cold_start": 10, "transit": 24 - 10}
    # No more than the call took beside its stage.
    trace[4] = replace(trace[4], attributes={"ai.hop.wait_ms": 1e6})
    trace[5] = replace(trace[5], attributes={})
    assert parts(trace) == WHOLE | {"replica_wait": 10, "transit": 24 - 10}


def test_a_call_whose_replica_died_is_a_lost_attempt() -> None:
    trace = request()
    died = {"error.type": "replica_died"}
    trace[4] = span("hm", "root", names.HOP_MODEL, 40, 85)
    trace.append(span("h1", "root", names.HOP_MODEL, 15, 40, **died))
    trace[5] = span("m", "hm", names.BATCHED_PREDICT, -SKEW, -SKEW + 40)
    trace[6] = span("q", "m", names.QUEUE, -SKEW, -SKEW + 20, ai__queue__device_busy_ms=20.0)
    trace[7] = span("f", "m", names.FORWARD_PASS, -SKEW + 20, -SKEW + 40)
    changed = {"lost_attempt": 25, "transit": 6 + 5 + 8, "device_busy": 20, "unaccounted": 1}
    assert parts(trace) == {name: ms for name, ms in (WHOLE | changed).items() if name != "batch_fill"}


def test_a_request_in_two_batches_waits_only_while_neither_runs() -> None:
    trace = [
        span("root", "", names.PREDICT, 0, 100),
        span("hm", "root", names.HOP_MODEL, 0, 100),
        span("m", "hm", names.BATCHED_PREDICT, 0, 100),
        span("q1", "m", names.QUEUE, 0, 10, ai__queue__device_busy_ms=10.0),
        span("f1", "m", names.FORWARD_PASS, 10, 40),
        span("q2", "m", names.QUEUE, 0, 60, ai__queue__device_busy_ms=60.0),
        span("f2", "m", names.FORWARD_PASS, 60, 100),
    ]
    assert parts(trace) == {"device_busy": 10 + 20, "forward": 30 + 40}


def test_the_time_of_a_stage_is_capped_at_the_duration_of_its_call() -> None:
    trace = [
        span("root", "", names.PREDICT, 0, 10),
        span("ht", "root", names.HOP_TOKENIZER, 0, 10),
        span("t", "ht", names.PREPROCESS, 0, 11),
    ]
    assert parts(trace) == {"tokenization": 10}


def test_a_trace_without_a_root_is_rejected() -> None:
    with pytest.raises(NoRoot):
        break_down(request()[1:])


TIMES = st.integers(-50, 150)
NUMBERS = st.one_of(st.none(), st.floats(), st.integers(-5, 200), st.text(max_size=2))
KEYS = ["ai.hop.transit_ms", "ai.hop.wait_ms", "error.type", "ai.queue.device_busy_ms", "ai.queue.fill_wait_ms"]


@st.composite
def damaged(draw: st.DrawFn) -> list[Span]:
    spans = [span("root", "", names.PREDICT, 0, draw(st.integers(-5, 120)))]
    for number in range(draw(st.integers(0, 12))):
        name = draw(st.sampled_from([spec.name for spec in span_specs.SPANS if spec.name != names.PREDICT]))
        parent = draw(st.sampled_from(spans)).span_id
        attributes = draw(st.dictionaries(st.sampled_from(KEYS), NUMBERS))
        spans.append(span(f"s{number}", parent, name, draw(TIMES), draw(TIMES), **attributes))
    return draw(st.permutations(spans))


@given(damaged())
def test_the_parts_add_up_to_the_latency_even_for_damaged_traces(trace: list[Span]) -> None:
    root = next(s for s in trace if s.span_id == "root")
    result = break_down(trace)

    assert result.latency_ns == max(0, root.end_ns - root.start_ns)
    assert all(took >= 0 for _, took in result.parts())


@given(*[st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)))] * 2)
def test_interval_operations_match_brute_force(some: list[tuple[int, int]], cut: list[tuple[int, int]]) -> None:
    def moments(intervals: list[tuple[int, int]]) -> set[int]:
        return {moment for start, end in intervals for moment in range(start, end)}

    assert length(union(some)) == len(moments(some))
    assert moments(without(union(some), union(cut))) == moments(some) - moments(cut)
