"""The metrics under their Prometheus names, as the Collector exports them.

The names follow OpenTelemetry's "Prometheus and OpenMetrics Compatibility", with units and ``_total`` added
(https://opentelemetry.io/docs/specs/otel/compatibility/prometheus_and_openmetrics/#metric-metadata-1): dots become
underscores; a unit is spelled out and appended unless the name already has it as a word; a unit in braces is omitted.
"""

from __future__ import annotations

import re

from deployments.telemetry.metrics import DROPPED_RECORDS, UNWRITTEN_SPANS, MetricSpec

_UNITS = {
    "ms": "milliseconds",
    "s": "seconds",
    "By": "bytes",
    "GB": "gigabytes",
    "W": "watts",
    "Cel": "celsius",
    "%": "percent",
}


def series(spec: MetricSpec) -> str:
    """Return the name in Prometheus; for a histogram, without ``_bucket``, ``_sum`` and ``_count``."""
    return prometheus_name(spec.name, spec.kind, spec.unit)


def prometheus_name(name: str, kind: str, unit: str) -> str:
    """``kind`` is histogram, counter or gauge."""
    plain = re.sub(r"[^a-zA-Z0-9:]+", "_", name)
    if unit == "1" and kind == "gauge":
        word = "ratio"
    else:
        word = _UNITS.get(unit, "")
        assert word or unit == "1" or unit.startswith("{"), f"the unit {unit} has no word"
    words = plain.split("_")
    if word and word not in words:
        plain = f"{plain}_{word}"
    return f"{plain}_total" if kind == "counter" and "total" not in words else plain


def label(attribute: str) -> str:
    """Return an attribute name as a Prometheus label."""
    return re.sub(r"[^a-zA-Z0-9_]", "_", attribute)


def of_the_collector(name: str) -> str:
    """Select one of the Collector's own counters; whether it has a suffix depends on its version."""
    return f'{{__name__=~"otelcol_{name}(_total)?"}}'


LOST_SPANS = 'otel_sdk_exporter_span_exported_total{error_type!=""}'
"""OpenTelemetry SDK metric: spans that an exporter could not deliver."""
REFUSED_SPANS = 'otel_sdk_processor_span_processed_total{error_type!=""}'
"""OpenTelemetry SDK metric: spans rejected because the queue was full."""
LOST_BY_PROCESSES = (series(DROPPED_RECORDS), series(UNWRITTEN_SPANS), LOST_SPANS, REFUSED_SPANS)
"""What counts the spans and records that our processes lost."""
LOST_BY_THE_COLLECTOR = tuple(
    map(
        of_the_collector,
        (
            "exporter_send_failed_spans",
            "exporter_enqueue_failed_spans",
            "receiver_refused_spans",
            "processor_tail_sampling_sampling_trace_dropped_too_early",
        ),
    )
)
"""What counts those that the Collector lost. One selector each: a rate drops the name."""
