"""What enters a batch, and when: an admission gate in front of the device. Plain asyncio, no Ray, no torch.

1. Inputs wait here until the device is free. A free device and a waiting input make a batch at once; a busy device
   makes inputs wait and the next batch grow. With ``max_wait_ms`` an idle device waits that long for a batch to fill.
   The way from here to the device takes a moment, in which it would be idle. So at most one batch is released while the
   one before it still runs: a full one at once, for it has nothing to gain by waiting, and what there is shortly before
   the run is expected to end. A run that lasts longer than expected makes inputs wait as if it had no end.
2. A batch is the oldest waiting input and those that cost least to run with it (see ``cutting``), out of the first
   ``grouping_window`` in order of arrival: at most ``max_batch_size`` inputs and ``max_batch_tokens`` padded tokens. An
   input that is larger on its own runs alone. Every batch takes the oldest input, so an input is passed over by at most
   as many batches as inputs were waiting when it came.
3. The inputs of a batch are released together, in one tick of the loop, and each is then handed to ``execute`` (the
   function under ``@serve.batch``), whose own queue is therefore never deeper than what was released.
4. A request is admitted whole or refused whole (``QueueFull``), so a limit of the queue never splits a request.
5. A cancelled input leaves the queue at once. When a batch is cut, an input whose deadline has passed, or would pass
   during a run of its own at the estimated cost (see ``cost``), is dropped; and a batch is made smaller until all that
   are in it meet their deadlines.
6. Where a run did not fit the device's memory, batches stay below half of it, and grow again slowly.
7. Each input's wait is split into what the device was busy, and the rest, in which an idle device waited for the batch
   to fill. The parts add up to the wait exactly, because they are differences of one running total.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Generic, TypeVar

from deployments.batching.planner import BatchCutter, DispatchReason, GateLimits, Item
from deployments.errors import DeadlinePassed, QueueFull

Payload = TypeVar("Payload")
_CAUTION, _TIMER_NS = 1.1, 1_000_000
"""A wait to fill leaves a deadline so much more than the run's estimate: what it may be wrong, and a timer late."""
_LEAD_NS, _LEAD_PART = 4_000_000, 0.25
"""How long before a run's expected end the next batch is cut, and at most which part of what is left of the run."""


