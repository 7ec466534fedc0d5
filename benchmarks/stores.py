"""The log stores that are compared, and the records that they are given."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from typing import Any
from uuid import uuid4

from zenml.enums import StackComponentType
from zenml.log_stores import OtelLogStore
from zenml.log_stores.base_log_store import BaseLogStore
from zenml.models import LogsResponse
from zenml.models.v2.core.logs import LogsResponseBody

from composite_logstore import ChildConfig, CompositeLogStore, CompositeLogStoreConfig, LogEvent, Stream
from tests.otel_sdk import LogRecordExporter, LogRecordExportResult

NOW = datetime.now(timezone.utc)
ENDPOINT = "http://127.0.0.1:4318/v1/logs"


class NullChildConfig(ChildConfig):
    """A child that takes everything and does nothing with it."""

    def create_exporter(self) -> NullExporter:
        return NullExporter()

    @property
    def unreadable(self) -> None:
        return None


class NullExporter:
    """See `NullChildConfig`."""

    def export(self, batch: Sequence[LogEvent]) -> int:
        return 0

    def end_stream(self, stream: Stream) -> None:
        pass

    def close(self) -> None:
        pass


class NullLogRecordExporter(LogRecordExporter):
    """The same for OpenTelemetry's SDK."""

    def export(self, batch: Any) -> LogRecordExportResult:
        return LogRecordExportResult.SUCCESS

    def shutdown(self) -> None:
        pass

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return True


class NullOtelLogStore(OtelLogStore):
    """ZenML's own log store, with an exporter that does nothing."""

    def get_exporter(self) -> LogRecordExporter:
        return NullLogRecordExporter()


class NullLogStore(BaseLogStore):
    """A log store that does nothing: what is left is ZenML's own cost."""

    @property
    def config(self) -> Any:
        return self._config

    def emit(self, origin: Any, record: logging.LogRecord, metadata: dict[str, Any] | None = None) -> None:
        pass

    def _release_origin(self, origin: Any) -> None:
        pass

    def flush(self, blocking: bool = True) -> None:
        pass

    def fetch(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError


def make(kind: type[BaseLogStore], config: Any) -> BaseLogStore:
    """Return a log store as ZenML makes it of a registered component."""
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


def composite(disk: str, *children: ChildConfig, **settings: Any) -> CompositeLogStore:
    """Return a composite log store whose spool is in a folder of its own."""
    config = CompositeLogStoreConfig(
        primary=children[0].name, children=list(children), spool_directory=f"{disk}/spool", **settings
    )
    store = make(CompositeLogStore, config)
    assert isinstance(store, CompositeLogStore)
    return store


def null_children(number: int, **settings: Any) -> list[NullChildConfig]:
    """Return children that do nothing."""
    return [NullChildConfig(name=f"null-{place}", type="null", **settings) for place in range(number)]


def make_logs(store: BaseLogStore, **fields: Any) -> LogsResponse:
    """Return what ZenML knows of a stream."""
    body = LogsResponseBody(
        created=NOW,
        updated=NOW,
        project_id=uuid4(),
        source="step",
        log_store_id=store.id,
        artifact_store_id=uuid4(),
        **fields,
    )
    return LogsResponse(id=uuid4(), body=body)


def step_metadata() -> dict[str, Any]:
    """Return the attributes that ZenML gives to a step's stream."""
    things = ("pipeline", "pipeline.run", "project", "stack", "step.run", "user")
    return {f"zenml.{thing}.{key}": str(uuid4()) for thing in things for key in ("id", "name")}


def register(store: BaseLogStore, **fields: Any) -> Any:
    """Return the origin of a new stream."""
    logs = make_logs(store, **fields)
    return store.register_origin(str(logs.id), logs, step_metadata())


def emitter(store: BaseLogStore, **fields: Any) -> Callable[[logging.LogRecord], None]:
    """Return what a log call ends in, for a stream with the attributes that ZenML gives to a step's."""
    origin = register(store, **fields)
    return lambda record: store.emit(origin, record)


def make_records(number: int, message: str = "epoch %d, loss %.3f", **extra: Any) -> list[logging.LogRecord]:
    """Return records of a training loop.

    Args:
        number: How many.
        message: What they say; it is given two numbers.
        extra: Attributes of each.
    """
    records = []
    for place in range(number):
        args = (place, 1 / (place + 1))
        record = logging.LogRecord("train", logging.INFO, "/code/train.py", 42, message, args, None, "fit")
        vars(record).update(extra)
        records.append(record)
    return records
