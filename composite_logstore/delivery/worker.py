"""The thread that drives a child's deliveries: it performs their actions and reports the results.

A process has one journal, and so one delivery for each child. A process that also delivers for others, such as the
agent, has one delivery of the child for each of them: the worker takes these in turn, one export a turn, with one
exporter. While one of them is retried, the others wait, since they have the same backend. If others succeed meanwhile,
only the failing one waits.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import partial
from itertools import count
from math import inf
from typing import Protocol
from uuid import UUID

from zenml.logger import get_logger

from composite_logstore import secret_references
from composite_logstore.backend import Exporter
from composite_logstore.child_config import ChildConfig
from composite_logstore.clock import Clock
from composite_logstore.delivery import metrics
from composite_logstore.delivery.account import ChildStats
from composite_logstore.delivery.delivery import Delivery
from composite_logstore.delivery.rejections import Rejections
from composite_logstore.delivery.states import Action, EndStream, Export, Load, State, Wait
from composite_logstore.event import LogEvent, Stream
from composite_logstore.inert import described
from composite_logstore.loading import loading
from composite_logstore.processing.processor import Processed, Processor, Step
from composite_logstore.processing.repeats import REASON as REPEATS
from composite_logstore.service import Service, patiently, tell
from composite_logstore.spool.settings import SpoolSettings

logger = get_logger(__name__)


_CALM_SECONDS = 60.0
"""A child that always has a backlog counts as losing no more events after this time without a loss."""


def _nothing() -> None:
    """Report no result: the action has none."""


class Feed(Protocol):
    """The journal that feeds a worker's delivery: the live one of this process, or one recovered from disk.

    Attributes:
        lock: Guards the journal and its deliveries. It is held for moments, and never across I/O.
        progress: Notified, under the lock, when a delivery has made progress.
    """

    lock: threading.RLock
    progress: threading.Condition

    def hand_out(self) -> None:
        """Put all events captured so far into the queues. Under the lock."""

    def wake_after(self, events: int, urgent: bool = False) -> bool:
        """Have the workers woken once so many more events have arrived, or an urgent one. Under the lock.

        Returns:
            Whether events have arrived meanwhile that wake no worker, so that the worker has to look again.
        """
        ...

    def load(self, delivery: Delivery, load: Load) -> list[LogEvent]:
        """Read the events that a delivery asks for from the spool. Without the lock, since it is I/O."""
        ...

    def acknowledge(self, delivery: Delivery) -> None:
        """Record on disk which events a delivery has acknowledged. Under the lock."""


class _Turn:
    """One of the deliveries that a worker takes in turn.

    Attributes:
        delivery: The delivery.
        feed: The journal that feeds it.
        processor: What processes its batches, None before the first one.
        place: Its place in the row: the lowest comes first.
        due: When it has to be asked for its next action, in seconds.
        is_woken: Whether it has to be asked before that.
        is_leaving: Whether it leaves the row as soon as it only waits.
        answers: How many exports of the child had been answered when one of this delivery failed last.
    """

    def __init__(self, delivery: Delivery, feed: Feed, place: int) -> None:
        self.delivery = delivery
        self.feed = feed
        self.processor: Processor | None = None
        self.place = place
        self.due = -inf
        self.is_woken = self.is_leaving = False
        self.answers = -1
        self.has_problem = self.is_dropping = False
        self.dropped = 0
        self.dropped_at = -inf


class Worker:
    """One child's thread and its exporter. It starts with the first event and stops with the process.

    Attributes:
        has_ended: Whether the thread was stopped and has ended. The feeds' `progress` is notified of it.
    """

    def __init__(
        self,
        log_store_id: UUID,
        config: ChildConfig,
        clock: Clock,
        budget: Step | None = None,
        spool: SpoolSettings | None = None,
        tells_state: bool = True,
    ):
        """Prepare; nothing is started.

        Args:
            log_store_id: The log store's id.
            config: The child's settings, references to secrets unresolved.
            clock: The source of time and threads.
            budget: Withholds what exceeds the child's budget; None if the child has none.
            spool: Where rejected events are kept, None if nowhere.
            tells_state: Whether to warn when a problem with the backend begins, and when it ends.
        """
        self._tells_state = tells_state
        self._config = config
        self._attributes = metrics.attributes(log_store_id, config)
        self._clock = clock
        self._awake = clock.signal()
        self._service = Service(
            f"composite-logstore {config.name}",
            self._work,
            clock,
            warn=lambda text: tell(logger.warning, text),
            note_problem=self._note_problem,
        )
        self._exporter: Exporter | None = None
        # With secrets resolved, once there is an exporter.
        self._settings = config
        self._budget = budget
        self._rejections = Rejections(config.name, spool)
        # Replaced in one step, so that `wake` needs no lock: it is part of `emit`.
        self._row: tuple[_Turn, ...] = ()
        self._changing_row = threading.Lock()
        self._places = count()
        # The delivery whose action was performed last, until `_report_result` has reported the result.
        self._current: _Turn | None = None
        self._report_result: Callable[[], None] = _nothing
        # After an export has failed: when the next one follows, and of which delivery it is, None if of any.
        self._resume_at = -inf
        self._retried: _Turn | None = None
        self._answers = 0
        self._stopping = False
        self._is_cut_short = False
        self.has_ended = False
        self._reported: set[str] = set()

    def take(self, delivery: Delivery, feed: Feed) -> None:
        """Drive a delivery, in turn with the others.

        Args:
            delivery: The delivery.
            feed: The journal that feeds it.
        """
        with self._changing_row:
            self._row = (*self._row, _Turn(delivery, feed, next(self._places)))

    def let_go(self, delivery: Delivery, at_once: bool = False) -> None:
        """Drive a delivery no more.

        Args:
            delivery: The delivery.
            at_once: Whether to do nothing more for it, even with a backlog; otherwise it stays until it only waits.
        """
        for turn in self._row:
            if turn.delivery is delivery:
                turn.is_leaving = turn.is_woken = True
                if at_once:
                    self._leave(turn)
        self._awake.set()

    def _leave(self, turn: _Turn) -> None:
        with self._changing_row:
            self._row = tuple(other for other in self._row if other is not turn)

    def wake(self, delivery: Delivery | None = None) -> bool:
        """Have the thread ask for the next action; start the thread if necessary. Never raises.

        Args:
            delivery: The delivery to ask; all if not given.

        Returns:
            False if the thread cannot be started.
        """
        for turn in self._row:
            if delivery is None or turn.delivery is delivery:
                turn.is_woken = True
        self._awake.set()
        return self._service.start()

    def give_up(self, before: int) -> None:
        """Note that the thread cannot be started, so that a flush does not wait for it.

        Args:
            before: The flush is for events with numbers below this.
        """
        for turn in self._row:
            with turn.feed.lock:
                if turn.delivery.oldest < before:
                    turn.delivery.give_up()

    def stop(self, at_once: bool = False) -> None:
        """Have the thread close the exporter and end, as soon as its deliveries only wait.

        Args:
            at_once: Whether to end as soon as the export under way has returned, even with a backlog.
        """
        self._is_cut_short = at_once
        self._stopping = True
        self._awake.set()

    @property
    def is_stopping(self) -> bool:
        """Whether the thread was told to end."""
        return self._stopping

    @property
    def is_running(self) -> bool:
        """Whether the thread runs."""
        return self._service.is_running

    @property
    def is_finishing(self) -> bool:
        """Whether the thread is still at work, though all events are acknowledged. Under the feeds' lock."""
        is_done = not any(turn.delivery.pending for turn in self._row)
        return self._service.is_running and not self.has_ended and is_done

    def report(self) -> None:
        """Warn once when a problem or a loss begins and once when it ends, and once for each reason of a rejection.

        Never call this under a feed's lock: see `service.tell`.
        """
        for turn in self._row:
            with turn.feed.lock:
                news = self._news(turn, turn.delivery.stats())
            self._tell(news)

    def _tell(self, news: list[str]) -> None:
        for line in news:
            tell(logger.warning, f"child '{self._config.name}': {line}")

    def _note_problem(self, why: str) -> None:
        for turn in self._row:
            with turn.feed.lock:
                turn.delivery.last_error = why

    def _news(self, turn: _Turn, stats: ChildStats) -> list[str]:
        """Return the warnings that are due, and remember that they have been given. Under the lock."""
        news = []
        has_problem = self._tells_state and stats.state != State.HEALTHY.value
        if has_problem and not turn.has_problem:
            problem = "backend unavailable" if self._service.is_running else "events cannot be delivered"
            news.append(f"{problem}: {stats.last_error}; events are queued and will be retried.")
        elif turn.has_problem and not has_problem:
            news.append("backend available again.")
        turn.has_problem = has_problem
        news += self._news_of_dropped(turn, stats)
        fate = self._rejections.fate
        losses = {reason: f"backend rejects events: {reason}; {fate}." for reason in stats.rejected_reasons}
        if turn.delivery.lost_in_forks:
            losses["forks"] = "events of forked processes are lost on their way to this process; stats() counts them."
        losses |= self._rejections.losses
        news += [losses[loss] for loss in losses.keys() - self._reported]
        self._reported |= losses.keys()
        return news

    def _news_of_dropped(self, turn: _Turn, stats: ChildStats) -> list[str]:
        now = self._clock.now()
        dropped = stats.dropped - turn.delivery.lost_in_forks
        if dropped > turn.dropped:
            turn.dropped, turn.dropped_at = dropped, now
            if not turn.is_dropping:
                turn.is_dropping = True
                return ["events are dropped, oldest first; stats() counts them."]
            return []
        is_over = stats.state == State.HEALTHY.value and (not stats.pending or now - turn.dropped_at > _CALM_SECONDS)
        if turn.is_dropping and is_over:
            turn.is_dropping = False
            return [f"no more events are dropped; {dropped} were lost."]
        return []

    def _work(self) -> Callable[[], object] | None:
        """Perform the next action of a delivery. Returns how to wait for the next step, None to end the thread."""
        turn = self._current or self._first()
        if turn is None:
            return self._rest()
        with patiently(turn.feed.lock):
            # Once, even if it raises: reporting a result twice would acknowledge the next batch, too.
            report, self._report_result, self._current = self._report_result, _nothing, None
            report()
            news = self._news(turn, turn.delivery.stats())
            # Warnings first, since they may take long, and `next` starts the clock of an export.
            is_its_turn = not news and not self._is_cut_short and self._first() is turn
            action = self._next(turn) if is_its_turn else None
        if news:
            self._tell(news)
        elif self._is_cut_short:
            self._close()
            return None
        elif isinstance(action, Export):
            self._report_result = self._export(turn, action)
            self._current = turn
        elif isinstance(action, Load):
            self._report_result = self._load(turn, action)
            self._current = turn
        elif isinstance(action, EndStream):
            self._report_result = self._end_stream(turn, action.stream)
            self._current = turn
        elif isinstance(action, Wait):
            turn.due = inf if action.seconds is None else self._clock.now() + action.seconds
            if turn.is_leaving:
                self._leave(turn)
        return _nothing

    def _first(self) -> _Turn | None:
        """Return the delivery to ask for its next action, None if none has to be asked now."""
        now = self._clock.now()
        if now < self._resume_at:
            return None
        row = self._row
        if self._retried is not None and self._retried in row:
            row = (self._retried,)
        return min((turn for turn in row if turn.is_woken or turn.due <= now), key=_place_of, default=None)

    def _rest(self) -> Callable[[], object] | None:
        """Return how to wait until a delivery has to be asked, None to end the thread."""
        if self._stopping:
            self._close()
            return None
        due = max(self._resume_at, min((turn.due for turn in self._row), default=inf))
        return partial(self._awake.wait, None if due == inf else due - self._clock.now())

    def _next(self, turn: _Turn) -> Action:
        """Return a delivery's next action, and have the worker woken when a wait is over. Under the lock."""
        turn.is_woken, turn.due = False, -inf
        while True:
            turn.feed.hand_out()
            action = turn.delivery.next(self._clock.now())
            if isinstance(action, Wait) and action.events and turn.feed.wake_after(action.events, action.urgent):
                # Events have arrived meanwhile that wake no worker.
                continue
            if not isinstance(action, Load):
                # What was loaded is exported in the same turn: only one batch of the child is in memory.
                turn.place = next(self._places)
            return action

    def _pause(self, turn: _Turn) -> None:
        """Have all deliveries wait if an export of one has just failed, unless others succeed meanwhile."""
        now = self._clock.now()
        seconds = turn.delivery.seconds_until_retry(now)
        self._resume_at, self._retried = -inf, None
        if not seconds:
            self._answers += 1
        elif turn.answers in (-1, self._answers):
            self._resume_at = now + seconds
            if turn.delivery.state is not State.UNAVAILABLE:
                self._retried = turn
        turn.answers = self._answers if seconds else -1

    def _load(self, turn: _Turn, action: Load) -> Callable[[], None]:
        """Read events from the spool. Returns what reports the result, under the lock."""
        try:
            events = turn.feed.load(turn.delivery, action)
        except Exception as error:
            return partial(turn.delivery.not_loaded, error, self._clock.now())

        def report() -> None:
            turn.delivery.loaded(events, action.expected)
            turn.feed.acknowledge(turn.delivery)

        return report

    def _export(self, turn: _Turn, action: Export) -> Callable[[], None]:
        """Process a batch and export it. Returns what reports the result, under the lock."""
        error: BaseException | None = None
        processed: Processed | None = None
        shortened = 0
        delay_millis: object = None
        begin = self._clock.now()
        try:
            # The first export may import further modules.
            with loading() if self._exporter is None else nullcontext():
                exporter = self._exporter or self._create_exporter()
                processed = self._processed(turn, action.batch)
                if processed.events:
                    shortened = exporter.export(processed.events)
        except BaseException as raised:  # a backend may raise anything, and no other code would see it
            error = raised
        with suppress(BaseException):
            delay_millis = getattr(self._exporter, "schedule_delay_millis", None)
        end = self._clock.now()
        failure = {"error.type": type(error).__name__} if error else {}
        if processed is None or processed.events:
            metrics.exported(end - begin, self._attributes | failure)

        # Before they are acknowledged: if the process dies in between, they are read from the spool again.
        not_kept = self._rejections.keep(error, processed.events, action.batch) if error and processed else 0

        def report() -> None:
            is_over = True
            if error is not None:
                turn.delivery.not_kept += not_kept
                is_over = turn.delivery.failed(error, end, processed)
            elif processed is not None and not processed.events:
                turn.delivery.withheld(processed)
            else:
                turn.delivery.exported(shortened, end, processed)
                turn.delivery.set_delay(delay_millis)
            self._pause(turn)
            if is_over and processed is not None and turn.processor is not None:
                turn.processor.commit(processed)
            turn.feed.progress.notify_all()
            turn.feed.acknowledge(turn.delivery)

        return report

    def _processed(self, turn: _Turn, batch: list[LogEvent]) -> Processed:
        """Return a batch as the child gets it.

        Raises:
            RetryableError: It cannot be processed.
        """
        if turn.processor is None:
            turn.processor = self._settings.create_processor().then(self._budget)
        return turn.processor.process(batch)

    def _end_stream(self, turn: _Turn, stream: Stream) -> Callable[[], None]:
        """End a stream, after the last of its repeats. Returns what reports the result, under the lock."""
        shown: list[LogEvent] = []

        def end(exporter: Exporter) -> None:
            exporter.end_stream(stream)
            if turn.processor and (last := turn.processor.last_of(stream)):
                # The exporter has forgotten the stream: it would take them for events that it has written. They are
                # tried once: of a backend that fails now, only the number of repeats is missing.
                exporter.export(last)
                shown.extend(last)
                exporter.end_stream(stream)

        self._quietly(end, "child '%s': ending a stream failed: %s")
        return partial(turn.delivery.show_after_all, len(shown), REPEATS)

    def _create_exporter(self) -> Exporter:
        try:
            self._settings = secret_references.resolve(self._config)
            self._exporter = self._settings.create_exporter()
            return self._exporter
        except BaseException:
            # Without a free file descriptor Python remembers a module as missing: have it look again.
            importlib.invalidate_caches()
            raise

    def _quietly(self, do: Callable[[Exporter], None], complaint: str) -> None:
        """Call a method of the exporter, if there is one, whose failure costs no event."""
        try:
            if self._exporter is not None:
                do(self._exporter)
        except BaseException as error:
            tell(logger.debug, complaint, self._config.name, described(error))

    def _close(self) -> None:
        self._quietly(lambda exporter: exporter.close(), "child '%s': closing its exporter failed: %s")
        self.has_ended = True
        for turn in self._row:
            with turn.feed.lock:
                turn.feed.progress.notify_all()


def _place_of(turn: _Turn) -> int:
    return turn.place
