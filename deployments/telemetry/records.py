"""Records that a stage fills in while it works: plain times and counts, no spans.

Times are monotonic nanoseconds of the process that took them. Records never leave their process; what other stages
need is sent in the replies.
"""

from __future__ import annotations

import asyncio
import time
import traceback
from dataclasses import dataclass, field
from typing import TypeVar

from opentelemetry.trace import SpanContext

from deployments.batching.entry import NEVER
from deployments.errors import ApiError, Cancelled, DeadlinePassed, Failure, InternalError
from deployments.messages import Carrier, Envelope, Ids, Reply
from deployments.telemetry.generation.facts import GenerationFacts
from deployments.telemetry.names import Service

Result = TypeVar("Result")
_MESSAGE_LIMIT = 500


def translate_cancellation(error: BaseException) -> BaseException:
    """Return ``error``, or ``Cancelled`` in place of asyncio's cancellation: the client hung up."""
    if isinstance(error, asyncio.CancelledError):
        return Cancelled("the client hung up").with_traceback(error.__traceback__)
    return error


@dataclass(slots=True)
class Fault:
    """Why a span failed."""

    error_type: str
    """``error.type``: our error code, or the class of an unexpected exception."""
    exception_type: str
    message: str
    stacktrace: str | None = None
    is_callers: bool = False
    """The request itself is at fault, and no stage has seen it: the span's status stays unset, as the conventions have
    it for a server's 4xx."""

    @classmethod
    def of(cls, error: BaseException) -> Fault:
        """Build from an error. Messages of unexpected exceptions are left out: they may quote the input.

        What is refused by a rule has no stack trace: it would say no more, and cost most when most is refused.
        """
        kind = type(error)
        name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
        is_refusal = isinstance(error, ApiError) and error.status != InternalError.status
        frames = None if is_refusal else "".join(traceback.format_tb(error.__traceback__))
        if isinstance(error, ApiError):
            return cls(error.code, name, error.message[:_MESSAGE_LIMIT], frames)
        return cls(name, name, "", frames)


@dataclass(slots=True, eq=False)
class StageRecord:
    """One request in one stage behind the ingress."""

    envelope: Envelope
    started_ns: int = NEVER
    """By default when the call arrived."""
    ended_ns: int = 0
    fault: Fault | None = None
    failure: Failure | None = None

    def __post_init__(self) -> None:
        if self.started_ns == NEVER:
            self.started_ns = self.envelope.arrived_ns

    @property
    def carrier(self) -> Carrier:
        return self.envelope.carrier

    @property
    def deadline_ns(self) -> int:
        return self.envelope.deadline_ns

    @property
    def held_ns(self) -> int:
        return self.ended_ns - self.started_ns

    def end(self, error: BaseException | None) -> None:
        self.ended_ns = time.monotonic_ns()
        if error is None:
            return
        error = translate_cancellation(error)
        if isinstance(error, Cancelled) and self.ended_ns >= self.deadline_ns:
            passed = DeadlinePassed("the deadline passed while the request was in this stage")
            error = passed.with_traceback(error.__traceback__)
        self.fault = Fault.of(error)
        self.failure = Failure.of(error if isinstance(error, ApiError) else InternalError("internal error"))

    def reply(self, result: Result | None) -> Reply[Result]:
        if self.failure is not None:
            return Reply(self.held_ns, failure=self.failure)
        return Reply(self.held_ns, result)


@dataclass(slots=True, eq=False)
class TokenizeRecord(StageRecord):
    input_chars: int = 0
    token_count: int = 0
    was_truncated: bool = False
    cache_hits: int = 0
    slow_ms: float = 50.0


@dataclass(slots=True, eq=False)
class PostprocessRecord(StageRecord):
    output_length: int = 0


@dataclass(slots=True, eq=False)
class BatchRecord:
    """One model run, in a trace of its own."""

    context: SpanContext
    started_ns: int
    size: int
    tokens: int
    padded_tokens: int
    reason: str
    queue_behind: int
    waits_ns: list[int]
    members: list[Membership]
    ended_ns: int = 0
    inference_ms: float = 0.0
    output_shape: tuple[int, ...] = ()
    device: str = ""
    peak_memory_gb: float | None = None
    gpu_utilization: tuple[float | None, float | None] = (None, None)
    gpu_memory_free_gb: float | None = None
    fault: Fault | None = None

    @property
    def padding_ratio(self) -> float:
        return 1 - self.tokens / self.padded_tokens if self.padded_tokens else 0.0


@dataclass(slots=True, eq=False)
class Membership:
    """A request's part in one batch: one ``queue`` and one ``forward_pass`` span.

    ``runs`` has more than one entry if a run failed and was repeated in parts to find the faulty input.
    """

    context: SpanContext
    """Context of the ``forward_pass`` span."""
    started_ns: int
    depth_on_arrival: int
    busy_wait_ns: int
    fill_wait_ns: int
    runs: list[BatchRecord] = field(default_factory=list)
    fault: Fault | None = None

    @property
    def wait_ns(self) -> int:
        """Time in the queue before the batch started."""
        return self.busy_wait_ns + self.fill_wait_ns

    @property
    def is_over(self) -> bool:
        """Whether its runs have ended; a request can end earlier, if the client hangs up or the deadline passes."""
        return all(run.ended_ns for run in self.runs)

    @property
    def ended_ns(self) -> int:
        return max((run.ended_ns for run in self.runs), default=self.started_ns)


