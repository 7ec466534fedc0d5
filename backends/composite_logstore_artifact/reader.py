"""The reader: reads pages of an archive from either end, by seeking."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from zenml.exceptions import DoesNotExistException, IllegalOperationError
from zenml.log_stores.artifact.artifact_log_store import prepare_logs_uri
from zenml.models import LogsResponse

from composite_logstore import LogEvent, Page, PageRequest, ReadEntry, Scanned, Stream
from composite_logstore.zenml import LogEntry, LogsEntriesFilter, LogStoreError, LogStoreUnavailableError
from composite_logstore_artifact import artifact_stores, lines, scanning
from composite_logstore_artifact.artifact_stores import (
    ArtifactStoreNotFoundError,
    ArtifactStoreNotUsableError,
    is_where_it_was,
)
from composite_logstore_artifact.errors import read_error
from composite_logstore_artifact.filtering import LineFilter
from composite_logstore_artifact.index import Chunk, add, load
from composite_logstore_artifact.lines import Summary, find_event, is_complete, summarize_lines
from composite_logstore_artifact.objects import ObjectName, superseded
from composite_logstore_artifact.parts import Archive, Block, Part, backward, fetched, forward, open_archive

if TYPE_CHECKING:
    from zenml.artifact_stores import BaseArtifactStore

# How many bytes to read at a time: as many as a page usually takes, then twice as many each time.
_USUAL_LINE = 512
_FIRST_BLOCK = 64 * 1024
_LARGEST_BLOCK = 8 * 1024 * 1024
# A search is fastest on a block that fits into a processor's cache.
_SEARCHED_BLOCK = 1024 * 1024
# The most bytes that one page reads: a search that finds nothing must not take minutes.
_MOST_BYTES = 128 * 1024 * 1024
# A scan reads so many usual lines at a time, which fit into a processor's cache.
_SCANNED_LINES = 2 * _SEARCHED_BLOCK // _USUAL_LINE
_OFFSET = re.compile(r"\d{1,19}", re.ASCII)
# A block with fewer bytes is not worth a line in the index.
_WORTH_KNOWING = 64 * 1024


class ArtifactReader:
    """Reads the streams that `ArtifactExporter` and ZenML's own log store have written.

    A token is `<name of the object>:<offset in bytes>`, with an empty name where the stream is a single file. Nothing
    is inserted before a position that was read, so tokens stay valid while the stream grows. They stay valid when
    objects are merged, too: the name of the merged object says which objects are in it. Only where clocks disagree or
    go back, an object may sort before a token. A reader then sees it only if it begins anew.
    """

    max_page_size = 50_000
    in_order = True
    scan_format: ClassVar[str] = lines.SCAN_FORMAT

    def __init__(
        self,
        artifact_store: str | None = None,
        find: Callable[[LogsResponse], BaseArtifactStore] | None = None,
        is_in_progress: Callable[[LogsResponse], bool] = artifact_stores.is_in_progress,
    ) -> None:
        """Prepare; nothing is looked up or opened.

        Args:
            artifact_store: The name or ID of the artifact store. None: the one of each run's own stack.
            find: Finds the artifact store of a stream; replaces `artifact_store`.
            is_in_progress: Returns whether the run of a stream is known to be in progress.
        """
        self._is_configured = artifact_store is not None and find is None
        if find is not None:
            self._find = find
        elif artifact_store is not None:
            self._find = lambda logs: artifact_stores.find_named(artifact_store)
        else:
            self._find = artifact_stores.find_for_logs
        self._is_in_progress = is_in_progress

    def read(self, request: PageRequest) -> Page:
        """Read one page.

        Raises:
            ValueError: The token cannot be used.
            LogStoreUnavailableError: The artifact store cannot be reached or refuses access.
            LogStoreError: The artifact store cannot be used on this machine.
            DoesNotExistException: The archive does not have the stream, or its artifact store no longer exists.
        """
        start = _Position.parse(request.token)
        artifact_store = self._artifact_store_of(request.logs)
        with _in_words(artifact_store):
            for attempts_left in (2, 1, 0):
                archive = self._open(artifact_store, request.logs, may_be_silent=True)
                if archive is None:
                    break
                try:
                    return _read_page(archive, start, request)
                except FileNotFoundError:
                    # Objects were merged after they were listed.
                    if not attempts_left:
                        raise
        return Page()

    def scan(self, logs: LogsResponse, token: str | None = None) -> Iterator[Scanned]:
        """Read a whole stream, with its lines undecoded.

        Args:
            logs: The stream.
            token: The token at which an earlier scan, or a page towards newer entries, ended.

        Raises:
            Exception: As `read` does.
        """
        start = _Position.parse(token)
        artifact_store = self._artifact_store_of(logs)
        attempts_left = 2
        with _in_words(artifact_store):
            while (archive := self._open(artifact_store, logs)) is not None:
                try:
                    for scanned in _scan(archive, start):
                        yield scanned
                        if scanned.token is not None:
                            start, attempts_left = _Position.parse(scanned.token), 2
                    return
                except FileNotFoundError:
                    # Objects were merged after they were listed. The scan continues at the last token.
                    if not attempts_left:
                        raise
                    attempts_left -= 1

    def event_of(self, content: bytes, stream: Stream) -> LogEvent | None:
        """Return the event of a line; None if another program wrote the line."""
        return lines.event_of(content, stream)

    def shown_of(self, content: bytes) -> tuple[Any, ...] | None:
        """Return what every reader shows of a line's event; None if that takes more than a look at the line."""
        return lines.shown_of(content)

    def entry_of(self, content: bytes) -> LogEntry | None:
        """Return a line as an entry, whichever program wrote it."""
        return lines.entry_of(content)

    def _open(
        self, artifact_store: BaseArtifactStore, logs: LogsResponse, may_be_silent: bool = False
    ) -> Archive | None:
        """Return the archive of a stream; None if nothing was written yet.

        Args:
            artifact_store: The artifact store.
            logs: The stream.
            may_be_silent: Whether to return None, too, if the archive is where it was and so nothing was logged.
        """
        archive = open_archive(artifact_store, prepare_logs_uri(artifact_store, logs.id))
        if archive is None and not (
            self._is_in_progress(logs) or (may_be_silent and is_where_it_was(logs, artifact_store))
        ):
            raise DoesNotExistException(
                f"Nothing was found for these logs in artifact store '{artifact_store.name}'. Perhaps nothing was "
                f"logged. If the stack's artifact store was exchanged since, set 'artifact_store' of this child to the "
                f"old one."
            )
        return archive

    def close(self) -> None:
        """Do nothing: artifact stores are shared with the active stack, and between requests on ZenML's server."""

    def _artifact_store_of(self, logs: LogsResponse) -> BaseArtifactStore:
        try:
            return self._find(logs)
        except ArtifactStoreNotUsableError as error:
            raise LogStoreUnavailableError(f"These logs cannot be read: {error}.") from error
        except ArtifactStoreNotFoundError as error:
            if self._is_configured:
                raise LogStoreUnavailableError(f"'artifact_store' of this child: {error}.") from error
            raise DoesNotExistException(
                f"The artifact store of these logs is not known: {error}. If it still exists, set "
                f"'artifact_store' of this child to it."
            ) from error


