"""The index of a local archive: a small file beside it, `<stream>.index`, that summarizes its lines.

An exporter adds a summary of the lines that it writes, and a reader one of those that it had to summarize itself. So a
filter by time or level can skip lines. Each line of the index is checked by itself and against the archive: a line
that is torn, corrupt, malformed, or about another file is ignored.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import orjson

from composite_logstore import Bounds
from composite_logstore_artifact.lines import Summary

if TYPE_CHECKING:
    from zenml.artifact_stores import BaseArtifactStore

HEAD = 64
"""How many bytes at the beginning of a chunk its checksum covers. A line begins with its time, so they identify it."""


class Chunk(NamedTuple):
    """Consecutive whole lines of the archive.

    Attributes:
        begin: Where they begin, in bytes.
        end: Where they end, after the last newline.
        check: The checksum of their first `HEAD` bytes.
        summary: Their summary.
    """

    begin: int
    end: int
    check: int
    summary: Summary

    @classmethod
    def of(cls, begin: int, content: bytes, summary: Summary) -> Chunk:
        """Describe whole lines."""
        return cls(begin, begin + len(content), zlib.crc32(content[:HEAD]), summary)


def index_uri(uri: str) -> str:
    """Return the index's place: beside the stream's file, since ZenML reads every file in a stream's folder."""
    return uri + ".index"


def add(artifact_store: BaseArtifactStore, uri: str, chunk: Chunk) -> None:
    """Add a chunk to a stream's index. Errors are ignored: an archive is complete without an index."""
    values = orjson.dumps([chunk.begin, chunk.end, chunk.check, *chunk.summary])
    line = b"%s %08x\n" % (values, zlib.crc32(values))
    try:
        with artifact_store.open(index_uri(uri), "a+b") as file:
            # A process that was killed while writing leaves half a line.
            if file.seek(0, io.SEEK_END) > 0:
                file.seek(-1, io.SEEK_END)
                if file.read(1) != b"\n":
                    line = b"\n" + line
            file.write(line)
    except OSError:
        pass


def load(artifact_store: BaseArtifactStore, uri: str, read: Callable[[int, int], bytes]) -> list[Chunk]:
    """Return the chunks of a stream's index that match its file, in the order of their places.

    Args:
        artifact_store: The artifact store.
        uri: The stream's file.
        read: Reads the file from one offset to another, or to its end.
    """
    try:
        with artifact_store.open(index_uri(uri), "rb") as file:
            # If the index is larger than it may be, its beginning is enough: unknown lines are read.
            lines = file.read(Bounds.INDEX_BYTES).split(b"\n")
    except OSError:
        return []
    chunks: list[Chunk] = []
    for chunk in sorted(_parse(lines)):
        if (not chunks or chunk.begin >= chunks[-1].end) and _is_there(chunk, read):
            chunks.append(chunk)
    return chunks


def _is_there(chunk: Chunk, read: Callable[[int, int], bytes]) -> bool:
    head = read(max(0, chunk.begin - 1), min(chunk.begin + HEAD, chunk.end))
    if chunk.begin > 0:
        before, head = head[:1], head[1:]
        if before != b"\n":
            return False
    return zlib.crc32(head) == chunk.check and read(chunk.end - 1, chunk.end) == b"\n"


def _parse(lines: list[bytes]) -> Iterator[Chunk]:
    for line in lines:
        values, _, checksum = line.rpartition(b" ")
        if checksum != b"%08x" % zlib.crc32(values):
            continue
        try:
            numbers = orjson.loads(values)
        except ValueError:
            continue
        if not isinstance(numbers, list) or len(numbers) != 6 or not all(type(number) is int for number in numbers):
            continue
        begin, end, check, *summary = numbers
        if 0 <= begin < end:
            yield Chunk(begin, end, check, Summary(*summary))
