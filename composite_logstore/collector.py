"""The port from a child to the OpenTelemetry Collector: which of its exporters does what the child does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class CollectorExporter:
    """An exporter of the OpenTelemetry Collector that sends what a child sends.

    `composite-logstore collector-config` adds the queue, the filters and the pipeline.

    Attributes:
        type: The component's type, such as `otlp_http`.
        settings: Its settings, as the Collector names them. A value of the type `Secret` becomes a reference to an
            environment variable, and a text arrives as it is: a `$` in it is escaped.
        attributes: Attributes that each log record gets.
        resource_attributes: Attributes that its resource gets.
        statements: Further statements in OTTL, the Collector's language for changes, about a log record.
        losses: What it does otherwise than the child, each as a sentence without a full stop.
        read: The section `read` with which an `otlp` child reads what this exporter has written; None if none can.
        timeout: The name of its setting for the time of one request. None if it has none.
        retries: The name of its setting `retry_on_failure`. None if it has none, or if `settings` have its own.
    """

    type: str
    settings: Mapping[str, Any]
    attributes: Mapping[str, str | bool | int | float] = field(default_factory=dict)
    resource_attributes: Mapping[str, str | bool | int | float] = field(default_factory=dict)
    statements: Sequence[str] = ()
    losses: Sequence[str] = ()
    read: Mapping[str, Any] | None = None
    timeout: str | None = "timeout"
    retries: str | None = "retry_on_failure"
