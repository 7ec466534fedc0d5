"""The OpenTelemetry backend: whatever an exporter of OpenTelemetry's SDK can write to."""
