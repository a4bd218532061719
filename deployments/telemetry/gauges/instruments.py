"""Gauges that every replica reports: its process and its assigned GPUs."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from deployments.telemetry import metrics
from deployments.telemetry.gauges.counters import Counter
from deployments.telemetry.gauges.cpu import RunDelay
from deployments.telemetry.gauges.nvml import GpuReader, GpuSample
from deployments.telemetry.gauges.process import ProcessUsage, open_descriptors, resident_bytes
from deployments.telemetry.measures import Measures, Reading

Read = Callable[[GpuSample], float | None]


def show_process(measures: Measures) -> None:
    usage = ProcessUsage()
    measures.gauge(metrics.PROCESS_CPU, lambda: [(usage.cpu_utilization(), {})])
    measures.gauge(metrics.PROCESS_MEMORY, lambda: [(resident_bytes(), {})])
    measures.gauge(metrics.PROCESS_DESCRIPTORS, lambda: [(count, {})] if (count := open_descriptors()) else [])


def show_run_delay(measures: Measures, run_delay: RunDelay) -> None:
    measures.gauge(metrics.CPU_RUN_DELAY, lambda: [(run_delay.ratio(), {})])


def show_shortages(measures: Measures, limit: Counter, steal: Counter, pressure: Mapping[str, Counter]) -> None:
    """Nothing where the kernel does not count it: the limit without control groups, or with none that has a quota."""
    if limit.is_known:
        measures.gauge(metrics.CPU_THROTTLED, lambda: [(limit.ratio(), {})])
    if steal.is_known:
        measures.gauge(metrics.CPU_STEAL, lambda: [(steal.ratio(), {})])
    known = {resource: one for resource, one in pressure.items() if one.is_known}
    if known:
        measures.gauge(
            metrics.PRESSURE, lambda: [(one.ratio(), {"resource": resource}) for resource, one in known.items()]
        )


def show_gpus(measures: Measures, reader: GpuReader) -> None:
    """Register GPU gauges with the values that each device reports; none for a replica without a GPU."""
    if not reader.has_devices:
        return

    def by_index(read: Read) -> Reading:
        return lambda: [(v, {"gpu.index": s.index}) for s in reader.samples() if (v := read(s)) is not None]

    def by_id(read: Read, **more: str) -> Reading:
        return lambda: [(v, {"hw.id": s.uuid, **more}) for s in reader.samples() if (v := read(s)) is not None]

    measures.gauge(metrics.GPU_UTILIZATION, by_index(lambda s: s.utilization_percent))
    measures.gauge(metrics.GPU_MEMORY, by_index(lambda s: _scaled(s.memory_used_bytes, 1e9)))
    measures.gauge(metrics.HW_UTILIZATION, by_id(lambda s: _scaled(s.utilization_percent, 100)))
    measures.gauge(metrics.HW_MEMORY_USAGE, by_id(lambda s: s.memory_used_bytes))
    measures.gauge(metrics.HW_MEMORY_LIMIT, by_id(lambda s: s.memory_total_bytes))
    measures.gauge(metrics.HW_POWER, by_id(lambda s: s.power_w, **{"hw.type": "gpu"}))
    measures.gauge(metrics.HW_TEMPERATURE, by_id(lambda s: s.temperature_c, **{"hw.type": "gpu"}))


def _scaled(value: float | None, unit: float) -> float | None:
    return value / unit if value is not None else None
