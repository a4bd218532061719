"""First pass over a window: every request's latency, and which requests to read in full.

1. All requests count in the percentiles, the errors and the window; only a few numbers are kept for each.
2. These are read in full: the slow requests (the slowest share, at least five), a sample of the others that is large
   enough to show what is usual, and the longest failed requests. Memory therefore grows with the slow requests, not
   with all of them.
3. The sample is drawn with a fixed seed: the same traces get the same verdict.
"""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from deployments.explain.traces.otlp import Span
from deployments.explain.traces.weights import Sample, weight_of_request
from deployments.telemetry import names, span_specs

Key = tuple[str, str]
"""Trace id and span id."""
ORDINARY, FAILED = 5_000, 500
"""How many ordinary requests, and how many that failed on the server's side, are read in full."""
_MIN_SLOW = 5
NOT_OURS = frozenset({"cancelled", "invalid_json", "invalid_field", "too_large", "model_not_found"})
"""``error.type`` of requests whose failure is not the server's fault."""
LOAD_PHASES = {
    names.LOAD_WEIGHTS: "reading the weights",
    names.LOAD_DEVICE_MOVE: "moving them to the device",
    names.LOAD_WARM_UP: "warming up",
}
OF_A_REQUEST = {spec.name for spec in span_specs.SPANS if spec.parent != "none"} - LOAD_PHASES.keys()
_OF_A_PROCESS = {names.BATCH_FORWARD, names.SEGMENT, names.MODEL_LOAD, names.SCALING_DECISION, *LOAD_PHASES}


@dataclass(frozen=True, slots=True)
class Root:
    """The data of a request's root span."""

    key: Key
    started_ns: int
    latency_ns: int
    error: str
    """``error.type``; empty if there was none."""
    route: str = ""
    weight: float = 1.0
    """For how many requests it stands; 0 if it was kept for the sake of another."""
    model: str = ""
    instance: str = ""
    """The ingress."""
    number: int = 0
    """Of those of its model in that ingress, from 1; 0 if it has none."""
    cluster: str = ""

    @classmethod
    def of(cls, span: Span) -> Root:
        times = span.start_ns, span.end_ns
        return cls.made(span.key, *times, span.attributes, span.failed, span.instance, span.cluster)

    @classmethod
    def made(
        cls,
        key: Key,
        started_ns: int,
        ended_ns: int,
        attributes: Mapping[str, Any],
        failed: bool,
        instance: str,
        cluster: str = "",
    ) -> Root:
        """Read the attributes of a root span."""
        error = str(attributes.get(names.ERROR_TYPE) or ("error" if failed else ""))
        number = attributes.get(names.AI_REQUEST_NUMBER, 0)
        return cls(
            key=key,
            started_ns=started_ns,
            latency_ns=max(0, ended_ns - started_ns),
            error=error,
            route=sys.intern(route_of(attributes)),
            weight=weight_of_request(attributes),
            model=sys.intern(str(attributes.get(names.AI_MODEL_NAME, ""))),
            instance=sys.intern(instance),
            number=number if isinstance(number, int) else 0,
            cluster=sys.intern(cluster),
        )

    @property
    def ended_ns(self) -> int:
        return self.started_ns + self.latency_ns


@dataclass(slots=True)
class Survey:
    requests: int = 0
    errors: dict[str, int] = field(default_factory=dict)
    """Requests by ``error.type``."""
    failed_ms: float = 0.0
    """Time spent by all requests that failed on the server's side."""
    latencies_ms: list[float] = field(default_factory=list)
    """Of all answered requests, ascending."""
    latency_weights: list[float] = field(default_factory=list)
    starts_ns: list[int] = field(default_factory=list)
    routes: list[str] = field(default_factory=list)
    """For how many each of ``latencies_ms`` stands, and when and where it came in, in its order."""
    models: dict[str, float] = field(default_factory=dict)
    """Requests by model."""
    sample: Sample = field(default_factory=Sample)
    """``requests`` is what the kept ones stand for."""
    window_ns: tuple[int, int] = (0, 0)
    """From the first request's start to the last one's end, in Unix nanoseconds; zeros if there are none."""
    since_ns: int = 0
    slow: set[Key] = field(default_factory=set)
    ordinary: set[Key] = field(default_factory=set)
    failed: set[Key] = field(default_factory=set)
    """The longest of those that failed on the server's side."""
    weights: dict[Key, float] = field(default_factory=dict)
    """The number of requests that each one that is read in full represents, if it is not one."""
    trace_ids_to_read: set[str] = field(default_factory=set)
    known: set[str] = field(default_factory=set)
    """The traces of all requests."""

    @property
    def answered(self) -> float:
        """How many requests ``latencies_ms`` stand for."""
        return sum(self.latency_weights)

    def wants(self, name: str, trace_id: str) -> bool:
        """Whether to read this span. Spans of a request without a root are read, so that it counts as incomplete."""
        if name in _OF_A_PROCESS:
            return True
        return trace_id in self.trace_ids_to_read or (trace_id not in self.known and name in OF_A_REQUEST)


