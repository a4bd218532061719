"""What the autoscaling policy decided, as spans and metrics. Runs in Serve's controller, in a thread of the policy."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass

from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.trace import SpanContext, TraceFlags

from deployments.config import AppConfig, TelemetryConfig
from deployments.telemetry import names
from deployments.telemetry.export.provider import Provider, ReplicaIdentity
from deployments.telemetry.gauges.instruments import show_process
from deployments.telemetry.measures import Measures
from deployments.telemetry.names import MetricSpec
from deployments.telemetry.spans import Span


@dataclass(frozen=True, slots=True)
class ScalingRecord:
    """One decision on one deployment. Times are Unix nanoseconds."""

    application: str
    deployment: str
    seen_unix_ns: int
    """When the newest report that it was made on was taken."""
    decided_unix_ns: int
    reason: str
    from_replicas: int
    to_replicas: int
    needed_replicas: int
    """Without bounds."""
    max_replicas: int
    running_replicas: int
    reports: int
    demand: float
    queue_depth: float
    queue_wait_ms: float
    target_queue_wait_ms: float
    oldest_age_ms: float
    throughput: float
    start_ms: float


class DecisionTelemetry:
    """Of all policies of this process that write to the same place."""

    def __init__(self, directory: str | None, node_id: str) -> None:
        config = AppConfig(telemetry=TelemetryConfig(directory=directory))
        self._provider = Provider("autoscaler", config, ReplicaIdentity(f"autoscaler-{node_id[:8]}", node_id))
        self._measures = Measures(self._provider.meter(), "autoscaler", "")
        self._ids = RandomIdGenerator()
        self._latest: dict[tuple[str, str], ScalingRecord] = {}
        self._lock = threading.Lock()
        show_process(self._measures)
        self._show(names.SCALING_TARGET, lambda record: record.to_replicas)
        self._show(names.SCALING_RUNNING, lambda record: record.running_replicas)
        self._show(names.SCALING_MAX, lambda record: record.max_replicas)
        self._show(names.SCALING_DEMAND, lambda record: record.demand)
        self._show(names.SCALING_QUEUE_WAIT, lambda record: record.queue_wait_ms)
        self._show(names.SCALING_TARGET_WAIT, lambda record: record.target_queue_wait_ms)

    def take(self, record: ScalingRecord, is_news: bool) -> None:
        """Show it, and if it is a change of mind keep it. From any thread."""
        with self._lock:
            self._latest[record.application, record.deployment] = record
            if is_news:
                self._provider.sink.take(_span(record, self._ids))
                self._measures.raw_count(
                    names.SCALING_DECISIONS, {**_attributes_of(record), "ai.autoscaling.reason": record.reason}
                )
            self._provider.sink.tick()

    def forget(self, application: str, deployment: str) -> None:
        """Its policy is no more."""
        with self._lock:
            self._latest.pop((application, deployment), None)

    def close(self) -> None:
        self._provider.close()

    def _show(self, spec: MetricSpec, read: Callable[[ScalingRecord], float]) -> None:
        self._measures.gauge(
            spec, lambda: [(read(record), _attributes_of(record)) for record in list(self._latest.values())]
        )


_one_at_a_time = threading.Lock()
_decision_telemetry = functools.cache(DecisionTelemetry)


def decision_telemetry(directory: str | None, node_id: str) -> DecisionTelemetry:
    """One for all policies of the process: Serve makes a policy for each deployment, and anew at each change."""
    with _one_at_a_time:
        return _decision_telemetry(directory, node_id)


def _attributes_of(record: ScalingRecord) -> dict[str, str]:
    return {"ai.autoscaling.application": record.application, "ai.autoscaling.deployment": record.deployment}


def _span(record: ScalingRecord, ids: RandomIdGenerator) -> Span:
    own = SpanContext(ids.generate_trace_id(), ids.generate_span_id(), False, TraceFlags(TraceFlags.SAMPLED))
    return Span(
        name=names.SCALING_DECISION,
        trace=own,
        span_id=own.span_id,
        parent_id=0,
        parent_is_remote=False,
        # The two clocks may belong to two machines.
        started_unix_ns=min(record.seen_unix_ns, record.decided_unix_ns),
        ended_unix_ns=record.decided_unix_ns,
        attributes={
            "ai.autoscaling.application": record.application,
            "ai.autoscaling.deployment": record.deployment,
            "ai.autoscaling.reason": record.reason,
            "ai.autoscaling.from_replicas": record.from_replicas,
            "ai.autoscaling.to_replicas": record.to_replicas,
            "ai.autoscaling.needed_replicas": record.needed_replicas,
            "ai.autoscaling.max_replicas": record.max_replicas,
            "ai.autoscaling.running_replicas": record.running_replicas,
            "ai.autoscaling.reports": record.reports,
            "ai.autoscaling.demand": record.demand,
            "ai.autoscaling.queue_depth": int(record.queue_depth),
            "ai.autoscaling.queue_wait_ms": record.queue_wait_ms,
            "ai.autoscaling.target_queue_wait_ms": record.target_queue_wait_ms,
            "ai.autoscaling.oldest_age_ms": record.oldest_age_ms,
            "ai.autoscaling.throughput": record.throughput,
            "ai.autoscaling.start_ms": record.start_ms,
        },
        fault=None,
        links=(),
        events=(),
    )
