"""How long a request was in what stands before the ingress, as ``X-Request-Start`` says.

Proxies write it in several ways (nginx ``t=${msec}``, HAProxy ``%[date(0,us)]``, Heroku's router milliseconds): Unix
time in seconds, milliseconds or microseconds, with or without ``t=``; the number of digits tells them apart. Clocks of
two hosts may be apart. That the proxy's is ahead shows when requests seem to come before they left: then the quickest
of the last minutes is taken to have been there at once, and the others are measured by it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping

_LONGEST_NS = 600 * 10**9
"""What is longer is no time of a request: it is ignored."""
_PERIOD_S, _PERIODS = 60.0, 5
_UNITS_NS = ((1e8, 1e11, 1e9), (1e11, 1e14, 1e6), (1e14, 1e17, 1e3))
"""From and below which number a time since 1973 is in seconds, milliseconds, microseconds; in nanoseconds."""


class Front:
    """The time before the ingress, of the requests of one replica.

    Args:
        unix_ns: Unix time in nanoseconds.
        clock: monotonic seconds.
    """

    def __init__(self, unix_ns: Callable[[], int] = time.time_ns, clock: Callable[[], float] = time.monotonic) -> None:
        self._unix_ns, self._clock = unix_ns, clock
        self._least: deque[tuple[float, int]] = deque(maxlen=_PERIODS)
        """By minute: the shortest time, by both clocks."""

    def elapsed_ns(self, headers: Mapping[str, str]) -> int:
        """How long ago the request reached the first proxy; 0 without the header, or if it makes no sense."""
        told = headers.get("x-request-start")
        if told is None or (started_ns := parse_start(told)) is None:
            return 0
        elapsed_ns = self._unix_ns() - started_ns
        if abs(elapsed_ns) > _LONGEST_NS:
            return 0
        return elapsed_ns - min(0, self._shortest_ns(elapsed_ns))

    def _shortest_ns(self, elapsed_ns: int) -> int:
        now_s = self._clock()
        if not self._least or now_s - self._least[-1][0] > _PERIOD_S:
            self._least.append((now_s, elapsed_ns))
        elif elapsed_ns < self._least[-1][1]:
            self._least[-1] = (self._least[-1][0], elapsed_ns)
        return min(least for _, least in self._least)


def parse_start(text: str) -> int | None:
    """Parse ``t=1700000000.123``, ``1700000000123`` or ``t=1700000000123456`` into Unix nanoseconds."""
    number = text.strip().removeprefix("t=")
    whole, _, fraction = number.partition(".")
    if not (whole.isascii() and whole.isdecimal() and len(whole) <= 16) or not all(c in "0123456789" for c in fraction):
        return None
    value = float(number)
    return next((round(value * unit) for least, most, unit in _UNITS_NS if least <= value < most), None)
