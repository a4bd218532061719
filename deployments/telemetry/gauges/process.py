"""CPU and memory of this process, with or without a GPU."""

from __future__ import annotations

import os
import resource
import sys
import time
from pathlib import Path


class ProcessUsage:
    def __init__(self) -> None:
        self._cpus = os.cpu_count() or 1
        self._last = (time.monotonic(), time.process_time())

    def cpu_utilization(self) -> float:
        """CPU seconds since the last call, divided by elapsed seconds and the machine's CPU count: 0 to 1."""
        now, used = time.monotonic(), time.process_time()
        (before, used_before), self._last = self._last, (now, used)
        return (used - used_before) / max(now - before, 1e-9) / self._cpus


def resident_bytes() -> int:
    """Resident memory; its peak on systems without /proc."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def open_descriptors() -> int:
    """Open file descriptors; 0 on systems without /proc."""
    try:
        return sum(1 for _ in Path("/proc/self/fd").iterdir())
    except OSError:
        return 0
