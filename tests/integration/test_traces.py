"""One trace per request: the attributes of every span, and the links between batches and requests."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from deployments.engine.fake import fake_embedding, fake_token_id
from deployments.telemetry import names
from tests.support.cluster import run_together, wait_for_depth
from tests.support.http import Answer, call, new_traceparent
from tests.support.otlp import OtlpReceiver
from tests.support.traces import WHOLE_TRACE, WHOLE_TREE, Span, named, one, tree

POISON = "poison"


@pytest.fixture(scope="module")
def hold_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hold") / "hold"


@pytest.fixture(scope="module")
def port(deploy: Callable[..., int], hold_path: Path) -> int:
    return deploy(
        model={
            "engine": "fake",
            "max_length": 16,
            "fake": {"hold_path": str(hold_path), "poison_token": fake_token_id(POISON)},
        },
        batching={"max_batch_size": 4, "max_queue": 8},
        limits={"max_inputs": 8},
    )


@pytest.fixture
def held(hold_path: Path, port: int, receiver: OtlpReceiver) -> Iterator[Callable[[], None]]:
    """Hold the device with one request running on it. Call the fixture's value to release it."""
    hold_path.touch()
    first = threading.Thread(target=call, args=(port, "POST", "/v1/embeddings", {"input": "holds the device"}))
    first.start()
    wait_for_depth(0, running=True)
    yield hold_path.unlink
    hold_path.unlink(missing_ok=True)
    first.join()


def embed(port: int, text: str | list[Any], **headers: str) -> Answer:
    return call(port, "POST", "/v1/embeddings", {"input": text}, headers)


def test_what_came_before_the_ingress_is_part_of_the_request(port: int, receiver: OtlpReceiver) -> None:
    traceparent, trace_id, _ = new_traceparent()
    began = time.time() - 0.3
    answer = embed(port, "four five six", traceparent=traceparent, **{"X-Request-Start": f"t={began:.6f}"})
    spans = receiver.trace(trace_id, names=WHOLE_TRACE | {names.FRONT})
    root, front = one(spans, names.PREDICT), one(spans, names.FRONT)

    assert (front.start, front.parent_id) == (root.start, root.span_id)
    assert front.ms == pytest.approx(300, abs=200)
    assert front.start / 1e9 == pytest.approx(began, abs=0.05)
    assert root.ms >= 300
    assert children_cover(spans, root) == pytest.approx(1.0, abs=0.001)
    timing = dict(part.split(";dur=") for part in answer.headers["server-timing"].split(", "))
    assert float(timing["transit"]) >= front.ms
    assert sum(map(float, timing.values())) == pytest.approx(2 * float(timing["total"]), rel=0.05)


def test_one_request_produces_one_complete_trace(port: int, receiver: OtlpReceiver) -> None:
    traceparent, trace_id, caller_span = new_traceparent()
    answer = embed(port, "one two three", traceparent=traceparent, tracestate="vendor=value", **{"X-Request-ID": "r-1"})
    spans = receiver.trace(trace_id, names=WHOLE_TRACE)
    root = one(spans, names.PREDICT)

    assert answer.status == 200
    assert answer.headers["traceresponse"] == f"00-{trace_id}-{root.span_id}-01"
    assert answer.headers["x-request-id"] == "r-1"
    assert root.parent_id == caller_span
    assert tree(spans, root) == WHOLE_TREE
    assert len(spans) == len(WHOLE_TRACE)
    assert {s.status for s in spans} == {"UNSET"}
    assert children_cover(spans, root) == pytest.approx(1.0, abs=0.001)
    for span in spans:
        # Only if the host is busy.
        span.attributes.pop(names.AI_CPU_RUN_DELAY_MS, None)

    total = root.attributes.pop("ai.total_latency_ms")
    assert total == pytest.approx(root.ms, abs=0.01)
    assert root.attributes.pop("ai.request.number") >= 1
    assert root.attributes == {
        "ai.request_id": "r-1",
        "ai.input_count": 1,
        "ai.input_length": 13,
        "ai.device": "cpu",
        "ai.model.name": "fake",
        "http.request.method": "POST",
        "http.route": "/v1/embeddings",
        "http.response.status_code": 200,
        "url.path": "/v1/embeddings",
        "url.scheme": "http",
        "client.address": "127.0.0.1",
        "gen_ai.operation.name": "embeddings",
        "gen_ai.request.model": "fake",
        "gen_ai.usage.input_tokens": 5,
    }
    preprocess = one(spans, names.PREPROCESS)
    assert preprocess.attributes.pop("ai.preprocess.duration_ms") == pytest.approx(preprocess.ms, abs=0.01)
    assert preprocess.attributes == {
        "ai.preprocess.token_count": 5,
        "ai.preprocess.input_chars": 13,
        "ai.preprocess.was_truncated": False,
        "ai.preprocess.cache_hits": 0,
    }
    for name, callee in (
        (names.HOP_TOKENIZER, names.PREPROCESS),
        (names.HOP_MODEL, names.BATCHED_PREDICT),
        (names.HOP_POSTPROCESSOR, names.POSTPROCESS),
    ):
        hop, stage = one(spans, name), one(spans, callee)
        assert 0 <= hop.attributes["ai.hop.wait_ms"] <= hop.attributes["ai.hop.transit_ms"]
        assert hop.attributes["ai.hop.transit_ms"] == pytest.approx(hop.ms - stage.ms, abs=0.5)

    batched, queue, forward = (one(spans, n) for n in (names.BATCHED_PREDICT, names.QUEUE, names.FORWARD_PASS))
    assert batched.attributes["ai.batch.max_size"] == 4
    assert batched.attributes["ai.batch.timeout_ms"] == 0.0
    assert batched.attributes["ai.model.load_type"] == "warm"
    assert batched.attributes["ai.batch.wait_time_ms"] == pytest.approx(queue.ms, abs=0.01)
    waits = [queue.attributes[f"ai.queue.{part}_ms"] for part in ("device_busy", "fill_wait")]
    assert sum(waits) == pytest.approx(queue.ms, abs=0.01)
    assert queue.end == forward.start
    assert forward.attributes["ai.batch.actual_size"] == 1
    postprocess = one(spans, names.POSTPROCESS)
    assert postprocess.attributes["ai.postprocess.output_length"] > 0


