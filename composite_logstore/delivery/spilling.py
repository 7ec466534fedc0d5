"""When events go to disk, and what becomes of those that find no room there."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Sequence
from math import inf

from composite_logstore.clock import Clock
from composite_logstore.delivery.delivery import Delivery
from composite_logstore.delivery.schedule import Schedule
from composite_logstore.delivery.space import MakesRoom, Space, drop_oldest_segment
from composite_logstore.delivery.states import Load
from composite_logstore.event import LogEvent, abridged
from composite_logstore.spool import segments
from composite_logstore.spool.folder import Spool, Standing
from composite_logstore.spool.format import LINE_BYTES, EventTooLongError, UnstorableEventError
from composite_logstore.spool.reader import ForwardReader
from composite_logstore.spool.settings import SpoolSettings

_MOST_AT_ONCE = 200
"""How many events the keeper brings to disk under the journal's lock at a time: `emit` waits no longer."""
_MOST_WHEN_LATE = 2_000
"""How many others do at a time: more than they hand out, so that what is late becomes less."""
_NO_SPARE_SECONDS = 1.0


def next_batch(cursor: ForwardReader, delivery: Delivery, load: Load, before: float = inf) -> list[LogEvent]:
    """Read the next events of a child: as many as it asks for, and no more bytes than one export may have."""
    batch: list[LogEvent] = []
    size = 0
    for event in cursor.read(load.after, before):
        wanted = delivery.wants(event)
        if wanted is not None:
            batch.append(wanted)
            size += wanted.size
            if len(batch) == load.events or size > delivery.batch_bytes:
                break
    return batch


