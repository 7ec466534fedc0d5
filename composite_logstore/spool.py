"""The journal on disk: one folder for each process, with its events and how far each child is with them.

    <spool_directory>/<log store's id>/
        <writer>/
            owner.lock              held by the process that the folder belongs to, until it dies
            <first number>.log      a segment: lines of events and of streams, in journal order
            spare                   the next segment, allocated before it is needed
            <child>.settled         below which number everything is settled for that child
        damaged/                    what could not be read

A line is a checksum, a JSON value and a line break, so that one that is damaged hides no other. Segments
are mapped into memory: to copy a line into one costs a tenth of a `write`, which gives up the interpreter
lock, and what was copied is there after the process was killed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import re
import shutil
import time
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import zip_longest
from math import inf
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID

import orjson

from composite_logstore.backoff import described
from composite_logstore.event import ExceptionInfo, LogEvent, Stream, TraceContext, plain_mapping

SEGMENT_BYTES = 4 * 1024 * 1024
LINE_BYTES = 64 * 1024 * 1024
"""The longest line. One that is longer stays in memory."""
_FORMAT = 1
_LOCK = "owner.lock"
_SPARE = "spare"
_HEADER = b'{"format":%d}' % _FORMAT
_NUMBER = "{:020d}"
_WRITER = re.compile(r"[0-9a-f]{15}")
_SEGMENT = re.compile(r"[0-9]{20}\.log")
_POSITION = re.compile(r"[a-z0-9_-]+\.settled")
_POSITION_BYTES = 30
_REWRITE = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC
_HIDDEN = ".hidden-"
_ABANDONED_SECONDS = 3600.0
_STREAMS = 10_000
_DAMAGED = "damaged"

_locks: set[int] = set()


def let_go_of_all() -> None:
    """Let go of all locks, as the end of the process does."""
    while _locks:
        with contextlib.suppress(OSError):
            os.close(_locks.pop())


# A lock lives as long as any process has its descriptor: a forked one must not keep its parent's.
os.register_at_fork(after_in_child=let_go_of_all)


class SpoolFullError(OSError):
    """There is no room: neither within `spool_max_bytes` nor by giving up what is oldest."""


class UnstorableEventError(ValueError):
    """An event cannot be written, whatever there is room for."""


class EventTooLongError(UnstorableEventError):
    """An event has more bytes than a line may have."""


@dataclass
class Segment:
    """A file of the spool.

    Attributes:
        path: The file.
        first: The number of its first event, or one below it.
        last: The number of its last event, or one above it; one below `first` if it has none.
        kinds: How many events it has of each level, ordinary ones and a progress bar's updates.
    """

    path: Path
    first: int
    last: float
    kinds: Counter[tuple[int, bool]] = field(default_factory=Counter)


class Damage(NamedTuple):
    """What could not be read.

    Attributes:
        path: The file.
        offset: Where in it.
        length: How many bytes, 0 if none is worth keeping; None for the whole file.
        why: What is wrong, in words.
    """

    path: Path
    offset: int
    length: int | None
    why: str


class Spool:
    """A process's folder. The journal's lock guards every call but those that read.

    Attributes:
        folder: The folder.
        children: The names of the children that it keeps positions for.
        damage: What could not be read, as far as it was looked at.
    """

    def __init__(self, folder: Path, lock: int | None, children: Iterable[str]) -> None:
        """Use `create`, `adopt` or `look`.

        Args:
            folder: The folder.
            lock: The file descriptor that holds its lock, None if nobody does.
            children: The names of the children that it keeps positions for.
        """
        self.folder = folder
        self.children = sorted(children)
        self.damage: list[Damage] = []
        self._lock = lock
        # Of what is written: the attributes that the streams were written with.
        self._written: dict[Stream, dict[str, Any]] = {}
        # Of what is read.
        self._streams: dict[str, Stream] = {}
        self._positions: dict[str, mmap.mmap] = {}
        self._segments: list[Segment] = []
        # The segment in use, where its next line goes, where it ends, and the streams that it has: their ids as text.
        self._map: mmap.mmap | None = None
        self._end = self._room = 0
        self._current: dict[Stream, str] = {}
        self._spare: mmap.mmap | None = None
        # What is done with, for `tidy` to close and to take away.
        self._full: deque[tuple[mmap.mmap, Path, int]] = deque()
        self._freed: deque[Path] = deque()

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
        hidden = component / f"{_HIDDEN}{writer}"
        hidden.mkdir(mode=0o700)
        try:
            lock = _locked(hidden)
            if lock is None:
                raise OSError("its lock is held by somebody else")
            spool = cls(component / writer, lock, children)
            for child in spool.children:
                spool._positions[child] = _mapped_position(hidden / f"{child}.settled")
            # By this it is known which came first. The system's own times are milliseconds apart.
            now = time.time_ns()
            os.utime(hidden / _LOCK, ns=(now, now))
            hidden.rename(component / writer)
        except BaseException:
            shutil.rmtree(hidden, ignore_errors=True)
            raise
        return spool

    @classmethod
    def adopt(cls, folder: Path) -> Spool | None:
        """Take over a folder whose process is dead; None if it is alive, or somebody else was quicker.

        Raises:
            OSError: The folder cannot be read.
        """
        lock = _locked(folder)
        return None if lock is None else cls._found(folder, lock)

    @classmethod
    def look(cls, folder: Path) -> Spool:
        """Return a folder to be read alone, whether its process is dead or alive.

        Raises:
            OSError: The folder cannot be read.
        """
        return cls._found(folder, None)

    @classmethod
    def _found(cls, folder: Path, lock: int | None) -> Spool:
        files = sorted(path for path in folder.iterdir() if path.name not in (_LOCK, _SPARE))
        children = [path.name.removesuffix(".settled") for path in files if _POSITION.fullmatch(path.name)]
        spool = cls(folder, lock, children)
        segments = [path for path in files if _SEGMENT.fullmatch(path.name)]
        for path, successor in zip_longest(segments, segments[1:]):
            last = int(successor.stem) - 1 if successor else inf
            spool._segments.append(Segment(path, int(path.stem), last))
        for path in set(files) - set(segments) - {folder / f"{child}.settled" for child in children}:
            spool.damage.append(Damage(path, 0, None, "it is no part of a spool"))
        for child in children:
            if _read_position(folder / f"{child}.settled") is None:
                spool.damage.append(Damage(folder / f"{child}.settled", 0, 0, "damaged, so all is delivered again"))
                if lock is not None:
                    spool.forget_position(child)
        return spool

    @property
    def size(self) -> int:
        """How many bytes its segments take."""
        return sum(_size(segment.path) for segment in self._segments)

    @property
    def last(self) -> float:
        """The number of its last event, -1 if it has none. Exact for what was written or scanned."""
        return max((segment.last for segment in self._segments), default=-1)

    # Writing

    def append(self, event: LogEvent, room: Callable[[int], bool]) -> None:
        """Write an event.

        Args:
            event: The event.
            room: Asked before the spool grows by so many bytes, and after, since others grow too.

        Raises:
            OSError: There is no room on the disk, or `room` says no.
            EventTooLongError: There is no room in any line.
            UnstorableEventError: It has something in it that no line can say.
        """
        stream = event.stream
        name = self._current.get(stream)
        if name is None:
            # A segment says itself which streams it has.
            name = str(stream.id)
            self._streams[name] = stream
            self._write_stream(stream, event.number, room)
        try:
            payload = _encode(event, name)
        except Exception as error:
            raise UnstorableEventError(described(error)) from error
        line = b"%08x %b\n" % (zlib.crc32(payload), payload)
        end = self._end + len(line)
        if self._map is None or end > self._room:
            self._write(line, event.number, room)
        else:
            self._map[self._end : end] = line
            self._end = end
        segment = self._segments[-1]
        segment.last = event.number
        segment.kinds[event.level, event.progress] += 1

    def refresh(self, room: Callable[[int], bool]) -> None:
        """Write the attributes of streams anew if ZenML has added to them since.

        Raises:
            OSError: There is no room.
        """
        for stream in [stream for stream, written in self._written.items() if _differs(written, stream.metadata)]:
            self._write_stream(stream, int(self.last), room)

    def _write_stream(self, stream: Stream, number: int, room: Callable[[int], bool]) -> None:
        metadata = dict(stream.metadata)
        value = {
            "stream": str(stream.id),
            "artifact_store_id": str(stream.artifact_store_id) if stream.artifact_store_id else None,
            "attributes": stream.attributes,
        }
        self._write(_line(orjson.dumps(value)), number, room)
        self._current[stream] = str(stream.id)
        self._written[stream] = metadata
        # A process that serves for months has many streams.
        for old in [*self._written][:-_STREAMS]:
            del self._written[old], self._streams[str(old.id)]
            self._current.pop(old, None)

    def _write(self, line: bytes, number: int, room: Callable[[int], bool]) -> None:
        end = self._end + len(line)
        if self._map is None or end > self._room:
            self._map = self._begin_segment(number, len(line), room)
            end = self._end + len(line)
        self._map[self._end : end] = line
        self._end = end

    def _begin_segment(self, first: int, size: int, room: Callable[[int], bool]) -> mmap.mmap:
        if size > LINE_BYTES:
            raise EventTooLongError(f"more than {LINE_BYTES} bytes")
        header = _line(_HEADER)
        size = max(SEGMENT_BYTES, len(header) + size)
        # Attributes may be all that the one before has from this number on.
        first = max(first, self._segments[-1].first + 1) if self._segments else first
        path = self.folder / f"{_NUMBER.format(first)}.log"
        new = self._spare
        if new is not None and len(new) >= size:
            self._spare = None
            (self.folder / _SPARE).rename(path)
        else:
            if not room(size):
                raise SpoolFullError("'spool_max_bytes' is reached")
            new = _mapped(path, size)
            if not room(0):
                path.unlink()
                raise SpoolFullError("'spool_max_bytes' is reached")
        self._close_segment()
        new[: len(header)] = header
        self._end, self._room = len(header), len(new)
        self._segments.append(Segment(path, first, first - 1))
        return new

    def _close_segment(self) -> None:
        if self._map is not None:
            self._full.append((self._map, self._segments[-1].path, self._end))
            self._map = None
            self._current = {}

    @property
    def needs_spare(self) -> bool:
        """Whether there is no segment for when the one in use is full."""
        return self._spare is None and self._lock is not None

    def prepare(self) -> None:
        """Allocate the next segment. Without the lock: whoever is computing meanwhile makes each step of it long.

        Raises:
            OSError: There is no room on the disk.
        """
        (self.folder / _SPARE).unlink(missing_ok=True)
        self._spare = _mapped(self.folder / _SPARE, SEGMENT_BYTES)

    def tidy(self) -> None:
        """Close and take away what is done with. Without the lock, for the same reason."""
        with contextlib.suppress(IndexError):
            while True:
                full, path, end = self._full.popleft()
                full.close()
                with contextlib.suppress(OSError):
                    os.truncate(path, end)
        with contextlib.suppress(IndexError):
            while True:
                freed = self._freed.popleft()
                with contextlib.suppress(OSError):
                    freed.unlink()

    # How far the children are

    def settled(self, child: str) -> int:
        """Return below which number everything is settled for the child."""
        if child in self._positions:
            return _position(self._positions[child][:]) or 0
        return _read_position(self.folder / f"{child}.settled") or 0

    def settle(self, child: str, before: float) -> None:
        """Note that everything below a number is settled for the child, and free what all are done with: see `tidy`.

        Raises:
            OSError: The folder is gone.
        """
        noted = _encoded_position(int(before))
        if child in self._positions:
            if self._positions[child][:] == noted:
                return
            self._positions[child][:] = noted
        else:
            # A folder of somebody else's is one of many, and a mapping needs a file descriptor.
            with os.fdopen(os.open(self.folder / f"{child}.settled", _REWRITE, 0o600), "wb") as file:
                file.write(noted)
        self._free()

    def forget_position(self, child: str) -> None:
        """Have the child get everything that is still there."""
        path = self.folder / f"{child}.settled"
        path.unlink(missing_ok=True)
        _mapped_position(path).close()
        if child not in self.children:
            self.children = sorted([*self.children, child])

    def _free(self) -> None:
        finished = len(self._segments) - (self._map is not None)
        if not finished:
            return
        settled = min(map(self.settled, self.children), default=inf)
        while finished and self._segments[0].last < settled:
            self._freed.append(self._segments.pop(0).path)
            finished -= 1

    def oldest_segment(self) -> Segment | None:
        """Return the segment that would be given up first; None if there is none but the one in use."""
        return self._segments[0] if len(self._segments) > (self._map is not None) else None

    def close(self) -> bool:
        """Let go of the folder. It goes if all is settled; otherwise it is left to the next process.

        Returns:
            Whether it is gone.
        """
        is_done = False
        with contextlib.suppress(OSError):
            is_done = all(self.settled(child) > self.last for child in self.children)
        if is_done:
            # Gone at once, so that nobody adopts half of it.
            gone = self.folder.with_name(f"{_HIDDEN}{self.folder.name}")
            with contextlib.suppress(OSError):
                self.folder.rename(gone)
                shutil.rmtree(gone, ignore_errors=True)
        self.abandon()
        return is_done

    def abandon(self) -> None:
        """Let go of the folder as it is."""
        self._close_segment()
        self.tidy()
        if self._spare is not None:
            self._spare.close()
            self._spare = None
            (self.folder / _SPARE).unlink(missing_ok=True)
        for position in self._positions.values():
            position.close()
        self._positions.clear()
        if self._lock is not None:
            _locks.discard(self._lock)
            os.close(self._lock)
            self._lock = None

    # Reading

    def scan(self) -> Iterator[LogEvent | Damage]:
        """Yield all there is, in order, and what cannot be read where it is met.

        For a folder that was found. Afterwards it is known what each segment has, and the streams have
        the attributes that they had last.
        """
        last = -1
        for segment in list(self._segments):
            segment.last = segment.first - 1
            for item, _ in self._items(segment, 0, is_scan=True):
                if isinstance(item, LogEvent):
                    if item.number <= last:
                        # A Ctrl-C came in the middle of its writing, and it was written again.
                        continue
                    last = segment.last = item.number
                    segment.kinds[item.level, item.progress] += 1
                else:
                    self.damage.append(item)
                yield item

    def set_aside(self) -> list[tuple[Damage, Path]]:
        """Move what could not be read out of the way.

        Returns:
            Each damage, and the file in which it is kept.
        """
        aside: dict[Path, list[tuple[Damage, Path]]] = {}
        for damage in self.damage:
            target = self.folder.parent / _DAMAGED / f"{self.folder.name}-{damage.path.name}"
            try:
                target.parent.mkdir(mode=0o700, exist_ok=True)
                if damage.length == 0:
                    target = damage.path
                elif damage.length is None:
                    damage.path.rename(target)
                    self._segments = [segment for segment in self._segments if segment.path != damage.path]
                else:
                    _move_bytes(damage, target)
            except OSError:
                # It stays where it is, and is met again.
                target = damage.path
            aside.setdefault(damage.path, []).append((damage, target))
        self.damage = []
        return [told for of_file in aside.values() for told in of_file]

    def read(self, after: int, before: float) -> Iterator[LogEvent]:
        """Yield the events with numbers above `after` and below `before`, in order."""
        return Cursor(self).read(after, before)

    def _items(self, segment: Segment, offset: int, is_scan: bool = False) -> Iterator[tuple[LogEvent | Damage, int]]:
        """Yield what comes from an offset on, and where each ends. A segment that was given up has nothing."""
        try:
            file = segment.path.open("rb")
        except FileNotFoundError:
            return
        except (IsADirectoryError, PermissionError) as error:
            yield Damage(segment.path, 0, None, error.strerror or "unreadable"), 0
            return
        with file:
            file.seek(offset)
            while True:
                try:
                    line = file.readline(LINE_BYTES)
                except OSError as error:
                    if error.errno != errno.EIO:
                        raise
                    yield Damage(segment.path, 0, None, error.strerror or "unreadable"), offset
                    return
                if not line:
                    return
                begin, offset = offset, offset + len(line)
                if not line.endswith(b"\n"):
                    line = line.rstrip(b"\0")
                    if segment is self._segments[-1]:
                        # Its process was killed in the middle of writing it, so nobody was told that it is here.
                        return
                zeros = len(line) - len(line.lstrip(b"\0"))
                if not line:
                    # What was made room for, and not written to.
                    return
                if line == b"\n":
                    # What was here is set aside.
                    continue
                if zeros:
                    yield Damage(segment.path, begin, zeros, "zeros"), begin + zeros
                value = _decode(line[zeros:])
                item: LogEvent | Damage | None = None
                if isinstance(value, dict):
                    if value.get("format", _FORMAT) != _FORMAT:
                        yield Damage(segment.path, 0, None, "another version has written it"), offset
                        return
                    if "stream" in value:
                        self._learn(value, is_scan)
                elif isinstance(value, list):
                    item = _event(value, self._stream(value[0]))
                else:
                    item = Damage(segment.path, begin + zeros, len(line) - zeros, "damaged")
                if item is not None:
                    yield item, offset

    def _learn(self, line: dict[str, Any], is_scan: bool) -> None:
        is_known = line["stream"] in self._streams
        stream = self._stream(line["stream"])
        # The attributes that were written last count, wherever reading begins.
        if is_scan or not is_known:
            store_id = line["artifact_store_id"]
            stream.artifact_store_id = UUID(store_id) if store_id else None
            stream.metadata = line["attributes"]

    def _stream(self, name: str) -> Stream:
        return self._streams.get(name) or self._streams.setdefault(name, Stream(UUID(name), {}))


class Cursor:
    """Reads a spool on and on: each time what comes next, as far as it may. Needs no lock.

    Attributes:
        spool: What it reads.
    """

    def __init__(self, spool: Spool) -> None:
        """Begin at the beginning.

        Args:
            spool: What to read.
        """
        self.spool = spool
        self._segment: Segment | None = None
        self._offset = 0

    def read(self, after: int, before: float) -> Iterator[LogEvent]:
        """Yield the events with numbers above `after` and below `before`, in order."""
        for segment in list(self.spool._segments):
            if segment.last <= after or (self._segment is not None and segment.first < self._segment.first):
                continue
            if segment is not self._segment:
                self._segment, self._offset = segment, 0
            for item, offset in self.spool._items(segment, self._offset):
                if isinstance(item, LogEvent):
                    if item.number >= before:
                        return
                    self._offset = offset
                    if item.number > after:
                        after = item.number
                        yield item


def left_behind(component: Path) -> Iterator[Path]:
    """Yield the folders of a log store's processes, dead or alive, those first that were made first."""
    try:
        folders = list(component.iterdir())
    except OSError:
        return
    for folder in sorted(folders, key=_age):
        if _WRITER.fullmatch(folder.name) and folder.is_dir():
            yield folder
        elif folder.name.startswith(_HIDDEN) and time.time() - _age(folder) > _ABANDONED_SECONDS:
            # Its process died when it was made or taken away.
            shutil.rmtree(folder, ignore_errors=True)


