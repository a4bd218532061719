"""Traces out of a tracing backend, by its documented HTTP API.

Both answer a search with so many traces at most. A window whose answer is full is therefore asked for again in halves.

Jaeger: ``/api/traces`` (https://www.jaegertracing.io/docs/latest/architecture/apis/, "HTTP JSON"). Tempo:
``/api/search`` and ``/api/traces`` (https://grafana.com/docs/tempo/latest/api_docs/). Which of them answers is asked
once: Tempo has ``/api/echo``. A user and a password may stand in the URL, a bearer token in ``SLOWLENS_SOURCE_TOKEN``.
"""

from __future__ import annotations

import base64
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlencode, urlsplit, urlunsplit

from deployments.explain.otlp import Decoder, Span
from deployments.explain.source import Source, TraceFiles
from deployments.explain.survey import Root, Survey
from deployments.telemetry import names

_TIMEOUT_S = 30
_INGRESS = f"{names.NAMESPACE}.ingress"
_MODEL = f"{names.NAMESPACE}.model"
_LOOKBACK = "1h"
_LOOKBACK_NS = 3600 * 10**9
_AT_ONCE, _FETCHES = 500, 8
_SHORTEST_NS = 10**9
_LONGEST_REQUEST_NS = 600 * 10**9
"""How long before the window a request may have begun that ended in it."""


class SourceError(Exception):
    """The backend cannot be asked, or does not answer as its API says."""


def backend(url: str) -> Source:
    """The traces behind the URL of a Jaeger query service or of Tempo. Raises SourceError."""
    api = _Api(url)
    return _Tempo(api) if (api.text("/api/echo", {}) or "").strip() == "echo" else _Jaeger(api)


def source_at(where: str) -> Source:
    """The traces of a file, a folder or a server. Raises FileNotFoundError and SourceError."""
    return backend(where) if "://" in where else TraceFiles(Path(where))


def without_password(url: str) -> str:
    """What may be shown of it; a path is left as it is."""
    if "://" not in url:
        return url
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path.rstrip("/"), "", ""))


class _Api:
    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise SourceError(f"{without_password(url)!r} is no http or https URL")
        self.url = without_password(url)
        self._headers = {"Accept": "application/json"}
        if parts.username is not None:
            pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            self._headers["Authorization"] = f"Basic {base64.b64encode(pair.encode()).decode()}"
        elif token := os.environ.get("SLOWLENS_SOURCE_TOKEN"):
            self._headers["Authorization"] = f"Bearer {token}"

    def text(self, path: str, query: dict[str, str]) -> str | None:
        """What is there; None where nothing is (404). Raises SourceError."""
        where = f"{self.url}{path}" + (f"?{urlencode(query)}" if query else "")
        try:
            with urllib.request.urlopen(
                urllib.request.Request(where, headers=self._headers), timeout=_TIMEOUT_S
            ) as answer:
                content: bytes = answer.read()
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return None
            raise SourceError(f"{self.url} answered {error.code} {error.reason} to {path}") from None
        except (OSError, ValueError) as error:
            raise SourceError(f"{self.url} cannot be reached: {error}") from None
        return content.decode(errors="replace")

    def json(self, path: str, query: dict[str, str]) -> Any:
        content = self.text(path, query)
        if content is None:
            return None
        try:
            return json.loads(content)
        except ValueError:
            raise SourceError(
                f"{self.url} is neither Jaeger's nor Tempo's HTTP API: no JSON in its answer to {path}"
            ) from None


class _Backend:
    """What Jaeger and Tempo have in common: whole traces by their id."""

    def __init__(self, api: _Api) -> None:
        self._api = api
        self.broken = self.lost = 0

    def trace(self, trace_id: str) -> list[Span]:
        self.broken = 0
        found = self._spans(trace_id)
        if not found:
            raise LookupError(f"no span of trace {trace_id} is here")
        return found

    def traces(self, trace_ids: Collection[str]) -> list[Span]:
        return list(self._fetched(sorted(trace_ids)))

    def linked(self, trace: list[Span]) -> list[Span]:
        links = {link for span in trace for link in span.links}
        return [span for span in self._fetched(sorted({trace_id for trace_id, _ in links})) if span.key in links]

    def _fetched(self, traces: Sequence[str]) -> Iterator[Span]:
        with ThreadPoolExecutor(_FETCHES) as pool:
            for spans in pool.map(self._spans, traces):
                yield from spans

    def _spans(self, trace_id: str) -> list[Span]:
        raise NotImplementedError


