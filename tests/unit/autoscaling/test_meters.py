"""What replicas report of their load."""

from __future__ import annotations

import asyncio

import pytest

from deployments.autoscaling.meters import Forgetting, GateLoad, LoopLoad
from deployments.batching.gate import AdmissionGate
from deployments.batching.planner import GateLimits, Item


class Clock:
    s = 100.0

    def __call__(self) -> float:
        return self.s


@pytest.mark.parametrize("seconds", [1, 5, 60])
def test_an_even_stream_has_its_rate_from_the_start(seconds: int) -> None:
    clock = Clock()
    rate = Forgetting(clock, memory_s=5)
    for _ in range(seconds * 100):
        clock.s += 0.01
        rate.add(0.07)

    assert rate.per_second() == pytest.approx(7, rel=0.02)


def test_what_came_is_forgotten() -> None:
    clock = Clock()
    rate = Forgetting(clock, memory_s=5)
    clock.s += 60
    rate.add(100)
    at_once = rate.per_second()
    clock.s += 5

    assert at_once == pytest.approx(20, rel=0.01)
    assert rate.per_second() == pytest.approx(20 / 2.718, rel=0.01)


def test_the_first_moment_is_no_flood() -> None:
    rate = Forgetting(Clock(), memory_s=5)
    rate.add(1)

    assert rate.per_second() < 3


async def _hold_gate() -> tuple[AdmissionGate[None], GateLoad, asyncio.Event]:
    gate: AdmissionGate[None]
    release = asyncio.Event()

    async def execute(item: Item[None]) -> None:
        gate.begin([item])
        await release.wait()
        gate.end([item])

    gate = AdmissionGate(GateLimits(max_batch_size=4, max_batch_tokens=1000, max_wait_ms=0, max_queue=100), execute)
    # 10 ms a run and 1 ms a token: a full batch of inputs of 10 tokens takes 50 ms.
    gate.cutter.cost.run_ns, gate.cutter.cost.token_ns = 10e6, 1e6
    return gate, GateLoad(gate, 0.0), release


def test_the_queue_is_measured_at_the_rate_of_full_batches() -> None:
    async def run() -> None:
        gate, meter, release = await _hold_gate()
        meter.arrive((10,))
        submitted = [asyncio.create_task(gate.submit([Item(None, 10, 2**62)]))]
        await asyncio.sleep(0)
        meter.arrive((10,) * 8)
        submitted.append(asyncio.create_task(gate.submit([Item(None, 10, 2**62) for _ in range(8)])))
        await asyncio.sleep(0)
        load = meter.load()
        release.set()
        await asyncio.gather(*submitted)

        assert load.queue_depth == 8
        assert load.queue_wait_ms == pytest.approx(100)
        assert load.throughput == pytest.approx(80)
        # Nine inputs at once, where 80 a second can be run.
        assert load.demand > 0.1
        assert load.demand_now > load.demand

    asyncio.run(run())


def test_long_inputs_count_for_what_they_cost() -> None:
    async def run() -> None:
        _, meter, _ = await _hold_gate()
        meter.arrive((10,) * 4)
        short = meter.load()
        _, meter, _ = await _hold_gate()
        meter.arrive((200,) * 4)
        long = meter.load()

        assert long.demand / short.demand == pytest.approx(810 / 50, rel=0.05)
        assert long.throughput == pytest.approx(4 / 0.81, rel=0.01)

    asyncio.run(run())


def test_a_stage_reports_the_share_of_its_loop() -> None:
    meter = LoopLoad(0.0)
    meter.load()
    with meter.requests(3):
        sum(range(3_000_000))
        load = meter.load()
    after = meter.load()

    assert load.queue_depth == 3
    assert load.oldest_age_ms > 0
    assert load.demand > 0
    assert load.queue_wait_ms == pytest.approx(3 * 1e3 / load.throughput, rel=0.01)
    assert (after.queue_depth, after.oldest_age_ms) == (0, 0)


def test_an_idle_stage_has_no_demand_and_the_rate_that_it_had(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a process does between requests is neither: it would keep a replica, and look like a slow one."""
    meter = LoopLoad(0.0)
    meter.load()
    with meter.requests(3):
        sum(range(3_000_000))
        busy = meter.load()
    monkeypatch.setattr("deployments.autoscaling.meters._IDLE_S", -1.0)
    sum(range(1_000_000))
    idle = meter.load()

    assert (idle.demand, idle.demand_now) == (0, 0)
    assert idle.throughput == busy.throughput > 0


def test_the_report_is_what_serve_takes() -> None:
    stats = LoopLoad(0.0).load().stats()

    assert set(stats) == {
        "queue_depth",
        "oldest_age_ms",
        "queue_wait_ms",
        "demand",
        "demand_now",
        "throughput",
        "start_ms",
    }
    assert all(isinstance(value, int | float) for value in stats.values())
