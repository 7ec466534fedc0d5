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
from itertools import accumulate, chain, islice
from math import inf

from composite_logstore.bounds import Bounds
from composite_logstore.config import ChildConfig
from composite_logstore.delivery.account import ChildStats, count_reason
from composite_logstore.delivery.backoff import Backoff, ExportPolicy, bounded_count
from composite_logstore.delivery.progress_bars import ProgressBars
from composite_logstore.delivery.states import TRANSITIONS, Action, EndStream, Export, Load, Outcome, State, Wait
from composite_logstore.event import LogEvent, Stream, total_size
from composite_logstore.inert import described


class Delivery:
    """The delivery to one child. Its journal's lock guards every call.

    Attributes:
        queue: The events that wait. The journal appends to it; when it is full the oldest gives way.
        state: How the backend is doing.
        delay: How long an event may wait for a fuller batch, in seconds.
        settled: How many events are delivered or rejected: it grows while there is progress.
        lost_in_forks: How many of those that count as dropped were lost on the way from a forked process.
        progress_bars: The updates of progress bars, of which the child may want only the latest.
        taken: The number of the last event that was taken from the queue or the spool.
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
        """Start with nothing.

        Args:
            config: The child's settings.
            accepted: Tells how many events the journal has meant for the child.
            rand: A number from 0 to 1, for the jitter of retries.
            spooled: Whether what gives way in a full queue is in the spool.
            acknowledged_before: The number below which everything was settled by an earlier process.
            batch_bytes: Roughly how many bytes of events it may have in one export; as many as the backend likes if
                not given.
        """
        self.name = config.name
        self.queue: deque[LogEvent] = deque(maxlen=config.max_queue_size)
        self.state = State.HEALTHY
        self.lost_in_forks = 0
        self._config = config
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
        self._retry_at = -inf
        self._due_before = 0
        self._ended: deque[tuple[int, Stream]] = deque()
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
                return Wait(self.progress_bars.seen_at + 1 - now)
            self._batches.append(batch)
            self._loaded_bytes = 0
            self.taken = batch[-1].number
            self._waiting_since = now
        self._exporting_since = now
        self._exporting = min(len(self._batches[0]), self._policy.limit)
        return Export(self._batches[0][: self._exporting])

    def loaded(self, events: list[LogEvent], there: int) -> None:
        """Take what was read from the spool.

        Args:
            events: The events. If there is none, what was thought to be there is lost.
            there: How many were thought to be there.
        """
        self.progress_bars.in_spool.difference_update(event.number for event in events if event.progress)
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
        self._retry_at = now + self._policy.backoff.jittered(self._policy.backoff.longest)

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
                self.progress_bars.in_spool.add(event.number)

    def give_up_spooled(self, events: int, last: int) -> None:
        """Count the oldest events of the spool, up to number `last`, as dropped: they had to make room."""
        self._lost += min(events, self._in_spool)
        self.taken = max(self.taken, last)
        self.progress_bars.give_up(last)

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
        bars = self.progress_bars
        if bars.is_thinned and self._config.wants(logging.INFO):
            wanted += sum(first <= number <= last for number in bars.in_spool)
        return wanted

    def wants(self, event: LogEvent) -> LogEvent | None:
        """Return an event of the spool as the child is to have it, None if it is not meant for it."""
        wanted = self.progress_bars.wants(event)
        return wanted if wanted and self._config.wants(wanted.level) else None

    def flush(self, before: int) -> None:
        """Let no event whose number is below `before` wait for a fuller batch."""
        self._due_before = max(self._due_before, before)

    def end_stream(self, stream: Stream, before: int) -> None:
        """Note that the stream has ended; its last event's number is below `before`."""
        self._ended.append((before, stream))
        self.progress_bars.end_stream(stream)

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
        self._policy.succeeded(self._exporting, self._is_overdue(now))
        self._retry_at = -inf
        self._acknowledge(0, shortened)
        self._over(Outcome.ANSWERED)

    def failed(self, error: BaseException, now: float) -> None:
        """The export raised.

        Args:
            error: What it raised.
            now: The time in seconds.
        """
        decision = self._policy.failed(error, self._exporting, self._is_overdue(now))
        self._last_error = decision.message
        self._retry_at = now + decision.wait
        if decision.rejected is not None:
            count_reason(self._reasons, decision.reason, decision.rejected)
            self._acknowledge(decision.rejected, getattr(error, "shortened", 0))
        elif decision.outcome is Outcome.ANSWERED:
            self._split()
        self._over(decision.outcome)

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
            self.delay = min(max(0, millis), 1000 * Bounds.WAIT_SECONDS) / 1000

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
    def acknowledged(self) -> int:
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
    def _in_memory(self) -> int:
        return len(self.queue) + sum(map(len, self._batches))

    @property
    def _in_spool(self) -> int:
        """How many events gave way in a full queue, and can be read back."""
        return self._accepted() - self.acknowledged - self._lost - self._in_memory if self._spooled else 0

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
            dropped=accepted - self.acknowledged - pending,
            pending=pending,
            shortened=self._shortened,
            rejected_reasons=dict(self._reasons),
            last_error=self._last_error,
        )

    def _acknowledge(self, rejected: int, shortened: object) -> None:
        """Count the events of the export as delivered or rejected, and let go of them."""
        delivered = self._exporting - rejected
        self._delivered += delivered
        self._rejected += rejected
        self._shortened += bounded_count(shortened, delivered)
        rest = self._batches.popleft()[self._exporting :]
        if rest:
            self._batches.appendleft(rest)

    def _split(self) -> None:
        """Cut the export in halves: in one of them is the event at fault."""
        batch = self._batches.popleft()
        middle, end = self._exporting // 2, self._exporting
        pieces = (batch[end:], batch[middle:end], batch[:middle])
        self._batches.extendleft(piece for piece in pieces if piece)

    def _over(self, outcome: Outcome) -> None:
        """Note that the export is over."""
        self._exporting_since = None
        self._enter(outcome)

    def _enter(self, outcome: Outcome) -> None:
        self.state = TRANSITIONS[self.state, outcome]

    def _take(self, now: float) -> list[LogEvent]:
        """Take the next events from the queue, as many as a batch may have. A large event goes alone."""
        number = min(len(self.queue), self._batch_size)
        if self.progress_bars.is_thinned:
            number = self.progress_bars.final(number, now, self._due_before)
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
