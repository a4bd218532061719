"""Telemetry of one process: sampling, how spans end, and that telemetry never affects a request."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.trace import INVALID_SPAN_CONTEXT
from starlette.datastructures import Headers

from deployments.batching.entry import Batch, BatchEntry
from deployments.config import AppConfig
from deployments.errors import InvalidField
from deployments.http.server_timing import server_timing
from deployments.messages import Carrier, Envelope
from deployments.telemetry import metrics, names
from deployments.telemetry.carrier import from_headers
from deployments.telemetry.export.provider import ReplicaIdentity
from deployments.telemetry.export.sinks import StoreSink
from deployments.telemetry.names import Service
from deployments.telemetry.recorder import Telemetry
from deployments.telemetry.records import (
    Membership,
    PostprocessRecord,
    PredictRecord,
    RequestRecord,
    RunInput,
    TokenizeRecord,
)
from tests.support.otlp import OtlpReceiver

SAMPLED = Carrier("00-" + "a" * 32 + "-" + "b" * 16 + "-01", "vendor=1")
UNSAMPLED = Carrier("00-" + "c" * 32 + "-" + "d" * 16 + "-00")
Start = Callable[..., Telemetry]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    started = []

    def run(service: Service = "ingress", max_records: int = 20_000, **environ: str) -> Telemetry:
        for key, value in environ.items():
            monkeypatch.setenv(key, value)
        config = AppConfig.parse({"telemetry": {"directory": str(tmp_path)}})
        started.append(Telemetry(service, config, "model", ReplicaIdentity("replica", "node"), max_records=max_records))
        return started[-1]

    yield run
    for telemetry in started:
        telemetry.close()


def stored(folder: Path) -> list[dict[str, Any]]:
    return [
        span
        for path in folder.glob("traces-*.jsonl")
        for line in path.read_text().splitlines()
        for span in json.loads(line)["resourceSpans"][0]["scopeSpans"][0]["spans"]
    ]


def envelope(carrier: Carrier) -> Envelope:
    return Envelope(carrier, "id", time.monotonic_ns(), time.monotonic_ns() + 10**9)


def request(telemetry: Telemetry, **headers: str) -> RequestRecord:
    with telemetry.request(
        method="POST", path="/p", scheme="http", route="/p", client="10.0.0.9", request_id="id", headers=headers
    ) as record:
        with telemetry.interval(record, "validate"):
            pass
        record.status = 200
    return record


@pytest.mark.parametrize(
    ("sampler", "traceparent", "sampled"),
    [
        ("parentbased_always_on", None, True),
        ("parentbased_always_on", UNSAMPLED.traceparent, False),
        ("parentbased_always_off", None, False),
        ("parentbased_always_off", SAMPLED.traceparent, True),
        ("always_off", SAMPLED.traceparent, False),
        ("always_on", UNSAMPLED.traceparent, True),
    ],
)
def test_sampling_follows_the_standard_variables(
    start: Start, tmp_path: Path, sampler: str, traceparent: str | None, sampled: bool
) -> None:
    telemetry = start(OTEL_TRACES_SAMPLER=sampler)
    record = request(telemetry, **({"traceparent": traceparent} if traceparent else {}))
    telemetry.close()

    assert record.context.trace_flags.sampled == sampled
    assert [span["name"] for span in stored(tmp_path)] == ([names.VALIDATE, names.PREDICT] if sampled else [])


def test_a_disabled_sdk_records_nothing_and_the_request_keeps_its_ids(start: Start, tmp_path: Path) -> None:
    telemetry = start(OTEL_SDK_DISABLED="true")
    record = request(telemetry)
    telemetry.close()

    assert record.context.is_valid
    assert list(tmp_path.iterdir()) == []


def test_the_carrier_propagates_tracestate(start: Start, tmp_path: Path) -> None:
    telemetry = start()
    headers = {"traceparent": SAMPLED.traceparent, "tracestate": "vendor=1,other=2"}
    with telemetry.request(
        method="POST", path="/p", scheme="http", route="/p", client="10.0.0.9", request_id="id", headers=headers
    ) as record:
        with telemetry.hop(record, "model") as hop:
            carrier = telemetry.carrier_of(record, hop)
        record.status = 200
    with telemetry.stage(PostprocessRecord(envelope(carrier))):
        pass
    telemetry.close()

    assert carrier.tracestate == "vendor=1,other=2"
    by_name = {span["name"]: span for span in stored(tmp_path)}
    assert by_name[names.POSTPROCESS]["parentSpanId"] == by_name[names.HOP_MODEL]["spanId"]
    assert by_name[names.POSTPROCESS]["traceState"] == "vendor=1,other=2"


def test_a_long_tracestate_is_not_copied_into_every_span(start: Start, tmp_path: Path) -> None:
    telemetry = start()
    for length in (512, 513):
        headers = {"traceparent": SAMPLED.traceparent, "tracestate": f"a={'1' * 253},b=".ljust(length, "2")}
        with telemetry.request(
            method="POST", path="/p", scheme="http", route="/p", client="", request_id=str(length), headers=headers
        ) as record:
            record.status = 200
    telemetry.close()
    kept = {span["attributes"][0]["value"]["stringValue"]: span for span in stored(tmp_path)}
    assert len(kept["512"]["traceState"]) == 512
    assert kept["513"]["traceState"] == "ot=rv:aaaaaaaaaaaaaa"
    assert kept["513"]["parentSpanId"] == kept["512"]["parentSpanId"], "the trace goes on all the same"


@pytest.mark.parametrize("is_in_a_stage", [False, True])
def test_a_refused_request_has_status_error_only_if_a_stage_refused_it(
    start: Start, tmp_path: Path, is_in_a_stage: bool
) -> None:
    """The conventions leave the status of a server's 4xx unset; else a flood of them would fill a tail sampler."""
    telemetry = start()
    with telemetry.request(
        method="POST", path="/p", scheme="http", route="/p", client="", request_id="id", headers={}
    ) as record:
        try:
            with telemetry.hop(record, "model") if is_in_a_stage else telemetry.interval(record, "validate"):
                raise InvalidField("x must be y", param="x")
        except InvalidField as error:
            telemetry.fail(record, error)
    telemetry.close()
    for span in stored(tmp_path):
        assert span["status"].get("code") == (2 if is_in_a_stage else None)
        assert {"key": "error.type", "value": {"stringValue": "invalid_field"}} in span["attributes"]
        assert span["events"][0]["name"] == "exception"


