"""The folder of the spool that this process writes: made when it is needed first, kept in place, and given back."""

from __future__ import annotations

import contextlib
import os
import socket
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from math import inf

from composite_logstore.capture.process import has_joined, rank
from composite_logstore.clock import Clock
from composite_logstore.delivery.delivery import Delivery
from composite_logstore.delivery.space import MakesRoom, Space, drop_oldest_segment
from composite_logstore.event import LogEvent
from composite_logstore.spool import segments
from composite_logstore.spool.folder import Spool, Standing
from composite_logstore.spool.format import Process
from composite_logstore.spool.settings import SpoolSettings

_NO_SPARE_SECONDS = 1.0
"""How long to wait after a spare segment could not be allocated."""


class OwnFolder:
    """This process's folder. It says how far the children are, and makes room by dropping the oldest events.

    The journal's lock guards every call, except where a method says that it needs no lock.

    Attributes:
        settings: Where the folder is, and how large it may be.
        spool: The folder; None before the first event is written, and once it is given back or gone.
        space: How many bytes it may take.
        error: Why nothing can be written now, None if it can.
        may_try: Whether to try to write all the same. After an error that waits for the next tick: a full disk must not
            delay each `emit`.
        is_away: Whether an agent delivers the events, so that all of them have to be on disk.
        others: The recovered journals of this process, oldest first. They make room before this folder does.
    """

    def __init__(
        self,
        settings: SpoolSettings,
        writer: str,
        deliveries: Sequence[Delivery],
        clock: Clock,
        unwritten: deque[LogEvent],
        write_again: Callable[[Mapping[int, LogEvent]], None],
    ) -> None:
        """Make no folder yet.

        Args:
            settings: Where the folder is, and how large it may be.
            writer: The writer's name.
            deliveries: The deliveries that read from it.
            clock: The source of time.
            unwritten: The events that are not on disk, oldest first.
            write_again: Called with the events of a folder that is gone, as far as they are in memory, by their
                numbers.
        """
        self.settings = settings
        self.spool: Spool | None = None
        self.space = Space(settings.component, settings.max_bytes, clock)
        self.error: Exception | None = None
        self.may_try = True
        self.is_away = False
        self.others: Sequence[MakesRoom] = ()
        self._writer = writer
        self._deliveries = deliveries
        self._clock = clock
        self._unwritten = unwritten
        self._write_again = write_again
        self._no_spare_until = -inf

    def make(self) -> Spool:
        """Make the folder.

        Raises:
            OSError: It cannot be made or locked.
        """
        names = [delivery.name for delivery in self._deliveries]
        process = Process(socket.gethostname(), os.getpid(), rank(), self.settings.write_ahead, has_joined())
        is_shared = self.settings.is_shared
        spool = self.spool = Spool.create(
            self.settings.component, self._writer, names, is_shared=is_shared, process=process
        )
        self.acknowledge_all()
        if self.is_away:
            spool.give_delivery()
        return spool

    def release(self) -> None:
        """Release the folder, for the next process or another writer of this one."""
        spool, self.spool = self.spool, None
        if spool is not None:
            spool.close()

    def failed(self, error: Exception) -> None:
        """Note that the folder could not be written. If it is gone, the next event makes another one."""
        self.error = error
        # The error itself does not tell whether the folder is still there.
        is_gone = self.spool is not None and self.spool.standing() is Standing.GONE
        self.may_try = is_gone
        if is_gone:
            self.abandon()

    # What it says of the children

    @property
    def is_needed(self) -> bool:
        """Whether some child has yet to acknowledge events that are or may be in the folder."""
        return self.spool is not None and any(delivery.oldest < inf for delivery in self._deliveries)

    def acknowledge(self, delivery: Delivery) -> None:
        """Note how far a child is, beyond the events on disk too: another child may yet cause those to be written."""
        if self.spool is not None and self.spool.delivers_here:
            newest = self._unwritten[-1].number if self._unwritten else self.spool.segments.last
            try:
                self.spool.acknowledge(delivery.name, min(delivery.oldest, max(newest, self.spool.segments.last) + 1))
            except OSError as error:
                self.failed(error)

    def acknowledge_all(self) -> None:
        """Note how far all children are, including those for which no event was meant."""
        for delivery in self._deliveries:
            self.acknowledge(delivery)

    def refresh(self) -> None:
        """Write those streams again whose attributes ZenML has added to since."""
        if self.spool is not None and self.error is None:
            try:
                self.spool.segments.refresh(self.has_room)
            except OSError as error:
                self.failed(error)

    # Keeping it in place

    def maintain(self) -> None:
        """Close and remove segments, and allocate the next one. Needs no lock: the disk may take long for it."""
        spool = self.spool
        if spool is None:
            return
        spool.segments.tidy()
        if spool.segments.needs_spare and self._clock.now() >= self._no_spare_until:
            with contextlib.suppress(OSError):
                if (self.space.is_known or self.space.look()) and self.space.take(segments.SEGMENT_BYTES):
                    spool.segments.prepare()
                    return
            # An event that needs a segment makes room for one, or reports that there is none.
            self._no_spare_until = self._clock.now() + _NO_SPARE_SECONDS

    def standing(self) -> Standing:
        """Return whether the folder is in place, with all files that belong to it. Needs no lock."""
        spool = self.spool
        return Standing.IN_PLACE if spool is None else spool.standing()

    def mend(self, standing: Standing) -> None:
        """Write missing files again, or abandon the folder if it is gone.

        Args:
            standing: The result of `standing`, other than `IN_PLACE`.
        """
        if self.spool is None:
            return
        is_ours = standing is Standing.CHANGED
        # After an error the next look leads here again.
        with contextlib.suppress(OSError):
            is_ours = is_ours and self.spool.mend(self._between)
        if not is_ours:
            self.abandon()

    def abandon(self) -> None:
        """Release a folder that is gone. Those of its events that are in memory are written to a new folder."""
        if self.spool is None:
            return
        spool, self.spool = self.spool, None
        held = self._in_memory()
        held.update((event.number, event) for event in spool.reader.in_use())
        # A process that finds the folder elsewhere must not take this one for dead.
        spool.segments.mark_closed()
        spool.abandon()
        self._write_again(held)

    def _in_memory(self) -> dict[int, LogEvent]:
        """Return the events in memory that some child has not acknowledged, by their numbers."""
        found: dict[int, LogEvent] = {}
        # Thinned children first, so that the events of the others replace theirs: a thinned update has another level.
        for delivery in sorted(self._deliveries, key=lambda delivery: not delivery.progress_bars.is_thinned):
            found.update((event.number, event) for event in delivery.in_memory())
        return found

    def _between(self, first: int, last: float) -> list[LogEvent]:
        return [event for number, event in sorted(self._in_memory().items()) if first <= number <= last]

    # Room

    def has_room(self, size: int) -> bool:
        """Say whether the spool may grow by a number of bytes, if need be after the oldest events were dropped.

        Args:
            size: The number of bytes; 0 asks whether there are too many by now.

        Raises:
            OSError: The spool cannot be read or written now.
        """
        while not self.space.take(size):
            if not any(part.drop_oldest() for part in (*self.others, self)):
                return False
        return True

    def make_room(self) -> None:
        """Drop the oldest events if the log store has more bytes on disk than it may have."""
        with contextlib.suppress(OSError):
            self.has_room(0)
        # If that was not enough, the next look finds it out.
        self.space.is_exceeded = False

    def drop_oldest(self) -> bool:
        """See `MakesRoom`."""
        # With `write_ahead` an event that would not survive the process must not count as pending.
        is_write_ahead = self.settings.write_ahead
        return self.spool is not None and drop_oldest_segment(self.spool, self._deliveries, is_write_ahead)
