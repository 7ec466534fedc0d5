"""The reader of ClickHouse: the tables of the OpenTelemetry collector, of ClickStack, and of SigNoz."""
