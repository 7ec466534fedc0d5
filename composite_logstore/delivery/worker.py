"""The thread that drives one child's delivery: it performs the delivery's actions and reports the results."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import partial
from math import inf
from typing import Protocol
from uuid import UUID

from zenml.logger import get_logger

from composite_logstore import secret_references
from composite_logstore.backend import Exporter, RetryableError
from composite_logstore.clock import Clock
from composite_logstore.config import ChildConfig
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


class Worker:
    """One child's thread. It starts with the first event and stops with the process.

    Attributes:
        has_ended: Whether the thread was stopped and has ended. The feed's `progress` is notified of it.
    """

    def __init__(
        self,
        log_store_id: UUID,
        config: ChildConfig,
        delivery: Delivery,
        feed: Feed,
        clock: Clock,
        budget: Step | None = None,
        spool: SpoolSettings | None = None,
        tells_state: bool = True,
    ):
        """Prepare; nothing is started.

        Args:
            log_store_id: The log store's id.
            config: The child's settings, references to secrets unresolved.
            delivery: The child's delivery.
            feed: The journal that feeds the delivery.
            clock: The source of time and threads.
            budget: Withholds what exceeds the child's budget; None if the child has none.
            spool: Where rejected events are kept, None if nowhere.
            tells_state: Whether to warn when a problem with the backend begins, and when it ends.
        """
        self._tells_state = tells_state
        self._config = config
        self._delivery = delivery
        self._attributes = metrics.attributes(log_store_id, config)
        self._feed = feed
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
        self._processor = Processor()
        self._budget = budget
        self._rejections = Rejections(config.name, spool)
        self._report_result: Callable[[], None] = _nothing
        self._stopping = False
        self._is_cut_short = False
        self.has_ended = False
        self._has_problem = False
        self._is_dropping = False
        self._dropped = 0
        self._dropped_at = -inf
        self._reported: set[str] = set()

    def wake(self) -> bool:
        """Have the thread ask its delivery for the next action; start the thread if necessary. Never raises.

        Returns:
            False if the thread cannot be started.
        """
        self._awake.set()
        return self._service.start()

    def give_up(self, before: int) -> None:
        """Note that the thread cannot be started, so that a flush does not wait for it.

        Args:
            before: The flush is for events with numbers below this.
        """
        with self._feed.lock:
            if self._delivery.oldest < before:
                self._delivery.give_up()

    def stop(self, at_once: bool = False) -> None:
        """Have the thread close the exporter and end, as soon as its delivery only waits.

        Args:
            at_once: Whether to end as soon as the export under way has returned, even with a backlog.
        """
        self._is_cut_short = at_once
        self._stopping = True
        self._awake.set()

    @property
    def is_running(self) -> bool:
        """Whether the thread runs."""
        return self._service.is_running

    @property
    def is_finishing(self) -> bool:
        """Whether the thread is still at work, though all events are acknowledged. Under the feed's lock."""
        return self._service.is_running and not self.has_ended and not self._delivery.pending

    def report(self) -> None:
        """Warn once when a problem or a loss begins and once when it ends, and once for each reason of a rejection.

        Never call this under the feed's lock: see `service.tell`.
        """
        with self._feed.lock:
            news = self._news(self._delivery.stats())
        self._tell(news)

    def _tell(self, news: list[str]) -> None:
        for line in news:
            tell(logger.warning, f"child '{self._config.name}': {line}")

    def _note_problem(self, why: str) -> None:
        with self._feed.lock:
            self._delivery.last_error = why

    def _news(self, stats: ChildStats) -> list[str]:
        """Return the warnings that are due, and remember that they have been given. Under the lock."""
        news = []
        has_problem = self._tells_state and stats.state != State.HEALTHY.value
        if has_problem and not self._has_problem:
            problem = "backend unavailable" if self._service.is_running else "events cannot be delivered"
            news.append(f"{problem}: {stats.last_error}; events are queued and will be retried.")
        elif self._has_problem and not has_problem:
            news.append("backend available again.")
        self._has_problem = has_problem
        news += self._news_of_dropped(stats)
        fate = self._rejections.fate
        losses = {reason: f"backend rejects events: {reason}; {fate}." for reason in stats.rejected_reasons}
        if self._delivery.lost_in_forks:
            losses["forks"] = "events of forked processes are lost on their way to this process; stats() counts them."
        losses |= self._rejections.losses
        news += [losses[loss] for loss in losses.keys() - self._reported]
        self._reported |= losses.keys()
        return news

    def _news_of_dropped(self, stats: ChildStats) -> list[str]:
        now = self._clock.now()
        dropped = stats.dropped - self._delivery.lost_in_forks
        if dropped > self._dropped:
            self._dropped, self._dropped_at = dropped, now
            if not self._is_dropping:
                self._is_dropping = True
                return ["events are dropped, oldest first; stats() counts them."]
            return []
        is_over = stats.state == State.HEALTHY.value and (not stats.pending or now - self._dropped_at > _CALM_SECONDS)
        if self._is_dropping and is_over:
            self._is_dropping = False
            return [f"no more events are dropped; {dropped} were lost."]
        return []

    def _work(self) -> Callable[[], object] | None:
        """Perform the delivery's next action. Returns how to wait for the next step, None to end the thread."""
        with patiently(self._feed.lock):
            # Once, even if it raises: reporting a result twice would acknowledge the next batch, too.
            report, self._report_result = self._report_result, _nothing
            report()
            news = self._news(self._delivery.stats())
            # Warnings first, since they may take long, and `next` starts the clock of an export.
            action = None if news or self._is_cut_short else self._next()
        if news:
            self._tell(news)
        elif isinstance(action, Export):
            self._report_result = self._export(action)
        elif isinstance(action, Load):
            self._report_result = self._load(action)
        elif isinstance(action, EndStream):
            self._report_result = self._end_stream(action.stream)
        elif action is None or self._stopping:
            self._close()
            return None
        else:
            return partial(self._awake.wait, action.seconds)
        return _nothing

    def _next(self) -> Action:
        """Return the delivery's next action, and have the worker woken when a wait is over. Under the lock."""
        while True:
            self._feed.hand_out()
            action = self._delivery.next(self._clock.now())
            if isinstance(action, Wait) and action.events and self._feed.wake_after(action.events, action.urgent):
                # Events have arrived meanwhile that wake no worker.
                continue
            return action

    def _load(self, action: Load) -> Callable[[], None]:
        """Read events from the spool. Returns what reports the result, under the lock."""
        try:
            events = self._feed.load(self._delivery, action)
        except Exception as error:
            return partial(self._delivery.not_loaded, error, self._clock.now())

        def report() -> None:
            self._delivery.loaded(events, action.expected)
            self._feed.acknowledge(self._delivery)

        return report

    def _export(self, action: Export) -> Callable[[], None]:
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
                processed = self._processed(action.batch)
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

        # Before they are acknowledged: if the process dies in between, they come again from the spool.
        not_kept = self._rejections.keep(error, processed.events, action.batch) if error and processed else 0

        def report() -> None:
            is_over = True
            if error is not None:
                self._delivery.not_kept += not_kept
                is_over = self._delivery.failed(error, end, processed)
            elif processed is not None and not processed.events:
                self._delivery.withheld(processed)
            else:
                self._delivery.exported(shortened, end, processed)
                self._delivery.set_delay(delay_millis)
            if is_over and processed is not None:
                self._processor.commit(processed)
            self._feed.progress.notify_all()
            self._feed.acknowledge(self._delivery)

        return report

    def _processed(self, batch: list[LogEvent]) -> Processed:
        """Return a batch as the child gets it.

        Raises:
            RetryableError: A step failed. Nothing may leave then, and the backend is not the cause.
        """
        try:
            return self._processor.process(batch)
        except Exception as error:
            text = f"the child's rules, redaction or budget cannot be applied: {described(error)}"
            raise RetryableError(text, smaller_may_pass=True) from error

    def _end_stream(self, stream: Stream) -> Callable[[], None]:
        """End a stream, after the last of its repeats. Returns what reports the result, under the lock."""
        shown: list[LogEvent] = []

        def end(exporter: Exporter) -> None:
            exporter.end_stream(stream)
            if last := self._processor.last_of(stream):
                # The exporter has forgotten the stream: it would take them for events that it has written. They are
                # tried once: of a backend that fails now, only the number of repeats is missing.
                exporter.export(last)
                shown.extend(last)
                exporter.end_stream(stream)

        self._quietly(end, "child '%s': ending a stream failed: %s")
        return partial(self._delivery.show_after_all, len(shown), REPEATS)

    def _create_exporter(self) -> Exporter:
        try:
            config = secret_references.resolve(self._config)
            self._processor = config.create_processor().then(self._budget)
            self._exporter = config.create_exporter()
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
        with self._feed.lock:
            self.has_ended = True
            self._feed.progress.notify_all()
