"""How much room a log store's spool has, and how older events make room for newer ones."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from pathlib import Path
from typing import Protocol

from composite_logstore.clock import Clock
from composite_logstore.delivery.delivery import Delivery
from composite_logstore.spool import segments
from composite_logstore.spool.folder import Spool, bytes_used

_KNOWN_SECONDS = 5.0
_PARTS = 16


class MakesRoom(Protocol):
    """Something of the log store's on disk that can make room."""

    def drop_oldest(self) -> bool:
        """Have the children that are furthest behind lose what is oldest.

        Returns:
            Whether there was something that could go.
        """
        ...


def drop_oldest_segment(spool: Spool, deliveries: Sequence[Delivery], in_memory_too: bool = False) -> bool:
    """Free the oldest segment of a spool, and count what is lost with it. Under the lock that guards them.

    Args:
        spool: The spool.
        deliveries: The deliveries that read from it.
        in_memory_too: Whether what their queues have of it is to go as well.

    Returns:
        Whether there was one.
    """
    oldest = spool.segments.oldest()
    if oldest is None:
        return False
    for delivery in deliveries:
        if delivery.oldest <= oldest.last:
            taken = delivery.free_memory(oldest.last) if in_memory_too else 0
            lost = delivery.count_wanted(oldest.kinds, oldest.first, oldest.last)
            if lost is None:
                waiting = delivery.queue[0].number if delivery.queue else inf
                events = spool.reader.read(max(oldest.first - 1, delivery.taken), min(oldest.last + 1, waiting))
                lost = sum(delivery.wants(event) is not None for event in events)
            delivery.drop_spooled(taken + lost, int(oldest.last))
    for child in spool.children:
        # Also those that are no longer configured.
        if spool.acknowledged(child) <= oldest.last:
            spool.acknowledge(child, oldest.last + 1)
    spool.segments.tidy()
    return True


class Space:
    """How many bytes a log store has on this machine, all its processes together, and may have.

    To look at the folders of hundreds of processes takes time, and nobody is to wait for it under the journal's lock.
    So it is done now and then without it, and a process may then take a sixteenth of what is free: if 16 processes do
    so at once, there is room for all. Where little is free, each looks each time. The first segment may come before the
    first look.
    """

    def __init__(self, component: Path, max_bytes: int, clock: Clock) -> None:
        """Begin with nothing known.

        Args:
            component: The folder of the log store.
            max_bytes: How many bytes there may be.
            clock: Where time comes from.
        """
        self._component = component
        self._max_bytes = max_bytes
        self._clock = clock
        self._part = segments.SEGMENT_BYTES
        self._until = -inf
        self.is_exceeded = False

    @property
    def is_known(self) -> bool:
        """Whether somebody has looked of late."""
        return self._clock.now() < self._until

    def look(self, size: int = 0) -> bool:
        """Look how many bytes there are.

        Args:
            size: How many are to be taken in addition.

        Returns:
            Whether there may be so many.

        Raises:
            OSError: It cannot be known how many there are.
        """
        free = self._max_bytes - bytes_used(self._component) - size
        self._part = free // _PARTS if free >= _PARTS * segments.SEGMENT_BYTES else -1
        self._until = self._clock.now() + _KNOWN_SECONDS
        self.is_exceeded = free < 0
        return free >= 0

    def take(self, size: int) -> bool:
        """Take so many bytes more, if there may be so many.

        Args:
            size: The number of bytes; 0 to find out whether there are too many by now.

        Returns:
            Whether there may be.

        Raises:
            OSError: It cannot be known how many there are.
        """
        if size > self._part:
            return self.look(size)
        self._part -= size
        return True
