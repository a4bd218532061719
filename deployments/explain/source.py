"""Spans from files of OTLP JSON lines: the local store, or what a Collector's file exporter wrote."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Span:
    """One span, ids in hex, times in Unix nanoseconds."""

    trace_id: str
    span_id: str
    parent_id: str
    name: str
    service: str
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


@dataclass(frozen=True, slots=True)
class Capture:
    """What was read. ``broken_lines`` are lines that are no JSON, such as one that a crash cut short."""

    spans: list[Span]
    broken_lines: int


def read(source: Path) -> Capture:
    """All spans of a file, or of the ``*.jsonl`` and ``*.json`` files of a folder.

    Raises FileNotFoundError where there is nothing of that name.
    """
    if not source.exists():
        raise FileNotFoundError(f"no traces at {source}")
    files = sorted([*source.glob("*.jsonl"), *source.glob("*.json")]) if source.is_dir() else [source]
    spans: list[Span] = []
    broken = 0
    for path in files:
        with path.open("rb") as lines:
            for line in lines:
                try:
                    spans += _spans(json.loads(line))
                except (ValueError, KeyError, TypeError, AttributeError):
                    broken += 1
    return Capture(spans, broken)


def _spans(data: dict[str, Any]) -> Iterator[Span]:
    for resource in data.get("resourceSpans", []):
        service = _attributes(resource.get("resource", {})).get("service.name", "")
        for scope in resource.get("scopeSpans", []):
            for span in scope.get("spans", []):
                yield Span(
                    trace_id=span["traceId"],
                    span_id=span["spanId"],
                    parent_id=span.get("parentSpanId", ""),
                    name=span["name"],
                    service=service,
                    start_ns=int(span["startTimeUnixNano"]),
                    end_ns=int(span["endTimeUnixNano"]),
                    attributes=_attributes(span),
                    links=tuple((link["traceId"], link["spanId"]) for link in span.get("links", [])),
                    failed=span.get("status", {}).get("code") == 2,
                )


def _attributes(owner: dict[str, Any]) -> dict[str, Any]:
    return {pair["key"]: _value(pair["value"]) for pair in owner.get("attributes", [])}


def _value(value: dict[str, Any]) -> Any:
    ((kind, content),) = value.items()
    if kind == "intValue":
        return int(content)
    return [_value(item) for item in content.get("values", [])] if kind == "arrayValue" else content
