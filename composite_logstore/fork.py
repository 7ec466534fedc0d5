"""What forked processes log, a data loader's workers above all, on its way to their parent.

A forked process has none of its parent's threads, and opening backends in it is unsafe (gRPC hangs,
fsspec raises). So its events travel through a pipe that it inherits, and the parent journals them. A
pipe, since Linux lets only 10 datagrams wait in a local socket unless it is told otherwise.

A forked process keeps what it has sent until the parent has journaled it, which the parent notes in memory that both
share. When the parent is gone, the rest is the forked process's own.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import mmap
import os
import pickle
import select
import struct
import time
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
_CUT_OFF_SECONDS = 0.5
"""How long a forked process that has lost the pipe waits for what its parent may be about to journal."""
_CLOCK = Clock()
_MOST_UNFINISHED_BYTES = 256 * 1024 * 1024
"""How much the parent keeps of messages whose end has not come: a forked process may die in the middle of one."""

_KEPT_BYTES = 2 * _PIPE_BYTES
"""How much a forked process keeps at most: more than can wait in the pipe, and in the parent."""
_RECEIPTS = 1024

# What a frame begins with, its length, its sender, and whether it is the first and the last of its message.
_FRAME = struct.Struct("<4sHQ??")
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
        number: How many messages its process had sent before.
    """

    stream: UUID
    metadata: dict[str, Any] | None
    artifact_store_id: UUID | None
    capture: Capture | None
    number: int = 0


class Loss(NamedTuple):
    """Events that did not arrive: they found no room in the pipe, or nobody can tell what they were."""

    level: int
    progress: bool
    events: int = 1


# Nobody knows for which children it was: better one too many than a loss in silence.
_UNKNOWN = Loss(logging.CRITICAL, False)


class _Receipts:
    """How many messages of each sender the parent has journaled: in memory that it shares with all it forks.

    The parent alone writes there. There are places for so many senders; one that has sent nothing for long gives way.
    """

    def __init__(self) -> None:
        # Of each place: the sender, and how many.
        self._values = memoryview(mmap.mmap(-1, 16 * _RECEIPTS)).cast("Q")
        self._places: dict[int, int] = {}

    def give(self, sender: int, messages: int) -> None:
        """Say that so many messages of a sender are journaled."""
        place = self._places.pop(sender, None)
        if place is None:
            place = len(self._places)
            if place == _RECEIPTS:
                place = self._places.pop(next(iter(self._places)))
            # In this order: nobody takes another's number for its own.
            self._values[2 * place] = 0
            self._values[2 * place + 1] = 0
            self._values[2 * place] = sender
        self._places[sender] = place
        self._values[2 * place + 1] = messages

    def of(self, sender: int) -> int:
        """Return how many messages of the sender are journaled, as far as that is known."""
        with contextlib.suppress(ValueError):
            place = self._values[::2].tolist().index(sender)
            messages = self._values[2 * place + 1]
            if self._values[2 * place] == sender:
                return messages
        return 0