class Spilling:
    """Brings a journal's events to disk, as `durability` says. The journal's lock guards every call.

    Attributes:
        unwritten: The events that are not on disk. The journal appends to it.
        most_unwritten: How many there may be at any time.
        spool: The folder; None before there was something to write.
        error: Why events do not get to disk, None if they do.
        unstorable: Why an event cannot be written at all, None if that has not happened.
        others: What else of the log store's this process has on disk, oldest first.
    """

    def __init__(self, settings: SpoolSettings, writer: str, deliveries: Sequence[Delivery], clock: Clock):
        """Begin with nothing; no folder is made.

        Args:
            settings: Where and how.
            writer: The writer's name.
            deliveries: The deliveries that read from the spool.
            clock: Where time comes from.
        """
        self.unwritten: deque[LogEvent] = deque()
        smallest = min((delivery.queue.maxlen or 1 for delivery in deliveries), default=1)
        self.most_unwritten = 0 if settings.write_ahead else smallest - 1
        self._most_waiting = smallest - 1
        self._is_write_ahead = settings.write_ahead
        self._may_try = True
        self._is_writing = False
        self.spool: Spool | None = None
        self.error: Exception | None = None
        self.unstorable: Exception | None = None
        self.others: Sequence[MakesRoom] = ()
        self._deliveries = deliveries
        self._component = settings.component
        self._writer = writer
        self._clock = clock
        self._space = Space(settings.component, settings.max_bytes, clock)
        self._no_spare_until = -inf
        self._schedule = Schedule()

    # What is due

    def woken(self) -> None:
        """Note that the first event since a `rest` has just been logged. Needs no lock."""
        self._schedule.woken(self._clock.now())

    def rest(self, next_number: int) -> None:
        """Note that no event waits.

        Args:
            next_number: The number that the next event will have.
        """
        self._schedule.rest(next_number)

    def hurry(self, next_number: int) -> None:
        """Write events that should be on disk already, if the keeper is late.

        Args:
            next_number: The number that the next event will have.
        """
        if self.unwritten and self._schedule.is_late(self._clock.now()):
            self.tick(next_number)
            self.write(self._schedule.due, _MOST_WHEN_LATE)

    def tick(self, next_number: int) -> float:
        """Find out which events have waited in memory long enough.

        Args:
            next_number: The number that the next event will have.

        Returns:
            After how many seconds to do so again.
        """
        return self._schedule.tick(next_number, self._clock.now(), self.spool is not None)

    def write_due(self) -> bool:
        """Bring a few of the events that are due to disk.

        Returns:
            Whether there are more.
        """
        # With `write_ahead` what waits has been due since it came.
        return self.write(inf if self._is_write_ahead else self._schedule.due, _MOST_AT_ONCE)

    # To disk

    def write(self, before: float = inf, most: float = inf) -> bool:
        """Bring the events whose numbers are below `before` to disk, but for those that all children have.

        What finds no room waits in memory alone.

        Args:
            before: See above.
            most: How many events to bring to disk at most.

        Returns:
            Whether there are more of them.
        """
        if self._is_writing:
            # A signal handler has logged, and what it interrupts goes on with its event.
            return False
        self._is_writing = True
        try:
            return self._write(before, most)
        finally:
            self._is_writing = False

    def _write(self, before: float, most: float) -> bool:
        # With `write_ahead` it has just come, so nobody has it.
        settled = 0 if self._is_write_ahead else min(delivery.oldest for delivery in self._deliveries)
        written = 0
        while self.unwritten and self.unwritten[0].number < before:
            if written >= most:
                return True
            if self.unwritten[0].number >= settled:
                spool = self.spool
                if not self._append(self.unwritten[0]):
                    if spool is not None and self.spool is None:
                        # The folder was gone. What was in it comes first now, in a new one.
                        continue
                    # As long as the queues have them all, there may yet be room for them.
                    while len(self.unwritten) > self._most_waiting:
                        self.unwritten.popleft()
                    break
                written += 1
            self.unwritten.popleft()
        return False

    @property
    def room(self) -> int:
        """How many more events can come before those in memory go to disk."""
        return self.most_unwritten + 1 - len(self.unwritten)

    def write_through(self) -> None:
        """Bring to disk what finds no room in memory, always as many events as it has room for and one more.

        So the events and the time alone say what is on disk when the process is killed, and not how many of them are
        handed out at a time, which the workers of other children have a part in.
        """
        full = self.most_unwritten + 1
        most = len(self.unwritten) // full * full
        if not most:
            return
        before = self.unwritten[most - 1].number + 1
        if most == 1 and self.error is None and self.spool is not None and not self._is_writing:
            self._is_writing = True
            try:
                self._store(self.spool, self.unwritten[0])
                self.unwritten.popleft()
            except Exception as error:
                self._failed(error)
            finally:
                self._is_writing = False
        if self.unwritten:
            self.write(before)

    def evict(self, last: int) -> tuple[float, float] | None:
        """Bring the events up to number `last` to disk, since they cannot stay in memory.

        Returns:
            The numbers from which on and below which they are on disk: the others find no room there. None if that
            cannot be done now.
        """
        if self._is_writing:
            # A signal handler has logged, and what it interrupts goes on with its event.
            return None
        self.write(last + 1)
        before = self.unwritten[0].number if self.unwritten else inf
        while self.unwritten and self.unwritten[0].number <= last:
            self.unwritten.popleft()
        return self.spool.segments.first if self.spool is not None else inf, before

    def _append(self, event: LogEvent) -> bool:
        # After an error it is tried again at the next tick: a full disk must not cost `emit` time for each event.
        if self.error is not None and not self._may_try:
            return False
        try:
            self._store(self._folder(), event)
            self.error = None
        except Exception as error:
            self._failed(error)
        return self.error is None

    def _store(self, spool: Spool, event: LogEvent) -> None:
        """Write an event; what no line can hold, as much of it as one can. None holds up those behind it."""
        try:
            try:
                spool.segments.append(event, self._has_room)
            except EventTooLongError:
                spool.segments.append(abridged(event, LINE_BYTES // 64), self._has_room)
        except UnstorableEventError as error:
            # It waits in memory alone.
            self.unstorable = error

    def _failed(self, error: Exception) -> None:
        self.error = error
        # Whatever the error says: whether the folder is still there is a thing to be looked at.
        is_gone = self.spool is not None and self.spool.standing() is Standing.GONE
        self._may_try = is_gone
        if is_gone:
            self.abandon_folder()

    def try_again(self) -> None:
        """Let the next event find out whether there is room again."""
        self._may_try = True

    # The folder

    def maintain(self) -> None:
        """Do what would make others wait if it were done under the journal's lock: so without it."""
        spool = self.spool
        if spool is None:
            return
        spool.segments.tidy()
        if spool.segments.needs_spare and self._clock.now() >= self._no_spare_until:
            with contextlib.suppress(OSError):
                if (self._space.is_known or self._space.look()) and self._space.take(segments.SEGMENT_BYTES):
                    spool.segments.prepare()
                    return
            # The next event makes room, or says that there is none.
            self._no_spare_until = self._clock.now() + _NO_SPARE_SECONDS

    @property
    def is_needed(self) -> bool:
        """Whether events wait in the folder, or may wait there."""
        return self.spool is not None and any(delivery.oldest < inf for delivery in self._deliveries)

    @property
    def needs_room(self) -> bool:
        """Whether there is more on disk than there may be. Without the lock."""
        return self._space.is_exceeded

    def make_room(self) -> None:
        """Have the oldest make room, if there is more on disk than there may be."""
        with contextlib.suppress(OSError):
            self._has_room(0)
        # If that was not enough, the next look says so again.
        self._space.is_exceeded = False

    def standing(self) -> Standing:
        """Look whether others have taken away the folder, or something in it. Without the lock."""
        spool = self.spool
        return Standing.IN_PLACE if spool is None else spool.standing()

    def mend(self, standing: Standing) -> None:
        """Make again what others have taken away, so that what was on disk is there again.

        Args:
            standing: What `standing` has found.
        """
        if self.spool is None or standing is Standing.IN_PLACE:
            return
        is_ours = standing is Standing.CHANGED
        # What cannot be mended now may be at the next tick.
        with contextlib.suppress(OSError):
            is_ours = is_ours and self.spool.mend(self._between)
        if not is_ours:
            self.abandon_folder()

    def _in_memory(self) -> dict[int, LogEvent]:
        """Return the events that some child has yet to deliver, by their numbers, as far as they are in memory."""
        found: dict[int, LogEvent] = {}
        # A child that wants a progress bar's latest update alone has it at another level.
        for delivery in sorted(self._deliveries, key=lambda delivery: not delivery.progress_bars.is_thinned):
            found.update((event.number, event) for event in delivery.in_memory())
        return found

    def _between(self, first: int, last: float) -> list[LogEvent]:
        return [event for number, event in sorted(self._in_memory().items()) if first <= number <= last]

    def abandon_folder(self) -> None:
        """Let go of a folder that others have taken away. What was in it, and is in memory, goes to a new one."""
        if self.spool is None:
            return
        spool, self.spool = self.spool, None
        held = self._in_memory()
        held.update((event.number, event) for event in spool.reader.in_use())
        spool.abandon()
        before = self.unwritten[0].number if self.unwritten else inf
        again = [held[number] for number in sorted(held, reverse=True) if number < before]
        self.unwritten.extendleft(again)
        if again:
            self._schedule.hold(again[0].number + 1)

    def refresh(self) -> None:
        """Write the attributes of streams anew, if ZenML has added to them since."""
        if self.spool is not None and self.error is None:
            try:
                self.spool.segments.refresh(self._has_room)
            except OSError as error:
                self._failed(error)

    def acknowledge(self, delivery: Delivery) -> None:
        """Note how far a child is: also of what is not on disk, since it may yet come there for another child."""
        if self.spool is not None:
            newest = self.unwritten[-1].number if self.unwritten else self.spool.segments.last
            try:
                self.spool.acknowledge(delivery.name, min(delivery.oldest, max(newest, self.spool.segments.last) + 1))
            except OSError as error:
                self._failed(error)

    def acknowledge_all(self) -> None:
        """Note how far all children are, also those for which nothing has come that they could settle."""
        for delivery in self._deliveries:
            self.acknowledge(delivery)

    def write_rest(self) -> None:
        """Bring to disk what is not delivered, for the next process. What comes now goes there at once."""
        self.try_again()
        self.write()
        self.most_unwritten = 0
        self.acknowledge_all()
        if self.spool is not None and all(delivery.oldest == inf for delivery in self._deliveries):
            self.spool.close()
            self.spool = None

    def release(self) -> None:
        """Leave the folder to the next process, or to another writer of this one."""
        spool, self.spool = self.spool, None
        if spool is not None:
            spool.close()

    def _folder(self) -> Spool:
        if self.spool is None:
            names = [delivery.name for delivery in self._deliveries]
            self.spool = Spool.create(self._component, self._writer, names)
            self.acknowledge_all()
        return self.spool

    def _has_room(self, size: int) -> bool:
        """Say whether the spool may grow by so many bytes, after the oldest has made room where it can."""
        while not self._space.take(size):
            if not any(part.drop_oldest() for part in (*self.others, self)):
                return False
        return True

    def drop_oldest(self) -> bool:
        """See `MakesRoom`."""
        # With `write_ahead` nothing may count as pending that would not survive the process.
        return self.spool is not None and drop_oldest_segment(self.spool, self._deliveries, self._is_write_ahead)