def test_resources_identify_the_actor_and_its_replica(port: int, receiver: OtlpReceiver) -> None:
    spans = receiver.trace(embed(port, "who are you").trace_id, names=WHOLE_TRACE)
    by_service = {span.service: span.resource for span in spans}

    assert sorted(by_service) == [f"slowlens.{s}" for s in ("ingress", "model", "postprocessor", "tokenizer")]
    assert len({resource["service.instance.id"] for resource in by_service.values()}) == 4
    for service, resource in by_service.items():
        assert resource["service.namespace"] == "slowlens"
        assert resource["service.version"] == "0.1.0"
        assert resource["deployment.environment.name"] == "development"
        assert len(resource["ray.node.id"]) == 56
        assert service.removeprefix("slowlens.") in resource["service.instance.id"].lower()


def test_resources_carry_the_settings_that_a_fix_may_name(port: int, receiver: OtlpReceiver) -> None:
    spans = receiver.trace(embed(port, "how are you set up").trace_id, names=WHOLE_TRACE)
    settings = {
        key.removeprefix(names.SETTING): value
        for span in spans
        for key, value in span.resource.items()
        if key.startswith(names.SETTING)
    }
    assert settings["batching.max_batch_size"] == 4
    assert settings["batching.max_wait_ms"] == 0
    assert settings["limits.max_input_chars"] == 200_000
    assert settings["deployments.Model.num_replicas"] == 1
    assert settings["deployments.Model.max_ongoing_requests"] == 4000


def test_client_address_is_the_first_x_forwarded_for_entry(port: int, receiver: OtlpReceiver) -> None:
    answer = embed(port, "from afar", **{"X-Forwarded-For": "203.0.113.7, 10.0.0.1"})
    root = one(receiver.trace(answer.trace_id, names=WHOLE_TRACE), names.PREDICT)
    assert root.attributes["client.address"] == "203.0.113.7"


def test_a_request_without_traceparent_starts_a_new_trace(port: int, receiver: OtlpReceiver) -> None:
    answer = embed(port, "nobody called")
    root = one(receiver.trace(answer.trace_id, names=WHOLE_TRACE), names.PREDICT)

    assert root.parent_id == ""
    assert root.span_id == answer.root_span_id


@pytest.mark.parametrize(
    "malformed", ["nonsense", "00-" + "0" * 32 + "-" + "1" * 16 + "-01", "ff-" + "1" * 32 + "-" + "1" * 16 + "-01"]
)
def test_a_malformed_traceparent_is_ignored(port: int, receiver: OtlpReceiver, malformed: str) -> None:
    answer = embed(port, "bad caller", traceparent=malformed)
    root = one(receiver.trace(answer.trace_id, names=WHOLE_TRACE), names.PREDICT)

    assert (answer.status, root.parent_id) == (200, "")


def test_every_actor_honours_an_unsampled_traceparent(port: int, receiver: OtlpReceiver) -> None:
    traceparent, unsampled, _ = new_traceparent(flags="00")
    answer = embed(port, "leave no trace", traceparent=traceparent)
    # Each process exports spans in order, so once this later trace is complete the earlier one would be there too.
    receiver.trace(embed(port, "a later one").trace_id, names=WHOLE_TRACE)

    assert answer.headers["traceresponse"].startswith(f"00-{unsampled}-")
    assert answer.headers["traceresponse"].endswith("-00")
    assert [span for span in receiver.spans() if span.trace_id == unsampled] == []


