"""Writes the events of a journal to the spool: late with `spill`, at once with `write_ahead`."""

from __future__ import annotations

import contextlib
import os
import socket
from collections import deque
from collections.abc import Sequence
from math import inf

from composite_logstore.capture.process import has_joined, is_daemonic, rank
from composite_logstore.clock import Clock
from composite_logstore.delivery.delivery import Delivery
from composite_logstore.delivery.schedule import Schedule
from composite_logstore.delivery.space import MakesRoom, Space, drop_oldest_segment
from composite_logstore.delivery.states import Load
from composite_logstore.event import LogEvent, Stream, abridged
from composite_logstore.spool import segments
from composite_logstore.spool.folder import Spool, Standing
from composite_logstore.spool.format import LINE_BYTES, EventTooLongError, Process, UnstorableEventError
from composite_logstore.spool.reader import ForwardReader
from composite_logstore.spool.settings import SpoolSettings

_MOST_AT_ONCE = 200
"""How many events the keeper writes under the journal's lock at a time, which bounds how long `emit` waits for it."""
_MOST_WHEN_LATE = 2_000
"""How many events another thread writes at a time if the keeper is late: more than it numbers, so it catches up."""
_MOST_ENDED = 10_000
"""Of how many streams it is remembered that they have ended."""
_NO_SPARE_SECONDS = 1.0
"""How long to wait after a spare segment could not be allocated."""


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
    """Writes a journal's events to its spool, as `durability` says, and looks after the spool's folder.

    The journal's lock guards every call, except where a method says that it needs no lock.

    Attributes:
        settings: Where and how to write.
        unwritten: The events that are not on disk, oldest first. The journal appends to it.
        most_unwritten: How many such events there may be.
        spool: The spool, None before the first event is written.
        error: Why events cannot be written now, None if they can.
        unstorable: Why an event can never be written, None if there was no such event.
        schedule: Which events are due.
        is_away: Whether an agent delivers the events, so that all of them have to be on disk.
        only_in_memory: The highest number of an event that is not on disk and is not to be written any more.
        others: The recovered journals of this process, oldest first. They make room before this spool does.
    """

    def __init__(self, settings: SpoolSettings, writer: str, deliveries: Sequence[Delivery], clock: Clock):
        """Make no folder yet.

        Args:
            settings: Where and how to write.
            writer: The writer's name.
            deliveries: The deliveries that read from the spool.
            clock: The source of time.
        """
        self.unwritten: deque[LogEvent] = deque()
        smallest = min((delivery.queue.maxlen or 1 for delivery in deliveries), default=1)
        self.most_unwritten = 0 if settings.write_ahead else smallest - 1
        self._most_waiting = smallest - 1
        self._is_write_ahead = settings.write_ahead
        self._may_try = self._may_mark = True
        self._is_writing = False
        self.spool: Spool | None = None
        self.error: Exception | None = None
        self.unstorable: Exception | None = None
        self.is_away = False
        self.only_in_memory = -1
        self.others: Sequence[MakesRoom] = ()
        # Streams that have ended → the number below which their events are; and those whose mark is not written yet.
        self._ended: dict[Stream, int] = {}
        self._unmarked: dict[Stream, int] = {}
        self._is_closed = False
        self._may_name = True
        self._deliveries = deliveries
        self.settings = settings
        self._writer = writer
        self._clock = clock
        self._space = Space(settings.component, settings.max_bytes, clock)
        self._no_spare_until = -inf
        self.schedule = Schedule()

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
        """Find out which events have waited in memory long enough.

        Args:
            next_number: The number that the next event will have.

        Returns:
            After how many seconds to do so again.
        """
        return self.schedule.tick(next_number, self._clock.now(), self.spool is not None)

    def write_due(self) -> bool:
        """Write some of the events that are due.

        Returns:
            Whether more are due.
        """
        # With `write_ahead` all are: they wait only because an earlier attempt failed.
        return self.write(inf if self._is_write_ahead or self.is_away else self.schedule.due, _MOST_AT_ONCE)

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
            self._write_marks()
            return is_more
        finally:
            self._is_writing = False

    def _write(self, before: float, most: float) -> bool:
        # With `write_ahead` no child can have an event that was just logged.
        is_needed = self._is_write_ahead or self.is_away
        acknowledged = 0 if is_needed else min(delivery.oldest for delivery in self._deliveries)
        unwritten = self.unwritten
        while unwritten and (event := unwritten[0]).number < before:
            if not most:
                return True
            if self._unmarked:
                self._write_marks()
            if event.number >= acknowledged:
                spool = self.spool
                # For one event alone it takes longer than `_append`.
                if len(unwritten) > 1 and spool is not None and self.error is None and not self._unmarked:
                    # `_append` finds out why an event cannot be written.
                    with contextlib.suppress(Exception):
                        most -= spool.segments.write_from(unwritten, before, most)
                    if not unwritten or unwritten[0] is not event:
                        continue
                if not self._append(event):
                    if spool is not None and self.spool is None:
                        # The folder was gone. Its events are unwritten again, and come first.
                        continue
                    # There may be room later for those that all queues still have.
                    while len(unwritten) > self._most_waiting:
                        self._give_up(unwritten.popleft())
                    return False
                most -= 1
            else:
                self._name(event)
            unwritten.popleft()
        return False

    # Marks

    def _name(self, event: LogEvent) -> None:
        """Write that the stream of an event is open, so that others notice if this process dies.

        Nobody needs the event itself. So nothing depends on it, and no error is told.
        """
        if not self._may_name or event.stream in self._ended:
            return
        try:
            spool = self.spool or self._new_folder()
            if not self._is_closed:
                spool.segments.name(event.stream, event.number, self._space.take)
        except Exception:
            self._may_name = False

    def open_stream(self, stream: Stream) -> None:
        """Note that a stream gets events, even if it has ended before."""
        self._ended.pop(stream, None)
        self._unmarked.pop(stream, None)
        if self.spool is not None:
            self.spool.segments.open_again(stream)

    def end_stream(self, stream: Stream, before: int) -> None:
        """Write behind the events of a stream, once they are on disk or need not be, that it has ended.

        Args:
            stream: The stream.
            before: The number below which its events are.
        """
        for ended in (self._ended, self._unmarked):
            # The numbers ascend.
            ended.pop(stream, None)
            ended[stream] = before
            if len(ended) > _MOST_ENDED:
                del ended[next(iter(ended))]
        self.write(inf if self._is_write_ahead else 0)

    def _write_marks(self) -> None:
        """Write the marks whose events are on disk, or acknowledged. No event makes room for a mark."""
        if not (self._unmarked or self._is_closed) or not self._may_mark:
            return
        spool = self.spool
        number = self.unwritten[0].number if self.unwritten else inf
        try:
            for stream, before in list(self._unmarked.items()):
                if before > number:
                    break
                if spool is not None:
                    spool.segments.end(stream, self._space.take)
                del self._unmarked[stream]
            if spool is not None and self._is_closed:
                spool.segments.mark_closed()
        except OSError:
            # As in `_append`.
            self._may_mark = False

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
            self.write(self.unwritten[most - 1].number + 1)

    def evict(self, last: int) -> tuple[float, float] | None:
        """Write the events up to number `last`, since memory has no room for them.

        Args:
            last: The number.

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
        return self.spool.segments.first if self.spool is not None else inf, before

    def _give_up(self, event: LogEvent) -> None:
        """Write an event no more. If it is in no queue either, it is lost."""
        self.only_in_memory = event.number
        for delivery in self._deliveries if self.is_away else ():
            delivery.lose(event)

    def _append(self, event: LogEvent) -> bool:
        """Write an event, shortened if no line can hold it. Returns whether the next one can be written, too."""
        # After an error the next attempt follows the next tick: a full disk must not delay each `emit`.
        if self.error is not None and not self._may_try:
            return False
        try:
            spool = self.spool or self._new_folder()
            try:
                spool.segments.append(event, self._has_room)
            except EventTooLongError:
                spool.segments.append(abridged(event, LINE_BYTES // 64), self._has_room)
            self.error = None
        except UnstorableEventError as error:
            # The event stays in memory only.
            self.unstorable, self.error = error, None
            self._give_up(event)
        except Exception as error:
            self._failed(error)
        return self.error is None

    def _failed(self, error: Exception) -> None:
        self.error = error
        # The error itself does not tell whether the folder is still there.
        is_gone = self.spool is not None and self.spool.standing() is Standing.GONE
        self._may_try = is_gone
        if is_gone:
            self.abandon_folder()

    def try_again(self) -> None:
        """Try to write the next event or mark, even if the last attempt failed."""
        self._may_try = self._may_mark = True

    # The folder

    def maintain(self) -> None:
        """Close and remove segments, and allocate the next one. Needs no lock: the disk may take long for it."""
        spool = self.spool
        if spool is None:
            return
        spool.segments.tidy()
        if spool.segments.needs_spare and self._clock.now() >= self._no_spare_until:
            with contextlib.suppress(OSError):
                if (self._space.is_known or self._space.look()) and self._space.take(segments.SEGMENT_BYTES):
                    spool.segments.prepare()
                    return
            # An event that needs a segment makes room for one, or reports that there is none.
            self._no_spare_until = self._clock.now() + _NO_SPARE_SECONDS

    @property
    def is_needed(self) -> bool:
        """Whether some child has yet to acknowledge events that are or may be in the folder."""
        return self.spool is not None and any(delivery.oldest < inf for delivery in self._deliveries)

    @property
    def needs_room(self) -> bool:
        """Whether the log store had more bytes on disk than it may have, at the last look. Needs no lock."""
        return self._space.is_exceeded

    def make_room(self) -> None:
        """Drop the oldest events if the log store has more bytes on disk than it may have."""
        with contextlib.suppress(OSError):
            self._has_room(0)
        # If that was not enough, the next look finds it out.
        self._space.is_exceeded = False

    def standing(self) -> Standing:
        """Return whether the folder is in place, with all files that belong to it. Needs no lock."""
        spool = self.spool
        return Standing.IN_PLACE if spool is None else spool.standing()

    def mend(self, standing: Standing) -> None:
        """Write missing files again, or begin a new folder if this one is gone.

        Args:
            standing: The result of `standing`, other than `IN_PLACE`.
        """
        if self.spool is None:
            return
        is_ours = standing is Standing.CHANGED
        # After an error the next look leads here again.
        with contextlib.suppress(OSError):
            is_ours = is_ours and self.spool.mend(self._between)
        if not is_ours:
            self.abandon_folder()

    def _in_memory(self) -> dict[int, LogEvent]:
        """Return the events in memory that some child has not acknowledged, by their numbers."""
        found: dict[int, LogEvent] = {}
        # Thinned children first, so that the events of the others replace theirs: a thinned update has another level.
        for delivery in sorted(self._deliveries, key=lambda delivery: not delivery.progress_bars.is_thinned):
            found.update((event.number, event) for event in delivery.in_memory())
        return found

    def _between(self, first: int, last: float) -> list[LogEvent]:
        return [event for number, event in sorted(self._in_memory().items()) if first <= number <= last]

    def abandon_folder(self) -> None:
        """Release a folder that is gone. Those of its events that are in memory are written to a new folder."""
        if self.spool is None:
            return
        spool, self.spool = self.spool, None
        held = self._in_memory()
        held.update((event.number, event) for event in spool.reader.in_use())
        # Whoever has it now must not take this process for dead.
        spool.segments.mark_closed()
        spool.abandon()
        before = self.unwritten[0].number if self.unwritten else inf
        if self.is_away:
            # The agent has delivered some of them.
            first = min(delivery.taken for delivery in self._deliveries) + 1
            held = {number: event for number, event in held.items() if number >= first}
        again = [held[number] for number in sorted(held, reverse=True) if number < before]
        self.unwritten.extendleft(again)
        for delivery in self._deliveries if self.is_away else ():
            left = sum(event.number > delivery.taken and delivery.wants(event) is not None for event in self.unwritten)
            delivery.drop_spooled(delivery.pending - left, delivery.taken)
        if again:
            self.schedule.demand(again[0].number + 1)

    def refresh(self) -> None:
        """Write those streams again whose attributes ZenML has added to since."""
        if self.spool is not None and self.error is None:
            try:
                self.spool.segments.refresh(self._has_room)
            except OSError as error:
                self._failed(error)

    def acknowledge(self, delivery: Delivery) -> None:
        """Note how far a child is, beyond the events on disk too: another child may yet cause those to be written.

        Args:
            delivery: The child's delivery.
        """
        if self.spool is not None and self.spool.delivers_here:
            newest = self.unwritten[-1].number if self.unwritten else self.spool.segments.last
            try:
                self.spool.acknowledge(delivery.name, min(delivery.oldest, max(newest, self.spool.segments.last) + 1))
            except OSError as error:
                self._failed(error)

    def acknowledge_all(self) -> None:
        """Note how far all children are, including those for which no event was meant."""
        for delivery in self._deliveries:
            self.acknowledge(delivery)

    def write_rest(self) -> None:
        """Write all events that some child needs, for the next process. Later events are written at once."""
        self._is_closed = True
        self.try_again()
        self.write()
        self.most_unwritten = 0
        if not self.is_away:
            self.acknowledge_all()
        if not self.is_needed:
            self.release()

    def release(self) -> None:
        """Release the folder, for the next process or another writer of this one."""
        self._is_closed = True
        self.write(0)
        spool, self.spool = self.spool, None
        if spool is not None:
            spool.close()

    def _new_folder(self) -> Spool:
        names = [delivery.name for delivery in self._deliveries]
        process = Process(socket.gethostname(), os.getpid(), rank(), self._is_write_ahead, has_joined())
        is_shared = self.settings.is_shared
        spool = self.spool = Spool.create(
            self.settings.component, self._writer, names, is_shared=is_shared, process=process
        )
        # One of these is killed by its parent in the ordinary course.
        self._is_closed = self._is_closed or is_daemonic()
        self._unmarked = dict(self._ended)
        self.acknowledge_all()
        self._write_marks()
        if self.is_away:
            spool.give_delivery()
        return spool

    def _has_room(self, size: int) -> bool:
        """Say whether the spool may grow by a number of bytes, if need be after the oldest events were dropped."""
        while not self._space.take(size):
            if not any(part.drop_oldest() for part in (*self.others, self)):
                return False
        return True

    def drop_oldest(self) -> bool:
        """See `MakesRoom`."""
        # With `write_ahead` an event that would not survive the process must not count as pending.
        return self.spool is not None and drop_oldest_segment(self.spool, self._deliveries, self._is_write_ahead)
