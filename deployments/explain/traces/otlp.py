"""Decodes spans from OTLP JSON, as found in files and returned by servers.

Traces come from strangers. What is decoded has ids in hex, times between 1970 and 2262, and no character that a
terminal would act on, so that whoever reads spans may compute with them and print them.
"""

from __future__ import annotations

import base64
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from deployments.telemetry import names

_BASE64_LENGTHS = (12, 24)
_HEX = re.compile("[0-9a-f]{1,32}")
_MAX_NS = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Event:
    name: str
    unix_ns: int
    attributes: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Span:
    """A span, with ids in lowercase hex and times in Unix nanoseconds."""

    trace_id: str
    span_id: str
    parent_id: str
    name: str
    service: str
    instance: str
    """``service.instance.id``: the replica."""
    start_ns: int
    end_ns: int
    attributes: dict[str, Any]
    links: tuple[tuple[str, str], ...]
    """``(trace id, span id)``."""
    failed: bool
    resource: Mapping[str, Any] = field(default_factory=dict)
    """Attributes of the process."""
    events: tuple[Event, ...] = ()
    """Of a ``decode`` span; those of other spans are not read."""

    @property
    def key(self) -> tuple[str, str]:
        return self.trace_id, self.span_id

    @property
    def cluster(self) -> str:
        """KubeRay's RayCluster; empty elsewhere."""
        return str(self.resource.get(names.RAY_CLUSTER_NAME, ""))

    @property
    def ms(self) -> float:
        return (self.end_ns - self.start_ns) / 1e6


NOT_OTLP = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)
"""What decoding raises where the data is not what it should be."""


class SpanFilter(Protocol):
    """Selects spans by name and trace."""

    def wants(self, name: str, trace_id: str) -> bool: ...


class Decoder:
    """Decodes spans from OTLP JSON objects: all, or those that the filter wants.

    Attributes:
        broken: objects and spans that were skipped because they are not valid OTLP.
    """

    def __init__(self, span_filter: SpanFilter | None = None) -> None:
        self.broken = 0
        self._span_filter = span_filter
        # Cached, because every line repeats its process's resource.
        self._resources: dict[str, dict[str, Any]] = {}

    def spans(self, data: Any) -> Iterator[Span]:
        """The spans of a ``TracesData`` object (Tempo calls its list ``batches``)."""
        try:
            resources = data.get("resourceSpans", data.get("batches")) or []
            parts = [(self._resource(part.get("resource", {})), _of_scopes(part)) for part in resources]
        except NOT_OTLP:
            self.broken += 1
            return
        span_filter = self._span_filter
        for resource, spans in parts:
            for span in spans:
                try:
                    if span_filter is None or span_filter.wants(span["name"], _hex(span["traceId"])):
                        yield _span(span, resource)
                except NOT_OTLP:
                    self.broken += 1

    def _resource(self, resource: dict[str, Any]) -> dict[str, Any]:
        key = repr(resource)
        if key not in self._resources:
            self._resources[key] = attributes_of(resource)
        return self._resources[key]


def _of_scopes(part: dict[str, Any]) -> list[dict[str, Any]]:
    return [span for scope in part.get("scopeSpans", []) for span in scope.get("spans", [])]


def _span(span: dict[str, Any], resource: dict[str, Any]) -> Span:
    end_ns = time_ns(span["endTimeUnixNano"])
    if end_ns == 0:
        raise ValueError("the span has not ended")
    attributes = attributes_of(span)
    if state := span.get("traceState"):
        attributes.setdefault(names.W3C_TRACESTATE, printable(state))
    return Span(
        trace_id=_hex(span["traceId"]),
        span_id=_hex(span["spanId"]),
        parent_id=_hex(parent) if (parent := span.get("parentSpanId")) else "",
        name=sys.intern(printable(span["name"])),
        # Interned, because a million spans share these few strings.
        service=sys.intern(str(resource.get("service.name", ""))),
        instance=sys.intern(str(resource.get("service.instance.id", ""))),
        start_ns=time_ns(span["startTimeUnixNano"]),
        end_ns=end_ns,
        attributes=attributes,
        links=tuple((_hex(link["traceId"]), _hex(link["spanId"])) for link in span.get("links", [])),
        failed=span.get("status", {}).get("code") in (2, "STATUS_CODE_ERROR"),
        resource=resource,
        events=tuple(map(_event, span.get("events", []))) if span["name"] == names.DECODE else (),
    )


def _event(event: dict[str, Any]) -> Event:
    return Event(printable(event.get("name", "")), time_ns(event["timeUnixNano"]), attributes_of(event))


def _hex(ident: str) -> str:
    """OTLP JSON has ids in hex; protobuf's own JSON, which Tempo returns, has them in base64."""
    return hex_id(base64.b64decode(ident, validate=True).hex() if len(ident) in _BASE64_LENGTHS else ident)


def hex_id(ident: str) -> str:
    """Raises ValueError if it is no id, as an empty one is."""
    ident = ident.lower()
    if _HEX.fullmatch(ident) is None:
        raise ValueError("an id is not hexadecimal")
    return ident


def time_ns(value: Any) -> int:
    """Raises ValueError if it is no time."""
    ns = int(value)
    if not 0 <= ns <= _MAX_NS:
        raise ValueError("a time is not between 1970 and 2262")
    return ns


def printable(text: Any) -> str:
    """Replace what a terminal would act on: control characters, and those that change the direction of text."""
    text = str(text)
    return text if text.isprintable() else "".join(char if char.isprintable() else "\ufffd" for char in text)


def attributes_of(owner: dict[str, Any]) -> dict[str, Any]:
    """Raises one of ``NOT_OTLP``."""
    return {sys.intern(printable(pair["key"])): _value(pair["value"]) for pair in owner.get("attributes", [])}


def _value(value: dict[str, Any]) -> Any:
    """Return the value of an attribute; None if it has no value or is of a kind that we never write."""
    for kind, content in value.items():
        if kind == "intValue":
            return int(content)
        if kind == "doubleValue":
            # JSON has no NaN and no infinities: OTLP writes them as strings.
            return float(content)
        if kind == "arrayValue":
            return [_value(item) for item in content.get("values", [])]
        if kind == "stringValue":
            return printable(content)
        if kind == "boolValue":
            return content is True
    return None
