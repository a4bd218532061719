"""The HTTP layer of an inference request: the ASGI application, request bodies, responses and errors."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from fastapi import FastAPI, Request, Response
from pydantic_core import to_json
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from deployments.errors import ApiError, Cancelled, DeadlinePassed, InternalError, TooLarge

_logger = logging.getLogger("slowlens.ingress")


class FastPathApp(FastAPI):
    """A FastAPI application that calls the endpoints of the inference routes directly.

    FastAPI's middlewares, dependencies and response models cost more than everything else this process does with a
    request, and an inference route uses none of them. These endpoints are still registered as routes of the
    application, for its OpenAPI document.
    """

    def __init__(self, fast_path: Mapping[str, Callable[[Request], Awaitable[Response]]], **settings: Any) -> None:
        super().__init__(**settings)
        self._fast_path = fast_path
        self.add_exception_handler(HTTPException, _http_error)
        self.add_exception_handler(Exception, _unforeseen)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        endpoint = None
        if scope["type"] == "http" and scope["method"] == "POST":
            endpoint = self._fast_path.get(scope["path"].removeprefix(scope.get("root_path", "")))
        if endpoint is None:
            await super().__call__(scope, receive, send)
            return
        request = Request(scope, receive)
        try:
            response = await endpoint(request)
        except Exception as error:
            response = await _unforeseen(request, error)
        await response(scope, receive, send)


async def read_body(http: Request, limit: int, deadline_ns: int) -> bytes:
    """Read the body. Raises TooLarge as soon as that is known, DeadlinePassed if it arrives too slowly."""
    announced = http.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > limit:
        raise TooLarge(f"the body has {announced} bytes; at most {limit} are allowed")
    parts, size = [], 0
    try:
        async with asyncio.timeout((deadline_ns - time.monotonic_ns()) / 1e9):
            async for part in http.stream():
                size += len(part)
                if size > limit:
                    raise TooLarge(f"the body has more than {limit} bytes, the maximum allowed")
                parts.append(part)
    except ClientDisconnect:
        raise Cancelled("the client hung up") from None
    except TimeoutError:
        raise DeadlinePassed(f"the deadline passed after {size} bytes of the body had arrived") from None
    return b"".join(parts)


def json_response(content: Any, status: int = 200) -> Response:
    return Response(to_json(content), status, media_type="application/json")


def error_response(error: ApiError, body: Any) -> Response:
    response = json_response(body, error.status)
    if error.retry_after_s is not None:
        response.headers["Retry-After"] = str(error.retry_after_s)
    return response


async def _http_error(_: Request, error: Exception) -> Response:
    """Return 404 for an unknown path, and 405, in the same shape as all other errors."""
    assert isinstance(error, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
    body = {"error": {"message": error.detail, "type": "invalid_request_error", "param": None, "code": code}}
    response = json_response(body, error.status_code)
    response.headers.update(error.headers or {})
    return response


async def _unforeseen(_: Request, error: Exception) -> Response:
    """Handle an internal error outside the handling of an inference request."""
    _logger.error("a response failed", exc_info=error)
    internal = InternalError("internal error")
    return error_response(internal, internal.body())
