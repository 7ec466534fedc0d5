"""One process that logs to one component: its journal, and a worker for each child."""

from __future__ import annotations

import atexit
import contextvars
import os
import threading
from functools import lru_cache
from math import inf
from typing import Any
from uuid import UUID

from zenml.logger import get_logger

from composite_logstore import clock, telemetry
from composite_logstore.adoption import AdoptedJournal, left_behind
from composite_logstore.config import CompositeLogStoreConfig
from composite_logstore.delivery import ChildStats, Flush
from composite_logstore.event import Capture, Stream
from composite_logstore.fork import Inbox, Loss, Outbox, ParentGoneError
from composite_logstore.journal import Journal
from composite_logstore.spool import Spool
from composite_logstore.spooling import TICK_SECONDS, SpoolSettings, spool_settings
from composite_logstore.telemetry import Observed
from composite_logstore.worker import Worker

logger = get_logger(__name__)

EXIT_SECONDS = 3.0
"""How long the process's own exit may take: ZenML's local deployer kills after 5 s."""


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
        self._begin(spool_settings(component_id, config))

    def _begin(self, spool: SpoolSettings | None) -> None:
        # What forked processes say comes in here; a forked process itself has an outbox.
        self._inbox: Inbox | None = None
        self._is_listening = False
        self._receiving = threading.Lock()
        self._outbox: Outbox | None = None
        self._sending = threading.RLock()
        self._inherited: set[UUID] = set()
        children = self._config.enabled_children
        self._spool = spool
        self._journal = Journal(children, self._clock, spool)
        self._keeping = threading.Lock()
        self._is_keeping = False
        self._keeper_due = self._clock.signal()
        self._spool_error: str | None = None
        self._adopted: list[tuple[AdoptedJournal, list[Worker]]] = []
        self._workers = [
            Worker(self._component_id, child, delivery, self._journal, self._clock)
            for child, delivery in zip(children, self._journal.deliveries, strict=True)
        ]

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

    def append(self, stream: Stream, capture: Capture) -> None:
        """Hand an event to every child that wants it. Waits for nothing that is held across I/O."""
        if self._outbox is not None and self._tell_parent(stream, capture):
            return
        if self._journal.append(stream, capture):
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
        self._receive()
        if not self._journal.next_number:
            return
        with self._journal.lock:
            flush = Flush(self._journal.deliveries, self._journal.next_number, self._clock.now(), timeout, limit)
        self._wake()
        if not blocking:
            return
        with self._journal.lock:
            while (seconds := flush.wait(self._clock.now())) > 0:
                self._journal.progress.wait(seconds)
        for worker in self._workers:
            worker.report()

    # The spool

    def _wake_keeper(self) -> None:
        if self._spool is not None:
            self._keeper_due.set()
            if not self._is_keeping:
                with self._keeping:
                    if not self._is_keeping:
                        self._clock.start(self._keep, "composite-logstore spool")

    def _keep(self) -> None:
        """Bring to disk what waits too long, and deliver what dead processes have left there."""
        with self._keeping:
            was_keeping, self._is_keeping = self._is_keeping, True
        spooling = self._journal.spooling
        if was_keeping or self._spool is None or spooling is None:
            return
        for spool in left_behind(self._spool.component):
            self._adopt(spool)
        while True:
            with self._journal.lock:
                is_busy = spooling.tick(self._journal.next_number)
                spooling.refresh([stream.last[0] for stream in self._streams.values() if stream.last])
                if not is_busy:
                    self._journal.wake_after(1)
            self._report_spool(spooling.error)
            self._let_go_of_adopted()
            self._keeper_due.wait(TICK_SECONDS if is_busy else 1.0 if self._adopted else None)

    def _adopt(self, spool: Spool) -> None:
        journal = AdoptedJournal(spool, self._config.enabled_children, self._clock)
        workers = [
            Worker(self._component_id, child, delivery, journal, self._clock)
            for child, delivery in zip(journal.children, journal.deliveries, strict=True)
        ]
        with self._journal.lock:
            self._adopted.append((journal, workers))
        for worker in workers:
            worker.wake()

    def _let_go_of_adopted(self) -> None:
        """Take away the folders of which nothing is left for the children that there are now."""
        for journal, workers in list(self._adopted):
            with journal.lock:
                is_done = all(delivery.oldest == inf for delivery in journal.deliveries)
                if is_done and not journal.is_closed:
                    journal.is_closed = True
                    journal.spool.close()
            if is_done:
                for worker in workers:
                    worker.stop()

    def _report_spool(self, error: OSError | None) -> None:
        """Warn once when events get no longer to disk, and once when they do again."""
        said = None if error is None else error.strerror or str(error)
        if bool(said) != bool(self._spool_error) and self._spool is not None:
            text = (
                f"the spool in {self._spool.component} cannot be used: {said}. Events wait in memory alone; make room "
                "there, or set 'spool_directory' to a folder that can be written and locked."
                if said
                else "the spool can be used again."
            )
            contextvars.Context().run(logger.warning, text)
        self._spool_error = said

    def stats(self) -> dict[str, ChildStats]:
        """Return the account of each child as of now."""
        with self._journal.lock:
            for delivery in self._journal.deliveries:
                delivery.watch(self._clock.now())
            stats = {delivery.name: delivery.stats() for delivery in self._journal.deliveries}
            adopted = [journal for journal, _ in self._adopted]
        for journal in adopted:
            with journal.lock:
                for delivery in journal.deliveries:
                    stats[delivery.name] = stats[delivery.name].plus(delivery.stats())
        return stats

    def observed(self) -> list[Observed]:
        """Return how each child stands, for the metrics."""
        with self._journal.lock:
            return [
                Observed(self._component_id, child, delivery.stats(), len(delivery.queue))
                for child, delivery in zip(self._config.enabled_children, self._journal.deliveries, strict=True)
            ]

    def close(self, seconds: float) -> None:
        """Deliver what can be delivered, stop the workers, and say in one line what is left.

        Args:
            seconds: How long to wait at most.
        """
        if not self._journal.next_number:
            return
        self.flush(seconds, seconds)
        for worker in self._workers:
            worker.stop()
        left = {name: stats.pending for name, stats in self.stats().items() if stats.pending}
        if self._journal.spooling is not None:
            with self._journal.lock:
                self._journal.spooling.settle_down()
                error = self._journal.spooling.error
            if error is None:
                return
        if left:
            children = ", ".join(f"{number} for child '{name}'" for name, number in left.items())
            logger.warning(f"The process ends with events that could not be delivered: {children}.")

    # Forks

    def before_fork(self) -> None:
        """Make the way by which the forked process will hand over what it logs."""
        if self._inbox is None and self._outbox is None and self._streams:
            self._inbox = Inbox()

    def after_fork_in_parent(self) -> None:
        """Begin to listen."""
        if self._inbox is not None and not self._is_listening:
            self._is_listening = True
            self._clock.start(self._listen, "composite-logstore forked processes")

    def after_fork_in_child(self) -> None:
        """In the forked process: leave everything to the parent. Its threads are not here, its locks may be held."""
        outbox = self._inbox.outbox() if self._inbox else self._outbox
        if self._journal.spooling is not None and self._journal.spooling.spool is not None:
            self._journal.spooling.spool.release_in_fork()
        # Never freed: an exporter that is taken apart in a forked process can hang.
        self._parents = self._workers, self._journal, self._adopted
        self._begin(None)
        self._outbox = outbox
        self._inherited = set(self._streams)
        for stream in self._streams.values():
            stream.last.clear()

    def _tell_parent(self, stream: Stream, capture: Capture | None) -> bool:
        """Hand over an event, or that the stream has ended, unless the parent is gone."""
        with self._sending:
            try:
                if self._outbox is not None:
                    self._outbox.send(stream, stream.id not in self._inherited, capture)
                    return True
            except ParentGoneError:
                self._outbox = None
            return False

    def _listen(self) -> None:
        while self._inbox is not None:
            self._inbox.wait()
            self._receive()

    def _receive(self) -> None:
        """Journal what forked processes have said."""
        if self._inbox is None:
            return
        with self._receiving:
            for said in self._inbox.receive():
                if isinstance(said, Loss):
                    self._journal.drop(said.level, said.progress)
                    continue
                if said.metadata is not None:
                    self.stream(said.stream, said.metadata, said.artifact_store_id)
                with self._journal.lock:
                    stream = self._streams.get(said.stream)
                if stream is None:
                    continue
                if said.capture is None:
                    self.end_stream(stream)
                else:
                    self.append(stream, said.capture)

    def _wake(self) -> None:
        wanted = self._journal.wakes_wanted
        for worker in self._workers:
            worker.wake()
        self._wake_keeper()
        self._journal.wakes_done = wanted


