"""Which device and which data type a model gets, and what goes wrong on a device."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from deployments.config import ModelConfig
from deployments.engine.protocol import Memory, OutOfMemory
from deployments.errors import ConfigError

_GB = 1e9

_TRIED_TOKENS, _TRIED_WIDTH = 512, 768
"""Size of the layer by which the data types are compared."""


class TorchEngine:
    """What all engines of PyTorch have in common. See ``engine.protocol.Engine``.

    Args:
        config: which device and data type to use.
        has_gpu: whether the replica has a GPU (decides ``device: auto``).
        cpus: CPUs assigned to the replica; the model uses as many threads on a CPU, rounded up.
    """

    def __init__(self, config: ModelConfig, *, has_gpu: bool, cpus: float) -> None:
        # NVML and Ray number GPUs this way; by default, CUDA puts the fastest first.
        os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
        self._device = _torch_device(config.device, has_gpu)
        self.device = str(self._device)
        self._on_gpu = self._device.type == "cuda"
        self._dtype = _torch_dtype(config.dtype, self._device)
        self.broken: str | None = None
        if not self._on_gpu:
            torch.set_num_threads(config.threads or max(1, math.ceil(cpus)))

    def memory(self) -> Memory | None:
        if not self._on_gpu:
            return None
        return Memory(torch.cuda.memory_allocated(self._device) / _GB, torch.cuda.memory_reserved(self._device) / _GB)

    @contextmanager
    def _on_device(self, what: str) -> Iterator[None]:
        """While the device computes ``what``. Raises OutOfMemory where that did not fit."""
        try:
            yield
        except torch.cuda.OutOfMemoryError as error:
            # Memory cached in blocks of the wrong sizes may be all that less would need.
            torch.cuda.empty_cache()
            raise OutOfMemory(f"{what} did not fit in the GPU's memory") from error
        except torch.AcceleratorError as error:
            # An illegal access or a device-side assertion: this process can no longer use the device.
            self.broken = f"{type(error).__name__} on {self.device}"
            raise


def _torch_device(wanted: str, has_gpu: bool) -> torch.device:
    """The device that ``model.device`` names. Raises ConfigError if it is not there."""
    if wanted == "auto":
        wanted = "cuda" if has_gpu and torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise ConfigError(f"args.model.device: {wanted!r} is not a device: {error}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"args.model.device: {wanted!r}, but this replica sees no CUDA device; assign one with "
            "ray_actor_options.num_gpus, or set auto"
        )
    return device


def _torch_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """The type that ``model.dtype`` names on this device."""
    if wanted != "auto":
        return getattr(torch, wanted)  # type: ignore[no-any-return]
    return automatic_dtype(device)


def automatic_dtype(device: torch.device) -> torch.dtype:
    """What ``dtype: auto`` is on this device."""
    return torch.bfloat16 if _gains_by_bfloat16(device) else torch.float32


def _gains_by_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 is faster than float32.

    A GPU that has it is; emulated, it is slower. A CPU that has instructions for it may be slower all the same, unless
    it has AMX, so that both are tried.
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return False
    capabilities = torch.cpu.get_capabilities()
    if not (capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")):
        return False
    return _multiplication_s(torch.bfloat16) < _multiplication_s(torch.float32)


def _multiplication_s(dtype: torch.dtype) -> float:
    """Time of a layer on a batch, the best of three."""
    inputs = torch.ones(_TRIED_TOKENS, _TRIED_WIDTH, dtype=dtype)
    weights = torch.ones(_TRIED_WIDTH, _TRIED_WIDTH, dtype=dtype)
    times = []
    with torch.inference_mode():
        for _ in range(1 + 3):
            began = time.perf_counter()
            torch.nn.functional.linear(inputs, weights)
            times.append(time.perf_counter() - began)
    # The first call includes the library's setup.
    return min(times[1:])
