"""What forked processes log, a data loader's workers above all, on its way to their parent.

A forked process has none of its parent's threads, and opening backends in it is unsafe (gRPC hangs, fsspec raises). So
it appends its events to a file without a name that it has inherited, and the parent journals them. It waits for nobody,
and what it has appended is the parent's to deliver, even if it is killed in the next moment. A pipe would not do: it
holds 1 MiB, which four workers fill in a tenth of a second, and what they keep for later dies with them.

There are two files, which take turns: while forked processes append to the one, the parent empties the other. It does
so once it has read all of it, and so late that nobody can still be about to append to it.

A forked process keeps what it has appended until the parent acknowledges it, that is has journaled it, in memory that
both share. When the parent is gone, the rest is the forked process's own.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import pickle
import select
import struct
import tempfile
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import suppress
from itertools import count
from typing import Any, NamedTuple
from uuid import UUID
from zlib import crc32

from zenml.logger import get_logger

from composite_logstore.capture.record import NOWHERE
from composite_logstore.clock import Clock
from composite_logstore.event import LogEvent, Stream
from composite_logstore.inert import described
from composite_logstore.service import tell

logger = get_logger(__name__)

_MOST_BYTES = 64 * 1024 * 1024
"""How large each of the two files becomes at most, in bytes: about 160,000 lines of a log."""
_LOSSES_BYTES = 8 * 1024 * 1024
"""How much more room there is for the account of what found none."""
_TURN_BYTES = 64 * 1024
_TURN_SECONDS = 1.0
"""How much of a file was read, and how old its turn is, before the other one takes over; and how long after that it is
emptied. To append takes far less time."""
_CHUNK_BYTES = 256 * 1024
_CUT_OFF_SECONDS = 1.0
"""How long a forked process waits, once, for what a parent that is at its end may be about to journal."""
_SENDERS = 1024
_CLOCK = Clock()

# What a frame begins with, what it holds, its length and checksum, its sender, and its number among the sender's.
_FRAME = struct.Struct("<4s?IIQQ")
_MAGIC = b"\xc0LS\x02"
# A stream, a level, whether they were a progress bar's updates, and how many of them.
_LOSS = struct.Struct("<16si?I")
_MOST_LOSSES = (1 << 32) - 1
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOMEM}

_OPEN, _CLOSING, _CLOSED = range(3)


class Message(NamedTuple):
    """What a forked process says.

    Attributes:
        stream: The id of the stream.
        metadata: Its origin's metadata, if the forked process registered it.
        artifact_store_id: Its artifact store, if the forked process registered it and knows it.
        event: An event without numbers, or None where the stream has ended.
    """

    stream: UUID
    metadata: dict[str, Any] | None
    artifact_store_id: UUID | None
    event: LogEvent | None


class Loss(NamedTuple):
    """Events that did not arrive: they found no room, or nobody can tell what they were.

    Attributes:
        level: Their level.
        progress: Whether they were a progress bar's updates.
        events: How many there were.
        stream: The id of their stream, if that is known.
    """

    level: int
    progress: bool
    events: int = 1
    stream: UUID | None = None


# Nobody knows for which children it was: better one too many than a loss in silence.
_UNKNOWN = Loss(logging.CRITICAL, False)


class _Shared:
    """Memory that the parent shares with all it forks. The parent alone writes there.

    There are places for so many senders; one that has sent nothing for long gives way.
    """

    def __init__(self) -> None:
        # Which file is appended to, and whether the parent receives. Then of each place: the sender, and how much of it
        # is journaled.
        self._values = memoryview(mmap.mmap(-1, 16 + 16 * _SENDERS)).cast("Q")
        self._places: dict[int, int] = {}

    @property
    def current(self) -> int:
        """Which of the files is appended to."""
        return self._values[0]

    @current.setter
    def current(self, file: int) -> None:
        self._values[0] = file

    @property
    def state(self) -> int:
        """Whether the parent receives, does so for the last time, or does so no more."""
        return self._values[1]

    @state.setter
    def state(self, state: int) -> None:
        self._values[1] = state

    def acknowledge(self, sender: int, number: int) -> None:
        """Say that what a sender has sent is journaled, up to the frame with this number."""
        place = self._places.pop(sender, None)
        if place is None:
            place = 2 + 2 * len(self._places)
            if place == len(self._values):
                place = self._places.pop(next(iter(self._places)))
            # In this order: nobody takes another's number for its own.
            self._values[place] = 0
            self._values[place + 1] = 0
            self._values[place] = sender
        self._places[sender] = place
        self._values[place + 1] = number + 1

    def is_last(self, sender: int, number: int) -> bool:
        """Return, in the parent, whether the frame with this number is the one that was journaled last."""
        place = self._places.get(sender)
        return place is not None and self._values[place + 1] == number + 1

    def acknowledged(self, sender: int) -> int:
        """Return the number below which all of the sender's frames are journaled, as far as that is known."""
        with suppress(ValueError):
            place = 2 + 2 * self._values[2::2].tolist().index(sender)
            number = self._values[place + 1]
            if self._values[place] == sender:
                return number
        return 0


