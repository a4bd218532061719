"""``/metrics`` in Prometheus' format: one target per node, for those without a Collector.

1. Every process of the application listens on a socket in one folder of its node, and answers with its own metrics, as
   OpenTelemetry's exporter writes them.
2. One of them, whichever is first, also listens on the port. It asks all, and adds up what is the same series. If it
   goes, another takes the port.
3. A counter must not fall when a replica leaves. A process leaves its last counters in a file; those of one that died
   are written by whoever had the port. They are added from then on.

Series carry the model and the stage (``service_name``), and no ids: of the replicas of a stage, counters, histograms
and most gauges are added up; of gauges that are ratios, percentages, temperatures or ages, the highest counts.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import stat
import tempfile
import threading
import uuid
from collections.abc import Iterable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import BaseRequestHandler, BaseServer, ThreadingUnixStreamServer
from typing import Any

from opentelemetry.exporter.prometheus import PrometheusMetricReader
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families

_RETRY_S, _ANSWER_S, _POLL_S = 2.0, 2.0, 0.1
_MOST_DEPARTED = 8
"""Files of processes that are gone, before they are put together."""
_HIGHEST = ("_ratio", "_percent", "_celsius", "_milliseconds")
_logger = logging.getLogger("slowlens.telemetry")
Series = dict[tuple[str, tuple[tuple[str, str], ...]], float]


class PrometheusTarget:
    """This process's part of the node's target.

    ``reader`` belongs to the process's meter provider.
    """

    def __init__(self, host: str, port: int, folder: Path | None = None) -> None:
        self._registry = CollectorRegistry()
        self.reader = PrometheusMetricReader(
            disable_target_info=True,
            scope_info_enabled=False,
            resource_attribute_filter=lambda key: key == "service.name",
            registry=self._registry,
        )
        self._address = host, port
        self._folder = folder or Path(tempfile.gettempdir()) / f"slowlens-metrics-{os.getuid()}-{port}"
        self._name = f"{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._ends = threading.Event()
        self._seen: dict[str, bytes] = {}
        """By socket: what its process last answered."""
        self._asking = threading.Lock()
        self._own: ThreadingUnixStreamServer | None = None
        try:
            self._prepare()
        except OSError as error:
            _logger.error("no metrics for Prometheus: %s", error)
            return
        threading.Thread(target=self._hold_port, name="slowlens-prometheus", daemon=True).start()

    def _prepare(self) -> None:
        """Listen on the socket. Raises OSError, also if the folder is not this user's alone."""
        self._folder.mkdir(mode=0o700, exist_ok=True)
        status = self._folder.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
            raise PermissionError(f"{self._folder} must be a folder of this user alone")
        self._own = _OwnServer(str(self._folder / f"{self._name}.sock"), self._text)
        _serve(self._own, "slowlens-prometheus-own")

    def close(self) -> None:
        """Leave the last counters to whoever has the port."""
        if self._own is None or self._ends.is_set():
            return
        self._ends.set()
        with contextlib.suppress(OSError):
            self._leave(self._name, self._text())
            self._folder.joinpath(f"{self._name}.sock").unlink(missing_ok=True)
        self._own.shutdown()
        self._own.server_close()

    def _text(self) -> bytes:
        return generate_latest(self._registry)

    # --- whoever has the port ---

    def _hold_port(self) -> None:
        while not self._ends.is_set():
            try:
                server = _PortServer(self._address, self.collect)
            except OSError:
                # Another process has it, or it is not for us; that is told by whoever looks at the port.
                self._ends.wait(_RETRY_S)
                continue
            _serve(server, "slowlens-prometheus-port")
            self._ends.wait()
            server.shutdown()
            server.server_close()

    def collect(self) -> bytes:
        """The metrics of all processes of the node, together."""
        with self._asking:
            answers = {path.stem: self._ask(path) for path in sorted(self._folder.glob("*.sock"))}
            here = {name: text for name, text in answers.items() if text is not None}
            # One that has answered may be leaving just now.
            gone = [path.read_bytes() for path in self._departed() if path.stem not in here]
        return _written(_merged(here.values(), gone))

    def _ask(self, path: Path) -> bytes | None:
        """Ask a process; None if it is gone. One that does not answer in time is taken to be as it was."""
        try:
            with socket.socket(socket.AF_UNIX) as asked:
                asked.settimeout(_ANSWER_S)
                asked.connect(str(path))
                self._seen[path.name] = b"".join(iter(lambda: asked.recv(65536), b""))
        except (ConnectionError, FileNotFoundError):
            with contextlib.suppress(OSError):
                if path.exists() and path.name in self._seen:
                    self._leave(path.stem, self._seen[path.name])
                path.unlink(missing_ok=True)
            self._seen.pop(path.name, None)
            return None
        except OSError:
            pass
        return self._seen.get(path.name)

    def _leave(self, name: str, text: bytes) -> None:
        new = self._folder / f"{name}.new"
        new.write_bytes(text)
        new.replace(self._folder / f"{name}.last")

    def _departed(self) -> Sequence[Path]:
        """The files of processes that are gone, put together if they are many."""
        paths = sorted(self._folder.glob("*.last"))
        if len(paths) > _MOST_DEPARTED:
            self._leave("together", _written(_merged([], [path.read_bytes() for path in paths])))
            for path in paths:
                if path.stem != "together":
                    path.unlink(missing_ok=True)
            return [self._folder / "together.last"]
        return paths


