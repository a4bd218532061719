"""Trace sources: files of OTLP JSON, Jaeger, Tempo."""
