"""The common part of the contracts of exporters and readers: the fixtures that an author provides, and helpers."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager
from datetime import datetime, timedelta, timezone
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

import pytest
from pydantic import SecretStr
from zenml.exceptions import DoesNotExistException
from zenml.models import LogsResponse
from zenml.utils.time_utils import to_utc_timezone

from composite_logstore.backend import (
    Copier,
    Exporter,
    ExportError,
    Page,
    PageRequest,
    ReadEntry,
    Reader,
    Scanned,
    TooLargeError,
)
from composite_logstore.child_config import ChildConfig
from composite_logstore.event import LogEvent, Stream
from composite_logstore.testing.events import make_logs
from composite_logstore.zenml import LogsEntriesFilter

Result = TypeVar("Result")


class Received(NamedTuple):
    """One event, as stored in the backend.

    Attributes:
        uid: Its `log.record.uid`.
        writer: Its `zenml.log.writer`.
        sequence: Its `zenml.log.sequence`.
        message: Its message, with or without the exception after it.
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
"""Returns the events of a stream that are in the backend, in the backend's order."""


class Fault(NamedTuple):
    """A way in which the backend can fail, and the errors that exporter and reader must raise then.

    Attributes:
        begin: Makes the backend fail. Returns a context manager; when its block ends, the backend works again, with all
            the events that it had before.
        export: The class of the error that an export raises meanwhile. None if exports still succeed.
        read: The class of the error that reading a page raises meanwhile. None if reading still succeeds.
    """

    begin: Callable[[], AbstractContextManager[object]]
    export: type[ExportError] | None = None
    read: type[Exception] | None = None


class Contract:
    """The base of `ExporterContract` and `ReaderContract`. A subclass defines the fixture `child`.

    Attributes:
        margin_seconds: How much longer than `export_timeout_millis` an export may take, in seconds, on a busy machine.
        read_seconds: How long reading a page may take while the backend fails, in seconds.
        patience_seconds: How long the backend may take to show exported events, and to work again after a fault, in
            seconds.
        time_unit_nanos: The unit in which the backend stores an event's time, in nanoseconds.
    """

    margin_seconds: ClassVar[float] = 5.0
    read_seconds: ClassVar[float] = 60.0
    patience_seconds: ClassVar[float] = 15.0
    time_unit_nanos: ClassVar[int] = 1_000

    @pytest.fixture
    def child(self) -> ChildConfig:
        """The settings of a child whose backend works. It may contain other events."""
        raise NotImplementedError("define a fixture 'child' that returns the settings of a child")

    @pytest.fixture
    def received(self, child: ChildConfig) -> Backend:
        """A function that reads the backend. Override it if the child cannot be read."""
        if child.unreadable:
            raise NotImplementedError(f"{child.unreadable}: define a fixture 'received' that looks into the backend")

        def read(stream: Stream) -> list[Received]:
            reader = child.create_reader()
            try:
                return [to_received(entry) for page in walk(reader, make_logs(stream)) for entry in page.entries]
            except DoesNotExistException:
                return []
            finally:
                reader.close()

        return read

    @pytest.fixture
    def faults(self) -> Mapping[str, Fault]:
        """The ways in which a test can make the backend fail, by name."""
        return {}

    @pytest.fixture
    def exporter(self, child: ChildConfig) -> Iterator[ExporterThread]:
        """The child's exporter, created with the first export."""
        exporter = ExporterThread(child, self.margin_seconds)
        yield exporter
        exporter.close()

    def assert_received(self, received: Backend, events: Sequence[LogEvent], copies: bool = False) -> None:
        """Check that the backend has these events, and no others of their streams.

        Args:
            received: Reads the backend.
            events: The events, in the order of each writer.
            copies: Whether the backend may have duplicates, if the first one of each event is in its place.
        """
        for stream in dict.fromkeys(event.stream for event in events):
            expected = [event for event in events if event.stream is stream]
            found = self.wait_for(received, expected)
            if copies:
                found = list({event.uid: event for event in found}.values())
            for writer in dict.fromkeys(event.writer for event in expected):
                arrived = [event.sequence for event in found if event.writer == writer]
                sent = [event.sequence for event in expected if event.writer == writer]
                assert arrived == sent, "events are missing, duplicated, or in another order"
            assert len(found) == len(expected), "the backend has events that were not exported"
            sent_events = {event.uid: event for event in expected}
            for event in found:
                assert event.uid in sent_events, "an event has another uid than it was exported with"
                self.assert_same(event, sent_events[event.uid])

    def assert_same(self, found: Received, event: LogEvent) -> None:
        """Check that an event in the backend is the exported one."""
        assert found.message in (event.message, event.text)
        assert found.time_unix_nano // self.time_unit_nanos == event.time_unix_nano // self.time_unit_nanos
        assert (found.writer, found.sequence) == (event.writer, event.sequence)
        if event.level in (10, 20, 30, 40, 50):
            assert found.level // 10 * 10 == event.level

    def recovered(self, action: Callable[[], Result], *errors: type[Exception]) -> Result:
        """Repeat an action until the backend works again, which may take a while.

        Args:
            action: The action.
            errors: The errors that it raises while the backend does not work.
        """
        end = time.monotonic() + self.patience_seconds
        while True:
            try:
                return action()
            except errors:
                if time.monotonic() > end:
                    raise
                time.sleep(0.1)

    def wait_for(self, received: Backend, events: Sequence[LogEvent]) -> list[Received]:
        """Return the events of a stream in the backend, once these events are among them or patience is over.

        Args:
            received: Reads the backend.
            events: Events of one stream, at least one.
        """
        end = time.monotonic() + self.patience_seconds
        wanted = {event.uid for event in events}
        while True:
            found = list(received(events[0].stream))
            if wanted <= {event.uid for event in found} or time.monotonic() > end:
                return found
            time.sleep(0.1)


