"""Consistent probability sampling: a trace is kept if its randomness reaches a threshold, whoever applies it.

The randomness of a trace is the last 56 bits of its id, or ``rv`` in the ``ot`` part of its ``tracestate``; ``th``
there is the threshold it has passed (https://opentelemetry.io/docs/specs/otel/trace/tracestate-probability-sampling/).
So samplers one after the other, in other processes and at other rates, keep subsets of each other's traces, and what is
kept says for how many it stands.

A model run is in a trace of its own, which gets the greatest randomness of its requests' traces: whatever threshold a
sampler applies, it keeps the runs of every request that it keeps, and drops those of which it keeps nobody.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Mapping, Sequence

from opentelemetry.context import Context
from opentelemetry.sdk.trace.sampling import Decision, Sampler, SamplingResult
from opentelemetry.trace import Link, SpanContext, SpanKind, TraceState, get_current_span
from opentelemetry.util.types import Attributes

from deployments.telemetry.sampling.threshold import BITS, DIGITS, member, threshold, written

_MASK = (1 << BITS) - 1
_KEY = "ot"
_MOST_MEMBERS, _MOST_CHARACTERS = 32, 512
"""Of a ``tracestate``, by W3C."""


def randomness(trace_id: int, state: TraceState | None) -> int:
    """Between 0 and ``2**BITS - 1``."""
    explicit = member(state.get(_KEY, ""), "rv") if state else ""
    if len(explicit) == DIGITS:
        try:
            return int(explicit, 16)
        except ValueError:
            pass
    return trace_id & _MASK


@functools.lru_cache(maxsize=64)
def as_state(at_least: int) -> TraceState:
    """``ot=th:c``: kept by this threshold."""
    return TraceState([(_KEY, written(at_least))])


def trace_of_run(trace_id: int, members: Iterable[SpanContext]) -> tuple[int, TraceState]:
    """Return a trace id with the greatest randomness of these, and the weakest threshold that they have passed.

    Args:
        trace_id: a random one, whose first 72 bits are kept.
        members: the sampled requests of the run, at least one.
    """
    greatest, weakest = 0, _MASK
    for one in members:
        greatest = max(greatest, randomness(one.trace_id, one.trace_state))
        weakest = min(weakest, threshold(one.trace_state.get(_KEY, "")) or 0)
    return trace_id & ~_MASK | greatest, as_state(weakest)


class ConsistentSampler(Sampler):
    """What OTEL_TRACES_SAMPLER says, by thresholds: the SDK's ``traceidratio`` keeps others, and says no threshold.

    A caller's decision is followed as the SDK follows it, and its ``tracestate`` passed on as it is. If it has none,
    ``rv`` is added: the Collector's tail sampling takes the randomness of other traces from a hash of its own.
    """

    def __init__(self, configured: Sampler, environ: Mapping[str, str] = os.environ) -> None:
        self._configured = configured
        name = environ.get("OTEL_TRACES_SAMPLER", "").strip().lower() or "parentbased_always_on"
        self._follows_parents = name.startswith("parentbased_")
        self._threshold = _threshold_of(name.removeprefix("parentbased_"), environ.get("OTEL_TRACES_SAMPLER_ARG", ""))
        self._state = as_state(self._threshold) if self._threshold is not None else None

    def should_sample(
        self,
        parent_context: Context | None,
        trace_id: int,
        name: str,
        kind: SpanKind | None = None,
        attributes: Attributes = None,
        links: Sequence[Link] | None = None,
        trace_state: TraceState | None = None,
    ) -> SamplingResult:
        parent = get_current_span(parent_context).get_span_context()
        if self._threshold is None or (parent.is_valid and self._follows_parents):
            found = self._configured.should_sample(parent_context, trace_id, name, kind, attributes, links, trace_state)
            if found.decision is Decision.RECORD_AND_SAMPLE and parent.is_valid and not parent.trace_state:
                found.trace_state = TraceState([(_KEY, f"rv:{trace_id & _MASK:0{DIGITS}x}")])
            return found
        keeps = randomness(trace_id, parent.trace_state if parent.is_valid else None) >= self._threshold
        return SamplingResult(
            Decision.RECORD_AND_SAMPLE if keeps else Decision.DROP,
            trace_state=_merged(parent.trace_state, self._state) if parent.is_valid else self._state,
        )

    def get_description(self) -> str:
        return f"ConsistentSampler{{{self._configured.get_description()}}}"


def _threshold_of(name: str, argument: str) -> int | None:
    """None if it is no sampler that has one, or keeps nothing."""
    if name == "always_on":
        return 0
    if name != "traceidratio":
        return None
    try:
        rate = float(argument)
    except ValueError:
        # Like the SDK, which warns.
        rate = 1.0
    return (1 << BITS) - round(rate * (1 << BITS)) if 0 < rate <= 1 else None


def _merged(state: TraceState, own: TraceState | None) -> TraceState:
    """Another sampler has decided before: what it said of its threshold is replaced, all else stays."""
    if own is None:
        return state
    rest = [one for one in state.get(_KEY, "").split(";") if one and not one.startswith("th:")]
    return _with(state, ";".join([own[_KEY], *rest]))


def _with(state: TraceState, ot: str) -> TraceState:
    """Unchanged if it would be longer than what everybody carries."""
    if _KEY in state:
        found = state.update(_KEY, ot)
    elif len(state) < _MOST_MEMBERS:
        found = state.add(_KEY, ot)
    else:
        return state
    return found if len(found.to_header()) <= _MOST_CHARACTERS else state