_writers: dict[tuple[UUID, str], Writer] = {}
_writers_lock = threading.Lock()


def writer_of(component_id: UUID, config: CompositeLogStoreConfig) -> Writer:
    """Return this process's writer for a component.

    ZenML may build a component more than once in a process. All instances with the same settings share
    one writer, so that a child has one queue and one order; after an update of the component new
    instances get a new one.
    """
    key = (component_id, config.model_dump_json())
    with _writers_lock:
        if key not in _writers:
            _offer_metrics()
            _writers[key] = Writer(component_id, config)
        return _writers[key]


@lru_cache(maxsize=1)
def _offer_metrics() -> None:
    telemetry.observe(lambda: [child for writer in list(_writers.values()) for child in writer.observed()])


def _close_all() -> None:
    end = clock.current.now() + EXIT_SECONDS
    for writer in list(_writers.values()):
        writer.close(max(0.0, end - clock.current.now()))


def _before_fork() -> None:
    for writer in list(_writers.values()):
        writer.before_fork()


def _after_fork_in_parent() -> None:
    for writer in list(_writers.values()):
        writer.after_fork_in_parent()


def _after_fork_in_child() -> None:
    global _writers_lock
    _writers_lock = threading.Lock()
    for writer in _writers.values():
        writer.after_fork_in_child()


atexit.register(_close_all)
os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
