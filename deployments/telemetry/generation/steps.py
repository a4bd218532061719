"""Turns what the engine's thread reports of each step into the records of generations and segments."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from statistics import median_low

from deployments.messages import Envelope
from deployments.telemetry.generation.records import GenerateRecord, SegmentRecord
from deployments.telemetry.recorder import Telemetry

_RECENT = 256
"""Steps whose median is the usual time between two tokens."""


class StepTelemetry:
    """The generations and segments of one replica. Used on its event loop.

    Args:
        telemetry: the replica's.
        device: which the steps run on.
    """

    def __init__(self, telemetry: Telemetry, device: str) -> None:
        self._telemetry, self._device = telemetry, device
        self._segment: SegmentRecord | None = None
        self._last_ns = 0
        self._gaps: deque[int] = deque(maxlen=_RECENT)

    def begin(self, envelope: Envelope, choice: int, depth: int) -> GenerateRecord:
        """Start the record of one choice of a call. ``end`` must follow."""
        self._telemetry.watch_thread()
        return GenerateRecord(
            envelope,
            context=self._telemetry.context_in(envelope.carrier),
            choice=choice,
            device=self._device,
            depth_on_arrival=depth,
        )

    def end(self, record: GenerateRecord, error: BaseException | None = None) -> None:
        """Record that the choice is finished, or why it will not be."""
        record.end(error)
        if error is None and record.last_token_ns:
            record.ended_ns = record.last_token_ns
        if record.gaps:
            record.usual_gap_ns = median_low(self._gaps)
        self._telemetry.put(record)

    def step(
        self,
        started_ns: int,
        ended_ns: int,
        prefilling: Sequence[tuple[GenerateRecord, int]],
        decoding: Sequence[GenerateRecord],
        waiting: int,
        kv_used_ratio: float,
    ) -> None:
        """Record one step: who was prefilled, with how many tokens, and who decoded."""
        segment = self._segment_of(tuple(record for record, _ in prefilling), tuple(decoding), started_ns)
        for record, tokens in prefilling:
            record.first_step_ns = record.first_step_ns or started_ns
            segment.prefill_tokens += tokens
            if not record.first_token_ns:
                record.prefill_tokens += tokens
                record.chunks += 1
        for record in segment.members:
            if record.losses and not record.losses[-1][1]:
                record.losses[-1] = (record.losses[-1][0], started_ns)
        segment.ended_ns = ended_ns
        segment.steps += 1
        segment.decode_tokens += len(decoding)
        segment.step_ns.append(ended_ns - started_ns)
        segment.gaps.append(ended_ns - (self._last_ns or started_ns))
        if decoding:
            self._gaps.append(segment.gaps[-1])
        segment.waiting = max(segment.waiting, waiting)
        segment.kv_used_ratio = max(segment.kv_used_ratio, kv_used_ratio)
        self._last_ns = ended_ns

    def token(self, record: GenerateRecord, at_ns: int) -> None:
        """Record that a token of this choice was there."""
        if record.first_token_ns:
            record.gaps.append(at_ns - record.last_token_ns)
        else:
            record.first_token_ns = at_ns
        record.last_token_ns = at_ns
        record.tokens += 1

    def lost(self, record: GenerateRecord, at_ns: int) -> None:
        """Record that it lost its cache."""
        record.losses.append((at_ns, 0))

    def idle(self) -> None:
        """Record that no step follows for now."""
        if self._segment is not None:
            self._telemetry.put(self._segment)
            self._segment = None
        self._last_ns = 0

    def _segment_of(
        self, prefilling: tuple[GenerateRecord, ...], decoding: tuple[GenerateRecord, ...], started_ns: int
    ) -> SegmentRecord:
        current = self._segment
        if current is not None:
            if current.prefilling == prefilling and current.decoding == decoding:
                return current
            self._telemetry.put(current)
        own = self._telemetry.trace_of_run([record.context for record in prefilling + decoding])
        self._segment = segment = SegmentRecord(own, started_ns, prefilling, decoding, device=self._device)
        for record in segment.members:
            record.segments.append(segment)
        return segment
