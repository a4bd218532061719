"""Decides when a batch runs: an admission gate in front of the device. Plain asyncio, no Ray, no torch.

1. Inputs wait here until the device is free. If the device is free, a waiting input forms a batch immediately; while
   the device is busy, inputs wait and the next batch grows. With ``max_wait_ms``, an idle device waits that long for a
   batch to fill. Handing a batch to the device takes a moment in which it would be idle, so at most one batch is
   released while the previous one still runs: a full batch immediately, because waiting gains nothing, otherwise
   whatever is waiting shortly before the run is expected to end. A run that takes longer than expected does not release
   another batch.
2. A batch consists of the oldest waiting input and the inputs that are cheapest to run with it (see ``planner``), taken
   from the first ``grouping_window`` in order of arrival: at most ``max_batch_size`` inputs and ``max_batch_tokens``
   padded tokens. An input that exceeds those tokens runs alone. Every batch takes the oldest input, so an input is
   overtaken by at most as many batches as there were inputs waiting when it arrived. A batch is not larger than what
   runs in ``max_run_ms`` either: what arrives next waits that long.
3. The runner pulls batches (``next_batch``), calls ``begin`` when the run starts and ``end`` when it is over, and sets
   the result of every entry in between. A batch belongs to its puller from ``next_batch`` to ``end``.
4. A request is admitted or rejected (``QueueFull``) as a whole, so a queue limit never splits a request. Tenants share
   the queue's room and its order (see ``fairness``); where this file says arrival, it means that order.
5. A request whose deadline would pass before all that is ahead of it has run, and itself, at the estimated cost (see
   ``cost``), is rejected at once (``DeadlinePassed``), unless the device is idle. So under overload the queue holds
   what can still be answered, and nobody waits in vain.
6. A cancelled input leaves the queue immediately. When a batch is formed, an input whose deadline has passed, or would
   pass during a run of its own, is discarded, and the batch is shrunk until all its inputs meet their deadlines.
7. After a run that did not fit in the device's memory, batches are limited to half of its tokens; the limit grows back
   slowly.
8. Each input's wait is split into the time that the device was busy and the rest, in which an idle device waited for
   the batch to fill. The parts add up to the wait exactly, because they are differences of one running total.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic

from deployments.batching.entry import Batch, BatchEntry, Payload
from deployments.batching.fairness import FairOrder, may_hold
from deployments.batching.planner import BatchPlanner, GateLimits
from deployments.errors import DeadlinePassed, QueueFull
from deployments.messages import Share

_CAUTION, _TIMER_NS = 1.1, 1_000_000
"""Margin kept before a deadline while a batch fills: factor on the run's estimate, and allowance for a late timer."""
_RESERVE = 1.25
"""Factor on what the device is expected to need for a queue: under overload that is as long as the deadlines allow, and
if its work took only a little longer than expected, all of it would be in vain."""
_CREDIT_RUNS = 4
"""What a tenant that used little may have at once, in full runs."""
_LEAD_NS, _LEAD_PART = 4_000_000, 0.25
"""How long before a run's expected end the next batch is formed, and the most it may be of the rest of the run."""


