"""Verdicts on synthetic traces: the correct cause first, and no finding where nothing is unusual."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deployments.cli.main import main
from deployments.explain.render.text import fix_text
from deployments.explain.requests.capture import Capture, capture
from deployments.explain.requests.parts import PARTS, RunFit, fit_runs, parts_of, usual_of
from deployments.explain.requests.pattern import clock
from deployments.explain.traces.otlp import Span
from deployments.explain.traces.survey import Root, survey
from deployments.explain.verdict import Verdict, judge
from deployments.telemetry import names
from tests.support.made import CASES, RUN_MS, TOKEN_MS, otlp, request, span, window


def read(spans: Sequence[Span], since_ns: int = 0, slowest: float = 0.05) -> Capture:
    roots = (Root.of(one) for one in spans if one.name == names.PREDICT)
    chosen = survey(roots, slowest, since_ns)
    return capture([one for one in spans if chosen.wants(one.name, one.trace_id)], chosen)


def verdict(spans: Sequence[Span]) -> Verdict:
    return judge(read(spans))


@pytest.mark.parametrize("cause", CASES)
def test_the_correct_cause_and_no_other(cause: str) -> None:
    found = verdict(window(CASES[cause]))
    assert [finding.cause for finding in found.findings] == [cause]
    (finding,) = found.findings
    assert finding.share_of_excess > 0.8
    assert finding.requests == 12
    # The evidence comes from requests that were slow in this way.
    assert {int(trace_id, 16) % 12 for trace_id, _ in finding.evidence} == {3}


@pytest.mark.parametrize("cause", CASES)
def test_lost_spans_are_reported_but_do_not_change_the_cause(cause: str) -> None:
    spans = window(CASES[cause])
    chance = random.Random(1)
    left = [one for one in spans if chance.random() > 0.03 or one.name == names.PREDICT]
    found = verdict([*left, *left[::10]])
    assert found.findings[0].cause == cause
    assert [finding.cause for finding in found.findings[1:]] == ["telemetry_loss"]


def test_requests_cut_off_by_the_edges_of_the_window_are_not_incomplete() -> None:
    spans = window({"busy": 400.0}, every=1)
    root = next(one for one in spans if one.name == names.PREDICT and int(one.trace_id, 16) == 120)
    since_ns = (root.start_ns + root.end_ns) // 2
    last = f"{239:032x}"
    found = read([one for one in spans if one.trace_id != last or one.name != names.PREDICT], since_ns)
    # At that time 119 has finished and 120 is in progress; 239 has not ended yet.
    assert [int(request.trace_id, 16) for request in found.requests] == list(range(120, 239))
    assert found.incomplete == 0
    assert len(found.runs) == 119


def queued(arrivals_ms: Sequence[float], tokens: Sequence[int], **slow: Any) -> list[Span]:
    """Requests that run one by one, in order of arrival, on a device that they wait for."""
    spans: list[Span] = []
    free_at = 0.0
    for number, (at, size) in enumerate(zip(arrivals_ms, tokens, strict=True)):
        took = RUN_MS + TOKEN_MS * size
        # As ``request`` has it: its upload, the tokenizer there and back, and the way to the model.
        at_model = at + 1.0 + 1.0 + 0.5 + 1.0 + 1.0
        busy = max(0.0, free_at - at_model)
        free_at = at_model + busy + took
        spans += request(number, at, tokens=size, busy=busy, chars=4 * size, **slow)
    return [one_by_one(one) for one in spans]


def one_by_one(span: Span) -> Span:
    """The span of a process that is set to run no batches."""
    return replace(span, resource={**span.resource, "slowlens.batching.max_batch_size": 1})


def at_random(rate_per_s: float, count: int, seed: int) -> list[float]:
    chance, at, found = random.Random(seed), 0.0, []
    for _ in range(count):
        at += chance.expovariate(rate_per_s / 1000)
        found.append(at)
    return found


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("busy", [0.2, 0.4, 0.6, 0.7, 0.8])
def test_what_random_arrivals_wait_is_no_finding(busy: float, seed: int) -> None:
    # A run of 10 tokens takes 9 ms.
    arrivals = at_random(busy * 1000 / 9.0, 800, seed)
    assert [finding.cause for finding in verdict(queued(arrivals, [10] * 800)).findings] == []


@pytest.mark.parametrize("seed", range(2))
def test_a_burst_is_more_than_chance(seed: int) -> None:
    arrivals = at_random(30.0, 800, seed)
    arrivals = sorted([*arrivals, *(arrivals[400] + number for number in range(40))])
    assert [finding.cause for finding in verdict(queued(arrivals, [10] * 840)).findings] == ["device_queue"]


@pytest.mark.parametrize("seed", range(2))
def test_who_waits_behind_a_long_input_waits_for_that(seed: int) -> None:
    arrivals = at_random(30.0, 800, seed)
    chance = random.Random(seed)
    tokens = [500 if chance.random() < 0.03 else chance.randint(5, 15) for _ in arrivals]
    found = verdict(queued(arrivals, tokens))
    assert found.findings[0].cause == "long_input"
    assert "device_queue" not in [finding.cause for finding in found.findings]
    assert "waited behind the inputs of others" in found.findings[0].summary
    for one in found.answered:
        assert sum(one.parts.values()) == pytest.approx(one.request.latency_ns / 1e6)
        assert min(one.parts.values()) > -1e-6


def with_inputs(spans: Sequence[Span], tokens: int, inputs: int) -> list[Span]:
    """Requests with so many tokens have so many inputs, and so have their runs."""
    large = {one.trace_id for one in spans if one.attributes.get("gen_ai.usage.input_tokens") == tokens}
    return [
        replace(one, attributes=one.attributes | {"ai.input_count": inputs if one.trace_id in large else 1})
        if one.name == names.PREDICT
        else replace(one, attributes=one.attributes | {"ai.batch.actual_size": inputs})
        if one.name == names.BATCH_FORWARD and one.attributes["ai.batch.tokens"] == tokens
        else one
        for one in spans
    ]


def test_who_waits_behind_a_request_of_many_short_inputs_waits_for_that() -> None:
    arrivals = at_random(30.0, 800, 1)
    chance = random.Random(1)
    tokens = [480 if chance.random() < 0.03 else chance.randint(5, 15) for _ in arrivals]
    found = verdict(with_inputs(queued(arrivals, tokens), 480, 40))
    assert [finding.cause for finding in found.findings] == ["long_input"]
    fix = fix_text(found.findings[0])
    assert "40 inputs and 480 tokens (medians; usual are 1 and 10)" in fix
    assert "limits.max_inputs: 20" in fix


def test_the_batch_mates_of_a_large_request_lost_their_time_to_it() -> None:
    # Each slow request ran together with one other, of 400 tokens.
    spans = [
        replace(one, attributes=one.attributes | {"ai.batch.requests": 2})
        if one.name == names.BATCH_FORWARD and one.attributes["ai.batch.tokens"] > 100
        else one
        for one in window({"batch_mates": 400})
    ]
    assert [finding.cause for finding in verdict(spans).findings] == ["long_input"]
    # With 40 others of ten tokens each, they had more of the ordinary to do.
    spans = [
        replace(one, attributes=one.attributes | {"ai.batch.requests": 41})
        if "ai.batch.requests" in one.attributes
        else one
        for one in spans
    ]
    assert [finding.cause for finding in verdict(spans).findings] == ["device_queue"]


def test_a_device_that_is_always_busy_in_small_batches_is_healthy() -> None:
    # Whoever waits runs together: the device hardly rests, and could do four times as much in full batches.
    arrivals, at, spans = at_random(130.0, 1500, 3), 0, list[Span]()
    free_at = busy = 0.0
    while at < len(arrivals):
        begins = max(free_at, arrivals[at] + 4.5)
        batch = [n for n in range(at, min(at + 32, len(arrivals))) if arrivals[n] + 4.5 <= begins]
        took = 20.0 + 0.05 * 10 * len(batch)
        for n in batch:
            spans += with_run(request(n, arrivals[n], busy=begins - arrivals[n] - 4.5), f"{at}", took, len(batch))
        at, free_at, busy = at + len(batch), begins + took, busy + took
    assert busy / free_at > 0.9
    assert [finding.cause for finding in verdict(spans).findings] == []


def with_run(spans: Iterable[Span], run: str, took: float, size: int) -> Iterator[Span]:
    """A request whose run took so long, and had so many inputs."""
    for one in spans:
        if one.name == names.BATCH_FORWARD:
            sizes = {"ai.batch.actual_size": size, "ai.batch.requests": size}
            tokens = {"ai.batch.tokens": 10 * size, "ai.batch.padded_tokens": 10 * size}
            ends = one.start_ns + round(took * 1e6)
            yield replace(one, trace_id=f"run {run}", end_ns=ends, attributes=one.attributes | sizes | tokens)
            continue
        # What follows the run follows it later.
        moved = round((took - RUN_MS - 10 * TOKEN_MS) * 1e6)
        links = tuple((f"run {run}", "b") for _ in one.links)
        grows = one.name in (names.FORWARD_PASS, names.BATCHED_PREDICT, names.HOP_MODEL, names.PREDICT)
        later = one.name in (names.HOP_POSTPROCESSOR, names.POSTPROCESS, names.RESPOND)
        yield replace(
            one,
            start_ns=one.start_ns + (moved if later else 0),
            end_ns=one.end_ns + (moved if later or grows else 0),
            links=links,
        )


def test_who_waits_behind_a_slow_run_waits_for_what_slowed_it() -> None:
    arrivals = at_random(30.0, 800, 1)
    spans: list[Span] = []
    free_at = 0.0
    for number, at in enumerate(arrivals):
        slow = 150.0 if number % 60 == 59 else 0.0
        busy = max(0.0, free_at - at - 4.5)
        free_at = at + 4.5 + busy + RUN_MS + TOKEN_MS * 10 + slow
        spans += request(number, at, busy=busy, contention=slow)
    found = [finding.cause for finding in verdict(spans).findings]
    assert found == ["device_contention"]


def test_a_healthy_window_has_no_findings() -> None:
    found = verdict(window({}))
    assert found.findings == []
    assert found.note.startswith("nothing is unusual")


def test_constantly_long_work_is_not_a_cause_but_constant_waiting_is() -> None:
    assert verdict(window({"postprocess": 60.0}, every=1)).findings == []
    found = verdict([one for number in range(100) for one in request(number, number * 250.0, fill=200.0)])
    assert [finding.cause for finding in found.findings] == ["batch_fill"]
    assert fix_text(found.findings[0]).startswith("batching.max_wait_ms: 200 -> 0")


def test_two_simultaneous_causes_are_both_reported() -> None:
    found = verdict(window({"busy": 100.0, "upload": 60.0}))
    assert [finding.cause for finding in found.findings] == ["device_queue", "slow_upload"]


def test_waiting_while_padding_is_computed_counts_as_padding() -> None:
    spans: list[Span] = []
    for number in range(240):
        at_ms = number * 1000.0
        if number % 12 == 3:
            # A run of 5 + 5 tokens and 390 of padding, 204 ms long, begins as this request reaches the model.
            spans += request(number, at_ms, busy=204.0, tokens=10)
            begun = next(one.start_ns for one in spans if one.key == (f"{number:032x}", "q"))
            other = span(f"{number:x}".zfill(32).replace("0", "e", 8), "b", "", names.BATCH_FORWARD, "model", 0, 204.0)
            numbers = {"ai.batch.actual_size": 2, "ai.batch.tokens": 10, "ai.batch.padded_tokens": 400}
            spans.append(replace(other, start_ns=begun, end_ns=begun + 204_000_000, attributes=numbers))
        else:
            spans += request(number, at_ms, tokens=5 + number % 11)
    found = verdict(spans)
    assert [finding.cause for finding in found.findings] == ["padding"]
    # All but the 4 ms of a run and the 5 ms of its ten tokens.
    assert found.findings[0].evidence[0][1] == pytest.approx(204 - 9, abs=1)
    assert sum(found.answered[-1].parts.values()) == pytest.approx(found.answered[-1].request.latency_ns / 1e6)


def test_a_small_cause_that_dominates_some_requests_is_reported_beside_a_large_one() -> None:
    spans = [
        one
        for number in range(240)
        for one in request(
            number,
            number * 250.0,
            **({"upload": 1500.0} if number % 24 == 3 else {"busy": 80.0} if number % 24 == 15 else {}),
        )
    ]
    found = judge(read(spans, slowest=0.08))
    assert [finding.cause for finding in found.findings] == ["slow_upload", "device_queue"]
    assert found.findings[1].share_of_excess < 0.07


def decision(at_ms: float, **more: Any) -> Span:
    """A policy decision to add model replicas."""
    stated = {"from_replicas": 1, "to_replicas": 3, "needed_replicas": 3, "max_replicas": 4} | more
    attributes: dict[str, Any] = {f"ai__autoscaling__{key}": value for key, value in stated.items()}
    return span("d" * 32, "d", "", names.SCALING_DECISION, "autoscaler", at_ms, 1, ai__autoscaling__deployment="Model",
                **attributes)  # fmt: skip


def load_of_model(at_ms: float, took_ms: float) -> Span:
    return span("e" * 32, "l", "", names.MODEL_LOAD, "model-2", at_ms, took_ms)


SETTINGS = {
    "slowlens.deployments.Model.autoscaling_config.min_replicas": 1,
    "slowlens.deployments.Model.autoscaling_config.max_replicas": 4,
}


def scaled(spans: Sequence[Span]) -> list[Span]:
    return [replace(s, resource={**s.resource, **SETTINGS}) if s.service == "slowlens.model" else s for s in spans]


def test_waiting_for_the_first_replica_suggests_keeping_one() -> None:
    least = "deployments.Tokenizer.autoscaling_config.min_replicas"
    spans = window(CASES["replica_queue"])
    (finding,) = verdict([replace(s, resource={**s.resource, f"slowlens.{least}": 0}) for s in spans]).findings

    assert fix_text(finding).startswith(f"keep a replica of the Tokenizer deployment running: {least}: 0 -> 1")


@pytest.mark.parametrize("cause", ["device_queue", "cold_start"])
def test_late_scaling_is_reported_with_the_reaction_and_warm_up_times(cause: str) -> None:
    spans = scaled(window(CASES[cause]))
    (finding,) = verdict([*spans, decision(9_000), load_of_model(9_500, 20_000)]).findings

    seen, warm = (clock_at(spans, ms) for ms in (9_001, 29_500))
    said = f"; scaled late: the policy reacted at {seen} (1 -> 3 replicas), the first was warm at {warm}"
    assert said in finding.summary
    assert "deployments.Model.autoscaling_config.min_replicas: 1 -> " in fix_text(finding)


def clock_at(spans: Sequence[Span], ms: float) -> str:
    (first,) = (one for one in spans if one.name == names.PREDICT and int(one.trace_id, 16) == 0)
    return clock(first.start_ns + int(ms * 1e6))


def test_replicas_that_never_became_warm_are_reported() -> None:
    spans = scaled(window(CASES["device_queue"]))
    (finding,) = verdict([*spans, decision(9_000)]).findings

    assert finding.summary.endswith("(1 -> 3 replicas), and none of them was warm by the end of the window")


def test_replicas_ordered_before_the_requests_arrived_count() -> None:
    """A model load that began before the decision does not belong to it."""
    spans = scaled(window(CASES["device_queue"]))
    earlier = load_of_model(-50_000, 60_000)
    (finding,) = verdict([*spans, decision(-30_000), earlier, load_of_model(-25_000, 45_000)]).findings

    seen, warm = (clock_at(spans, ms) for ms in (-29_999, 20_000))
    assert f"the policy reacted at {seen} (1 -> 3 replicas), the first was warm at {warm}" in finding.summary


def test_a_limit_reached_a_minute_earlier_is_reported() -> None:
    spans = scaled(window(CASES["device_queue"]))
    at_limit = decision(-50_000, from_replicas=4, to_replicas=4, needed_replicas=9)
    (finding,) = verdict([*spans, at_limit]).findings

    assert "the policy needed 9 replicas, but max_replicas is 4" in finding.summary


def test_a_limit_that_is_too_low_is_reported() -> None:
    spans = scaled(window(CASES["device_queue"]))
    at_limit = decision(9_000, from_replicas=4, to_replicas=4, needed_replicas=9)
    (finding,) = verdict([*spans, at_limit]).findings

    assert f"; not scaled: at {clock_at(spans, 9_001)} the policy needed 9 replicas, but max_replicas is 4" in (
        finding.summary
    )
    assert "deployments.Model.autoscaling_config.max_replicas: 4 -> 5" in fix_text(finding)


def test_decisions_at_other_times_or_for_other_deployments_are_ignored() -> None:
    spans = scaled(window(CASES["device_queue"]))
    other = replace(decision(9_000), attributes={**decision(9_000).attributes, "ai.autoscaling.deployment": "Ingress"})
    fewer = decision(9_000, from_replicas=3, to_replicas=1)
    (finding,) = verdict([*spans, decision(-60_000), other, fewer]).findings

    assert "scaled" not in finding.summary


@pytest.mark.parametrize(("slow", "named"), [({"there": 300.0}, []), ({"cold": 900.0}, ["cold_start"])])
def test_one_slow_request_is_ignored_unless_its_trace_states_why(slow: dict[str, Any], named: list[str]) -> None:
    assert [finding.cause for finding in verdict(window(slow, every=60, count=60)).findings] == named


def test_several_requests_in_one_trace_are_counted_separately() -> None:
    spans = window(CASES["tokenization"])
    together = [replace(one, trace_id="f" * 32) if int(one.trace_id, 16) < 10**6 else one for one in spans]
    # Ids are unique within the one trace, and parents and links follow.
    renamed = [
        replace(
            one,
            span_id=f"{of.trace_id}-{one.span_id}",
            parent_id=f"{of.trace_id}-{one.parent_id}" if one.parent_id else "caller",
        )
        if one.trace_id == "f" * 32
        else one
        for one, of in zip(together, spans, strict=True)
    ]
    found = verdict(renamed)
    assert found.capture.survey.requests == 240
    assert [finding.cause for finding in found.findings] == ["tokenization"]
    assert {trace_id for trace_id, _ in found.findings[0].evidence} == {"f" * 32}
    assert found.capture.incomplete == 0


def test_missing_stage_spans_are_reported() -> None:
    spans = [one for one in window({}) if one.name != names.PREPROCESS or int(one.trace_id, 16) % 10]
    found = verdict(spans)
    # The spans of the last requests may not have arrived yet.
    assert 20 <= found.capture.incomplete <= 24
    assert [finding.cause for finding in found.findings] == ["telemetry_loss"]


def test_fixes_name_the_setting_with_its_current_and_suggested_value() -> None:
    settings = {
        "slowlens.deployments.Model.autoscaling_config.max_replicas": 2,
        "slowlens.batching.grouping_window": 128,
        "slowlens.limits.max_input_chars": 200_000,
    }
    fixes = {}
    for cause in ("device_queue", "padding", "tokenization"):
        slow = CASES[cause] | ({"chars": 90_000} if cause == "tokenization" else {})
        spans = [replace(one, resource={**one.resource, **settings}) for one in window(slow)]
        fixes[cause] = fix_text(verdict(spans).findings[0])
    # One replica ran, and the policy had not asked for a second: it is no limit that held it back.
    assert "deployments.Model.autoscaling_config.min_replicas: 2" in fixes["device_queue"]
    assert "batching.max_batch_tokens: 8192 -> 4096" in fixes["padding"]
    assert "limits.max_input_chars: 200000 -> 50000" in fixes["tokenization"]
    assert "at best p99 111 -> 23 ms" in fixes["tokenization"]


def test_too_few_requests_are_reported_as_such() -> None:
    found = verdict(list(itertools.chain(*(request(number, number * 250.0, busy=900.0) for number in range(10)))))
    assert found.findings == []
    assert found.note == "10 answered requests are too few to tell slow from ordinary; 20 are needed"


def test_failures_are_a_cause_but_invalid_input_is_not() -> None:
    spans = window({"error": "replica_died", "there": 400.0}, every=40)
    (finding,) = verdict(spans).findings
    assert (finding.cause, finding.requests) == ("errors_retries", 6)
    assert "6 of 240 requests failed (replica_died 6)" in finding.summary
    assert "more than once" not in finding.summary
    assert verdict(window({"error": "invalid_field"})).findings == []


def test_requests_that_failed_and_requests_that_were_sent_again_are_one_finding() -> None:
    spans = window({"attempt": 80.0})
    for number in range(240, 246):
        spans += request(number, number * 250.0, error="replica_died")
    (finding,) = (one for one in verdict(spans).findings if one.cause == "errors_retries")
    assert finding.requests > 6 + 10
    assert finding.summary.startswith("6 of 246 requests failed (replica_died 6)")
    assert "; 12 of 12 slow requests spent 80 ms more" in finding.summary
    assert "on replicas that died before they replied, until the call was sent to another" in finding.summary


def test_retried_failures_are_identified_by_their_request_id() -> None:
    spans = window({})
    for number in range(300, 304):
        spans += request(number, number * 200.0, error="queue_full", id=f"again-{number}")
        spans += request(number + 100, number * 200.0 + 50, id=f"again-{number}" if number < 303 else "once")
    (finding,) = verdict(spans).findings
    assert finding.cause == "errors_retries"
    assert finding.summary.startswith("4 of 248 requests failed (queue_full 4), 3 of them were sent more than once")
    assert "a longer queue (batching.max_queue: 2048)" in fix_text(finding)


def test_the_parts_add_up_to_the_latency() -> None:
    found = read(window(CASES["padding"] | CASES["transit"]))
    for one, parts in zip(found.requests, parts_of(found, usual_of(found)), strict=True):
        assert sum(parts.values()) == pytest.approx(one.latency_ns / 1e6)
        assert set(parts) == set(PARTS)
        assert all(ms > -1e-9 for ms in parts.values())


def test_the_run_cost_fit_is_robust_to_slow_runs() -> None:
    found = read(window({"contention": 300.0}, every=4))
    fit = fit_runs(found.runs.values())
    assert fit is not None
    assert fit.run_ms == pytest.approx(RUN_MS, rel=0.05)
    assert fit.token_ms == pytest.approx(TOKEN_MS, rel=0.05)
    assert fit_runs([]) is None
    assert fit.ms(10) == pytest.approx(RunFit(RUN_MS, TOKEN_MS).ms(10), rel=0.05)


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path: Path) -> str:
    path = tmp_path / "traces.jsonl"
    path.write_text(otlp(window(CASES["tokenization"], count=120)))
    return str(path)


def test_json_has_the_documented_fields(store: str, tmp_path: Path) -> None:
    target = tmp_path / "verdict.json"
    assert main(["why", "--source", store, "--format", "json", "-o", str(target)]) == 0
    found = json.loads(target.read_text())

    assert {key: type(value).__name__ for key, value in found.items()} == {
        "schema": "int",
        "window": "dict",
        "requests": "int",
        "sampling": "dict",
        "models": "dict",
        "incomplete": "int",
        "errors": "dict",
        "latency_ms": "dict",
        "stages": "list",
        "findings": "list",
        "unaccounted_share": "float",
    }
    assert (found["schema"], found["requests"], found["incomplete"], found["errors"]) == (1, 120, 0, {})
    assert found["window"] == {"from": "2001-09-09T01:46:40.000Z", "to": "2001-09-09T01:47:09.768Z"}
    assert list(found["latency_ms"]) == ["p50", "p90", "p95", "p99", "max"]
    assert [stage["stage"] for stage in found["stages"]] == list(PARTS)
    assert sum(stage["share_of_total"] for stage in found["stages"]) == pytest.approx(1, abs=0.002)
    (finding,) = found["findings"]
    assert set(finding) == {"cause", "share_of_excess", "requests", "summary", "fix", "evidence"}
    assert finding["cause"] == "tokenization"
    assert finding["evidence"][0]["value_ms"] == pytest.approx(89.5)


def test_text_has_the_cause_the_fix_and_example_traces(store: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["why", "--source", store]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("120 requests in 30 s, 01:46:40Z to 01:47:09Z\nlatency: p50 ")
    assert "\n1. tokenization (9" in printed
    assert "6 of 6 slow requests spent 90 ms more than usual (median; worst 90 ms) in the tokenizer\n" in printed
    assert "\n   fix: inputs of up to 40 characters: " in printed
    assert "\n   slowlens trace 0000" in printed


def test_since_excludes_older_requests(store: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["why", "--source", store, "--since", "15m"]) == 1
    assert "there is no request in these traces" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["--since", "15"], ["--since", "0m"], ["--slowest", "0%"], ["--slowest", "x"], ["--format", "xml"]]
)
def test_an_invalid_argument_is_named(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["why", *arguments])
    assert stop.value.code == 2
    assert repr(arguments[1]) in capsys.readouterr().err


def hindered(spans: Sequence[Span], **attributes: float) -> list[Span]:
    """Every slow request was hindered so in its model replica."""
    slow = {one.trace_id for one in spans if one.name == names.PREDICT and int(one.trace_id, 16) % 12 == 3}
    return [
        replace(one, attributes=one.attributes | {key.replace("__", "."): v for key, v in attributes.items()})
        if one.name == names.BATCHED_PREDICT and one.trace_id in slow
        else one
        for one in spans
    ]


def test_a_limit_of_the_container_is_told_from_other_processes() -> None:
    starved = window({"contention": 80.0, "starved": 80.0})
    (among_others,) = verdict(starved).findings
    (held_back,) = verdict(hindered(starved, ai__cpu__throttled_ms=75.0)).findings

    assert among_others.cause == held_back.cause == "cpu_starvation"
    assert "other processes use the CPUs" in fix_text(among_others)
    assert "a CPU limit of the container is reached" in fix_text(held_back)
    assert "in 12 of them a CPU limit of its container held the model back" in held_back.summary


def test_stolen_cpus_and_a_lack_of_memory_are_told_from_other_processes() -> None:
    spans = window({"contention": 80.0})
    (among_others,) = verdict(spans).findings
    assert among_others.cause == "device_contention"
    assert "something else used the device" in fix_text(among_others)
    for key, told, fix in (
        (
            "ai__cpu__steal_ms",
            "the hypervisor ran others on the CPUs",
            "the hypervisor gives the CPUs to other machines",
        ),
        ("ai__memory__pressure_ms", "was short of memory", "the container is short of memory"),
    ):
        (finding,) = verdict(hindered(spans, **{key: 60.0})).findings
        assert finding.cause == "device_contention"
        assert told in finding.summary
        assert fix in fix_text(finding)


def test_what_a_cold_start_consisted_of() -> None:
    slow = {"cold": 9000.0}
    spans = window(slow, every=60, count=60)
    load = span("e" * 32, "l", "", names.MODEL_LOAD, "model", -1000.0, 6000.0, ai__io__pressure_ms=4500.0)
    phases = [
        span("e" * 32, "a", "l", names.LOAD_WEIGHTS, "model", -1000.0, 5000.0),
        span("e" * 32, "b", "l", names.LOAD_WARM_UP, "model", 4000.0, 1000.0),
    ]
    (finding,) = verdict([*spans, *phases, load]).findings
    assert finding.cause == "cold_start"
    assert "its model loaded for 6.0 s (reading the weights 5.0 s)" in finding.summary
    assert "for 4.5 s, threads in the container of the replica waited for the disk" in finding.summary
    assert "read the weights from a faster disk" in fix_text(finding)
    (finding,) = verdict([*spans, replace(load, instance="another")]).findings
    assert "loaded for" not in finding.summary


def test_stalls_and_collections_of_garbage_are_named() -> None:
    spans = window({"contention": 80.0})
    assert "in 12 of them garbage was collected in the model" in (
        verdict(hindered(spans, ai__gc__pause_ms=60.0)).findings[0].summary
    )
    assert "the event loop of the model stalled" in (
        verdict(hindered(spans, ai__event_loop__stall_ms=60.0)).findings[0].summary
    )
    assert "garbage" not in verdict(hindered(spans, ai__gc__pause_ms=5.0)).findings[0].summary
    (waited,) = verdict(hindered(window({"there": 60.0}), ai__gc__pause_ms=100.0)).findings
    assert waited.cause == "replica_queue"
    assert "garbage was collected in the model" in waited.summary
    assert "collections of garbage stop the model" in fix_text(waited)


@pytest.mark.parametrize(
    ("used", "told"),
    [(0.3, "other processes use 1.2 of the 2.0 CPUs"), (0.9, "the application itself uses 2.0 of the 2.0 CPUs")],
)
def test_who_used_the_cpus_is_told(used: float, told: str) -> None:
    # The model and the tokenizer were starved; each used so many of the two CPUs that were in use.
    used_by = {names.BATCHED_PREDICT: used + 0.2, names.PREPROCESS: used}
    spans = [
        replace(
            one,
            attributes=one.attributes
            | {"ai.cpu.used_ms": used_by[one.name] * one.ms, "ai.cpu.host_used_ms": 2.0 * one.ms},
            resource={**one.resource, "host.name": "one"},
        )
        if one.name in used_by
        else one
        for one in window({"contention": 80.0, "starved": 80.0})
    ]
    (finding,) = verdict(spans).findings
    assert finding.cause == "cpu_starvation"
    assert told in fix_text(finding)


def starved_by_load(number: int, chance: random.Random) -> dict[str, Any]:
    """Processes of the application compete: a part of a request's time, which differs from one to the next."""
    contention = chance.expovariate(1 / 20)
    return {"contention": contention, "starved": contention * chance.random(), "tokens": chance.randint(5, 15)}


def test_a_usual_shortage_of_cpus_is_no_finding_and_more_of_it_for_a_while_is() -> None:
    chance, spans, held = random.Random(5), list[Span](), list[Span]()
    for number in range(600):
        usual = starved_by_load(number, chance)
        spans += request(number, number * 50.0, **usual)
        # For a tenth of the time, something else has the CPUs.
        held += request(
            number, number * 50.0, **({"contention": 250.0, "starved": 240.0} if 300 <= number < 360 else usual)
        )
    assert "cpu_starvation" not in [finding.cause for finding in verdict(spans).findings]
    assert verdict(held).findings[0].cause == "cpu_starvation"


def test_one_cold_start_is_told_in_a_window_of_any_size() -> None:
    spans = [*window({"tokenize": 90.0}, count=1200), *request(5000, 100.0, cold=20_000.0)]
    assert [finding.cause for finding in verdict(spans).findings] == ["cold_start", "tokenization"]
