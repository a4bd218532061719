"""Converts spans to OTLP: to JSON for the local store, to SDK objects for the SDK's exporters.

The JSON is encoded here because the SDK takes five times as long, and with a dozen spans per request that is more than
the request's own work. A test compares it with OpenTelemetry's encoder.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

from opentelemetry.exporter.otlp.json.common.trace_encoder import encode_spans
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event as SdkEvent
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode
from pydantic_core import PydanticSerializationError, to_json

from deployments import __version__
from deployments.telemetry import names, span_specs
from deployments.telemetry.export.span import Attributes, Event, Span, Value

_SCOPE = InstrumentationScope(names.SCOPE, __version__)
_KINDS = {spec.name: SpanKind[spec.kind] for spec in span_specs.SPANS}
# OTLP's kind numbers are the API's plus one.
_KIND_NUMBERS = {name: kind.value + 1 for name, kind in _KINDS.items()}
_MARK = "the spans"
_HAS_IS_REMOTE, _IS_REMOTE = 0x100, 0x200


def _completed(span: Span) -> tuple[Attributes, Sequence[Event]]:
    """Return attributes and events, including those that a failure adds."""
    fault = span.fault
    if fault is None:
        return span.attributes, span.events
    exception = Event(
        "exception",
        span.ended_unix_ns,
        {
            names.EXCEPTION_TYPE: fault.exception_type,
            names.EXCEPTION_MESSAGE: fault.message,
            names.EXCEPTION_STACKTRACE: fault.stacktrace,
        },
    )
    return {**span.attributes, names.ERROR_TYPE: fault.error_type}, [*span.events, exception]


# --- the SDK's objects -----------------------------------------------------------------------------------------------


def readable(span: Span, resource: Resource) -> ReadableSpan:
    trace, attributes, events = span.trace, *_completed(span)
    flags, state = trace.trace_flags, trace.trace_state
    parent = SpanContext(trace.trace_id, span.parent_id, span.parent_is_remote, flags, state)
    status = Status(StatusCode.UNSET)
    if span.fault is not None and not span.fault.is_callers:
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
    """Encodes spans of one resource as OTLP JSON lines, each one ``TracesData`` object."""

    def __init__(self, resource: Resource) -> None:
        # Resource and scope as OpenTelemetry encodes them, around a placeholder for the spans.
        empty = ReadableSpan(name="", context=SpanContext(1, 1, False), resource=resource, instrumentation_scope=_SCOPE)
        document = json.loads(encode_spans([empty]).to_json())
        document["resourceSpans"][0]["scopeSpans"][0]["spans"] = [_MARK]
        self._before, self._after = to_json(document).split(to_json(_MARK))

    def line(self, spans: Iterable[bytes]) -> bytes:
        """Return one line with spans that ``span`` encoded."""
        return self._before + b",".join(spans) + self._after

    @staticmethod
    def span(span: Span) -> bytes:
        document = span_document(span)
        try:
            return to_json(document)
        except PydanticSerializationError:
            # A lone surrogate has no UTF-8 encoding, but JSON can escape it.
            return json.dumps(document).encode()


def span_document(span: Span) -> dict[str, Any]:
    """``opentelemetry.proto.trace.v1.Span`` in its JSON form."""
    trace, attributes, events = span.trace, *_completed(span)
    document: dict[str, Any] = {
        "traceId": f"{trace.trace_id:032x}",
        "spanId": f"{span.span_id:016x}",
        "name": span.name,
        "kind": _KIND_NUMBERS[span.name],
        "startTimeUnixNano": str(span.started_unix_ns),
        "endTimeUnixNano": str(span.ended_unix_ns),
        "attributes": _attributes(attributes),
        "flags": _flags(bool(span.parent_id) and span.parent_is_remote),
        "status": {},
    }
    if trace.trace_state:
        document["traceState"] = trace.trace_state.to_header()
    if span.parent_id:
        document["parentSpanId"] = f"{span.parent_id:016x}"
    if events:
        document["events"] = list(map(_event, events))
    if span.links:
        document["links"] = list(map(_link, span.links))
    if span.fault is not None and not span.fault.is_callers:
        document["status"] = {"message": span.fault.message or span.fault.exception_type, "code": 2}
    return document


def _attributes(attributes: Attributes) -> list[dict[str, Any]]:
    return [{"key": key, "value": _value(value)} for key, value in attributes.items() if value is not None]


def _value(value: Value) -> dict[str, Any]:
    if isinstance(value, bool):
        return {"boolValue": value}
    if isinstance(value, int):
        return {"intValue": str(value)}
    if isinstance(value, float):
        # JSON has no numbers for these; protobuf's JSON form writes NaN, Infinity and -Infinity as strings.
        return {"doubleValue": value if math.isfinite(value) else json.dumps(value)}
    if isinstance(value, str):
        return {"stringValue": value}
    return {"arrayValue": {"values": [{"stringValue": item} for item in value]}}


def _event(event: Event) -> dict[str, Any]:
    return {"timeUnixNano": str(event.unix_ns), "name": event.name, "attributes": _attributes(event.attributes)}


def _link(link: SpanContext) -> dict[str, Any]:
    return {"traceId": f"{link.trace_id:032x}", "spanId": f"{link.span_id:016x}", "flags": _flags(link.is_remote)}


def _flags(is_remote: bool) -> int:
    return _HAS_IS_REMOTE | (_IS_REMOTE if is_remote else 0)