class Inbox:
    """The parent's end, made before the first fork. All forked processes share the other end.

    Attributes:
        is_closed: Whether nothing is received any more.
        shared: The memory that both ends share.
    """

    def __init__(self) -> None:
        """Make the files, and a pipe through which forked processes wake the parent and see that it lives.

        Raises:
            OSError: There are no descriptors or there is no room to be had.
        """
        self.is_closed = False
        self.shared = _Shared()
        ends: list[int] = []
        try:
            ends.append(_file_without_name())
            ends.append(_file_without_name())
            ends.extend(os.pipe())
        except BaseException:
            for end in ends:
                os.close(end)
            raise
        self.files = ends[0], ends[1]
        self._bell, self.ringing = ends[2:]
        for end in ends[2:]:
            os.set_blocking(end, False)
        self._identities = {end: _identity(os.fstat(end)) for end in ends}
        # How far each file is read, and since when the one that is appended to is.
        self._positions = (0, 0)
        self._turned_at = _CLOCK.now()
        # Each with its sender and its number.
        self._unheard: deque[tuple[int, int, Message | Loss]] = deque()

    def has(self, *ends: int) -> bool:
        """Return whether these descriptors are still what they were: a program may have closed all it had."""
        try:
            return all(_identity(os.fstat(end)) == self._identities[end] for end in ends)
        except OSError:
            return False

    def size(self, file: int) -> int:
        """Return how large one of the files is.

        Raises:
            OSError: It is not there any more.
        """
        end = self.files[file]
        status = os.fstat(end)
        if _identity(status) != self._identities[end]:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return status.st_size

    @property
    def is_there(self) -> bool:
        """Whether what forked processes say can be received."""
        return not self.is_closed and self.has(*self._identities)

    def wait(self) -> None:
        """Wait until a forked process has said something, or what was read can be removed.

        Raises:
            OSError: The pipe is not there any more.
        """
        is_more = self._positions[self.shared.current] >= _TURN_BYTES or self._positions[1 - self.shared.current] > 0
        poll = select.poll()
        poll.register(self._bell, select.POLLIN)
        found = poll.poll(_TURN_SECONDS * 1000 if is_more else None)
        if any(events & select.POLLNVAL for _, events in found) and not self.is_closed:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    def receive(self) -> Iterator[Message | Loss]:
        """Yield what forked processes have said by now. For one thread at a time.

        What was yielded counts as journaled when the next one is asked for.

        Raises:
            OSError: The files or the pipe are not there any more.
        """
        if not self.has(self._bell):
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        with suppress(BlockingIOError):
            os.read(self._bell, _CHUNK_BYTES)
        # Whoever logs all the time must not keep a flush from ending.
        left = self.size(0) + self.size(1) - sum(self._positions)
        while True:
            # One at a time, so that a Ctrl-C leaves the others for the next call.
            while self._unheard:
                sender, number, said = self._unheard[0]
                # A Ctrl-C may have had it written twice.
                if not (sender and self.shared.is_last(sender, number)):
                    yield said
                    if sender:
                        self.shared.acknowledge(sender, number)
                self._unheard.popleft()
            if left <= 0 or not (read := self._read()):
                break
            left -= read
        self._turn()

    def announce_end(self) -> None:
        """Tell forked processes that what they say from now on is their own."""
        self.shared.state = _CLOSING

    def close(self) -> None:
        """Receive nothing any more."""
        self.shared.state = _CLOSED
        if self.is_there:
            self.is_closed = True
            # A thread that waits for the pipe keeps it open, unless it has something to read.
            with suppress(OSError):
                os.write(self.ringing, b"\0")
            for end in self._identities:
                os.close(end)
        self.is_closed = True

    def outbox(self) -> Outbox:
        """Return the other end, in a process that was just forked. Nothing can be received here then."""
        # Whoever makes a daemon of it may have closed it, and opened another.
        if not self.is_closed and self.has(self._bell):
            os.close(self._bell)
        return Outbox(self)

    def _read(self) -> int:
        """Read on in one of the files. Returns how many bytes were understood."""
        current = self.shared.current
        # In this order: what a process has appended to the file before is there once it appends to this one.
        newer = self._chunk(current)
        older = self._chunk(1 - current)
        for file, data in ((1 - current, older), (current, newer)):
            said, read = _understood(data)
            if read:
                self._read_on(file, read, said)
                return read
        return 0

    def _read_on(self, file: int, read: int, said: list[tuple[int, int, Message | Loss]]) -> None:
        positions = list(self._positions)
        positions[file] += read
        # In one call, which no Ctrl-C interrupts.
        vars(self).update(_unheard=deque(said), _positions=tuple(positions))

    def _chunk(self, file: int) -> bytes:
        if self.size(file) < self._positions[file]:
            # A Ctrl-C came when it had just been emptied.
            self._begin_again(file)
        data = os.pread(self.files[file], _CHUNK_BYTES, self._positions[file])
        if len(data) == _CHUNK_BYTES:
            length = _FRAME.size + _FRAME.unpack_from(data)[2]
            if _CHUNK_BYTES < length <= _MOST_BYTES:
                data = os.pread(self.files[file], length, self._positions[file])
        return data

    def _turn(self) -> None:
        """Empty the file that is not appended to any more, and have the other one take over."""
        if _CLOCK.now() < self._turned_at + _TURN_SECONDS:
            return
        current = self.shared.current
        other = 1 - current
        rest = self._chunk(other)
        if rest and not _understood(rest)[1]:
            # Whoever appended this was killed in the middle of it.
            self._read_on(other, len(rest), [*self._unheard, (0, 0, _UNKNOWN)])
        if self._positions[other] < self.size(other):
            return
        if self._positions[other]:
            os.ftruncate(self.files[other], 0)
            self._begin_again(other)
        if self._positions[current] >= _TURN_BYTES:
            self.shared.current = other
            self._turned_at = _CLOCK.now()

    def _begin_again(self, file: int) -> None:
        self._positions = (0, self._positions[1]) if file == 0 else (self._positions[0], 0)


