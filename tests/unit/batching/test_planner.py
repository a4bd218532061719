"""Which inputs form a batch: similar lengths, deadlines, token limits and no starvation."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.batching.cost import RunCost
from deployments.batching.entry import BatchEntry
from deployments.errors import DeadlinePassed, QueueFull
from tests.support.device import FOREVER, Device, settle
from tests.support.virtual_time import virtual


@virtual
async def test_inputs_of_similar_length_run_together_and_the_oldest_first() -> None:
    device = Device(max_batch_size=8, max_batch_tokens=1000, grouping_window=8)
    device.gate.planner.cost = RunCost(run_ns=10, token_ns=1)
    device.submit("a")
    await device.start()
    for name, tokens in (("long", 90), ("s1", 5), ("s2", 6), ("long2", 88), ("s3", 5)):
        device.submit(name, tokens=tokens)
    await settle()
    await device.end()
    assert await device.start() == ["long", "long2"]
    assert device.runs[-1].reason == "device_idle"
    await device.end()
    assert await device.start() == ["s1", "s2", "s3"]
    await device.end()


@virtual
async def test_lengths_count_as_padded_by_the_engine() -> None:
    device = Device(max_batch_tokens=20, pad_to_multiple_of=8)
    device.submit("a")
    await device.start()
    for name in "bcd":
        device.submit(name, tokens=3)
    await settle()
    await device.end()
    assert await device.start() == ["b", "c"]
    assert device.gate.planner.padded_tokens(device.runs[-1].entries) == 16
    await device.end()


@virtual
async def test_an_input_that_cannot_meet_its_deadline_is_rejected_even_if_the_device_is_idle() -> None:
    device = Device()
    device.gate.planner.cost = RunCost(run_ns=50e6, token_ns=1)
    (error,) = await device.submit("late", deadline_ns=20_000_000)

    assert isinstance(error, DeadlinePassed)
    assert error.message == ("after 0 ms in the queue, 20 ms remain and the model needs about 50 ms; it was not run")
    assert (device.gate.depth, device.gate.running) == (0, 0)


@virtual
async def test_a_wrong_estimate_does_not_reject_inputs_forever() -> None:
    device = Device()
    device.gate.planner.cost = RunCost(run_ns=50e6, token_ns=1)
    refused = 0
    while device.gate.running == 0:
        answer = device.submit("again", deadline_ns=20_000_000)
        await settle()
        refused += answer.done()
    assert 10 < refused < 30


@virtual
async def test_a_batch_is_reduced_until_all_its_inputs_meet_their_deadlines() -> None:
    device = Device(max_batch_tokens=1000)
    device.gate.planner.cost = RunCost(run_ns=1, token_ns=1)
    device.submit("a")
    await device.start()
    device.submit("oldest", tokens=10)
    device.submit("urgent", tokens=10, deadline_ns=100)
    device.submit("long", tokens=60)
    await settle()
    await device.end()
    assert await device.start() == ["oldest", "urgent"]
    assert device.runs[-1].reason == "deadline"
    await device.end()
    assert await device.start() == ["long"]
    await device.end()


@virtual
async def test_the_queue_is_limited_in_tokens_but_an_empty_queue_accepts_any_request() -> None:
    device = Device(max_queue_tokens=100)
    device.submit("a")
    await device.start()
    device.submit("huge", tokens=500)
    await settle()
    with pytest.raises(QueueFull, match="the queue holds 500 tokens of at most 100, and this request adds 1"):
        await device.gate.submit([BatchEntry("more", 1, FOREVER)])
    await device.end()


@virtual
async def test_a_limit_learned_from_out_of_memory_bounds_batches_and_grows_back() -> None:
    device = Device(max_batch_tokens=100, max_batch_size=32)
    device.gate.planner.ran_out_of_memory(80)
    assert device.gate.planner.max_batch_tokens == 40
    device.submit("a")
    await device.start()
    for name in "bcdef":
        device.submit(name, tokens=10)
    await settle()
    await device.end()
    assert await device.start() == ["b", "c", "d", "e"]
    assert device.runs[-1].reason == "token_budget"
    await device.end()
    device.gate.planner.ran_out_of_memory(200)
    assert device.gate.planner.max_batch_tokens == 40
    for _ in range(100):
        device.gate.planner.observe(10, 1e6)
    assert device.gate.planner.max_batch_tokens == 100


@given(
    steps=st.lists(st.lists(st.integers(1, 60), max_size=6), min_size=1, max_size=12),
    max_size=st.integers(1, 6),
    budget=st.integers(1, 200),
    window=st.integers(1, 12),
    token_ns=st.sampled_from([0.01, 1.0, 100.0]),
)
def test_no_input_starves(steps: list[list[int]], max_size: int, budget: int, window: int, token_ns: float) -> None:
    """An input is overtaken by at most as many runs as there were inputs waiting when it arrived."""

    async def run() -> None:
        device = Device(max_batch_size=max_size, max_batch_tokens=budget, grouping_window=window, max_queue=1000)
        device.gate.planner.cost = RunCost(run_ns=50, token_ns=token_ns)
        came: dict[BatchEntry[str], int] = {}
        entries: list[BatchEntry[str]] = []
        answers = []
        for lengths in [*steps, *[[] for _ in range(sum(map(len, steps)))]]:
            for tokens in lengths:
                entry = BatchEntry(str(len(entries)), tokens, FOREVER)
                # A batch in transit to the device has already left the queue.
                came[entry] = len(device.runs) + (device.gate.running > 0 and not device.gate.is_busy)
                entries.append(entry)
                answers.append(device.submit_entries([entry]))
                await settle()
            if device.gate.running and not device.gate.is_busy:
                oldest = next(entry for entry in entries if not entry.has_started)
                assert oldest.payload in await device.start()
            device.now_ns += 10
            if device.gate.is_busy:
                await device.end()
        assert all(entry.has_started for entry in entries)
        for number, batch in enumerate(device.runs):
            for entry in batch.entries:
                assert number - came[entry] <= entry.depth_on_arrival
        assert [(await answer)[0] for answer in answers] == [f"done {entry.payload}" for entry in entries]

    asyncio.run(run())
