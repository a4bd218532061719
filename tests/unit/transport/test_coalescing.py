"""Shared calls, in virtual time: who leaves when and with whom, and that nobody is lost or harmed by another."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from deployments.transport.coalescing import MAX_COOLDOWN_S, MAX_LINGER_S, PendingRequest, Replies, SharedCalls
from tests.support.virtual_time import virtual


class Stage:
    """Answers a call when the test says so, or each request as it is ready."""

    def __init__(self, **settings: Any) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.sent_s: list[float] = []
        self.gates: list[asyncio.Event] = []
        self.cancelled: list[tuple[Any, ...]] = []
        self.forgotten: list[Any] = []
        self.error: Exception | None = None
        forget = self._forget if settings.get("pipelined") else None
        self.shared = SharedCalls(self._exchange, 10, forget=forget, **settings)

    async def _exchange(self, requests: tuple[Any, ...]) -> AsyncIterator[Replies]:
        gate = asyncio.Event()
        self.calls.append(requests)
        self.gates.append(gate)
        self.sent_s.append(asyncio.get_running_loop().time())
        try:
            await gate.wait()
        except asyncio.CancelledError:
            self.cancelled.append(requests)
            raise
        if self.error is not None:
            raise self.error
        yield [(i, f"{request}!") for i, request in enumerate(requests)]

    async def _forget(self, request: Any) -> None:
        self.forgotten.append(request)

    def ask(self, request: Any, weight: int = 1, timeout_s: float = 60.0) -> asyncio.Task[Any]:
        return asyncio.ensure_future(self._ask(request, weight, timeout_s))

    async def _ask(self, request: Any, weight: int, timeout_s: float) -> Any:
        pending = self.shared.submit(request, weight, timeout_s)
        try:
            return await pending.reply, pending.group_size
        finally:
            self.shared.withdraw(pending)


async def settle() -> None:
    for _ in range(8):
        await asyncio.sleep(0)


@virtual
async def test_what_comes_in_one_tick_leaves_together_at_once() -> None:
    stage = Stage()
    answers = [stage.ask(name) for name in "abc"]
    await settle()
    assert stage.calls == [("a", "b", "c")]
    stage.gates[0].set()
    assert await asyncio.gather(*answers) == [("a!", 3), ("b!", 3), ("c!", 3)]


@virtual
async def test_what_comes_while_a_call_is_under_way_leaves_with_the_next() -> None:
    stage = Stage()
    stage.ask("a")
    await settle()
    answers = [stage.ask(name) for name in "bc"]
    await settle()
    assert stage.calls == [("a",)]
    stage.gates[0].set()
    await settle()
    assert stage.calls == [("a",), ("b", "c")]
    assert stage.sent_s[0] == stage.sent_s[1]
    stage.gates[1].set()
    assert await asyncio.gather(*answers) == [("b!", 2), ("c!", 2)]


@virtual
async def test_where_replies_come_as_they_are_ready_no_call_holds_up_the_next() -> None:
    stage = Stage(pipelined=True)
    stage.ask("a")
    await settle()
    stage.ask("b")
    await settle()
    assert stage.calls == [("a",), ("b",)]


@virtual
async def test_a_full_call_leaves_at_once_and_one_that_is_heavier_alone() -> None:
    stage = Stage()
    stage.ask("first")
    await settle()
    for name in ("a", "b", "c"):
        stage.ask(name, weight=4)
    await settle()
    # Twelve are waiting, ten fit: the call is full. The third waits for the next.
    assert stage.calls[1:] == [("a", "b")]
    stage.gates[0].set()
    stage.gates[1].set()
    await settle()
    assert stage.calls[2:] == [("c",)]

    stage.ask("huge", weight=11)
    stage.ask("small")
    await settle()
    # What waited before a huge one goes with it in mind: each in its turn, the huge one alone.
    assert stage.calls[3:] == [("huge",)]
    stage.gates[2].set()
    await settle()
    # The huge one is still under way and holds up nobody.
    assert stage.calls[4:] == [("small",)]


@virtual
async def test_a_call_that_lasts_holds_up_the_others_for_the_patience_only() -> None:
    stage = Stage()
    stage.ask("stuck")
    await settle()
    answer = stage.ask("next")
    await asyncio.sleep(MAX_LINGER_S * 1.5)
    assert stage.calls == [("stuck",), ("next",)]
    assert stage.sent_s[1] - stage.sent_s[0] == pytest.approx(MAX_LINGER_S)
    stage.gates[1].set()
    assert await answer == ("next!", 1)


@virtual
async def test_a_stage_rests_after_a_call_in_proportion_to_it_and_what_comes_leaves_together() -> None:
    stage = Stage(cooldown_factor=2.0)
    stage.ask("a")
    await asyncio.sleep(0.005)
    stage.gates[0].set()
    await settle()
    for name in "bc":
        stage.ask(name)
        await asyncio.sleep(0.003)
    assert stage.calls == [("a",)]
    await asyncio.sleep(0.005)
    assert stage.calls[1:] == [("b", "c")]
    assert stage.sent_s[1] - stage.sent_s[0] == pytest.approx(0.005 + 2 * 0.005)


@virtual
async def test_the_rest_is_bounded_and_neither_a_full_call_nor_a_lone_request_keeps_it() -> None:
    busy = True
    stage = Stage(cooldown_factor=2.0, is_busy=lambda: busy)
    stage.ask("a")
    await asyncio.sleep(1.0)
    stage.gates[0].set()
    await settle()
    stage.ask("b")
    await asyncio.sleep(MAX_COOLDOWN_S * 1.01)
    assert stage.calls[1:] == [("b",)]
    assert stage.sent_s[1] - stage.sent_s[0] == pytest.approx(1.0 + MAX_COOLDOWN_S)
    stage.gates[1].set()
    await settle()

    stage.ask("full", weight=10)
    await settle()
    assert stage.calls[2:] == [("full",)]
    stage.gates[2].set()
    await asyncio.sleep(0.001)

    busy = False
    stage.ask("alone")
    await settle()
    assert stage.calls[3:] == [("alone",)]


@virtual
async def test_a_request_that_is_gone_before_its_call_leaves_is_not_sent() -> None:
    stage = Stage()
    stage.ask("first")
    await settle()
    gone, stays = stage.ask("gone"), stage.ask("stays")
    await settle()
    gone.cancel()
    stage.gates[0].set()
    await settle()
    assert stage.calls[1:] == [("stays",)]
    stage.gates[1].set()
    assert await stays == ("stays!", 1)


@virtual
async def test_one_that_goes_from_a_shared_call_is_forgotten_and_the_others_get_their_answers() -> None:
    stage = Stage(pipelined=True)
    gone, stays = stage.ask("gone"), stage.ask("stays")
    await settle()
    gone.cancel()
    await settle()
    assert (stage.forgotten, stage.cancelled) == (["gone"], [])
    stage.gates[0].set()
    assert await stays == ("stays!", 2)


@virtual
async def test_a_call_that_nobody_waits_for_is_cancelled() -> None:
    stage = Stage(pipelined=True)
    one, other = stage.ask("one"), stage.ask("other", timeout_s=5.0)
    await settle()
    one.cancel()
    with pytest.raises(TimeoutError):
        await other
    await settle()
    assert stage.cancelled == [("one", "other")]
    assert stage.forgotten == ["one"]


@virtual
async def test_a_request_whose_time_is_up_gets_a_timeout_while_it_waits_for_its_call_too() -> None:
    stage = Stage()
    stage.ask("first")
    await settle()
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    with pytest.raises(TimeoutError):
        await stage.ask("late", timeout_s=MAX_LINGER_S / 2)
    assert loop.time() - began_s == pytest.approx(MAX_LINGER_S / 2)
    stage.gates[0].set()
    await settle()
    assert stage.calls == [("first",)]


@virtual
async def test_an_error_of_the_call_reaches_all_in_it_and_the_next_call_is_none_the_worse() -> None:
    stage = Stage()
    answers = [stage.ask(name) for name in "ab"]
    await settle()
    after = stage.ask("c")
    await settle()
    stage.error = ValueError("down")
    stage.gates[0].set()
    results = await asyncio.gather(*answers, return_exceptions=True)
    assert [str(result) for result in results] == ["down", "down"]
    stage.error = None
    await settle()
    stage.gates[1].set()
    assert await after == ("c!", 1)


@virtual
async def test_a_request_without_a_reply_gets_an_error_and_not_silence() -> None:
    async def forgetful(requests: tuple[Any, ...]) -> AsyncIterator[Replies]:
        yield [(0, "only the first")]

    shared = SharedCalls(forgetful, 10)
    members: list[PendingRequest] = [shared.submit(name, 1, 60.0) for name in "ab"]
    assert await members[0].reply == "only the first"
    with pytest.raises(RuntimeError, match="left a request without a reply"):
        await members[1].reply


@virtual
async def test_a_call_is_nobodys_alone() -> None:
    """What the first request has in its context does not reach the call."""
    import contextvars

    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="clean")
    seen = []

    async def exchange(requests: tuple[Any, ...]) -> AsyncIterator[Replies]:
        seen.append(variable.get())
        yield [(i, "x") for i, _ in enumerate(requests)]

    shared = SharedCalls(exchange, 10)

    async def ask() -> None:
        variable.set("of one request")
        await shared.submit("a", 1, 60.0).reply

    await asyncio.ensure_future(ask())
    assert seen == ["clean"]
