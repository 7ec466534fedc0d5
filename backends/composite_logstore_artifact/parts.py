"""Reads the bytes of a stream in ranges, from one file or from many objects."""

from __future__ import annotations

import io
import os
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from itertools import islice
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from composite_logstore import Bounds

if TYPE_CHECKING:
    from zenml.artifact_stores import BaseArtifactStore

LONGEST_LINE = 64 * 1024 * 1024
"""In bytes. A longer line is read as several lines, since a line must fit into memory."""
_AT_ONCE = 16


class Part(ABC):
    """One file or object of a stream. Its size is the one that it had when it was opened."""

    def __init__(self, name: str) -> None:
        """Prepare; nothing is opened yet.

        Args:
            name: The name in the stream's folder; empty if the stream is a single file.
        """
        self.name = name
        self._fetched = (0, b"")

    @property
    @abstractmethod
    def size(self) -> int:
        """The size in bytes."""

    @abstractmethod
    def _read(self, begin: int, end: int) -> bytes:
        """Read bytes within the size."""

    def read(self, begin: int, end: int) -> bytes:
        """Return the bytes from one offset to another, or to the end.

        Raises:
            OSError: The part cannot be read, or became shorter.
        """
        end = min(end, self.size)
        if begin >= end:
            return b""
        fetched_from, fetched = self._fetched
        if fetched_from <= begin and end <= fetched_from + len(fetched):
            return fetched[begin - fetched_from : end - fetched_from]
        content = self._read(begin, end)
        if len(content) != end - begin:
            raise OSError("it is not as large as it was")
        return content

    def fetch(self, begin: int, end: int) -> None:
        """Read a range ahead, for a later `read`."""
        self._fetched = (begin, self.read(begin, end))

    def close(self) -> None:
        """Close the file, and forget the range that was read ahead."""
        self._fetched = (0, b"")


class _File(Part):
    """A file that an artifact store opens, on first use."""

    def __init__(self, artifact_store: BaseArtifactStore, uri: str, name: str) -> None:
        super().__init__(name)
        self._artifact_store = artifact_store
        self._uri = uri
        self._file: IO[bytes] | None = None
        self._size: int | None = None

    @property
    def size(self) -> int:
        if self._size is None:
            self._size = self._open().seek(0, io.SEEK_END)
        return self._size

    def _open(self) -> IO[bytes]:
        if self._file is None:
            self._file = self._artifact_store.open(self._uri, "rb")
        return self._file

    def _read(self, begin: int, end: int) -> bytes:
        file = self._open()
        file.seek(begin)
        return file.read(end - begin)

    def close(self) -> None:
        super().close()
        if self._file is not None:
            self._file.close()
            self._file = None


class _Object(Part):
    """An object of S3, GCS or Azure: one request reads exactly one range."""

    def __init__(self, filesystem: Any, path: str, name: str, size: int) -> None:
        super().__init__(name)
        self._filesystem = filesystem
        self.path = path
        self._size = size

    @property
    def size(self) -> int:
        return self._size

    def _read(self, begin: int, end: int) -> bytes:
        content: bytes = self._filesystem.cat_file(self.path, start=begin, end=end, **_in_time(self._filesystem))
        return content


class Archive(NamedTuple):
    """The archive of one stream.

    Attributes:
        artifact_store: The artifact store.
        uri: The stream's file or folder.
        is_folder: Whether the stream is a folder of objects.
        parts: The objects, sorted by name, which is the order of arrival; or the one file.
    """

    artifact_store: BaseArtifactStore
    uri: str
    is_folder: bool
    parts: list[Part]


class ListingError(OSError):
    """The listing of an artifact store has too many objects, or makes no sense."""


def _in_time(filesystem: Any) -> dict[str, float]:
    """Return the argument that bounds a request's time, for the asynchronous filesystems of `fsspec`, which know it."""
    return {"timeout": Bounds.STORE_SECONDS} if getattr(filesystem, "async_impl", False) is True else {}


def open_archive(artifact_store: BaseArtifactStore, uri: str) -> Archive | None:
    """List a stream, and return its archive; None if the stream has no file and no objects."""
    filesystem = getattr(artifact_store, "filesystem", None)
    parts: list[Part]
    if filesystem is not None:
        # One request returns the names and sizes of up to 1,000 objects. These filesystems cache listings, and objects
        # may have been added since the last page, so the cache is dropped.
        path = filesystem._strip_protocol(uri)
        filesystem.invalidate_cache(path)
        try:
            found = filesystem.ls(path, detail=True, **_in_time(filesystem))
        except FileNotFoundError:
            return None
        files = {info["name"]: info["size"] for info in found if info["type"] == "file"}
        if len(files) > Bounds.OBJECTS or not all(isinstance(size, int) and size >= 0 for size in files.values()):
            raise ListingError
        if list(files) == [path]:
            return Archive(artifact_store, uri, False, [_Object(filesystem, path, "", files[path])])
        parts = [_Object(filesystem, path, os.path.basename(path), size) for path, size in sorted(files.items())]
    elif artifact_store.isdir(uri):
        names = sorted(os.fsdecode(name) for name in artifact_store.listdir(uri))
        parts = [_File(artifact_store, os.path.join(uri, name), name) for name in names]
    elif artifact_store.exists(uri):
        return Archive(artifact_store, uri, False, [_File(artifact_store, uri, "")])
    else:
        return None
    return Archive(artifact_store, uri, True, [part for part in parts if part.name]) if parts else None


