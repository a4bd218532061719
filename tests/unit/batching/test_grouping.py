"""Grouping by length compared with the best possible split, and the cost estimate that it relies on."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.batching.cost import RunCost
from deployments.batching.grouping import group_with_oldest

lengths = st.lists(st.integers(1, 64), min_size=1, max_size=9)
costs = st.builds(RunCost, st.floats(1, 1e4), st.floats(1, 1e3))


def least_cost(values: Sequence[int], cost: RunCost, max_size: int, max_tokens: int) -> float:
    """Return the least cost of any split of the sorted lengths into contiguous runs, by brute force."""
    ascending = sorted(values)
    least = float("inf")
    for cuts in itertools.product([False, True], repeat=len(ascending) - 1):
        ends = [i + 1 for i, cut in enumerate(cuts) if cut] + [len(ascending)]
        runs = [ascending[a:b] for a, b in zip([0, *ends], ends, strict=False)]
        if all(len(run) == 1 or (len(run) <= max_size and len(run) * run[-1] <= max_tokens) for run in runs):
            least = min(least, sum(cost.estimate(len(run) * run[-1]) for run in runs))
    return least


@given(lengths, costs, st.integers(1, 6), st.integers(1, 200))
def test_a_run_includes_the_oldest_and_respects_the_limits(
    values: list[int], cost: RunCost, max_size: int, max_tokens: int
) -> None:
    places = group_with_oldest(values, cost, max_size, max_tokens)

    assert places[0] == 0
    assert places == sorted(set(places))
    assert len(places) <= max_size
    assert len(places) == 1 or len(places) * max(values[i] for i in places) <= max_tokens


@given(lengths, costs, st.integers(1, 6), st.integers(1, 200))
def test_draining_the_queue_costs_little_more_than_the_best_split(
    values: list[int], cost: RunCost, max_size: int, max_tokens: int
) -> None:
    best = least_cost(values, cost, max_size, max_tokens)
    waiting, total = list(values), 0.0
    while waiting:
        places = group_with_oldest(waiting, cost, max_size, max_tokens)
        total += cost.estimate(len(places) * max(waiting[i] for i in places))
        waiting = [length for i, length in enumerate(waiting) if i not in set(places)]

    # Arrival order is used where splitting that one batch does not pay; the rest may then cost one run more than best.
    assert total <= best + cost.run_ns * len(values)


def test_short_and_long_inputs_run_separately_where_padding_costs_more_than_a_run() -> None:
    dear_padding = RunCost(run_ns=5e6, token_ns=160e3)
    assert group_with_oldest([10, 250, 12, 11, 240, 9], dear_padding, 32, 8192) == [0, 2, 3, 5]
    assert group_with_oldest([250, 12, 11, 240, 9], dear_padding, 32, 8192) == [0, 3]


def test_short_and_long_inputs_run_together_where_a_run_costs_more_than_padding() -> None:
    dear_runs = RunCost(run_ns=5e6, token_ns=1e3)
    assert group_with_oldest([10, 250, 12, 11, 240, 9], dear_runs, 32, 8192) == [0, 1, 2, 3, 4, 5]


@given(st.floats(1e4, 1e8), st.floats(1e2, 1e6))
def test_the_fit_recovers_both_terms(run_ns: float, token_ns: float) -> None:
    true = RunCost(run_ns, token_ns)
    cost = RunCost()
    cost.fit([(tokens, true.estimate(tokens)) for tokens in (3, 16, 512, 8192)])

    assert cost.run_ns == pytest.approx(run_ns, rel=1e-3, abs=2_000)
    assert cost.token_ns == pytest.approx(token_ns, rel=1e-3, abs=2)


def test_a_fit_of_one_shape_changes_nothing() -> None:
    cost = RunCost(7.0, 3.0)
    cost.fit([(16, 100.0), (16, 120.0)])
    cost.fit([])

    assert (cost.run_ns, cost.token_ns) == (7.0, 3.0)


@given(st.floats(0.2, 5), st.lists(st.sampled_from([13, 400, 4000]), min_size=300, max_size=300))
def test_the_estimate_follows_a_machine_that_got_faster_or_slower(factor: float, runs: list[int]) -> None:
    cost, true = RunCost(5e6, 1.5e5), RunCost(5e6 * factor, 1.5e5 * factor)
    for tokens in runs:
        cost.observe(tokens, true.estimate(tokens))

    for tokens in set(runs[-50:]):
        assert cost.estimate(tokens) == pytest.approx(true.estimate(tokens), rel=0.15)


def test_one_stall_does_not_spoil_the_estimate() -> None:
    cost = RunCost(5e6, 1.5e5)
    before = cost.estimate(400)
    cost.observe(400, 30e9)

    assert cost.estimate(400) <= before * 1.25


def test_rejections_lower_the_estimate() -> None:
    cost = RunCost(5e9, 1.5e5)
    for _ in range(200):
        cost.decay_after_rejection()

    assert cost.estimate(400) < 5e6
