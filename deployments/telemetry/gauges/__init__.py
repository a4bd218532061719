"""Gauges that every process reports at each export: CPU, memory, GPUs."""
