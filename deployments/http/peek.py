"""Looks into a request's body before it is known who will read it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence

from fastapi import Request
from starlette.types import Message, Receive

from deployments.config import LimitsConfig
from deployments.errors import QueueFull
from deployments.http.bodies import ARRIVED, BodyBudget


async def look_into(request: Request, budget: BodyBudget, limits: LimitsConfig) -> tuple[Request, bytes]:
    """Read a body, and return a request from which it can be read again.

    What is too slow or too long by ``limits``, does not fit into the budget, or ends because its client is gone, is
    left to whoever reads it next; the bytes are then empty.
    """
    request.scope[ARRIVED] = time.monotonic_ns()
    messages, size, is_over = list[Message](), 0, False
    under_way: asyncio.Future[Message] | None = None
    deadline_s = time.monotonic() + limits.body_timeout_ms / 1e3
    with budget.body(request) as body, contextlib.suppress(QueueFull):
        while not is_over and size <= limits.max_body_bytes:
            under_way = asyncio.ensure_future(request.receive())
            done, _ = await asyncio.wait({under_way}, timeout=max(0.0, deadline_s - time.monotonic()))
            if not done:
                break
            message, under_way = under_way.result(), None
            messages.append(message)
            size += len(message.get("body", b""))
            is_over = message["type"] != "http.request" or not message.get("more_body", False)
            body.hold(size)
    again = Request(request.scope, _again(messages, under_way, request.receive))
    return again, b"".join(one.get("body", b"") for one in messages) if is_over else b""


def _again(messages: Sequence[Message], under_way: asyncio.Future[Message] | None, receive: Receive) -> Receive:
    """Receive these messages, and then what follows them."""
    left = list(messages)

    async def received() -> Message:
        nonlocal under_way
        if left:
            return left.pop(0)
        if under_way is not None:
            awaited, under_way = under_way, None
            return await awaited
        return await receive()

    return received
