"""What an inference request says in its headers: its id, its client, its timeout."""

from __future__ import annotations

import uuid
from collections.abc import Mapping

from fastapi import Request

from deployments.config import LimitsConfig
from deployments.errors import InvalidField

_MAX_REQUEST_ID, _MAX_ADDRESS = 256, 64
"""Characters that telemetry keeps."""


def request_id_of(headers: Mapping[str, str]) -> str:
    """The client's X-Request-ID, or the one that Serve assigned. Serve itself adds it to every response."""
    return headers.get("x-request-id", "")[:_MAX_REQUEST_ID] or uuid.uuid4().hex


def client_address(http: Request) -> str:
    """The client's address: the one forwarded by the first proxy, or that of the peer."""
    forwarded = http.headers.get("x-forwarded-for", "").partition(",")[0].strip()
    return (forwarded or (http.client.host if http.client is not None else ""))[:_MAX_ADDRESS]


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
