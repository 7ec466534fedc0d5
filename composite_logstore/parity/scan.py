"""Scanning: a stream read as a whole through any child's reader, and its records decoded to events."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import UUID

from zenml.enums import LoggingLevels
from zenml.exceptions import LogStoreRateLimitError, LogStoreUnavailableError
from zenml.models import LogEntry, LogsEntriesFilter

from composite_logstore import secret_references
from composite_logstore.backend import Page, PageRequest, ReadEntry, Reader, Scanned, Scanner, checked_entry
from composite_logstore.delivery.backoff import Backoff, bounded_seconds
from composite_logstore.event import LogEvent, Stream

if TYPE_CHECKING:
    from zenml.models import LogsResponse

    from composite_logstore.config import ChildConfig

PAGES = "pages"
"""The scan format of every reader that reads page by page: their entries can be compared, but only as events."""

_ATTEMPTS = 4
_RATE_LIMITED = Backoff(first=2.0, longest=120.0)
_UNAVAILABLE = Backoff(first=0.5, longest=120.0)
_NUMBER = (1 << 62) - 1
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


def open_source(child: ChildConfig) -> Source:
    """Open a child for reading.

    Raises:
        UnavailableError: Something is missing that the user can provide, such as a secret.
        ImportError: A package that the reader needs is not installed.
    """
    reader = secret_references.resolve(child).create_reader()
    scanner: Any = reader if isinstance(reader, Scanner) else PageScanner(reader)
    return Source(child.name, scanner, reader.in_order, child, reader.close)


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
            page = self._read(PageRequest(logs, "newer", token, self._reader.max_page_size, LogsEntriesFilter()))
            before, token = token, page.newer
            groups = [list(group) for _, group in groupby(map(checked_entry, page.entries), _writer_of)]
            for place, group in enumerate(groups, start=1):
                events = [read.event for read in group if read.event]
                times = [unix_nano(read.entry) for read in group]
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
        number = entry.id.int & _NUMBER
        event = rebuilt(entry, writer, number, sequence, stream)
        return event if event.uid == str(entry.id) else event._replace(number=sequence)

    def entry_of(self, content: ReadEntry) -> LogEntry | None:
        """Return the entry."""
        return content.entry

    def _read(self, request: PageRequest) -> Page:
        failures = 0
        while True:
            try:
                return self._reader.read(request)
            except LogStoreRateLimitError as error:
                asked_for = bounded_seconds(error.retry_after)
                seconds = min(asked_for or _RATE_LIMITED.wait(failures), _RATE_LIMITED.longest)
                failures += 1
                if failures == _ATTEMPTS:
                    raise
            except LogStoreUnavailableError:
                seconds = _UNAVAILABLE.wait(failures)
                failures += 1
                if failures == _ATTEMPTS:
                    raise
            self._sleep(seconds)


def _writer_of(read: ReadEntry) -> str:
    return read.event.writer if read.event else ""


def unix_nano(entry: LogEntry) -> int:
    """Return an entry's time in nanoseconds since the epoch; 0 if it has none, or one beyond 64 bits."""
    if entry.timestamp is None:
        return 0
    from datetime import datetime, timedelta, timezone

    from zenml.utils.time_utils import to_utc_timezone

    try:
        since = to_utc_timezone(entry.timestamp) - datetime(1970, 1, 1, tzinfo=timezone.utc)
    except OverflowError:
        return 0
    nanos = since // timedelta(microseconds=1) * 1000
    return nanos if -_INT64 <= nanos < _INT64 else 0


def foreign_writer(logs_id: UUID) -> str:
    """Return the writer of a stream's events that have none, always the same: 15 hexadecimal digits."""
    return hashlib.sha256(b"composite-logstore foreign " + logs_id.bytes).hexdigest()[:15]


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
        unix_nano(entry),
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
