"""The alerts, built from the metric names. Each gives the ``slowlens why`` command to run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from deployments.telemetry import metrics
from deployments.telemetry.export.prometheus_names import (
    LOST_BY_PROCESSES,
    LOST_BY_THE_COLLECTOR,
    label,
    of_the_collector,
    series,
)

OBJECTIVE = 0.999
"""Target share of requests that succeed, not counting invalid and cancelled ones."""
_DEPLOYMENT = f"{label('ai.autoscaling.application')}, {label('ai.autoscaling.deployment')}"
_LOSSES = (*LOST_BY_PROCESSES, *LOST_BY_THE_COLLECTOR, of_the_collector("receiver_refused_metric_points"))
_WHY = "slowlens why --source $TRACES_URL --metrics $PROMETHEUS_URL --since"


@dataclass(frozen=True, slots=True)
class Alert:
    name: str
    expr: str
    lasts: str
    """How long ``expr`` must hold before the alert fires."""
    severity: str
    summary: str
    what_to_do: str
    since: str
    """The period to pass to ``slowlens why --since``."""

    def rule(self) -> dict[str, Any]:
        """Return the alert as a Prometheus rule."""
        return {
            "alert": self.name,
            "expr": self.expr,
            "for": self.lasts,
            "labels": {"severity": self.severity},
            "annotations": {
                "summary": self.summary,
                "runbook": f"Run `{_WHY} {self.since}`. {self.what_to_do}",
            },
        }


def _by_deployment(spec: metrics.MetricSpec) -> str:
    return f"max by ({_DEPLOYMENT}) ({series(spec)})"


def _lost_lately(lost: str) -> str:
    """PromQL for what a counter counted within 15 minutes, its first value included where it begins with one."""
    return f"(sum (increase({lost}[15m])) or vector(0)) + (sum ({lost} unless {lost} offset 15m) or vector(0))"


def _burn(window: str) -> str:
    """PromQL for the burn rate: how many times faster than allowed the error budget is used."""
    ours = f'{series(metrics.REQUESTS)}{{outcome=~"error|overloaded|deadline"}}'
    every = f'{series(metrics.REQUESTS)}{{outcome!~"invalid|cancelled"}}'
    return f"(sum (rate({ours}[{window}])) / sum (rate({every}[{window}])) / {1 - OBJECTIVE:.4g})"


_IS_LATE = f"{_by_deployment(metrics.SCALING_QUEUE_WAIT)} > {_by_deployment(metrics.SCALING_TARGET_WAIT)}"
ALERTS = (
    Alert(
        "SlowlensWaitAboveTarget",
        _IS_LATE,
        "5m",
        "warning",
        "The backlog of {{ $labels.ai_autoscaling_deployment }} takes {{ $value | humanize }} ms, more than its target",
        "device_queue and replica_queue name the stage; `scaled late` says when the policy reacted and when a replica "
        "was warm. If ordered replicas did not start, check the cluster's capacity.",
        "15m",
    ),
    Alert(
        "SlowlensAtMaxReplicas",
        f"{_by_deployment(metrics.SCALING_TARGET)} >= {_by_deployment(metrics.SCALING_MAX)} "
        f"and on ({_DEPLOYMENT}) ({_IS_LATE})",
        "5m",
        "critical",
        "{{ $labels.ai_autoscaling_deployment }} is at its maximum of {{ $value }} replicas, and requests wait",
        "Raise autoscaling_config.max_replicas of the deployment, or make runs cheaper; the finding has the numbers.",
        "15m",
    ),
    Alert(
        "SlowlensColdStarts",
        f"count ({series(metrics.LOADS)} unless {series(metrics.LOADS)} offset 10m) > 5",
        "0m",
        "warning",
        "{{ $value }} model replicas were loaded within ten minutes",
        "cold_start says how many requests waited for them. If replicas start and stop often, raise quiet_s or "
        "min_replicas; if they die, check their logs.",
        "10m",
    ),
    Alert(
        "SlowlensGpuMemoryNearlyFull",
        f"max by (instance, hw_id) ({series(metrics.HW_MEMORY_USAGE)} / {series(metrics.HW_MEMORY_LIMIT)}) > 0.95",
        "10m",
        "warning",
        "The GPU {{ $labels.hw_id }} of {{ $labels.instance }} uses {{ $value | humanizePercentage }} of its memory",
        "Lower batching.max_batch_tokens before runs fail (ai.model.out_of_memory counts those that did not fit).",
        "15m",
    ),
    Alert(
        "SlowlensKvCacheFull",
        f"max by (instance) ({series(metrics.KV_USED)}) > 0.9 and on (instance) "
        f"max by (instance) ({series(metrics.QUEUE_DEPTH)}) > 0",
        "5m",
        "warning",
        "The KV cache of {{ $labels.instance }} is {{ $value | humanizePercentage }} full, and sequences wait",
        "kv_cache_full says how long requests waited for it. Raise generation.kv_cache_tokens, lower max_tokens, or "
        "add model replicas.",
        "15m",
    ),
    Alert(
        "SlowlensErrorBudgetBurnsFast",
        f"{_burn('1h')} > 14.4 and {_burn('5m')} > 14.4",
        "2m",
        "critical",
        f"Errors use the month's {1 - OBJECTIVE:.1%} {{{{ $value | humanize }}}} times too fast: gone in two days",
        "errors_retries lists the kinds of failure and a fix for the most frequent one.",
        "1h",
    ),
    Alert(
        "SlowlensErrorBudgetBurns",
        f"{_burn('6h')} > 6 and {_burn('30m')} > 6",
        "15m",
        "warning",
        f"Errors use the month's {1 - OBJECTIVE:.1%} {{{{ $value | humanize }}}} times too fast: gone in five days",
        "errors_retries lists the kinds of failure and a fix for the most frequent one.",
        "6h",
    ),
    Alert(
        "SlowlensSpansDropped",
        " + ".join(map(_lost_lately, _LOSSES)) + " > 0",
        # One loss is enough: it is told for as long as the window is.
        "0s",
        "warning",
        "Telemetry was lost: {{ $value | humanize }} records and spans within 15 minutes",
        "telemetry_loss says what is missing. Check the Collector: its memory, its queue, its backend.",
        "15m",
    ),
)


def rules() -> dict[str, Any]:
    """Return the content of a Prometheus rule file."""
    return {"groups": [{"name": "slowlens", "interval": "30s", "rules": [alert.rule() for alert in ALERTS]}]}
