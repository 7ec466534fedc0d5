"""For a child that wants it so, only the latest update of a progress bar in each second is delivered."""

from __future__ import annotations

import logging
from collections import deque
from itertools import islice
from math import inf
from typing import TypeAlias
from uuid import UUID

from composite_logstore.event import LogEvent, Stream

Bar: TypeAlias = tuple[UUID, str, int]
"""A progress bar: its stream's id, the logger's name, and its number."""

_MOST_BARS = 1_000
"""Of how many bars the last update is remembered. Of another one, a further update in the same second is delivered."""


class ProgressBars:
    """The updates of progress bars on their way to one child. The lock of its journal guards every call.

    Attributes:
        is_thinned: Whether the child gets only the latest update of each second.
        accepted: How many events `append` has put into the queue, less those that a later update has replaced.
        in_spool: The numbers of the updates that are on disk because the queue was full. Of all updates on disk, a
            child that wants the latest gets only these.
        seen_at: When `final` last began a second, in seconds.
    """

    def __init__(self, queue: deque[LogEvent], is_thinned: bool, spooled: bool) -> None:
        """Begin without updates.

        Args:
            queue: The events that wait for the child.
            is_thinned: Whether the child gets only the latest update of each second.
            spooled: Whether the spool holds the events that leave a full queue.
        """
        self.is_thinned = is_thinned
        self.accepted = 0
        self.in_spool: set[int] = set()
        self.seen_at = -inf
        self._queue = queue
        self._spooled = spooled
        # The last update of each progress bar, the oldest first.
        self._latest: dict[Bar, LogEvent] = {}
        # The numbers at which the last two seconds ended, as `final` saw them: updates below the first are final.
        self._over_before = self._seen_before = 0

    def append(self, event: LogEvent) -> LogEvent | None:
        """Append an event to the queue. An update replaces the one before if that is of the same second and waits.

        Returns:
            The update before, if it was not replaced.
        """
        if self._spooled and len(self._queue) == self._queue.maxlen and self._queue[0].progress:
            self.in_spool.add(self._queue[0].number)
        if not event.progress:
            self.accepted += 1
            self._queue.append(event)
            return None
        event = at_info(event)
        before = self._remember(event)
        if before and second_of(before) == second_of(event) and self._remove(before):
            before = None
        else:
            self.accepted += 1
        self._queue.append(event)
        return before

    def final(self, most: int, now: float, due_before: int) -> int:
        """Return how many events at the front of the queue no later update can replace.

        Args:
            most: How many events to look at.
            now: The time in seconds.
            due_before: Events with numbers below this do not wait for a later update.
        """
        if now - self.seen_at >= 1:
            self._over_before, self._seen_before, self.seen_at = self._seen_before, self._queue[-1].number + 1, now
        before = max(self._over_before, due_before)
        for place, event in enumerate(islice(self._queue, most)):
            is_latest = event.progress and self._latest.get(bar_of(event)) is event
            if is_latest and event.number >= before:
                return place
        return most

    def wants(self, event: LogEvent) -> LogEvent | None:
        """Return an event of the spool as the child gets it, None if the child does not get it."""
        if not (event.progress and self.is_thinned):
            return event
        return at_info(event) if event.number in self.in_spool else None

    def forget(self) -> None:
        """Forget all updates: another process looks at those on disk from now on."""
        self.in_spool.clear()
        self._latest.clear()

    def find(self, event: LogEvent) -> int:
        """Note an update that waits on disk, in the order of the numbers.

        Returns:
            By how many the events that the child gets become more: 0 if it replaces one of the same second.
        """
        before = self._remember(event)
        is_replaced = before is not None and second_of(before) == second_of(event) and before.number in self.in_spool
        if before is not None and is_replaced:
            self.in_spool.discard(before.number)
        self.in_spool.add(event.number)
        return 0 if is_replaced else 1

    def _remember(self, event: LogEvent) -> LogEvent | None:
        """Remember an update as the latest of its bar. Returns the one before, if that is remembered."""
        key = bar_of(event)
        before = self._latest.pop(key, None)
        self._latest[key] = event
        if len(self._latest) > _MOST_BARS:
            del self._latest[next(iter(self._latest))]
        return before

    def end_stream(self, stream: Stream) -> None:
        """Forget the last updates of a stream that has ended."""
        for key in [key for key in self._latest if key[0] == stream.id]:
            del self._latest[key]

    def give_up(self, last: int) -> None:
        """Forget the updates in the spool up to number `last`: they are lost."""
        self.in_spool = {number for number in self.in_spool if number > last}

    def _remove(self, event: LogEvent) -> bool:
        """Remove an event from the queue, if it still waits. Events of the last second are near the end."""
        for place, waiting in enumerate(reversed(self._queue), start=1):
            if waiting.number <= event.number:
                if waiting is event:
                    del self._queue[-place]
                return waiting is event
        return False


def bar_of(event: LogEvent) -> Bar:
    """Return which progress bar an update belongs to."""
    return event.stream.id, event.logger_name, event.progress


def at_info(event: LogEvent) -> LogEvent:
    """Return an update of a progress bar as a thinned child gets it."""
    return event._replace(level=logging.INFO, level_name="INFO")


def second_of(event: LogEvent) -> int:
    """Return the second of an event's time, since the epoch."""
    return event.time_unix_nano // 1_000_000_000
