"""The OpenTelemetry SDK of one process: resource, sampler, exporters. It is never set as the global provider, so it
coexists with Serve's own tracing or an agent's.

Telemetry goes to ``OTEL_EXPORTER_OTLP_ENDPOINT`` (or the ``_TRACES_``/``_METRICS_`` forms) if set, using
``OTEL_EXPORTER_OTLP_PROTOCOL``; otherwise to the local store. ``OTEL_TRACES_EXPORTER`` and ``OTEL_METRICS_EXPORTER``
may be ``otlp``, ``console`` or ``none``. ``OTEL_SDK_DISABLED=true`` disables all of it.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from opentelemetry.metrics import Meter
from opentelemetry.sdk.metrics import AlwaysOffExemplarFilter, MeterProvider
from opentelemetry.sdk.metrics.export import (
    ConsoleMetricExporter,
    MetricExporter,
    MetricReader,
    PeriodicExportingMetricReader,
)
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter, SpanExporter
from opentelemetry.sdk.trace.sampling import Sampler

from deployments import __version__
from deployments.config import AppConfig
from deployments.errors import ConfigError
from deployments.telemetry import names
from deployments.telemetry.export.failures import say_failures_once
from deployments.telemetry.export.sinks import NoSink, SdkSink, SpanSink, StoreSink
from deployments.telemetry.export.store import JsonLines, JsonLinesMetricExporter
from deployments.telemetry.names import Service

if TYPE_CHECKING:
    from deployments.telemetry.export.prometheus import PrometheusTarget

Signal = Literal["traces", "metrics"]
_MB = 1_000_000
_NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
# Defaults if the operator sets nothing: room for a burst of about a thousand requests, and traces within a second.
_DEFAULT_QUEUE, _DEFAULT_DELAY_MS = 16_384, 1_000.0
_FLUSH_S = 5.0
_SETTINGS: dict[Service, tuple[tuple[str, str], ...]] = {
    "ingress": (("limits", "max_input_chars"), ("limits", "max_inputs"), ("limits", "default_timeout_ms")),
    "tokenizer": (("tokenizer", "cache_entries"),),
    "model": (
        ("model", "source"),
        ("model", "revision"),
        ("model", "dtype"),
        ("model", "quantization"),
        ("model", "compile"),
        ("model", "threads"),
        ("model", "max_length"),
        ("batching", "max_batch_size"),
        ("batching", "max_batch_tokens"),
        ("batching", "max_run_ms"),
        ("batching", "max_wait_ms"),
        ("batching", "grouping_window"),
        ("batching", "max_queue"),
        ("batching", "max_queue_tokens"),
        ("generation", "max_sequences"),
        ("generation", "max_batch_tokens"),
        ("generation", "max_step_ms"),
        ("generation", "kv_cache_tokens"),
        ("generation", "kv_reserve"),
        ("generation", "max_queue"),
    ),
    "postprocessor": (),
    "autoscaler": (),
}


@dataclass(frozen=True, slots=True)
class ReplicaIdentity:
    """This process's identity in Ray."""

    replica_id: str
    node_id: str
    settings: Mapping[str, float] = field(default_factory=dict)
    """The deployment's Serve settings, by their key in serve_config.yaml."""


class Provider:
    """Owns the SDK objects of one process. ``close`` flushes what is left, within a few seconds."""

    def __init__(self, service: Service, config: AppConfig, identity: ReplicaIdentity) -> None:
        say_failures_once()
        self._config, self._identity = config.telemetry, identity
        self._prometheus: PrometheusTarget | None = None
        self.resource = make_resource(service, config, identity)
        # The SDK counts what its queues drop and what its exporters fail to deliver (otel.sdk.*), if enabled.
        os.environ.setdefault("OTEL_PYTHON_SDK_INTERNAL_METRICS_ENABLED", "true")
        self._meters = self._make_meters()
        # Only its sampler is used: OTEL_TRACES_SAMPLER decides, as in any process with an SDK.
        self.sampler: Sampler = TracerProvider(resource=self.resource, shutdown_on_exit=False).sampler
        self.sink = self._span_sink()

    def meter(self) -> Meter:
        return self._meters.get_meter(names.SCOPE, __version__)

    def close(self) -> None:
        """Flush what is left, but do not wait for an unresponsive collector: the replica has to stop in time."""
        if self._prometheus is not None:
            self._prometheus.close()
        flushes = [
            threading.Thread(target=shutdown, name="slowlens-flush", daemon=True)
            for shutdown in (self.sink.close, self._meters.shutdown)
        ]
        for flush in flushes:
            flush.start()
        deadline_s = time.monotonic() + _FLUSH_S
        for flush in flushes:
            flush.join(max(0.0, deadline_s - time.monotonic()))

    # --- traces ---

    def _span_sink(self) -> SpanSink:
        match destination("traces"):
            case "none":
                return NoSink()
            case "store":
                return StoreSink(self._lines("traces"), self.resource)
            case "console":
                return self._through_sdk(ConsoleSpanExporter())
            case "grpc":
                from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as Grpc

                return self._through_sdk(Grpc(meter_provider=self._meters))
            case "http/protobuf":
                from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as Http

                return self._through_sdk(Http(meter_provider=self._meters))

    def _through_sdk(self, exporter: SpanExporter) -> SpanSink:
        processor = BatchSpanProcessor(
            exporter,
            max_queue_size=None if "OTEL_BSP_MAX_QUEUE_SIZE" in os.environ else _DEFAULT_QUEUE,
            schedule_delay_millis=None if "OTEL_BSP_SCHEDULE_DELAY" in os.environ else _DEFAULT_DELAY_MS,
            meter_provider=self._meters,
        )
        return SdkSink(processor, self.resource)

    # --- metrics ---

    def _make_meters(self) -> MeterProvider:
        exporter = self._metric_exporter()
        environment_says = "OTEL_METRIC_EXPORT_INTERVAL" in os.environ
        interval_ms = None if environment_says else self._config.metric_interval_s * 1000
        readers: list[MetricReader] = []
        if exporter is not None:
            readers.append(PeriodicExportingMetricReader(exporter, interval_ms))
        if self._config.prometheus.port is not None:
            from deployments.telemetry.export.prometheus import PrometheusTarget

            self._prometheus = PrometheusTarget(self._config.prometheus.host, self._config.prometheus.port)
            readers.append(self._prometheus.reader)
        # Who is measured is not known to be kept then, and an exemplar must lead to a trace.
        is_retroactive = self._config.sampling.mode == "retroactive"
        exemplars = AlwaysOffExemplarFilter() if is_retroactive else None
        return MeterProvider(readers, self.resource, exemplar_filter=exemplars, shutdown_on_exit=False)

    def _metric_exporter(self) -> MetricExporter | None:
        match destination("metrics"):
            case "none":
                return None
            case "console":
                return ConsoleMetricExporter()
            case "store":
                return JsonLinesMetricExporter(self._lines("metrics"))
            case "grpc":
                from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter as Grpc

                return Grpc()
            case "http/protobuf":
                from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter as Http

                return Http()

    def _lines(self, signal: Signal) -> JsonLines:
        return JsonLines(
            self._config.store_directory(),
            signal,
            self._identity.replica_id,
            int(self._config.max_file_mb * _MB),
            int(self._config.max_total_mb * _MB),
        )


