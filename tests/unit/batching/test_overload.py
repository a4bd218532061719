"""More arrives than the device can do: what is refused, when, and what is left of its throughput."""

from __future__ import annotations

import asyncio
import random

import pytest

from deployments.batching.cost import RunCost
from deployments.batching.entry import BatchEntry
from deployments.batching.planner import BatchPlanner, GateLimits
from deployments.errors import DeadlinePassed
from deployments.messages import Share
from tests.support.device import Device, settle, timed_device
from tests.support.virtual_time import now_ns, run, virtual

MS, S = 10**6, 10**9


@virtual
async def test_what_cannot_be_done_in_time_is_refused_before_it_waits() -> None:
    device = timed_device(max_batch_size=1)
    device.submit("runs")
    await device.start()
    device.submit("first")
    await settle()
    # The rest of a run, the one that waits and its own: 120 ms, and a quarter in reserve.
    with pytest.raises(DeadlinePassed) as refused:
        await device.submit("late", deadline_ns=now_ns() + 149 * MS)
    assert refused.value.message == (
        "the deadline would pass in the queue: it passes in 149 ms, and the model needs about 150 ms for what is ahead "
        "and for this request"
    )
    assert refused.value.retry_after_s == 1
    assert device.gate.depth == 1
    in_time = device.submit("in time", deadline_ns=now_ns() + 151 * MS)
    await settle()
    assert (device.gate.depth, in_time.done()) == (2, False)


@virtual
async def test_an_idle_device_tries_what_it_may_not_manage() -> None:
    """The estimate may be too high, and only runs correct it."""
    device = timed_device()
    (error,) = await device.submit("a", deadline_ns=now_ns() + 20 * MS)
    assert isinstance(error, DeadlinePassed)
    rejected = 0
    while not device.ready() and rejected < 100:
        device.submit("b", deadline_ns=now_ns() + 20 * MS)
        await settle()
        rejected += 1
    assert rejected == 14, "each lowers the estimate by a twentieth"


@virtual
async def test_rejections_under_load_do_not_change_the_cost() -> None:
    device = timed_device(max_batch_size=1)
    before = device.gate.planner.cost.estimate(1)
    device.submit("runs")
    await device.start()
    device.submit(*(f"late {number}" for number in range(50)), deadline_ns=now_ns() + 10 * S)
    device.submit("last")
    await settle()
    await asyncio.sleep(9.99)
    for expected in ("late 0", "last"):
        await device.end()
        assert await device.start() == [expected]
    assert device.gate.planner.cost.estimate(1) == before


@virtual
async def test_a_tenants_place_in_the_queue_counts_not_its_length() -> None:
    device = timed_device(max_batch_size=1)
    device.submit_entries([BatchEntry("runs", 1, 2**62, share=Share("big"))])
    await device.start()
    for number in range(40):
        device.submit_entries([BatchEntry(f"big {number}", 1, 2**62, share=Share("big"))])
    await settle()
    deadline_ns = now_ns() + 300 * MS
    with pytest.raises(DeadlinePassed):
        await device.submit_entries([BatchEntry("one more", 1, deadline_ns, share=Share("big"))])
    small = device.submit_entries([BatchEntry("small", 1, deadline_ns, share=Share("small"))])
    await settle()
    assert not small.done()


@pytest.mark.parametrize(
    ("run_ms", "token_us", "tokens"),
    [
        (1, 100, 2490),  # 249 ms of tokens
        (0.1, 1, 8192),  # as configured: 8 ms
        (100, 100, 4000),  # the fixed cost is a fifth
        (1000, 1000, 4000),
    ],
)
def test_a_run_is_bounded_in_time(run_ms: float, token_us: float, tokens: int) -> None:
    planner: BatchPlanner = BatchPlanner(GateLimits(10_000, 8192, 0, 10_000, max_run_ms=250))
    planner.cost = RunCost(run_ms * 1e6, token_us * 1e3)
    assert planner.max_batch_tokens == tokens


@pytest.mark.parametrize("slower", [0.9, 1.0, 1.2])
@pytest.mark.parametrize("times", [1.5, 10])
def test_most_of_the_capacity_is_left_whatever_arrives(times: float, slower: float) -> None:
    done, late = run(flooded(times, slower))
    assert done >= 0.9 * 30 * 1000 / (42 * slower)
    assert late <= 0.04 * done


async def flooded(times: float, slower: float) -> tuple[int, int]:
    """Send inputs of 40 ms, with deadlines of 2 s, for 30 s: how many were done in time, and how many late.

    Args:
        times: what arrives, in times of what the device can do.
        slower: what runs take, in times of what is expected.
    """
    device = Device(clock=now_ns, max_batch_size=8, max_batch_tokens=10_000, max_queue=1000)
    gate, chance = device.gate, random.Random(1)
    gate.planner.cost = RunCost(2 * MS, 0.4 * MS)
    done = late = 0

    async def runs() -> None:
        while True:
            batch = await gate.next_batch()
            if batch.present:
                gate.begin(batch)
                took_ns = slower * chance.uniform(0.8, 1.2) * (2 * MS + 40 * MS * len(batch.present))
                await asyncio.sleep(took_ns / 1e9)
                gate.planner.observe(gate.planner.padded_tokens(batch.present), took_ns)
                for entry in batch.present:
                    entry.deliver("done")
            gate.end(batch)

    async def ask() -> None:
        nonlocal done, late
        deadline_ns = now_ns() + 2 * S
        try:
            (result,) = await gate.submit([BatchEntry("x", 100, deadline_ns)])
        except DeadlinePassed:
            return
        if result == "done":
            done, late = done + (now_ns() <= deadline_ns), late + (now_ns() > deadline_ns)

    worker = asyncio.ensure_future(runs())
    asked = []
    for _ in range(round(30 * 25 * times)):
        asked.append(asyncio.ensure_future(ask()))
        await asyncio.sleep(chance.expovariate(25 * times))
    await asyncio.gather(*asked)
    worker.cancel()
    return done, late
