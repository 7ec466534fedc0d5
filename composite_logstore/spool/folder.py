"""The journal on disk: one folder for each process, with its events and how far each child is with them.

    <spool_directory>/<log store's id>/
        <writer>/
            owner.lock              held by the process that the folder belongs to, until it dies
            <first number>.log      a segment: lines of events and of streams, in journal order
            spare                   the next segment, allocated before it is needed
            <child>.settled         below which number everything is settled for that child
        <writer>-2/                 a later one, should the first have been taken away from the process
        damaged/                    what could not be read

A line is a checksum, a JSON value and a line break, so that one that is damaged hides no other. Segments
are mapped into memory: to copy a line into one costs a tenth of a `write`, which gives up the interpreter
lock, and what was copied is there after the process was killed.

Others may write beside the log store's folder, and anything may have become of what a dead process left. So nothing is
opened but through a `PrivateFolder`, and a line counts as damaged unless each of its fields has the shape that it was
written with.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import mmap
import os
import re
import secrets
import stat
import time
import zlib
from array import array
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import count, pairwise, zip_longest
from math import inf
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from uuid import UUID

import orjson

from composite_logstore.event import ExceptionInfo, LogEvent, Stream, TraceContext
from composite_logstore.inert import described
from composite_logstore.plain import plain_mapping
from composite_logstore.spool.private_folder import PrivateFolder, identity_of

SEGMENT_BYTES = 4 * 1024 * 1024
LINE_BYTES = 64 * 1024 * 1024
"""The longest line. One that is longer stays in memory."""
_FORMAT = 1
_LOCK = "owner.lock"
_SPARE = "spare"
_NEW = "spare.new"
_NO_EVENTS = (_LOCK, _SPARE, _NEW)
_NUMBER = "{:020d}"
_WRITER = re.compile(r"[0-9a-f]{15}")
_PROCESS = re.compile(rf"{_WRITER.pattern}(-[0-9]{{1,6}})?")
_SEGMENT = re.compile(r"[0-9]{20}\.log")
_POSITION = re.compile(r"[a-z0-9_-]+\.settled")
_POSITION_BYTES = 30
_HIDDEN = ".hidden-"
_ABANDONED_SECONDS = 3600.0
_STREAMS = 10_000
_DAMAGED = "damaged"
_STEP_SECONDS = 2.0
"""How coarse a file system's clock may be, which says when a folder has changed."""

# Each with what tells its file from others: a program may close all descriptors, and open others under their numbers.
_locks: dict[int, tuple[int, int]] = {}


def let_go_of_all() -> None:
    """Let go of all locks, as the end of the process does."""
    for lock in list(_locks):
        _let_go(lock)


def _let_go(lock: int) -> None:
    held = _locks.pop(lock, None)
    with contextlib.suppress(OSError):
        if held is not None and identity_of(os.fstat(lock)) == held:
            os.close(lock)


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
        strays: Where its lines begin whose numbers are out of order.
    """

    path: Path
    first: int
    last: float
    kinds: Counter[tuple[int, bool]] = field(default_factory=Counter)
    strays: frozenset[int] = frozenset()


class Damage(NamedTuple):
    """What could not be read.

    Attributes:
        path: The file.
        offset: Where in it.
        length: How many bytes, 0 if none is worth keeping; None for the whole file.
        why: What is wrong, in words.
        lines: How many lines it may have been.
    """

    path: Path
    offset: int
    length: int | None
    why: str
    lines: int = 1


class Standing(Enum):
    """How a living process's folder stands."""

    IN_PLACE = "nothing was made or taken away there since it was looked at"
    CHANGED = "something was"
    GONE = "where it was there is nothing, or another one"


class _Mapped(NamedTuple):
    memory: mmap.mmap
    identity: tuple[int, int]


