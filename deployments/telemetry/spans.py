"""Records to spans. Runs in the telemetry thread only; one function per record, in the order of a request."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode

from deployments import __version__
from deployments.telemetry import names
from deployments.telemetry.carrier import child_of, from_carrier, is_sampled
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
_SCOPE = InstrumentationScope(names.SCOPE, __version__)
_TEXT_LIMIT = 1000
_KINDS = {"SERVER": SpanKind.SERVER, "CLIENT": SpanKind.CLIENT, "INTERNAL": SpanKind.INTERNAL}
_SPECS = {spec.name: spec for spec in names.SPANS}


@dataclass(frozen=True, slots=True)
class SpanFactory:
    """Makes spans of one process.

    Attributes:
        resource: who emits them.
        model: the served model's name.
        max_batch_size, max_wait_ms: settings that spans state.
        wall_offset_ns: what to add to this process's monotonic clock to get Unix time.
    """

    resource: Resource
    ids: RandomIdGenerator
    model: str
    max_batch_size: int
    max_wait_ms: float
    wall_offset_ns: int

    def spans(self, record: object) -> Iterator[ReadableSpan]:
        """All spans of a record; none if its trace is not sampled."""
        return _spans_of(record, self)

    def make(
        self,
        name: str,
        context: SpanContext,
        parent: SpanContext | None,
        started_ns: int,
        ended_ns: int,
        attributes: Mapping[str, Value | None],
        fault: Fault | None = None,
        links: Sequence[SpanContext] = (),
        events: Sequence[Event] = (),
    ) -> ReadableSpan:
        filled = {key: value for key, value in attributes.items() if value is not None}
        status, all_events = Status(StatusCode.UNSET), list(events)
        if fault is not None:
            filled["error.type"] = fault.error_type
            status = Status(StatusCode.ERROR, fault.message or fault.exception_type)
            all_events.append(
                Event(
                    "exception",
                    {
                        "exception.type": fault.exception_type,
                        "exception.message": fault.message,
                        "exception.stacktrace": fault.stacktrace,
                    },
                    self.wall_offset_ns + ended_ns,
                )
            )
        return ReadableSpan(
            name=name,
            context=context,
            parent=parent,
            resource=self.resource,
            attributes=filled,
            events=all_events,
            links=[Link(link) for link in links],
            kind=_KINDS[_SPECS[name].kind],
            status=status,
            start_time=self.wall_offset_ns + started_ns,
            end_time=self.wall_offset_ns + ended_ns,
            instrumentation_scope=_SCOPE,
        )

    def child(self, parent: SpanContext, span_id: int | None = None) -> SpanContext:
        """A context in the parent's trace, for a span made here."""
        return child_of(parent, span_id or self.ids.generate_span_id())


@functools.singledispatch
def _spans_of(record: object, _: SpanFactory) -> Iterator[ReadableSpan]:
    raise TypeError(f"no spans are defined for {type(record).__name__}")


@_spans_of.register
def _(record: RequestRecord, make: SpanFactory) -> Iterator[ReadableSpan]:
    root = record.context
    if not root.trace_flags.sampled:
        return
    for interval in record.intervals:
        span_id, attributes = None, {}
        if isinstance(interval, HopRecord):
            span_id, attributes = interval.span_id, _hop_attributes(interval)
        yield make.make(
            _INTERVAL_SPANS[interval.name],
            make.child(root, span_id),
            root,
            interval.started_ns,
            interval.ended_ns,
            attributes,
            interval.fault,
        )
    yield make.make(
        names.PREDICT,
        root,
        record.parent,
        record.started_ns,
        record.ended_ns,
        _root_attributes(record, make.model),
        record.fault,
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
        "gen_ai.operation.name": record.operation or None,
        "gen_ai.request.model": record.requested_model or None,
        "gen_ai.usage.input_tokens": record.tokens,
    }


