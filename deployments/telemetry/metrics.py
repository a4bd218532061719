"""Every metric as data: name, unit, buckets, attributes. Instruments are made from these alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# Milliseconds, from a hop within one machine to a cold start.
MS_BUCKETS = (0.5, 1, 2, 5, 10, 20, 35, 50, 75, 100, 150, 250, 500, 1000, 2500, 5000, 10_000, 30_000, 60_000)
# Buckets that the semantic conventions recommend for http.server.request.duration.
S_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)
SIZE_BUCKETS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256)
RATIO_BUCKETS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True, slots=True, eq=False)
class MetricSpec:
    name: str
    kind: Literal["histogram", "counter", "gauge"]
    unit: str
    service: str
    description: str
    attributes: tuple[str, ...] = ()
    buckets: tuple[float, ...] | None = None
    is_of_generations: bool = False
    """Whether only language models export it."""


LATENCY = MetricSpec(
    "ai.inference.latency", "histogram", "ms", "ingress", "End-to-end request latency", ("model", "outcome"), MS_BUCKETS
)
HTTP_DURATION = MetricSpec(
    "http.server.request.duration",
    "histogram",
    "s",
    "ingress",
    "End-to-end duration of HTTP requests, under its name in the semantic conventions",
    ("http.request.method", "http.route", "http.response.status_code", "url.scheme", "error.type"),
    S_BUCKETS,
)
RPC_DURATION = MetricSpec(
    "rpc.server.call.duration",
    "histogram",
    "s",
    "ingress",
    "The same of gRPC calls",
    ("rpc.system.name", "rpc.method", "rpc.response.status_code", "error.type"),
    S_BUCKETS,
)
TRANSIT = MetricSpec(
    "ai.inference.transit",
    "histogram",
    "ms",
    "ingress",
    "Duration of one hop minus the time in the stage",
    ("model", "stage"),
    MS_BUCKETS,
)
REQUESTS = MetricSpec(
    "ai.inference.requests",
    "counter",
    "{request}",
    "ingress",
    "Requests by outcome, and by tenant if there are API keys",
    ("model", "outcome", "ai.tenant"),
)
TOKENS = MetricSpec(
    "ai.inference.tokens",
    "counter",
    "{token}",
    "ingress",
    "Input tokens of successful requests, by tenant if there are API keys",
    ("model", "ai.tenant"),
)
PREPROCESSING = MetricSpec(
    "ai.inference.preprocessing.latency",
    "histogram",
    "ms",
    "tokenizer",
    "Tokenization latency",
    ("model",),
    MS_BUCKETS,
)
QUEUE_WAIT = MetricSpec(
    "ai.inference.queue.wait_time",
    "histogram",
    "ms",
    "model",
    "Time from arrival at the replica to the start of the batch",
    ("model",),
    MS_BUCKETS,
)
MODEL_LATENCY = MetricSpec(
    "ai.inference.model.latency", "histogram", "ms", "model", "Duration of one model run", ("model",), MS_BUCKETS
)
BATCH_SIZE = MetricSpec("ai.batch.size", "histogram", "{input}", "model", "Inputs per run", ("model",), SIZE_BUCKETS)
PADDING = MetricSpec(
    "ai.batch.padding_ratio",
    "histogram",
    "1",
    "model",
    "Fraction of the tokens of a run that are padding",
    ("model",),
    RATIO_BUCKETS,
)
DISPATCHES = MetricSpec(
    "ai.batch.dispatches", "counter", "{batch}", "model", "Batches by dispatch reason", ("model", "reason")
)
OUT_OF_MEMORY = MetricSpec(
    "ai.model.out_of_memory", "counter", "{run}", "model", "Runs that did not fit in device memory", ("model",)
)
LOADS = MetricSpec("ai.model.loads", "counter", "{load}", "model", "Model loads", ("model", "load_type"))
POSTPROCESSING = MetricSpec(
    "ai.inference.postprocessing.latency",
    "histogram",
    "ms",
    "postprocessor",
    "Time to convert model output into a result",
    ("model",),
    MS_BUCKETS,
)
# Buckets that the semantic conventions recommend for these three.
GEN_AI_DURATION_BUCKETS = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
FIRST_TOKEN_BUCKETS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
OUTPUT_TOKEN_BUCKETS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
_GEN_AI = ("gen_ai.operation.name", "gen_ai.request.model", "error.type")
GEN_AI_DURATION = MetricSpec(
    "gen_ai.server.request.duration",
    "histogram",
    "s",
    "ingress",
    "Duration of a generation, until its last token",
    _GEN_AI,
    GEN_AI_DURATION_BUCKETS,
    is_of_generations=True,
)
TIME_TO_FIRST_TOKEN = MetricSpec(
    "gen_ai.server.time_to_first_token",
    "histogram",
    "s",
    "ingress",
    "Time from the arrival of a request to its first token",
    _GEN_AI,
    FIRST_TOKEN_BUCKETS,
    is_of_generations=True,
)
TIME_PER_OUTPUT_TOKEN = MetricSpec(
    "gen_ai.server.time_per_output_token",
    "histogram",
    "s",
    "ingress",
    "Time per output token after the first",
    _GEN_AI,
    OUTPUT_TOKEN_BUCKETS,
    is_of_generations=True,
)
OUTPUT_TOKENS = MetricSpec(
    "ai.inference.output_tokens",
    "counter",
    "{token}",
    "ingress",
    "Generated tokens of all requests",
    ("model",),
    is_of_generations=True,
)
INTER_TOKEN = MetricSpec(
    "ai.generation.inter_token_latency",
    "histogram",
    "ms",
    "model",
    "Time between two tokens of a sequence; recorded once a step, for all that decode in it",
    ("model",),
    MS_BUCKETS,
    is_of_generations=True,
)
STEP_LATENCY = MetricSpec(
    "ai.engine.step.latency",
    "histogram",
    "ms",
    "model",
    "Duration of one step",
    ("model",),
    MS_BUCKETS,
    is_of_generations=True,
)
PREEMPTIONS = MetricSpec(
    "ai.engine.preemptions",
    "counter",
    "{sequence}",
    "model",
    "Sequences that lost their cache",
    ("model",),
    is_of_generations=True,
)
RUNNING = MetricSpec(
    "ai.engine.running",
    "gauge",
    "{sequence}",
    "model",
    "Sequences that are generated",
    ("model",),
    is_of_generations=True,
)
KV_USED = MetricSpec(
    "ai.engine.kv_used_ratio",
    "gauge",
    "1",
    "model",
    "Fraction of the KV cache that running sequences hold or have reserved",
    ("model",),
    is_of_generations=True,
)
QUEUE_DEPTH = MetricSpec("ai.queue.depth", "gauge", "{input}", "model", "Inputs waiting in the replica", ("model",))
QUEUE_AGE = MetricSpec("ai.queue.oldest_age_ms", "gauge", "ms", "model", "Age of the oldest waiting input", ("model",))
REPLICAS_WARM = MetricSpec(
    "ai.model.replicas_warm",
    "gauge",
    "{replica}",
    "model",
    "1 per loaded and warm replica; sum to count them",
    ("model",),
)
_BY_DEPLOYMENT = ("ai.autoscaling.application", "ai.autoscaling.deployment")
SCALING_TARGET = MetricSpec(
    "ai.autoscaling.target_replicas", "gauge", "{replica}", "autoscaler", "Target number of replicas", _BY_DEPLOYMENT
)
SCALING_RUNNING = MetricSpec(
    "ai.autoscaling.running_replicas", "gauge", "{replica}", "autoscaler", "Number of running replicas", _BY_DEPLOYMENT
)
SCALING_MAX = MetricSpec(
    "ai.autoscaling.max_replicas", "gauge", "{replica}", "autoscaler", "Maximum number of replicas", _BY_DEPLOYMENT
)
SCALING_DEMAND = MetricSpec(
    "ai.autoscaling.demand",
    "gauge",
    "{replica}",
    "autoscaler",
    "Arriving work, as the number of replicas it keeps busy",
    _BY_DEPLOYMENT,
)
SCALING_QUEUE_WAIT = MetricSpec(
    "ai.autoscaling.queue_wait_ms",
    "gauge",
    "ms",
    "autoscaler",
    "Time the running replicas need to clear the backlog",
    _BY_DEPLOYMENT,
)
SCALING_TARGET_WAIT = MetricSpec(
    "ai.autoscaling.target_queue_wait_ms",
    "gauge",
    "ms",
    "autoscaler",
    "Queue wait that the operator accepts",
    _BY_DEPLOYMENT,
)
SCALING_DECISIONS = MetricSpec(
    "ai.autoscaling.decisions",
    "counter",
    "{decision}",
    "autoscaler",
    "Changes to the number of replicas",
    (*_BY_DEPLOYMENT, "ai.autoscaling.reason"),
)
GPU_UTILIZATION = MetricSpec(
    "ai.gpu.utilization_percent", "gauge", "%", "model", "Utilization of one GPU of the replica", ("gpu.index",)
)
GPU_MEMORY = MetricSpec(
    "ai.gpu.memory_used_gb", "gauge", "GB", "model", "Memory used on one GPU of the replica", ("gpu.index",)
)
HW_UTILIZATION = MetricSpec(
    "hw.gpu.utilization", "gauge", "1", "model", "Utilization of one GPU of the replica", ("hw.id",)
)
HW_MEMORY_USAGE = MetricSpec(
    "hw.gpu.memory.usage", "gauge", "By", "model", "Memory used on one GPU of the replica", ("hw.id",)
)
HW_MEMORY_LIMIT = MetricSpec(
    "hw.gpu.memory.limit", "gauge", "By", "model", "Total memory of one GPU of the replica", ("hw.id",)
)
HW_POWER = MetricSpec("hw.power", "gauge", "W", "model", "Power draw of one GPU of the replica", ("hw.id", "hw.type"))
HW_TEMPERATURE = MetricSpec(
    "hw.temperature", "gauge", "Cel", "model", "Temperature of one GPU of the replica", ("hw.id", "hw.type")
)
PROCESS_CPU = MetricSpec(
    "process.cpu.utilization",
    "gauge",
    "1",
    "every",
    "CPU time since the last export, divided by elapsed time and the machine's CPU count",
)
CPU_RUN_DELAY = MetricSpec(
    "ai.cpu.run_delay_ratio",
    "gauge",
    "1",
    "every",
    "Share of the time in which a thread that works on requests could run and got no CPU",
)
CPU_THROTTLED = MetricSpec(
    "ai.cpu.throttled_ratio",
    "gauge",
    "1",
    "every",
    "Share of the time in which a CPU limit of the container held the process back; none where there is no limit",
)
CPU_STEAL = MetricSpec(
    "ai.cpu.steal_ratio",
    "gauge",
    "1",
    "every",
    "Share of the time in which the hypervisor ran others on this machine's CPUs, by the mean of the CPUs",
)
PRESSURE = MetricSpec(
    "ai.pressure.ratio",
    "gauge",
    "1",
    "every",
    "Share of the time in which a thread of the container, or else of the machine, waited for CPUs, memory or the disk",
    ("resource",),
)
LOOP_STALLS = MetricSpec(
    "ai.event_loop.stalls", "counter", "{stall}", "every", "Times in which the event loop ran nothing for a second"
)
PROCESS_DESCRIPTORS = MetricSpec(
    "process.unix.file_descriptor.count", "gauge", "{file_descriptor}", "every", "Open file descriptors of the process"
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
