"""Load meters of a replica: they measure what it reports to the autoscaling policy, where the work is done."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from deployments.autoscaling.report import LoadReport
from deployments.batching.gate import AdmissionGate
from deployments.batching.generation.step_cost import StepCost

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
        started_s: when the stage's constructor began, by ``clock``.
        clock: monotonic seconds.
        cpu_s: CPU time of the loop's thread, in seconds.
    """

    def __init__(
        self,
        started_s: float,
        clock: Callable[[], float] = time.monotonic,
        cpu_s: Callable[[], float] = time.thread_time,
    ) -> None:
        self._clock, self._cpu_s = clock, cpu_s
        self._start_ms = (clock() - started_s) * 1e3
        self._requests = DecayingRate(clock)
        self._work_s, self._work_now_s = DecayingRate(clock), DecayingRate(clock, _NOW_S)
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
        self._calls[key] = self._clock(), count
        self.in_progress += count
        try:
            yield
        finally:
            self.in_progress -= count
            del self._calls[key]
            self._last_s = self._clock()

    def arrive(self, count: int) -> None:
        """Record the arrival of ``count`` requests."""
        self._requests.add(count)
        self._last_s = self._clock()

    def arriving(self) -> float:
        """Arriving requests per second."""
        return self._requests.per_second()

    @contextmanager
    def in_thread(self) -> Iterator[None]:
        """Meter work in a thread while it is awaited."""
        began_s = self._clock()
        try:
            yield
        finally:
            self._worked(self._clock() - began_s)

    def share(self) -> float:
        """Seconds of work per second, in the loop's thread and in the threads beside it."""
        loop_s = self._cpu_s()
        if self._loop_s is not None:
            self._worked(loop_s - self._loop_s)
        self._loop_s = loop_s
        return self._work_s.per_second()

    def _worked(self, seconds: float) -> None:
        self._work_s.add(seconds)
        self._work_now_s.add(seconds)

    def report(self) -> LoadReport:
        share, arriving = self.share(), self.arriving()
        now_s = self._clock()
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

    def report_of_ingress(self) -> LoadReport:
        """The same without a queue: requests in an ingress wait for other stages, not for it."""
        return replace(self.report(), queue_depth=0, oldest_age_ms=0.0, queue_wait_ms=0.0)


class BatchQueueMeter:
    """The load of the model: what waits in its gate and what arrives there, at the rate of full batches.

    A run costs ``a + b * padded tokens`` (see ``cost``), so a device that is always busy with small batches can take
    more, and how busy it is says little. Arriving work is therefore compared with the rate of full batches.
    """

    def __init__(
        self,
        gate: AdmissionGate[Any],
        started_s: float,
        clock: Callable[[], float] = time.monotonic,
        cpu_s: Callable[[], float] = time.thread_time,
    ) -> None:
        self._gate, self._loop = gate, EventLoopMeter(started_s, clock, cpu_s)
        self._tokens = DecayingRate(clock)
        self._tokens_now = DecayingRate(clock, _NOW_S)

    def arrive(self, lengths: tuple[int, ...]) -> None:
        """Record the arrival of inputs of these lengths in tokens, whether they are admitted or not."""
        tokens = sum(map(self._gate.planner.rounded, lengths))
        self._loop.arrive(len(lengths))
        self._tokens.add(tokens)
        self._tokens_now.add(tokens)

    def _rate(self) -> tuple[float, float]:
        """Tokens per second that the device can run in full batches, and the tokens of an input, on average."""
        inputs, tokens = self._loop.arriving(), self._tokens.per_second()
        mean = tokens / inputs if inputs > 0 and tokens > 0 else 1.0
        return self._gate.planner.tokens_per_second(mean), mean

    def report(self) -> LoadReport:
        gate, (rate, mean) = self._gate, self._rate()
        tokens = self._tokens.per_second()
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


class GenerationMeter:
    """The load of a language model: seconds of device time that arrive and wait, by the learned cost of a step.

    A sequence costs the prefill of its prompt, and for each of its tokens its part of a step that is full. How much of
    ``max_tokens`` it will use is learned from those before it.
    """

    def __init__(
        self, cost: StepCost, max_sequences: int, started_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._cost, self._max_sequences = cost, max_sequences
        self._loop = EventLoopMeter(started_s, clock)
        self._work_s, self._work_now_s = DecayingRate(clock), DecayingRate(clock, _NOW_S)
        self._used_ratio = 1.0
        self._prompt_tokens = self._max_tokens = self._sequences = 0

    def arrive(self, choices: int, prompt: int, max_tokens: int) -> None:
        """Record the arrival of a request, whether it is admitted or not."""
        self._loop.arrive(choices)
        seconds = self._seconds(choices, choices * prompt, choices * max_tokens)
        self._work_s.add(seconds)
        self._work_now_s.add(seconds)

    def queued(self, prompt: int, max_tokens: int) -> None:
        """Record that a sequence was admitted to the queue; ``left`` must follow."""
        self._sequences += 1
        self._prompt_tokens += prompt
        self._max_tokens += max_tokens

    def left(self, prompt: int, max_tokens: int) -> None:
        self._sequences -= 1
        self._prompt_tokens -= prompt
        self._max_tokens -= max_tokens

    def finished(self, max_tokens: int, tokens: int) -> None:
        """Record how much of its maximum a sequence used."""
        self._used_ratio += 0.1 * (tokens / max_tokens - self._used_ratio)

    def queue_wait_ms(self) -> float:
        """How long a sequence that arrived now would wait: 0 while there is a place for it."""
        if self._sequences < self._max_sequences:
            return 0.0
        behind = self._sequences - self._max_sequences + 1
        each = self._seconds(self._sequences, self._prompt_tokens, self._max_tokens) / self._sequences
        return behind * each * 1e3

    def _seconds(self, sequences: int, prompt_tokens: int, max_tokens: int) -> float:
        """Device time of these sequences, in full steps."""
        in_full = self._cost.estimate(self._max_sequences, 0) / self._max_sequences
        prefill = self._cost.estimate(0, prompt_tokens) - self._cost.estimate(0, 0)
        return (prefill + max(sequences, max_tokens * self._used_ratio) * in_full) / 1e9

    def report(self, waiting: int, oldest_age_ms: float) -> LoadReport:
        of_loop = self._loop.report()
        work_s, arriving = self._work_s.per_second(), self._loop.arriving()
        # What arrived long ago may still be generated.
        taken = min(1.0, self._sequences / self._max_sequences)
        return LoadReport(
            queue_depth=waiting,
            oldest_age_ms=oldest_age_ms,
            queue_wait_ms=self.queue_wait_ms(),
            demand=max(work_s, taken, of_loop.demand),
            demand_now=max(self._work_now_s.per_second(), taken, of_loop.demand_now),
            throughput=arriving / work_s if work_s > 0 else 0.0,
            start_ms=of_loop.start_ms,
        )
