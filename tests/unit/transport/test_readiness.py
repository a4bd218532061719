"""Which stages have replicas, as the controller says: asked once for all who wait, cached, and never for long."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping

from deployments.telemetry.names import Service
from deployments.transport.readiness import Readiness

DEPLOYMENTS: Mapping[Service, str] = {"tokenizer": "Tokenizer", "model": "Model"}


def test_stages_without_a_running_replica_are_missing() -> None:
    readiness = Readiness(lambda: {"Tokenizer": 1, "Model": 0}, DEPLOYMENTS)

    assert asyncio.run(readiness.missing(1.0)) == ["model"]


def test_callers_share_one_query_and_its_answer_for_a_moment() -> None:
    asked = 0

    def ask() -> Mapping[str, int]:
        nonlocal asked
        asked += 1
        return {"Tokenizer": 1, "Model": 1}

    async def run() -> None:
        readiness = Readiness(ask, DEPLOYMENTS)
        assert await asyncio.gather(*(readiness.missing(1.0) for _ in range(5))) == [[]] * 5
        assert await readiness.missing(1.0) == []

    asyncio.run(run())
    assert asked == 1


def test_a_controller_that_fails_or_hangs_says_nothing() -> None:
    answer = threading.Event()

    def hang() -> Mapping[str, int]:
        answer.wait()
        return {"Tokenizer": 1, "Model": 1}

    def fail() -> Mapping[str, int]:
        raise ConnectionError("away")

    async def run() -> None:
        assert await Readiness(fail, DEPLOYMENTS).missing(1.0) is None
        readiness = Readiness(hang, DEPLOYMENTS)
        assert await readiness.missing(0.01) is None
        # One caller's time-out does not cancel the query: the next caller gets its answer.
        answer.set()
        assert await readiness.missing(5.0) == []

    asyncio.run(run())
