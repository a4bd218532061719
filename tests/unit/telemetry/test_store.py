"""The local store: Collector-compatible lines, concurrent writers, the size cap and crashes."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.json_format import ParseDict
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.trace import SpanContext

from deployments.telemetry import names
from deployments.telemetry.export.sinks import StoreSink
from deployments.telemetry.export.span import Span
from deployments.telemetry.export.store import JsonLines, JsonLinesMetricExporter

WRITER = """
import sys
from pathlib import Path
from deployments.telemetry.export.store import JsonLines
lines = JsonLines(Path(sys.argv[1]), "traces", "replica#" + sys.argv[2], 20_000, 100_000)
print("ready", flush=True)
for number in range(int(sys.argv[3])):
    lines.write(b'{"writer": %s, "number": %d, "padding": "%s"}' % (sys.argv[2].encode(), number, b"x" * 100))
if sys.argv[4] == "crash":
    lines._file.write(b'{"writer": 9, "numb')
    lines._file.flush()
    import os, signal
    os.kill(os.getpid(), signal.SIGKILL)
"""


def lines_in(folder: Path) -> list[dict[str, Any]]:
    """Return all complete lines; fail if any line but the last of a file is broken."""
    found = []
    for path in sorted(folder.glob("*.jsonl")):
        *whole, rest = path.read_bytes().split(b"\n")
        found += [json.loads(line) for line in whole]
        assert not rest or rest.startswith(b"{")
    return found


def writer(folder: Path, number: int, lines: int, end: str = "close") -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", WRITER, str(folder), str(number), str(lines), end])


def a_span() -> Span:
    context = SpanContext(1, 2, False)
    return Span(name=names.QUEUE, trace=context, span_id=3, started_unix_ns=10, ended_unix_ns=20, attributes={})


def with_bytes_ids(value: Any) -> Any:
    """Convert ids from hex (OTLP JSON) to base64 (protobuf JSON), the only difference between the two."""
    if isinstance(value, dict):
        return {
            key: base64.b64encode(bytes.fromhex(inner)).decode()
            if key in ("traceId", "spanId", "parentSpanId")
            else with_bytes_ids(inner)
            for key, inner in value.items()
        }
    return [with_bytes_ids(item) for item in value] if isinstance(value, list) else value


Open = Callable[..., JsonLines]


@pytest.fixture
def opened() -> Iterator[Open]:
    """Makes stores, and closes them at the end."""
    with contextlib.ExitStack() as stack:
        yield lambda *args, **options: stack.enter_context(contextlib.closing(JsonLines(*args, **options)))


def test_metrics_are_otlp_json(tmp_path: Path, opened: Open) -> None:
    reader = InMemoryMetricReader()
    meter = MeterProvider([reader]).get_meter("slowlens")
    meter.create_histogram("h", "ms").record(5, {"model": "m"})
    meter.create_counter("c").add(2)
    data = reader.get_metrics_data()
    assert data is not None
    JsonLinesMetricExporter(opened(tmp_path, "metrics", "replica", 10**6, 10**7)).export(data)
    (path,) = tmp_path.glob("metrics-replica-*.jsonl")
    parsed = ParseDict(with_bytes_ids(json.loads(path.read_text())), ExportMetricsServiceRequest())
    histogram, counter = parsed.resource_metrics[0].scope_metrics[0].metrics

    assert (histogram.name, histogram.histogram.data_points[0].count) == ("h", 1)
    assert counter.sum.data_points[0].as_int == 2


def test_concurrent_writers_write_complete_lines_and_lose_none(tmp_path: Path) -> None:
    writers = [writer(tmp_path, number, 200) for number in range(3)]
    assert [process.wait(60) for process in writers] == [0, 0, 0]
    found = lines_in(tmp_path)

    for number in range(3):
        assert [line["number"] for line in found if line["writer"] == number] == list(range(200))


def test_files_are_rotated_and_the_oldest_deleted_at_the_cap(tmp_path: Path, opened: Open) -> None:
    lines = opened(tmp_path, "traces", "replica", max_file_bytes=1_000, max_total_bytes=5_000)
    for number in range(200):
        lines.write(b'{"number": %3d, "padding": "%s"}' % (number, b"x" * 70))
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 5_000
    numbers = [line["number"] for line in lines_in(tmp_path)]

    assert numbers == list(range(numbers[0], 200))
    assert 35 <= len(numbers) < 60
    assert all(path.stat().st_size <= 1_000 for path in tmp_path.iterdir())


def test_only_own_files_are_deleted(tmp_path: Path, opened: Open) -> None:
    foreign = tmp_path / "my-dataset.jsonl"
    foreign.write_text("x" * 10_000)
    lines = opened(tmp_path, "traces", "replica", max_file_bytes=1_000, max_total_bytes=4_000)
    for _ in range(100):
        lines.write(b"{}" + b" " * 98)

    assert foreign.exists()


def test_the_cap_holds_for_many_writers(tmp_path: Path, opened: Open) -> None:
    writers = [opened(tmp_path, "traces", f"replica-{n}", 1_000, 5_000) for n in range(12)]
    for _ in range(30):
        for lines in writers:
            lines.write(b"{}" + b" " * 98)
            assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 5_000 + len(writers) * 125

    assert len(lines_in(tmp_path)) > 20


def test_a_line_truncated_by_a_full_disk_ends_its_file(
    tmp_path: Path, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    files: list[_Disk] = []
    really_open = Path.open

    def open_on_disk(path: Path, *args: Any, **options: Any) -> _Disk:
        files.append(_Disk(really_open(path, *args, **options)))
        return files[-1]

    lines = opened(tmp_path, "traces", "replica", 10**6, 10**7)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", open_on_disk)
        lines.write(b'{"number": 1}')
        files[0].is_full = True
        with pytest.raises(OSError, match="the disk is full"):
            lines.write(b'{"number": 2}')
        assert files[0].closed
        lines.write(b'{"number": 3}')
    lines.close()

    assert lines_in(tmp_path) == [{"number": 1}, {"number": 3}]


class _Disk:
    """A file that takes only the first three bytes of a line once the disk is full, as the system call does."""

    def __init__(self, file: Any) -> None:
        self._file, self.is_full = file, False

    def write(self, data: bytes) -> int:
        return int(self._file.write(data[:3] if self.is_full else data))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def test_a_crash_in_the_middle_of_a_line_corrupts_no_other_line(tmp_path: Path) -> None:
    assert writer(tmp_path, 1, 20, "crash").wait(60) == -signal.SIGKILL
    assert writer(tmp_path, 1, 20).wait(60) == 0
    found = lines_in(tmp_path)

    assert [line["number"] for line in found] == [*range(20), *range(20)]


def test_a_file_deleted_while_open_is_recreated(tmp_path: Path, opened: Open) -> None:
    lines = opened(tmp_path, "traces", "replica", 10**6, 10**7)
    lines.write(b'{"number": 1}')
    for path in tmp_path.iterdir():
        path.unlink()
    lines.write(b'{"number": 2}')

    assert lines_in(tmp_path) == [{"number": 2}]


def test_an_unwritable_folder_drops_and_counts_spans_without_raising(tmp_path: Path, opened: Open) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    sink = StoreSink(opened(blocked / "store", "traces", "replica", 10**6, 10**7), Resource({}))
    sink.take(a_span())
    sink.close()

    assert sink.unwritten == 1
    assert os.listdir(tmp_path) == ["file"]  # noqa: PTH208
