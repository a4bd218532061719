"""A batch from its release to its end, with an engine that the test controls."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deployments.batching import watch
from deployments.batching.entry import BatchEntry
from deployments.batching.gate import AdmissionGate
from deployments.batching.planner import GateLimits
from deployments.config import AppConfig
from deployments.engine.protocol import Memory, OutOfMemory, Phase, Run, WarmUp
from deployments.errors import InternalError
from deployments.messages import Carrier, Envelope, Ids
from deployments.stages.batch_runner import BatchRunner, RunFailed
from deployments.telemetry.recorder import Telemetry
from deployments.telemetry.records import PredictRecord, RunInput
from tests.support.local import PLACEMENT, run_directly

UNSAMPLED = Carrier("00-" + "c" * 32 + "-" + "d" * 16 + "-00")


class Engine:
    """Doubles the first id of each input. Fails on the ids in ``bad``; runs wait while ``hold`` is not set."""

    device = "cpu"
    pad_to_multiple_of = 1

    def __init__(self) -> None:
        self.bad: dict[int, Exception] = {}
        self.broken: str | None = None
        self.hold = threading.Event()
        self.hold.set()
        self.runs: list[list[int]] = []
        self.warm_up = WarmUp(((1, 1e6), (100, 2e6)))

    def load(self, phase: Phase) -> WarmUp:
        with phase("weights"):
            pass
        return self.warm_up

    def collate(self, batch: Sequence[Ids]) -> list[int]:
        return [int(ids[0]) for ids in batch]

    def run(self, collated: list[int]) -> Run:
        self.hold.wait()
        self.runs.append(collated)
        for first in collated:
            if first in self.bad:
                raise self.bad[first]
        return Run([2 * first for first in collated], 1.0, len(collated), (len(collated),))

    def memory(self) -> Memory | None:
        return Memory(1.0, 2.0)


class Replica:
    def __init__(self, directory: Path) -> None:
        config = AppConfig.parse({"telemetry": {"directory": str(directory)}})
        self.engine = Engine()
        self.gate: AdmissionGate[RunInput] = AdmissionGate(GateLimits(8, 1000, 0, 100))
        self.telemetry = Telemetry("model", config, "model", PLACEMENT.identity)
        self.runner = BatchRunner(self.engine, self.gate, self.telemetry, 8, run_directly)

    async def submit(self, *firsts: int) -> list[Any]:
        self.runner.start()
        record = PredictRecord(Envelope(UNSAMPLED, "id", time.monotonic_ns(), time.monotonic_ns() + 10**15))
        inputs = [RunInput(record, np.array([first], dtype=np.int32)) for first in firsts]
        return await self.gate.submit([BatchEntry(one, 1, record.deadline_ns) for one in inputs])


@contextmanager
def replica(directory: Path) -> Iterator[Replica]:
    made = Replica(directory)
    yield made
    made.runner.close()
    made.telemetry.close()


def test_results_are_delivered_in_order(tmp_path: Path) -> None:
    with replica(tmp_path) as made:
        assert asyncio.run(made.submit(1, 2, 3)) == [2, 4, 6]
        assert made.engine.runs == [[1, 2, 3]]


def test_an_input_that_fails_is_isolated_by_halving(tmp_path: Path) -> None:
    with replica(tmp_path) as made:
        made.engine.bad[3] = ValueError("bad")
        outcomes = asyncio.run(made.submit(1, 2, 3, 4))

        assert outcomes[:2] + outcomes[3:] == [2, 4, 8]
        assert isinstance(outcomes[2], RunFailed)
        assert isinstance(outcomes[2].__cause__, ValueError)
        assert made.engine.runs == [[1, 2, 3, 4], [1, 2], [3, 4], [3], [4]]


def test_a_broken_device_fails_all_at_once(tmp_path: Path) -> None:
    with replica(tmp_path) as made:
        made.engine.bad[1], made.engine.broken = RuntimeError("device"), "illegal access"
        outcomes = asyncio.run(made.submit(1, 2))

        assert [type(outcome) for outcome in outcomes] == [RunFailed, RunFailed]
        assert len(made.engine.runs) == 1


def test_a_run_that_does_not_end_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "_STUCK_NS", 0)
    monkeypatch.setattr(watch, "_HUNG_NS", 0)
    # The engine's warm-up expects 1 ms for a run: stuck after 10 ms, broken after 20.
    with replica(tmp_path) as made:
        made.runner.load()
        made.engine.hold.clear()

        def problem() -> str | None:
            return made.runner.broken

        async def hold() -> None:
            call = asyncio.ensure_future(made.submit(1))
            while not made.runner.is_stuck:
                await asyncio.sleep(0.001)
            while problem() is None:
                await asyncio.sleep(0.001)
            assert "a run has not ended in" in str(problem())
            made.engine.hold.set()
            assert await call == [2]
            assert not made.runner.is_stuck
            assert problem() is None

        asyncio.run(asyncio.wait_for(hold(), 20))


def test_out_of_memory_lowers_the_limit(tmp_path: Path) -> None:
    with replica(tmp_path) as made:
        made.engine.bad[1] = OutOfMemory("full")
        asyncio.run(made.submit(1, 2, 3, 4))

        assert made.gate.planner.max_batch_tokens < 1000


def test_a_warm_up_that_did_not_fit_lowers_the_limit_from_the_start(tmp_path: Path) -> None:
    with replica(tmp_path) as made:
        made.engine.warm_up = WarmUp(((1, 1e6), (100, 2e6)), too_large=600)
        record = made.runner.load()

        assert made.gate.planner.max_batch_tokens == 300
        assert made.gate.planner.cost.run_ns == pytest.approx(1e6, rel=0.02)
        assert (record.device, record.memory_allocated_gb, record.memory_reserved_gb) == ("cpu", 1.0, 2.0)


def test_a_batch_whose_callers_are_all_gone_is_not_run(tmp_path: Path) -> None:
    async def run(made: Replica) -> None:
        made.engine.hold.clear()
        first = asyncio.ensure_future(made.submit(1))
        while not made.gate.is_busy:
            await asyncio.sleep(0.001)
        # A full batch, so it is released while the first still runs.
        gone = asyncio.ensure_future(made.submit(*range(2, 10)))
        await asyncio.sleep(0.01)
        gone.cancel()
        await asyncio.sleep(0.01)
        made.engine.hold.set()
        assert await first == [2]
        assert await made.submit(20) == [40]

    with replica(tmp_path) as made:
        asyncio.run(run(made))
        assert made.engine.runs == [[1], [20]]


def test_a_batch_loses_those_who_are_gone_before_it_runs(tmp_path: Path) -> None:
    async def run(made: Replica) -> None:
        made.engine.hold.clear()
        first = asyncio.ensure_future(made.submit(1))
        while not made.gate.is_busy:
            await asyncio.sleep(0.001)
        gone = asyncio.ensure_future(made.submit(*range(2, 6)))
        stays = asyncio.ensure_future(made.submit(*range(6, 10)))
        await asyncio.sleep(0.01)
        gone.cancel()
        await asyncio.sleep(0.01)
        made.engine.hold.set()
        assert await first == [2]
        assert await stays == [12, 14, 16, 18]

    with replica(tmp_path) as made:
        asyncio.run(run(made))
        assert made.engine.runs == [[1], [6, 7, 8, 9]]


def test_an_error_of_ours_fails_the_batch_and_not_the_replica(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with replica(tmp_path) as made:
        monkeypatch.setattr(made.telemetry, "run_ends", lambda *_: 1 / 0)

        async def run() -> None:
            (outcome,) = await made.submit(1)
            assert isinstance(outcome, InternalError)
            monkeypatch.undo()
            assert await made.submit(2) == [4]

        asyncio.run(run())
        assert "a batch of 1 failed" in caplog.text


def test_a_runner_without_its_workers_or_its_device_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run(made: Replica) -> None:
        assert await made.submit(1) == [2]
        assert made.runner.broken is None
        made.engine.broken = "illegal access"
        assert made.runner.broken == "the device can no longer be used: illegal access"
        made.engine.broken = None
        monkeypatch.setattr(made.gate, "end", lambda _: 1 / 0)
        assert await made.submit(2) == [4]
        await asyncio.sleep(0)
        assert made.runner.broken == "a worker that runs batches has stopped"

    with replica(tmp_path) as made:
        asyncio.run(run(made))
