"""What dead processes of the log store left on this machine: found, and delivered as they would have."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from composite_logstore.clock import Clock
from composite_logstore.config import ChildConfig
from composite_logstore.delivery import Delivery, Load
from composite_logstore.event import LogEvent
from composite_logstore.spool import Cursor, Spool
from composite_logstore.spooling import next_batch


class AdoptedJournal:
    """The journal of a dead process, as far as its spool has it. Nothing is added to it.

    Attributes:
        writer: The dead process's writer, if it left an event.
        lock: Guards it and its deliveries.
        progress: Notified, under the lock, whenever a delivery has got on.
        deliveries: One for each child that is configured now and was then.
        spool: Its folder.
        is_closed: Whether the folder was let go of.
    """

    def __init__(self, spool: Spool, children: Sequence[ChildConfig], clock: Clock) -> None:
        """Count what is there.

        Args:
            spool: The folder, which this process has taken over.
            children: The enabled children.
            clock: Where time and chance come from.
        """
        self.spool = spool
        self.is_closed = False
        self.writer = spool.folder.name
        self.lock = threading.RLock()
        self.progress = clock.condition(self.lock)
        known = set(spool.children)
        self.children = [child for child in children if child.name in known]
        accepted = dict.fromkeys((child.name for child in self.children), 0)
        self.deliveries = [self._delivery(child, accepted, clock) for child in self.children]
        self._cursors = {child.name: Cursor(spool) for child in self.children}
        settled = {delivery.name: delivery.settled_before for delivery in self.deliveries}
        self.streams = set()
        last = -1
        for event in spool.read(min(settled.values(), default=0) - 1, float("inf")):
            last = event.number
            self.streams.add(event.stream)
            for delivery in self.deliveries:
                if event.number < settled[delivery.name]:
                    continue
                if event.progress:
                    delivery.updates_in_spool.add(event.number)
                accepted[delivery.name] += delivery.wants(event) is not None
        for delivery in self.deliveries:
            for stream in self.streams:
                delivery.end_stream(stream, last + 1)

    def _delivery(self, child: ChildConfig, accepted: dict[str, int], clock: Clock) -> Delivery:
        before = self.spool.settled(child.name)
        return Delivery(child, lambda: accepted[child.name], clock.random(child.name), True, before)

    def wake_after(self, events: int) -> None:
        """Nothing comes any more."""

    def load(self, delivery: Delivery, load: Load) -> list[LogEvent]:
        """Read what a delivery asks for from the spool."""
        return next_batch(self._cursors[delivery.name], delivery, load)

    def settled(self, delivery: Delivery) -> None:
        """Note on disk how far a delivery is."""
        self.spool.settle(delivery.name, delivery.settled_before)


def left_behind(component: Path) -> Iterator[Spool]:
    """Yield the folders of dead processes, oldest first, each taken over."""
    folders = [folder for folder in component.glob("*") if folder.is_dir() and not folder.name.startswith(".")]
    for folder in sorted(folders, key=_age):
        try:
            spool = Spool.adopt(folder)
        except OSError:
            # Somebody else's, or gone since.
            continue
        if spool is not None:
            yield spool


def _age(folder: Path) -> float:
    try:
        return folder.stat().st_mtime
    except OSError:
        return 0.0
