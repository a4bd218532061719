"""The gate's rules, with a device and a clock that the test controls."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.batching.cost import RunCost
from deployments.batching.entry import BatchEntry
from deployments.errors import DeadlinePassed, QueueFull
from tests.support.device import FOREVER, Device, settle, timed_device
from tests.support.virtual_time import now_ns, virtual


@virtual
async def test_a_free_device_runs_an_input_at_once() -> None:
    device = Device()
    answer = device.submit("a")

    assert await device.start() == ["a"]
    assert (device.gate.depth, device.gate.running) == (0, 1)
    await device.end()
    assert await answer == ["done a"]
    assert device.gate.running == 0


@virtual
async def test_inputs_waiting_for_a_busy_device_form_the_next_batch() -> None:
    device = Device()
    answers = [device.submit("a")]
    await device.start()
    answers += [device.submit(name) for name in "bcdef"]
    await settle()
    assert device.gate.depth == 5
    await device.end()
    assert await device.start() == ["b", "c", "d", "e"]
    assert (device.runs[-1].reason, device.runs[-1].queue_behind) == ("full", 1)
    await device.end()
    assert await device.start() == ["f"]
    assert device.runs[-1].reason == "device_idle"
    await device.end()
    assert [(await answer)[0] for answer in answers] == [f"done {name}" for name in "abcdef"]


@virtual
async def test_padded_tokens_limit_a_batch_and_an_oversized_input_runs_alone() -> None:
    device = Device(max_batch_tokens=20)
    device.submit("first")
    await device.start()
    for name, tokens in (("a", 5), ("b", 8), ("c", 5), ("huge", 50), ("d", 1)):
        device.submit(name, tokens=tokens)
    await settle()
    await device.end()
    assert await device.start() == ["a", "b"]
    assert device.runs[-1].reason == "token_budget"
    await device.end()
    assert await device.start() == ["c"]
    await device.end()
    assert await device.start() == ["huge"]
    await device.end()
    assert await device.start() == ["d"]
    await device.end()


@virtual
async def test_the_wait_is_split_exactly_into_busy_and_fill_time() -> None:
    device = Device()
    device.submit("a")
    await device.start()
    device.now_ns = 10
    device.submit("b")
    await settle()
    device.now_ns = 50
    await device.end()
    device.now_ns = 53
    await device.start()
    (b,) = device.runs[-1].entries

    assert (b.wait_ns, b.busy_wait_ns, b.fill_wait_ns) == (43, 40, 3)
    await device.end()


@virtual
async def test_a_cancelled_input_leaves_the_queue_and_never_runs() -> None:
    device = Device()
    device.submit("a")
    await device.start()
    gone, stays = device.submit("gone"), device.submit("stays")
    await settle()
    gone.cancel()
    await settle()
    assert device.gate.depth == 1
    await device.end()
    assert await device.start() == ["stays"]
    await device.end()
    assert await stays == ["done stays"]


@virtual
async def test_inputs_cancelled_between_release_and_run_free_the_device() -> None:
    device = Device()
    gone = device.submit("gone")
    await settle()
    assert device.gate.running == 1
    gone.cancel()
    await settle()
    assert device.gate.running == 0
    device.submit("next")
    assert await device.start() == ["next"]
    await device.end()


@virtual
async def test_cancelling_in_the_same_tick_as_the_release_is_safe() -> None:
    device = Device()
    first = device.submit("first")
    await device.start()
    waiting = device.submit("waiting")
    await settle()
    waiting.cancel()
    await device.end()
    assert (await first, device.gate.depth, device.gate.running) == (["done first"], 0, 0)


@virtual
async def test_a_cancelled_running_input_keeps_the_device_busy_until_the_run_ends() -> None:
    device = Device()
    gone = device.submit("gone")
    await device.start()
    device.submit("next")
    gone.cancel()
    await settle()
    assert (device.gate.depth, device.gate.running) == (1, 1)
    await device.end()
    assert await device.start() == ["next"]
    await device.end()


@virtual
async def test_a_request_cancelled_before_its_inputs_begin_to_wait_leaves_no_state() -> None:
    for busy in (False, True):
        device = Device()
        if busy:
            device.submit("first")
            await device.start()
        gone = device.submit("gone")
        # Between the tick in which the request is queued and the one in which its inputs begin to wait.
        asyncio.get_running_loop().call_soon(gone.cancel)
        await settle()
        if busy:
            await device.end()
        assert (device.gate.depth, device.gate.running) == (0, 0)
        device.submit("next")
        assert await device.start() == ["next"]
        await device.end()


@virtual
async def test_an_input_that_never_ran_has_its_wait_times() -> None:
    device = Device()
    device.submit("a")
    device.now_ns = 5
    await device.start()
    item = BatchEntry("b", 1, FOREVER)
    device.now_ns = 10
    waiting = asyncio.ensure_future(device.gate.submit([item]))
    await settle()
    device.now_ns = 40
    waiting.cancel()
    await settle()
    assert (item.wait_ns, item.busy_wait_ns, item.fill_wait_ns) == (30, 30, 0)
    await device.end()


@virtual
async def test_an_input_past_its_deadline_is_discarded_when_the_batch_is_formed() -> None:
    device = Device()
    device.submit("a")
    await device.start()
    late, fine = device.submit("late", deadline_ns=30_000_000), device.submit("fine")
    await settle()
    device.now_ns = 30_000_000
    await device.end()
    assert await device.start() == ["fine"]
    await device.end()
    (error,) = await late
    assert isinstance(error, DeadlinePassed)
    assert error.message == "the deadline passed after 30 ms in the queue, before the model ran"
    assert await fine == ["done fine"]


@virtual
async def test_a_full_queue_rejects_the_whole_request() -> None:
    device = Device(max_queue=3)
    device.submit("a")
    await device.start()
    device.submit("b", "c")
    await settle()
    with pytest.raises(QueueFull, match="the queue holds 2 inputs of at most 3, and this request adds 2") as refused:
        await device.gate.submit([BatchEntry("d", 1, FOREVER), BatchEntry("e", 1, FOREVER)])
    assert refused.value.retry_after_s == 1
    assert device.gate.depth == 2
    await device.end()


@virtual
async def test_retry_after_follows_the_rate_of_the_device() -> None:
    device = Device(max_queue=4, max_batch_size=1)
    device.submit(*"abcd")
    for _ in range(2):
        await device.start()
        device.now_ns += 2_000_000_000
        await device.end()
    device.submit(*"ef")
    await device.start()
    device.submit("g")
    await settle()
    with pytest.raises(QueueFull) as refused:
        await device.gate.submit([BatchEntry("h", 1, FOREVER)])
    # Four inputs are or would be waiting, at one every two seconds.
    assert refused.value.retry_after_s == 2 * device.gate.depth


@virtual
async def test_an_idle_device_waits_at_most_max_wait_ms_for_a_batch_to_fill() -> None:
    device = Device(clock=now_ns, max_wait_ms=20)
    loop = asyncio.get_running_loop()
    start = loop.time()
    answer = device.submit("a")
    await settle()
    assert device.gate.depth == 1
    while not device.ready():
        await asyncio.sleep(0.001)
    assert loop.time() - start >= 0.02
    assert await device.start() == ["a"]
    assert device.runs[-1].reason == "timeout"
    await device.end()
    await answer


@virtual
async def test_a_full_batch_does_not_wait() -> None:
    device = Device(max_wait_ms=60_000, max_batch_size=2)
    device.submit("a", "b")
    assert await device.start() == ["a", "b"]
    await device.end()
    device.submit("c")
    await settle()
    assert (device.gate.depth, device.ready()) == (1, [])


@virtual
async def test_a_near_deadline_ends_the_fill_wait() -> None:
    device = Device(clock=now_ns, max_wait_ms=60_000)
    device.gate.planner.cost = RunCost(run_ns=50e6, token_ns=1)
    device.submit("a", deadline_ns=now_ns() + 60_000_000)
    assert await asyncio.wait_for(first_run(device), 5) == ["a"]
    assert device.runs[-1].reason == "deadline"
    await device.end()


async def first_run(device: Device) -> list[str]:
    await settle()
    while not device.ready():
        await asyncio.sleep(0.001)
    return await device.start()


@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=40),
    max_size=st.integers(1, 8),
    budget=st.integers(1, 120),
)
def test_no_input_is_lost_reordered_or_over_the_limits(sizes: Sequence[int], max_size: int, budget: int) -> None:
    async def run() -> None:
        device = Device(max_batch_size=max_size, max_batch_tokens=budget)
        answers = [device.submit(str(i), tokens=tokens) for i, tokens in enumerate(sizes)]
        order: list[str] = []
        while len(order) < len(sizes):
            order += await device.start()
            items = device.runs[-1].entries
            padded = max(item.tokens for item in items) * len(items)
            assert len(items) <= max_size
            assert padded <= budget or len(items) == 1
            device.now_ns += 7
            await device.end()
        assert order == [str(i) for i in range(len(sizes))]
        assert [(await answer)[0] for answer in answers] == [f"done {i}" for i in range(len(sizes))]
        for item in (entry for batch in device.runs for entry in batch.entries):
            assert item.busy_wait_ns + item.fill_wait_ns == item.wait_ns >= item.busy_wait_ns >= 0

    asyncio.run(run())


@virtual
async def test_only_one_full_batch_is_released_while_the_device_runs() -> None:
    device = Device(max_batch_size=2)
    device.submit("a")
    await device.start()
    for name in "bcdef":
        device.submit(name)
    await settle()
    # b and c are released, but count as waiting until they run.
    assert device.ready() == ["b", "c"]
    assert (device.gate.depth, device.gate.running) == (5, 1)
    await device.end()
    assert await device.start() == ["b", "c"]
    await settle()
    assert device.ready() == ["d", "e"]
    assert device.runs[-1].queue_behind == 3
    await device.end()
    await device.start()
    await device.end()
    # f is not a full batch, so it waited for the device.
    assert await device.start() == ["f"]
    await device.end()


@virtual
async def test_waiting_inputs_are_ready_shortly_before_the_run_is_expected_to_end() -> None:
    device = timed_device()
    device.submit("a")
    await device.start()
    device.submit("b")
    await asyncio.sleep(0.0355)
    device.submit("c")
    assert device.ready() == []
    await asyncio.sleep(0.001)
    assert device.ready() == ["b", "c"]
    device.submit("d")
    await settle()
    # Ready is not running: b and c wait for the device until it takes them.
    assert (device.ready(), device.gate.depth, device.gate.running) == (["b", "c"], 3, 1)
    await asyncio.sleep(0.0025)
    await device.end()
    assert await device.start() == ["b", "c"]
    assert device.runs[-1].reason == "device_idle"
    assert [round(entry.busy_wait_ns / 1e6, 1) for entry in device.runs[-1].entries] == [39.0, 3.5]
    assert all(entry.fill_wait_ns == 0 for entry in device.runs[-1].entries)
    await device.end()


@virtual
async def test_a_run_that_takes_longer_than_expected_lets_the_next_batch_grow() -> None:
    device = timed_device()
    device.submit("a")
    await device.start()
    await asyncio.sleep(0.05)
    for name in "bcd":
        device.submit(name)
        await asyncio.sleep(0.05)
    assert device.ready() == []
    await device.end()
    assert await device.start() == ["b", "c", "d"]
    await device.end()


@virtual
async def test_a_batch_that_starts_before_the_last_end_is_reported_keeps_its_own_time() -> None:
    device = timed_device()
    device.submit("a")
    await device.start()
    device.submit("b")
    await asyncio.sleep(0.039)
    # The device thread takes the next batch itself, so the event loop learns of its start first.
    assert device.start_next() == ["b"]
    await device.end()
    device.submit("c")
    await asyncio.sleep(0.035)
    assert device.ready() == []
    await asyncio.sleep(0.002)
    assert device.ready() == ["c"]
    await device.end()


@virtual
async def test_a_recent_arrival_still_waits_for_a_batch_to_fill() -> None:
    device = timed_device(max_wait_ms=10)
    for arrives_at_s, is_ready in ((0.001, True), (0.03, False)):
        device.submit("a")
        await asyncio.sleep(0.011)
        await device.start()
        await asyncio.sleep(arrives_at_s)
        device.submit("b")
        await asyncio.sleep(0.0395 - arrives_at_s)
        assert device.ready() == (["b"] if is_ready else [])
        await device.end()
        await asyncio.sleep(0.011)
        assert await device.start() == ["b"]
        assert device.runs[-1].reason == "timeout"
        await device.end()


@virtual
async def test_an_input_cancelled_in_the_ready_batch_is_removed_before_it_runs() -> None:
    device = Device(max_batch_size=2)
    device.submit("a")
    await device.start()
    gone, stays = device.submit("gone"), device.submit("stays")
    await settle()
    gone.cancel()
    await settle()
    assert device.ready() == ["stays"]
    await device.end()
    assert await device.start() == ["stays"]
    await device.end()
    assert await stays == ["done stays"]
