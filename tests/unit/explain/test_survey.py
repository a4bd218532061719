"""Which requests are read in full, and that no statistics are lost for the others."""

from __future__ import annotations

from dataclasses import replace

import pytest

from deployments.explain.render.sample import percentiles
from deployments.explain.traces.survey import FAILED, ORDINARY, Root, survey
from deployments.telemetry import names


def roots(count: int, error: str = "") -> list[Root]:
    return [Root((f"{n:032x}", "r"), n * 10**6, (n * 7919 % count) * 1000, error) for n in range(count)]


def test_all_requests_are_counted_and_a_sample_is_read_in_full() -> None:
    found = survey([*roots(40_000), *roots(40_000)], 0.05)

    assert found.requests == 40_000
    assert len(found.latencies_ms) == 40_000
    assert found.latencies_ms == sorted(found.latencies_ms)
    assert (len(found.slow), len(found.ordinary), set(found.weights.values())) == (2_000, ORDINARY, {38_000 / ORDINARY})
    assert not found.slow & found.ordinary
    assert {latency_ns(key) for key in found.slow} == {n * 1000 for n in range(38_000, 40_000)}
    assert found.window_ns == (0, max(root.ended_ns for root in roots(40_000)))
    assert survey(roots(40_000), 0.05).ordinary == found.ordinary


def latency_ns(key: tuple[str, str]) -> int:
    return int(key[0], 16) * 7919 % 40_000 * 1000


def test_few_requests_are_all_read_in_full() -> None:
    found = survey(roots(30), 0.05)
    assert (len(found.slow), len(found.ordinary), set(found.weights.values())) == (5, 25, {1.0})
    assert survey([], 0.05).window_ns == (0, 0)


def test_the_longest_failures_are_read_and_invalid_input_is_not_a_failure() -> None:
    found = survey([*roots(2_000, "replica_died")], 0.05)
    assert found.errors == {"replica_died": 2_000}
    assert len(found.failed) == FAILED
    assert found.failed_ms == sum(n * 1000 for n in range(2_000)) / 1e6
    assert survey(roots(50, "invalid_field"), 0.05).failed == set()


def test_which_spans_are_wanted() -> None:
    found = survey(roots(30), 0.05, since_ns=20 * 10**6)
    read, old = f"{25:032x}", f"{3:032x}"
    assert found.requests == 10
    assert found.wants(names.QUEUE, read)
    assert found.wants(names.BATCH_FORWARD, "somewhere")
    # A span of a request without a root is wanted, so that its root is missed; a foreign span is not.
    assert found.wants(names.QUEUE, old)
    assert not found.wants("GET /", old)


def test_a_sample_stands_for_all_requests_by_its_weights() -> None:
    """Of 10,000 requests the slowest twentieth is kept, and one in a hundred of the others, with neighbours."""
    every = sorted(roots(10_000), key=lambda root: root.latency_ns)
    slow = every[9_500:]
    drawn = [replace(root, weight=100.0) for root in every[:9_500:100]]
    beside = [replace(root, weight=0.0) for root in every[50:9_500:100]]
    whole, found = survey(every, 0.05), survey([*slow, *drawn, *beside], 0.05)

    assert (found.requests, found.sample.kept, found.sample.is_sample) == (10_000, 690, True)
    assert not whole.sample.is_sample
    assert found.slow == whole.slow
    assert found.ordinary == {root.key for root in drawn}
    for name, ms in percentiles(found.latencies_ms, found.latency_weights).items():
        assert ms == pytest.approx(percentiles(whole.latencies_ms)[name], rel=0.02)
    assert sum(found.weights.get(key, 1.0) for key in found.slow | found.ordinary) == 10_000


def test_failures_count_for_as_many_as_they_stand_for() -> None:
    failed = [
        replace(root, weight=weight) for root, weight in zip(roots(3, "model_failed"), (1.0, 100.0, 0.0), strict=True)
    ]
    assert survey([*roots(30), *failed], 0.05).errors == {"model_failed": 101}


def test_requests_that_have_not_ended_are_not_missing() -> None:
    """A hundred long ones are in progress, in a place where others take as long."""
    every = [
        Root((f"{n:032x}", "r"), n * 10**7, 10**9 if n % 3 else 30 * 10**9, "", number=n + 1, instance="i")
        for n in range(6_000)
    ]
    ended = [root for root in every if root.ended_ns < 60 * 10**9]
    found = survey(ended, 0.05)
    assert len(every) - len(ended) > 800
    assert (found.sample.missing, found.sample.says_nothing) == (0, False)
    # Lost ones are.
    lost = survey([root for root in ended if not 1000 < root.number < 1500], 0.05)
    assert lost.sample.missing == sum(1000 < root.number < 1500 for root in ended)
