"""Backfill: copies the events that one child is missing from another, with their identity and their times.

See the theory of operation at the head of the package.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from zenml.exceptions import DoesNotExistException, LogStoreError

from composite_logstore.backend import BACKFILLED, Scanned, UnavailableError
from composite_logstore.event import LogEvent, Stream
from composite_logstore.intervals import Intervals
from composite_logstore.parity.holding import Holding
from composite_logstore.parity.ledger import Ledger
from composite_logstore.parity.result import BackfillStoppedError, Copied, Tell
from composite_logstore.parity.scan import PAGES, Source, as_event, foreign_writer
from composite_logstore.parity.sender import Sender

if TYPE_CHECKING:
    from zenml.models import LogsResponse

    from composite_logstore.config import ChildConfig


class Backfill:
    """Copies streams from one child to another, one after the other. One thread uses it."""

    def __init__(
        self,
        source: Source,
        target: ChildConfig,
        there: Source | None,
        ledger: Ledger,
        rate: float | None = None,
        tell: Tell = lambda number: None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Create the exporter.

        Args:
            source: The child to copy from.
            target: The settings of the child to copy to.
            there: The child to copy to, opened for reading; None if it cannot be read.
            ledger: What was sent earlier.
            rate: The most events in a second; as many as the child takes if not given.
            tell: Told how many more events were looked at.
            clock: The time in seconds, from a clock that never goes back.
            sleep: Waits for so many seconds.

        Raises:
            UnavailableError: Something is missing that the user can provide, such as a secret.
            ImportError: A package that the exporter needs is not installed.
        """
        self._source = source
        self._target = target
        self._there = there
        self._ledger = ledger
        self._tell = tell
        self._sender = Sender(target, ledger, rate, clock, sleep)

    def close(self) -> None:
        """Wait for the export under way, and release connections."""
        self._sender.close()

    def copy(self, logs: LogsResponse, stream: Stream, result: Copied | None = None) -> Copied:
        """Copy the events of a stream that the child is missing.

        Args:
            logs: The stream, as ZenML knows it.
            stream: The stream, with the attributes that its events get.
            result: What to count in, so that the caller has the counts even if this raises.

        Returns:
            What became of the stream's events.

        Raises:
            BackfillStoppedError: A child cannot be read, or the child to copy to accepts no more events.
        """
        result = Copied() if result is None else result
        if self._ledger.is_resumed and str(logs.id) in self._ledger.finished:
            return result
        held = self._held(logs, stream)
        self._sender.begin(stream, result)
        try:
            _StreamCopy(self._source, self._target, self._there, self._sender, logs, stream, held, result).run(
                self._tell
            )
        except BaseException:
            self._sender.drop()
            raise
        self._ledger.finish(str(logs.id))
        return result

    def _held(self, logs: LogsResponse, stream: Stream) -> dict[str, Intervals]:
        """Return which events the child has, or will show as soon as its backend has indexed them."""
        there, held = self._there, {}
        if there is not None:
            holding = Holding(there, stream)
            try:
                holding.scan(logs, lambda number: None)
            except DoesNotExistException:
                pass
            except Exception as error:
                raise BackfillStoppedError(_unreadable(there.name, error)) from error
            held = dict(holding.numbers)
            if holding.foreign and not held.keys() - {foreign_writer(logs.id)} and there.scanner.scan_format == PAGES:
                # These entries may be all of the stream's events, or none of them.
                raise BackfillStoppedError(
                    f"child '{there.name}' has entries of this stream that do not say which events they are: "
                    f"which events are missing cannot be known. Copy to another child"
                )
            if there.in_order:
                # Such a child shows at once what was sent to it, unless the events were deleted since.
                return held
        for writer in self._ledger.writers(str(logs.id)):
            held[writer] = held.get(writer, Intervals()) | self._ledger.sent(str(logs.id), writer)
        return held


