"""Stalls of the event loop: what counts as one, and what is said of it."""

from __future__ import annotations

import asyncio
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from deployments.telemetry.gauges.stalls import StallWatch

SECOND = 10**9


class Loop:
    """A loop whose marks, and a thread whose looks, the test sets."""

    def __init__(self) -> None:
        self.now_ns, self.counted = SECOND, 0
        self.watch = StallWatch(self.count, lambda: self.now_ns, lambda _: sys._getframe())  # noqa: SLF001

    def count(self) -> None:
        self.counted += 1

    def looks(self, seconds: float) -> None:
        for _ in range(round(seconds * 10)):
            self.now_ns += SECOND // 10
            self.watch.look()


@pytest.mark.parametrize(("seconds", "stalls"), [(0.9, 0), (1.1, 1), (30, 1)])
def test_a_loop_that_ran_nothing_for_a_second_has_stalled_once(seconds: float, stalls: int) -> None:
    loop = Loop()
    loop.looks(5)
    assert loop.counted == 0, "nothing was watched yet"
    loop.watch.mark()
    loop.looks(seconds)
    assert loop.counted == stalls


def test_a_stall_lasts_until_the_next_mark(caplog: pytest.LogCaptureFixture) -> None:
    loop = Loop()
    loop.watch.mark()
    loop.looks(3)
    (lasting,) = loop.watch.between(2 * SECOND, 3 * SECOND)
    assert lasting.ended_ns == 0
    loop.watch.mark()
    loop.looks(0.5)
    assert loop.watch.between(0, SECOND) == []
    assert loop.watch.between(4 * SECOND, 5 * SECOND) == []
    (stall,) = loop.watch.between(3 * SECOND, 9 * SECOND)
    assert (stall.started_ns, stall.ended_ns) == (SECOND, 4 * SECOND)
    assert stall.shared_ns(3 * SECOND, 9 * SECOND) == SECOND
    assert "test_stalls.py" in stall.stack
    assert "the event loop has run nothing for 1.0 s" in caplog.text
    assert "the event loop runs again, after 3.0 s" in caplog.text


def test_a_process_that_was_stopped_is_not_blamed_on_a_line_of_code() -> None:
    loop = Loop()
    loop.watch.mark()
    loop.looks(0.5)
    loop.now_ns += 20 * SECOND
    loop.watch.look()
    (stall,) = loop.watch.between(0, loop.now_ns)
    assert stall.stack.startswith("nothing of this process ran")


def the_culprit(watch: StallWatch, found: list[int]) -> None:
    """Block the loop until another thread has seen it."""
    with ThreadPoolExecutor(1) as thread:
        while not found:
            thread.submit(watch.look).result()


def test_a_real_loop_is_seen_where_it_is_blocked() -> None:
    found: list[int] = []

    async def run() -> StallWatch:
        watch = StallWatch(lambda: found.append(1))
        watch.watch(asyncio.get_running_loop())
        the_culprit(watch, found)
        return watch

    watch = asyncio.run(run())
    (stall,) = watch.between(0, time.monotonic_ns())
    assert "in the_culprit" in stall.stack
