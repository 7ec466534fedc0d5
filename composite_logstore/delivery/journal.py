"""The one ordered sequence of a writer's events: it numbers each and hands it to every child."""

from __future__ import annotations

import secrets
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, groupby, repeat, starmap
from math import inf
from operator import attrgetter
from typing import Any

from composite_logstore.capture.record import Note, numbered
from composite_logstore.clock import Clock
from composite_logstore.config import QUEUE_BYTES, ChildConfig
from composite_logstore.delivery.delivery import Delivery
from composite_logstore.delivery.memory import Held, Memory, batch_bytes
from composite_logstore.delivery.spilling import Spilling, next_batch
from composite_logstore.delivery.states import Load
from composite_logstore.event import EVENT_BYTES, LogEvent, Stream
from composite_logstore.spool.reader import ForwardReader
from composite_logstore.spool.settings import SpoolSettings

MOST_CAPTURED = 512
"""How many records may wait for their number. The last of them waits for it: less than a millisecond. So does one that
is large: together they have an eighth of the bytes at most that may wait in memory."""

_append: Callable[[Any, Any], None] = deque.append
_extend: Callable[[Any, Any], None] = deque.extend
_popleft: Callable[[Any], Any] = deque.popleft
_kind_of = attrgetter("level", "progress")

# Runs an iterator to its end inside one C call. Python delivers a Ctrl-C between bytecodes only, so what
# is done this way is done wholly or not at all.
_run: Callable[[Iterable[Any]], None] = deque(maxlen=0).extend


def _size_of(said: tuple[Stream, Note | LogEvent]) -> int:
    """Return roughly how many bytes the event takes that this becomes."""
    one = said[1]
    size: int = one.size if isinstance(one, LogEvent) else EVENT_BYTES + one[-1]
    return size


class _Route:
    """Where the events of one kind go, and how many have gone there.

    Attributes:
        children: The names of the children that get each of them.
        queues: The queues of these children, and what is to go to disk.
        latest: The deliveries that take each by itself, with what counts the progress bars' updates that each of them
            wants the latest of.
        held: What counts them in memory, None where nobody wants them as they are.
        count: How many there were.
    """

    __slots__ = ("children", "count", "held", "latest", "queues")

    def __init__(
        self,
        wanted_by: list[Delivery],
        latest: list[tuple[Delivery, Held]],
        held: Held | None = None,
        unwritten: deque[LogEvent] | None = None,
    ) -> None:
        self.children = frozenset(delivery.name for delivery in wanted_by)
        queues = [delivery.queue for delivery in wanted_by]
        # What nobody wants need not go to disk.
        self.queues = (*queues, unwritten) if unwritten is not None and (queues or latest) else tuple(queues)
        self.latest = tuple(latest)
        self.held = held
        self.count: deque[int] = deque([0], maxlen=1)


