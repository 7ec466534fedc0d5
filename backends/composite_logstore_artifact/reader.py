"""The read port: pages of an archive, from either end, by seeking."""

from __future__ import annotations

import io
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from datetime import datetime, timedelta, timezone
from itertools import islice
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import orjson
from zenml.enums import LoggingLevels
from zenml.exceptions import (
    DoesNotExistException,
    IllegalOperationError,
    LogStoreError,
    LogStoreUnavailableError,
)
from zenml.log_stores.artifact.artifact_log_store import parse_log_entry, prepare_logs_uri
from zenml.models import LogEntry, LogsEntriesFilter, LogsResponse
from zenml.utils.time_utils import to_utc_timezone

from composite_logstore import Event, Page, PageRequest, ReadEntry
from composite_logstore_artifact import artifact_stores
from composite_logstore_artifact.artifact_stores import (
    ArtifactStoreNotFoundError,
    ArtifactStoreNotUsableError,
    is_refusal,
)

if TYPE_CHECKING:
    from zenml.artifact_stores import BaseArtifactStore

_FIRST_BLOCK = 64 * 1024
# Blocks double: what is read backwards from S3 is read with everything that follows it, up to 50 MB.
_LARGEST_BLOCK = 8 * 1024 * 1024
# Objects up to this size are read in one request.
_SMALL = 8 * 1024 * 1024
_AT_ONCE = 16
# What each line begins with that our exporter writes.
_BEGINNING = b'{"timestamp":'


class ArtifactReader:
    """Reads what `ArtifactExporter` has written, and what ZenML's own log store has.

    A token is `<name of the object>:<offset in bytes>`, with an empty name where the stream is a single
    file. Nothing is ever inserted before a place that was read, so tokens stay valid while the stream
    grows. The exception are two writers whose clocks disagree: an object that sorts before a token is
    only seen by who begins anew.
    """

    max_page_size = 50_000
    in_order = True

    def __init__(
        self,
        artifact_store: str | None = None,
        find: Callable[[LogsResponse], BaseArtifactStore] | None = None,
        is_in_progress: Callable[[LogsResponse], bool] = artifact_stores.is_in_progress,
    ) -> None:
        """Prepare; nothing is looked up or opened.

        Args:
            artifact_store: The name or id of the artifact store. None: that of each run's own stack.
            find: Finds the artifact store of a stream, in the place of the above.
            is_in_progress: Whether the run of a stream is known to be in progress.
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
            LogStoreError: The artifact store cannot be used from here.
            DoesNotExistException: Nothing was archived for the stream, or its artifact store is gone.
        """
        start = _Position.parse(request.token)
        artifact_store = self._artifact_store_of(request.logs)
        try:
            archive = _open(artifact_store, prepare_logs_uri(artifact_store, request.logs.id))
            if archive is not None:
                return _read_page(archive, start, request)
        except IllegalOperationError as error:
            # ZenML's server keeps away from its own disk, unless it is told otherwise.
            raise LogStoreError(
                f"Artifact store '{artifact_store.name}' is on the disk of the machine that wrote it, which the "
                f"ZenML server does not read. Fetch these logs there, or use a remote artifact store."
            ) from error
        except Exception as error:
            translated = _translated(error, artifact_store)
            if translated is None:
                raise
            raise translated from error
        if self._is_in_progress(request.logs):
            return Page()
        raise DoesNotExistException(
            f"Nothing was found for these logs in artifact store '{artifact_store.name}'. Nothing may have been "
            f"logged; or, if the stack has got another artifact store since, set 'artifact_store' of this child "
            f"to the old one."
        )

    def close(self) -> None:
        """Do nothing: artifact stores are shared with the active stack, or between the server's requests."""

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


def _translated(error: Exception, artifact_store: BaseArtifactStore) -> LogStoreError | None:
    """Return the error in the words of the read port, None if it is not the artifact store's.

    The error's own text may hold a secret: it is not repeated.
    """
    name = f"artifact store '{artifact_store.name}'"
    kind = type(error)
    if is_refusal(error):
        return LogStoreUnavailableError(
            f"The {name} refuses access. Check its credentials, and that they may list and read its path."
        )
    if isinstance(error, OSError):
        reason = os.strerror(error.errno) if error.errno else kind.__name__
    elif kind.__module__ == "builtins" or kind.__module__.startswith("zenml."):
        return None
    else:
        # A client library's own kind of error: not connected, timed out.
        reason = kind.__name__
    return LogStoreUnavailableError(f"The {name} could not be read: {reason}. Try again later.")


class _Position(NamedTuple):
    """A place between two bytes of a stream."""

    name: str
    offset: int

    @classmethod
    def parse(cls, token: str | None) -> _Position | None:
        if token is None:
            return None
        name, colon, offset = token.rpartition(":")
        if not colon or not offset.isascii() or not offset.isdigit():
            raise ValueError("The token is malformed: pass on what an earlier page returned.")
        return cls(name, int(offset))

    def __str__(self) -> str:
        return f"{self.name}:{self.offset}"


