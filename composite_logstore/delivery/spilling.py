"""Writes the events of a journal to the spool: late with `spill`, at once with `write_ahead`."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Mapping, Sequence
from math import inf

from composite_logstore.clock import Clock
from composite_logstore.delivery.delivery import Delivery
from composite_logstore.delivery.own_folder import OwnFolder
from composite_logstore.delivery.schedule import Schedule
from composite_logstore.delivery.states import Load
from composite_logstore.delivery.stream_marks import StreamMarks
from composite_logstore.event import LogEvent, Stream, abridged
from composite_logstore.spool.folder import Spool
from composite_logstore.spool.format import ABRIDGED_BYTES, EventTooLongError, UnstorableEventError
from composite_logstore.spool.reader import ForwardReader
from composite_logstore.spool.settings import SpoolSettings

_MOST_AT_ONCE = 200
"""How many events the keeper writes under the journal's lock at a time, which bounds how long `emit` waits for it."""
_MOST_WHEN_LATE = 2_000
"""How many events another thread writes at a time if the keeper is late: more than it numbers, so it catches up."""


def next_batch(reader: ForwardReader, delivery: Delivery, load: Load, before: float = inf) -> list[LogEvent]:
    """Read the next events of a child from its spool, no more bytes than one export may have.

    Args:
        reader: The child's own reader of the spool.
        delivery: The child's delivery.
        load: What the delivery asks for.
        before: Read only events with lower numbers.

    Raises:
        OSError: The spool cannot be read now.
    """
    batch: list[LogEvent] = []
    size = 0
    for event in reader.read(load.after, before):
        wanted = delivery.wants(event)
        if wanted is not None:
            batch.append(wanted)
            size += wanted.size
            if len(batch) == load.events or size > delivery.batch_bytes:
                break
    return batch


