"""Why generations were slow: in virtual time, with the real planner and the real records."""

from __future__ import annotations

import functools
import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.explain.render.text import as_json
from deployments.explain.render.waterfall import waterfall
from deployments.explain.requests.capture import segment_of
from deployments.explain.requests.parts import parts_of, usual_of
from deployments.explain.requests.steps import fit_steps
from deployments.explain.token_gaps import token_gaps
from deployments.explain.traces.otlp import Span
from deployments.telemetry import names
from tests.support.generations import DECODE_MS, PREFILL_MS, STEP_MS, Asked, at_random, chats, ordered, simulate
from tests.unit.explain.test_verdict import read, verdict

CASES = {
    "prefill_interference": lambda: simulate(
        ordered(chats(200, 200.0), [Asked(1000.0 + 4000 * i, prompt=6000, output=2) for i in range(3)])
    ),
    "kv_cache_full": lambda: simulate(
        ordered(chats(200, 150.0), [Asked(4000.0, prompt=400, output=200), Asked(18_000.0, prompt=400, output=200)]),
        cache_tokens=640,
    ),
    "decode_batch": lambda: simulate(ordered(chats(150, 400.0), chats(28, 0.0, output=40))),
    "long_output": lambda: simulate(ordered(chats(200, 500.0), chats(10, 9000.0, output=400))),
    "long_prompt": lambda: simulate(ordered(chats(200, 800.0), chats(10, 15_900.0, prompt=3000))),
    "slow_reader": lambda: simulate(ordered(chats(200, 500.0), chats(10, 9000.0, reader_ms=3000.0))),
    "device_contention": lambda: simulate(ordered(at_random(400, 300.0), chats(6, 19_900.0, disturbed_ms=60.0))),
}


@pytest.mark.parametrize("cause", CASES)
def test_the_cause_comes_first(cause: str) -> None:
    found = verdict(CASES[cause]())
    assert [finding.cause for finding in found.findings][:1] == [cause]


@pytest.mark.parametrize("every_ms", [2000.0, 500.0, 250.0])
def test_nothing_is_found_where_all_is_as_usual(every_ms: float) -> None:
    assert verdict(simulate(chats(200, every_ms))).findings == []


@pytest.mark.parametrize("cause", CASES)
def test_the_parts_add_up_to_the_latency(cause: str) -> None:
    found = read(CASES[cause]())
    for request, parts in zip(found.requests, parts_of(found, usual_of(found)), strict=True):
        assert sum(parts.values()) == pytest.approx(request.latency_ns / 1e6, abs=1e-6)
        assert min(parts.values()) > -1e-6
        assert parts["unaccounted"] < 1e-3


def test_the_cost_of_a_step_is_found_in_the_segments() -> None:
    fit = fit_steps(read(CASES["prefill_interference"]()).segments.values())
    assert fit is not None
    assert fit.step_ms == pytest.approx(STEP_MS, rel=0.1)
    assert fit.decode_ms == pytest.approx(DECODE_MS, rel=0.2)
    assert fit.prefill_ms == pytest.approx(PREFILL_MS, rel=0.1)


def test_the_account_of_one_request() -> None:
    found = read(simulate([Asked(0.0, prompt=10, output=41), Asked(50.0, prompt=400, output=2)]))
    parts = parts_of(found, usual_of(found))[0]
    assert parts["own_prefill"] == pytest.approx(STEP_MS + 10 * PREFILL_MS)
    assert parts["others_prefill"] == pytest.approx(400 * PREFILL_MS)
    assert parts["decode"] == pytest.approx(40 * (STEP_MS + DECODE_MS))
    # One step beside the other's second token.
    assert parts["decode_neighbours"] == pytest.approx(DECODE_MS)


def test_how_busy_the_device_was_is_said() -> None:
    found = verdict(simulate(ordered(at_random(150, 600.0), chats(60, 0.0, output=20)), max_sequences=4))
    queue = next(finding for finding in found.findings if finding.cause == "device_queue")
    assert "the model's devices were busy 100% of that time" in "".join(map(str, queue.fix.pieces))


def test_there_are_few_segments_and_all_link_both_ways() -> None:
    spans = CASES["prefill_interference"]()
    segments = {span.key: span for span in spans if span.name == names.SEGMENT}
    tokens = sum(int(span.attributes["ai.decode.tokens"]) for span in spans if span.name == names.DECODE)
    assert len(segments) < tokens / 3
    generates = {span.key: span for span in spans if span.name == names.GENERATE}
    by_parent = {span.parent_id: span for span in spans if span.name == names.DECODE}
    for generate in generates.values():
        for link in by_parent[generate.span_id].links:
            assert generate.key in segments[link].links


