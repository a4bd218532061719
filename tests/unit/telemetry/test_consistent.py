"""Consistent sampling: whichever threshold, a run is kept exactly if one of its requests is."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.context import Context
from opentelemetry.metrics import NoOpMeterProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON, Decision, ParentBased, TraceIdRatioBased
from opentelemetry.trace import (
    NonRecordingSpan,
    SpanContext,
    TraceFlags,
    TraceState,
    get_current_span,
    set_span_in_context,
)

from deployments.explain.traces.weights import Sample, interval_of, percentile, weight_of_request, weight_of_run
from deployments.telemetry.measures import Measures
from deployments.telemetry.sampling.consistent import ConsistentSampler, as_state, randomness, trace_of_run
from deployments.telemetry.sampling.threshold import BITS, threshold, written

TRACE_IDS = st.integers(1, 2**128 - 1)
THRESHOLDS = st.integers(0, 2**BITS - 1)


def member(trace_id: int, state: TraceState | None = None) -> SpanContext:
    return SpanContext(trace_id, 1, False, TraceFlags(TraceFlags.SAMPLED), state)


def called(trace_id: int, state: dict[str, str], *, sampled: bool = True) -> Context:
    flags = TraceFlags(TraceFlags.SAMPLED if sampled else TraceFlags.DEFAULT)
    parent = SpanContext(trace_id, 1, True, flags, TraceState(list(state.items())))
    return set_span_in_context(NonRecordingSpan(parent), Context())


@given(st.lists(TRACE_IDS, min_size=1, max_size=40), TRACE_IDS, THRESHOLDS)
def test_a_run_is_kept_exactly_if_one_of_its_requests_is(requests: list[int], own: int, at_least: int) -> None:
    trace_id, state = trace_of_run(own, [member(one, as_state(0)) for one in requests])

    kept = [one for one in requests if randomness(one, None) >= at_least]
    assert (randomness(trace_id, state) >= at_least) == bool(kept)
    assert trace_id >> BITS == own >> BITS


@given(THRESHOLDS)
def test_thresholds_are_read_as_they_are_written(at_least: int) -> None:
    assert threshold(written(at_least)) == at_least
    assert threshold(f"rv:00000000000001;{written(at_least)};x:y") == at_least


@pytest.mark.parametrize(
    ("ot", "found"),
    [("", None), ("th:", None), ("th:zz", None), ("th:000000000000000", None), ("th:0", 0), ("th:8", 1 << BITS - 1)],
)
def test_what_is_no_threshold_is_none(ot: str, found: int | None) -> None:
    assert threshold(ot) == found


def test_an_explicit_randomness_comes_before_that_of_the_trace_id() -> None:
    assert randomness(5, TraceState([("ot", "rv:00000000000009")])) == 9
    assert randomness(5, TraceState([("ot", "rv:9")])) == 5
    assert randomness(5, TraceState([("ot", "rv:zzzzzzzzzzzzzz")])) == 5


# --- the head sampler ------------------------------------------------------------------------------------------------


def test_everything_is_kept_by_default_and_says_so() -> None:
    found = ConsistentSampler(ParentBased(ALWAYS_ON), {}).should_sample(Context(), 7, "x")
    assert (found.decision, found.trace_state) == (Decision.RECORD_AND_SAMPLE, TraceState([("ot", "th:0")]))


def test_a_ratio_keeps_the_traces_of_great_randomness_and_says_the_threshold() -> None:
    environ = {"OTEL_TRACES_SAMPLER": "parentbased_traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0.25"}
    sampler = ConsistentSampler(ParentBased(TraceIdRatioBased(0.25)), environ)
    chance = random.Random(1)
    for _ in range(200):
        trace_id = chance.getrandbits(128)
        found = sampler.should_sample(Context(), trace_id, "x")
        assert (found.decision is Decision.RECORD_AND_SAMPLE) == (trace_id % 2**BITS >= 3 * 2 ** (BITS - 2))
        assert found.trace_state is not None
        assert weight_of_request({"w3c.tracestate": found.trace_state.to_header()}) == 4


def test_a_callers_decision_is_followed_and_its_state_passed_on() -> None:
    sampler = ConsistentSampler(ParentBased(ALWAYS_ON), {})
    found = sampler.should_sample(called(5, {"vendor": "1"}), 5, "x")
    assert (found.decision, found.trace_state) == (Decision.RECORD_AND_SAMPLE, TraceState([("vendor", "1")]))
    assert sampler.should_sample(called(5, {}, sampled=False), 5, "x").decision is Decision.DROP
    # The Collector would hash a trace that says nothing of its randomness.
    found = sampler.should_sample(called(5, {}), 5, "x")
    assert found.trace_state == TraceState([("ot", "rv:00000000000005")])


def test_without_a_parent_to_follow_the_threshold_replaces_that_of_the_caller() -> None:
    environ = {"OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0.5"}
    sampler = ConsistentSampler(TraceIdRatioBased(0.5), environ)
    found = sampler.should_sample(called(2**BITS - 1, {"a": "b", "ot": "th:0;rv:ffffffffffffff"}), 2**BITS - 1, "x")
    assert found.decision is Decision.RECORD_AND_SAMPLE
    assert found.trace_state is not None
    assert found.trace_state["ot"] == "th:8;rv:ffffffffffffff"
    assert found.trace_state["a"] == "b"


@pytest.mark.parametrize("name", ["always_off", "parentbased_always_off", "traceidratio"])
def test_other_samplers_decide_for_themselves(name: str) -> None:
    sampler = ConsistentSampler(ALWAYS_OFF, {"OTEL_TRACES_SAMPLER": name, "OTEL_TRACES_SAMPLER_ARG": "0"})
    assert sampler.should_sample(Context(), 7, "x").decision is Decision.DROP


# --- what a sample says of all ---------------------------------------------------------------------------------------


def test_weights_of_requests_and_runs() -> None:
    tenth = {"w3c.tracestate": f"vendor=1, ot={written(9 * 2**BITS // 10)}"}
    assert weight_of_request({}) == weight_of_run({}, 3) == 1
    assert weight_of_request(tenth) == pytest.approx(10)
    assert weight_of_request(tenth | {"ai.sampling.weight": 100}) == pytest.approx(1000)
    assert weight_of_request(tenth | {"ai.sampling.weight": 0}) == 0
    assert weight_of_run(tenth, 1) == pytest.approx(10)
    assert weight_of_run(tenth, 10) == pytest.approx(1 / (1 - 0.9**10))


@pytest.mark.parametrize("weight", [-1, float("nan"), float("inf"), 1e30, True, "10", None])
def test_what_is_no_weight_counts_for_one(weight: object) -> None:
    assert weight_of_request({"ai.sampling.weight": weight}) == 1


def test_estimates_are_right_on_average_and_intervals_hold_the_truth() -> None:
    """Of 2,000 latencies, those above 500 are all kept and a tenth of the others: 200 times."""
    chance = random.Random(3)
    values = sorted(chance.lognormvariate(4, 1) for _ in range(2_000))
    whole = [(value, 1.0) for value in values]
    counts, held = [], dict.fromkeys((0.5, 0.9, 0.99), 0)
    for _ in range(200):
        kept = [(value, 1.0 if value > 500 else 10.0) for value in values if value > 500 or chance.random() < 0.1]
        counts.append(sum(weight for _, weight in kept))
        for share in held:
            least, most = interval_of(kept, share)
            held[share] += least <= percentile(whole, share) <= most
    assert sum(counts) / len(counts) == pytest.approx(2_000, rel=0.01)
    assert all(count >= 180 for count in held.values()), held


def numbered(kept: list[tuple[int, float]]) -> Sample:
    sample = Sample()
    for number, weight in kept:
        sample.add(weight)
        sample.add_number(("ingress", "model"), number, weight)
    sample.conclude()
    return sample


def test_weights_are_made_to_add_up_to_what_was_counted() -> None:
    # 100 that were slow and kept for sure, 95 instead of 90 of the 900 others.
    found = numbered([(n * 10 + 1, 1.0) for n in range(100)] + [(n * 10 + 2, 10.0) for n in range(94)] + [(1000, 10.0)])
    assert found.counted == pytest.approx(1000, rel=0.01)
    assert found.missing == 0
    assert 100 + 95 * 10 * found.factor == pytest.approx(found.counted)
    assert found.interval() == (found.counted, found.counted)


def test_many_ingresses_with_few_requests_each_are_counted_without_bias() -> None:
    chance = random.Random(8)
    sample, there = Sample(), 0
    for ingress in range(200):
        for number in range(1, 101):
            there += 1
            if chance.random() < 0.1:
                sample.add(10.0)
                sample.add_number((f"{ingress}", "model"), number, 10.0)
    sample.conclude()
    assert sample.counted == pytest.approx(there, rel=0.02)
    assert sample.missing == 0


def test_what_is_missing_beyond_chance_is_counted() -> None:
    whole = numbered([(n, 1.0) for n in range(1, 1001)])
    assert (whole.missing, whole.is_sample, whole.says_nothing) == (0, False, False)
    lost = numbered([(n, 1.0) for n in range(1, 1001) if not 400 <= n < 450])
    assert (lost.missing, lost.says_nothing) == (50, False)
    silent = numbered([(n, 1.0) for n in range(1, 1001, 7)])
    assert silent.says_nothing
    sampled = numbered([(n, 10.0) for n in range(1, 1001, 10) if not 400 <= n < 900])
    assert sampled.missing == pytest.approx(500, abs=40)
    assert not sampled.says_nothing


@pytest.mark.parametrize(
    ("trace_id", "state", "special", "found"),
    [
        (2**BITS - 1, {"ot": "th:0"}, False, True),
        (2**BITS // 2, {"ot": "th:0"}, False, False),
        (2**BITS // 2, {"ot": "th:0"}, True, True),
        (2**BITS // 2, {"ot": "th:0;rv:ffffffffffffff"}, False, True),
        # A caller's, which the Collector hashes.
        (2**BITS - 1, {"vendor": "1"}, False, False),
    ],
)
def test_exemplars_are_of_traces_that_the_collector_keeps(
    trace_id: int, state: dict[str, str], special: bool, found: bool
) -> None:
    context = member(trace_id, TraceState(list(state.items())))
    for is_sampled_later in (False, True):
        meter = NoOpMeterProvider().get_meter("test")
        measures = Measures(meter, "ingress", "model", is_sampled_later=is_sampled_later)
        exemplar = measures.exemplar(context, is_special=special)
        assert get_current_span(exemplar).get_span_context().is_valid == (found or not is_sampled_later)