@pytest.mark.parametrize(
    ("error", "error_type", "message"),
    [
        (InvalidField("x must be y", param="x"), "invalid_field", "x must be y"),
        (ValueError("the input was: secret"), "ValueError", ""),
        (asyncio.CancelledError(), "cancelled", "the client hung up"),
    ],
)
def test_a_failed_stage_records_the_error_without_quoting_the_input(
    start: Start, tmp_path: Path, error: BaseException, error_type: str, message: str
) -> None:
    telemetry = start("postprocessor")
    record = PostprocessRecord(envelope(SAMPLED))
    try:
        with telemetry.stage(record):
            raise error
    except asyncio.CancelledError:
        assert error_type == "cancelled"
    telemetry.close()
    (span,) = stored(tmp_path)
    attributes = {a["key"]: a["value"] for a in span["attributes"]}
    (event,) = span["events"]
    exception = {a["key"]: a["value"].get("stringValue", "") for a in event["attributes"]}

    assert span["status"]["code"] == 2
    assert attributes["error.type"] == {"stringValue": error_type}
    assert event["name"] == "exception"
    assert exception["exception.message"] == message
    assert ("test_recorder.py" in exception.get("exception.stacktrace", "")) == (error_type == "ValueError")
    assert "secret" not in json.dumps(span)
    assert record.reply(None).failure is not None


def test_a_record_that_cannot_be_exported_does_not_affect_others(start: Start, tmp_path: Path) -> None:
    telemetry = start("postprocessor")
    broken = PostprocessRecord(envelope(Carrier("not a traceparent at 01")))
    with telemetry.stage(broken):
        pass
    with telemetry.stage(PostprocessRecord(envelope(SAMPLED))):
        pass
    telemetry.close()

    assert [span["name"] for span in stored(tmp_path)] == [names.POSTPROCESS]


def test_excess_records_are_dropped_and_counted(start: Start, tmp_path: Path) -> None:
    telemetry = start("postprocessor", max_records=0)
    with telemetry.stage(PostprocessRecord(envelope(SAMPLED))):
        pass
    telemetry.close()
    (path,) = tmp_path.glob("metrics-*.jsonl")

    assert stored(tmp_path) == []
    assert metrics.DROPPED_RECORDS.name in path.read_text()


