"""The parent's end of the way from forked processes: two files that all of them append to, and a pipe that wakes it."""

from __future__ import annotations

import errno
import mmap
import os
import select
import tempfile
from collections import deque
from collections.abc import Iterator
from contextlib import suppress

from composite_logstore.capture import frames
from composite_logstore.capture.frames import Frame, Loss, Message
from composite_logstore.clock import Clock

_TURN_BYTES = 64 * 1024
_TURN_SECONDS = 1.0
"""The other file takes over once so many bytes of this one are read, and its turn is so old; so long after that the
parent empties it. To append takes far less time."""
_CHUNK_BYTES = 256 * 1024
_SENDERS = 1024
_CLOCK = Clock()

OPEN, CLOSING, CLOSED = range(3)
"""Whether the parent receives, receives for the last time, or receives no more."""


class Shared:
    """Memory that the parent shares with all processes that it forks. The parent alone writes to it.

    Each of the last 1024 senders has a slot there. Each value is eight bytes at an aligned address, which the
    processor writes in one piece.
    """

    def __init__(self) -> None:
        # The current file and the state. Then for each slot: the sender, and how many of its frames are journaled.
        self._values = memoryview(mmap.mmap(-1, 16 + 16 * _SENDERS)).cast("Q")
        self._slots: dict[int, int] = {}

    @property
    def current(self) -> int:
        """The file that senders append to, 0 or 1."""
        return self._values[0]

    @current.setter
    def current(self, file: int) -> None:
        self._values[0] = file

    @property
    def state(self) -> int:
        """`OPEN`, `CLOSING` or `CLOSED`."""
        return self._values[1]

    @state.setter
    def state(self, state: int) -> None:
        self._values[1] = state

    def acknowledge(self, sender: int, number: int) -> None:
        """Tell a sender that its frames are journaled up to this number."""
        slot = self._slots.pop(sender, None)
        if slot is None:
            slot = 2 + 2 * len(self._slots)
            if slot == len(self._values):
                # The sender that has been silent the longest gives way.
                slot = self._slots.pop(next(iter(self._slots)))
            # In this order, so that no sender takes another's number for its own.
            self._values[slot] = 0
            self._values[slot + 1] = 0
            self._values[slot] = sender
        self._slots[sender] = slot
        self._values[slot + 1] = number + 1

    def is_last(self, sender: int, number: int) -> bool:
        """Return, in the parent, whether this frame of the sender is the one that was journaled last."""
        slot = self._slots.get(sender)
        return slot is not None and self._values[slot + 1] == number + 1

    def acknowledged(self, sender: int) -> int:
        """Return the number below which all frames of the sender are known to be journaled."""
        with suppress(ValueError):
            slot = 2 + 2 * self._values[2::2].tolist().index(sender)
            number = self._values[slot + 1]
            if self._values[slot] == sender:
                return number
        return 0


