"""When events go to disk, and what becomes of those that find no room there."""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Sequence
from math import inf
from pathlib import Path
from typing import NamedTuple, Protocol
from uuid import UUID

from composite_logstore.backoff import described
from composite_logstore.config import CompositeLogStoreConfig
from composite_logstore.delivery import Delivery, Load
from composite_logstore.event import LogEvent, abridged
from composite_logstore.spool import (
    LINE_BYTES,
    SEGMENT_BYTES,
    Cursor,
    EventTooLongError,
    Spool,
    SpoolFullError,
    UnstorableEventError,
)

TICK_SECONDS = 0.1
_TICKS = 8
"""With `spill` an event goes to disk after so many ticks, so within a second, unless all children have it."""
_MOST_AT_ONCE = 200
"""How many events the keeper brings to disk under the journal's lock at a time: `emit` waits no longer."""


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


def spool_folder(component_id: UUID, config: CompositeLogStoreConfig) -> Path:
    """Return the folder of a log store's spools on this machine."""
    return spool_root(config.spool_directory) / str(component_id)


def spool_root(spool_directory: str | None) -> Path:
    """Return the folder of the folders of log stores, by their ids."""
    if spool_directory:
        return Path(os.path.expanduser(spool_directory))
    from zenml.config.global_config import GlobalConfiguration

    return Path(GlobalConfiguration().config_directory) / "composite_logstore" / "spool"


def spool_settings(component_id: UUID, config: CompositeLogStoreConfig) -> SpoolSettings | None:
    """Return where and how a log store's events go to disk, None if they never do."""
    if config.durability == "memory":
        return None
    folder = spool_folder(component_id, config)
    return SpoolSettings(folder, config.durability == "write_ahead", config.spool_max_bytes)


def check(settings: SpoolSettings) -> None:
    """Check that events can go to disk.

    Raises:
        OSError: They cannot.
    """
    # A name that no writer has.
    Spool.create(settings.component, f"check-{os.getpid()}", []).close()


def in_words(error: Exception, settings: SpoolSettings) -> str:
    """Say what keeps events from going to disk, and what mends it."""
    why = (error.strerror or str(error)) if isinstance(error, OSError) else described(error)
    if isinstance(error, SpoolFullError):
        fix = "raise 'spool_max_bytes', or have its backends take what waits there"
    else:
        fix = "make room there, or set 'spool_directory' to a folder that can be written and locked"
    return f"the spool in {settings.component} cannot be used: {why}; {fix}"


def next_batch(cursor: Cursor, delivery: Delivery, load: Load, before: float = inf) -> list[LogEvent]:
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


class GivesUp(Protocol):
    """Something of the log store's on disk that can make room."""

    def give_up_oldest(self) -> bool:
        """Have the children that are furthest behind lose what is oldest.

        Returns:
            Whether there was something that could go.
        """
        ...


