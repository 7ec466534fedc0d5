"""Reads the segments of a spool, whether its process is dead or alive. Needs no lock, and trusts no byte.

A living process may append to a segment while it is read. The system shows the bytes of the mapping to readers of the
file, so a reader finds complete lines, then perhaps a line that is being written, then the allocated zeros. It ignores
an incomplete line at the end.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import time
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

from composite_logstore.event import HIGHEST, LogEvent, Stream
from composite_logstore.spool import segments
from composite_logstore.spool.damage import Damage
from composite_logstore.spool.format import (
    LINE_BYTES,
    READABLE,
    Closed,
    Ended,
    Process,
    decode_event,
    decode_line,
    decode_mark,
    number_in,
    process_in_header,
    read_line,
)
from composite_logstore.spool.marks import Marks
from composite_logstore.spool.private_folder import CLOCK_STEP_SECONDS, KnownFolder, PrivateFolder, identity_of
from composite_logstore.spool.segments import Segment, Segments
from composite_logstore.spool.streams import Streams

Item: TypeAlias = LogEvent | Stream | Ended | Closed | Process | Damage
"""What a line of a segment says, or a piece that cannot be read."""
_OTHER_VERSION = "another version has written it"
_LINE_BREAK = ord("\n")
_PIECE_BYTES = 128 * 1024
"""How many bytes of a growing segment are read at a time."""
_SETTLED_SECONDS = 0.2
"""A line of a growing segment counts as damaged only if it still is after this time, in seconds."""


class SegmentReader:
    """Reads the events of a spool.

    Attributes:
        segments: The spool's segments.
        damage: The damaged pieces that `scan` has found, and files that were damaged when the folder was opened.
        marks: The marks that `scan` has found. A caller that reads with `items` has to note them itself.
    """

    def __init__(self, folder: KnownFolder, segments: Segments, streams: Streams) -> None:
        """Read nothing yet.

        Args:
            folder: The spool's folder.
            segments: Its segments.
            streams: The streams that its lines name.
        """
        self.damage: list[Damage] = []
        self.marks = Marks()
        self._folder = folder
        self.segments = segments
        self._streams = streams

    def scan(self) -> Iterator[LogEvent | Ended | Damage]:
        """Yield all events in order, and the ends of streams and damaged pieces where they are.

        For the spool of another process: the segments learn exactly which events they have, and the streams the
        attributes that they had last.

        Raises:
            OSError: The folder cannot be read now.
        """
        self._find_strays()
        self.marks = Marks()
        last = -1
        for segment in list(self.segments.all):
            segment.last = segment.first - 1
            for item, _ in self.items(segment, 0, is_scan=True):
                news = self._news(item, segment, last)
                if isinstance(news, LogEvent):
                    last = news.number
                if news is not None:
                    yield news

    def _news(self, item: Item, segment: Segment, last: int) -> LogEvent | Ended | Damage | None:
        """Note what a line of a segment says, and return it if a scan yields it, after an event with number `last`."""
        self.marks.note(item)
        if isinstance(item, LogEvent):
            if item.number <= last:
                # A Ctrl-C may have interrupted the writing of an event, which was then written again.
                return None
            segment.last = item.number
            segment.kinds[item.level, bool(item.progress)] += 1
            return item
        if isinstance(item, Damage):
            self._note(item)
        return item if isinstance(item, Ended | Damage) else None

    def _note(self, damage: Damage) -> None:
        """Note a damaged piece. If the line before is damaged in the same way, both become one piece."""
        both = self.damage[-1].continued_by(damage) if self.damage else None
        if both is not None:
            self.damage[-1] = both
        else:
            self.damage.append(damage)

    def read(self, after: int, before: float) -> Iterator[LogEvent]:
        """Yield the events with numbers above `after` and below `before`, in order.

        Raises:
            OSError: The folder cannot be read now.
        """
        return ForwardReader(self).read(after, before)

    def in_use(self) -> list[LogEvent]:
        """Return the events of the segment in use, from memory: its file may be gone."""
        data = self.segments.in_use
        items = self._lines(io.BytesIO(data), self.segments.all[-1], 0, is_scan=False) if data else ()
        return [item for item, _ in items if isinstance(item, LogEvent)]

    def items(self, segment: Segment, offset: int, is_scan: bool = False) -> Iterator[tuple[Item, int]]:
        """Yield what the lines of a segment say from an offset on, each item with the offset of the next line.

        There are none if the file is gone.

        Args:
            segment: The segment.
            offset: The offset of a line.
            is_scan: Whether all segments are read in order.

        Raises:
            OSError: The folder cannot be read now.
        """
        descriptor = None
        # The segment may have been dropped.
        with contextlib.suppress(FileNotFoundError), self._folder.open() as folder:
            try:
                descriptor = folder.open_file(segment.path.name, os.O_RDONLY)
            except PermissionError as error:
                yield Damage(segment.path, 0, None, error.strerror or "unreadable"), 0
        if descriptor is not None:
            with os.fdopen(descriptor, "rb") as file:
                yield from self._lines(file, segment, offset, is_scan)

    def _lines(self, file: BinaryIO, segment: Segment, offset: int, is_scan: bool) -> Iterator[tuple[Item, int]]:
        file.seek(offset)
        while True:
            if offset > segments.SEGMENT_BYTES + LINE_BYTES:
                yield Damage(segment.path, offset, 0, "longer than the spool makes any file"), offset
                return
            try:
                zeros, line = read_line(file, segments.SEGMENT_BYTES)
            except OSError as error:
                if error.errno != errno.EIO:
                    raise
                yield Damage(segment.path, 0, None, error.strerror or "unreadable"), offset
                return
            begin, offset = offset, offset + zeros + len(line)
            if not line.endswith(b"\n"):
                line = line.rstrip(b"\0")
                if segment is self.segments.all[-1]:
                    # It is being written, or a kill interrupted that, and then no `emit` has returned for it.
                    return
            if not line:
                # The rest was allocated and never written.
                return
            if zeros:
                yield Damage(segment.path, begin, zeros, "zeros"), begin + zeros
            if line == b"\n":
                # A damaged piece was here, and has been moved away.
                continue
            item = self._item(decode_line(line), segment, begin, is_scan)
            if isinstance(item, str):
                is_whole = item == _OTHER_VERSION
                place, length = (0, None) if is_whole else (begin + zeros, len(line))
                yield Damage(segment.path, place, length, item), offset
                if is_whole:
                    return
            elif item is not None:
                yield item, offset

    def _item(
        self, value: Any, segment: Segment, begin: int, is_scan: bool
    ) -> LogEvent | Stream | Ended | Closed | Process | str | None:
        """Return what a line's value says, None for a header that names no process, or what is wrong with the line."""
        if isinstance(value, list):
            event = decode_event(value, self._streams.of)
            if event is not None:
                return "out of order" if event.number < segment.first or begin in segment.strays else event
        if isinstance(value, dict):
            if "stream" in value:
                return self._streams.learned(value, is_scan) or "damaged"
            if value.get("format") in READABLE:
                return process_in_header(value)
            if begin == 0 and "format" in value:
                return _OTHER_VERSION
            return decode_mark(value, self._streams.of) or "damaged"
        return "damaged"

    # Lines out of order

    def _find_strays(self) -> None:
        """Find the fewest lines without which all numbers ascend.

        One number that is too high would otherwise hide all lines after it.
        """
        numbers, offsets, begins = self._numbers(lambda line: True)
        if all(one <= other for one, other in pairwise(numbers)):
            return
        # Lines that are no events must not cost one its place.
        numbers, offsets, begins = self._numbers(self._is_event)
        fitting = _ascending(numbers)
        for segment, begin, end in zip(self.segments.all, begins, [*begins[1:], len(numbers)], strict=True):
            segment.strays = frozenset(offsets[place] for place in range(begin, end) if not fitting[place])

    def _numbers(self, counts: Callable[[bytes], bool]) -> tuple[array[int], array[int], list[int]]:
        """Return the numbers of all lines that count, their offsets, and where those of each segment begin."""
        numbers, offsets = array("q"), array("q")
        begins = []
        for segment in self.segments.all:
            segment.strays = frozenset()
            begins.append(len(numbers))
            with contextlib.suppress(OSError):
                for offset, line in self._raw_lines(segment):
                    number = number_in(line)
                    if number is not None and segment.first <= number <= HIGHEST and counts(line):
                        numbers.append(number)
                        offsets.append(offset)
        return numbers, offsets, begins

    def _raw_lines(self, segment: Segment) -> Iterator[tuple[int, bytes]]:
        """Yield the offset and the bytes of each line of a segment, damaged or not."""
        offset = 0
        with self._folder.open() as folder, os.fdopen(folder.open_file(segment.path.name, os.O_RDONLY), "rb") as file:
            while offset <= segments.SEGMENT_BYTES + LINE_BYTES:
                zeros, line = read_line(file, segments.SEGMENT_BYTES)
                if not line:
                    return
                yield offset, line
                offset += zeros + len(line)

    def _is_event(self, line: bytes) -> bool:
        value = decode_line(line)
        return isinstance(value, list) and decode_event(value, self._streams.of) is not None


