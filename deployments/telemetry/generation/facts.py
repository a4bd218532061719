"""What the ingress records of a generation, besides what it records of any request."""

from __future__ import annotations

from dataclasses import dataclass

from deployments.telemetry import names


@dataclass(slots=True)
class StreamRecord:
    """The chunks of a response, from the first until the last was taken; beside the other intervals, not among them."""

    started_ns: int
    ended_ns: int
    chunks: int = 0
    blocked_ns: int = 0
    """Waiting for the reader to take what was there."""
    detokenize_ns: int = 0
    """Waiting for the text of tokens that were there."""

    def attributes(self) -> dict[str, int | float]:
        return {
            names.AI_STREAM_CHUNKS: self.chunks,
            names.AI_STREAM_BLOCKED_MS: self.blocked_ns / 1e6,
            names.AI_STREAM_DETOKENIZE_MS: self.detokenize_ns / 1e6,
        }


@dataclass(slots=True)
class GenerationFacts:
    """Settings and outcome of a generation. Times are monotonic nanoseconds of the ingress."""

    response_id: str
    is_streamed: bool
    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int | None
    choices: int
    finish_reasons: tuple[str, ...] = ()
    output_tokens: int = 0
    cached_tokens: int = 0
    queue_ns: int = 0
    prefill_ns: int = 0
    """Both as the model replica measured them, for the first choice."""
    first_token_ns: int = 0
    """When the first tokens had arrived in the ingress; 0 if none did."""
    last_token_ns: int = 0
    device: str = ""
    model_sent_ns: int = 0
    """When the model was called; 0 if it was not."""
    stream: StreamRecord | None = None

    def attributes(self, started_ns: int) -> dict[str, bool | int | float | str | list[str] | None]:
        first_ns = self.first_token_ns
        return {
            names.GEN_AI_REQUEST_MAX_TOKENS: self.max_tokens,
            names.GEN_AI_REQUEST_TEMPERATURE: self.temperature,
            names.GEN_AI_REQUEST_TOP_P: self.top_p,
            names.GEN_AI_REQUEST_TOP_K: self.top_k or None,
            names.GEN_AI_REQUEST_SEED: self.seed,
            names.GEN_AI_REQUEST_CHOICE_COUNT: self.choices if self.choices > 1 else None,
            names.GEN_AI_REQUEST_STREAM: self.is_streamed,
            names.GEN_AI_RESPONSE_ID: self.response_id,
            names.GEN_AI_RESPONSE_FINISH_REASONS: list(self.finish_reasons) or None,
            names.GEN_AI_RESPONSE_TIME_TO_FIRST_CHUNK: (first_ns - started_ns) / 1e9 if first_ns else None,
            names.GEN_AI_USAGE_OUTPUT_TOKENS: self.output_tokens,
            names.GEN_AI_USAGE_CACHE_READ_INPUT_TOKENS: self.cached_tokens,
        }
