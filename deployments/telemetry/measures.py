"""Records to measurements, and the gauges. Instruments are made from ``names`` alone."""

from __future__ import annotations

import functools
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from opentelemetry.context import Context
from opentelemetry.metrics import CallbackOptions, Meter, Observation
from opentelemetry.trace import NonRecordingSpan, SpanContext, set_span_in_context

from deployments.telemetry import names
from deployments.telemetry.carrier import from_carrier
from deployments.telemetry.names import MetricSpec, Service
from deployments.telemetry.records import (
    BatchRecord,
    LoadRecord,
    PostprocessRecord,
    PredictRecord,
    RequestRecord,
    StageRecord,
    TokenizeRecord,
)

Reading = Callable[[], Iterable[tuple[float, dict[str, Any]]]]
"""What a gauge shows: values with their attributes."""


class Measures:
    """The instruments of one process."""

    def __init__(self, meter: Meter, service: Service, model: str) -> None:
        self._meter, self.model = meter, model
        self._instruments: dict[str, Any] = {
            spec.name: self._create(spec)
            for spec in names.METRICS
            if spec.kind != "gauge" and spec.service in (service, "every")
        }
        self._counts: Counter[tuple[str, str, str]] = Counter()
        self._lock = threading.Lock()

    def _create(self, spec: MetricSpec) -> Any:
        if spec.kind == "counter":
            return self._meter.create_counter(spec.name, spec.unit, spec.description)
        return self._meter.create_histogram(
            spec.name, spec.unit, spec.description, explicit_bucket_boundaries_advisory=spec.buckets
        )

    def gauge(self, spec: MetricSpec, reading: Reading) -> None:
        def observe(_: CallbackOptions) -> Iterable[Observation]:
            return [Observation(value, attributes) for value, attributes in reading()]

        self._meter.create_observable_gauge(spec.name, [observe], spec.unit, spec.description)

    def measure(self, record: object) -> None:
        _measure(record, self)

    def record(self, spec: MetricSpec, value: float, exemplar: Context, **attributes: str | int) -> None:
        self.raw(spec, value, exemplar, {"model": self.model, **attributes})

    def raw(self, spec: MetricSpec, value: float, exemplar: Context, attributes: dict[str, Any]) -> None:
        self._instruments[spec.name].record(value, attributes, context=exemplar)

    def count(self, spec: MetricSpec, amount: int, attribute: str = "", value: str = "") -> None:
        """Counted together, and given to the SDK by ``flush``: each of its measurements costs as much as a span."""
        with self._lock:
            self._counts[spec.name, attribute, value] += amount

    def flush(self) -> None:
        with self._lock:
            counts, self._counts = self._counts, Counter()
        for (name, attribute, value), amount in counts.items():
            attributes = {"model": self.model, attribute: value} if attribute else {"model": self.model}
            self._instruments[name].add(amount, attributes)

    def raw_count(self, spec: MetricSpec, attributes: dict[str, Any]) -> None:
        """For what happens seldom."""
        self._instruments[spec.name].add(1, attributes)

    def count_lost(self, spec: MetricSpec, amount: int) -> None:
        """Telemetry that this process lost, of whatever model."""
        self._instruments[spec.name].add(amount, {})


@functools.singledispatch
def _measure(record: object, _: Measures) -> None:
    raise TypeError(f"no measurements are defined for {type(record).__name__}")


@_measure.register
def _(record: RequestRecord, measures: Measures) -> None:
    exemplar = _exemplar(record.context)
    latency_ns = record.ended_ns - record.started_ns
    measures.record(names.LATENCY, latency_ns / 1e6, exemplar, outcome=record.outcome)
    http = {
        "http.request.method": record.method,
        "http.route": record.route,
        "http.response.status_code": record.status,
        "url.scheme": record.scheme,
    }
    if record.fault is not None:
        http["error.type"] = record.fault.error_type
    measures.raw(names.HTTP_DURATION, latency_ns / 1e9, exemplar, http)
    for stage, hop in record.hops.items():
        if not hop.answered:
            continue
        measures.record(names.TRANSIT, hop.transit_ns / 1e6, exemplar, stage=stage)
    measures.count(names.REQUESTS, 1, "outcome", record.outcome)
    if record.fault is None:
        measures.count(names.TOKENS, record.tokens)


def _exemplar(context: SpanContext) -> Context:
    """Measurements made in this context have the span as their exemplar."""
    return set_span_in_context(NonRecordingSpan(context), Context())


def _of_caller(record: StageRecord) -> Context:
    return _exemplar(from_carrier(record.carrier))


@_measure.register
def _(record: TokenizeRecord, measures: Measures) -> None:
    measures.record(names.PREPROCESSING, record.held_ns / 1e6, _of_caller(record))


@_measure.register
def _(record: PredictRecord, measures: Measures) -> None:
    exemplar = _of_caller(record)
    for membership in record.memberships:
        waited_ns = membership.busy_wait_ns + membership.fill_wait_ns
        measures.record(names.QUEUE_WAIT, waited_ns / 1e6, exemplar)
    if record.unfinished is not None:
        waited_ns = record.unfinished.ended_ns - record.unfinished.started_ns
        measures.record(names.QUEUE_WAIT, waited_ns / 1e6, exemplar)


@_measure.register
def _(record: BatchRecord, measures: Measures) -> None:
    exemplar = _exemplar(record.context)
    measures.record(names.MODEL_LATENCY, (record.ended_ns - record.started_ns) / 1e6, exemplar)
    measures.record(names.BATCH_SIZE, record.size, exemplar)
    if record.padded_tokens:
        measures.record(names.PADDING, record.padding_ratio, exemplar)
    measures.count(names.DISPATCHES, 1, "reason", record.reason)


@_measure.register
def _(record: PostprocessRecord, measures: Measures) -> None:
    measures.record(names.POSTPROCESSING, record.held_ns / 1e6, _of_caller(record))


@_measure.register
def _(record: LoadRecord, measures: Measures) -> None:
    if record.fault is None:
        measures.count(names.LOADS, 1, "load_type", "cold")
