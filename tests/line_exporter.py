"""An exporter of OpenTelemetry's SDK, as somebody might have in a package of their own: it writes JSON lines.

`install` makes it such a package.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

try:
    from opentelemetry.sdk._logs.export import LogRecordExporter, LogRecordExportResult
except ImportError:
    # Their names in SDK 1.38.
    from opentelemetry.sdk._logs.export import LogExporter as LogRecordExporter  # type: ignore[no-redef]
    from opentelemetry.sdk._logs.export import LogExportResult as LogRecordExportResult  # type: ignore[no-redef]

logger = logging.getLogger(__name__)


class LineExporter(LogRecordExporter):
    """Appends to a file. While there is another with `.down` behind its name, it fails or raises."""

    def __init__(self, path: str, token: str = "") -> None:
        if token == "unusable":
            raise ValueError(f"the token {token} is unusable")
        self._path = Path(path)
        self._token = token

    def export(self, batch: Sequence[Any]) -> LogRecordExportResult:
        down = self._path.with_name(f"{self._path.name}.down")
        if down.exists():
            if down.read_text() == "raise":
                raise ConnectionError(f"refused for {self._token}")
            logger.error("the backend is down, token %s", self._token)
            return LogRecordExportResult.FAILURE
        with self._path.open("a") as file:
            for readable in batch:
                record = readable.log_record
                assert record.severity_number is not None
                line = {
                    "time": record.timestamp,
                    "severity_number": record.severity_number.value,
                    "severity_text": record.severity_text,
                    "body": record.body,
                    "trace_id": record.trace_id,
                    "span_id": record.span_id,
                    "trace_flags": record.trace_flags,
                    "scope": readable.instrumentation_scope and readable.instrumentation_scope.name,
                    "resource": dict((getattr(readable, "resource", None) or record.resource).attributes),
                    "attributes": dict(record.attributes or {}),
                }
                file.write(json.dumps(line) + "\n")
        return LogRecordExportResult.SUCCESS

    def shutdown(self) -> None:
        logger.warning("shut down")

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return True


class Unfinished(LogRecordExporter):
    """Lacks what every SDK wants; SDK 1.45 wants `force_flush`, too."""

    def shutdown(self) -> None:
        pass


def install(site: Path) -> None:
    """Put it into a folder as pip would, as package `own-line-exporter` with the entry point `lines`."""
    metadata = site / "own_line_exporter-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: own-line-exporter\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(
        "[opentelemetry_logs_exporter]\nlines = own_line_exporter:LineExporter\nmissing = no_such_module:Exporter\n"
    )
    (metadata / "RECORD").write_text("own_line_exporter.py,,\n")
    shutil.copy(__file__, site / "own_line_exporter.py")
