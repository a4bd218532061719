"""Where one request's time went: its latency, split without remainder.

1. The ingress measures everything it waits for on one clock: its intervals follow each other, and what no interval
   covers is ``unaccounted``. If intervals of a damaged trace overlap or exceed the request, they are clipped to what
   they alone cover.
2. A stage's work is measured on the stage's own clock. Only durations are taken from it, never timestamps: a call's
   duration minus the stage's is ``replica_wait`` while the ingress had not sent the call, and ``transit`` otherwise; a
   stage's duration is capped at that of the call. If the request arrived before its model replica was ready, both are
   ``cold_start``. A call whose replica died is a ``lost_attempt``.
3. Inside the model replica, the runs of the request are counted first; the rest was waiting, split according to the
   queue spans. What neither covers is ``unaccounted``, and so is a call about which nothing is known except that it
   was made.
4. All times are whole nanoseconds, so that the parts add up to the latency exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace

from deployments.explain.requests.device import Interval
from deployments.explain.traces.otlp import Span
from deployments.telemetry import names


@dataclass(slots=True)
class Breakdown:
    """Nanoseconds of one request, by part. ``latency_ns`` is their sum."""

    front: int = 0
    """In what stands before the ingress: ``X-Request-Start``."""
    validation: int = 0
    """Reading the body, however slowly it arrives, and validating it."""
    tokenization: int = 0
    replica_wait: int = 0
    """Waiting in the ingress for a replica that could take the call."""
    cold_start: int = 0
    """Waiting for a model replica to start and load."""
    device_busy: int = 0
    """Waiting for the device while it ran other batches."""
    batch_fill: int = 0
    """Waiting for a batch to fill while the device was idle."""
    forward: int = 0
    """In the model runs that contain inputs of the request."""
    cache_wait: int = 0
    """Of a generation: waiting for room in the KV cache."""
    prefill: int = 0
    """Of a generation: in steps until its first token."""
    decode: int = 0
    """Of a generation: from its first token to its last, without what follows."""
    preempted: int = 0
    """Of a generation: without its keys and values, which had to make room for others."""
    postprocessing: int = 0
    slow_reader: int = 0
    """Of a streamed answer: after the last token, until the reader had taken it."""
    lost_attempt: int = 0
    """On replicas that died before they replied; the calls were sent again."""
    transit: int = 0
    """Between the actors."""
    response: int = 0
    unaccounted: int = 0

    @property
    def latency_ns(self) -> int:
        return sum(getattr(self, part.name) for part in fields(self))

    def parts(self) -> list[tuple[str, int]]:
        return [(part.name, getattr(self, part.name)) for part in fields(self)]


class NoRoot(LookupError):
    """The trace has no root span of a request."""


def break_down(trace: Sequence[Span]) -> Breakdown:
    """Split the latency of the request with these spans. Duplicate spans count once. Raises NoRoot."""
    spans = list({span.key: span for span in trace}.values())
    root = next((span for span in spans if span.name == names.PREDICT), None)
    if root is None:
        raise NoRoot("the trace has no root span of a request")
    latency = max(0, root.end_ns - root.start_ns)
    result = Breakdown()
    reached = root.start_ns
    for span in sorted((s for s in spans if s.parent_id == root.span_id), key=lambda s: (s.start_ns, s.end_ns)):
        took = min(span.end_ns, root.start_ns + latency) - max(span.start_ns, reached)
        if took <= 0 or span.name not in _SHARES:
            continue
        reached = max(reached, span.end_ns)
        _SHARES[span.name](result, took, span, spans)
    result.unaccounted += latency - result.latency_ns
    return result


def _front(result: Breakdown, took: int, *_: object) -> None:
    result.front += took


def _validation(result: Breakdown, took: int, *_: object) -> None:
    result.validation += took


def _response(result: Breakdown, took: int, _: Span, spans: Sequence[Span]) -> None:
    # After a generation in one piece, it is the text that is made.
    if any(span.name == names.GENERATE for span in spans):
        result.postprocessing += took
    else:
        result.response += took


def _tokenizer(result: Breakdown, took: int, hop: Span, spans: Sequence[Span]) -> None:
    result.tokenization += _held(result, took, hop, spans, names.PREPROCESS)


def _postprocessor(result: Breakdown, took: int, hop: Span, spans: Sequence[Span]) -> None:
    result.postprocessing += _held(result, took, hop, spans, names.POSTPROCESS)


def _stream(result: Breakdown, took: int, stream: Span, _: Sequence[Span]) -> None:
    # What is left of it when the model has replied.
    blocked = min(took, _total_ns((stream,), names.AI_STREAM_BLOCKED_MS))
    result.slow_reader += blocked
    result.postprocessing += took - blocked


def _generation(result: Breakdown, took: int, hop: Span, choices: Sequence[Span], spans: Sequence[Span]) -> None:
    """Split a call that generated: by its first choice until that has a token, then by the choice that ends last."""
    first, last = min(choices, key=lambda s: s.start_ns), max(choices, key=lambda s: s.end_ns)
    whole = replace(first, end_ns=last.end_ns)
    before = result.transit, result.replica_wait
    left = _held(result, took, hop, (whole,), names.GENERATE)
    if first.attributes.get(names.AI_MODEL_LOAD_TYPE) == "cold":
        result.cold_start += result.transit + result.replica_wait - sum(before)
        result.transit, result.replica_wait = before
    taken: list[Interval] = []

    def take(name: str, choice: Span) -> int:
        nonlocal left, taken
        own = [s for s in spans if s.parent_id == choice.span_id and s.name == name]
        intervals = without(union(_within(whole, s) for s in own), taken)
        taken = union((*taken, *intervals))
        left -= (found := min(left, length(intervals)))
        return found

    chosen = (first,) if first is last else (first, last)
    for choice in chosen:
        result.preempted += take(names.PREEMPTED, choice)
        queues = [s for s in spans if s.parent_id == choice.span_id and s.name == names.QUEUE]
        waited = take(names.QUEUE, choice)
        for_cache = min(waited, _total_ns(queues, names.AI_QUEUE_CACHE_WAIT_MS))
        result.cache_wait += for_cache
        result.device_busy += waited - for_cache
        result.prefill += take(names.PREFILL, choice)
    result.decode += sum(take(names.DECODE, choice) for choice in reversed(chosen))
    result.unaccounted += left


def _model(result: Breakdown, took: int, hop: Span, spans: Sequence[Span]) -> None:
    generated = [s for s in spans if s.parent_id == hop.span_id and s.name == names.GENERATE]
    if generated and not is_lost(hop):
        _generation(result, took, hop, generated, spans)
        return
    before = result.transit, result.replica_wait
    held = _held(result, took, hop, spans, names.BATCHED_PREDICT)
    stage = next((s for s in spans if s.parent_id == hop.span_id and s.name == names.BATCHED_PREDICT), None)
    if stage is None:
        # The call says how long the replica held the request, but the replica's own spans are missing.
        result.unaccounted += held
        return
    if stage.attributes.get(names.AI_MODEL_LOAD_TYPE) == "cold":
        result.cold_start += result.transit + result.replica_wait - sum(before)
        result.transit, result.replica_wait = before
    inside = [s for s in spans if s.parent_id == stage.span_id]
    runs = union(_within(stage, s) for s in inside if s.name == names.FORWARD_PASS)
    queues = [s for s in inside if s.name == names.QUEUE]
    waits = without(union(_within(stage, s) for s in queues), runs)
    result.forward += (forward := min(held, length(runs)))
    waited = min(held - forward, length(waits))
    busy, fill = _total_ns(queues, names.AI_QUEUE_DEVICE_BUSY_MS), _total_ns(queues, names.AI_QUEUE_FILL_WAIT_MS)
    filled = waited * fill // (busy + fill) if busy + fill else 0
    result.batch_fill += filled
    # Queue time that the span does not split counts as waiting for the device, as nearly all of it is.
    result.device_busy += waited - filled
    result.unaccounted += held - forward - waited


_SHARES: dict[str, Callable[[Breakdown, int, Span, Sequence[Span]], None]] = {
    names.FRONT: _front,
    names.VALIDATE: _validation,
    names.HOP_TOKENIZER: _tokenizer,
    names.HOP_MODEL: _model,
    names.HOP_POSTPROCESSOR: _postprocessor,
    names.RESPOND: _response,
    names.STREAM: _stream,
}


def _held(result: Breakdown, took: int, hop: Span, spans: Sequence[Span], stage: str) -> int:
    """Return how much of the call the stage held the request, and add the rest to its parts; 0 if unknown."""
    if is_lost(hop):
        result.lost_attempt += took
        return 0
    callee = next((s for s in spans if s.parent_id == hop.span_id and s.name == stage), None)
    transit_ms = hop.attributes.get(names.AI_HOP_TRANSIT_MS)
    if callee is not None:
        held = min(took, max(0, callee.end_ns - callee.start_ns))
    elif isinstance(transit_ms, int | float) and 0 <= transit_ms < float("inf"):
        held = max(0, took - round(transit_ms * 1e6))
    else:
        result.unaccounted += took
        return 0
    waited = min(took - held, wait_ns(hop))
    result.replica_wait += waited
    result.transit += took - held - waited
    return held


def is_lost(hop: Span) -> bool:
    """Whether the replica died before it replied."""
    return hop.attributes.get(names.ERROR_TYPE) == "replica_died"


def wait_ns(hop: Span) -> int:
    """How long the ingress waited before it sent the call."""
    return _total_ns((hop,), names.AI_HOP_WAIT_MS)


def _within(outer: Span, span: Span) -> Interval:
    return max(span.start_ns, outer.start_ns), min(span.end_ns, outer.end_ns)


def _total_ns(spans: Iterable[Span], key: str) -> int:
    values = (span.attributes.get(key) for span in spans)
    return sum(round(v * 1e6) for v in values if isinstance(v, int | float) and 0 <= v < float("inf"))


# --- intervals -------------------------------------------------------------------------------------------------------


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """Merge intervals into ordered ones that neither touch nor overlap."""
    result: list[Interval] = []
    for start, end in sorted(intervals):
        if end <= start:
            continue
        if result and start <= result[-1][1]:
            result[-1] = (result[-1][0], max(end, result[-1][1]))
        else:
            result.append((start, end))
    return result


def without(intervals: Sequence[Interval], removed: Sequence[Interval]) -> list[Interval]:
    """Return what is in ``intervals`` and not in ``removed``; both as returned by ``union``."""
    result = []
    for start, end in intervals:
        for removed_start, removed_end in removed:
            if removed_end <= start or end <= removed_start:
                continue
            if start < removed_start:
                result.append((start, removed_start))
            start = max(start, removed_end)
        if start < end:
            result.append((start, end))
    return result


def length(intervals: Iterable[Interval]) -> int:
    return sum(end - start for start, end in intervals)
