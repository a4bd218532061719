"""The thread that runs steps, with the fake engine."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from deployments.batching import watch
from deployments.batching.generation.steps import Sequence
from deployments.config import AppConfig
from deployments.engine.generation.fake import FakeGenerator
from deployments.messages import Sampling
from deployments.stages.generation.step_runner import Report, StepReport, StepRunner
from deployments.telemetry.recorder import Telemetry
from tests.support.local import PLACEMENT


def test_a_step_that_does_not_end_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "_STUCK_NS", 0)
    monkeypatch.setattr(watch, "_HUNG_NS", 0)
    hold = tmp_path / "hold"
    fake = {"hold_path": str(hold), "base_ms": 1}
    config = AppConfig.parse(
        {
            "model": {"engine": "fake", "task": "text-generation", "fake": fake},
            "telemetry": {"directory": str(tmp_path)},
        }
    )
    telemetry = Telemetry("model", config, "model", PLACEMENT.identity)
    reports: list[Report] = []
    engine = FakeGenerator(config.model.fake, config.generation)
    runner = StepRunner(engine, telemetry, config.generation, reports.append)
    runner.load()

    def problem() -> str | None:
        return runner.broken

    async def run() -> None:
        runner.start()
        hold.touch()
        runner.submit(Sequence(1, [5, 6, 7], 2), Sampling())
        while not runner.is_stuck:
            await asyncio.sleep(0.001)
        while problem() is None:
            await asyncio.sleep(0.001)
        assert "a run has not ended in" in str(problem())
        hold.unlink()
        while not any(isinstance(report, StepReport) and report.finished for report in reports):
            await asyncio.sleep(0.001)
        assert not runner.is_stuck
        assert problem() is None
        runner.close()

    asyncio.run(asyncio.wait_for(run(), 20))
    telemetry.close()
