"""Turns records into measurements, and registers gauges. Instruments are created from ``metrics`` alone."""

from __future__ import annotations

import functools
import itertools
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from opentelemetry.context import Context
from opentelemetry.metrics import CallbackOptions, Meter, Observation
from opentelemetry.trace import NonRecordingSpan, SpanContext, set_span_in_context

from deployments.errors import OUTCOMES
from deployments.telemetry import metrics, names
from deployments.telemetry.carrier import from_carrier
from deployments.telemetry.generation.facts import GenerationFacts
from deployments.telemetry.generation.records import GenerateRecord, SegmentRecord
from deployments.telemetry.metrics import MetricSpec
from deployments.telemetry.names import Service
from deployments.telemetry.records import (
    BatchRecord,
    ModelLoadRecord,
    PostprocessRecord,
    PredictRecord,
    RequestRecord,
    TokenizeRecord,
)
from deployments.telemetry.sampling.consistent import randomness
from deployments.telemetry.sampling.threshold import BITS

SLOW_NS, ORDINARY = 500_000_000, (9 << BITS) // 10
"""What the shipped Collector keeps: requests that took so long or failed, and traces of at least this randomness."""
_NONE: Mapping[str, str | int] = {}
Reading = Callable[[], Iterable[tuple[float, dict[str, Any]]]]
"""Returns the values of a gauge, each with its attributes."""


class Measures:
    """The instruments of one process.

    Args:
        model: the model that measurements are of, unless they say another.
        models: all that it serves; by default that one.
        is_sampled_later: a Collector decides which traces are kept (``telemetry.sampling.mode: tail``).
    """

    def __init__(
        self,
        meter: Meter,
        service: Service,
        model: str,
        models: Sequence[str] = (),
        *,
        is_sampled_later: bool = False,
    ) -> None:
        self._meter, self.model, self._is_sampled_later = meter, model, is_sampled_later
        self._instruments: dict[str, Any] = {
            spec.name: self._create(spec)
            for spec in metrics.METRICS
            if spec.kind != "gauge" and spec.service in (service, "every")
        }
        self._begin_at_zero(models or (model,))
        self._counts: Counter[tuple[MetricSpec, tuple[tuple[str, str | int], ...]]] = Counter()
        self._lock = threading.Lock()

    def _begin_at_zero(self, models: Sequence[str]) -> None:
        """What must not be missed is there from the start: a counter that begins with a count has no increase."""
        for spec in (metrics.DROPPED_RECORDS, metrics.UNWRITTEN_SPANS):
            self._instruments[spec.name].add(0, self._complete(spec, {}))
        if metrics.REQUESTS.name in self._instruments:
            for one, outcome in itertools.product(models, OUTCOMES):
                self._instruments[metrics.REQUESTS.name].add(0, {"model": one, "outcome": outcome})

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

    def exemplar(self, context: SpanContext, *, is_special: bool = False) -> Context:
        """Return the context whose measurements have this span as their exemplar, if its trace will be there.

        ``is_special``: it is a request that was slow or failed.
        """
        if self._is_sampled_later and not is_special:
            state = context.trace_state
            # The Collector hashes the traces of callers whose tracestate says nothing of this.
            if "ot" not in state or randomness(context.trace_id, state) < ORDINARY:
                return Context()
        return set_span_in_context(NonRecordingSpan(context), Context())

    def measure(self, record: object) -> None:
        _measure(record, self)

    def record(
        self, spec: MetricSpec, value: float, exemplar: Context, attributes: Mapping[str, str | int] = _NONE
    ) -> None:
        """Record one histogram value. The model's name is added if the metric has a ``model`` attribute."""
        self._instruments[spec.name].record(value, self._complete(spec, attributes), context=exemplar)

    def count(self, spec: MetricSpec, amount: int = 1, attributes: Mapping[str, str | int] = _NONE) -> None:
        """Add to a counter, from any thread.

        Summed here and passed to the SDK by ``flush``: each SDK measurement costs as much as a span.
        """
        with self._lock:
            self._counts[spec, tuple(attributes.items())] += amount

    def flush(self) -> None:
        with self._lock:
            counts, self._counts = self._counts, Counter()
        for (spec, attributes), amount in counts.items():
            self._instruments[spec.name].add(amount, self._complete(spec, dict(attributes)))

    def _complete(self, spec: MetricSpec, attributes: Mapping[str, str | int]) -> Mapping[str, str | int]:
        return {"model": self.model, **attributes} if "model" in spec.attributes else attributes


@functools.singledispatch
def _measure(record: object, _: Measures) -> None:
    raise TypeError(f"no measurements are defined for {type(record).__name__}")


