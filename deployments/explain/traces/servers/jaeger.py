"""Jaeger's query service: ``/api/v3/traces``, or ``/api/traces`` where there is no v3
(https://www.jaegertracing.io/docs/latest/architecture/apis/).

Version 3 returns OTLP, with everything that a span has. The older API is also that of other stores (VictoriaTraces).
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import partial
from typing import Any
from urllib.parse import quote

from deployments.explain.traces.otlp import NOT_OTLP, Decoder, Event, Span, hex_id, printable, time_ns
from deployments.explain.traces.servers.http_api import (
    LONGEST_REQUEST_NS,
    LOOKBACK,
    LOOKBACK_NS,
    Api,
    Backend,
    SourceError,
    window,
)
from deployments.explain.traces.survey import Root, Survey
from deployments.telemetry import names

_INGRESS, _MODEL, _AUTOSCALER = (f"{names.NAMESPACE}.{service}" for service in ("ingress", "model", "autoscaler"))
_OWN_TRACES = (
    (_MODEL, names.BATCH_FORWARD),
    (_MODEL, names.SEGMENT),
    (_MODEL, names.MODEL_LOAD),
    (_AUTOSCALER, names.SCALING_DECISION),
)
_NEWEST = 20
Trace = list[Span]


class Jaeger(Backend):
    """A search returns whole traces, so ``roots`` keeps them for ``spans``."""

    shortest_ns = 10**3

    def __init__(self, api: Api) -> None:
        super().__init__(api)
        self._kept: dict[str, Trace] = {}

    def newest(self) -> str:
        _, now_ns = window(0)
        found = self._search(_INGRESS, names.PREDICT, now_ns - LOOKBACK_NS, now_ns, _NEWEST)
        roots = [span for trace in found for span in trace if span.name == names.PREDICT]
        if not roots:
            raise LookupError(f"there is no request in these traces in the last {LOOKBACK}")
        return max(roots, key=lambda span: span.end_ns).trace_id

    def roots(self, since_ns: int) -> Iterator[Root]:
        self.broken = self.cut = 0
        self._kept = {}
        for spans in self.in_windows(partial(self._search, _INGRESS, names.PREDICT), *window(since_ns)):
            if spans:
                self._kept[spans[0].trace_id] = spans
            yield from (Root.of(span) for span in spans if span.name == names.PREDICT)

    def spans(self, survey: Survey) -> Iterator[Span]:
        begin_ns, end_ns = survey.window_ns
        for spans in self._kept.values():
            yield from spans
        for service, name in _OWN_TRACES:
            for trace in self.in_windows(partial(self._search, service, name), begin_ns - LONGEST_REQUEST_NS, end_ns):
                yield from trace

    def _search(self, service: str, operation: str, begin_ns: int, end_ns: int, limit: int) -> list[Trace]:
        """Return the traces, at most ``limit``, that have such a span between two times."""
        window = {
            "query.service_name": service,
            "query.operation_name": operation,
            "query.start_time_min": _rfc3339(begin_ns),
            "query.start_time_max": _rfc3339(end_ns),
            "query.num_traces": str(limit),
        }
        spans: dict[str, Trace] = defaultdict(list)
        for span in self._otlp("/api/v3/traces", window):
            spans[span.trace_id].append(span)
        return list(spans.values())

    def _spans(self, trace_id: str) -> Trace:
        return list({span.key: span for span in self._otlp(f"/api/v3/traces/{quote(trace_id)}", {})}.values())

    def _otlp(self, path: str, query: dict[str, str]) -> Iterator[Span]:
        """Jaeger answers 404 where it finds nothing. Several results may follow each other, as a stream."""
        decoder, content = Decoder(), self._api.text(path, query)
        for result in _documents(content) if content is not None else ():
            found = result.get("result")
            if not isinstance(found, dict):
                raise SourceError(f"{self._api.url} did not answer {path} as Jaeger's API specifies")
            yield from decoder.spans(found)
        self.broken += decoder.broken


def _documents(content: str) -> Iterator[dict[str, Any]]:
    decoder, at = json.JSONDecoder(), 0
    content = content.strip()
    while at < len(content):
        try:
            found, at = decoder.raw_decode(content, at)
        except NOT_OTLP:
            raise SourceError("Jaeger's response is no JSON") from None
        yield found if isinstance(found, dict) else {}
        at += len(content[at:]) - len(content[at:].lstrip())


def _rfc3339(unix_ns: int) -> str:
    seconds, ns = divmod(max(0, unix_ns), 10**9)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{ns:09}Z"


class OlderJaeger(Jaeger):
    """By the API of Jaeger's own page."""

    def _search(self, service: str, operation: str, begin_ns: int, end_ns: int, limit: int) -> list[Trace]:
        query = {
            "service": service,
            "operation": operation,
            "start": str(begin_ns // 1000),
            "end": str(end_ns // 1000),
            "limit": str(limit),
        }
        return [list(self._decoded(one)) for one in self._api.objects("/api/traces", query, "data", is_search=True)]

    def _spans(self, trace_id: str) -> Trace:
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
