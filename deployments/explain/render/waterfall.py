"""A request as a waterfall, with the batch that ran it and the requests in that batch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain

from deployments.explain.requests.breakdown import Breakdown
from deployments.explain.requests.capture import segment_of
from deployments.explain.requests.request import HINDRANCES, STAGE_OF, number, whole
from deployments.explain.token_gaps import token_gaps
from deployments.explain.traces.otlp import Span
from deployments.telemetry import names

_WIDTH = 40
# The attributes that readers look for first, shown after the bar of a span.
_SHOWN = (
    names.AI_HOP_TRANSIT_MS,
    names.AI_PREPROCESS_TOKEN_COUNT,
    names.AI_PREPROCESS_WAS_TRUNCATED,
    names.AI_MODEL_LOAD_TYPE,
    names.AI_QUEUE_DEVICE_BUSY_MS,
    names.AI_QUEUE_FILL_WAIT_MS,
    names.AI_BATCH_ACTUAL_SIZE,
    names.AI_BATCH_PADDING_RATIO,
    names.AI_BATCH_DISPATCH_REASON,
    names.AI_QUEUE_CACHE_WAIT_MS,
    names.AI_PREFILL_TOKENS,
    names.AI_PREFILL_CACHED_TOKENS,
    names.AI_DECODE_TOKENS,
    names.AI_DECODE_MAX_GAP_MS,
    names.AI_CPU_RUN_DELAY_MS,
    *HINDRANCES,
    names.AI_STREAM_BLOCKED_MS,
    names.HTTP_RESPONSE_STATUS_CODE,
    names.ERROR_TYPE,
)
_SLOW_STEPS = 5
_SLOW_TOKENS = 5
MOST_MEMBERS = 64
"""Maximum number of requests shown per batch."""


def waterfall(trace: Sequence[Span], linked: Sequence[Span]) -> Iterator[str]:
    """Yield lines of text: the spans of a trace, and the spans of other traces that it links to.

    Spans whose parent is missing appear at the top level, so nothing is hidden.
    """
    trace, linked = aligned(trace, linked)
    start = min(span.start_ns for span in trace)
    scale = max(span.end_ns for span in trace) - start
    yield f"trace {trace[0].trace_id}"
    for depth, span in ordered(trace):
        yield _line(span, start, scale, depth)
    segments = [span for span in linked if span.name == names.SEGMENT]
    for batch in _by_start(span for span in linked if span.name != names.SEGMENT):
        count = len(batch.links)
        held = (
            f"batch of {count} request{'' if count == 1 else 's'}"
            if batch.name == names.BATCH_FORWARD
            else "waited for"
        )
        yield f"linked: {held}, trace {batch.trace_id}"
        yield _line(batch, start, scale, 0)
    yield from _slow_steps(trace[0].trace_id, segments)
    yield from _slow_tokens(trace, segments)


def _slow_steps(trace_id: str, segments: Sequence[Span]) -> Iterator[str]:
    """Yield lines of text: the longest steps of a generation, and whose prompts they computed."""
    if not segments:
        return
    count = len(segments)
    yield f"linked: {count} segment{'' if count == 1 else 's'} of steps with the same members; the longest steps:"
    longest = sorted(segments, key=lambda span: -number(span, names.AI_SEGMENT_MAX_STEP_MS))[:_SLOW_STEPS]
    for segment in longest:
        steps = max(1, whole(segment, names.AI_SEGMENT_STEPS))
        decoded = whole(segment, names.AI_SEGMENT_DECODE_TOKENS) // steps
        prompts = whole(segment, names.AI_SEGMENT_PREFILL_TOKENS)
        yield (
            f"  {number(segment, names.AI_SEGMENT_MAX_STEP_MS):9.2f} ms, in trace {segment.trace_id}: {decoded} decoded"
            f", {prompts} tokens of prompts in {steps} step{'' if steps == 1 else 's'}"
        )
        for prefilled, _ in segment.links[: min(_SLOW_STEPS, whole(segment, names.AI_SEGMENT_PREFILLING))]:
            yield f"{'':16}prompt of {'this request' if prefilled == trace_id else f'slowlens trace {prefilled}'}"


def _slow_tokens(trace: Sequence[Span], segments: Sequence[Span]) -> Iterator[str]:
    gaps = sorted(token_gaps(trace, {span.key: segment_of(span) for span in segments}), key=lambda gap: -gap.gap_ms)
    if gaps:
        yield "longest waits for a token:"
        yield from (f"  {gap}" for gap in gaps[:_SLOW_TOKENS])


def member_traces(linked: Iterable[Span]) -> Collection[str]:
    """Return the traces of the requests in the linked batches, at most ``MOST_MEMBERS`` per batch."""
    batches = (span for span in linked if span.name == names.BATCH_FORWARD)
    return dict.fromkeys(trace_id for batch in batches for trace_id, _ in batch.links[:MOST_MEMBERS])


def members(trace_id: str, linked: Iterable[Span], spans: Iterable[Span]) -> Iterator[str]:
    """Yield lines of text: the requests in each linked batch, unless alone; ``spans`` are those of their traces."""
    by_key = {span.key: span for span in spans}
    inputs: dict[str, int] = defaultdict(int)
    for span in by_key.values():
        count = span.attributes.get(names.AI_PREPROCESS_TOKEN_COUNT, 0)
        inputs[span.trace_id] += count if isinstance(count, int) else 0
    for batch in (span for span in linked if span.name == names.BATCH_FORWARD):
        passes = [by_key[link] for link in batch.links[:MOST_MEMBERS] if link in by_key]
        missing = len({link for link, _ in batch.links[:MOST_MEMBERS]} - {span.trace_id for span in passes})
        if not missing and not any(span.trace_id != trace_id for span in passes):
            continue
        yield ""
        yield f"in the batch of trace {batch.trace_id}:"
        yield f"  {'':<47} {'tokens':>20} {'waited ms':>10}"
        for span in sorted(passes, key=lambda one: -inputs[one.trace_id]):
            stage = by_key.get((span.trace_id, span.parent_id))
            waited = f"{(span.start_ns - stage.start_ns) / 1e6:.2f}" if stage is not None else ""
            own = " (this request)" if span.trace_id == trace_id else ""
            yield f"  slowlens trace {span.trace_id} {inputs[span.trace_id] or '':>20} {waited:>10}{own}"
        if missing:
            yield f"  and {missing} whose {'traces are' if missing > 1 else 'trace is'} not here: not kept, or lost"
        if len(batch.links) > MOST_MEMBERS:
            yield f"  and {len(batch.links) - MOST_MEMBERS} more"


def spent(breakdown: Breakdown) -> Iterator[str]:
    """Yield lines of text: the parts of the latency, in the order of a request's path."""
    latency = breakdown.latency_ns
    yield f"{latency / 1e6:.2f} ms were spent on"
    for part, took in breakdown.parts():
        if took:
            share = took / latency
            bar = "#" * round(share * _WIDTH)
            yield f"  {part.replace('_', ' '):<22} {took / 1e6:22.2f} ms |{bar:<{_WIDTH}}| {share:.1%}"