def test_the_longest_step_names_whose_prompt_it_computed() -> None:
    spans = simulate([Asked(0.0, prompt=10, output=41), Asked(50.0, prompt=400, output=2)])
    roots = sorted((span for span in spans if span.name == names.PREDICT), key=lambda span: span.start_ns)
    own = [span for span in spans if span.trace_id == roots[0].trace_id]
    links = {link for span in own for link in span.links}
    lines = list(waterfall(own, [span for span in spans if span.key in links]))
    at = next(number for number, line in enumerate(lines) if "longest steps" in line)
    assert "222.00 ms" in lines[at + 1]
    assert "400 tokens of prompts in 1 step" in lines[at + 1]
    assert f"prompt of slowlens trace {roots[1].trace_id}" in lines[at + 2]


def test_a_late_token_is_named_with_whose_prompt_made_it_late() -> None:
    spans = simulate([Asked(0.0, prompt=10, output=41), Asked(50.0, prompt=400, output=2)])
    roots = sorted((span for span in spans if span.name == names.PREDICT), key=lambda span: span.start_ns)
    own = [span for span in spans if span.trace_id == roots[0].trace_id]
    segments = [span for span in spans if span.name == names.SEGMENT]
    (gap,) = token_gaps(own, {span.key: segment_of(span) for span in segments})
    # The first token comes after 25 ms, the next after 22; the third's step has the other's prompt in it.
    assert (gap.token, gap.prompt_tokens, gap.prompts_of) == (4, 400, (roots[1].trace_id,))
    assert gap.gap_ms == pytest.approx(STEP_MS + DECODE_MS + 400 * PREFILL_MS)
    assert gap.usual_ms == pytest.approx(STEP_MS + DECODE_MS)
    said = "token 4 waited 222 ms, usually 22: 200 ms for 400 tokens of the prompt of slowlens trace"
    assert list(waterfall(own, segments))[-1] == f"  {said} {roots[1].trace_id}"


def test_a_token_that_waited_for_a_place_in_the_cache_says_so() -> None:
    two = [Asked(0.0, prompt=200, output=200), Asked(5.0, prompt=200, output=200)]
    spans = simulate(two, cache_tokens=512, reserve=0.1)
    (lost,) = (span for span in spans if span.name == names.PREEMPTED)
    own = [span for span in spans if span.trace_id == lost.trace_id]
    gaps = token_gaps(own, {span.key: segment_of(span) for span in spans if span.name == names.SEGMENT})
    longest = max(gaps, key=lambda gap: gap.gap_ms)
    assert longest.preempted_ms == pytest.approx(lost.ms)
    assert str(longest).endswith(f": {lost.ms:.0f} ms without its place in the KV cache")


def test_the_verdict_names_the_longest_waits_for_tokens() -> None:
    found = verdict(CASES["prefill_interference"]())
    document = json.loads(as_json(found))
    long = {request.trace_id for request in found.capture.requests if request.tokens == 6000}
    assert document["slow_tokens"]
    for gap in document["slow_tokens"]:
        # Chunks of the prompts of 6,000 tokens.
        assert gap["prompt_tokens"] > 400
        assert gap["gap_ms"] > gap["usual_ms"]
        assert long & set(gap["prompts_of"])


FIRST_TOKENS = {
    "prefill_interference": lambda: simulate(
        ordered(chats(200, 500.0), [Asked(10_001.0, prompt=200) for _ in range(10)]), max_batch_tokens=4096
    ),
    "kv_cache_full": CASES["kv_cache_full"],
    "long_prompt": CASES["long_prompt"],
}


@pytest.mark.parametrize("cause", FIRST_TOKENS)
def test_the_time_to_the_first_token_has_causes_of_its_own(cause: str) -> None:
    found = verdict(FIRST_TOKENS[cause]()).first_token
    assert found is not None
    assert [finding.cause for finding in found.findings][:1] == [cause]
    for one in found.answered:
        assert one.request.generation is not None
        assert sum(one.parts.values()) == pytest.approx(one.request.generation.first_token_ms)
        assert min(one.parts.values()) >= 0
        assert one.parts["decode"] == one.parts["slow_reader"] == 0


@pytest.mark.parametrize("cause", ["long_output", "slow_reader"])
def test_what_follows_the_first_token_does_not_delay_it(cause: str) -> None:
    found = verdict(CASES[cause]())
    assert found.first_token is not None
    assert cause not in [finding.cause for finding in found.first_token.findings]
    document = json.loads(as_json(found))
    assert document["first_token"]["latency_ms"]["p50"] < document["latency_ms"]["p50"]


@given(st.sampled_from(sorted(CASES)), st.integers(0, 2**32), st.floats(0, 0.5))
@settings(max_examples=15)
def test_the_parts_add_up_even_where_spans_are_missing(cause: str, seed: int, lost: float) -> None:
    chance = random.Random(seed)
    spans = [one for one in made(cause) if one.name == names.PREDICT or chance.random() >= lost]
    found = read(spans)
    for request, parts in zip(found.requests, parts_of(found, usual_of(found)), strict=True):
        assert sum(parts.values()) == pytest.approx(request.latency_ns / 1e6, abs=1e-6)
        assert min(parts.values()) > -1e-6
    verdict(spans)


@functools.cache
def made(cause: str) -> list[Span]:
    return CASES[cause]()
