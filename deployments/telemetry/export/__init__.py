"""Where spans and metrics go: the SDK of one process, the exporters, the local store."""
