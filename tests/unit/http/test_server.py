"""The ASGI application around the endpoints: the fast path, and errors outside the request path."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx2
import pytest
from fastapi import Request, Response

from deployments.errors import QueueFull, TooLarge
from deployments.http.keys import ApiKeys
from deployments.http.server import FastPathApp, RetryAdvice, error_response, json_response


async def _echo(request: Request, _: Any) -> Response:
    return json_response({"path": request.url.path, "body": (await request.body()).decode()})


async def _broken(*_: Any) -> Response:
    raise ValueError("secret")


def application() -> FastPathApp:
    app = FastPathApp({"/echo": _echo, "/broken": _broken}, ApiKeys(None), title="test")
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


def test_who_comes_again_before_its_time_is_told_to_wait_longer() -> None:
    now_s = 100.0
    advice = RetryAdvice(lambda: now_s)

    def told(caller: str, wait_s: int, arrived_s: float | None = None) -> int:
        return advice.for_refused(caller, wait_s, now_s if arrived_s is None else arrived_s)

    assert [told("a", 3) for _ in range(7)] == [3, 6, 12, 24, 48, 96, 120]
    assert told("b", 3) == 3, "another caller"
    assert told("b", 3, now_s - 1) == 3, "it came when nothing had been told"
    assert told("a", 200) == 200, "the queue is longer than that"
    advice.served("a")
    assert told("a", 3) == 3
    now_s += 3
    assert told("a", 4) == 4, "it has waited"


def test_the_callers_that_were_told_last_are_remembered() -> None:
    advice = RetryAdvice(lambda: 1.0)
    for number in range(10_001):
        advice.for_refused(str(number), 1, 1.0)
    assert [advice.for_refused(caller, 1, 1.0) for caller in ("0", "10000")] == [1, 2]