@_measure.register
def _(record: RequestRecord, measures: Measures) -> None:
    latency_ns = record.ended_ns - record.started_ns
    failed = record.fault is not None and not record.fault.is_callers
    exemplar = measures.exemplar(record.context, is_special=failed or latency_ns >= SLOW_NS)
    of_model = {"model": record.model}
    measures.record(metrics.LATENCY, latency_ns / 1e6, exemplar, {**of_model, "outcome": record.outcome})
    spec, attributes = _of_protocol(record)
    if record.fault is not None:
        attributes[names.ERROR_TYPE] = record.fault.error_type
    measures.record(spec, latency_ns / 1e9, exemplar, attributes)
    for stage, hop in record.hops.items():
        if hop.has_reply:
            measures.record(metrics.TRANSIT, hop.transit_ns / 1e6, exemplar, {**of_model, "stage": stage})
    of_tenant = of_model | ({names.AI_TENANT: record.tenant} if record.tenant else {})
    measures.count(metrics.REQUESTS, 1, {**of_tenant, "outcome": record.outcome})
    if record.fault is None:
        measures.count(metrics.TOKENS, record.tokens, of_tenant)
    if record.generation is not None:
        _measure_generation(record, record.generation, measures, exemplar)


def _of_protocol(record: RequestRecord) -> tuple[MetricSpec, dict[str, str | int]]:
    """The duration of a request under its name in the semantic conventions, and the attributes of that."""
    if record.rpc_method:
        return metrics.RPC_DURATION, {
            names.RPC_SYSTEM_NAME: "grpc",
            names.RPC_METHOD: record.rpc_method,
            names.RPC_RESPONSE_STATUS_CODE: record.rpc_status,
        }
    return metrics.HTTP_DURATION, {
        names.HTTP_REQUEST_METHOD: record.method,
        names.HTTP_ROUTE: record.route,
        names.HTTP_RESPONSE_STATUS_CODE: record.status,
        names.URL_SCHEME: record.scheme,
    }


def _measure_generation(record: RequestRecord, facts: GenerationFacts, measures: Measures, exemplar: Context) -> None:
    attributes: dict[str, str | int] = {
        names.GEN_AI_OPERATION_NAME: record.operation,
        names.GEN_AI_REQUEST_MODEL: record.requested_model,
    }
    if record.fault is not None:
        attributes[names.ERROR_TYPE] = record.fault.error_type
    last_ns = facts.last_token_ns or record.ended_ns
    measures.record(metrics.GEN_AI_DURATION, (last_ns - record.started_ns) / 1e9, exemplar, attributes)
    if facts.first_token_ns:
        first_s = (facts.first_token_ns - record.started_ns) / 1e9
        measures.record(metrics.TIME_TO_FIRST_TOKEN, first_s, exemplar, attributes)
        further = facts.output_tokens // facts.choices - 1
        if further > 0:
            each_s = (last_ns - facts.first_token_ns) / 1e9 / further
            measures.record(metrics.TIME_PER_OUTPUT_TOKEN, each_s, exemplar, attributes)
    measures.count(metrics.OUTPUT_TOKENS, facts.output_tokens, {"model": record.model})


@_measure.register
def _(record: TokenizeRecord, measures: Measures) -> None:
    measures.record(metrics.PREPROCESSING, record.held_ns / 1e6, measures.exemplar(from_carrier(record.carrier)))


@_measure.register
def _(record: PredictRecord, measures: Measures) -> None:
    exemplar = measures.exemplar(from_carrier(record.carrier))
    for membership in record.memberships:
        measures.record(metrics.QUEUE_WAIT, membership.wait_ns / 1e6, exemplar)
    if record.unfinished is not None:
        waited_ns = record.unfinished.ended_ns - record.unfinished.started_ns
        measures.record(metrics.QUEUE_WAIT, waited_ns / 1e6, exemplar)


@_measure.register
def _(record: BatchRecord, measures: Measures) -> None:
    exemplar = measures.exemplar(record.context)
    measures.record(metrics.MODEL_LATENCY, (record.ended_ns - record.started_ns) / 1e6, exemplar)
    measures.record(metrics.BATCH_SIZE, record.size, exemplar)
    if record.padded_tokens:
        measures.record(metrics.PADDING, record.padding_ratio, exemplar)
    measures.count(metrics.DISPATCHES, 1, {"reason": record.reason})


@_measure.register
def _(record: GenerateRecord, measures: Measures) -> None:
    if record.first_step_ns or (record.failure is not None and record.failure.kind == "DeadlinePassed"):
        # Those that were refused have not waited.
        measures.record(metrics.QUEUE_WAIT, record.queue_ns / 1e6, measures.exemplar(from_carrier(record.carrier)))
    if record.losses:
        measures.count(metrics.PREEMPTIONS, len(record.losses))


@_measure.register
def _(record: SegmentRecord, measures: Measures) -> None:
    exemplar = measures.exemplar(record.context)
    for took_ns, gap_ns in zip(record.step_ns, record.gaps, strict=True):
        measures.record(metrics.STEP_LATENCY, took_ns / 1e6, exemplar)
        if record.decoding:
            measures.record(metrics.INTER_TOKEN, gap_ns / 1e6, exemplar)


@_measure.register
def _(record: PostprocessRecord, measures: Measures) -> None:
    measures.record(metrics.POSTPROCESSING, record.held_ns / 1e6, measures.exemplar(from_carrier(record.carrier)))


@_measure.register
def _(record: ModelLoadRecord, measures: Measures) -> None:
    if record.fault is None:
        measures.count(metrics.LOADS, 1, {"load_type": "cold"})
