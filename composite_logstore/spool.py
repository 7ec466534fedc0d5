"""The journal on disk: one folder for each process, with its events and how far each child is with them.

    <spool_directory>/<log store's id>/<writer>/
        owner.lock              held by the process that the folder belongs to, until it dies
        <first number>.log      a segment: lines of events and of streams, in journal order
        <child>.settled         below which number everything is settled for that child

A line is a checksum, a JSON value and a line break, so that one that is damaged hides no other. Segments
are mapped into memory: to copy a line into one costs a tenth of a `write`, which gives up the interpreter
lock, and what was copied is there after the process was killed.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Any
from uuid import UUID

import orjson

from composite_logstore.event import ExceptionInfo, LogEvent, Stream, TraceContext

SEGMENT_BYTES = 4 * 1024 * 1024
_LOCK = "owner.lock"
_POSITION = "{:020d}"
_NEW = ".new-"


class SpoolFullError(OSError):
    """There is no room: neither within `spool_max_bytes` nor by giving up what is oldest."""


@dataclass
class Segment:
    """A file of the spool.

    Attributes:
        path: The file.
        first: The number of its first event, or one below it.
        last: The number of its last event; one below `first` if it has none.
    """

    path: Path
    first: int
    last: int
    streams: set[int] = field(default_factory=set)


class Spool:
    """A process's folder. The journal's lock guards every call but `read`.

    Attributes:
        folder: The folder.
        streams: The streams that its lines refer to, by their number in it.
        damaged: How many lines could not be read.
    """

    def __init__(self, folder: Path, lock: int) -> None:
        """Use `create` or `adopt`.

        Args:
            folder: The folder.
            lock: The file descriptor that holds its lock.
        """
        self.folder = folder
        self.streams: dict[int, Stream] = {}
        self.damaged = 0
        self._numbers: dict[UUID, int] = {}
        self._written: dict[int, dict[str, Any]] = {}
        self._lock = lock
        self._positions: dict[str, mmap.mmap] = {}
        self._segments: list[Segment] = []
        self._map: mmap.mmap | None = None
        self._end = 0

    @classmethod
    def create(cls, component: Path, writer: str, children: Iterable[str]) -> Spool:
        """Make the folder of this process.

        Args:
            component: The folder of the log store.
            writer: The writer's name.
            children: The names of its children.

        Raises:
            OSError: The folder cannot be used: it cannot be written, or has no locks.
        """
        component.mkdir(mode=0o700, parents=True, exist_ok=True)
        # It gets its name once it is locked, so that nobody takes it for a dead process's.
        hidden = component / f"{_NEW}{writer}"
        hidden.mkdir(mode=0o700)
        try:
            lock = _locked(hidden)
            if lock is None:
                raise OSError(f"the spool's lock in {component} is held by somebody else")
            for child in children:
                (hidden / f"{child}.settled").write_text(_POSITION.format(0))
                os.chmod(hidden / f"{child}.settled", 0o600)
            hidden.rename(component / writer)
        except BaseException:
            shutil.rmtree(hidden, ignore_errors=True)
            raise
        return cls(component / writer, lock)

    @classmethod
    def adopt(cls, folder: Path) -> Spool | None:
        """Take over a folder whose process is dead; None if it is alive, or somebody else was quicker.

        Raises:
            OSError: The folder cannot be read.
        """
        lock = _locked(folder)
        if lock is None:
            return None
        spool = cls(folder, lock)
        for path in sorted(folder.glob("*.log")):
            first = int(path.stem) if path.stem.isdigit() else 0
            spool._segments.append(Segment(path, first, first - 1))
        for segment in spool._segments:
            for number, _ in spool._events(segment, -1):
                segment.last = number
        return spool

    @property
    def size(self) -> int:
        """How many bytes its segments take."""
        return sum(segment.path.stat().st_size for segment in self._segments if segment.path.exists())

    @property
    def children(self) -> list[str]:
        """The names of the children that it keeps positions for."""
        return sorted(path.name.removesuffix(".settled") for path in self.folder.glob("*.settled"))

    def release_in_fork(self) -> None:
        """Let go of the lock in a forked process; the parent goes on holding it."""
        os.close(self._lock)

    # Writing

    def append(self, event: LogEvent, room: Callable[[int], bool]) -> None:
        """Write an event.

        Args:
            event: The event.
            room: Asked before the spool grows by so many bytes.

        Raises:
            OSError: There is no room on the disk, or `room` says no.
        """
        number = self._numbers.get(event.stream.id)
        if number is None:
            number = self._numbers[event.stream.id] = len(self._numbers)
            self.streams[number] = event.stream
        if not self._segments or number not in self._segments[-1].streams:
            self._write_stream(event, number, room)
        self._write(_encode(event, number), event.number, room)
        self._segments[-1].last = event.number

    def _write_stream(self, event: LogEvent, number: int, room: Callable[[int], bool]) -> None:
        stream = event.stream
        self._written[number] = dict(stream.attributes)
        line = {
            "stream": number,
            "id": str(stream.id),
            "artifact_store_id": str(stream.artifact_store_id) if stream.artifact_store_id else None,
            "writer": event.writer,
            "metadata": self._written[number],
        }
        self._write(orjson.dumps(line), event.number, room)
        self._segments[-1].streams.add(number)

    def _write(self, payload: bytes, number: int, room: Callable[[int], bool]) -> None:
        line = b"%08x %b\n" % (zlib.crc32(payload), payload)
        end = self._end + len(line)
        if self._map is None or end > len(self._map):
            self._begin_segment(number, max(SEGMENT_BYTES, len(line)), room)
            end = len(line)
        assert self._map is not None
        self._map[self._end : end] = line
        self._end = end

    def _begin_segment(self, first: int, size: int, room: Callable[[int], bool]) -> None:
        if not room(size):
            raise SpoolFullError("the spool is full")
        path = self.folder / f"{_POSITION.format(first)}.log"
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            # A page of a sparse file that finds no room when it is written to would kill the process.
            os.posix_fallocate(file, 0, size)
            new = mmap.mmap(file, size)
        except BaseException:
            path.unlink()
            raise
        finally:
            os.close(file)
        self._close_segment()
        self._map, self._end = new, 0
        self._segments.append(Segment(path, first, first - 1))

    def _close_segment(self) -> None:
        if self._map is not None:
            self._map.close()
            self._map = None
            os.truncate(self._segments[-1].path, self._end)

    # How far the children are

    def settled(self, child: str) -> int:
        """Return below which number everything is settled for the child."""
        return int(self._position(child)[:])

    def settle(self, child: str, before: int) -> None:
        """Note that everything below a number is settled for the child, and free what all are done with."""
        position = self._position(child)
        position[:] = _POSITION.format(before).encode()
        self._free()

    def _position(self, child: str) -> mmap.mmap:
        if child not in self._positions:
            file = os.open(self.folder / f"{child}.settled", os.O_RDWR | os.O_CLOEXEC)
            try:
                self._positions[child] = mmap.mmap(file, 20)
            finally:
                os.close(file)
        return self._positions[child]

    def _free(self) -> None:
        if len(self._segments) < 2 and self._map is not None:
            return
        settled = min(map(self.settled, self.children), default=inf)
        while self._segments and self._segments[0].last < settled:
            if self._map is not None and len(self._segments) == 1:
                break
            self._segments.pop(0).path.unlink(missing_ok=True)

    def oldest_segment(self) -> Segment | None:
        """Return the segment that would be given up first; None if there is none but the one in use."""
        return self._segments[0] if len(self._segments) > (self._map is not None) else None

    def close(self) -> None:
        """Take the folder away if all is settled; otherwise leave it to the next process."""
        self._close_segment()
        last = max((segment.last for segment in self._segments), default=-1)
        if all(self.settled(child) > last for child in self.children):
            shutil.rmtree(self.folder, ignore_errors=True)
        for position in self._positions.values():
            position.close()
        self._positions.clear()
        os.close(self._lock)

    # Reading

    def read(self, after: int, before: float) -> Iterator[LogEvent]:
        """Yield the events with numbers above `after` and below `before`, in order.

        Needs no lock. A segment that is given up meanwhile ends there.
        """
        for segment in list(self._segments):
            if segment.last <= after:
                continue
            for number, event in self._events(segment, after):
                if number >= before:
                    return
                yield event
                after = number

    def _events(self, segment: Segment, after: int) -> Iterator[tuple[int, LogEvent]]:
        try:
            file = segment.path.open("rb")
        except FileNotFoundError:
            return
        with file:
            for line in file:
                if line[:1] == b"\0":
                    # What was made room for and not written to. A line may follow that zeros have overwritten.
                    line = line.lstrip(b"\0")
                    if not line:
                        return
                value = _decode(line)
                if value is None:
                    self.damaged += 1
                elif isinstance(value, dict):
                    self._learn(value)
                elif value[0] > after and value[2] in self.streams:
                    yield value[0], _event(value, self.streams[value[2]])

    def _learn(self, line: dict[str, Any]) -> None:
        number = line["stream"]
        store_id = line["artifact_store_id"]
        if number not in self._numbers.values():
            stream = self.streams.setdefault(number, Stream(UUID(line["id"]), {}, UUID(store_id) if store_id else None))
            stream.metadata = line["metadata"]

    def refresh(self, event: LogEvent, room: Callable[[int], bool]) -> None:
        """Write the attributes of the event's stream anew if ZenML has added to them since."""
        number = self._numbers.get(event.stream.id)
        if number is not None and self._written[number] != event.stream.attributes:
            self._write_stream(event, number, room)