class Inbox:
    """The parent's end, made before the first fork. All forked processes share the other end.

    Attributes:
        is_closed: Whether nothing is received any more.
    """

    def __init__(self) -> None:
        """Make the pipe, and a second one for the account of what found no room in the first."""
        self.is_closed = False
        self.receipts = _Receipts()
        self._messages, self._sending = os.pipe()
        try:
            self._losses, self._losing = os.pipe()
        except OSError:
            os.close(self._messages)
            os.close(self._sending)
            raise
        self._identities = {end: _identity(end) for end in self._ends}
        for end in self._ends:
            os.set_blocking(end, False)
        with contextlib.suppress(ImportError, AttributeError, OSError):
            import fcntl

            fcntl.fcntl(self._sending, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)  # Linux alone has it
        # What was read, and how much of it is known.
        self._unread = b""
        self._place = 0
        # Each with its sender.
        self._unheard: deque[tuple[int, Message | Loss]] = deque()
        # The beginnings of messages, by the sender; those that were begun first come first.
        self._parts: dict[int, bytearray] = {}

    @property
    def _ends(self) -> tuple[int, int, int, int]:
        return self._messages, self._sending, self._losses, self._losing

    def has(self, *ends: int) -> bool:
        """Return whether these descriptors are still the pipes': a program may have closed all it had."""
        return all(_identity(end) == self._identities[end] for end in ends)

    @property
    def is_there(self) -> bool:
        """Whether what forked processes say can be received."""
        return not self.is_closed and self.has(*self._ends)

    def wait(self) -> None:
        """Wait until a forked process has said something.

        Raises:
            OSError: The pipe is not there any more.
        """
        poll = select.poll()
        poll.register(self._messages, select.POLLIN)
        poll.register(self._losses, select.POLLIN)
        if any(events & select.POLLNVAL for _, events in poll.poll()) and not self.is_closed:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    def receive(self) -> Iterator[Message | Loss]:
        """Yield what forked processes have said. For one thread at a time.

        What was yielded counts as journaled when the next one is asked for.

        Raises:
            OSError: The pipe is not there any more.
        """
        if not self.has(self._messages, self._losses):
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        while True:
            # One at a time, so that a Ctrl-C leaves the others for the next call.
            while self._unheard:
                sender, said = self._unheard.popleft()
                yield said
                if isinstance(said, Message):
                    self.receipts.give(sender, said.number + 1)
            data = self._read(self._messages)
            if not data:
                break
            self._unheard.extend(self._whole_messages(data))
        for level, progress, events in _LOSS.iter_unpack(self._read(self._losses)):
            yield Loss(level, progress, events)

    def close(self) -> None:
        """Receive nothing any more. What forked processes say from now on is their own."""
        if self.is_there:
            self.is_closed = True
            # A thread that waits for the pipe keeps it open, unless it has something to read.
            with contextlib.suppress(OSError):
                os.write(self._losing, _LOSS.pack(logging.NOTSET, False, 0))
            for end in self._ends:
                os.close(end)
        self.is_closed = True

    def outbox(self) -> Outbox:
        """Return the other end, in a process that was just forked. Nothing can be received here then."""
        for end in (self._messages, self._losses):
            # Whoever makes a daemon of it may have closed them, and opened others.
            if not self.is_closed and self.has(end):
                os.close(end)
        return Outbox(self)

    def _whole_messages(self, data: bytes) -> Iterator[tuple[int, Message | Loss]]:
        unread = self._unread = self._unread[self._place :] + data
        self._place = 0
        while (place := self._place) + _FRAME.size <= len(unread):
            magic, length, sender, is_first, is_last = _FRAME.unpack_from(unread, place)
            begin, end = place + _FRAME.size, place + _FRAME.size + length
            if magic != _MAGIC or end - place > _FRAME_BYTES:
                # Somebody else has written into the pipe. The next frame may be a whole one again.
                found = unread.find(_MAGIC, place + 1)
                self._place = found if found >= 0 else max(place + 1, len(unread) - len(_MAGIC) + 1)
                yield 0, _UNKNOWN
                continue
            if end > len(unread):
                break
            self._place = end
            for said in self._message(sender, unread[begin:end], is_first, is_last):
                yield sender, said

    def _message(self, sender: int, part: bytes, is_first: bool, is_last: bool) -> Iterator[Message | Loss]:
        # What was begun and never ended found no room, or its process died.
        if is_first:
            self._parts.pop(sender, None)
            self._parts[sender] = bytearray()
        if sender not in self._parts:
            return
        self._parts[sender] += part
        if is_last:
            yield _decoded(self._parts.pop(sender))
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


def _identity(end: int) -> tuple[int, int] | None:
    """Return what a descriptor is open for, None if for nothing."""
    try:
        status = os.fstat(end)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _decoded(data: bytearray) -> Message | Loss:
    try:
        message = pickle.loads(data)
        if type(message) is Message and 0 <= message.number < 1 << 63:
            return message
    except Exception as error:
        tell(logger.debug, "What a forked process says cannot be read: %s", described(error))
    return _UNKNOWN


class ParentGoneError(Exception):
    """Nobody receives any longer what the forked process says."""


