"""For how many each kept trace stands, and what that says of all.

A trace that was kept with probability ``p`` stands for ``1 / p``: then sums over the kept are, on average, sums over
all (Horvitz and Thompson). ``p`` follows from ``th`` in the trace's ``tracestate`` (``telemetry.sampling.consistent``);
a request that was sampled retroactively states its weight in ``ai.sampling.weight``. Both may be there, and multiply.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from deployments.telemetry import names
from deployments.telemetry.sampling.threshold import BITS, threshold

PERCENTILES = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99}
"""Those that are shown."""
_MOST = 1e9
_SURE = 1.96
"""Standard errors on either side: 95 %."""
_DOUBT, _MIN_MISSING, _MIN_SHARE = 4.0, 5, 0.01
"""Of traces that are missing: standard errors, how many, and of how many."""
_MIN_DRAWN = 30
"""Below that, what was counted is too few to correct weights by it."""
_MOST_LOST = 0.1
"""Where more are missing and nothing says of sampling, something samples and does not say so."""


def weight_of_request(attributes: Mapping[str, Any]) -> float:
    """For how many requests a root stands; 0 if it was kept for the sake of another."""
    stated = attributes.get(names.AI_SAMPLING_WEIGHT, 1)
    if isinstance(stated, bool) or not isinstance(stated, int | float) or not 0 <= stated <= _MOST:
        stated = 1.0
    return min(_MOST, float(stated) / (1 - _passed(attributes)))


def weight_of_run(attributes: Mapping[str, Any], requests: int) -> float:
    """For how many runs one of so many requests stands: it is kept if any of them reaches the threshold."""
    passed = _passed(attributes)
    return min(_MOST, 1 / (1 - passed ** max(1, requests))) if passed else 1.0


def _passed(attributes: Mapping[str, Any]) -> float:
    """Which share of traces the threshold sorts out, below 1."""
    state = attributes.get(names.W3C_TRACESTATE)
    if not isinstance(state, str):
        return 0.0
    for member in state.split(","):
        key, _, ot = member.strip().partition("=")
        if key == "ot":
            found = threshold(ot)
            return 0.0 if found is None or not 0 <= found < 1 << BITS else found / (1 << BITS)
    return 0.0


@dataclass(slots=True)
class Sample:
    """What the kept requests are of all.

    Attributes:
        kept: traces that were read.
        stand_for: how many requests they stand for, by their weights.
        variance: of that estimate.
        counted: how many there were by the numbers that each ingress gives its requests; 0 if they have none.
        missing: of those, how many have no trace although they should; 0 if chance explains it.
        factor: what weights of more than one have to be multiplied with, so that they add up to what was counted.
    """

    kept: int = 0
    stand_for: float = 0.0
    variance: float = 0.0
    counted: int = 0
    missing: int = 0
    factor: float = 1.0
    _numbers: dict[tuple[str, str], _Numbers] = field(default_factory=dict)
    _of_counted: _Sums = field(default_factory=lambda: _Sums())

    def add(self, weight: float) -> None:
        self.kept += 1
        self.stand_for += weight
        self.variance += _variance(weight)

    def add_number(self, counter: tuple[str, str], number: int, weight: float) -> None:
        """Add the number that ``counter``, an ingress and a model, gave to a request; 0 if it has none."""
        if number <= 0:
            return
        self._numbers.setdefault(counter, _Numbers(number, number)).add(number)
        sums = self._of_counted
        sums.weight += weight
        sums.variance += _variance(weight)
        if weight > 1:
            sums.uncertain += weight
            sums.drawn += 1

    def conclude(self) -> None:
        """Compare what the kept stand for with what was counted."""
        sums = self._of_counted
        self.counted = round(sum(numbers.count() for numbers in self._numbers.values()))
        missing = self.counted - sums.weight
        least = max(_MIN_MISSING, _MIN_SHARE * self.counted) + _DOUBT * math.sqrt(sums.variance)
        if missing > least:
            self.missing = round(missing)
        elif sums.drawn >= _MIN_DRAWN and self.counted > sums.weight - sums.uncertain:
            # A sum that is known makes all others better (ratio estimation; Cochran, Sampling Techniques, ch. 6).
            self.factor = (self.counted - sums.weight + sums.uncertain) / sums.uncertain

    @property
    def is_sample(self) -> bool:
        """Whether the kept say that they are only some."""
        return self.kept != round(self.stand_for) or self.variance > 0

    @property
    def says_nothing(self) -> bool:
        """Whether many are missing and the kept do not say for how many they stand."""
        return not self.is_sample and self.missing > _MOST_LOST * self.counted

    def interval(self) -> tuple[int, int]:
        """How many requests there were, with 95 % confidence; at least as many as were kept."""
        if self.factor != 1:
            counted = round(self.counted + self.stand_for - self._of_counted.weight)
            return counted, counted
        error = _SURE * math.sqrt(self.variance)
        return max(self.kept, math.floor(self.stand_for - error)), math.ceil(self.stand_for + error)


@dataclass(slots=True)
class _Numbers:
    """What one ingress gave to requests of one model."""

    first: int
    last: int
    kept: int = 0

    def add(self, number: int) -> None:
        self.first, self.last = min(self.first, number), max(self.last, number)
        self.kept += 1

    def count(self) -> float:
        """How many requests there were: before the first and after the last kept one as many as between two."""
        between = self.last - self.first + 1
        gap = (between - self.kept) / (self.kept - 1) if self.kept > 1 else 0.0
        return between + 2 * max(0.0, gap)


@dataclass(slots=True)
class _Sums:
    """Of the requests with a number."""

    weight: float = 0.0
    variance: float = 0.0
    uncertain: float = 0.0
    """Of the weights of more than one."""
    drawn: int = 0
    """How many have such a weight."""


def _variance(weight: float) -> float:
    """Of what one kept trace adds to a sum, if each is kept or not by itself."""
    return weight * max(0.0, weight - 1)


def percentile(ascending: Sequence[tuple[float, float]], share: float) -> float:
    """Smallest value with ``share`` of the weight at or below it, of ``(value, weight)`` pairs; 0 if there are none."""
    left = share * sum(weight for _, weight in ascending) * (1 - 1e-9)
    for value, weight in ascending:
        left -= weight
        if left <= 0:
            return value
    return ascending[-1][0] if ascending else 0.0


def interval_of(ascending: Sequence[tuple[float, float]], share: float) -> tuple[float, float]:
    """Where a percentile of all lies, with 95 % confidence, by a sample.

    The distribution at the percentile has an error; the interval is where the distribution has the values within that
    error (Woodruff, J. Am. Stat. Assoc. 47, 1952).
    """
    whole = sum(weight for _, weight in ascending)
    if not whole:
        return 0.0, 0.0
    at = percentile(ascending, share)
    variance = sum(_variance(weight) * (float(value <= at) - share) ** 2 for value, weight in ascending)
    error = _SURE * math.sqrt(variance) / whole
    return percentile(ascending, max(0.0, share - error)), percentile(ascending, min(1.0, share + error))