class Spool:
    """A process's folder. The journal's lock guards every call but those that read.

    Attributes:
        folder: The folder.
        children: The names of the children that it keeps positions for.
        damage: What could not be read, as far as it was looked at.
    """

    def __init__(
        self,
        folder: Path,
        lock: tuple[int, int | None] | None,
        children: Iterable[str],
        identity: tuple[int, int],
    ) -> None:
        """Use `create`, `adopt` or `look`.

        Args:
            folder: The folder.
            lock: The descriptors that hold its lock, None if nobody does.
            children: The names of the children that it keeps positions for.
            identity: What tells the folder from any other.
        """
        self.folder = folder
        self.children = sorted(children)
        self.damage: list[Damage] = []
        # The lock, and the folder's own where a folder can be locked: see `_locked`.
        self._lock: int | None = None
        self._guard: int | None = None
        if lock is not None:
            self._lock, self._guard = lock
        self._identity = identity
        # When the folder had changed, and what rights it had, as it was looked at last.
        self._seen: tuple[int, int] | None = None
        # Of what is written: the attributes that the streams were written with.
        self._written: dict[Stream, dict[str, Any]] = {}
        # Of what is read.
        self._streams: dict[str, Stream] = {}
        self._positions: dict[str, _Mapped] = {}
        self._segments: list[Segment] = []
        # The segment in use, where its next line goes, where it ends, and the streams that it has: their ids as text.
        self._map: mmap.mmap | None = None
        self._map_identity = identity
        self._end = self._room = 0
        self._current: dict[Stream, str] = {}
        self._spare: _Mapped | None = None
        # What is done with, for `tidy` to close and to take away.
        self._full: deque[tuple[_Mapped, Path, int]] = deque()
        self._freed: deque[Path] = deque()

    @classmethod
    def create(cls, component: Path, writer: str, children: Iterable[str]) -> Spool:
        """Make a folder for this process.

        Args:
            component: The folder of the log store.
            writer: The writer's name.
            children: The names of its children.

        Raises:
            OSError: The folder cannot be used: it cannot be written, or has no locks.
        """
        with PrivateFolder.make(component) as home:
            # It gets its name once it is locked, so that nobody takes it for a dead process's.
            hidden = f"{_HIDDEN}{writer}-{secrets.token_hex(4)}"
            try:
                with home.make_folder(hidden) as folder:
                    return cls._created(home, folder, writer, children)
            except BaseException:
                home.remove(hidden)
                raise

    @classmethod
    def _created(cls, home: PrivateFolder, folder: PrivateFolder, writer: str, children: Iterable[str]) -> Spool:
        lock = _locked(folder, is_new=True)
        if lock is None:
            raise OSError("its lock is held by somebody else")
        spool = cls(component_path := home.path / writer, lock, children, folder.identity)
        try:
            for child in spool.children:
                spool._positions[child] = _mapped_position(folder, f"{child}.settled", 0)
            # By this it is known which came first. The system's own times are milliseconds apart.
            now = time.time_ns()
            os.utime(lock[0], ns=(now, now))
            for number in count(2):
                if home.status(spool.folder.name) is None:
                    break
                # Whatever became of it, it is this process's no longer.
                spool.folder = component_path.with_name(f"{writer}-{number}")
            home.rename(folder.path.name, spool.folder.name)
        except BaseException:
            spool._close_all()
            raise
        return spool

    @classmethod
    def adopt(cls, folder: Path) -> Spool | None:
        """Take over a folder whose process is dead; None if it is alive, or somebody else was quicker.

        Raises:
            OSError: The folder cannot be read, or is not to be trusted.
        """
        with PrivateFolder.open(folder.parent) as home:
            try:
                with home.open_folder(folder.name) as opened:
                    return cls._adopted(home, opened)
            except OSError:
                if home.status(folder.name) is not None:
                    raise
                # Its process, or another one, is done with it.
                return None

    @classmethod
    def _adopted(cls, home: PrivateFolder, folder: PrivateFolder) -> Spool | None:
        lock = _locked(folder)
        if lock is None:
            return None
        try:
            # It may have been open before it was taken away.
            if _is_at(home, folder.path.name, folder.identity):
                return cls._found(folder, lock)
        except BaseException:
            _unlock(lock)
            raise
        _unlock(lock)
        return None

    @classmethod
    def look(cls, folder: Path) -> Spool:
        """Return a folder to be read alone, whether its process is dead or alive.

        Raises:
            OSError: The folder cannot be read, or is not to be trusted.
        """
        with PrivateFolder.open(folder.parent) as home, home.open_folder(folder.name) as opened:
            return cls._found(opened, None)

    @classmethod
    def _found(cls, folder: PrivateFolder, lock: tuple[int, int | None] | None) -> Spool:
        names = [name for name in folder.names() if name not in _NO_EVENTS]
        segments = [name for name in names if _SEGMENT.fullmatch(name)]
        positions = {name for name in names if _POSITION.fullmatch(name)}
        # Who only looks need not know of what is gone.
        noted = set(_noted_positions(folder, segments)) if lock is not None else set()
        spool = cls(folder.path, lock, [name.removesuffix(".settled") for name in positions | noted], folder.identity)
        for name, successor in zip_longest(segments, segments[1:]):
            last = int(Path(successor).stem) if successor else inf
            spool._segments.append(Segment(folder.path / name, int(Path(name).stem), last))
        for child in spool.children:
            name = f"{child}.settled"
            if _read_position(folder, name) is None:
                why = "damaged" if name in positions else "gone"
                spool.damage.append(Damage(folder.path / name, 0, 0, f"{why}, so all is delivered again"))
                if lock is not None:
                    spool.forget_position(child)
        for name in folder.names():
            if not (name in _NO_EVENTS or _SEGMENT.fullmatch(name) or _POSITION.fullmatch(name)):
                spool.damage.append(Damage(folder.path / name, 0, None, "it is no part of a spool"))
        return spool

    def _open(self) -> PrivateFolder:
        """Open the folder.

        Raises:
            OSError: It cannot be opened; or it is not there any more, though there may be another one.
        """
        folder = PrivateFolder.open(self.folder)
        try:
            if folder.identity != self._identity:
                raise FileNotFoundError(errno.ENOENT, "somebody has taken the folder away", str(self.folder))
        except BaseException:
            os.close(folder.fd)
            raise
        return folder

    @property
    def size(self) -> int:
        """How many bytes its segments take.

        Raises:
            OSError: The folder cannot be read.
        """
        with self._open() as folder:
            found = [folder.status(segment.path.name) for segment in self._segments]
        return sum(status.st_size for status in found if status)

    @property
    def last(self) -> float:
        """The number of its last event, -1 if it has none. Exact for what was written or scanned."""
        return max((segment.last for segment in self._segments), default=-1)

    # Writing

    @property
    def first(self) -> float:
        """The number from which on its events are there, as far as they are not settled; infinity if there is none."""
        return self._segments[0].first if self._segments else inf

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
        self._write(_stream_line(stream), number, room)
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
        header = self._header
        size = max(SEGMENT_BYTES, len(header) + size)
        # Attributes may be all that the one before has from this number on.
        first = max(first, self._segments[-1].first + 1) if self._segments else first
        path = self.folder / f"{_NUMBER.format(first)}.log"
        with self._open() as folder:
            # Once it is full it is no longer in memory.
            self._mend_segment_in_use(folder)
            new = self._taken_spare(folder, path.name, size)
            if new is None:
                if not room(size):
                    raise SpoolFullError("'spool_max_bytes' is reached")
                new = _mapped(folder, _NEW, size)
                if not room(0):
                    folder.unlink(_NEW)
                    raise SpoolFullError("'spool_max_bytes' is reached")
                _put(folder, _NEW, path.name)
        self._close_segment()
        new.memory[: len(header)] = header
        self._end, self._room = len(header), len(new.memory)
        self._map_identity = new.identity
        self._segments.append(Segment(path, first, first - 1))
        return new.memory

    @property
    def _header(self) -> bytes:
        return _line(orjson.dumps({"format": _FORMAT, "positions": [f"{child}.settled" for child in self.children]}))

    def _taken_spare(self, folder: PrivateFolder, name: str, size: int) -> _Mapped | None:
        """Give the spare segment its name, if it is there and large enough."""
        spare = self._spare
        if spare is None or len(spare.memory) < size:
            return None
        self._spare = None
        if not _is_at(folder, _SPARE, spare.identity):
            # Somebody has tidied up.
            spare.memory.close()
            return None
        _put(folder, _SPARE, name)
        return spare

    def _close_segment(self) -> None:
        if self._map is not None:
            self._full.append((_Mapped(self._map, self._map_identity), self._segments[-1].path, self._end))
            self._map = None
            self._current = {}

    @property
    def needs_spare(self) -> bool:
        """Whether there is no segment for when the one in use is full."""
        return self._spare is None and self._lock is not None

    @property
    def is_untidy(self) -> bool:
        """Whether `tidy` has something to do."""
        return bool(self._full or self._freed)

    def prepare(self) -> None:
        """Allocate the next segment. Without the lock: whoever is computing meanwhile makes each step of it long.

        Raises:
            OSError: There is no room on the disk, or the folder is gone.
        """
        with self._open() as folder:
            self._spare = _mapped(folder, _SPARE, SEGMENT_BYTES)
        if self._lock is None:
            # It was abandoned meanwhile.
            self._drop_spare()

    def _drop_spare(self) -> None:
        spare, self._spare = self._spare, None
        if spare is not None:
            spare.memory.close()
            with contextlib.suppress(OSError), self._open() as folder:
                folder.unlink(_SPARE)

    def tidy(self) -> None:
        """Close and take away what is done with. Without the lock, for the same reason."""
        if not self.is_untidy:
            return
        try:
            folder = self._open()
        except OSError:
            # What is closed takes no memory at least.
            with contextlib.suppress(IndexError):
                while True:
                    self._full.popleft()[0].memory.close()
            return
        with folder:
            with contextlib.suppress(IndexError):
                while True:
                    full, path, end = self._full.popleft()
                    full.memory.close()
                    with contextlib.suppress(OSError):
                        if _is_at(folder, path.name, full.identity):
                            _truncate(folder, path.name, end)
            with contextlib.suppress(IndexError):
                while True:
                    freed = self._freed.popleft()
                    with contextlib.suppress(OSError):
                        folder.unlink(freed.name)

    # What others do to it

    def standing(self) -> Standing:
        """Look whether the folder is still there, with all that belongs to it. Without the lock."""
        try:
            status = os.stat(self.folder, follow_symlinks=False)
        except (FileNotFoundError, NotADirectoryError):
            return Standing.GONE
        except OSError:
            # That says nothing about it.
            return Standing.IN_PLACE
        if identity_of(status) != self._identity:
            return Standing.GONE
        if (status.st_mtime_ns, status.st_mode) == self._seen:
            return Standing.IN_PLACE
        if _has_odd_rights(status):
            return Standing.CHANGED
        with contextlib.suppress(OSError):
            if not self._is_whole():
                return Standing.CHANGED
            if time.time() - status.st_mtime > _STEP_SECONDS:
                # Otherwise more may happen that has the same time.
                self._seen = status.st_mtime_ns, status.st_mode
        return Standing.IN_PLACE

    def _is_whole(self) -> bool:
        # What is made or taken away by this process meanwhile makes it look twice.
        own = [(f"{child}.settled", position.identity) for child, position in list(self._positions.items())]
        if (spare := self._spare) is not None:
            own.append((_SPARE, spare.identity))
        segments = [segment.path.name for segment in list(self._segments)]
        if self._map is not None and segments:
            own.append((segments[-1], self._map_identity))
        with self._open() as folder:
            there = set(folder.names())
            return (
                all(_is_at(folder, name, identity) for name, identity in own)
                and there.issuperset(segments)
                and self._holds_lock(folder)
            )

    def mend(self, waiting: Callable[[int, float], list[LogEvent]]) -> bool:
        """Make again what somebody has taken away of a living process's folder, as far as it is known.

        Args:
            waiting: Returns the events that are in memory, from one number to another.

        Returns:
            Whether the folder still belongs to this process.

        Raises:
            OSError: It cannot be mended now.
        """
        if _has_odd_rights(os.stat(self.folder, follow_symlinks=False)):
            if self._guard is not None and self._guard in _locks:
                os.fchmod(self._guard, 0o700)
            else:
                os.chmod(self.folder, 0o700)
        with self._open() as folder:
            if not self._holds_lock(folder) and not self._has_locked(folder):
                return False
            for child, position in list(self._positions.items()):
                if not _is_at(folder, f"{child}.settled", position.identity):
                    self._positions[child] = _mapped_position(folder, _NEW, self.settled(child))
                    _put(folder, _NEW, f"{child}.settled")
                    position.memory.close()
            if self._spare is not None and not _is_at(folder, _SPARE, self._spare.identity):
                self._drop_spare()
            self._mend_segments(folder, waiting)
        return True

    def _holds_lock(self, folder: PrivateFolder) -> bool:
        if self._lock is None or self._lock not in _locks:
            return False
        held = _locks[self._lock]
        try:
            return _is_at(folder, _LOCK, held) and identity_of(os.fstat(self._lock)) == held
        except OSError:
            return False

    def _has_locked(self, folder: PrivateFolder) -> bool:
        """Lock the folder again: its lock is gone. Whoever has locked it meanwhile has taken it over."""
        lost = self._lock, self._guard
        lock = _locked(folder, is_new=True)
        if lock is None:
            return False
        self._lock, self._guard = lock[0], lock[1] if lock[1] is not None else self._guard
        for descriptor in lost:
            if descriptor is not None and descriptor not in (self._lock, self._guard):
                _let_go(descriptor)
        return True

    def _mend_segments(self, folder: PrivateFolder, waiting: Callable[[int, float], list[LogEvent]]) -> None:
        self._mend_segment_in_use(folder)
        there = set(folder.names())
        for place, segment in reversed(list(enumerate(self._segments))):
            is_in_use = self._map is not None and segment is self._segments[-1]
            if not is_in_use and segment.path.name not in there:
                self._segments[place : place + 1] = self._written_again(folder, segment, waiting)

    def _mend_segment_in_use(self, folder: PrivateFolder) -> None:
        if self._map is None or _is_at(folder, self._segments[-1].path.name, self._map_identity):
            return
        new = _mapped(folder, _NEW, len(self._map))
        new.memory[: self._end] = self._map[: self._end]
        _put(folder, _NEW, self._segments[-1].path.name)
        self._map.close()
        self._map, self._map_identity = new

    def _written_again(
        self, folder: PrivateFolder, lost: Segment, waiting: Callable[[int, float], list[LogEvent]]
    ) -> list[Segment]:
        """Write a segment that is gone as far as its events are still in memory."""
        events = waiting(lost.first, lost.last)
        if not events:
            return []
        again = Segment(lost.path, lost.first, lost.last)
        lines = [self._header]
        for stream in dict.fromkeys(event.stream for event in events):
            lines.append(_stream_line(stream))
        for event in events:
            lines.append(_line(_encode(event, str(event.stream.id))))
            again.kinds[event.level, event.progress] += 1
        _make_way(folder, _NEW)
        with os.fdopen(folder.create_file(_NEW), "wb") as file:
            file.write(b"".join(lines))
        _put(folder, _NEW, lost.path.name)
        return [again]

    def in_use(self) -> list[LogEvent]:
        """Return the events of the segment in use, which is in memory, whatever became of its file."""
        if self._map is None:
            return []
        lines = io.BytesIO(self._map[: self._end])
        items = self._lines(lines, self._segments[-1], 0, is_scan=False)
        return [item for item, _ in items if isinstance(item, LogEvent)]

    # How far the children are

    def settled(self, child: str) -> int:
        """Return below which number everything is settled for the child.

        Raises:
            OSError: That cannot be known now.
        """
        if child in self._positions:
            return _position(self._positions[child].memory[:]) or 0
        with self._open() as folder:
            return _read_position(folder, f"{child}.settled") or 0

    def settle(self, child: str, before: float) -> None:
        """Note that everything below a number is settled for the child, and free what all are done with: see `tidy`.

        Raises:
            OSError: The folder is gone, or it cannot be noted.
        """
        noted = _encoded_position(int(before))
        if child in self._positions:
            if self._positions[child].memory[:] == noted:
                return
            self._positions[child].memory[:] = noted
        else:
            # A folder of somebody else's is one of many, and a mapping needs a file descriptor.
            name = f"{child}.settled"
            with self._open() as folder:
                is_there = folder.status(name) is not None
                with os.fdopen(
                    folder.open_file(name, os.O_WRONLY) if is_there else folder.create_file(name), "wb"
                ) as file:
                    file.write(noted)
        self._free()

    def forget_position(self, child: str) -> None:
        """Have the child get everything that is still there.

        Raises:
            OSError: It cannot be noted.
        """
        name = f"{child}.settled"
        with self._open() as folder:
            _mapped_position(folder, _NEW, 0).memory.close()
            _put(folder, _NEW, name)
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
                self._remove()
        self.abandon()
        return is_done

    def _remove(self) -> None:
        with PrivateFolder.open(self.folder.parent) as home:
            if _is_at(home, self.folder.name, self._identity):
                # Gone at once, so that nobody adopts half of it.
                hidden = f"{_HIDDEN}{self.folder.name}-{secrets.token_hex(4)}"
                home.rename(self.folder.name, hidden)
                home.remove(hidden)

    def abandon(self) -> None:
        """Let go of the folder as it is."""
        self._close_segment()
        self.tidy()
        self._drop_spare()
        self._close_all()

    def _close_all(self) -> None:
        for position in self._positions.values():
            position.memory.close()
        self._positions.clear()
        _unlock((self._lock, self._guard))
        self._lock = self._guard = None

    # Reading

    def scan(self) -> Iterator[LogEvent | Damage]:
        """Yield all there is, in order, and what cannot be read where it is met.

        For a folder that was found. Afterwards it is known what each segment has, and the streams have
        the attributes that they had last.

        Raises:
            OSError: The folder cannot be read now.
        """
        self._find_strays()
        last = -1
        for segment in list(self._segments):
            segment.last = segment.first - 1
            damage: Damage | None = None
            for item, _ in self._items(segment, 0, is_scan=True):
                if isinstance(item, Damage):
                    if damage is not None and _is_continued(damage, item):
                        length = (damage.length or 0) + (item.length or 0)
                        damage = damage._replace(length=length, lines=damage.lines + item.lines)
                        continue
                    if damage is not None:
                        self.damage.append(damage)
                        yield damage
                    damage = item
                    continue
                if damage is not None:
                    self.damage.append(damage)
                    yield damage
                    damage = None
                if item.number <= last:
                    # A Ctrl-C came in the middle of its writing, and it was written again.
                    continue
                last = segment.last = item.number
                segment.kinds[item.level, item.progress] += 1
                yield item
            if damage is not None:
                self.damage.append(damage)
                yield damage

    def set_aside(self) -> list[tuple[Damage, Path]]:
        """Move what could not be read out of the way.

        Returns:
            Each damage, and the file in which it is kept.
        """
        damages, self.damage = self.damage, []
        # What is not moved stays where it is, and is met again.
        targets = [damage.path for damage in damages]
        worth_keeping = [place for place, damage in enumerate(damages) if damage.length != 0]
        if worth_keeping:
            with contextlib.suppress(OSError), self._open() as folder, self._aside() as aside:
                for place in worth_keeping:
                    with contextlib.suppress(OSError):
                        targets[place] = aside.path / self._moved(folder, damages[place], aside)
        return list(zip(damages, targets, strict=True))

    def _moved(self, folder: PrivateFolder, damage: Damage, aside: PrivateFolder) -> str:
        if damage.length is not None:
            return _move_bytes(folder, damage, aside)
        name = _free_name(aside, f"{self.folder.name}-{damage.path.name}")
        folder.rename(damage.path.name, name, aside)
        self._segments = [segment for segment in self._segments if segment.path != damage.path]
        return name

    def _aside(self) -> PrivateFolder:
        with PrivateFolder.open(self.folder.parent) as home:
            if home.status(_DAMAGED) is None:
                with contextlib.suppress(FileExistsError):
                    return home.make_folder(_DAMAGED)
            return home.open_folder(_DAMAGED)

    def read(self, after: int, before: float) -> Iterator[LogEvent]:
        """Yield the events with numbers above `after` and below `before`, in order.

        Raises:
            OSError: The folder cannot be read now.
        """
        return Cursor(self).read(after, before)

    def _items(self, segment: Segment, offset: int, is_scan: bool = False) -> Iterator[tuple[LogEvent | Damage, int]]:
        """Yield what comes from an offset on, and where each ends. A segment that was given up has nothing."""
        try:
            folder = self._open()
        except FileNotFoundError:
            return
        with folder:
            try:
                descriptor = folder.open_file(segment.path.name, os.O_RDONLY)
            except FileNotFoundError:
                return
            except PermissionError as error:
                yield Damage(segment.path, 0, None, error.strerror or "unreadable"), 0
                return
        with os.fdopen(descriptor, "rb") as file:
            yield from self._lines(file, segment, offset, is_scan)

    def _find_strays(self) -> None:
        """Find the lines that do not fit in, so that as few as possible are left out.

        One number that is too high would hide all that come after it.
        """
        numbers, offsets, begins = self._numbers(lambda line: True)
        if all(one <= other for one, other in pairwise(numbers)):
            return
        # What is no event is no reason to leave one out.
        numbers, offsets, begins = self._numbers(self._is_event)
        fitting = _ascending(numbers)
        for segment, begin, end in zip(self._segments, begins, [*begins[1:], len(numbers)], strict=True):
            segment.strays = frozenset(offsets[place] for place in range(begin, end) if not fitting[place])

    def _numbers(self, counts: Callable[[bytes], bool]) -> tuple[array[int], array[int], list[int]]:
        """Return the numbers of all lines that count, where these begin in their segments, and each segment's first."""
        numbers, offsets = array("q"), array("q")
        begins = []
        for segment in self._segments:
            segment.strays = frozenset()
            begins.append(len(numbers))
            with (
                contextlib.suppress(OSError),
                self._open() as folder,
                os.fdopen(folder.open_file(segment.path.name, os.O_RDONLY), "rb") as file,
            ):
                _note_numbers(file, segment.first, numbers, offsets, counts)
        return numbers, offsets, begins

    def _is_event(self, line: bytes) -> bool:
        value = _decode(line)
        return isinstance(value, list) and _event(value, self._stream) is not None

    def _lines(
        self, file: BinaryIO, segment: Segment, offset: int, is_scan: bool
    ) -> Iterator[tuple[LogEvent | Damage, int]]:
        file.seek(offset)
        while True:
            if offset > SEGMENT_BYTES + LINE_BYTES:
                yield Damage(segment.path, offset, 0, "longer than the spool makes any file"), offset
                return
            try:
                zeros, line = _next_line(file)
            except OSError as error:
                if error.errno != errno.EIO:
                    raise
                yield Damage(segment.path, 0, None, error.strerror or "unreadable"), offset
                return
            begin, offset = offset, offset + zeros + len(line)
            if not line.endswith(b"\n"):
                line = line.rstrip(b"\0")
                if segment is self._segments[-1]:
                    # Its process was killed in the middle of writing it, so nobody was told that it is here.
                    return
            if not line:
                # What was made room for, and not written to.
                return
            if zeros:
                yield Damage(segment.path, begin, zeros, "zeros"), begin + zeros
            if line == b"\n":
                # What was here is set aside.
                continue
            item = self._item(_decode(line), segment, begin, is_scan)
            if isinstance(item, str):
                is_whole = item == _OTHER_VERSION
                place, length = (0, None) if is_whole else (begin + zeros, len(line))
                yield Damage(segment.path, place, length, item), offset
                if is_whole:
                    return
            elif item is not None:
                yield item, offset

    def _item(self, value: Any, segment: Segment, begin: int, is_scan: bool) -> LogEvent | str | None:
        """Return the event that a line has, None if it has none, and in words what is wrong with it if something is."""
        if isinstance(value, list):
            event = _event(value, self._stream)
            if event is None:
                return "damaged"
            return "out of order" if event.number < segment.first or begin in segment.strays else event
        if isinstance(value, dict):
            if "stream" in value:
                return None if self._has_learned(value, is_scan) else "damaged"
            if value.get("format") == _FORMAT:
                return None
            if begin == 0 and "format" in value:
                return _OTHER_VERSION
        return "damaged"

    def _has_learned(self, line: dict[str, Any], is_scan: bool) -> bool:
        """Take in what a line says of a stream, unless it says nothing of one."""
        name, store_id, attributes = line["stream"], line.get("artifact_store_id"), line.get("attributes")
        is_known = isinstance(name, str) and name in self._streams
        stream = self._stream(name)
        artifact_store_id = None if store_id is None else _uuid(store_id)
        if stream is None or (store_id is not None and artifact_store_id is None) or not isinstance(attributes, dict):
            return False
        # The attributes that were written last count, wherever reading begins.
        if is_scan or not is_known:
            stream.artifact_store_id = artifact_store_id
            stream.metadata = attributes
        return True

    def _stream(self, name: Any) -> Stream | None:
        """Return the stream of an id, None if it is none."""
        if not isinstance(name, str):
            return None
        stream = self._streams.get(name)
        if stream is None:
            id = _uuid(name)
            if id is not None:
                # The line with its attributes may be damaged, and backends find the events of a stream by this one.
                stream = self._streams.setdefault(name, Stream(id, {"zenml.log.id": str(id)}))
        return stream


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