class ForwardReader:
    """Reads a spool forward: each call continues where the one before has ended.

    Attributes:
        reader: What reads the segments.
    """

    def __init__(self, reader: SegmentReader) -> None:
        self.reader = reader
        self._segment: Segment | None = None
        self._offset = 0

    def read(self, after: int, before: float) -> Iterator[LogEvent]:
        """Yield the events with numbers above `after` and below `before`, in order.

        Raises:
            OSError: The folder cannot be read now.
        """
        # The list is copied in one C call, so it may change meanwhile.
        for segment in list(self.reader.segments.all):
            if segment.last <= after or (self._segment is not None and segment.first < self._segment.first):
                continue
            if segment is not self._segment:
                self._segment, self._offset = segment, 0
            for item, offset in self.reader.items(segment, self._offset):
                if isinstance(item, LogEvent):
                    if item.number >= before:
                        return
                    self._offset = offset
                    if item.number > after:
                        after = item.number
                        yield item


class GrowingReader:
    """Reads a spool while its process writes: each call continues where the one before has ended.

    The segment that the process writes stays open, so a look for new lines is two calls of the system. What it has read
    is noted in the list of segments, as `SegmentReader.scan` does it, except for the kinds of events.

    Attributes:
        longest: How many bytes the longest of the lines has that were read last.
    """

    def __init__(self, reader: SegmentReader, folder: KnownFolder, first: int) -> None:
        """Read nothing yet.

        Args:
            reader: What reads the segments.
            folder: The spool's folder.
            first: The number of the first event to read. Earlier ones may be read, too.
        """
        self._reader = reader
        self._folder = folder
        self._first = first
        self._file: int | None = None
        self._segment: Segment | None = None
        self._offset = 0
        # The time of the folder when its segments were listed.
        self._listed = -1
        self._last = -1
        self.longest = 0
        # Where a line was damaged at the last call, and when that was seen first.
        self._damaged: tuple[int, float] | None = None

    def read(self, now: float, is_over: bool = False) -> list[LogEvent | Ended | Damage]:
        """Return what further lines say. None are left, if it is empty.

        A line that is being written may look damaged for a moment. So it counts as damaged only if it still is later.

        Args:
            now: The time in seconds.
            is_over: Whether the process is dead, so that no line is being written.

        Raises:
            FileNotFoundError: The folder is gone.
            OSError: The folder cannot be read now, or another version has written it.
        """
        while True:
            before = self._offset
            if self._segment is not None and self._file is not None:
                if self.has_grown():
                    found = self._lines_in(self._piece(), self._segment, now)
                    if found:
                        return found
                    if self._offset > before:
                        continue
                if not is_over and not self.has_successor():
                    return []
            # Nothing more is written there.
            rest = self._rest()
            if rest or not (self.has_successor() and self._is_next_open()):
                return rest

    def has_grown(self) -> bool:
        """Return whether the process has written further lines to the segment that it wrote last.

        Raises:
            OSError: That cannot be known now.
        """
        return self._file is not None and os.pread(self._file, 1, self._offset) not in (b"", b"\0")

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _piece(self) -> bytes:
        """Return bytes with at least one whole line, if there is one."""
        size = _PIECE_BYTES
        while True:
            data = os.pread(self._file or 0, size, self._offset)
            if len(data) < size or b"\n" in data or b"\0" in data or size > LINE_BYTES:
                return data
            size *= 4

    def _lines_in(self, data: bytes, segment: Segment, now: float) -> list[LogEvent | Ended | Damage]:
        """Return what the lines in some bytes say, as far as they are complete, and not damaged for the moment."""
        found: list[LogEvent | Ended | Damage] = []
        stream_of, marks = self._reader._streams.of, self._reader.marks
        noted: Stream | None = None
        lines = data.splitlines(keepends=True)
        self.longest = max(map(len, lines), default=0)
        for line in lines:
            if line[-1] != _LINE_BREAK:
                break
            value = decode_line(line)
            event = decode_event(value, stream_of) if type(value) is list else None
            if event is not None and event.number > self._last and event.number >= segment.first:
                # As `_add` does it, for most lines, and in half of the time.
                if event.stream is not noted:
                    noted = event.stream
                    marks.note(event)
                segment.last = self._last = event.number
                self._offset += len(line)
                found.append(event)
                continue
            noted = None
            said = event or self._reader._item(value, segment, self._offset, is_scan=True)
            if said == _OTHER_VERSION:
                raise OSError(errno.EPROTONOSUPPORT, _OTHER_VERSION, str(segment.path))
            if isinstance(said, str) and self._is_damaged_for_now(now):
                break
            item = Damage(segment.path, self._offset, len(line), said) if isinstance(said, str) else said
            self._offset += len(line)
            if item is not None:
                self._add(item, segment, found)
        return found

    def _add(self, item: Item, segment: Segment, found: list[LogEvent | Ended | Damage]) -> None:
        news = self._reader._news(item, segment, self._last)
        if isinstance(news, LogEvent):
            self._last = news.number
        if news is not None:
            found.append(news)

    def _is_damaged_for_now(self, now: float) -> bool:
        if self._damaged is None or self._damaged[0] != self._offset:
            self._damaged = self._offset, now
        return now - self._damaged[1] < _SETTLED_SECONDS

    def _rest(self) -> list[LogEvent | Ended | Damage]:
        """Read the present segment to its end: nothing is written there any more."""
        if self._segment is None or self._file is None:
            return []
        found: list[LogEvent | Ended | Damage] = []
        self.longest = LINE_BYTES
        for item, _ in self._reader.items(self._segment, self._offset, is_scan=True):
            self._add(item, self._segment, found)
        self.close()
        return found

    def has_successor(self) -> bool:
        """Return whether there is a segment after the present one. The folder is listed if it may have changed.

        Raises:
            FileNotFoundError: The folder is gone.
            OSError: The folder cannot be read now.
        """
        self._list()
        present = self._segment
        return any(present is None or segment.first > present.first for segment in self._reader.segments.all)

    def _list(self) -> None:
        status = os.stat(self._folder.path, follow_symlinks=False)
        if identity_of(status) != self._folder.identity:
            raise FileNotFoundError(errno.ENOENT, "the folder was moved or removed", str(self._folder.path))
        if status.st_mtime_ns == self._listed:
            return
        with self._folder.open() as folder:
            names = [name for name in folder.names() if segments.SEGMENT.fullmatch(name)]
            if self._file is not None and self._segment is not None:
                self._reopen(folder, self._segment.path.name)
        known = {segment.path.name: segment for segment in self._reader.segments.all}
        path = self._folder.path
        self._reader.segments.all = [
            known.get(name) or Segment(path / name, int(Path(name).stem), int(Path(name).stem) - 1) for name in names
        ]
        if time.time() - status.st_mtime > CLOCK_STEP_SECONDS:
            # Before that, the folder may change again without a change of its time.
            self._listed = status.st_mtime_ns

    def _reopen(self, folder: PrivateFolder, name: str) -> None:
        """Open the present segment anew if another file has its name: its process has restored or enlarged it."""
        status = folder.status(name)
        if self._file is not None and status and identity_of(status) != identity_of(os.fstat(self._file)):
            self.close()
            self._file = folder.open_file(name, os.O_RDONLY)

    def _is_next_open(self) -> bool:
        """Open the next segment. Returns whether there is one."""
        present = self._segment
        found = [one for one in self._reader.segments.all if present is None or one.first > present.first]
        if not found:
            return False
        if present is None:
            # Those before have no event that is wanted.
            found = [one for one in found if one.first < self._first][-1:] or found[:1]
        segment = found[0]
        try:
            with self._folder.open() as folder:
                file = folder.open_file(segment.path.name, os.O_RDONLY)
        except FileNotFoundError:
            # It had to make room.
            self._segment, self._listed = segment, -1
            return True
        self.close()
        self._segment, self._file, self._offset, self._damaged = segment, file, 0, None
        segment.last = segment.first - 1
        segment.kinds.clear()
        return True


def _ascending(numbers: Sequence[int]) -> bytearray:
    """Return 1 for each number of the longest subsequence that never descends, 0 for the others."""
    # For each length: the lowest number that a subsequence of that length ends with, and the place of that number.
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
