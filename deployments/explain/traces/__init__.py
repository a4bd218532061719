"""Where traces are read from: files of OTLP JSON, Jaeger, Tempo."""
