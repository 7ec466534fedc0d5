"""Both sides of a fork as a writer sees them: `ForkedProcesses` in the parent, `Parent` in a forked process.

The package's docstring tells how they work together.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, Protocol
from uuid import UUID

from zenml.logger import get_logger

from composite_logstore.capture.frames import Loss, Message
from composite_logstore.capture.inbox import Inbox
from composite_logstore.capture.outbox import Outbox, ParentGoneError
from composite_logstore.capture.record import Note, captured
from composite_logstore.event import LogEvent, Stream
from composite_logstore.inert import described
from composite_logstore.service import Service, Wait, tell

logger = get_logger(__name__)


class TakesEvents(Protocol):
    """A journal, or a writer with its journal."""

    def append(self, stream: Stream, said: Note | LogEvent) -> object:
        """Take in an event."""

    def end_stream(self, stream: Stream) -> None:
        """Take in that a stream has ended."""


class CountsLosses(TakesEvents, Protocol):
    """A journal."""

    def drop(self, level: int, progress: bool = False, count: int = 1, stream: Stream | None = None) -> None:
        """Count events that were lost before they had a number."""


class KnowsStreams(TakesEvents, Protocol):
    """A writer."""

    def stream(self, id: UUID, metadata: dict[str, Any], artifact_store_id: UUID | None) -> Stream:
        """Return the stream with this id, registered if need be."""

    def known_stream(self, id: UUID) -> Stream | None:
        """Return the stream with this id, None if it is not registered."""


class ForkedProcesses:
    """The parent's side: a thread that journals events of forked processes, started with the first fork."""

    def __init__(self, writer: KnowsStreams, journal: CountsLosses, service: Callable[..., Service]) -> None:
        """Prepare.

        Args:
            writer: Takes in the events of forked processes.
            journal: Its journal.
            service: Makes a service of a thread's name and its step.
        """
        self._writer = writer
        self._journal = journal
        self._inbox: Inbox | None = None
        self._has_forked = False
        self._listener = service("composite-logstore forked processes", self._listen)
        self._receiving = threading.RLock()
        self._is_receiving = False

    def before_fork(self) -> None:
        """Make an inbox, if there is none that can be used. A closed one stays: this process is at its end.

        Without a free file descriptor there is none, and a forked process becomes a writer of its own.
        """
        if self._inbox is None or not (self._inbox.is_closed or self._inbox.has()):
            with suppress(OSError):
                self._inbox = Inbox()

    def after_fork(self) -> None:
        """Begin to listen, in the parent."""
        if self._inbox is not None:
            self._has_forked = True
            self._listener.start()

    def outbox(self) -> Outbox | None:
        """Return the way to the parent, in a process that was just forked."""
        if self._inbox is None:
            return None
        self._inbox.become_outbox()
        return Outbox(self._inbox)

    def wake(self) -> bool:
        """Start the thread again, should it not run. Returns whether it runs, or need not."""
        return not self._has_forked or self._listener.start()

    def receive(self) -> None:
        """Journal everything that forked processes have sent by now."""
        with self._receiving:
            if self._inbox is None or self._inbox.is_closed or self._is_receiving:
                # A signal handler's flush may interrupt this very method.
                return
            self._is_receiving = True
            try:
                for said in self._inbox.receive():
                    self._take_in(said)
            finally:
                self._is_receiving = False

    def stop(self) -> None:
        """Journal everything that forked processes have sent. They deliver later events themselves."""
        if self._inbox is None or self._inbox.is_closed:
            return
        self._inbox.announce_end()
        try:
            self.receive()
        finally:
            with self._receiving:
                self._inbox.close()

    def _listen(self) -> Wait | None:
        if self._inbox is None or self._inbox.is_closed:
            return None
        self.receive()
        return self._inbox.wait

    def _take_in(self, said: Message | Loss) -> None:
        try:
            if isinstance(said, Message):
                self._take_in_message(said)
            else:
                stream = self._writer.known_stream(said.stream) if said.stream else None
                self._journal.drop(said.level, said.progress, said.events, stream)
        except Exception as error:
            tell(logger.debug, "An event of a forked process cannot be journaled: %s", described(error))
            self._journal.drop(logging.CRITICAL)

    def _take_in_message(self, said: Message) -> None:
        if said.metadata is not None:
            self._writer.stream(said.stream, said.metadata, said.artifact_store_id)
        stream = self._writer.known_stream(said.stream)
        if said.event is None:
            if stream is not None:
                self._writer.end_stream(stream)
        elif stream is None:
            # The writer registered it so long ago that it has forgotten it.
            self._journal.drop(said.event.level, bool(said.event.progress))
        else:
            self._writer.append(stream, said.event)


class Parent:
    """A forked process's side: it sends everything to the parent, and takes over once the parent is gone."""

    def __init__(self, outbox: Outbox, inherited: Iterable[UUID], journal: CountsLosses, wake: Callable[[], object]):
        """Begin.

        Args:
            outbox: The way to the parent.
            inherited: The ids of the streams that the parent knows.
            journal: This process's own journal, for when the parent is gone.
            wake: Wakes this process's own workers, once the journal has events for them.
        """
        self._outbox: Outbox | None = outbox
        self._inherited = set(inherited)
        self._journal = journal
        self._wake = wake
        self._sending = threading.RLock()

    @property
    def is_alive(self) -> bool:
        """Whether the parent gets what this process logs, as far as this process knows."""
        return self._outbox is not None

    def again(self) -> Outbox | None:
        """Return the way to the same parent, for a process that this one has forked."""
        return self._outbox and Outbox(self._outbox.inbox)

    def send(self, stream: Stream, said: Note | LogEvent) -> bool:
        """Send an event to the parent.

        Returns:
            Whether the parent has it, or this process's journal since the parent is gone. If not, the caller journals
            the event.
        """
        return self._outbox is not None and self._send(stream, captured(said, stream))

    def end_stream(self, stream: Stream) -> bool:
        """Tell the parent that a stream has ended, unless the stream is the parent's own. Returns as `send` does."""
        return self._outbox is not None and (stream.id in self._inherited or self._send(stream, None))

    def look(self) -> None:
        """Check whether the parent still receives, and take over if it does not."""
        if self._outbox is not None and not self._outbox.is_heard():
            self._take_over()

    def _send(self, stream: Stream, event: LogEvent | None) -> bool:
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
        """Journal all events that the parent has not. From then on this process is a writer of its own."""
        with self._sending:
            outbox = self._outbox
            if outbox is None or outbox.is_sending:
                # A signal handler interrupts `send`, which takes over itself.
                return
            for stream, said in outbox.take_back():
                if said is None:
                    self._journal.end_stream(stream)
                elif isinstance(said, Loss):
                    self._journal.drop(said.level, said.progress, said.events, stream)
                else:
                    self._journal.append(stream, said)
            # Only now, so that events of other threads follow these.
            self._outbox = None