def _serve(server: BaseServer, name: str) -> None:
    threading.Thread(target=lambda: server.serve_forever(_POLL_S), name=name, daemon=True).start()


class _OwnServer(ThreadingUnixStreamServer):
    daemon_threads = True

    def __init__(self, path: str, text: Any) -> None:
        self.text = text
        super().__init__(path, _OwnHandler)


class _OwnHandler(BaseRequestHandler):
    server: _OwnServer

    def handle(self) -> None:
        self.request.sendall(self.server.text())


class _PortServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], collect: Any) -> None:
        self.collect = collect
        super().__init__(address, _PortHandler)


class _PortHandler(BaseHTTPRequestHandler):
    server: _PortServer
    timeout = 10

    def do_GET(self) -> None:
        if self.path.partition("?")[0] != "/metrics":
            self.send_error(404)
            return
        body = self.server.collect()
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """A scrape is nothing to log."""


# --- putting metrics together ----------------------------------------------------------------------------------------


def _merged(here: Iterable[bytes], gone: Iterable[bytes]) -> dict[str, tuple[Metric, Series]]:
    found: dict[str, tuple[Metric, Series]] = {}
    for text in here:
        for family in _families(text):
            _add(found, family)
    for text in gone:
        for family in _families(text):
            # What was is no longer; what has been counted stays counted.
            if family.type != "gauge":
                _add(found, family)
    return found


def _families(text: bytes) -> Iterator[Metric]:
    try:
        yield from text_string_to_metric_families(text.decode())
    except ValueError as error:
        _logger.error("metrics of a process could not be read: %s", error)


def _add(found: dict[str, tuple[Metric, Series]], family: Metric) -> None:
    _, series = found.setdefault(family.name, (Metric(family.name, family.documentation, family.type), {}))
    for sample in family.samples:
        key = sample.name, tuple(sorted(sample.labels.items()))
        if family.type == "gauge" and family.name.endswith(_HIGHEST):
            series[key] = max(sample.value, series.get(key, sample.value))
        else:
            series[key] = series.get(key, 0.0) + sample.value


class _Merged:
    """A collector of what has been put together."""

    def __init__(self, found: dict[str, tuple[Metric, Series]]) -> None:
        self._found = found

    def collect(self) -> Iterator[Metric]:
        for metric, series in self._found.values():
            for (name, labels), value in series.items():
                metric.add_sample(name, dict(labels), value)
            yield metric


def _written(found: dict[str, tuple[Metric, Series]]) -> bytes:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Merged(found))
    return generate_latest(registry)