def test_requests_that_queue_together_run_as_one_batch(
    port: int, receiver: OtlpReceiver, held: Callable[[], None]
) -> None:
    trace_ids = [
        answer.trace_id
        for answer in run_together([partial(embed, port, value) for value in ["a", "b c d", "e f"]], held)
    ]
    traces = [receiver.trace(trace_id, names=WHOLE_TRACE) for trace_id in trace_ids]
    forwards = [one(spans, names.FORWARD_PASS) for spans in traces]
    batch = batch_of(receiver, forwards[0])

    assert {forward.links for forward in forwards} == {((batch.trace_id, batch.span_id),)}
    assert sorted(batch.links) == sorted((forward.trace_id, forward.span_id) for forward in forwards)
    assert batch.parent_id == ""
    assert batch.trace_id not in trace_ids
    assert [one(spans, names.QUEUE).attributes["ai.queue.depth_on_arrival"] for spans in traces] == [0, 1, 2]
    for spans in traces:
        queue = one(spans, names.QUEUE)
        assert queue.attributes["ai.queue.device_busy_ms"] == pytest.approx(queue.ms, abs=20)
        assert queue.ms > 0
    expected = {
        "ai.batch.actual_size": 3,
        "ai.batch.tokens": 3 + 5 + 4,
        "ai.batch.padded_tokens": 15,
        "ai.batch.padding_ratio": pytest.approx(0.2),
        "ai.batch.dispatch_reason": "device_idle",
        "ai.batch.queue_behind": 0,
        "ai.model.name": "fake",
        "ai.device": "cpu",
        "ai.forward_pass.output_shape": "[3, 4]",
    }
    assert {key: batch.attributes[key] for key in expected} == expected
    waits = [one(spans, names.QUEUE).ms for spans in traces]
    assert batch.attributes["ai.batch.max_wait_ms"] == pytest.approx(max(waits), abs=0.01)
    assert batch.attributes["ai.batch.avg_wait_ms"] == pytest.approx(sum(waits) / 3, abs=0.01)


def test_a_request_split_across_batches_has_a_queue_and_a_forward_span_per_batch(
    port: int, receiver: OtlpReceiver, held: Callable[[], None]
) -> None:
    texts = [f"text number {i}" for i in range(6)]
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(embed, port, texts)
        wait_for_depth(6)
        held()
        answer = future.result()
    spans = receiver.trace(answer.trace_id, names=WHOLE_TRACE)
    forwards = sorted(named(spans, names.FORWARD_PASS), key=lambda s: s.start)
    batches = [batch_of(receiver, forward) for forward in forwards]

    assert len(named(spans, names.QUEUE)) == 2
    assert [batch.attributes["ai.batch.actual_size"] for batch in batches] == [4, 2]
    assert [batch.attributes["ai.batch.dispatch_reason"] for batch in batches] == ["full", "device_idle"]
    assert [batch.attributes["ai.batch.queue_behind"] for batch in batches] == [2, 0]
    assert [batch.links for batch in batches] == [((f.trace_id, f.span_id),) for f in forwards]
    for text, item in zip(texts, answer.json()["data"], strict=True):
        ids = [1, *map(fake_token_id, text.split()), 2]
        assert item["embedding"] == pytest.approx(fake_embedding(ids).tolist())
    timing = answer.server_timing
    assert abs(sum(timing.values()) - 2 * timing["total"]) <= max(1.0, 0.05 * timing["total"])


def test_a_poisoned_input_fails_alone(port: int, receiver: OtlpReceiver, held: Callable[[], None]) -> None:
    texts = ["good one", POISON, "good two"]
    answers = run_together([partial(embed, port, value) for value in texts], held)
    bad = answers[1]

    assert [answer.status for answer in answers] == [200, 500, 200]
    assert bad.error["code"] == "model_failed"
    assert bad.trace_id in bad.error["message"]
    assert "Traceback" not in bad.error["message"]
    for answer, text in ((answers[0], texts[0]), (answers[2], texts[2])):
        ids = [1, *map(fake_token_id, text.split()), 2]
        assert answer.json()["data"][0]["embedding"] == pytest.approx(fake_embedding(ids).tolist())

    spans = receiver.trace(
        bad.trace_id, names={names.PREDICT, names.HOP_MODEL, names.BATCHED_PREDICT, names.FORWARD_PASS}
    )
    for name in (names.PREDICT, names.HOP_MODEL, names.BATCHED_PREDICT, names.FORWARD_PASS):
        failed = one(spans, name)
        assert failed.status == "ERROR"
        assert failed.attributes["error.type"] in ("model_failed", "ValueError")
        assert [event for event, _ in failed.events] == ["exception"]
    good = receiver.trace(answers[0].trace_id, names=WHOLE_TRACE)
    assert {span.status for span in good} == {"UNSET"}
    runs = one(good, names.FORWARD_PASS).links
    assert len(runs) == 2, "the run that failed, and the one that succeeded"
    receiver.wait_for(lambda spans: set(runs) <= {(s.trace_id, s.span_id) for s in spans})
    statuses = {(s.trace_id, s.span_id): s.status for s in receiver.spans()}
    assert [statuses[run] for run in runs] == ["ERROR", "UNSET"]


