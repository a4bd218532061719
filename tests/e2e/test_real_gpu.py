"""Checks that need a real GPU. Skipped where there is none."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deployments.batching.generation.steps import StepLimits
from deployments.config import BatchingConfig, ModelConfig
from deployments.engine.card import ModelCard
from deployments.engine.encoder import EncoderEngine
from deployments.engine.protocol import Run
from deployments.messages import Ids
from deployments.telemetry.gauges.nvml import GpuReader
from tests.support.models import save_language_model
from tests.support.steps import Steps
from tests.support.steps import engine as generator

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
TEXT_IDS = [np.arange(1000, 1000 + length, dtype=np.int32) for length in (3, 17, 64, 200)]


def engine(**config: str) -> EncoderEngine:
    model = ModelConfig(**config)  # type: ignore[arg-type]
    built = EncoderEngine(model, ModelCard.load(model), BatchingConfig(), has_gpu=True, cpus=1)
    phases: list[str] = []

    class Phase:
        def __init__(self, name: str) -> None:
            phases.append(name)

        def __enter__(self) -> None: ...
        def __exit__(self, *_: object) -> None: ...

    built.load(Phase)
    assert phases == ["weights", "device_move", "warm_up"]
    return built


def cosine(a: Any, b: Any) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def run(engine: EncoderEngine, batch: Sequence[Ids]) -> Run:
    return engine.run(engine.collate(batch))


def test_the_gpu_agrees_with_the_cpu() -> None:
    reference = run(engine(device="cpu", dtype="float32"), TEXT_IDS)
    for dtype, least in (("float32", 0.9999), ("bfloat16", 0.999)):
        found = run(engine(device="auto", dtype=dtype), TEXT_IDS)
        cosines = [
            float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
            for a, b in zip(found.outputs, reference.outputs, strict=True)
        ]
        assert min(cosines) >= least


def test_a_language_model_on_the_gpu_generates_what_it_does_on_the_cpu(tmp_path: Path) -> None:
    folder = save_language_model(tmp_path)
    texts = ["a", "hello there", "the quick brown fox " * 12]
    found = []
    for device in ("cpu", "cuda"):
        steps = Steps(generator(folder, device), StepLimits(8, 512, 1e6, 1.0))
        sequences = [steps.add(text, 20) for text in texts]
        steps.run()
        found.append([sequence.generated for sequence in sequences])
    assert found[0] == found[1]


def test_inference_time_from_cuda_events_is_within_wall_time() -> None:
    gpu = engine(device="auto")
    batch = [TEXT_IDS[3]] * 32
    run(gpu, batch)
    started = time.perf_counter()
    timed = run(gpu, batch)
    wall_ms = (time.perf_counter() - started) * 1e3

    assert 0 < timed.inference_ms <= wall_ms
    assert gpu.device.startswith("cuda")
    assert timed.peak_memory_gb is not None
    memory = gpu.memory()
    assert memory is not None
    assert 0 < memory.allocated_gb <= memory.reserved_gb


def test_nvml_agrees_with_nvidia_smi_and_utilization_rises_under_load() -> None:
    query = ["nvidia-smi", "--query-gpu=uuid,memory.total", "--format=csv,noheader,nounits", "--id=0"]
    uuid, total_mib = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip().split(", ")
    reader = GpuReader(["0"], interval_s=0.05)
    sample = reader.first()
    assert sample is not None
    assert sample.uuid == uuid
    assert sample.memory_total_bytes == pytest.approx(int(total_mib) * 2**20, rel=0.01)

    left = torch.randn(8192, 8192, device="cuda")
    busy = 0.0
    until = time.monotonic() + 30
    while busy < 50 and time.monotonic() < until:
        left @ left
        torch.cuda.synchronize()
        now = reader.first()
        busy = (now.utilization_percent or 0.0) if now is not None else 0.0
    reader.close()
    assert busy >= 50
