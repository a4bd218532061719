"""A model replica that dies during a request: the error response, its spans, and the health check until recovery."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ray

from deployments.telemetry import names
from tests.support.cluster import wait_for_depth
from tests.support.http import call
from tests.support.otlp import OtlpReceiver
from tests.support.traces import one


def model_actor() -> ray.actor.ActorHandle[Any]:
    (name,) = [n["name"] for n in ray.util.list_named_actors(all_namespaces=True) if "#Model#" in n["name"]]
    return ray.get_actor(name, namespace="serve")


def test_replica_death_and_recovery(deploy: Callable[..., int], receiver: OtlpReceiver, tmp_path: Path) -> None:
    hold = tmp_path / "hold"
    port = deploy(model={"engine": "fake", "fake": {"hold_path": str(hold), "load_ms": 3000}})
    hold.touch()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(call, port, "POST", "/v1/embeddings", {"input": "a"})
        wait_for_depth(0, running=True)
        ray.kill(model_actor(), no_restart=True)
        answer = future.result()
    hold.unlink()
    spans = receiver.trace(answer.trace_id, names={names.PREDICT, names.HOP_MODEL})
    while call(port, "GET", "/healthz").status != 503:
        pass
    while call(port, "GET", "/healthz").status != 200:
        pass
    after = call(port, "POST", "/v1/embeddings", {"input": "a"})

    assert (answer.status, answer.error["code"]) == (503, "replica_died")
    assert answer.headers["retry-after"] == "1"
    for name in (names.PREDICT, names.HOP_MODEL):
        assert one(spans, name).status == "ERROR"
        assert one(spans, name).attributes["error.type"] == "replica_died"
    assert after.status == 200
