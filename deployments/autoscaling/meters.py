"""Load meters of a replica: they measure what it reports to the autoscaling policy, where the work is done."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from deployments.autoscaling.report import LoadReport
from deployments.batching.gate import AdmissionGate

_MEMORY_S, _NOW_S = 5.0, 1.0
_IDLE_S = 2.0
"""After this time without a request, CPU time is no longer attributed to requests."""


class DecayingRate:
    """An amount per second; an amount added ``memory_s`` ago counts 1/e as much as one added now."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, memory_s: float = _MEMORY_S) -> None:
        self._clock, self._memory_s = clock, memory_s
        self._since_s = self._at_s = clock()
        self._sum = 0.0

    def add(self, amount: float) -> None:
        self._decay()
        self._sum += amount

    def per_second(self) -> float:
        """The rate over the time elapsed so far, so that it is correct from the start."""
        self._decay()
        weight = 1 - math.exp(-max(self._at_s - self._since_s, self._memory_s / 10) / self._memory_s)
        return self._sum / (self._memory_s * weight)

    def _decay(self) -> None:
        now_s = self._clock()
        self._sum *= math.exp((self._at_s - now_s) / self._memory_s)
        self._at_s = now_s


class EventLoopMeter:
    """The load of a stage that works in its event loop, or in threads beside it.

    The loop's thread uses at most one processor; its share is the fraction it used. Call ``report`` in that thread.

    Args:
        started_s: when the stage's constructor began, by ``time.monotonic``.
    """

    def __init__(self, started_s: float) -> None:
        self._start_ms = (time.monotonic() - started_s) * 1e3
        self._requests = DecayingRate()
        self._work_s, self._work_now_s = DecayingRate(), DecayingRate(memory_s=_NOW_S)
        self._calls: dict[int, tuple[float, int]] = {}
        self.in_progress = 0
        self._next = 0
        self._loop_s: float | None = None
        self._each_s = 0.0
        self._last_s = -math.inf

    @contextmanager
    def requests(self, count: int) -> Iterator[None]:
        """Meter the handling of ``count`` requests."""
        self.arrive(count)
        self._next += 1
        key = self._next
        self._calls[key] = time.monotonic(), count
        self.in_progress += count
        try:
            yield
        finally:
            self.in_progress -= count
            del self._calls[key]
            self._last_s = time.monotonic()

    def arrive(self, count: int) -> None:
        """Record the arrival of ``count`` requests."""
        self._requests.add(count)
        self._last_s = time.monotonic()

    def arriving(self) -> float:
        """Arriving requests per second."""
        return self._requests.per_second()

    @contextmanager
    def in_thread(self) -> Iterator[None]:
        """Meter work in a thread while it is awaited."""
        began_s = time.monotonic()
        try:
            yield
        finally:
            self._worked(time.monotonic() - began_s)

    def share(self) -> float:
        """Seconds of work per second, in the loop's thread and in the threads beside it."""
        loop_s = time.thread_time()
        if self._loop_s is not None:
            self._worked(loop_s - self._loop_s)
        self._loop_s = loop_s
        return self._work_s.per_second()

    def _worked(self, seconds: float) -> None:
        self._work_s.add(seconds)
        self._work_now_s.add(seconds)

    def report(self) -> LoadReport:
        share, arriving = self.share(), self.arriving()
        now_s = time.monotonic()
        is_idle = self.in_progress == 0 and now_s - self._last_s > _IDLE_S
        if not is_idle:
            self._each_s = share / arriving if arriving > 0 else 0.0
        oldest_s = min((since_s for since_s, _ in self._calls.values()), default=now_s)
        return LoadReport(
            queue_depth=self.in_progress,
            oldest_age_ms=(now_s - oldest_s) * 1e3,
            queue_wait_ms=self.in_progress * self._each_s * 1e3,
            demand=0.0 if is_idle else share,
            demand_now=0.0 if is_idle else self._work_now_s.per_second(),
            throughput=1 / self._each_s if self._each_s > 0 else 0.0,
            start_ms=self._start_ms,
        )


class BatchQueueMeter:
    """The load of the model: what waits in its gate and what arrives there, at the rate of full batches.

    A run costs ``a + b * padded tokens`` (see ``cost``), so a device that is always busy with small batches can take
    more, and how busy it is says little. Arriving work is therefore compared with the rate of full batches.
    """

    def __init__(self, gate: AdmissionGate[Any], started_s: float) -> None:
        self._gate, self._loop = gate, EventLoopMeter(started_s)
        self._tokens = DecayingRate()
        self._tokens_now = DecayingRate(memory_s=_NOW_S)

    def arrive(self, lengths: tuple[int, ...]) -> None:
        """Record the arrival of inputs of these lengths in tokens, whether they are admitted or not."""
        tokens = sum(map(self._gate.planner.rounded, lengths))
        self._loop.arrive(len(lengths))
        self._tokens.add(tokens)
        self._tokens_now.add(tokens)

    def report(self) -> LoadReport:
        gate = self._gate
        inputs, tokens = self._loop.arriving(), self._tokens.per_second()
        mean = tokens / inputs if inputs > 0 and tokens > 0 else 1.0
        rate = gate.planner.tokens_per_second(mean)
        of_loop = self._loop.report()
        return LoadReport(
            queue_depth=gate.depth,
            oldest_age_ms=gate.oldest_age_ms,
            queue_wait_ms=gate.waiting_tokens / rate * 1e3,
            # Whichever is scarcer: the device, or the processor of its event loop.
            demand=max(tokens / rate, of_loop.demand),
            demand_now=max(self._tokens_now.per_second() / rate, of_loop.demand_now),
            throughput=rate / mean,
            start_ms=of_loop.start_ms,
        )
