"""Rejected events on disk: kept beside the spool with the backend's reason, until somebody sends or purges them.

The folder `rejected` of a log store has files of lines (see `format`), each with the events of one child. All processes
of the log store append to the child's newest file, and begin another once it is full. A line is never moved: what was
sent again is overwritten by blanks, which needs no room on disk, and an empty file is removed. A kill leaves a
line as it was, so an event may be sent twice, and none is lost.

Two files are locked. `lock` is held for moments, while a file is changed; `manage.lock` is held by a process that sends
or purges events, so that no two of them work on the same ones. Processes that reject events wait for the first alone.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from math import inf
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

from composite_logstore.event import abridged
from composite_logstore.spool.format import (
    ABRIDGED_BYTES,
    LINE_BYTES,
    POSITION_BYTES,
    RejectedEvent,
    UnstorableEventError,
    decode_position,
    decode_rejected,
    encode_position,
    encode_rejected,
)
from composite_logstore.spool.lock import locked
from composite_logstore.spool.private_folder import PrivateFolder
from composite_logstore.spool.streams import Streams

_FOLDER = "rejected"
_LOCK, _MANAGE_LOCK = "lock", "manage.lock"
_FILE = re.compile(r"([a-z0-9_-]+)\.([0-9]{20})\.log")
_DISCARDED = ".discarded"
_FILE_BYTES = 1024 * 1024
_FILES = 16
"""A file has at most this fraction of all bytes, one in so many: the oldest file makes room as a whole."""
_LOCK_SECONDS = 5.0


class Kept(NamedTuple):
    """What has become of some rejected events.

    Attributes:
        number: How many of them are on disk.
        discarded: How many older ones had to make room.
        error: Why some of them are not on disk, None if all are.
    """

    number: int
    discarded: int
    error: Exception | None


class KeptLine(NamedTuple):
    """A line of a file of rejected events.

    Attributes:
        file: The name of the file.
        offset: Where in the file it begins.
        length: How many bytes it has.
        rejected: The event, None if the line is damaged.
    """

    file: str
    offset: int
    length: int
    rejected: RejectedEvent | None


class _File(NamedTuple):
    number: int
    name: str
    child: str
    size: int


class RejectedFolder:
    """The rejected events of one log store on this machine. It keeps nothing open between two calls."""

    def __init__(self, component: Path, max_bytes: int | None = None) -> None:
        """Touch nothing yet.

        Args:
            component: The folder of the log store.
            max_bytes: How many bytes there may be; without it no older events make room.
        """
        self.path = component / _FOLDER
        self._max_bytes = max_bytes

    # Keeping

    def keep(self, child: str, events: Iterable[RejectedEvent]) -> Kept:
        """Keep events that the backend of a child has rejected. Never raises."""
        lines, error = _encoded(events, self._max_bytes)
        written = discarded = 0
        try:
            with PrivateFolder.make(self.path.parent) as home, home.open_or_make_folder(_FOLDER) as folder:
                for piece in _pieces(lines, self._file_bytes):
                    # Other processes may append in between.
                    with locked(folder, _LOCK, _LOCK_SECONDS):
                        discarded += self._append(folder, child, piece)
                    written += len(piece)
        except Exception as raised:
            error = raised
        return Kept(written, discarded, error)

    @property
    def _file_bytes(self) -> int:
        return _FILE_BYTES if self._max_bytes is None else min(_FILE_BYTES, self._max_bytes // _FILES)

    def _append(self, folder: PrivateFolder, child: str, lines: Sequence[bytes]) -> int:
        """Append lines to the newest file of a child, or to a new one. Returns how many older ones made room."""
        data = b"".join(lines)
        files = _files(folder)
        discarded = self._make_room(folder, files, len(data))
        newest = max((file for file in files if file.child == child), default=None)
        number = max([time.time_ns(), *(file.number + 1 for file in files)])
        descriptor = None
        if newest is not None and newest.size + len(data) <= self._file_bytes:
            # A file that was exchanged is left as it is.
            with contextlib.suppress(OSError):
                descriptor = folder.open_file(newest.name, os.O_RDWR)
        if descriptor is None:
            descriptor = folder.create_file(f"{child}.{number:020d}.log")
        try:
            _write_at_end(descriptor, data)
        finally:
            os.close(descriptor)
        return discarded

    def _make_room(self, folder: PrivateFolder, files: list[_File], size: int) -> int:
        """Remove the oldest files, also from the list, until there is room for so many bytes."""
        discarded = 0
        most = inf if self._max_bytes is None else self._max_bytes
        while files and sum(file.size for file in files) + size > most:
            oldest = files.pop(0)
            lost = 0
            with contextlib.suppress(OSError):
                lost = sum(1 for _ in _lines(folder, oldest.name))
            folder.unlink(oldest.name)
            discarded += lost
            # The number is for people. Rejected events are kept without it, too.
            with contextlib.suppress(OSError):
                _write_number(folder, oldest.child + _DISCARDED, self._discarded(folder, oldest.child) + lost)
        return discarded

    # Reading

    def children(self) -> list[str]:
        """Return the names of the children with rejected events, or with discarded ones; none without the folder.

        Raises:
            OSError: The folder cannot be read, or is not to be trusted.
        """
        with self._opened() as folder:
            if folder is None:
                return []
            counted = {name.removesuffix(_DISCARDED) for name in folder.names() if name.endswith(_DISCARDED)}
            return sorted({file.child for file in _files(folder)} | counted)

    def read(self, child: str) -> Iterator[KeptLine]:
        """Yield the lines of a child that are there now, oldest first. Files may come and go meanwhile.

        Raises:
            OSError: The folder cannot be read, or is not to be trusted.
        """
        streams = Streams()
        for file in self._files_of(child):
            yield from self._read(file, streams)

    def _files_of(self, child: str) -> list[_File]:
        with self._opened() as folder:
            if folder is None:
                return []
            # Without the lock, another process could be in the middle of a line.
            with locked(folder, _LOCK, _LOCK_SECONDS):
                return [file for file in _files(folder) if file.child == child]

    def _read(self, file: _File, streams: Streams) -> Iterator[KeptLine]:
        with self._opened() as folder:
            found = list(_lines(folder, file.name)) if folder and folder.status(file.name) else []
        for offset, line in found:
            # Lines behind these were written later.
            if offset < file.size:
                yield KeptLine(file.name, offset, len(line), decode_rejected(line, streams))

    def size(self, child: str) -> int:
        """Return how many bytes the events of a child have on disk.

        Raises:
            OSError: The folder cannot be read, or is not to be trusted.
        """
        return sum(file.size for file in self._files_of(child))

    def discarded(self, child: str) -> int:
        """Return how many rejected events of a child had to make room for newer ones since the last purge.

        Raises:
            OSError: The folder cannot be read, or is not to be trusted.
        """
        with self._opened() as folder:
            return self._discarded(folder, child) if folder else 0

    def _discarded(self, folder: PrivateFolder, child: str) -> int:
        with contextlib.suppress(FileNotFoundError), os.fdopen(folder.open_file(child + _DISCARDED, 0), "rb") as file:
            return decode_position(file.read(POSITION_BYTES)) or 0
        return 0

    @contextlib.contextmanager
    def _opened(self) -> Iterator[PrivateFolder | None]:
        """Open the folder; None if it does not exist."""
        with contextlib.ExitStack() as stack:
            try:
                home = stack.enter_context(PrivateFolder.open(self.path.parent))
                folder = stack.enter_context(home.open_folder(_FOLDER))
            except FileNotFoundError:
                yield None
                return
            yield folder

    # Working on them

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Keep others from sending or purging the events meanwhile. More events may be rejected.

        Raises:
            BlockingIOError: Another process is at it.
            OSError: The folder cannot be read, or is not to be trusted.
        """
        with self._opened() as folder:
            if folder is None:
                yield
                return
            with locked(folder, _MANAGE_LOCK, 0):
                yield

    def remove(self, lines: Iterable[KeptLine]) -> None:
        """Remove lines, because their events were sent, or kept anew.

        Raises:
            OSError: They cannot be removed.
        """
        with self._opened() as folder:
            for name, found in groupby(sorted(lines, key=attrgetter("file")), attrgetter("file")):
                if folder is not None and folder.status(name) is not None:
                    with locked(folder, _LOCK, _LOCK_SECONDS):
                        _remove(folder, name, found)

    def purge(self, child: str) -> None:
        """Remove all events of a child, damaged lines too, and forget how many were discarded.

        Raises:
            OSError: They cannot be removed.
        """
        with self._opened() as folder:
            if folder is None:
                return
            with locked(folder, _LOCK, _LOCK_SECONDS):
                for file in _files(folder):
                    if file.child == child:
                        folder.unlink(file.name)
                folder.unlink(child + _DISCARDED)


