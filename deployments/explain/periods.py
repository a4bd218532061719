"""Two periods of time: since when requests take longer, what they take longer for, and what else is different.

1. The moment. The window is cut into bins of equally many requests, and each latency is taken relative to the usual
   one on its route. Requests take longer from that bin on after which nearly all medians are above nearly all before
   (Mann and Whitney's statistic), by a quarter and 5 ms, up to the end. What ends within the window is no change.
2. The causes. Of each cause, the mean per request of both periods is compared, over blocks of time: it has increased if
   the difference is far outside what the blocks of a period differ among themselves (Welch's t), so that no single slow
   request, and no burst, makes a difference.
3. What is different: rate, inputs, routes, replicas, their version and settings. It is told, not judged.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, median, variance
from typing import Any

from deployments.explain.causes import CAUSES
from deployments.explain.requests.capture import Capture
from deployments.explain.requests.parts import Parts
from deployments.explain.requests.request import Request, window_of
from deployments.explain.traces.survey import Survey
from deployments.explain.traces.weights import percentile

_BINS, _OF_A_BIN, _LEAST_REQUESTS = 60, 6, 100
_EDGE = 0.2
"""Share of the bins that there must be before and after a moment."""
_APART, _LEAST_FACTOR, _LEAST_MS = 0.9, 1.25, 5.0
_BLOCKS, _LEAST_BLOCKS, _OF_A_BLOCK = 12, 4, 3
_LEAST_T, _LEAST_SHARE, _LEAST_INCREASE_MS = 4.0, 0.05, 0.5
_NOTEWORTHY = 1.25
"""A rate or a size that is so many times another is different."""


@dataclass(frozen=True, slots=True)
class Judged:
    """An answered request that was read in full."""

    request: Request
    parts: Parts
    weight: float
    """The number of requests it represents."""
    is_slow: bool


@dataclass(frozen=True, slots=True)
class Period:
    """The answered requests of a period that were read in full, by start time."""

    capture: Capture
    judged: Sequence[Judged]

    def mean_ms(self, parts: Sequence[str]) -> float:
        """What a request spends on these parts, on average."""
        return _mean(self.judged, parts)

    @property
    def requests(self) -> list[Request]:
        return [one.request for one in self.judged]


@dataclass(frozen=True, slots=True)
class Change:
    """Requests take longer from a moment on."""

    moment_ns: int
    p50_ms: tuple[float, float]
    """The median latency before and after."""
    differences: tuple[str, ...]
    """What else is different since, in words."""
    increases: dict[str, float]
    """By cause, how much more of it a request has on average, in milliseconds."""


def moment_of(found: Survey) -> int | None:
    """Return since when the requests of a window take longer, in Unix nanoseconds; None if they do not."""
    count = len(found.latencies_ms)
    if count < _LEAST_REQUESTS:
        return None
    every = sorted(zip(found.starts_ns, found.routes, found.latencies_ms, found.latency_weights, strict=True))
    by_route = defaultdict(list)
    for _, route, ms, weight in every:
        by_route[route].append((ms, weight))
    usual = {route: max(1e-6, _median(values)) for route, values in by_route.items()}
    bins = min(_BINS, count // _OF_A_BIN)
    edges = [number * count // bins for number in range(bins + 1)]
    cut = [every[begin:end] for begin, end in pairwise(edges)]
    at = _split([_median([(ms / usual[route], weight) for _, route, ms, weight in one]) for one in cut])
    if at is None:
        return None
    before, after = (
        _median([(ms, weight) for one in side for _, _, ms, weight in one]) for side in (cut[:at], cut[at:])
    )
    return cut[at][0][0] if after - before >= _LEAST_MS else None


def _split(medians: Sequence[float]) -> int | None:
    """The bin from which on all are higher."""
    bins = len(medians)
    edge = math.ceil(_EDGE * bins)
    best, most = None, 0.0
    for at in range(edge, bins - edge + 1):
        before, after = medians[:at], medians[at:]
        higher = sum(one > other for one in after for other in before) / (at * (bins - at))
        strength = (higher - 0.5) * math.sqrt(at * (bins - at))
        if higher >= _APART and strength > most and median(after) >= _LEAST_FACTOR * median(before):
            best, most = at, strength
    if best is None:
        return None
    last = medians[-math.ceil(bins / 10) :]
    return best if median(last) > sorted(medians[:best])[int(best * 0.9)] else None


def change_of(moment_ns: int, before: Period, after: Period) -> Change | None:
    """Describe what happened at a moment; None if too few requests were read before or after."""
    if min(len(before.judged), len(after.judged)) < _LEAST_BLOCKS * _OF_A_BLOCK:
        return None
    medians = [
        _median([(one.request.latency_ns / 1e6, one.weight) for one in period.judged]) for period in (before, after)
    ]
    return Change(moment_ns, (medians[0], medians[1]), differences(before, after), increases(before, after))


def increases(then: Period, now: Period) -> dict[str, float]:
    """Return, by cause, how many milliseconds more a request has of it on average, where that is beyond doubt."""
    least = max(_LEAST_INCREASE_MS, _LEAST_SHARE * _mean(then.judged, None))
    found = {}
    for cause in CAUSES:
        more = now.mean_ms(cause.parts) - then.mean_ms(cause.parts)
        if more >= least and _t([_block_means(period.judged, cause.parts) for period in (then, now)]) >= _LEAST_T:
            found[cause.name] = more
    return found


def is_longer(then: Period, now: Period) -> bool:
    """Whether requests take longer now, beyond doubt."""
    before = _mean(then.judged, None)
    more = _mean(now.judged, None) - before
    is_sure = _t([_block_means(period.judged, None) for period in (then, now)]) >= _LEAST_T
    return more >= max(_LEAST_INCREASE_MS, _LEAST_SHARE * before) and is_sure


def _mean(judged: Sequence[Judged], parts: Sequence[str] | None) -> float:
    weight = sum(one.weight for one in judged)
    return sum(one.weight * _spent(one, parts) for one in judged) / weight if weight else 0.0


def _spent(one: Judged, parts: Sequence[str] | None) -> float:
    return sum(one.parts.values()) if parts is None else sum(one.parts[part] for part in parts)


def _block_means(judged: Sequence[Judged], parts: Sequence[str] | None) -> list[float]:
    return [_mean(block, parts) for block in blocks_of(judged, _BLOCKS)]


def blocks_of(judged: Sequence[Judged], most: int) -> list[Sequence[Judged]]:
    """Blocks of time with equally many requests, at most so many blocks; none of too few requests."""
    blocks = min(most, len(judged) // _OF_A_BLOCK)
    edges = [number * len(judged) // blocks for number in range(blocks + 1)] if blocks else []
    return [judged[begin:end] for begin, end in pairwise(edges)]


def _t(blocks: Sequence[Sequence[float]]) -> float:
    """Welch's t of the second over the first."""
    then, now = blocks
    if min(len(then), len(now)) < _LEAST_BLOCKS:
        return 0.0
    error = math.sqrt(variance(then) / len(then) + variance(now) / len(now))
    return (fmean(now) - fmean(then)) / max(error, 1e-9)


