"""The router for the model's replicas: least outstanding work, by what was sent."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ray.serve.request_router import RequestRouter

from deployments.messages import Call, Carrier, Envelope, PredictRequest, Ragged
from deployments.transport.routing import LeastWorkRouter


def replica(name: str) -> Any:
    return SimpleNamespace(replica_id=name)


def pending(ident: str, *lengths: tuple[int, ...]) -> Any:
    """A call with one request for each tuple of lengths."""
    envelope = Envelope(Carrier("00-" + "a" * 32 + "-" + "b" * 16 + "-01"), "id", 1000.0, 0)
    calls = tuple(
        Call(envelope, PredictRequest(Ragged(np.zeros(sum(of_one), np.int32), of_one), "input")) for of_one in lengths
    )
    return SimpleNamespace(args=[calls], metadata=SimpleNamespace(internal_request_id=ident))


@pytest.fixture
def router(monkeypatch: pytest.MonkeyPatch) -> Any:
    for of_serve in ("update_replicas", "on_send_request"):
        monkeypatch.setattr(RequestRouter, of_serve, lambda *_: None)
    made = LeastWorkRouter.__new__(LeastWorkRouter)
    made.initialize_state()
    return made


def chosen(router: Any, replicas: list[Any]) -> list[str]:
    ranks = asyncio.run(router.choose_replicas(replicas))
    return [one.replica_id for rank in ranks for one in rank]


def test_a_call_goes_to_the_replica_with_the_least_work(router: Any) -> None:
    replicas = [replica("a"), replica("b"), replica("c")]
    # Two calls of a few tokens are less than one of many requests.
    router.on_request_routed(pending("1", (10,)), "a", None)
    router.on_request_routed(pending("2", (10,)), "a", None)
    router.on_request_routed(pending("3", *[(10,)] * 9), "b", None)
    router.on_request_routed(pending("4", (500,)), "c", None)

    assert chosen(router, replicas) == ["a", "b", "c"]


def test_work_ends_with_its_call(router: Any) -> None:
    router.on_request_routed(pending("1", (100,)), "a", None)
    router.on_request_routed(pending("2", (50,)), "b", None)
    assert chosen(router, [replica("a"), replica("b")]) == ["b", "a"]
    router.on_request_completed("a", "1")

    assert chosen(router, [replica("a"), replica("b")]) == ["a", "b"]
    assert router.work("a") == 0


def test_calls_sent_together_go_to_different_replicas(router: Any) -> None:
    """Each is counted when it is sent, before the replica accepts it."""
    replicas = [replica("a"), replica("b"), replica("c")]
    router.on_send_request("a")
    router.on_request_routed(pending("0", (84,)), "a", None)
    router.on_request_completed("a", "0")
    went = []
    for _ in range(3):
        went.append(chosen(router, replicas)[0])
        router.on_send_request(went[-1])

    assert sorted(went) == ["a", "b", "c"]


def test_a_rejected_call_adds_no_work(router: Any) -> None:
    router.on_send_request("a")
    router.on_request_routed(pending("0", (84,)), "a", None)
    router.on_request_completed("a", "0")
    router.on_send_request("a")
    router.on_request_completed("a", "refused")
    # Serve reports a call that could not be sent in the same way.
    router.on_request_completed("a", "not sent")

    assert router.work("a") == 0


def test_removed_replicas_are_forgotten(router: Any) -> None:
    router.on_send_request("a")
    router.on_request_routed(pending("1", (84,)), "a", None)
    router.update_replicas([replica("b")])
    router.on_request_completed("a", "1")

    assert router.work("a") == 0
    assert "a" not in router.tracked


def test_only_a_few_of_many_replicas_are_considered(router: Any) -> None:
    replicas = [replica(str(number)) for number in range(1000)]
    first = {chosen(router, replicas)[0] for _ in range(50)}

    assert len(chosen(router, replicas)) == 8
    assert len(first) > 20


@pytest.mark.parametrize("args", [[], [("traceparent",)], [3]])
def test_calls_of_other_methods_add_no_work(router: Any, args: list[Any]) -> None:
    other = SimpleNamespace(args=args, metadata=SimpleNamespace(internal_request_id="1"))
    router.on_send_request("a")
    router.on_request_routed(other, "a", None)
    assert router.work("a") == 0
    router.on_request_completed("a", "1")

    assert router.work("a") == 0