class _Archive(NamedTuple):
    """The parts of one stream, in order: names of objects in a folder, or one empty name for a file."""

    artifact_store: BaseArtifactStore
    uri: str
    names: Sequence[str]

    @property
    def is_folder(self) -> bool:
        return self.names[0] != ""

    def open(self, name: str) -> _Part:
        file = self.artifact_store.open(os.path.join(self.uri, name) if name else self.uri, "rb")
        return _Part(name, file, at_once=bool(name))


def _open(artifact_store: BaseArtifactStore, uri: str) -> _Archive | None:
    """Return what there is of the stream now, None if there is nothing."""
    # The filesystems of S3, GCS and Azure remember what they have listed. What was there a page ago is not
    # what is there now.
    invalidate_cache = getattr(getattr(artifact_store, "filesystem", None), "invalidate_cache", None)
    if invalidate_cache is not None:
        invalidate_cache(uri)
    if artifact_store.isdir(uri):
        names = sorted(os.fsdecode(name) for name in artifact_store.listdir(uri) if name)
        return _Archive(artifact_store, uri, names) if names else None
    if artifact_store.exists(uri):
        return _Archive(artifact_store, uri, [""])
    return None


class _Part:
    """The bytes of one file or object: as many as there were when it was opened."""

    def __init__(self, name: str, file: IO[bytes], at_once: bool) -> None:
        self.name = name
        self._file: IO[bytes] | None = file
        file.seek(0, io.SEEK_END)
        self.size = file.tell()
        if at_once and self.size <= _SMALL:
            content = self.read(0, self.size)
            self.close()
            self._file = io.BytesIO(content)

    def read(self, begin: int, end: int) -> bytes:
        assert self._file is not None
        self._file.seek(begin)
        content = self._file.read(end - begin)
        if len(content) != end - begin:
            raise OSError("it became shorter while it was read")
        return content

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


class _Line(NamedTuple):
    part: _Part
    begin: int
    end: int
    text: bytes

    @property
    def is_terminated(self) -> bool:
        return self.end - self.begin > len(self.text)


def _forward(part: _Part, begin: int) -> Iterator[_Line]:
    """Yield the lines from a place on, the first one first."""
    rest = b""  # the beginning of a line, from `begin` on
    block = _FIRST_BLOCK
    while (start := begin + len(rest)) < part.size:
        *lines, rest = (rest + part.read(start, min(start + block, part.size))).split(b"\n")
        for text in lines:
            end = begin + len(text) + 1
            yield _Line(part, begin, end, text)
            begin = end
        block = min(2 * block, _LARGEST_BLOCK)
    if rest:
        yield _Line(part, begin, part.size, rest)


def _backward(part: _Part, end: int) -> Iterator[_Line]:
    """Yield the lines before a place, the last one first."""
    rest = b""  # the end of a line, up to `end`
    start = end
    block = _FIRST_BLOCK
    while start > 0:
        begin = max(0, start - block)
        content = part.read(begin, start) + rest
        start = begin
        block = min(2 * block, _LARGEST_BLOCK)
        # What comes before the first newline belongs to a line that begins further up.
        first = content.find(b"\n") + 1 if start > 0 else 0
        if start > 0 and first == 0:
            rest = content
            continue
        rest = content[:first]
        lines = content[first:].split(b"\n")
        unterminated = lines.pop()
        if unterminated:
            yield _Line(part, end - len(unterminated), end, unterminated)
            end -= len(unterminated)
        for text in reversed(lines):
            begin = end - len(text) - 1
            yield _Line(part, begin, end, text)
            end = begin


def _ahead(names: Iterable[str], open_part: Callable[[str], _Part]) -> Generator[_Part]:
    """Open the parts in this order, and further ones already, the more the further it goes.

    A step that logs little writes many small objects, and each takes a request.
    """
    remaining = iter(names)
    pending: deque[Future[_Part]] = deque()
    at_once = 1
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        try:
            while True:
                pending.extend(pool.submit(open_part, name) for name in islice(remaining, at_once - len(pending)))
                if not pending:
                    return
                yield pending.popleft().result()
                at_once = min(2 * at_once, _AT_ONCE)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            for future in pending:
                if not future.cancelled() and future.exception() is None:
                    future.result().close()


def _lines(archive: _Archive, start: _Position | None, towards_newer: bool) -> Generator[_Line]:
    """Yield the lines of the stream from a place on, in the direction."""
    if towards_newer:
        names = [name for name in archive.names if start is None or name >= start.name]
    else:
        names = [name for name in reversed(archive.names) if start is None or name <= start.name]
    with closing(_ahead(names, archive.open)) as parts:
        for part in parts:
            with closing(part):
                if start is not None and part.name == start.name:
                    offset = min(start.offset, part.size)
                else:
                    offset = 0 if towards_newer else part.size
                yield from _forward(part, offset) if towards_newer else _backward(part, offset)


