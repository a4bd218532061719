"""Headers of a request: how they are read, and what of them telemetry keeps."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from deployments.config import LimitsConfig
from deployments.errors import InvalidField
from deployments.http.headers import CleanHeaders, client_address, middlewares, request_id_of, timeout_ms

LIMITS = LimitsConfig(default_timeout_ms=1_000, max_timeout_ms=5_000)


@pytest.mark.parametrize(("value", "timeout"), [(None, 1_000), ("250", 250), ("0.5", 0.5), ("5000", 5_000)])
def test_the_timeout_is_the_requests_or_the_default(value: str | None, timeout: float) -> None:
    assert timeout_ms({} if value is None else {"x-request-timeout-ms": value}, LIMITS) == timeout


@pytest.mark.parametrize("value", ["0", "-1", "5001", "nan", "inf", "soon", ""])
def test_an_invalid_timeout_is_rejected_with_the_rule_and_the_value(value: str) -> None:
    with pytest.raises(InvalidField) as refused:
        timeout_ms({"x-request-timeout-ms": value}, LIMITS)

    assert refused.value.param == "X-Request-Timeout-Ms"
    assert refused.value.message.endswith(f"above 0 and at most 5000; got {value!r}")


def test_request_ids_are_kept_truncated_or_made() -> None:
    assert request_id_of({"x-request-id": "mine"}) == "mine"
    assert request_id_of({"x-request-id": "x" * 999}) == "x" * 256
    assert len({request_id_of({}), request_id_of({"x-request-id": ""})}) == 2


def test_the_client_is_the_first_forwarded_address_or_the_peer() -> None:
    assert client_address({"x-forwarded-for": "1.2.3.4, 10.0.0.1"}, "10.0.0.7") == "1.2.3.4"
    assert client_address({}, "10.0.0.7") == "10.0.0.7"
    assert client_address({}, "") == ""
    assert len(client_address({"x-forwarded-for": "9" * 999}, "10.0.0.7")) == 64


@pytest.mark.parametrize(
    ("name", "value", "passes"),
    [
        (b"x-request-disconnect-disabled", b"?1", False),
        (b"x-request-timeout-seconds", b"0.001", False),
        (b"x-request-id", b"mine", True),
        (b"x-request-id", b"\xff", False),
        (b"x-session-id", b"user-7", True),
        (b"x_session_id", b"\xff", False),
        (b"x-request-timeout-ms", b"250", True),
        (b"traceparent", b"\xff", True),
    ],
)
def test_what_serve_would_obey_or_fail_on_does_not_reach_it(name: bytes, value: bytes, passes: bool) -> None:
    seen: list[Any] = []

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        seen.extend(scope["headers"])

    async def receive() -> Message:
        raise AssertionError

    async def send(_: Message) -> None:
        raise AssertionError

    assert [one.cls.__name__ for one in middlewares()] == [CleanHeaders.__name__]  # type: ignore[attr-defined]
    app = CleanHeaders(serve)
    other = (b"host", b"here")
    asyncio.run(app({"type": "http", "headers": [other, (name, value)]}, receive, send))
    assert seen == ([other, (name, value)] if passes else [other])
