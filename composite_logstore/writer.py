"""One process that logs to one component: its journal, and a worker for each child."""

from __future__ import annotations

import atexit
import os
import threading
import time
from typing import Any
from uuid import UUID

from zenml.logger import get_logger

from composite_logstore.config import CompositeLogStoreConfig
from composite_logstore.delivery import ChildStats, Flush
from composite_logstore.event import Capture, Stream
from composite_logstore.journal import Journal
from composite_logstore.worker import Worker

logger = get_logger(__name__)

EXIT_SECONDS = 3.0
"""How long the process's own exit may take: ZenML's local deployer kills after 5 s."""


class Writer:
    """The events of this process for one component, whichever instances of its log store they come by.

    Creating it starts nothing and touches no disk; the workers start with the first event.
    """

    def __init__(self, config: CompositeLogStoreConfig) -> None:
        """Prepare.

        Args:
            config: The composite's settings.
        """
        self._config = config
        self._begin()

    def _begin(self) -> None:
        children = self._config.enabled_children
        self._journal = Journal(children)
        self._streams: dict[UUID, Stream] = {}
        self._workers = [
            Worker(child, delivery, self._journal)
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
        if self._journal.append(stream, capture):
            self._wake()

    def end_stream(self, stream: Stream) -> None:
        """Announce that no more events of the stream will come, unless it is registered again."""
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
        if not self._journal.next_number:
            return
        with self._journal.lock:
            flush = Flush(self._journal.deliveries, self._journal.next_number, time.monotonic(), timeout, limit)
        self._wake()
        if not blocking:
            return
        with self._journal.lock:
            while (seconds := flush.wait(time.monotonic())) > 0:
                self._journal.progress.wait(seconds)
        for worker in self._workers:
            worker.report()

    def stats(self) -> dict[str, ChildStats]:
        """Return the account of each child as of now."""
        with self._journal.lock:
            for delivery in self._journal.deliveries:
                delivery.watch(time.monotonic())
            return {delivery.name: delivery.stats() for delivery in self._journal.deliveries}

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
        if left:
            children = ", ".join(f"{number} for child '{name}'" for name, number in left.items())
            logger.warning(f"The process ends with events that could not be delivered: {children}.")

    def begin_again_in_fork(self) -> None:
        """Be a writer of its own in a forked process: threads and locks are not inherited, streams are."""
        streams = self._streams
        self._begin()
        for stream in streams.values():
            stream.last.clear()
        self._streams = streams

    def _wake(self) -> None:
        for worker in self._workers:
            worker.wake()


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
            _writers[key] = Writer(config)
        return _writers[key]


def _close_all() -> None:
    end = time.monotonic() + EXIT_SECONDS
    for writer in list(_writers.values()):
        writer.close(max(0.0, end - time.monotonic()))


def _begin_again_in_fork() -> None:
    global _writers_lock
    _writers_lock = threading.Lock()
    for writer in _writers.values():
        writer.begin_again_in_fork()


atexit.register(_close_all)
os.register_at_fork(after_in_child=_begin_again_in_fork)
