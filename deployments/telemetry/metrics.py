"""Every metric as data: name, unit, buckets, attributes. Instruments are made from these alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# Milliseconds, from a hop within one machine to a cold start.
MS_BUCKETS = (0.5, 1, 2, 5, 10, 20, 35, 50, 75, 100, 150, 250, 500, 1000, 2500, 5000, 10_000, 30_000, 60_000)
# The semantic conventions' advice for http.server.request.duration.
S_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)
SIZE_BUCKETS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256)
RATIO_BUCKETS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True, slots=True)
class MetricSpec:
    name: str
    kind: Literal["histogram", "counter", "gauge"]
    unit: str
    service: str
    description: str
    attributes: tuple[str, ...] = ()
    buckets: tuple[float, ...] | None = None


LATENCY = MetricSpec(
    "ai.inference.latency", "histogram", "ms", "ingress", "Whole request", ("model", "outcome"), MS_BUCKETS
)
HTTP_DURATION = MetricSpec(
    "http.server.request.duration",
    "histogram",
    "s",
    "ingress",
    "Whole request, as the semantic conventions name it",
    ("http.request.method", "http.route", "http.response.status_code", "url.scheme", "error.type"),
    S_BUCKETS,
)
TRANSIT = MetricSpec(
    "ai.inference.transit",
    "histogram",
    "ms",
    "ingress",
    "What one hop cost beside the stage's own time",
    ("model", "stage"),
    MS_BUCKETS,
)
REQUESTS = MetricSpec(
    "ai.inference.requests",
    "counter",
    "{request}",
    "ingress",
    "Requests by how they ended",
    ("model", "outcome"),
)
TOKENS = MetricSpec(
    "ai.inference.tokens", "counter", "{token}", "ingress", "Input tokens of answered requests", ("model",)
)
PREPROCESSING = MetricSpec(
    "ai.inference.preprocessing.latency",
    "histogram",
    "ms",
    "tokenizer",
    "Tokenization",
    ("model",),
    MS_BUCKETS,
)
QUEUE_WAIT = MetricSpec(
    "ai.inference.queue.wait_time",
    "histogram",
    "ms",
    "model",
    "Arrival at the replica until the batch began",
    ("model",),
    MS_BUCKETS,
)
MODEL_LATENCY = MetricSpec(
    "ai.inference.model.latency", "histogram", "ms", "model", "One run of the model", ("model",), MS_BUCKETS
)
BATCH_SIZE = MetricSpec("ai.batch.size", "histogram", "{input}", "model", "Inputs in one run", ("model",), SIZE_BUCKETS)
PADDING = MetricSpec(
    "ai.batch.padding_ratio",
    "histogram",
    "1",
    "model",
    "Padding tokens over all tokens of a run",
    ("model",),
    RATIO_BUCKETS,
)
DISPATCHES = MetricSpec(
    "ai.batch.dispatches", "counter", "{batch}", "model", "Batches by why they were cut", ("model", "reason")
)
OUT_OF_MEMORY = MetricSpec(
    "ai.model.out_of_memory", "counter", "{run}", "model", "Runs that did not fit the device's memory", ("model",)
)
LOADS = MetricSpec("ai.model.loads", "counter", "{load}", "model", "Model loads", ("model", "load_type"))
POSTPROCESSING = MetricSpec(
    "ai.inference.postprocessing.latency",
    "histogram",
    "ms",
    "postprocessor",
    "Model output to answer",
    ("model",),
    MS_BUCKETS,
)
QUEUE_DEPTH = MetricSpec("ai.queue.depth", "gauge", "{input}", "model", "Inputs waiting in the replica", ("model",))
QUEUE_AGE = MetricSpec(
    "ai.queue.oldest_age_ms", "gauge", "ms", "model", "How long the first of them has waited", ("model",)
)
REPLICAS_WARM = MetricSpec(
    "ai.model.replicas_warm",
    "gauge",
    "{replica}",
    "model",
    "1 per loaded and warm replica; sum them",
    ("model",),
)
_BY_DEPLOYMENT = ("ai.autoscaling.application", "ai.autoscaling.deployment")
SCALING_TARGET = MetricSpec(
    "ai.autoscaling.target_replicas", "gauge", "{replica}", "autoscaler", "Replicas that are ordered", _BY_DEPLOYMENT
)
SCALING_RUNNING = MetricSpec(
    "ai.autoscaling.running_replicas", "gauge", "{replica}", "autoscaler", "Replicas that run", _BY_DEPLOYMENT
)
SCALING_MAX = MetricSpec(
    "ai.autoscaling.max_replicas", "gauge", "{replica}", "autoscaler", "Replicas that there may be", _BY_DEPLOYMENT
)
SCALING_DEMAND = MetricSpec(
    "ai.autoscaling.demand", "gauge", "{replica}", "autoscaler", "Replicas' worth of work that arrives", _BY_DEPLOYMENT
)
SCALING_QUEUE_WAIT = MetricSpec(
    "ai.autoscaling.queue_wait_ms",
    "gauge",
    "ms",
    "autoscaler",
    "How long the running replicas need for all that waits",
    _BY_DEPLOYMENT,
)
SCALING_TARGET_WAIT = MetricSpec(
    "ai.autoscaling.target_queue_wait_ms",
    "gauge",
    "ms",
    "autoscaler",
    "The wait that the operator accepts",
    _BY_DEPLOYMENT,
)
SCALING_DECISIONS = MetricSpec(
    "ai.autoscaling.decisions",
    "counter",
    "{decision}",
    "autoscaler",
    "Changes of the number of replicas",
    (*_BY_DEPLOYMENT, "ai.autoscaling.reason"),
)
GPU_UTILIZATION = MetricSpec(
    "ai.gpu.utilization_percent", "gauge", "%", "model", "Of one device of the replica", ("gpu.index",)
)
GPU_MEMORY = MetricSpec("ai.gpu.memory_used_gb", "gauge", "GB", "model", "Of one device of the replica", ("gpu.index",))
HW_UTILIZATION = MetricSpec("hw.gpu.utilization", "gauge", "1", "model", "Of one device of the replica", ("hw.id",))
HW_MEMORY_USAGE = MetricSpec("hw.gpu.memory.usage", "gauge", "By", "model", "Of one device of the replica", ("hw.id",))
HW_MEMORY_LIMIT = MetricSpec("hw.gpu.memory.limit", "gauge", "By", "model", "Of one device of the replica", ("hw.id",))
HW_POWER = MetricSpec("hw.power", "gauge", "W", "model", "Of one device of the replica", ("hw.id", "hw.type"))
HW_TEMPERATURE = MetricSpec(
    "hw.temperature", "gauge", "Cel", "model", "Of one device of the replica", ("hw.id", "hw.type")
)
PROCESS_CPU = MetricSpec(
    "process.cpu.utilization",
    "gauge",
    "1",
    "every",
    "CPU time over elapsed time and CPUs of the machine, since the last export",
)
PROCESS_MEMORY = MetricSpec("process.memory.usage", "gauge", "By", "every", "Resident memory of the replica's process")
DROPPED_RECORDS = MetricSpec(
    "ai.telemetry.dropped_records",
    "counter",
    "{record}",
    "every",
    "Records lost because the telemetry thread fell behind",
)
UNWRITTEN_SPANS = MetricSpec(
    "ai.telemetry.unwritten_spans", "counter", "{span}", "every", "Spans that the local store could not write"
)

METRICS: tuple[MetricSpec, ...] = tuple(value for value in list(vars().values()) if isinstance(value, MetricSpec))