def is_alive(folder: Path) -> bool:
    """Say whether the process that the folder belongs to is alive.

    Raises:
        OSError: Its lock cannot be opened.
    """
    lock = _locked(folder)
    if lock is not None:
        _locks.discard(lock)
        os.close(lock)
    return lock is None


def damaged(component: Path) -> list[Path]:
    """Return the files in which what could not be read is kept."""
    return sorted((component / _DAMAGED).glob("*"))


def _age(folder: Path) -> float:
    try:
        return (folder / _LOCK).stat().st_mtime
    except OSError:
        try:
            return folder.stat().st_mtime
        except OSError:
            return inf


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _mapped(path: Path, size: int) -> mmap.mmap:
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        _allocate(file, size)
        return mmap.mmap(file, size)
    except BaseException:
        path.unlink()
        raise
    finally:
        os.close(file)


def _allocate(file: int, size: int) -> None:
    # A page of a sparse file that finds no room when it is written to would kill the process.
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)
    else:
        written = 0
        while written < size:
            written += os.write(file, bytes(size - written))


def _locked(folder: Path) -> int | None:
    """Return a descriptor that holds the folder's lock, which dies with the process; None if another has it."""
    try:
        lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except FileNotFoundError:
        return None
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
    _locks.add(lock)
    return lock


