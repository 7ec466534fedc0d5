"""What one child does with the events meant for it: queue, batch, export, retry, account.

A `Delivery` is a state machine without thread, sleep or clock. Told the time and how exports ended, it
says what to do next; `worker.py` does it. One export at a time, oldest first: the retry of the oldest
batch is at once the probe that finds out whether an unavailable backend is back.
"""

from __future__ import annotations

import logging
import random
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from itertools import accumulate, chain, islice
from math import inf
from typing import TypeAlias
from uuid import UUID

from composite_logstore.backend import RejectedError, RetryableError, TooLargeError, UnavailableError
from composite_logstore.config import ChildConfig
from composite_logstore.delivery.backoff import (
    at_most,
    count_reason,
    is_judged,
    may_be_size,
    rejections,
    retry_after,
)
from composite_logstore.delivery.batch_size import MOST_REJECTED, BatchSize
from composite_logstore.event import LogEvent, Stream, total_size
from composite_logstore.inert import described, message_of

_LONGEST_DELAY_MILLIS = 3_600_000


class State(str, Enum):
    """How a child's backend is doing."""

    HEALTHY = "healthy"
    RETRYING = "retrying"
    UNAVAILABLE = "unavailable"


class Outcome(Enum):
    """What can happen to an export, as far as the state is concerned."""

    ANSWERED = "the backend took the batch, or said which of its events it will never take"
    TOO_LARGE = "the batch has too many events or bytes for one request"
    REJECTED_ALL = "the backend has rejected so many events in a row, one by one, that they cannot be at fault"
    FAILED = "the backend did not take the batch this time"
    BROKEN_OFF = "the same: the export timed out or broke off so often that the batch may be too large"
    FAILED_LONG = "either, and the wait between retries has grown to its longest"
    REFUSED = "the backend can take nothing until somebody mends something"
    OVERDUE = "the export has not returned within export_timeout_millis"
    GIVEN_UP = "a flush saw no progress for flush_timeout_millis"


TRANSITIONS: dict[tuple[State, Outcome], State] = {
    (State.HEALTHY, Outcome.ANSWERED): State.HEALTHY,
    (State.HEALTHY, Outcome.TOO_LARGE): State.HEALTHY,
    (State.HEALTHY, Outcome.REJECTED_ALL): State.UNAVAILABLE,
    (State.HEALTHY, Outcome.FAILED): State.RETRYING,
    (State.HEALTHY, Outcome.BROKEN_OFF): State.RETRYING,
    (State.HEALTHY, Outcome.FAILED_LONG): State.UNAVAILABLE,
    (State.HEALTHY, Outcome.REFUSED): State.UNAVAILABLE,
    (State.HEALTHY, Outcome.OVERDUE): State.UNAVAILABLE,
    (State.HEALTHY, Outcome.GIVEN_UP): State.UNAVAILABLE,
    (State.RETRYING, Outcome.ANSWERED): State.HEALTHY,
    (State.RETRYING, Outcome.TOO_LARGE): State.HEALTHY,
    (State.RETRYING, Outcome.REJECTED_ALL): State.UNAVAILABLE,
    (State.RETRYING, Outcome.FAILED): State.RETRYING,
    (State.RETRYING, Outcome.BROKEN_OFF): State.RETRYING,
    (State.RETRYING, Outcome.FAILED_LONG): State.UNAVAILABLE,
    (State.RETRYING, Outcome.REFUSED): State.UNAVAILABLE,
    (State.RETRYING, Outcome.OVERDUE): State.UNAVAILABLE,
    (State.RETRYING, Outcome.GIVEN_UP): State.UNAVAILABLE,
    (State.UNAVAILABLE, Outcome.ANSWERED): State.HEALTHY,
    (State.UNAVAILABLE, Outcome.TOO_LARGE): State.HEALTHY,
    (State.UNAVAILABLE, Outcome.REJECTED_ALL): State.UNAVAILABLE,
    (State.UNAVAILABLE, Outcome.FAILED): State.UNAVAILABLE,
    (State.UNAVAILABLE, Outcome.BROKEN_OFF): State.UNAVAILABLE,
    (State.UNAVAILABLE, Outcome.FAILED_LONG): State.UNAVAILABLE,
    (State.UNAVAILABLE, Outcome.REFUSED): State.UNAVAILABLE,
    (State.UNAVAILABLE, Outcome.OVERDUE): State.UNAVAILABLE,
    # A flush does not wait for an unavailable child, so it cannot give it up.
}


