"""Reads request bodies, within a limit for each, a time, and a budget for all of them together."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager

from fastapi import Request
from starlette.requests import ClientDisconnect

from deployments.config import LimitsConfig
from deployments.errors import BodyTooSlow, Cancelled, DeadlinePassed, QueueFull, TooLarge

_DIGITS = 18
ARRIVED = "slowlens.arrived_ns"
"""In the scope: when the request arrived, if something has looked into its body since then."""
_FREE_BYTES = 64 * 1024
"""Of each body, outside the budget: who sends little is not refused because others send much."""


class BodyBudget:
    """Bytes of bodies that this process holds, from their arrival until their requests have been answered.

    Args:
        limits: ``max_body_bytes`` of one, ``body_timeout_ms`` for its arrival, and ``max_held_body_bytes`` of all.
    """

    def __init__(self, limits: LimitsConfig) -> None:
        self._limits = limits
        self.held = 0

    @contextmanager
    def body(self, http: Request) -> Iterator[Body]:
        """Around a request."""
        body = Body(self, self._limits, http)
        try:
            yield body
        finally:
            self.held -= body.held

    def take(self, more: int) -> None:
        """Raises QueueFull if there is no room."""
        most = self._limits.max_held_body_bytes
        if self.held + more > most:
            raise QueueFull(
                f"the ingress holds {self.held} bytes of large request bodies, of at most {most}; try again later",
                retry_after_s=1,
            )
        self.held += more


class Body:
    """The body of one request.

    Attributes:
        held: its bytes that count in the budget.
        was_left: whether there may be much of it that was not read; its connection is then better closed.
    """

    def __init__(self, budget: BodyBudget, limits: LimitsConfig, http: Request) -> None:
        self._budget, self._limits, self._http = budget, limits, http
        self._arrived_ns: int = http.scope.get(ARRIVED, 0) or time.monotonic_ns()
        announced = http.headers.get("content-length", "")
        self._announced = int(announced[:_DIGITS]) if announced.isdecimal() else None
        self.held = 0
        self.was_left = self._announced > _FREE_BYTES if self._announced is not None else _is_chunked(http)

    async def read(self, deadline_ns: int) -> bytes:
        """Read it.

        Raises TooLarge as soon as that is known, QueueFull if all bodies together are too large, BodyTooSlow or
        DeadlinePassed if it arrives too slowly, Cancelled if the client is gone.
        """
        limit, parts, size = self._limits.max_body_bytes, list[bytes](), 0
        if self._announced is not None and self._announced > limit:
            raise TooLarge(f"the body has {self._announced} bytes; at most {limit} are allowed")
        now_ns, most_s = time.monotonic_ns(), self._limits.body_timeout_ms / 1e3
        left_s = (deadline_ns - now_ns) / 1e9
        try:
            async with asyncio.timeout(min(left_s, most_s - (now_ns - self._arrived_ns) / 1e9)):
                async for part in self._http.stream():
                    size += len(part)
                    if size > limit:
                        raise TooLarge(f"the body has more than {limit} bytes, the maximum allowed")
                    self.hold(size)
                    parts.append(part)
        except ClientDisconnect:
            raise Cancelled("the client hung up") from None
        except TimeoutError:
            if left_s <= most_s:
                raise DeadlinePassed(f"the deadline passed after {size} bytes of the body had arrived") from None
            raise BodyTooSlow(
                f"{size} bytes of the body have arrived in {most_s * 1e3:g} ms; it must arrive in that time"
            ) from None
        self.was_left = False
        return b"".join(parts)

    def hold(self, size: int) -> None:
        """Count so many bytes of it in the budget. Raises QueueFull."""
        more = max(0, size - _FREE_BYTES) - self.held
        if more > 0:
            self._budget.take(more)
            self.held += more


def _is_chunked(http: Request) -> bool:
    return "transfer-encoding" in http.headers
