"""How long a CPU limit of the container held this process back, as Linux counts it (``cpu.stat`` of its control group).

The kernel counts the time in which the group, or one that it is in, had used up its quota while threads of it could
run. These threads' run delay has it too: it says that they waited, this says for what.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

from deployments.telemetry.gauges.curve import Curve

_MOUNT = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")
_COUNTERS = {b"throttled_usec": 1000, b"throttled_time": 1}
"""Of version 2 and version 1, in nanoseconds."""


class Throttling:
    """The throttled time of this process, over time.

    Args:
        clock: monotonic nanoseconds.
        mount: where the control groups are.
        membership: a file that says which this process is in, as ``/proc/self/cgroup``.
    """

    def __init__(
        self,
        clock: Callable[[], int] = time.monotonic_ns,
        mount: Path = _MOUNT,
        membership: Path = _MEMBERSHIP,
    ) -> None:
        self._clock, self._curve = clock, Curve()
        self._files = list(_statistics(mount, membership))
        self._seen = self._read()

    @property
    def is_known(self) -> bool:
        """Whether the kernel counts it here."""
        return bool(self._files)

    def look(self) -> None:
        """Called several times a second, by one thread."""
        if self._files:
            before, self._seen = self._seen, self._read()
            self._curve.add(self._clock(), max(0, self._seen - before))

    def between_ns(self, started_ns: int, ended_ns: int) -> int:
        """The throttled time between two times, as far as it was seen."""
        return self._curve.between_ns(started_ns, ended_ns)

    def ratio(self) -> float:
        """The share of the time since the last call: 0 to 1."""
        return self._curve.ratio()

    def _read(self) -> int:
        return sum(throttled for path in self._files if (throttled := throttled_ns(path)) is not None)


def throttled_ns(path: Path) -> int | None:
    """Read a ``cpu.stat``; None if it has no such counter."""
    try:
        lines = [line.split() for line in path.read_bytes().splitlines()]
        return next((int(line[1]) * _COUNTERS[line[0]] for line in lines if line and line[0] in _COUNTERS), None)
    except (OSError, ValueError, IndexError):
        return None


def _statistics(mount: Path, membership: Path) -> Iterator[Path]:
    """The ``cpu.stat`` files of this process's group and of those that it is in, as far as they count."""
    try:
        lines = [line.split(":", 2) for line in membership.read_text().splitlines()]
    except OSError:
        return
    for line in lines:
        if len(line) != 3:
            continue
        _, controllers, path = line
        # Version 2 has no controllers here; in version 1, a folder bears their names.
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = mount / controllers if controllers else mount
        # In a container the group is often mounted at the root, whatever its path outside is.
        inside = [base.joinpath(*part.parts[1:]) for part in (Path(path), *Path(path).parents)]
        yield from (file for one in inside if throttled_ns(file := one / "cpu.stat") is not None)
