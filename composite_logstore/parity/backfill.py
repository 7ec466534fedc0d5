"""Backfill: copies the events that one child is missing from another, with their identity and their times.

See the theory of operation at the head of the package.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from zenml.exceptions import DoesNotExistException

from composite_logstore.backend import BACKFILLED, PAGES, Scanned
from composite_logstore.event import LogEvent, Stream
from composite_logstore.intervals import Intervals
from composite_logstore.parity.holding import Holding
from composite_logstore.parity.result import BackfillStoppedError, Copied, Tell
from composite_logstore.parity.scan import Source, as_event, foreign_writer, is_foreseen, numbered, unix_nano
from composite_logstore.parity.sender import Sender
from composite_logstore.processing.budget import is_notice

if TYPE_CHECKING:
    from zenml.models import LogsResponse


@dataclass
class Backfill:
    """Copies streams from one child to another, one after the other. One thread uses it.

    Attributes:
        source: The child to copy from.
        there: The child to copy to, opened for reading; None if it cannot be read.
        sender: Exports to the child to copy to.
        tell: Told how many more events were looked at.
    """

    source: Source
    there: Source | None
    sender: Sender
    tell: Tell = lambda number: None

    def copy(self, logs: LogsResponse, stream: Stream, result: Copied | None = None) -> Copied:
        """Copy the events of a stream that the child is missing.

        Args:
            logs: The stream, as ZenML knows it.
            stream: The stream, with the attributes that its events get.
            result: What to count in, so that the caller has the counts even if this raises.

        Returns:
            What became of the stream's events.

        Raises:
            BackfillStoppedError: A child cannot be read, the child to copy to accepts no more events, or ZenML cannot
                be asked which secrets to mask.
        """
        result = Copied() if result is None else result
        ledger = self.sender.ledger
        if ledger.is_resumed and str(logs.id) in ledger.finished:
            return result
        held = self._held(logs, stream)
        self.sender.begin(stream, result)
        is_in_order = self.there is not None and self.there.in_order
        try:
            copy = _StreamCopy(self.source, is_in_order, self.sender, logs, stream, held, result)
            copy.run(self.tell)
        except BaseException:
            self.sender.drop()
            raise
        ledger.finish(str(logs.id))
        return result

    def _held(self, logs: LogsResponse, stream: Stream) -> dict[str, Intervals]:
        """Return which events the child has, or will show as soon as its backend has indexed them."""
        there = self.there
        held: dict[str, Intervals] = {}
        if there is not None:
            holding = Holding(there, stream)
            try:
                holding.scan(logs, lambda number: None)
            except DoesNotExistException:
                pass
            except Exception as error:
                raise _unreadable(there, error) from error
            # A notice has the identity of the event that it replaces, so most backends would take that for a duplicate.
            for numbers in (holding.numbers, holding.notices):
                for writer, of_writer in numbers.items():
                    held[writer] = held.get(writer, Intervals()) | of_writer
            if holding.foreign and not held.keys() - {foreign_writer(logs.id)} and there.scanner.scan_format == PAGES:
                # These entries may be all of the stream's events, or none of them.
                raise BackfillStoppedError(
                    f"child '{there.name}' has entries of this stream that do not say which events they are: "
                    f"which events are missing cannot be known. Copy to another child"
                )
            if there.in_order:
                # Such a child shows at once what was sent to it, unless the events were deleted since.
                return held
        ledger = self.sender.ledger
        for writer in ledger.writers(str(logs.id)):
            held[writer] = held.get(writer, Intervals()) | ledger.sent(str(logs.id), writer)
        return held


@dataclass
class _StreamCopy:
    """Copies one stream: reads the source, and hands the events that are missing to the sender.

    Attributes:
        source: The child to copy from.
        is_in_order: Whether the child to copy to can be read, and keeps a writer's events in their order.
        sender: Exports to the child to copy to.
        logs: The stream, as ZenML knows it.
        stream: The stream, with the attributes that its events get.
        held: A writer → which of its events the child has, or was sent.
        result: What to count in.
    """

    source: Source
    is_in_order: bool
    sender: Sender
    logs: LogsResponse
    stream: Stream
    held: dict[str, Intervals]
    result: Copied

    def __post_init__(self) -> None:
        self._target = self.sender.target
        # A writer → the highest of the numbers that are held.
        self._highest = {writer: numbers.last for writer, numbers in self.held.items()}
        # The numbers that were held before the copy began.
        self._before = {writer: Intervals(numbers) for writer, numbers in self.held.items()}
        # A writer → the last of its events that the exporter got, and remembers.
        self._reached: dict[str, int] = {}
        # Records in a format that both children share need not be decoded, if the child gets all of them.
        self._copies_records = (
            self.sender.takes_scanned(self.source.scanner.scan_format)
            and self._target.wants_all
            and self.source.config.budget is None
            and self._target.oldest_seconds is None
        )
        self._oldest = 0
        if self._target.oldest_seconds is not None:
            self._oldest = time.time_ns() - int(self._target.oldest_seconds * 1e9)
        # How many records of other programs were read so far: their numbers, since they have none of their own.
        self._ordinal = 0
        self._has_own = self.source.scanner.scan_format == PAGES and bool(
            self.held.keys() - {foreign_writer(self.logs.id)}
        )

    def run(self, tell: Tell) -> None:
        """Copy the stream.

        Raises:
            BackfillStoppedError: The source cannot be read, the child accepts no more events, or ZenML cannot be asked
                which secrets to mask.
        """
        for chunk in self._chunks():
            tell(len(chunk.contents))
            self._copy(chunk)
        self.sender.end()

    def _chunks(self) -> Iterator[Scanned]:
        try:
            yield from self.source.scanner.scan(self.logs)
        except DoesNotExistException:
            self.result.absent += 1
        except Exception as error:
            raise _unreadable(self.source, error) from error

    def _copy(self, chunk: Scanned) -> None:
        size, first = len(chunk.contents), self._ordinal
        if self._has_own and not chunk.writer:
            self.result.unidentified += size
            return
        writer, sequences = numbered(chunk, self.logs.id, first)
        if not chunk.writer:
            self._ordinal += size
        held = self.held.setdefault(writer, Intervals())
        if not self.sender.remembers and isinstance(sequences, range) and held.has(sequences[0], sequences[-1]):
            self.result.there += size
        elif self._copies_records and chunk.writer and self._are_new(sequences, held, writer):
            held.add(sequences[0], sequences[-1])
            self._highest[writer] = self._reached[writer] = sequences[-1]
            self.sender.add_scanned(chunk)
        else:
            for place, sequence in enumerate(sequences):
                if sequence in held:
                    self.result.there += 1
                    if self.sender.remembers and sequence in self._before.get(writer, Intervals()):
                        event = self._event_of(chunk, place, first)
                        if event is not None:
                            self.sender.note_held(event)
                    continue
                event = self._event_of(chunk, place, first)
                if event is not None:
                    held.add(sequence, sequence)
                    self._copy_event(writer, sequence, event)

    def _event_of(self, chunk: Scanned, place: int, first: int) -> LogEvent | None:
        event = as_event(self.source.scanner, chunk.contents[place], self.stream, first + place)
        if event is not None and is_notice(event):
            # The source does not have the event whose place the notice takes.
            return None
        if event is not None and not event.time_unix_nano:
            # Another program's line without a time gets that of its stream.
            event = event._replace(time_unix_nano=unix_nano(self.logs.created))
        return event

    def _are_new(self, sequences: Sequence[int], held: Intervals, writer: str) -> bool:
        """Return whether events have no gap among them, and the child has none of them and none that follows them."""
        return (
            isinstance(sequences, range)
            and sequences[0] > self._highest.get(writer, -1)
            and not held.touches(sequences[0], sequences[-1])
        )

    def _copy_event(self, writer: str, sequence: int, event: LogEvent) -> None:
        if not self._target.expects(event.level, bool(event.progress)):
            self.result.unwanted += 1
            return
        if event.time_unix_nano < self._oldest:
            self.result.too_old += 1
            return
        if sequence < self._reached.get(writer, -1):
            # The exporter would take it for an event that it has written, unless it forgets the stream.
            self.sender.finish()
            self._reached.clear()
        self._reached[writer] = sequence
        if sequence > self._highest.get(writer, -1):
            self._highest[writer] = sequence
        elif self.is_in_order:
            event = event._replace(metadata={**event.metadata, BACKFILLED: True})
        self.sender.add(writer, sequence, event)


def _unreadable(child: Source, error: Exception) -> BackfillStoppedError:
    why = error if is_foreseen(error) else type(error).__name__
    return BackfillStoppedError(f"child '{child.name}' could not be read: {why}")
