"""What was short: a CPU limit, stolen CPUs, pressure; from files of the kernel's form, and from the kernel itself."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from deployments.telemetry.gauges.counters import CPUS, Counter, busy, pressure, stolen, throttled

S = 10**9
V2 = "usage_usec 10\nnr_periods 4\nnr_throttled 2\nthrottled_usec {}\n"
V1 = "nr_periods 4\nnr_throttled 2\nthrottled_time {}\n"


def group(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cpu.stat").write_text(text)
    return folder / "cpu.stat"


def test_version_2_counts_in_microseconds_and_so_do_the_groups_around(tmp_path: Path) -> None:
    membership = tmp_path / "cgroup"
    membership.write_text("0::/pod/container\n")
    inner, outer = group(tmp_path / "pod" / "container", V2.format(0)), group(tmp_path / "pod", V2.format(100))
    now = [0]
    seen = Counter(throttled(tmp_path, membership), lambda: now[0])
    seen.look()

    inner.write_text(V2.format(300_000))
    outer.write_text(V2.format(200_100))
    now[0] = S
    seen.look()
    assert seen.is_known
    assert seen.between_ns(0, S) == S // 2
    assert seen.between_ns(0, S // 2) == S // 4
    assert seen.ratio() == pytest.approx(0.5)
    # Several CPUs may be throttled at once; it is no more than the time itself.
    inner.write_text(V2.format(9_300_000))
    now[0] = 2 * S
    seen.look()
    assert seen.between_ns(S, 2 * S) == S


def test_version_1_counts_in_nanoseconds_below_its_controller(tmp_path: Path) -> None:
    membership = tmp_path / "cgroup"
    membership.write_text("5:memory:/a\n4:cpu,cpuacct:/outside/a\n1:name=systemd:/a\n")
    # In a container the group is mounted at the root.
    statistics = group(tmp_path / "cpu,cpuacct", V1.format(7))
    now = [0]
    seen = Counter(throttled(tmp_path, membership), lambda: now[0])
    seen.look()
    statistics.write_text(V1.format(7 + S // 10))
    now[0] = S
    seen.look()
    assert seen.between_ns(0, S) == S // 10


@pytest.mark.parametrize("text", ["", "usage_usec 10\n", "throttled_usec\n", "throttled_usec many\n", "\n\n"])
def test_where_nothing_is_counted_there_is_nothing(text: str, tmp_path: Path) -> None:
    membership = tmp_path / "cgroup"
    membership.write_text("0::/\nnonsense\n")
    group(tmp_path, text)
    seen = Counter(throttled(tmp_path, membership), lambda: 0)
    seen.look()
    assert not seen.is_known
    assert seen.between_ns(0, S) == 0
    assert not Counter(throttled(tmp_path, tmp_path / "missing"), lambda: 0).is_known


@pytest.fixture
def limited() -> Iterator[Path]:
    """A control group that may use a fifth of one CPU."""
    name = f"slowlens-test-{os.getpid()}"
    for folder, quota in (
        (Path("/sys/fs/cgroup/cpu") / name, ("cpu.cfs_quota_us", "20000")),
        (Path("/sys/fs/cgroup/cpu,cpuacct") / name, ("cpu.cfs_quota_us", "20000")),
        (Path("/sys/fs/cgroup") / name, ("cpu.max", "20000 100000")),
    ):
        with contextlib.suppress(OSError):
            folder.mkdir()
            try:
                (folder / quota[0]).write_text(quota[1])
            except OSError:
                folder.rmdir()
                continue
            yield folder
            folder.rmdir()
            return
    pytest.skip("no control group with a CPU limit can be made here")


def test_the_kernel_counts_what_a_limit_costs(limited: Path) -> None:
    program = """
import time
from pathlib import Path
from deployments.telemetry.gauges.counters import Counter, throttled
input()
seen = Counter(throttled())
seen.look()
began = time.monotonic_ns()
while time.monotonic_ns() - began < 1_000_000_000:
    pass
seen.look()
print(seen.between_ns(began, time.monotonic_ns()) / (time.monotonic_ns() - began))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    (limited / "cgroup.procs").write_text(str(process.pid))
    said, _ = process.communicate("\n", timeout=60)
    assert float(said) == pytest.approx(0.8, abs=0.2)


PRESSURE = "some avg10=0.00 avg60=0.24 avg300=0.65 total={}\nfull avg10=0.00 avg60=0.20 avg300=0.54 total=7\n"


def test_pressure_is_that_of_the_innermost_group_which_counts_it(tmp_path: Path) -> None:
    membership = tmp_path / "membership"
    membership.write_text("5:memory:/elsewhere\n0::/pod/container\n")
    for folder, total in (("", 1), ("unified/pod", 100), ("unified/pod/container", 0)):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / "io.pressure").write_text(PRESSURE.format(total) if total else "")
    (tmp_path / "system").mkdir()
    (tmp_path / "system" / "memory").write_text(PRESSURE.format(30))

    # In the hybrid layout version 2 is mounted below; the container's own file has no count.
    assert pressure("io", tmp_path / "unified", membership, tmp_path / "system")() == 100_000
    # On the whole machine, where no group has it; None where nothing has.
    assert pressure("memory", tmp_path / "unified", membership, tmp_path / "system")() == 30_000
    assert pressure("cpu", tmp_path / "unified", membership, tmp_path / "system")() is None
    assert pressure("io", tmp_path, tmp_path / "missing", tmp_path)() is None


def test_busy_time_is_that_of_all_cpus_and_stolen_time_their_mean(tmp_path: Path) -> None:
    stat = tmp_path / "stat"
    stat.write_text("cpu  100 20 3 900 50 6 7 80 9 10\ncpu0 1 1 1 1 1 1 1 1 1 1\nintr 5\n")
    tick_ns = S // os.sysconf("SC_CLK_TCK")
    assert busy(stat)() == 136 * tick_ns
    assert stolen(stat)() == 80 * tick_ns // CPUS
    for text in ("intr 5\n", "cpu 1 2\n", "cpu a b c d e f g h i\n", ""):
        stat.write_text(text)
        assert busy(stat)() is None
        assert stolen(stat)() is None
    assert busy(tmp_path / "missing")() is None


def test_several_cpus_may_be_used_at_once() -> None:
    now, counted = [0], [0]
    seen = Counter(lambda: counted[0], lambda: now[0], most=4)
    now[0], counted[0] = S, 3 * S
    seen.look()
    assert seen.between_ns(0, S // 2) == 3 * S // 2
    now[0], counted[0] = 2 * S, 30 * S
    seen.look()
    assert seen.between_ns(S, 2 * S) == 4 * S
