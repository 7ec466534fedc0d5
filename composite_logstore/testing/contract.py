"""What the contracts of exporters and readers share: what an author provides, and how it is used."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager
from typing import Any, ClassVar, NamedTuple, TypeVar

import pytest
from pydantic import SecretStr
from zenml.exceptions import DoesNotExistException
from zenml.models import LogEntry, LogsEntriesFilter

from composite_logstore.backend import (
    Exporter,
    ExportError,
    PageRequest,
    Reader,
    RetryableError,
    TooLargeError,
    UnavailableError,
)
from composite_logstore.config import ChildConfig
from composite_logstore.event import LogEvent, Stream
from composite_logstore.testing.events import make_logs

Result = TypeVar("Result")


class Received(NamedTuple):
    """One event, as the backend holds it.

    Attributes:
        uid: Its `log.record.uid`.
        writer: Its `zenml.log.writer`.
        sequence: Its `zenml.log.sequence`.
        message: Its message, with or without the exception beneath.
        level: Python's level number.
        time_unix_nano: When the record was created, in nanoseconds since the epoch.
    """

    uid: str
    writer: str
    sequence: int
    message: str
    level: int
    time_unix_nano: int


Backend = Callable[[Stream], Sequence[Received]]
"""Says what the backend holds of a stream, in its order."""


class Fault(NamedTuple):
    """A way in which the backend can fail, and what must come of it.

    Attributes:
        begin: Makes the backend fail so. Its result is used in a `with` statement, at whose end the
            backend works again, with all that it held before.
        export: The class of the error that an export raises meanwhile. None if exports go on.
        read: The class of the error that reading a page raises meanwhile. None if reading goes on.
    """

    begin: Callable[[], AbstractContextManager[object]]
    export: type[ExportError] | None = None
    read: type[Exception] | None = None


class Contract:
    """What `ExporterContract` and `ReaderContract` share. Give it the fixture `child`, in a subclass.

    Attributes:
        margin_seconds: How much longer than `export_timeout_millis` an export may take, in seconds. A
            busy machine needs some.
        read_seconds: How long reading a page may take while the backend fails, in seconds.
        patience_seconds: How long the backend may take to show what it was given, and to work again
            when a fault is over, in seconds.
        time_unit_nanos: The unit in which the backend keeps an event's time, in nanoseconds.
    """

    margin_seconds: ClassVar[float] = 5.0
    read_seconds: ClassVar[float] = 60.0
    patience_seconds: ClassVar[float] = 15.0
    time_unit_nanos: ClassVar[int] = 1_000

    @pytest.fixture
    def child(self) -> ChildConfig:
        """The settings of a child whose backend works. What it held before does not matter."""
        raise NotImplementedError("define a fixture 'child' that returns the settings of a child")

    @pytest.fixture
    def received(self, child: ChildConfig) -> Backend:
        """What the backend holds. To be replaced where the child cannot be read."""
        if child.unreadable:
            raise NotImplementedError(f"{child.unreadable}: define a fixture 'received' that looks into the backend")

        def read(stream: Stream) -> list[Received]:
            try:
                return _everything(child.create_reader(), stream)
            except DoesNotExistException:
                return []

        return read

    @pytest.fixture
    def faults(self) -> Mapping[str, Fault]:
        """The ways in which the backend can be made to fail, each with its name."""
        return {}

    @pytest.fixture
    def exporter(self, child: ChildConfig) -> Iterator[ExporterThread]:
        """The child's exporter, which is created with the first export."""
        exporter = ExporterThread(child, self.margin_seconds)
        yield exporter
        exporter.close()

    def assert_received(self, received: Backend, events: Sequence[LogEvent], copies: bool = False) -> None:
        """Check that the backend holds these events, and nothing else of their streams.

        Args:
            received: What the backend holds.
            events: The events, in the order of each writer.
            copies: Whether an event may be there more than once, if its first copy is in its place.
        """
        for stream in dict.fromkeys(event.stream for event in events):
            expected = [event for event in events if event.stream is stream]
            found = self._wait_for(received, stream, len({event.uid for event in expected}))
            if copies:
                found = list({event.uid: event for event in found}.values())
            for writer in dict.fromkeys(event.writer for event in expected):
                arrived = [event.sequence for event in found if event.writer == writer]
                sent = [event.sequence for event in expected if event.writer == writer]
                assert arrived == sent, "events are missing, there twice, or in another order"
            assert len(found) == len(expected), "there are events that nobody has sent"
            sent_events = {event.uid: event for event in expected}
            for event in found:
                assert event.uid in sent_events, "it is not the event's own uid"
                self.assert_same(event, sent_events[event.uid])

    def assert_same(self, found: Received, event: LogEvent) -> None:
        """Check that what the backend holds is the event."""
        assert found.message in (event.message, event.text)
        assert found.time_unix_nano // self.time_unit_nanos == event.time_unix_nano // self.time_unit_nanos
        assert (found.writer, found.sequence) == (event.writer, event.sequence)
        if event.level in (10, 20, 30, 40, 50):
            assert found.level // 10 * 10 == event.level

    def recovered(self, action: Callable[[], Result], *errors: type[Exception]) -> Result:
        """Do something as soon as the backend works again: a connection may take its time."""
        end = time.monotonic() + self.patience_seconds
        while True:
            try:
                return action()
            except errors or (RetryableError, UnavailableError):
                if time.monotonic() > end:
                    raise
                time.sleep(0.1)

    def _wait_for(self, received: Backend, stream: Stream, count: int) -> list[Received]:
        end = time.monotonic() + self.patience_seconds
        while True:
            found = list(received(stream))
            if len({event.uid for event in found}) >= count or time.monotonic() > end:
                return found
            time.sleep(0.1)


