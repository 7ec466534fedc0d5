"""What forked processes log, a data loader's workers above all, on its way to their parent.

A forked process has none of its parent's threads, and opening backends in it is unsafe (gRPC hangs,
fsspec raises). So its events travel through a pipe that it inherits, and the parent journals them. A
pipe, since Linux lets only 10 datagrams wait in a local socket unless it is told otherwise.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import struct
import time
from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple
from uuid import UUID

from composite_logstore.event import Capture, Stream

# A write of at most PIPE_BUF bytes is never mixed with another process's, and done wholly or not at all.
# https://pubs.opengroup.org/onlinepubs/9799919799/functions/write.html
_FRAME_BYTES = select.PIPE_BUF
_PIPE_BYTES = 1024 * 1024
_PATIENCE_SECONDS = 0.05

# A frame's length, the process that wrote it, and whether it is the first and the last of its message.
_FRAME = struct.Struct("<Hi??")
_LOSS = struct.Struct("<i?")


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
    """An event that found no room in the pipe."""

    level: int
    progress: bool


class Inbox:
    """The parent's end, made before the first fork. All forked processes share the other end."""

    def __init__(self) -> None:
        """Make the pipe, and a second one for the account of what found no room in the first."""
        self._messages, self._sending = os.pipe()
        self._losses, self._losing = os.pipe()
        for end in (self._messages, self._sending, self._losses, self._losing):
            os.set_blocking(end, False)
        with contextlib.suppress(ImportError, AttributeError, OSError):
            import fcntl

            fcntl.fcntl(self._sending, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)  # Linux alone has it
        self._unread = b""
        self._unheard: deque[Message] = deque()
        self._parts: dict[int, bytearray] = {}

    def wait(self) -> None:
        """Wait until a forked process has said something."""
        poll = select.poll()
        poll.register(self._messages, select.POLLIN)
        poll.register(self._losses, select.POLLIN)
        poll.poll()

    def receive(self) -> Iterator[Message | Loss]:
        """Yield what forked processes have said. For one thread at a time."""
        while data := self._read(self._messages):
            self._unheard.extend(self._whole_messages(data))
            # One at a time, so that a Ctrl-C leaves the others for the next call.
            while self._unheard:
                yield self._unheard.popleft()
        for level, progress in _LOSS.iter_unpack(self._read(self._losses)):
            yield Loss(level, progress)

    def outbox(self) -> Outbox:
        """Return the other end, in a process that was just forked. Nothing can be received here then."""
        os.close(self._messages)
        os.close(self._losses)
        return Outbox(self._sending, self._losing)

    def _whole_messages(self, data: bytes) -> Iterator[Message]:
        self._unread += data
        place = 0
        while place + _FRAME.size <= len(self._unread):
            length, process, is_first, is_last = _FRAME.unpack_from(self._unread, place)
            end = place + _FRAME.size + length
            if end > len(self._unread):
                break
            part = self._unread[place + _FRAME.size : end]
            place = end
            # What was begun and never ended found no room, or its process died.
            if is_first:
                self._parts[process] = bytearray()
            if process in self._parts:
                self._parts[process] += part
                if is_last:
                    message: Message = pickle.loads(self._parts.pop(process))
                    yield message
        self._unread = self._unread[place:]

    @staticmethod
    def _read(end: int) -> bytes:
        try:
            # A whole number of accounts of losses too.
            return os.read(end, 16 * 1024 * _LOSS.size)
        except BlockingIOError:
            return b""


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
        self._unreported: list[Loss] = []

    def send(self, stream: Stream, is_own: bool, capture: Capture | None) -> None:
        """Send an event, or that the stream has ended. What finds no room is lost, and counted.

        Args:
            stream: The stream.
            is_own: Whether this process registered it.
            capture: The event, or None where the stream has ended.

        Raises:
            ParentGoneError: The parent is dead.
        """
        metadata, artifact_store_id = (dict(stream.metadata), stream.artifact_store_id) if is_own else (None, None)
        message = Message(stream.id, metadata, artifact_store_id, capture)
        try:
            is_sent = self._has_written(pickle.dumps(message, pickle.HIGHEST_PROTOCOL))
        except BrokenPipeError as error:
            raise ParentGoneError from error
        if not is_sent and capture is not None:
            self._unreported.append(Loss(capture.level, capture.progress))
        with contextlib.suppress(BlockingIOError):
            while self._unreported:
                os.write(self._losing, _LOSS.pack(*self._unreported[-1]))
                self._unreported.pop()

    def _has_written(self, data: bytes) -> bool:
        # A full pipe is waited for once, and then not again before it has had room.
        patience = 0.0 if self._is_full else _PATIENCE_SECONDS
        room = _FRAME_BYTES - _FRAME.size
        process = os.getpid()
        for place in range(0, len(data), room):
            part = data[place : place + room]
            frame = _FRAME.pack(len(part), process, place == 0, place + room >= len(data)) + part
            if not self._has_written_frame(frame, patience):
                self._is_full = True
                return False
        self._is_full = False
        return True

    def _has_written_frame(self, frame: bytes, patience: float) -> bool:
        end = time.monotonic() + patience
        while True:
            try:
                return os.write(self._sending, frame) > 0
            except BlockingIOError:
                # Other processes take room too.
                seconds = end - time.monotonic()
                if seconds <= 0:
                    return False
            poll = select.poll()
            poll.register(self._sending, select.POLLOUT)
            poll.poll(seconds * 1000)
