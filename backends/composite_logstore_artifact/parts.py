"""The bytes of a stream: the file or the objects that it consists of, read in ranges."""

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
"""In bytes. What goes on for longer without a newline is read as several lines: it must fit into memory."""
_AT_ONCE = 16


class Part(ABC):
    """One file or object, of as many bytes as there were when it was first looked at."""

    def __init__(self, name: str) -> None:
        """Open nothing yet.

        Args:
            name: Its name in the stream's folder; empty where the stream is a single file.
        """
        self.name = name
        self._fetched = (0, b"")

    @property
    @abstractmethod
    def size(self) -> int:
        """How many bytes it has."""

    @abstractmethod
    def _read(self, begin: int, end: int) -> bytes:
        """Read bytes that are there."""

    def read(self, begin: int, end: int) -> bytes:
        """Return the bytes from one place to another, fewer where it ends before.

        Raises:
            OSError: It cannot be read, or became shorter.
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
        """Read a range, to have it when it is asked for."""
        self._fetched = (begin, self.read(begin, end))

    def close(self) -> None:
        """Release what is open, and forget what was fetched."""
        self._fetched = (0, b"")


class _File(Part):
    """A file of whatever an artifact store keeps, opened when it is needed."""

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
    """An object of S3, GCS or Azure: one request reads one range, and nothing beyond it."""

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
    """What there is of one stream.

    Attributes:
        artifact_store: Where it is.
        uri: Its file or folder.
        is_folder: Whether it consists of objects in a folder.
        parts: The objects by their names, which is the order of arrival; or the one file.
    """

    artifact_store: BaseArtifactStore
    uri: str
    is_folder: bool
    parts: list[Part]


class ListingError(OSError):
    """What an artifact store lists is more than it can have, or makes no sense."""


def _in_time(filesystem: Any) -> dict[str, float]:
    """Return the argument that ends a request in time, if the filesystem knows it: asynchronous ones of `fsspec` do."""
    return {"timeout": Bounds.STORE_SECONDS} if getattr(filesystem, "async_impl", False) is True else {}


def open_archive(artifact_store: BaseArtifactStore, uri: str) -> Archive | None:
    """Return what there is of a stream now, None if there is nothing."""
    filesystem = getattr(artifact_store, "filesystem", None)
    parts: list[Part]
    if filesystem is not None:
        # One request has the names and the sizes of up to 1,000 objects. It must be made: these filesystems
        # remember what they have listed, and what was there a page ago is not what is there now.
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
    """Return all that is in some parts of an archive.

    Objects are read side by side, by the filesystem itself: at a process's end no thread pool would do so any
    more, and it would not end before a request that hangs.

    Raises:
        OSError: One cannot be read, or is not as large as it was.
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
    """Whole lines of a part, the last of which may lack its newline.

    Attributes:
        begin: Where they begin, in bytes.
        content: The lines.
    """

    begin: int
    content: bytes

    @property
    def end(self) -> int:
        """Where they end."""
        return self.begin + len(self.content)


def forward(part: Part, begin: int, end: int, size: int, largest: int) -> Iterator[Block]:
    """Yield the lines between two places, the first ones first.

    Args:
        part: Where they are.
        begin: Where to begin.
        end: Where to end.
        size: How many bytes to read first; then twice as many each time.
        largest: The most bytes to read at a time.
    """
    rest: list[bytes] = []  # the beginning of a line, from `begin` on
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
    """Yield the lines between two places, the last ones first. The arguments are those of `forward`."""
    rest: deque[bytes] = deque()  # the end of a line, up to `end`
    place = end
    while place > begin:
        content = part.read(max(begin, place - size), place)
        place -= len(content)
        size = min(2 * size, largest)
        # What comes before the first newline belongs to a line that begins further up.
        cut = content.find(b"\n") + 1 if place > begin else 0
        if place > begin and (cut == 0 or (cut == len(content) and not rest)):
            # No line begins here.
            if end - place < LONGEST_LINE:
                rest.appendleft(content)
                continue
            cut = 0
        whole = b"".join([content[cut:], *rest])
        rest = deque([content[:cut]] if cut else [])
        yield Block(place + cut, whole)
        end = place + cut


def fetched(parts: Iterable[Part], first: Callable[[Part], tuple[int, int]]) -> Generator[Part]:
    """Yield the parts when a range of each has been fetched, and fetch further ones meanwhile, more and more.

    A step that logs little writes many small objects, and each takes a request.

    Args:
        parts: The parts.
        first: Says which range of a part is wanted first.
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
