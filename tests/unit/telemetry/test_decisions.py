"""Telemetry of autoscaling decisions."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from deployments.telemetry import names
from deployments.telemetry.decisions import DecisionTelemetry, ScalingRecord, decision_telemetry
from deployments.telemetry.span_specs import SPANS

RECORD = ScalingRecord(
    application="slowlens",
    deployment="Model",
    seen_unix_ns=1_000,
    decided_unix_ns=3_000,
    stated={
        "reason": "queue",
        "from_replicas": 1,
        "to_replicas": 3,
        "needed_replicas": 5,
        "max_replicas": 3,
        "running_replicas": 1,
        "reports": 1,
        "demand": 2.5,
        "queue_depth": 40,
        "queue_wait_ms": 900.0,
        "target_queue_wait_ms": 500.0,
        "oldest_age_ms": 700.0,
        "throughput": 44.0,
        "start_ms": 8000.0,
    },
)
STATED = {
    "ai.autoscaling.application": "slowlens",
    "ai.autoscaling.deployment": "Model",
    "ai.autoscaling.reason": "queue",
    "ai.autoscaling.from_replicas": 1,
    "ai.autoscaling.to_replicas": 3,
    "ai.autoscaling.needed_replicas": 5,
    "ai.autoscaling.max_replicas": 3,
    "ai.autoscaling.running_replicas": 1,
    "ai.autoscaling.reports": 1,
    "ai.autoscaling.demand": 2.5,
    "ai.autoscaling.queue_depth": 40,
    "ai.autoscaling.queue_wait_ms": 900.0,
    "ai.autoscaling.target_queue_wait_ms": 500.0,
    "ai.autoscaling.oldest_age_ms": 700.0,
    "ai.autoscaling.throughput": 44.0,
    "ai.autoscaling.start_ms": 8000.0,
}


def written(folder: Path, signal: str) -> list[Any]:
    return [json.loads(line) for path in folder.glob(f"{signal}-*") for line in path.read_text().splitlines()]


def values(pairs: list[Any]) -> dict[str, Any]:
    read = {"intValue": int, "doubleValue": float, "stringValue": str}
    return {pair["key"]: read[kind](value) for pair in pairs for kind, value in pair["value"].items()}


def test_a_new_decision_emits_a_span_and_metrics(tmp_path: Path) -> None:
    telemetry = DecisionTelemetry(str(tmp_path), "node-1234567")
    telemetry.take(RECORD, False)
    telemetry.take(RECORD, True)
    telemetry.close()

    (traces,) = written(tmp_path, "traces")
    (resource,) = traces["resourceSpans"]
    (span,) = resource["scopeSpans"][0]["spans"]
    assert span["name"] == names.SCALING_DECISION
    assert (span["startTimeUnixNano"], span["endTimeUnixNano"]) == ("1000", "3000")
    assert not span.get("parentSpanId")
    assert values(span["attributes"]) == STATED
    (spec,) = (spec for spec in SPANS if spec.name == names.SCALING_DECISION)
    assert tuple(STATED) == spec.attributes
    own = values([pair for pair in resource["resource"]["attributes"] if pair["key"] != "process.pid"])
    assert own["service.name"] == "slowlens.autoscaler"
    assert own["ray.node.id"] == "node-1234567"

    metrics = [
        metric
        for line in written(tmp_path, "metrics")
        for metric in line["resourceMetrics"][0]["scopeMetrics"][0]["metrics"]
    ]
    shown = {}
    for metric in metrics:
        (point,) = metric.get("gauge", metric.get("sum"))["dataPoints"]
        shown[metric["name"]] = float(point.get("asInt", point.get("asDouble")))
    assert {name: shown[name] for name in shown if name.startswith("ai.")} == {
        "ai.autoscaling.target_replicas": 3,
        "ai.autoscaling.running_replicas": 1,
        "ai.autoscaling.max_replicas": 3,
        "ai.autoscaling.demand": 2.5,
        "ai.autoscaling.queue_wait_ms": 900,
        "ai.autoscaling.target_queue_wait_ms": 500,
        "ai.autoscaling.decisions": 1,
        "ai.telemetry.dropped_records": 0,
        "ai.telemetry.unwritten_spans": 0,
    }


def test_policies_that_start_concurrently_share_one_telemetry(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: decision_telemetry(str(tmp_path), "node-1"), range(8)))
    for telemetry in {id(one): one for one in made}.values():
        telemetry.close()

    assert len({id(one) for one in made}) == 1


def test_a_forgotten_deployment_is_no_longer_exported(tmp_path: Path) -> None:
    telemetry = DecisionTelemetry(str(tmp_path), "node-1234567")
    telemetry.take(RECORD, False)
    telemetry.forget(RECORD.application, RECORD.deployment)
    telemetry.close()

    text = "".join(path.read_text() for path in tmp_path.glob("metrics-*"))
    assert "ai.autoscaling." not in text