def route_of(root: Mapping[str, Any]) -> str:
    """The HTTP route, or the gRPC method, of the attributes of a root span."""
    return str(root.get(names.HTTP_ROUTE) or root.get(names.RPC_METHOD) or "")


def survey(roots: Iterable[Root], slowest: float, since_ns: int = 0, until_ns: float = float("inf")) -> Survey:
    """Survey all requests that ended from ``since_ns`` until ``until_ns``; ``slowest`` (0 to 1) is the slow share."""
    every, kept = weighed((root for root in roots if since_ns <= root.ended_ns < until_ns), since_ns)
    counted = [root for root in every if root.weight]
    answered = sorted((root for root in counted if not root.error), key=lambda root: (root.latency_ns, root.key))
    failed = sorted(
        (root for root in counted if root.error and root.error not in NOT_OURS), key=lambda root: -root.latency_ns
    )
    ordinary = answered[: len(answered) - _slow_of(answered, slowest)]
    sample = random.Random(0).sample(ordinary, min(ORDINARY, len(ordinary)))
    stands_for = sum(root.weight for root in ordinary) / sum(root.weight for root in sample) if sample else 1.0
    slow = answered[len(ordinary) :]
    errors: Counter[str] = Counter()
    for root in counted:
        if root.error:
            errors[root.error] += round(root.weight)
    found = Survey(
        requests=round(sum(root.weight for root in counted)),
        errors=dict(errors),
        failed_ms=sum(root.latency_ns * root.weight for root in failed) / 1e6,
        latencies_ms=[root.latency_ns / 1e6 for root in answered],
        latency_weights=[root.weight for root in answered],
        starts_ns=[root.started_ns for root in answered],
        routes=[root.route for root in answered],
        models=_by_model(counted),
        sample=kept,
        since_ns=since_ns,
        slow={root.key for root in slow},
        ordinary={root.key for root in sample},
        failed={root.key for root in failed[:FAILED]},
        weights={root.key: root.weight * stands_for for root in sample}
        | {root.key: root.weight for root in (*slow, *failed[:FAILED]) if root.weight != 1},
        known={root.key[0] for root in every},
    )
    if every:
        found.window_ns = min(root.started_ns for root in every), max(root.ended_ns for root in every)
    found.trace_ids_to_read = {trace_id for trace_id, _ in found.slow | found.ordinary | found.failed}
    return found


def weighed(roots: Iterable[Root], since_ns: int) -> tuple[list[Root], Sample]:
    """Return each root once, with weights that add up to what was counted, and what they are of all requests."""
    every = list({root.key: root for root in roots}.values())
    found = Sample()
    # One that began before the window would count all others that did, and one that began at its end those that have
    # not ended yet, which have no trace either.
    last_ns = max((root.ended_ns for root in every), default=0) - max((root.latency_ns for root in every), default=0)
    for root in every:
        found.add(root.weight)
        is_within = since_ns <= root.started_ns <= last_ns
        found.add_number((root.instance, root.model), root.number if is_within else 0, root.weight)
    found.conclude()
    if found.factor != 1:
        every = [_reweighed(root, found.factor) if root.weight > 1 else root for root in every]
    return every, found


def _reweighed(root: Root, factor: float) -> Root:
    return replace(root, weight=max(1.0, root.weight * factor))


def _by_model(roots: Iterable[Root]) -> dict[str, float]:
    found: Counter[str] = Counter()
    for root in roots:
        found[root.model] += root.weight  # type: ignore[assignment]
    return dict(found)


def _slow_of(answered: Sequence[Root], slowest: float) -> int:
    """How many of them, ascending by latency, are the slowest share of all that they stand for; never all."""
    wanted, count = slowest * sum(root.weight for root in answered), 0
    for root in reversed(answered):
        if wanted < root.weight / 2:
            break
        wanted -= root.weight
        count += 1
    return min(max(0, len(answered) - 1), max(_MIN_SLOW, count))
