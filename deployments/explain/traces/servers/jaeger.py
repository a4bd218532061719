"""Jaeger's query service, through its HTTP API: ``/api/traces``
(https://www.jaegertracing.io/docs/latest/architecture/apis/, "HTTP JSON")."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

from deployments.explain.traces.otlp import NOT_OTLP, Event, Span, hex_id, printable, time_ns
from deployments.explain.traces.servers.http_api import LONGEST_REQUEST_NS, LOOKBACK, Api, Backend, in_windows, window
from deployments.explain.traces.survey import Root, Survey
from deployments.telemetry import names

_INGRESS, _MODEL, _AUTOSCALER = (f"{names.NAMESPACE}.{service}" for service in ("ingress", "model", "autoscaler"))


class Jaeger(Backend):
    """A search returns whole traces, so ``roots`` keeps them for ``spans``."""

    def __init__(self, api: Api) -> None:
        super().__init__(api)
        self._kept: dict[str, list[Span]] = {}

    def newest(self) -> str:
        found = self._search(_INGRESS, names.PREDICT, {"lookback": LOOKBACK, "limit": "20"})
        roots = [span for trace in found for span in self._decoded(trace) if span.name == names.PREDICT]
        if not roots:
            raise LookupError(f"there is no request in these traces in the last {LOOKBACK}")
        return max(roots, key=lambda span: span.end_ns).trace_id

    def roots(self, since_ns: int) -> Iterator[Root]:
        self.broken, self._kept = 0, {}
        for trace in self._all(_INGRESS, names.PREDICT, *window(since_ns)):
            spans = list(self._decoded(trace))
            if spans:
                self._kept[spans[0].trace_id] = spans
            yield from (Root.of(span) for span in spans if span.name == names.PREDICT)

    def spans(self, survey: Survey) -> Iterator[Span]:
        begin_ns, end_ns = survey.window_ns
        for spans in self._kept.values():
            yield from spans
        own_traces = (
            (_MODEL, names.BATCH_FORWARD),
            (_MODEL, names.SEGMENT),
            (_MODEL, names.MODEL_LOAD),
            (_AUTOSCALER, names.SCALING_DECISION),
        )
        for service, name in own_traces:
            for trace in self._all(service, name, begin_ns - LONGEST_REQUEST_NS, end_ns):
                yield from self._decoded(trace)

    def _all(self, service: str, operation: str, begin_ns: int, end_ns: int) -> Iterator[dict[str, Any]]:
        def between(begin_ns: int, end_ns: int, limit: int) -> list[dict[str, Any]]:
            window = {"start": str(begin_ns // 1000), "end": str(end_ns // 1000)}
            return self._search(service, operation, {**window, "limit": str(limit)})

        return in_windows(between, begin_ns, end_ns)

    def _search(self, service: str, operation: str, more: dict[str, str]) -> list[dict[str, Any]]:
        query = {"service": service, "operation": operation, **more}
        return self._api.objects("/api/traces", query, "data", is_search=True)

    def _spans(self, trace_id: str) -> list[Span]:
        traces = self._api.objects(f"/api/traces/{quote(trace_id)}", {}, "data")
        spans = {span.key: span for trace in traces for span in self._decoded(trace)}
        return list(spans.values())

    def _decoded(self, trace: dict[str, Any]) -> Iterator[Span]:
        try:
            resources = {key: _resource(process) for key, process in trace.get("processes", {}).items()}
            spans = list(trace.get("spans") or [])
        except NOT_OTLP:
            self.broken += 1
            return
        for span in spans:
            try:
                yield _from_jaeger(span, resources.get(span.get("processID", ""), {}))
            except NOT_OTLP:
                self.broken += 1


def _resource(process: dict[str, Any]) -> dict[str, Any]:
    return {**_tags(process.get("tags")), "service.name": printable(process.get("serviceName", ""))}


def _tags(tags: list[dict[str, Any]] | None) -> dict[str, Any]:
    return {
        printable(tag["key"]): value if isinstance(value := tag["value"], bool | int | float) else printable(value)
        for tag in tags or []
    }


def _from_jaeger(span: dict[str, Any], resource: dict[str, Any]) -> Span:
    """Jaeger's times are in microseconds; a link is a reference that is not the parent."""
    trace_id = _padded(span["traceID"], 32)
    references = [
        (one["refType"], _padded(one["traceID"], 32), _padded(one["spanID"], 16)) for one in span.get("references", [])
    ]
    parent = next((ref for ref in references if ref[0] == "CHILD_OF" and ref[1] == trace_id), None)
    attributes = _tags(span.get("tags"))
    return Span(
        trace_id=trace_id,
        span_id=_padded(span["spanID"], 16),
        parent_id=parent[2] if parent is not None else "",
        name=printable(span["operationName"]),
        service=str(resource.get("service.name", "")),
        instance=str(resource.get("service.instance.id", "")),
        start_ns=time_ns(int(span["startTime"]) * 1000),
        end_ns=time_ns((int(span["startTime"]) + int(span["duration"])) * 1000),
        attributes=attributes,
        links=tuple(ref[1:] for ref in references if ref is not parent),
        failed=attributes.get("error") is True or attributes.get("otel.status_code") == "ERROR",
        resource=resource,
        events=tuple(map(_event, span.get("logs") or [])) if span["operationName"] == names.DECODE else (),
    )


def _event(log: dict[str, Any]) -> Event:
    fields = _tags(log.get("fields"))
    return Event(str(fields.pop("event", "")), time_ns(int(log["timestamp"]) * 1000), fields)


def _padded(ident: str, length: int) -> str:
    """Jaeger omits leading zeros."""
    return hex_id(ident).zfill(length)
