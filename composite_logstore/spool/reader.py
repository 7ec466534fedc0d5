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
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, BinaryIO, TypeAlias

from composite_logstore.event import HIGHEST, LogEvent, Stream
from composite_logstore.spool import segments
from composite_logstore.spool.damage import Damage
from composite_logstore.spool.format import (
    LINE_BYTES,
    READABLE,
    Closed,
    Ended,
    decode_event,
    decode_line,
    decode_mark,
    number_in,
    read_line,
)
from composite_logstore.spool.marks import Marks
from composite_logstore.spool.private_folder import KnownFolder
from composite_logstore.spool.segments import Segment, Segments
from composite_logstore.spool.streams import Streams

Item: TypeAlias = LogEvent | Stream | Ended | Closed | Damage
"""What a line of a segment says, or a piece that cannot be read."""
_OTHER_VERSION = "another version has written it"


class SegmentReader:
    """Reads the events of a spool.

    Attributes:
        segments: The spool's segments.
        damage: The damaged pieces that `scan` has found, and files that were damaged when the folder was opened.
        marks: What the marks say that `scan` has found. Whoever reads with `items` alone notes them by itself.
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
                self.marks.note(item)
                if isinstance(item, Damage):
                    self._note(item)
                    yield item
                elif isinstance(item, Ended):
                    yield item
                # A Ctrl-C may have interrupted the writing of an event, which was then written again.
                elif isinstance(item, LogEvent) and item.number > last:
                    last = segment.last = item.number
                    segment.kinds[item.level, bool(item.progress)] += 1
                    yield item

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

        There are none if the file is gone. Headers are no items.

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
                # A damaged piece was here, and was set aside.
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
    ) -> LogEvent | Stream | Ended | Closed | str | None:
        """Return what a line's value says, None for a header, or what is wrong with the line."""
        if isinstance(value, list):
            event = decode_event(value, self._streams.of)
            if event is not None:
                return "out of order" if event.number < segment.first or begin in segment.strays else event
        if isinstance(value, dict):
            if "stream" in value:
                return self._streams.learned(value, is_scan) or "damaged"
            if value.get("format") in READABLE:
                return None
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
        """Begin at the beginning.

        Args:
            reader: What reads the segments.
        """
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
