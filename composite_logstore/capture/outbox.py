"""A forked process's end of the way to its parent: it appends frames, and keeps them until the parent acknowledges."""

from __future__ import annotations

import errno
import os
import select
import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

from zenml.logger import get_logger

from composite_logstore.capture import frames
from composite_logstore.capture.frames import Loss, Message
from composite_logstore.capture.inbox import CLOSED, OPEN, Inbox
from composite_logstore.clock import Clock
from composite_logstore.event import LogEvent, Stream
from composite_logstore.inert import described
from composite_logstore.service import tell

logger = get_logger(__name__)

_CUT_OFF_SECONDS = 1.0
"""How long a forked process waits, once, for a parent at its end to journal its last frames, in seconds."""
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOMEM}
_CLOCK = Clock()


class ParentGoneError(Exception):
    """The parent no longer receives what the forked process sends."""


@dataclass
class _Item:
    """Something to send. It gets its number when it is first tried, since a Ctrl-C makes the outbox try it again."""

    stream: Stream
    is_own: bool
    event: LogEvent | None
    number: int = -1


class Outbox:
    """A forked process's end. For one thread at a time.

    Attributes:
        inbox: The parent's end, as this process has inherited it.
        is_sending: Whether a call of `send` is under way: a signal handler may log in the middle of it.
    """

    def __init__(self, inbox: Inbox) -> None:
        """Begin.

        Args:
            inbox: The parent's end, as this process has inherited it.
        """
        self.inbox = inbox
        # Not so in a process that another forked process has forked, or whose parent is gone already.
        self._is_child = os.getppid() == inbox.owner
        # Not the process's id, which a later process may get.
        self._sender = int.from_bytes(os.urandom(8), "little") or 1
        self._numbers = count()
        self.is_sending = False
        self._waiting: deque[_Item] = deque()
        self._lost: Counter[tuple[Stream, int, bool]] = Counter()
        # Frames that the parent may not have journaled: number, stream, whether it is a message, content.
        self._kept: deque[tuple[int, Stream, bool, bytes]] = deque()
        self._kept_bytes = 0

    def send(self, stream: Stream, is_own: bool, event: LogEvent | None) -> None:
        """Send an event, or the end of a stream. Where the file is full, the event is lost, and counted.

        Args:
            stream: The stream.
            is_own: Whether this process registered it.
            event: The event, or None where the stream has ended.

        Raises:
            ParentGoneError: The parent is dead or at its end, or the files or the pipe are closed. `take_back` yields
                the event.
        """
        self._waiting.append(_Item(stream, is_own, event))
        # A signal handler that logs meanwhile leaves its item to this loop.
        while self._waiting and not self.is_sending:
            self.is_sending = True
            try:
                while self._waiting:
                    self._send(self._waiting[0])
                    self._waiting.popleft()
                    self._ring()
            finally:
                self.is_sending = False

    def _send(self, item: _Item) -> None:
        if self._lost:
            self._send_losses()
        if item.number < 0:
            item.number = next(self._numbers)
        stream, event = item.stream, item.event
        metadata, artifact_store_id = (stream.attributes, stream.artifact_store_id) if item.is_own else (None, None)
        try:
            content = frames.encode_message(Message(stream.id, metadata, artifact_store_id, event))
        except Exception as error:
            tell(logger.debug, "A forked process cannot send an event: %s", described(error))
            content = b""
        # The end of a stream is so short that it may use the room for losses.
        room = frames.MOST_BYTES if event is not None else frames.MOST_BYTES + frames.LOSSES_BYTES
        if not (content and self._has_written(item.number, stream, True, content, room)) and event is not None:
            self._lost[stream, event.level, bool(event.progress)] += 1
            self._send_losses()

    def _send_losses(self) -> None:
        while self._lost:
            (stream, level, progress), events = next(iter(self._lost.items()))
            content = frames.encode_loss(stream.id, level, progress, events)
            room = frames.MOST_BYTES + frames.LOSSES_BYTES
            if not self._has_written(next(self._numbers), stream, False, content, room):
                break
            del self._lost[stream, level, progress]

    def _has_written(self, number: int, stream: Stream, is_message: bool, content: bytes, room: int) -> bool:
        """Append a frame, if the file has room for it, and keep it until it is acknowledged."""
        file = self.inbox.shared.current
        frame = frames.header(is_message, content, self._sender, number) + content
        if not self._is_open():
            raise ParentGoneError
        try:
            if self.inbox.size(file) + len(frame) > room:
                return False
            # O_APPEND and one call: the system does not mix the frames of two processes.
            if os.write(self.inbox.files[file], frame) < len(frame):
                return False
        except OSError as error:
            if error.errno in _NO_ROOM:
                return False
            raise ParentGoneError from error
        self._kept.append((number, stream, is_message, content))
        self._kept_bytes += len(content)
        # Not each time: the lookup takes longer than sending a message.
        if number % 64 == 0:
            self._drop_acknowledged()
        while self._kept_bytes > frames.MOST_BYTES:
            self._kept_bytes -= len(self._kept.popleft()[3])
        return True

    def _ring(self) -> None:
        """Wake the parent.

        Raises:
            ParentGoneError: It is dead, or may have read for the last time.
        """
        # To write to a pipe without a reader raises SIGPIPE, which kills a program that has reset its handler.
        if self.inbox.shared.state != OPEN or not self._has_reader():
            raise ParentGoneError
        try:
            os.write(self.inbox.ringing, b"\0")
        except BlockingIOError:
            # The pipe is full: the parent has yet to notice earlier rings.
            pass
        except OSError as error:
            raise ParentGoneError from error

    def is_heard(self) -> bool:
        """Return whether the parent still receives."""
        return self._is_open() and self._has_reader()

    def _is_open(self) -> bool:
        return self.inbox.shared.state == OPEN and self.inbox.has(self.inbox.ringing)

    def _has_reader(self) -> bool:
        """Return whether the pipe is open, and a process can read from it."""
        # A dying process closes its descriptors thread by thread, and processes that inherited them keep them open.
        # The system gives its children another parent once none of its threads runs any more code.
        if self._is_child and os.getppid() != self.inbox.owner:
            return False
        # A new object each time: two threads must not use one at once.
        poll = select.poll()
        poll.register(self.inbox.ringing, select.POLLOUT)
        return all(events == select.POLLOUT for _, events in poll.poll(0))

    def take_back(self) -> Iterator[tuple[Stream, LogEvent | Loss | None]]:
        """Yield all items that the parent has not journaled: events, losses, or None for the end of a stream.

        Each item counts as taken back when the caller asks for the next one.
        """
        end = _CLOCK.now() + _CUT_OFF_SECONDS
        self._drop_acknowledged()
        while self._kept and self._may_be_journaled() and _CLOCK.now() < end:
            time.sleep(0.01)
            self._drop_acknowledged()
        while self._kept:
            number, stream, is_message, content = self._kept[0]
            said = frames.decode(is_message, content)
            yield stream, said.event if isinstance(said, Message) else said
            self._kept.popleft()
            if self._waiting and self._waiting[0].number == number:
                self._waiting.popleft()
        while self._waiting:
            item = self._waiting[0]
            yield item.stream, item.event
            self._waiting.popleft()
        while self._lost:
            (stream, level, progress), events = next(iter(self._lost.items()))
            yield stream, Loss(level, progress, events, stream.id)
            del self._lost[stream, level, progress]
        self._kept_bytes = 0

    def _may_be_journaled(self) -> bool:
        """Return whether the parent may be alive, and about to journal more frames."""
        return self.inbox.shared.state != CLOSED and (not self.inbox.has(self.inbox.ringing) or self._has_reader())

    def _drop_acknowledged(self) -> None:
        acknowledged = self.inbox.shared.acknowledged(self._sender)
        while self._kept and self._kept[0][0] < acknowledged:
            self._kept_bytes -= len(self._kept.popleft()[3])
