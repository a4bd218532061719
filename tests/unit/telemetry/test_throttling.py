"""The time in which a CPU limit held the process back: from files of the kernel's form, and from the kernel itself."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from deployments.telemetry.gauges.throttling import Throttling, throttled_ns

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
    seen = Throttling(lambda: now[0], tmp_path, membership)
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
    seen = Throttling(lambda: now[0], tmp_path, membership)
    seen.look()
    statistics.write_text(V1.format(7 + S // 10))
    now[0] = S
    seen.look()
    assert seen.between_ns(0, S) == S // 10


@pytest.mark.parametrize("text", ["", "usage_usec 10\n", "throttled_usec\n", "throttled_usec many\n", "\n\n"])
def test_where_nothing_is_counted_there_is_nothing(text: str, tmp_path: Path) -> None:
    membership = tmp_path / "cgroup"
    membership.write_text("0::/\nnonsense\n")
    assert throttled_ns(group(tmp_path, text)) is None
    seen = Throttling(lambda: 0, tmp_path, membership)
    seen.look()
    assert not seen.is_known
    assert seen.between_ns(0, S) == 0
    assert not Throttling(lambda: 0, tmp_path, tmp_path / "missing").is_known


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
from deployments.telemetry.gauges.throttling import Throttling
input()
seen = Throttling()
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
