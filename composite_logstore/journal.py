"""The one ordered sequence of a writer's events: it numbers each and hands it to every child."""

from __future__ import annotations

import secrets
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from composite_logstore.config import ChildConfig
from composite_logstore.delivery import Delivery
from composite_logstore.event import Capture, LogEvent, Stream

_append: Callable[[Any, Any], None] = deque.append

# Runs an iterator to its end inside one C call. Python delivers a Ctrl-C between bytecodes only, so what
# is done this way is done wholly or not at all.
_run: Callable[[Iterable[Any]], None] = deque(maxlen=0).extend


class _Route:
    """Where the events of one level go, and how many have gone there."""

    __slots__ = ("count", "level", "queues")

    def __init__(self, level: int, queues: tuple[deque[LogEvent], ...]) -> None:
        self.level = level
        self.queues = queues
        self.count: deque[int] = deque([0], maxlen=1)


class Journal:
    """The journal of one writer, and the deliveries that it feeds.

    Attributes:
        writer: The writer's name, 15 hexadecimal digits at random.
        lock: Guards the journal and its deliveries. Held for moments, never across I/O. It is
            reentrant since a signal handler or a finalizer may log at any point.
        progress: Notified, under the lock, whenever a delivery has got on.
        deliveries: One for each enabled child.
    """

    def __init__(self, children: Sequence[ChildConfig]) -> None:
        """Begin with number 0.

        Args:
            children: The enabled children.
        """
        self.writer = secrets.token_hex(8)[:15]
        self.lock = threading.RLock()
        self.progress = threading.Condition(self.lock)
        self._min_levels: dict[str, int] = {}
        self._routes: dict[int, _Route] = {}
        self._last: deque[LogEvent] = deque(maxlen=1)
        self.deliveries = [self._delivery(child) for child in children]
        self._stride = min((child.batch_size for child in children), default=1)
        self._wake_at = 0

    def _delivery(self, child: ChildConfig) -> Delivery:
        min_level = int(child.min_level.value) if child.min_level is not None else 0
        self._min_levels[child.name] = min_level
        return Delivery(
            child, lambda: sum(route.count[0] for route in self._routes.values() if route.level >= min_level)
        )

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
            Whether the workers should be woken: one has nothing to do, or a batch may be full.
        """
        with self.lock:
            number = self.next_number
            sequence = stream.last[0].sequence + 1 if stream.last else 0
            event = LogEvent(stream, self.writer, number, sequence, *capture)
            route = self._routes.get(capture.level) or self._route(capture.level)
            _run(
                map(
                    _append,
                    (route.count, self._last, stream.last, *route.queues),
                    (route.count[0] + 1, *(event,) * (len(route.queues) + 2)),
                )
            )
            if number < self._wake_at:
                return False
            self._wake_at = number + self._stride
            return True

    def _route(self, level: int) -> _Route:
        queues = (delivery.queue for delivery in self.deliveries if level >= self._min_levels[delivery.name])
        return self._routes.setdefault(level, _Route(level, tuple(queues)))

    def wake_with_next(self) -> None:
        """Have `append` ask for the workers with the very next event."""
        self._wake_at = 0

    def end_stream(self, stream: Stream) -> None:
        """Announce to every child that the stream has ended."""
        with self.lock:
            for delivery in self.deliveries:
                delivery.end_stream(stream, self.next_number)
