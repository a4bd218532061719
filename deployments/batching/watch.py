"""Notices a run of the device that does not end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_STUCK_NS, _STUCK_TIMES = 3 * 10**9, 10
_HUNG_NS, _HUNG_TIMES = 30 * 10**9, 20


class RunWatch:
    """Watches the run in progress. Written by the device's thread, read by any other.

    Args:
        clock: monotonic nanoseconds.
    """

    def __init__(self, clock: Callable[[], int] = time.monotonic_ns) -> None:
        self._clock = clock
        self._run: tuple[int, float] | None = None

    @contextmanager
    def run(self, expected_ns: float) -> Iterator[None]:
        """Around a run, with how long it is expected to take."""
        self._run = self._clock(), expected_ns
        try:
            yield
        finally:
            self._run = None

    @property
    def is_stuck(self) -> bool:
        """Whether it takes so long that others should get the work: over 3 s and 10 times what was expected."""
        return self._lasts(_STUCK_NS, _STUCK_TIMES) is not None

    @property
    def broken(self) -> str | None:
        """Why no run can be expected to end here any more: it has lasted over 30 s and 20 times what was expected."""
        lasts_s = self._lasts(_HUNG_NS, _HUNG_TIMES)
        return f"a run has not ended in {lasts_s:.0f} s" if lasts_s is not None else None

    def _lasts(self, least_ns: int, times: int) -> float | None:
        run = self._run
        if run is None:
            return None
        began_ns, expected_ns = run
        lasts_ns = self._clock() - began_ns
        return lasts_ns / 1e9 if lasts_ns > max(least_ns, times * expected_ns) else None
