"""Spans out of OTLP JSON, as files and servers give it."""

from __future__ import annotations

import base64
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_BASE64_LENGTHS = (12, 24)


@dataclass(frozen=True, slots=True)
class Span:
    """One span, ids in lower-case hex, times in Unix nanoseconds."""

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

    @property
    def key(self) -> tuple[str, str]:
        return self.trace_id, self.span_id

    @property
    def ms(self) -> float:
        return (self.end_ns - self.start_ns) / 1e6


class Decoder:
    """Makes spans of OTLP JSON objects.

    Attributes:
        broken: objects and spans that were passed over, because they are not what OTLP says.
    """

    def __init__(self) -> None:
        self.broken = 0

    def spans(self, data: Any) -> Iterator[Span]:
        """The spans of a ``TracesData`` object (Tempo calls its list ``batches``)."""
        try:
            resources = data.get("resourceSpans", data.get("batches")) or []
            parts = [(*_origin(part), _of_scopes(part)) for part in resources]
        except (ValueError, KeyError, TypeError, AttributeError):
            self.broken += 1
            return
        for service, instance, spans in parts:
            for span in spans:
                try:
                    yield _span(span, service, instance)
                except (ValueError, KeyError, TypeError, AttributeError):
                    self.broken += 1


def _origin(part: dict[str, Any]) -> tuple[str, str]:
    resource = _attributes(part.get("resource", {}))
    # A million spans share these few words.
    return sys.intern(str(resource.get("service.name", ""))), sys.intern(str(resource.get("service.instance.id", "")))


def _of_scopes(part: dict[str, Any]) -> list[dict[str, Any]]:
    return [span for scope in part.get("scopeSpans", []) for span in scope.get("spans", [])]


def _span(span: dict[str, Any], service: str, instance: str) -> Span:
    return Span(
        trace_id=_hex(span["traceId"]),
        span_id=_hex(span["spanId"]),
        parent_id=_hex(span.get("parentSpanId") or ""),
        name=sys.intern(str(span["name"])),
        service=service,
        instance=instance,
        start_ns=int(span["startTimeUnixNano"]),
        end_ns=int(span["endTimeUnixNano"]),
        attributes=_attributes(span),
        links=tuple((_hex(link["traceId"]), _hex(link["spanId"])) for link in span.get("links", [])),
        failed=span.get("status", {}).get("code") in (2, "STATUS_CODE_ERROR"),
    )


def _hex(ident: str) -> str:
    """OTLP's JSON has ids in hex; protobuf's own, which Tempo answers with, has them in base64."""
    if len(ident) in _BASE64_LENGTHS:
        return base64.b64decode(ident, validate=True).hex()
    return ident.lower()


def _attributes(owner: dict[str, Any]) -> dict[str, Any]:
    return {sys.intern(pair["key"]): _value(pair["value"]) for pair in owner.get("attributes", [])}


def _value(value: dict[str, Any]) -> Any:
    """Of an attribute; None for one without a value and for kinds that we never write."""
    for kind, content in value.items():
        if kind == "intValue":
            return int(content)
        if kind == "doubleValue":
            # JSON has no NaN and no infinities: OTLP writes them as strings.
            return float(content)
        if kind == "arrayValue":
            return [_value(item) for item in content.get("values", [])]
        if kind in ("stringValue", "boolValue"):
            return content
    return None
