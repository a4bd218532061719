"""Records of a generation. Consecutive steps with the same members in the same roles are one segment."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

from opentelemetry.trace import SpanContext

from deployments.telemetry.records import StageRecord

MAX_LINKS = 128
"""Segments that a ``decode`` span links to: those of its slow tokens and the longest ones."""
MAX_SLOW_TOKENS = 8
"""Events for the longest gaps of a ``decode`` span."""


@dataclass(slots=True, eq=False)
class SegmentRecord:
    """Consecutive steps with the same members in the same roles, in a trace of its own."""

    context: SpanContext
    started_ns: int
    prefilling: tuple[GenerateRecord, ...]
    decoding: tuple[GenerateRecord, ...]
    ended_ns: int = 0
    steps: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    step_ns: array[int] = field(default_factory=lambda: array("q"))
    """Nanoseconds of each step."""
    gaps: array[int] = field(default_factory=lambda: array("q"))
    """Nanoseconds from the end of the step before, whatever it was, to the end of each."""
    waiting: int = 0
    """The most that waited."""
    kv_used_ratio: float = 0.0
    device: str = ""

    @property
    def members(self) -> tuple[GenerateRecord, ...]:
        return self.prefilling + self.decoding


@dataclass(slots=True, eq=False, kw_only=True)
class GenerateRecord(StageRecord):
    """One choice of a request, in the model replica. Ends with its last token."""

    context: SpanContext
    """Of its ``generate`` span."""
    choice: int = 0
    device: str = ""
    depth_on_arrival: int = 0
    cache_wait_ns: int = 0
    """How much of its time in the queue the KV cache had no room for it."""
    first_step_ns: int = 0
    first_token_ns: int = 0
    last_token_ns: int = 0
    prefill_tokens: int = 0
    """Computed before its first token."""
    cached_tokens: int = 0
    chunks: int = 0
    tokens: int = 0
    gaps: array[int] = field(default_factory=lambda: array("q"))
    """Nanoseconds between its tokens."""
    usual_gap_ns: int = 0
    """Between the tokens of anybody, before it ended."""
    losses: list[tuple[int, int]] = field(default_factory=list)
    """From when it lost its cache until it ran again; 0 while it has not."""
    segments: list[SegmentRecord] = field(default_factory=list)
    load: SpanContext | None = None
    finish_reason: str = ""

    @property
    def queue_ns(self) -> int:
        return (self.first_step_ns or self.ended_ns) - self.started_ns

    @property
    def prefill_ns(self) -> int:
        return (self.first_token_ns or self.ended_ns) - self.first_step_ns if self.first_step_ns else 0

    def p99_gap_ns(self) -> int:
        """The smallest gap with 99 % of the gaps at or below it."""
        return sorted(self.gaps)[-(-99 * len(self.gaps) // 100) - 1] if self.gaps else 0

    def slow_tokens(self) -> list[tuple[int, int, int]]:
        """The longest gaps that are more than twice the usual: number of the token, from 1; when it came; its gap."""
        slow_ns, came_ns, found = 2 * self.usual_gap_ns, self.first_token_ns, []
        for number, gap_ns in enumerate(self.gaps, 2):
            came_ns += gap_ns
            if gap_ns > slow_ns:
                found.append((number, came_ns, gap_ns))
        return sorted(sorted(found, key=lambda token: -token[2])[:MAX_SLOW_TOKENS])