class Journal:
    """The journal of one writer, and the deliveries that it feeds.

    Attributes:
        writer: The writer's name, 15 hexadecimal digits at random.
        batch_bytes: Roughly how many bytes of events one export may have.
        lock: Guards the journal and its deliveries. Held for moments, never across I/O. It is
            reentrant since a signal handler or a finalizer may log at any point.
        progress: Notified, under the lock, whenever a delivery has got on.
        wakes_wanted: How often the workers were to be woken.
        wakes_done: How many of these times they have been. A Ctrl-C may come in between.
    """

    def __init__(
        self,
        children: Sequence[ChildConfig],
        clock: Clock | None = None,
        spool: SpoolSettings | None = None,
        most_bytes: int = QUEUE_BYTES,
    ) -> None:
        """Begin with number 0.

        Args:
            children: The enabled children.
            clock: Where time and chance come from; the real ones if not given.
            spool: How events go to disk; they wait in memory alone if not given.
            most_bytes: How many bytes of events may wait in memory.
        """
        clock = clock or Clock()
        self.writer = secrets.token_hex(8)[:15]
        self.lock = threading.RLock()
        self.progress = clock.condition(self.lock)
        self._children = children
        # By level: the routes of ordinary events, and those of progress bars' updates.
        self._routes: dict[int, _Route] = {}
        self._update_routes: dict[int, _Route] = {}
        # What has no number yet. It is added to without the lock.
        self._captured: deque[tuple[Stream, Note | LogEvent]] = deque()
        self._last: deque[LogEvent] = deque(maxlen=1)
        self.batch_bytes = batch_bytes(most_bytes, len(children))
        self._deliveries = [self._delivery(child, clock.random(child.name), spool is not None) for child in children]
        # The rest is for what has no number yet.
        self._large = most_bytes // (8 * MOST_CAPTURED)
        self._memory = Memory(most_bytes - MOST_CAPTURED * self._large, self._deliveries)
        self._is_batch_full = False
        self._is_making_room = False
        self.spilling = spool and Spilling(spool, self.writer, self._deliveries, clock)
        # Without a spool nothing is ever added to it.
        self._unwritten: deque[LogEvent] = self.spilling.unwritten if self.spilling else deque()
        self._cursors: dict[str, ForwardReader] = {}
        self._wake_at: float = 0
        # When so many records wait for their number, they get it at once.
        self._most_captured: float = 0
        self.wakes_wanted = 0
        self.wakes_done = 0

    def _delivery(self, child: ChildConfig, rand: Callable[[], float], spooled: bool) -> Delivery:
        def accepted() -> int:
            routes = (*self._routes.values(), *self._update_routes.values())
            return (
                sum(route.count[0] for route in routes if child.name in route.children)
                + delivery.progress_bars.accepted
            )

        delivery = Delivery(child, accepted, rand, spooled, batch_bytes=self.batch_bytes)
        return delivery

    @property
    def deliveries(self) -> list[Delivery]:
        """The delivery of each enabled child, with what was captured up to now."""
        self.hand_out()
        return self._deliveries

    @property
    def next_number(self) -> int:
        """The number that the next event will have, after what was captured up to now."""
        self.hand_out()
        return self._next_number

    @property
    def _next_number(self) -> int:
        return self._last[0].number + 1 if self._last else 0

    def append(self, stream: Stream, said: Note | LogEvent) -> bool:
        """Take an event in. It is numbered and handed out by whoever is next: the pipeline does not wait for that.

        Args:
            stream: The stream that it belongs to.
            said: What the record says.

        Returns:
            Whether the workers should be woken: one of them waits for this event.
        """
        if not self._most_captured:
            self._append_now(stream, said)
        else:
            self._captured.append((stream, said))
            size = said.size if isinstance(said, LogEvent) else said[-1]
            if size > self._large or len(self._captured) >= self._most_captured:
                self.hand_out()
        return self.wakes_wanted > self.wakes_done

    def _append_now(self, stream: Stream, said: Note | LogEvent) -> None:
        """Do with one event what `hand_out` does with many, in less time."""
        last, before = self._last, stream.last
        with self.lock:
            self._hand_out()
            while True:
                newest = last[0] if last else None
                number = newest.number + 1 if newest else 0
                sequence = before[0] + 1 if before else 0
                event = numbered(said, stream, self.writer, number, sequence)
                route = self._route(event.level, event.progress)
                queues = (last, *route.queues, before, route.count)
                items = (*(event,) * (len(queues) - 2), sequence, route.count[0] + 1)
                step = map(_append, queues, items)
                # If not, a signal handler has logged meanwhile.
                if (last[0] if last else None) is newest:
                    break
            _run(step)
            self._hold(route, [event], [event.size])
            if self._unwritten and self.spilling:
                self.spilling.write_through()
            if self._memory.is_full:
                self._make_room()
            if number >= self._wake_at or self._is_batch_full:
                self.wakes_wanted += 1
                self._wake_at = inf
                self._is_batch_full = False
            if not self.spilling or self.spilling.most_unwritten:
                self._look_ahead(number + 1)

    def hand_out(self) -> None:
        """Number what was captured, and put a reference to it into the queue of every child that wants it."""
        with self.lock:
            self._hand_out()
            if self._memory.is_full:
                self._make_room()
            if self._next_number > self._wake_at or self._is_batch_full:
                self.wakes_wanted += 1
                self._wake_at = inf
                self._is_batch_full = False
            if self.spilling:
                self.spilling.hurry(self._next_number)
            self._look_ahead(self._next_number)

    def _hand_out(self) -> None:
        while self._captured:
            # In this order: what has a number by now is no longer among what was captured.
            last = self._last[0] if self._last else None
            if self._has_handed_out(list(self._captured), last):
                break

    def _has_handed_out(self, said: list[tuple[Stream, Note | LogEvent]], last: LogEvent | None) -> bool:
        events = self._numbered(said, last.number + 1 if last else 0)
        for run in (events,) if len(events) == 1 else [list(run) for _, run in groupby(events, _kind_of)]:
            newest = run[-1]
            route = self._route(newest.level, newest.progress)
            # Their order is that of importance: whoever comes in between must not number the same event again.
            appends = [(self._last, newest), (route.count, route.count[0] + len(run))]
            appends += [(stream.last, sequence) for stream, sequence in {e.stream: e.sequence for e in run}.items()]
            step = chain(
                starmap(_append, appends),
                map(_popleft, repeat(self._captured, len(run))),
                map(_extend, route.queues, repeat(run)),
            )
            if (self._last[0] if self._last else None) is not last:
                # A signal handler has logged meanwhile, and has handed out what was captured before.
                return False
            _run(step)
            last = newest
            place = run[0].number - events[0].number
            self._hold(route, run, list(map(_size_of, said[place : place + len(run)])))
            if self.spilling and len(self._unwritten) > self.spilling.most_unwritten:
                self.spilling.write_through()
        return True

    def _hold(self, route: _Route, events: list[LogEvent], sizes: list[int]) -> None:
        """Count events in memory, and have those children take them that take each by itself."""
        for delivery, held in route.latest:
            for event in events:
                # As long as another may take its place an update is not counted.
                before = delivery.progress_bars.append(event)
                if before:
                    held.add([before], [before.size])
        if route.held:
            self._is_batch_full |= route.held.add(events, sizes)

    def _make_room(self) -> None:
        """Have the oldest events leave memory if they have too many bytes: for the disk, where it takes them."""
        if self._is_making_room:
            # A signal handler has logged.
            return
        self._is_making_room = True
        try:
            memory = self._memory
            memory.release(self._first_unwritten)
            # A little more than must be, so that it is not to be done again with the next event.
            most = memory.most - memory.interval_bytes
            for last in memory.oldest_first(self._first_unwritten) if memory.is_full else ():
                if memory.size <= most:
                    break
                if not self.spilling and last >= self._next_number - 1:
                    # The newest one is kept, however large it is.
                    break
                on_disk = self.spilling.evict(last) if self.spilling else (inf, inf)
                if on_disk is None:
                    break
                for delivery in self._deliveries:
                    delivery.free_queue(last, on_disk)
                memory.release(self._first_unwritten)
        finally:
            self._is_making_room = False

    @property
    def _first_unwritten(self) -> float:
        return self._unwritten[0].number if self._unwritten else inf

    def _numbered(self, said: list[tuple[Stream, Note | LogEvent]], number: int) -> list[LogEvent]:
        writer = self.writer
        sequences: dict[Stream, int] = {}
        events = []
        for stream, one in said:
            sequence = sequences.get(stream)
            if sequence is None:
                sequence = stream.last[0] + 1 if stream.last else 0
            sequences[stream] = sequence + 1
            events.append(numbered(one, stream, writer, number, sequence))
            number += 1
        return events

    def _look_ahead(self, number: int) -> None:
        if self.spilling and not self.spilling.most_unwritten:
            # Each event is to be on disk before `append` returns.
            self._most_captured = 0
        else:
            self._most_captured = min(MOST_CAPTURED, self._wake_at - number + 1)
            if self.spilling:
                # What goes to disk for want of room in memory goes there with this very event.
                self._most_captured = min(self._most_captured, self.spilling.room)

    def drop(self, level: int, progress: bool = False, count: int = 1, stream: Stream | None = None) -> None:
        """Count events that were lost before they had a number as dropped, for every child that wanted them.

        Args:
            level: Their level.
            progress: Whether they were a progress bar's updates.
            count: How many there were.
            stream: Their stream, if that is known: no event gets their sequence numbers, so a page shows the gap.
        """
        with self.lock:
            self._hand_out()
            if stream is not None:
                stream.last.append((stream.last[0] if stream.last else -1) + count)
            route = self._route(level, progress)
            # What was accepted, and is neither settled nor in a queue, counts as dropped.
            route.count.append(route.count[0] + count)
            for delivery, _ in route.latest:
                delivery.progress_bars.accepted += count
            wanted_by = route.children.union(delivery.name for delivery, _ in route.latest)
            for delivery in self._deliveries:
                if delivery.name in wanted_by:
                    delivery.lost_in_forks += count

    def _route(self, level: int, progress: bool) -> _Route:
        routes = self._update_routes if progress else self._routes
        return routes.get(level) or routes.setdefault(level, self._new_route(level, progress))

    def _new_route(self, level: int, progress: bool) -> _Route:
        wanted_by: list[Delivery] = []
        latest: list[tuple[Delivery, Held]] = []
        holders: list[Delivery] = []
        for child, delivery in zip(self._children, self._deliveries, strict=True):
            thinned = progress and child.is_thinned
            # With a spool it has to note which updates give way, so it takes every event by itself.
            by_itself = thinned or (child.is_thinned and self.spilling is not None)
            if child.wants(level, progress):
                if by_itself:
                    latest.append((delivery, self._memory.held_by([delivery])))
                else:
                    wanted_by.append(delivery)
                if not thinned:
                    holders.append(delivery)
        held = self._memory.held_by(holders) if holders else None
        return _Route(wanted_by, latest, held, self.spilling.unwritten if self.spilling else None)

    def wake_after(self, events: int) -> bool:
        """Have `append` ask for the workers once so many events more are there, if not before.

        Returns:
            Whether there are events that the caller has not seen: it looks again instead of sleeping.
        """
        seen = self._next_number
        self.hand_out()
        self._wake_at = min(self._wake_at, self._next_number + events - 1)
        self._look_ahead(self._next_number)
        # What came before the last line does not wake anybody.
        return self._next_number > seen or bool(self._captured)

    def load(self, delivery: Delivery, load: Load) -> list[LogEvent]:
        """Read what a delivery asks for from the spool. Not under the lock, since it is I/O."""
        with self.lock:
            spool = self.spilling and self.spilling.spool
            before = delivery.queue[0].number if delivery.queue else self._next_number
        if not spool:
            return []
        cursor = self._cursors.get(delivery.name)
        if cursor is None or cursor.reader is not spool.reader:
            cursor = self._cursors[delivery.name] = ForwardReader(spool.reader)
        return next_batch(cursor, delivery, load, before)

    def acknowledge(self, delivery: Delivery) -> None:
        """Note on disk how far a delivery is. Under the lock."""
        if self.spilling:
            self.spilling.acknowledge(delivery)

    def end_stream(self, stream: Stream) -> None:
        """Announce to every child that the stream has ended."""
        with self.lock:
            for delivery in self.deliveries:
                delivery.end_stream(stream, self._next_number)
