"""Run delay: what the kernel counts, and how it is spread over time."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import pytest

from deployments.telemetry.gauges.cpu import RunDelay, kernel_run_delay_ns

SECOND = 10**9


class Kernel:
    """Threads whose run delay the test sets."""

    def __init__(self) -> None:
        self.now_ns = 0
        self.delays: dict[int, int] = {threading.get_native_id(): 0}
        self.seen = RunDelay(lambda: self.now_ns, self.delays.get)
        self.seen.watch()

    def look(self, after_ns: int, delayed_ns: int) -> None:
        self.now_ns += after_ns
        self.delays[threading.get_native_id()] += delayed_ns
        self.seen.look()


def test_a_delay_is_spread_over_the_time_between_two_looks() -> None:
    kernel = Kernel()
    for delayed in (0, SECOND // 2, 0, SECOND):
        kernel.look(SECOND, delayed)
    between = kernel.seen.between_ns
    assert between(0, SECOND) == 0
    assert between(SECOND, 2 * SECOND) == SECOND // 2
    assert between(SECOND, SECOND + SECOND // 5) == SECOND // 10
    assert between(2 * SECOND, 3 * SECOND) == 0
    assert between(0, 10 * SECOND) == SECOND + SECOND // 2
    assert kernel.seen.ratio() == pytest.approx(0.5)
    assert kernel.seen.ratio() == 0.0


def test_no_time_counts_twice() -> None:
    kernel = Kernel()
    kernel.look(SECOND, 0)
    # Several threads, or a late look: there is no more delay than there was time.
    kernel.look(SECOND, 5 * SECOND)
    assert kernel.seen.between_ns(0, 9 * SECOND) == SECOND


def test_where_requests_wait_for_one_thread_only_that_one_counts() -> None:
    kernel = Kernel()
    kernel.look(SECOND, 0)

    def device() -> None:
        kernel.delays[threading.get_native_id()] = 0
        kernel.seen.watch(is_decisive=True)
        kernel.look(SECOND, SECOND // 4)

    thread = threading.Thread(target=device)
    thread.start()
    thread.join()
    kernel.look(SECOND, SECOND // 2)
    assert kernel.seen.between_ns(0, 9 * SECOND) == SECOND // 4


def test_a_thread_that_has_ended_is_forgotten() -> None:
    kernel = Kernel()
    kernel.look(SECOND, SECOND)
    kernel.delays.clear()
    kernel.now_ns += SECOND
    kernel.seen.look()
    assert kernel.seen.between_ns(0, 9 * SECOND) == 0


def test_without_a_kernel_that_counts_there_is_none() -> None:
    seen = RunDelay(read=lambda _: None)
    seen.watch()
    seen.look()
    seen.look()
    assert seen.between_ns(0, 10**18) == 0
    assert seen.ratio() == 0.0


def test_long_ago_is_forgotten_in_bounded_memory() -> None:
    kernel = Kernel()
    for _ in range(30_000):
        kernel.look(1000, 500)
    assert kernel.seen.between_ns(kernel.now_ns - 1000, kernel.now_ns) == 500
    assert kernel.seen.between_ns(0, 1000) == 0


@pytest.mark.skipif(
    kernel_run_delay_ns(threading.get_native_id()) is None or not hasattr(os, "sched_setaffinity"),
    reason="this kernel does not count run delays",
)
def test_a_thread_that_shares_its_cpu_waits_for_it() -> None:
    found: list[int] = []

    def work() -> None:
        seen = RunDelay()
        seen.watch()
        seen.look()
        began_ns = time.monotonic_ns()
        while time.monotonic_ns() - began_ns < SECOND:
            pass
        seen.look()
        found.append(seen.between_ns(began_ns, time.monotonic_ns()))

    cpu = min(os.sched_getaffinity(0))
    spin = f"import os; os.sched_setaffinity(0, {{{cpu}}}); print(1, flush=True)\nwhile True: pass"
    hog = subprocess.Popen([sys.executable, "-c", spin], stdout=subprocess.PIPE)
    try:
        assert hog.stdout is not None
        hog.stdout.readline()

        def pinned() -> None:
            # Of this thread only.
            os.sched_setaffinity(0, {cpu})
            work()

        thread = threading.Thread(target=pinned)
        thread.start()
        thread.join()
    finally:
        hog.kill()
        hog.communicate()
    assert found[0] > SECOND // 5
