"""The reader for VictoriaLogs."""
