"""Export of spans and metrics: the SDK of one process, the exporters, the local store."""