class Outbox:
    """A forked process's end. For one thread at a time."""

    def __init__(self, inbox: Inbox) -> None:
        """Begin.

        Args:
            inbox: The parent's end, as this process has inherited it.
        """
        self._inbox = inbox
        self._sending, self._losing = inbox._sending, inbox._losing
        # No process's id, which the next process may get.
        self._sender = int.from_bytes(os.urandom(8), "little") or 1
        self._number = 0
        self._is_full = False
        self._is_cut_off = False
        self._unreported: Counter[tuple[int, bool]] = Counter()
        # What the parent may not have journaled: numbers, streams, events, and bytes.
        self._kept: deque[tuple[int, Stream, Capture | None, int]] = deque()
        self._kept_bytes = 0

    def again(self) -> Outbox:
        """Return the same end for a process that this one has forked."""
        return Outbox(self._inbox)

    def send(self, stream: Stream, is_own: bool, capture: Capture | None) -> None:
        """Send an event, or that the stream has ended. What finds no room is lost, and counted.

        Args:
            stream: The stream.
            is_own: Whether this process registered it.
            capture: The event, or None where the stream has ended.

        Raises:
            ParentGoneError: The parent is dead or at its end, or the way to it is gone.
        """
        metadata, artifact_store_id = (stream.attributes, stream.artifact_store_id) if is_own else (None, None)
        number = self._number
        self._number += 1
        data = b""
        try:
            self._check()
            message = Message(stream.id, metadata, artifact_store_id, capture, number)
            data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
            is_sent = self._has_written(data)
        except OSError as error:
            raise ParentGoneError from error
        except Exception as error:
            tell(logger.debug, "A forked process has something to say that cannot be sent: %s", described(error))
            is_sent = False
        if is_sent:
            self._keep(number, stream, capture, len(data))
        elif capture is not None:
            self._unreported[capture.level, capture.progress] += 1
        with contextlib.suppress(OSError):
            while self._unreported:
                (level, progress), count = next(iter(self._unreported.items()))
                os.write(self._losing, _LOSS.pack(level, progress, min(count, _MOST_LOSSES)))
                del self._unreported[level, progress]

    def _check(self) -> None:
        if self._inbox.is_closed or not self._inbox.has(self._sending, self._losing):
            self._is_cut_off = True
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    def _keep(self, number: int, stream: Stream, capture: Capture | None, size: int) -> None:
        self._kept.append((number, stream, capture, size))
        self._kept_bytes += size
        # Looking for the receipt takes longer than a message.
        if number % 64 == 0:
            self._let_go()
        while self._kept_bytes > _KEPT_BYTES:
            self._kept_bytes -= self._kept.popleft()[3]

    def _let_go(self) -> None:
        journaled = self._inbox.receipts.of(self._sender)
        while self._kept and self._kept[0][0] < journaled:
            self._kept_bytes -= self._kept.popleft()[3]

    def is_heard(self) -> bool:
        """Return whether the parent still receives."""
        try:
            self._check()
        except OSError:
            return False
        poll = select.poll()
        poll.register(self._sending, 0)
        return not poll.poll(0)

    def take_back(self) -> list[tuple[Stream, Capture | None]]:
        """Return what was sent to a parent that is gone, and was not journaled by it: events, or None for an end."""
        end = _CLOCK.now() + _CUT_OFF_SECONDS
        self._let_go()
        while self._is_cut_off and self._kept and _CLOCK.now() < end:
            # The parent may be well, and have read what it is about to journal.
            time.sleep(0.01)
            self._let_go()
        taken = [(stream, capture) for _, stream, capture, _ in self._kept]
        self._kept.clear()
        self._kept_bytes = 0
        return taken

    def _has_written(self, data: bytes) -> bool:
        # A full pipe is waited for once, and then not again before it has had room.
        patience = 0.0 if self._is_full else _PATIENCE_SECONDS
        room = _FRAME_BYTES - _FRAME.size
        for place in range(0, len(data), room):
            part = data[place : place + room]
            frame = _FRAME.pack(_MAGIC, len(part), self._sender, place == 0, place + room >= len(data)) + part
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
