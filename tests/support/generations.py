"""A replica of a language model in virtual time: the real planner and the real records, with steps of a known cost."""

from __future__ import annotations

import heapq
import itertools
import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.trace import SpanContext, TraceFlags

import deployments.telemetry.generation.spans  # noqa: F401 (registers them)
from deployments.batching.generation.step_cost import StepCost
from deployments.batching.generation.steps import Sequence, StepLimits, StepPlanner
from deployments.engine.generation.fake import FakeCache
from deployments.explain.traces.otlp import Decoder, Span
from deployments.messages import Carrier, Envelope
from deployments.telemetry.carrier import child_of, from_carrier, to_carrier
from deployments.telemetry.export.otlp_json import JsonEncoder
from deployments.telemetry.generation.facts import GenerationFacts, StreamRecord
from deployments.telemetry.generation.records import GenerateRecord, SegmentRecord
from deployments.telemetry.generation.steps import StepTelemetry
from deployments.telemetry.records import HopRecord, Interval, RequestRecord, TokenizeRecord
from deployments.telemetry.sampling.consistent import as_state, trace_of_run
from deployments.telemetry.span_specs import CPU_USED, SHORTAGES
from deployments.telemetry.spans import SpanFactory

STEP_MS, DECODE_MS, PREFILL_MS = 20.0, 2.0, 0.5
_WALL_NS = 10**18
_MS = 10**6
_BEGIN_NS = 10**9
"""Times of 0 stand for what has not happened."""


@dataclass(frozen=True)
class Asked:
    """One request of the simulation."""

    at_ms: float
    prompt: int = 50
    output: int = 20
    reader_ms: float = 0.0
    """How long its reader takes after the last token."""
    disturbed_ms: float = 0.0
    """How much longer than it should each step takes in which it decodes."""


class Recorded:
    """Stand-in for the telemetry of a replica: keeps what is handed over."""

    def __init__(self) -> None:
        self.ids = RandomIdGenerator()
        self.records: list[Any] = []

    def context_in(self, carrier: Carrier) -> SpanContext:
        return child_of(from_carrier(carrier), self.ids.generate_span_id())

    def trace_of_run(self, members: list[SpanContext]) -> SpanContext:
        trace_id, state = trace_of_run(self.ids.generate_trace_id(), members)
        return SpanContext(trace_id, self.ids.generate_span_id(), False, TraceFlags(TraceFlags.SAMPLED), state)

    def own_trace(self) -> SpanContext:
        ids = self.ids.generate_trace_id(), self.ids.generate_span_id()
        return SpanContext(*ids, False, TraceFlags(TraceFlags.SAMPLED), as_state(0))

    def watch_thread(self) -> None:
        pass

    def put(self, record: object) -> None:
        self.records.append(record)


def simulate(
    asked: Iterable[Asked],
    *,
    max_sequences: int = 32,
    max_batch_tokens: int = 512,
    max_step_ms: float = 1e6,
    cache_tokens: int = 16_384,
    reserve: float = 1.0,
) -> list[Span]:
    """Return the spans of these requests and of the segments that they were in."""
    telemetry = Recorded()
    steps = StepTelemetry(telemetry, "cpu")  # type: ignore[arg-type]
    now_ns = 0
    limits = StepLimits(max_sequences, max_batch_tokens, max_step_ms, reserve)
    planner = StepPlanner(limits, FakeCache(cache_tokens), lambda: max(1, now_ns))
    planner.cost = StepCost(STEP_MS * _MS, DECODE_MS * _MS, PREFILL_MS * _MS)
    arrivals = [(_BEGIN_NS + round(one.at_ms * _MS), number, one) for number, one in enumerate(asked)]
    heapq.heapify(arrivals)
    roots: dict[int, RequestRecord] = {}
    records: dict[int, tuple[Asked, GenerateRecord]] = {}
    while arrivals or planner.running or planner.waiting:
        if not planner.running and not planner.waiting:
            now_ns = max(now_ns, arrivals[0][0])
        while arrivals and arrivals[0][0] <= now_ns:
            at_ns, number, one = heapq.heappop(arrivals)
            roots[number] = _root(telemetry, at_ns, one)
            hop = roots[number].hops["model"]
            envelope = Envelope(to_carrier(roots[number].context, hop.span_id), str(number), at_ns, at_ns + 10**12)
            record = steps.begin(envelope, 0, len(planner.waiting))
            records[number] = one, record
            planner.add(Sequence(number, [1] * one.prompt, one.output))
        plan = planner.plan()
        for sequence in plan.preempted:
            steps.lost(records[sequence.number][1], now_ns)
        if not plan.members:
            continue
        decoding = [records[member.sequence.number][1] for member in plan.members if not member.is_prefill]
        took_ms = STEP_MS + DECODE_MS * len(decoding) + PREFILL_MS * plan.prefill_tokens
        took_ms += max((records[m.sequence.number][0].disturbed_ms for m in plan.members), default=0.0)
        ended_ns = now_ns + round(took_ms * _MS)
        for member in plan.members:
            record, since_ns = records[member.sequence.number][1], member.sequence.cache_since_ns
            if not record.first_step_ns and since_ns:
                record.cache_wait_ns = now_ns - max(record.started_ns, since_ns)
        prefilling = [(records[m.sequence.number][1], m.tokens) for m in plan.members if m.is_prefill]
        steps.step(now_ns, ended_ns, prefilling, decoding, len(planner.waiting), planner.used_ratio)
        planner.done(plan)
        for member in plan.members:
            if not member.samples:
                continue
            sequence = member.sequence
            sequence.generated.append(1)
            record = records[sequence.number][1]
            steps.token(record, ended_ns)
            if len(sequence.generated) == sequence.max_tokens:
                planner.remove(sequence)
                record.finish_reason = "length"
                steps.end(record)
                _finish(roots[sequence.number], records[sequence.number][0], record)
        now_ns = ended_ns
    steps.idle()
    return list(_spans([*telemetry.records, *roots.values()], telemetry))