class AdmissionGate(Generic[Payload]):
    """See the module's rules.

    Args:
        limits: what a batch and the queue may hold.
        execute: runs one released item and returns its result. It must call ``begin`` once for the items that
            really run together, when the run starts, and ``end`` when it is over.
        clock: monotonic nanoseconds.
    """

    def __init__(
        self,
        limits: GateLimits,
        execute: Callable[[Item[Payload]], Awaitable[Any]],
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._limits, self._execute, self._clock = limits, execute, clock
        self.cutter = BatchCutter(limits)
        self._waiting: deque[Item[Payload]] = deque()
        self._waiting_tokens = 0
        self._released: list[set[Item[Payload]]] = []
        self._running_batches = 0
        self._busy_since_ns: int | None = None
        self._busy_total_ns = 0
        self._fill_timer: asyncio.TimerHandle | None = None
        self._lead_timer: asyncio.TimerHandle | None = None
        self._draining = False
        self._drain_rate = _Rate()

    # --- what operators see ---

    @property
    def depth(self) -> int:
        """Inputs waiting, those of a batch that is ready to follow included."""
        return len(self._waiting) + sum(map(len, self._released[1:]))

    @property
    def waiting_tokens(self) -> int:
        """Padded tokens of the inputs that ``depth`` counts."""
        return self._waiting_tokens + sum(item.padded for item in itertools.chain(*self._released[1:]))

    @property
    def is_busy(self) -> bool:
        """Whether a batch runs now."""
        return self._running_batches > 0

    @property
    def running(self) -> int:
        """Inputs on the device, or on their way to it."""
        return len(self._released[0]) if self._released else 0

    @property
    def oldest_age_ms(self) -> float:
        """How long the first waiting input has waited; 0 with none. May be read from another thread."""
        waiting = [*itertools.chain(*self._released[1:]), *itertools.islice(tuple(self._waiting), 1)]
        return (self._clock() - min(item.arrived_ns for item in waiting)) / 1e6 if waiting else 0.0

    # --- the way of an item ---

    async def submit(self, items: Sequence[Item[Payload]]) -> list[Any]:
        """Queue the inputs of one request and return, in order, each one's result or the exception it ended with.

        Raises QueueFull, with nothing queued, where they do not all fit.
        """
        for item in items:
            item.padded = self.cutter.rounded(item.tokens)
        was_full = self._may_be_full()
        self._admit(len(items), sum(item.padded for item in items))
        loop = asyncio.get_running_loop()
        now = self._clock()
        for item in items:
            item.arrived_ns, item.depth_on_arrival = now, self.depth
            item.busy_total_at_arrival_ns = self._busy_at(now)
            item.admitted = loop.create_future()
            self._waiting.append(item)
            self._waiting_tokens += item.padded
        if not self._released or self._may_be_full() > was_full:
            self._pump()
        try:
            return await asyncio.gather(*map(self._pass, items), return_exceptions=True)
        finally:
            # Once more for those cancelled before their ``_pass`` had begun: its own ``finally`` never ran.
            for item in items:
                self._leave(item)

    def _admit(self, count: int, tokens: int) -> None:
        limits = self._limits
        queued = self.waiting_tokens
        if self.depth + count > limits.max_queue:
            held = f"{self.depth} inputs of at most {limits.max_queue}, and this request adds {count}"
        elif self.depth and queued + tokens > limits.max_queue_tokens:
            held = f"{queued} tokens of at most {limits.max_queue_tokens}, and this request adds {tokens}"
        else:
            return
        raise QueueFull(
            f"the queue holds {held}; try again later",
            retry_after_s=self._drain_rate.seconds_for(queued),
        )

    async def _pass(self, item: Item[Payload]) -> Any:
        try:
            await item.admitted
            return await self._execute(item)
        finally:
            self._leave(item)

    def _leave(self, item: Item[Payload]) -> None:
        """The item is gone, by whatever way. One that runs stays in flight until its run is over."""
        if not item.has_started and not item.is_gone:
            item.left_ns = self._clock()
            item.busy_wait_ns = self._busy_wait(item, item.left_ns)
        if not item.admitted.done() or item.admitted.cancelled():
            if item in self._waiting:
                self._remove(item)
        elif not item.has_started and any(item in batch for batch in self._released):
            self._let_go([item])

    def _remove(self, item: Item[Payload]) -> None:
        self._waiting.remove(item)
        self._waiting_tokens -= item.padded

    # --- the device ---

    def begin(self, items: Sequence[Item[Payload]], at_ns: int | None = None) -> None:
        """The run of these items starts, or started ``at_ns``."""
        now = self._clock() if at_ns is None else at_ns
        if not items:
            return
        for item in items:
            item.started_ns = now
            item.queue_behind = len(self._waiting)
            item.busy_wait_ns = self._busy_wait(item, now)
        if self._running_batches == 0:
            self._busy_since_ns = now
        self._running_batches += 1
        self._pump()
        self._look_ahead(now + self.cutter.run_ns(items))

    def end(self, items: Sequence[Item[Payload]]) -> None:
        """Their run is over; the device may take the next batch."""
        now = self._clock()
        started = [item for item in items if item.has_started]
        if started:
            self._drain_rate.add(sum(item.padded for item in started), now - started[0].started_ns)
            self._running_batches -= 1
            if self._busy_since_ns is not None and self._running_batches == 0:
                self._busy_total_ns += max(0, now - self._busy_since_ns)
                self._busy_since_ns = None
                self._stop_looking_ahead()
        self._let_go(items)

    def _busy_at(self, now: int) -> int:
        """How long the device has been busy in all, up to ``now``."""
        return self._busy_total_ns + (max(0, now - self._busy_since_ns) if self._busy_since_ns is not None else 0)

    def _busy_wait(self, item: Item[Payload], until_ns: int) -> int:
        # The device's thread tells its times a moment late, so an item may seem to have come before the run it saw.
        waited_ns = until_ns - item.arrived_ns
        return max(0, min(self._busy_at(until_ns) - item.busy_total_at_arrival_ns, waited_ns))

    def _let_go(self, items: Sequence[Item[Payload]]) -> None:
        for batch in self._released:
            batch.difference_update(items)
        self._released = [batch for batch in self._released if batch]
        self._pump()

    # --- cutting a batch ---

    def drain(self) -> None:
        """From now on cut batches without waiting for more."""
        self._draining = True
        self._pump()

    def _pump(self, *, is_nearly_idle: bool = False) -> None:
        """Cut a batch if the device can take it, or set the timer that will."""
        is_ahead = len(self._released) == 1 and self._running_batches > 0
        if self._released and not (is_ahead and (is_nearly_idle or self._may_be_full())):
            return
        self._drop_the_gone()
        if not self._waiting:
            return
        batch, reason = self.cutter.cut(self._waiting, self._clock())
        if is_ahead and not is_nearly_idle and reason not in ("full", "token_budget"):
            return
        if self._draining:
            reason = "drain"
        elif reason == "device_idle" and self._limits.max_wait_ms > 0:
            due_ns = batch[0].arrived_ns + int(self._limits.max_wait_ms * 1e6)
            needs_ns = int(self.cutter.run_ns(batch) * _CAUTION) + _TIMER_NS
            latest_ns = min(due_ns, *(item.deadline_ns - needs_ns for item in batch))
            if self._clock() < latest_ns:
                self._wait_until(latest_ns)
                return
            reason = "timeout" if latest_ns == due_ns else "deadline"
        self._release(batch, reason)

    def _may_be_full(self) -> bool:
        return self.cutter.may_be_full(len(self._waiting), self._waiting_tokens)

    def _release(self, batch: list[Item[Payload]], reason: DispatchReason) -> None:
        self._stop_fill_timer()
        for item in batch:
            self._remove(item)
            item.reason = reason
        self._released.append(set(batch))
        for item in batch:
            item.admitted.set_result(None)

    def _look_ahead(self, run_ends_ns: float) -> None:
        """Set the timer that cuts the next batch a moment before the run is over."""
        self._stop_looking_ahead()
        left_ns = run_ends_ns - self._clock()
        if left_ns > 0:
            delay_s = (left_ns - min(_LEAD_NS, left_ns * _LEAD_PART)) / 1e9
            self._lead_timer = asyncio.get_running_loop().call_later(delay_s, lambda: self._pump(is_nearly_idle=True))

    def _stop_looking_ahead(self) -> None:
        if self._lead_timer is not None:
            self._lead_timer.cancel()
            self._lead_timer = None

    def _wait_until(self, when_ns: int) -> None:
        self._stop_fill_timer()
        delay_s = max(0.0, (when_ns - self._clock()) / 1e9)
        self._fill_timer = asyncio.get_running_loop().call_later(delay_s, self._pump)

    def _stop_fill_timer(self) -> None:
        if self._fill_timer is not None:
            self._fill_timer.cancel()
            self._fill_timer = None

    def _drop_the_gone(self) -> None:
        """Forget items whose caller is gone, and fail those that cannot make their deadline."""
        now = self._clock()
        for item in [item for item in self._waiting if item.admitted.done() or self.cutter.is_late(item, now)]:
            self._remove(item)
            if not item.admitted.done():
                item.admitted.set_exception(self._late(item, now))

    def _late(self, item: Item[Payload], now: int) -> DeadlinePassed:
        waited_ms, left_ms = (now - item.arrived_ns) / 1e6, (item.deadline_ns - now) / 1e6
        if left_ms <= 0:
            return DeadlinePassed(f"the deadline passed after {waited_ms:.0f} ms in the queue, before the model ran")
        needs_ms = self.cutter.cost.estimate(item.padded) / 1e6
        self.cutter.cost.hope()
        return DeadlinePassed(
            f"after {waited_ms:.0f} ms in the queue {left_ms:.0f} ms are left, and the model needs about "
            f"{needs_ms:.0f} ms; it was not run"
        )


class _Rate:
    """How fast a busy device drains the queue: tokens a second, smoothed over the last runs."""

    _WEIGHT = 0.2

    def __init__(self) -> None:
        self._per_second: float | None = None

    def add(self, tokens: int, run_ns: int) -> None:
        if run_ns > 0:
            rate = tokens / run_ns * 1e9
            old = self._per_second
            self._per_second = rate if old is None else old + self._WEIGHT * (rate - old)

    def seconds_for(self, tokens: int) -> int:
        """Whole seconds, at least 1, in which that many tokens are done: for ``Retry-After``."""
        return 1 if not self._per_second else max(1, math.ceil(tokens / self._per_second))
