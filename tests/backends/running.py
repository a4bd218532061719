"""Starts the programs with the configurations that the manifests ship, on free ports of the loopback interface."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from deployments.explain.traces.otlp import Span
from tests.backends.programs import program
from tests.support.made import otlp_of
from tests.support.process import wait_for
from tests.support.prometheus import Prometheus

BASE = Path(__file__).parents[2] / "k8s" / "base"
_AT_ONCE = 1000
_WAITING = ("otelcol_exporter_queue_size", "otelcol_exporter_in_flight_requests")
_FASTER = 10
"""The Collector's waits are divided by it."""


@dataclass
class Running:
    """A program that runs; ``stop`` ends it as Kubernetes does, ``kill`` as nothing should."""

    process: subprocess.Popen[bytes]
    log: Path

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(30)

    def pause(self) -> None:
        """It hangs, until ``resume``."""
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(30)


@dataclass
class Collector(Running):
    endpoint: str
    """OTLP over gRPC."""
    http: str
    metrics: str
    """Where Prometheus scrapes the replicas' metrics, and its own."""
    own_metrics: str
    samples: bool = True
    taken: set[str] = field(default_factory=set)
    """The traces that ``take`` sent."""

    def take(self, spans: Sequence[Span]) -> None:
        """Send it spans."""
        self.taken.update(span.trace_id for span in spans)
        for begin in range(0, len(spans), _AT_ONCE):
            resources = [one for span in spans[begin : begin + _AT_ONCE] for one in otlp_of(span)["resourceSpans"]]
            body = json.dumps({"resourceSpans": resources}).encode()
            request = urllib.request.Request(f"{self.http}/v1/traces", body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=30) as answer:
                assert answer.status == 200

    def settle(self) -> None:
        """Wait until it has decided on all that it took, and passed on what it keeps."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            seen = (
                self.own("otelcol_processor_tail_sampling_new_trace_id_received") if self.samples else len(self.taken)
            )
            held = self.own("otelcol_processor_tail_sampling_sampling_traces_on_memory")
            kept = self.own("otelcol_processor_outgoing_items", processor="transform")
            sent = self.own("otelcol_exporter_sent_spans", exporter="otlp_grpc")
            if seen >= len(self.taken) and not held and kept and kept == sent:
                return
            time.sleep(0.1)
        raise AssertionError(f"{seen} of {len(self.taken)} traces came, {held} are held, {kept - sent} spans wait")

    def drained(self) -> None:
        """Wait until it has passed on what an earlier one had left on disk."""
        deadline = time.monotonic() + 60
        # Its queue has a capacity as soon as it is read from the disk.
        while not self.own("otelcol_exporter_queue_capacity") or any(map(self.own, _WAITING)):
            assert time.monotonic() < deadline, "the queue is not empty"
            time.sleep(0.1)

    def own(self, name: str, **labels: str) -> float:
        """The sum of one of its own counters or gauges with these labels; 0 if there is none."""
        lines = get(self.own_metrics).decode().splitlines()
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        series = [line.rpartition(" ") for line in lines if line.startswith((f"{name}{{", f"{name} "))]
        return sum(float(value) for labelled, _, value in series if all(one in labelled for one in wanted))


@dataclass
class Jaeger(Running):
    endpoint: str
    """OTLP over gRPC, without a scheme."""
    url: str


@contextlib.contextmanager
def collector(
    folder: Path, traces_to: str, *, all_to: str | None = None, samples: bool = True, wait_s: float | None = None
) -> Iterator[Collector]:
    """The Collector as shipped, on a folder that may hold what an earlier one left.

    ``all_to`` is an OTLP endpoint that also gets every span; without ``samples``, all traces are kept.
    It waits ``wait_s`` before it decides, or a tenth of what is shipped.
    """
    config = yaml.safe_load((BASE / "collector" / "config.yaml").read_text())
    (folder / "queue").mkdir(parents=True, exist_ok=True)
    ports = free_ports(5)
    otlp, http, metrics, own, health = (f"127.0.0.1:{port}" for port in ports)
    config["receivers"]["otlp"]["protocols"] = {"grpc": {"endpoint": otlp}, "http": {"endpoint": http}}
    config["exporters"]["prometheus"]["endpoint"] = metrics
    config["exporters"]["otlp_grpc"]["endpoint"] = traces_to
    config["extensions"]["health_check"]["endpoint"] = health
    config["extensions"]["file_storage"]["directory"] = str(folder / "queue")
    reader = config["service"]["telemetry"]["metrics"]["readers"][0]["pull"]["exporter"]["prometheus"]
    reader["host"], reader["port"] = "127.0.0.1", ports[3]
    for key in ("decision_wait", "decision_wait_after_root_received"):
        shipped_s = int(config["processors"]["tail_sampling"][key].removesuffix("s"))
        config["processors"]["tail_sampling"][key] = f"{wait_s or shipped_s / _FASTER}s"
    if not samples:
        config["service"]["pipelines"]["traces"]["processors"].remove("tail_sampling")
    if all_to is not None:
        config["exporters"]["otlp_grpc/all"] = {"endpoint": all_to, "tls": {"insecure": True}}
        config["service"]["pipelines"]["traces/all"] = {"receivers": ["otlp"], "exporters": ["otlp_grpc/all"]}
    path = folder / "collector.yaml"
    path.write_text(yaml.safe_dump(config))
    (deployment, _) = yaml.safe_load_all((BASE / "collector.yaml").read_text())
    arguments = deployment["spec"]["template"]["spec"]["containers"][0]["args"]
    gates = [argument for argument in arguments if argument.startswith("--feature-gates")]
    with _running([str(program("collector")), f"--config={path}", *gates], folder / "collector.log") as process:
        wait_for(lambda: _answers(f"http://{health}/"), folder / "collector.log", process)
        yield Collector(
            process,
            folder / "collector.log",
            f"http://{otlp}",
            f"http://{http}",
            f"http://{metrics}/metrics",
            f"http://{own}/metrics",
            samples,
        )


@contextlib.contextmanager
def jaeger(folder: Path) -> Iterator[Jaeger]:
    """Jaeger as shipped, on a folder that may hold what an earlier one left."""
    config = yaml.safe_load((BASE / "jaeger" / "config.yaml").read_text())
    data = folder / "jaeger"
    data.mkdir(parents=True, exist_ok=True)
    otlp, query, grpc, health = (f"127.0.0.1:{port}" for port in free_ports(4))
    (storage,) = config["extensions"]["jaeger_storage"]["backends"].values()
    storage["badger"]["directories"] = {"keys": str(data / "keys"), "values": str(data / "values")}
    config["extensions"]["jaeger_query"] |= {"http": {"endpoint": query}, "grpc": {"endpoint": grpc}}
    config["extensions"]["healthcheckv2"]["http"]["endpoint"] = health
    config["receivers"]["otlp"]["protocols"]["grpc"]["endpoint"] = otlp
    path = folder / "jaeger.yaml"
    path.write_text(yaml.safe_dump(config))
    with _running([str(program("jaeger")), f"--config={path}"], folder / "jaeger.log") as process:
        wait_for(lambda: _answers(f"http://{query}/api/services"), folder / "jaeger.log", process)
        yield Jaeger(process, folder / "jaeger.log", otlp, f"http://{query}")
        # Badger takes ten seconds to close.
        process.kill()


@contextlib.contextmanager
def _running(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("ab") as out:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=os.environ, start_new_session=True
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextlib.contextmanager
def prometheus(folder: Path, running: Collector) -> Iterator[Prometheus]:
    """Prometheus with the shipped configuration and rules, which scrapes this Collector, every second."""
    shipped = BASE / "prometheus"
    config = yaml.safe_load((shipped / "prometheus.yaml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    rules = yaml.safe_load((shipped / "rules.yaml").read_text())
    for group in rules["groups"]:
        group["interval"] = "1s"
    (folder / "rules.yaml").write_text(yaml.safe_dump(rules))
    for job, url in zip(config["scrape_configs"], (running.metrics, running.own_metrics), strict=True):
        job["static_configs"] = [{"targets": [url.removeprefix("http://").removesuffix("/metrics")]}]
    path = folder / "prometheus.yaml"
    path.write_text(yaml.safe_dump(config))
    address = f"127.0.0.1:{free_ports(1)[0]}"
    (deployment, _) = yaml.safe_load_all((BASE / "prometheus.yaml").read_text())
    shipped_arguments = deployment["spec"]["template"]["spec"]["containers"][0]["args"]
    arguments = [one for one in shipped_arguments if one.startswith("--enable-feature")]
    command = [
        str(program("prometheus")),
        f"--config.file={path}",
        f"--storage.tsdb.path={folder / 'prometheus'}",
        f"--web.listen-address={address}",
        *arguments,
    ]
    with _running(command, folder / "prometheus.log") as process:
        wait_for(lambda: _answers(f"http://{address}/-/ready"), folder / "prometheus.log", process)
        yield Prometheus(f"http://{address}")


def _answers(url: str) -> bool:
    try:
        get(url)
    except OSError:
        return False
    return True


def get(url: str, **headers: str) -> bytes:
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as answer:
        return bytes(answer.read())


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]