def _in_windows(
    ask: Callable[[int, int], Sequence[dict[str, Any]]], begin_ns: int, end_ns: int
) -> Iterator[dict[str, Any]]:
    """All that is found between two times. Of a second that has more than an answer holds, what the answer holds."""
    found = ask(begin_ns, end_ns)
    if len(found) < _AT_ONCE or end_ns - begin_ns <= _SHORTEST_NS:
        yield from found
        return
    middle = (begin_ns + end_ns) // 2
    yield from _in_windows(ask, begin_ns, middle)
    yield from _in_windows(ask, middle, end_ns)


def _window(since_ns: int) -> tuple[int, int]:
    """When the requests may have begun that ended since then; the last hour where nothing is said."""
    now_ns = time.time_ns()
    return (since_ns or now_ns - _LOOKBACK_NS) - _LONGEST_REQUEST_NS, now_ns + _SHORTEST_NS


class _Tempo(_Backend):
    def newest(self) -> str:
        found = self._search({"limit": "20"})
        if not found:
            raise LookupError("there is no request in these traces yet")
        return _tempo_id(max(found, key=lambda one: int(one.get("startTimeUnixNano", 0))))

    def roots(self, since_ns: int) -> Iterator[Root]:
        self.broken = 0
        for summary in _in_windows(self._between, *_window(since_ns)):
            try:
                trace_id = _tempo_id(summary)
                sets = summary.get("spanSets") or [summary.get("spanSet") or {}]
                matched = [_tempo_root(trace_id, span) for one in sets for span in one.get("spans") or []]
            except (ValueError, KeyError, TypeError, AttributeError):
                self.broken += 1
                continue
            # Versions before TraceQL name the trace only.
            yield from matched or map(Root.of, (s for s in self._spans(trace_id) if s.name == names.PREDICT))

    def spans(self, survey: Survey) -> Iterator[Span]:
        linked: set[str] = set()
        for span in self._fetched(sorted(survey.close)):
            linked.update(trace_id for trace_id, _ in span.links)
            yield span
        yield from self._fetched(sorted(linked - survey.close))

    def _between(self, begin_ns: int, end_ns: int) -> list[dict[str, Any]]:
        # Whole seconds; a trace that two windows share comes twice and counts once.
        window = {"start": str(begin_ns // 10**9), "end": str(-(-end_ns // 10**9))}
        return self._search({**window, "limit": str(_AT_ONCE), "spss": "100"})

    def _search(self, more: dict[str, str]) -> list[dict[str, Any]]:
        query = f'{{ name = "{names.PREDICT}" }} | select(span.error.type, status)'
        answer = self._api.json("/api/search", {"q": query, **more}) or {}
        return answer.get("traces") or []

    def _spans(self, trace_id: str) -> list[Span]:
        decoder = Decoder()
        data = self._api.json(f"/api/traces/{quote(trace_id)}", {}) or {}
        spans = {span.key: span for span in decoder.spans(data.get("trace", data))}
        self.broken += decoder.broken
        return list(spans.values())


def _tempo_id(summary: dict[str, Any]) -> str:
    """Tempo leaves leading zeros out."""
    return str(summary["traceID"]).lower().zfill(32)


def _tempo_root(trace_id: str, span: dict[str, Any]) -> Root:
    attributes = {one["key"]: next(iter(one["value"].values()), "") for one in span.get("attributes", [])}
    error = str(attributes.get("error.type") or ("error" if attributes.get("status") == "error" else ""))
    key = (trace_id, str(span["spanID"]).lower().zfill(16))
    return Root(key, int(span["startTimeUnixNano"]), int(span["durationNanos"]), error)


class _Jaeger(_Backend):
    """A search answers with whole traces, so they are kept for when they are asked for."""

    def __init__(self, api: _Api) -> None:
        super().__init__(api)
        self._kept: dict[str, list[Span]] = {}

    def newest(self) -> str:
        found = self._search(_INGRESS, names.PREDICT, {"lookback": _LOOKBACK, "limit": "20"})
        roots = [span for trace in found for span in self._decoded(trace) if span.name == names.PREDICT]
        if not roots:
            raise LookupError(f"there is no request in these traces in the last {_LOOKBACK}")
        return max(roots, key=lambda span: span.end_ns).trace_id

    def roots(self, since_ns: int) -> Iterator[Root]:
        self.broken, self._kept = 0, {}
        for trace in self._all(_INGRESS, names.PREDICT, *_window(since_ns)):
            spans = list(self._decoded(trace))
            if spans:
                self._kept[spans[0].trace_id] = spans
            yield from (Root.of(span) for span in spans if span.name == names.PREDICT)

    def spans(self, survey: Survey) -> Iterator[Span]:
        begin_ns, end_ns = survey.window_ns
        for spans in self._kept.values():
            yield from spans
        for name in (names.BATCH_FORWARD, names.MODEL_LOAD):
            for trace in self._all(_MODEL, name, begin_ns - _LONGEST_REQUEST_NS, end_ns):
                yield from self._decoded(trace)

    def _all(self, service: str, operation: str, begin_ns: int, end_ns: int) -> Iterator[dict[str, Any]]:
        def between(begin_ns: int, end_ns: int) -> list[dict[str, Any]]:
            window = {"start": str(begin_ns // 1000), "end": str(end_ns // 1000)}
            return self._search(service, operation, {**window, "limit": str(_AT_ONCE)})

        return _in_windows(between, begin_ns, end_ns)

    def _search(self, service: str, operation: str, more: dict[str, str]) -> list[dict[str, Any]]:
        query = {"service": service, "operation": operation, **more}
        return (self._api.json("/api/traces", query) or {}).get("data") or []

    def _spans(self, trace_id: str) -> list[Span]:
        answer = self._api.json(f"/api/traces/{quote(trace_id)}", {}) or {}
        spans = {span.key: span for trace in answer.get("data") or [] for span in self._decoded(trace)}
        return list(spans.values())

    def _decoded(self, trace: dict[str, Any]) -> Iterator[Span]:
        resources = {key: _resource(process) for key, process in trace.get("processes", {}).items()}
        for span in trace.get("spans", []):
            try:
                yield _from_jaeger(span, resources.get(span.get("processID", ""), {}))
            except (ValueError, KeyError, TypeError, AttributeError):
                self.broken += 1


def _resource(process: dict[str, Any]) -> dict[str, Any]:
    tags = {tag["key"]: tag["value"] for tag in process.get("tags", [])}
    return {**tags, "service.name": process.get("serviceName", "")}


def _from_jaeger(span: dict[str, Any], resource: dict[str, Any]) -> Span:
    """Jaeger's times are microseconds; a link is a reference that is not the parent."""
    trace_id = _padded(span["traceID"], 32)
    references = [
        (one["refType"], _padded(one["traceID"], 32), _padded(one["spanID"], 16)) for one in span.get("references", [])
    ]
    parent = next((ref for ref in references if ref[0] == "CHILD_OF" and ref[1] == trace_id), None)
    attributes = {tag["key"]: tag["value"] for tag in span.get("tags", [])}
    return Span(
        trace_id=trace_id,
        span_id=_padded(span["spanID"], 16),
        parent_id=parent[2] if parent is not None else "",
        name=str(span["operationName"]),
        service=str(resource.get("service.name", "")),
        instance=str(resource.get("service.instance.id", "")),
        start_ns=int(span["startTime"]) * 1000,
        end_ns=(int(span["startTime"]) + int(span["duration"])) * 1000,
        attributes=attributes,
        links=tuple(ref[1:] for ref in references if ref is not parent),
        failed=attributes.get("error") is True or attributes.get("otel.status_code") == "ERROR",
        resource=resource,
    )


def _padded(ident: str, length: int) -> str:
    """Jaeger leaves leading zeros out."""
    return ident.lower().zfill(length)
