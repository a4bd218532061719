"""What the kernel counts of CPU time and of shortages, as it grows: nothing where it does not count it.

- ``throttled``: time in which the container's control group, or one that it is in, had used up its CPU quota while
  threads of it could run (``cpu.stat``). These threads' run delay has it too: it says that they waited, this for what.
- ``busy``: CPU time that was used on this machine, in all its CPUs together (``/proc/stat``).
- ``stolen``: time in which this machine's CPUs could run and its hypervisor ran others (``/proc/stat``); the mean of
  the CPUs. No run delay has it: the threads think that they run.
- ``pressure``: time in which at least one thread waited for CPUs, memory or the disk; in the container's control group
  where it counts for itself, else on the whole machine (``*.pressure``, "some").
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from deployments.telemetry.gauges.curve import Curve

Count = Callable[[], int | None]
"""Nanoseconds since some time; None where the kernel does not count them."""
_MOUNT = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")
_SYSTEM = Path("/proc/pressure")
_STAT = Path("/proc/stat")
_THROTTLED = {b"throttled_usec": 1000, b"throttled_time": 1}
"""Of version 2 and version 1, in nanoseconds."""
_BUSY, _STOLEN = (1, 2, 3, 6, 7), 8
"""The columns of a ``cpu`` line (user, nice, system, irq, softirq; steal), of which the first is the name."""
_TICK_NS = 10**9 // os.sysconf("SC_CLK_TCK")
CPUS = os.cpu_count() or 1


class Counter:
    """A counter of nanoseconds, looked at a few times a second.

    Args:
        count: what it is now.
        clock: monotonic nanoseconds.
        most: by how much it grows at most in a nanosecond.
    """

    def __init__(self, count: Count, clock: Callable[[], int] = time.monotonic_ns, most: float = 1.0) -> None:
        self._count, self._clock, self._curve = count, clock, Curve(most)
        self._seen = count()
        self._curve.add(clock(), 0)

    @property
    def is_known(self) -> bool:
        """Whether the kernel counts it here."""
        return self._seen is not None

    def look(self) -> None:
        """Called several times a second, by one thread."""
        if self._seen is not None:
            before, self._seen = self._seen, max(self._seen, self._count() or 0)
            self._curve.add(self._clock(), self._seen - before)

    def between_ns(self, started_ns: int, ended_ns: int) -> int:
        """How much came between two times, as far as it was seen."""
        return self._curve.between_ns(started_ns, ended_ns)

    def ratio(self) -> float:
        """The share of the time since the last call: 0 to 1."""
        return self._curve.ratio()


def throttled(mount: Path = _MOUNT, membership: Path = _MEMBERSHIP) -> Count:
    """By the groups that this process is in now."""
    files = [
        file for group in _groups(mount, membership, "cpu") if _throttled_ns(file := group / "cpu.stat") is not None
    ]
    return lambda: sum(_throttled_ns(file) or 0 for file in files) if files else None


def pressure(resource: str, mount: Path = _MOUNT, membership: Path = _MEMBERSHIP, system: Path = _SYSTEM) -> Count:
    """Of ``cpu``, ``memory`` or ``io``, in the innermost group that counts it."""
    groups = [*_groups(mount, membership, ""), *_groups(mount / "unified", membership, "")]
    files = [*(group / f"{resource}.pressure" for group in groups), system / resource]
    file = next((file for file in files if _waited_ns(file) is not None), None)
    return partial(_waited_ns, file) if file is not None else lambda: None


def busy(stat: Path = _STAT) -> Count:
    return lambda: _of_all_cpus(stat, _BUSY)


def stolen(stat: Path = _STAT) -> Count:
    return lambda: None if (of_all := _of_all_cpus(stat, (_STOLEN,))) is None else of_all // CPUS


def _of_all_cpus(stat: Path, columns: Sequence[int]) -> int | None:
    try:
        with stat.open("rb") as file:
            of_all = file.readline().split()
        return sum(int(of_all[column]) for column in columns) * _TICK_NS if of_all[0] == b"cpu" else None
    except (OSError, ValueError, IndexError):
        return None


def _throttled_ns(path: Path) -> int | None:
    """Of a ``cpu.stat``; None if it has no such counter."""
    try:
        lines = [line.split() for line in path.read_bytes().splitlines()]
        return next((int(line[1]) * _THROTTLED[line[0]] for line in lines if line and line[0] in _THROTTLED), None)
    except (OSError, ValueError, IndexError):
        return None


def _waited_ns(path: Path) -> int | None:
    """Of a pressure file; None if it is none."""
    try:
        some = next(line.split() for line in path.read_bytes().splitlines() if line.startswith(b"some"))
        return next(int(field[6:]) * 1000 for field in some if field.startswith(b"total="))
    except (OSError, ValueError, StopIteration):
        return None


def _groups(mount: Path, membership: Path, controller: str) -> Iterator[Path]:
    """Folders of the groups that a process is in, by those of a controller of version 1 (or only by version 2's)."""
    try:
        lines = [line.split(":", 2) for line in membership.read_text().splitlines()]
    except OSError:
        return
    for line in lines:
        if len(line) != 3:
            continue
        _, controllers, path = line
        # Version 2 has no controllers here; in version 1, a folder bears their names.
        if controllers and controller not in controllers.split(","):
            continue
        base = mount / controllers if controllers else mount
        # In a container the group is often mounted at the root, whatever its path outside is.
        yield from (base.joinpath(*part.parts[1:]) for part in (Path(path), *Path(path).parents))
