"""Records to spans. Runs in the telemetry thread only; one function per record, in the order of a request."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.trace import SpanContext

from deployments.telemetry import names
from deployments.telemetry.carrier import from_carrier, is_sampled
from deployments.telemetry.records import (
    BatchRecord,
    Fault,
    HopRecord,
    LoadRecord,
    Membership,
    PostprocessRecord,
    PredictRecord,
    RequestRecord,
    TokenizeRecord,
    UnfinishedWait,
)

Value = str | bool | int | float | Sequence[str]
Attributes = Mapping[str, Value | None]
_TEXT_LIMIT = 1000


@dataclass(slots=True, eq=False)
class Event:
    name: str
    unix_ns: int
    attributes: Attributes


@dataclass(slots=True, eq=False)
class Span:
    """A span as plain values: what ``telemetry.wire`` makes OTLP of. An attribute that is None is not there."""

    name: str
    trace: SpanContext
    """Of any span of the trace: its id, its flags and its state are the trace's."""
    span_id: int
    parent_id: int
    """0 where there is none."""
    parent_is_remote: bool
    started_unix_ns: int
    ended_unix_ns: int
    attributes: Attributes
    fault: Fault | None
    links: Sequence[SpanContext]
    events: Sequence[Event]


@dataclass(frozen=True, slots=True)
class SpanFactory:
    """Makes spans of one process.

    Attributes:
        model: the served model's name.
        max_batch_size, max_wait_ms: settings that spans state.
        wall_offset_ns: what to add to this process's monotonic clock to get Unix time.
    """

    ids: RandomIdGenerator
    model: str
    max_batch_size: int
    max_wait_ms: float
    wall_offset_ns: int

    def spans(self, record: object) -> Iterator[Span]:
        """All spans of a record; none if its trace is not sampled."""
        return _spans_of(record, self)

    def make(
        self,
        name: str,
        trace: SpanContext,
        span_id: int,
        parent_id: int,
        started_ns: int,
        ended_ns: int,
        attributes: Attributes,
        fault: Fault | None = None,
        links: Sequence[SpanContext] = (),
        events: Sequence[Event] = (),
        *,
        parent_is_remote: bool = False,
    ) -> Span:
        offset = self.wall_offset_ns
        return Span(
            name,
            trace,
            span_id,
            parent_id,
            parent_is_remote,
            offset + started_ns,
            offset + ended_ns,
            attributes,
            fault,
            links,
            events,
        )

    def new_id(self) -> int:
        return self.ids.generate_span_id()


@functools.singledispatch
def _spans_of(record: object, _: SpanFactory) -> Iterator[Span]:
    raise TypeError(f"no spans are defined for {type(record).__name__}")


@_spans_of.register
def _(record: RequestRecord, make: SpanFactory) -> Iterator[Span]:
    root = record.context
    if not root.trace_flags.sampled:
        return
    for interval in record.intervals:
        hop = interval if isinstance(interval, HopRecord) else None
        yield make.make(
            _INTERVAL_SPANS[interval.name],
            root,
            hop.span_id if hop is not None else make.new_id(),
            root.span_id,
            interval.started_ns,
            interval.ended_ns,
            _hop_attributes(hop) if hop is not None else {},
            interval.fault,
        )
    yield make.make(
        names.PREDICT,
        root,
        root.span_id,
        record.parent.span_id if record.parent is not None else 0,
        record.started_ns,
        record.ended_ns,
        _root_attributes(record, make.model),
        record.fault,
        parent_is_remote=record.parent is not None,
    )


_INTERVAL_SPANS = {
    "validate": names.VALIDATE,
    "tokenizer": names.HOP_TOKENIZER,
    "model": names.HOP_MODEL,
    "postprocessor": names.HOP_POSTPROCESSOR,
    "respond": names.RESPOND,
}


def _hop_attributes(hop: HopRecord) -> dict[str, Value | None]:
    transit_ms = _ms(hop.transit_ns) if hop.answered else None
    return {"ai.hop.transit_ms": transit_ms, "ai.hop.group_size": hop.group_size}


