"""The segments of a spool: files of lines that are appended to and never changed.

A process appends to the last segment alone, the one *in use*. It is mapped into memory: copying a line into it costs a
tenth of a `write()`, which gives up the GIL, and the copy belongs to the operating system, so it survives a kill of the
process. A full segment is closed and cut to its length; a segment that all children have acknowledged is removed.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Any, TypeVar

from composite_logstore.event import LogEvent, Stream
from composite_logstore.spool.format import (
    LINE_BYTES,
    Closed,
    Ended,
    EventTooLongError,
    Process,
    encode_event,
    encode_header,
    encode_mark,
    encode_stream,
)
from composite_logstore.spool.mapped import NEW, Mapped
from composite_logstore.spool.positions import Positions
from composite_logstore.spool.private_folder import KnownFolder, PrivateFolder
from composite_logstore.spool.streams import Streams

SEGMENT_BYTES = 4 * 1024 * 1024
SEGMENT = re.compile(r"[0-9]{20}\.log")
SPARE = "spare"
_Item = TypeVar("_Item")
_STREAMS = 10_000
"""How many streams a process remembers: one that serves for months has many."""
_NAMES_BYTES = 64 * 1024
"""How many bytes the first segment has if no event has to be on disk."""
_CLOSED = encode_mark(Closed())
_MOST_OPEN = 100
"""How many open streams each segment names."""
_OPEN_BYTES = SEGMENT_BYTES // 16
"""How many bytes of a segment the lines of open streams may take."""


class SpoolFullError(OSError):
    """There is no room within `spool_max_bytes`, and nothing older can be given up."""


@dataclass
class Segment:
    """A file of lines.

    Attributes:
        path: The file.
        first: The number of its first event, or a lower one.
        last: The number of its last event, or a higher one; lower than `first` if it has none.
        kinds: How many events it has of each level, ordinary ones and updates of progress bars.
        strays: The offsets of its lines whose numbers are out of order.
    """

    path: Path
    first: int
    last: float
    kinds: Counter[tuple[int, bool]] = field(default_factory=Counter)
    strays: frozenset[int] = frozenset()


class Segments:
    """The segments of one spool.

    The journal's lock guards every call, except `prepare` and `tidy`: the disk may take long for them, so the
    housekeeping thread calls them without it. They share the spare segment and two queues with the other methods, and
    rely on the GIL: `deque.append`, `deque.popleft` and the assignment of an attribute are one C call each. A mistake
    would be caught by test_spilling_in_time.py::test_an_event_is_on_disk_within_a_second_even_if_the_disk_is_slow and
    test_spool_taken_away.py::test_whatever_is_taken_away_is_restored_and_the_next_process_delivers_it.

    Attributes:
        all: The segments, oldest first. Replaced or changed in single steps, so that a reader may copy it at any time.
        process: The process that writes them, None if it does not say.
    """

    def __init__(self, folder: KnownFolder, positions: Positions, streams: Streams, found: Iterable[Segment]) -> None:
        """Begin with the segments that were found, and none in use.

        Args:
            folder: The spool's folder.
            positions: The children's positions, which a segment's header names.
            streams: Where to note the streams that are written.
            found: The segments of a process that is dead, or of another one.
        """
        self.all = list(found)
        self.process: Process | None = None
        self._folder = folder
        self._positions = positions
        self._streams = streams
        # The attributes that each stream was written with last.
        self._written: dict[Stream, dict[str, Any]] = {}
        # Which of these are open, those with events in the last full segment last; and the streams that have ended.
        self._open: dict[Stream, None] = {}
        self._ended: dict[Stream, None] = {}
        self._is_marked_closed = False
        # The segment in use: its memory, where its next line goes, and the ids of the streams in it.
        self._in_use: Mapped | None = None
        self._end = 0
        self._ids: dict[Stream, str] = {}
        self._spare: Mapped | None = None
        self._is_closed = False
        self._has_only_names = False
        # For `tidy`: the segments to cut to their length, and the files to remove.
        self._full: deque[tuple[Mapped, str, int]] = deque()
        self._freed: deque[str] = deque()

    @property
    def first(self) -> float:
        """The number from which on all events that some child needs are on disk; infinity if there is no segment."""
        return self.all[0].first if self.all else inf

    @property
    def last(self) -> float:
        """The number of the last event, -1 if there is none. Exact for segments that were written or scanned."""
        return max((segment.last for segment in self.all), default=-1)

    @property
    def size(self) -> int:
        """How many bytes the files have.

        Raises:
            OSError: The folder cannot be read.
        """
        with self._folder.open() as folder:
            found = [folder.status(segment.path.name) for segment in self.all]
        return sum(status.st_size for status in found if status)

    # Writing

    def append(self, event: LogEvent, has_room: Callable[[int], bool]) -> None:
        """Write an event.

        Args:
            event: The event.
            has_room: Asked whether the spool may grow by a number of bytes: before it grows, and with 0 afterwards,
                since other processes grow too.

        Raises:
            SpoolFullError: `has_room` says no.
            OSError: There is no room on the disk, or the folder is gone.
            EventTooLongError: No line can hold the event.
            UnstorableEventError: No line can express the event.
        """
        id = self._ids.get(event.stream) or self._write_stream(event.stream, event.number, has_room)
        self._write(encode_event(event, id), event.number, has_room)
        segment = self.all[-1]
        segment.last = event.number
        segment.kinds[event.level, bool(event.progress)] += 1

    def write_from(self, queue: deque[LogEvent], before: float, most: float) -> int:
        """Write the first events of a queue, and remove them, as long as each needs nothing but its own line.

        `append` does the same for any event. Here one event takes 5 µs instead of 7 µs. Each line is complete before
        the next one begins, as an agent that reads them meanwhile expects.

        Args:
            queue: The events.
            before: Write only events with lower numbers.
            most: How many events to write at most.

        Returns:
            How many events were written. If more were asked for, the next one needs a line of its stream or a further
            segment.

        Raises:
            UnstorableEventError: No line can express the next event.
        """
        segment = self._in_use
        if segment is None:
            return 0
        memory, room, ids, newest = segment.memory, len(segment.memory) - len(_CLOSED), self._ids, self.all[-1]
        kinds: list[tuple[int, bool]] = []
        try:
            while queue and len(kinds) < most:
                event = queue[0]
                id = ids.get(event.stream)
                if id is None or event.number >= before:
                    break
                line = encode_event(event, id)
                end = self._end + len(line)
                if end > room:
                    break
                memory[self._end : end] = line
                self._end = end
                newest.last = event.number
                kinds.append((event.level, bool(event.progress)))
                queue.popleft()
        finally:
            newest.kinds.update(kinds)
        return len(kinds)

    def refresh(self, has_room: Callable[[int], bool]) -> None:
        """Write those streams again whose attributes ZenML has added to since.

        Args:
            has_room: As for `append`.

        Raises:
            OSError: There is no room.
        """
        for stream in [stream for stream in self._open if _differs(self._written[stream], stream.metadata)]:
            self._write_stream(stream, self._next, has_room)

    def name(self, stream: Stream, number: int, has_room: Callable[[int], bool]) -> None:
        """Write that a stream is open, though none of its events has to be on disk.

        Args:
            stream: The stream.
            number: The number of an event of it.
            has_room: As for `append`.

        Raises:
            OSError: There is no room.
        """
        if stream not in self._written:
            if self._in_use is None:
                self._in_use = self._begin_segment(number, 0, has_room, has_only_names=True)
            self._write_stream(stream, number, has_room)

    def end(self, stream: Stream, has_room: Callable[[int], bool]) -> None:
        """Write that a stream gets no more events. That of a stream without a line is only remembered.

        Args:
            stream: The stream.
            has_room: As for `append`.

        Raises:
            OSError: There is no room.
        """
        if stream in self._open:
            if _differs(self._written[stream], stream.metadata):
                self._write_stream(stream, self._next, has_room)
            self._write(encode_mark(Ended(stream)), self._next, has_room)
            del self._open[stream]
        self._ended[stream] = None
        if len(self._ended) > _STREAMS:
            del self._ended[next(iter(self._ended))]

    def open_again(self, stream: Stream) -> None:
        """Have a stream that has ended be written again with its next event, since it was registered again."""
        if stream in self._ended:
            del self._ended[stream]
            self._ids.pop(stream, None)

    def mark_closed(self) -> None:
        """Write that the process has ended in order, if anything has been written. There is always room for that."""
        if self._in_use is not None and not self._is_marked_closed:
            self._in_use.memory[self._end : self._end + len(_CLOSED)] = _CLOSED
            self._end += len(_CLOSED)
            self._is_marked_closed = True

    @property
    def next_name(self) -> int:
        """The lowest number that an event in a further segment may have."""
        return int(max(self.last, self.all[-1].first)) + 1 if self.all else 0

    def add_end(self, events: Sequence[LogEvent], process: Process) -> None:
        """Write a further segment as a whole, after which nothing follows: the process is dead.

        Args:
            events: Its events. Their streams have ended.
            process: The dead process.

        Raises:
            OSError: There is no room.
        """
        first = events[0].number
        lines = [encode_header(self._positions.children, process)]
        for event in events:
            lines += [encode_stream(event.stream), encode_event(event, str(event.stream.id))]
            lines.append(encode_mark(Ended(event.stream)))
        name = f"{first:020d}.log"
        with self._folder.open() as folder:
            _write_whole(folder, name, [*lines, _CLOSED])
        added = Segment(self._folder.path / name, first, events[-1].number)
        added.kinds.update((event.level, bool(event.progress)) for event in events)
        self.all.append(added)

    @property
    def _next(self) -> int:
        """The lowest number that the next event may have."""
        return int(self.last) + 1

    def _write_stream(self, stream: Stream, number: int, has_room: Callable[[int], bool]) -> str:
        """Write the line of a stream, and return the id that the lines of its events have."""
        id = self._streams.add(stream)
        metadata = dict(stream.metadata)
        self._write(self._lines_of(stream), number, has_room)
        self._ids[stream] = id
        self._written[stream] = metadata
        if stream not in self._ended:
            self._open[stream] = None
        for old in [*self._written][:-_STREAMS]:
            del self._written[old]
            self._open.pop(old, None)
            self._streams.forget(old)
            self._ids.pop(old, None)
        return id

    def _lines_of(self, stream: Stream) -> bytes:
        """Return the line of a stream, and its mark if it has ended: an event that follows must not open it again."""
        line = encode_stream(stream)
        return line + encode_mark(Ended(stream)) if stream in self._ended else line

    def _write(self, line: bytes, number: int, has_room: Callable[[int], bool]) -> None:
        segment = self._in_use
        end = self._end + len(line)
        # An orderly end must find room for its mark, even if the disk is full.
        if segment is None or end + len(_CLOSED) > len(segment.memory):
            if len(line) > LINE_BYTES:
                raise EventTooLongError(f"more than {LINE_BYTES} bytes")
            if segment is not None and self.all[-1].first >= number:
                # It has no event yet, and another one would need the same name.
                segment = self._grown(segment, end + len(_CLOSED), has_room)
            else:
                segment = self._begin_segment(number, len(line), has_room)
            self._in_use = segment
            end = self._end + len(line)
        segment.memory[self._end : end] = line
        self._end = end

    def _grown(self, segment: Mapped, size: int, has_room: Callable[[int], bool]) -> Mapped:
        if not has_room(size - len(segment.memory)):
            raise SpoolFullError("'spool_max_bytes' is reached")
        with self._folder.open() as folder:
            self._mend_in_use(folder)
            return (self._in_use or segment).grown(folder, self.all[-1].path.name, size)

    def _begin_segment(
        self, first: int, size: int, has_room: Callable[[int], bool], has_only_names: bool = False
    ) -> Mapped:
        # So this is known even after earlier segments are removed.
        opening = encode_header(self._positions.children, self.process) + self._marks()
        size = max(_NAMES_BYTES if has_only_names else SEGMENT_BYTES, len(opening) + size + len(_CLOSED))
        path = self._folder.path / f"{first:020d}.log"
        with self._folder.open() as folder:
            # Once the segment in use is closed, its lines are no longer in memory.
            self._mend_in_use(folder)
            new = self._named_spare(folder, path.name, size)
            if new is None:
                new = Mapped.create(folder, NEW, size) if has_room(size) else None
                if new is None or not has_room(0):
                    folder.unlink(NEW)
                    raise SpoolFullError("'spool_max_bytes' is reached")
                folder.put(NEW, path.name)
        self._close_in_use()
        self._has_only_names = has_only_names
        new.memory[: len(opening)] = opening
        self._end = len(opening)
        self.all.append(Segment(path, first, first - 1))
        return new

    def _marks(self) -> bytes:
        """Return the lines that say which streams are open, and whether the process has ended in order."""
        for stream in [stream for stream in self._ids if stream in self._open]:
            del self._open[stream]
            self._open[stream] = None
        lines: list[bytes] = []
        size = 0
        for stream in [*self._open][: -_MOST_OPEN - 1 : -1]:
            line = encode_stream(stream)
            size += len(line)
            if size > _OPEN_BYTES:
                break
            lines.append(line)
        return b"".join([*reversed(lines), _CLOSED if self._is_marked_closed else b""])

    def _named_spare(self, folder: PrivateFolder, name: str, size: int) -> Mapped | None:
        """Give the spare segment its name, if it is still in place and large enough."""
        spare = self._spare
        if spare is None or len(spare.memory) < size:
            return None
        self._spare = None
        if not folder.has(SPARE, spare.identity):
            spare.memory.close()
            return None
        folder.put(SPARE, name)
        return spare

    def _close_in_use(self) -> None:
        if self._in_use is not None:
            self._full.append((self._in_use, self.all[-1].path.name, self._end))
            self._in_use = None
            self._ids = {}

    @property
    def in_use(self) -> bytes:
        """The bytes of the segment in use, even if its file is gone; none without such a segment."""
        return self._in_use.memory[: self._end] if self._in_use else b""

    # Removing

    def free(self, before: float) -> None:
        """Remove the segments whose events all have lower numbers. Their files go with `tidy`."""
        finished = len(self.all) - (self._in_use is not None)
        while finished and self.all[0].last < before:
            self._freed.append(self.all.pop(0).path.name)
            finished -= 1

    def oldest(self) -> Segment | None:
        """Return the segment to give up first, None if there is none besides the one in use."""
        return self.all[0] if len(self.all) > (self._in_use is not None) else None

    def remove(self, path: Path) -> None:
        """Forget the segment whose file was moved away."""
        self.all = [segment for segment in self.all if segment.path != path]

    @property
    def needs_spare(self) -> bool:
        """Whether there is no segment yet for when the one in use is full. Needs no lock."""
        return self._spare is None and not self._is_closed and not self._has_only_names

    def prepare(self) -> None:
        """Allocate the next segment. Needs no lock: other threads that compute make each step of it take long.

        Raises:
            OSError: There is no room on the disk, or the folder is gone.
        """
        with self._folder.open() as folder:
            self._spare = Mapped.create(folder, SPARE, SEGMENT_BYTES)
        # `close` sets this before it looks for a spare, so one of the two removes it.
        if self._is_closed:
            self._drop_spare()

    def _drop_spare(self) -> None:
        spare, self._spare = self._spare, None
        if spare is not None:
            spare.memory.close()
            with contextlib.suppress(OSError), self._folder.open() as folder:
                folder.unlink(SPARE)

    def tidy(self) -> None:
        """Close and cut full segments, and remove freed ones. Needs no lock, for the same reason as `prepare`."""
        if not (self._full or self._freed):
            return
        # The memory can be released even if the folder is gone.
        full = list(_taken_from(self._full))
        for segment, _, _ in full:
            segment.memory.close()
        with contextlib.suppress(OSError), self._folder.open() as folder:
            for segment, name, end in full:
                with contextlib.suppress(OSError):
                    if folder.has(name, segment.identity):
                        with os.fdopen(folder.open_file(name, os.O_WRONLY), "wb") as file:
                            file.truncate(end)
            for freed in _taken_from(self._freed):
                with contextlib.suppress(OSError):
                    folder.unlink(freed)

    def close(self) -> None:
        """Leave the files as they are to the next process."""
        self._is_closed = True
        self._close_in_use()
        self.tidy()
        self._drop_spare()

    # Restoring

    def files(self) -> list[tuple[str, tuple[int, int]]]:
        """Return the name and the identity of each mapped file. Needs no lock."""
        files = []
        if (spare := self._spare) is not None:
            files.append((SPARE, spare.identity))
        if (in_use := self._in_use) is not None and (segments := list(self.all)):
            files.append((segments[-1].path.name, in_use.identity))
        return files

    def mend(self, folder: PrivateFolder, in_memory: Callable[[int, float], Sequence[LogEvent]]) -> None:
        """Write missing files again, as far as their events are in memory.

        Args:
            folder: The spool's folder.
            in_memory: Returns the events in memory from one number to another.

        Raises:
            OSError: A file cannot be written now.
        """
        if self._spare is not None and not folder.has(SPARE, self._spare.identity):
            self._drop_spare()
        self._mend_in_use(folder)
        there = set(folder.names())
        for place, segment in reversed(list(enumerate(self.all))):
            is_in_use = self._in_use is not None and segment is self.all[-1]
            if not is_in_use and segment.path.name not in there:
                self.all[place : place + 1] = self._written_again(folder, segment, in_memory)

    def _mend_in_use(self, folder: PrivateFolder) -> None:
        if self._in_use is not None:
            self._in_use = self._in_use.restored(folder, self.all[-1].path.name)

    def _written_again(
        self, folder: PrivateFolder, lost: Segment, in_memory: Callable[[int, float], Sequence[LogEvent]]
    ) -> list[Segment]:
        events = in_memory(lost.first, lost.last)
        if not events:
            return []
        again = Segment(lost.path, lost.first, lost.last)
        lines = [encode_header(self._positions.children, self.process)]
        lines += [self._lines_of(stream) for stream in dict.fromkeys(event.stream for event in events)]
        for event in events:
            lines.append(encode_event(event, str(event.stream.id)))
            again.kinds[event.level, bool(event.progress)] += 1
        _write_whole(folder, lost.path.name, lines)
        return [again]


def _write_whole(folder: PrivateFolder, name: str, lines: Iterable[bytes]) -> None:
    folder.make_way(NEW)
    with os.fdopen(folder.create_file(NEW), "wb") as file:
        file.write(b"".join(lines))
    folder.put(NEW, name)


def _taken_from(queue: deque[_Item]) -> Iterator[_Item]:
    """Remove and yield the items of a queue. Two threads may do so at once: `popleft` is one C call."""
    with contextlib.suppress(IndexError):
        while True:
            yield queue.popleft()


def _differs(written: dict[str, Any], metadata: dict[str, Any]) -> bool:
    try:
        return bool(written != metadata)
    except Exception:
        # One of two different arrays, for example, whose comparison has no truth value.
        return True