def test_client_disconnect_ends_every_span_and_the_input_never_runs(
    port: int, receiver: OtlpReceiver, held: Callable[[], None]
) -> None:
    traceparent, trace_id, _ = new_traceparent()
    connection = http.client.HTTPConnection("127.0.0.1", port)
    body = json.dumps({"input": "never mind"})
    connection.request("POST", "/v1/embeddings", body, {"traceparent": traceparent})
    wait_for_depth(1)
    connection.close()
    ended = {names.PREDICT, names.HOP_MODEL, names.BATCHED_PREDICT, names.QUEUE}
    spans = receiver.trace(trace_id, names=ended)
    held()

    for name in ended:
        span = one(spans, name)
        assert span.status == "ERROR"
        assert span.attributes["error.type"] == "cancelled"
    assert named(spans, names.FORWARD_PASS) == []
    assert embed(port, "the next one").status == 200


def test_work_past_its_deadline_is_dropped_before_the_model_runs(
    port: int, receiver: OtlpReceiver, held: Callable[[], None]
) -> None:
    answer = embed(port, "too late", **{"X-Request-Timeout-Ms": "150"})
    spans = receiver.trace(answer.trace_id, names={names.PREDICT, names.BATCHED_PREDICT})
    held()

    assert answer.status == 504
    assert answer.error["code"] == "deadline_passed"
    assert one(spans, names.PREDICT).attributes["error.type"] == "deadline_passed"
    for name in (names.BATCHED_PREDICT, names.QUEUE):
        assert one(spans, name).attributes["error.type"] == "deadline_passed"
    queue = one(spans, names.QUEUE)
    waits = [queue.attributes[f"ai.queue.{part}_ms"] for part in ("device_busy", "fill_wait")]
    assert sum(waits) == pytest.approx(queue.ms, abs=0.01)
    timing = answer.server_timing
    assert timing["queue"] == pytest.approx(queue.ms, abs=20)
    assert abs(sum(timing.values()) - 2 * timing["total"]) <= max(1.0, 0.05 * timing["total"])
    assert named(spans, names.FORWARD_PASS) == []


def test_a_full_queue_returns_429_with_a_retry_after_header(
    port: int, receiver: OtlpReceiver, held: Callable[[], None]
) -> None:
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(embed, port, [f"text {i}" for i in range(8)])
        wait_for_depth(8)
        refused = embed(port, "one too many")
        held()
        accepted = waiting.result()
    spans = receiver.trace(refused.trace_id, names={names.PREDICT, names.BATCHED_PREDICT})

    assert (refused.status, accepted.status) == (429, 200)
    assert refused.error == {
        "message": "the queue holds 8 inputs of at most 8, and this request adds 1; try again later",
        "type": "rate_limit_error",
        "param": None,
        "code": "queue_full",
    }
    assert int(refused.headers["retry-after"]) >= 1
    assert one(spans, names.PREDICT).attributes["http.response.status_code"] == 429
    assert named(spans, names.QUEUE) == []


def test_input_text_stays_out_of_telemetry(port: int, receiver: OtlpReceiver) -> None:
    secret = "hunter2-secret"
    answers = [embed(port, secret), embed(port, f"{POISON} {secret}"), embed(port, [secret, 1])]
    for answer in answers:
        receiver.trace(answer.trace_id, names={names.PREDICT})
    receiver.trace(embed(port, "flush").trace_id, names=WHOLE_TRACE)

    assert secret not in repr(receiver.spans())


def batch_of(receiver: OtlpReceiver, forward: Span) -> Span:
    (link,) = forward.links
    spans = receiver.wait_for(lambda spans: link in {(s.trace_id, s.span_id) for s in spans})
    (batch,) = [s for s in spans if (s.trace_id, s.span_id) == link]
    assert batch.name == names.BATCH_FORWARD
    return batch


def children_cover(spans: list[Span], root: Span) -> float:
    covered = sum(span.end - span.start for span in spans if span.parent_id == root.span_id)
    return covered / (root.end - root.start)
