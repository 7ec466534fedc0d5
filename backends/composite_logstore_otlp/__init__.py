"""The OTLP backend: any OpenTelemetry collector, over HTTP or gRPC."""
