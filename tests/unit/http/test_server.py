"""The ASGI application around the endpoints: the fast path, request bodies, and errors outside the request path."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import pytest
from fastapi import Request, Response

from deployments.errors import Cancelled, DeadlinePassed, QueueFull, TooLarge
from deployments.http.server import FastPathApp, error_response, json_response, read_body

FAR_NS = 10**18


async def _echo(request: Request) -> Response:
    return json_response({"path": request.url.path, "body": (await request.body()).decode()})


async def _broken(_: Request) -> Response:
    raise ValueError("secret")


def application() -> FastPathApp:
    app = FastPathApp({"/echo": _echo, "/broken": _broken}, title="test")
    app.add_api_route("/slow/{name}", lambda name: {"name": name}, methods=["GET"])
    return app


def ask(method: str, path: str, app: FastPathApp | None = None, **options: Any) -> httpx2.Response:
    async def run() -> httpx2.Response:
        transport = httpx2.ASGITransport(app or application(), raise_app_exceptions=False, root_path="")
        async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, **options)

    return asyncio.run(run())


def test_inference_routes_bypass_fastapi_and_other_routes_do_not() -> None:
    assert ask("POST", "/echo", content=b"hello").json() == {"path": "/echo", "body": "hello"}
    assert ask("GET", "/slow/x").json() == {"name": "x"}


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [("GET", "/nothing", 404, "not_found"), ("DELETE", "/slow/x", 405, "method_not_allowed")],
)
def test_routing_errors_have_our_format(method: str, path: str, status: int, code: str) -> None:
    answer = ask(method, path)

    assert answer.status_code == status
    assert answer.json()["error"]["code"] == code
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_an_unexpected_error_is_500_without_details() -> None:
    answer = ask("POST", "/broken")

    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "internal_error"
    assert "secret" not in answer.text


def test_retry_after_is_sent_as_a_header() -> None:
    error = QueueFull("full", retry_after_s=7)

    assert error_response(error, error.body()).headers["Retry-After"] == "7"
    assert "Retry-After" not in error_response(TooLarge("large"), {}).headers


# --- bodies ----------------------------------------------------------------------------------------------------------


def request(*parts: bytes, announced: str | None = None, pause_s: float = 0.0, disconnect: bool = False) -> Request:
    headers = [(b"content-length", announced.encode())] if announced is not None else []
    messages = [{"type": "http.request", "body": part, "more_body": i < len(parts) - 1} for i, part in enumerate(parts)]
    if disconnect:
        messages = [{"type": "http.disconnect"}]

    async def generate() -> AsyncIterator[dict[str, Any]]:
        for message in messages:
            await asyncio.sleep(pause_s)
            yield message

    received = generate()
    return Request({"type": "http", "method": "POST", "headers": headers}, lambda: anext(received))


def test_a_body_is_read_completely() -> None:
    assert asyncio.run(read_body(request(b"ab", b"cd"), 4, FAR_NS)) == b"abcd"


def test_a_body_whose_content_length_is_too_large_is_not_read() -> None:
    with pytest.raises(TooLarge, match="the body has 5 bytes; at most 4 are allowed"):
        asyncio.run(read_body(request(announced="5"), 4, FAR_NS))


def test_a_body_is_rejected_as_soon_as_it_exceeds_the_limit() -> None:
    with pytest.raises(TooLarge, match="the body has more than 4 bytes"):
        asyncio.run(read_body(request(b"abc", b"de", announced="many"), 4, FAR_NS))


def test_a_body_past_the_deadline_is_rejected() -> None:
    with pytest.raises(DeadlinePassed, match="the deadline passed after 0 bytes of the body"):
        asyncio.run(read_body(request(b"a", pause_s=60.0), 4, time.monotonic_ns() + 1_000_000))


def test_a_client_disconnect_while_sending_the_body_is_a_cancellation() -> None:
    with pytest.raises(Cancelled, match="the client hung up"):
        asyncio.run(read_body(request(disconnect=True), 4, FAR_NS))
