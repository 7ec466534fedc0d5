"""When events go to disk, and what becomes of those that find no room there."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from math import inf
from pathlib import Path
from typing import NamedTuple
from uuid import UUID

from composite_logstore.config import CompositeLogStoreConfig
from composite_logstore.delivery import Delivery, Load
from composite_logstore.event import LogEvent
from composite_logstore.spool import Cursor, Spool

TICK_SECONDS = 0.1
_TICKS = 8
"""With `spill` an event goes to disk after so many ticks, so within a second, unless all children have it."""


class SpoolSettings(NamedTuple):
    """Where and how events go to disk.

    Attributes:
        component: The folder of the log store.
        write_ahead: Whether each event is to be on disk at once.
        max_bytes: How many bytes the log store may have on this machine, all its processes together.
    """

    component: Path
    write_ahead: bool
    max_bytes: int


def spool_settings(component_id: UUID, config: CompositeLogStoreConfig) -> SpoolSettings | None:
    """Return where and how a log store's events go to disk, None if they never do."""
    if config.durability == "memory":
        return None
    if config.spool_directory:
        root = Path(config.spool_directory).expanduser()
    else:
        from zenml.config.global_config import GlobalConfiguration

        root = Path(GlobalConfiguration().config_directory) / "composite_logstore" / "spool"
    return SpoolSettings(root / str(component_id), config.durability == "write_ahead", config.spool_max_bytes)


def next_batch(cursor: Cursor, delivery: Delivery, load: Load) -> list[LogEvent]:
    """Read the next events of a child: as many as it asks for, and no more bytes than one export may have."""
    batch: list[LogEvent] = []
    size = 0
    for event in cursor.read(load.after, load.before):
        wanted = delivery.wants(event)
        if wanted is not None:
            batch.append(wanted)
            size += wanted.size
            if len(batch) == load.events or size > delivery.batch_bytes:
                break
    return batch


class Spooling:
    """Brings a journal's events to disk, as `durability` says. The journal's lock guards every call.

    Attributes:
        unspooled: The events that are not on disk. The journal appends to it.
        most_unspooled: How many there may be at any time.
        spool: The folder; None before there was something to write.
        error: Why events do not get to disk, None if they do.
    """

    def __init__(self, settings: SpoolSettings, writer: str, deliveries: Sequence[Delivery]):
        """Begin with nothing; no folder is made.

        Args:
            settings: Where and how.
            writer: The writer's name.
            deliveries: The deliveries that read from the spool.
        """
        self.unspooled: deque[LogEvent] = deque()
        smallest = min((delivery.queue.maxlen or 1 for delivery in deliveries), default=1)
        self.most_unspooled = 0 if settings.write_ahead else smallest - 1
        self.spool: Spool | None = None
        self.error: OSError | None = None
        self._component = settings.component
        self._writer = writer
        self._deliveries = deliveries
        self._max_bytes = settings.max_bytes
        # The number that the next event had, at each of the last ticks.
        self._ticks: deque[int] = deque(maxlen=_TICKS)

    def write(self, before: float = inf) -> None:
        """Bring the events whose numbers are below `before` to disk, but for those that all children have.

        What finds no room waits in memory alone.
        """
        settled = min(delivery.settled_before for delivery in self._deliveries)
        try:
            while self.unspooled and self.unspooled[0].number < before:
                if self.unspooled[0].number >= settled:
                    self._folder().append(self.unspooled[0], self._has_room)
                self.unspooled.popleft()
            self.error = None
        except OSError as error:
            self.error = error
            # It waits in the queues. The next event may find room again.
            while self.unspooled and self.unspooled[0].number < before:
                self.unspooled.popleft()

    def tick(self, next_number: int) -> bool:
        """Bring to disk what has waited long enough. Called every tick while there is something to bring.

        Returns:
            Whether there is.
        """
        if len(self._ticks) == _TICKS:
            self.write(before=self._ticks[0])
        self._ticks.append(next_number)
        if self.unspooled:
            return True
        self._ticks.clear()
        return False

    def refresh(self, events: Sequence[LogEvent]) -> None:
        """Write the attributes of streams anew, if ZenML has added to them since."""
        if self.spool is not None:
            try:
                for event in events:
                    self.spool.refresh(event, self._has_room)
            except OSError as error:
                self.error = error

    def settled(self, delivery: Delivery) -> None:
        """Note how far a child is."""
        if self.spool is not None:
            self.spool.settle(delivery.name, delivery.settled_before)

    def settle_down(self) -> None:
        """Bring to disk what is not delivered, for the next process. What comes now goes there at once."""
        self.write()
        self.most_unspooled = 0
        if self.spool is not None and all(delivery.oldest == inf for delivery in self._deliveries):
            self.spool.close()
            self.spool = None

    def _folder(self) -> Spool:
        if self.spool is None:
            names = [delivery.name for delivery in self._deliveries]
            self.spool = Spool.create(self._component, self._writer, names)
            for delivery in self._deliveries:
                self.settled(delivery)
        return self.spool

    def _has_room(self, size: int) -> bool:
        """Say whether the spool may grow, and have the child that is furthest behind give up its oldest."""
        while sum(path.stat().st_size for path in self._component.glob("*/*.log")) + size > self._max_bytes:
            if self.spool is None or not self._given_up(self.spool):
                return False
        return True

    def _given_up(self, spool: Spool) -> bool:
        oldest = spool.oldest_segment()
        if oldest is None:
            return False
        for delivery in self._deliveries:
            if delivery.settled_before <= oldest.last:
                events = spool.read(delivery.settled_before - 1, oldest.last + 1)
                delivery.give_up_spooled(sum(delivery.wants(event) is not None for event in events), oldest.last)
                spool.settle(delivery.name, oldest.last + 1)
        return True