class Inbox:
    """The parent's end, made before the first fork. All forked processes share the other end.

    The parent reads both files, empties the one that is not appended to, and then lets it take over.

    Attributes:
        shared: The memory that both ends share.
        files: The descriptors of the two files.
        ringing: The descriptor of the pipe that forked processes write to.
        owner: The id of the parent.
    """

    def __init__(self) -> None:
        """Make the files, and a pipe through which forked processes wake the parent and see that it lives.

        Raises:
            OSError: There is no free descriptor, or no space.
        """
        self.shared = Shared()
        self.owner = os.getpid()
        ends: list[int] = []
        try:
            ends.append(_unnamed_file())
            ends.append(_unnamed_file())
            ends.extend(os.pipe())
        except BaseException:
            for end in ends:
                os.close(end)
            raise
        self.files = ends[0], ends[1]
        self._bell, self.ringing = ends[2:]
        for end in ends[2:]:
            os.set_blocking(end, False)
        # What the system knows of the file behind each descriptor: a program may close or reuse any descriptor.
        self._identities = {end: os.fstat(end) for end in ends}
        # How many bytes of each file are read, and since when the current one is appended to.
        self._positions = (0, 0)
        self._turned_at = _CLOCK.now()
        self._unheard: deque[Frame] = deque()

    @property
    def is_closed(self) -> bool:
        """Whether the parent receives no more."""
        return self.shared.state == CLOSED

    def has(self, *ends: int) -> bool:
        """Return whether these descriptors, or all without an argument, still belong to the inbox."""
        try:
            for end in ends or self._identities:
                self._status(end)
        except OSError:
            return False
        return True

    def size(self, file: int) -> int:
        """Return the size of one of the files in bytes.

        Raises:
            OSError: Its descriptor is closed, or belongs to another file.
        """
        return self._status(self.files[file]).st_size

    def _status(self, end: int) -> os.stat_result:
        status = os.fstat(end)
        if not os.path.samestat(status, self._identities[end]):
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return status

    def wait(self) -> None:
        """Wait until a forked process has sent something, or a file can be emptied.

        Raises:
            OSError: The pipe is closed, though the inbox is not.
        """
        is_more = self._positions[self.shared.current] >= _TURN_BYTES or self._positions[1 - self.shared.current] > 0
        poll = select.poll()
        poll.register(self._bell, select.POLLIN)
        found = poll.poll(_TURN_SECONDS * 1000 if is_more else None)
        if any(events & select.POLLNVAL for _, events in found) and not self.is_closed:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    def receive(self) -> Iterator[Message | Loss]:
        """Yield the messages and losses that forked processes have sent by now. For one thread at a time.

        Each message counts as journaled when the caller asks for the next one.

        Raises:
            OSError: The files or the pipe are closed.
        """
        self._status(self._bell)
        with suppress(BlockingIOError):
            os.read(self._bell, _CHUNK_BYTES)
        # No more than the files contain now: a process that never stops logging must not keep a flush from ending.
        left = self.size(0) + self.size(1) - sum(self._positions)
        while True:
            # One at a time, so that a Ctrl-C leaves the others for the next call.
            while self._unheard:
                sender, number, content = self._unheard[0]
                # A Ctrl-C may make a process write one frame twice.
                if not (sender and self.shared.is_last(sender, number)):
                    yield content
                    if sender:
                        self.shared.acknowledge(sender, number)
                self._unheard.popleft()
            if left <= 0 or not (read := self._read()):
                break
            left -= read
        self._turn()

    def announce_end(self) -> None:
        """Tell forked processes to send nothing more, and to deliver later events themselves."""
        self.shared.state = CLOSING

    def close(self) -> None:
        """Receive nothing more. May be called again."""
        self.shared.state = CLOSED
        if self.has():
            # A thread that waits for the pipe would keep it open, so give it something to read.
            with suppress(OSError):
                os.write(self.ringing, b"\0")
            for end in self._identities:
                os.close(end)

    def become_outbox(self) -> None:
        """Turn it into the other end, in a process that was just forked. It can receive nothing from then on."""
        # A program that turns itself into a daemon may have closed the descriptor, and opened another file under it.
        if self.has(self._bell):
            os.close(self._bell)

    def _read(self) -> int:
        """Read some frames of one file. Returns how many bytes they take."""
        current = self.shared.current
        # The current file first: whatever a process has written to the older one before is visible after that.
        newer = self._chunk(current)
        older = self._chunk(1 - current)
        for file, data in ((1 - current, older), (current, newer)):
            found, read = frames.parse(data)
            if read:
                self._advance(file, read, found)
                return read
        return 0

    def _advance(self, file: int, read: int, found: list[Frame]) -> None:
        positions = self._moved(file, self._positions[file] + read)
        # Both in one C call, which no Ctrl-C interrupts.
        vars(self).update(_unheard=deque(found), _positions=positions)

    def _moved(self, file: int, to: int) -> tuple[int, int]:
        """Return the positions in both files, with another one for this file."""
        return (to, self._positions[1]) if file == 0 else (self._positions[0], to)

    def _chunk(self, file: int) -> bytes:
        if self.size(file) < self._positions[file]:
            # A Ctrl-C came after the file was emptied, and before its position was set back.
            self._positions = self._moved(file, 0)
        data = os.pread(self.files[file], _CHUNK_BYTES, self._positions[file])
        if len(data) == _CHUNK_BYTES and _CHUNK_BYTES < (length := frames.frame_bytes(data)) <= frames.MOST_BYTES:
            data = os.pread(self.files[file], length, self._positions[file])
        return data

    def _turn(self) -> None:
        """Empty the file that is no longer appended to, and let it take over."""
        if _CLOCK.now() < self._turned_at + _TURN_SECONDS:
            return
        current = self.shared.current
        other = 1 - current
        rest = self._chunk(other)
        if rest and not frames.parse(rest)[1]:
            # A process was killed in the middle of this frame.
            self._advance(other, len(rest), [*self._unheard, frames.UNKNOWN])
        if self._positions[other] < self.size(other):
            return
        if self._positions[other]:
            os.ftruncate(self.files[other], 0)
            self._positions = self._moved(other, 0)
        if self._positions[current] >= _TURN_BYTES:
            self.shared.current = other
            self._turned_at = _CLOCK.now()


def _unnamed_file() -> int:
    """Return a descriptor of a file that processes append to, and that disappears with the last of them."""
    try:
        end = os.memfd_create("composite-logstore")  # Linux alone has it
    except (AttributeError, OSError):
        end, path = tempfile.mkstemp(prefix="composite-logstore")
        os.unlink(path)
    import fcntl

    fcntl.fcntl(end, fcntl.F_SETFL, fcntl.fcntl(end, fcntl.F_GETFL) | os.O_APPEND)
    return end
