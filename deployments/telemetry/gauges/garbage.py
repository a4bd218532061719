"""Collections of garbage, in which no Python of this process runs."""

from __future__ import annotations

import gc
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

_LEAST_NS = 1_000_000
"""Of a collection that is kept: shorter ones are many and do not matter."""
_KEPT = 1000
_REACH_NS = 20_000_000
"""How long before a request is handled a collection may have ended that kept it from being read."""


class GarbageWatch:
    """The collections of this process that took a millisecond or more.

    Args:
        clock: monotonic nanoseconds.
    """

    def __init__(self, clock: Callable[[], int] = time.monotonic_ns) -> None:
        self._clock, self._began_ns = clock, 0
        self._pauses: deque[tuple[int, int]] = deque(maxlen=_KEPT)

    def watch(self) -> None:
        gc.callbacks.append(self.note)

    def close(self) -> None:
        if self.note in gc.callbacks:
            gc.callbacks.remove(self.note)

    def note(self, phase: str, info: Mapping[str, Any]) -> None:  # noqa: ARG002
        """Called by the collector, in whichever thread it runs."""
        if phase == "start":
            self._began_ns = self._clock()
        elif self._began_ns and (ended_ns := self._clock()) - self._began_ns >= _LEAST_NS:
            self._pauses.append((self._began_ns, ended_ns))

    def between_ns(self, started_ns: int, ended_ns: int) -> int:
        """How long those took that fell between two times, or ended right before: until then nothing was read."""
        if not self._pauses or self._pauses[-1][1] <= started_ns - _REACH_NS:
            return 0
        return sum(
            max(0, min(ended_ns, end) - begin) for begin, end in tuple(self._pauses) if end > started_ns - _REACH_NS
        )
