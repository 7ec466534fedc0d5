"""One process that logs to one component: its journal, and a worker for each child."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any
from uuid import UUID

from zenml.logger import get_logger

from composite_logstore import clock
from composite_logstore.capture.forked import Inbox, Loss, Message, Outbox, ParentGoneError
from composite_logstore.capture.record import Note, captured
from composite_logstore.config import CompositeLogStoreConfig
from composite_logstore.delivery.account import ChildStats
from composite_logstore.delivery.flush import Flush
from composite_logstore.delivery.journal import Journal
from composite_logstore.delivery.metrics import Observed
from composite_logstore.delivery.recovery import Recovery
from composite_logstore.delivery.schedule import TICK_SECONDS
from composite_logstore.delivery.step_metadata import Summaries
from composite_logstore.delivery.worker import Worker
from composite_logstore.event import LogEvent, Stream
from composite_logstore.inert import described
from composite_logstore.service import LONGEST_PAUSE_SECONDS, Service, Wait, patiently, tell
from composite_logstore.spool.folder import Standing
from composite_logstore.spool.settings import spool_problem, spool_settings

logger = get_logger(__name__)

_LONGEST_WAIT_SECONDS = 3600.0
_LOOK_SECONDS = 1.0
"""How often to look after the spool's folder while nothing is logged, and events wait there."""


