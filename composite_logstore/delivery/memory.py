"""How many bytes of events wait in memory: each event counts once, however many children have yet to take it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from composite_logstore.delivery.delivery import Delivery
from composite_logstore.event import LogEvent

_PARTS = 64
"""Events that came one after the other are counted as one, up to this part of all bytes: so little is counted as
waiting that does not wait any more."""


def batch_bytes(most: int, children: int) -> int:
    """Return how many bytes each child may have in one export, so that all together have half of them at most.

    Args:
        most: How many bytes may wait in memory.
        children: The number of children.
    """
    return max(1, most // (2 * max(1, children)))


class _Run:
    """Some events that came one after the other.

    Attributes:
        first: The lowest of their numbers.
        last: The highest of them.
        size: How many bytes they take.
    """

    __slots__ = ("first", "last", "size")

    def __init__(self, first: int, last: int, size: int) -> None:
        self.first = first
        self.last = last
        self.size = size

    def add(self, first: int, last: int, size: int) -> None:
        """Add more of them."""
        self.first = min(self.first, first)
        self.last = max(self.last, last)
        self.size += size


class Held:
    """Events that the same children are to have, as long as any of them has to."""

    def __init__(self, memory: Memory, deliveries: Sequence[Delivery]) -> None:
        """Begin with none.

        Args:
            memory: What counts them.
            deliveries: Those of the children.
        """
        self._memory = memory
        self._deliveries = deliveries
        self.runs: list[_Run] = []

    def add(self, events: Sequence[LogEvent], sizes: Sequence[int]) -> bool:
        """Count events, in their order.

        Args:
            events: The events.
            sizes: Roughly how many bytes each of them takes.

        Returns:
            Whether they fill a batch.
        """
        size = sum(sizes)
        if size <= self._memory.run_bytes:
            self._add(events[0].number, events[-1].number, size)
        else:
            for event, one in zip(events, sizes, strict=True):
                self._add(event.number, event.number, one)
        # For all of them: they are to be told.
        full = [delivery.enqueued(len(events), size, max(sizes)) for delivery in self._deliveries]
        return any(full)

    def _add(self, first: int, last: int, size: int) -> None:
        self._memory.size += size
        if self.runs and self.runs[-1].size + size <= self._memory.run_bytes:
            self.runs[-1].add(first, last, size)
        else:
            self.runs.append(_Run(first, last, size))

    def release(self, unwritten: float) -> None:
        """Count no longer what no child has to take any more.

        Args:
            unwritten: The number from which on events are in memory until they are on disk.
        """
        holds = [delivery.holds for delivery in self._deliveries]
        self.runs = [
            run for run in self.runs if run.last >= unwritten or any(held(run.first, run.last) for held in holds)
        ]


class Memory:
    """The bytes of the events that wait in memory. The journal's lock guards every call.

    Attributes:
        most: How many there may be.
        size: How many there are at most: what has left memory is found out by `release`.
        run_bytes: Up to how many bytes events are counted as one.
    """

    def __init__(self, most: int, deliveries: Sequence[Delivery]) -> None:
        """Begin with none.

        Args:
            most: How many bytes there may be.
            deliveries: Those of all children.
        """
        self.most = most
        self.size = 0
        self.run_bytes = most // _PARTS
        self._deliveries = deliveries
        self._held: dict[tuple[Delivery, ...], Held] = {}

    def held_by(self, deliveries: Iterable[Delivery]) -> Held:
        """Return what the children with these deliveries hold together."""
        deliveries = tuple(deliveries)
        return self._held.setdefault(deliveries, Held(self, deliveries))

    def release(self, unwritten: float) -> None:
        """Count no longer what has left memory.

        Args:
            unwritten: The number from which on events are in memory until they are on disk.
        """
        for held in self._held.values():
            held.release(unwritten)
        runs = sum(run.size for held in self._held.values() for run in held.runs)
        self.size = runs + sum(delivery.loaded_bytes for delivery in self._deliveries)

    @property
    def is_full(self) -> bool:
        """Whether there are too many."""
        return self.size > self.most

    def oldest_first(self, unwritten: float) -> list[int]:
        """Return numbers so that something is freed when the events up to each of them leave memory.

        Args:
            unwritten: The number from which on events are in memory until they are on disk.
        """
        first = min(unwritten, *(delivery.first_in_queue for delivery in self._deliveries))
        return sorted({run.last for held in self._held.values() for run in held.runs if run.last >= first})
