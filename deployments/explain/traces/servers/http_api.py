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
from http.client import HTTPException
from typing import Any, TypeVar
from urllib.parse import unquote, urlencode, urlsplit, urlunsplit

from deployments.explain.traces.otlp import NOT_OTLP, Span, printable

_TIMEOUT_S = 30
"""Of a whole answer."""
_MAX_ANSWER = 48 * 1024 * 1024
_PIECE = 1 << 16
LOOKBACK = "1h"
LOOKBACK_NS = 3600 * 10**9
_AT_ONCE, _MOST_AT_ONCE, _FETCHES = 500, 20_000, 8
"""Results of a search, those of one that cannot be narrowed, and traces that are fetched at a time."""
_SKEW_NS = 10**9
Found = TypeVar("Found")
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


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: the token is for the server that the user named."""

    def redirect_request(self, *_: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)


class Api:
    """A server by its URL, which may have a user and a password; ``token`` names a variable with a bearer token."""

    def __init__(self, url: str, token: str = "SLOWLENS_SOURCE_TOKEN") -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise SourceError(f"{without_password(url)!r} is not an http or https URL")
        self.url = without_password(url)
        self._headers = {"Accept": "application/json"}
        if parts.username is not None:
            pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            self._headers["Authorization"] = f"Basic {base64.b64encode(pair.encode()).decode()}"
        elif bearer := os.environ.get(token):
            self._headers["Authorization"] = f"Bearer {bearer}"

    def text(self, path: str, query: dict[str, str]) -> str | None:
        """Return the response body; None if it is a 404. Raises SourceError."""
        where = f"{self.url}{path}" + (f"?{urlencode(query)}" if query else "")
        request = urllib.request.Request(where, headers=self._headers)
        deadline_s = time.monotonic() + _TIMEOUT_S
        try:
            with _OPENER.open(request, timeout=_TIMEOUT_S) as answer:
                parts, size = [], 0
                while part := answer.read1(_PIECE):
                    parts.append(part)
                    size += len(part)
                    if size > _MAX_ANSWER:
                        raise SourceError(
                            f"{self.url} returned more than {_MAX_ANSWER >> 20} MiB for {path}; narrow the window"
                        )
                    if time.monotonic() > deadline_s:
                        raise SourceError(f"{self.url} took more than {_TIMEOUT_S} s to answer {path}")
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return None
            to = error.headers.get("Location") if 300 <= error.code < 400 else None
            moved = f", to {without_password(to)}; name that as the source" if to else ""
            raise SourceError(printable(f"{self.url} returned {error.code} {error.reason} for {path}{moved}")) from None
        except (OSError, ValueError, HTTPException) as error:
            raise SourceError(printable(f"{self.url} cannot be reached: {error}")) from None
        return b"".join(parts).decode(errors="replace")

    def json(self, path: str, query: dict[str, str]) -> Any:
        content = self.text(path, query)
        if content is None:
            return None
        try:
            found = json.loads(content)
        except NOT_OTLP:
            found = None
        if not isinstance(found, dict):
            raise SourceError(
                f"{self.url} is neither Jaeger's nor Tempo's HTTP API: its response to {path} is not a JSON object"
            )
        return found

    def objects(self, path: str, query: dict[str, str], key: str, *, is_search: bool = False) -> list[dict[str, Any]]:
        """Return the list of objects that a response has under ``key``; empty if there is none.

        A 404 is that too, but for a search: there, it is no store of traces. Raises SourceError.
        """
        content = self.json(path, query)
        if content is None and is_search:
            raise SourceError(
                f"{self.url} returned 404 for {path}: it is neither a Jaeger query service nor Tempo, or it is "
                "below another path"
            )
        found = (content or {}).get(key) or []
        if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
            raise SourceError(f"{self.url} did not answer {path} as Jaeger's and Tempo's HTTP APIs specify")
        return found


class Backend:
    """Common base of Jaeger and Tempo: fetches whole traces by id, and searches all of a window.

    Attributes:
        shortest_ns: of a window that a search can be limited to.
        cut: windows of which there was more than the store returns.
    """

    shortest_ns: int
    is_server = True

    def __init__(self, api: Api) -> None:
        self._api = api
        self.broken = self.lost = self.cut = 0

    def in_windows(
        self, ask: Callable[[int, int, int], Sequence[Found]], begin_ns: int, end_ns: int
    ) -> Iterator[Found]:
        """Yield everything found between two times: ``ask`` takes both, and the most results that it may return.

        Where there is more than that, each half of the window is searched, until it cannot be shorter.
        """
        found = ask(begin_ns, end_ns, _AT_ONCE)
        if len(found) >= _AT_ONCE and end_ns - begin_ns <= self.shortest_ns:
            found = ask(begin_ns, end_ns, _MOST_AT_ONCE)
            self.cut += len(found) >= _MOST_AT_ONCE
        elif len(found) >= _AT_ONCE:
            middle = (begin_ns + end_ns) // 2
            yield from self.in_windows(ask, begin_ns, middle)
            yield from self.in_windows(ask, middle, end_ns)
            return
        yield from found

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


def window(since_ns: int) -> tuple[int, int]:
    """Return when requests that ended since ``since_ns`` may have started; 0 stands for the last hour."""
    now_ns = time.time_ns()
    return (since_ns or now_ns - LOOKBACK_NS) - LONGEST_REQUEST_NS, now_ns + _SKEW_NS
