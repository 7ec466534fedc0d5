"""The write port: events go to a log store of ZenML, through its own exporter where it has one."""

from __future__ import annotations

import logging
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
    """Create the exporter for the component with this name or id.

    Raises:
        ComponentError: It cannot be used.
    """
    store = load(find_model(component))
    return OtelStoreExporter(store) if extends_otel(store) else EmittingExporter(store)


class OtelStoreExporter(OtelExporter):
    """Delivers through the exporter of a log store, past its queue: what it refuses is known and tried again."""

    def __init__(self, store: OtelLogStore) -> None:
        """Take the log store's exporter.

        Args:
            store: The log store. It is this exporter's alone, but for the artifact store within it.

        Raises:
            ComponentError: The log store cannot create its exporter.
        """
        config = store.config
        try:
            exporter = store.get_exporter()
            # Here references to secrets are resolved: by ZenML, as it reads a setting.
            settings = [getattr(config, name) for name in type(config).model_fields]
        except Exception as error:
            raise ComponentError(
                f"'{store.name}' cannot create its exporter ({type(error).__name__}); check its settings and secrets"
            ) from error
        resource = {"service.name": config.service_name, "service.version": config.service_version}
        super().__init__(exporter, resource, hidden=settings, max_batch_size=config.max_export_batch_size)
        self._store = store

    def attributes_of(self, stream: Stream) -> Mapping[str, Any]:
        """Return the stream's attributes, and where it is if it is in an artifact store."""
        if extends_artifact(self._store):
            return {**stream.attributes, "zenml.log.uri": prepare_logs_uri(self._store._artifact_store, stream.id)}
        return stream.attributes

    def close(self) -> None:
        """Shut the exporter down, unless that would close an artifact store that others use."""
        if not extends_artifact(self._store):
            super().close()


class EmittingExporter:
    """Hands events to a log store as ZenML does. What it then does with them it does not say."""

    def __init__(self, store: BaseLogStore) -> None:
        """Take a log store.

        Args:
            store: The log store. It is this exporter's alone.
        """
        self._store = store
        self._origins: dict[UUID, BaseLogStoreOrigin] = {}
        self._emitted: dict[str, int] = {}

    def export(self, batch: Sequence[LogEvent]) -> int:
        """Emit each event that has not been emitted, and flush.

        Args:
            batch: The events.

        Returns:
            0: what the log store shortens is not known.

        Raises:
            RetryableError: The log store raised.
            RejectedError: No record can say what an event says.
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
            # Without its text, which may repeat a key.
            raise RetryableError(f"log store '{self._store.name}' raised {type(error).__name__}") from error
        return 0

    def end_stream(self, stream: Stream) -> None:
        """Deregister the stream's origin."""
        origin = self._origins.pop(stream.id, None)
        if origin is not None:
            self._store.deregister_origin(origin)

    def close(self) -> None:
        """Deregister what is registered, and clean the log store up."""
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
        # Of another program. No later try would change that.
        raise RejectedError(f"an event cannot be made a record ({type(error).__name__})") from error


def _record(event: LogEvent) -> logging.LogRecord:
    """Return a record that says what the event says."""
    record = logging.LogRecord(
        event.logger_name, event.level, event.file, event.line, event.message, (), None, event.function
    )
    record.levelname = event.level_name
    record.created = event.time_unix_nano / 1e9
    record.msecs = event.time_unix_nano // 1_000_000 % 1_000
    if event.exception is not None:
        # Formatters show it beneath the message. The exception itself is gone.
        record.exc_text = event.exception.stacktrace
    for name, value in event.attributes.items():
        record.__dict__.setdefault(name, value)
    return record


def _metadata(event: LogEvent) -> dict[str, object]:
    return {**event.details, **event.identity}
