"""The local store: OTLP JSON lines in one folder, used when no collector is configured.

1. Every line is one ``TracesData`` or ``MetricsData`` object, in the format of the Collector's file exporter.
2. Each process writes its own files, ``traces-<instance>-<pid>-<n>.jsonl`` and ``metrics-...``, so replicas never write
   into each other's lines, and a line truncated by a crash is always the last line of a file that is not appended to.
3. Files are rotated at ``max_file_mb``. All files in the folder together stay below ``max_total_mb``, plus up to an
   eighth of a file per writing process: the oldest are deleted first. If its file is removed, a process starts a new
   one.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import os
import re
import threading
from pathlib import Path
from typing import Any, Literal

from opentelemetry.exporter.otlp.json.common.metrics_encoder import encode_metrics
from opentelemetry.sdk.metrics.export import MetricExporter, MetricExportResult, MetricsData

_OUR_FILES = re.compile(r"(traces|metrics)-.+-\d+-\d{6}\.jsonl")
_logger = logging.getLogger("slowlens.telemetry")


class JsonLines:
    """Append-only lines in rotated files. Thread-safe; other processes may use the same folder.

    ``write`` raises OSError if the folder cannot be written.
    """

    def __init__(
        self,
        directory: Path,
        signal: Literal["traces", "metrics"],
        instance: str,
        max_file_bytes: int,
        max_total_bytes: int,
    ) -> None:
        safe = re.sub(r"[^A-Za-z0-9_.]+", "_", instance)
        self._directory, self._prefix = directory, f"{signal}-{safe}-{os.getpid()}"
        self._max_file_bytes, self._max_total_bytes = max_file_bytes, max_total_bytes
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._file: Any = None
        self._size = self._unchecked = 0

    def write(self, line: bytes) -> None:
        with self._lock:
            if self._file is not None and (self._size + len(line) >= self._max_file_bytes or self._was_removed()):
                self._close()
            if self._file is None:
                self._open(len(line) + 1)
            try:
                # One unbuffered write: a crash leaves either the line or its beginning, and nothing after it.
                if self._file.write(line + b"\n") <= len(line):
                    raise OSError(errno.ENOSPC, "the disk is full")
            except OSError:
                # A partly written line must stay the last of its file.
                self._close()
                raise
            self._size += len(line) + 1
            self._unchecked += len(line) + 1
            if self._unchecked > self._max_file_bytes // 8:
                self._remove_oldest(0)

    def close(self) -> None:
        with self._lock:
            self._close()

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
            self._size = 0

    def _was_removed(self) -> bool:
        return os.fstat(self._file.fileno()).st_nlink == 0

    def _open(self, room: int) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        self._remove_oldest(max(room, self._max_file_bytes))
        while self._file is None:
            path = self._directory / f"{self._prefix}-{next(self._numbers):06d}.jsonl"
            with contextlib.suppress(FileExistsError):
                self._file = path.open("xb", buffering=0)
        self._size = 0

    def _remove_oldest(self, room: int) -> None:
        """Keep the folder below the cap with ``room`` to spare. Only our own files are touched."""
        self._unchecked = 0
        own = self._file.name if self._file is not None else None
        files = []
        for path in self._directory.glob("*.jsonl"):
            if str(path) == str(own) or not _OUR_FILES.fullmatch(path.name):
                continue
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                files.append((status.st_mtime_ns, status.st_size, path))
        total = sum(size for _, size, _ in files) + self._size + room
        for _, size, path in sorted(files):
            if total <= self._max_total_bytes:
                return
            path.unlink(missing_ok=True)
            total -= size


class JsonLinesMetricExporter(MetricExporter):
    def __init__(self, lines: JsonLines) -> None:
        super().__init__()
        self._lines = lines

    def export(
        self,
        metrics_data: MetricsData,
        timeout_millis: float = 10_000,  # noqa: ARG002
        **_: Any,
    ) -> MetricExportResult:
        try:
            self._lines.write(encode_metrics(metrics_data).to_json().encode())
        except OSError as error:
            _logger.warning("cannot write to the local store, a metrics export is lost: %s", error)
            return MetricExportResult.FAILURE
        return MetricExportResult.SUCCESS

    def shutdown(self, timeout_millis: float = 30_000, **_: Any) -> None:  # noqa: ARG002
        self._lines.close()

    def force_flush(self, timeout_millis: float = 10_000) -> bool:  # noqa: ARG002
        return True
