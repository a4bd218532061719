"""Actor calls shared by the requests that wait for the same stage. Plain asyncio, no Ray.

A call costs a millisecond or two, whatever is in it; one call for ten requests costs each of them a tenth. No timer
makes requests wait for company:

1. If no call is under way, a request leaves at the end of the loop's tick, with all that came in the same tick; else
   with the next call. Where a stage answers each request as it is ready (``pipelined``), no call holds up the next.
2. With ``rest``, a stage rests after each call for so many times as long as the call took, ``MAX_REST_S`` at most. What
   comes meanwhile leaves together. Where calls have become slow, the processors are short, and fewer calls are the
   cure. A request that has the application to itself does not wait (``is_busy``).
3. A call carries requests up to a weight, and a full one leaves at once. A request heavier than that travels alone and
   holds up nobody.
4. A call that lasts does not hold up the others: ``PATIENCE_S`` after the first of them came, they leave beside it.
5. A request that is gone before its call leaves is not sent. If it goes later, the stage is told (``forget``), and
   when all of a call are gone the call is cancelled.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any

PATIENCE_S = 0.02
MAX_REST_S = 0.04
Replies = Sequence[tuple[int, Any]]
"""Some replies of a call, each with the place of its request in it."""


class Member:
    """One request on its way through a shared call; ``answer`` is its reply, or TimeoutError."""

    __slots__ = ("answer", "call", "request", "timer", "weight")

    def __init__(self, request: Any, weight: int, timeout_s: float) -> None:
        loop = asyncio.get_running_loop()
        self.request, self.weight = request, weight
        self.answer: asyncio.Future[Any] = loop.create_future()
        self.call: _Call | None = None
        self.timer = loop.call_later(timeout_s, self._expire)

    def _expire(self) -> None:
        if not self.answer.done():
            self.answer.set_exception(TimeoutError())

    @property
    def group_size(self) -> int:
        """Requests in its call; 1 where it was not sent."""
        return len(self.call.members) if self.call is not None else 1


class _Call:
    __slots__ = ("is_alone", "members", "task")

    def __init__(self, members: list[Member], is_alone: bool) -> None:
        self.members, self.is_alone = members, is_alone
        self.task: asyncio.Task[None] | None = None


class SharedCalls:
    """The calls to one stage.

    Args:
        exchange: sends requests as one call and yields replies as they come. What it raises, every request of the call
            that has no reply yet gets.
        forget: tells the stage that a request of a call under way is not wanted any more; None where that is not worth
            the telling.
        max_weight: of one call.
        pipelined: whether the stage answers each request as it is ready.
        rest: of the stage after a call, in times that the call took.
        is_busy: whether other requests are in hand; only then does the stage rest.
    """

    def __init__(
        self,
        exchange: Callable[[tuple[Any, ...]], AsyncIterator[Replies]],
        max_weight: int,
        *,
        pipelined: bool = False,
        rest: float = 0.0,
        is_busy: Callable[[], bool] = lambda: True,
        forget: Callable[[Any], Coroutine[Any, Any, None]] | None = None,
    ) -> None:
        self._exchange, self._forget = exchange, forget
        self._max_weight, self._pipelined = max_weight, pipelined
        self._rest, self._is_busy = rest, is_busy
        self._rested_at_s = 0.0
        self._waiting: deque[Member] = deque()
        self._waiting_weight = self._under_way = 0
        self._next_leave: asyncio.Handle | None = None
        self._patience: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        # A shared call is nobody's alone: what the first of its requests has in its context must not reach it (Serve
        # would cancel the call when that request is cancelled).
        self._context = contextvars.copy_context()

    def enter(self, request: Any, weight: int, timeout_s: float) -> Member:
        """Let the request wait for its call. Whoever awaits its ``answer`` must call ``leave`` in the end."""
        member = Member(request, weight, timeout_s)
        self._waiting.append(member)
        self._waiting_weight += member.weight
        self._schedule()
        return member

    def leave(self, member: Member) -> None:
        """The request is over. Where it has no reply, withdraw it."""
        member.timer.cancel()
        answer, call = member.answer, member.call
        if not answer.done():
            answer.cancel()
        is_withdrawn = answer.cancelled() or isinstance(answer.exception(), TimeoutError)
        if not is_withdrawn or call is None or call.task is None or call.task.done():
            return
        if all(other.answer.done() for other in call.members):
            # Cancels the call in the stage too, where it is still running.
            call.task.cancel()
        elif self._forget is not None:
            self._spawn(self._forget(member.request))

    def _is_full(self) -> bool:
        return self._waiting_weight >= self._max_weight

    def _may_leave(self) -> bool:
        return self._pipelined or self._under_way == 0 or self._is_full()

    def _schedule(self) -> None:
        loop = asyncio.get_running_loop()
        if self._may_leave():
            if self._next_leave is None or self._is_full():
                if self._next_leave is not None:
                    self._next_leave.cancel()
                # A timer of the past fires in the next tick.
                must_rest = not self._is_full() and self._is_busy()
                self._next_leave = loop.call_at(self._rested_at_s if must_rest else loop.time(), self._send)
        elif self._patience is None:
            self._patience = loop.call_later(PATIENCE_S, self._out_of_patience)

    def _send(self) -> None:
        self._next_leave = None
        while self._waiting and self._may_leave():
            self._send_one()
        if self._waiting:
            self._schedule()
        elif self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def _out_of_patience(self) -> None:
        self._patience = None
        self._send_one()
        if self._waiting:
            self._schedule()

    def _send_one(self) -> None:
        members, weight = self._next_members()
        if not members:
            return
        call = _Call(members, is_alone=weight > self._max_weight)
        for member in members:
            member.call = call
        self._under_way += not call.is_alone
        call.task = self._spawn(self._carry(call))

    def _next_members(self) -> tuple[list[Member], int]:
        """From the front of the queue, what one call carries, and its weight."""
        members: list[Member] = []
        weight = 0
        while self._waiting and (not members or weight + self._waiting[0].weight <= self._max_weight):
            member = self._waiting.popleft()
            self._waiting_weight -= member.weight
            if not member.answer.done():
                members.append(member)
                weight += member.weight
        return members, weight

    async def _carry(self, call: _Call) -> None:
        members, loop = call.members, asyncio.get_running_loop()
        began_s = loop.time()
        problem: Exception = RuntimeError("the stage left a request without a reply")
        try:
            async for replies in self._exchange(tuple(member.request for member in members)):
                for index, reply in replies:
                    if not members[index].answer.done():
                        members[index].answer.set_result(reply)
        except Exception as error:
            problem = error
        finally:
            self._under_way -= not call.is_alone
            if not call.is_alone:
                self._rested_at_s = loop.time() + min(MAX_REST_S, self._rest * (loop.time() - began_s))
            if self._waiting:
                self._schedule()
        for member in members:
            if not member.answer.done():
                member.answer.set_exception(problem)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work, context=self._context.copy())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
