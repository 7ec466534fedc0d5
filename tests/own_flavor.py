"""A log store flavor as a colleague might have written it: it keeps everything in memory, and says nothing of it."""

from __future__ import annotations

import logging
from typing import Any, ClassVar
from uuid import UUID, uuid4

from zenml.enums import LoggingLevels
from zenml.log_stores.base_log_store import BaseLogStore, BaseLogStoreConfig, BaseLogStoreFlavor, BaseLogStoreOrigin
from zenml.models import LogsResponse

from composite_logstore.zenml import LogEntry, LogsEntriesFilter, LogsEntriesResponse


class OwnLogStoreConfig(BaseLogStoreConfig):
    """One setting."""

    prefix: str = ""


class OwnLogStore(BaseLogStore):
    """What is emitted waits until it is flushed, as in many a log store."""

    waiting: ClassVar[list[tuple[UUID, logging.LogRecord, dict[str, Any]]]] = []
    kept: ClassVar[list[tuple[UUID, logging.LogRecord, dict[str, Any]]]] = []
    origins: ClassVar[list[BaseLogStoreOrigin]] = []
    error: ClassVar[Exception | None] = None
    fails_at: ClassVar[str] = ""

    def emit(
        self, origin: BaseLogStoreOrigin, record: logging.LogRecord, metadata: dict[str, Any] | None = None
    ) -> None:
        if self.error is not None and record.getMessage() == self.fails_at:
            raise self.error
        if origin not in self.origins:
            self.origins.append(origin)
        self.waiting.append((origin.log_model.id, record, {**origin.metadata, **(metadata or {})}))

    def _release_origin(self, origin: BaseLogStoreOrigin) -> None:
        self.origins.remove(origin)

    def flush(self, blocking: bool = True) -> None:
        self.kept.extend(self.waiting)
        self.waiting.clear()

    def fetch(
        self,
        logs_model: LogsResponse,
        start: str | None = None,
        limit: int | None = None,
        before: str | None = None,
        after: str | None = None,
        filter_: LogsEntriesFilter | None = None,
    ) -> LogsEntriesResponse:
        """Return the page; a cursor is the number of an entry."""
        assert logs_model.log_store_id == self.id
        said = [record for id, record, _ in self.kept if id == logs_model.id]
        size = self.resolve_limit(limit)
        begin = int(after) if after else max(0, (int(before) if before else len(said)) - size)
        if start == "oldest":
            begin = 0
        end = min(begin + size, int(before) if before else len(said))
        prefix = getattr(self.config, "prefix", "")
        entries = [
            LogEntry(id=uuid4(), message=prefix + record.getMessage(), level=LoggingLevels(record.levelno))
            for record in said[begin:end]
        ]
        return LogsEntriesResponse(
            items=entries, before=str(begin) if begin else None, after=str(end) if entries else None
        )


class OwnLogStoreFlavor(BaseLogStoreFlavor):
    """The flavor `own`."""

    @property
    def name(self) -> str:
        return "own"

    @property
    def config_class(self) -> type[BaseLogStoreConfig]:
        return OwnLogStoreConfig

    @property
    def implementation_class(self) -> type[BaseLogStore]:
        return OwnLogStore
