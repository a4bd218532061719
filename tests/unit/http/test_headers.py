"""Headers of a request: how they are read, and what of them telemetry keeps."""

from __future__ import annotations

import pytest
from fastapi import Request

from deployments.config import LimitsConfig
from deployments.errors import InvalidField
from deployments.http.headers import client_address, request_id_of, timeout_ms

LIMITS = LimitsConfig(default_timeout_ms=1_000, max_timeout_ms=5_000)


def request(*headers: tuple[str, str], peer: tuple[str, int] | None = ("10.0.0.7", 5)) -> Request:
    raw = [(name.encode(), value.encode()) for name, value in headers]
    return Request({"type": "http", "method": "POST", "headers": raw, "client": peer})


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
    assert client_address(request(("x-forwarded-for", "1.2.3.4, 10.0.0.1"))) == "1.2.3.4"
    assert client_address(request()) == "10.0.0.7"
    assert client_address(request(peer=None)) == ""
    assert len(client_address(request(("x-forwarded-for", "9" * 999)))) == 64
