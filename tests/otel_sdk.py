"""The log classes of OpenTelemetry's SDK, by their present names: SDK 1.38 has others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opentelemetry.sdk._logs import ReadableLogRecord
    from opentelemetry.sdk._logs.export import LogRecordExporter, LogRecordExportResult
else:
    try:
        from opentelemetry.sdk._logs import ReadableLogRecord
        from opentelemetry.sdk._logs.export import LogRecordExporter, LogRecordExportResult
    except ImportError:
        from opentelemetry.sdk._logs import LogData as ReadableLogRecord
        from opentelemetry.sdk._logs.export import LogExporter as LogRecordExporter
        from opentelemetry.sdk._logs.export import LogExportResult as LogRecordExportResult

__all__ = [
    "LogRecordExportResult",
    "LogRecordExporter",
    "ReadableLogRecord",
    "resource_of",
    "text_of",
]


def resource_of(readable: ReadableLogRecord) -> Any:
    """Return the resource of an exported record."""
    return getattr(readable, "resource", None) or readable.log_record.resource  # type: ignore[attr-defined]


def text_of(readable: ReadableLogRecord) -> str:
    """Return an exported record as JSON."""
    return str((readable if hasattr(readable, "to_json") else readable.log_record).to_json())  # type: ignore[attr-defined]