def give_up_oldest(spool: Spool, deliveries: Sequence[Delivery], in_memory_too: bool = False) -> bool:
    """Free the oldest segment of a spool, and count what is lost with it. Under the lock that guards them.

    Args:
        spool: The spool.
        deliveries: The deliveries that read from it.
        in_memory_too: Whether what their queues have of it is to go as well.

    Returns:
        Whether there was one.
    """
    oldest = spool.oldest_segment()
    if oldest is None:
        return False
    for delivery in deliveries:
        if delivery.oldest <= oldest.last:
            taken = delivery.withdraw(oldest.last) if in_memory_too else 0
            lost = delivery.wanted_of(oldest.kinds, oldest.first, oldest.last)
            if lost is None:
                waiting = delivery.queue[0].number if delivery.queue else inf
                events = spool.read(max(oldest.first - 1, delivery.taken), min(oldest.last + 1, waiting))
                lost = sum(delivery.wants(event) is not None for event in events)
            delivery.give_up_spooled(taken + lost, int(oldest.last))
    for child in spool.children:
        # Also those that are no longer configured.
        if spool.settled(child) <= oldest.last:
            spool.settle(child, oldest.last + 1)
    spool.tidy()
    return True


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
        self._most_waiting = smallest - 1
        self._is_write_ahead = settings.write_ahead
        self._may_try = True
        self.spool: Spool | None = None
        self.error: Exception | None = None
        self.unstorable: Exception | None = None
        self.others: Sequence[GivesUp] = ()
        self._deliveries = deliveries
        self._component = settings.component
        self._writer = writer
        self._max_bytes = settings.max_bytes
        # The number that the next event had, at each of the last ticks.
        self._ticks: deque[int] = deque(maxlen=_TICKS)

    def write(self, before: float = inf, most: float = inf) -> bool:
        """Bring the events whose numbers are below `before` to disk, but for those that all children have.

        What finds no room waits in memory alone.

        Args:
            before: See above.
            most: How many events to bring to disk at most.

        Returns:
            Whether there are more of them.
        """
        # With `write_ahead` it has just come, so nobody has it.
        settled = 0 if self._is_write_ahead else min(delivery.oldest for delivery in self._deliveries)
        written = 0
        while self.unspooled and self.unspooled[0].number < before:
            if written >= most:
                return True
            if self.unspooled[0].number >= settled:
                if not self._append(self.unspooled[0]):
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
        if self.error is None and self.spool is not None and most == 1:
            try:
                self._store(self.spool, self.unspooled[0])
                self.unspooled.popleft()
                return
            except Exception as error:
                self._failed(error)
        self.write(before=self.unspooled[most - 1].number + 1)

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
                spool.append(event, self._has_room)
            except EventTooLongError:
                spool.append(abridged(event, LINE_BYTES // 64), self._has_room)
        except UnstorableEventError as error:
            # It waits in memory alone.
            self.unstorable = error

    def _failed(self, error: Exception) -> None:
        self.error = error
        self._may_try = False
        if isinstance(error, FileNotFoundError):
            self.give_up_folder()

    def tick(self, next_number: int) -> float | None:
        """Say below which number events have waited in memory long enough. Called every tick.

        Args:
            next_number: The number that the next event will have.

        Returns:
            The number; None if nothing waits.
        """
        due = self._ticks[0] if len(self._ticks) == _TICKS else -inf
        self._ticks.append(next_number)
        if not self.unspooled:
            self._ticks.clear()
            return None
        return due

    def write_due(self, due: float) -> bool:
        """Bring a few of the events that are due to disk.

        Args:
            due: The number below which they are due.

        Returns:
            Whether there are more.
        """
        return self.write(before=due, most=_MOST_AT_ONCE)

    def try_again(self) -> None:
        """Let the next event find out whether there is room again."""
        self._may_try = True

    def keep_house(self) -> bool:
        """Do what would make `emit` wait if it were done under the journal's lock.

        Returns:
            Whether the folder is still there.
        """
        spool = self.spool
        if spool is None:
            return True
        spool.tidy()
        if not spool.folder.exists():
            return False
        # If there is no room, the next event makes some, or says so.
        if spool.needs_spare and _used(self._component) + SEGMENT_BYTES <= self._max_bytes:
            with contextlib.suppress(OSError):
                spool.prepare()
        return True

    def give_up_folder(self) -> None:
        """Let go of a folder that somebody has taken away. The next event gets a new one."""
        if self.spool is not None:
            self.spool.abandon()
            self.spool = None

    def refresh(self) -> None:
        """Write the attributes of streams anew, if ZenML has added to them since."""
        if self.spool is not None and self.error is None:
            try:
                self.spool.refresh(self._has_room)
            except OSError as error:
                self._failed(error)

    def settled(self, delivery: Delivery) -> None:
        """Note how far a child is: also of what is not on disk, since it may yet come there for another child."""
        if self.spool is not None:
            newest = self.unspooled[-1].number if self.unspooled else self.spool.last
            try:
                self.spool.settle(delivery.name, min(delivery.oldest, max(newest, self.spool.last) + 1))
            except OSError as error:
                self._failed(error)

    def settle(self) -> None:
        """Note how far all children are, also those for which nothing has come that they could settle."""
        for delivery in self._deliveries:
            self.settled(delivery)

    def settle_down(self) -> None:
        """Bring to disk what is not delivered, for the next process. What comes now goes there at once."""
        self.try_again()
        self.write()
        self.most_unspooled = 0
        self.settle()
        if self.spool is not None and all(delivery.oldest == inf for delivery in self._deliveries):
            self.spool.close()
            self.spool = None

    def _folder(self) -> Spool:
        if self.spool is None:
            names = [delivery.name for delivery in self._deliveries]
            self.spool = Spool.create(self._component, self._writer, names)
            self.settle()
        return self.spool

    def _has_room(self, size: int) -> bool:
        """Say whether the spool may grow by so many bytes, after the oldest has made room where it can."""
        while _used(self._component) + size > self._max_bytes:
            if not any(part.give_up_oldest() for part in (*self.others, self)):
                return False
        return True

    def give_up_oldest(self) -> bool:
        """See `GivesUp`."""
        # With `write_ahead` nothing may count as pending that would not survive the process.
        return self.spool is not None and give_up_oldest(self.spool, self._deliveries, self._is_write_ahead)


def _used(component: Path) -> int:
    used = 0
    # The folders of writers, not what is damaged and can no longer give way.
    for path in component.glob(f"{'?' * 15}/*"):
        try:
            used += path.stat().st_size
        except OSError:
            # Gone since.
            continue
    return used