class AdmissionGate(Generic[Payload]):
    """See the rules in the module docstring.

    Args:
        limits: what a batch and the queue may hold.
        clock: monotonic nanoseconds.
    """

    def __init__(self, limits: GateLimits, clock: Callable[[], int] = time.monotonic_ns) -> None:
        self._limits, self._clock = limits, clock
        self.planner = BatchPlanner(limits)
        self._waiting: deque[BatchEntry[Payload]] = deque()
        self._waiting_tokens = 0
        self._order = FairOrder()
        self._held: Counter[str] = Counter()
        self._held_tokens: Counter[str] = Counter()
        """Inputs and tokens that wait, by tenant."""
        self._pullers: deque[asyncio.Future[Batch[Payload]]] = deque()
        # The first is running or being handed to the device; the second is ready to follow it.
        self._released: list[Batch[Payload]] = []
        self._running_batches = 0
        self._run_ends_ns = 0.0
        """When the current run is expected to end."""
        self._busy_since_ns: int | None = None
        self._busy_total_ns = 0
        self._fill_timer: asyncio.TimerHandle | None = None
        self._lead_timer: asyncio.TimerHandle | None = None
        self._drain_rate = _Rate()

    # --- what operators see ---

    @property
    def depth(self) -> int:
        """Waiting inputs, including those of a batch that is ready to follow."""
        return len(self._waiting) + sum(1 for _ in self._ready_to_follow())

    @property
    def waiting_tokens(self) -> int:
        """Padded tokens of the inputs that ``depth`` counts."""
        return self._waiting_tokens + sum(entry.padded for entry in self._ready_to_follow())

    @property
    def is_full(self) -> bool:
        """Whether a request of one short input would be refused now."""
        limits = self._limits
        return self.depth >= limits.max_queue or self.waiting_tokens >= limits.max_queue_tokens

    @property
    def is_busy(self) -> bool:
        """Whether a batch is running."""
        return self._running_batches > 0

    @property
    def running(self) -> int:
        """Inputs running on the device or being handed to it."""
        return len(self._released[0].present) if self._released else 0

    @property
    def oldest_age_ms(self) -> float:
        """How long the oldest waiting input has waited; 0 if there is none. May be read from another thread."""
        waiting = [*self._ready_to_follow(), *tuple(self._waiting)]
        return (self._clock() - min(entry.arrived_ns for entry in waiting)) / 1e6 if waiting else 0.0

    def _ready_to_follow(self) -> Iterator[BatchEntry[Payload]]:
        for batch in self._released[1:]:
            yield from batch.present

    def wait_ns(self) -> float:
        """How long a request that came now would take here, if it is like those that wait: its wait and its own run."""
        depth, tokens = self.depth, self.waiting_tokens
        if not depth and not self._released:
            return 0.0
        return self._device_ns(depth + 1, tokens + (tokens // depth if depth else 0))

    def _device_ns(self, count: int, tokens: int) -> float:
        """How long the device may need for the rest of the run, and for so many inputs and padded tokens after it."""
        return _RESERVE * (max(0.0, self._run_ends_ns - self._clock()) + self.planner.runs_ns(count, tokens))

    # --- the path of an input ---

    async def submit(self, entries: Sequence[BatchEntry[Payload]]) -> list[Any]:
        """Queue the inputs of one request and return, in order, the result or the exception of each.

        Raises QueueFull or DeadlinePassed, without queueing any, if they do not all fit, or not in time.
        """
        for entry in entries:
            entry.padded = self.planner.rounded(entry.tokens)
        was_full = self._may_be_full()
        self._order.credit = _CREDIT_RUNS * self.planner.max_batch_tokens
        tokens = sum(entry.padded for entry in entries)
        self._admit(len(entries), tokens, entries[0].share)
        self._refuse_hopeless(entries, tokens)
        loop, now = asyncio.get_running_loop(), self._clock()
        for entry in entries:
            entry.arrived_ns, entry.depth_on_arrival = now, self.depth
            entry.busy_total_at_arrival_ns = self._busy_at(now)
            entry.result = loop.create_future()
            self._insert(entry)
        if not self._released or self._may_be_full() > was_full:
            self._release_next()
        try:
            return await asyncio.gather(*(entry.result for entry in entries), return_exceptions=True)
        finally:
            for entry in entries:
                self._withdraw(entry)

    def _insert(self, entry: BatchEntry[Payload]) -> None:
        waiting, tenant = self._waiting, entry.share.tenant
        entry.order = self._order.tag(entry.share, entry.padded)
        at = len(waiting)
        while at and waiting[at - 1].order > entry.order:
            at -= 1
        waiting.insert(at, entry)
        self._waiting_tokens += entry.padded
        self._held[tenant] += 1
        self._held_tokens[tenant] += entry.padded

    def _admit(self, count: int, tokens: int, share: Share) -> None:
        limits = self._limits
        queued = self.waiting_tokens
        if self.depth + count > limits.max_queue:
            held = f"{self.depth} inputs of at most {limits.max_queue}, and this request adds {count}"
        elif self.depth and queued + tokens > limits.max_queue_tokens:
            held = f"{queued} tokens of at most {limits.max_queue_tokens}, and this request adds {tokens}"
        elif not may_hold(share, self._held[share.tenant], count, self.depth, limits.max_queue):
            held = f"{self._held[share.tenant]} inputs of {share.tenant!r} already, whose share of it is used up"
        elif not may_hold(share, self._held_tokens[share.tenant], tokens, queued, limits.max_queue_tokens):
            held = f"{self._held_tokens[share.tenant]} tokens of {share.tenant!r} already, whose share of it is used up"
        else:
            return
        raise QueueFull(
            f"the queue holds {held}; try again later",
            retry_after_s=self._drain_rate.seconds_for(queued),
        )

    def _refuse_hopeless(self, entries: Sequence[BatchEntry[Payload]], tokens: int) -> None:
        if not self._released and not self._waiting:
            # The estimate may be wrong, and is corrected by runs only.
            return
        share = entries[0].share
        count, ahead = self.depth, self.waiting_tokens
        if share.tenant:
            place = self._order.next_tag(share)
            behind = [entry.padded for entry in self._waiting if entry.order > place]
            count, ahead = count - len(behind), ahead - sum(behind)
        needs_ns = self._device_ns(count + len(entries), ahead + tokens)
        left_ns = min(entry.deadline_ns for entry in entries) - self._clock()
        if needs_ns > left_ns:
            raise DeadlinePassed(
                f"the deadline would pass in the queue: it passes in {left_ns / 1e6:.0f} ms, and the model needs about "
                f"{needs_ns / 1e6:.0f} ms for what is ahead and for this request",
                retry_after_s=max(1, math.ceil((needs_ns - max(0, left_ns)) / 1e9)),
            )

    def _withdraw(self, entry: BatchEntry[Payload]) -> None:
        """Withdraw an entry whose caller no longer waits. A running entry stays in its batch until the run is over."""
        if entry.has_started or entry.is_gone:
            return
        entry.left_ns = self._clock()
        entry.busy_wait_ns = self._busy_wait(entry, entry.left_ns)
        if entry.batch is None and entry in self._waiting:
            self._remove(entry)

    def _remove(self, entry: BatchEntry[Payload]) -> None:
        self._waiting.remove(entry)
        self._waiting_tokens -= entry.padded
        self._held[entry.share.tenant] -= 1
        self._held_tokens[entry.share.tenant] -= entry.padded

    # --- the path of a batch ---

    async def next_batch(self) -> Batch[Payload]:
        """Wait until the device can take a batch, and return it. The caller owns it until it calls ``end``."""
        ready = asyncio.get_running_loop().create_future()
        self._pullers.append(ready)
        self._release_next()
        batch: Batch[Payload] = await ready
        return batch

    def begin(self, batch: Batch[Payload], at_ns: int | None = None) -> None:
        """Record that the batch's run starts now, or started at ``at_ns``."""
        now = self._clock() if at_ns is None else at_ns
        present = batch.present
        if not present:
            return
        batch.started_ns, batch.queue_behind = now, len(self._waiting)
        for entry in present:
            entry.started_ns = now
            entry.busy_wait_ns = self._busy_wait(entry, now)
        if self._running_batches == 0:
            self._busy_since_ns = now
        self._run_ends_ns = now + self.planner.run_ns(present)
        self._running_batches += 1
        self._release_next()
        self._look_ahead(self._run_ends_ns)

    def end(self, batch: Batch[Payload]) -> None:
        """Record that the batch's run is over, or that it was no longer needed; the device can take the next batch."""
        now = self._clock()
        if batch.has_started:
            self._drain_rate.add(sum(entry.padded for entry in batch.present), now - batch.started_ns)
            self._running_batches -= 1
            if self._busy_since_ns is not None and self._running_batches == 0:
                self._busy_total_ns += max(0, now - self._busy_since_ns)
                self._busy_since_ns = None
                self._stop_looking_ahead()
        self._released.remove(batch)
        self._release_next()

    def _busy_at(self, now: int) -> int:
        """Total time that the device has been busy, up to ``now``."""
        return self._busy_total_ns + (max(0, now - self._busy_since_ns) if self._busy_since_ns is not None else 0)

    def _busy_wait(self, entry: BatchEntry[Payload], until_ns: int) -> int:
        # The device's thread reports its times a moment late, so an input may seem to have arrived before the run that
        # it waited for.
        waited_ns = until_ns - entry.arrived_ns
        return max(0, min(self._busy_at(until_ns) - entry.busy_total_at_arrival_ns, waited_ns))

    # --- releasing a batch ---

    def _release_next(self, *, is_nearly_idle: bool = False) -> None:
        """Release a batch if the device can take it and a puller is waiting, or set the timer that will."""
        is_ahead = len(self._released) == 1 and self._running_batches > 0
        if self._released and not (is_ahead and (is_nearly_idle or self._may_be_full())):
            return
        self._discard_cancelled_and_late()
        puller = self._next_puller()
        if not self._waiting or puller is None:
            return
        batch = self.planner.next_batch(self._waiting, self._clock())
        if is_ahead and not is_nearly_idle and batch.reason not in ("full", "token_budget"):
            return
        if batch.reason == "device_idle" and self._limits.max_wait_ms > 0:
            due_ns = batch.entries[0].arrived_ns + int(self._limits.max_wait_ms * 1e6)
            needs_ns = int(self.planner.run_ns(batch.entries) * _CAUTION) + _TIMER_NS
            latest_ns = min(due_ns, *(entry.deadline_ns - needs_ns for entry in batch.entries))
            if self._clock() < latest_ns:
                self._wait_until(latest_ns)
                return
            batch.reason = "timeout" if latest_ns == due_ns else "deadline"
        self._release(batch, puller)

    def _next_puller(self) -> asyncio.Future[Batch[Payload]] | None:
        while self._pullers and self._pullers[0].done():
            self._pullers.popleft()
        return self._pullers[0] if self._pullers else None

    def _may_be_full(self) -> bool:
        return self.planner.may_be_full(len(self._waiting), self._waiting_tokens)

    def _release(self, batch: Batch[Payload], puller: asyncio.Future[Batch[Payload]]) -> None:
        self._stop_fill_timer()
        self._order.served(batch.entries[0].order)
        for entry in batch.entries:
            self._remove(entry)
            entry.batch = batch
        self._released.append(batch)
        puller.set_result(batch)

    def _look_ahead(self, run_ends_ns: float) -> None:
        """Set the timer that releases the next batch shortly before the run is expected to end."""
        self._stop_looking_ahead()
        left_ns = run_ends_ns - self._clock()
        if left_ns > 0:
            delay_s = (left_ns - min(_LEAD_NS, left_ns * _LEAD_PART)) / 1e9
            loop = asyncio.get_running_loop()
            self._lead_timer = loop.call_later(delay_s, lambda: self._release_next(is_nearly_idle=True))

    def _stop_looking_ahead(self) -> None:
        if self._lead_timer is not None:
            self._lead_timer.cancel()
            self._lead_timer = None

    def _wait_until(self, when_ns: int) -> None:
        self._stop_fill_timer()
        delay_s = max(0.0, (when_ns - self._clock()) / 1e9)
        self._fill_timer = asyncio.get_running_loop().call_later(delay_s, self._release_next)

    def _stop_fill_timer(self) -> None:
        if self._fill_timer is not None:
            self._fill_timer.cancel()
            self._fill_timer = None

    def _discard_cancelled_and_late(self) -> None:
        """Remove inputs whose caller is gone, and fail those that cannot meet their deadline."""
        now, has_rejected = self._clock(), False
        for entry in [e for e in self._waiting if e.result.done() or self.planner.is_late(e, now)]:
            self._remove(entry)
            if not entry.result.done():
                has_rejected |= entry.deadline_ns > now
                entry.fail(self._deadline_passed(entry, now))
        if has_rejected and not self._waiting and not self._released:
            # Only a run could correct an estimate that is too high, and there will be none.
            self.planner.cost.decay_after_rejection()

    def _deadline_passed(self, entry: BatchEntry[Payload], now: int) -> DeadlinePassed:
        waited_ms, left_ms = (now - entry.arrived_ns) / 1e6, (entry.deadline_ns - now) / 1e6
        if left_ms <= 0:
            return DeadlinePassed(f"the deadline passed after {waited_ms:.0f} ms in the queue, before the model ran")
        needs_ms = self.planner.cost.estimate(entry.padded) / 1e6
        return DeadlinePassed(
            f"after {waited_ms:.0f} ms in the queue, {left_ms:.0f} ms remain and the model needs about "
            f"{needs_ms:.0f} ms; it was not run"
        )


class _Rate:
    """Rate at which a busy device drains the queue: tokens per second, smoothed over recent runs."""

    _WEIGHT = 0.2

    def __init__(self) -> None:
        self._per_second: float | None = None

    def add(self, tokens: int, run_ns: int) -> None:
        if run_ns > 0:
            rate = tokens / run_ns * 1e9
            old = self._per_second
            self._per_second = rate if old is None else old + self._WEIGHT * (rate - old)

    def seconds_for(self, tokens: int) -> int:
        """Whole seconds, at least 1, to process ``tokens``; for ``Retry-After``."""
        return 1 if not self._per_second else max(1, math.ceil(tokens / self._per_second))
