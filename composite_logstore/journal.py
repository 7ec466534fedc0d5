"""The one ordered sequence of a writer's events: it numbers each and hands it to every child."""

from __future__ import annotations

import logging
import secrets
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from math import inf
from typing import Any

from composite_logstore.clock import Clock
from composite_logstore.config import ChildConfig
from composite_logstore.delivery import Delivery, Load
from composite_logstore.event import Capture, LogEvent, Stream, numbered
from composite_logstore.spool import Cursor
from composite_logstore.spooling import Spooling, SpoolSettings, next_batch

_append: Callable[[Any, Any], None] = deque.append

# Runs an iterator to its end inside one C call. Python delivers a Ctrl-C between bytecodes only, so what
# is done this way is done wholly or not at all.
_run: Callable[[Iterable[Any]], None] = deque(maxlen=0).extend


class _Route:
    """Where the events of one kind go, and how many have gone there.

    Attributes:
        children: The names of the children that get each of them.
        queues: The queues of these children, and what is to go to disk.
        latest: The deliveries that only want the latest of them.
        count: How many there were.
    """

    __slots__ = ("children", "count", "latest", "queues")

    def __init__(
        self, wanted_by: list[Delivery], latest: list[Delivery], unspooled: deque[LogEvent] | None = None
    ) -> None:
        self.children = frozenset(delivery.name for delivery in wanted_by)
        queues = [delivery.queue for delivery in wanted_by]
        # What nobody wants need not go to disk.
        self.queues = (*queues, unspooled) if unspooled is not None and (queues or latest) else tuple(queues)
        self.latest = tuple(latest)
        self.count: deque[int] = deque([0], maxlen=1)


class Journal:
    """The journal of one writer, and the deliveries that it feeds.

    Attributes:
        writer: The writer's name, 15 hexadecimal digits at random.
        lock: Guards the journal and its deliveries. Held for moments, never across I/O. It is
            reentrant since a signal handler or a finalizer may log at any point.
        progress: Notified, under the lock, whenever a delivery has got on.
        deliveries: One for each enabled child.
        wakes_wanted: How often the workers were to be woken.
        wakes_done: How many of these times they have been. A Ctrl-C may come in between.
    """

    def __init__(
        self, children: Sequence[ChildConfig], clock: Clock | None = None, spool: SpoolSettings | None = None
    ) -> None:
        """Begin with number 0.

        Args:
            children: The enabled children.
            clock: Where time and chance come from; the real ones if not given.
            spool: How events go to disk; they wait in memory alone if not given.
        """
        clock = clock or Clock()
        self.writer = secrets.token_hex(8)[:15]
        self.lock = threading.RLock()
        self.progress = clock.condition(self.lock)
        self._children = children
        # By level: the routes of ordinary events, and those of progress bars' updates.
        self._routes: dict[int, _Route] = {}
        self._update_routes: dict[int, _Route] = {}
        self._last: deque[LogEvent] = deque(maxlen=1)
        self.deliveries = [self._delivery(child, clock.random(child.name), spool is not None) for child in children]
        self.spooling = spool and Spooling(spool, self.writer, self.deliveries)
        # Without a spool nothing is ever added to it.
        self._unspooled: deque[LogEvent] = self.spooling.unspooled if self.spooling else deque()
        self._cursors: dict[str, Cursor] = {}
        self._wake_at: float = 0
        self.wakes_wanted = 0
        self.wakes_done = 0

    def _delivery(self, child: ChildConfig, rand: Callable[[], float], spooled: bool) -> Delivery:
        def accepted() -> int:
            routes = (*self._routes.values(), *self._update_routes.values())
            return sum(route.count[0] for route in routes if child.name in route.children) + delivery.updates

        delivery = Delivery(child, accepted, rand, spooled)
        return delivery

    @property
    def next_number(self) -> int:
        """The number that the next event will have."""
        return self._last[0].number + 1 if self._last else 0

    def append(self, stream: Stream, capture: Capture) -> bool:
        """Number the event and put a reference to it into the queue of every child that wants it.

        Args:
            stream: The stream that it belongs to.
            capture: What the record says.

        Returns:
            Whether the workers should be woken: one of them waits for this event.
        """
        with self.lock:
            number = self.next_number
            sequence = stream.last[0].sequence + 1 if stream.last else 0
            event = numbered(capture, stream, self.writer, number, sequence)
            route = self._route(capture.level, capture.progress)
            _run(
                map(
                    _append,
                    (route.count, self._last, stream.last, *route.queues),
                    (route.count[0] + 1, *(event,) * (len(route.queues) + 2)),
                )
            )
            for delivery in route.latest:
                delivery.update(event)
            if self._unspooled and self.spooling and len(self._unspooled) > self.spooling.most_unspooled:
                self.spooling.write()
            if number >= self._wake_at:
                self.wakes_wanted += 1
                self._wake_at = inf
            return self.wakes_wanted > self.wakes_done

    def drop(self, level: int, progress: bool = False) -> None:
        """Count an event that was lost before it had a number as dropped, for every child that wanted it."""
        with self.lock:
            route = self._route(level, progress)
            # What was accepted, and is neither settled nor in a queue, counts as dropped.
            route.count.append(route.count[0] + 1)
            for delivery in route.latest:
                delivery.updates += 1

    def _route(self, level: int, progress: bool) -> _Route:
        routes = self._update_routes if progress else self._routes
        return routes.get(level) or routes.setdefault(level, self._new_route(level, progress))

    def _new_route(self, level: int, progress: bool) -> _Route:
        wanted_by: list[Delivery] = []
        latest: list[Delivery] = []
        for child, delivery in zip(self._children, self.deliveries, strict=True):
            thinned = progress and child.progress == "latest"
            # With a spool it has to note which updates give way, so it takes every event by itself.
            by_itself = thinned or (child.progress == "latest" and self.spooling is not None)
            if child.min_level is None or (logging.INFO if thinned else level) >= int(child.min_level.value):
                (latest if by_itself else wanted_by).append(delivery)
        return _Route(wanted_by, latest, self.spooling.unspooled if self.spooling else None)

    def wake_after(self, events: int) -> None:
        """Have `append` ask for the workers once so many events more are there, if not before."""
        self._wake_at = min(self._wake_at, self.next_number + events - 1)

    def load(self, delivery: Delivery, load: Load) -> list[LogEvent]:
        """Read what a delivery asks for from the spool. Not under the lock, since it is I/O."""
        with self.lock:
            spool = self.spooling and self.spooling.spool
            before = delivery.queue[0].number if delivery.queue else self.next_number
        if not spool:
            return []
        cursor = self._cursors.get(delivery.name)
        if cursor is None or cursor.spool is not spool:
            cursor = self._cursors[delivery.name] = Cursor(spool)
        return next_batch(cursor, delivery, load, before)

    def settled(self, delivery: Delivery) -> None:
        """Note on disk how far a delivery is. Under the lock."""
        if self.spooling:
            self.spooling.settled(delivery)

    def end_stream(self, stream: Stream) -> None:
        """Announce to every child that the stream has ended."""
        with self.lock:
            for delivery in self.deliveries:
                delivery.end_stream(stream, self.next_number)