def _root_attributes(record: RequestRecord, model: str) -> dict[str, Value | None]:
    return {
        "ai.request_id": record.request_id,
        "ai.input_count": record.input_count,
        "ai.input_length": record.input_length,
        "ai.input_text": [text[:_TEXT_LIMIT] for text in record.texts] if record.texts is not None else None,
        "ai.device": record.device or None,
        "ai.model.name": model,
        "ai.total_latency_ms": _ms(record.ended_ns - record.started_ns),
        "http.request.method": record.method,
        "http.route": record.route,
        "http.response.status_code": record.status or None,
        "url.path": record.path,
        "url.scheme": record.scheme,
        "client.address": record.client or None,
        "gen_ai.operation.name": record.operation or None,
        "gen_ai.request.model": record.requested_model or None,
        "gen_ai.usage.input_tokens": record.tokens,
    }


@_spans_of.register
def _(record: TokenizeRecord, make: SpanFactory) -> Iterator[Span]:
    if not is_sampled(record.carrier):
        return
    hop = from_carrier(record.carrier)
    duration_ms = _ms(record.held_ns)
    slow = Event(
        names.EVENT_SLOW_TOKENIZATION,
        make.wall_offset_ns + record.ended_ns,
        {"duration_ms": duration_ms, "input_length": record.input_chars},
    )
    yield make.make(
        names.PREPROCESS,
        hop,
        make.new_id(),
        hop.span_id,
        record.started_ns,
        record.ended_ns,
        {
            "ai.preprocess.token_count": record.token_count,
            "ai.preprocess.input_chars": record.input_chars,
            "ai.preprocess.duration_ms": duration_ms,
            "ai.preprocess.was_truncated": record.was_truncated,
            "ai.preprocess.cache_hits": record.cache_hits,
        },
        record.fault,
        events=[slow] if duration_ms > record.slow_ms else [],
        parent_is_remote=True,
    )


@_spans_of.register
def _(record: PredictRecord, make: SpanFactory) -> Iterator[Span]:
    if not is_sampled(record.carrier):
        return
    hop = from_carrier(record.carrier)
    own = make.new_id()
    last_ns = max((membership.ended_ns for membership in record.memberships), default=0)
    for membership in record.memberships:
        yield _queue_span(membership, hop, own, make)
        last = membership.runs[-1]
        # The last run, as the request lived it, is over when it has its result: a busy loop hands it out later.
        is_last = not membership.is_over or membership.ended_ns == last_ns
        ended_ns = record.ended_ns if is_last else membership.ended_ns
        yield make.make(
            names.FORWARD_PASS,
            hop,
            membership.context.span_id,
            own,
            membership.started_ns,
            ended_ns,
            {
                "ai.forward_pass.duration_ms": _ms(ended_ns - membership.started_ns),
                "ai.batch.actual_size": last.size,
                "ai.batch.padding_ratio": last.padding_ratio,
                "ai.model.name": make.model,
            },
            membership.fault if membership.is_over else record.fault,
            links=[run.context for run in membership.runs],
        )
    waits = [m.busy_wait_ns + m.fill_wait_ns for m in record.memberships]
    if record.unfinished is not None:
        yield _unfinished_queue_span(record.unfinished, record.fault, hop, own, make)
        waits.append(record.unfinished.ended_ns - record.unfinished.started_ns)
    waited_ns = max(waits, default=0)
    yield make.make(
        names.BATCHED_PREDICT,
        hop,
        own,
        hop.span_id,
        record.started_ns,
        record.ended_ns,
        {
            "ai.batch.max_size": make.max_batch_size,
            "ai.batch.timeout_ms": make.max_wait_ms,
            "ai.batch.wait_time_ms": _ms(waited_ns),
            "ai.model.load_type": "cold" if record.load is not None else "warm",
        },
        record.fault,
        links=[record.load] if record.load is not None else [],
        parent_is_remote=True,
    )


def _queue_span(membership: Membership, trace: SpanContext, parent_id: int, make: SpanFactory) -> Span:
    waited_ns = membership.busy_wait_ns + membership.fill_wait_ns
    return make.make(
        names.QUEUE,
        trace,
        make.new_id(),
        parent_id,
        membership.started_ns - waited_ns,
        membership.started_ns,
        _queue_attributes(membership),
    )


