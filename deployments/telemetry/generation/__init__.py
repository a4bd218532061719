"""Telemetry of language models: what is recorded of a generation, of its steps and of its stream, and their spans."""
