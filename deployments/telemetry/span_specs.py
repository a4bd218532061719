"""Declares every span, in one place: the service that emits it, its parent and its attributes.

``spans`` makes them, a test compares them with this declaration, and the documentation's table is generated from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from deployments.telemetry import names
from deployments.telemetry.names import Service

SpanKindName = Literal["SERVER", "CLIENT", "INTERNAL"]


@dataclass(frozen=True, slots=True)
class SpanSpec:
    name: str
    kind: SpanKindName
    service: Service
    parent: str
    attributes: tuple[str, ...]
    is_of_generations: bool = False
    """Whether only language models emit it."""


_HOP_ATTRIBUTES = (names.AI_HOP_TRANSIT_MS, names.AI_HOP_WAIT_MS, names.AI_HOP_ATTEMPT)

SPANS: tuple[SpanSpec, ...] = (
    SpanSpec(
        names.PREDICT,
        "SERVER",
        "ingress",
        "the caller's span",
        (
            names.AI_REQUEST_ID,
            names.AI_TENANT,
            names.AI_TIMEOUT_MS,
            names.AI_SAMPLING_WEIGHT,
            names.AI_INPUT_COUNT,
            names.AI_INPUT_LENGTH,
            names.AI_INPUT_TEXT,
            names.AI_DEVICE,
            names.AI_MODEL_NAME,
            names.AI_TOTAL_LATENCY_MS,
            names.AI_CPU_RUN_DELAY_MS,
            names.AI_CPU_THROTTLED_MS,
            names.AI_EVENT_LOOP_STALL_MS,
            names.AI_GC_PAUSE_MS,
            names.HTTP_REQUEST_METHOD,
            names.HTTP_ROUTE,
            names.HTTP_RESPONSE_STATUS_CODE,
            names.URL_PATH,
            names.URL_SCHEME,
            names.CLIENT_ADDRESS,
            names.ERROR_TYPE,
            names.GEN_AI_OPERATION_NAME,
            names.GEN_AI_REQUEST_MODEL,
            names.GEN_AI_USAGE_INPUT_TOKENS,
            names.GEN_AI_REQUEST_MAX_TOKENS,
            names.GEN_AI_REQUEST_TEMPERATURE,
            names.GEN_AI_REQUEST_TOP_P,
            names.GEN_AI_REQUEST_TOP_K,
            names.GEN_AI_REQUEST_SEED,
            names.GEN_AI_REQUEST_CHOICE_COUNT,
            names.GEN_AI_REQUEST_STREAM,
            names.GEN_AI_RESPONSE_ID,
            names.GEN_AI_RESPONSE_FINISH_REASONS,
            names.GEN_AI_RESPONSE_TIME_TO_FIRST_CHUNK,
            names.GEN_AI_USAGE_OUTPUT_TOKENS,
            names.GEN_AI_USAGE_CACHE_READ_INPUT_TOKENS,
        ),
    ),
    SpanSpec(names.FRONT, "INTERNAL", "ingress", names.PREDICT, ()),
    SpanSpec(names.VALIDATE, "INTERNAL", "ingress", names.PREDICT, ()),
    SpanSpec(names.HOP_TOKENIZER, "CLIENT", "ingress", names.PREDICT, _HOP_ATTRIBUTES),
    SpanSpec(
        names.PREPROCESS,
        "SERVER",
        "tokenizer",
        names.HOP_TOKENIZER,
        (
            names.AI_PREPROCESS_TOKEN_COUNT,
            names.AI_PREPROCESS_INPUT_CHARS,
            names.AI_PREPROCESS_DURATION_MS,
            names.AI_PREPROCESS_WAS_TRUNCATED,
            names.AI_PREPROCESS_CACHE_HITS,
            names.AI_CPU_RUN_DELAY_MS,
            names.AI_CPU_THROTTLED_MS,
            names.AI_EVENT_LOOP_STALL_MS,
            names.AI_GC_PAUSE_MS,
        ),
    ),
    SpanSpec(names.HOP_MODEL, "CLIENT", "ingress", names.PREDICT, _HOP_ATTRIBUTES),
    SpanSpec(
        names.BATCHED_PREDICT,
        "SERVER",
        "model",
        names.HOP_MODEL,
        (
            names.AI_BATCH_MAX_SIZE,
            names.AI_BATCH_TIMEOUT_MS,
            names.AI_BATCH_WAIT_TIME_MS,
            names.AI_CPU_RUN_DELAY_MS,
            names.AI_CPU_THROTTLED_MS,
            names.AI_EVENT_LOOP_STALL_MS,
            names.AI_GC_PAUSE_MS,
            names.AI_MODEL_LOAD_TYPE,
        ),
    ),
    SpanSpec(
        names.QUEUE,
        "INTERNAL",
        "model",
        names.BATCHED_PREDICT,
        (
            names.AI_QUEUE_DEPTH_ON_ARRIVAL,
            names.AI_QUEUE_DEVICE_BUSY_MS,
            names.AI_QUEUE_FILL_WAIT_MS,
        ),
    ),
    SpanSpec(
        names.FORWARD_PASS,
        "INTERNAL",
        "model",
        names.BATCHED_PREDICT,
        (
            names.AI_FORWARD_PASS_DURATION_MS,
            names.AI_BATCH_ACTUAL_SIZE,
            names.AI_BATCH_PADDING_RATIO,
            names.AI_MODEL_NAME,
        ),
    ),
    SpanSpec(
        names.BATCH_FORWARD,
        "INTERNAL",
        "model",
        "none",
        (
            names.AI_BATCH_ACTUAL_SIZE,
            names.AI_BATCH_MAX_WAIT_MS,
            names.AI_BATCH_AVG_WAIT_MS,
            names.AI_BATCH_INFERENCE_MS,
            names.AI_BATCH_TOKENS,
            names.AI_BATCH_PADDED_TOKENS,
            names.AI_BATCH_PADDING_RATIO,
            names.AI_BATCH_DISPATCH_REASON,
            names.AI_BATCH_QUEUE_BEHIND,
            names.AI_MODEL_NAME,
            names.AI_DEVICE,
            names.AI_FORWARD_PASS_OUTPUT_SHAPE,
            names.AI_GPU_UTILIZATION_PRE,
            names.AI_GPU_UTILIZATION_POST,
            names.AI_GPU_MEMORY_FREE_GB,
            names.AI_GPU_PEAK_MEMORY_GB,
        ),
    ),
    SpanSpec(
        names.GENERATE,
        "SERVER",
        "model",
        names.HOP_MODEL,
        (
            names.AI_GENERATE_CHOICE,
            names.AI_CPU_RUN_DELAY_MS,
            names.AI_CPU_THROTTLED_MS,
            names.AI_EVENT_LOOP_STALL_MS,
            names.AI_GC_PAUSE_MS,
            names.AI_MODEL_NAME,
            names.AI_MODEL_LOAD_TYPE,
            names.AI_DEVICE,
            names.GEN_AI_RESPONSE_FINISH_REASONS,
        ),
        is_of_generations=True,
    ),
    SpanSpec(
        names.QUEUE,
        "INTERNAL",
        "model",
        names.GENERATE,
        (names.AI_QUEUE_DEPTH_ON_ARRIVAL, names.AI_QUEUE_CACHE_WAIT_MS),
        is_of_generations=True,
    ),
    SpanSpec(
        names.PREFILL,
        "INTERNAL",
        "model",
        names.GENERATE,
        (names.AI_PREFILL_TOKENS, names.AI_PREFILL_CACHED_TOKENS, names.AI_PREFILL_CHUNKS),
        is_of_generations=True,
    ),
    SpanSpec(
        names.DECODE,
        "INTERNAL",
        "model",
        names.GENERATE,
        (
            names.AI_DECODE_TOKENS,
            names.AI_DECODE_STEPS,
            names.AI_DECODE_MAX_GAP_MS,
            names.AI_DECODE_USUAL_GAP_MS,
            names.AI_DECODE_P99_GAP_MS,
        ),
        is_of_generations=True,
    ),
    SpanSpec(names.PREEMPTED, "INTERNAL", "model", names.GENERATE, (), is_of_generations=True),
    SpanSpec(
        names.SEGMENT,
        "INTERNAL",
        "model",
        "none",
        (
            names.AI_SEGMENT_STEPS,
            names.AI_SEGMENT_PREFILLING,
            names.AI_SEGMENT_PREFILL_TOKENS,
            names.AI_SEGMENT_DECODE_TOKENS,
            names.AI_SEGMENT_REQUESTS,
            names.AI_SEGMENT_WAITING,
            names.AI_SEGMENT_KV_USED_RATIO,
            names.AI_SEGMENT_STEP_MS,
            names.AI_SEGMENT_MAX_STEP_MS,
            names.AI_MODEL_NAME,
            names.AI_DEVICE,
        ),
        is_of_generations=True,
    ),
    SpanSpec(
        names.STREAM,
        "INTERNAL",
        "ingress",
        names.PREDICT,
        (names.AI_STREAM_CHUNKS, names.AI_STREAM_BLOCKED_MS, names.AI_STREAM_DETOKENIZE_MS),
        is_of_generations=True,
    ),
    SpanSpec(names.HOP_POSTPROCESSOR, "CLIENT", "ingress", names.PREDICT, _HOP_ATTRIBUTES),
    SpanSpec(
        names.POSTPROCESS,
        "SERVER",
        "postprocessor",
        names.HOP_POSTPROCESSOR,
        (
            names.AI_POSTPROCESS_DURATION_MS,
            names.AI_POSTPROCESS_OUTPUT_LENGTH,
            names.AI_CPU_RUN_DELAY_MS,
            names.AI_CPU_THROTTLED_MS,
            names.AI_EVENT_LOOP_STALL_MS,
            names.AI_GC_PAUSE_MS,
        ),
    ),
    SpanSpec(names.RESPOND, "INTERNAL", "ingress", names.PREDICT, ()),
    SpanSpec(
        names.MODEL_LOAD,
        "INTERNAL",
        "model",
        "none",
        (
            names.AI_MODEL_LOAD_TYPE,
            names.AI_MODEL_LOAD_TIME_MS,
            names.AI_MODEL_ALREADY_LOADED,
            names.AI_MODEL_NAME,
            names.AI_DEVICE,
            names.AI_GPU_MEMORY_ALLOCATED_GB,
            names.AI_GPU_MEMORY_RESERVED_GB,
        ),
    ),
    SpanSpec(names.LOAD_WEIGHTS, "INTERNAL", "model", names.MODEL_LOAD, ()),
    SpanSpec(names.LOAD_DEVICE_MOVE, "INTERNAL", "model", names.MODEL_LOAD, ()),
    SpanSpec(names.LOAD_WARM_UP, "INTERNAL", "model", names.MODEL_LOAD, ()),
    SpanSpec(
        names.SCALING_DECISION,
        "INTERNAL",
        "autoscaler",
        "none",
        (
            names.AI_AUTOSCALING_APPLICATION,
            names.AI_AUTOSCALING_DEPLOYMENT,
            names.AI_AUTOSCALING_REASON,
            names.AI_AUTOSCALING_FROM_REPLICAS,
            names.AI_AUTOSCALING_TO_REPLICAS,
            names.AI_AUTOSCALING_NEEDED_REPLICAS,
            names.AI_AUTOSCALING_MAX_REPLICAS,
            names.AI_AUTOSCALING_RUNNING_REPLICAS,
            names.AI_AUTOSCALING_REPORTS,
            names.AI_AUTOSCALING_DEMAND,
            names.AI_AUTOSCALING_QUEUE_DEPTH,
            names.AI_AUTOSCALING_QUEUE_WAIT_MS,
            names.AI_AUTOSCALING_TARGET_QUEUE_WAIT_MS,
            names.AI_AUTOSCALING_OLDEST_AGE_MS,
            names.AI_AUTOSCALING_THROUGHPUT,
            names.AI_AUTOSCALING_START_MS,
        ),
    ),
)
