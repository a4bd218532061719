"""Spans made from records: each has exactly the attributes that its spec declares."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.trace import SpanContext, TraceFlags

import deployments.telemetry.generation.spans  # noqa: F401 (registers them)
from deployments.errors import InternalError
from deployments.messages import Carrier, Envelope
from deployments.telemetry import names
from deployments.telemetry.export.span import Span
from deployments.telemetry.gauges.stalls import Stall
from deployments.telemetry.generation.facts import GenerationFacts, StreamRecord
from deployments.telemetry.generation.records import GenerateRecord, SegmentRecord
from deployments.telemetry.records import (
    BatchRecord,
    Fault,
    HopRecord,
    Interval,
    Membership,
    ModelLoadRecord,
    PostprocessRecord,
    PredictRecord,
    RequestRecord,
    TokenizeRecord,
    UnfinishedWait,
)
from deployments.telemetry.span_specs import CPU_USED, SHORTAGES, SPANS, SpanSpec
from deployments.telemetry.spans import SpanFactory

ENVELOPE = Envelope(Carrier("00-" + "a" * 32 + "-" + "b" * 16 + "-01"), "id", 0, 10**9)
CONTEXT = SpanContext(0xA, 0xB, False, TraceFlags(TraceFlags.SAMPLED))
FAULT = Fault.of(InternalError("broken"))
IN_EVERY_FAILED_SPAN = {names.ERROR_TYPE}
EMITTED_ELSEWHERE = {names.SCALING_DECISION}
"""By the autoscaling policy, see test_decisions."""


def factory() -> SpanFactory:
    return SpanFactory(
        RandomIdGenerator(),
        "model",
        32,
        0.0,
        1_000_000,
        cpu_used=dict.fromkeys(CPU_USED, lambda *_: 0),
        shortages=dict.fromkeys(SHORTAGES, lambda *_: 0),
    )


def batch(member: Membership) -> BatchRecord:
    return BatchRecord(CONTEXT, 10, 2, 6, 8, "full", 3, [4, 6], [member], ended_ns=20)


def a_request() -> RequestRecord:
    request = RequestRecord(CONTEXT, None, "id", "POST", "/p", "http", "/p", "10.0.0.9", 0, ended_ns=30)
    request.intervals = [
        Interval("front", 0, 0),
        Interval("validate", 0, 1),
        HopRecord("tokenizer", 1, 2, span_id=7),
        HopRecord("model", 2, 20, span_id=8),
        HopRecord("postprocessor", 20, 25, span_id=9),
        Interval("respond", 25, 30),
    ]
    request.generation = GenerationFacts("id", True, 9, 1.0, 1.0, 0, None, 1)
    request.generation.stream = StreamRecord(10, 20)
    return request


def every_generation_record() -> Iterator[object]:
    yield a_request()
    record = GenerateRecord(ENVELOPE, 0, 30, context=CONTEXT, first_step_ns=2, first_token_ns=9, last_token_ns=30)
    record.losses.append((12, 15))
    segment = SegmentRecord(CONTEXT, 2, (record,), (), ended_ns=9)
    record.segments.append(segment)
    yield record
    yield segment


def every_record() -> Iterator[object]:
    yield a_request()
    over_grpc = a_request()
    over_grpc.rpc_method, over_grpc.rpc_status = "inference.GRPCInferenceService/ModelInfer", "OK"
    yield over_grpc
    yield TokenizeRecord(ENVELOPE, 0, 5)
    predict = PredictRecord(ENVELOPE, 0, 25)
    membership = Membership(CONTEXT, 10, 1, 4, 6)
    run = batch(membership)
    membership.runs.append(run)
    predict.memberships.append(membership)
    predict.unfinished = UnfinishedWait(0, 9, 1, 5, 4)
    yield predict
    yield run
    yield PostprocessRecord(ENVELOPE, 0, 5)
    load = ModelLoadRecord(CONTEXT, 0, ended_ns=9)
    load.phases = [("weights", 0, 3), ("device_move", 3, 4), ("warm_up", 4, 9)]
    yield load


def every_span(*, is_of_generations: bool = False) -> list[Span]:
    records = every_generation_record() if is_of_generations else every_record()
    return [span for record in records for span in factory().spans(record)]


RPC = {"rpc.system.name", "rpc.method", "rpc.response.status_code"}
HTTP = {"http.request.method", "http.route", "http.response.status_code", "url.path", "url.scheme"}
"""Attributes of a root over one of the two."""


@pytest.mark.parametrize("spec", SPANS, ids=lambda spec: spec.name)
def test_a_span_has_exactly_its_declared_attributes(spec: SpanSpec) -> None:
    if spec.name in EMITTED_ELSEWHERE:
        return
    found = [span for span in every_span(is_of_generations=spec.is_of_generations) if span.name == spec.name]

    assert found, "no record makes this span"
    declared = set(spec.attributes) - IN_EVERY_FAILED_SPAN
    for span in found:
        of_the_other = RPC if "http.route" in span.attributes else HTTP if "rpc.method" in span.attributes else set()
        assert set(span.attributes) == declared - of_the_other


def test_every_emitted_span_is_declared() -> None:
    emitted = every_span() + every_span(is_of_generations=True)
    assert {span.name for span in emitted} == {spec.name for spec in SPANS} - EMITTED_ELSEWHERE


def test_an_unsampled_request_emits_no_spans() -> None:
    unsampled = Envelope(Carrier("00-" + "a" * 32 + "-" + "b" * 16 + "-00"), "id", 0, 10**9)
    request = RequestRecord(SpanContext(1, 2, False), None, "id", "POST", "/p", "http", "/p", "", 0)
    load = ModelLoadRecord(SpanContext(1, 2, False), 0)
    records = [request, load, TokenizeRecord(unsampled), PredictRecord(unsampled), PostprocessRecord(unsampled)]
    alone = batch(Membership(SpanContext(0, 0, False), 10, 0, 0, 0))

    assert [span for record in [*records, alone] for span in factory().spans(record)] == []


def test_a_forward_pass_ends_with_its_last_run_and_the_last_one_with_the_reply() -> None:
    record = PredictRecord(ENVELOPE, 0, 100)
    for started_ns, ended_ns in ((10, 30), (40, 80)):
        membership = Membership(CONTEXT, started_ns, 0, 2, 3)
        run = batch(membership)
        run.ended_ns = ended_ns
        membership.runs.append(run)
        record.memberships.append(membership)
    spans = {name: [s for s in factory().spans(record) if s.name == name] for name in (names.QUEUE, names.FORWARD_PASS)}
    offset = factory().wall_offset_ns

    assert [(s.started_unix_ns - offset, s.ended_unix_ns - offset) for s in spans[names.FORWARD_PASS]] == [
        (10, 30),
        (40, 100),
    ]
    assert [s.ended_unix_ns - s.started_unix_ns for s in spans[names.QUEUE]] == [5, 5]


def test_a_stall_of_the_event_loop_is_an_event_of_what_waited_for_it() -> None:
    stall = Stall(20, "in the culprit", 60)

    def stalls(started_ns: int, ended_ns: int) -> list[Stall]:
        return [stall] if stall.shared_ns(started_ns, ended_ns) else []

    make = replace(factory(), stalls_between=stalls)
    (before,) = make.spans(PostprocessRecord(ENVELOPE, 0, 20))
    (meanwhile,) = make.spans(PostprocessRecord(ENVELOPE, 50, 100))

    assert (list(before.events), before.attributes[names.AI_EVENT_LOOP_STALL_MS]) == ([], None)
    (event,) = meanwhile.events
    assert (event.name, event.unix_ns) == (names.EVENT_LOOP_STALL, make.wall_offset_ns + 20)
    assert event.attributes == {names.AI_EVENT_LOOP_STALL_MS: 40 / 1e6, names.CODE_STACKTRACE: "in the culprit"}
    assert meanwhile.attributes[names.AI_EVENT_LOOP_STALL_MS] == 10 / 1e6


def test_a_request_that_ends_while_its_batch_runs_keeps_its_own_fault() -> None:
    record = PredictRecord(ENVELOPE, 0, 15, fault=FAULT)
    membership = Membership(CONTEXT, 10, 0, 2, 3)
    run = batch(membership)
    run.ended_ns = 0
    membership.runs.append(run)
    record.memberships.append(membership)
    (forward,) = (span for span in factory().spans(record) if span.name == names.FORWARD_PASS)

    assert forward.fault is FAULT


def test_an_unknown_record_type_is_rejected() -> None:
    with pytest.raises(TypeError, match="no spans are defined for str"):
        factory().spans("a string")
