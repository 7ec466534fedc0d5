"""The delivery of events to one child: queue, batches, retries and account.

A `Delivery` is a state machine without a thread, a clock or a socket. The caller tells it the time and how exports
ended; it answers with the next action, and `worker.py` performs that. One export is under way at a time, the oldest
batch first. So the retry of the oldest batch also finds out whether an unavailable backend works again.
"""

from __future__ import annotations

import logging
import random
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from itertools import accumulate, chain, islice
from math import inf

from composite_logstore.bounds import Bounds
from composite_logstore.child_config import ChildConfig
from composite_logstore.delivery.account import NOTHING, OTHER_REASONS, ChildStats, count_reason
from composite_logstore.delivery.backoff import Backoff, ExportPolicy, bounded_count
from composite_logstore.delivery.progress_bars import ProgressBars
from composite_logstore.delivery.states import TRANSITIONS, Action, EndStream, Export, Load, Outcome, State, Wait
from composite_logstore.event import LogEvent, Stream, total_size
from composite_logstore.inert import described
from composite_logstore.processing.processor import Processed

_MOST_LEVELS = 100
"""Of how many levels a delivery remembers whether the child gets them: a program may use any number as a level."""


URGENT_LEVEL = logging.WARNING
"""The level from which events are urgent: of a killed process they matter most."""

URGENT_SECONDS = 1.0
"""If the events of a child wait for longer than this, urgent ones are exported at once, but no more often than this."""


def is_urgent(event: LogEvent) -> bool:
    """Return whether an event is exported without waiting for a fuller batch."""
    return event.level >= URGENT_LEVEL and not event.progress


