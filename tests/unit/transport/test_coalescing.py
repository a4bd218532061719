"""Shared calls, in virtual time: which requests are sent when, and that none is lost or affected by another."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from deployments.transport.coalescing import MAX_COOLDOWN_S, MAX_LINGER_S, PendingRequest, Replies, SharedCalls
from tests.support.virtual_time import virtual


class Stage:
    """Replies to a call when the test says so, or to each request as it is ready."""

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
async def test_requests_of_one_tick_are_sent_together_at_once() -> None:
    stage = Stage()
    answers = [stage.ask(name) for name in "abc"]
    await settle()
    assert stage.calls == [("a", "b", "c")]
    stage.gates[0].set()
    assert await asyncio.gather(*answers) == [("a!", 3), ("b!", 3), ("c!", 3)]


@virtual
async def test_requests_during_a_call_are_sent_with_the_next() -> None:
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
async def test_a_pipelined_call_does_not_delay_the_next() -> None:
    stage = Stage(pipelined=True)
    stage.ask("a")
    await settle()
    stage.ask("b")
    await settle()
    assert stage.calls == [("a",), ("b",)]


@virtual
async def test_a_full_call_is_sent_at_once_and_an_oversized_request_alone() -> None:
    stage = Stage()
    stage.ask("first")
    await settle()
    for name in ("a", "b", "c"):
        stage.ask(name, weight=4)
    await settle()
    # A weight of 12 is waiting and 10 fit, so the call is full. The third request waits for the next.
    assert stage.calls[1:] == [("a", "b")]
    stage.gates[0].set()
    stage.gates[1].set()
    await settle()
    assert stage.calls[2:] == [("c",)]

    stage.ask("huge", weight=11)
    stage.ask("small")
    await settle()
    # Requests are sent in order, the huge one alone.
    assert stage.calls[3:] == [("huge",)]
    stage.gates[2].set()
    await settle()
    # The huge one is still in flight and delays no other.
    assert stage.calls[4:] == [("small",)]


@virtual
async def test_a_long_call_delays_the_others_by_at_most_the_linger_time() -> None:
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
async def test_cooldown_is_proportional_to_the_last_call() -> None:
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
async def test_cooldown_is_bounded_and_skipped_by_full_calls_and_lone_requests() -> None:
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
async def test_a_request_cancelled_before_its_call_is_not_sent() -> None:
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
async def test_a_request_cancelled_in_a_shared_call_is_forgotten_and_the_others_get_replies() -> None:
    stage = Stage(pipelined=True)
    gone, stays = stage.ask("gone"), stage.ask("stays")
    await settle()
    gone.cancel()
    await settle()
    assert (stage.forgotten, stage.cancelled) == (["gone"], [])
    stage.gates[0].set()
    assert await stays == ("stays!", 2)


@virtual
async def test_a_call_with_no_waiting_requests_is_cancelled() -> None:
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
async def test_a_request_times_out_even_while_it_waits_for_its_call() -> None:
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
async def test_a_call_error_reaches_all_its_requests_and_does_not_affect_the_next_call() -> None:
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
async def test_a_request_without_a_reply_gets_an_error() -> None:
    async def forgetful(requests: tuple[Any, ...]) -> AsyncIterator[Replies]:
        yield [(0, "only the first")]

    shared = SharedCalls(forgetful, 10)
    members: list[PendingRequest] = [shared.submit(name, 1, 60.0) for name in "ab"]
    assert await members[0].reply == "only the first"
    with pytest.raises(RuntimeError, match="left a request without a reply"):
        await members[1].reply


@virtual
async def test_a_call_does_not_inherit_the_context_of_a_request() -> None:
    """The context of the first request does not reach the call."""
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
