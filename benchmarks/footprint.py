"""What waiting records take in memory, and what importing costs.

    python -m benchmarks.footprint NAME RECORDS

prints the megabytes as JSON.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from statistics import median
from typing import Any

import psutil
from opentelemetry.sdk._logs.export import LogRecordExporter, LogRecordExportResult
from zenml.log_stores import OtelLogStore, OtelLogStoreConfig

from benchmarks.stores import ENDPOINT, NullChildConfig, NullExporter, composite, emitter, make, make_records
from composite_logstore import LogEvent

_never = threading.Event()


class StuckExporter(NullExporter):
    """Never returns, so that everything waits."""

    def export(self, batch: Sequence[LogEvent]) -> int:
        _never.wait()
        return 0


class StuckChildConfig(NullChildConfig):
    """See `StuckExporter`."""

    def create_exporter(self) -> StuckExporter:
        return StuckExporter()


class StuckLogRecordExporter(LogRecordExporter):
    """The same for OpenTelemetry's SDK."""

    def export(self, batch: Any) -> LogRecordExportResult:
        _never.wait()
        return LogRecordExportResult.SUCCESS

    def shutdown(self) -> None:
        pass

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return True


class StuckOtelLogStore(OtelLogStore):
    """ZenML's own log store with it."""

    def get_exporter(self) -> LogRecordExporter:
        return StuckLogRecordExporter()


def resident_megabytes() -> float:
    """Return how much memory this process has."""
    return float(psutil.Process().memory_info().rss) / 1e6


MEMORY = ("composite log store, three children", "composite log store, in memory alone", "ZenML, three log stores")


def megabytes(name: str, records: int) -> float:
    """Return how much memory it takes that so many records of 200 bytes wait for three backends."""
    with tempfile.TemporaryDirectory() as disk:
        if name == "ZenML, three log stores":
            config = OtelLogStoreConfig(endpoint=ENDPOINT, max_queue_size=2 * records + 10_000)
            emits = [emitter(make(StuckOtelLogStore, config)) for _ in range(3)]
        else:
            children = [
                StuckChildConfig(name=name, type="stuck", max_queue_size=2 * records + 10_000)
                for name in ("a", "b", "c")
            ]
            settings: dict[str, Any] = {"durability": "memory"} if "alone" in name else {}
            emits = [emitter(composite(disk, *children, **settings))]
        message = "x" * 180 + " %d %.3f"

        def emit_all(number: int) -> None:
            for record in make_records(number, message):
                for emit in emits:
                    emit(record)

        emit_all(1_000)
        gc.collect()
        before = resident_megabytes()
        for _ in range(10):
            emit_all(records // 10)
        gc.collect()
        return resident_megabytes() - before


_IMPORT = """
import time
import zenml.stack, zenml.log_stores, zenml.client
begin = time.perf_counter()
import composite_logstore
{also}
print((time.perf_counter() - begin) * 1e3)
"""


def import_millis(also: str = "", rounds: int = 5) -> float:
    """Return how long it takes to import the package after ZenML, in milliseconds."""
    command = [sys.executable, "-c", _IMPORT.format(also=also)]
    return median(
        float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        for _ in range(rounds)
    )


def main() -> None:
    logging.disable(logging.CRITICAL)
    print("\n" + json.dumps({"megabytes": megabytes(sys.argv[1], int(sys.argv[2]))}), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
