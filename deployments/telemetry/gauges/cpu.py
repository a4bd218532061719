"""How long threads of this process could run and did not, as Linux counts it (``/proc/self/task/*/schedstat``).

The kernel adds to a thread's run delay whenever it waits for a CPU: because others run, or because the control group
has used up its quota. Only the threads that work on requests are looked at, a few times a second; what one of them
waited between two looks is spread evenly over that time.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

from deployments.telemetry.gauges.curve import Curve


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
        self._curve = Curve()

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
        self._curve.add(self._clock(), most)

    def between_ns(self, started_ns: int, ended_ns: int) -> int:
        """The run delay between two times, as far as it was seen."""
        return self._curve.between_ns(started_ns, ended_ns)

    def ratio(self) -> float:
        """The share of the time since the last call that was run delay: 0 to 1."""
        return self._curve.ratio()