def left_behind(component: Path) -> list[Path]:
    """Return the folders of a log store's processes, dead or alive, those first that were made first.

    Raises:
        OSError: The log store's folder cannot be read, or is not to be trusted.
    """
    try:
        home = PrivateFolder.open(component)
    except FileNotFoundError:
        return []
    found = []
    with home:
        for name in home.names():
            if _PROCESS.fullmatch(name) and (status := home.status(name)):
                if stat.S_ISDIR(status.st_mode) or stat.S_ISLNK(status.st_mode):
                    found.append((_age(home, name, status), component / name))
            elif (
                name.startswith(_HIDDEN)
                and (status := home.status(name))
                and time.time() - _age(home, name, status) > _ABANDONED_SECONDS
            ):
                _clear(home, name)
    return [folder for _, folder in sorted(found)]


def bytes_used(component: Path) -> int:
    """Return how many bytes the folders of a log store's processes take, which come and go meanwhile.

    Raises:
        OSError: That cannot be known now.
    """
    used = 0
    for name in _listed(component):
        # Not what is damaged and can no longer give way.
        if _PROCESS.fullmatch(name):
            folder = component / name
            for file in _listed(folder):
                with contextlib.suppress(OSError):
                    used += os.stat(folder / file, follow_symlinks=False).st_size
    return used


