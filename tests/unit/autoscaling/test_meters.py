"""What replicas report about their load."""

from __future__ import annotations

import asyncio

import pytest

from deployments.autoscaling.meters import BatchQueueMeter, DecayingRate, EventLoopMeter, GenerationMeter
from deployments.batching.cost import RunCost
from deployments.batching.generation.step_cost import StepCost
from tests.support.device import Device, settle


class Clock:
    s = 100.0

    def __call__(self) -> float:
        return self.s


@pytest.mark.parametrize("seconds", [1, 5, 60])
def test_the_rate_of_a_steady_stream_is_correct_from_the_start(seconds: int) -> None:
    clock = Clock()
    rate = DecayingRate(clock, memory_s=5)
    for _ in range(seconds * 100):
        clock.s += 0.01
        rate.add(0.07)

    assert rate.per_second() == pytest.approx(7, rel=0.02)


def test_past_arrivals_decay() -> None:
    clock = Clock()
    rate = DecayingRate(clock, memory_s=5)
    clock.s += 60
    rate.add(100)
    at_once = rate.per_second()
    clock.s += 5

    assert at_once == pytest.approx(20, rel=0.01)
    assert rate.per_second() == pytest.approx(20 / 2.718, rel=0.01)


def test_a_first_event_is_not_taken_for_a_burst() -> None:
    rate = DecayingRate(Clock(), memory_s=5)
    rate.add(1)

    assert rate.per_second() < 3


def busy_gate(device: Device) -> BatchQueueMeter:
    """10 ms per run and 1 ms per token: a full batch of 10-token inputs takes 50 ms."""
    device.gate.planner.cost = RunCost(run_ns=10e6, token_ns=1e6)
    return BatchQueueMeter(device.gate, 0.0, Clock())


def test_the_queue_is_measured_at_the_rate_of_full_batches() -> None:
    async def run() -> None:
        device = Device(max_batch_tokens=1000)
        meter = busy_gate(device)
        meter.arrive((10,))
        device.submit("a", tokens=10)
        await device.start()
        meter.arrive((10,) * 8)
        device.submit(*"bcdefghi", tokens=10)
        await settle()
        report = meter.report()

        assert report.queue_depth == 8
        assert report.queue_wait_ms == pytest.approx(100)
        assert report.throughput == pytest.approx(80)
        # Nine inputs at once, at a capacity of 80 per second.
        assert report.demand > 0.1
        assert report.demand_now > report.demand

    asyncio.run(run())


def test_long_inputs_are_weighted_by_their_cost() -> None:
    async def run() -> None:
        meter = busy_gate(Device(max_batch_tokens=1000))
        meter.arrive((10,) * 4)
        short = meter.report()
        meter = busy_gate(Device(max_batch_tokens=1000))
        meter.arrive((200,) * 4)
        long = meter.report()

        assert long.demand / short.demand == pytest.approx(810 / 50, rel=0.05)
        assert long.throughput == pytest.approx(4 / 0.81, rel=0.01)

    asyncio.run(run())


def test_a_stage_reports_the_load_of_its_event_loop() -> None:
    meter = EventLoopMeter(0.0)
    meter.report()
    with meter.requests(3):
        sum(range(3_000_000))
        report = meter.report()
    after = meter.report()

    assert report.queue_depth == 3
    assert report.oldest_age_ms > 0
    assert report.demand > 0
    assert report.queue_wait_ms == pytest.approx(3 * 1e3 / report.throughput, rel=0.01)
    assert (after.queue_depth, after.oldest_age_ms) == (0, 0)


def test_an_idle_stage_has_no_demand_and_keeps_its_last_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work between requests counts for neither: it would keep a replica running and make it look slow."""
    meter = EventLoopMeter(0.0)
    meter.report()
    with meter.requests(3):
        sum(range(3_000_000))
        busy = meter.report()
    monkeypatch.setattr("deployments.autoscaling.meters._IDLE_S", -1.0)
    sum(range(1_000_000))
    idle = meter.report()

    assert (idle.demand, idle.demand_now) == (0, 0)
    assert idle.throughput == busy.throughput > 0


def generations(clock: Clock, max_sequences: int = 4) -> GenerationMeter:
    """20 ms a step, 5 for each sequence that decodes, 1 for each token of a prompt: 10 ms a token in full steps."""
    return GenerationMeter(StepCost(20e6, 5e6, 1e6), max_sequences, 0.0, clock)


def test_a_generation_waits_when_all_places_are_taken() -> None:
    meter = generations(Clock())
    for number in range(6):
        assert meter.queue_wait_ms() == pytest.approx(0 if number < 4 else (number - 3) * 600)
        # 100 ms of prompt, and 50 tokens at 10 ms.
        meter.queued(prompt=100, max_tokens=50)
    for _ in range(6):
        meter.left(prompt=100, max_tokens=50)
    assert meter.queue_wait_ms() == 0


def test_how_much_of_its_maximum_a_generation_uses_is_learned() -> None:
    meter = generations(Clock())
    for _ in range(100):
        meter.finished(max_tokens=500, tokens=50)
    for _ in range(5):
        meter.queued(prompt=0, max_tokens=500)
    assert meter.queue_wait_ms() == pytest.approx(2 * 500, rel=0.01)


def test_arriving_generations_are_reported_in_seconds_of_the_device() -> None:
    clock = Clock()
    meter = generations(clock)
    for _ in range(600):
        clock.s += 0.05
        meter.arrive(choices=1, prompt=10, max_tokens=5)
    report = meter.report(waiting=3, oldest_age_ms=40.0)
    assert report.demand == pytest.approx(1.2, rel=0.05)
    assert report.demand_now == pytest.approx(1.2, rel=0.1)
    assert report.throughput == pytest.approx(1 / 0.06, rel=0.05)
    assert (report.queue_depth, report.oldest_age_ms) == (3, 40.0)
    assert report.is_credible


def test_the_report_has_the_form_that_serve_accepts() -> None:
    stats = EventLoopMeter(0.0).report().stats()

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