def destination(
    signal: Signal, environ: Mapping[str, str] = os.environ
) -> Literal["none", "console", "store", "grpc", "http/protobuf"]:
    """Return where the environment sends a signal. Raises ConfigError on an unknown exporter or protocol."""
    if environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return "none"
    upper = signal.upper()
    wanted = environ.get(f"OTEL_{upper}_EXPORTER", "").strip().lower()
    if wanted in ("none", "console"):
        return "none" if wanted == "none" else "console"
    if wanted not in ("", "otlp"):
        raise ConfigError(f"OTEL_{upper}_EXPORTER: {wanted!r} is not one of otlp, console, none")
    endpoint = environ.get(f"OTEL_EXPORTER_OTLP_{upper}_ENDPOINT") or environ.get("OTEL_EXPORTER_OTLP_ENDPOINT")
    if not endpoint and not wanted:
        return "store"
    protocol = environ.get(f"OTEL_EXPORTER_OTLP_{upper}_PROTOCOL") or environ.get("OTEL_EXPORTER_OTLP_PROTOCOL")
    match (protocol or "").strip().lower():
        case "grpc":
            return "grpc"
        case "http/protobuf":
            return "http/protobuf"
        case "":
            # Like OpenTelemetry's Python distribution: gRPC, unless the port is the one registered for HTTP.
            return "http/protobuf" if ":4318" in (endpoint or "") else "grpc"
        case other:
            raise ConfigError(f"OTEL_EXPORTER_OTLP_PROTOCOL: {other!r} is not one of grpc, http/protobuf")


def make_resource(service: Service, config: AppConfig, identity: ReplicaIdentity) -> Resource:
    """Merge OTEL_RESOURCE_ATTRIBUTES with our attributes. Ours win: dashboards rely on the service names."""
    return Resource.create(
        {
            "service.namespace": names.NAMESPACE,
            "service.name": f"slowlens.{service}",
            "service.instance.id": identity.replica_id,
            "service.version": __version__,
            **_environment(config.telemetry.environment),
            "ray.node.id": identity.node_id,
            # KubeRay says it to its pods: the old and the new cluster of an upgrade.
            **({names.RAY_CLUSTER_NAME: cluster} if (cluster := os.environ.get("RAY_CLUSTER_NAME")) else {}),
            "host.name": socket.gethostname(),
            "process.pid": os.getpid(),
            **_kubernetes(os.environ),
            **{f"{names.SETTING}{key}": value for key, value in _settings(service, config, identity)},
        }
    )


def _settings(service: Service, config: AppConfig, identity: ReplicaIdentity) -> Iterator[tuple[str, str | float]]:
    """Yield the values of the settings that ``slowlens why`` and ``what-if`` may propose to change, or tell apart."""
    for section, key in _SETTINGS[service]:
        value = getattr(getattr(config, section), key)
        if value is not None:
            yield f"{section}.{key}", value
    yield "telemetry.sampling.mode", config.telemetry.sampling.mode
    yield from identity.settings.items()


def _environment(configured: str | None) -> dict[str, str]:
    """Our default must not override the operator's OTEL_RESOURCE_ATTRIBUTES."""
    key = "deployment.environment.name"
    if configured is None and f"{key}=" in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", ""):
        return {}
    return {key: configured or "development"}


def _kubernetes(environ: Mapping[str, str]) -> dict[str, str]:
    """Return what the pod knows about itself; the downward API may add more through K8S_* variables."""
    if "KUBERNETES_SERVICE_HOST" not in environ:
        return {}
    namespace = _NAMESPACE_FILE.read_text().strip() if _NAMESPACE_FILE.is_file() else None
    found = {
        "k8s.pod.name": environ.get("K8S_POD_NAME") or environ.get("HOSTNAME"),
        "k8s.namespace.name": environ.get("K8S_NAMESPACE_NAME") or namespace,
        "k8s.node.name": environ.get("K8S_NODE_NAME"),
        "k8s.cluster.name": environ.get("K8S_CLUSTER_NAME"),
    }
    return {key: value for key, value in found.items() if value}
