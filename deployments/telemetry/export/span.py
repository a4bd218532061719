"""A span as plain values: made from a record by ``telemetry.spans``, converted to OTLP by the exporters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from opentelemetry.trace import SpanContext

from deployments.telemetry.records import Fault

Value = str | bool | int | float | Sequence[str]
Attributes = Mapping[str, Value | None]
"""An attribute that is None is not exported."""


@dataclass(slots=True, eq=False)
class Event:
    name: str
    unix_ns: int
    attributes: Attributes


@dataclass(slots=True, eq=False, kw_only=True)
class Span:
    """One span. Its kind follows from its name (``span_specs``)."""

    name: str
    trace: SpanContext
    """Context of any span of the trace; only the trace's id, flags and state are used."""
    span_id: int
    parent_id: int = 0
    """0 if there is none."""
    parent_is_remote: bool = False
    started_unix_ns: int
    ended_unix_ns: int
    attributes: Attributes
    fault: Fault | None = None
    links: Sequence[SpanContext] = ()
    events: Sequence[Event] = ()
