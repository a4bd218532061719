"""Common parts of the HTTP clients for Jaeger and Tempo.

Both limit the number of traces per search. A window that reaches the limit is therefore searched again in halves. The
URL may contain a user and a password; ``SLOWLENS_SOURCE_TOKEN`` may hold a bearer token.
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
from typing import Any
from urllib.parse import unquote, urlencode, urlsplit, urlunsplit

from deployments.explain.traces.otlp import Span

_TIMEOUT_S = 30
LOOKBACK = "1h"
LOOKBACK_NS = 3600 * 10**9
_AT_ONCE, _FETCHES = 500, 8
_SHORTEST_NS = 10**9
LONGEST_REQUEST_NS = 600 * 10**9
"""How long before the window a request that ended in it may have started."""


class SourceError(Exception):
    """The backend cannot be queried, or does not respond as its API specifies."""


def without_password(url: str) -> str:
    """Return the part of a URL that may be shown; a path is returned unchanged."""
    if "://" not in url:
        return url
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path.rstrip("/"), "", ""))


class Api:
    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise SourceError(f"{without_password(url)!r} is not an http or https URL")
        self.url = without_password(url)
        self._headers = {"Accept": "application/json"}
        if parts.username is not None:
            pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            self._headers["Authorization"] = f"Basic {base64.b64encode(pair.encode()).decode()}"
        elif token := os.environ.get("SLOWLENS_SOURCE_TOKEN"):
            self._headers["Authorization"] = f"Bearer {token}"

    def text(self, path: str, query: dict[str, str]) -> str | None:
        """Return the response body; None if it is a 404. Raises SourceError."""
        where = f"{self.url}{path}" + (f"?{urlencode(query)}" if query else "")
        try:
            with urllib.request.urlopen(
                urllib.request.Request(where, headers=self._headers), timeout=_TIMEOUT_S
            ) as answer:
                content: bytes = answer.read()
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return None
            raise SourceError(f"{self.url} returned {error.code} {error.reason} for {path}") from None
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
                f"{self.url} is neither Jaeger's nor Tempo's HTTP API: its response to {path} is not JSON"
            ) from None


class Backend:
    """Common base of Jaeger and Tempo: fetches whole traces by id."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self.broken = self.lost = 0

    def trace(self, trace_id: str) -> list[Span]:
        self.broken = 0
        found = self._spans(trace_id)
        if not found:
            raise LookupError(f"no spans found for trace {trace_id}")
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


def in_windows(
    ask: Callable[[int, int, int], Sequence[dict[str, Any]]], begin_ns: int, end_ns: int
) -> Iterator[dict[str, Any]]:
    """Yield everything found between two times, with a limit on the results per query.

    If a single second has more results than the limit, the rest is dropped.
    """
    found = ask(begin_ns, end_ns, _AT_ONCE)
    if len(found) < _AT_ONCE or end_ns - begin_ns <= _SHORTEST_NS:
        yield from found
        return
    middle = (begin_ns + end_ns) // 2
    yield from in_windows(ask, begin_ns, middle)
    yield from in_windows(ask, middle, end_ns)


def window(since_ns: int) -> tuple[int, int]:
    """Return when requests that ended since ``since_ns`` may have started; 0 stands for the last hour."""
    now_ns = time.time_ns()
    return (since_ns or now_ns - LOOKBACK_NS) - LONGEST_REQUEST_NS, now_ns + _SHORTEST_NS