def test_spans_lost_to_an_unreachable_collector_are_counted(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    telemetry = start(
        OTEL_EXPORTER_OTLP_ENDPOINT=f"http://127.0.0.1:{port}",
        OTEL_EXPORTER_OTLP_PROTOCOL="http/protobuf",
        OTEL_EXPORTER_OTLP_TIMEOUT="1",
        OTEL_BSP_SCHEDULE_DELAY="50",
        OTEL_METRIC_EXPORT_INTERVAL="200",
    )
    for _ in range(100):
        request(telemetry)
    while not any("Failed to export spans" in message for message in caplog.messages):
        time.sleep(0.05)
    receiver = OtlpReceiver(port)
    counted = {True: 0, False: 0}
    deadline = time.monotonic() + 30
    # Spans still queued when the collector came back are delivered; the rest are counted as lost.
    while sum(counted.values()) < 200 and time.monotonic() < deadline:
        for point in receiver.metric_points("otel.sdk.exporter.span.exported"):
            is_lost = any(attribute.key == "error.type" for attribute in point.attributes)
            counted[is_lost] = max(counted[is_lost], point.as_int)
    receiver.close()

    assert counted[True] >= 2
    assert sum(counted.values()) == 200


def test_an_unresponsive_collector_does_not_delay_shutdown(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        telemetry = start(
            OTEL_EXPORTER_OTLP_ENDPOINT=f"http://127.0.0.1:{silent.getsockname()[1]}",
            OTEL_EXPORTER_OTLP_PROTOCOL="grpc",
        )
        request(telemetry)
        started = time.monotonic()
        telemetry.close()
        # The exporter itself would retry for 10 s, and then again for its metrics.
        assert time.monotonic() - started < 9


def test_a_request_cancelled_while_its_batch_runs_ends_with_the_batch(start: Start, tmp_path: Path) -> None:
    telemetry = start("model")
    record = PredictRecord(envelope(SAMPLED))
    entry = BatchEntry(RunInput(record, np.array([1, 2], dtype=np.int32)), 2, 0, arrived_ns=record.started_ns)
    entry.started_ns = time.monotonic_ns()
    batch = Batch([entry], "device_idle", started_ns=entry.started_ns)
    telemetry.batch_begins(batch)
    run = telemetry.run_begins(batch, [entry], 2, entry.started_ns)
    with contextlib.suppress(asyncio.CancelledError), telemetry.stage(record):
        raise asyncio.CancelledError
    telemetry.flush()
    telemetry.run_ends(run, time.monotonic_ns())
    telemetry.close()
    by_name = {span["name"]: span for span in stored(tmp_path)}
    forward, batched = by_name[names.FORWARD_PASS], by_name[names.BATCHED_PREDICT]

    assert forward["endTimeUnixNano"] == batched["endTimeUnixNano"]
    assert int(forward["endTimeUnixNano"]) >= int(forward["startTimeUnixNano"])
    assert forward["status"]["code"] == 2
    assert by_name[names.BATCH_FORWARD]["links"][0]["spanId"] == forward["spanId"]


def test_multiple_tracestate_headers_are_joined() -> None:
    headers = Headers(
        raw=[(b"traceparent", SAMPLED.traceparent.encode()), (b"tracestate", b"a=1"), (b"tracestate", b"b=2")]
    )
    context = from_headers(headers)

    assert context is not None
    assert context.trace_state.to_header() == "a=1,b=2"
    assert from_headers(Headers(raw=[(b"traceparent", SAMPLED.traceparent.encode())] * 2)) is None


runs = st.lists(st.tuples(st.integers(0, 100), st.integers(0, 50)), max_size=6)


@given(runs=runs, held=st.integers(0, 200))
def test_queue_and_forward_add_up_to_the_time_in_the_replica(runs: list[tuple[int, int]], held: int) -> None:
    record = PredictRecord(envelope(SAMPLED), started_ns=0, ended_ns=held)
    for begin, length in runs:
        membership = Membership(INVALID_SPAN_CONTEXT, min(begin, held), 0, 0, 0)
        membership.runs = [_Run(min(begin + length, held))]  # type: ignore[list-item]
        record.memberships.append(membership)
    forward = record.forward_ns()
    covered = {t for m in record.memberships for t in range(m.started_ns, m.ended_ns)}
    last = max((m.started_ns for m in record.memberships), default=held)

    assert 0 <= forward <= held
    assert forward == len(covered | set(range(last, held)))


class _Run:
    def __init__(self, ended_ns: int) -> None:
        self.ended_ns = ended_ns


def test_server_timing_adds_up(start: Start) -> None:
    telemetry = start()
    record = request(telemetry)
    record.intervals[0].ended_ns = record.started_ns + 2_000_000
    with telemetry.hop(record, "tokenizer") as hop:
        pass
    hop.ended_ns, hop.held_ns = hop.started_ns + 5_000_000, 3_000_000
    with telemetry.hop(record, "model") as hop:
        pass
    hop.ended_ns, hop.held_ns, record.forward_ns = hop.started_ns + 20_000_000, 18_000_000, 15_000_000

    assert server_timing(record) == (
        "validate;dur=2.000, tokenize;dur=3.000, queue;dur=3.000, forward;dur=15.000, postprocess;dur=0.000, "
        "transit;dur=4.000, total;dur=27.000"
    )


def test_the_telemetry_thread_outlives_an_error_in_its_flush(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    failures = iter([RuntimeError("not an OSError"), ValueError("nor this")])
    really_tick = StoreSink.tick

    def tick(sink: StoreSink) -> None:
        if (failure := next(failures, None)) is not None:
            raise failure
        really_tick(sink)

    monkeypatch.setattr(StoreSink, "tick", tick)
    telemetry = start("postprocessor")
    with telemetry.stage(PostprocessRecord(envelope(SAMPLED))):
        pass
    deadline = time.monotonic() + 10
    while not stored(tmp_path):
        assert time.monotonic() < deadline, "the thread has ended"
        time.sleep(0.01)

    assert caplog.text.count("telemetry could not be flushed") == 1


def test_a_call_that_is_cancelled_past_its_deadline_has_missed_it() -> None:
    now_ns = time.monotonic_ns()
    for deadline_ns, error_type in ((now_ns - 1, "deadline_passed"), (now_ns + 10**12, "cancelled")):
        record = TokenizeRecord(Envelope(SAMPLED, "id", now_ns - 10, deadline_ns))
        record.end(asyncio.CancelledError())
        assert record.fault is not None
        assert record.fault.error_type == error_type
