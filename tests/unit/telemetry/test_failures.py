"""What the SDK's exporters log of their failures: once, with what to do."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from deployments.config import AppConfig
from deployments.telemetry.export.failures import SaidOnce
from deployments.telemetry.export.provider import Provider, ReplicaIdentity

OURS = logging.getLogger("opentelemetry.exporter")
GRPC = logging.getLogger("opentelemetry.exporter.otlp.proto.grpc.exporter")
FAILED = "Failed to export %s to %s, error code: %s, error details: %s"


@pytest.fixture
def now_s() -> Iterator[list[float]]:
    """The clock of the only handler of the SDK's exporters."""
    before, OURS.handlers = OURS.handlers, []
    # The exporter's module, once imported, keeps duplicates to itself.
    filters, GRPC.filters = GRPC.filters, []
    clock = [0.0]
    OURS.addHandler(SaidOnce(lambda: clock[0]))
    OURS.propagate = False
    yield clock
    OURS.handlers, GRPC.filters = before, filters


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "slowlens.telemetry"]


def test_a_failure_is_said_once_an_hour_with_what_to_set(now_s: list[float], caplog: pytest.LogCaptureFixture) -> None:
    for number in range(5):
        now_s[0] = number * 15.0
        GRPC.error(FAILED, "metrics", "jaeger:4317", "StatusCode.UNIMPLEMENTED", f"unknown service {number}")
    assert said(caplog) == [
        "Failed to export metrics to jaeger:4317, error code: StatusCode.UNIMPLEMENTED, error details: unknown service "
        "0; if what is there takes traces only, set OTEL_METRICS_EXPORTER=none; said once an hour"
    ]
    now_s[0] = 3700.0
    GRPC.error(FAILED, "metrics", "jaeger:4317", "StatusCode.UNIMPLEMENTED", "unknown service")
    assert "(4 more of these in the hour before)" in said(caplog)[1]


def test_another_failure_is_another_message(now_s: list[float], caplog: pytest.LogCaptureFixture) -> None:
    for signal in ("metrics", "traces"):
        for code in ("UNAVAILABLE", "UNIMPLEMENTED"):
            for _ in range(3):
                GRPC.error(FAILED, signal, "collector:4317", code, "")
    for seconds in (0.9, 2.1):
        GRPC.warning(
            "Transient error %s encountered while exporting %s, retrying in %.2fs", "UNAVAILABLE", "traces", seconds
        )
    found = said(caplog)
    assert len(found) == 5
    assert sum("OTEL_METRICS_EXPORTER" in one for one in found) == 2
    assert now_s == [0.0]


def test_any_provider_sets_it_up_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    for _ in range(2):
        Provider("model", AppConfig(), ReplicaIdentity("replica", "node")).close()
    assert sum(isinstance(handler, SaidOnce) for handler in OURS.handlers) == 1
    assert not OURS.propagate
