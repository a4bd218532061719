"""A real Prometheus, and what it scrapes: the OTLP metrics of a receiver, as the Collector's exporter exposes them."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml

from deployments.telemetry.export.prometheus_names import label, prometheus_name
from tests.support.otlp import OtlpReceiver

PROMETHEUS = Path(__file__).parents[2] / "k8s" / "base" / "prometheus"


class Exposition:
    """The newest point of each series that a receiver has got."""

    def __init__(self, receiver: OtlpReceiver) -> None:
        self._receiver = receiver
        self._families: dict[str, tuple[str, dict[str, list[str]]]] = {}
        self._seen = 0
        self._lock = threading.Lock()

    def text(self) -> str:
        """OpenMetrics text. What has been read once is not read again, so that a scrape stays short."""
        with self._lock:
            new = self._receiver.resource_metrics()[self._seen :]
            self._seen += len(new)
            for resource in new:
                self._take(resource)
            lines = []
            for name, (kind, samples) in self._families.items():
                lines.append(f"# TYPE {name.removesuffix('_total')} {kind}")
                lines += [line for of_series in samples.values() for line in of_series]
            return "\n".join([*lines, "# EOF", ""])

    def _take(self, resource: Any) -> None:
        own = {a.key: a.value.string_value for a in resource.resource.attributes}
        # As the specification maps them: service.namespace/service.name and service.instance.id.
        base = {"job": f"{own['service.namespace']}/{own['service.name']}", "instance": own["service.instance.id"]}
        for metric in (metric for scope in resource.scope_metrics for metric in scope.metrics):
            data = metric.WhichOneof("data")
            is_counter = data == "sum" and metric.sum.is_monotonic
            kind = "histogram" if data == "histogram" else "counter" if is_counter else "gauge"
            name = prometheus_name(metric.name, kind, metric.unit)
            _, samples = self._families.setdefault(name, (kind, {}))
            for point in getattr(metric, data).data_points:
                labels = base | {label(a.key): a.value.string_value or str(a.value.int_value) for a in point.attributes}
                text = ",".join(f"{key}={json.dumps(value)}" for key, value in sorted(labels.items()))
                samples[text] = list(_samples(name, kind, text, point))


def _samples(name: str, kind: str, labels: str, point: Any) -> Iterator[str]:
    if kind != "histogram":
        yield f"{name}{{{labels}}} {point.as_double if point.HasField('as_double') else point.as_int}"
        return
    bounds = [*map(str, point.explicit_bounds), "+Inf"]
    exemplars: dict[str, Any] = defaultdict(lambda: None)
    for exemplar in point.exemplars:
        bound = next((b for b in point.explicit_bounds if exemplar.as_double <= b), "+Inf")
        exemplars[str(bound)] = exemplar
    total = 0
    for bound, count in zip(bounds, point.bucket_counts, strict=True):
        total += count
        exemplar = exemplars[bound]
        ending = f' # {{trace_id="{exemplar.trace_id.hex()}"}} {exemplar.as_double}' if exemplar is not None else ""
        yield f'{name}_bucket{{{labels},le="{bound}"}} {total}{ending}'
    yield f"{name}_sum{{{labels}}} {point.sum}"
    yield f"{name}_count{{{labels}}} {point.count}"


@contextlib.contextmanager
def prometheus(receiver: OtlpReceiver, folder: Path) -> Iterator[Prometheus]:
    """Run Prometheus with our rules; it scrapes the receiver's metrics every second, in place of the Collector's."""

    exposition = Exposition(receiver)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = exposition.text().encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/openmetrics-text; version=1.0.0; charset=utf-8")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    config = yaml.safe_load((PROMETHEUS / "prometheus.yaml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(PROMETHEUS / "rules.yaml")]
    config["scrape_configs"] = config["scrape_configs"][:1]
    config["scrape_configs"][0]["static_configs"] = [{"targets": [f"127.0.0.1:{server.server_address[1]}"]}]
    path = folder / "prometheus.yaml"
    path.write_text(yaml.safe_dump(config))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        "prometheus",
        f"--config.file={path}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--enable-feature=exemplar-storage",
    ]
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        yield Prometheus(f"http://127.0.0.1:{port}")
    finally:
        process.terminate()
        process.wait(20)
        server.shutdown()
        server.server_close()


class Prometheus:
    def __init__(self, url: str) -> None:
        self.url = url

    def wait_for(self, expr: str, timeout_s: float = 60) -> list[Any]:
        """Return the result of the query once it is not empty."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                found = self.ask("query", query=expr)["result"]
                if found:
                    return list(found)
            time.sleep(0.2)
        raise AssertionError(f"no data in {timeout_s} s: {expr}")

    def ask(self, what: str, **query: str) -> Any:
        url = f"{self.url}/api/v1/{what}?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(url, timeout=10) as answer:
            return json.loads(answer.read())["data"]
