"""Recorded requests served again: as they were, and with other settings."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deployments.cli.main import main
from deployments.errors import ConfigError
from deployments.explain.requests.capture import Run
from deployments.explain.requests.parts import RunFit
from deployments.explain.traces.files import TraceFiles
from deployments.explain.traces.otlp import Span
from deployments.simulate.recording import NotReplayable, Recorded, Recording, record, recording_of
from deployments.simulate.replay import Replayed, replay
from deployments.simulate.settings import KEYS, parse_change, settings_of
from deployments.simulate.what_if import document, search, what_if
from deployments.telemetry import names
from tests.support.made import otlp, request
from tests.unit.explain.test_verdict import at_random, queued

MS, S = 10**6, 10**9
PER_S = 1000 / 9.0
"""What a device can do that runs one request of ten tokens at a time."""


def one_by_one(busy: float, count: int = 800, seed: int = 1, faster: float = 1.0) -> list[Span]:
    """Requests at random times that a device serves one by one, as ``queued`` computes it."""
    arrivals = [at / faster for at in at_random(busy * PER_S, count, seed)]
    return queued(arrivals, [10] * count)


def made(
    arrivals_s: Sequence[float],
    tokens: Sequence[int] | int = 10,
    settings: dict[str, Any] | None = None,
    timeout_s: float = 60.0,
    **changed: Any,
) -> Recording:
    """A recording of requests that take 4 ms a run and half a millisecond a token."""
    sizes = [tokens] * len(arrivals_s) if isinstance(tokens, int) else tokens
    requests = [
        Recorded(
            round(at * S), 20 * MS, "", 1, size, 4 * size, round(timeout_s * S), "", 2 * MS, MS, MS, 0, 0, 0, 0, 9 * MS
        )
        for at, size in zip(arrivals_s, sizes, strict=True)
    ]
    runs = [run_of(number, one.at_ns + 2 * MS, one.tokens) for number, one in enumerate(requests)]
    requests = [one._replace(**changed, forward_ns=run.took_ns) for one, run in zip(requests, runs, strict=True)]
    return Recording(requests, runs, RunFit(4.0, 0.5), settings or {}, 1, 8.0)


def run_of(number: int, started_ns: int, tokens: int) -> Run:
    took_ns = round((4 + tokens / 2) * MS)
    return Run((str(number), "b"), started_ns, took_ns, 1, tokens, tokens, 0, "", False, None, (), "model")


def served(recording: Recording, changes: dict[str, Any] | None = None, rate: float = 1.0) -> Replayed:
    return replay(recording, settings_of(recording.settings, recording.replicas, changes or {}), rate)


def queue_ms(done: Replayed) -> float:
    return sum(outcome.queue_ns for _, outcome in done.answered) / len(done.answered) / MS


# --- as it was -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("busy", [0.3, 0.6, 0.8])
def test_without_a_change_a_replay_is_what_was_measured(busy: float) -> None:
    told = document(what_if(recording_of(one_by_one(busy)), {"batching.max_batch_size": 1}))

    for name, measured in told["measured"].items():
        assert told["replayed"][name] == pytest.approx(measured, rel=0.02)
        assert told["predicted"][name] == told["replayed"][name]
    assert sum(row["replayed_ms"] for row in told["stages"]) == pytest.approx(
        sum(root.end_ns - root.start_ns for root in one_by_one(busy) if root.name == names.PREDICT) / 800 / MS, rel=0.02
    )


def test_a_replay_is_the_same_every_time() -> None:
    recording = recording_of(one_by_one(0.8))
    changes = {"deployments.Model.num_replicas": 3}
    assert document(what_if(recording, changes, 2.0)) == document(what_if(recording, changes, 2.0))


def test_what_was_slow_for_a_while_is_slow_then() -> None:
    recording = made([number / 20 for number in range(400)])
    recording.runs = [
        replace(run, took_ns=5 * run.took_ns) if 5 * S <= run.started_ns < 10 * S else run for run in recording.runs
    ]
    slow = [one.at_ns / S for one, outcome in served(recording).answered if outcome.forward_ns > 30 * MS]
    assert [min(slow), max(slow)] == pytest.approx([5.0, 10.0], abs=0.1)
    # At twice the rate it comes twice as soon, for the same requests.
    again = [one.at_ns / S for one, outcome in served(recording, rate=2.0).answered if outcome.forward_ns > 30 * MS]
    assert [min(again), max(again)] == pytest.approx([5.0, 10.0], abs=0.6)


def test_a_replay_can_be_asked_for_where_an_event_loop_runs() -> None:
    recording = made([number / 10 for number in range(30)])

    async def ask() -> Replayed:
        return served(recording)

    assert len(asyncio.run(ask()).answered) == 30


# --- other settings --------------------------------------------------------------------------------------------------


def test_a_higher_rate_is_what_it_would_have_been() -> None:
    told = document(what_if(recording_of(one_by_one(0.4)), {}, 1.8))
    then = document(what_if(recording_of(one_by_one(0.4, faster=1.8)), {"batching.max_wait_ms": 0}))

    assert told["change"] == {"rate": [1.0, 1.8]}
    for name in ("p50", "p90", "p99"):
        assert told["predicted"][name] == pytest.approx(then["measured"][name], rel=0.05)


def test_more_replicas_share_the_work() -> None:
    recording = recording_of(one_by_one(0.9))
    one, two = served(recording), served(recording, {"deployments.Model.num_replicas": 2})

    assert queue_ms(two) < queue_ms(one) / 5
    assert two.replica_seconds == pytest.approx(2 * one.replica_seconds, rel=0.01)


def test_larger_batches_clear_a_queue() -> None:
    arrivals = [0.0] * 64
    small, large = (served(made(arrivals), {"batching.max_batch_size": size}) for size in (1, 32))
    # 64 runs of 9 ms, or two of 164.
    assert max(o.latency_ns for _, o in small.answered) / MS == pytest.approx(64 * 9 + 3, rel=0.05)
    assert max(o.latency_ns for _, o in large.answered) / MS == pytest.approx(2 * 164 + 3, rel=0.05)


def test_a_wait_for_a_batch_is_waited() -> None:
    done = served(made([number * 1.0 for number in range(20)]), {"batching.max_wait_ms": 50})
    assert queue_ms(done) == pytest.approx(50, abs=2)


def test_lengths_are_kept_apart_or_padded() -> None:
    chance = random.Random(1)
    sizes = [chance.choice((10, 200)) for _ in range(300)]
    recording = made([number / 12 for number in range(300)], sizes)
    apart, in_order = (served(recording, {"batching.grouping_window": window}, 2.0) for window in (128, 1))
    assert sum(o.forward_ns for _, o in apart.answered) < sum(o.forward_ns for _, o in in_order.answered)


def test_limits_refuse_what_they_would_have_refused() -> None:
    burst = [0.0] * 100
    assert served(made(burst)).refused == 0
    full = served(made(burst), {"batching.max_queue": 40, "batching.max_batch_size": 1})
    assert full.refused == pytest.approx(100 - 41, abs=2)
    late = served(made(burst, timeout_s=0.2), {"batching.max_batch_size": 1})
    assert 100 - 200 / 9 < late.refused < 100
    assert all(outcome.latency_ns <= 0.21 * S for _, outcome in late.answered)

    sizes = [10] * 50 + [1000] * 10
    recording = made([number / 10 for number in range(60)], sizes)
    assert served(recording, {"limits.max_input_chars": 100}).refused == 10
    cut = served(recording, {"model.max_length": 100})
    assert max(outcome.forward_ns for _, outcome in cut.answered) < 60 * MS


def test_a_replica_takes_so_many_calls_at_once() -> None:
    done = served(made([0.0] * 30), {"deployments.Model.max_ongoing_requests": 1})
    waits = sorted(outcome.replica_wait_ns / MS for _, outcome in done.answered)
    assert waits[-1] == pytest.approx(29 * 9, rel=0.05)
    assert queue_ms(done) == pytest.approx(0, abs=0.5)


def test_inputs_of_a_request_are_in_batches_of_their_own() -> None:
    recording = made([number * 1.0 for number in range(30)], 160, inputs=16)
    done = served(recording, {"batching.max_batch_size": 4})
    # Four runs of 24 ms each, of which the last waits for three.
    latencies = [outcome.latency_ns / MS for _, outcome in done.answered]
    assert min(latencies) == pytest.approx(3 + 4 * 24, rel=0.05)


# --- autoscaling -----------------------------------------------------------------------------------------------------

SCALED = {
    "deployments.Model.autoscaling_config.min_replicas": 1,
    "deployments.Model.autoscaling_config.max_replicas": 4,
    "deployments.Model.autoscaling_config.policy.policy_kwargs.target_queue_wait_ms": 200,
    "batching.max_batch_size": 1,
}


def test_the_policy_orders_replicas_and_they_start_as_slowly_as_they_did() -> None:
    quiet, busy = at_random(30.0, 300, 1), at_random(300.0, 4500, 2)
    arrivals = [at / 1000 for at in [*quiet, *(quiet[-1] + at for at in busy)]]
    recording = made(arrivals, settings=SCALED)
    scaled, alone = served(recording), served(recording, {"deployments.Model.num_replicas": 1})

    assert scaled.replicas == 4
    assert scaled.replica_seconds > alone.replica_seconds
    assert queue_ms(scaled) < queue_ms(alone)
    # The load rises when the quiet part ends, and a replica takes 8 s to start.
    relieved = quiet[-1] / 1000 + 8
    before = [o.queue_ns for one, o in scaled.answered if relieved - 4 < one.at_ns / S < relieved]
    assert min(before) > 200 * MS
    few = served(recording, {"deployments.Model.autoscaling_config.max_replicas": 2})
    assert few.replicas == 2


def test_from_zero_the_first_request_starts_a_replica() -> None:
    zero = {**SCALED, "deployments.Model.autoscaling_config.min_replicas": 0}
    recording = made([number / 10 for number in range(200)], settings=zero)
    recording.runs = [run for run in recording.runs if run.started_ns > 6 * S]
    done = served(recording)

    assert not done.refused
    assert max(outcome.replica_wait_ns for _, outcome in done.answered) == pytest.approx(8 * S, rel=0.01)


# --- what is asked ---------------------------------------------------------------------------------------------------


def test_search_finds_the_fewest_replicas_and_the_smallest_change() -> None:
    recording = made([at / 1000 for at in at_random(1.5 * PER_S, 1500, 3)], settings={"batching.max_batch_size": 1})
    found = search(recording, 400)
    assert found is not None
    # Larger batches are enough.
    assert found.change["deployments.Model.num_replicas"][1] == 1
    assert found.change["batching.max_batch_size"][0] == 1
    assert document(found)["predicted"]["p99"] <= 400

    assert search(made([0.0, 1.0, 2.0] * 10), 5) is None, "a run alone takes longer"


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("batching.max_batch_size", "must be KEY=VALUE"),
        ("model.dtype=bfloat16", "its effect cannot be predicted; known here: batching.max_batch_size"),
        ("batching.nonsense=1", "its effect cannot be predicted"),
    ],
)
def test_a_change_that_cannot_be_predicted_says_so(text: str, rule: str) -> None:
    with pytest.raises(ConfigError, match=rule):
        parse_change(text)


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("batching.max_batch_size", 0, "args.batching.max_batch_size: Input should be greater than 0"),
        ("batching.max_wait_ms", "soon", "args.batching.max_wait_ms"),
        ("deployments.Model.num_replicas", 0, "a whole number of at least 1; got 0"),
        ("deployments.Model.num_replicas", True, "a whole number of at least 1; got True"),
        ("deployments.Model.autoscaling_config.max_replicas", 0, "at least 1"),
        ("deployments.Model.autoscaling_config.policy.policy_kwargs.target_queue_wait_ms", -1, "above 0; got -1"),
    ],
)
def test_an_invalid_value_names_the_key_and_the_rule(key: str, value: Any, rule: str) -> None:
    with pytest.raises(ConfigError, match=rule):
        settings_of(SCALED, 1, {key: value})


def test_every_key_can_be_changed() -> None:
    for key in KEYS:
        settings_of(SCALED, 1, {key: 4 if not key.endswith("utilization") else 0.5})


def test_what_cannot_be_replayed_says_why() -> None:
    with pytest.raises(NotReplayable, match="from 3 runs; 20 are needed"):
        recording_of(one_by_one(0.3, count=3))
    failed = [one for number in range(30) for one in request(number, number * 100.0, error="model_failed")]
    with pytest.raises(NotReplayable, match="no request in these traces was answered"):
        recording_of(failed)
    generation = replace(failed[0], name=names.GENERATE)
    with pytest.raises(NotReplayable, match="generations"):
        recording_of([generation])


def test_requests_that_were_refused_come_again_and_mistakes_of_clients_do_not() -> None:
    spans = [
        one
        for number in range(60)
        for one in request(number, number * 100.0, error={1: "queue_full", 2: "invalid_field"}.get(number % 3, ""))
    ]
    told = document(what_if(recording_of(spans), {"batching.max_wait_ms": 0}))

    assert told["requests"] == 40
    assert told["refused"] == {"measured": 20, "predicted": 0}


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "traces.jsonl"
    source.write_text(otlp(one_by_one(0.8, 300)))
    asked = ["what-if", "--source", str(source)]

    assert (
        main([*asked, "batching.max_batch_size=16", "--replicas", "Model=2", "--rate", "1.5", "--format", "json"]) == 0
    )
    told = json.loads(capsys.readouterr().out)
    assert set(told) == {
        "schema", "window", "requests", "kept", "change", "measured", "replayed", "predicted", "stages", "refused",
        "replica_seconds",
    }  # fmt: skip
    assert (told["schema"], told["requests"], set(told["measured"])) == (1, 300, {"p50", "p90", "p95", "p99"})
    assert told["change"] == {
        "batching.max_batch_size": [1, 16], "deployments.Model.num_replicas": [1, 2], "rate": [1.0, 1.5],
    }  # fmt: skip
    assert set(told["stages"][0]) == {"stage", "replayed_ms", "predicted_ms"}
    assert set(told["refused"]) == set(told["replica_seconds"]) == {"measured", "predicted"}

    assert main([*asked, "batching.max_batch_size=16"]) == 0
    out = capsys.readouterr().out
    assert "batching.max_batch_size: 1 -> 16" in out
    assert "fidelity: replayed without a change it differs in p50 by" in out
    assert main([*asked, "--search", "--target-p99", "1s"]) == 0
    assert "deployments.Model.num_replicas: 1 -> 1" in capsys.readouterr().out
    assert main([*asked, "--search", "--target-p99", "1ms"]) == 1
    assert "no settings were found" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        ([], "say what to change"),
        (["model.dtype=float16"], "its effect cannot be predicted"),
        (["batching.max_batch_size=-3"], "greater than 0"),
        (["--replicas", "Tokenizer=2"], "must be Model=N"),
        (["--rate", "0"], "must be a number from 0.01 to 100"),
        (["--search"], "belong together"),
        (["--search", "--target-p99", "soon"], "such as 300ms"),
        (["--search", "--target-p99", "1s", "batching.max_batch_size=8"], "it takes none"),
    ],
)
def test_an_invalid_call_is_refused_with_the_rule(
    arguments: list[str], rule: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "traces.jsonl"
    source.write_text(otlp(one_by_one(0.3, 30)))
    with pytest.raises(SystemExit) as ended:
        main(["what-if", "--source", str(source), *arguments])
    assert ended.value.code == 2
    assert rule in capsys.readouterr().err


def test_why_says_what_its_fix_is_predicted_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A queue behind runs of one input each, which larger batches would shorten, and another replica too."""
    source = tmp_path / "traces.jsonl"
    busy = at_random(1.3 * PER_S, 600, 4)
    spans = queued([*at_random(20.0, 400, 1), *(20_000 + at for at in busy)], [10] * 1000)
    source.write_text(otlp(spans))

    assert main(["why", "--source", str(source), "--format", "json"]) == 0
    (first, *_) = json.loads(capsys.readouterr().out)["findings"]
    assert first["cause"] == "device_queue"
    text, _, predicted = first["fix"].partition("; predicted p99 ")
    before, after = (float(number) for number in predicted.removesuffix(" ms").split(" -> "))
    assert "deployments.Model.num_replicas: 1 -> 2" in text
    assert main(["what-if", "--source", str(source), "--replicas", "Model=2", "--format", "json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert before == pytest.approx(told["measured"]["p99"], abs=1)
    assert after == pytest.approx(told["predicted"]["p99"], rel=0.05)
    assert after < before / 2


@pytest.mark.parametrize("numbered", [True, False])
def test_of_sampled_requests_each_stands_for_as_many_like_it(numbered: bool) -> None:
    chance, numbers = random.Random(2), itertools.count(1)
    every = sorted(one_by_one(0.6), key=lambda span: span.start_ns)
    if numbered:
        every = [
            replace(span, attributes=span.attributes | {"ai.request.number": next(numbers)})
            if span.name == names.PREDICT
            else span
            for span in every
        ]
    roots = {span.trace_id: span.key for span in every if span.name == names.PREDICT}
    kept = {trace_id for trace_id in roots if chance.random() < 0.25}
    of_kept = [
        span
        for span in every
        if (span.trace_id in kept if span.trace_id in roots else any(trace in kept for trace, _ in span.links))
    ]
    whole = document(what_if(recording_of(every), {}, 1.0))
    found = recording_of(of_kept, {roots[trace_id]: len(roots) / len(kept) for trace_id in kept})
    told = document(what_if(found, {}, 1.0))

    assert told["requests"] == pytest.approx(len(roots), rel=0.02)
    for name in ("p50", "p90"):
        assert told["measured"][name] == pytest.approx(whole["measured"][name], rel=0.1)
        assert told["replayed"][name] == pytest.approx(whole["replayed"][name], rel=0.25 if numbered else 0.4)


def test_a_sample_that_does_not_say_for_how_many_it_stands_is_not_replayed(tmp_path: Path) -> None:
    roots = [span for span in one_by_one(0.3, count=400) if span.name == names.PREDICT]
    every = [
        replace(root, attributes=root.attributes | {"ai.request.number": number})
        for number, root in enumerate(roots, 1)
    ]
    source = tmp_path / "traces.jsonl"
    source.write_text(otlp(every[::5]))
    with pytest.raises(NotReplayable, match=r"the traces of \d+ of \d+ requests are here"):
        record(TraceFiles(source))
