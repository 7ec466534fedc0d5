"""How many bytes of events are in memory. Each event counts once, however many children have yet to deliver it.

Events are counted in intervals: some that were logged one after the other, for the same children. An interval counts
until none of its events is in memory, which is found out only when the count exceeds the bound. So `emit` only adds a
number, and a delivery does nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from composite_logstore.delivery.delivery import Delivery
from composite_logstore.event import LogEvent

_PARTS = 64
"""An interval has at most this part of all bytes, so few bytes count that are no longer in memory."""


def batch_bytes(most: int, children: int) -> int:
    """Return how many bytes one export may have, so that those of all children have at most half of the bytes.

    Args:
        most: How many bytes of events may be in memory.
        children: The number of children.
    """
    return max(1, most // (2 * max(1, children)))


@dataclass(slots=True)
class _Interval:
    """Some events that were logged one after the other.

    Attributes:
        first: The lowest number.
        last: The highest number.
        size: How many bytes they have.
    """

    first: int
    last: int
    size: int

    def add(self, first: int, last: int, size: int) -> None:
        """Add events."""
        self.first = min(self.first, first)
        self.last = max(self.last, last)
        self.size += size


class Held:
    """The events in memory that are meant for the same children."""

    def __init__(self, memory: Memory, deliveries: Sequence[Delivery]) -> None:
        self._memory = memory
        self._deliveries = deliveries
        self.intervals: list[_Interval] = []

    def add(self, events: Sequence[LogEvent], sizes: Sequence[int]) -> bool:
        """Add events, in their order, and tell the deliveries.

        Args:
            events: The events.
            sizes: Roughly how many bytes each of them has.

        Returns:
            Whether a delivery has a full batch now.
        """
        size = sum(sizes)
        if size <= self._memory.interval_bytes:
            self._add(events[0].number, events[-1].number, size)
        else:
            for event, one in zip(events, sizes, strict=True):
                self._add(event.number, event.number, one)
        # A list, since `any` would stop telling the deliveries at the first full one.
        full = [delivery.enqueued(len(events), size, max(sizes)) for delivery in self._deliveries]
        return any(full)

    def _add(self, first: int, last: int, size: int) -> None:
        self._memory.size += size
        if self.intervals and self.intervals[-1].size + size <= self._memory.interval_bytes:
            self.intervals[-1].add(first, last, size)
        else:
            self.intervals.append(_Interval(first, last, size))

    def release(self, unwritten: float) -> None:
        """Remove the intervals that no child needs in memory any more.

        Args:
            unwritten: The lowest number of an event that is not on disk.
        """
        holds = [delivery.holds for delivery in self._deliveries]
        self.intervals = [
            one for one in self.intervals if one.last >= unwritten or any(held(one.first, one.last) for held in holds)
        ]


class Memory:
    """The bytes of the events in memory. The journal's lock guards every call.

    Attributes:
        most: How many there may be.
        size: How many there are, or more: `release` finds out which events have left memory.
        interval_bytes: How many bytes an interval may have.
    """

    def __init__(self, most: int, deliveries: Sequence[Delivery]) -> None:
        """Begin with none.

        Args:
            most: How many bytes there may be.
            deliveries: The deliveries of all children.
        """
        self.most = most
        self.size = 0
        self.interval_bytes = most // _PARTS
        self._deliveries = deliveries
        self._held: dict[tuple[Delivery, ...], Held] = {}

    def held_by(self, deliveries: Iterable[Delivery]) -> Held:
        """Return the events that are meant for the children with these deliveries, and for no other."""
        deliveries = tuple(deliveries)
        return self._held.setdefault(deliveries, Held(self, deliveries))

    def release(self, unwritten: float) -> None:
        """Count anew, without the events that have left memory.

        Args:
            unwritten: The lowest number of an event that is not on disk.
        """
        for held in self._held.values():
            held.release(unwritten)
        held_bytes = sum(one.size for held in self._held.values() for one in held.intervals)
        self.size = held_bytes + sum(delivery.loaded_bytes for delivery in self._deliveries)

    @property
    def is_full(self) -> bool:
        """Whether there are more bytes than there may be."""
        return self.size > self.most

    def oldest_first(self, unwritten: float) -> list[int]:
        """Return the last number of each interval, oldest first: freeing all events up to one frees bytes.

        Args:
            unwritten: The lowest number of an event that is not on disk.
        """
        first = min(unwritten, *(delivery.first_in_queue for delivery in self._deliveries))
        return sorted({one.last for held in self._held.values() for one in held.intervals if one.last >= first})
