"""A small HTTP client: the tests need exact headers and bodies, and connections that can be cut."""

from __future__ import annotations

import http.client
import json
import re
import secrets
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes
    header_list: list[tuple[str, str]]

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        body = self.json()
        assert set(body) == {"error"}
        assert set(body["error"]) == {"message", "type", "param", "code"}
        error: dict[str, Any] = body["error"]
        return error

    @property
    def trace_id(self) -> str:
        return self.headers["traceresponse"].split("-")[1]

    @property
    def root_span_id(self) -> str:
        return self.headers["traceresponse"].split("-")[2]

    @property
    def server_timing(self) -> dict[str, float]:
        return {k: float(v) for k, v in re.findall(r"(\w+);dur=([0-9.]+)", self.headers["server-timing"])}


def call(
    port: int,
    method: str,
    path: str,
    body: Any = None,
    headers: dict[str, str] | None = None,
    timeout_s: float = 60,
) -> Answer:
    """Send one request on its own connection. ``body`` is sent unchanged if bytes, otherwise as JSON."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)
    try:
        raw = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        connection.request(method, path, raw, {"content-type": "application/json", **(headers or {})})
        response = connection.getresponse()
        pairs = [(name.lower(), value) for name, value in response.getheaders()]
        return Answer(response.status, dict(pairs), response.read(), pairs)
    finally:
        connection.close()


def new_traceparent(flags: str = "01") -> tuple[str, str, str]:
    """A caller's ``traceparent``, with its trace id and span id."""
    trace_id, span_id = secrets.token_hex(16), secrets.token_hex(8)
    return f"00-{trace_id}-{span_id}-{flags}", trace_id, span_id
