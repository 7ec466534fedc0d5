"""What `emit` costs: three children of the composite, beside one OpenTelemetry store of ZenML's own.

No exporter does anything, so this is the time for which a log call holds up the pipeline. Both are measured
in turn, many times over; what is printed are medians.

    python -m benchmarks.emit
"""

from __future__ import annotations

import logging
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from statistics import median
from typing import Any
from uuid import uuid4

from opentelemetry.sdk._logs.export import LogRecordExporter, LogRecordExportResult
from zenml.enums import StackComponentType
from zenml.log_stores import OtelLogStore, OtelLogStoreConfig
from zenml.log_stores.base_log_store import BaseLogStore
from zenml.models import LogsResponse
from zenml.models.v2.core.logs import LogsResponseBody

from composite_logstore import ChildConfig, CompositeLogStore, CompositeLogStoreConfig, LogEvent, Stream

ROUNDS = 25
RECORDS = 4_000
NOW = datetime.now(timezone.utc)


class NullChildConfig(ChildConfig):
    def create_exporter(self) -> NullExporter:
        return NullExporter()

    @property
    def unreadable(self) -> None:
        return None


class NullExporter:
    def export(self, batch: Sequence[LogEvent]) -> int:
        return 0

    def end_stream(self, stream: Stream) -> None:
        pass

    def close(self) -> None:
        pass


class NullLogRecordExporter(LogRecordExporter):
    def export(self, batch: Any) -> LogRecordExportResult:
        return LogRecordExportResult.SUCCESS

    def shutdown(self) -> None:
        pass


class NullOtelLogStore(OtelLogStore):
    def get_exporter(self) -> LogRecordExporter:
        return NullLogRecordExporter()


def make(kind: type[BaseLogStore], config: Any) -> BaseLogStore:
    return kind(
        name="logs",
        id=uuid4(),
        config=config,
        flavor="",
        type=StackComponentType.LOG_STORE,
        user=None,
        created=NOW,
        updated=NOW,
    )


def emitter(store: BaseLogStore) -> Callable[[logging.LogRecord], None]:
    """Return what a log call ends in, for a stream with the attributes that ZenML gives to a step's."""
    body = LogsResponseBody(
        created=NOW,
        updated=NOW,
        project_id=uuid4(),
        source="step",
        log_store_id=store.id,
        artifact_store_id=uuid4(),
    )
    logs = LogsResponse(id=uuid4(), body=body)
    things = ("pipeline", "pipeline.run", "project", "stack", "step.run", "user")
    metadata = {f"zenml.{thing}.{key}": str(uuid4()) for thing in things for key in ("id", "name")}
    origin = store.register_origin(str(logs.id), logs, metadata)
    return lambda record: store.emit(origin, record)


def measure(emit: Callable[[logging.LogRecord], None]) -> float:
    """Return the microseconds for each record."""
    records = [
        logging.LogRecord(
            "train", logging.INFO, "/code/train.py", 42, "epoch %d, loss %.3f", (n, 1 / (n + 1)), None, "fit"
        )
        for n in range(RECORDS)
    ]
    begin = time.perf_counter()
    for record in records:
        emit(record)
    return (time.perf_counter() - begin) / RECORDS * 1e6


def main() -> None:
    children = [NullChildConfig(name=name, type="null") for name in ("a", "b", "c")]
    disk = tempfile.TemporaryDirectory()
    config = CompositeLogStoreConfig(primary="a", children=children, spool_directory=disk.name)
    composite = make(CompositeLogStore, config)
    stock = make(NullOtelLogStore, OtelLogStoreConfig(endpoint="http://127.0.0.1:4318/v1/logs"))
    emitters = {composite: emitter(composite), stock: emitter(stock)}
    times: dict[BaseLogStore, list[float]] = {composite: [], stock: []}
    for _ in range(ROUNDS):
        for store, emit in emitters.items():
            times[store].append(measure(emit))
            store.flush()
    ours, theirs = median(times[composite]), median(times[stock])
    ratio = median(b / a for a, b in zip(times[composite], times[stock], strict=True))
    print(f"Python {platform.python_version()}, {ROUNDS} rounds of {RECORDS} records")
    print(f"composite log store, three children    {ours:5.1f} µs a record")
    print(f"ZenML's OtelLogStore, one exporter     {theirs:5.1f} µs a record")
    print(f"ratio                                  {ratio:5.1f}")
    disk.cleanup()


if __name__ == "__main__":
    main()
