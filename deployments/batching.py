"""What enters a batch, and when: an admission gate in front of the device. Plain asyncio, no Ray, no torch.

1. Inputs wait here, in order of arrival, until the device is free. A free device and a waiting input make a batch at
   once; a busy device makes inputs wait and the next batch grow. With ``max_wait_ms`` an idle device waits that long
   for a batch to fill.
2. A batch takes from the front what fits: at most ``max_batch_size`` inputs and ``max_batch_tokens`` padded tokens
   (longest times count). An input that is larger on its own runs alone.
3. The inputs of a batch are released together, in one tick of the loop, and each is then handed to ``execute`` (the
   function under ``@serve.batch``), whose own queue is therefore never deeper than what was released. The device is
   free again when no released input is left in flight.
4. A request is admitted whole or refused whole (``QueueFull``), so a queue limit never splits a request.
5. A cancelled input leaves the queue at once. An input whose deadline has passed is dropped when its batch is cut.
6. Each input's wait is split into what the device was busy, and the rest, in which an idle device waited for the batch
   to fill. The parts add up to the wait exactly, because they are differences of one running total.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

from deployments.errors import DeadlinePassed, QueueFull

DispatchReason = Literal["full", "token_budget", "timeout", "device_idle", "deadline", "drain"]
Payload = TypeVar("Payload")
NEVER = -1
"""A time that has not come."""


@dataclass(frozen=True, slots=True)
class GateLimits:
    max_batch_size: int
    max_batch_tokens: int
    max_wait_ms: float
    max_queue: int


@dataclass(eq=False, slots=True)
class Item(Generic[Payload]):
    """One input on its way through the gate. Times are monotonic nanoseconds of this process."""

    payload: Payload
    tokens: int
    deadline_ns: int
    arrived_ns: int = NEVER
    depth_on_arrival: int = 0
    busy_total_at_arrival_ns: int = 0
    started_ns: int = NEVER
    left_ns: int = NEVER
    """When it left without having run."""
    busy_wait_ns: int = 0
    reason: DispatchReason | None = None
    queue_behind: int = 0
    admitted: asyncio.Future[None] = field(init=False)

    @property
    def has_started(self) -> bool:
        return self.started_ns != NEVER

    @property
    def wait_ns(self) -> int:
        return (self.started_ns if self.has_started else self.left_ns) - self.arrived_ns

    @property
    def fill_wait_ns(self) -> int:
        return self.wait_ns - self.busy_wait_ns


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
        self._waiting: deque[Item[Payload]] = deque()
        self._released: set[Item[Payload]] = set()
        self._busy_since_ns: int | None = None
        self._busy_total_ns = 0
        self._last_run_ns = 0
        self._fill_timer: asyncio.TimerHandle | None = None
        self._draining = False
        self._drain_rate = _Rate()

    # --- what operators see ---

    @property
    def depth(self) -> int:
        """Inputs waiting."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Inputs released and not done."""
        return len(self._released)

    @property
    def oldest_age_ms(self) -> float:
        """How long the first waiting input has waited; 0 with none. May be read from another thread."""
        try:
            return (self._clock() - self._waiting[0].arrived_ns) / 1e6
        except IndexError:
            return 0.0

    # --- the way of an item ---

    async def submit(self, items: Sequence[Item[Payload]]) -> list[Any]:
        """Queue the inputs of one request and return, in order, each one's result or the exception it ended with.

        Raises QueueFull, with nothing queued, where they do not all fit.
        """
        if self.depth + len(items) > self._limits.max_queue:
            raise QueueFull(
                f"the queue holds {self.depth} inputs of at most {self._limits.max_queue}, and this request adds "
                f"{len(items)}; try again later",
                retry_after_s=self._drain_rate.seconds_for(self.depth),
            )
        loop = asyncio.get_running_loop()
        now = self._clock()
        for item in items:
            item.arrived_ns, item.depth_on_arrival = now, self.depth
            item.busy_total_at_arrival_ns = self._busy_at(now)
            item.admitted = loop.create_future()
            self._waiting.append(item)
        self._pump()
        try:
            return await asyncio.gather(*map(self._pass, items), return_exceptions=True)
        finally:
            # Once more for those cancelled before their ``_pass`` had begun: its own ``finally`` never ran.
            for item in items:
                self._leave(item)

    async def _pass(self, item: Item[Payload]) -> Any:
        try:
            await item.admitted
            return await self._execute(item)
        finally:
            self._leave(item)

    def _leave(self, item: Item[Payload]) -> None:
        """The item is gone, by whatever way. One that runs stays in flight until its run is over."""
        if not item.has_started and item.left_ns == NEVER:
            item.left_ns = self._clock()
            item.busy_wait_ns = self._busy_at(item.left_ns) - item.busy_total_at_arrival_ns
        if not item.admitted.done() or item.admitted.cancelled():
            if item in self._waiting:
                self._waiting.remove(item)
        elif not item.has_started and item in self._released:
            self._released.discard(item)
            self._pump()

    # --- the device ---

    def begin(self, items: Sequence[Item[Payload]]) -> int:
        """The run of these items starts now. Returns the time."""
        now = self._clock()
        for item in items:
            item.started_ns = now
            item.busy_wait_ns = self._busy_at(now) - item.busy_total_at_arrival_ns
        self._busy_since_ns = now
        return now

    def end(self, items: Sequence[Item[Payload]]) -> None:
        """Their run is over; the device may take the next batch."""
        now = self._clock()
        self._last_run_ns = now - self._busy_since_ns if self._busy_since_ns is not None else 0
        self._busy_total_ns += self._last_run_ns
        self._busy_since_ns = None
        self._drain_rate.add(len(items), self._last_run_ns)
        self._released.difference_update(items)
        self._pump()

    def _busy_at(self, now: int) -> int:
        """How long the device has been busy in all, up to ``now``."""
        return self._busy_total_ns + (now - self._busy_since_ns if self._busy_since_ns is not None else 0)

    # --- cutting a batch ---

    def drain(self) -> None:
        """From now on cut batches without waiting for more."""
        self._draining = True
        self._pump()

    def _pump(self) -> None:
        """If the device is free and something waits, cut a batch or set the timer that will."""
        if self._released:
            return
        self._drop_the_gone()
        if not self._waiting:
            return
        batch, reason = self._front()
        if self._draining:
            reason = "drain"
        elif reason == "device_idle" and self._limits.max_wait_ms > 0:
            due_ns = batch[0].arrived_ns + int(self._limits.max_wait_ms * 1e6)
            latest_ns = min(due_ns, *(item.deadline_ns - self._last_run_ns for item in batch))
            if self._clock() < latest_ns:
                self._wait_until(latest_ns)
                return
            reason = "timeout" if latest_ns == due_ns else "deadline"
        self._release(batch, reason)

    def _front(self) -> tuple[list[Item[Payload]], DispatchReason]:
        """What fits from the front of the queue, and what ended it."""
        batch: list[Item[Payload]] = []
        longest = 0
        for item in self._waiting:
            if len(batch) == self._limits.max_batch_size:
                return batch, "full"
            longest = max(longest, item.tokens)
            if batch and longest * (len(batch) + 1) > self._limits.max_batch_tokens:
                return batch, "token_budget"
            batch.append(item)
        return batch, "full" if len(batch) == self._limits.max_batch_size else "device_idle"

    def _release(self, batch: list[Item[Payload]], reason: DispatchReason) -> None:
        self._stop_fill_timer()
        for item in batch:
            self._waiting.popleft()
            item.reason = reason
        self._released = set(batch)
        for item in batch:
            item.queue_behind = self.depth
            item.admitted.set_result(None)

    def _wait_until(self, when_ns: int) -> None:
        self._stop_fill_timer()
        delay_s = max(0.0, (when_ns - self._clock()) / 1e9)
        self._fill_timer = asyncio.get_running_loop().call_later(delay_s, self._pump)

    def _stop_fill_timer(self) -> None:
        if self._fill_timer is not None:
            self._fill_timer.cancel()
            self._fill_timer = None

    def _drop_the_gone(self) -> None:
        """Forget items whose caller is gone, and fail those whose deadline has passed."""
        now = self._clock()
        for item in [item for item in self._waiting if item.admitted.done() or item.deadline_ns <= now]:
            self._waiting.remove(item)
            if not item.admitted.done():
                waited_ms = (now - item.arrived_ns) / 1e6
                item.admitted.set_exception(
                    DeadlinePassed(f"the deadline passed after {waited_ms:.0f} ms in the queue, before the model ran")
                )


class _Rate:
    """How fast a busy device drains the queue: items a second, smoothed over the last runs."""

    _WEIGHT = 0.2

    def __init__(self) -> None:
        self._per_second: float | None = None

    def add(self, items: int, run_ns: int) -> None:
        if run_ns > 0:
            rate = items / run_ns * 1e9
            old = self._per_second
            self._per_second = rate if old is None else old + self._WEIGHT * (rate - old)

    def seconds_for(self, items: int) -> int:
        """Whole seconds, at least 1, in which that many items are done: for ``Retry-After``."""
        return 1 if not self._per_second else max(1, math.ceil(items / self._per_second))