@dataclass(frozen=True)
class Export:
    """Export this batch now, then say how it ended."""

    batch: list[LogEvent]


@dataclass(frozen=True)
class Load:
    """Read the next events of the child back from the spool, then hand them over: those that its queue has not.

    Attributes:
        after: Only events with numbers above this are wanted.
        events: How many at most.
        there: How many are thought to be there.
    """

    after: int
    events: int
    there: int


@dataclass(frozen=True)
class EndStream:
    """Tell the exporter that the stream has ended: all its events are settled."""

    stream: Stream


@dataclass(frozen=True)
class Wait:
    """Do nothing.

    Attributes:
        seconds: For how long, None for as long as nothing happens.
        events: Unless so many events more are there before; None if events change nothing.
    """

    seconds: float | None
    events: int | None = None


Action: TypeAlias = Export | Load | EndStream | Wait


@dataclass(frozen=True)
class ChildStats:
    """What became of the events meant for a child: `accepted = delivered + rejected + dropped + pending`.

    Attributes:
        state: `healthy`, `retrying` or `unavailable`.
        accepted: Events that were meant for the child.
        delivered: Events that its backend has taken.
        rejected: Events that its backend will never take.
        dropped: Events that gave way to newer ones in a full queue.
        pending: Events that wait, or are being exported.
        shortened: Delivered events that were too large for the backend as they were.
        rejected_reasons: A reason → how many events were rejected for it.
        last_error: The last thing that went wrong, None if nothing has.
    """

    state: str
    accepted: int
    delivered: int
    rejected: int
    dropped: int
    pending: int
    shortened: int
    rejected_reasons: dict[str, int]
    last_error: str | None

    def plus(self, other: ChildStats) -> ChildStats:
        """Return the account of both: of this process, and of what it has adopted."""
        reasons = Counter(self.rejected_reasons) + Counter(other.rejected_reasons)
        return ChildStats(
            state=self.state,
            accepted=self.accepted + other.accepted,
            delivered=self.delivered + other.delivered,
            rejected=self.rejected + other.rejected,
            dropped=self.dropped + other.dropped,
            pending=self.pending + other.pending,
            shortened=self.shortened + other.shortened,
            rejected_reasons=dict(reasons),
            last_error=self.last_error or other.last_error,
        )


