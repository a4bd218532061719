"""The dashboards and alerts against a real Prometheus, with the metrics of a real run."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton
import yaml
from tritonclient.utils import InferenceServerException

from deployments.autoscaling.settings import POLICY
from deployments.telemetry import metrics
from deployments.telemetry.export.prometheus_names import series
from k8s.dashboards import DASHBOARDS, dashboard
from tests.support.http import call
from tests.support.nvml import compile_nvml
from tests.support.otlp import OtlpReceiver
from tests.support.process import serve_run
from tests.support.prometheus import PROMETHEUS, Prometheus, prometheus

PORT = 8000
needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None or shutil.which("promtool") is None, reason="Prometheus is not installed"
)
SCALING = {
    "min_replicas": 1,
    "max_replicas": 2,
    "metrics_interval_s": 0.5,
    "look_back_period_s": 2,
    "upscale_delay_s": 0,
    "downscale_delay_s": 0,
    # The load of this test exceeds these targets from the first request on.
    "policy": {"policy_function": POLICY, "policy_kwargs": {"target_queue_wait_ms": 1, "target_utilization": 0.001}},
}
CONFIG = {
    "grpc_options": {
        "port": 9000,
        "grpc_servicer_functions": [
            "deployments.protocols.open_inference.service:add_GRPCInferenceServiceServicer_to_server"
        ],
    },
    "applications": [
        {
            "name": "slowlens",
            "import_path": "deployments.app:build",
            "args": {"model": {"engine": "fake", "fake": {"base_ms": 20}}},
            "deployments": [
                {
                    "name": "Model",
                    "autoscaling_config": SCALING,
                    "ray_actor_options": {"num_cpus": 0.5, "num_gpus": 0.5},
                }
            ],
        },
        {
            "name": "language-model",
            "route_prefix": "/lm",
            "import_path": "deployments.app:build",
            "args": {
                "model": {"engine": "fake", "task": "text-generation", "fake": {"base_ms": 2}},
                # So little that sequences lose their place.
                "generation": {"kv_cache_tokens": 64, "kv_reserve": 0.0},
            },
            "deployments": [{"name": "Model", "ray_actor_options": {"num_cpus": 0.2}}],
        },
    ],
}


@needs_prometheus
def test_promtool_accepts_the_configuration_and_the_rules() -> None:
    for what in ("config", "rules"):
        path = PROMETHEUS / ("prometheus.yaml" if what == "config" else "rules.yaml")
        ran = subprocess.run(["promtool", "check", what, str(path)], capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stdout + ran.stderr


def constant(value: float, minutes: int = 60) -> str:
    return f"{value}x{minutes}"


def rising(per_minute: float, minutes: int = 480) -> str:
    return f"0+{per_minute}x{minutes}"


QUIET = {
    'ai_autoscaling_queue_wait_ms_milliseconds{ai_autoscaling_deployment="Model"}': constant(100),
    'ai_autoscaling_target_queue_wait_ms_milliseconds{ai_autoscaling_deployment="Model"}': constant(500),
    'ai_autoscaling_target_replicas{ai_autoscaling_deployment="Model"}': constant(4),
    'ai_autoscaling_max_replicas{ai_autoscaling_deployment="Model"}': constant(4),
    'ai_model_loads_total{instance="a"}': constant(1),
    'hw_gpu_memory_usage_bytes{instance="a", hw_id="GPU-1"}': constant(5e10),
    'hw_gpu_memory_limit_bytes{instance="a", hw_id="GPU-1"}': constant(8e10),
    'ai_inference_requests_total{outcome="ok"}': rising(6000),
    'ai_inference_requests_total{outcome="invalid"}': rising(6000),
    'ai_inference_requests_total{outcome="error"}': rising(1),
    'ai_engine_kv_used_ratio{instance="a"}': constant(1),
    'ai_queue_depth{instance="a"}': constant(0),
    'ai_telemetry_dropped_records_total{instance="a"}': constant(0),
    'ai_telemetry_unwritten_spans_total{instance="a"}': constant(0),
}
WAIT = 'ai_autoscaling_queue_wait_ms_milliseconds{ai_autoscaling_deployment="Model"}'
ERRORS = 'ai_inference_requests_total{outcome="error"}'
ANSWERS = 'ai_inference_requests_total{outcome="ok"}'
NEW_REPLICAS = {f'ai_model_loads_total{{instance="new-{number}"}}': "_x50 1x10" for number in range(6)}
CASES: dict[str, tuple[dict[str, str], str, set[str]]] = {
    "quiet": ({}, "60m", set()),
    "waits, room left": (
        {WAIT: constant(800), 'ai_autoscaling_max_replicas{ai_autoscaling_deployment="Model"}': constant(9)},
        "10m",
        {"SlowlensWaitAboveTarget"},
    ),
    "waits for a moment only": ({WAIT: "100x8 800x3 100x40"}, "12m", set()),
    "waits, no room left": ({WAIT: constant(800)}, "10m", {"SlowlensWaitAboveTarget", "SlowlensAtMaxReplicas"}),
    "cold starts": (NEW_REPLICAS, "55m", {"SlowlensColdStarts"}),
    "GPU memory": (
        {'hw_gpu_memory_usage_bytes{instance="a", hw_id="GPU-1"}': constant(7.8e10)},
        "15m",
        {"SlowlensGpuMemoryNearlyFull"},
    ),
    "sequences wait for a full cache": ({'ai_queue_depth{instance="a"}': constant(3)}, "10m", {"SlowlensKvCacheFull"}),
    "many errors": ({ERRORS: rising(120)}, "70m", {"SlowlensErrorBudgetBurnsFast", "SlowlensErrorBudgetBurns"}),
    "errors before and after a restart": (
        {ERRORS: "0+120x35 0+120x60"},
        "70m",
        {"SlowlensErrorBudgetBurnsFast", "SlowlensErrorBudgetBurns"},
    ),
    "a restart": ({ANSWERS: "0+6000x30 0+6000x450", ERRORS: "0+1x30 0+1x450"}, "45m", set()),
    "errors of a new replica": (
        {'ai_inference_requests_total{outcome="error", instance="new"}': "_x50 0+600x30"},
        "75m",
        {"SlowlensErrorBudgetBurnsFast", "SlowlensErrorBudgetBurns"},
    ),
    "errors of a replica that left": (
        {'ai_inference_requests_total{outcome="error", instance="gone"}': "0+600x60 _x400"},
        "58m",
        {"SlowlensErrorBudgetBurnsFast", "SlowlensErrorBudgetBurns"},
    ),
    "errors of a replica that left long ago": (
        {'ai_inference_requests_total{outcome="error", instance="gone"}': "0+600x60 _x420"},
        "8h",
        set(),
    ),
    "some errors for long": ({ERRORS: rising(40)}, "7h", {"SlowlensErrorBudgetBurns"}),
    "spans dropped": (
        {'ai_telemetry_dropped_records_total{instance="a"}': rising(60)},
        "12m",
        {"SlowlensSpansDropped"},
    ),
    "spans not written": (
        {'ai_telemetry_unwritten_spans_total{instance="a"}': rising(60)},
        "12m",
        {"SlowlensSpansDropped"},
    ),
    "spans dropped once": (
        {'ai_telemetry_dropped_records_total{instance="a"}': "0x20 200x60"},
        "23m",
        {"SlowlensSpansDropped"},
    ),
    "spans dropped once, half an hour ago": (
        {'ai_telemetry_dropped_records_total{instance="a"}': "0x20 200x60"},
        "50m",
        set(),
    ),
    "spans dropped once, by a counter that begins with it": (
        {'otel_sdk_exporter_span_exported_total{instance="b", error_type="timeout"}': "_x20 200x60"},
        "22m",
        {"SlowlensSpansDropped"},
    ),
    "a replica that lost some and left": (
        {'ai_telemetry_dropped_records_total{instance="b"}': "0x5 9x15 _x60"},
        "40m",
        set(),
    ),
    "spans that found the queue full": (
        {'otel_sdk_processor_span_processed_total{instance="a", error_type="queue_full"}': rising(60)},
        "12m",
        {"SlowlensSpansDropped"},
    ),
    "spans that the backend does not take": (
        {
            'otelcol_exporter_send_failed_spans{exporter="otlp"}': rising(60),
            'otelcol_exporter_enqueue_failed_spans{exporter="otlp"}': constant(0),
        },
        "12m",
        {"SlowlensSpansDropped"},
    ),
    "spans not delivered": (
        {'otel_sdk_exporter_span_exported_total{instance="a", error_type="timeout"}': rising(60)},
        "12m",
        {"SlowlensSpansDropped"},
    ),
}
EVERY = {one["alert"] for one in yaml.safe_load((PROMETHEUS / "rules.yaml").read_text())["groups"][0]["rules"]}


@needs_prometheus
@pytest.mark.parametrize("case", CASES)
def test_alerts_fire_only_when_they_should(case: str, tmp_path: Path) -> None:
    changes, at, firing = CASES[case]
    test = {
        "rule_files": [str(PROMETHEUS / "rules.yaml")],
        "evaluation_interval": "30s",
        "tests": [
            {
                "interval": "1m",
                "input_series": [{"series": name, "values": values} for name, values in (QUIET | changes).items()],
                # Count each alert: promtool compares whole alerts, and this test does not check their texts.
                "promql_expr_test": [
                    {
                        "expr": f'count (ALERTS{{alertname="{alert}", alertstate="firing"}}) or vector(0)',
                        "eval_time": at,
                        "exp_samples": [{"labels": "{}", "value": int(alert in firing)}],
                    }
                    for alert in sorted(EVERY)
                ],
            }
        ],
    }
    path = tmp_path / "test.yaml"
    path.write_text(yaml.safe_dump(test))
    ran = subprocess.run(["promtool", "test", "rules", str(path)], capture_output=True, text=True, check=False)

    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_every_alert_fires_in_some_case() -> None:
    assert set().union(*(firing for _, _, firing in CASES.values())) == EVERY


# --- a real run ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    folder = tmp_path_factory.mktemp("prometheus")
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(CONFIG))
    receiver = OtlpReceiver()
    env = {
        "LD_LIBRARY_PATH": f"{compile_nvml(folder / 'lib')}:{os.environ.get('LD_LIBRARY_PATH', '')}",
        "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.http_endpoint,
        "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
        "OTEL_METRIC_EXPORT_INTERVAL": "500",
    }
    stopped = threading.Event()
    text = triton.InferInput("text", [1], "BYTES")
    text.set_data_from_numpy(np.array([b"a b c"], dtype=object))

    def ask() -> None:
        over_grpc = triton.InferenceServerClient("127.0.0.1:9000")
        while not stopped.is_set():
            call(PORT, "POST", "/v1/embeddings", {"input": ["a b c", "d"]})
            call(PORT, "POST", "/v1/embeddings", {"input": ""})
            with contextlib.suppress(InferenceServerException):
                over_grpc.infer("fake", [text], headers={"application": "slowlens"})
            call(PORT, "POST", "/lm/v1/completions", {"prompt": "a b c", "n": 3, "max_tokens": 40})
            time.sleep(0.05)

    with serve_run(config, folder / "serve.log", env), prometheus(receiver, folder) as server:
        client = threading.Thread(target=ask)
        client.start()
        try:
            yield server
        finally:
            stopped.set()
            client.join()
    receiver.close()


def panels() -> list[Any]:
    return [
        pytest.param(target["expr"], id=f"{panel['title']}: {target['legendFormat']}")
        for uid in DASHBOARDS
        for panel in dashboard(uid)["panels"]
        for target in panel["targets"]
    ]


@needs_prometheus
@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler for the fake libnvidia-ml")
@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="the real NVML is found here first")
@pytest.mark.parametrize("expr", panels())
def test_every_panel_query_returns_data(expr: str, server: Prometheus) -> None:
    asked = expr.replace("$__rate_interval", "10s").replace("$model", ".*")
    found = server.wait_for(asked)

    assert all(series["value"][1] != "NaN" for series in found) or server.wait_for(f"({asked}) >= 0")


@needs_prometheus
@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler for the fake libnvidia-ml")
@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="the real NVML is found here first")
def test_exemplars_carry_trace_ids(server: Prometheus) -> None:
    name = f"{series(metrics.LATENCY)}_bucket"
    server.wait_for(name)
    now = time.time()
    found = server.ask("query_exemplars", query=name, start=str(now - 300), end=str(now))

    assert found
    assert all(len(one["labels"]["trace_id"]) == 32 for of_series in found for one in of_series["exemplars"])