def _unfinished_queue_span(
    wait: UnfinishedWait, fault: Fault | None, trace: SpanContext, parent_id: int, make: SpanFactory
) -> Span:
    attributes = _queue_attributes(wait)
    return make.make(names.QUEUE, trace, make.new_id(), parent_id, wait.started_ns, wait.ended_ns, attributes, fault)


def _queue_attributes(wait: Membership | UnfinishedWait) -> dict[str, Value | None]:
    return {
        "ai.queue.depth_on_arrival": wait.depth_on_arrival,
        "ai.queue.device_busy_ms": _ms(wait.busy_wait_ns),
        "ai.queue.fill_wait_ms": _ms(wait.fill_wait_ns),
        # The model is loaded before a replica takes its first call, so nothing waits for it here.
        "ai.queue.load_wait_ms": 0.0,
    }


@_spans_of.register
def _(record: BatchRecord, make: SpanFactory) -> Iterator[Span]:
    members = [member.context for member in record.members if member.context.trace_flags.sampled]
    if not members:
        return
    pre, post = record.gpu_utilization
    yield make.make(
        names.BATCH_FORWARD,
        record.context,
        record.context.span_id,
        0,
        record.started_ns,
        record.ended_ns,
        {
            "ai.batch.actual_size": record.size,
            "ai.batch.max_wait_ms": _ms(max(record.waits_ns)),
            "ai.batch.avg_wait_ms": _ms(sum(record.waits_ns) // len(record.waits_ns)),
            "ai.batch.inference_ms": record.inference_ms,
            "ai.batch.tokens": record.tokens,
            "ai.batch.padded_tokens": record.padded_tokens,
            "ai.batch.padding_ratio": record.padding_ratio,
            "ai.batch.dispatch_reason": record.reason,
            "ai.batch.queue_behind": record.queue_behind,
            "ai.model.name": make.model,
            "ai.device": record.device,
            "ai.forward_pass.output_shape": str(list(record.output_shape)),
            "ai.gpu.utilization_pre": pre,
            "ai.gpu.utilization_post": post,
            "ai.gpu.memory_free_gb": record.gpu_memory_free_gb,
            "ai.gpu.peak_memory_gb": record.peak_memory_gb,
        },
        record.fault,
        links=members,
    )


@_spans_of.register
def _(record: PostprocessRecord, make: SpanFactory) -> Iterator[Span]:
    if not is_sampled(record.carrier):
        return
    hop = from_carrier(record.carrier)
    yield make.make(
        names.POSTPROCESS,
        hop,
        make.new_id(),
        hop.span_id,
        record.started_ns,
        record.ended_ns,
        {
            "ai.postprocess.duration_ms": _ms(record.held_ns),
            "ai.postprocess.output_length": record.output_length,
        },
        record.fault,
        parent_is_remote=True,
    )


@_spans_of.register
def _(record: LoadRecord, make: SpanFactory) -> Iterator[Span]:
    own = record.context
    if not own.trace_flags.sampled:
        return
    for name, started_ns, ended_ns in record.phases:
        yield make.make(_PHASE_SPANS[name], own, make.new_id(), own.span_id, started_ns, ended_ns, {})
    loaded = Event(names.EVENT_MODEL_LOADED, make.wall_offset_ns + record.ended_ns, {"device": record.device})
    yield make.make(
        names.MODEL_LOAD,
        own,
        own.span_id,
        0,
        record.started_ns,
        record.ended_ns,
        {
            "ai.model.load_type": "cold",
            "ai.model.load_time_ms": _ms(record.ended_ns - record.started_ns),
            "ai.model.already_loaded": False,
            "ai.model.name": make.model,
            "ai.device": record.device,
            "ai.gpu.memory_allocated_gb": record.memory_allocated_gb,
            "ai.gpu.memory_reserved_gb": record.memory_reserved_gb,
        },
        record.fault,
        events=[loaded] if record.fault is None else [],
    )


_PHASE_SPANS = {
    "weights": names.LOAD_WEIGHTS,
    "device_move": names.LOAD_DEVICE_MOVE,
    "warm_up": names.LOAD_WARM_UP,
}


def _ms(nanoseconds: int) -> float:
    return nanoseconds / 1e6