def _listed(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            # That says nothing about the folder.
            raise
        return []


def _clear(home: PrivateFolder, name: str) -> None:
    """Take away the folder of a process that died when it was made or taken away."""
    with contextlib.suppress(OSError), home.open_folder(name) as folder:
        lock = _locked(folder)
        if lock is not None:
            home.remove(name)
            _unlock(lock)


def is_alive(folder: Path) -> bool:
    """Say whether the process that the folder belongs to is alive.

    Raises:
        OSError: Its lock cannot be opened, or is not to be trusted.
    """
    with PrivateFolder.open(folder.parent) as home, home.open_folder(folder.name) as opened:
        lock = _locked(opened)
    if lock is not None:
        _unlock(lock)
    return lock is None


def damaged(component: Path) -> list[Path]:
    """Return the files in which what could not be read is kept."""
    with contextlib.suppress(OSError), PrivateFolder.open(component) as home, home.open_folder(_DAMAGED) as folder:
        return [folder.path / name for name in folder.names()]
    return []


def remove_damaged(component: Path, name: str) -> None:
    """Remove something that could not be read.

    Args:
        component: The folder of the log store.
        name: The name of what is to go.

    Raises:
        OSError: It cannot be removed.
    """
    with PrivateFolder.open(component) as home, home.open_folder(_DAMAGED) as folder:
        # Where a file should have been there may have been a folder.
        folder.remove(name)
        if not _is_folder(folder, name):
            folder.unlink(name)


def _age(home: PrivateFolder, name: str, status: os.stat_result) -> float:
    with contextlib.suppress(OSError):
        return os.stat(f"{name}/{_LOCK}", dir_fd=home.fd, follow_symlinks=False).st_mtime
    return status.st_mtime


def _has_odd_rights(status: os.stat_result) -> bool:
    """Say whether others can write in one's own folder, or one cannot use it oneself."""
    return bool(status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)) or status.st_mode & stat.S_IRWXU != stat.S_IRWXU