class Delivery:
    """The delivery to one child. The lock of its journal guards every call.

    Attributes:
        name: The child's name.
        queue: The events that wait. The journal appends to it, and a full queue loses its oldest event.
        state: The state of the child.
        delay: How long an event may wait for a fuller batch, in seconds.
        batch_bytes: About how many bytes of events one export may have.
        last_error: The last problem, None if there was none: of the backend, or of this process, such as a thread that
            cannot start.
        lost_in_forks: How many of the dropped events were lost on the way from a forked process.
        not_kept: How many of the rejected events are not kept on disk.
        progress_bars: The updates of progress bars, of which the child may want only the latest.
        taken: The number of the last event that left the queue, or was loaded from the spool.
    """

    def __init__(
        self,
        config: ChildConfig,
        accepted: Callable[[], int],
        rand: Callable[[], float] = random.random,
        spooled: bool = False,
        acknowledged_before: int = 0,
        batch_bytes: int | None = None,
    ):
        """Start with an empty queue.

        Args:
            config: The child's settings.
            accepted: Returns how many events the journal has accepted for the child.
            rand: Returns a number from 0 to 1, for the jitter of retries.
            spooled: Whether the spool holds the events that leave a full queue.
            acknowledged_before: An earlier process has acknowledged all events below this number.
            batch_bytes: About how many bytes of events one export may have; without it the child's own limit holds.
        """
        self.name = config.name
        self.queue: deque[LogEvent] = deque(maxlen=config.max_queue_size)
        self.state = State.HEALTHY
        self.lost_in_forks = self.not_kept = 0
        self._config = config
        # Asked for every event that is read from the spool: the settings themselves take ten times as long to answer.
        self._wants_level = lru_cache(maxsize=_MOST_LEVELS)(config.wants)
        self.progress_bars = ProgressBars(self.queue, config.is_thinned, spooled)
        self._accepted = accepted
        self._batch_size = config.batch_size
        backoff = Backoff(config.retry_initial_interval_millis / 1000, config.retry_max_interval_millis / 1000, rand)
        self._policy = ExportPolicy(config.batch_size, backoff)
        self.batch_bytes = min(config.max_batch_bytes, batch_bytes or config.max_batch_bytes)
        self.delay = config.schedule_delay_millis / 1000
        self._timeout = config.export_timeout_millis / 1000
        self._spooled = spooled
        self.taken = acknowledged_before - 1
        # How many events left a full queue and are not in the spool.
        self._lost = 0
        # What agents have done, and how many accepted events were not meant for the child, as they see it.
        self._elsewhere = NOTHING
        self._unmeant = 0
        self._loaded_bytes = 0
        # Upper bounds for the events that `enqueued` has reported: their bytes, their number, the bytes of the largest.
        self._queue_bytes = self._queue_events = self._queue_largest = 0
        # The events that have left the queue and are not acknowledged: one batch, or the pieces of a split one.
        self._batches: deque[list[LogEvent]] = deque()
        # How many events of the first batch the present export has, or the last one had.
        self._exporting = 0
        self._exporting_since: float | None = None
        # When the last export began.
        self._exported_at = -inf
        # The last urgent event that was found in the queue, and up to which event the queue was searched.
        self._urgent = self._searched = -1
        self._waiting_since: float | None = None
        self._retry_at = -inf
        self._due_before = 0
        self._ended: deque[tuple[int, Stream]] = deque()
        self._delivered = self._rejected = self._withheld = self._shortened = 0
        self._reasons: Counter[str] = Counter()
        self._withheld_reasons: Counter[str] = Counter()
        self._redacted: Counter[str] = Counter()
        self.last_error: str | None = None

    # The next action

    def next(self, now: float) -> Action:
        """Return the next action.

        Args:
            now: The time in seconds, on a monotonic clock.
        """
        if now < self._retry_at:
            return Wait(self._retry_at - now)
        if self._ended and self.oldest >= self._ended[0][0]:
            return EndStream(self._ended.popleft()[1])
        if not self._batches:
            if self.in_spool:
                return Load(self.taken, self._batch_size, self.in_spool)
            if not self.queue:
                self._waiting_since = None
                return Wait(None, events=1)
            if self._waiting_since is None:
                self._waiting_since = now
            due_at = self._waiting_since + self.delay
            is_full = len(self.queue) >= self._batch_size or self._queue_bytes >= self.batch_bytes
            is_due = now >= due_at or is_full
            if not is_due and self.queue[0].number >= self._due_before:
                more = self._batch_size - len(self.queue)
                if self.delay <= URGENT_SECONDS:
                    return Wait(due_at - now, more)
                if not self._has_urgent():
                    return Wait(due_at - now, more, urgent=True)
                if now < self._exported_at + URGENT_SECONDS:
                    return Wait(min(self._exported_at + URGENT_SECONDS, due_at) - now, more)
            batch = self._take(now)
            if not batch:
                return Wait(self.progress_bars.seen_at + 1 - now)
            self._batches.append(batch)
            self._loaded_bytes = 0
            self.taken = batch[-1].number
            self._waiting_since = now
        self._exporting_since = self._exported_at = now
        self._exporting = min(len(self._batches[0]), self._policy.limit)
        return Export(self._batches[0][: self._exporting])

    def loaded(self, events: list[LogEvent], expected: int) -> None:
        """Take the events that were read from the spool.

        Args:
            events: The events. If there are none, the expected ones are lost.
            expected: How many events the spool was expected to hold.
        """
        self.progress_bars.in_spool.difference_update(event.number for event in events if event.progress)
        # Events that had to make room meanwhile are counted already.
        batch = [event for event in events if event.number > self.taken]
        if batch:
            self._batches.append(batch)
            self._loaded_bytes = total_size(batch)
            self.taken = batch[-1].number
        elif not events:
            self._lost += min(expected, self.in_spool)

    def not_loaded(self, error: Exception, now: float) -> None:
        """Note that reading from the spool failed. It is tried again.

        Args:
            error: The exception.
            now: The time in seconds.
        """
        self.last_error = f"the spool cannot be read: {getattr(error, 'strerror', None) or described(error)}"
        self._retry_at = now + self._policy.backoff.jittered(self._policy.backoff.longest)

    def free_memory(self, last: float) -> int:
        """Remove the events up to number `last` from memory, except those of an export under way.

        Returns:
            How many of them had left the queue, and waited for a retry.
        """
        while self.queue and self.queue[0].number <= last:
            self.queue.popleft()
        before = sum(map(len, self._batches))
        if self._exporting_since is None:
            rests = [[event for event in batch if event.number > last] for batch in self._batches]
            self._batches = deque(rest for rest in rests if rest)
        return before - sum(map(len, self._batches))

    def free_queue(self, last: int, on_disk: tuple[float, float]) -> None:
        """Remove the events up to number `last` from the queue, since memory is full.

        Args:
            last: The number of the last event to remove.
            on_disk: The first number that is on disk, and the first above it that is not. Other events are dropped.
        """
        first, before = on_disk
        while self.queue and self.queue[0].number <= last:
            event = self.queue.popleft()
            if not first <= event.number < before:
                self._lost += 1
            elif event.progress:
                self.progress_bars.in_spool.add(event.number)

    def leave_to_spool(self) -> None:
        """Remove all events from the queue. They are on disk, and are loaded from there."""
        if self.queue:
            self.free_queue(self.queue[-1].number, (0, inf))
        self._queue_bytes = self._queue_events = self._queue_largest = 0

    def drop_spooled(self, events: int, last: int) -> None:
        """Count events as dropped: those of the spool up to number `last` are gone or cannot be read."""
        self._lost += min(events, self.in_spool)
        self.taken = max(self.taken, last)
        self.progress_bars.give_up(last)

    def count_wanted(self, kinds: Mapping[tuple[int, bool], int], first: int, last: float) -> int | None:
        """Return how many events of a part of the spool the child still waits for.

        Args:
            kinds: The number of events of each kind: their level, and whether they are updates of a progress bar.
            first: The lowest number of the part.
            last: The highest number of the part.

        Returns:
            The count; None if some of the events have been taken or are in the queue, so that each has to be checked.
        """
        if first <= self.taken or self.first_in_queue <= last:
            return None
        wanted = sum(count for kind, count in kinds.items() if self._config.expects(*kind))
        bars = self.progress_bars
        if bars.is_thinned and self._config.wants(logging.INFO):
            wanted += sum(first <= number <= last for number in bars.in_spool)
        return wanted

    def wants(self, event: LogEvent) -> LogEvent | None:
        """Return an event of the spool as the child gets it, None if the child does not get it."""
        wanted = self.progress_bars.wants(event) if event.progress else event
        return wanted if wanted and self._wants_level(wanted.level) else None

    # Delivery by an agent

    def hand_over(self) -> None:
        """Forget the events in memory: from now on they are on disk or about to be. No export may be under way."""
        if self.oldest < inf:
            self.taken = int(self.oldest) - 1
        self.queue.clear()
        self._batches.clear()
        self._loaded_bytes = self._queue_bytes = self._queue_events = self._queue_largest = 0
        self._waiting_since, self._retry_at = None, -inf
        self.progress_bars.forget()

    def lose(self, event: LogEvent) -> None:
        """Count an event as dropped, if it is meant for the child: there is no room for it, on disk or in memory."""
        self._lost += self._config.wants(event.level, bool(event.progress))

    def follow(self, before: int, elsewhere: ChildStats, waiting: int | None = None) -> None:
        """Note what others have done for the child.

        They have the present settings, and know which updates of a progress bar were the latest. So they know better
        which events were meant for the child, and which were not lost after all.

        Args:
            before: The child has acknowledged all events below this number.
            elsewhere: The account of all events that others have dealt with.
            waiting: How many events wait on disk for the child, None if that is not known.
        """
        self.taken = max(self.taken, before - 1)
        while self._ended and self._ended[0][0] <= before:
            self._ended.popleft()
        self._elsewhere = elsewhere
        surplus = self._meant - self.acknowledged - self._lost - self._in_memory - (waiting or 0)
        found = min(max(0, -surplus), self._lost)
        self._lost -= found
        if surplus < 0 or waiting is not None:
            self._unmeant += surplus + found

    def flush(self, before: int) -> None:
        """Have all events with numbers below `before` exported without waiting for a fuller batch."""
        self._due_before = max(self._due_before, before)

    def end_stream(self, stream: Stream, before: int) -> None:
        """Note that a stream has ended. The numbers of its events are below `before`."""
        self._ended.append((before, stream))
        self.progress_bars.end_stream(stream)

    def enqueued(self, events: int, size: int, largest: int) -> bool:
        """Note that the journal has put events into the queue.

        Args:
            events: How many events.
            size: How many bytes they take together.
            largest: How many bytes the largest of them takes.

        Returns:
            Whether they complete a batch by their bytes, so that the worker should be woken.
        """
        was_full = self._queue_bytes >= self.batch_bytes
        self._queue_events += events
        self._queue_bytes += size
        self._queue_largest = max(self._queue_largest, largest)
        return self._queue_bytes >= self.batch_bytes and not was_full

    # Results

    def exported(self, shortened: int = 0, now: float = -inf, processed: Processed | None = None) -> None:
        """Note that the backend took the batch.

        Args:
            shortened: How many of its events had to be shortened.
            now: The time in seconds. Without it the export counts as in time.
            processed: What was exported; without it the whole batch.
        """
        self._policy.succeeded(self._exporting, self._is_overdue(now))
        self._retry_at = -inf
        self._acknowledge(0, shortened, processed)
        self._over(Outcome.ANSWERED)

    def withheld(self, processed: Processed) -> None:
        """Note that nothing of the batch had to be exported. The backend was not asked, so the state stays."""
        self._acknowledge(0, 0, processed)
        self._exporting_since = None

    def show_after_all(self, events: int, reason: str) -> None:
        """Count events as delivered that were withheld for a reason, and were exported in the end."""
        self._delivered += events
        self._withheld -= events
        counted = reason if reason in self._withheld_reasons else OTHER_REASONS
        # Without the reasons that are left with no event.
        self._withheld_reasons = self._withheld_reasons - Counter({counted: events})

    def failed(self, error: BaseException, now: float, processed: Processed | None = None) -> bool:
        """Note that the export raised.

        Args:
            error: The exception.
            now: The time in seconds.
            processed: What was to be exported; without it the whole batch.

        Returns:
            Whether the backend has answered for good: it rejects events, and takes all others.
        """
        sent = len(processed.events) if processed else self._exporting
        decision = self._policy.failed(error, self._exporting, self._is_overdue(now), sent)
        self.last_error = decision.message
        self._retry_at = now + decision.wait
        if decision.rejected is not None:
            count_reason(self._reasons, decision.reason, decision.rejected)
            self._acknowledge(decision.rejected, getattr(error, "shortened", 0), processed)
        elif decision.outcome is Outcome.ANSWERED:
            self._split()
        self._over(decision.outcome)
        return decision.rejected is not None

    def seconds_until_retry(self, now: float) -> float:
        """Return how long the next export waits because the last one has failed, in seconds; 0 if it does not.

        Args:
            now: The time in seconds.
        """
        return max(0.0, self._retry_at - now)

    def watch(self, now: float) -> None:
        """Make the child unavailable if an export takes too long. The export cannot be interrupted."""
        if self._is_overdue(now):
            if self.state is not State.UNAVAILABLE:
                self.last_error = f"an export has not returned within {self._timeout:g} s"
            self._enter(Outcome.OVERDUE)

    def give_up(self) -> None:
        """Note that a flush has given up on the child. The next flush does not wait for it."""
        self.last_error = self.last_error or "no progress during a flush"
        if self.state is not State.UNAVAILABLE:
            self._enter(Outcome.GIVEN_UP)

    def set_delay(self, millis: object) -> None:
        """Take over an exporter's `schedule_delay_millis`, an hour at most, unless it is not a number."""
        if isinstance(millis, int):
            self.delay = min(max(0, millis), 1000 * Bounds.WAIT_SECONDS) / 1000

    # Progress and account

    @property
    def oldest(self) -> float:
        """The number of the oldest event that is not acknowledged, infinity if there is none.

        While events wait on disk, it may be too low: the next event may be one that the child does not get.
        """
        if self._batches:
            return self._batches[0][0].number
        if self.in_spool:
            return self.taken + 1
        return self.first_in_queue

    @property
    def first_in_queue(self) -> float:
        """The number of the oldest event in the queue, infinity if the queue is empty."""
        return self.queue[0].number if self.queue else inf

    def holds(self, first: int, last: int) -> bool:
        """Return whether some of the events from number `first` to `last` may be in memory."""
        if self._batches and first <= self._batches[-1][-1].number and last >= self._batches[0][0].number:
            return True
        return last >= self.first_in_queue

    @property
    def loaded_bytes(self) -> int:
        """How many bytes the events take that were loaded from the spool and are not acknowledged."""
        return self._loaded_bytes if self._batches else 0

    def in_memory(self) -> Iterator[LogEvent]:
        """Yield the events in memory that are not acknowledged."""
        return chain(*self._batches, self.queue)

    @property
    def oldest_time(self) -> int | None:
        """When the oldest event in memory that is not acknowledged was logged, in nanoseconds since the epoch."""
        return next((event.time_unix_nano for event in self.in_memory()), None)

    @property
    def acknowledged(self) -> int:
        """How many events are delivered, rejected or withheld, here or elsewhere. It grows while there is progress."""
        return self._delivered + self._rejected + self._withheld + self._elsewhere.accepted

    @property
    def _meant(self) -> int:
        """How many events were meant for the child."""
        return self._accepted() - self._unmeant

    @property
    def pending(self) -> int:
        """How many events wait in memory or on disk, or are being exported."""
        return self._in_memory + self.in_spool

    @property
    def is_exporting(self) -> bool:
        """Whether an export is under way."""
        return self._exporting_since is not None

    def _is_overdue(self, now: float) -> bool:
        """Return whether an export is under way and takes longer than `export_timeout_millis`."""
        return self._exporting_since is not None and now - self._exporting_since > self._timeout

    @property
    def _in_memory(self) -> int:
        return len(self.queue) + sum(map(len, self._batches))

    @property
    def in_spool(self) -> int:
        """How many events are only on disk, since the queue was full."""
        return self._meant - self.acknowledged - self._lost - self._in_memory if self._spooled else 0

    def stats(self) -> ChildStats:
        """Return the account as of now."""
        accepted, pending = self._meant, self.pending
        stats = ChildStats(
            state=self.state.value,
            accepted=accepted - self._elsewhere.accepted,
            delivered=self._delivered,
            rejected=self._rejected,
            rejected_not_kept=self.not_kept,
            # All other accepted events are lost: they left a full queue, the spool, or a forked process.
            dropped=accepted - self.acknowledged - pending,
            withheld=self._withheld,
            pending=pending,
            shortened=self._shortened,
            rejected_reasons=dict(self._reasons),
            withheld_reasons=dict(self._withheld_reasons),
            redacted=dict(self._redacted),
            last_error=self.last_error,
        )
        return stats if self._elsewhere is NOTHING else stats.plus(self._elsewhere)

    def _acknowledge(self, rejected: int, shortened: object, processed: Processed | None) -> None:
        """Count the events of the export as delivered, rejected or withheld, and forget them."""
        sent = len(processed.events) if processed else self._exporting
        self._withheld += self._exporting - sent
        if processed:
            for reason, number in processed.withheld.items():
                count_reason(self._withheld_reasons, reason, number)
            for name, number in processed.redacted.items():
                count_reason(self._redacted, name, number)
        delivered = sent - rejected
        self._delivered += delivered
        self._rejected += rejected
        self._shortened += bounded_count(shortened, delivered)
        rest = self._batches.popleft()[self._exporting :]
        if rest:
            self._batches.appendleft(rest)

    def _has_urgent(self) -> bool:
        """Return whether an urgent event waits. Each event is looked at once."""
        for event in reversed(self.queue):
            if event.number <= self._searched:
                break
            if event.number > self._urgent and is_urgent(event):
                self._urgent = event.number
        self._searched = self.queue[-1].number
        return self._urgent >= self.queue[0].number

    def _split(self) -> None:
        """Split the batch of the export in halves, to find the event at fault."""
        batch = self._batches.popleft()
        middle, end = self._exporting // 2, self._exporting
        pieces = (batch[end:], batch[middle:end], batch[:middle])
        self._batches.extendleft(piece for piece in pieces if piece)

    def _over(self, outcome: Outcome) -> None:
        self._exporting_since = None
        self._enter(outcome)

    def _enter(self, outcome: Outcome) -> None:
        self.state = TRANSITIONS[self.state, outcome]

    def _take(self, now: float) -> list[LogEvent]:
        """Take the next batch from the queue, within the limits in events and bytes, but one event at least."""
        number = min(len(self.queue), self._batch_size)
        if self.progress_bars.is_thinned:
            number = self.progress_bars.final(number, now, self._due_before)
        size = 0
        # Adding up the sizes takes longer than everything else here, so it is avoided where the bounds suffice.
        if self._queue_largest * number > self.batch_bytes or self._queue_events < len(self.queue):
            events = list(islice(self.queue, number))
            size = total_size(events)
            if size > self.batch_bytes:
                # The events that stay behind have waited as long.
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
