"""The exporter: writes events to a log store of ZenML, through the log store's own exporter if it has one."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any
from uuid import UUID

from zenml.log_stores.artifact.artifact_log_store import prepare_logs_uri

from composite_logstore import UNENCODABLE, LogEvent, OtelExporter, RejectedError, RetryableError, Stream
from composite_logstore_component.components import ComponentError, find_model, load
from composite_logstore_component.streams import describe, extends_artifact, extends_otel

if TYPE_CHECKING:
    from zenml.log_stores import BaseLogStore
    from zenml.log_stores.base_log_store import BaseLogStoreOrigin
    from zenml.log_stores.otel.otel_log_store import OtelLogStore

    from composite_logstore import Exporter


def create(component: str) -> Exporter:
    """Create the exporter for the component with this name or ID.

    Raises:
        ComponentError: The component cannot be used.
    """
    store = load(find_model(component))
    return OtelStoreExporter(store) if extends_otel(store) else EmittingExporter(store)


class OtelStoreExporter(OtelExporter):
    """Exports through a log store's own exporter, and not through its queue: so failures are known and retried."""

    def __init__(self, store: OtelLogStore) -> None:
        """Take the log store's exporter.

        Args:
            store: The log store. Only this exporter uses it, apart from its artifact store.

        Raises:
            ComponentError: The log store cannot create its exporter.
        """
        config = store.config
        try:
            exporter = store.get_exporter()
            # ZenML resolves references to secrets when a setting is read.
            settings = [getattr(config, name) for name in type(config).model_fields]
        except Exception as error:
            raise ComponentError(
                f"'{store.name}' cannot create its exporter ({type(error).__name__}); check its settings and secrets"
            ) from error
        resource = {"service.name": config.service_name, "service.version": config.service_version}
        super().__init__(exporter, resource, hidden=settings, max_batch_size=config.max_export_batch_size)
        self._store = store

    def attributes_of(self, stream: Stream) -> Mapping[str, Any]:
        """Return the stream's attributes, with its place if it is in an artifact store."""
        if extends_artifact(self._store):
            return {**stream.attributes, "zenml.log.uri": prepare_logs_uri(self._store._artifact_store, stream.id)}
        return stream.attributes

    def close(self) -> None:
        """Shut down the exporter, unless that would close an artifact store that others use."""
        if not extends_artifact(self._store):
            super().close()


class EmittingExporter:
    """Emits events to a log store, as ZenML does. Such a log store does not tell what becomes of them."""

    def __init__(self, store: BaseLogStore) -> None:
        """Take a log store.

        Args:
            store: The log store. Only this exporter uses it.
        """
        self._store = store
        self._origins: dict[UUID, BaseLogStoreOrigin] = {}
        self._emitted: dict[str, int] = {}

    def export(self, batch: Sequence[LogEvent]) -> int:
        """Emit each event that was not emitted before, and flush.

        Args:
            batch: The events.

        Returns:
            0: the log store does not tell which events it shortens.

        Raises:
            RetryableError: The log store raised.
            RejectedError: An event cannot be converted to a log record.
        """
        try:
            for event in batch:
                if event.number > self._emitted.get(event.writer, -1):
                    record, metadata = _said(event)
                    self._store.emit(self._origin(event.stream), record, metadata)
                    self._emitted[event.writer] = event.number
            self._store.flush(blocking=True)
        except RejectedError:
            raise
        except Exception as error:
            # The error's text is left out, since it may contain a key.
            raise RetryableError(f"log store '{self._store.name}' raised {type(error).__name__}") from error
        return 0

    def end_stream(self, stream: Stream) -> None:
        """Deregister the stream's origin."""
        origin = self._origins.pop(stream.id, None)
        if origin is not None:
            self._store.deregister_origin(origin)

    def close(self) -> None:
        """Deregister all origins, and clean up the log store."""
        while self._origins:
            self._store.deregister_origin(self._origins.popitem()[1])
        self._store.cleanup()

    def _origin(self, stream: Stream) -> BaseLogStoreOrigin:
        origin = self._origins.get(stream.id)
        if origin is None:
            name = str(stream.id)
            origin = self._store.register_origin(name, describe(stream, self._store), dict(stream.attributes))
            self._origins[stream.id] = origin
        # ZenML adds the run's and the step's names after the first records.
        for key, value in stream.attributes.items():
            origin.metadata.setdefault(key, value)
        return origin


def _said(event: LogEvent) -> tuple[logging.LogRecord, dict[str, object]]:
    try:
        return _record(event), _metadata(event)
    except UNENCODABLE as error:
        # Another program wrote the event. A retry would fail too.
        raise RejectedError(f"an event cannot be converted to a log record ({type(error).__name__})") from error


def _record(event: LogEvent) -> logging.LogRecord:
    """Return the event as a log record."""
    record = logging.LogRecord(
        event.logger_name, event.level, event.file, event.line, event.message, (), None, event.function
    )
    record.levelname = event.level_name
    record.created = _seconds(event.time_unix_nano)
    record.msecs = event.time_unix_nano // 1_000_000 % 1_000
    if event.exception is not None:
        # Formatters show it below the message. The exception object no longer exists.
        record.exc_text = event.exception.stacktrace
    for name, value in event.attributes.items():
        record.__dict__.setdefault(name, value)
    return record


def _seconds(time_unix_nano: int) -> float:
    """Return a time in seconds that does not fall below the time in nanoseconds.

    Handlers cut off what a record's time has beyond their unit: OpenTelemetry's takes `int(created * 1e9)`. The nearest
    float is often just below the time, and would lose a microsecond, or a millisecond in Datadog.
    """
    seconds = time_unix_nano / 1e9
    while int(seconds * 1e9) < time_unix_nano:
        seconds = math.nextafter(seconds, math.inf)
    return seconds


def _metadata(event: LogEvent) -> dict[str, object]:
    return {**event.details, **event.identity}
