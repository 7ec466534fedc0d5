"""What forked processes log, a data loader's workers above all, on its way to their parent.

A forked process has none of its parent's threads, and opening backends in it is unsafe (gRPC hangs,
fsspec raises). So its events travel through a pipe that it inherits, and the parent journals them. A
pipe, since Linux lets only 10 datagrams wait in a local socket unless it is told otherwise.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import pickle
import select
import struct
from collections import Counter, deque
from collections.abc import Iterator
from typing import Any, NamedTuple
from uuid import UUID

from zenml.logger import get_logger

from composite_logstore.backoff import described
from composite_logstore.clock import Clock
from composite_logstore.event import Capture, Stream
from composite_logstore.service import tell

logger = get_logger(__name__)

# A write of at most PIPE_BUF bytes is never mixed with another process's, and done wholly or not at all.
# https://pubs.opengroup.org/onlinepubs/9799919799/functions/write.html
_FRAME_BYTES = select.PIPE_BUF
_PIPE_BYTES = 1024 * 1024
_PATIENCE_SECONDS = 0.05
_CLOCK = Clock()
_MOST_UNFINISHED_BYTES = 256 * 1024 * 1024
"""How much the parent keeps of messages whose end has not come: a forked process may die in the middle of one."""

# What a frame begins with, its length, the process that wrote it, and whether it is the first and the last of its
# message.
_FRAME = struct.Struct("<4sHi??")
_MAGIC = b"\xc0LS\x01"
# A level, whether it was a progress bar's update, and how many of them.
_LOSS = struct.Struct("<i?I")
_MOST_LOSSES = (1 << 32) - 1


class Message(NamedTuple):
    """What a forked process says.

    Attributes:
        stream: The id of the stream.
        metadata: Its origin's metadata, if the forked process registered it.
        artifact_store_id: Its artifact store, if the forked process registered it and knows it.
        capture: An event, or None where the stream has ended.
    """

    stream: UUID
    metadata: dict[str, Any] | None
    artifact_store_id: UUID | None
    capture: Capture | None


class Loss(NamedTuple):
    """Events that did not arrive: they found no room in the pipe, or nobody can tell what they were."""

    level: int
    progress: bool
    events: int = 1


# Nobody knows for which children it was: better one too many than a loss in silence.
_UNKNOWN = Loss(logging.CRITICAL, False)


class Inbox:
    """The parent's end, made before the first fork. All forked processes share the other end."""

    def __init__(self) -> None:
        """Make the pipe, and a second one for the account of what found no room in the first."""
        self._messages, self._sending = os.pipe()
        try:
            self._losses, self._losing = os.pipe()
        except OSError:
            os.close(self._messages)
            os.close(self._sending)
            raise
        for end in (self._messages, self._sending, self._losses, self._losing):
            os.set_blocking(end, False)
        with contextlib.suppress(ImportError, AttributeError, OSError):
            import fcntl

            fcntl.fcntl(self._sending, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)  # Linux alone has it
        # What was read, and how much of it is known.
        self._unread = b""
        self._place = 0
        self._unheard: deque[Message | Loss] = deque()
        # The beginnings of messages, by the process; those that were begun first come first.
        self._parts: dict[int, bytearray] = {}

    def wait(self) -> None:
        """Wait until a forked process has said something.

        Raises:
            OSError: The pipe is not there any more.
        """
        poll = select.poll()
        poll.register(self._messages, select.POLLIN)
        poll.register(self._losses, select.POLLIN)
        if any(events & select.POLLNVAL for _, events in poll.poll()):
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    def receive(self) -> Iterator[Message | Loss]:
        """Yield what forked processes have said. For one thread at a time."""
        while True:
            # One at a time, so that a Ctrl-C leaves the others for the next call.
            while self._unheard:
                yield self._unheard.popleft()
            data = self._read(self._messages)
            if not data:
                break
            self._unheard.extend(self._whole_messages(data))
        for level, progress, events in _LOSS.iter_unpack(self._read(self._losses)):
            yield Loss(level, progress, events)

    def outbox(self) -> Outbox:
        """Return the other end, in a process that was just forked. Nothing can be received here then."""
        for end in (self._messages, self._losses):
            # Whoever makes a daemon of it may have closed them.
            with contextlib.suppress(OSError):
                os.close(end)
        return Outbox(self._sending, self._losing)

    def _whole_messages(self, data: bytes) -> Iterator[Message | Loss]:
        unread = self._unread = self._unread[self._place :] + data
        self._place = 0
        while (place := self._place) + _FRAME.size <= len(unread):
            magic, length, process, is_first, is_last = _FRAME.unpack_from(unread, place)
            begin, end = place + _FRAME.size, place + _FRAME.size + length
            if magic != _MAGIC or end - place > _FRAME_BYTES:
                # Somebody else has written into the pipe. The next frame may be a whole one again.
                found = unread.find(_MAGIC, place + 1)
                self._place = found if found >= 0 else max(place + 1, len(unread) - len(_MAGIC) + 1)
                yield _UNKNOWN
                continue
            if end > len(unread):
                break
            self._place = end
            yield from self._message(process, unread[begin:end], is_first, is_last)

    def _message(self, process: int, part: bytes, is_first: bool, is_last: bool) -> Iterator[Message | Loss]:
        # What was begun and never ended found no room, or its process died.
        if is_first:
            self._parts.pop(process, None)
            self._parts[process] = bytearray()
        if process not in self._parts:
            return
        self._parts[process] += part
        if is_last:
            yield _decoded(self._parts.pop(process))
        while sum(map(len, self._parts.values())) > _MOST_UNFINISHED_BYTES:
            del self._parts[next(iter(self._parts))]
            yield _UNKNOWN

    @staticmethod
    def _read(end: int) -> bytes:
        try:
            # A whole number of accounts of losses too.
            return os.read(end, 16 * 1024 * _LOSS.size)
        except BlockingIOError:
            return b""