class Delivery:
    """The delivery to one child. Its journal's lock guards every call.

    Attributes:
        queue: The events that wait. The journal appends to it; when it is full the oldest gives way.
        state: How the backend is doing.
        delay: How long an event may wait for a fuller batch, in seconds.
        settled: How many events are delivered or rejected: it grows while there is progress.
        updates: How many of a progress bar's updates were accepted, where only the latest are.
        lost_in_forks: How many of those that count as dropped were lost on the way from a forked process.
        is_thinned: Whether of a progress bar's updates it gets the latest alone.
        taken: The number of the last event that was taken from the queue or the spool.
        updates_in_spool: The numbers of a progress bar's updates that gave way in a full queue: of those in
            the spool, they alone are meant for a child that wants the latest.
    """

    def __init__(
        self,
        config: ChildConfig,
        accepted: Callable[[], int],
        rand: Callable[[], float] = random.random,
        spooled: bool = False,
        settled_before: int = 0,
        batch_bytes: int | None = None,
    ):
        """Start with nothing.

        Args:
            config: The child's settings.
            accepted: Tells how many events the journal has meant for the child.
            rand: A number from 0 to 1, for the jitter of retries.
            spooled: Whether what gives way in a full queue is in the spool.
            settled_before: The number below which everything was settled by an earlier process.
            batch_bytes: Roughly how many bytes of events it may have in one export; as many as the backend likes if
                not given.
        """
        self.name = config.name
        self.queue: deque[LogEvent] = deque(maxlen=config.max_queue_size)
        self.state = State.HEALTHY
        self.updates = 0
        self.lost_in_forks = 0
        self._config = config
        self.is_thinned = config.is_thinned
        self._accepted = accepted
        self._rand = rand
        self._batch_size = config.batch_size
        self._size = BatchSize(config.batch_size)
        self.batch_bytes = min(config.max_batch_bytes, batch_bytes or config.max_batch_bytes)
        self.delay = config.schedule_delay_millis / 1000
        self._timeout = config.export_timeout_millis / 1000
        self._first_wait = config.retry_initial_interval_millis / 1000
        self._longest_wait = config.retry_max_interval_millis / 1000
        self._spooled = spooled
        self.taken = settled_before - 1
        self.updates_in_spool: set[int] = set()
        # How many of those that gave way in a full queue are not in the spool after all.
        self._lost = 0
        self._loaded_bytes = 0
        # How many bytes of events are in the queue at most, and in one of them, if it has no more events than these.
        self._queue_bytes = self._queue_events = self._queue_largest = 0
        # What was taken from the queue and is not yet settled: a batch, or the pieces of one with an event at fault.
        self._batches: deque[list[LogEvent]] = deque()
        # How many events of the first of them are being exported, or were last.
        self._exporting = 0
        self._exporting_since: float | None = None
        self._waiting_since: float | None = None
        self._failures = 0
        # How many events were rejected, each by itself, since the backend last took one.
        self._rejected_in_a_row = 0
        self._retry_at = -inf
        self._due_before = 0
        self._ended: deque[tuple[int, Stream]] = deque()
        # The last update of each progress bar, and which updates are of a second that is over.
        self._latest: dict[tuple[UUID, str], LogEvent] = {}
        self._over_before = self._seen_before = 0
        self._seen_at = -inf
        self._delivered = self._rejected = self._shortened = 0
        self._reasons: Counter[str] = Counter()
        self._last_error: str | None = None

    # What to do

    def next(self, now: float) -> Action:
        """Say what to do now.

        Args:
            now: The time in seconds, on a clock that never goes back.
        """
        if now < self._retry_at:
            return Wait(self._retry_at - now)
        if self._ended and self.oldest >= self._ended[0][0]:
            return EndStream(self._ended.popleft()[1])
        if not self._batches:
            if self._in_spool:
                return Load(self.taken, self._batch_size, there=self._in_spool)
            if not self.queue:
                self._waiting_since = None
                return Wait(None, events=1)
            if self._waiting_since is None:
                self._waiting_since = now
            due_at = self._waiting_since + self.delay
            is_full = len(self.queue) >= self._batch_size or self._queue_bytes >= self.batch_bytes
            is_due = now >= due_at or is_full
            if not is_due and self.queue[0].number >= self._due_before:
                return Wait(due_at - now, events=self._batch_size - len(self.queue))
            batch = self._take(now)
            if not batch:
                return Wait(self._seen_at + 1 - now)
            self._batches.append(batch)
            self._loaded_bytes = 0
            self.taken = batch[-1].number
            self._waiting_since = now
        self._exporting_since = now
        self._exporting = min(len(self._batches[0]), 1 if self._is_probing else self._size.limit)
        return Export(self._batches[0][: self._exporting])

    def loaded(self, events: list[LogEvent], there: int) -> None:
        """Take what was read from the spool.

        Args:
            events: The events. If there is none, what was thought to be there is lost.
            there: How many were thought to be there.
        """
        self.updates_in_spool.difference_update(event.number for event in events if event.progress)
        # What had to make room meanwhile is counted already.
        batch = [event for event in events if event.number > self.taken]
        if batch:
            self._batches.append(batch)
            self._loaded_bytes = total_size(batch)
            self.taken = batch[-1].number
        elif not events:
            self._lost += min(there, self._in_spool)

    def not_loaded(self, error: Exception, now: float) -> None:
        """Reading from the spool raised. It is tried again.

        Args:
            error: What it raised.
            now: The time in seconds.
        """
        self._last_error = f"the spool cannot be read: {getattr(error, 'strerror', None) or described(error)}"
        self._retry_at = now + self._jittered(self._longest_wait)

    def withdraw(self, last: float) -> int:
        """Take the events up to number `last` out of memory, but for those that are being exported.

        Returns:
            How many of them had been taken from the queue, and waited to be tried again.
        """
        while self.queue and self.queue[0].number <= last:
            self.queue.popleft()
        before = sum(map(len, self._batches))
        if self._exporting_since is None:
            rests = [[event for event in batch if event.number > last] for batch in self._batches]
            self._batches = deque(rest for rest in rests if rest)
        return before - sum(map(len, self._batches))

    def give_way(self, last: int, on_disk: tuple[float, float]) -> None:
        """Take the events up to number `last` out of the queue, for want of room in memory.

        Args:
            last: See above.
            on_disk: The numbers from which on and below which they are on disk. The others count as dropped.
        """
        first, before = on_disk
        while self.queue and self.queue[0].number <= last:
            event = self.queue.popleft()
            if not first <= event.number < before:
                self._lost += 1
            elif event.progress:
                self.updates_in_spool.add(event.number)

    def give_up_spooled(self, events: int, last: int) -> None:
        """Count the oldest events of the spool, up to number `last`, as dropped: they had to make room."""
        self._lost += min(events, self._in_spool)
        self.taken = max(self.taken, last)
        self.updates_in_spool = {number for number in self.updates_in_spool if number > last}

    def wanted_of(self, kinds: Mapping[tuple[int, bool], int], first: int, last: float) -> int | None:
        """Return how many of a run of events in the spool are meant for the child, and not yet taken or queued.

        Args:
            kinds: How many events there are of each level, ordinary ones and a progress bar's updates.
            first: The number below which none of them is.
            last: The number above which none of them is.

        Returns:
            The number; None if some of them are taken or queued, so that each has to be looked at.
        """
        if first <= self.taken or (self.queue and self.queue[0].number <= last):
            return None
        wanted = sum(count for kind, count in kinds.items() if self._config.expects(*kind))
        if self.is_thinned and self._config.wants(logging.INFO):
            wanted += sum(first <= number <= last for number in self.updates_in_spool)
        return wanted

    def wants(self, event: LogEvent) -> LogEvent | None:
        """Return an event of the spool as the child is to have it, None if it is not meant for it."""
        if event.progress and self.is_thinned:
            if event.number not in self.updates_in_spool:
                return None
            event = event._replace(level=logging.INFO, level_name="INFO")
        return event if self._config.wants(event.level) else None

    def flush(self, before: int) -> None:
        """Let no event whose number is below `before` wait for a fuller batch."""
        self._due_before = max(self._due_before, before)

    def end_stream(self, stream: Stream, before: int) -> None:
        """Note that the stream has ended; its last event's number is below `before`."""
        self._ended.append((before, stream))
        for logger_name in ("stdout", "stderr"):
            self._latest.pop((stream.id, logger_name), None)

    def update(self, event: LogEvent) -> LogEvent | None:
        """Take a progress bar's update, in place of the one before if that is of the same second and waits.

        Returns:
            The update before, if it has not given way.
        """
        if self._spooled and len(self.queue) == self.queue.maxlen and self.queue[0].progress:
            self.updates_in_spool.add(self.queue[0].number)
        if not event.progress:
            self.updates += 1
            self.queue.append(event)
            return None
        event = event._replace(level=logging.INFO, level_name="INFO")
        key = (event.stream.id, event.logger_name)
        before = self._latest.get(key)
        self._latest[key] = event
        if before and _second(before) == _second(event) and self._withdraw(before):
            before = None
        else:
            self.updates += 1
        self.queue.append(event)
        return before

    def came(self, events: int, size: int, largest: int) -> bool:
        """Note that events have come into the queue.

        Args:
            events: How many.
            size: How many bytes they take together.
            largest: How many the largest of them takes.

        Returns:
            Whether they fill a batch, so that nothing waits for a fuller one.
        """
        was_full = self._queue_bytes >= self.batch_bytes
        self._queue_events += events
        self._queue_bytes += size
        self._queue_largest = max(self._queue_largest, largest)
        return self._queue_bytes >= self.batch_bytes and not was_full

    # What happened

    def exported(self, shortened: int = 0, now: float = -inf) -> None:
        """The backend took the batch.

        Args:
            shortened: How many of its events had to be shortened.
            now: The time in seconds, if it is to be seen whether the export took too long.
        """
        if self._is_overdue(now):
            # A smaller one would have been in time.
            self._size.broken_off(self._exporting)
        else:
            self._size.taken(self._exporting)
        self._settle(0, shortened)

    def failed(self, error: BaseException, now: float) -> None:
        """The export raised.

        Args:
            error: What it raised.
            now: The time in seconds.
        """
        if isinstance(error, RetryableError | RejectedError | TooLargeError | UnavailableError):
            reason = message_of(error)
        else:
            # A file that cannot be opened, or no memory, may be the machine's fault.
            is_defect = not isinstance(error, OSError | ImportError | MemoryError)
            reason = f"{'defect of the backend: ' if is_defect else ''}{described(error)}"
        self._last_error = reason
        if isinstance(error, RejectedError | TooLargeError):
            rejected = rejections(error, self._exporting)
            if rejected is not None:
                self._reject(rejected, error, reason, now)
            elif isinstance(error, TooLargeError):
                self._size.too_large(self._exporting)
                self._over(Outcome.TOO_LARGE)
            else:
                self._split()
        elif isinstance(error, UnavailableError):
            self._retry_at = now + self._jittered(self._longest_wait)
            self._over(Outcome.REFUSED)
        else:
            self._retry_later(error, now)

    def _reject(self, rejected: int, error: BaseException, reason: str, now: float) -> None:
        """The backend will never take so many of the events. Of one that refuses them all they are not at fault."""
        count_reason(self._reasons, reason, rejected)
        outcome = Outcome.ANSWERED
        if not is_judged(error):
            self._rejected_in_a_row += rejected
            if self._is_probing:
                outcome = Outcome.REJECTED_ALL
                self._last_error = f"the last {self._rejected_in_a_row} events were rejected: {reason}"
        elif rejected < self._exporting:
            self._size.taken(self._exporting)
        self._settle(rejected, getattr(error, "shortened", 0), outcome)
        if outcome is Outcome.REJECTED_ALL:
            self._retry_at = now + self._jittered(self._wait_after(self._rejected_in_a_row - MOST_REJECTED))

    def _retry_later(self, error: BaseException, now: float) -> None:
        """The backend did not take the batch this time."""
        wait = self._wait_after(self._failures)
        self._failures += 1
        asked_for = retry_after(error)
        # One that asks to be tried again at once, and again, would otherwise be asked without end.
        shortest = self._jittered(self._first_wait)
        self._retry_at = now + (self._jittered(wait) if asked_for is None else max(asked_for, shortest))
        is_smaller = may_be_size(error, self._is_overdue(now)) and self._size.broken_off(self._exporting)
        if wait >= self._longest_wait:
            self._over(Outcome.FAILED_LONG)
        else:
            self._over(Outcome.BROKEN_OFF if is_smaller else Outcome.FAILED)

    def _wait_after(self, failures: int) -> float:
        """Return how long to wait after so many failures in a row, in seconds."""
        # 64 doublings are more than any interval has room for.
        return min(self._first_wait * 2.0 ** min(failures, 64), self._longest_wait)

    def watch(self, now: float) -> None:
        """Notice that an export has been under way for too long. It cannot be stopped, only waited for."""
        if self._is_overdue(now):
            if self.state is not State.UNAVAILABLE:
                self._last_error = f"an export has not returned within {self._timeout:g} s"
            self._enter(Outcome.OVERDUE)

    def give_up(self) -> None:
        """A flush stopped waiting: the next one need not wait again."""
        self._last_error = self._last_error or "no progress during a flush"
        if self.state is not State.UNAVAILABLE:
            self._enter(Outcome.GIVEN_UP)

    def hindered(self, why: str) -> None:
        """Something that is no backend keeps events from being delivered, or from being kept safe meanwhile."""
        self._last_error = why

    def set_delay(self, millis: object) -> None:
        """Take what an exporter says about how long events are to wait, in milliseconds, if it is a number."""
        if isinstance(millis, int):
            self.delay = min(max(0, millis), _LONGEST_DELAY_MILLIS) / 1000

    # How it stands

    @property
    def oldest(self) -> float:
        """The number of the oldest event that is not settled, infinity if all are.

        Below it there may be events that are not meant for the child.
        """
        if self._batches:
            return self._batches[0][0].number
        if self._in_spool:
            return self.taken + 1
        return self.queue[0].number if self.queue else inf

    @property
    def first_in_queue(self) -> float:
        """The number of the oldest event in the queue, infinity if there is none."""
        return self.queue[0].number if self.queue else inf

    def holds(self, first: int, last: int) -> bool:
        """Return whether it may have some of the events from number `first` to `last` in memory."""
        if self._batches and first <= self._batches[-1][-1].number and last >= self._batches[0][0].number:
            return True
        return last >= self.first_in_queue

    @property
    def loaded_bytes(self) -> int:
        """How many bytes of events were read back from the spool, and are not settled."""
        return self._loaded_bytes if self._batches else 0

    def in_memory(self) -> Iterator[LogEvent]:
        """Yield the events that are not settled, but for those that wait on disk alone."""
        return chain(*self._batches, self.queue)

    @property
    def settled(self) -> int:
        """How many events are delivered or rejected."""
        return self._delivered + self._rejected

    @property
    def pending(self) -> int:
        """How many events wait, or are being exported."""
        return self._in_memory + self._in_spool

    def _is_overdue(self, now: float) -> bool:
        """Say whether an export is under way, and takes longer than it may."""
        return self._exporting_since is not None and now - self._exporting_since > self._timeout

    @property
    def _is_probing(self) -> bool:
        """Whether the backend rejects everything, so that single events find out when it takes some again."""
        return self._rejected_in_a_row >= MOST_REJECTED

    @property
    def _in_memory(self) -> int:
        return len(self.queue) + sum(map(len, self._batches))

    @property
    def _in_spool(self) -> int:
        """How many events gave way in a full queue, and can be read back."""
        return self._accepted() - self.settled - self._lost - self._in_memory if self._spooled else 0

    @property
    def last_error(self) -> str | None:
        """The last thing that went wrong."""
        return self._last_error

    def stats(self) -> ChildStats:
        """Return the account as of now."""
        accepted, pending = self._accepted(), self.pending
        return ChildStats(
            state=self.state.value,
            accepted=accepted,
            delivered=self._delivered,
            rejected=self._rejected,
            # What was accepted, and is neither settled nor here, gave way in a full queue.
            dropped=accepted - self.settled - pending,
            pending=pending,
            shortened=self._shortened,
            rejected_reasons=dict(self._reasons),
            last_error=self._last_error,
        )

    def _settle(self, rejected: int, shortened: int, outcome: Outcome = Outcome.ANSWERED) -> None:
        taken = self._exporting - rejected
        self._delivered += taken
        self._rejected += rejected
        self._shortened += at_most(taken, shortened)
        if taken:
            self._rejected_in_a_row = 0
        rest = self._batches.popleft()[self._exporting :]
        if rest:
            self._batches.appendleft(rest)
        self._failures = 0
        self._retry_at = -inf
        self._over(outcome)

    def _split(self) -> None:
        """Try the halves each by itself: in one of them there is an event at fault."""
        batch = self._batches.popleft()
        middle, end = self._exporting // 2, self._exporting
        pieces = (batch[end:], batch[middle:end], batch[:middle])
        self._batches.extendleft(piece for piece in pieces if piece)
        self._over(Outcome.ANSWERED)

    def _over(self, outcome: Outcome) -> None:
        """Note that the export is over."""
        self._exporting_since = None
        self._enter(outcome)

    def _enter(self, outcome: Outcome) -> None:
        self.state = TRANSITIONS[self.state, outcome]

    def _jittered(self, seconds: float) -> float:
        """Return between half and all of it, so that many writers do not ask at the same moment."""
        return seconds * (0.5 + 0.5 * self._rand())

    def _take(self, now: float) -> list[LogEvent]:
        """Take the next events from the queue, as many as a batch may have. A large event goes alone."""
        number = min(len(self.queue), self._batch_size)
        if self.is_thinned:
            if now - self._seen_at >= 1:
                self._over_before, self._seen_before, self._seen_at = self._seen_before, self.queue[-1].number + 1, now
            waiting = enumerate(islice(self.queue, number))
            number = next((place for place, event in waiting if self._may_be_replaced(event)), number)
        size = 0
        # To add up sizes takes longer than all else here.
        if self._queue_largest * number > self.batch_bytes or self._queue_events < len(self.queue):
            events = list(islice(self.queue, number))
            size = total_size(events)
            if size > self.batch_bytes:
                # Those that have to stay have waited as long.
                self._due_before = max(self._due_before, events[-1].number + 1)
                sizes = list(accumulate(event.size for event in events))
                number = max(1, bisect_right(sizes, self.batch_bytes))
                size = sizes[number - 1]
        taken = [self.queue.popleft() for _ in range(number)]
        if self.queue:
            self._queue_bytes = max(0, self._queue_bytes - size)
            self._queue_events = max(0, self._queue_events - number)
        else:
            self._queue_bytes = self._queue_events = self._queue_largest = 0
        return taken

    def _may_be_replaced(self, event: LogEvent) -> bool:
        """Say whether the update is its progress bar's newest, and of a second that may not be over."""
        return (
            event.progress
            and event.number >= max(self._over_before, self._due_before)
            and self._latest.get((event.stream.id, event.logger_name)) is event
        )

    def _withdraw(self, event: LogEvent) -> bool:
        """Take an event back out of the queue, near whose end it is if it still waits."""
        for place, waiting in enumerate(reversed(self.queue), start=1):
            if waiting.number <= event.number:
                if waiting is event:
                    del self.queue[-place]
                return waiting is event
        return False


