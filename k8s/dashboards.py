"""The Grafana dashboards, built from the metric names, so that they cannot drift from what the replicas export."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from deployments.telemetry import metrics
from deployments.telemetry.export.prometheus_names import LOST_SPANS, REFUSED_SPANS, label, series
from deployments.telemetry.metrics import MetricSpec

RATE = "$__rate_interval"
MODEL = 'model=~"$model"'
_DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
_WIDTH, _HEIGHT = 12, 8
_DEPLOYMENT = label("ai.autoscaling.deployment")


@dataclass(frozen=True, slots=True)
class Query:
    expr: str
    legend: str
    exemplars: bool = False
    on_the_right: bool = False
    """Whether to draw the query against a second axis, with the panel's ``right_unit``."""


@dataclass(frozen=True, slots=True)
class Panel:
    title: str
    what: str
    """The description, shown when the pointer hovers over the panel's corner."""
    unit: str
    queries: Sequence[Query]
    stacked: bool = False
    right_unit: str = "short"


def quantile(share: float, spec: MetricSpec, by: str = "") -> str:
    grouped = f"le, {by}" if by else "le"
    return f"histogram_quantile({share}, sum by ({grouped}) (rate({series(spec)}_bucket[{RATE}])))"


def mean(spec: MetricSpec, by: str = "") -> str:
    group = f" by ({by})" if by else ""
    return f"sum{group} (rate({series(spec)}_sum[{RATE}])) / sum{group} (rate({series(spec)}_count[{RATE}]))"


def per_second(spec: MetricSpec, by: str) -> str:
    return f"sum by ({by}) (rate({series(spec)}[{RATE}]))"


def _quantiles(spec: MetricSpec) -> list[Query]:
    return [Query(quantile(share, spec), f"p{share * 100:g}", exemplars=share == 0.99) for share in (0.5, 0.95, 0.99)]


def _by_stage() -> Iterator[Query]:
    stages = {
        "tokenization": metrics.PREPROCESSING,
        "queue": metrics.QUEUE_WAIT,
        "run of the model": metrics.MODEL_LATENCY,
        "postprocessing": metrics.POSTPROCESSING,
    }
    for stage, spec in stages.items():
        yield Query(mean(spec), stage)
    each = f"sum (rate({series(metrics.TRANSIT)}_sum[{RATE}])) / sum (rate({series(metrics.LATENCY)}_count[{RATE}]))"
    yield Query(each, "between the actors")


LATENCY_DASHBOARD = (
    Panel(
        "Latency",
        "End-to-end latency. The dots are exemplars: each links to its trace.",
        "ms",
        _quantiles(metrics.LATENCY),
    ),
    Panel(
        "Latency by stage",
        "Average time per stage. `slowlens why` says where the slowest requests spent theirs.",
        "ms",
        tuple(_by_stage()),
        stacked=True,
    ),
    Panel(
        "Wait before the device",
        "From arrival at the model replica to the start of the batch, and the policy's target.",
        "ms",
        (
            *_quantiles(metrics.QUEUE_WAIT),
            Query(f'max ({series(metrics.SCALING_TARGET_WAIT)}{{{_DEPLOYMENT}="Model"}})', "accepted"),
        ),
    ),
    Panel(
        "Requests by outcome",
        "error: on the server; overloaded: the queue was full; deadline: it passed; invalid, cancelled: by the client.",
        "reqps",
        (Query(per_second(metrics.REQUESTS, "outcome"), "{{outcome}}"),),
        stacked=True,
    ),
    Panel(
        "Tokens and run time",
        "Tokens of successful requests, and the duration of a model run (right).",
        "short",
        (
            Query(f"sum (rate({series(metrics.TOKENS)}[{RATE}]))", "tokens a second"),
            Query(quantile(0.5, metrics.MODEL_LATENCY), "run p50", on_the_right=True),
            Query(quantile(0.99, metrics.MODEL_LATENCY), "run p99", exemplars=True, on_the_right=True),
        ),
        right_unit="ms",
    ),
    Panel(
        "Between the actors",
        "Duration of each hop minus the time in its stage.",
        "ms",
        (Query(quantile(0.99, metrics.TRANSIT, "stage"), "{{stage}} p99"),),
    ),
    Panel(
        "Responses",
        "By route or gRPC method and status code, as the semantic conventions count them.",
        "reqps",
        (
            Query(
                f"sum by (http_route, http_response_status_code) (rate({series(metrics.HTTP_DURATION)}_count[{RATE}]))",
                "{{http_route}} {{http_response_status_code}}",
            ),
            Query(
                f"sum by (rpc_method, rpc_response_status_code) (rate({series(metrics.RPC_DURATION)}_count[{RATE}]))",
                "{{rpc_method}} {{rpc_response_status_code}}",
            ),
        ),
        stacked=True,
    ),
    Panel(
        "Telemetry health",
        "Lost records and spans. A missing trace cannot be explained.",
        "cps",
        (
            Query(f"sum (rate({series(metrics.DROPPED_RECORDS)}[{RATE}])) or vector(0)", "records dropped"),
            Query(f"sum (rate({series(metrics.UNWRITTEN_SPANS)}[{RATE}])) or vector(0)", "spans not written"),
            Query(f"sum (rate({LOST_SPANS}[{RATE}])) or vector(0)", "spans not delivered"),
            Query(f"sum (rate({REFUSED_SPANS}[{RATE}])) or vector(0)", "spans that found the queue full"),
        ),
    ),
)

