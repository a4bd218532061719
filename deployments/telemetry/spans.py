"""Turns records into spans. Runs in the telemetry thread only; one function per record, in the order of a request.

``span_specs`` declares each span; this module fills in its values.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.trace import SpanContext

from deployments.telemetry import names
from deployments.telemetry.carrier import child_of, from_carrier, is_sampled
from deployments.telemetry.export.span import Attributes, Event, Span
from deployments.telemetry.gauges.stalls import Stall
from deployments.telemetry.records import (
    BatchRecord,
    Fault,
    HopRecord,
    Membership,
    ModelLoadRecord,
    PostprocessRecord,
    PredictRecord,
    RequestRecord,
    StageRecord,
    TokenizeRecord,
    UnfinishedWait,
)

_TEXT_LIMIT = 1000
_LEAST_RUN_DELAY_NS = 1_000_000
_INTERVAL_SPANS = {
    "front": names.FRONT,
    "validate": names.VALIDATE,
    "tokenizer": names.HOP_TOKENIZER,
    "model": names.HOP_MODEL,
    "postprocessor": names.HOP_POSTPROCESSOR,
    "respond": names.RESPOND,
}
_PHASE_SPANS = {
    "weights": names.LOAD_WEIGHTS,
    "device_move": names.LOAD_DEVICE_MOVE,
    "warm_up": names.LOAD_WARM_UP,
}


class Timed(Protocol):
    """Anything with a start and an end on this process's monotonic clock."""

    @property
    def started_ns(self) -> int: ...
    @property
    def ended_ns(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Between:
    started_ns: int
    ended_ns: int


@dataclass(frozen=True, slots=True)
class SpanFactory:
    """Makes the spans of one process.

    Attributes:
        model: the served model's name.
        max_batch_size, max_wait_ms: settings that spans report.
        wall_offset_ns: offset to add to this process's monotonic clock to get Unix time.
        run_delay_ns: how long threads could run and did not between two times of that clock.
        cpu_used: by attribute, CPU time that was used between two times of that clock.
        shortages: by attribute, how long something was short between two times of that clock.
        garbage_ns: how long collections of garbage took between two times of that clock.
        stalls_between: stalls of the event loop between two times of that clock.
    """

    ids: RandomIdGenerator
    model: str
    max_batch_size: int
    max_wait_ms: float
    wall_offset_ns: int
    run_delay_ns: Callable[[int, int], int] = lambda *_: 0
    cpu_used: Mapping[str, Callable[[int, int], int]] = field(default_factory=dict)
    shortages: Mapping[str, Callable[[int, int], int]] = field(default_factory=dict)
    garbage_ns: Callable[[int, int], int] = lambda *_: 0
    stalls_between: Callable[[int, int], list[Stall]] = lambda *_: []

    def spans(self, record: object) -> Iterator[Span]:
        """Return all spans of a record; none if its trace is not sampled."""
        return spans_of(record, self)

    def root(
        self,
        name: str,
        context: SpanContext,
        time: Timed,
        attributes: Attributes,
        *,
        parent: SpanContext | None = None,
        fault: Fault | None = None,
        links: Sequence[SpanContext] = (),
        events: Sequence[Event] = (),
    ) -> Span:
        """Return the span identified by ``context``; ``parent``, if any, belongs to another process."""
        return Span(
            name=name,
            trace=context,
            span_id=context.span_id,
            parent_id=parent.span_id if parent is not None else 0,
            parent_is_remote=parent is not None,
            started_unix_ns=self.wall_offset_ns + time.started_ns,
            ended_unix_ns=self.wall_offset_ns + time.ended_ns,
            attributes=attributes,
            fault=fault,
            links=links,
            events=events,
        )

    def child(
        self,
        name: str,
        parent: SpanContext,
        time: Timed,
        attributes: Attributes,
        *,
        span_id: int = 0,
        fault: Fault | None = None,
        links: Sequence[SpanContext] = (),
        events: Sequence[Event] = (),
    ) -> Span:
        """Return a child of a span of this process, with a new id unless one is given."""
        return Span(
            name=name,
            trace=parent,
            span_id=span_id or self.new_id(),
            parent_id=parent.span_id,
            started_unix_ns=self.wall_offset_ns + time.started_ns,
            ended_unix_ns=self.wall_offset_ns + time.ended_ns,
            attributes=attributes,
            fault=fault,
            links=links,
            events=events,
        )

    def stage(
        self,
        name: str,
        record: StageRecord,
        attributes: Attributes,
        *,
        span_id: int = 0,
        links: Sequence[SpanContext] = (),
        events: Sequence[Event] = (),
    ) -> Span:
        """Return a stage's span, a child of its caller's hop, with what its event loop did instead meanwhile."""
        hop = from_carrier(record.carrier)
        return Span(
            name=name,
            trace=hop,
            span_id=span_id or self.new_id(),
            parent_id=hop.span_id,
            parent_is_remote=True,
            started_unix_ns=self.wall_offset_ns + record.started_ns,
            ended_unix_ns=self.wall_offset_ns + record.ended_ns,
            attributes=attributes,
            fault=record.fault,
            links=links,
            events=[*events, *self.stalls(record)],
        )

    def hindrances(self, time: Timed) -> Attributes:
        """How long this process was held up meanwhile: by others on its CPUs, a shortage, a stalled loop, garbage."""
        delay_ns = self.run_delay_ns(time.started_ns, time.ended_ns)
        garbage_ns = self.garbage_ns(time.started_ns, time.ended_ns)
        stalled_ns = sum(stall.shared_ns(time.started_ns, time.ended_ns) for stall in self._stalls(time))
        is_starved = delay_ns >= _LEAST_RUN_DELAY_NS
        return {
            names.AI_CPU_RUN_DELAY_MS: _ms(delay_ns) if is_starved else None,
            # Whose work it was that left no CPU.
            **{
                key: _ms(between(time.started_ns, time.ended_ns)) if is_starved else None
                for key, between in self.cpu_used.items()
            },
            **self.shortage(time),
            names.AI_EVENT_LOOP_STALL_MS: _ms(stalled_ns) if stalled_ns else None,
            names.AI_GC_PAUSE_MS: _ms(garbage_ns) if garbage_ns else None,
        }

    def shortage(self, time: Timed) -> Attributes:
        """How long what was short meanwhile."""
        each = {key: between(time.started_ns, time.ended_ns) for key, between in self.shortages.items()}
        return {key: _ms(short_ns) if short_ns >= _LEAST_RUN_DELAY_NS else None for key, short_ns in each.items()}

    def stalls(self, time: Timed) -> list[Event]:
        """An event for each stall of the event loop meanwhile, with what the loop was doing."""
        return [
            Event(
                names.EVENT_LOOP_STALL,
                self.wall_offset_ns + stall.started_ns,
                {
                    names.AI_EVENT_LOOP_STALL_MS: _ms(stall.shared_ns(stall.started_ns, time.ended_ns)),
                    names.CODE_STACKTRACE: stall.stack,
                },
            )
            for stall in self._stalls(time)
        ]

    def _stalls(self, time: Timed) -> list[Stall]:
        return self.stalls_between(time.started_ns, time.ended_ns)

    def new_id(self) -> int:
        return self.ids.generate_span_id()


@functools.singledispatch
def spans_of(record: object, _: SpanFactory) -> Iterator[Span]:
    """All spans of a record. Registered for each type of record, here and in ``generation.spans``."""
    raise TypeError(f"no spans are defined for {type(record).__name__}")


@spans_of.register
def _(record: RequestRecord, make: SpanFactory) -> Iterator[Span]:
    root = record.context
    if not root.trace_flags.sampled:
        return
    for interval in record.intervals:
        name = _INTERVAL_SPANS[interval.name]
        if isinstance(interval, HopRecord):
            hop = _hop_attributes(interval)
            yield make.child(name, root, interval, hop, span_id=interval.span_id, fault=interval.fault)
        else:
            yield make.child(name, root, interval, {}, fault=interval.fault)
    attributes: Attributes = {
        names.AI_REQUEST_ID: record.request_id,
        names.AI_REQUEST_NUMBER: record.number,
        names.AI_TENANT: record.tenant or None,
        names.AI_TIMEOUT_MS: record.timeout_ms,
        names.AI_SAMPLING_WEIGHT: record.weight,
        names.AI_INPUT_COUNT: record.input_count,
        names.AI_INPUT_LENGTH: record.input_length,
        names.AI_INPUT_TEXT: [text[:_TEXT_LIMIT] for text in record.texts] if record.texts is not None else None,
        names.AI_DEVICE: record.device or None,
        names.AI_MODEL_NAME: record.model,
        names.AI_TOTAL_LATENCY_MS: _ms(record.ended_ns - record.started_ns),
        **_protocol_attributes(record),
        names.CLIENT_ADDRESS: record.client or None,
        names.GEN_AI_OPERATION_NAME: record.operation or None,
        names.GEN_AI_REQUEST_MODEL: record.requested_model or None,
        names.GEN_AI_USAGE_INPUT_TOKENS: record.tokens,
        **make.hindrances(record),
    }
    facts = record.generation
    if facts is not None:
        attributes = {**attributes, **facts.attributes(record.started_ns)}
        if facts.stream is not None:
            yield make.child(names.STREAM, root, facts.stream, facts.stream.attributes())
    yield make.root(
        names.PREDICT,
        root,
        record,
        attributes,
        parent=record.parent,
        fault=record.fault,
        events=make.stalls(record),
    )


def _protocol_attributes(record: RequestRecord) -> Attributes:
    if record.rpc_method:
        return {
            names.RPC_SYSTEM_NAME: "grpc",
            names.RPC_METHOD: record.rpc_method,
            names.RPC_RESPONSE_STATUS_CODE: record.rpc_status or None,
        }
    return {
        names.HTTP_REQUEST_METHOD: record.method,
        names.HTTP_ROUTE: record.route,
        names.HTTP_RESPONSE_STATUS_CODE: record.status or None,
        names.URL_PATH: record.path,
        names.URL_SCHEME: record.scheme,
    }


def _hop_attributes(hop: HopRecord) -> Attributes:
    return {
        names.AI_HOP_TRANSIT_MS: _ms(hop.transit_ns) if hop.has_reply else None,
        names.AI_HOP_WAIT_MS: _ms(hop.wait_ns),
        names.AI_HOP_ATTEMPT: hop.attempt if hop.attempt > 1 else None,
    }


@spans_of.register
def _(record: TokenizeRecord, make: SpanFactory) -> Iterator[Span]:
    if not is_sampled(record.carrier):
        return
    duration_ms = _ms(record.held_ns)
    attributes: Attributes = {
        names.AI_PREPROCESS_TOKEN_COUNT: record.token_count,
        names.AI_PREPROCESS_INPUT_CHARS: record.input_chars,
        names.AI_PREPROCESS_DURATION_MS: duration_ms,
        names.AI_PREPROCESS_WAS_TRUNCATED: record.was_truncated,
        names.AI_PREPROCESS_CACHE_HITS: record.cache_hits,
        **make.hindrances(record),
    }
    slow = Event(
        names.EVENT_SLOW_TOKENIZATION,
        make.wall_offset_ns + record.ended_ns,
        {"duration_ms": duration_ms, "input_length": record.input_chars},
    )
    yield make.stage(names.PREPROCESS, record, attributes, events=[slow] if duration_ms > record.slow_ms else [])


@spans_of.register
def _(record: PredictRecord, make: SpanFactory) -> Iterator[Span]:
    if not is_sampled(record.carrier):
        return
    own = child_of(from_carrier(record.carrier), make.new_id())
    last_ns = max((membership.ended_ns for membership in record.memberships), default=0)
    for membership in record.memberships:
        queued = Between(membership.started_ns - membership.wait_ns, membership.started_ns)
        yield make.child(names.QUEUE, own, queued, _queue_attributes(membership))
        # For the request, the last run ends when its result is delivered, which a busy event loop delays.
        is_last = not membership.is_over or membership.ended_ns == last_ns
        yield _forward_pass(membership, record, own, record.ended_ns if is_last else membership.ended_ns, make)
    waits_ns = [membership.wait_ns for membership in record.memberships]
    if record.unfinished is not None:
        wait = record.unfinished
        yield make.child(names.QUEUE, own, wait, _queue_attributes(wait), fault=record.fault)
        waits_ns.append(wait.ended_ns - wait.started_ns)
    attributes: Attributes = {
        names.AI_BATCH_MAX_SIZE: make.max_batch_size,
        names.AI_BATCH_TIMEOUT_MS: make.max_wait_ms,
        names.AI_BATCH_WAIT_TIME_MS: _ms(max(waits_ns, default=0)),
        names.AI_MODEL_LOAD_TYPE: "cold" if record.load is not None else "warm",
        **make.hindrances(record),
    }
    links = [record.load] if record.load is not None else []
    yield make.stage(names.BATCHED_PREDICT, record, attributes, span_id=own.span_id, links=links)


def _forward_pass(
    membership: Membership, record: PredictRecord, own: SpanContext, ended_ns: int, make: SpanFactory
) -> Span:
    last = membership.runs[-1]
    attributes: Attributes = {
        names.AI_FORWARD_PASS_DURATION_MS: _ms(ended_ns - membership.started_ns),
        names.AI_BATCH_ACTUAL_SIZE: last.size,
        names.AI_BATCH_PADDING_RATIO: last.padding_ratio,
        names.AI_MODEL_NAME: make.model,
    }
    return make.child(
        names.FORWARD_PASS,
        own,
        Between(membership.started_ns, ended_ns),
        attributes,
        span_id=membership.context.span_id,
        fault=membership.fault if membership.is_over else record.fault,
        links=[run.context for run in membership.runs],
    )


def _queue_attributes(wait: Membership | UnfinishedWait) -> Attributes:
    return {
        names.AI_QUEUE_DEPTH_ON_ARRIVAL: wait.depth_on_arrival,
        names.AI_QUEUE_DEVICE_BUSY_MS: _ms(wait.busy_wait_ns),
        names.AI_QUEUE_FILL_WAIT_MS: _ms(wait.fill_wait_ns),
    }


@spans_of.register
def _(record: BatchRecord, make: SpanFactory) -> Iterator[Span]:
    members = [member.context for member in record.members if member.context.trace_flags.sampled]
    if not members:
        return
    before, after = record.gpu_utilization
    attributes: Attributes = {
        names.AI_BATCH_ACTUAL_SIZE: record.size,
        names.AI_BATCH_MAX_WAIT_MS: _ms(max(record.waits_ns)),
        names.AI_BATCH_AVG_WAIT_MS: _ms(sum(record.waits_ns) // len(record.waits_ns)),
        names.AI_BATCH_INFERENCE_MS: record.inference_ms,
        names.AI_BATCH_TOKENS: record.tokens,
        names.AI_BATCH_PADDED_TOKENS: record.padded_tokens,
        names.AI_BATCH_PADDING_RATIO: record.padding_ratio,
        names.AI_BATCH_DISPATCH_REASON: record.reason,
        names.AI_BATCH_QUEUE_BEHIND: record.queue_behind,
        names.AI_BATCH_REQUESTS: len(record.members),
        names.AI_MODEL_NAME: make.model,
        names.AI_DEVICE: record.device,
        names.AI_FORWARD_PASS_OUTPUT_SHAPE: str(list(record.output_shape)),
        names.AI_GPU_UTILIZATION_PRE: before,
        names.AI_GPU_UTILIZATION_POST: after,
        names.AI_GPU_MEMORY_FREE_GB: record.gpu_memory_free_gb,
        names.AI_GPU_PEAK_MEMORY_GB: record.peak_memory_gb,
    }
    yield make.root(names.BATCH_FORWARD, record.context, record, attributes, fault=record.fault, links=members)


@spans_of.register
def _(record: PostprocessRecord, make: SpanFactory) -> Iterator[Span]:
    if not is_sampled(record.carrier):
        return
    attributes: Attributes = {
        names.AI_POSTPROCESS_DURATION_MS: _ms(record.held_ns),
        names.AI_POSTPROCESS_OUTPUT_LENGTH: record.output_length,
        **make.hindrances(record),
    }
    yield make.stage(names.POSTPROCESS, record, attributes)


@spans_of.register
def _(record: ModelLoadRecord, make: SpanFactory) -> Iterator[Span]:
    own = record.context
    if not own.trace_flags.sampled:
        return
    for name, started_ns, ended_ns in record.phases:
        yield make.child(_PHASE_SPANS[name], own, Between(started_ns, ended_ns), {})
    attributes: Attributes = {
        names.AI_MODEL_LOAD_TYPE: "cold",
        names.AI_MODEL_LOAD_TIME_MS: _ms(record.ended_ns - record.started_ns),
        names.AI_MODEL_ALREADY_LOADED: False,
        names.AI_MODEL_NAME: make.model,
        names.AI_DEVICE: record.device,
        names.AI_GPU_MEMORY_ALLOCATED_GB: record.memory_allocated_gb,
        names.AI_GPU_MEMORY_RESERVED_GB: record.memory_reserved_gb,
        **make.shortage(record),
    }
    loaded = Event(names.EVENT_MODEL_LOADED, make.wall_offset_ns + record.ended_ns, {"device": record.device})
    events = [loaded] if record.fault is None else []
    yield make.root(names.MODEL_LOAD, own, record, attributes, fault=record.fault, events=events)


def _ms(nanoseconds: int) -> float:
    return nanoseconds / 1e6
