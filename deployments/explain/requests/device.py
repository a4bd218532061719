"""The runs of one model replica over time: how busy its device was, and with what, while requests waited for it."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterator
from typing import NamedTuple

Interval = tuple[int, int]
"""Start and end, in nanoseconds of one clock."""
_FIELDS = 5


class Within(NamedTuple):
    """A run, as far as it is within an interval."""

    within_ns: int
    took_ns: int
    """In all."""
    tokens: int
    padded_tokens: int
    requests: int
    """That had an input in it; 0 if unknown."""


class Device:
    """The runs of a device, which follow each other; times are on the replica's own clock.

    Attributes:
        ahead_ns: how far that clock is ahead of the ingress's; 0 if unknown.
    """

    def __init__(self) -> None:
        self.ahead_ns = 0
        # Compact, as there may be a million runs: start, duration, tokens, padded tokens and requests of each in turn.
        self._numbers = array("q")
        self._weights = array("d")
        self._starts: list[int] = []
        self._order: list[int] = []

    def add(
        self, started_ns: int, took_ns: int, tokens: int, padded_tokens: int, requests: int = 0, weight: float = 1.0
    ) -> None:
        """Add a run that stands for ``weight`` of its kind."""
        self._weights.append(weight)
        self._numbers.extend((started_ns, took_ns, tokens, padded_tokens, requests))

    def during(self, interval: Interval) -> Iterator[Within]:
        """Yield each run that was in progress in the interval."""
        begin, end = interval
        if len(self._order) != len(self._numbers) // _FIELDS:
            self._order = sorted(range(0, len(self._numbers), _FIELDS), key=self._numbers.__getitem__)
            self._starts = [self._numbers[at] for at in self._order]
        # The run that started before may still be in progress.
        for number in range(max(0, bisect_left(self._starts, begin) - 1), len(self._starts)):
            start, took, *rest = self._numbers[self._order[number] : self._order[number] + _FIELDS]
            if start >= end:
                return
            if (within := min(start + took, end) - max(start, begin)) > 0:
                yield Within(within, took, *rest)

    def busy_ns(self, window: Interval, bins: int, bin_ns: int) -> list[int]:
        """Return how long the device ran in each bin of a window on the ingress's clock, at most all of it."""
        begin, end = window[0] + self.ahead_ns, window[1] + self.ahead_ns
        busy = [0.0] * bins
        for start, took, weight in zip(self._numbers[::_FIELDS], self._numbers[1::_FIELDS], self._weights, strict=True):
            first, last = max(0, (start - begin) // bin_ns), min(bins - 1, (start + took - begin) // bin_ns)
            for number in range(first, last + 1):
                lower = begin + number * bin_ns
                busy[number] += weight * max(0, min(start + took, lower + bin_ns, end) - max(start, lower))
        return [min(bin_ns, round(ns)) for ns in busy]
