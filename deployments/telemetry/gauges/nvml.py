"""The GPUs of one replica, read through NVML in the background.

1. Only the replica's assigned devices are opened: indices, ``GPU-`` UUIDs and ``MIG-`` UUIDs, full or abbreviated, as
   in CUDA_VISIBLE_DEVICES.
2. One thread samples; spans and gauges read the last sample and never touch NVML themselves.
3. What NVML does not provide is left out. Without the library or a device there is no GPU telemetry. If a symbol is
   missing or a device does not support a value (utilization of a MIG slice), only that value is left out. If a device
   is lost, its last sample is dropped and the device is retried.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

_logger = logging.getLogger("slowlens.telemetry")
_GB = 1e9
Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class GpuSample:
    """One reading of one device; None for values that the device does not report."""

    index: int
    uuid: str
    utilization_percent: float | None
    memory_used_bytes: int | None
    memory_total_bytes: int | None
    power_w: float | None
    temperature_c: float | None

    @property
    def memory_free_gb(self) -> float | None:
        if self.memory_used_bytes is None or self.memory_total_bytes is None:
            return None
        return (self.memory_total_bytes - self.memory_used_bytes) / _GB


class GpuReader:
    """Samples the given devices every ``interval_s`` until closed. Does nothing without devices."""

    def __init__(self, devices: Sequence[str], interval_s: float) -> None:
        self._interval_s = interval_s
        self._devices = list(devices)
        self._handles: dict[str, Any] = {}
        self._samples: list[GpuSample | None] = []
        self._stopped = threading.Event()
        self._warned: set[str] = set()
        self._thread: threading.Thread | None = None
        self._nvml: Any = self._start_nvml() if devices else None
        if self._nvml is None:
            return
        self._sample_all()
        self._thread = threading.Thread(target=self._work, name="slowlens-gpu", daemon=True)
        self._thread.start()

    @property
    def has_devices(self) -> bool:
        """Whether there are devices to sample, now or later."""
        return self._thread is not None

    def samples(self) -> list[GpuSample]:
        """The last reading of every device that responds."""
        return [sample for sample in self._samples if sample is not None]

    def first(self) -> GpuSample | None:
        """The last reading of the replica's first device (``cuda:0``); None while it does not respond."""
        return self._samples[0] if self._samples else None

    def close(self) -> None:
        self._stopped.set()
        if self._thread is not None:
            self._thread.join(timeout=5)
        if self._nvml is not None:
            self._ask("nvmlShutdown", self._nvml.nvmlShutdown)

    # --- NVML ---

    def _start_nvml(self) -> Any:
        try:
            import pynvml

            pynvml.nvmlInit()
        except Exception as error:
            self._warn("nvml", f"no GPU telemetry: {error}")
            return None
        return pynvml

    def _open(self, device: str) -> Any:
        nvml = self._nvml
        if device.isdecimal():
            return self._ask(f"device {device}", lambda: nvml.nvmlDeviceGetHandleByIndex(int(device)))
        handle = self._ask(f"device {device}", lambda: nvml.nvmlDeviceGetHandleByUUID(device), quiet=True)
        return handle if handle is not None else self._open_abbreviated(device)

    def _open_abbreviated(self, device: str) -> Any:
        """Find a device by a unique UUID prefix, which CUDA accepts and NVML does not."""
        nvml = self._nvml
        for index in range(self._ask("nvmlDeviceGetCount", nvml.nvmlDeviceGetCount) or 0):
            handle = self._ask(f"device {index}", partial(nvml.nvmlDeviceGetHandleByIndex, index))
            uuid = self._ask("uuid", partial(nvml.nvmlDeviceGetUUID, handle))
            if uuid is not None and _text(uuid).startswith(device):
                return handle
        self._warn(device, f"no GPU telemetry for {device!r}: NVML does not know this device")
        return None

    def _work(self) -> None:
        while not self._stopped.wait(self._interval_s):
            self._sample_all()

    def _sample_all(self) -> None:
        self._samples = [self._sample(device) for device in self._devices]

    def _sample(self, device: str) -> GpuSample | None:
        nvml = self._nvml
        handle = self._handles.get(device)
        if handle is None:
            handle = self._open(device)
            if handle is None:
                return None
            self._handles[device] = handle
        uuid = self._ask("uuid", lambda: _text(nvml.nvmlDeviceGetUUID(handle)))
        if uuid is None:
            # Every device reports its UUID, even if it supports nothing else; this one is lost.
            return None
        memory = self._ask("memory", lambda: nvml.nvmlDeviceGetMemoryInfo(handle))
        utilization = self._ask("utilization", lambda: nvml.nvmlDeviceGetUtilizationRates(handle))
        power_mw = self._ask("power", lambda: nvml.nvmlDeviceGetPowerUsage(handle))
        temperature = self._ask("temperature", lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU))
        return GpuSample(
            index=self._index(handle),
            uuid=uuid,
            utilization_percent=float(utilization.gpu) if utilization is not None else None,
            memory_used_bytes=int(memory.used) if memory is not None else None,
            memory_total_bytes=int(memory.total) if memory is not None else None,
            power_w=power_mw / 1000 if power_mw is not None else None,
            temperature_c=float(temperature) if temperature is not None else None,
        )

    def _index(self, handle: Any) -> int:
        """NVML's index of the device; for a MIG slice, that of its parent GPU."""
        nvml = self._nvml
        index = self._ask("index", lambda: nvml.nvmlDeviceGetIndex(handle), quiet=True)
        if index is None or self._ask("mig", lambda: nvml.nvmlDeviceIsMigDeviceHandle(handle), quiet=True):
            parent = self._ask("parent", lambda: nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle), quiet=True)
            if parent is not None:
                index = self._ask("index", lambda: nvml.nvmlDeviceGetIndex(parent))
        return index if index is not None else -1

    def _ask(self, what: str, call: Callable[[], Value], *, quiet: bool = False) -> Value | None:
        """Return the result of ``call``, or None with one warning per kind of failure."""
        try:
            return call()
        except Exception as error:
            if not quiet:
                self._warn(f"{what}: {error}", f"NVML does not report {what}: {error}")
            return None

    def _warn(self, key: str, message: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            _logger.warning("%s", message)


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