@contextmanager
def _in_words(artifact_store: BaseArtifactStore) -> Iterator[None]:
    """Translate errors into those of the read port."""
    try:
        yield
    except IllegalOperationError as error:
        # ZenML's server does not read its own disk, unless it is configured to.
        raise LogStoreError(
            f"Artifact store '{artifact_store.name}' is on the disk of the machine that wrote it, which the "
            f"ZenML server does not read. Fetch these logs there, or use a remote artifact store."
        ) from error
    except Exception as error:
        translated = read_error(error, artifact_store)
        if translated is None:
            raise
        raise translated from error


class _Position(NamedTuple):
    """A position between two bytes of a stream: the object, and the offset in it."""

    name: str
    offset: int

    @classmethod
    def parse(cls, token: str | None) -> _Position | None:
        if token is None:
            return None
        name, colon, offset = token.rpartition(":")
        if not colon or not _OFFSET.fullmatch(offset):
            raise ValueError("The token is malformed: pass on what an earlier page returned.")
        return cls(name, int(offset))

    def __str__(self) -> str:
        return f"{self.name}:{self.offset}"


def _located(start: _Position, archive: Archive) -> _Position:
    """Return where a position is now: its object may have been merged into another."""
    name = ObjectName.parse(start.name)
    if name is None or start.name in {part.name for part in archive.parts}:
        return start
    offset = start.offset
    for part in archive.parts:
        into = ObjectName.parse(part.name)
        if into is not None and name.has_merged(into):
            # The merged object turned out incomplete and was removed; the objects that it was made of remain.
            if offset <= part.size:
                return _Position(part.name, offset)
            offset -= part.size
        if into is None or into.size != part.size or not into.has_merged(name):
            continue
        with closing(part):
            for block in forward(part, 0, part.size, _LARGEST_BLOCK, _LARGEST_BLOCK):
                begin = find_event(block.content, name.writer, name.first)
                if begin is not None:
                    return _Position(part.name, block.begin + begin + start.offset)
    return start


