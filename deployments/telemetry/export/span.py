"""A span as plain values: what ``telemetry.spans`` makes of a record, and what the exporters make OTLP of."""

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
    """One span. Its kind is that of its name (``span_specs``)."""

    name: str
    trace: SpanContext
    """Of any span of the trace: its id, its flags and its state are the trace's."""
    span_id: int
    parent_id: int = 0
    """0 where there is none."""
    parent_is_remote: bool = False
    started_unix_ns: int
    ended_unix_ns: int
    attributes: Attributes
    fault: Fault | None = None
    links: Sequence[SpanContext] = ()
    events: Sequence[Event] = ()