def _file_without_name() -> int:
    """Return a descriptor of a file that every process can append to, and that goes with the last of them."""
    try:
        end = os.memfd_create("composite-logstore")  # Linux alone has it
    except (AttributeError, OSError):
        end, path = tempfile.mkstemp(prefix="composite-logstore")
        os.unlink(path)
    import fcntl

    fcntl.fcntl(end, fcntl.F_SETFL, fcntl.fcntl(end, fcntl.F_GETFL) | os.O_APPEND)
    return end


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _understood(data: bytes) -> tuple[list[tuple[int, int, Message | Loss]], int]:
    """Return what the frames say, each with its sender and its number, and how many bytes they have."""
    said: list[tuple[int, int, Message | Loss]] = []
    place = 0
    while place + _FRAME.size <= len(data):
        magic, is_message, length, checksum, sender, number = _FRAME.unpack_from(data, place)
        begin = place + _FRAME.size
        end = begin + length
        is_frame = magic == _MAGIC and length <= _MOST_BYTES
        if is_frame and end <= len(data):
            content = data[begin:end]
            if crc32(content, number) == checksum:
                said.append((sender, number, _message(content) if is_message else _loss(content)))
                place = end
                continue
        # Who was to write it was killed in the middle of it, or it is somebody else's. Where another frame begins,
        # nobody is about to write the rest.
        found = data.find(_MAGIC, place + 1)
        if found < 0:
            if is_frame and end > len(data):
                break
            found = max(place + 1, len(data) - len(_MAGIC) + 1)
        place = found
        said.append((0, 0, _UNKNOWN))
    return said, place