class _StreamCopy:
    """Copies one stream: reads the source, and hands the events that are missing to the sender."""

    def __init__(
        self,
        source: Source,
        target: ChildConfig,
        there: Source | None,
        sender: Sender,
        logs: LogsResponse,
        stream: Stream,
        held: dict[str, Intervals],
        result: Copied,
    ) -> None:
        self._source = source
        self._target = target
        self._sender = sender
        self._logs = logs
        self._stream = stream
        self._result = result
        # A writer → which of its events the child has, or was sent.
        self._held = held
        # A writer → the highest of these numbers.
        self._highest = {writer: numbers.last for writer, numbers in held.items()}
        # A writer → the last of its events that the exporter got, and remembers.
        self._reached: dict[str, int] = {}
        self._is_in_order = there is not None and there.in_order
        # Records in a format that both children share need not be decoded, if the child gets all of them.
        self._copies_records = (
            sender.takes_scanned(source.scanner.scan_format) and target.wants_all and target.oldest_seconds is None
        )
        self._oldest = 0
        if target.oldest_seconds is not None:
            self._oldest = time.time_ns() - int(target.oldest_seconds * 1e9)
        self._foreign = foreign_writer(logs.id)
        # How many records of other programs were read so far: their numbers, since they have none of their own.
        self._ordinal = 0
        self._has_own = source.scanner.scan_format == PAGES and bool(held.keys() - {self._foreign})

    def run(self, tell: Tell) -> None:
        """Copy the stream.

        Raises:
            BackfillStoppedError: The source cannot be read, or the child accepts no more events.
        """
        for chunk in self._chunks():
            tell(len(chunk.contents))
            self._copy(chunk)
        self._sender.finish()

    def _chunks(self) -> Iterator[Scanned]:
        try:
            yield from self._source.scanner.scan(self._logs)
        except DoesNotExistException:
            self._result.absent += 1
        except Exception as error:
            raise BackfillStoppedError(_unreadable(self._source.name, error)) from error

    def _copy(self, chunk: Scanned) -> None:
        size, first = len(chunk.contents), self._ordinal
        if self._has_own and not chunk.writer:
            self._result.unidentified += size
            return
        writer, sequences = chunk.writer, chunk.sequences
        if not writer:
            writer, sequences = self._foreign, range(first, first + size)
            self._ordinal += size
        held = self._held.setdefault(writer, Intervals())
        if isinstance(sequences, range) and held.has(sequences[0], sequences[-1]):
            self._result.there += size
        elif self._copies_records and chunk.writer and self._are_new(sequences, held, writer):
            held.add(sequences[0], sequences[-1])
            self._highest[writer] = self._reached[writer] = sequences[-1]
            self._sender.add_scanned(chunk)
        else:
            for place, sequence in enumerate(sequences):
                if sequence in held:
                    self._result.there += 1
                    continue
                event = as_event(self._source.scanner, chunk.contents[place], self._stream, first + place)
                if event is not None:
                    held.add(sequence, sequence)
                    self._copy_event(writer, sequence, event)

    def _are_new(self, sequences: Sequence[int], held: Intervals, writer: str) -> bool:
        """Return whether events have no gap among them, and the child has none of them and none that follows them."""
        return (
            isinstance(sequences, range)
            and sequences[0] > self._highest.get(writer, -1)
            and not held.touches(sequences[0], sequences[-1])
        )

    def _copy_event(self, writer: str, sequence: int, event: LogEvent) -> None:
        if not event.time_unix_nano:
            # Another program's line without a time gets that of its stream.
            event = event._replace(time_unix_nano=_created(self._logs))
        if not self._target.expects(event.level, event.progress):
            self._result.unwanted += 1
            return
        if event.time_unix_nano < self._oldest:
            self._result.too_old += 1
            return
        if sequence < self._reached.get(writer, -1):
            # The exporter would take it for an event that it has written, unless it forgets the stream.
            self._sender.finish()
            self._reached.clear()
        self._reached[writer] = sequence
        if sequence > self._highest.get(writer, -1):
            self._highest[writer] = sequence
        elif self._is_in_order:
            event = event._replace(metadata={**event.metadata, BACKFILLED: True})
        self._sender.add(writer, sequence, event)


def _created(logs: LogsResponse) -> int:
    from zenml.utils.time_utils import to_utc_timezone

    return int(to_utc_timezone(logs.created).timestamp() * 1e6) * 1000


def _unreadable(name: str, error: Exception) -> str:
    is_known = isinstance(error, LogStoreError | UnavailableError | ValueError)
    return f"child '{name}' could not be read: {error if is_known else type(error).__name__}"