class Spilling:
    """Writes a journal's events to the spool, as `durability` says: when they are due, or when memory has no room.

    The journal's lock guards every call.

    Attributes:
        unwritten: The events that are not on disk, oldest first. The journal appends to it.
        most_unwritten: How many such events there may be.
        unstorable: Why an event can never be written, None if there was no such event.
        schedule: Which events are due.
        only_in_memory: The highest number of an event that is not on disk and is not to be written any more.
        folder: Where they are written.
        marks: What is written of their streams.
    """

    def __init__(self, settings: SpoolSettings, writer: str, deliveries: Sequence[Delivery], clock: Clock):
        """Make no folder yet. `OwnFolder` explains the arguments."""
        self.unwritten: deque[LogEvent] = deque()
        smallest = min((delivery.queue.maxlen or 1 for delivery in deliveries), default=1)
        self.most_unwritten = 0 if settings.write_ahead else smallest - 1
        self.unstorable: Exception | None = None
        self.schedule = Schedule()
        self.only_in_memory = -1
        self.folder = OwnFolder(settings, writer, deliveries, clock, self.unwritten, self._write_again)
        self.marks = StreamMarks(self.folder, self.unwritten)
        self._most_waiting = smallest - 1
        self._is_write_ahead = settings.write_ahead
        self._is_writing = False
        self._deliveries = deliveries
        self._clock = clock

    # What is due

    def hurry(self, next_number: int) -> None:
        """Write events that should be on disk already, if the keeper is late.

        Args:
            next_number: The number that the next event will have.
        """
        if self.unwritten and self.schedule.is_late(self._clock.now()):
            self.tick(next_number)
            self.write(self.schedule.due, _MOST_WHEN_LATE)

    def tick(self, next_number: int) -> float:
        """Find out which events are due, as `Schedule.tick` does."""
        return self.schedule.tick(next_number, self._clock.now(), self.folder.spool is not None)

    def write_due(self) -> bool:
        """Write some of the events that are due.

        Returns:
            Whether more are due.
        """
        # With `write_ahead` all are: they wait only because an earlier attempt failed.
        return self.write(inf if self._is_write_ahead or self.folder.is_away else self.schedule.due, _MOST_AT_ONCE)

    # Writing

    def write(self, before: float = inf, most: float = inf) -> bool:
        """Write the events with numbers below `before`, except those that all children have acknowledged.

        Events for which there is no room stay in memory only.

        Args:
            before: The number.
            most: How many events to write at most.

        Returns:
            Whether more of them are left.
        """
        if self._is_writing:
            # This is a signal handler that logs. The call that it has interrupted writes its event too.
            return False
        self._is_writing = True
        try:
            is_more = self._write(before, most)
            self.marks.write()
            return is_more
        finally:
            self._is_writing = False

    def _write(self, before: float, most: float) -> bool:
        folder, marks = self.folder, self.marks
        # With `write_ahead` no child can have an event that was just logged.
        is_needed = self._is_write_ahead or folder.is_away
        acknowledged = 0 if is_needed else min(delivery.oldest for delivery in self._deliveries)
        unwritten = self.unwritten
        # One event after another is of the same stream, and to name it costs more than to compare.
        named: Stream | None = None
        while unwritten and (event := unwritten[0]).number < before:
            if not most:
                return True
            if marks.waiting:
                marks.write()
            if event.number >= acknowledged:
                # This may be the first event in another folder.
                named = None
                spool = folder.spool
                # For one event alone it takes longer than `_append`.
                if len(unwritten) > 1 and spool is not None and folder.error is None and not marks.waiting:
                    # `_append` finds out why an event cannot be written.
                    with contextlib.suppress(Exception):
                        most -= spool.segments.write_from(unwritten, before, most)
                    if not unwritten or unwritten[0] is not event:
                        continue
                if not self._append(event):
                    if spool is not None and folder.spool is None:
                        # The folder was gone. Its events are unwritten again, and come first.
                        continue
                    # There may be room later for those that all queues still have.
                    while len(unwritten) > self._most_waiting:
                        self._give_up(unwritten.popleft())
                    return False
                most -= 1
            elif event.stream is not named:
                marks.name(event, self._opened)
                named = event.stream
            unwritten.popleft()
        return False

    def end_stream(self, stream: Stream, before: int) -> None:
        """Write behind the events of a stream that it has ended, as `StreamMarks.end_stream` says."""
        self.marks.end_stream(stream, before)
        self.write(inf if self._is_write_ahead else 0)

    @property
    def room(self) -> int:
        """How many more events fit into memory before some have to be written."""
        return self.most_unwritten + 1 - len(self.unwritten)

    def write_through(self) -> None:
        """Write the events that do not fit into memory: always one more than fit, or a multiple of that.

        So which events survive a kill depends on the events and on the time alone, and not on how many are numbered at
        a time, which depends on the workers of all children
        (test_journal.py::test_what_is_on_disk_does_not_depend_on_how_many_events_are_handed_out_at_a_time).
        """
        full = self.most_unwritten + 1
        most = len(self.unwritten) // full * full
        if most:
            # First, since a signal handler that logs may write all of them meanwhile.
            before = self.unwritten[most - 1].number + 1
            if most > 1 or not self._has_written_one():
                self.write(before)

    def _has_written_one(self) -> bool:
        """Write the only event. `write` does it for any number of them, and takes 2 µs more, for which `emit` waits.

        Returns:
            Whether it is written. If not, `write` may still do so, or find out why it cannot.
        """
        folder, marks = self.folder, self.marks
        spool = folder.spool
        is_ordinary = self._is_write_ahead and folder.error is None and not (marks.waiting or marks.is_closed)
        if spool is None or not is_ordinary or self._is_writing:
            return False
        self._is_writing = True
        try:
            spool.segments.append(self.unwritten[0], folder.has_room)
            self.unwritten.popleft()
            return True
        except Exception:
            return False
        finally:
            self._is_writing = False

    def evict(self, last: int) -> tuple[float, float] | None:
        """Write the events up to number `last`, since memory has no room for them.

        Returns:
            The number from which on and the number below which they are on disk; there is no room for the others. None
            if the events cannot be written now.
        """
        if self._is_writing:
            # As in `write`.
            return None
        self.write(last + 1)
        before = self.unwritten[0].number if self.unwritten else inf
        while self.unwritten and self.unwritten[0].number <= last:
            self._give_up(self.unwritten.popleft())
        spool = self.folder.spool
        return spool.segments.first if spool is not None else inf, before

    def _give_up(self, event: LogEvent) -> None:
        """Write an event no more. If it is in no queue either, it is lost."""
        self.only_in_memory = event.number
        for delivery in self._deliveries if self.folder.is_away else ():
            delivery.lose(event)

    def _append(self, event: LogEvent) -> bool:
        """Write an event, shortened if no line can hold it. Returns whether the next one can be written, too."""
        folder = self.folder
        if folder.error is not None and not folder.may_try:
            return False
        try:
            spool = folder.spool or self._opened()
            try:
                spool.segments.append(event, folder.has_room)
            except EventTooLongError:
                spool.segments.append(abridged(event, ABRIDGED_BYTES), folder.has_room)
            folder.error = None
        except UnstorableEventError as error:
            # The event stays in memory only.
            self.unstorable, folder.error = error, None
            self._give_up(event)
        except Exception as error:
            folder.failed(error)
        return folder.error is None

    def try_again(self) -> None:
        """Try to write the next event or mark, even if the last attempt failed."""
        self.folder.may_try = self.marks.may_try = True

    def _opened(self) -> Spool:
        """Return the folder, made if there is none.

        Raises:
            OSError: It cannot be made or locked.
        """
        spool = self.folder.spool
        if spool is None:
            spool = self.folder.make()
            self.marks.begin_folder()
        return spool

    def _write_again(self, held: Mapping[int, LogEvent]) -> None:
        """Take back the events of a folder that is gone, as far as they are in memory: those in `held`."""
        before = self.unwritten[0].number if self.unwritten else inf
        first = 0
        if self.folder.is_away:
            # The agent has delivered the others.
            first = min(delivery.taken for delivery in self._deliveries) + 1
        again = [held[number] for number in sorted(held, reverse=True) if first <= number < before]
        self.unwritten.extendleft(again)
        for delivery in self._deliveries if self.folder.is_away else ():
            left = sum(event.number > delivery.taken and delivery.wants(event) is not None for event in self.unwritten)
            delivery.drop_spooled(delivery.pending - left, delivery.taken)
        if again:
            self.schedule.demand(again[0].number + 1)

    # The end

    def write_rest(self) -> None:
        """Write all events that some child needs, for the next process. Later events are written at once."""
        self.marks.is_closed = True
        self.try_again()
        self.write()
        self.most_unwritten = 0
        if not self.folder.is_away:
            self.folder.acknowledge_all()
        if not self.folder.is_needed:
            self.release()

    def release(self) -> None:
        """Release the folder, after a mark that the process has ended in order."""
        self.marks.is_closed = True
        self.write(0)
        self.folder.release()
