"""A simulated backend, which can fail in every way that a backend can, and stores events in memory."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Any, ClassVar
from uuid import UUID

from zenml.enums import LoggingLevels

from composite_logstore import clock
from composite_logstore.backend import (
    Event,
    Page,
    PageRequest,
    ReadEntry,
    RejectedError,
    RetryableError,
    TooLargeError,
    UnavailableError,
)
from composite_logstore.child_config import ChildConfig
from composite_logstore.event import LogEvent, Stream
from composite_logstore.reading.records import RankedEntry
from composite_logstore.zenml import LogEntry, LogsEntriesFilter, LogStoreUnavailableError

FAULTS = (
    "refused",
    "throttled",
    "unavailable",
    "rejects one",
    "rejects all",
    "too large",
    "defect",
    "answer lost",
    "slow",
    "silent",
)
"""The faults of a simulated backend. Each is a way in which real ones fail."""


class SimulatedBackend:
    """A simulated backend, which is its own exporter.

    Attributes:
        received: The events that it has taken, in the order of arrival.
        batches: The same events in batches.
        rejected: The events that it has rejected.
        ended: The streams that have ended.
        faults: The errors that the next exports raise, in order. None lets an export succeed.
        entered: Set when an export begins.
        closed: How often its exporter was closed.
        exports: How many exports have begun.
    """

    def __init__(self) -> None:
        """Begin without events and without a fault."""
        self.received: list[LogEvent] = []
        self.batches: list[list[LogEvent]] = []
        self.rejected: list[LogEvent] = []
        self.ended: list[Stream] = []
        self.faults: list[BaseException | None] = []
        self.closed = 0
        self.exports = 0
        self._fault: str | BaseException | None = None
        self._clock = clock.current
        self._changed = self._clock.condition(threading.RLock())
        self.entered = self._clock.signal()

    @property
    def fault(self) -> str | BaseException | None:
        """The current fault: one of `FAULTS`, an error that every export raises, or None."""
        return self._fault

    @fault.setter
    def fault(self, fault: str | BaseException | None) -> None:
        with self._changed:
            self._fault = fault
            self._changed.notify_all()

    @property
    def messages(self) -> list[str]:
        """The messages of the events that it has taken."""
        return [event.message for event in self.received]

    def export(self, batch: Sequence[LogEvent]) -> int:
        """Take the batch, unless there is a fault."""
        self.exports += 1
        self.entered.set()
        fault = self.faults.pop(0) if self.faults else self.fault
        if isinstance(fault, BaseException):
            raise fault
        match fault:
            case "refused":
                raise RetryableError("connection refused")
            case "throttled":
                raise RetryableError("too many requests", retry_after_seconds=90)
            case "unavailable":
                raise UnavailableError("the key is wrong")
            case "rejects one":
                self._take(batch[1:])
                self.rejected.append(batch[0])
                raise RejectedError("too old", count=1)
            case "rejects all":
                if len(batch) == 1:
                    self.rejected += batch
                raise RejectedError("bad request")
            case "too large" if len(batch) > 1:
                raise TooLargeError("one at a time")
            case "defect":
                raise TypeError("a defect")
            case "answer lost":
                self._take(batch)
                raise RetryableError("connection reset")
            case "slow":
                with self._changed:
                    self._changed.wait(15)
            case "silent":
                with self._changed:
                    while self.fault == "silent":
                        self._changed.wait()
        self._take(batch)
        return 0

    def _take(self, batch: Sequence[LogEvent]) -> None:
        with self._changed:
            self.batches.append(list(batch))
            self.received += batch
            self._changed.notify_all()

    def end_stream(self, stream: Stream) -> None:
        """Remember that the stream has ended."""
        self.ended.append(stream)

    def close(self) -> None:
        """Count the call."""
        with self._changed:
            self.closed += 1
            self._changed.notify_all()

    def wait_for(self, count: int) -> None:
        """Wait until so many events have arrived, at most a minute."""
        self._wait(lambda: len(self.received) >= count)

    def wait_for_close(self) -> None:
        """Wait until its exporter has been closed, at most a minute."""
        self._wait(lambda: self.closed > 0)

    def _wait(self, ready: Any) -> None:
        end = self._clock.now() + 60
        with self._changed:
            while not ready():
                assert self._clock.now() < end
                self._changed.wait(end - self._clock.now())


class SimulatedReader:
    """Reads the events that the backend has taken. A token is a position among them."""

    max_page_size = 1000
    in_order = True

    def __init__(self, backend: SimulatedBackend) -> None:
        """Begin.

        Args:
            backend: The backend to read.
        """
        self._backend = backend

    def read(self, request: PageRequest) -> Page:
        """Read one page, unless there is a fault."""
        fault = self._backend.fault
        if isinstance(fault, BaseException):
            raise fault
        if fault in ("refused", "throttled", "unavailable", "slow", "silent"):
            raise LogStoreUnavailableError(f"the backend cannot be reached: {fault}")
        events = [
            read
            for read in (_entry(event) for event in self._backend.received if event.stream.id == request.logs.id)
            if _is_wanted(read.entry, request.filter)
        ]
        if request.direction == "newer":
            first = int(request.token or 0)
            last = min(first + request.limit, len(events))
        else:
            last = len(events) if request.token is None else int(request.token)
            first = max(0, last - request.limit)
        entries = events[first:last]
        return Page(entries, older=str(first) if first else None, newer=str(last) if entries else None)

    def close(self) -> None:
        """Do nothing: nothing is open."""


def _is_wanted(entry: LogEntry, wanted: LogsEntriesFilter) -> bool:
    assert entry.level is not None
    assert entry.timestamp is not None
    return (
        (not wanted.search or wanted.search in entry.message)
        and (not wanted.level or entry.level.value >= wanted.level.value)
        and (not wanted.since or entry.timestamp >= wanted.since)
        and (not wanted.until or entry.timestamp <= wanted.until)
    )


def _entry(event: LogEvent) -> ReadEntry:
    rank = event.metadata.get("zenml.log.rank")
    ranked: dict[str, Any] = {} if rank is None else {"rank": rank}
    entry = (RankedEntry if ranked else LogEntry)(
        **ranked,
        id=UUID(event.uid),
        message=event.text,
        level=LoggingLevels(max(0, min(event.level // 10 * 10, 50))),
        timestamp=datetime.fromtimestamp(event.time_unix_nano / 1e9, tz=timezone.utc),
    )
    return ReadEntry(entry, Event(event.writer, event.sequence))


class SimulatedChildConfig(ChildConfig):
    """The settings of a child with a simulated backend, found in `backends` under the child's name."""

    readable: ClassVar[bool] = True
    backends: ClassVar[dict[str, SimulatedBackend]] = {}

    def create_exporter(self) -> SimulatedBackend:
        """Return the backend itself."""
        return self.backends[self.name]

    def create_reader(self) -> SimulatedReader:
        """Return a reader of the backend."""
        return SimulatedReader(self.backends[self.name])