def _second(event: LogEvent) -> int:
    return event.time_unix_nano // 1_000_000_000


class Flush:
    """How long a flush waits: on for children that make progress, not at all for unavailable ones.

    Like a delivery it has no clock.
    """

    def __init__(self, deliveries: list[Delivery], before: int, now: float, timeout: float, limit: float) -> None:
        """Begin.

        Args:
            deliveries: The children.
            before: Events with numbers below this are to be settled.
            now: The time in seconds.
            timeout: How long to wait for a child that makes no progress, in seconds.
            limit: How long to wait at all, in seconds.
        """
        self._before = before
        self._timeout = timeout
        self._end = now + limit
        self._waiting = {delivery.name: delivery for delivery in deliveries}
        self._progress = {delivery.name: (delivery.settled, now) for delivery in deliveries}
        for delivery in deliveries:
            delivery.flush(before)

    def wait(self, now: float) -> float:
        """Return for how many seconds at most to wait before asking again; 0 when it is over."""
        seconds = inf
        for name, delivery in list(self._waiting.items()):
            delivery.watch(now)
            settled, since = self._progress[name]
            if delivery.settled > settled:
                since = now
                self._progress[name] = (delivery.settled, now)
            left = since + self._timeout - now
            if delivery.oldest >= self._before or delivery.state is State.UNAVAILABLE:
                del self._waiting[name]
            elif left <= 0:
                delivery.give_up()
                del self._waiting[name]
            else:
                seconds = min(seconds, left)
        if not self._waiting or now >= self._end:
            return 0.0
        return min(seconds, self._end - now)
