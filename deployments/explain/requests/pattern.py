"""What distinguishes the requests of a finding from all others: a replica, host, client, kind of input or time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from itertools import pairwise
from statistics import fmean, pstdev

from deployments.explain.requests.request import Request, window_of
from deployments.telemetry import names

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
    concerned: Sequence[Request], everybody: Sequence[Request], window_ns: tuple[int, int], stage: str
) -> str:
    """Return phrases, each after a comma; empty if nothing stands out. ``stage`` is the one whose replica matters."""
    if len(concerned) < _MIN_COUNT:
        return ""
    return "".join(f", {phrase}" for phrase in (*_where(concerned, everybody, stage), *_when(concerned, window_ns)))


_HINDRANCES = {
    names.AI_CPU_THROTTLED_MS: "a CPU limit of its container held the {} back",
    names.AI_EVENT_LOOP_STALL_MS: "the event loop of the {} stalled (its stack is in the traces)",
    names.AI_GC_PAUSE_MS: "garbage was collected in the {}",
}


def what_hindered(concerned: Sequence[Request], amounts_ms: Sequence[float]) -> str:
    """``; in 12 of them garbage was collected in the model``: for half of what they lost, in half of them."""
    said = ""
    for key, phrase in _HINDRANCES.items():
        hit = [
            one.hindered[key][0]
            for one, ms in zip(concerned, amounts_ms, strict=True)
            if key in one.hindered and one.hindered[key][1] >= ms / 2
        ]
        if len(hit) * 2 >= len(concerned) and hit:
            said += f"; in {len(hit)} of them {phrase.format(Counter(hit).most_common(1)[0][0])}"
    return said


def _where(concerned: Sequence[Request], everybody: Sequence[Request], stage: str) -> Iterator[str]:
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


def _common(concerned: Sequence[Request], everybody: Sequence[Request], key: Callable[[Request], str]) -> str:
    """Return the value that nearly all concerned have and many others do not; empty if there is none."""
    own = Counter(key(request) for request in concerned)
    value, count = own.most_common(1)[0]
    share = sum(key(request) == value for request in everybody) / len(everybody)
    return value if value and count >= _NEARLY_ALL * len(concerned) and share <= _OFTEN else ""


def _kind_of_input(concerned: Sequence[Request], everybody: Sequence[Request]) -> Iterator[str]:
    """Yield the one measure of the input that differs most from the others, if any."""
    keys = {request.key for request in concerned}
    others = [request for request in everybody if request.key not in keys]
    found: list[tuple[float, str]] = []
    for measure, unit in _INPUTS:
        own, usual = sorted(map(measure, concerned)), sorted(map(measure, others))
        if not usual:
            return
        least, most = own[len(own) // 10], usual[len(usual) * 9 // 10]
        if least > 1.5 * most:
            found.append(
                (least / max(1, most), f"with at least {least} {unit}, where 90% of the others have at most {most}")
            )
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