def _move_bytes(damage: Damage, target: Path) -> None:
    with damage.path.open("r+b") as file:
        file.seek(damage.offset)
        data = file.read(damage.length)
        with os.fdopen(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600), "ab") as aside:
            aside.write(data if data.endswith(b"\n") else data + b"\n")
        file.seek(damage.offset)
        file.write(b"\n" * len(data))


# A position has a checksum too: one that is cut or flipped must not hide what is not settled.


def _encoded_position(number: int) -> bytes:
    text = _NUMBER.format(number).encode()
    return b"%b %08x\n" % (text, zlib.crc32(text))


def _position(data: bytes) -> int | None:
    text = data[:20]
    return int(text) if text.isdigit() and data == _encoded_position(int(text)) else None


def _read_position(path: Path) -> int | None:
    try:
        with path.open("rb") as file:
            return _position(file.read(_POSITION_BYTES + 1))
    except OSError:
        return None


def _mapped_position(path: Path) -> mmap.mmap:
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.write(file, _encoded_position(0))
        return mmap.mmap(file, _POSITION_BYTES)
    finally:
        os.close(file)


def _differs(written: dict[str, Any], metadata: dict[str, Any]) -> bool:
    try:
        return bool(written != metadata)
    except Exception:
        # An array, say, that cannot tell whether it equals another one.
        return orjson.dumps(plain_mapping(written)) != orjson.dumps(plain_mapping(metadata))


