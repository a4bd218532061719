"""Holds the records of a process until it is known which traces are kept.

1. Every process holds what it recorded, by trace, for a while. The ingress decides when a request has ended (``rule``),
   the model replica for those that waited for its load, and both tell the others.
2. A request that is kept for its own sake keeps the runs that it was in, and so the requests that shared them: the
   model replica says which these are. They keep their own spans and runs, but nobody else.
3. The weight of a request, on its root span, is for how many it stands: one if it mattered, ``one_in`` if it was drawn
   from those that did not, and none if it is there for a neighbour's sake. So the weights add up to all requests.
4. Only the telemetry thread works here; others hand over what they were told.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from deployments.telemetry.carrier import from_carrier, is_sampled
from deployments.telemetry.generation.records import GenerateRecord, SegmentRecord
from deployments.telemetry.records import BatchRecord, PredictRecord, RequestRecord, StageRecord
from deployments.telemetry.sampling.rule import KeepRule

MAX_HELD = 50_000
"""Records. Beyond, the oldest are let go."""


class Keep(NamedTuple):
    """A trace that is kept."""

    trace_id: int
    is_cause: bool
    """For its own sake, so that those who shared its runs are kept too."""


@dataclass(slots=True)
class _Trace:
    since_s: float
    held: list[object] = field(default_factory=list)
    shared: list[BatchRecord | SegmentRecord] = field(default_factory=list)
    """The runs that it was in, held or written."""
    has_root: bool = False
    is_cause: bool | None = None
    """None as long as it is not kept."""

    def is_kept_as(self, is_cause: bool) -> bool:
        return self.is_cause is True or self.is_cause is is_cause


class Retention:
    """The records of one process.

    Args:
        hold_s: how long something is held.
        rule: decides; only in the ingress.
        clock: monotonic seconds.
        max_held: records.

    Attributes:
        let_go: records that had to go before their time, for want of room.
    """

    def __init__(
        self,
        hold_s: float,
        rule: KeepRule | None = None,
        clock: Callable[[], float] = time.monotonic,
        max_held: int = MAX_HELD,
    ) -> None:
        self._hold_s, self._rule, self._clock, self._max_held = hold_s, rule, clock, max_held
        self._traces: dict[int, _Trace] = {}
        """By the time of their first record."""
        self._written: dict[int, float] = {}
        """Runs, by their own trace, and when they were written."""
        self._asked: deque[Keep] = deque()
        self._told: list[Keep] = []
        self._count = 0
        self.let_go = 0

    def ask(self, kept: Iterable[Keep]) -> None:
        """Hand over what another process has told. From any thread."""
        self._asked.extend(kept)

    def told(self) -> list[Keep]:
        """What to tell the other processes since the last call."""
        told, self._told = self._told, []
        return told

    def take(self, record: object) -> Iterator[object]:
        """Hold a record, and yield what is to be written now."""
        trace_ids = _traces_of(record)
        if not trace_ids:
            yield record
            return
        traces = [self._trace(trace_id) for trace_id in trace_ids]
        if isinstance(record, BatchRecord | SegmentRecord):
            for trace in traces:
                trace.shared.append(record)
        for trace in traces:
            trace.held.append(record)
        self._count += len(traces)
        yield from self._decided(record, trace_ids[0])
        for trace_id, trace in zip(trace_ids, traces, strict=True):
            if trace.is_cause is not None:
                yield from self._let_out(trace)
            if trace.is_cause and trace.shared:
                yield from self._neighbours(trace_id, trace)

    def settle(self) -> Iterator[object]:
        """Yield what is to be written because others told so, and forget what is too old."""
        while self._asked:
            asked = self._asked.popleft()
            trace = self._traces.get(asked.trace_id)
            if trace is not None and trace.has_root and not trace.is_kept_as(asked.is_cause):
                # The ingress that has the request tells all stages.
                self._told.append(asked)
            yield from self._keep(*asked)
        self._forget()

    def _decided(self, record: object, trace_id: int) -> Iterator[object]:
        """What this process decides by itself."""
        if isinstance(record, RequestRecord) and self._rule is not None:
            self._traces[trace_id].has_root = True
            known = self._traces[trace_id].is_cause
            record.weight = self._rule.weight(record) or (1 if known else 0)
            if record.weight or known is False:
                self._told.append(Keep(trace_id, bool(record.weight)))
                yield from self._keep(trace_id, bool(record.weight))
        elif isinstance(record, PredictRecord | GenerateRecord) and record.load is not None:
            self._told.append(Keep(trace_id, is_cause=True))
            yield from self._keep(trace_id, is_cause=True)

    def _keep(self, trace_id: int, is_cause: bool) -> Iterator[object]:
        trace = self._trace(trace_id)
        if trace.is_kept_as(is_cause):
            return
        trace.is_cause = is_cause
        if is_cause:
            for record in trace.held:
                if isinstance(record, RequestRecord) and not record.weight:
                    record.weight = 1
        yield from self._let_out(trace)
        if is_cause:
            yield from self._neighbours(trace_id, trace)

    def _neighbours(self, trace_id: int, trace: _Trace) -> Iterator[object]:
        """Keep those who shared its runs."""
        for other_id in {other_id for run in trace.shared for other_id in _traces_of(run)} - {trace_id}:
            if self._trace(other_id).is_cause is None:
                self._told.append(Keep(other_id, is_cause=False))
                yield from self._keep(other_id, is_cause=False)

    def _let_out(self, trace: _Trace) -> Iterator[object]:
        held, trace.held = trace.held, []
        self._count -= len(held)
        for record in held:
            if isinstance(record, BatchRecord | SegmentRecord):
                if record.context.trace_id in self._written:
                    continue
                self._written[record.context.trace_id] = self._clock()
            yield record

    def _trace(self, trace_id: int) -> _Trace:
        if (trace := self._traces.get(trace_id)) is None:
            self._traces[trace_id] = trace = _Trace(self._clock())
        return trace

    def _forget(self) -> None:
        now_s = self._clock()
        while self._traces:
            trace_id, oldest = next(iter(self._traces.items()))
            is_old = now_s - oldest.since_s > self._hold_s
            if not is_old and self._count <= self._max_held:
                break
            if not is_old:
                self.let_go += len(oldest.held)
            self._count -= len(oldest.held)
            del self._traces[trace_id]
        while self._written:
            run, written_s = next(iter(self._written.items()))
            if now_s - written_s <= self._hold_s:
                break
            del self._written[run]


def _traces_of(record: object) -> Sequence[int]:
    """The traces of the requests that a record belongs to; none if it belongs to no request."""
    match record:
        case RequestRecord():
            return (record.context.trace_id,)
        case StageRecord() if is_sampled(record.carrier):
            return (from_carrier(record.carrier).trace_id,)
        case BatchRecord() | SegmentRecord():
            contexts = [member.context for member in record.members]
            return tuple(dict.fromkeys(one.trace_id for one in contexts if one.trace_flags.sampled))
    return ()