def _encoded(events: Iterable[RejectedEvent], most: int | None) -> tuple[list[bytes], Exception | None]:
    """Return events as lines, and the error of one that cannot be a line, or needs more bytes than there may be."""
    lines: list[bytes] = []
    error: Exception | None = None
    for one in events:
        try:
            line = encode_rejected(one)
            if len(line) > LINE_BYTES:
                line = encode_rejected(one._replace(event=abridged(one.event, ABRIDGED_BYTES)))
        except UnstorableEventError as raised:
            error = raised
            continue
        if most is not None and len(line) > most:
            error = OSError(errno.EFBIG, "an event is larger than 'rejected_max_bytes'")
            continue
        lines.append(line)
    return lines, error


def _pieces(lines: Sequence[bytes], most: int) -> Iterator[list[bytes]]:
    """Yield lines in pieces of at most so many bytes; a longer line is a piece by itself."""
    piece: list[bytes] = []
    size = 0
    for line in lines:
        if piece and size + len(line) > most:
            yield piece
            piece, size = [], 0
        piece.append(line)
        size += len(line)
    if piece:
        yield piece


def _files(folder: PrivateFolder) -> list[_File]:
    """Return the files of rejected events, oldest first."""
    files = []
    for name in folder.names():
        match, status = _FILE.fullmatch(name), folder.status(name)
        if match and status and stat.S_ISREG(status.st_mode):
            files.append(_File(int(match[2]), name, match[1], status.st_size))
    return sorted(files)


