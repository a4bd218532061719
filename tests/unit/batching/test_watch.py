"""A run that does not end is noticed, and one that is merely long is not."""

from __future__ import annotations

import pytest

from deployments.batching.watch import RunWatch


@pytest.mark.parametrize(
    ("expected_s", "stuck_after_s", "broken_after_s"),
    [(0.0, 3, 30), (0.1, 3, 30), (1.0, 10, 30), (10.0, 100, 200)],
)
def test_it_depends_on_how_long_the_run_was_expected_to_take(
    expected_s: float, stuck_after_s: float, broken_after_s: float
) -> None:
    now_ns = 0
    watch = RunWatch(lambda: now_ns)
    assert (watch.is_stuck, watch.broken) == (False, None)
    with watch.run(expected_s * 1e9):
        now_ns = int(stuck_after_s * 1e9)
        assert (watch.is_stuck, watch.broken) == (False, None)
        now_ns += 1
        assert watch.is_stuck
        now_ns = int(broken_after_s * 1e9)
        assert watch.broken is None
        now_ns += 10**9
        assert watch.broken == f"a run has not ended in {broken_after_s + 1} s"
    assert (watch.is_stuck, watch.broken) == (False, None)


def test_a_run_that_fails_is_over() -> None:
    watch = RunWatch(lambda: 0)
    with pytest.raises(ValueError, match="no"), watch.run(1.0):
        raise ValueError("no")
    assert watch.broken is None
