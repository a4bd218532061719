"""A generation's time in steps, by what made them as long as they were.

The cost of a step is fitted over all segments, ``a + b * decoding sequences + c * prefilled tokens``. Of the steps in
which a sequence decoded, ``a + b`` is its own, ``b`` for each further sequence its neighbours', and ``c`` for each
token of a prompt others' prefill. Of those in which it was prefilled, ``a`` and ``c`` for each own token are its own.
What the steps took beyond that is contention.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from deployments.batching.cost import fit_line
from deployments.explain.requests.capture import Segment
from deployments.explain.requests.request import Generation
from deployments.explain.traces.survey import Key

_ROUNDS = 8


@dataclass(frozen=True, slots=True)
class StepFit:
    """Milliseconds of a step."""

    step_ms: float
    decode_ms: float
    prefill_ms: float


@dataclass(slots=True)
class StepParts:
    """Milliseconds; their sum is the time that was split."""

    own_prefill: float = 0.0
    others_prefill: float = 0.0
    decode: float = 0.0
    neighbours: float = 0.0
    contention: float = 0.0

    def scaled_to(self, whole_ms: float, rest: str) -> StepParts:
        """Scale down to ``whole_ms``, or add what is missing to ``rest``."""
        parts = (self.own_prefill, self.others_prefill, self.decode, self.neighbours, self.contention)
        total = sum(parts)
        if total > whole_ms:
            return StepParts(*(part * whole_ms / total for part in parts))
        scaled = StepParts(*parts)
        setattr(scaled, rest, getattr(scaled, rest) + whole_ms - total)
        return scaled


def fit_steps(segments: Iterable[Segment]) -> StepFit | None:
    """Least squares of the relative errors, with slow outliers down-weighted (Huber). None without segments."""
    known = [one for one in segments if one.step_ms > 0]
    if not known:
        return None
    decoding = [one for one in known if not one.prefill_tokens]
    step_ms, decode_ms = _line(
        [(one.decode_tokens / one.steps, one.step_ms / one.steps, one.steps) for one in decoding]
    )
    beyond = [
        max(0.0, one.step_ms - step_ms * one.steps - decode_ms * one.decode_tokens) / one.prefill_tokens
        for one in known
        if one.prefill_tokens
    ]
    return StepFit(step_ms, decode_ms, median(beyond) if beyond else 0.0)


def _line(points: Sequence[tuple[float, float, int]]) -> tuple[float, float]:
    """Fit ``y = a + b x`` to ``(x, y, weight)``, with ``a`` and ``b`` at least 0."""
    if not points:
        return 0.0, 0.0
    a = b = 0.0
    trusted = [1.0] * len(points)
    for _ in range(_ROUNDS):
        weights = [trust * weight / y**2 for trust, (_, y, weight) in zip(trusted, points, strict=True)]
        a, b = fit_line([(x, y) for x, y, _ in points], weights)
        a = max(0.0, a)
        errors = [(y - a - b * x) / y for x, y, _ in points]
        scale = max(0.02, median([abs(error) for error in errors]))
        trusted = [min(1.0, scale / max(error, 1e-9)) for error in errors]
    return a, b


def split_prefill(one: Generation, segments: Mapping[Key, Segment], fit: StepFit | None, whole_ms: float) -> StepParts:
    """Split the time from a sequence's first step until its first token."""
    known = [segments[key] for key in one.prefill if key in segments]
    if fit is None or not known:
        return StepParts().scaled_to(whole_ms, "own_prefill")
    tokens = sum(segment.prefill_tokens for segment in known)
    own = min(tokens, one.prefill_tokens)
    in_steps = min(whole_ms, sum(segment.step_ms for segment in known))
    parts = StepParts(
        own_prefill=fit.step_ms * one.chunks + fit.prefill_ms * own,
        others_prefill=fit.prefill_ms * (tokens - own),
        neighbours=fit.decode_ms * sum(segment.decode_tokens for segment in known),
    ).scaled_to(in_steps, "contention")
    # Steps between its chunks that had no room for it.
    parts.others_prefill += whole_ms - in_steps
    return parts


def split_decode(one: Generation, segments: Mapping[Key, Segment], fit: StepFit | None, whole_ms: float) -> StepParts:
    """Split the time from a sequence's first token until its last."""
    parts = StepParts()
    for segment in (segments[key] for key in one.decode if key in segments):
        if fit is None:
            break
        own = (fit.step_ms + fit.decode_ms) * segment.steps
        others = fit.prefill_ms * segment.prefill_tokens
        neighbours = fit.decode_ms * max(0, segment.decode_tokens - segment.steps)
        parts.decode += min(own, segment.step_ms)
        left = max(0.0, segment.step_ms - own)
        share = min(1.0, left / (others + neighbours)) if others + neighbours else 0.0
        parts.others_prefill += others * share
        parts.neighbours += neighbours * share
        parts.contention += max(0.0, left - others - neighbours)
    # Of segments that it has no link to, nothing is known but that it decoded in them.
    return parts.scaled_to(whole_ms, "decode")
