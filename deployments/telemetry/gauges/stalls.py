"""Stalls of the event loop: times in which it ran nothing, and what it was doing instead.

The loop sets a mark a few times a second; the telemetry thread looks whether the newest mark is too old, and if so, at
the stack of the loop's thread.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType

STALL_NS = 1_000_000_000
_MARK_S = 0.25
_KEPT = 100
_NOTHING_RAN = "nothing of this process ran: it was stopped, or a thread held the interpreter's lock\n"
_logger = logging.getLogger("slowlens.telemetry")


@dataclass(slots=True)
class Stall:
    """Monotonic times of this process; ``ended_ns`` is 0 as long as it lasts."""

    started_ns: int
    stack: str
    """Of the loop's thread, innermost call last, as it was found."""
    ended_ns: int = 0

    def shared_ns(self, started_ns: int, ended_ns: int) -> int:
        """How much of it lies between two times."""
        return max(0, min(self.ended_ns or ended_ns, ended_ns) - max(self.started_ns, started_ns))


class StallWatch:
    """Watches one event loop.

    Args:
        count: called once for each stall.
        clock: monotonic nanoseconds.
        frame_of: the frame that a thread is in.
    """

    def __init__(
        self,
        count: Callable[[], None],
        clock: Callable[[], int] = time.monotonic_ns,
        frame_of: Callable[[int], FrameType | None] = lambda thread: sys._current_frames().get(thread),  # noqa: SLF001
    ) -> None:
        self._count, self._clock, self._frame_of = count, clock, frame_of
        self._thread = 0
        self._marked_ns = self._looked_ns = 0
        self._stalls: deque[Stall] = deque(maxlen=_KEPT)

    def watch(self, loop: asyncio.AbstractEventLoop) -> None:
        """Watch the running loop, from its own thread, until it is closed."""
        self._thread = threading.get_ident()
        self._mark(loop)

    def _mark(self, loop: asyncio.AbstractEventLoop) -> None:
        self.mark()
        loop.call_later(_MARK_S, self._mark, loop)

    def mark(self) -> None:
        """The loop runs."""
        now_ns = self._clock()
        marked_ns, self._marked_ns = self._marked_ns, now_ns
        newest = self._stalls[-1] if self._stalls else None
        if newest is not None and newest.started_ns == marked_ns:
            newest.ended_ns = now_ns
            _logger.warning("the event loop runs again, after %.1f s", (now_ns - marked_ns) / 1e9)

    def look(self) -> None:
        """Called several times a second, by one other thread."""
        now_ns, marked_ns = self._clock(), self._marked_ns
        looked_ns, self._looked_ns = self._looked_ns, now_ns
        has_begun = bool(self._stalls) and self._stalls[-1].started_ns == marked_ns
        if not marked_ns or has_begun or now_ns - marked_ns < STALL_NS:
            return
        was_away = now_ns - looked_ns >= STALL_NS
        stack = _NOTHING_RAN if was_away else self._stack()
        self._stalls.append(Stall(marked_ns, stack))
        self._count()
        _logger.warning("the event loop has run nothing for %.1f s:\n%s", (now_ns - marked_ns) / 1e9, stack)

    def _stack(self) -> str:
        frame = self._frame_of(self._thread)
        return "".join(traceback.format_stack(frame)) if frame is not None else ""

    def between(self, started_ns: int, ended_ns: int) -> list[Stall]:
        """The stalls that share time with this one."""
        return [stall for stall in self._stalls if stall.shared_ns(started_ns, ended_ns)] if self._stalls else []
