"""What distinguishes the requests of a finding from all others: a replica, host, client, kind of input or time."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from itertools import pairwise
from statistics import fmean, pstdev

from deployments.explain.requests.request import HINDRANCES, Request, window_of
from deployments.explain.traces.weights import percentile

_NEARLY_ALL, _OFTEN = 0.9, 0.6
"""Minimum share of the requests concerned, and maximum share of all, that have a distinguishing value."""
_MIN_COUNT, _MIN_BURSTS = 2, 4
_REGULAR = 0.15
"""Maximum standard deviation of the pauses between bursts, over their mean."""
_INPUTS: tuple[tuple[Callable[[Request], int], str], ...] = (
    (lambda request: request.chars, "characters"),
    (lambda request: request.tokens, "tokens"),
    (lambda request: request.inputs, "inputs"),
)


def distinguishing_traits(
    concerned: Sequence[Request],
    everybody: Sequence[Request],
    window_ns: tuple[int, int],
    stage: str,
    weight: Callable[[Request], float],
) -> str:
    """Return phrases, each after a comma; empty if nothing stands out.

    Args:
        concerned: those that may have something in common.
        everybody: those that were read, with them.
        window_ns: what was observed.
        stage: the one whose replica matters.
        weight: for how many requests one of them stands.
    """
    if len(concerned) < _MIN_COUNT:
        return ""
    those, every = (_Requests((request, weight(request)) for request in ones) for ones in (concerned, everybody))
    where = _where(those, every, stage)
    return "".join(f", {phrase}" for phrase in (*where, *_when(concerned, window_ns)))


class _Requests(list[tuple[Request, float]]):
    """Requests, each with the number of those that it stands for."""

    def shares(self, key: Callable[[Request], str]) -> dict[str, float]:
        """Their shares by the value of a key."""
        found: dict[str, float] = defaultdict(float)
        whole = max(1e-9, sum(weight for _, weight in self))
        for request, weight in self:
            found[key(request)] += weight / whole
        return found

    def percentile(self, measure: Callable[[Request], int], share: float) -> float:
        return percentile(sorted((measure(request), weight) for request, weight in self), share)


def what_hindered(concerned: Sequence[Request], amounts_ms: Sequence[float]) -> str:
    """``; in 12 of them garbage was collected in the model``: for half of what they lost, in half of them."""
    said = ""
    for key, phrase in HINDRANCES.items():
        hit = [
            one.hindered[key][0]
            for one, ms in zip(concerned, amounts_ms, strict=True)
            if key in one.hindered and one.hindered[key][1] >= ms / 2
        ]
        if len(hit) * 2 >= len(concerned) and hit:
            said += f"; in {len(hit)} of them {phrase.format(Counter(hit).most_common(1)[0][0])}"
    return said


def _where(concerned: _Requests, everybody: _Requests, stage: str) -> Iterator[str]:
    replica = _common(concerned, everybody, lambda request: request.replicas.get(stage, ""))
    host = _common(concerned, everybody, lambda request: request.host)
    if replica:
        yield f"nearly all on replica {replica}"
    elif host:
        yield f"nearly all on host {host}"
    if client := _common(concerned, everybody, lambda request: request.client):
        yield f"nearly all from client {client}"
    if tenant := _common(concerned, everybody, lambda request: request.tenant):
        yield f"nearly all of tenant {tenant}"
    if route := _common(concerned, everybody, lambda request: request.route):
        yield f"nearly all to {route}"
    yield from _kind_of_input(concerned, everybody)


def _common(concerned: _Requests, everybody: _Requests, key: Callable[[Request], str]) -> str:
    """Return the value that nearly all concerned have and many others do not; empty if there is none."""
    value, share = max(concerned.shares(key).items(), key=lambda pair: pair[1])
    is_common = share >= _NEARLY_ALL * (1 - 1e-9) and everybody.shares(key)[value] <= _OFTEN * (1 + 1e-9)
    return value if is_common else ""


def _kind_of_input(concerned: _Requests, everybody: _Requests) -> Iterator[str]:
    """Yield the one measure of the input that differs most from the others, if any."""
    keys = {request.key for request, _ in concerned}
    others = _Requests(pair for pair in everybody if pair[0].key not in keys)
    found: list[tuple[float, str]] = []
    for measure, unit in _INPUTS if others else ():
        least, most = concerned.percentile(measure, 0.1), others.percentile(measure, 0.9)
        if least > 1.5 * most:
            phrase = f"with at least {least:.0f} {unit}, where 90% of the others have at most {most:.0f}"
            found.append((least / max(1, most), phrase))
    if found:
        yield max(found)[1]


def _when(concerned: Sequence[Request], window_ns: tuple[int, int]) -> Iterator[str]:
    begin, end = window_ns
    first, last = window_of(concerned)
    seen = end - begin
    if first > begin + seen / 4 and last > end - seen / 10 and _fills(concerned, first, end):
        yield f"since {clock(first)}"
    elif last - first < seen / 3:
        yield f"all within {(last - first) / 1e9:.1f} of the {seen / 1e9:.1f} s observed, from {clock(first)}"
    elif every_s := _period_s(sorted(request.started_ns for request in concerned), seen):
        yield f"every {every_s:.1f} s"


def _fills(concerned: Sequence[Request], begin: int, end: int) -> bool:
    """Whether they are spread over the whole period."""
    quarters = {min(3, 4 * (request.started_ns - begin) // max(1, end - begin)) for request in concerned}
    return len(quarters) == 4


def _period_s(starts: Sequence[int], seen_ns: int) -> float:
    """Return the period of bursts at regular intervals; 0 if they are not regular."""
    bursts = [starts[0]]
    last = starts[0]
    for start in starts[1:]:
        if start - last > seen_ns / 100:
            bursts.append(start)
        last = start
    pauses = [(later - earlier) / 1e9 for earlier, later in pairwise(bursts)]
    if len(bursts) < _MIN_BURSTS or pstdev(pauses) > _REGULAR * fmean(pauses):
        return 0.0
    return fmean(pauses)


def clock(unix_ns: int) -> str:
    """``12:03:04Z``."""
    return datetime.fromtimestamp(unix_ns / 1e9, UTC).strftime("%H:%M:%SZ")
