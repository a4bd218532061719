"""Lost telemetry as reported by the processes' own counters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from deployments.cli.main import main
from deployments.explain.traces.losses import Losses
from tests.support.made import otlp, window


def metrics(name: str, *points: tuple[int, int, str], process: str = "a", temporality: int | str = 2) -> dict[str, Any]:
    """``(time, value, error.type)``."""
    made = [
        {
            "timeUnixNano": str(at),
            "asInt": str(value),
            "attributes": [{"key": "error.type", "value": {"stringValue": error}}] if error else [],
        }
        for at, value, error in points
    ]
    metric = {"name": name, "sum": {"aggregationTemporality": temporality, "dataPoints": made, "isMonotonic": True}}
    resource = {"attributes": [{"key": "service.instance.id", "value": {"stringValue": process}}]}
    return {"resourceMetrics": [{"resource": resource, "scopeMetrics": [{"metrics": [metric]}]}]}


EXPORTED = "otel.sdk.exporter.span.exported"


@pytest.mark.parametrize(
    ("data", "lost"),
    [
        ([metrics("ai.telemetry.dropped_records", (50, 3, ""), (150, 5, ""), (200, 9, ""))], 6),
        (
            [
                metrics("ai.telemetry.unwritten_spans", (150, 5, "")),
                metrics("ai.telemetry.unwritten_spans", (160, 5, "")),
            ],
            5,
        ),
        ([metrics(EXPORTED, (150, 900, "")), metrics(EXPORTED, (150, 7, "timeout"), (160, 8, "timeout"))], 8),
        ([metrics(EXPORTED, (150, 7, "x")), metrics(EXPORTED, (150, 7, "x"), process="b")], 14),
        ([metrics(EXPORTED, (90, 7, "x"), (150, 2, "x"), (160, 3, "x"), temporality=1)], 5),
        ([metrics("ai.batch.dispatches", (150, 5, ""))], 0),
    ],
    ids=["grown since", "unwritten", "failed exports only", "by process", "delta", "other counters"],
)
def test_losses_in_the_window(data: list[dict[str, Any]], lost: int) -> None:
    losses = Losses(since_ns=100)
    for one in data:
        losses.add(one)
    assert losses.total() == lost


def test_the_verdict_reports_lost_spans(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counted = json.dumps(metrics(EXPORTED, (10**18, 7, "timeout")))
    (tmp_path / "all.jsonl").write_text(f'{otlp(window({}))}\n{counted}\n{{"resourceMetrics": 5}}\n')
    assert main(["why", "--source", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    assert "1. telemetry_loss\n   the processes report 7 lost spans\n" in printed.out
    assert printed.err == "1 broken lines or spans were skipped\n"
