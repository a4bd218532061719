"""The autoscaling policy's decisions as spans and metrics. Runs in Serve's controller, in a thread of the policy."""

from __future__ import annotations

import functools
import threading
from collections.abc import Mapping
from dataclasses import dataclass

from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.trace import SpanContext, TraceFlags

from deployments.config import AppConfig, TelemetryConfig
from deployments.telemetry import metrics, names
from deployments.telemetry.export.provider import Provider, ReplicaIdentity
from deployments.telemetry.export.span import Span
from deployments.telemetry.gauges.instruments import show_process
from deployments.telemetry.measures import Measures
from deployments.telemetry.metrics import MetricSpec

Stated = Mapping[str, str | float]
"""The inputs and the outcome of a decision: the attributes of its span, without their prefix."""
_PREFIX = "ai.autoscaling."


@dataclass(frozen=True, slots=True)
class ScalingRecord:
    """One decision on one deployment. Times are Unix nanoseconds.

    Attributes:
        stated: the attributes that ``span_specs`` lists for the span; only some are read here.
    """

    application: str
    deployment: str
    seen_unix_ns: int
    """When the newest report behind the decision was taken."""
    decided_unix_ns: int
    stated: Stated


class DecisionTelemetry:
    """Telemetry of all policies of this process that write to the same directory."""

    def __init__(self, directory: str | None, node_id: str) -> None:
        config = AppConfig(telemetry=TelemetryConfig(directory=directory))
        self._provider = Provider("autoscaler", config, ReplicaIdentity(f"autoscaler-{node_id[:8]}", node_id))
        self._measures = Measures(self._provider.meter(), "autoscaler", "")
        self._ids = RandomIdGenerator()
        self._latest: dict[tuple[str, str], ScalingRecord] = {}
        self._lock = threading.Lock()
        show_process(self._measures)
        self._show(metrics.SCALING_TARGET, "to_replicas")
        self._show(metrics.SCALING_RUNNING, "running_replicas")
        self._show(metrics.SCALING_MAX, "max_replicas")
        self._show(metrics.SCALING_DEMAND, "demand")
        self._show(metrics.SCALING_QUEUE_WAIT, "queue_wait_ms")
        self._show(metrics.SCALING_TARGET_WAIT, "target_queue_wait_ms")

    def take(self, record: ScalingRecord, is_news: bool) -> None:
        """Update the gauges; if ``is_news``, also export a span and count the decision. Thread-safe."""
        with self._lock:
            self._latest[record.application, record.deployment] = record
            if is_news:
                self._provider.sink.take(_span(record, self._ids))
                reason = {names.AI_AUTOSCALING_REASON: str(record.stated["reason"])}
                self._measures.count(metrics.SCALING_DECISIONS, 1, {**_deployment_of(record), **reason})
                self._measures.flush()
            self._provider.sink.tick()

    def forget(self, application: str, deployment: str) -> None:
        """Remove the deployment from the gauges; its policy is gone."""
        with self._lock:
            self._latest.pop((application, deployment), None)

    def close(self) -> None:
        self._provider.close()

    def _show(self, spec: MetricSpec, name: str) -> None:
        """Register a gauge of the value ``name`` of the latest decisions."""
        self._measures.gauge(
            spec,
            lambda: [(float(record.stated[name]), _deployment_of(record)) for record in list(self._latest.values())],
        )


_one_at_a_time = threading.Lock()
_decision_telemetry = functools.cache(DecisionTelemetry)


def decision_telemetry(directory: str | None, node_id: str) -> DecisionTelemetry:
    """Return the instance shared by all policies; Serve makes a policy per deployment, and a new one per change."""
    with _one_at_a_time:
        return _decision_telemetry(directory, node_id)


def _deployment_of(record: ScalingRecord) -> dict[str, str]:
    return {
        names.AI_AUTOSCALING_APPLICATION: record.application,
        names.AI_AUTOSCALING_DEPLOYMENT: record.deployment,
    }


def _span(record: ScalingRecord, ids: RandomIdGenerator) -> Span:
    own = SpanContext(ids.generate_trace_id(), ids.generate_span_id(), False, TraceFlags(TraceFlags.SAMPLED))
    return Span(
        name=names.SCALING_DECISION,
        trace=own,
        span_id=own.span_id,
        # The two clocks may be on different machines.
        started_unix_ns=min(record.seen_unix_ns, record.decided_unix_ns),
        ended_unix_ns=record.decided_unix_ns,
        attributes={**_deployment_of(record), **{f"{_PREFIX}{name}": value for name, value in record.stated.items()}},
    )
