"""When events go to disk, and what becomes of those that find no room there."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Sequence
from math import inf

from composite_logstore.clock import Clock
from composite_logstore.delivery.delivery import Delivery
from composite_logstore.delivery.space import GivesUp, Space, give_up_oldest
from composite_logstore.delivery.states import Load
from composite_logstore.event import LogEvent, abridged
from composite_logstore.spool import segments
from composite_logstore.spool.folder import Spool, Standing
from composite_logstore.spool.format import LINE_BYTES, EventTooLongError, UnstorableEventError
from composite_logstore.spool.reader import ForwardReader
from composite_logstore.spool.settings import SpoolSettings

TICK_SECONDS = 0.1
_TICKS = 8
"""With `spill` an event that is as old as so many ticks goes to disk, unless all children have it: so it is there
within a second. Its age is measured, since a tick may take longer."""
_STEPS = 2
_STEPS_TO_FOLDER = 30
"""How many steps it may take to bring an event to disk, each of them as long as a tick comes late; with a folder, and
without one. Events go to disk so much earlier."""
_LEAST_SECONDS = 0.1
"""How old an event has to be in any case."""
_LATE_SECONDS = 0.9
"""If one that is so old is not on disk, whoever hands out events brings it there."""
_SHORTEST_SECONDS = 0.005
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


class Ages:
    """How old the events are that wait, at most. It has no clock.

    The time of each event is not known, as `emit` is not to pay for that. What is known is which number the next event
    had at some times: an event is no older than the last of these times at which it was yet to come.
    """

    def __init__(self) -> None:
        """Begin with nothing that waits."""
        # Times, and the number that was yet to come then. Infinity stands for the time at which it will come.
        self._known: deque[tuple[float, int]] = deque([(inf, 0)])
        self.due = 0

    def rest(self, next_number: int) -> None:
        """Note that nothing waits: nothing is known of the time until `woken`, or an event comes.

        Args:
            next_number: The number that the next event will have.
        """
        self._known = deque([(inf, next_number)])

    def woken(self, now: float) -> None:
        """Note that the first event has just come. Needs no lock.

        Args:
            now: The time in seconds.
        """
        known = self._known
        if known[0][0] == inf:
            known[0] = now, known[0][1]

    def note(self, next_number: int, now: float) -> None:
        """Note which events have come by now.

        Args:
            next_number: The number that the next event will have.
            now: The time in seconds.
        """
        if next_number > self._known[0][1]:
            self.woken(now)
        if now - self._known[-1][0] >= TICK_SECONDS / 2:
            self._known.append((now, next_number))

    def older_than(self, seconds: float, next_number: int, now: float) -> int:
        """Return the number below which all may be so old.

        Args:
            seconds: How old.
            next_number: The number that the next event will have.
            now: The time in seconds.
        """
        while self._known[0][0] <= now - seconds:
            self._known.popleft()
            if not self._known:
                self._known.append((now, next_number))
            self.due = self._known[0][1]
        return self.due

    def oldest(self, now: float) -> float:
        """Return how old the oldest may be that is not older than was asked for last, in seconds.

        Args:
            now: The time in seconds.
        """
        return now - self._known[0][0]


class Spooling:
    """Brings a journal's events to disk, as `durability` says. The journal's lock guards every call.

    Attributes:
        unspooled: The events that are not on disk. The journal appends to it.
        most_unspooled: How many there may be at any time.
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
        self.unspooled: deque[LogEvent] = deque()
        smallest = min((delivery.queue.maxlen or 1 for delivery in deliveries), default=1)
        self.most_unspooled = 0 if settings.write_ahead else smallest - 1
        self._most_waiting = smallest - 1
        self._is_write_ahead = settings.write_ahead
        self._may_try = True
        self._is_writing = False
        self.spool: Spool | None = None
        self.error: Exception | None = None
        self.unstorable: Exception | None = None
        self.others: Sequence[GivesUp] = ()
        self._deliveries = deliveries
        self._component = settings.component
        self._writer = writer
        self._clock = clock
        self._space = Space(settings.component, settings.max_bytes, clock)
        self._no_spare_until = -inf
        self._ages = Ages()
        self._due = 0
        self._next_tick = inf
        self._lateness = 0.0

    # What is due

    def woken(self) -> None:
        """Note that the first event since a `rest` has come. Without the lock."""
        self._ages.woken(self._clock.now())

    def rest(self, next_number: int) -> None:
        """Note that nothing waits.

        Args:
            next_number: The number that the next event will have.
        """
        self._ages.rest(next_number)
        self._next_tick = inf

    def hurry(self, next_number: int) -> None:
        """Bring events to disk that should be there, should the keeper be late.

        Args:
            next_number: The number that the next event will have.
        """
        if self.unspooled and self._ages.oldest(self._clock.now()) >= _LATE_SECONDS:
            self.tick(next_number)
            self.write(self._due, _MOST_WHEN_LATE)

    def tick(self, next_number: int) -> float:
        """Find out which events have waited in memory long enough.

        Args:
            next_number: The number that the next event will have.

        Returns:
            After how many seconds to do so again.
        """
        now = self._clock.now()
        late = max(0.0, now - self._next_tick)
        self._lateness = max(late, 0.99 * self._lateness)
        # As late as one tick came the next may come, and each step that gives up the interpreter lock takes as long.
        steps = _STEPS if self.spool is not None else _STEPS_TO_FOLDER
        seconds = max(_LEAST_SECONDS, _TICKS * TICK_SECONDS - steps * self._lateness)
        self._ages.note(next_number, now)
        self._due = max(self._due, self._ages.older_than(seconds, next_number, now))
        wait = min(max(_SHORTEST_SECONDS, seconds - self._ages.oldest(now)), TICK_SECONDS)
        self._next_tick = now + wait
        return wait

    def write_due(self) -> bool:
        """Bring a few of the events that are due to disk.

        Returns:
            Whether there are more.
        """
        # With `write_ahead` what waits has been due since it came.
        return self.write(inf if self._is_write_ahead else self._due, _MOST_AT_ONCE)

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
        while self.unspooled and self.unspooled[0].number < before:
            if written >= most:
                return True
            if self.unspooled[0].number >= settled:
                spool = self.spool
                if not self._append(self.unspooled[0]):
                    if spool is not None and self.spool is None:
                        # The folder was gone. What was in it comes first now, in a new one.
                        continue
                    # As long as the queues have them all, there may yet be room for them.
                    while len(self.unspooled) > self._most_waiting:
                        self.unspooled.popleft()
                    break
                written += 1
            self.unspooled.popleft()
        return False

    @property
    def room(self) -> int:
        """How many more events can come before those in memory go to disk."""
        return self.most_unspooled + 1 - len(self.unspooled)

    def write_through(self) -> None:
        """Bring to disk what finds no room in memory, always as many events as it has room for and one more.

        So the events and the time alone say what is on disk when the process is killed, and not how many of them are
        handed out at a time, which the workers of other children have a part in.
        """
        full = self.most_unspooled + 1
        most = len(self.unspooled) // full * full
        if not most:
            return
        before = self.unspooled[most - 1].number + 1
        if most == 1 and self.error is None and self.spool is not None and not self._is_writing:
            self._is_writing = True
            try:
                self._store(self.spool, self.unspooled[0])
                self.unspooled.popleft()
            except Exception as error:
                self._failed(error)
            finally:
                self._is_writing = False
        if self.unspooled:
            self.write(before)

    def make_way(self, last: int) -> tuple[float, float] | None:
        """Bring the events up to number `last` to disk, since they cannot stay in memory.

        Returns:
            The numbers from which on and below which they are on disk: the others find no room there. None if that
            cannot be done now.
        """
        if self._is_writing:
            # A signal handler has logged, and what it interrupts goes on with its event.
            return None
        self.write(last + 1)
        before = self.unspooled[0].number if self.unspooled else inf
        while self.unspooled and self.unspooled[0].number <= last:
            self.unspooled.popleft()
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
            self.give_up_folder()

    def try_again(self) -> None:
        """Let the next event find out whether there is room again."""
        self._may_try = True

    # The folder

    def keep_house(self) -> None:
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
            self.give_up_folder()

    def _in_memory(self) -> dict[int, LogEvent]:
        """Return the events that some child has yet to deliver, by their numbers, as far as they are in memory."""
        found: dict[int, LogEvent] = {}
        # A child that wants a progress bar's latest update alone has it at another level.
        for delivery in sorted(self._deliveries, key=lambda delivery: not delivery.progress_bars.is_thinned):
            found.update((event.number, event) for event in delivery.in_memory())
        return found

    def _between(self, first: int, last: float) -> list[LogEvent]:
        return [event for number, event in sorted(self._in_memory().items()) if first <= number <= last]

    def give_up_folder(self) -> None:
        """Let go of a folder that others have taken away. What was in it, and is in memory, goes to a new one."""
        if self.spool is None:
            return
        spool, self.spool = self.spool, None
        held = self._in_memory()
        held.update((event.number, event) for event in spool.reader.in_use())
        spool.abandon()
        before = self.unspooled[0].number if self.unspooled else inf
        again = [held[number] for number in sorted(held, reverse=True) if number < before]
        self.unspooled.extendleft(again)
        if again:
            self._due = max(self._due, again[0].number + 1)

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
            newest = self.unspooled[-1].number if self.unspooled else self.spool.segments.last
            try:
                self.spool.acknowledge(delivery.name, min(delivery.oldest, max(newest, self.spool.segments.last) + 1))
            except OSError as error:
                self._failed(error)

    def acknowledge_all(self) -> None:
        """Note how far all children are, also those for which nothing has come that they could settle."""
        for delivery in self._deliveries:
            self.acknowledge(delivery)

    def settle_down(self) -> None:
        """Bring to disk what is not delivered, for the next process. What comes now goes there at once."""
        self.try_again()
        self.write()
        self.most_unspooled = 0
        self.acknowledge_all()
        if self.spool is not None and all(delivery.oldest == inf for delivery in self._deliveries):
            self.spool.close()
            self.spool = None

    def let_go(self) -> None:
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
            if not any(part.give_up_oldest() for part in (*self.others, self)):
                return False
        return True

    def give_up_oldest(self) -> bool:
        """See `GivesUp`."""
        # With `write_ahead` nothing may count as pending that would not survive the process.
        return self.spool is not None and give_up_oldest(self.spool, self._deliveries, self._is_write_ahead)