CAPACITY_DASHBOARD = (
    Panel(
        "Queue and replicas",
        "Inputs waiting in all model replicas; warm, target and maximum replicas (right).",
        "short",
        (
            Query(f"sum ({series(metrics.QUEUE_DEPTH)})", "inputs waiting"),
            Query(f"sum ({series(metrics.REPLICAS_WARM)})", "warm", on_the_right=True),
            Query(f'max ({series(metrics.SCALING_TARGET)}{{{_DEPLOYMENT}="Model"}})', "ordered", on_the_right=True),
            Query(f'max ({series(metrics.SCALING_MAX)}{{{_DEPLOYMENT}="Model"}})', "allowed", on_the_right=True),
        ),
    ),
    Panel(
        "Oldest input and replicas",
        "Age of the oldest waiting input of any replica; warm replicas (right).",
        "ms",
        (
            Query(f"max ({series(metrics.QUEUE_AGE)})", "oldest"),
            Query(f"max ({series(metrics.SCALING_QUEUE_WAIT)})", "to run all that waits"),
            Query(f"sum ({series(metrics.REPLICAS_WARM)})", "warm", on_the_right=True),
        ),
    ),
    Panel(
        "Demand in replicas",
        "Arriving work, as the number of replicas it keeps busy, and running replicas, by deployment.",
        "short",
        (
            Query(f"max by ({_DEPLOYMENT}) ({series(metrics.SCALING_DEMAND)})", f"{{{{{_DEPLOYMENT}}}}} arriving"),
            Query(f"max by ({_DEPLOYMENT}) ({series(metrics.SCALING_RUNNING)})", f"{{{{{_DEPLOYMENT}}}}} running"),
        ),
    ),
    Panel(
        "Scaling decisions",
        "Changes to the number of replicas, by reason.",
        "short",
        (
            Query(
                f"sum by ({_DEPLOYMENT}, {label('ai.autoscaling.reason')}) "
                f"(increase({series(metrics.SCALING_DECISIONS)}[{RATE}]))",
                f"{{{{{_DEPLOYMENT}}}}} {{{{{label('ai.autoscaling.reason')}}}}}",
            ),
        ),
        stacked=True,
    ),
    Panel(
        "Inputs per run",
        "Batches grow with load; small batches with a long queue mean that a batching limit is too low.",
        "short",
        (Query(mean(metrics.BATCH_SIZE), "mean"), Query(f"ceil({quantile(0.9, metrics.BATCH_SIZE)})", "p90")),
    ),
    Panel(
        "Padding",
        "Fraction of the tokens of a run that are padding.",
        "percentunit",
        (Query(mean(metrics.PADDING), "mean"), Query(quantile(0.9, metrics.PADDING), "p90")),
    ),
    Panel(
        "Batches by dispatch reason",
        "full and token_budget: more inputs were waiting; device_idle: all that waited; timeout: after max_wait_ms.",
        "short",
        (Query(per_second(metrics.DISPATCHES, "reason"), "{{reason}}"),),
        stacked=True,
    ),
    Panel(
        "Cold starts",
        "Model replicas loaded in the last ten minutes, and runs that did not fit in memory.",
        "short",
        (
            # A replica's counter starts at 1, which `increase` does not count.
            Query(f"count ({series(metrics.LOADS)} unless {series(metrics.LOADS)} offset 10m) or vector(0)", "loads"),
            Query(f"sum (increase({series(metrics.OUT_OF_MEMORY)}[10m])) or vector(0)", "out of memory"),
        ),
    ),
    Panel(
        "GPU utilization and latency",
        "Each GPU of each replica, and p99 latency (right).",
        "percent",
        (
            Query(
                f"max by (instance, gpu_index) ({series(metrics.GPU_UTILIZATION)})", "{{instance}} GPU {{gpu_index}}"
            ),
            Query(quantile(0.99, metrics.LATENCY), "p99", exemplars=True, on_the_right=True),
        ),
        right_unit="ms",
    ),
    Panel(
        "GPU memory and latency",
        "Each GPU of each replica, and p99 latency (right).",
        "percentunit",
        (
            Query(
                f"max by (instance, hw_id) ({series(metrics.HW_MEMORY_USAGE)} / {series(metrics.HW_MEMORY_LIMIT)})",
                "{{instance}} {{hw_id}}",
            ),
            Query(quantile(0.99, metrics.LATENCY), "p99", exemplars=True, on_the_right=True),
        ),
        right_unit="ms",
    ),
    Panel(
        "GPU power and temperature",
        "Each GPU of each replica; temperature on the right.",
        "watt",
        (
            Query(f"max by (instance, hw_id) ({series(metrics.HW_POWER)})", "{{instance}} {{hw_id}}"),
            Query(
                f"max by (instance, hw_id) ({series(metrics.HW_TEMPERATURE)})",
                "{{instance}} {{hw_id}}",
                on_the_right=True,
            ),
        ),
        right_unit="celsius",
    ),
    Panel(
        "Stalls and descriptors",
        "Times in which an event loop ran nothing for a second (the replica's log and the event `event_loop_stall` of "
        "its spans say what it did), and open file descriptors (right).",
        "short",
        (
            Query(f"sum (increase({series(metrics.LOOP_STALLS)}[{RATE}])) or vector(0)", "stalls"),
            Query(f"max by (job) ({series(metrics.PROCESS_DESCRIPTORS)})", "{{job}}", on_the_right=True),
        ),
    ),
    Panel(
        "Shortages",
        "The share of the time in which threads in the container, or else on the machine, waited for CPUs, memory or "
        "the disk, and in which a hypervisor ran others on the machine's CPUs.",
        "percentunit",
        (
            Query(f"max by (job, resource) ({series(metrics.PRESSURE)})", "{{job}} waits for {{resource}}"),
            Query(f"max by (job) ({series(metrics.CPU_STEAL)})", "{{job}}: CPUs are stolen"),
        ),
    ),
    Panel(
        "Processes",
        "CPU time of each replica as a fraction of its machine, the share of the time in which its threads got no CPU, "
        "and in which its container's limit held it back, and resident memory (right).",
        "percentunit",
        (
            Query(f"max by (job, instance) ({series(metrics.PROCESS_CPU)})", "{{job}} {{instance}}"),
            Query(f"max by (job, instance) ({series(metrics.CPU_RUN_DELAY)})", "{{job}} {{instance}} waits for a CPU"),
            Query(f"max by (job, instance) ({series(metrics.CPU_THROTTLED)})", "{{job}} {{instance}} is throttled"),
            Query(f"sum by (job) ({series(metrics.PROCESS_MEMORY)})", "{{job}}", on_the_right=True),
        ),
        right_unit="bytes",
    ),
)
GENERATION_DASHBOARD = (
    Panel(
        "Time to first token",
        "Of language models. `slowlens why` says what the slowest first tokens waited for.",
        "s",
        _quantiles(metrics.TIME_TO_FIRST_TOKEN),
    ),
    Panel(
        "Time per output token",
        "After the first, averaged over each request.",
        "s",
        _quantiles(metrics.TIME_PER_OUTPUT_TOKEN),
    ),
    Panel(
        "Between two tokens",
        "From one step that decodes to the next, and the step itself. What is longer than generation.max_step_ms was a "
        "prompt, or many sequences.",
        "ms",
        (
            *_quantiles(metrics.INTER_TOKEN),
            Query(quantile(0.99, metrics.STEP_LATENCY), "step p99", exemplars=True),
        ),
    ),
    Panel(
        "Generations",
        "Until the last token.",
        "s",
        _quantiles(metrics.GEN_AI_DURATION),
    ),
    Panel(
        "Tokens",
        "Generated tokens a second.",
        "short",
        (Query(per_second(metrics.OUTPUT_TOKENS, "model"), "{{model}}"),),
    ),
    Panel(
        "Sequences and cache",
        "Sequences that are generated, and the fraction of the KV cache that they hold (right).",
        "short",
        (
            Query(f"sum by (model) ({series(metrics.RUNNING)})", "{{model}} running"),
            Query(f"max by (instance) ({series(metrics.KV_USED)})", "{{instance}} cache", on_the_right=True),
        ),
        right_unit="percentunit",
    ),
    Panel(
        "Preemptions",
        "Sequences a second that lost their keys and values to others. None with generation.kv_reserve: 1.",
        "short",
        (Query(per_second(metrics.PREEMPTIONS, "model"), "{{model}}"),),
    ),
)
DASHBOARDS = {
    "slowlens-latency": ("slowlens: latency", LATENCY_DASHBOARD),
    "slowlens-capacity": ("slowlens: capacity", CAPACITY_DASHBOARD),
    "slowlens-generation": ("slowlens: generation", GENERATION_DASHBOARD),
}


