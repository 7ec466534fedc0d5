"""The reader for Grafana Loki."""