def _without_merged(archive: Archive, start: _Position | None) -> tuple[Archive, _Position | None]:
    """Return a stream without objects that were merged but not yet removed, and where a position is in it.

    Raises:
        ValueError: The stream does not have the position.
    """
    if start is not None and bool(start.name) != archive.is_folder:
        raise ValueError("The token is not one of this stream: pass on what an earlier page returned.")
    if archive.is_folder:
        if start is not None and not _is_of(archive, start.name):
            raise ValueError("The token names an object that is not there. Begin anew without a cursor.")
        copies = superseded(archive.parts)
        archive = archive._replace(parts=[part for part in archive.parts if part.name not in copies])
        start = _located(start, archive) if start is not None else None
    return archive, start


def _is_of(archive: Archive, name: str) -> bool:
    """Return whether the stream has, or may have had, an object of that name: merged objects are removed."""
    return ObjectName.parse(name) is not None or any(part.name == name for part in archive.parts)


def _read_page(archive: Archive, start: _Position | None, request: PageRequest) -> Page:
    archive, start = _without_merged(archive, start)
    towards_newer = request.direction == "newer"
    limit = min(request.limit, ArtifactReader.max_page_size)
    wanted = LineFilter(request.filter)
    entries: list[ReadEntry] = []
    near: _Position | None = None  # The near end of the first entry in the direction.
    edge = "", 0  # The far end of the last entry. A plain tuple, since there is one for each entry.
    far = start  # How far the stream was searched.
    scanned = page_bytes = 0
    is_full, reached_end = False, True
    with closing(_blocks(archive, start, towards_newer, wanted, limit)) as blocks:
        for part, block, size in blocks:
            content = block.content
            if part is archive.parts[-1] and block.end == part.size:
                content = _whole(content)
            for begin, end in wanted.find(content, backwards=not towards_newer):
                read = wanted.parse(content[begin:end])
                if read is None:
                    continue
                page_bytes += read.size
                is_full = bool(entries) and request.is_too_large(page_bytes)
                if is_full:
                    break
                entries.append(read)
                before = block.begin + begin
                # The newline, if there is one, belongs to its line.
                after = min(block.begin + end + 1, block.end)
                near = near or _Position(part.name, before if towards_newer else after)
                edge = part.name, after if towards_newer else before
                is_full = len(entries) == limit
                if is_full:
                    break
            if is_full:
                far, reached_end = _Position(*edge), False
                break
            far = _Position(part.name, block.begin + (len(content) if towards_newer else 0))
            scanned += size
            if scanned >= _MOST_BYTES:
                reached_end = False
                break
    if towards_newer:
        older = None if start is None else near or start
        newer = far if entries or not reached_end else None
    else:
        entries.reverse()
        older, newer = None if reached_end else far, near or start
    if older == (archive.parts[0].name, 0):
        older = None
    return Page(entries, str(older) if older else None, str(newer) if newer else None)


def _scan(archive: Archive, start: _Position | None) -> Iterator[Scanned]:
    archive, start = _without_merged(archive, start)
    with closing(_blocks(archive, start, True, LineFilter(LogsEntriesFilter()), _SCANNED_LINES)) as blocks:
        for part, block, _ in blocks:
            content = block.content
            if part is archive.parts[-1] and block.end == part.size:
                content = _whole(content)
            name = ObjectName.parse(part.name)
            # A merged object does not tell when each of its events arrived.
            arrival = name.arrival if name is not None and name.size is None else None
            before: Scanned | None = None
            for scanned in scanning.scan(content, arrival):
                if before is not None:
                    yield before
                before = scanned
            if before is not None:
                yield before._replace(token=str(_Position(part.name, block.begin + len(content))))


