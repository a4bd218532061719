"""A sum that grows over time, looked at a few times a second: how much of it lies between two times."""

from __future__ import annotations

from bisect import bisect_right

_KEPT = 12_000
"""Looks; ten a second are kept for ten to twenty minutes."""


class Curve:
    """What grew between two looks is spread evenly over that time. Times are nanoseconds of one clock.

    Args:
        most: by how much it grows at most in a nanosecond.
    """

    def __init__(self, most: float = 1.0) -> None:
        self._most = most
        self._times: list[int] = []
        self._sums: list[int] = []
        self._shown = 0

    def add(self, now_ns: int, more_ns: int) -> None:
        """Add what came since the last call, as far as it may be true."""
        since_ns = self._times[-1] if self._times else now_ns
        self._times.append(now_ns)
        self._sums.append((self._sums[-1] if self._sums else 0) + min(more_ns, round(self._most * (now_ns - since_ns))))
        if len(self._times) > _KEPT:
            del self._times[: _KEPT // 2], self._sums[: _KEPT // 2]

    def between_ns(self, started_ns: int, ended_ns: int) -> int:
        """How much came between two times, as far as it was seen."""
        return max(0, round(self._at(ended_ns) - self._at(started_ns)))

    def ratio(self) -> float:
        """The share of the time since the last call that it makes up: 0 to 1."""
        if not self._times:
            return 0.0
        since_ns, self._shown = self._shown or self._times[0], self._times[-1]
        return self.between_ns(since_ns, self._shown) / max(1, self._shown - since_ns)

    def _at(self, time_ns: int) -> float:
        times, sums = self._times, self._sums
        number = bisect_right(times, time_ns)
        if number == 0 or not times:
            return float(sums[0]) if sums else 0.0
        if number == len(times):
            return float(sums[-1])
        before, after = times[number - 1], times[number]
        share = (time_ns - before) / (after - before)
        return sums[number - 1] + share * (sums[number] - sums[number - 1])
