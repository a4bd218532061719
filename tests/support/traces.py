"""Spans in a form that is convenient for tests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as trace_pb

KINDS = {1: "INTERNAL", 2: "SERVER", 3: "CLIENT"}
STATUSES = {0: "UNSET", 1: "OK", 2: "ERROR"}


@dataclass(frozen=True)
class Span:
    trace_id: str
    span_id: str
    parent_id: str
    name: str
    kind: str
    service: str
    resource: dict[str, Any]
    attributes: dict[str, Any]
    events: tuple[tuple[str, dict[str, Any]], ...]
    links: tuple[tuple[str, str], ...]
    status: str
    start: int
    end: int

    @property
    def ms(self) -> float:
        return (self.end - self.start) / 1e6


def spans_of(request: trace_pb.ExportTraceServiceRequest) -> list[Span]:
    found = []
    for resource in request.resource_spans:
        attributes = _attributes(resource.resource.attributes)
        for scope in resource.scope_spans:
            assert scope.scope.name == "slowlens"
            found += [_span(span, attributes) for span in scope.spans]
    return found


def _span(span: Any, resource: dict[str, Any]) -> Span:
    return Span(
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex(),
        name=span.name,
        kind=KINDS[span.kind],
        service=resource["service.name"],
        resource=resource,
        attributes=_attributes(span.attributes),
        events=tuple((event.name, _attributes(event.attributes)) for event in span.events),
        links=tuple((link.trace_id.hex(), link.span_id.hex()) for link in span.links),
        status=STATUSES[span.status.code],
        start=span.start_time_unix_nano,
        end=span.end_time_unix_nano,
    )


def _attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(item) for item in value.array_value.values]
    return getattr(value, kind)


def tree(spans: list[Span], root: Span) -> Any:
    """``(name, kind, service, [children by start])``: a whole trace to compare with a literal."""
    children = sorted((s for s in spans if s.parent_id == root.span_id), key=lambda s: (s.start, s.end))
    service = root.service.removeprefix("slowlens.")
    return (root.name, root.kind, service, [tree(spans, child) for child in children])


def named(spans: list[Span], name: str) -> list[Span]:
    return [span for span in spans if span.name == name]


def one(spans: list[Span], name: str) -> Span:
    (span,) = named(spans, name)
    return span


WHOLE_TRACE = {
    "ai.inference.predict",
    "ai.inference.validate",
    "ai.hop.tokenizer",
    "ai.inference.preprocess",
    "ai.hop.model",
    "ai.inference.batched_predict",
    "ai.inference.queue",
    "ai.inference.forward_pass",
    "ai.hop.postprocessor",
    "ai.inference.postprocess",
    "ai.inference.respond",
}

WHOLE_TREE = (
    "ai.inference.predict",
    "SERVER",
    "ingress",
    [
        ("ai.inference.validate", "INTERNAL", "ingress", []),
        (
            "ai.hop.tokenizer",
            "CLIENT",
            "ingress",
            [("ai.inference.preprocess", "SERVER", "tokenizer", [])],
        ),
        (
            "ai.hop.model",
            "CLIENT",
            "ingress",
            [
                (
                    "ai.inference.batched_predict",
                    "SERVER",
                    "model",
                    [
                        ("ai.inference.queue", "INTERNAL", "model", []),
                        ("ai.inference.forward_pass", "INTERNAL", "model", []),
                    ],
                )
            ],
        ),
        (
            "ai.hop.postprocessor",
            "CLIENT",
            "ingress",
            [("ai.inference.postprocess", "SERVER", "postprocessor", [])],
        ),
        ("ai.inference.respond", "INTERNAL", "ingress", []),
    ],
)
