"""Traces out of a tracing backend, by its documented HTTP API.

Jaeger: ``/api/traces`` (https://www.jaegertracing.io/docs/latest/architecture/apis/, "HTTP JSON"). Tempo:
``/api/search`` and ``/api/traces`` (https://grafana.com/docs/tempo/latest/api_docs/). Which of them answers is asked
once: Tempo has ``/api/echo``. A user and a password may stand in the URL, a bearer token in ``SLOWLENS_SOURCE_TOKEN``.
"""

from __future__ import annotations

import base64
import json
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote, unquote, urlencode, urlsplit, urlunsplit

from deployments.explain.otlp import Decoder, Span
from deployments.explain.source import Source
from deployments.telemetry import names

_TIMEOUT_S = 30
_INGRESS = f"{names.NAMESPACE}.ingress"
_LOOKBACK = "1h"


class SourceError(Exception):
    """The backend cannot be asked, or does not answer as its API says."""


def backend(url: str) -> Source:
    """The traces behind the URL of a Jaeger query service or of Tempo. Raises SourceError."""
    api = _Api(url)
    return _Tempo(api) if (api.text("/api/echo", {}) or "").strip() == "echo" else _Jaeger(api)


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
        self.broken = 0

    def trace(self, trace_id: str) -> list[Span]:
        self.broken = 0
        found = self._spans(trace_id)
        if not found:
            raise LookupError(f"no span of trace {trace_id} is here")
        return found

    def linked(self, trace: list[Span]) -> list[Span]:
        links = {link for span in trace for link in span.links}
        traces = sorted({trace_id for trace_id, _ in links})
        return [span for trace_id in traces for span in self._spans(trace_id) if span.key in links]

    def _spans(self, trace_id: str) -> list[Span]:
        raise NotImplementedError


class _Tempo(_Backend):
    def newest(self) -> str:
        query = f'{{ name = "{names.PREDICT}" }}'
        answer = self._api.json("/api/search", {"q": query, "limit": "20"}) or {}
        found = answer.get("traces") or []
        if not found:
            raise LookupError("there is no request in these traces yet")
        newest: dict[str, Any] = max(found, key=lambda one: int(one.get("startTimeUnixNano", 0)))
        # Tempo leaves leading zeros out.
        return str(newest["traceID"]).lower().zfill(32)

    def _spans(self, trace_id: str) -> list[Span]:
        decoder = Decoder()
        data = self._api.json(f"/api/traces/{quote(trace_id)}", {}) or {}
        spans = {span.key: span for span in decoder.spans(data.get("trace", data))}
        self.broken += decoder.broken
        return list(spans.values())


class _Jaeger(_Backend):
    def newest(self) -> str:
        query = {"service": _INGRESS, "operation": names.PREDICT, "lookback": _LOOKBACK, "limit": "20"}
        answer = self._api.json("/api/traces", query) or {}
        spans = [span for trace in answer.get("data") or [] for span in self._decoded(trace)]
        roots = [span for span in spans if span.name == names.PREDICT]
        if not roots:
            raise LookupError(f"there is no request in these traces in the last {_LOOKBACK}")
        return max(roots, key=lambda span: span.end_ns).trace_id

    def _spans(self, trace_id: str) -> list[Span]:
        answer = self._api.json(f"/api/traces/{quote(trace_id)}", {}) or {}
        spans = {span.key: span for trace in answer.get("data") or [] for span in self._decoded(trace)}
        return list(spans.values())

    def _decoded(self, trace: dict[str, Any]) -> Iterator[Span]:
        origins = {key: _origin(process) for key, process in trace.get("processes", {}).items()}
        for span in trace.get("spans", []):
            try:
                yield _from_jaeger(span, *origins.get(span.get("processID", ""), ("", "")))
            except (ValueError, KeyError, TypeError, AttributeError):
                self.broken += 1


def _origin(process: dict[str, Any]) -> tuple[str, str]:
    tags = {tag["key"]: tag["value"] for tag in process.get("tags", [])}
    return process.get("serviceName", ""), str(tags.get("service.instance.id", ""))


def _from_jaeger(span: dict[str, Any], service: str, instance: str) -> Span:
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
        service=service,
        instance=instance,
        start_ns=int(span["startTime"]) * 1000,
        end_ns=(int(span["startTime"]) + int(span["duration"])) * 1000,
        attributes=attributes,
        links=tuple(ref[1:] for ref in references if ref is not parent),
        failed=attributes.get("error") is True or attributes.get("otel.status_code") == "ERROR",
    )


def _padded(ident: str, length: int) -> str:
    """Jaeger leaves leading zeros out."""
    return ident.lower().zfill(length)
