"""A replica with an assigned GPU reports that GPU and no other.

Ray and pynvml are real; the NVML library below them is the small fake in ``tests/support``, so this runs without a
GPU. On a machine with a GPU, ``tests/e2e/test_real_gpu.py`` also tests against the real library.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from deployments.telemetry import metrics, names
from tests.support.http import call
from tests.support.nvml import FIRST, SECOND, compile_nvml
from tests.support.otlp import OtlpReceiver
from tests.support.process import serve_run
from tests.support.traces import WHOLE_TRACE, named, one

pytestmark = [
    pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler for the fake libnvidia-ml"),
    pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="the real NVML is found here first"),
]
PORT = 8000


@pytest.fixture(scope="module")
def receiver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OtlpReceiver]:
    folder = tmp_path_factory.mktemp("gpu")
    config = {
        "applications": [
            {
                "name": "slowlens",
                "import_path": "deployments.app:build",
                "args": {"model": {"engine": "fake"}},
                "deployments": [{"name": "Model", "ray_actor_options": {"num_cpus": 0.5, "num_gpus": 1}}],
            }
        ]
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    receiver = OtlpReceiver()
    env = {
        "LD_LIBRARY_PATH": f"{compile_nvml(folder / 'lib')}:{os.environ.get('LD_LIBRARY_PATH', '')}",
        "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.grpc_endpoint,
        "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc",
        "OTEL_BSP_SCHEDULE_DELAY": "200",
        "OTEL_METRIC_EXPORT_INTERVAL": "500",
    }
    with serve_run(path, folder / "serve.log", env):
        yield receiver
    receiver.close()


def test_gauges_report_only_the_device_of_the_replica(receiver: OtlpReceiver) -> None:
    expected = {
        (metrics.GPU_UTILIZATION.name, "gpu.index", "0"): 40.0,
        (metrics.GPU_MEMORY.name, "gpu.index", "0"): 1.0,
        (metrics.HW_UTILIZATION.name, "hw.id", FIRST): 0.4,
        (metrics.HW_MEMORY_USAGE.name, "hw.id", FIRST): 1_000_000_000,
        (metrics.HW_MEMORY_LIMIT.name, "hw.id", FIRST): 80_000_000_000,
        (metrics.HW_POWER.name, "hw.id", FIRST): 300.5,
        (metrics.HW_TEMPERATURE.name, "hw.id", FIRST): 50.0,
    }
    receiver.metric_points(metrics.HW_TEMPERATURE.name)
    found = {}
    for service, metric, point in receiver.metrics():
        if metric.name.startswith(("ai.gpu.", "hw.")):
            assert service == "slowlens.model"
            values = {a.key: a.value.string_value or str(a.value.int_value) for a in point.attributes}
            assert SECOND not in values.values()
            key = "gpu.index" if "gpu.index" in values else "hw.id"
            found[metric.name, key, values[key]] = point.as_double or point.as_int

    assert found == pytest.approx(expected)


def test_batches_report_device_utilization_and_free_memory(receiver: OtlpReceiver) -> None:
    spans = receiver.trace(call(PORT, "POST", "/v1/embeddings", {"input": "a"}).trace_id, names=WHOLE_TRACE)
    link = one(spans, names.FORWARD_PASS).links[0]
    everything = receiver.wait_for(lambda spans: link in {(s.trace_id, s.span_id) for s in spans})
    (batch,) = [s for s in named(everything, names.BATCH_FORWARD) if (s.trace_id, s.span_id) == link]

    assert batch.attributes["ai.gpu.utilization_pre"] == 40.0
    assert batch.attributes["ai.gpu.utilization_post"] == 40.0
    assert batch.attributes["ai.gpu.memory_free_gb"] == 79.0