def _whole(content: bytes) -> bytes:
    """Return the last block of a stream, without a last line that its writer may not have finished."""
    last = content.rfind(b"\n") + 1
    return content if last == len(content) or is_complete(content[last:]) else content[:last]


def _blocks(
    archive: Archive, start: _Position | None, towards_newer: bool, wanted: LineFilter, limit: int
) -> Generator[tuple[Part, Block, int]]:
    """Yield blocks of lines, from a position on in the direction, and how many bytes were read for each.

    Lines that the filter cannot want are left out: an empty block tells how far they reach.
    """
    first, largest = _FIRST_BLOCK, _LARGEST_BLOCK
    if not wanted.is_all:
        first = largest = _SEARCHED_BLOCK
    elif limit * _USUAL_LINE > first:
        first = min(limit * _USUAL_LINE, largest)

    def bounds(part: Part) -> tuple[int, int]:
        """Return where in a part to begin and to end."""
        if start is None or part.name != start.name:
            return 0, part.size
        offset = min(start.offset, part.size)
        return (offset, part.size) if towards_newer else (0, offset)

    def first_bytes(part: Part) -> tuple[int, int]:
        begin, end = bounds(part)
        return (begin, min(begin + first, end)) if towards_newer else (max(begin, end - first), end)

    is_indexed = not archive.is_folder and archive.artifact_store.config.is_local and wanted.is_summarized
    with closing(fetched(_parts(archive, start, towards_newer, wanted), first_bytes)) as ready:
        for part in ready:
            with closing(part):
                begin, end = bounds(part)
                if is_indexed:
                    for block, size in _indexed_blocks(archive, part, begin, end, towards_newer, wanted):
                        yield part, block, size
                else:
                    for block in (forward if towards_newer else backward)(part, begin, end, first, largest):
                        yield part, block, len(block.content)


def _parts(archive: Archive, start: _Position | None, towards_newer: bool, wanted: LineFilter) -> list[Part]:
    """Return the parts to read, in the direction, without those that the filter cannot want by their names."""
    if towards_newer:
        parts = [part for part in archive.parts if start is None or part.name >= start.name]
    else:
        parts = [part for part in reversed(archive.parts) if start is None or part.name <= start.name]
    if wanted.is_summarized:
        parts = [
            part for part in parts if (name := ObjectName.parse(part.name)) is None or wanted.may_be_in(name.summary)
        ]
    return parts


def _indexed_blocks(
    archive: Archive, part: Part, begin: int, end: int, towards_newer: bool, wanted: LineFilter
) -> Iterator[tuple[Block, int]]:
    """Yield blocks of a local file with the help of its index, and add to the index what it does not have."""
    read = forward if towards_newer else backward
    chunks = load(archive.artifact_store, archive.uri, part.read)
    for since, until, summary in _stretches(chunks, begin, end, towards_newer):
        if summary is not None and not wanted.may_be_in(summary):
            yield Block(until if towards_newer else since, b""), 0
            continue
        for block in read(part, since, until, _SEARCHED_BLOCK, _SEARCHED_BLOCK):
            size = len(block.content)
            # A line without a newline may not be complete, so it is not summarized.
            is_unknown = summary is None and block.content.endswith(b"\n")
            if is_unknown and not wanted.may_be_in(_indexed(archive, block)):
                block = Block(block.end if towards_newer else block.begin, b"")
            yield block, size


def _stretches(
    chunks: list[Chunk], begin: int, end: int, towards_newer: bool
) -> Iterator[tuple[int, int, Summary | None]]:
    """Yield the pieces between two offsets, in the direction, each with its summary; None if the index has none."""
    stretches: list[tuple[int, int, Summary | None]] = []
    place = begin
    for chunk in chunks:
        if chunk.end <= begin or chunk.begin >= end:
            continue
        if chunk.begin > place:
            stretches.append((place, chunk.begin, None))
        stretches.append((max(chunk.begin, place), min(chunk.end, end), chunk.summary))
        place = stretches[-1][1]
    if place < end:
        stretches.append((place, end, None))
    return iter(stretches) if towards_newer else reversed(stretches)


def _indexed(archive: Archive, block: Block) -> Summary:
    """Summarize lines that the index does not know, and add them to it."""
    summary = summarize_lines(block.content.split(b"\n"))
    if len(block.content) >= _WORTH_KNOWING:
        add(archive.artifact_store, archive.uri, Chunk.of(block.begin, block.content, summary))
    return summary
