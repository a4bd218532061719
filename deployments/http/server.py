"""The HTTP layer of an inference request: the ASGI application, responses and errors."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from fastapi import FastAPI, Request, Response
from pydantic_core import to_json
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from deployments.errors import ApiError, InternalError, Unauthorized
from deployments.http.keys import ApiKeys

_logger = logging.getLogger("slowlens.ingress")


OPEN_PATHS = ("/healthz", "/v2/health/live", "/v2/health/ready")
"""Answered without a key."""
Endpoint = Callable[[Request, Send], Awaitable[Response | None]]
"""Handles a request, and returns the response, or None if it has sent it itself."""
Finder = Callable[[str], tuple[Endpoint, Mapping[str, str]] | None]


class FastPathApp(FastAPI):
    """A FastAPI application that calls the endpoints of the inference routes directly.

    FastAPI's middlewares, dependencies and response models cost more than everything else this process does with a
    request, and an inference route uses none of them. These endpoints are still registered as routes of the
    application, for its OpenAPI document.

    Args:
        fast_path: endpoints by path; they ask for keys themselves, so that a refusal is traced.
        keys: what all other routes ask for.
        find: for other paths: an endpoint and the path's parameters, if there is one.
        challenge: how, by ``WWW-Authenticate``; a browser asks its user on ``Basic``.
    """

    def __init__(
        self,
        fast_path: Mapping[str, Endpoint],
        keys: ApiKeys,
        *,
        challenge: str = "Bearer",
        find: Finder = lambda _: None,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        self._fast_path, self._keys, self._challenge, self._find = fast_path, keys, challenge, find
        self.add_exception_handler(HTTPException, _http_error)
        self.add_exception_handler(Exception, _unforeseen)

    def document(self, path: str, **described: Any) -> None:
        """Have a route of the fast path in the OpenAPI document."""
        self.add_api_route(path, _taken_before, methods=["POST"], **described)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        endpoint = None
        if scope["type"] == "http" and scope["method"] == "POST":
            path = scope["path"].removeprefix(scope.get("root_path", ""))
            endpoint = self._fast_path.get(path)
            if endpoint is None and (found := self._find(path)) is not None:
                endpoint, scope["path_params"] = found
        if endpoint is None:
            await self._slow_path(scope, receive, send)
            return
        request = Request(scope, receive)
        try:
            response = await endpoint(request, send)
        except Exception as error:
            response = await _unforeseen(request, error)
        if response is not None:
            await response(scope, receive, send)

    async def _slow_path(self, scope: Scope, receive: Receive, send: Send) -> None:
        """All other routes, which need a key too, but for those that say whether the application is well."""
        is_open = scope["type"] != "http" or scope["path"].removeprefix(scope.get("root_path", "")) in OPEN_PATHS
        if not is_open:
            try:
                self._keys.check(Request(scope).headers)
            except Unauthorized as error:
                response = error_response(error, error.body())
                response.headers["WWW-Authenticate"] = self._challenge
                await response(scope, receive, send)
                return
        await super().__call__(scope, receive, send)


async def _taken_before() -> Response:
    """Stands for a route of the fast path; its requests do not come here."""
    raise NotImplementedError


def json_response(content: Any, status: int = 200) -> Response:
    return Response(to_json(content), status, media_type="application/json")


def error_response(error: ApiError, body: Any, status: int | None = None) -> Response:
    response = json_response(body, status or error.status)
    if error.retry_after_s is not None:
        response.headers["Retry-After"] = str(error.retry_after_s)
    if isinstance(error, Unauthorized):
        response.headers["WWW-Authenticate"] = "Bearer"
    return response


_MOST_CALLERS, _LONGEST_RETRY_S = 10_000, 120


class RetryAdvice:
    """What callers are told to wait: longer, each time one comes again before its time, up to two minutes.

    Who has got an answer, or has waited, begins anew. The callers who were told last are remembered.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._told: OrderedDict[str, tuple[float, int]] = OrderedDict()

    def for_refused(self, caller: str, wait_s: int, arrived_s: float) -> int:
        """Return the seconds to tell this caller, whose request came then, and would be let in after ``wait_s``."""
        told_s, before_s = self._told.pop(caller, (0.0, 0))
        # What was under way already has not come too early.
        if told_s <= arrived_s < told_s + before_s:
            wait_s = max(wait_s, min(2 * before_s, _LONGEST_RETRY_S))
        self._told[caller] = (self._clock(), wait_s)
        if len(self._told) > _MOST_CALLERS:
            self._told.popitem(last=False)
        return wait_s

    def served(self, caller: str) -> None:
        self._told.pop(caller, None)


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
