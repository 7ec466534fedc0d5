"""Tailing: delivers the events of a living process while it writes them to its spool.

The process owns the folder: it writes the segments, and removes those that all children have acknowledged. The holder
of `delivery.lock` delivers, and writes the positions first and then the account. When the process dies, the same
journal is read to its end, and its folder is removed like that of any dead process.

An event is read once, and waits in memory for each child that keeps up. For a child that does not, its events are read
again when it can take them, so an outage takes no memory. While no child needs further events, none are read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from errno import ENOENT
from functools import cached_property
from itertools import chain
from math import inf

from composite_logstore.delivery.account import count_reason
from composite_logstore.delivery.delivery import Delivery, is_urgent
from composite_logstore.delivery.last_words import add_last_words
from composite_logstore.delivery.progress_bars import Bar, bar_of, second_of
from composite_logstore.delivery.recovery import RecoveredJournal
from composite_logstore.delivery.spilling import next_batch
from composite_logstore.delivery.states import Load
from composite_logstore.event import EVENT_BYTES, LogEvent, Stream, total_size
from composite_logstore.service import patiently
from composite_logstore.spool.account import ChildAccount
from composite_logstore.spool.damage import Damage
from composite_logstore.spool.format import Ended

NOTE_SECONDS = 0.25
"""How often the account of a process is written at most, in seconds."""
FULL_SECONDS = 0.01
"""After how many seconds to look whether children need further events, while enough wait for them."""
STARVING_SECONDS = 0.05
"""The same if none wait for one of them: its siblings may be slower, or get many events that it does not get."""
MOST_BYTES = 2 * 1024 * 1024
"""How many bytes of events of one process wait for a child in memory, about."""
_MOST_BARS = 1_000
"""Of how many progress bars the last update is remembered."""


class TailedJournal(RecoveredJournal):
    """The journal of a living process, read from its spool while it grows.

    One thread calls `grow`, `note` and `process_died`. `close` comes after these, from that thread or from recovery's.

    Attributes:
        most_bytes: How many bytes of events wait for a child in memory, about.
        is_growing: Whether the process lives, or not all that it wrote has been read.
        has_news: Whether more has become of the events than the account says.
    """

    most_bytes = MOST_BYTES
    is_growing = True

    @cached_property
    def _former(self) -> dict[str, ChildAccount]:
        """The account as it was found."""
        return self.spool.account()

    def _acknowledged(self, name: str) -> int:
        # If this is below the position, an agent was killed between writing the position and the account.
        former = self._former.get(name)
        return max(self.spool.acknowledged(name), former.before if former else 0)

    def _count(self) -> None:
        """Begin at the lowest position of a child."""
        self._begins = {delivery.name: self._acknowledged(delivery.name) for delivery in self.deliveries}
        self._noted = dict(self._begins)
        # The events below the position that the account does not count: an agent was killed before it wrote that.
        self._uncounted = {
            name: self._former[name].before if name in self._former else before for name, before in self._begins.items()
        }
        self._delivered_before: Counter[str] = Counter()
        self._reader = self.spool.growing(min(self._uncounted.values(), default=0))
        self._next = min(self._begins.values(), default=0)
        # The children whose events wait in memory.
        self._keeping_up = {delivery.name for delivery in self.deliveries}
        self._latest: dict[Bar, tuple[int, int]] = {}
        # The streams with events behind which there is no mark that they have ended.
        self._streams: dict[Stream, None] = {}
        # Below which number all events are due, and of which such number the account has told that they are done.
        self._due = self._due_noted = 0
        self._wake_at: float = 0
        # About how many bytes an event takes.
        self._event_bytes = float(EVENT_BYTES)
        self._awaits_urgent = self._is_urgent = False
        self.has_news = False
        self._noted_at = -inf

    # Growing

    def has_grown(self, with_folder: bool) -> bool:
        """Return whether the process has written more.

        Args:
            with_folder: Whether to find out whether a segment has begun, which is one more call of the system.

        Raises:
            OSError: That cannot be known now.
        """
        return self._reader.has_grown() or (with_folder and self._reader.has_successor())

    def grow(self, has_died: bool = False) -> float:
        """Read some of what the process has written, if a child needs it.

        Args:
            has_died: Whether the process is dead.

        Returns:
            After how many seconds to call again: 0 if there may be more, infinity if nothing waits.

        Raises:
            FileNotFoundError: The folder is gone.
            OSError: The folder cannot be read now.
        """
        with self.lock:
            is_full = not has_died and any(self._is_full(delivery) for delivery in self.deliveries)
            is_starving = any(delivery.oldest == inf for delivery in self.deliveries)
        if is_full and not is_starving:
            return FULL_SECONDS
        found = self._reader.read(self._clock.now(), has_died)
        if found:
            with patiently(self.lock):
                self._take(found)
            return STARVING_SECONDS if is_full else 0.0
        return inf

    def _is_full(self, delivery: Delivery) -> bool:
        """Return whether enough events wait for a child for now: in memory, or on disk."""
        if delivery.name in self._keeping_up:
            return len(delivery.queue) > self._most_in_memory(delivery)
        return delivery.in_spool > 2 * self.children[delivery.name].batch_size

    def _most_in_memory(self, delivery: Delivery) -> float:
        return min(self.most_bytes / self._event_bytes, (delivery.queue.maxlen or 0) / 2)

    def _take(self, found: list[LogEvent | Ended | Damage]) -> None:
        """Hand what was read to the deliveries. Under the lock."""
        events: list[LogEvent] = []
        for item in found:
            if isinstance(item, LogEvent):
                events.append(item)
                continue
            self._accept_all(events)
            events = []
            if isinstance(item, Damage):
                self._lose(item)
            else:
                self._end_stream(item.stream)
        self._accept_all(events)

    def _end_stream(self, stream: Stream) -> None:
        self._streams.pop(stream, None)
        for delivery in self.deliveries:
            delivery.end_stream(stream, self._next)
        self.has_news, self._wake_at = True, 0

    def _accept_all(self, events: list[LogEvent]) -> None:
        if not events:
            return
        for stream in {event.stream: None for event in events}:
            self._streams[stream] = None
        size = total_size(events)
        self._event_bytes = size / len(events)
        for delivery in self.deliveries:
            self._hand_to(delivery, self._new_for(delivery, events), size)
        for event in events:
            if event.progress:
                self._latest.pop(bar_of(event), None)
                self._latest[bar_of(event)] = second_of(event), event.number
        for bar in [*self._latest][:-_MOST_BARS]:
            del self._latest[bar]
        self._is_urgent |= self._awaits_urgent and any(map(is_urgent, events))
        before, self._next = self._next, max(self._next, events[-1].number + 1)
        if self._next > before:
            self.has_news = True

    def _new_for(self, delivery: Delivery, events: list[LogEvent]) -> list[LogEvent]:
        """Return the events that the child has not acknowledged."""
        begin = self._begins[delivery.name]
        if events[0].number >= begin:
            return events
        uncounted = self._uncounted[delivery.name]
        self._delivered_before[delivery.name] += sum(
            uncounted <= event.number < begin and delivery.wants(event) is not None for event in events
        )
        return [event for event in events if event.number >= begin]

    def _hand_to(self, delivery: Delivery, events: list[LogEvent], size: int) -> None:
        """Count the events that the child gets, and put them into its queue if it keeps up.

        Args:
            delivery: The child's delivery.
            events: The events.
            size: How many bytes they take, or more.
        """
        name, bars = delivery.name, delivery.progress_bars
        if name not in self._keeping_up and delivery.in_spool <= self.children[name].batch_size:
            self._keeping_up.add(name)
        if name in self._keeping_up and len(delivery.queue) + len(events) > 2 * self._most_in_memory(delivery):
            self._keeping_up.discard(name)
            delivery.leave_to_spool()
        if name not in self._keeping_up:
            for event in events:
                self._accept(delivery, event, self._latest)
            return
        if bars.is_thinned and any(event.progress for event in events):
            wanted = [event for event in events if event.progress or delivery.wants(event) is not None]
            for event in wanted:
                bars.append(event)
        else:
            wanted = events
            if self.children[name].min_level is not None:
                wanted = [event for event in events if delivery.wants(event) is not None]
            delivery.queue.extend(wanted)
            self._accepted[name] += len(wanted)
        # No character takes more bytes in memory than four times those that it takes on disk.
        delivery.enqueued(len(wanted), size, EVENT_BYTES + 4 * self._reader.longest)

    def _lose(self, damage: Damage) -> None:
        """Count damaged lines as lost. It is not known which children wanted them."""
        for delivery in self.deliveries:
            self._accepted[delivery.name] += damage.lines
            delivery.drop_spooled(damage.lines, delivery.taken)

    def should_wake(self) -> bool:
        """Return whether the workers have to look at the journal now: events have arrived that one waits for."""
        with self.lock:
            if self._next > self._wake_at or self._is_urgent:
                self._wake_at, self._awaits_urgent, self._is_urgent = inf, False, False
                return True
            return False

    def wake_after(self, events: int, urgent: bool = False) -> bool:
        """Have the workers woken once so many more events have arrived, or an urgent one. Under the lock."""
        self._wake_at = min(self._wake_at, self._next + events - 1)
        self._awaits_urgent |= urgent
        return False

    def load(self, delivery: Delivery, load: Load) -> list[LogEvent]:
        """Read the events that a delivery asks for from the spool, of those that were counted."""
        with self.lock:
            before = delivery.queue[0].number if delivery.queue else self._next
        return next_batch(self._cursors[delivery.name], delivery, load, before)

    # The process's wishes, and its end

    def heed_due(self) -> bool:
        """Have the events delivered that the process wants delivered at once. Returns whether these are news.

        Raises:
            OSError: It cannot be known now.
        """
        due = self.spool.due
        if due <= self._due:
            return False
        self._due = due
        with self.lock:
            for delivery in self.deliveries:
                delivery.flush(due)
        return True

    def process_died(self) -> bool:
        """Take over the folder of the dead process, all of which has been read.

        Returns:
            Whether it is taken over; False if another process has locked it for a moment.

        Raises:
            OSError: The folder is gone, or cannot be locked.
        """
        if not self.spool.inherit():
            return False
        self._reader.close()
        with self.lock:
            self.is_growing = False
            self._accept_all(add_last_words(self.spool, self._clock.time()))
            for delivery in self.deliveries:
                delivery.flush(self._next)
                for stream in self._streams:
                    delivery.end_stream(stream, self._next)
        self._notify()
        return True

    @property
    def is_done(self) -> bool:
        """Whether the process is dead, and all children have acknowledged all events; or as in a dead one's journal."""
        return (self.is_given_back or not self.is_growing) and super().is_done

    @property
    def is_idle(self) -> bool:
        """Whether all that was read is acknowledged."""
        with self.lock:
            return all(delivery.oldest == inf for delivery in self.deliveries)

    def needs(self, delivery: Delivery) -> bool:
        """Return whether a delivery has anything to do, or may have soon."""
        return self.is_growing or super().needs(delivery)

    # What is written

    def acknowledge(self, delivery: Delivery) -> None:
        """Record on disk which events a delivery has acknowledged. Under the lock."""
        self.has_news = True
        if not self.is_growing:
            super().acknowledge(delivery)
        elif self.is_given_back:
            # It is written when the journal is closed, if the delivery is still locked.
            self._notify()
        else:
            self._note_position(delivery)

    def _note_position(self, delivery: Delivery) -> None:
        before = int(max(self._begins[delivery.name], min(delivery.oldest, self._next)))
        if before > self._noted[delivery.name]:
            # If the folder has been removed, no events are left to deliver either.
            with suppress(OSError):
                self.spool.acknowledge(delivery.name, before)
                self._noted[delivery.name] = before

    def note(self, at_once: bool = False) -> None:
        """Write how far the children are and what became of the events, if that is news and was not written just now.

        The position comes first: if this process is killed in between, the next one finds out what the account misses.

        Args:
            at_once: Whether to write it even if it was written just now.

        Raises:
            FileNotFoundError: The folder is gone, or the lock of its delivery was taken away.
            OSError: It cannot be written now.
        """
        is_due_done = self._due_noted < self._due <= min(self._noted.values(), default=0)
        now = self._clock.now()
        is_soon = now - self._noted_at < NOTE_SECONDS and not (is_due_done or at_once)
        if not (self.has_news and self.is_growing) or is_soon:
            return
        if not self.spool.delivers:
            raise FileNotFoundError(ENOENT, "the lock of the delivery was taken away", str(self.spool.folder))
        with patiently(self.lock):
            self.has_news = False
            for delivery in self.deliveries:
                self._note_position(delivery)
            account = {delivery.name: self._account_of(delivery) for delivery in self.deliveries}
        self._noted_at = now
        if is_due_done:
            self._due_noted = self._due
        try:
            self.spool.write_account({**self._former, **account})
        except BaseException:
            self.has_news = True
            raise

    def _account_of(self, delivery: Delivery) -> ChildAccount:
        stats, former = delivery.stats(), self._former.get(delivery.name)
        before = self._noted[delivery.name]
        if former is None:
            since = self._begins[delivery.name]
            former = ChildAccount(since, since, stats.state, 0, 0, 0, 0, 0, 0, {}, {}, {}, None)
        return ChildAccount(
            former.since,
            before,
            stats.state,
            former.delivered + self._delivered_before[delivery.name] + stats.delivered,
            former.rejected + stats.rejected,
            former.rejected_not_kept + stats.rejected_not_kept,
            former.dropped + stats.dropped,
            former.withheld + stats.withheld,
            former.shortened + stats.shortened,
            _sum(former.rejected_reasons, stats.rejected_reasons),
            _sum(former.withheld_reasons, stats.withheld_reasons),
            _sum(former.redacted, stats.redacted),
            stats.last_error or former.last_error,
        )

    def close(self) -> None:
        """Give the folder back to its process; remove it if that is dead and nothing in it waits. Under the lock."""
        self._reader.close()
        with suppress(OSError):
            self.note(at_once=True)
        if self.is_growing:
            self.spool.abandon()
        else:
            self.spool.close()


def _sum(one: Mapping[str, int], other: Mapping[str, int]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for reason, number in chain(one.items(), other.items()):
        count_reason(counts, reason, number)
    return counts
