"""W3C trace context: read from HTTP headers, and passed between actors as text in the message."""

from __future__ import annotations

import functools
from collections.abc import Mapping

from opentelemetry.trace import SpanContext, TraceFlags, get_current_span
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.trace.span import TraceState

from deployments.messages import Carrier

_MAX_TRACESTATE = 512
"""Characters: what W3C asks everyone to carry. It is copied into every span, so more is left out."""
_PROPAGATOR = TraceContextTextMapPropagator()


def from_headers(headers: Mapping[str, str]) -> SpanContext | None:
    """Return the caller's span, or None if the header is missing or malformed (W3C: then start a new trace)."""
    context = get_current_span(_PROPAGATOR.extract(_combined(headers))).get_span_context()
    return context if context.is_valid else None


def _combined(headers: Mapping[str, str]) -> dict[str, str]:
    """W3C: several ``tracestate`` headers are one list; several ``traceparent`` headers are malformed."""
    found: dict[str, list[str]] = {}
    for name, value in headers.items():
        if name.lower() in ("traceparent", "tracestate"):
            found.setdefault(name.lower(), []).append(value)
    combined = {name: ",".join(values) for name, values in found.items()}
    if len(combined.get("tracestate", "")) > _MAX_TRACESTATE:
        del combined["tracestate"]
    return combined


def from_carrier(carrier: Carrier) -> SpanContext:
    """Return the sender's span. The carrier is our own, so it is well-formed."""
    _, trace_id, span_id, flags = carrier.traceparent.split("-")
    state = _state(carrier.tracestate)
    return SpanContext(int(trace_id, 16), int(span_id, 16), True, TraceFlags(int(flags, 16)), state)


@functools.lru_cache(maxsize=256)
def _state(header: str) -> TraceState:
    """Most are the same: what this server's own sampler writes."""
    return TraceState.from_header([header]) if header else TraceState.get_default()


def child_of(parent: SpanContext, span_id: int) -> SpanContext:
    """Return a context in the parent's trace for a span of this process."""
    return SpanContext(parent.trace_id, span_id, False, parent.trace_flags, parent.trace_state)


def is_sampled(carrier: Carrier) -> bool:
    return bool(int(carrier.traceparent[-2:], 16) & TraceFlags.SAMPLED)


def to_carrier(context: SpanContext, span_id: int) -> Carrier:
    """Return the carrier that makes the receiver's spans children of ``span_id`` in this trace."""
    return Carrier(traceparent(context, span_id), context.trace_state.to_header() if context.trace_state else "")


def traceparent(context: SpanContext, span_id: int | None = None) -> str:
    """``00-<trace id>-<span id>-<flags>``; also the format of the ``traceresponse`` header."""
    return f"00-{context.trace_id:032x}-{span_id or context.span_id:016x}-{int(context.trace_flags):02x}"