def _is_at(folder: PrivateFolder, name: str, identity: tuple[int, int]) -> bool:
    status = folder.status(name)
    return status is not None and identity_of(status) == identity


def _put(folder: PrivateFolder, name: str, to: str) -> None:
    """Give a file its name, in place of what has had it."""
    if _is_folder(folder, to):
        _make_way(folder, to)
    folder.rename(name, to)


def _make_way(folder: PrivateFolder, name: str) -> None:
    """Take away what has the name of one of the spool's own files."""
    if _is_folder(folder, name):
        # No part of a spool, so whoever takes the folder over sets it aside.
        folder.rename(name, f"{name}-{secrets.token_hex(4)}")
    else:
        folder.unlink(name)


def _is_folder(folder: PrivateFolder, name: str) -> bool:
    status = folder.status(name)
    return status is not None and stat.S_ISDIR(status.st_mode)


def _free_name(folder: PrivateFolder, name: str) -> str:
    """Return a name that nothing has in the folder."""
    names = (name if number == 1 else f"{name}-{number}" for number in count(1))
    return next(name for name in names if folder.status(name) is None)


def _mapped(folder: PrivateFolder, name: str, size: int) -> _Mapped:
    _make_way(folder, name)
    file = folder.create_file(name)
    try:
        _allocate(file, size)
        return _Mapped(mmap.mmap(file, size), identity_of(os.fstat(file)))
    except BaseException:
        folder.unlink(name)
        raise
    finally:
        os.close(file)


