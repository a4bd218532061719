"""The client of a stage: its result, its failures, its deadline, and a stage without a replica."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ray.serve.exceptions import RequestCancelledError

from deployments.config import AppConfig
from deployments.errors import Cancelled, DeadlinePassed, Failure, InvalidField, NoReplicaReady
from deployments.messages import Call, Reply
from deployments.telemetry.recorder import Telemetry
from deployments.telemetry.records import RequestRecord
from deployments.transport.readiness import Readiness
from deployments.transport.stage_client import StageClient
from tests.support.local import PLACEMENT, LocalHandle


@dataclass(frozen=True, slots=True)
class Word:
    text: str
    cost_us: int = 1


class Stage:
    """Replies in capitals. Waits on ``hang``, fails on ``bad``."""

    def __init__(self) -> None:
        self.forgotten: list[str] = []
        self.running = asyncio.Event()
        self.was_cancelled = False

    async def upper(self, calls: tuple[Call[Word], ...]) -> tuple[Reply[str], ...]:
        return tuple([await self._reply(call) for call in calls])

    async def stream(self, calls: tuple[Call[Word], ...]) -> Any:
        for index, call in enumerate(calls):
            yield [(index, await self._reply(call))]

    async def _reply(self, call: Call[Word]) -> Reply[str]:
        self.running.set()
        if call.request.text == "hang":
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                self.was_cancelled = True
                raise
        if call.request.text == "bad":
            return Reply(5, failure=Failure.of(InvalidField("bad word", param="word")))
        return Reply(7, call.request.text.upper())

    async def forget(self, traceparents: tuple[str, ...]) -> None:
        self.forgotten += traceparents


@pytest.fixture
def telemetry(tmp_path: Path) -> Iterator[Telemetry]:
    config = AppConfig.parse({"telemetry": {"directory": str(tmp_path)}})
    made = Telemetry("ingress", config, "model", PLACEMENT.identity)
    yield made
    made.close()


class Caller:
    """One HTTP request that calls the stage."""

    def __init__(
        self, telemetry: Telemetry, *, streams: bool = False, replicas: Mapping[str, int] | None = None
    ) -> None:
        self.stage, self.telemetry = Stage(), telemetry
        self.handle = LocalHandle("Model", self.stage)
        handle: Any = self.handle
        self.client: StageClient[Word, str] = StageClient(
            "model",
            handle,
            "stream" if streams else "upper",
            telemetry=telemetry,
            readiness=Readiness(lambda: replicas or {}, {"model": "Model"}),
            no_replica_wait_ms=20,
            replies_as_ready=streams,
        )
        self.records: list[RequestRecord] = []

    async def call(self, text: str, timeout_s: float = 30.0) -> str:
        with self.telemetry.request(
            method="POST", path="/", scheme="http", route="/", client="", request_id="id", headers={}
        ) as record:
            self.records.append(record)
            record.deadline_ns = time.monotonic_ns() + int(timeout_s * 1e9)
            return await self.client.call(record, Word(text))


@pytest.mark.parametrize("streams", [False, True])
def test_the_result_comes_back_and_the_hop_says_how_long_the_stage_had_it(telemetry: Telemetry, streams: bool) -> None:
    async def run() -> None:
        caller = Caller(telemetry, streams=streams)
        assert await asyncio.gather(*map(caller.call, "ab")) == ["A", "B"]
        for record in caller.records:
            hop = record.hops["model"]
            assert (hop.held_ns, hop.has_reply, hop.group_size) == (7, True, 2)

    asyncio.run(run())


@pytest.mark.parametrize("streams", [False, True])
def test_a_failure_of_the_stage_is_raised_and_harms_no_other(telemetry: Telemetry, streams: bool) -> None:
    async def run() -> None:
        caller = Caller(telemetry, streams=streams)
        good, bad = await asyncio.gather(caller.call("a"), caller.call("bad"), return_exceptions=True)
        assert good == "A"
        assert isinstance(bad, InvalidField)
        assert bad.param == "word"

    asyncio.run(run())


def test_deadlines_before_and_while_waiting(telemetry: Telemetry) -> None:
    async def run() -> None:
        caller = Caller(telemetry, replicas={"Model": 1})
        with pytest.raises(DeadlinePassed, match="before the request was sent to the model"):
            await caller.call("a", timeout_s=-1)
        with pytest.raises(DeadlinePassed, match="while waiting for the model"):
            await caller.call("hang", timeout_s=0.01)

    asyncio.run(run())


def test_a_stage_without_a_replica_is_503_and_one_with_a_replica_is_waited_for(telemetry: Telemetry) -> None:
    async def run() -> None:
        with pytest.raises(NoReplicaReady, match="no replica of the model is ready"):
            await Caller(telemetry).call("hang", timeout_s=5)
        with pytest.raises(DeadlinePassed):
            await Caller(telemetry, replicas={"Model": 1}).call("hang", timeout_s=0.1)

    asyncio.run(run())


def test_a_call_that_nobody_waits_for_is_cancelled_in_the_stage(telemetry: Telemetry) -> None:
    async def run() -> None:
        caller = Caller(telemetry, replicas={"Model": 1})
        waiting = asyncio.ensure_future(caller.call("hang"))
        await caller.stage.running.wait()
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        for _ in range(10):
            await asyncio.sleep(0)
        assert caller.stage.was_cancelled

    asyncio.run(run())


def test_one_of_a_shared_call_is_forgotten(telemetry: Telemetry) -> None:
    async def run() -> None:
        caller = Caller(telemetry, streams=True, replicas={"Model": 1})
        calls = [asyncio.ensure_future(caller.call(text)) for text in ("hang", "b")]
        await caller.stage.running.wait()
        calls[1].cancel()
        for _ in range(10):
            await asyncio.sleep(0)
        assert len(caller.stage.forgotten) == 1
        calls[0].cancel()

    asyncio.run(run())


def test_a_call_that_serve_cancelled_is_a_client_that_hung_up(telemetry: Telemetry) -> None:
    async def run() -> None:
        caller = Caller(telemetry)
        caller.handle.error = RequestCancelledError("1")
        with pytest.raises(Cancelled, match="the call to the model was cancelled"):
            await caller.call("a")

    asyncio.run(run())
