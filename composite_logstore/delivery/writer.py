"""One process that logs to one component: its journal, and a worker for each child."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, Literal
from uuid import UUID

from zenml.enums import LoggingLevels
from zenml.logger import get_logger

from composite_logstore import clock
from composite_logstore.ansi import without_escapes
from composite_logstore.capture.forked import ForkedProcesses, Parent
from composite_logstore.capture.lines import Lines
from composite_logstore.capture.open_streams import here
from composite_logstore.capture.record import Note, of_this_process, text_in
from composite_logstore.config import CompositeLogStoreConfig
from composite_logstore.delivery.account import ChildStats
from composite_logstore.delivery.budgets import Budgets
from composite_logstore.delivery.flush import Flush
from composite_logstore.delivery.handover import Handover
from composite_logstore.delivery.journal import Journal
from composite_logstore.delivery.keeper import Keeper
from composite_logstore.delivery.metrics import Observed
from composite_logstore.delivery.recovery import Recovery
from composite_logstore.delivery.status import Status
from composite_logstore.delivery.step_metadata import Summaries
from composite_logstore.delivery.worker import Worker
from composite_logstore.event import LogEvent, Stream
from composite_logstore.inert import described
from composite_logstore.processing import known_secrets
from composite_logstore.service import Service, patiently, tell
from composite_logstore.spool.settings import spool_settings

logger = get_logger(__name__)

STEP_ID = "zenml.step.run.id"
"""The attribute by which ZenML names the step of a stream."""

_LONGEST_WAIT_SECONDS = 3600.0


class Writer:
    """The events of this process for one component: all instances of its log store share the writer.

    Creating it starts nothing and touches no disk; the workers start with the first event. In a forked process it
    sends everything to the parent's writer, and delivers by itself once the parent is gone.
    """

    def __init__(self, component_id: UUID, config: CompositeLogStoreConfig) -> None:
        config.watch_secrets()
        self._component_id = component_id
        self._config = config
        self._clock = clock.current
        self._streams: dict[UUID, Stream] = {}
        self.summaries = Summaries(component_id, self._clock)
        self._delivery = self._chosen_delivery()
        self._spool = spool_settings(component_id, config, is_shared=self._delivery != "process")
        self._begin()

    def _chosen_delivery(self) -> Literal["process", "agent", "auto"]:
        try:
            return self._config.chosen_delivery
        except ValueError as error:
            _warn(f"{error}. Until then this process delivers its own events.")
            return "process"

    def _begin(self) -> None:
        service = partial(Service, clock=self._clock, warn=_warn, note_problem=self._note_problem)
        children = self._config.enabled_children
        self._journal = Journal(children, self._clock, self._spool, self._config.max_queue_bytes)
        batch_bytes = self._journal.batch_bytes
        budgets = Budgets(self._component_id, children, self._spool and self._spool.component, self._clock)
        self._recovery = Recovery(
            self._component_id, children, self._spool, self._clock, _warn, self._note_problem, batch_bytes, budgets
        )
        if self._journal.spilling:
            self._journal.spilling.folder.others = self._recovery.journals
        self._status = Status(self._spool.component, self._journal.writer, self._clock) if self._spool else None

        def new_worker(place: int) -> Worker:
            child = children[place]
            worker = Worker(self._component_id, child, self._clock, budgets.of(child), self._spool)
            worker.take(self._journal.deliveries[place], self._journal)
            return worker

        self._handover = Handover(self._delivery, self._journal, self._clock, new_worker, _warn)
        self._keeper = Keeper(
            self._journal, self._handover, self._recovery, self._clock, service, _warn, self._report_status
        )
        self._forked = ForkedProcesses(self, self._journal, service)
        # Only in a forked process.
        self._parent: Parent | None = None
        # A forked process starts no thread.
        self.lines = Lines(self.append, self._clock, service, lambda: self._parent is None or not self._parent.is_alive)

    def _note_problem(self, why: str) -> None:
        """Put into all accounts why a thread cannot do its work: all children depend on it."""
        with self._journal.lock:
            for delivery in self._journal.deliveries:
                delivery.last_error = why

    @property
    def writer_id(self) -> str:
        """The writer's name, 15 hexadecimal digits."""
        return self._journal.writer

    def stream(self, id: UUID, metadata: dict[str, Any], artifact_store_id: UUID | None) -> Stream:
        """Return the stream with this id. Registered once more, it continues with its next sequence number.

        Args:
            id: The id of ZenML's `LogsResponse`.
            metadata: The origin's metadata, which ZenML fills later.
            artifact_store_id: The artifact store of the active stack, None if unknown.
        """
        known_secrets.known_secrets.own(id)
        with self._journal.lock:
            level = self._config.stderr_level
            new = Stream(id, metadata, artifact_store_id, level if level == "detect" else LoggingLevels[level].value)
            stream = self._streams.setdefault(id, new)
            if self._journal.spilling:
                self._journal.spilling.marks.open_stream(stream)
            stream.metadata = metadata
            return stream

    def known_stream(self, id: UUID) -> Stream | None:
        """Return the stream with this id, None if it is not registered, or forgotten."""
        with self._journal.lock:
            return self._streams.get(id)

    def events_of_step(self, step_run_id: UUID) -> dict[str, int]:
        """Return how many events this process has captured for a step: the id of each of its streams → their number."""
        with self._journal.lock:
            self._journal.hand_out()
            streams = [one for one in self._streams.values() if one.metadata.get(STEP_ID) == str(step_run_id)]
            return {str(stream.id): stream.last[0] + 1 if stream.last else 0 for stream in streams}

    def append(self, stream: Stream, said: Note | LogEvent) -> None:
        """Hand an event to every child that wants it. Never waits for I/O of a backend."""
        if self._parent is not None:
            begun, stream, said = stream, self._stream_of_now(stream), of_this_process(said)
            if stream is not begun and "step" in said.attributes:
                # ZenML names the step that was running when this process was forked.
                step = str(stream.metadata.get("zenml.step.run.name", ""))
                said = said._replace(attributes={**said.attributes, "step": step})
            if self._parent.send(stream, said):
                return
        if self._journal.append(stream, said):
            self._wake()

    def _stream_of_now(self, stream: Stream) -> Stream:
        """Return, in a forked process that outlives its step, the stream of the step that runs now."""
        found = here.follow(stream.id, self._component_id)
        if found is None:
            return stream
        return self.known_stream(found.id) or self.stream(found.id, found.metadata, found.artifact_store_id)

    def write(self, stream: Stream, said: Note) -> None:
        """Take in what a thread has printed. A line becomes an event when it is complete, or a second later.

        Args:
            stream: The stream that it belongs to.
            said: The text, noted as a record of the logger `stdout` or `stderr`. Its newline counts.
        """
        if self._config.join_lines:
            self.lines.write(stream, said)
        elif without_escapes(text_in(said)).strip():
            self.append(stream, said)

    def end_stream(self, stream: Stream) -> None:
        """Announce that the stream gets no more events, unless it is registered again."""
        self.lines.flush(stream)
        if self._parent is not None and self._parent.end_stream(stream):
            return
        self._journal.end_stream(stream)
        if not self._handover.is_away:
            self._recovery.look_again()
        with self._journal.lock:
            # A process that serves for months has many streams: it remembers the latest ones.
            for id in [id for id in self._streams if id != stream.id][: max(0, len(self._streams) - 10_000)]:
                del self._streams[id]

    def flush(self, timeout: float, limit: float, blocking: bool = True) -> None:
        """Deliver all events captured by now, without waiting for fuller batches.

        Args:
            timeout: How long to wait for a child that makes no progress, in seconds.
            limit: How long to wait in all, in seconds.
            blocking: Whether to wait.
        """
        self._collect()
        if not self._journal.next_number:
            return
        self._handover.begin()
        if self._handover.is_away:
            # Without an agent that may take longer than a flush may.
            self._handover.look_soon()
            self._keeper.keep_house()
        with self._journal.lock:
            before = self._journal.next_number
            flush = Flush(self._journal.deliveries, before, self._clock.now(), timeout, limit)
        while not self._has_flushed(flush, before, blocking):
            # Delivery was handed over meanwhile.
            pass
        for worker in self._handover.workers if blocking else ():
            worker.report()

    def _has_flushed(self, flush: Flush, before: int, blocking: bool) -> bool:
        """Wait for those who deliver now. Returns False if others do, before the flush is over."""
        is_away = self._handover.is_away
        if is_away:
            self._handover.demand()
            return not blocking or self._handover.wait(flush)
        for worker in self._wake():
            worker.give_up(before)
        with self._journal.lock:
            while blocking and (seconds := flush.wait(self._clock.now())) > 0:
                if self._handover.is_away:
                    return False
                self._journal.progress.wait(min(seconds, _LONGEST_WAIT_SECONDS))
        return True

    def _collect(self) -> None:
        """Journal incomplete lines, events that a dead parent has not journaled, and those that forked processes sent.

        Each source is asked even if another one raises. The listener's thread warns of errors of forked processes.
        """
        with suppress(Exception):
            self.lines.flush()
        with suppress(Exception):
            if self._parent is not None:
                self._parent.look()
        with suppress(Exception):
            self._forked.receive()

    def stats(self) -> dict[str, ChildStats]:
        """Return the account of each child as of now."""
        self._handover.follow()
        with patiently(self._journal.lock):
            for delivery in self._journal.deliveries:
                delivery.watch(self._clock.now())
            stats = {delivery.name: delivery.stats() for delivery in self._journal.deliveries}
        for recovered in self._recovery.stats():
            for name, account in recovered.items():
                stats[name] = stats[name].plus(account)
        return stats

    def _report_status(self) -> None:
        """Tell `composite-logstore status` how the children are.

        Raises:
            OSError: That is not possible now.
        """
        if self._status is None:
            return
        accounts = self.stats()
        with patiently(self._journal.lock):
            deliveries = self._journal.deliveries
            oldest = [(delivery.name, time) for delivery in deliveries if (time := delivery.oldest_time) is not None]
        self._status.report(accounts, oldest + self._recovery.oldest_times(), self._recovery.folders)

    def observed(self) -> list[Observed]:
        """Return the state of each child, for the metrics."""
        stats = self.stats()
        return [
            Observed(
                self._component_id,
                child,
                stats[child.name],
                delivery.pending if self._handover.is_away else len(delivery.queue),
            )
            for child, delivery in zip(self._config.enabled_children, self._journal.deliveries, strict=True)
        ]

    def close(self, seconds: float) -> None:
        """Deliver what can be delivered, stop the workers, and warn in one line of undelivered events.

        Args:
            seconds: How long to wait at most, in seconds.
        """
        self._collect()
        if not self._journal.next_number:
            # Forked processes may still have sent something.
            with suppress(Exception):
                self._forked.stop()
            if not self._journal.next_number:
                return
        try:
            self._deliver_last(seconds)
        finally:
            # After a Ctrl-C, too, undelivered events go to disk.
            is_on_disk = self._keeper.write_rest()
            if self._status is not None:
                self._status.end()
        self._handover.follow()
        with self._journal.lock:
            left = {delivery.name: delivery.pending for delivery in self._journal.deliveries if delivery.pending}
        if left:
            children = ", ".join(f"{number} for child '{name}'" for name, number in left.items())
            if is_on_disk and self._handover.is_away:
                _warn(f"The process ends with events that wait on disk: {children}. The agent delivers them.")
            elif is_on_disk:
                _warn(f"The process ends with events that wait on disk: {children}. The next process delivers them.")
            else:
                _warn(f"The process ends with events that could not be delivered: {children}.")

    def end(self) -> bool:
        """Give back threads and descriptors, if all undelivered events are on disk for a later writer.

        Returns:
            Whether it has ended.
        """
        if self._parent is not None and self._parent.is_alive:
            # The parent has the events, and this process no threads.
            return True
        with suppress(Exception):
            self._forked.stop()
        if not self._journal.next_number:
            return True
        with self._journal.lock:
            is_left = any(delivery.pending for delivery in self._journal.deliveries)
        if is_left and not self._keeper.write_rest():
            return False
        self._keeper.stop()
        self._recovery.stop(at_once=True)
        for worker in self._handover.workers:
            # Another writer may soon deliver the events on disk.
            worker.stop(at_once=is_left)
        self._keeper.let_go()
        if self._status is not None:
            self._status.end()
        return True

    def _deliver_last(self, seconds: float) -> None:
        """Deliver what can be delivered in so many seconds. Each step runs even if an earlier one raises."""
        end = self._clock.now() + seconds
        steps: list[Callable[[], object]] = [
            lambda: self.flush(seconds, seconds),
            self._forked.stop,
            lambda: self.flush(left := max(0.0, end - self._clock.now()), left),
            lambda: self.summaries.wait(end - self._clock.now()),
            self._recovery.stop,
            self._handover.stop,
            lambda: self._wait_for_workers(end),
        ]
        for step in steps:
            try:
                step()
            except Exception as error:
                tell(logger.debug, "A step of the process's end failed: %s", described(error))

    def _wait_for_workers(self, end: float) -> None:
        """Wait for workers that have delivered everything but must finish something, such as merging objects."""
        with self._journal.lock:
            while any(worker.is_finishing for worker in self._handover.workers) and self._clock.now() < end:
                self._journal.progress.wait(end - self._clock.now())

    # Forks

    def before_fork(self) -> None:
        """Make the inbox for what the forked process will log, unless this process has a living parent itself."""
        if self._streams and not (self._parent is not None and self._parent.is_alive):
            self._forked.before_fork()

    def after_fork_in_parent(self) -> None:
        """Begin to listen to forked processes."""
        self._forked.after_fork()

    def after_fork_in_child(self) -> None:
        """Begin anew in a forked process, as a sender to the parent: the threads are missing, locks may be held."""
        outbox = self._forked.outbox() or (self._parent and self._parent.again())
        # Never freed: an exporter that is finalized in a forked process can hang.
        self._parents = self._handover, self._journal, self._recovery
        self._begin()
        if outbox:
            self._parent = Parent(outbox, self._streams, self._journal, self._wake)
        for stream in self._streams.values():
            stream.last.clear()

    def _wake(self) -> list[Worker]:
        """Wake all threads, and start those that do not run. Never raises: this is part of `emit`.

        Returns:
            The workers whose thread cannot be started.
        """
        self._handover.begin()
        wanted = self._journal.wakes_wanted
        asleep = [worker for worker in self._handover.workers if not worker.wake()]
        all_awake = self._keeper.wake() and not asleep
        if self._forked.wake() and all_awake:
            self._journal.wakes_done = wanted
        return asleep


def _warn(text: str) -> None:
    tell(logger.warning, text)
