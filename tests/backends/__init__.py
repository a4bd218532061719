"""What slowlens sends, and what ``why`` reads, through the programs that operators run: OpenTelemetry's Collector with
the shipped configuration, Jaeger, Prometheus. They are built from their Go modules, once, into a cache."""
