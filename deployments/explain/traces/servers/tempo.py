"""Grafana Tempo, by its HTTP API: ``/api/search`` and ``/api/traces`` (https://grafana.com/docs/tempo/latest/api_docs/)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any
from urllib.parse import quote

from deployments.explain.traces.otlp import NOT_OTLP, Decoder, Span, attributes_of, hex_id, time_ns
from deployments.explain.traces.servers.http_api import LONGEST_REQUEST_NS, Backend, window
from deployments.explain.traces.survey import Root, Survey
from deployments.telemetry import names

_SELECTED = (
    names.ERROR_TYPE,
    names.HTTP_ROUTE,
    names.RPC_METHOD,
    names.AI_MODEL_NAME,
    names.AI_REQUEST_NUMBER,
    names.AI_SAMPLING_WEIGHT,
    names.W3C_TRACESTATE,
)
_RESOURCE = ("service.instance.id", names.RAY_CLUSTER_NAME)
_SELECT = ", ".join(["status", *(f"resource.{name}" for name in _RESOURCE), *(f"span.{name}" for name in _SELECTED)])


class Tempo(Backend):
    # Its windows are whole seconds.
    shortest_ns = 10**9

    def newest(self) -> str:
        found = self._search({"limit": "20"})
        if not found:
            raise LookupError("there is no request in these traces yet")
        return _tempo_id(max(found, key=lambda one: time_ns(one.get("startTimeUnixNano", 0))))

    def roots(self, since_ns: int) -> Iterator[Root]:
        self.broken = self.cut = 0
        for summary in self.in_windows(self._between, *window(since_ns)):
            try:
                trace_id = _tempo_id(summary)
                sets = summary.get("spanSets") or [summary.get("spanSet") or {}]
                matched = [_tempo_root(trace_id, span) for one in sets for span in one.get("spans") or []]
            except NOT_OTLP:
                self.broken += 1
                continue
            # Versions before TraceQL return only the trace id.
            yield from matched or map(Root.of, (s for s in self._spans(trace_id) if s.name == names.PREDICT))

    def spans(self, survey: Survey) -> Iterator[Span]:
        linked: set[str] = set()
        for span in self._fetched(sorted(survey.trace_ids_to_read)):
            linked.update(trace_id for trace_id, _ in span.links)
            yield span
        begin_ns, end_ns = survey.window_ns
        for name in () if not survey.requests else (names.MODEL_LOAD, names.SCALING_DECISION):
            found = self.in_windows(partial(self._between, name=name), begin_ns - LONGEST_REQUEST_NS, end_ns)
            linked.update(map(_tempo_id, found))
        yield from self._fetched(sorted(linked - survey.trace_ids_to_read))

    def _between(self, begin_ns: int, end_ns: int, limit: int, name: str = names.PREDICT) -> list[dict[str, Any]]:
        # Whole seconds; a trace in two windows is returned twice and counts once.
        window = {"start": str(begin_ns // 10**9), "end": str(-(-end_ns // 10**9))}
        return self._search({**window, "limit": str(limit), "spss": "100"}, name)

    def _search(self, more: dict[str, str], name: str = names.PREDICT) -> list[dict[str, Any]]:
        query = f'{{ name = "{name}" }} | select({_SELECT})'
        found = self._api.objects("/api/search", {"q": query, **more}, "traces", is_search=True)
        known = [one for one in found if _is_summary(one)]
        self.broken += len(found) - len(known)
        return known

    def _spans(self, trace_id: str) -> list[Span]:
        decoder = Decoder()
        data = self._api.json(f"/api/traces/{quote(trace_id)}", {}) or {}
        spans = {span.key: span for span in decoder.spans(data.get("trace", data))}
        self.broken += decoder.broken
        return list(spans.values())


def _is_summary(found: dict[str, Any]) -> bool:
    try:
        _tempo_id(found)
        time_ns(found.get("startTimeUnixNano", 0))
    except NOT_OTLP:
        return False
    return True


def _tempo_id(summary: dict[str, Any]) -> str:
    """Tempo omits leading zeros."""
    return hex_id(str(summary["traceID"])).zfill(32)


def _tempo_root(trace_id: str, span: dict[str, Any]) -> Root:
    attributes = attributes_of(span)
    key = (trace_id, hex_id(str(span["spanID"])).zfill(16))
    started_ns = time_ns(span["startTimeUnixNano"])
    ended_ns = time_ns(started_ns + int(span["durationNanos"]))
    failed = attributes.get("status") == "error"
    instance, cluster = (str(attributes.get(name, "")) for name in _RESOURCE)
    return Root.made(key, started_ns, ended_ns, attributes, failed, instance, cluster)
