"""Our OTLP JSON against OpenTelemetry's own encoder."""

from __future__ import annotations

import json
from typing import Any

from google.protobuf.json_format import ParseDict
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.exporter.otlp.json.common.trace_encoder import encode_spans
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.resources import Resource
from opentelemetry.trace import SpanContext, TraceFlags
from opentelemetry.trace.span import TraceState

from deployments.telemetry import span_specs
from deployments.telemetry.export.otlp_json import JsonEncoder, readable
from deployments.telemetry.export.span import Event, Span
from deployments.telemetry.records import Fault
from tests.unit.telemetry.test_store import with_bytes_ids

RESOURCE = Resource({"service.name": "slowlens.model", "host.name": 'a "quoted" name', "process.pid": 5})
ids = st.integers(1, 2**64 - 1)
contexts = st.builds(
    SpanContext,
    st.integers(1, 2**128 - 1),
    ids,
    st.booleans(),
    st.sampled_from([TraceFlags(0), TraceFlags(1)]),
    st.sampled_from([TraceState(), TraceState([("vendor", "1"), ("other", "x")])]),
)
values = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**63), 2**63 - 1), st.floats(), st.text(), st.lists(st.text(), max_size=3)
)
attributes = st.dictionaries(st.sampled_from(["ai.batch.size", "text", 'k"ey', "ai.gpu.x"]), values)
spans = st.builds(
    Span,
    name=st.sampled_from([spec.name for spec in span_specs.SPANS]),
    trace=contexts,
    span_id=ids,
    parent_id=st.one_of(st.just(0), ids),
    parent_is_remote=st.booleans(),
    started_unix_ns=st.integers(1, 2**62),
    ended_unix_ns=st.integers(1, 2**62),
    attributes=attributes,
    fault=st.one_of(st.none(), st.builds(Fault, st.text(), st.text(min_size=1), st.text(), st.text())),
    links=st.lists(contexts, max_size=3),
    events=st.lists(st.builds(Event, st.text(), st.integers(1, 2**62), attributes), max_size=2),
)


def comparable(value: Any) -> Any:
    """Drop empty values, which proto3 does not distinguish from missing ones, and replace NaN, which equals nothing."""
    if isinstance(value, dict):
        found = {key: comparable(inner) for key, inner in value.items()}
        return {key: inner for key, inner in found.items() if inner not in ("", [], {}, None)}
    if isinstance(value, list):
        return [comparable(item) for item in value]
    return str(value) if isinstance(value, float) and value != value else value


@given(st.lists(spans, min_size=1, max_size=3))
def test_our_json_equals_that_of_opentelemetry(given_spans: list[Span]) -> None:
    encoder = JsonEncoder(RESOURCE)
    ours = json.loads(encoder.line([encoder.span(span) for span in given_spans]))
    theirs = json.loads(encode_spans([readable(span, RESOURCE) for span in given_spans]).to_json())

    assert comparable(ours) == comparable(theirs)


@given(st.lists(spans, min_size=1, max_size=3))
def test_the_collector_can_parse_it(given_spans: list[Span]) -> None:
    encoder = JsonEncoder(RESOURCE)
    line = json.loads(encoder.line([encoder.span(span) for span in given_spans]))
    read = ParseDict(with_bytes_ids(line), ExportTraceServiceRequest()).resource_spans[0].scope_spans[0].spans

    assert [span.name for span in read] == [span.name for span in given_spans]
    assert [span.span_id for span in read] == [span.span_id.to_bytes(8, "big") for span in given_spans]
    assert [[link.trace_id for link in span.links] for span in read] == [
        [link.trace_id.to_bytes(16, "big") for link in span.links] for span in given_spans
    ]


def test_a_line_contains_no_newline() -> None:
    encoder = JsonEncoder(RESOURCE)

    assert b"\n" not in encoder.line([b"{}"])
