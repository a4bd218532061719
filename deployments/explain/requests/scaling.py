"""What the autoscaling policy did about a wait: when it reacted, and when the replicas it ordered were ready."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from deployments.explain.requests.pattern import clock
from deployments.explain.requests.request import HINDRANCES, Request
from deployments.explain.traces.otlp import Span
from deployments.telemetry import names

_BEFORE_NS = 5 * 10**9
"""How long before the arrival of a slow request the policy may have reacted to what made it slow."""
_ON_THE_WAY_NS = 600 * 10**9
"""The same for replicas that were still starting when it arrived."""
_MUCH = 0.25
"""Share of a load that is worth telling."""
_AT_LIMIT_NS = 65 * 10**9
"""The same for a limit that is too low, which is reported once a minute."""


@dataclass(frozen=True, slots=True)
class Scaling:
    """One decision: an ``ai.autoscaling.decision`` span."""

    deployment: str
    decided_ns: int
    replicas: int
    """Before the decision."""
    ordered: int
    """After the decision."""
    needed: int
    """If there were no ``max_replicas``."""
    most: int
    """``max_replicas``."""

    @classmethod
    def of(cls, span: Span) -> Scaling:
        def count(name: str) -> int:
            value: Any = span.attributes.get(f"ai.autoscaling.{name}")
            return value if isinstance(value, int) else 0

        return cls(
            str(span.attributes.get(names.AI_AUTOSCALING_DEPLOYMENT, "")),
            span.end_ns,
            count("from_replicas"),
            count("to_replicas"),
            count("needed_replicas"),
            count("max_replicas"),
        )


class Loaded(Protocol):
    @property
    def replica(self) -> str: ...
    @property
    def took_ns(self) -> int: ...
    @property
    def phases_ms(self) -> Mapping[str, float]: ...
    @property
    def hindered(self) -> Mapping[str, float]: ...


class Loading(Protocol):
    @property
    def started_ns(self) -> int: ...
    @property
    def took_ns(self) -> int: ...


def how_loaded(concerned: Sequence[Request], loads: Iterable[Loaded]) -> str:
    """What the load consisted of that they waited for, as the end of a sentence; empty if it is unknown."""
    longest = longest_load(concerned, loads)
    if longest is None:
        return ""
    whole_ms = longest.took_ns / 1e6
    phases = [f"{what} {ms / 1e3:.1f} s" for what, ms in longest.phases_ms.items() if ms >= _MUCH * whole_ms]
    said = f"; of that, its model loaded for {whole_ms / 1e3:.1f} s"
    said += f" ({', '.join(phases)})" if phases else ""
    for key in HINDRANCES:
        if held_up(longest, key):
            said += f"; meanwhile, for {longest.hindered[key] / 1e3:.1f} s, {HINDRANCES[key].format('replica')}"
    return said


def longest_load(concerned: Sequence[Request], loads: Iterable[Loaded]) -> Loaded | None:
    """Of the replicas that served these requests."""
    replicas = {request.replicas.get("model") for request in concerned}
    return max((load for load in loads if load.replica in replicas), key=lambda load: load.took_ns, default=None)


def held_up(load: Loaded, hindrance: str) -> bool:
    """Whether this hindrance made up much of the load."""
    return load.hindered.get(hindrance, 0.0) >= _MUCH * load.took_ns / 1e6 > 0


def orders_during(
    decisions: Iterable[Scaling], concerned: Sequence[Request], deployment: str, loads: Sequence[Loading]
) -> list[Scaling]:
    """Return decisions for replicas that these requests had to wait for, and those blocked by ``max_replicas``."""
    if not concerned:
        return []
    begin = min(request.started_ns for request in concerned)
    end = max(request.started_ns + request.latency_ns for request in concerned)

    def concerns(made: Scaling) -> bool:
        if made.deployment != deployment or made.decided_ns > end:
            return False
        if made.ordered > made.replicas:
            warm = _warm_after(made, loads)
            was_on_the_way = bool(warm) and warm[0] > begin
            return made.decided_ns >= begin - (_ON_THE_WAY_NS if was_on_the_way else _BEFORE_NS)
        return made.needed > made.most and made.decided_ns >= begin - _AT_LIMIT_NS

    return [made for made in sorted(decisions, key=lambda made: made.decided_ns) if concerns(made)]


def _warm_after(made: Scaling, loads: Iterable[Loading]) -> list[int]:
    """Return the end times of the loads that started after the decision, in order."""
    return sorted(load.started_ns + load.took_ns for load in loads if load.started_ns >= made.decided_ns)


def scaled_late(orders: Sequence[Scaling], loads: Iterable[Loading], until_ns: int) -> str:
    """Describe the decisions for the slow requests, as the end of a sentence; empty if there are none."""
    if not orders:
        return ""
    first = orders[0]
    seen = clock(first.decided_ns)
    if first.ordered <= first.replicas:
        return f"; not scaled: at {seen} the policy needed {first.needed} replicas, but max_replicas is {first.most}"
    began = f"; scaled late: the policy reacted at {seen} ({first.replicas} -> {first.ordered} replicas), "
    warm = [end_ns for end_ns in _warm_after(first, loads) if end_ns <= until_ns]
    if not warm:
        return began + "and none of them was warm by the end of the window"
    which = "the replica was" if first.ordered == first.replicas + 1 else "the first was"
    return f"{began}{which} warm at {clock(warm[0])}"