def _allocate(file: int, size: int) -> None:
    # A page of a sparse file that finds no room when it is written to would kill the process.
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file, 0, size)
            return
        except OSError as error:
            # Not every C library does by itself what the file system does not.
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
    written = 0
    while written < size:
        written += os.write(file, bytes(min(1 << 20, size - written)))


def _truncate(folder: PrivateFolder, name: str, size: int) -> None:
    file = folder.open_file(name, os.O_WRONLY)
    try:
        os.ftruncate(file, size)
    finally:
        os.close(file)


def _locked(folder: PrivateFolder, is_new: bool = False) -> tuple[int, int | None] | None:
    """Lock a folder; the lock dies with the process.

    Its lock is that of a file in it. Where the system can lock folders too, this one is locked besides, and that counts
    should somebody have deleted the file.

    Args:
        folder: The folder.
        is_new: Whether it is this process's own, even if its lock is gone.

    Returns:
        The descriptors that hold it, that of the file and that of the folder, if it can be locked; None if another
        process has it.

    Raises:
        OSError: It cannot be locked.
    """
    guard, is_guarded = _guarded(folder)
    owner = None
    try:
        try:
            owner = folder.open_file(_LOCK, os.O_RDWR)
        except (FileNotFoundError, PermissionError):
            if not is_new and is_guarded is False:
                return None
            if not is_new and is_guarded is None:
                raise
            if folder.status(_LOCK) is not None:
                # No part of a spool, so it is set aside.
                folder.rename(_LOCK, f"{_LOCK}-{secrets.token_hex(4)}")
            owner = folder.create_file(_LOCK)
        fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not _is_at(folder, _LOCK, identity_of(os.fstat(owner))):
            return None
        _locks[owner] = identity_of(os.fstat(owner))
        if guard is not None:
            _locks[guard] = folder.identity
        return owner, guard
    except (BlockingIOError, FileExistsError):
        return None
    finally:
        for descriptor in (owner, guard):
            if descriptor is not None and descriptor not in _locks:
                os.close(descriptor)


