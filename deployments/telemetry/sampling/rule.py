"""Which requests matter: those that were slow, failed, or sampled by their caller, and one in so many of the others."""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable

from deployments.telemetry.records import RequestRecord

_GROWTH = math.log(1.04)
"""Of the latencies that count as equal: the threshold is within 4 % of the percentile."""
_PERIOD_S = 60.0
_LEAST = 100
"""Requests of a route before its slow ones can be told from the others; until then all are kept."""
_MARGIN = 0.9
"""Of the percentile: that of the last minute or two is not exactly that of the next."""


class Latencies:
    """The latencies of one route over the last minute or two, as counts of nearly equal ones."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._counts: list[Counter[int]] = [Counter(), Counter()]
        self._since_s = clock()

    def add(self, latency_ns: int) -> None:
        now_s = self._clock()
        if now_s - self._since_s > _PERIOD_S:
            self._counts = [self._counts[1], Counter()]
            self._since_s = now_s
        self._counts[1][int(math.log(max(1, latency_ns)) / _GROWTH)] += 1

    def percentile_ns(self, share: float) -> float:
        """The latency that this share is below; 0 while there are too few."""
        counts = self._counts[0] + self._counts[1]
        left = share * counts.total()
        if counts.total() < _LEAST:
            return 0.0
        for bucket in sorted(counts):
            left -= counts[bucket]
            if left <= 0:
                return math.exp(bucket * _GROWTH)
        return 0.0


class KeepRule:
    """Decides, when a request has ended, whether it is kept for its own sake.

    Args:
        slowest: share of the requests of a route that are slow.
        one_in: of so many that do not matter, one is kept.
    """

    def __init__(self, slowest: float, one_in: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._slowest, self._one_in = slowest, one_in
        self._routes: dict[str, Latencies] = defaultdict(lambda: Latencies(clock))

    def weight(self, record: RequestRecord) -> int:
        """For how many requests this one stands; 0 if it is not kept for its own sake."""
        latency_ns = record.ended_ns - record.started_ns
        latencies = self._routes[record.route]
        is_slow = latency_ns >= _MARGIN * latencies.percentile_ns(1 - self._slowest)
        latencies.add(latency_ns)
        by_caller = record.parent is not None and record.parent.trace_flags.sampled
        failed = record.fault is not None and not record.fault.is_callers
        if is_slow or by_caller or failed:
            return 1
        # By its id, so that requests of one trace are drawn together.
        return self._one_in if record.context.trace_id % self._one_in == 0 else 0
