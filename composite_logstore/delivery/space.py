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
"""For how long the result of a look at all folders is used."""
_PARTS = 16
"""Which part of the free bytes a process may take before it looks again."""


class MakesRoom(Protocol):
    """A part of the log store's spool that can make room for newer events."""

    def drop_oldest(self) -> bool:
        """Drop its oldest events, for the children that have not acknowledged them.

        Returns:
            Whether it had any to drop.
        """
        ...


def drop_oldest_segment(spool: Spool, deliveries: Sequence[Delivery], in_memory_too: bool = False) -> bool:
    """Remove the oldest segment of a spool, and count its events as dropped. Needs the lock that guards both.

    Args:
        spool: The spool.
        deliveries: The deliveries that read from it.
        in_memory_too: Whether the events also leave the deliveries' queues.

    Returns:
        Whether there was a segment to remove.

    Raises:
        OSError: The spool cannot be read or written now.
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
    if not spool.delivers_here:
        # The agent finds out by itself.
        spool.segments.free(oldest.last + 1)
    for child in spool.children if spool.delivers_here else ():
        # Including children that are no longer configured.
        if spool.acknowledged(child) <= oldest.last:
            spool.acknowledge(child, oldest.last + 1)
    spool.segments.tidy()
    return True


class Space:
    """How many bytes the spools of all processes of a log store have on this machine, and may have.

    To count them takes long where there are hundreds of folders, and `emit` must not wait for that. So the housekeeping
    thread counts them now and then without the journal's lock. Until it does so again, a process may take a sixteenth
    of the free bytes, so there is room for 16 processes that do so at once. Where little is free, a process counts each
    time. A process may take its first segment before it has counted.

    Attributes:
        is_exceeded: Whether there were more bytes than there may be, at the last look.
    """

    def __init__(self, component: Path, max_bytes: int, clock: Clock) -> None:
        """Count nothing yet.

        Args:
            component: The folder of the log store.
            max_bytes: How many bytes there may be.
            clock: The source of time.
        """
        self._component = component
        self._max_bytes = max_bytes
        self._clock = clock
        self._part = segments.SEGMENT_BYTES
        self._until = -inf
        self.is_exceeded = False

    @property
    def is_known(self) -> bool:
        """Whether the last look is recent enough."""
        return self._clock.now() < self._until

    def look(self, size: int = 0) -> bool:
        """Count the bytes.

        Args:
            size: How many bytes to take in addition.

        Returns:
            Whether there may be that many.

        Raises:
            OSError: They cannot be counted now.
        """
        free = self._max_bytes - bytes_used(self._component) - size
        self._part = free // _PARTS if free >= _PARTS * segments.SEGMENT_BYTES else -1
        self._until = self._clock.now() + _KNOWN_SECONDS
        self.is_exceeded = free < 0
        return free >= 0

    def take(self, size: int) -> bool:
        """Take bytes, if there may be that many.

        Args:
            size: How many; 0 asks whether there are too many by now.

        Returns:
            Whether there may be that many.

        Raises:
            OSError: The bytes cannot be counted now.
        """
        if size > self._part:
            return self.look(size)
        self._part -= size
        return True
