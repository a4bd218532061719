"""The admission rules in a real replica: holding the device produces the batches that the rules predict."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from deployments.telemetry import metrics, names
from tests.support.cluster import run_together, wait_for_depth
from tests.support.http import Answer, call
from tests.support.otlp import OtlpReceiver
from tests.support.traces import Span, named, one

BASE_MS, TOKEN_US = 8.0, 2000
MEMORY_TOKENS = 400
"""Larger runs do not fit: eight inputs of 42 tokens (336) fit; eight of 102 do not, nor do four."""


@pytest.fixture(scope="module")
def hold_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hold") / "hold"


@pytest.fixture(scope="module")
def port(deploy: Callable[..., int], hold_path: Path) -> int:
    fake = {"base_ms": BASE_MS, "per_token_us": TOKEN_US, "hold_path": str(hold_path), "memory_tokens": MEMORY_TOKENS}
    return deploy(
        model={"engine": "fake", "max_length": 128, "fake": fake},
        batching={"max_batch_size": 8, "max_queue": 32, "max_queue_tokens": 1000, "max_run_ms": 60_000.0},
        limits={"max_inputs": 32},
    )


@pytest.fixture
def held(hold_path: Path, port: int) -> Iterator[Callable[[], None]]:
    """Hold the device with one request running on it. Call the fixture's value to release it."""
    hold_path.touch()
    first = threading.Thread(target=embed, args=(port, 1))
    first.start()
    try:
        wait_for_depth(0, running=True)
        yield hold_path.unlink
    finally:
        hold_path.unlink(missing_ok=True)
        first.join()


def embed(port: int, words: int, **headers: str) -> Answer:
    """Send one text of ``words`` words, which becomes ``words + 2`` tokens."""
    return call(port, "POST", "/v1/embeddings", {"input": " ".join(["w"] * words)}, headers)


def forward_of(receiver: OtlpReceiver, answer: Answer) -> Span:
    return one(receiver.trace(answer.trace_id, names={names.FORWARD_PASS, names.PREDICT}), names.FORWARD_PASS)


def batches_of(receiver: OtlpReceiver, answers: list[Answer]) -> list[Span]:
    """Return the runs that the requests were part of, in start order."""
    wanted = {link for answer in answers for link in forward_of(receiver, answer).links}
    found: list[Span] = []

    def arrived(spans: list[Span]) -> bool:
        found[:] = [span for span in spans if (span.trace_id, span.span_id) in wanted]
        return len(found) == len(wanted)

    receiver.wait_for(arrived)
    return sorted(found, key=lambda span: span.start)


def test_similar_lengths_run_together_and_the_oldest_runs_first(
    port: int, receiver: OtlpReceiver, held: Callable[[], None]
) -> None:
    answers = run_together([partial(embed, port, value) for value in [98, 2, 3, 97, 2]], held)
    long_run, short_run = batches_of(receiver, answers)

    assert {answer.status for answer in answers} == {200}
    assert long_run.attributes["ai.batch.tokens"] == 98 + 97 + 4
    assert short_run.attributes["ai.batch.tokens"] == 2 + 3 + 2 + 6
    for run in (long_run, short_run):
        assert run.attributes["ai.batch.dispatch_reason"] == "device_idle"
        assert run.attributes["ai.batch.padding_ratio"] < 0.2
    assert (long_run.attributes["ai.batch.queue_behind"], short_run.attributes["ai.batch.queue_behind"]) == (3, 0)


def test_a_full_batch_is_formed_before_the_device_is_free_and_the_rest_waits(
    port: int, receiver: OtlpReceiver, held: Callable[[], None]
) -> None:
    answers = run_together([partial(embed, port, value) for value in [3] * 11], held)
    first, second = batches_of(receiver, answers)

    assert (first.attributes["ai.batch.actual_size"], first.attributes["ai.batch.dispatch_reason"]) == (8, "full")
    assert (second.attributes["ai.batch.actual_size"], second.attributes["ai.batch.dispatch_reason"]) == (
        3,
        "device_idle",
    )
    # The requests in the batch waited only for the device; there was almost no gap between the runs.
    for answer in answers[:8]:
        queue = one(receiver.trace(answer.trace_id, names={names.QUEUE, names.PREDICT}), names.QUEUE)
        assert queue.attributes["ai.queue.device_busy_ms"] == pytest.approx(queue.ms, rel=0.2, abs=5)
        assert sum(queue.attributes[f"ai.queue.{part}_ms"] for part in ("device_busy", "fill_wait")) == pytest.approx(
            queue.ms, abs=0.01
        )


