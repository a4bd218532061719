"""A model replica that dies during a request: the second attempt, its spans, and the health check until recovery."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ray

from deployments.telemetry import names
from tests.support.cluster import wait_for_depth
from tests.support.http import call
from tests.support.otlp import OtlpReceiver
from tests.support.traces import WHOLE_TRACE, named, one


def model_replica() -> str:
    """Name of the actor that is the model's only replica."""
    while True:
        listed = [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)]
        found = [str(name) for name in listed if "#Model#" in name]
        if len(found) == 1:
            return found[0]


def kill(replica: str) -> None:
    ray.kill(ray.get_actor(replica, namespace="serve"), no_restart=True)


def test_a_request_whose_replica_dies_is_answered_by_the_one_that_replaces_it(
    deploy: Callable[..., int], receiver: OtlpReceiver, tmp_path: Path
) -> None:
    hold = tmp_path / "hold"
    port = deploy(model={"engine": "fake", "fake": {"hold_path": str(hold), "load_ms": 3000}})
    hold.touch()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(call, port, "POST", "/v1/embeddings", {"input": "a"})
        wait_for_depth(0, running=True)
        kill(model_replica())
        while call(port, "GET", "/healthz").status != 503:
            pass
        hold.unlink()
        answer = future.result()
    healthy = call(port, "GET", "/healthz")
    spans = receiver.trace(answer.trace_id, names=WHOLE_TRACE)
    first, second = sorted(named(spans, names.HOP_MODEL), key=lambda span: span.start)

    assert (answer.status, healthy.status) == (200, 200)
    assert (first.status, first.attributes["error.type"]) == ("ERROR", "replica_died")
    assert second.attributes["ai.hop.attempt"] == 2
    assert one(spans, names.BATCHED_PREDICT).parent_id == second.span_id
    assert one(spans, names.PREDICT).status == "UNSET"
    # Its second attempt waited for the replacement to load.
    assert one(spans, names.BATCHED_PREDICT).attributes["ai.model.load_type"] == "cold"
    assert second.attributes["ai.hop.wait_ms"] > 1000


def test_a_request_that_two_replicas_die_of_is_refused(
    deploy: Callable[..., int], receiver: OtlpReceiver, tmp_path: Path
) -> None:
    hold = tmp_path / "hold"
    port = deploy(model={"engine": "fake", "fake": {"hold_path": str(hold)}})
    hold.touch()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(call, port, "POST", "/v1/embeddings", {"input": "a"})
        for _ in range(2):
            wait_for_depth(0, running=True)
            kill(dying := model_replica())
            while model_replica() == dying:
                pass
        answer = future.result()
    hold.unlink()
    spans = receiver.trace(answer.trace_id, names={names.PREDICT, names.HOP_MODEL})
    while call(port, "GET", "/healthz").status != 200:
        pass

    assert (answer.status, answer.error["code"]) == (503, "replica_died")
    assert answer.headers["retry-after"] == "1"
    assert one(spans, names.PREDICT).attributes["error.type"] == "replica_died"
    hops = named(spans, names.HOP_MODEL)
    assert sorted(hop.attributes.get("ai.hop.attempt", 1) for hop in hops) == [1, 2]
    assert {hop.attributes["error.type"] for hop in hops} == {"replica_died"}
    assert call(port, "POST", "/v1/embeddings", {"input": "a"}).status == 200
