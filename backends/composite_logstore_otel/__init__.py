"""The OpenTelemetry backend: writes through any exporter of OpenTelemetry's SDK."""