def contents_of(archive: Archive, parts: Sequence[Part]) -> list[bytes]:
    """Return the contents of some parts of an archive.

    The filesystem itself reads objects side by side. A thread pool would not start at a process's end, and would wait
    for a request that hangs.

    Raises:
        OSError: A part cannot be read, or changed its size.
    """
    objects = [part for part in parts if isinstance(part, _Object)]
    if len(objects) == len(parts):
        paths, sizes = [part.path for part in objects], [part.size for part in objects]
        filesystem = archive.artifact_store.filesystem  # type: ignore[attr-defined]
        contents: list[bytes] = filesystem.cat_ranges(
            paths, [0] * len(paths), sizes, on_error="raise", **_in_time(filesystem)
        )
        if list(map(len, contents)) != sizes:
            raise OSError("it is not as large as it was")
        return contents
    contents = []
    for part in parts:
        with closing(part):
            contents.append(part.read(0, part.size))
    return contents


class Block(NamedTuple):
    """Consecutive whole lines of a part. The last line of a part may have no newline.

    Attributes:
        begin: The offset of the first line, in bytes.
        content: The lines.
    """

    begin: int
    content: bytes

    @property
    def end(self) -> int:
        """The offset after the last line."""
        return self.begin + len(self.content)


def forward(part: Part, begin: int, end: int, size: int, largest: int) -> Iterator[Block]:
    """Yield the lines between two offsets, block by block, the first block first.

    Args:
        part: The part.
        begin: The offset to begin at.
        end: The offset to end at.
        size: How many bytes to read first; then twice as many each time.
        largest: The most bytes to read at a time.
    """
    rest: list[bytes] = []  # The beginning of an unfinished line, from `begin` on.
    place = begin
    while place < end:
        content = part.read(place, min(place + size, end))
        place += len(content)
        size = min(2 * size, largest)
        cut = content.rfind(b"\n") + 1
        if cut == 0 and place - begin < LONGEST_LINE:
            rest.append(content)
            continue
        whole = b"".join([*rest, content[: cut or len(content)]])
        rest = [content[cut:]] if cut else []
        yield Block(begin, whole)
        begin += len(whole)
    if begin < place:
        yield Block(begin, b"".join(rest))


def backward(part: Part, begin: int, end: int, size: int, largest: int) -> Iterator[Block]:
    """Yield the lines between two offsets, block by block, the last block first; see `forward` for the arguments."""
    rest: deque[bytes] = deque()  # The end of a line whose beginning was not read yet, up to `end`.
    place = end
    while place > begin:
        content = part.read(max(begin, place - size), place)
        place -= len(content)
        size = min(2 * size, largest)
        # The bytes before the first newline belong to a line that begins earlier.
        cut = content.find(b"\n") + 1 if place > begin else 0
        if place > begin and (cut == 0 or (cut == len(content) and not rest)):
            # No line begins in these bytes.
            if end - place < LONGEST_LINE:
                rest.appendleft(content)
                continue
            cut = 0
        whole = b"".join([content[cut:], *rest])
        rest = deque([content[:cut]] if cut else [])
        yield Block(place + cut, whole)
        end = place + cut


def fetched(parts: Iterable[Part], first: Callable[[Part], tuple[int, int]]) -> Generator[Part]:
    """Yield the parts, each with a range read ahead, while threads read ahead ranges of the next parts.

    A step that logs little writes many small objects, and each takes a request. So the number of parts that are read
    ahead grows.

    Args:
        parts: The parts.
        first: Returns the range of a part to read ahead.
    """

    def fetch(part: Part) -> Part:
        part.fetch(*first(part))
        return part

    remaining = iter(parts)
    pending: deque[Future[Part]] = deque()
    at_once = 1
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        try:
            while True:
                pending.extend(pool.submit(fetch, part) for part in islice(remaining, at_once - len(pending)))
                if not pending:
                    return
                yield pending.popleft().result()
                at_once = min(2 * at_once, _AT_ONCE)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            for future in pending:
                if not future.cancelled() and future.exception() is None:
                    future.result().close()