@_spans_of.register
def _(record: TokenizeRecord, make: SpanFactory) -> Iterator[ReadableSpan]:
    if not is_sampled(record.carrier):
        return
    hop = from_carrier(record.carrier)
    duration_ms = _ms(record.held_ns)
    slow = Event(
        names.EVENT_SLOW_TOKENIZATION,
        {"duration_ms": duration_ms, "input_length": record.input_chars},
        make.wall_offset_ns + record.ended_ns,
    )
    yield make.make(
        names.PREPROCESS,
        make.child(hop),
        hop,
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
    )


@_spans_of.register
def _(record: PredictRecord, make: SpanFactory) -> Iterator[ReadableSpan]:
    if not is_sampled(record.carrier):
        return
    hop = from_carrier(record.carrier)
    own = make.child(hop)
    for membership in record.memberships:
        yield _queue_span(membership, own, make)
        last = membership.runs[-1]
        ended_ns = membership.ended_ns if membership.is_over else record.ended_ns
        yield make.make(
            names.FORWARD_PASS,
            membership.context,
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
        yield _unfinished_queue_span(record.unfinished, record.fault, own, make)
        waits.append(record.unfinished.ended_ns - record.unfinished.started_ns)
    waited_ns = max(waits, default=0)
    yield make.make(
        names.BATCHED_PREDICT,
        own,
        hop,
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
    )


def _queue_span(membership: Membership, parent: SpanContext, make: SpanFactory) -> ReadableSpan:
    waited_ns = membership.busy_wait_ns + membership.fill_wait_ns
    return make.make(
        names.QUEUE,
        make.child(parent),
        parent,
        membership.started_ns - waited_ns,
        membership.started_ns,
        _queue_attributes(membership),
    )


def _unfinished_queue_span(
    wait: UnfinishedWait, fault: Fault | None, parent: SpanContext, make: SpanFactory
) -> ReadableSpan:
    return make.make(
        names.QUEUE, make.child(parent), parent, wait.started_ns, wait.ended_ns, _queue_attributes(wait), fault
    )


def _queue_attributes(wait: Membership | UnfinishedWait) -> dict[str, Value | None]:
    return {
        "ai.queue.depth_on_arrival": wait.depth_on_arrival,
        "ai.queue.device_busy_ms": _ms(wait.busy_wait_ns),
        "ai.queue.fill_wait_ms": _ms(wait.fill_wait_ns),
        # The model is loaded before a replica takes its first call, so nothing waits for it here.
        "ai.queue.load_wait_ms": 0.0,
    }


@_spans_of.register
def _(record: BatchRecord, make: SpanFactory) -> Iterator[ReadableSpan]:
    members = [member.context for member in record.members if member.context.trace_flags.sampled]
    if not members:
        return
    pre, post = record.gpu_utilization
    yield make.make(
        names.BATCH_FORWARD,
        record.context,
        None,
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
def _(record: PostprocessRecord, make: SpanFactory) -> Iterator[ReadableSpan]:
    if not is_sampled(record.carrier):
        return
    hop = from_carrier(record.carrier)
    yield make.make(
        names.POSTPROCESS,
        make.child(hop),
        hop,
        record.started_ns,
        record.ended_ns,
        {
            "ai.postprocess.duration_ms": _ms(record.held_ns),
            "ai.postprocess.output_length": record.output_length,
        },
        record.fault,
    )


@_spans_of.register
def _(record: LoadRecord, make: SpanFactory) -> Iterator[ReadableSpan]:
    own = record.context
    if not own.trace_flags.sampled:
        return
    for name, started_ns, ended_ns in record.phases:
        yield make.make(_PHASE_SPANS[name], make.child(own), own, started_ns, ended_ns, {})
    loaded = Event(names.EVENT_MODEL_LOADED, {"device": record.device}, make.wall_offset_ns + record.ended_ns)
    yield make.make(
        names.MODEL_LOAD,
        own,
        None,
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
