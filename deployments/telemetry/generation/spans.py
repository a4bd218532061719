"""Spans of generations and of the segments that they were in."""

from __future__ import annotations

from collections.abc import Iterator

from deployments.telemetry import names
from deployments.telemetry.carrier import is_sampled
from deployments.telemetry.export.span import Attributes, Event, Span
from deployments.telemetry.generation.records import MAX_LINKS, GenerateRecord, SegmentRecord
from deployments.telemetry.spans import Between, SpanFactory, spans_of


@spans_of.register
def _(record: GenerateRecord, make: SpanFactory) -> Iterator[Span]:
    if not is_sampled(record.carrier):
        return
    own, ended_ns = record.context, record.ended_ns
    first_step_ns = record.first_step_ns or ended_ns
    queue: Attributes = {
        names.AI_QUEUE_DEPTH_ON_ARRIVAL: record.depth_on_arrival,
        names.AI_QUEUE_CACHE_WAIT_MS: record.cache_wait_ns / 1e6,
    }
    yield make.child(names.QUEUE, own, Between(record.started_ns, first_step_ns), queue)
    if record.first_step_ns:
        prefill: Attributes = {
            names.AI_PREFILL_TOKENS: record.prefill_tokens,
            names.AI_PREFILL_CACHED_TOKENS: record.cached_tokens,
            names.AI_PREFILL_CHUNKS: record.chunks,
        }
        in_prefill = [segment.context for segment in record.segments if record in segment.prefilling]
        between = Between(record.first_step_ns, record.first_token_ns or ended_ns)
        yield make.child(names.PREFILL, own, between, prefill, links=in_prefill[:MAX_LINKS])
    if record.first_token_ns:
        decode: Attributes = {
            names.AI_DECODE_TOKENS: record.tokens,
            names.AI_DECODE_STEPS: len(record.gaps),
            names.AI_DECODE_MAX_GAP_MS: max(record.gaps, default=0) / 1e6,
            names.AI_DECODE_USUAL_GAP_MS: record.usual_gap_ns / 1e6,
            names.AI_DECODE_P99_GAP_MS: record.p99_gap_ns() / 1e6,
        }
        slow = record.slow_tokens()
        events = [_slow_token(number, make.wall_offset_ns + came_ns, gap_ns) for number, came_ns, gap_ns in slow]
        came = [came_ns for _, came_ns, _ in slow]

        def cost(segment: SegmentRecord) -> tuple[bool, int]:
            has_slow = any(segment.started_ns < came_ns <= segment.ended_ns for came_ns in came)
            return has_slow, sum(segment.step_ns)

        costliest = sorted(_after(record), key=cost, reverse=True)[:MAX_LINKS]
        links = [segment.context for segment in costliest]
        between = Between(record.first_token_ns, ended_ns)
        yield make.child(names.DECODE, own, between, decode, links=links, events=events)
    for lost_ns, again_ns in record.losses:
        yield make.child(names.PREEMPTED, own, Between(lost_ns, again_ns or ended_ns), {})
    attributes: Attributes = {
        names.AI_GENERATE_CHOICE: record.choice,
        names.AI_MODEL_NAME: make.model,
        names.AI_MODEL_LOAD_TYPE: "cold" if record.load is not None else "warm",
        names.AI_DEVICE: record.device,
        **make.hindrances(record),
        names.GEN_AI_RESPONSE_FINISH_REASONS: [record.finish_reason] if record.finish_reason else None,
    }
    links = [record.load] if record.load is not None else []
    yield make.stage(names.GENERATE, record, attributes, span_id=own.span_id, links=links)


def _slow_token(number: int, unix_ns: int, gap_ns: int) -> Event:
    attributes: Attributes = {names.AI_TOKEN_INDEX: number, names.AI_TOKEN_GAP_MS: gap_ns / 1e6}
    return Event(names.EVENT_SLOW_TOKEN, unix_ns, attributes)


def _after(record: GenerateRecord) -> Iterator[SegmentRecord]:
    """The segments that had steps after the first token."""
    return (segment for segment in record.segments if segment.ended_ns > record.first_token_ns)


@spans_of.register
def _(record: SegmentRecord, make: SpanFactory) -> Iterator[Span]:
    prefilling, decoding = (
        [member.context for member in members if member.context.trace_flags.sampled]
        for members in (record.prefilling, record.decoding)
    )
    links = prefilling + decoding
    if not links:
        return
    attributes: Attributes = {
        names.AI_SEGMENT_STEPS: record.steps,
        names.AI_SEGMENT_PREFILLING: len(prefilling),
        names.AI_SEGMENT_PREFILL_TOKENS: record.prefill_tokens,
        names.AI_SEGMENT_DECODE_TOKENS: record.decode_tokens,
        names.AI_SEGMENT_REQUESTS: len(record.members),
        names.AI_SEGMENT_WAITING: record.waiting,
        names.AI_SEGMENT_KV_USED_RATIO: record.kv_used_ratio,
        names.AI_SEGMENT_STEP_MS: sum(record.step_ns) / 1e6,
        names.AI_SEGMENT_MAX_STEP_MS: max(record.step_ns, default=0) / 1e6,
        names.AI_MODEL_NAME: make.model,
        names.AI_DEVICE: record.device,
    }
    yield make.root(names.SEGMENT, record.context, record, attributes, links=links)
