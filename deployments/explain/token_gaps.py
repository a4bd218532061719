"""The longest waits between tokens of generations, and whose prompts made them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from deployments.explain.requests.capture import Segment
from deployments.explain.requests.request import number
from deployments.explain.traces.otlp import Span
from deployments.explain.traces.survey import Key
from deployments.telemetry import names

_SLACK_NS = 10**6
"""Trace stores keep microseconds, and a token is there a moment after its step."""
_NAMED = 2
"""Requests named for one token."""


@dataclass(frozen=True, slots=True)
class TokenGap:
    """A token that came late."""

    trace_id: str
    token: int
    """Its number in the answer, from 1."""
    gap_ms: float
    """Since the token before."""
    usual_ms: float
    """The median of the replica's last steps, whoever decoded in them."""
    preempted_ms: float = 0.0
    """How much of it the generation had no place in the KV cache."""
    prompt_tokens: int = 0
    """Tokens of prompts that a step of its segment computed, on average."""
    prompts_of: tuple[str, ...] = ()
    """Traces of the requests whose prompts these were."""

    @property
    def more_ms(self) -> float:
        return self.gap_ms - self.usual_ms

    def __str__(self) -> str:
        """``token 41 waited 380 ms, usually 70: 310 ms for 1,024 tokens of the prompt of slowlens trace 4bf9…``."""
        waited = f"token {self.token} waited {self.gap_ms:.0f} ms, usually {self.usual_ms:.0f}"
        if self.preempted_ms > self.more_ms / 2:
            return f"{waited}: {self.preempted_ms:.0f} ms without its place in the KV cache"
        if self.prompts_of:
            return f"{waited}: {self.more_ms:.0f} ms for {self.prompt_tokens:,} tokens of {self._prompts()}"
        return f"{waited}: {self.more_ms:.0f} ms more for a step without anybody's prompt"

    def _prompts(self) -> str:
        named = ", ".join(f"slowlens trace {trace_id}" for trace_id in self.prompts_of[:_NAMED])
        if len(self.prompts_of) == 1:
            return f"the prompt of {named}"
        others = len(self.prompts_of) - _NAMED
        return f"the prompts of {named}" + (f" and {others} more" if others > 0 else "")


def token_gaps(spans: Iterable[Span], segments: Mapping[Key, Segment]) -> Iterator[TokenGap]:
    """The tokens of a request that its ``decode`` spans report as slow, each with the step that it waited for."""
    spans = list(spans)
    for decode in (span for span in spans if span.name == names.DECODE):
        linked = sorted(
            (segments[key] for key in decode.links if key in segments), key=lambda segment: segment.started_ns
        )
        lost = [span for span in spans if span.name == names.PREEMPTED and span.parent_id == decode.parent_id]
        usual_ms = number(decode, names.AI_DECODE_USUAL_GAP_MS)
        for event in decode.events:
            gap_ms, token = (event.attributes.get(key) for key in (names.AI_TOKEN_GAP_MS, names.AI_TOKEN_INDEX))
            if event.name != names.EVENT_SLOW_TOKEN or not isinstance(gap_ms, int | float):
                continue
            if not isinstance(token, int) or gap_ms <= usual_ms:
                continue
            yield _gap(TokenGap(decode.trace_id, token, gap_ms, usual_ms), event.unix_ns, linked, lost)


def _gap(gap: TokenGap, came_ns: int, segments: Sequence[Segment], lost: Sequence[Span]) -> TokenGap:
    """Complete a gap by what its step computed."""
    since_ns = came_ns - round(gap.gap_ms * 1e6)
    preempted_ns = sum(max(0, min(came_ns, span.end_ns) - max(since_ns, span.start_ns)) for span in lost)
    gap = replace(gap, preempted_ms=preempted_ns / 1e6)
    for step in reversed(segments):
        if step.started_ns < came_ns <= step.ended_ns + _SLACK_NS:
            return replace(gap, prompt_tokens=step.prefill_tokens // step.steps, prompts_of=step.prompts_of)
    return gap
