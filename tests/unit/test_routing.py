"""The router of the model's replicas: the least work, by what was sent and what is reported."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve.request_router import RequestRouter

from deployments.routing import LeastWorkRouter


def replica(name: str, **stats: float) -> Any:
    return SimpleNamespace(replica_id=name, routing_stats=stats)


def pending(ident: str, *lengths: tuple[int, ...]) -> Any:
    """A call of one request for each tuple of lengths."""
    requests = tuple(SimpleNamespace(ids=SimpleNamespace(lengths=of_one)) for of_one in lengths)
    return SimpleNamespace(args=[requests], metadata=SimpleNamespace(internal_request_id=ident))


@pytest.fixture
def router(monkeypatch: pytest.MonkeyPatch) -> LeastWorkRouter:
    monkeypatch.setattr(RequestRouter, "update_replicas", lambda *_: None)
    made = LeastWorkRouter.__new__(LeastWorkRouter)
    made.initialize_state()
    return made


def chosen(router: LeastWorkRouter, replicas: list[Any]) -> list[str]:
    ranks = asyncio.run(router.choose_replicas(replicas))
    return [one.replica_id for rank in ranks for one in rank]


def test_a_call_goes_where_the_least_work_is(router: LeastWorkRouter) -> None:
    replicas = [replica("a"), replica("b"), replica("c")]
    # Two calls of a few tokens are less than one of many requests.
    router.on_request_routed(pending("1", (10,)), "a", None)
    router.on_request_routed(pending("2", (10,)), "a", None)
    router.on_request_routed(pending("3", *[(10,)] * 9), "b", None)
    router.on_request_routed(pending("4", (500,)), "c", None)

    assert chosen(router, replicas) == ["a", "b", "c"]


def test_work_is_over_when_the_call_is(router: LeastWorkRouter) -> None:
    router.on_request_routed(pending("1", (100,)), "a", None)
    router.on_request_routed(pending("2", (50,)), "b", None)
    assert chosen(router, [replica("a"), replica("b")]) == ["b", "a"]
    router.on_request_completed("a", "1")

    assert chosen(router, [replica("a"), replica("b")]) == ["a", "b"]
    assert router.work("a") == 0


def test_what_others_sent_counts_as_it_is_reported(router: LeastWorkRouter) -> None:
    router.on_request_routed(pending("1", (84,)), "a", None)
    # Of the 130 tokens that a has to run 100 are one's own.
    router.update_replicas([replica("a", work=130.0), replica("b", work=200.0)])
    assert (router.work("a"), router.work("b")) == (130, 200)
    router.on_request_completed("a", "1")

    assert router.work("a") == 30


def test_an_old_report_is_not_taken_for_a_new_one(router: LeastWorkRouter) -> None:
    a = replica("a", work=100.0)
    router.update_replicas([a])
    router.on_request_routed(pending("1", (84,)), "a", None)
    router.update_replicas([a])

    assert router.work("a") == 200


def test_replicas_that_are_gone_are_forgotten(router: LeastWorkRouter) -> None:
    router.on_request_routed(pending("1", (84,)), "a", None)
    router.update_replicas([replica("a", work=500.0), replica("b")])
    router.update_replicas([replica("b")])
    router.on_request_completed("a", "1")

    assert router.work("a") == 0
    assert "a" not in router._own


def test_of_many_replicas_a_few_are_looked_at(router: LeastWorkRouter) -> None:
    replicas = [replica(str(number)) for number in range(1000)]
    first = {chosen(router, replicas)[0] for _ in range(50)}

    assert len(chosen(router, replicas)) == 8
    assert len(first) > 20
