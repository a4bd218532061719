"""What distinguishes slow requests: where they ran, which client sent them, their content and when they arrived."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from deployments.explain.requests.pattern import distinguishing_traits
from tests.support.made import request
from tests.unit.explain.test_verdict import read

COUNT = 240


def said(slow: Callable[[int], dict[str, Any] | None], usual: Callable[[int], dict[str, Any]]) -> str:
    """The traits reported for a minute of requests in which those that ``slow`` changes are slow."""
    numbers = [number for number in range(COUNT) if slow(number) is not None]
    spans = [one for n in range(COUNT) for one in request(n, n * 250.0, **usual(n) | (slow(n) or {}))]
    found = read(spans)
    concerned = [one for one in found.requests if int(one.trace_id, 16) in numbers]
    return distinguishing_traits(concerned, found.requests, found.survey.window_ns, "model", found.weight)


def mixed(number: int) -> dict[str, Any]:
    chance = random.Random(number)
    replica = chance.choice("ab")
    # One replica on each host.
    host = {"a": "one", "b": "two"}[replica]
    return {"replica": replica, "host": host, "client": f"10.0.0.{chance.randint(1, 3)}"}


CASES: dict[str, tuple[Callable[[int], dict[str, Any]], str]] = {
    "replica": (lambda _: {"replica": "b", "host": "two"}, "nearly all on replica b"),
    "host": (lambda n: {"replica": f"c{n}", "host": "three"}, "nearly all on host three"),
    "client": (lambda _: {"client": "10.0.0.9"}, "nearly all from client 10.0.0.9"),
    "route": (lambda _: {"route": "/predict"}, "nearly all to /predict"),
    "characters": (
        lambda _: {"chars": 5000},
        "with at least 5000 characters, where 90% of the others have at most 40",
    ),
    "tokens": (lambda _: {"tokens": 200}, "with at least 200 tokens, where 90% of the others have at most 10"),
    "nothing": (lambda _: {}, ""),
}


@pytest.mark.parametrize("case", CASES)
def test_traits_that_slow_requests_share(case: str) -> None:
    change, expected = CASES[case]
    scattered = {random.Random(case).randrange(COUNT) for _ in range(12)} | {1, 80, 160, 238}
    assert said(lambda n: change(n) if n in scattered else None, mixed).strip(", ") == expected


@pytest.mark.parametrize(
    ("slow", "expected"),
    [
        (lambda n: 100 <= n < 120, ", all within 4.8 of the 59.8 s observed, from 01:47:05Z"),
        (lambda n: n >= 150, ", since 01:47:17Z"),
        (lambda n: n % 30 < 3, ", every 7.5 s"),
        (lambda n: random.Random(n).random() < 0.1, ""),
        (lambda n: n == 7, ""),
    ],
    ids=["a burst", "since a moment", "periodic", "at any time", "one alone"],
)
def test_when_slow_requests_arrived(slow: Callable[[int], bool], expected: str) -> None:
    assert said(lambda n: {} if slow(n) else None, lambda _: {}) == expected