class Writer:
    """The events of this process for one component, whichever instances of its log store they come by.

    Creating it starts nothing and touches no disk; the workers start with the first event. In a forked
    process it hands everything to its parent's; should that be gone, it works by itself.
    """

    def __init__(self, component_id: UUID, config: CompositeLogStoreConfig) -> None:
        """Prepare.

        Args:
            component_id: The log store's id.
            config: Its settings.
        """
        self._component_id = component_id
        self._config = config
        self._clock = clock.current
        self._streams: dict[UUID, Stream] = {}
        self.summaries = Summaries(component_id, self._clock)
        self._spool = spool_settings(component_id, config)
        self._begin()

    def _begin(self) -> None:
        # What forked processes say comes in here; a forked process itself has an outbox.
        self._inbox: Inbox | None = None
        self._has_forked = False
        self._listener = self._service("composite-logstore forked processes", self._listen)
        self._receiving = threading.RLock()
        self._is_receiving = False
        self._outbox: Outbox | None = None
        self._sending = threading.RLock()
        self._inherited: set[UUID] = set()
        children = self._config.enabled_children
        self._journal = Journal(children, self._clock, self._spool, self._config.max_queue_bytes)
        self._keeper = self._service("composite-logstore spool", self._keep, TICK_SECONDS)
        self._keeper_due = self._clock.signal()
        self._housekeeper = self._service("composite-logstore housekeeping", self._keep_house)
        self._housework_due = self._clock.signal()
        self._has_ended = False
        self._seen = -1
        self._spool_error: Exception | None = None
        self._has_told_of_unstorable = False
        self._recovery = Recovery(
            self._component_id, children, self._clock, _warn, self._hindered, self._journal.batch_bytes
        )
        if self._journal.spooling:
            self._journal.spooling.others = self._recovery.journals
        self._workers = [
            Worker(self._component_id, child, delivery, self._journal, self._clock)
            for child, delivery in zip(children, self._journal.deliveries, strict=True)
        ]

    def _service(
        self, name: str, step: Callable[[], Wait | None], longest_pause: float = LONGEST_PAUSE_SECONDS
    ) -> Service:
        return Service(name, step, self._clock, _warn, self._hindered, longest_pause)

    def _hindered(self, why: str) -> None:
        """Have all accounts tell that a thread cannot do its work: all children depend on it."""
        with self._journal.lock:
            for delivery in self._journal.deliveries:
                delivery.hindered(why)

    @property
    def writer_id(self) -> str:
        """The writer's name, 15 hexadecimal digits."""
        return self._journal.writer

    def stream(self, id: UUID, metadata: dict[str, Any], artifact_store_id: UUID | None) -> Stream:
        """Return the stream with this id; registered again, it goes on where it ended.

        Args:
            id: The id of ZenML's `LogsResponse`.
            metadata: The origin's metadata, which ZenML fills later.
            artifact_store_id: The artifact store of the stack that is active now, if there is one.
        """
        with self._journal.lock:
            stream = self._streams.setdefault(id, Stream(id, metadata, artifact_store_id))
            stream.metadata = metadata
            return stream

    def append(self, stream: Stream, said: Note | LogEvent) -> None:
        """Hand an event to every child that wants it. Waits for nothing that is held across I/O."""
        if self._outbox is not None and self._tell_parent(stream, captured(said)):
            return
        if self._journal.append(stream, said):
            self._wake()

    def end_stream(self, stream: Stream) -> None:
        """Announce that no more events of the stream will come, unless it is registered again."""
        if self._outbox is not None and (stream.id in self._inherited or self._tell_parent(stream, None)):
            return
        self._journal.end_stream(stream)
        with self._journal.lock:
            # A process that serves for months has many streams: remember those of late alone.
            for id in [id for id in self._streams if id != stream.id][: max(0, len(self._streams) - 10_000)]:
                del self._streams[id]

    def flush(self, timeout: float, limit: float, blocking: bool = True) -> None:
        """Deliver what there is now without waiting for fuller batches.

        Args:
            timeout: How long to wait for a child that makes no progress, in seconds.
            limit: How long to wait at all, in seconds.
            blocking: Whether to wait.
        """
        if self._outbox is not None and not self._outbox.is_heard():
            self._take_over()
        # The listener says what is wrong with it.
        with suppress(Exception):
            self._receive()
        if not self._journal.next_number:
            return
        with self._journal.lock:
            before = self._journal.next_number
            flush = Flush(self._journal.deliveries, before, self._clock.now(), timeout, limit)
        for worker in self._wake():
            worker.give_up(before)
        if not blocking:
            return
        with self._journal.lock:
            while (seconds := flush.wait(self._clock.now())) > 0:
                self._journal.progress.wait(min(seconds, _LONGEST_WAIT_SECONDS))
        for worker in self._workers:
            worker.report()

    # The spool

    def _wake_keeper(self) -> bool:
        """Have the spool's thread look at what there is. Returns whether it is there, or on its way."""
        spooling = self._journal.spooling
        if spooling is None:
            return True
        spooling.woken()
        self._keeper_due.set()
        if self._keeper.start():
            return True
        # Nobody brings to disk what has waited for long, so nothing waits.
        with suppress(Exception), self._journal.lock:
            self._journal.hand_out()
            spooling.write()
        return False

    def _keep(self) -> Wait | None:
        """Bring to disk what waits too long, and deliver what dead processes have left there."""
        spooling = self._journal.spooling
        if self._spool is None or spooling is None or self._has_ended:
            return None
        self._recovery.start(self._spool.component)
        with patiently(self._journal.lock):
            spooling.try_again()
            number = self._journal.next_number
            seconds = spooling.tick(number)
            is_idle = not spooling.unspooled and self._seen == number and not self._journal.wake_after(1)
            self._seen = number
            if is_idle:
                spooling.rest(number)
            # What is due comes first: all else may take its time.
            is_more = spooling.write_due()
            spooling.refresh()
            spooling.acknowledge_all()
            is_needed = spooling.is_needed
        while is_more:
            # Others who wait for the lock come first.
            time.sleep(0)
            with patiently(self._journal.lock):
                is_more = spooling.write_due()
        self._report_spool(spooling.error, spooling.unstorable)
        if spooling.spool is not None:
            self._housework_due.set()
            if not self._housekeeper.start():
                self._keep_house()
        if is_idle:
            return partial(self._keeper_due.wait, _LOOK_SECONDS if is_needed else None)
        # A signal of its own, which nobody gives: an event does not make the time pass faster.
        return partial(self._clock.signal().wait, seconds)

    def _keep_house(self) -> Wait | None:
        """Do what the disk may take long for, so that no event has to wait for it."""
        spooling = self._journal.spooling
        if spooling is not None and self._has_ended:
            with self._journal.lock:
                spooling.let_go()
            return None
        if spooling is not None:
            spooling.keep_house()
            if spooling.needs_room:
                with patiently(self._journal.lock):
                    spooling.make_room()
            standing = spooling.standing()
            if standing is not Standing.IN_PLACE:
                with patiently(self._journal.lock):
                    spooling.mend(standing)
                if spooling.unspooled:
                    # What is to be written again waits for nothing.
                    self._keeper_due.set()
        return self._housework_due.wait

    def _report_spool(self, error: Exception | None, unstorable: Exception | None) -> None:
        """Warn once when events get no longer to disk, and once when they do again; and once of one that never can."""
        if unstorable is not None and not self._has_told_of_unstorable:
            self._has_told_of_unstorable = True
            _warn(f"an event cannot be brought to disk, and waits in memory alone: {unstorable}.")
        if self._spool is not None and bool(error) != bool(self._spool_error):
            if error:
                _warn(f"{spool_problem(error, self._spool)}. Until then events wait in memory alone.")
            else:
                _warn(f"the spool in {self._spool.component} can be used again.")
        self._spool_error = error

    def stats(self) -> dict[str, ChildStats]:
        """Return the account of each child as of now."""
        with self._journal.lock:
            for delivery in self._journal.deliveries:
                delivery.watch(self._clock.now())
            stats = {delivery.name: delivery.stats() for delivery in self._journal.deliveries}
        for recovered in self._recovery.stats():
            for name, account in recovered.items():
                stats[name] = stats[name].plus(account)
        return stats

    def observed(self) -> list[Observed]:
        """Return how each child stands, for the metrics."""
        stats = self.stats()
        return [
            Observed(self._component_id, child, stats[child.name], len(delivery.queue))
            for child, delivery in zip(self._config.enabled_children, self._journal.deliveries, strict=True)
        ]

    def close(self, seconds: float) -> None:
        """Deliver what can be delivered, stop the workers, and say in one line what is left.

        Args:
            seconds: How long to wait at most.
        """
        # What a parent that is gone has not journaled is this process's.
        with suppress(Exception):
            if self._outbox is not None and not self._outbox.is_heard():
                self._take_over()
        with suppress(Exception):
            self._receive()
        if not self._journal.next_number:
            # Nor is anything heard from now on.
            with suppress(Exception):
                self._stop_listening()
            if not self._journal.next_number:
                return
        try:
            self._deliver_last(seconds)
        finally:
            # Also after a Ctrl-C: what waits goes to disk.
            is_on_disk = self._settle_down()
        with self._journal.lock:
            left = {delivery.name: delivery.pending for delivery in self._journal.deliveries if delivery.pending}
        if left:
            children = ", ".join(f"{number} for child '{name}'" for name, number in left.items())
            if is_on_disk:
                _warn(f"The process ends with events that wait on disk: {children}. The next process delivers them.")
            else:
                _warn(f"The process ends with events that could not be delivered: {children}.")

    def end(self) -> bool:
        """Give back threads and descriptors, if all that is not delivered is on disk, for whoever comes next.

        Returns:
            Whether it has.
        """
        if self._outbox is not None:
            # In a forked process nothing of it is here.
            return True
        with suppress(Exception):
            self._stop_listening()
        if not self._journal.next_number:
            return True
        with self._journal.lock:
            is_left = any(delivery.pending for delivery in self._journal.deliveries)
        if is_left and not self._settle_down():
            return False
        self._has_ended = True
        self._recovery.give_back()
        for worker in self._workers:
            # What is on disk may soon be delivered by another writer.
            worker.stop(at_once=is_left)
        self._keeper_due.set()
        self._housework_due.set()
        if not self._housekeeper.is_running:
            self._keep_house()
        return True

    def _deliver_last(self, seconds: float) -> None:
        """Deliver what can be delivered in so many seconds. What one step meets keeps no other from being done."""
        end = self._clock.now() + seconds
        steps: list[Callable[[], object]] = [
            lambda: self.flush(seconds, seconds),
            self._stop_listening,
            lambda: self.flush(left := max(0.0, end - self._clock.now()), left),
            lambda: self.summaries.wait(end - self._clock.now()),
            self._recovery.stop,
            *(worker.stop for worker in self._workers),
            lambda: self._wait_for_workers(end),
        ]
        for step in steps:
            try:
                step()
            except Exception as error:
                tell(logger.debug, "A step of the process's end failed: %s", described(error))

    def _wait_for_workers(self, end: float) -> None:
        """Wait for who has delivered everything, and yet has to finish something, such as merging objects."""
        with self._journal.lock:
            while any(worker.is_finishing for worker in self._workers) and self._clock.now() < end:
                self._journal.progress.wait(end - self._clock.now())

    def _settle_down(self) -> bool:
        """Bring to disk what is not delivered. Returns whether it is there."""
        if self._journal.spooling is None:
            return False
        with self._journal.lock:
            self._journal.spooling.settle_down()
            self._journal.hand_out()
            return self._journal.spooling.error is None

    # Forks

    def before_fork(self) -> None:
        """Make the way by which the forked process will hand over what it logs."""
        is_there = self._inbox is not None and (self._inbox.is_closed or self._inbox.is_there)
        if not is_there and self._outbox is None and self._streams:
            # Without a file descriptor to be had, the forked process becomes a writer of its own.
            with suppress(OSError):
                self._inbox = Inbox()

    def after_fork_in_parent(self) -> None:
        """Begin to listen."""
        if self._inbox is not None:
            self._has_forked = True
            self._listener.start()

    def after_fork_in_child(self) -> None:
        """In the forked process: leave everything to the parent. Its threads are not here, its locks may be held."""
        outbox = self._inbox.outbox() if self._inbox else self._outbox and self._outbox.again()
        # Never freed: an exporter that is taken apart in a forked process can hang.
        self._parents = self._workers, self._journal, self._recovery
        self._begin()
        self._outbox = outbox
        self._inherited = set(self._streams)
        for stream in self._streams.values():
            stream.last.clear()

    def _tell_parent(self, stream: Stream, event: LogEvent | None) -> bool:
        """Hand over an event, or that the stream has ended.

        Returns:
            Whether it is handed over, or journaled here since the parent is gone.
        """
        with self._sending:
            if self._outbox is None:
                return False
            try:
                self._outbox.send(stream, stream.id not in self._inherited, event)
            except ParentGoneError:
                self._take_over()
                self._wake()
            return True

    def _take_over(self) -> None:
        """Become a writer of its own, beginning with what the parent has not journaled."""
        with self._sending:
            outbox = self._outbox
            if outbox is None or outbox.is_sending:
                # A signal handler's: what it has interrupted does it.
                return
            for stream, said in outbox.take_back():
                if said is None:
                    self._journal.end_stream(stream)
                elif isinstance(said, Loss):
                    self._journal.drop(said.level, said.progress, said.events, stream)
                else:
                    self._journal.append(stream, said)
            # Now, so that what others log meanwhile comes after.
            self._outbox = None

    def _listen(self) -> Wait | None:
        if self._inbox is None or self._inbox.is_closed:
            return None
        self._receive()
        return self._inbox.wait

    def _stop_listening(self) -> None:
        """Take in what forked processes have said, and leave to them what they say from now on."""
        if self._inbox is None:
            return
        self._inbox.announce_end()
        try:
            self._receive()
        finally:
            with self._receiving:
                self._inbox.close()

    def _receive(self) -> None:
        """Journal what forked processes have said."""
        with self._receiving:
            if self._inbox is None or self._inbox.is_closed or self._is_receiving:
                # It may be a signal handler's flush that has interrupted this.
                return
            self._is_receiving = True
            try:
                for said in self._inbox.receive():
                    self._take_in(said)
            finally:
                self._is_receiving = False

    def _take_in(self, said: Message | Loss) -> None:
        try:
            if isinstance(said, Message):
                self._take(said)
            else:
                with self._journal.lock:
                    stream = self._streams.get(said.stream) if said.stream else None
                self._journal.drop(said.level, said.progress, said.events, stream)
        except Exception as error:
            tell(logger.debug, "What a forked process says cannot be journaled: %s", described(error))
            self._journal.drop(logging.CRITICAL)

    def _take(self, said: Message) -> None:
        if said.metadata is not None:
            self.stream(said.stream, said.metadata, said.artifact_store_id)
        with self._journal.lock:
            stream = self._streams.get(said.stream)
        if said.event is None:
            if stream is not None:
                self.end_stream(stream)
        elif stream is None:
            # It was registered so long ago that it is forgotten.
            self._journal.drop(said.event.level, said.event.progress)
        else:
            self.append(stream, said.event)

    def _wake(self) -> list[Worker]:
        """Wake all threads; where one is not there, try to start it. Never raises: this is part of `emit`.

        Returns:
            The workers whose thread cannot be started.
        """
        wanted = self._journal.wakes_wanted
        asleep = [worker for worker in self._workers if not worker.wake()]
        all_awake = self._wake_keeper() and not asleep
        if self._has_forked:
            all_awake = self._listener.start() and all_awake
        if all_awake:
            self._journal.wakes_done = wanted
        return asleep


def _warn(text: str) -> None:
    tell(logger.warning, text)
