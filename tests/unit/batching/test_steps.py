"""The planner of steps, driven as the device's thread drives it, with pages that are counted."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable

from hypothesis import given
from hypothesis import strategies as st

from deployments.batching.generation.step_cost import StepCost
from deployments.batching.generation.steps import Plan, Sequence, StepLimits, StepPlanner
from deployments.engine.generation.fake import FakeCache
from deployments.messages import Share

LIMITS = StepLimits(max_sequences=8, max_batch_tokens=64, max_step_ms=50.0, reserve=1.0)


def planner(cache_tokens: int = 16_384, limits: StepLimits = LIMITS) -> StepPlanner:
    clock = itertools.count(1)
    return StepPlanner(limits, FakeCache(cache_tokens), lambda: next(clock))


def sequence(number: int, prompt: int, output: int) -> Sequence:
    return Sequence(number, list(range(1000 * number, 1000 * number + prompt)), output)


def run(one: StepPlanner) -> Plan:
    """Plan a step and pretend that it ran: the token that follows is the length of the sequence so far."""
    plan = one.plan()
    for member in plan.members:
        assert len(member.sequence.next_tokens(member.tokens)) == member.tokens
    one.done(plan)
    for member in plan.members:
        if member.samples:
            member.sequence.generated.append(member.sequence.length)
            if len(member.sequence.generated) == member.sequence.max_tokens:
                one.remove(member.sequence)
    return plan


def run_all(one: StepPlanner, limit: int = 10_000) -> list[Plan]:
    plans = []
    while one.running or one.waiting:
        plans.append(run(one))
        assert len(plans) < limit, "it does not end"
    return plans


def numbers(members: Iterable[object]) -> list[int]:
    return [member.sequence.number for member in members]  # type: ignore[attr-defined]


SIZES = st.lists(st.tuples(st.integers(1, 150), st.integers(1, 20)), min_size=1, max_size=12)


@given(SIZES, st.integers(16, 40), st.sampled_from([0.0, 0.5, 1.0]))
def test_every_sequence_gets_all_its_tokens(sizes: list[tuple[int, int]], pages: int, reserve: float) -> None:
    one = planner(16 * pages, StepLimits(4, 64, 50.0, reserve))
    sequences = [sequence(number, *size) for number, size in enumerate(sizes)]
    for each in sequences:
        assert one.fits(len(each.prompt), each.max_tokens)
        one.add(each)
    plans = run_all(one)

    for each in sequences:
        assert each.generated == list(range(len(each.prompt), len(each.prompt) + each.max_tokens))
    for plan in plans:
        assert sum(member.tokens for member in plan.members) <= 64
        assert len({id(member.sequence) for member in plan.members}) == len(plan.members) <= 4
    if reserve == 1:
        assert not any(plan.preempted for plan in plans)


def test_the_room_that_a_sequence_may_need_is_kept_for_it() -> None:
    one = planner(cache_tokens=160)
    first, second = sequence(1, 60, 60), sequence(2, 20, 20)
    one.add(first)
    one.add(second)
    run(one)
    assert one.running == [first]
    assert second.cache_since_ns > 0
    assert first.cache_since_ns == 0
    run_all(one)
    assert len(second.generated) == 20


def test_nobody_overtakes_the_one_that_waits_for_the_cache() -> None:
    one = planner(cache_tokens=160)
    for each in (sequence(1, 100, 10), sequence(2, 100, 10), sequence(3, 5, 5)):
        one.add(each)
    run(one)
    assert [each.number for each in one.running] == [1]


def test_whoever_decodes_is_in_every_step() -> None:
    one = planner()
    one.cost = StepCost(step_ns=10e6, decode_ns=1e6, prefill_ns=1e6)
    chat, long = sequence(1, 4, 30), sequence(2, 500, 2)
    one.add(chat)
    run(one)
    one.add(long)
    for _ in range(10):
        plan = run(one)
        assert numbers(plan.members)[0] == 1
        # 50 ms, less 11 for the one that decodes, at 1 ms a token.
        assert plan.prefill_tokens == 39


def test_alone_a_prompt_takes_all_that_a_step_may_have() -> None:
    one = planner()
    one.cost = StepCost(step_ns=10e6, decode_ns=1e6, prefill_ns=100e6)
    one.add(sequence(1, 200, 2))
    assert run(one).prefill_tokens == 64


def test_a_prompt_gets_as_much_as_decoding_if_that_takes_too_long_alone() -> None:
    one = planner()
    one.cost = StepCost(step_ns=99e6, decode_ns=1e6, prefill_ns=4e6)
    one.add(sequence(1, 4, 30))
    run(one)
    one.add(sequence(2, 500, 2))
    assert run(one).prefill_tokens == 25
    one.cost = StepCost(step_ns=99e6, decode_ns=1e6, prefill_ns=100e6)
    assert run(one).prefill_tokens == 16


def test_a_short_prompt_does_not_wait_for_a_long_one() -> None:
    one = planner()
    one.add(sequence(1, 600, 2))
    run(one)
    one.add(sequence(2, 20, 2))
    plan = run(one)
    assert {member.sequence.number: member.tokens for member in plan.members} == {1: 44, 2: 20}


def test_the_newest_makes_room_when_the_cache_is_full() -> None:
    one = planner(cache_tokens=96, limits=StepLimits(8, 64, 1e6, 0.0))
    first, second = sequence(1, 16, 60), sequence(2, 16, 40)
    one.add(first)
    one.add(second)
    preempted = [each.number for plan in run_all(one) for each in plan.preempted]
    assert preempted
    assert set(preempted) == {2}
    assert len(first.generated) == 60
    assert second.generated == list(range(16, 56))


def test_after_a_failure_each_is_computed_alone() -> None:
    one = planner()
    for number in (1, 2, 3):
        one.add(sequence(number, 10, 5))
    run(one)
    plan = one.plan()
    assert len(plan.members) == 3
    one.isolate([member.sequence for member in plan.members])
    alone = [numbers(run(one).members) for _ in range(3)]
    assert alone == [[1], [2], [3]]
    assert len(run(one).members) == 3


def test_a_sequence_that_is_removed_leaves_nothing_behind() -> None:
    cache = FakeCache(16_384)
    one = StepPlanner(LIMITS, cache)
    running, waiting = sequence(1, 100, 5), sequence(2, 10, 5)
    one.add(running)
    run(one)
    one.add(waiting)
    one.remove(waiting)
    one.remove(running)
    one.remove(running)
    assert not one.running
    assert not one.waiting
    assert not cache.held
    assert one.used_ratio == 0


def took(decoding: int, prefill: int) -> float:
    return 70e6 + 8e6 * decoding + 4e6 * prefill


def test_the_cost_of_a_step_is_learned() -> None:
    cost = StepCost()
    # A warm-up in which the machine was slow.
    cost.fit(64, 2 * took(0, 64), 1.5 * took(1, 0))
    for decoding, prefill in itertools.islice(itertools.cycle([(1, 0), (8, 0), (8, 64), (0, 100), (3, 10)]), 100):
        cost.observe(decoding, prefill, took(decoding, prefill))
    for decoding, prefill in [(1, 0), (16, 0), (4, 50)]:
        assert abs(cost.estimate(decoding, prefill) / took(decoding, prefill) - 1) < 0.05
    assert abs(cost.prefill_tokens_within(302e6, 4) - 50) < 5


def test_prompts_get_what_is_left_even_where_the_estimate_decides_what_is_seen() -> None:
    # Started by a warm-up on a machine that is slower with many than with one.
    cost, chance = StepCost(), random.Random(1)
    cost.fit(64, took(0, 64), took(1, 0))
    decoding, chunks = 16, []
    for _ in range(400):
        decoding = min(16, max(1, decoding + chance.choice((-1, 0, 1))))
        chunk = max(16, cost.prefill_tokens_within(max(250e6, 2 * cost.estimate(decoding, 0)), decoding))
        right = max(16, (max(250e6, 2 * took(decoding, 0)) - took(decoding, 0)) / 4e6)
        chunks.append(chunk / right)
        cost.observe(decoding, chunk, took(decoding, chunk) * chance.uniform(0.85, 1.15))
    late = sorted(chunks[100:])
    assert 0.8 < late[len(late) // 20] <= late[-len(late) // 20] < 1.25


def test_one_stall_does_not_spoil_the_estimate() -> None:
    cost = StepCost()
    for decoding in range(1, 17):
        cost.observe(decoding, 0, took(decoding, 0))
    before = cost.estimate(8, 0)
    cost.observe(8, 0, 50 * took(8, 0))
    assert abs(cost.estimate(8, 0) / before - 1) < 0.1


def test_batch_jobs_wait_behind_interactive_requests() -> None:
    one = planner(limits=StepLimits(1, 64, 1e6, 1.0))
    for number, priority in ((1, 0), (2, 1), (3, 0), (4, 1), (5, 0)):
        one.add(Sequence(number, [1, 2], 1, Share(priority=priority)))
    assert [numbers(plan.members) for plan in run_all(one)] == [[1], [3], [5], [2], [4]]


def test_prompts_of_batch_jobs_get_what_interactive_ones_leave() -> None:
    one = planner()
    one.add(Sequence(1, [1] * 100, 1, Share(priority=1)))
    run(one)
    one.add(Sequence(2, [1] * 60, 1))
    assert {member.sequence.number: member.tokens for member in run(one).members} == {2: 60, 1: 4}


def test_a_tenant_with_little_does_not_wait_behind_one_with_much() -> None:
    one = planner(limits=StepLimits(1, 64, 1e6, 1.0))
    for number in range(1, 11):
        one.add(Sequence(number, [1, 2], 1, Share("much")))
    run(one)
    one.add(Sequence(11, [1, 2], 1, Share("little")))
    order = [numbers(plan.members)[0] for plan in run_all(one)]
    assert order[:3] == [2, 11, 3] or order[:2] == [11, 2]