@dataclass(frozen=True, slots=True)
class UnfinishedWait:
    """A wait in the queue that ended without a run."""

    started_ns: int
    ended_ns: int
    depth_on_arrival: int
    busy_wait_ns: int
    fill_wait_ns: int


@dataclass(slots=True, eq=False)
class PredictRecord(StageRecord):
    memberships: list[Membership] = field(default_factory=list)
    load: SpanContext | None = None
    """The model load that the request had to wait for."""
    unfinished: UnfinishedWait | None = None
    """Set if the request ended while some of its inputs were still waiting."""

    def forward_ns(self) -> int:
        """Length of the union of the request's runs; the last run counts until the request has its result."""
        spans = sorted((m.started_ns, m.ended_ns) for m in self.memberships)
        if not spans:
            return 0
        spans[-1] = (spans[-1][0], max(self.ended_ns, spans[-1][1]))
        total, reached = 0, 0
        for start, end in spans:
            total += max(0, end - max(start, reached))
            reached = max(reached, end)
        return min(total, self.held_ns)


@dataclass(slots=True, eq=False)
class RunInput:
    """One input of a request, as passed to the model."""

    record: PredictRecord
    ids: Ids
    membership: Membership | None = None
    """The request's part in the batch that contains this input."""


@dataclass(slots=True)
class ModelLoadRecord:
    """One model load, in a trace of its own with the phases as children."""

    context: SpanContext
    started_ns: int
    device: str = ""
    phases: list[tuple[str, int, int]] = field(default_factory=list)
    ended_ns: int = 0
    memory_allocated_gb: float | None = None
    memory_reserved_gb: float | None = None
    fault: Fault | None = None


@dataclass(slots=True)
class Interval:
    """Part of a request as the ingress sees it."""

    name: str
    started_ns: int
    ended_ns: int = 0
    fault: Fault | None = None


@dataclass(slots=True)
class HopRecord(Interval):
    span_id: int = 0
    held_ns: int = 0
    """Time the stage reported holding the request; 0 without a reply."""
    has_reply: bool = False
    attempt: int = 1
    """2 if a replica was lost and the call was sent again, to another."""
    left_ns: int = 0
    """When the call was sent; 0 if it was not."""

    @property
    def wait_ns(self) -> int:
        """How long the call waited for a replica that could take it."""
        return (self.left_ns or self.ended_ns) - self.started_ns

    @property
    def transit_ns(self) -> int:
        return max(0, self.ended_ns - self.started_ns - self.held_ns)


@dataclass(slots=True)
class RequestRecord:
    """One request, over HTTP or gRPC, from its first byte to its response.

    Its intervals are contiguous: each begins where the previous one ended.
    """

    context: SpanContext
    parent: SpanContext | None
    request_id: str
    method: str
    path: str
    scheme: str
    route: str
    client: str
    """Client address; empty if unknown."""
    started_ns: int
    deadline_ns: int = 0
    """On this process's monotonic clock."""
    timeout_ms: float | None = None
    """If it set another than the default."""
    ended_ns: int = 0
    intervals: list[Interval] = field(default_factory=list)
    input_count: int = 0
    input_length: int = 0
    texts: tuple[str, ...] | None = None
    operation: str = ""
    requested_model: str = ""
    tenant: str = ""
    """Name of the API key; empty if none is needed."""
    device: str = ""
    tokens: int = 0
    forward_ns: int = 0
    status: int = 0
    outcome: str = "ok"
    fault: Fault | None = None
    generation: GenerationFacts | None = None
    weight: int | None = None
    """For how many requests it stands, if it is sampled retroactively."""
    number: int | None = None
    """Of those of its model that this ingress has traced or, by its own sampler, not traced, from 1."""
    rpc_method: str = ""
    """Of a gRPC call, ``service/method``; empty for HTTP."""
    rpc_status: str = ""
    model: str = ""

    @property
    def caller(self) -> str:
        return self.tenant or self.client

    @property
    def boundary_ns(self) -> int:
        """Where the next interval begins."""
        return self.intervals[-1].ended_ns if self.intervals else self.started_ns

    @property
    def streamed_until_ns(self) -> int:
        """When the last chunk of a stream was taken; 0 if nothing was streamed."""
        stream = self.generation.stream if self.generation is not None else None
        return stream.ended_ns if stream is not None else 0

    @property
    def hops(self) -> dict[Service, HopRecord]:
        """The last call to each stage."""
        return {i.name: i for i in self.intervals if isinstance(i, HopRecord)}  # type: ignore[misc]