class PatientThread:
    """A thread that does one call after the other, for a caller that cannot wait for ever."""

    def __init__(self) -> None:
        self.is_stuck = False
        self._calls: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._run, name="contract", daemon=True)
        self.thread.start()

    def call(self, name: str, seconds: float, action: Callable[[], Result]) -> Result:
        """Return the result of an action, or raise its error.

        Args:
            name: What to call the action.
            seconds: How long it may take, in seconds.
            action: What to do.
        """
        future: Future[Result] = Future()
        self._calls.put((future, action))
        wait([future], seconds)
        self.is_stuck = not future.done()
        assert not self.is_stuck, f"{name} has not returned within {seconds:g} s"
        return future.result()

    def _run(self) -> None:
        while True:
            future, action = self._calls.get()
            try:
                future.set_result(action())
            except BaseException as error:  # it is raised where the action was called
                future.set_exception(error)


class ExporterThread(PatientThread):
    """Uses an exporter as a child does: in one thread, and with an end to its patience."""

    def __init__(self, child: ChildConfig, margin_seconds: float) -> None:
        """Start the thread. It creates the exporter on first use.

        Args:
            child: The child's settings.
            margin_seconds: How much longer than `export_timeout_millis` a call may take, in seconds.
        """
        super().__init__()
        self._child = child
        self._seconds = child.export_timeout_millis / 1000 + margin_seconds
        self._exporter: Exporter | None = None

    def export(self, batch: Sequence[LogEvent]) -> int:
        """Export a batch, and return or raise as the exporter does."""
        shortened = self._use("export()", lambda exporter: exporter.export(batch))
        assert type(shortened) is int, "export() returns the number of events that it has shortened"
        assert 0 <= shortened <= len(batch), "export() has shortened more events than the batch has"
        return shortened

    def deliver(self, events: Sequence[LogEvent]) -> int:
        """Export events as a child does, in batches that are split if they are too large.

        Returns:
            How many events were shortened.
        """
        size = self._child.batch_size
        return sum(self._deliver(events[start : start + size]) for start in range(0, len(events), size))

    def failure(self, batch: Sequence[LogEvent]) -> Exception | None:
        """Return the error that exporting the batch raises, None if it succeeds."""
        try:
            self.export(batch)
        except Exception as error:
            return error
        return None

    def create(self) -> None:
        """Create the exporter."""
        self._use("create_exporter()", lambda exporter: None)

    def takes_scanned(self, scan_format: str) -> bool:
        """Return whether the exporter writes scanned records of this format."""
        return bool(
            self._use(
                "create_exporter()",
                lambda exporter: isinstance(exporter, Copier) and exporter.scan_format == scan_format,
            )
        )

    def export_scanned(self, stream: Stream, scanned: Scanned) -> None:
        """Export scanned records, and raise as the exporter does."""

        def export(exporter: Exporter) -> None:
            assert isinstance(exporter, Copier)
            exporter.export_scanned(stream, scanned)

        self._use("export_scanned()", export)

    def end_stream(self, stream: Stream) -> None:
        """End a stream."""
        self._use("end_stream()", lambda exporter: exporter.end_stream(stream))

    def close(self, times: int = 1) -> None:
        """Close the exporter, if it was created. A later call creates another one.

        Args:
            times: How often to close it.
        """
        if self._exporter is not None and not self.is_stuck:
            for _ in range(times):
                self._use("close()", lambda exporter: exporter.close())
            self._exporter = None

    def _deliver(self, batch: Sequence[LogEvent]) -> int:
        try:
            return self.export(batch)
        except TooLargeError as error:
            middle = len(batch) // 2
            if middle == 0:
                raise AssertionError("one event is too large; the exporter has to shorten it") from error
            return self._deliver(batch[:middle]) + self._deliver(batch[middle:])

    def _use(self, name: str, action: Callable[[Exporter], Any]) -> Any:
        def act() -> Any:
            if self._exporter is None:
                self._exporter = self._child.create_exporter()
            return action(self._exporter)

        return self.call(name, self._seconds, act)