def test_a_request_that_cannot_meet_its_deadline_is_rejected_before_it_runs(port: int, receiver: OtlpReceiver) -> None:
    """The device is idle and the deadline has not passed; only the estimate shows that it will be missed."""
    needs_ms = BASE_MS + 122 * TOKEN_US / 1e3
    answer = embed(port, 120, **{"X-Request-Timeout-Ms": f"{needs_ms * 0.6}"})
    spans = receiver.trace(answer.trace_id, names={names.PREDICT, names.BATCHED_PREDICT, names.QUEUE})

    assert answer.status == 504
    assert "and the model needs about" in answer.error["message"]
    assert answer.server_timing["total"] < needs_ms * 0.6
    assert named(spans, names.FORWARD_PASS) == []
    assert one(spans, names.QUEUE).attributes["error.type"] == "deadline_passed"
    assert embed(port, 120).status == 200


def test_the_queue_is_limited_in_tokens(port: int, held: Callable[[], None]) -> None:
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(call, port, "POST", "/v1/embeddings", {"input": ["w " * 38] * 24})
        wait_for_depth(1)
        refused = embed(port, 48)
        held()
        assert waiting.result().status == 200
    assert refused.status == 429
    assert refused.error["message"] == (
        "the queue holds 960 tokens of at most 1000, and this request adds 50; try again later"
    )
    assert int(refused.headers["retry-after"]) >= 1


def test_out_of_memory_fails_no_request_and_limits_later_batches(port: int, receiver: OtlpReceiver) -> None:
    body = {"input": ["w " * 100] * 8}
    first = call(port, "POST", "/v1/embeddings", body)
    again = call(port, "POST", "/v1/embeddings", body)
    runs = {link for answer in (first, again) for span in forwards_of(receiver, answer) for link in span.links}
    receiver.wait_for(lambda spans: runs <= {(span.trace_id, span.span_id) for span in spans})
    of_first, of_again = (batches_of_all(receiver, forwards_of(receiver, answer)) for answer in (first, again))

    assert (first.status, again.status) == (200, 200)
    assert first.json()["data"] == again.json()["data"]
    # Eight did not fit, nor did four; two do, and later batches start at two.
    assert [(run.status, run.attributes["ai.batch.actual_size"]) for run in of_first][:3] == [
        ("ERROR", 8),
        ("ERROR", 4),
        ("UNSET", 2),
    ]
    assert {(run.status, run.attributes["ai.batch.actual_size"]) for run in of_again} == {("UNSET", 2)}
    assert {run.attributes["ai.batch.dispatch_reason"] for run in of_again} <= {"token_budget", "device_idle"}
    receiver.wait_for(lambda _: out_of_memory_count(receiver) == sum(run.status == "ERROR" for run in of_first))


def forwards_of(receiver: OtlpReceiver, answer: Answer) -> list[Span]:
    return named(receiver.trace(answer.trace_id, names={names.FORWARD_PASS, names.PREDICT}), names.FORWARD_PASS)


def batches_of_all(receiver: OtlpReceiver, forwards: list[Span]) -> list[Span]:
    links = {link for forward in forwards for link in forward.links}
    return sorted(
        (span for span in receiver.spans() if (span.trace_id, span.span_id) in links), key=lambda span: span.start
    )


def out_of_memory_count(receiver: OtlpReceiver) -> int:
    counts = [point.as_int for _, metric, point in receiver.metrics() if metric.name == metrics.OUT_OF_MEMORY.name]
    return max(counts, default=0)