def _encoded(message: Message) -> bytes:
    # Plain tuples and bytes take a fifth of the time that named tuples and UUIDs take, on both ends.
    stream, metadata, store, event = message
    plain = stream.bytes, metadata, store and store.bytes, event and event[4:]
    return pickle.dumps(plain, pickle.HIGHEST_PROTOCOL)


def _message(data: bytes) -> Message | Loss:
    try:
        stream, metadata, store, fields = pickle.loads(data)
        event = fields and LogEvent(NOWHERE, "", 0, 0, *fields)
        return Message(UUID(bytes=stream), metadata, store and UUID(bytes=store), event)
    except Exception as error:
        tell(logger.debug, "What a forked process says cannot be read: %s", described(error))
    return _UNKNOWN


def _loss(data: bytes) -> Loss:
    try:
        stream, level, progress, events = _LOSS.unpack(data)
    except struct.error:
        return _UNKNOWN
    return Loss(level, progress, events, UUID(bytes=stream))


class ParentGoneError(Exception):
    """Nobody receives any longer what the forked process says."""


class _Item:
    """What is to be sent. Its number is given when it is first tried: a Ctrl-C has it tried again."""

    __slots__ = ("event", "is_own", "number", "stream")

    def __init__(self, stream: Stream, is_own: bool, event: LogEvent | None) -> None:
        self.stream = stream
        self.is_own = is_own
        self.event = event
        self.number = -1