def assert_error(error: Exception | None, kind: type[Exception], child: ChildConfig, name: str) -> None:
    """Check that a fault raised the right error, and that its text contains no secret.

    Args:
        error: The error, None if none was raised.
        kind: The class that it should have.
        child: The child, whose settings contain the secrets.
        name: The fault's name.
    """
    assert isinstance(error, kind), f"fault {name!r}: expected {kind.__name__}, not {error!r}"
    said = str(error)
    assert said, f"fault {name!r}: the error has no text"
    for secret in _secrets(child.model_dump()):
        assert secret not in said, f"fault {name!r}: the error's text contains a secret"


def assert_quiet(caplog: pytest.LogCaptureFixture) -> None:
    """Check that nothing was logged at WARNING or above: an exporter raises errors instead."""
    loud = [f"{record.name}: {record.getMessage()}" for record in caplog.records if record.levelno >= logging.WARNING]
    assert not loud, "the backend logs at level WARNING or above"


def walk(
    reader: Reader,
    logs: LogsResponse,
    direction: Literal["newer", "older"] = "newer",
    limit: int = 1_000,
    token: str | None = None,
    **filters: Any,
) -> Iterator[Page]:
    """Yield all pages of a stream in a direction.

    Args:
        reader: The reader.
        logs: The stream.
        direction: `newer` or `older`.
        limit: The most entries of a page.
        token: The token of the page to begin after; None begins at the first page of the direction.
        filters: The filter, as arguments of ZenML's `LogsEntriesFilter`.
    """
    for _ in range(2_000):
        page = reader.read(PageRequest(logs, direction, token, limit, LogsEntriesFilter(**filters)))
        assert len(page.entries) <= limit, "a page has more entries than its limit"
        for text in (page.older, page.newer):
            assert text is None or isinstance(text, str), "a token is not a text"
        yield page
        token = page.newer if direction == "newer" else page.older
        if token is None:
            return
    raise AssertionError("the pages have no end")


def to_received(read: ReadEntry) -> Received:
    """Return an entry that a reader has read."""
    entry, event = read
    assert event is not None, "an entry has no event"
    assert entry.level is not None, "an entry has no level"
    assert entry.timestamp is not None, "an entry has no time"
    micros = (to_utc_timezone(entry.timestamp) - _EPOCH) // timedelta(microseconds=1)
    return Received(str(entry.id), event.writer, event.sequence, entry.message, entry.level.value, micros * 1000)


_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)


def _secrets(value: Any) -> Iterator[str]:
    """Yield all secrets, and also the words of each, since a key may follow `Bearer`."""
    if isinstance(value, SecretStr):
        secret = value.get_secret_value()
        yield from {secret, *secret.split()} - {""} if len(secret) > 3 else ()
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _secrets(item)
    elif isinstance(value, list | tuple | set):
        for item in value:
            yield from _secrets(item)