def _line(payload: bytes) -> bytes:
    return b"%08x %b\n" % (zlib.crc32(payload), payload)


def _decode(line: bytes) -> Any:
    """Return a line's value, None if it is damaged."""
    try:
        payload = line[9:-1]
        if line[-1:] == b"\n" and int(line[:8], 16) == zlib.crc32(payload):
            return orjson.loads(payload)
    except ValueError:
        pass
    return None


_EXCEPTION, _TRACE = LogEvent._fields.index("exception"), LogEvent._fields.index("trace")


def _encode(event: LogEvent, stream: str) -> bytes:
    error, trace = event.exception, event.trace
    if error is None and trace is None:
        return orjson.dumps((stream, *event[1:]))
    fields = event._asdict()
    fields["stream"] = stream
    fields["exception"] = error and tuple(error)
    # JSON's numbers end at 64 bits.
    fields["trace"] = trace and (f"{trace.trace_id:x}", f"{trace.span_id:x}", trace.flags)
    return orjson.dumps(list(fields.values()))


def _event(value: list[Any], stream: Stream) -> LogEvent:
    value[0] = stream
    error, trace = value[_EXCEPTION], value[_TRACE]
    value[_EXCEPTION] = error and ExceptionInfo(*error)
    value[_TRACE] = trace and TraceContext(int(trace[0], 16), int(trace[1], 16), trace[2])
    return LogEvent._make(value)