class Cursor:
    """Reads a spool on and on: each time what comes next, as far as it may."""

    def __init__(self, spool: Spool) -> None:
        """Begin at the beginning.

        Args:
            spool: What to read.
        """
        self._spool = spool
        self._after = -1
        self._events: Iterator[LogEvent] = iter(())
        self._next: LogEvent | None = None

    def read(self, after: int, before: float) -> Iterator[LogEvent]:
        """Yield the events with numbers above `after` and below `before`, in order."""
        if self._next is None or after < self._after:
            self._events = self._spool.read(after, inf)
            self._next = next(self._events, None)
        while self._next is not None and self._next.number < before:
            event, self._next = self._next, next(self._events, None)
            self._after = event.number
            if event.number > after:
                yield event


def _locked(folder: Path) -> int | None:
    """Return a descriptor that holds the folder's lock, which dies with the process; None if another has it."""
    lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if (folder / _LOCK).stat().st_ino != os.fstat(lock).st_ino:
            raise BlockingIOError
    except (BlockingIOError, FileNotFoundError):
        os.close(lock)
        return None
    except BaseException:
        os.close(lock)
        raise
    return lock


def _encode(event: LogEvent, stream: int) -> bytes:
    error, trace = event.exception, event.trace
    return orjson.dumps(
        (
            event.number,
            event.sequence,
            stream,
            event.writer,
            event.time_unix_nano,
            event.level,
            event.level_name,
            event.message,
            event.logger_name,
            event.file,
            event.line,
            event.function,
            error and tuple(error),
            # JSON's numbers end at 64 bits.
            trace and (f"{trace.trace_id:x}", f"{trace.span_id:x}", trace.flags),
            event.attributes,
            event.metadata,
            event.progress,
        )
    )


def _decode(line: bytes) -> Any:
    """Return a line's value, None if it is damaged."""
    try:
        payload = line[9:-1]
        if line[-1:] == b"\n" and int(line[:8], 16) == zlib.crc32(payload):
            return orjson.loads(payload)
    except ValueError:
        pass
    return None


def _event(value: list[Any], stream: Stream) -> LogEvent:
    number, sequence, _, writer, *capture = value
    error, trace = capture[8], capture[9]
    capture[8] = error and ExceptionInfo(*error)
    capture[9] = trace and TraceContext(int(trace[0], 16), int(trace[1], 16), trace[2])
    return LogEvent(stream, writer, number, sequence, *capture)
