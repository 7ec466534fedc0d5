"""The thread that drives one child's delivery: it does what the delivery says, and says how it went."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from math import inf
from typing import Protocol
from uuid import UUID

from zenml.logger import get_logger

from composite_logstore import secret_references
from composite_logstore.backend import Exporter
from composite_logstore.clock import Clock
from composite_logstore.config import ChildConfig
from composite_logstore.delivery import metrics
from composite_logstore.delivery.account import ChildStats
from composite_logstore.delivery.delivery import Delivery
from composite_logstore.delivery.states import Action, EndStream, Export, Load, State, Wait
from composite_logstore.event import LogEvent
from composite_logstore.inert import described
from composite_logstore.loading import loading
from composite_logstore.service import Service, patiently, tell

logger = get_logger(__name__)


_CALM_SECONDS = 60.0
"""A child that has always something that waits has lost no more events for so long when the worker says so."""


def _nothing() -> None:
    """There is nothing to conclude."""


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

    def wake_after(self, events: int) -> bool:
        """Have the workers woken once so many more events have arrived. Under the lock.

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
        has_ended: Whether it was stopped, and does nothing any more. The journal's `progress` tells of it.
    """

    def __init__(
        self,
        log_store_id: UUID,
        config: ChildConfig,
        delivery: Delivery,
        feed: Feed,
        clock: Clock,
        tells_state: bool = True,
    ):
        """Prepare; nothing is started.

        Args:
            log_store_id: The log store's id.
            config: The child's settings, references to secrets unresolved.
            delivery: What to drive.
            feed: The journal that feeds the delivery.
            clock: Where time and threads come from.
            tells_state: Whether it warns when trouble with the backend begins, and when it ends.
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
            hinder=self._hindered,
        )
        self._exporter: Exporter | None = None
        self._conclude: Callable[[], None] = _nothing
        self._stopping = False
        self._is_cut_short = False
        self.has_ended = False
        self._in_trouble = False
        self._is_dropping = False
        self._dropped = 0
        self._dropped_at = -inf
        self._reported: set[str] = set()

    def wake(self) -> bool:
        """Have the thread look at its delivery; start it if it has not been started. Never raises.

        Returns:
            Whether the thread is there, or on its way.
        """
        self._awake.set()
        return self._service.start()

    def give_up(self, before: int) -> None:
        """Note that no thread can be started, so that no flush waits for it.

        Args:
            before: What the flush is for: events with numbers below this.
        """
        with self._feed.lock:
            if self._delivery.oldest < before:
                self._delivery.give_up()

    def stop(self, at_once: bool = False) -> None:
        """Have the thread end, and the exporter closed, as soon as there is nothing to do but wait.

        Args:
            at_once: Whether to end as soon as the export under way has returned, whatever is left.
        """
        self._is_cut_short = at_once
        self._stopping = True
        self._awake.set()

    @property
    def is_running(self) -> bool:
        """Whether its thread is there."""
        return self._service.is_running

    @property
    def is_finishing(self) -> bool:
        """Whether it is still at work though there is no event left to deliver. Under the journal's lock."""
        return self._service.is_running and not self.has_ended and not self._delivery.pending

    def report(self) -> None:
        """Warn once when trouble or a loss begins and once when it ends, and once for each kind of rejection.

        Never under the journal's lock: ZenML calls `emit` under a logging handler's lock, so whoever
        logs while holding the journal's can wait for ever. And outside of any ZenML logging context, so
        that it does not become an event.
        """
        with self._feed.lock:
            news = self._news(self._delivery.stats())
        self._tell(news)

    def _tell(self, news: list[str]) -> None:
        for line in news:
            tell(logger.warning, f"child '{self._config.name}': {line}")

    def _hindered(self, why: str) -> None:
        with self._feed.lock:
            self._delivery.hindered(why)

    def _news(self, stats: ChildStats) -> list[str]:
        news = []
        in_trouble = self._tells_state and stats.state != State.HEALTHY.value
        if in_trouble and not self._in_trouble:
            what = "its backend takes no events" if self._service.is_running else "its events cannot be delivered"
            news.append(f"{what}: {stats.last_error}. They wait and are tried again.")
        elif self._in_trouble and not in_trouble:
            news.append("its backend takes events again.")
        self._in_trouble = in_trouble
        news += self._news_of_dropped(stats)
        losses = {reason: f"its backend rejects events: {reason}" for reason in stats.rejected_reasons}
        if self._delivery.lost_in_forks:
            losses["forks"] = "events of forked processes are lost on their way to this one"
        news += [f"{losses[loss]}. The store's stats count them." for loss in losses.keys() - self._reported]
        self._reported |= losses.keys()
        return news

    def _news_of_dropped(self, stats: ChildStats) -> list[str]:
        now = self._clock.now()
        dropped = stats.dropped - self._delivery.lost_in_forks
        if dropped > self._dropped:
            self._dropped, self._dropped_at = dropped, now
            if not self._is_dropping:
                self._is_dropping = True
                return ["events are dropped, the oldest first. The store's stats count them."]
            return []
        is_over = stats.state == State.HEALTHY.value and (not stats.pending or now - self._dropped_at > _CALM_SECONDS)
        if self._is_dropping and is_over:
            self._is_dropping = False
            return [f"no more events are dropped; {dropped} were."]
        return []

    def _work(self) -> Callable[[], object] | None:
        """Do what the delivery says, and return how to wait for more. None where the thread is to end."""
        with patiently(self._feed.lock):
            # Once, whatever becomes of it: a batch that is settled twice takes another one along.
            conclude, self._conclude = self._conclude, _nothing
            conclude()
            news = self._news(self._delivery.stats())
            # An export's time begins with `next`, and telling may take long.
            action = None if news or self._is_cut_short else self._next()
        if news:
            self._tell(news)
        elif isinstance(action, Export):
            self._conclude = self._export(action)
        elif isinstance(action, Load):
            self._conclude = self._load(action)
        elif isinstance(action, EndStream):
            self._end_stream(action)
        elif action is None or self._stopping:
            self._close()
            return None
        else:
            return partial(self._awake.wait, action.seconds)
        return _nothing

    def _next(self) -> Action:
        while True:
            self._feed.hand_out()
            action = self._delivery.next(self._clock.now())
            if isinstance(action, Wait) and action.events and self._feed.wake_after(action.events):
                # Something came meanwhile, and would wake nobody.
                continue
            return action

    def _load(self, action: Load) -> Callable[[], None]:
        """Read what the delivery asks for, and return what is to be done under the lock then."""
        try:
            events = self._feed.load(self._delivery, action)
        except Exception as error:
            reason = error
            return lambda: self._delivery.not_loaded(reason, self._clock.now())

        def conclude() -> None:
            self._delivery.loaded(events, action.expected)
            self._feed.acknowledge(self._delivery)

        return conclude

    def _export(self, action: Export) -> Callable[[], None]:
        """Export the batch, and return what is to be done under the lock then."""
        error: BaseException | None = None
        shortened = 0
        delay_millis: object = None
        begin = self._clock.now()
        try:
            if self._exporter is None:
                with loading():
                    # The first export imports what was not needed until then.
                    self._exporter = self._create_exporter()
                    shortened = self._exporter.export(action.batch)
            else:
                shortened = self._exporter.export(action.batch)
        except BaseException as raised:  # whatever a backend raises: nobody else owns this thread
            error = raised
        with suppress(BaseException):
            delay_millis = getattr(self._exporter, "schedule_delay_millis", None)
        end = self._clock.now()
        failure = {"error.type": type(error).__name__} if error else {}
        metrics.exported(end - begin, self._attributes | failure)

        def conclude() -> None:
            if error is None:
                self._delivery.exported(shortened, end)
                self._delivery.set_delay(delay_millis)
            else:
                self._delivery.failed(error, end)
            self._feed.progress.notify_all()
            self._feed.acknowledge(self._delivery)

        return conclude

    def _create_exporter(self) -> Exporter:
        try:
            return secret_references.resolve(self._config).create_exporter()
        except BaseException:
            # What could not be read for want of a file descriptor counts as missing until it is looked for anew.
            importlib.invalidate_caches()
            raise

    def _end_stream(self, action: EndStream) -> None:
        try:
            if self._exporter is not None:
                self._exporter.end_stream(action.stream)
        except BaseException as error:
            tell(logger.debug, "child '%s': ending a stream failed: %s", self._config.name, described(error))

    def _close(self) -> None:
        try:
            if self._exporter is not None:
                self._exporter.close()
        except BaseException as error:
            tell(logger.debug, "child '%s': closing its exporter failed: %s", self._config.name, described(error))
        with self._feed.lock:
            self.has_ended = True
            self._feed.progress.notify_all()