def _median(weighted: Sequence[tuple[float, float]]) -> float:
    """Of values with their weights."""
    return percentile(sorted(weighted), 0.5)


# --- what else is different ------------------------------------------------------------------------------------------


def differences(then: Period, now: Period) -> tuple[str, ...]:
    """Say what is different between two periods besides their latencies."""
    return (*_load(then, now), *_inputs(then, now), *_processes(then, now))


def _load(then: Period, now: Period) -> Iterator[str]:
    rates = [_rate(period) for period in (then, now)]
    if min(rates) > 0 and max(rates) > _NOTEWORTHY * min(rates):
        yield f"{rates[0]:.3g} -> {rates[1]:.3g} requests/s"


def _rate(period: Period) -> float:
    begin, end = window_of(period.requests)
    return sum(one.weight for one in period.judged) / ((end - begin) / 1e9) if end > begin else 0.0


_SIZES: tuple[tuple[str, Callable[[Request], float]], ...] = (
    ("tokens of a request", lambda request: request.tokens),
    ("inputs of a request", lambda request: request.inputs),
)


def _inputs(then: Period, now: Period) -> Iterator[str]:
    for what, size in _SIZES:
        means = [
            sum(one.weight * size(one.request) for one in period.judged)
            / max(1e-9, sum(one.weight for one in period.judged))
            for period in (then, now)
        ]
        if min(means) > 0 and max(means) > _NOTEWORTHY * min(means):
            yield f"{what} (mean) {means[0]:.3g} -> {means[1]:.3g}"
    routes = [Counter[str]() for _ in range(2)]
    for counted, period in zip(routes, (then, now), strict=True):
        for one in period.judged:
            counted[one.request.route] += 1
    new = [route for route in routes[1] if route and not routes[0][route]]
    if new:
        yield f"requests to {', '.join(sorted(new))}"


def _processes(then: Period, now: Period) -> Iterator[str]:
    for stage in ("ingress", "tokenizer", "model", "postprocessor"):
        old, new = (_replicas(period, stage) for period in (then, now))
        if len(old) != len(new):
            yield f"{len(old)} -> {len(new)} {stage} replicas"
        elif old and not old & new:
            yield f"other {stage} replicas"
        before, after = _facts(then, old), _facts(now, new)
        for key in sorted(before.keys() & after.keys()):
            if before[key] != after[key]:
                yield f"{key} {_listed(before[key])} -> {_listed(after[key])} ({stage})"


def _replicas(period: Period, stage: str) -> set[str]:
    return {one.request.replicas[stage] for one in period.judged if stage in one.request.replicas}


def _facts(period: Period, replicas: set[str]) -> dict[str, set[Any]]:
    """The values of each setting in these replicas."""
    found: dict[str, set[Any]] = defaultdict(set)
    for replica in replicas:
        for key, value in period.capture.facts.get(replica, {}).items():
            found[key].add(value)
    return found


def _listed(values: set[Any]) -> str:
    return ", ".join(sorted(f"{value:g}" if isinstance(value, float) else str(value) for value in values))
