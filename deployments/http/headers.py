"""What an inference request says in its headers: its id, its client, its timeout."""

from __future__ import annotations

import uuid
from collections.abc import Mapping

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

from deployments.config import LimitsConfig
from deployments.errors import InvalidField

_CONTROL = (b"x-request-disconnect-disabled", b"x-request-timeout-seconds")
"""By these Serve's proxy lets a client turn off the detection of its hang-up, and set a timeout that Serve answers."""
_IDS = (b"x-request-id", b"x-session-id")
"""Serve decodes these as UTF-8, and answers 500 if they are not."""
_MAX_REQUEST_ID, _MAX_ADDRESS = 256, 64
"""Characters that telemetry keeps."""


def request_id_of(headers: Mapping[str, str]) -> str:
    """The client's X-Request-ID, or the one that Serve assigned. Serve itself adds it to every response."""
    return headers.get("x-request-id", "")[:_MAX_REQUEST_ID] or uuid.uuid4().hex


def client_address(headers: Mapping[str, str], peer: str) -> str:
    """The client's address: the one forwarded by the first proxy, or that of the peer."""
    forwarded = headers.get("x-forwarded-for", "").partition(",")[0].strip()
    return (forwarded or peer)[:_MAX_ADDRESS]


def timeout_ms(headers: Mapping[str, str], limits: LimitsConfig) -> float:
    """The request's own timeout, or the default. Raises InvalidField."""
    wanted = headers.get("x-request-timeout-ms")
    if wanted is None:
        return limits.default_timeout_ms
    try:
        timeout = float(wanted)
    except ValueError:
        timeout = float("nan")
    if not 0 < timeout <= limits.max_timeout_ms:
        raise InvalidField(
            f"X-Request-Timeout-Ms must be a number of milliseconds, above 0 and at most "
            f"{limits.max_timeout_ms:g}; got {wanted[:80]!r}",
            param="X-Request-Timeout-Ms",
        )
    return timeout


class CleanHeaders:
    """ASGI middleware in front of Serve's own code: takes away the headers that Serve would obey or fail on."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope["headers"] = [(name, value) for name, value in scope["headers"] if not _is_unwelcome(name, value)]
        await self._app(scope, receive, send)


def _is_unwelcome(name: bytes, value: bytes) -> bool:
    # Serve takes some names with underscores too.
    name = name.replace(b"_", b"-")
    return name in _CONTROL or (name in _IDS and not value.isascii())


def middlewares() -> list[Middleware]:
    """``RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH``: what Serve puts around its HTTP servers."""
    return [Middleware(CleanHeaders)]
