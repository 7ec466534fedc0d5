"""Scanning: a stream read as a whole through any child's reader, and its records decoded to events."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timedelta, timezone
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import UUID

from zenml.enums import LoggingLevels
from zenml.logger import get_logger
from zenml.utils.time_utils import to_utc_timezone

from composite_logstore import secret_references
from composite_logstore.backend import (
    PAGES,
    Page,
    PageRequest,
    ReadEntry,
    Reader,
    Scanned,
    Scanner,
    UnavailableError,
    checked_entry,
)
from composite_logstore.bounds import Bounds
from composite_logstore.delivery.backoff import PASSING, READ_ATTEMPTS, seconds_until_read
from composite_logstore.event import HIGHEST, LogEvent, Stream
from composite_logstore.processing.redaction import Masks
from composite_logstore.service import quietly
from composite_logstore.zenml import LogEntry, LogsEntriesFilter, LogStoreError

if TYPE_CHECKING:
    from zenml.models import LogsResponse

    from composite_logstore.child_config import ChildConfig

logger = get_logger(__name__)

_INT64 = 1 << 63


class Source(NamedTuple):
    """A child that is open for reading.

    Attributes:
        name: The child's name.
        scanner: Reads its streams.
        in_order: Whether it keeps a writer's events in the order of their numbers.
        config: The child's settings.
        close: Releases connections.
    """

    name: str
    scanner: Scanner
    in_order: bool
    config: ChildConfig
    close: Callable[[], None]

    def masks(self) -> Masks:
        """Return what tells where something is masked in the child's events."""
        return Masks(self.config.redact, self.scanner.scan_format != PAGES)


def open_source(child: ChildConfig) -> Source:
    """Open a child for reading.

    Raises:
        UnavailableError: Something is missing that the user can provide, such as a secret.
        ImportError: A package that the reader needs is not installed.
    """
    reader = secret_references.resolve(child).create_reader()
    scanner: Any = reader if isinstance(reader, Scanner) else PageScanner(reader)
    close = partial(quietly, logger.debug, "closing a reader failed: %s", reader.close)
    return Source(child.name, scanner, reader.in_order, child, close)


class PageScanner:
    """Reads a stream page by page, for a reader that cannot scan.

    It retries for a while if the backend is unavailable or asks for a pause.
    """

    scan_format = PAGES

    def __init__(self, reader: Reader, sleep: Callable[[float], None] = time.sleep) -> None:
        self._reader = reader
        self._sleep = sleep

    def scan(self, logs: LogsResponse, token: str | None = None) -> Iterator[Scanned]:
        """Read a whole stream. Raises what `Reader.read` raises."""
        while True:
            page = self._read(
                PageRequest(logs, "newer", token, self._reader.max_page_size, LogsEntriesFilter(), Bounds.ENTRIES_BYTES)
            )
            before, token = token, page.newer
            groups = [list(group) for _, group in groupby(map(checked_entry, page.entries), _writer_of)]
            for place, group in enumerate(groups, start=1):
                events = [read.event for read in group if read.event]
                times = [unix_nano(read.entry.timestamp) for read in group]
                yield Scanned(
                    events[0].writer if events else "",
                    [event.sequence for event in events],
                    times,
                    group,
                    None,
                    token if place == len(groups) else None,
                )
            if token in (None, before):
                return

    def event_of(self, content: ReadEntry, stream: Stream) -> LogEvent | None:
        """Return the entry as an event, with the fields that `fetch()` shows."""
        entry, identity = content
        if identity is None:
            return None
        writer, sequence = identity
        number = entry.id.int & HIGHEST
        event = rebuilt(entry, writer, number, sequence, stream)
        return event if event.uid == str(entry.id) else event._replace(number=sequence)

    def entry_of(self, content: ReadEntry) -> LogEntry | None:
        """Return the entry."""
        return content.entry

    def _read(self, request: PageRequest) -> Page:
        for failures in range(READ_ATTEMPTS - 1):
            try:
                return self._reader.read(request)
            except PASSING as error:
                self._sleep(seconds_until_read(error, failures))
        return self._reader.read(request)


def _writer_of(read: ReadEntry) -> str:
    return read.event.writer if read.event else ""


def is_foreseen(error: Exception) -> bool:
    """Return whether a reader is meant to raise such an error. The text of any other may contain a secret."""
    return isinstance(error, LogStoreError | UnavailableError | ValueError)


def unix_nano(moment: datetime | None) -> int:
    """Return a time in nanoseconds since the epoch; 0 if there is none, or if it is beyond 64 bits."""
    if moment is None:
        return 0
    try:
        since = to_utc_timezone(moment) - datetime(1970, 1, 1, tzinfo=timezone.utc)
    except OverflowError:
        return 0
    nanos = since // timedelta(microseconds=1) * 1000
    return nanos if -_INT64 <= nanos < _INT64 else 0


def foreign_writer(logs_id: UUID) -> str:
    """Return the writer of a stream's events that have none, always the same: 15 hexadecimal digits."""
    return hashlib.sha256(b"composite-logstore foreign " + logs_id.bytes).hexdigest()[:15]


def numbered(chunk: Scanned, logs_id: UUID, ordinal: int) -> tuple[str, Sequence[int]]:
    """Return the writer and the numbers of scanned records.

    Args:
        chunk: The records. Those of another program get a writer and numbers here.
        logs_id: Their stream.
        ordinal: How many records of other programs precede them in the stream.
    """
    if chunk.writer:
        return chunk.writer, chunk.sequences
    return foreign_writer(logs_id), range(ordinal, ordinal + len(chunk.contents))


def rebuilt(entry: LogEntry, writer: str, number: int, sequence: int, stream: Stream) -> LogEvent:
    """Return an entry as an event, as far as the entry tells."""
    level = entry.level or LoggingLevels.INFO
    name = entry.name or ""
    filename = entry.filename or ""
    line = entry.lineno if filename and entry.lineno and 0 < entry.lineno < _INT64 else 0
    return LogEvent(
        stream,
        writer,
        number,
        sequence,
        unix_nano(entry.timestamp),
        level.value,
        {"WARN": "WARNING"}.get(level.name, level.name),
        entry.message,
        name,
        filename,
        line,
        entry.module or "",
        None,
        None,
        {},
        {},
        name in ("stdout", "stderr") and not filename and LogEvent.is_update(entry.message),
    )


def as_event(scanner: Scanner, content: Any, stream: Stream, ordinal: int) -> LogEvent | None:
    """Return a record as an event, whichever program wrote it.

    Args:
        scanner: The scanner that returned the record.
        content: The record.
        stream: The stream.
        ordinal: The record's number among those of the stream that other programs wrote.

    Returns:
        The event; None if the record cannot be shown.
    """
    event = scanner.event_of(content, stream)
    if event is None and (entry := scanner.entry_of(content)) is not None:
        event = rebuilt(entry, foreign_writer(stream.id), ordinal, ordinal, stream)
    return event