def dashboard(uid: str) -> dict[str, Any]:
    """Grafana's JSON model of one of ``DASHBOARDS`` (schema 39, Grafana 10 and later)."""
    title, panels = DASHBOARDS[uid]
    return {
        "uid": uid,
        "title": title,
        "tags": ["slowlens"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "",
        "templating": {
            "list": [
                {
                    "name": "datasource",
                    "label": "Prometheus",
                    "type": "datasource",
                    "query": "prometheus",
                    "current": {},
                    "hide": 0,
                },
                {
                    "name": "model",
                    "label": "Model",
                    "type": "query",
                    "datasource": _DATASOURCE,
                    "query": f"label_values({series(metrics.REQUESTS)}, model)",
                    "refresh": 2,
                    "multi": True,
                    "includeAll": True,
                    # Also of series without a model.
                    "allValue": ".*",
                    "current": {"text": "All", "value": "$__all"},
                    "hide": 0,
                },
            ]
        },
        "annotations": {"list": []},
        "links": [
            {"title": "slowlens", "type": "dashboards", "tags": ["slowlens"], "asDropdown": False, "includeVars": True}
        ],
        "panels": [_panel(number, panel) for number, panel in enumerate(panels)],
    }


def _panel(number: int, panel: Panel) -> dict[str, Any]:
    return {
        "id": number + 1,
        "type": "timeseries",
        "title": panel.title,
        "description": panel.what,
        "datasource": _DATASOURCE,
        "gridPos": {"x": number % 2 * _WIDTH, "y": number // 2 * _HEIGHT, "w": _WIDTH, "h": _HEIGHT},
        "fieldConfig": {
            "defaults": {
                "unit": panel.unit,
                "min": 0,
                "custom": {
                    "lineWidth": 1,
                    "fillOpacity": 30 if panel.stacked else 0,
                    "showPoints": "never",
                    "stacking": {"mode": "normal" if panel.stacked else "none"},
                },
            },
            "overrides": [_right(ref, panel.right_unit) for ref, query in _refs(panel) if query.on_the_right],
        },
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi"}},
        "targets": [
            {
                "refId": ref,
                "datasource": _DATASOURCE,
                "expr": _of_model(query.expr),
                "legendFormat": query.legend,
                "exemplar": query.exemplars,
                "range": True,
            }
            for ref, query in _refs(panel)
        ],
    }


def _of_model(expr: str) -> str:
    """The query for the models that are chosen, where its metrics have a model."""
    for spec in metrics.METRICS:
        if "model" in spec.attributes:
            named = rf"\b({series(spec)}(?:_bucket|_sum|_count)?)\b(?:{{([^}}]*)}})?"
            expr = re.sub(named, lambda found: f"{found[1]}{{{','.join(filter(None, (MODEL, found[2])))}}}", expr)
    return expr


def _refs(panel: Panel) -> list[tuple[str, Query]]:
    return [(chr(ord("A") + number), query) for number, query in enumerate(panel.queries)]


def _right(ref: str, unit: str) -> dict[str, Any]:
    return {
        "matcher": {"id": "byFrameRefID", "options": ref},
        "properties": [{"id": "unit", "value": unit}, {"id": "custom.axisPlacement", "value": "right"}],
    }
