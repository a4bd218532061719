"""What the processes count, through a real Collector and Prometheus: beside the traces, and as alerts."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from deployments.cli.main import main
from tests.backends.running import Jaeger, collector, jaeger, prometheus
from tests.backends.traffic import ORDINARY, POISON, Sent, application, send
from tests.support.prometheus import Prometheus

RATE = 30.0
BEFORE, MEANWHILE, AFTER = ([ORDINARY] * 14 + [POISON]) * 20, [ORDINARY] * 270, [ORDINARY] * 60
ASKED = len(BEFORE) + len(MEANWHILE) + len(AFTER)
COUNT = "sum(ai_inference_requests_total)"
LOST = 'sum(otel_sdk_exporter_span_exported_total{error_type!=""}) > 0'


@dataclass
class Outage:
    """Requests before, during and after an outage of the Collector that was longer than exporters try again."""

    before: Sent
    store: Jaeger
    metrics: Prometheus
    why: Any
    """``slowlens why --metrics`` after it."""


@pytest.fixture(scope="module")
def outage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outage]:
    folder = tmp_path_factory.mktemp("outage")

    async def drive() -> Sent:
        async with application(running.endpoint, monkeypatch, telemetry={"sampling": {"mode": "tail"}}) as client:
            # Scraped with 0 first.
            await asyncio.to_thread(metrics.wait_for, COUNT)
            before = await send(client, BEFORE, RATE)
            running.pause()
            await send(client, MEANWHILE, RATE)
            running.resume()
            await send(client, AFTER, RATE)
            await asyncio.to_thread(metrics.wait_for, f"{COUNT} >= {ASKED}")
            await asyncio.to_thread(metrics.wait_for, LOST)
            return before

    with jaeger(folder) as store, pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "2")
        with collector(folder, store.endpoint) as running, prometheus(folder, running) as metrics:
            before = asyncio.run(drive())
            output = folder / "why.json"
            command = ["why", "--source", store.url, "--metrics", metrics.url, "--since", "10m", "--format", "json"]
            assert main([*command, "-o", str(output)]) == 0
            yield Outage(before, store, metrics, json.loads(output.read_text()))


def test_metrics_say_what_was_asked_and_what_was_lost(outage: Outage) -> None:
    counted = outage.why["metrics"]

    assert counted["requests"] == pytest.approx(ASKED, rel=0.03)
    assert counted["outcomes"]["error"] == pytest.approx(outage.before.statuses[500], abs=2)
    assert counted["latency_ms"]["p50"] < counted["latency_ms"]["p99"]
    assert counted["lost"] > 100


def test_what_was_lost_is_a_finding_although_the_store_does_not_have_it(outage: Outage) -> None:
    (finding,) = (one for one in outage.why["findings"] if one["cause"] == "telemetry_loss")
    assert f"the processes report {outage.why['metrics']['lost']} lost spans" in finding["summary"]


def test_the_alert_on_lost_spans_fires_at_once(outage: Outage) -> None:
    (alert,) = outage.metrics.wait_for('ALERTS{alertname="SlowlensSpansDropped"}')
    assert alert["metric"]["alertstate"] == "firing"