def _decoded(data: bytearray) -> Message | Loss:
    try:
        message = pickle.loads(data)
        if type(message) is Message:
            return message
    except Exception as error:
        tell(logger.debug, "What a forked process says cannot be read: %s", described(error))
    return _UNKNOWN


class ParentGoneError(Exception):
    """Nobody receives any longer what the forked process says."""


class Outbox:
    """A forked process's end. For one thread at a time."""

    def __init__(self, sending: int, losing: int) -> None:
        """Begin.

        Args:
            sending: The pipe's end.
            losing: The end of the pipe for the account of losses.
        """
        self._sending = sending
        self._losing = losing
        self._is_full = False
        self._unreported: Counter[tuple[int, bool]] = Counter()

    def send(self, stream: Stream, is_own: bool, capture: Capture | None) -> None:
        """Send an event, or that the stream has ended. What finds no room is lost, and counted.

        Args:
            stream: The stream.
            is_own: Whether this process registered it.
            capture: The event, or None where the stream has ended.

        Raises:
            ParentGoneError: The parent is dead, or the way to it is.
        """
        metadata, artifact_store_id = (stream.attributes, stream.artifact_store_id) if is_own else (None, None)
        message = Message(stream.id, metadata, artifact_store_id, capture)
        try:
            is_sent = self._has_written(pickle.dumps(message, pickle.HIGHEST_PROTOCOL))
        except OSError as error:
            raise ParentGoneError from error
        except Exception as error:
            tell(logger.debug, "A forked process has something to say that cannot be sent: %s", described(error))
            is_sent = False
        if not is_sent and capture is not None:
            self._unreported[capture.level, capture.progress] += 1
        with contextlib.suppress(OSError):
            while self._unreported:
                (level, progress), count = next(iter(self._unreported.items()))
                os.write(self._losing, _LOSS.pack(level, progress, min(count, _MOST_LOSSES)))
                del self._unreported[level, progress]

    def _has_written(self, data: bytes) -> bool:
        # A full pipe is waited for once, and then not again before it has had room.
        patience = 0.0 if self._is_full else _PATIENCE_SECONDS
        room = _FRAME_BYTES - _FRAME.size
        process = os.getpid()
        for place in range(0, len(data), room):
            part = data[place : place + room]
            frame = _FRAME.pack(_MAGIC, len(part), process, place == 0, place + room >= len(data)) + part
            if not self._has_written_frame(frame, patience):
                self._is_full = True
                return False
        self._is_full = False
        return True

    def _has_written_frame(self, frame: bytes, patience: float) -> bool:
        end = _CLOCK.now() + patience
        while True:
            try:
                return os.write(self._sending, frame) > 0
            except BlockingIOError:
                # Other processes take room too.
                seconds = end - _CLOCK.now()
                if seconds <= 0:
                    return False
            poll = select.poll()
            poll.register(self._sending, select.POLLOUT)
            poll.poll(seconds * 1000)