class Outbox:
    """A forked process's end. For one thread at a time.

    Attributes:
        is_sending: Whether it is in the middle of sending: a signal handler may log, too.
    """

    def __init__(self, inbox: Inbox) -> None:
        """Begin.

        Args:
            inbox: The parent's end, as this process has inherited it.
        """
        self._inbox = inbox
        self._shared = inbox.shared
        # No process's id, which the next process may get.
        self._sender = int.from_bytes(os.urandom(8), "little") or 1
        self._numbers = count()
        self.is_sending = False
        self._waiting: deque[_Item] = deque()
        self._lost: Counter[tuple[Stream, int, bool]] = Counter()
        # What the parent may not have journaled: numbers, streams, and what was written.
        self._kept: deque[tuple[int, Stream, bool, bytes]] = deque()
        self._kept_bytes = 0

    def again(self) -> Outbox:
        """Return the same end for a process that this one has forked."""
        return Outbox(self._inbox)

    def send(self, stream: Stream, is_own: bool, event: LogEvent | None) -> None:
        """Send an event, or that the stream has ended. What finds no room is lost, and counted.

        Args:
            stream: The stream.
            is_own: Whether this process registered it.
            event: The event, or None where the stream has ended.

        Raises:
            ParentGoneError: The parent is dead or at its end, or the way to it is gone. `take_back` has the event.
        """
        self._waiting.append(_Item(stream, is_own, event))
        # A signal handler that logs meanwhile leaves it to this loop.
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
            self._tell_losses()
        if item.number < 0:
            item.number = next(self._numbers)
        stream, event = item.stream, item.event
        metadata, artifact_store_id = (stream.attributes, stream.artifact_store_id) if item.is_own else (None, None)
        try:
            data = _encoded(Message(stream.id, metadata, artifact_store_id, event))
        except Exception as error:
            tell(logger.debug, "A forked process has something to say that cannot be sent: %s", described(error))
            data = b""
        # Hardly anything is as short as the end of a stream.
        room = _MOST_BYTES if event is not None else _MOST_BYTES + _LOSSES_BYTES
        if not (data and self._has_written(item.number, stream, True, data, room)) and event is not None:
            self._lost[stream, event.level, event.progress] += 1
            self._tell_losses()

    def _tell_losses(self) -> None:
        while self._lost:
            (stream, level, progress), number = next(iter(self._lost.items()))
            data = _LOSS.pack(stream.id.bytes, level, progress, min(number, _MOST_LOSSES))
            if not self._has_written(next(self._numbers), stream, False, data, _MOST_BYTES + _LOSSES_BYTES):
                break
            del self._lost[stream, level, progress]

    def _has_written(self, number: int, stream: Stream, is_message: bool, data: bytes, room: int) -> bool:
        """Append a frame, if there is room, and keep it until it is acknowledged."""
        file = self._shared.current
        header = _FRAME.pack(_MAGIC, is_message, len(data), crc32(data, number), self._sender, number)
        try:
            self._check()
            if self._inbox.size(file) + len(header) + len(data) > room:
                return False
            # Appended in one piece: the system lets one process after the other write.
            if os.write(self._inbox.files[file], header + data) < len(header) + len(data):
                return False
        except OSError as error:
            if error.errno in _NO_ROOM:
                return False
            raise ParentGoneError from error
        self._kept.append((number, stream, is_message, data))
        self._kept_bytes += len(data)
        # Looking for what is acknowledged takes longer than a message.
        if number % 64 == 0:
            self._let_go()
        while self._kept_bytes > _MOST_BYTES:
            self._kept_bytes -= len(self._kept.popleft()[3])
        return True

    def _ring(self) -> None:
        """Wake the parent.

        Raises:
            ParentGoneError: It is dead, or may have read for the last time.
        """
        try:
            if self._shared.state != _OPEN:
                raise OSError(errno.EPIPE, os.strerror(errno.EPIPE))
            # Who writes to a pipe that nobody reads gets a signal, and a program may have asked for one that kills it.
            if self._ready():
                os.write(self._inbox.ringing, b"\0")
        except BlockingIOError:
            # It has not yet heard what was said before.
            pass
        except OSError as error:
            raise ParentGoneError from error

    def _check(self) -> None:
        if self._shared.state != _OPEN or not self._inbox.has(self._inbox.ringing):
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    def _ready(self) -> bool:
        """Return whether the pipe has room.

        Raises:
            OSError: Nobody has its other end.
        """
        # A new one each time: two threads must not use one at once.
        poll = select.poll()
        poll.register(self._inbox.ringing, select.POLLOUT)
        for _, events in poll.poll(0):
            if events & ~select.POLLOUT:
                raise OSError(errno.EPIPE, os.strerror(errno.EPIPE))
            return True
        return False

    def is_heard(self) -> bool:
        """Return whether the parent still receives."""
        try:
            self._check()
            self._ready()
        except OSError:
            return False
        return True

    def take_back(self) -> Iterator[tuple[Stream, LogEvent | Loss | None]]:
        """Yield what a parent that is gone has not journaled: events, losses, or None where a stream has ended.

        What was yielded counts as taken back when the next one is asked for.
        """
        end = _CLOCK.now() + _CUT_OFF_SECONDS
        self._let_go()
        while self._kept and self._may_be_journaled() and _CLOCK.now() < end:
            time.sleep(0.01)
            self._let_go()
        while self._kept:
            number, stream, is_message, data = self._kept[0]
            said = _message(data) if is_message else _loss(data)
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
        """Return whether the parent may be well, and about to journal what it has read."""
        if self._shared.state == _CLOSED:
            return False
        if not self._inbox.has(self._inbox.ringing):
            return True
        try:
            self._ready()
        except OSError:
            return False
        return True

    def _let_go(self) -> None:
        acknowledged = self._shared.acknowledged(self._sender)
        while self._kept and self._kept[0][0] < acknowledged:
            self._kept_bytes -= len(self._kept.popleft()[3])
