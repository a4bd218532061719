"""How much telemetry the processes lost, according to their own counters: a missing trace cannot show it.

Counters are summed over the window, per series. Cumulative ones (which we export) count by their growth since the
window began.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from deployments.telemetry import metrics, names

_ALWAYS = {metrics.DROPPED_RECORDS.name, metrics.UNWRITTEN_SPANS.name}
_OF_FAILURES = {"otel.sdk.exporter.span.exported", "otel.sdk.processor.span.processed"}
"""OpenTelemetry's own metrics: what they count with ``error.type`` is lost."""
_DELTA = (1, "AGGREGATION_TEMPORALITY_DELTA")
_Series = tuple[str, str, str]


class Losses:
    """Sums the losses reported in metrics."""

    def __init__(self, since_ns: int) -> None:
        self._since_ns = since_ns
        self._before: dict[_Series, float] = defaultdict(float)
        self._most: dict[_Series, float] = defaultdict(float)

    def add(self, data: Any) -> None:
        """Add a ``MetricsData`` object. Raises ValueError, KeyError, TypeError or AttributeError if it is not one."""
        for part in data["resourceMetrics"]:
            process = repr(part.get("resource", {}))
            for scope in part.get("scopeMetrics", []):
                for metric in scope.get("metrics", []):
                    if metric["name"] in _ALWAYS | _OF_FAILURES:
                        self._add(process, metric["name"], metric.get("sum", {}))

    def _add(self, process: str, name: str, counted: dict[str, Any]) -> None:
        is_delta = counted.get("aggregationTemporality") in _DELTA
        for attributes, at_ns, value in _points(counted):
            if name in _OF_FAILURES and names.ERROR_TYPE not in attributes:
                continue
            series = (process, name, repr(attributes))
            if is_delta:
                self._most[series] += value if at_ns >= self._since_ns else 0.0
            elif at_ns < self._since_ns:
                self._before[series] = max(value, self._before[series])
            else:
                self._most[series] = max(value, self._most[series])

    def total(self) -> int:
        """Return the number of lost spans and records of all processes."""
        return round(sum(max(0.0, most - self._before[series]) for series, most in list(self._most.items())))


def _points(counted: dict[str, Any]) -> Iterator[tuple[list[str], int, float]]:
    """Yield the attribute names and values, the time and the value of each point."""
    for point in counted.get("dataPoints", []):
        attributes = [text for pair in point.get("attributes", []) for text in (pair["key"], repr(pair["value"]))]
        yield attributes, int(point.get("timeUnixNano", 0)), float(point.get("asInt", point.get("asDouble", 0)))
