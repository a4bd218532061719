"""Spans to OTLP: as JSON for the local store, as the SDK's own objects for its exporters.

The JSON is written here because the SDK takes ten times as long for it, and with a dozen spans a request that is more
than the request's own work. A test holds it against OpenTelemetry's encoder.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable, Sequence
from json.encoder import encode_basestring_ascii as _quoted

from opentelemetry.exporter.otlp.json.common.trace_encoder import encode_spans
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event as SdkEvent
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode

from deployments import __version__
from deployments.telemetry import names
from deployments.telemetry.spans import Attributes, Event, Span, Value

_SCOPE = InstrumentationScope(names.SCOPE, __version__)
_KINDS = {spec.name: SpanKind[spec.kind] for spec in names.SPANS}
# OTLP's numbers for kinds are the API's plus one.
_KIND_NUMBERS = {name: kind.value + 1 for name, kind in _KINDS.items()}
_HAS_IS_REMOTE, _IS_REMOTE = 0x100, 0x200


def _completed(span: Span) -> tuple[Attributes, Sequence[Event]]:
    """Attributes and events, with what a failure adds to them."""
    fault = span.fault
    if fault is None:
        return span.attributes, span.events
    exception = Event(
        "exception",
        span.ended_unix_ns,
        {
            "exception.type": fault.exception_type,
            "exception.message": fault.message,
            "exception.stacktrace": fault.stacktrace,
        },
    )
    return {**span.attributes, "error.type": fault.error_type}, [*span.events, exception]


# --- the SDK's objects -----------------------------------------------------------------------------------------------


def readable(span: Span, resource: Resource) -> ReadableSpan:
    trace, attributes, events = span.trace, *_completed(span)
    flags, state = trace.trace_flags, trace.trace_state
    parent = SpanContext(trace.trace_id, span.parent_id, span.parent_is_remote, flags, state)
    status = Status(StatusCode.UNSET)
    if span.fault is not None:
        status = Status(StatusCode.ERROR, span.fault.message or span.fault.exception_type)
    return ReadableSpan(
        name=span.name,
        context=SpanContext(trace.trace_id, span.span_id, False, flags, state),
        parent=parent if span.parent_id else None,
        resource=resource,
        attributes=_present(attributes),
        events=[SdkEvent(event.name, _present(event.attributes), event.unix_ns) for event in events],
        links=[Link(link) for link in span.links],
        kind=_KINDS[span.name],
        status=status,
        start_time=span.started_unix_ns,
        end_time=span.ended_unix_ns,
        instrumentation_scope=_SCOPE,
    )


def _present(attributes: Attributes) -> dict[str, Value]:
    return {key: value for key, value in attributes.items() if value is not None}


# --- JSON ------------------------------------------------------------------------------------------------------------


class JsonEncoder:
    """Encodes spans of one resource as ``TracesData`` in OTLP's JSON form, one line each."""

    def __init__(self, resource: Resource) -> None:
        # Resource and scope as OpenTelemetry writes them, around a place for the spans.
        empty = ReadableSpan(name="", context=SpanContext(1, 1, False), resource=resource, instrumentation_scope=_SCOPE)
        document = json.loads(encode_spans([empty]).to_json())
        document["resourceSpans"][0]["scopeSpans"][0]["spans"] = ["HERE"]
        self._before, self._after = json.dumps(document, separators=(",", ":")).split('"HERE"')

    def line(self, spans: Iterable[str]) -> bytes:
        return f"{self._before}{','.join(spans)}{self._after}".encode()

    @staticmethod
    def span(span: Span) -> str:
        trace, attributes, events = span.trace, *_completed(span)
        state = trace.trace_state
        optional = ""
        if state:
            optional += f',"traceState":{_quoted(state.to_header())}'
        if span.parent_id:
            optional += f',"parentSpanId":"{span.parent_id:016x}"'
        if events:
            optional += ',"events":[' + ",".join(map(_event, events)) + "]"
        if span.links:
            optional += ',"links":[' + ",".join(map(_link, span.links)) + "]"
        if span.fault is not None:
            optional += f',"status":{{"message":{_quoted(span.fault.message or span.fault.exception_type)},"code":2}}'
        else:
            optional += ',"status":{}'
        return (
            f'{{"traceId":"{trace.trace_id:032x}","spanId":"{span.span_id:016x}","name":"{span.name}",'
            f'"kind":{_KIND_NUMBERS[span.name]},"startTimeUnixNano":"{span.started_unix_ns}",'
            f'"endTimeUnixNano":"{span.ended_unix_ns}","attributes":[{_attributes(attributes)}],'
            f'"flags":{_HAS_IS_REMOTE | (_IS_REMOTE if span.parent_id and span.parent_is_remote else 0)}{optional}}}'
        )


def _attributes(attributes: Attributes) -> str:
    return ",".join([_key(key) + _value(value) for key, value in attributes.items() if value is not None])


@functools.cache
def _key(key: str) -> str:
    return f'{{"key":{_quoted(key)},"value":'


def _value(value: Value) -> str:
    """The value, and the end of the attribute that ``_key`` began."""
    if isinstance(value, bool):
        return '{"boolValue":true}}' if value else '{"boolValue":false}}'
    if isinstance(value, int):
        return f'{{"intValue":"{value}"}}}}'
    if isinstance(value, float):
        return f'{{"doubleValue":{value if math.isfinite(value) else _quoted(json.dumps(value))}}}}}'
    if isinstance(value, str):
        return f'{{"stringValue":{_quoted(value)}}}}}'
    items = ",".join(['{"stringValue":' + _quoted(item) + "}" for item in value])
    return '{"arrayValue":{"values":[' + items + "]}}}"


def _event(event: Event) -> str:
    attributes = _attributes(event.attributes)
    return f'{{"timeUnixNano":"{event.unix_ns}","name":{_quoted(event.name)},"attributes":[{attributes}]}}'


def _link(link: SpanContext) -> str:
    flags = _HAS_IS_REMOTE | (_IS_REMOTE if link.is_remote else 0)
    return f'{{"traceId":"{link.trace_id:032x}","spanId":"{link.span_id:016x}","flags":{flags}}}'