def _lines(folder: PrivateFolder, name: str) -> Iterator[tuple[int, bytes]]:
    """Yield the lines of a file that were not removed, each with where it begins."""
    with os.fdopen(folder.open_file(name, os.O_RDONLY), "rb") as file:
        offset = 0
        while line := file.readline(LINE_BYTES):
            if not line.isspace():
                yield offset, line
            offset += len(line)


def _write_at_end(descriptor: int, data: bytes) -> None:
    """Append lines, all of them or none. A line that a killed process has not finished is ended first.

    Raises:
        OSError: They cannot be written.
    """
    end = os.lseek(descriptor, 0, os.SEEK_END)
    if end and os.pread(descriptor, 1, end - 1) != b"\n":
        data = b"\n" + data
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
    except BaseException:
        with contextlib.suppress(OSError):
            os.ftruncate(descriptor, end)
        raise


def _write_number(folder: PrivateFolder, name: str, number: int) -> None:
    try:
        descriptor = folder.open_file(name, os.O_RDWR)
    except FileNotFoundError:
        descriptor = folder.create_file(name)
    try:
        os.pwrite(descriptor, encode_position(number), 0)
    finally:
        os.close(descriptor)


def _remove(folder: PrivateFolder, name: str, lines: Iterable[KeptLine]) -> None:
    """Overwrite lines of a file with blanks, and remove the file if it has no others."""
    descriptor = folder.open_file(name, os.O_RDWR)
    try:
        for line in lines:
            os.pwrite(descriptor, b" " * (line.length - 1) + b"\n", line.offset)
    finally:
        os.close(descriptor)
    if next(_lines(folder, name), None) is None:
        folder.unlink(name)
