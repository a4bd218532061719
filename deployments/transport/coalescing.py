"""Actor calls shared by requests that wait for the same stage. Plain asyncio, no Ray.

A call costs a millisecond or two, whatever it carries; one call for ten requests costs each of them a tenth. Requests
do not wait on a timer for others to share a call with:

1. If no call is in flight, a request is sent at the end of the loop's tick, with all that arrived in the same tick;
   otherwise with the next call. If a stage replies to each request as it is ready (``pipelined``), no call delays
   the next.
2. With ``cooldown_factor``, the next call is sent no sooner than that many durations of the last call after its end,
   ``MAX_COOLDOWN_S`` at most; requests that arrive meanwhile are sent together. Slow calls mean that CPU is scarce, and
   fewer calls relieve it. If no other request is in progress, a request does not wait (``is_busy``).
3. A call carries requests up to a maximum weight, and a full one is sent at once. A heavier request is sent alone and
   does not delay others.
4. A slow call does not delay waiting requests: ``MAX_LINGER_S`` after the first of them arrived, they are sent in
   another call.
5. A request that is withdrawn before its call is sent is dropped. If it is withdrawn later, the stage is notified
   (``forget``), and when all requests of a call are withdrawn the call is cancelled.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any

MAX_LINGER_S = 0.02
MAX_COOLDOWN_S = 0.04
Replies = Sequence[tuple[int, Any]]
"""Some replies of a call, each with the index of its request in the call."""


class PendingRequest:
    """One request of a shared call; ``reply`` resolves to its reply or raises TimeoutError."""

    __slots__ = ("call", "reply", "request", "timer", "weight")

    def __init__(self, request: Any, weight: int, timeout_s: float) -> None:
        loop = asyncio.get_running_loop()
        self.request, self.weight = request, weight
        self.reply: asyncio.Future[Any] = loop.create_future()
        self.call: _Call | None = None
        self.timer = loop.call_later(timeout_s, self._expire)

    def _expire(self) -> None:
        if not self.reply.done():
            self.reply.set_exception(TimeoutError())

    @property
    def group_size(self) -> int:
        """Number of requests in its call; 1 if it was not sent."""
        return len(self.call.requests) if self.call is not None else 1


class _Call:
    __slots__ = ("is_alone", "requests", "task")

    def __init__(self, requests: list[PendingRequest], is_alone: bool) -> None:
        self.requests, self.is_alone = requests, is_alone
        self.task: asyncio.Task[None] | None = None


class SharedCalls:
    """The calls to one stage.

    Args:
        exchange: sends requests as one call and yields replies as they arrive. An exception that it raises is passed to
            every request of the call that has no reply yet.
        forget: tells the stage that a request of a call in flight is no longer wanted; None if the stage need not know.
        max_weight: maximum weight of one call.
        pipelined: whether the stage replies to each request as it is ready.
        cooldown_factor: see rule 2, in durations of the last call.
        is_busy: whether other requests are in progress; only then does the cooldown apply.
    """

    def __init__(
        self,
        exchange: Callable[[tuple[Any, ...]], AsyncIterator[Replies]],
        max_weight: int,
        *,
        pipelined: bool = False,
        cooldown_factor: float = 0.0,
        is_busy: Callable[[], bool] = lambda: True,
        forget: Callable[[Any], Coroutine[Any, Any, None]] | None = None,
    ) -> None:
        self._exchange, self._forget = exchange, forget
        self._max_weight, self._pipelined = max_weight, pipelined
        self._cooldown_factor, self._is_busy = cooldown_factor, is_busy
        self._cooled_at_s = 0.0
        self._waiting: deque[PendingRequest] = deque()
        self._waiting_weight = self._in_flight = 0
        self._next_send: asyncio.Handle | None = None
        self._linger_timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        # A shared call must not run in the context of its first request (Serve would cancel the call when that request
        # is cancelled).
        self._context = contextvars.copy_context()

    def submit(self, request: Any, weight: int, timeout_s: float) -> PendingRequest:
        """Queue the request for a call. The caller that awaits its ``reply`` must call ``withdraw`` afterwards."""
        pending = PendingRequest(request, weight, timeout_s)
        self._waiting.append(pending)
        self._waiting_weight += pending.weight
        self._schedule()
        return pending

    def withdraw(self, pending: PendingRequest) -> None:
        """End the request. If it has no reply, it is withdrawn from its call."""
        pending.timer.cancel()
        reply, call = pending.reply, pending.call
        if not reply.done():
            reply.cancel()
        is_withdrawn = reply.cancelled() or isinstance(reply.exception(), TimeoutError)
        if not is_withdrawn or call is None or call.task is None or call.task.done():
            return
        if all(other.reply.done() for other in call.requests):
            # Also cancels the call in the stage, if it is still running.
            call.task.cancel()
        elif self._forget is not None:
            self._spawn(self._forget(pending.request))

    def _is_full(self) -> bool:
        return self._waiting_weight >= self._max_weight

    def _may_send(self) -> bool:
        return self._pipelined or self._in_flight == 0 or self._is_full()

    def _schedule(self) -> None:
        loop = asyncio.get_running_loop()
        if self._may_send():
            if self._next_send is None or self._is_full():
                if self._next_send is not None:
                    self._next_send.cancel()
                # A timer set in the past fires in the next tick.
                must_cool_down = not self._is_full() and self._is_busy()
                self._next_send = loop.call_at(self._cooled_at_s if must_cool_down else loop.time(), self._send)
        elif self._linger_timer is None:
            self._linger_timer = loop.call_later(MAX_LINGER_S, self._send_lingering)

    def _send(self) -> None:
        self._next_send = None
        while self._waiting and self._may_send():
            self._send_one()
        if self._waiting:
            self._schedule()
        elif self._linger_timer is not None:
            self._linger_timer.cancel()
            self._linger_timer = None

    def _send_lingering(self) -> None:
        self._linger_timer = None
        self._send_one()
        if self._waiting:
            self._schedule()

    def _send_one(self) -> None:
        requests, weight = self._next_requests()
        if not requests:
            return
        call = _Call(requests, is_alone=weight > self._max_weight)
        for pending in requests:
            pending.call = call
        self._in_flight += not call.is_alone
        call.task = self._spawn(self._exchange_and_deliver(call))

    def _next_requests(self) -> tuple[list[PendingRequest], int]:
        """Take the requests of one call from the head of the queue; return them and their weight."""
        requests: list[PendingRequest] = []
        weight = 0
        while self._waiting and (not requests or weight + self._waiting[0].weight <= self._max_weight):
            pending = self._waiting.popleft()
            self._waiting_weight -= pending.weight
            if not pending.reply.done():
                requests.append(pending)
                weight += pending.weight
        return requests, weight

    async def _exchange_and_deliver(self, call: _Call) -> None:
        requests, loop = call.requests, asyncio.get_running_loop()
        began_s = loop.time()
        problem: Exception = RuntimeError("the stage left a request without a reply")
        try:
            async for replies in self._exchange(tuple(pending.request for pending in requests)):
                for index, reply in replies:
                    if not requests[index].reply.done():
                        requests[index].reply.set_result(reply)
        except Exception as error:
            problem = error
        finally:
            self._in_flight -= not call.is_alone
            if not call.is_alone:
                self._cooled_at_s = loop.time() + min(MAX_COOLDOWN_S, self._cooldown_factor * (loop.time() - began_s))
            if self._waiting:
                self._schedule()
        for pending in requests:
            if not pending.reply.done():
                pending.reply.set_exception(problem)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work, context=self._context.copy())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
