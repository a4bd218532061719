"""How long threads of this process could run and did not, as Linux counts it (``/proc/self/task/*/schedstat``).

The kernel adds to a thread's run delay whenever it waits for a CPU: because others run, or because the control group
has used up its quota. Only the threads that work on requests are looked at, a few times a second; what one of them
waited between two looks is spread evenly over that time.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_right
from collections.abc import Callable
from pathlib import Path

_KEPT = 12_000
"""Looks; ten a second are kept for ten to twenty minutes."""


def kernel_run_delay_ns(thread: int) -> int | None:
    """Run delay of a thread of this process since it began; None where the kernel does not say, or it has ended."""
    try:
        return int(Path(f"/proc/self/task/{thread}/schedstat").read_bytes().split()[1])
    except (OSError, ValueError, IndexError):
        return None


class RunDelay:
    """The run delay of the threads that called ``watch``, over time.

    Args:
        clock: monotonic nanoseconds.
        read: run delay of a thread.
    """

    def __init__(
        self,
        clock: Callable[[], int] = time.monotonic_ns,
        read: Callable[[int], int | None] = kernel_run_delay_ns,
    ) -> None:
        self._clock, self._read = clock, read
        self._seen: dict[int, int] = {}
        self._decisive: set[int] = set()
        self._times: list[int] = []
        self._sums: list[int] = []
        self._shown = 0

    def watch(self, *, is_decisive: bool = False) -> None:
        """Count the calling thread, from now on.

        Args:
            is_decisive: whether requests wait for this thread, and not for the others: of a process that has such
                threads, only these count.
        """
        thread = threading.get_native_id()
        if is_decisive:
            self._decisive.add(thread)
        if thread not in self._seen:
            delay_ns = self._read(thread)
            if delay_ns is not None:
                self._seen[thread] = delay_ns

    def look(self) -> None:
        """Called several times a second, by one thread."""
        most = 0
        for thread, before in list(self._seen.items()):
            delay_ns = self._read(thread)
            if delay_ns is None:
                del self._seen[thread]
                continue
            self._seen[thread] = delay_ns
            # A request is with one thread at a time: of those that waited, the longest wait counts.
            if not self._decisive or thread in self._decisive:
                most = max(most, delay_ns - before)
        now_ns = self._clock()
        since_ns = self._times[-1] if self._times else now_ns
        self._times.append(now_ns)
        self._sums.append((self._sums[-1] if self._sums else 0) + min(most, now_ns - since_ns))
        if len(self._times) > _KEPT:
            del self._times[: _KEPT // 2], self._sums[: _KEPT // 2]

    def between_ns(self, started_ns: int, ended_ns: int) -> int:
        """The run delay between two times, as far as it was seen."""
        return max(0, round(self._at(ended_ns) - self._at(started_ns)))

    def ratio(self) -> float:
        """The share of the time since the last call that was run delay: 0 to 1."""
        if not self._times:
            return 0.0
        since_ns, self._shown = self._shown or self._times[0], self._times[-1]
        return self.between_ns(since_ns, self._shown) / max(1, self._shown - since_ns)

    def _at(self, time_ns: int) -> float:
        times, sums = self._times, self._sums
        number = bisect_right(times, time_ns)
        if number == 0 or not times:
            return float(sums[0]) if sums else 0.0
        if number == len(times):
            return float(sums[-1])
        before, after = times[number - 1], times[number]
        share = (time_ns - before) / (after - before)
        return sums[number - 1] + share * (sums[number] - sums[number - 1])
