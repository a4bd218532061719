"""Requests before the model is loaded: how long they wait, their response, and how the trace shows the cold start."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
from ray import serve

from deployments.app import build
from deployments.telemetry import names
from tests.integration.conftest import undeploy
from tests.support.http import Answer, call
from tests.support.otlp import OtlpReceiver
from tests.support.traces import WHOLE_TRACE, named, one


def deploy_loading(load_ms: float, no_replica_wait_ms: float) -> threading.Thread:
    app = build(
        {
            "model": {"engine": "fake", "fake": {"load_ms": load_ms}},
            "limits": {"no_replica_wait_ms": no_replica_wait_ms},
        }
    )
    thread = threading.Thread(target=serve.run, args=(app,), kwargs={"name": "slowlens"})
    thread.start()
    return thread


@pytest.fixture
def _clean(cluster: int) -> Iterator[None]:
    undeploy()
    yield
    undeploy()


def wait_for_ingress(port: int) -> Answer:
    while True:
        answer = call(port, "GET", "/healthz")
        if b"no replica is ready" in answer.body:
            return answer
        time.sleep(0.05)


@pytest.mark.usefixtures("_clean")
def test_a_request_that_waits_for_the_model_load_is_cold_and_links_to_it(cluster: int, receiver: OtlpReceiver) -> None:
    receiver.clear()
    deployed = deploy_loading(load_ms=5000, no_replica_wait_ms=30_000)
    unhealthy = wait_for_ingress(cluster)
    answer = call(cluster, "POST", "/v1/embeddings", {"input": "first"})
    deployed.join()
    healthy = call(cluster, "GET", "/healthz")
    warm = call(cluster, "POST", "/v1/embeddings", {"input": "second"})
    spans = receiver.trace(answer.trace_id, names=WHOLE_TRACE)
    load = one(receiver.wait_for(lambda s: bool(named(s, names.MODEL_LOAD))), names.MODEL_LOAD)
    batched = one(spans, names.BATCHED_PREDICT)

    assert (unhealthy.status, unhealthy.error["code"]) == (503, "no_replica_ready")
    assert "model" in unhealthy.error["message"]
    assert int(unhealthy.headers["retry-after"]) > 0
    assert (answer.status, healthy.status, warm.status) == (200, 200, 200)

    assert batched.attributes["ai.model.load_type"] == "cold"
    assert batched.links == ((load.trace_id, load.span_id),)
    assert one(spans, names.HOP_MODEL).attributes["ai.hop.transit_ms"] > 1000
    warm_spans = receiver.trace(warm.trace_id, names=WHOLE_TRACE)
    assert one(warm_spans, names.BATCHED_PREDICT).attributes["ai.model.load_type"] == "warm"

    assert load.parent_id == ""
    assert load.ms >= 5000
    assert load.attributes["ai.model.load_type"] == "cold"
    assert load.attributes["ai.model.already_loaded"] is False
    assert load.attributes["ai.model.load_time_ms"] == pytest.approx(load.ms, abs=0.01)
    assert load.events == (("model_loaded", {"device": "cpu"}),)
    phases = [span for span in receiver.spans() if span.trace_id == load.trace_id and span != load]
    assert [(phase.name, phase.parent_id) for phase in phases] == [(names.LOAD_WEIGHTS, load.span_id)]


@pytest.mark.usefixtures("_clean")
def test_a_request_does_not_wait_for_a_replica_longer_than_allowed(cluster: int, receiver: OtlpReceiver) -> None:
    deployed = deploy_loading(load_ms=8000, no_replica_wait_ms=300)
    wait_for_ingress(cluster)
    answer = call(cluster, "POST", "/v1/embeddings", {"input": "first"})
    root = one(receiver.trace(answer.trace_id, names={names.PREDICT}), names.PREDICT)
    deployed.join()

    assert (answer.status, answer.error["code"]) == (503, "no_replica_ready")
    assert int(answer.headers["retry-after"]) > 0
    assert root.attributes["error.type"] == "no_replica_ready"
    assert root.ms < 5000