class ExporterThread:
    """Uses an exporter as a child does: in one thread, one call after the other, and not for ever."""

    def __init__(self, child: ChildConfig, margin_seconds: float) -> None:
        """Start the thread.

        Args:
            child: The child's settings.
            margin_seconds: How much longer than `export_timeout_millis` a call may take, in seconds.
        """
        self._child = child
        self._seconds = child.export_timeout_millis / 1000 + margin_seconds
        self._exporter: Exporter | None = None
        self._is_stuck = False
        self._calls: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._run, name=f"exporter of {child.name}", daemon=True)
        self.thread.start()

    def export(self, batch: Sequence[LogEvent]) -> int:
        """Export a batch: return or raise what the exporter does."""
        shortened: int = self._call("export", lambda exporter: exporter.export(batch))
        assert type(shortened) is int, "export() returns how many events were shortened"
        assert 0 <= shortened <= len(batch)
        return shortened

    def deliver(self, events: Sequence[LogEvent]) -> int:
        """Export events in batches that are not too large, and return how many were shortened."""
        shortened = 0
        for start in range(0, len(events), self._child.batch_size):
            shortened += self._deliver(events[start : start + self._child.batch_size])
        return shortened

    def create(self) -> None:
        """Create the exporter, if it has not been created."""
        self._call("create_exporter", lambda exporter: None)

    def end_stream(self, stream: Stream) -> None:
        """End a stream."""
        self._call("end_stream", lambda exporter: exporter.end_stream(stream))

    def close(self) -> None:
        """Close the exporter, if it has been created. It can be created again."""
        if self._exporter is not None and not self._is_stuck:
            self._call("close", lambda exporter: exporter.close())
            self._exporter = None

    def close_twice(self) -> None:
        """Close the exporter again when it has been closed."""
        self._call("close", lambda exporter: exporter.close())
        self.close()

    def _deliver(self, batch: Sequence[LogEvent]) -> int:
        try:
            return self.export(batch)
        except TooLargeError as error:
            middle = len(batch) // 2
            if middle == 0:
                raise AssertionError("an event is too large even alone: the exporter has to shorten it") from error
            return self._deliver(batch[:middle]) + self._deliver(batch[middle:])

    def _call(self, name: str, action: Callable[[Exporter], Any]) -> Any:
        def call() -> Any:
            if self._exporter is None:
                self._exporter = self._child.create_exporter()
            return action(self._exporter)

        return within(self._seconds, name, self._start(call), self)

    def _start(self, call: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        self._calls.put((future, call))
        return future
