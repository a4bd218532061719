"""The GPU reader through the real pynvml, against a real shared library."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.support.nvml import FIRST, SECOND, SLICE, compile_nvml, run_with_nvml

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler for the fake libnvidia-ml")

READ = """
import dataclasses, json, logging, sys
logging.basicConfig(stream=sys.stderr)
from deployments.telemetry.gauges.nvml import GpuReader
reader = GpuReader({devices!r}, interval_s=0.01)
print(json.dumps([dataclasses.asdict(s) for s in reader.samples()]))
reader.close()
"""

FALLS_OFF = """
import os, pathlib, json, time
from deployments.telemetry.gauges.nvml import GpuReader
lost = pathlib.Path(os.environ["FAKE_NVML_LOST"])
reader = GpuReader(["0", "1"], interval_s=0.01)
def until(count):
    while len(reader.samples()) != count:
        time.sleep(0.005)
    return [s.index for s in reader.samples()]
seen = [until(2)]
lost.touch(); seen.append(until(1))
lost.unlink(); seen.append(until(2))
print(json.dumps(seen))
reader.close()
"""


@pytest.fixture(scope="module")
def nvml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_nvml(tmp_path_factory.mktemp("nvml"))


def read(nvml: Path | None, devices: list[str]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(run_with_nvml(nvml, READ.format(devices=devices)))
    return found


def test_only_the_given_device_is_read(nvml: Path) -> None:
    assert read(nvml, ["1"]) == [
        {
            "index": 1,
            "uuid": SECOND,
            "utilization_percent": 41.0,
            "memory_used_bytes": 2_000_000_000,
            "memory_total_bytes": 80_000_000_000,
            "power_w": 300.501,
            "temperature_c": 51.0,
        }
    ]


@pytest.mark.parametrize(
    ("devices", "uuids"),
    [
        ([], []),
        (["0", "1"], [FIRST, SECOND]),
        ([SECOND], [SECOND]),
        (["GPU-bbbb"], [SECOND]),
        (["7"], []),
        (["GPU-x"], []),
    ],
)
def test_devices_are_named_as_in_cuda(nvml: Path, devices: list[str], uuids: list[str]) -> None:
    assert [sample["uuid"] for sample in read(nvml, devices)] == uuids


def test_a_mig_slice_reports_only_its_own_memory(nvml: Path) -> None:
    (sample,) = read(nvml, [SLICE])

    assert (sample["uuid"], sample["index"]) == (SLICE, 1)
    assert (sample["memory_used_bytes"], sample["memory_total_bytes"]) == (2_000_000_000, 10_000_000_000)
    assert sample["utilization_percent"] is sample["power_w"] is sample["temperature_c"] is None


def test_a_missing_symbol_loses_only_its_own_value(tmp_path: Path) -> None:
    (sample,) = read(compile_nvml(tmp_path, "-DNO_POWER"), ["0"])

    assert sample["power_w"] is None
    assert (sample["utilization_percent"], sample["temperature_c"]) == (40.0, 50.0)


def test_a_missing_library_means_no_gpu_telemetry(tmp_path: Path) -> None:
    broken = tmp_path / "libnvidia-ml.so.1"
    broken.write_text("not a library")

    assert read(tmp_path, ["0"]) == []


def test_a_lost_device_is_dropped_and_retried(nvml: Path, tmp_path: Path) -> None:
    seen = json.loads(run_with_nvml(nvml, FALLS_OFF, FAKE_NVML_LOST=str(tmp_path / "lost")))

    assert seen == [[0, 1], [1], [0, 1]]
