"""The exporter: writes events as lines of JSON, in ZenML's own layout and format."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from operator import attrgetter
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple
from uuid import UUID

import orjson
from zenml.log_stores.artifact.artifact_log_store import prepare_logs_uri

from composite_logstore import (
    LogEvent,
    RejectedError,
    Scanned,
    Stream,
)
from composite_logstore_artifact.artifact_stores import (
    find_for_stream,
    find_named,
)
from composite_logstore_artifact.compaction import Compaction
from composite_logstore_artifact.encoding import encode
from composite_logstore_artifact.errors import export_error, is_refusal
from composite_logstore_artifact.index import Chunk, add
from composite_logstore_artifact.lines import (
    SCAN_FORMAT,
    Summary,
    summarize_events,
    summarize_lines,
)
from composite_logstore_artifact.objects import ObjectName, writer_in_names
from composite_logstore_artifact.parts import ListingError, open_archive

if TYPE_CHECKING:
    from zenml.artifact_stores import BaseArtifactStore


# After so many objects the exporter merges them, so that a step that runs for days has hundreds and not thousands.
_MANY = 100
# At the end of a stream, fewer than these are not worth merging.
_MANY_AT_THE_END = 8
# An object of so many bytes is not merged: reading and writing it again would cost more than it saves.
_LARGE = 4 * 1024 * 1024
# In nanoseconds since the epoch. No clock reaches it: a name with a later time is not ours, or damaged.
_END_OF_TIME = 1 << 63

_stream_of = attrgetter("stream")
_number_of = attrgetter("number")


class ArtifactExporter:
    """Writes each stream into its artifact store.

    In a local artifact store a stream is one file, to which every writer appends. In any other it is a folder of
    objects, each written once. Their names begin with the time of arrival, so sorted names are in the order of arrival.
    `compaction.py` merges many small objects.

    Events count as delivered when `export` returns, so it writes them before. The size of an object is decided
    earlier, by the child's `schedule_delay_millis` and the bounds of a batch.

    Attributes:
        schedule_delay_millis: How long events should wait for a fuller batch, in milliseconds; None if the child's
            setting applies.
    """

    scan_format: ClassVar[str] = SCAN_FORMAT

    def __init__(
        self,
        artifact_store: str | None = None,
        find: Callable[[Stream], BaseArtifactStore] | None = None,
        clock: Callable[[], int] = time.time_ns,
        remote_delay_millis: int | None = None,
    ) -> None:
        """Prepare; nothing is looked up or opened.

        Args:
            artifact_store: The name or ID of the artifact store. None: the one of the stream's own stack.
            find: Finds the artifact store of a stream; replaces `artifact_store`.
            clock: Returns the time in nanoseconds since the epoch.
            remote_delay_millis: The value of `schedule_delay_millis` once an artifact store turns out to be remote.
        """
        self.schedule_delay_millis: int | None = None
        self._remote_delay_millis = remote_delay_millis
        if find is not None:
            self._find = find
        elif artifact_store is not None:
            self._find = lambda stream: find_named(artifact_store)
        else:
            self._find = find_for_stream
        self._clock = clock
        # Keep artifact stores, and never their filesystems: a filesystem holds a service connector's token, which
        # expires, and the artifact store then makes a new one.
        self._artifact_stores: dict[UUID | None, BaseArtifactStore] = {}
        self._progress: dict[UUID, _Progress] = {}
        self._compaction = Compaction()
        self._now = 0

    def export(self, batch: Sequence[LogEvent]) -> int:
        """Write the batch, stream by stream.

        Events that an earlier attempt wrote are recognized by their numbers, and not written again.

        Args:
            batch: Events of one writer, in journal order.

        Returns:
            0: the archive never shortens an event.

        Raises:
            RetryableError: The artifact store failed this time.
            RejectedError: An event cannot be encoded.
            UnavailableError: The artifact store does not exist, its integration is missing, or it refuses access.
        """
        streams: dict[UUID, list[LogEvent]] = {}
        for stream, run in groupby(batch, _stream_of):
            streams.setdefault(stream.id, []).extend(run)
        for events in streams.values():
            self._write(events[0].stream, _Lines(events[0].writer, events, encode, _number_of, summarize_events))
        return 0

    def export_scanned(self, stream: Stream, scanned: Scanned) -> None:
        """Write lines of another archive unchanged.

        Args:
            stream: Their stream.
            scanned: The lines of one writer, in journal order.

        Raises:
            RetryableError: As `export` does.
            RejectedError: A line does not have the number of its event.
            UnavailableError: As `export` does.
        """
        self._write(stream, _Lines(scanned.writer, scanned.contents, _with_newline, _number_in, summarize_lines))

    def end_stream(self, stream: Stream) -> None:
        """Merge the remaining objects if they are many, and forget the stream."""
        progress = self._progress.pop(stream.id, None)
        artifact_store = self._artifact_stores.get(stream.artifact_store_id)
        if progress is None or artifact_store is None:
            return
        if len(progress.loose) >= _MANY_AT_THE_END or progress.is_merged:
            uri = prepare_logs_uri(artifact_store, stream.id)
            self._compaction.begin(artifact_store, uri, progress.loose, is_last=True)

    def close(self) -> None:
        """Wait until objects are merged, and forget all streams.

        Artifact stores may be shared with the active stack, so they are not cleaned up.
        """
        self._compaction.close()
        self._progress.clear()
        self._artifact_stores.clear()

    def _write(self, stream: Stream, lines: _Lines) -> None:
        progress = self._progress.setdefault(stream.id, _Progress())
        lines = lines.after(progress.written.get(lines.writer, -1))
        if not lines.records:
            return
        first, last = lines.ends
        try:
            artifact_store = self._artifact_stores.get(stream.artifact_store_id)
            if artifact_store is None:
                artifact_store = self._artifact_stores[stream.artifact_store_id] = self._find(stream)
            uri = prepare_logs_uri(artifact_store, stream.id)
            if artifact_store.config.is_local:
                _append(artifact_store, uri, lines, progress)
            else:
                self.schedule_delay_millis = self._remote_delay_millis
                if lines.writer not in progress.written:
                    # List again before each attempt until one succeeds: an artifact store that fails may list nothing.
                    progress.arrived[lines.writer] = _arrived(artifact_store, uri, lines.writer)
                name = self._object_name(lines, first, last, progress)
                size = _write_object(artifact_store, os.path.join(uri, name), lines)
                progress.written[lines.writer] = last
                progress.attempt = None
                if size < _LARGE:
                    progress.loose[name] = size
        except Exception as error:
            # The user may update the artifact store to mend it, so look it up again.
            found = self._artifact_stores.pop(stream.artifact_store_id, None)
            translated = export_error(error, found)
            if translated is None:
                raise
            raise translated from error
        if len(progress.loose) >= _MANY:
            self._compaction.begin(artifact_store, uri, progress.loose, is_last=False)
            progress.loose, progress.is_merged = {}, True

    def _object_name(self, lines: _Lines, first: int, last: int, progress: _Progress) -> str:
        """Return the name of the object to write these lines to.

        An attempt that failed may have written its object, with only the answer lost. So the next attempt uses the same
        name, and overwrites that object, unless it has more events than the name says.
        """
        attempt, arrived = progress.attempt, progress.arrived[lines.writer]
        if (
            attempt is None
            or (attempt.writer, attempt.first) != (lines.writer, first)
            or last > attempt.last
            or attempt.arrival < arrived
        ):
            # A clock may go back.
            self._now = max(self._now + 1, self._clock())
            arrival = progress.arrived[lines.writer] = max(arrived + 1, self._now)
            progress.attempt = ObjectName(arrival, arrival, lines.writer, first, last, lines.summary)
        return str(progress.attempt)


def _arrived(artifact_store: BaseArtifactStore, uri: str, writer: str) -> int:
    """Return when a writer's last object was written, in nanoseconds since the epoch; 0 if the writer has none.

    Another process may have written it by a clock that was ahead of this one. New objects must sort after it.
    """
    try:
        archive = open_archive(artifact_store, uri)
    except Exception as error:
        if is_refusal(error) or isinstance(error, ListingError):
            # Credentials that forbid listing may still allow writing.
            return 0
        raise
    names = [ObjectName.parse(part.name) for part in archive.parts] if archive else []
    written_by = writer_in_names(writer)
    return max((one.until for one in names if one and one.writer == written_by and one.until < _END_OF_TIME), default=0)


class _Lines(NamedTuple):
    """Events of one writer in one stream, to be written at once.

    Attributes:
        writer: The writer.
        records: The events, or their lines as they were scanned, in journal order.
        encode: Returns the line of a record, with its newline.
        number_of: Returns the number of a record.
        summarize: Summarizes records.
    """

    writer: str
    records: Sequence[Any]
    encode: Callable[[Any], bytes]
    number_of: Callable[[Any], int]
    summarize: Callable[[Sequence[Any]], Summary]

    @property
    def ends(self) -> tuple[int, int]:
        """The numbers of the first and of the last record."""
        return self.number_of(self.records[0]), self.number_of(self.records[-1])

    @property
    def summary(self) -> Summary:
        """The summary of the records."""
        return self.summarize(self.records)

    def after(self, number: int) -> _Lines:
        """Return the records with a higher number."""
        if self.number_of(self.records[0]) > number:
            return self
        return self._replace(records=[record for record in self.records if self.number_of(record) > number])


def _with_newline(line: bytes) -> bytes:
    return line + b"\n"


def _number_in(line: bytes) -> int:
    try:
        number = orjson.loads(line)["number"]
    except (ValueError, LookupError, TypeError):
        number = None
    if type(number) is not int or number < 0:
        raise RejectedError("a line does not say which number its event has")
    return number


@dataclass
class _Progress:
    """What the exporter remembers of one stream.

    Attributes:
        written: A writer → the number of the last of its events that was written.
        arrived: A writer → when its last object was written, in nanoseconds since the epoch; 0 if it has none.
        attempt: The name of the object that the last attempt may or may not have written.
        loose: The small objects that were written since the last merge: a name → a size in bytes.
        is_merged: Whether objects were merged.
    """

    written: dict[str, int] = field(default_factory=dict)
    arrived: dict[str, int] = field(default_factory=dict)
    attempt: ObjectName | None = None
    loose: dict[str, int] = field(default_factory=dict)
    is_merged: bool = False


def _append(artifact_store: BaseArtifactStore, uri: str, lines: _Lines, progress: _Progress) -> None:
    """Append the lines to a file to which other processes append at the same time."""
    encoded = list(map(lines.encode, lines.records))
    try:
        file = artifact_store.open(uri, "a+b")
    except FileNotFoundError:
        artifact_store.makedirs(os.path.dirname(uri))
        file = artifact_store.open(uri, "a+b")
    with file:
        # A writer that died, or found the disk full, leaves half a line. The system appends each `write` as a whole, so
        # in the worst case there are two newlines, and readers ignore an empty line.
        if file.seek(0, io.SEEK_END) > 0:
            file.seek(-1, io.SEEK_END)
            if file.read(1) != b"\n":
                encoded[0] = b"\n" + encoded[0]
        # One unbuffered `write` tells how much was written if the disk is full.
        raw = getattr(file, "raw", file)
        content = b"".join(encoded)
        rest = memoryview(content)
        size = len(rest)
        try:
            while rest:
                rest = rest[raw.write(rest) :]
        finally:
            begin = raw.tell() - (size - len(rest))
            if len(rest) < size and content[:1] != b"\n" and not _ends_a_line(raw, begin):
                # Between the check and the `write`, another writer found the disk full and left half a line, which
                # spoils the first of these lines. If that line cannot be written again, none counts as written.
                again = memoryview(b"\n" + encoded[0])
                while again:
                    again = again[raw.write(again) :]
            if not rest:
                progress.written[lines.writer] = lines.ends[1]
            end = size - len(rest)
            for record, line in zip(lines.records, encoded, strict=True) if rest else ():
                end -= len(line)
                if end < 0:
                    break
                progress.written[lines.writer] = lines.number_of(record)
    whole = content.removeprefix(b"\n")
    add(artifact_store, uri, Chunk.of(begin + size - len(whole), whole, lines.summary))


def _ends_a_line(file: Any, end: int) -> bool:
    """Return whether a line ends, or the file begins, at this offset."""
    if end == 0:
        return True
    file.seek(end - 1)
    last: bytes = file.read(1)
    return last == b"\n"


def _write_object(artifact_store: BaseArtifactStore, uri: str, lines: _Lines) -> int:
    """Write the lines as an object, and return its size in bytes."""
    content = b"".join(map(lines.encode, lines.records))
    try:
        _write(artifact_store, uri, content)
    except FileNotFoundError:
        # Most remote filesystems have no folders. Where there are folders, this one may be missing. The root has to
        # exist before a folder is made: s3fs would create a missing bucket.
        if not artifact_store.exists(artifact_store.path):
            raise
        artifact_store.makedirs(os.path.dirname(uri))
        _write(artifact_store, uri, content)
    return len(content)


def _write(artifact_store: BaseArtifactStore, uri: str, content: bytes) -> None:
    with artifact_store.open(uri, "wb") as file:
        file.write(content)