def aligned(trace: Sequence[Span], linked: Sequence[Span]) -> tuple[list[Span], list[Span]]:
    """Return the spans with the clocks of other processes adjusted so that each stage lies within its call.

    A stage that already does is not moved; any other is put in the middle of its call, as its true position is unknown.
    """
    by_id = {span.span_id: span for span in trace}
    ahead: dict[str, int] = {}
    for stage in trace:
        hop = by_id.get(stage.parent_id)
        if hop is None or stage.name not in (STAGE_OF.get(hop.name), names.GENERATE):
            continue
        if stage.start_ns < hop.start_ns or stage.end_ns > hop.end_ns:
            ahead[stage.instance] = (stage.start_ns + stage.end_ns - hop.start_ns - hop.end_ns) // 2
    return [_earlier(s, ahead) for s in trace], [_earlier(s, ahead) for s in linked]


def _earlier(span: Span, ahead: dict[str, int]) -> Span:
    by_ns = ahead.get(span.instance, 0)
    return replace(span, start_ns=span.start_ns - by_ns, end_ns=span.end_ns - by_ns) if by_ns else span


def ordered(trace: Sequence[Span]) -> Iterator[tuple[int, Span]]:
    """Yield every span once, after its parent, with its depth; children by start time.

    Spans that descend from themselves, which no tree holds, follow without depth.
    """
    present = {span.span_id for span in trace}
    below: dict[str, list[Span]] = defaultdict(list)
    for span in trace:
        below[span.parent_id if span.parent_id in present else ""].append(span)
    waiting = [(0, span) for span in reversed(_by_start(below.pop("", ())))]
    while waiting:
        depth, span = waiting.pop()
        yield depth, span
        waiting += [(depth + 1, child) for child in reversed(_by_start(below.pop(span.span_id, ())))]
    yield from ((0, span) for span in _by_start(chain.from_iterable(below.values())))


def label(span: Span) -> str:
    return span.name.removeprefix("ai.inference.").removeprefix("ai.")


def shown(span: Span) -> str:
    """Format the attributes that readers look for first."""
    return ", ".join(
        f"{key.rpartition('.')[2]} {_short(span.attributes[key])}" for key in _SHOWN if key in span.attributes
    )


def _line(span: Span, start: int, scale: int, depth: int) -> str:
    name = "  " * depth + label(span)
    first = min(_WIDTH - 1, max(0, (span.start_ns - start) * _WIDTH // max(scale, 1)))
    last = min(_WIDTH, max(first + 1, -(-(span.end_ns - start) * _WIDTH // max(scale, 1))))
    bar = " " * first + ("x" if span.failed else "=") * (last - first)
    service = span.service.removeprefix("slowlens.")
    return f"{name:<24} {service:<13} {span.ms:9.2f} ms |{bar:<{_WIDTH}}| {shown(span)}".rstrip()


def _short(value: object) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def _by_start(spans: Iterable[Span]) -> list[Span]:
    return sorted(spans, key=lambda span: (span.start_ns, -span.end_ns))