def _root(telemetry: Recorded, at_ns: int, one: Asked) -> RequestRecord:
    record = RequestRecord(
        telemetry.own_trace(), None, "id", "POST", "/v1/chat/completions", "http", "/v1/chat/completions", "", at_ns
    )
    record.status, record.operation, record.tokens = 200, "chat", one.prompt
    record.intervals.append(Interval("validate", at_ns, at_ns))
    hop = HopRecord("tokenizer", at_ns, at_ns, span_id=telemetry.ids.generate_span_id(), has_reply=True, left_ns=at_ns)
    record.intervals.append(hop)
    envelope = Envelope(to_carrier(record.context, hop.span_id), "id", at_ns, at_ns + 10**12)
    telemetry.put(TokenizeRecord(envelope, at_ns, at_ns))
    record.intervals.append(
        HopRecord("model", at_ns, span_id=telemetry.ids.generate_span_id(), has_reply=True, left_ns=at_ns)
    )
    record.generation = GenerationFacts("id", True, one.output, 1.0, 1.0, 0, None, 1)
    return record


def _finish(root: RequestRecord, one: Asked, record: GenerateRecord) -> None:
    hop, facts = root.hops["model"], root.generation
    assert facts is not None
    hop.ended_ns = record.ended_ns
    hop.held_ns = record.ended_ns - hop.started_ns
    root.ended_ns = record.ended_ns + round(one.reader_ms * _MS)
    facts.first_token_ns, facts.last_token_ns = record.first_token_ns, record.last_token_ns
    facts.stream = StreamRecord(
        record.first_token_ns, root.ended_ns, chunks=record.tokens, blocked_ns=root.ended_ns - record.ended_ns
    )


def _spans(records: Iterable[Any], telemetry: Recorded) -> Iterator[Span]:
    factory = SpanFactory(
        telemetry.ids,
        "lm",
        32,
        0.0,
        _WALL_NS,
        cpu_used=dict.fromkeys(CPU_USED, lambda *_: 0),
        shortages=dict.fromkeys(SHORTAGES, lambda *_: 0),
    )
    encoders = {
        service: JsonEncoder(Resource({"service.name": f"slowlens.{service}", "service.instance.id": service}))
        for service in ("ingress", "tokenizer", "model")
    }
    decoder = Decoder()
    for record in records:
        kind = {RequestRecord: "ingress", TokenizeRecord: "tokenizer"}.get(type(record), "model")
        assert kind != "model" or isinstance(record, (GenerateRecord, SegmentRecord))
        encoder = encoders[kind]
        line = encoder.line([encoder.span(span) for span in factory.spans(record)])
        yield from decoder.spans(json.loads(line))


def chats(count: int, every_ms: float, **more: Any) -> list[Asked]:
    """Short chats at regular times."""
    return [Asked(number * every_ms, **more) for number in range(count)]


def at_random(count: int, every_ms: float, **more: Any) -> list[Asked]:
    """Short chats at random times."""
    chance, at_ms, found = random.Random(7), 0.0, []
    for _ in range(count):
        at_ms += chance.expovariate(1 / every_ms)
        found.append(Asked(at_ms, **more))
    return found


def ordered(*groups: Iterable[Asked]) -> list[Asked]:
    return sorted(itertools.chain(*groups), key=lambda one: one.at_ms)
