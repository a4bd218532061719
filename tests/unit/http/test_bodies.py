"""Request bodies: limits, times, and the budget that all of them share."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from fastapi import Request

from deployments.config import LimitsConfig
from deployments.errors import ApiError, BodyTooSlow, Cancelled, DeadlinePassed, QueueFull, TooLarge
from deployments.http.bodies import BodyBudget

FAR_NS = 10**18
KB = 1024


def request(*parts: bytes, announced: str | None = None, pause_s: float = 0.0, disconnect: bool = False) -> Request:
    """``pause_s`` is before every part. Without parts nothing ever comes."""
    length = (b"content-length", announced.encode()) if announced is not None else (b"transfer-encoding", b"chunked")
    total = int(announced) if announced is not None and announced.isdecimal() else sum(map(len, parts))
    messages = [{"type": "http.request", "body": part, "more_body": i < len(parts) - 1} for i, part in enumerate(parts)]
    if sum(map(len, parts)) < total:
        messages = [message | {"more_body": True} for message in messages]
    if disconnect:
        messages = [{"type": "http.disconnect"}]

    async def generate() -> AsyncIterator[dict[str, Any]]:
        for message in messages:
            await asyncio.sleep(pause_s)
            yield message
        await asyncio.Event().wait()

    received = generate()
    return Request({"type": "http", "method": "POST", "headers": [length]}, lambda: anext(received))


def limits(**settings: Any) -> LimitsConfig:
    return LimitsConfig(**{"max_body_bytes": 200 * KB, "max_held_body_bytes": 300 * KB, **settings})


def read(http: Request, *, deadline_ns: int = FAR_NS, **settings: Any) -> tuple[bytes | ApiError, bool]:
    """What was read, or why not; and whether something was left."""

    async def run() -> tuple[bytes | ApiError, bool]:
        with BodyBudget(limits(**settings)).body(http) as body:
            try:
                outcome: bytes | ApiError = await body.read(deadline_ns)
            except ApiError as error:
                outcome = error
            return outcome, body.was_left

    return asyncio.run(run())


def test_a_body_is_read_completely() -> None:
    assert read(request(b"ab", b"cd"), max_body_bytes=4) == (b"abcd", False)


@pytest.mark.parametrize(
    ("http", "kind", "message", "was_left"),
    [
        (request(announced="5"), TooLarge, "the body has 5 bytes; at most 4 are allowed", False),
        (request(announced="9" * 400), TooLarge, "the body has 999999999999999999 bytes", True),
        (request(b"abc", b"de"), TooLarge, "the body has more than 4 bytes, the maximum allowed", True),
        (request(b"abc", b"de", announced="many"), TooLarge, "the body has more than 4 bytes", False),
        (request(disconnect=True), Cancelled, "the client hung up", True),
    ],
)
def test_a_body_that_cannot_be_taken(http: Request, kind: type[ApiError], message: str, was_left: bool) -> None:
    error, left = read(http, max_body_bytes=4)
    assert isinstance(error, kind)
    assert message in error.message
    assert left == was_left


def test_a_body_past_the_deadline_is_rejected() -> None:
    error, _ = read(request(b"a", pause_s=60.0), deadline_ns=time.monotonic_ns() + 1_000_000)
    assert isinstance(error, DeadlinePassed)
    assert "the deadline passed after 0 bytes of the body" in error.message


def test_a_body_that_comes_too_slowly_is_rejected_before_its_deadline() -> None:
    error, was_left = read(request(b"a", b"b", b"c", pause_s=0.1), body_timeout_ms=150)
    assert isinstance(error, BodyTooSlow)
    assert error.status == 408
    assert error.message == "1 bytes of the body have arrived in 150 ms; it must arrive in that time"
    assert was_left


def test_large_bodies_share_a_budget_and_small_ones_pass() -> None:
    async def run() -> None:
        budget = BodyBudget(limits())
        with budget.body(request(b"x" * (200 * KB))) as first:
            await first.read(FAR_NS)
            assert budget.held == 136 * KB
            with budget.body(request(b"x" * (200 * KB))) as second:
                await second.read(FAR_NS)
                for _ in range(100):
                    with budget.body(request(b"x" * (64 * KB))) as small:
                        assert len(await small.read(FAR_NS)) == 64 * KB
                with budget.body(request(*[b"x" * (50 * KB)] * 3)) as third:
                    with pytest.raises(QueueFull, match="the ingress holds 278528 bytes of large request bodies"):
                        await third.read(FAR_NS)
                    assert third.was_left
            assert budget.held == 136 * KB
            with budget.body(request(b"x" * (150 * KB))) as fourth:
                await fourth.read(FAR_NS)
        assert budget.held == 0

    asyncio.run(run())


def test_bodies_that_stop_short_give_back_what_they_held() -> None:
    async def run() -> None:
        budget = BodyBudget(limits(body_timeout_ms=50, max_held_body_bytes=10_000 * KB))

        async def stop_short() -> None:
            http = request(b"x" * (200 * KB - 1), announced=str(200 * KB))
            with budget.body(http) as body, pytest.raises(BodyTooSlow):
                await body.read(FAR_NS)

        await asyncio.gather(*(stop_short() for _ in range(50)))
        assert budget.held == 0

    asyncio.run(run())