def _read_page(archive: _Archive, start: _Position | None, request: PageRequest) -> Page:
    if start is not None and bool(start.name) != archive.is_folder:
        raise ValueError("The token is not one of this stream: pass on what an earlier page returned.")
    towards_newer = request.direction == "newer"
    limit = min(request.limit, ArtifactReader.max_page_size)
    wanted = _Wanted(request.filter)
    entries: list[ReadEntry] = []
    first: _Line | None = None  # the first in the direction that was wanted
    last: _Line | None = None  # the last one that was
    passed: _Line | None = None  # the last one, wanted or not
    reached_end = True
    with closing(_lines(archive, start, towards_newer)) as lines:
        for line in lines:
            # The last line of all: whoever writes it may not have come to its end.
            is_last = line.part.name == archive.names[-1] and line.end == line.part.size
            if is_last and not line.is_terminated and not _is_complete(line.text):
                continue
            passed = line
            read = wanted.parse(line.text)
            if read is None:
                continue
            entries.append(read)
            first, last = first or line, line
            if len(entries) == limit:
                reached_end = False
                break
    if first is None or last is None or passed is None:
        older, newer = start, None
    elif towards_newer:
        # What was passed after the last entry, and not wanted, need not be looked at again.
        older, newer = _Position(first.part.name, first.begin), _Position(passed.part.name, passed.end)
    else:
        entries.reverse()
        older, newer = _Position(last.part.name, last.begin), _Position(first.part.name, first.end)
    is_oldest = start is None if towards_newer else reached_end
    if is_oldest or older == (archive.names[0], 0):
        older = None
    return Page(entries, str(older) if older else None, str(newer) if newer else None)


class _Wanted:
    """Parses lines, and leaves out what the filter does not want."""

    def __init__(self, filter_: LogsEntriesFilter) -> None:
        self._search = filter_.search.casefold() if filter_.search else None
        self._level = filter_.level.value if filter_.level else 0
        self._since = filter_.since
        self._until = filter_.until
        self._since_micros = _micros(filter_.since) if filter_.since else None
        self._until_micros = _micros(filter_.until) if filter_.until else None
        self._is_all = self._search is None and not self._level and self._since is None and self._until is None

    def parse(self, text: bytes) -> ReadEntry | None:
        """Return the line as an entry, None if it is empty or not wanted.

        A line that is not an entry is one all the same, of plain text, as ZenML has it, but for a piece of one.
        """
        event: Event | None = None
        try:
            fields = orjson.loads(text)
            event = _event(fields)
            if event is not None and self._is_surely_unwanted(fields):
                return None
            entry: LogEntry | None = LogEntry.model_validate(fields)
        except ValueError:
            if _is_piece(text):
                return None
            event = None
            entry = _plain(text)
        if entry is None or not (self._is_all or self._wants(entry)):
            return None
        return ReadEntry(entry, event)

    def _is_surely_unwanted(self, fields: dict[str, Any]) -> bool:
        """Judge an event's line before it is validated, which takes four times as long as the rest."""
        level, message, time_unix_nano = fields.get("level"), fields.get("message"), fields.get("time_unix_nano")
        if self._is_all or type(level) is not int or type(message) is not str or type(time_unix_nano) is not int:
            return False
        return (
            level < self._level
            or (self._since_micros is not None and time_unix_nano // 1000 < self._since_micros)
            or (self._until_micros is not None and time_unix_nano // 1000 > self._until_micros)
            or (self._search is not None and self._search not in message.casefold())
        )

    def _wants(self, entry: LogEntry) -> bool:
        if self._level and (entry.level is None or entry.level.value < self._level):
            return False
        if self._search is not None and self._search not in entry.message.casefold():
            return False
        if self._since is None and self._until is None:
            return True
        if entry.timestamp is None:
            return False
        try:
            timestamp = to_utc_timezone(entry.timestamp)
        except OverflowError:
            return False
        return (self._since is None or self._since <= timestamp) and (self._until is None or timestamp <= self._until)


def _plain(text: bytes) -> LogEntry | None:
    """Return the entry that ZenML makes of a line of plain text, None if it is empty."""
    line = text.decode("utf-8", "replace")
    try:
        return parse_log_entry(line)
    except ValueError:
        # It begins like a line of ZenML's old format, but with a time that is none.
        return LogEntry(message=line.strip(), level=LoggingLevels.INFO)


def _micros(time: datetime) -> int:
    return (time - datetime(1970, 1, 1, tzinfo=timezone.utc)) // timedelta(microseconds=1)


def _event(fields: Any) -> Event | None:
    """Return which event the line is, None if another program wrote it."""
    if not isinstance(fields, dict):
        return None
    writer, sequence = fields.get("writer"), fields.get("sequence")
    return Event(writer, sequence) if type(writer) is str and type(sequence) is int else None


def _is_piece(text: bytes) -> bool:
    """Return whether a line that is no entry is the beginning of one of ours.

    Its process was killed in the middle of writing it, or found the disk full. The event is written again.
    """
    return text.startswith(_BEGINNING) or (len(text) > 1 and _BEGINNING.startswith(text))


def _is_complete(text: bytes) -> bool:
    try:
        return isinstance(orjson.loads(text), dict)
    except ValueError:
        return False