def _unlock(lock: tuple[int | None, int | None]) -> None:
    for descriptor in lock:
        if descriptor is not None:
            _let_go(descriptor)


def _guarded(folder: PrivateFolder) -> tuple[int | None, bool | None]:
    """Lock the folder itself; say whether that was possible, None if it is not for any."""
    guard = os.dup(folder.fd)
    try:
        fcntl.flock(guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(guard)
        return None, False
    except OSError:
        # NFS locks only what is open for writing.
        os.close(guard)
        return None, None
    return guard, True


def _move_bytes(folder: PrivateFolder, damage: Damage, aside: PrivateFolder) -> str:
    """Move what is damaged of a segment into a file of what could not be read, and return that file's name."""
    name = f"{folder.path.name}-{damage.path.name}"
    with os.fdopen(folder.open_file(damage.path.name, os.O_RDWR), "r+b") as file:
        file.seek(damage.offset)
        data = file.read(damage.length)
        try:
            descriptor = aside.open_file(name, os.O_WRONLY | os.O_APPEND)
        except (FileNotFoundError, PermissionError):
            name = _free_name(aside, name)
            descriptor = aside.create_file(name)
        with os.fdopen(descriptor, "ab") as kept:
            kept.write(data if data.endswith(b"\n") else data + b"\n")
        file.seek(damage.offset)
        file.write(b"\n" * len(data))
    return name


def _is_continued(damage: Damage, by: Damage) -> bool:
    """Say whether another damage is that of the next line."""
    if damage.path != by.path or damage.why != by.why or not damage.length or not by.length:
        return False
    return damage.offset + damage.length == by.offset


# A position has a checksum too: one that is cut or flipped must not hide what is not settled.


def _encoded_position(number: int) -> bytes:
    text = _NUMBER.format(number).encode()
    return b"%b %08x\n" % (text, zlib.crc32(text))


def _position(data: bytes) -> int | None:
    text = data[:20]
    if not text.isdigit() or data != _encoded_position(int(text)):
        return None
    return int(text) if int(text) <= _HIGHEST else None


def _read_position(folder: PrivateFolder, name: str) -> int | None:
    """Return what a position says, None if it is gone or says nothing that can be believed.

    Raises:
        OSError: It cannot be read now. Taken for no position it would have all delivered again.
    """
    try:
        with os.fdopen(folder.open_file(name, os.O_RDONLY), "rb") as file:
            return _position(file.read(_POSITION_BYTES + 1))
    except (FileNotFoundError, PermissionError):
        return None


def _mapped_position(folder: PrivateFolder, name: str, number: int) -> _Mapped:
    _make_way(folder, name)
    file = folder.create_file(name)
    try:
        os.write(file, _encoded_position(number))
        return _Mapped(mmap.mmap(file, _POSITION_BYTES), identity_of(os.fstat(file)))
    finally:
        os.close(file)


def _differs(written: dict[str, Any], metadata: dict[str, Any]) -> bool:
    try:
        return bool(written != metadata)
    except Exception:
        # An array, say, that cannot tell whether it equals another one.
        return orjson.dumps(plain_mapping(written)) != orjson.dumps(plain_mapping(metadata))


# Lines


def _line(payload: bytes) -> bytes:
    return b"%08x %b\n" % (zlib.crc32(payload), payload)


def _stream_line(stream: Stream) -> bytes:
    value = {
        "stream": str(stream.id),
        "artifact_store_id": str(stream.artifact_store_id) if stream.artifact_store_id else None,
        "attributes": stream.attributes,
    }
    return _line(orjson.dumps(value))


def _decode(line: bytes) -> Any:
    """Return a line's value, None if it is damaged."""
    try:
        payload = line[9:-1]
        if line[-1:] == b"\n" and int(line[:8], 16) == zlib.crc32(payload):
            return orjson.loads(payload)
    except ValueError:
        pass
    return None


_OTHER_VERSION = "another version has written it"
_HEADER_BYTES = 1 << 20
_PIECE_BYTES = 1 << 16
_HIGHEST = (1 << 62) - 1
"""The highest number that an event can have: its UUID has 62 bits for it."""
_NUMBERED = re.compile(rb'[0-9a-f]{8} \["[^"]*","[^"]*",([0-9]{1,20}),')


def _note_numbers(
    file: BinaryIO, first: int, numbers: array[int], offsets: array[int], counts: Callable[[bytes], bool]
) -> None:
    """Note the numbers of a segment's events, and where their lines begin, without a look at anything else."""
    offset = 0
    while offset <= SEGMENT_BYTES + LINE_BYTES:
        zeros, line = _next_line(file)
        if not line:
            return
        found = _NUMBERED.match(line)
        if found and first <= (number := int(found[1])) <= _HIGHEST and counts(line):
            numbers.append(number)
            offsets.append(offset)
        offset += zeros + len(line)


def _next_line(file: BinaryIO) -> tuple[int, bytes]:
    """Return how many zeros come next, and the line behind them; no line if there are no more, or too many zeros."""
    zeros = 0
    while zeros <= SEGMENT_BYTES:
        piece = file.readline(_PIECE_BYTES)
        line = piece.lstrip(b"\0")
        zeros += len(piece) - len(line)
        if line or not piece:
            is_whole = line.endswith(b"\n") or len(piece) < _PIECE_BYTES
            return zeros, line if is_whole else line + file.readline(LINE_BYTES - len(line))
    return zeros, b""


def _ascending(numbers: Sequence[int]) -> bytearray:
    """Return 1 for each number of the longest subsequence that never descends, 0 for the others."""
    # Of each length: the lowest number that such a subsequence ends with, and its place.
    ends: list[int] = []
    places: list[int] = []
    before = array("q")
    for place, number in enumerate(numbers):
        length = bisect_right(ends, number)
        before.append(places[length - 1] if length else -1)
        ends[length : length + 1] = [number]
        places[length : length + 1] = [place]
    fitting = bytearray(len(numbers))
    at = places[-1] if places else -1
    while at >= 0:
        fitting[at] = 1
        at = before[at]
    return fitting


def _noted_positions(folder: PrivateFolder, segments: Iterable[str]) -> list[str]:
    """Return the names of the files of positions that there have been, as the segments say."""
    for name in segments:
        with contextlib.suppress(OSError):
            with os.fdopen(folder.open_file(name, os.O_RDONLY), "rb") as file:
                header = _decode(file.readline(_HEADER_BYTES))
            if isinstance(header, dict) and isinstance(names := header.get("positions"), list):
                return [name for name in names if isinstance(name, str) and _POSITION.fullmatch(name)]
    return []


_EXCEPTION, _TRACE = LogEvent._fields.index("exception"), LogEvent._fields.index("trace")
_ATTRIBUTES, _METADATA = LogEvent._fields.index("attributes"), LogEvent._fields.index("metadata")
# What the fields before the exception are. `type`, since for Python a truth value is a number.
_TYPES = [str, str, int, int, int, int, str, str, str, str, int, str]


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


def _event(value: list[Any], stream_of: Callable[[str], Stream | None]) -> LogEvent | None:
    """Return the event that was written so, None if no event was."""
    if len(value) != len(LogEvent._fields) or [*map(type, value[:_EXCEPTION])] != _TYPES:
        return None
    _, writer, number, sequence, time_unix_nano, level, *_ = value
    *_, attributes, metadata, progress = value
    is_so = (
        _WRITER.fullmatch(writer)
        and 0 <= number <= _HIGHEST
        and 0 <= sequence <= _HIGHEST
        and all(_is_number(one, 64) for one in (time_unix_nano, level, value[_LINE]))
        and type(attributes) is dict
        and type(metadata) is dict
        and type(progress) is bool
    )
    stream = stream_of(value[0]) if is_so else None
    error, trace = value[_EXCEPTION], value[_TRACE]
    if stream is None or not _is_exception(error) or not _is_trace(trace):
        return None
    value[0] = stream
    if error is not None:
        value[_EXCEPTION] = ExceptionInfo(*error)
    if trace is not None:
        value[_TRACE] = TraceContext(int(trace[0], 16), int(trace[1], 16), trace[2])
    if attributes or metadata:
        # Nested no deeper than what was captured.
        value[_ATTRIBUTES], value[_METADATA] = plain_mapping(attributes), plain_mapping(metadata)
    return LogEvent._make(value)


_LINE = LogEvent._fields.index("line")
_HEX = re.compile(r"[0-9a-f]{1,32}"), re.compile(r"[0-9a-f]{1,16}")


def _is_number(value: int, bits: int) -> bool:
    return -(1 << bits - 1) <= value < 1 << bits - 1


def _is_exception(value: Any) -> bool:
    return value is None or (type(value) is list and [*map(type, value)] == [str, str, str])


def _is_trace(value: Any) -> bool:
    if value is None:
        return True
    if type(value) is not list or [*map(type, value)] != [str, str, int]:
        return False
    trace_id, span_id = _HEX
    return bool(trace_id.fullmatch(value[0]) and span_id.fullmatch(value[1])) and 0 <= value[2] < 256


def _uuid(text: Any) -> UUID | None:
    try:
        return UUID(text) if type(text) is str else None
    except ValueError:
        return None
