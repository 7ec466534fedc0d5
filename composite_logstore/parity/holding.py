"""Which events of a stream one child holds, and a checksum of their contents."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any

from composite_logstore.backend import BACKFILLED, Scanned
from composite_logstore.event import LogEvent, Stream
from composite_logstore.parity.intervals import Intervals
from composite_logstore.parity.result import DELAYS_SECONDS, NAMED, Tell
from composite_logstore.parity.scan import PAGES, Source, as_event, foreign_writer

if TYPE_CHECKING:
    from zenml.models import LogsResponse


BLOCK_BITS = 10
BLOCK = 1 << BLOCK_BITS
"""How many of a writer's numbers share one checksum."""

MASK = (1 << 64) - 1
"""A checksum is a sum of hashes modulo 2^64, so that no order is needed."""

_MINUTE = 60_000_000_000
_HIGHEST = 1 << 62
# The least number of records between two places that are remembered.
_STRETCH = 16_384


@dataclass
class _Stretch:
    """A piece of a stream, as it was scanned.

    Attributes:
        token: Where it begins.
        ordinal: How many records lie before it that nobody of ours has numbered.
        records: How many records it has.
        bounds: A writer → the lowest and the highest number of its events in it.
    """

    token: str | None
    ordinal: int
    records: int = 0
    bounds: dict[str, tuple[int, int]] = field(default_factory=dict)

    def add(self, writer: str, sequences: Sequence[int]) -> None:
        """Take in some more."""
        self.records += len(sequences)
        lowest, highest = _bounds(sequences)
        if writer in self.bounds:
            lowest, highest = min(lowest, self.bounds[writer][0]), max(highest, self.bounds[writer][1])
        self.bounds[writer] = lowest, highest

    def may_have(self, wanted: dict[str, Intervals]) -> bool:
        """Return whether some of the events that are wanted may be in it."""
        return any(writer in wanted and wanted[writer].touches(*bounds) for writer, bounds in self.bounds.items())


def _bounds(sequences: Sequence[int]) -> tuple[int, int]:
    # Of a range that is known at once, and most are ranges.
    return (sequences[0], sequences[-1]) if isinstance(sequences, range) else (min(sequences), max(sequences))


class Holding:
    """What one child holds of one stream, as far as it was scanned.

    Attributes:
        numbers: A writer → the numbers of its events that are there.
        foreign: How many records nobody of ours has numbered; they are numbered as they come.
        token: Where to go on.
        duplicates: The first copies found.
        late: The first events found out of order.
    """

    def __init__(self, source: Source, stream: Stream, others: Sequence[Source] = (), is_raw: bool = True) -> None:
        """Begin with nothing.

        Args:
            source: The child.
            stream: The stream.
            others: The children that it is compared with.
            is_raw: Whether the contents can be compared as they are.
        """
        self.source = source
        self.numbers: dict[str, Intervals] = {}
        self.sums: dict[str, dict[int, int]] = {}
        self.foreign = 0
        self.token: str | None = None
        self.duplicated = 0
        self.out_of_order = 0
        self.duplicates: list[tuple[str, int]] = []
        self.late: list[tuple[str, int]] = []
        self.minutes: Counter[int] = Counter()
        self.delays: Counter[int] = Counter()
        # A child's name → a writer → which of its events are not meant for that child.
        self.exempt: dict[str, dict[str, Intervals]] = {}
        self._stretches = [_Stretch(None, 0)]
        self._stream = stream
        self._particular = [other for other in others if not other.config.wants_all]
        if source.config.is_thinned:
            # Its updates have another level than elsewhere: they take no part in the comparison of contents.
            self._particular.append(source)
        self._is_raw = is_raw and source.scanner.scan_format != PAGES

    @property
    def events(self) -> int:
        """How many events are there, copies left out."""
        return sum(len(held) for held in self.numbers.values())

    def scan(self, logs: LogsResponse, tell: Tell) -> None:
        """Scan from where it was left.

        Raises:
            Exception: As `Reader.read` does.
        """
        for chunk in self.source.scanner.scan(logs, self.token):
            self.add(chunk)
            tell(len(chunk.contents))

    def add(self, chunk: Scanned) -> None:
        """Take in records that lie one after the other."""
        first_ordinal = self.foreign
        size = len(chunk.contents)
        writer, sequences = self._numbered(chunk, first_ordinal)
        if not chunk.writer:
            self.foreign += size
        stretch = self._stretches[-1]
        stretch.add(writer, sequences)
        if chunk.token is not None:
            self.token = chunk.token
            if stretch.records >= _STRETCH:
                self._stretches.append(_Stretch(chunk.token, self.foreign))
        held = self.numbers.setdefault(writer, Intervals())
        sums = self.sums.setdefault(writer, {})
        first, last = sequences[0], sequences[-1]
        is_plain = (
            last - first == size - 1
            and held.last < first
            and first >= 0
            and last < _HIGHEST
            and (isinstance(sequences, range) or sequences == list(range(first, last + 1)))
        )
        if is_plain and not self._particular and self._is_raw:
            held.add(first, last)
            hashes = list(map(hash, chunk.contents))
            for block in range(first >> BLOCK_BITS, (last >> BLOCK_BITS) + 1):
                begin, end = max(0, (block << BLOCK_BITS) - first), ((block + 1) << BLOCK_BITS) - first
                sums[block] = (sums.get(block, 0) + sum(hashes[begin:end])) & MASK
            self._note_times(chunk.times, chunk.arrived)
            return
        times = []
        for place, (sequence, content) in enumerate(zip(sequences, chunk.contents, strict=True)):
            if not 0 <= sequence < _HIGHEST:
                continue
            event: LogEvent | None = None
            if sequence <= held.last:
                if sequence in held:
                    self.duplicated += 1
                    if len(self.duplicates) < NAMED:
                        self.duplicates.append((writer, sequence))
                    continue
                if self.source.in_order:
                    event = as_event(self.source.scanner, content, self._stream, first_ordinal + place)
                    if event is None or BACKFILLED not in {**event.attributes, **event.metadata}:
                        self.out_of_order += 1
                        if len(self.late) < NAMED:
                            self.late.append((writer, sequence))
            held.add(sequence, sequence)
            times.append(chunk.times[place])
            if self._particular or not self._is_raw:
                event = event or as_event(self.source.scanner, content, self._stream, first_ordinal + place)
            is_common = True
            for other in self._particular:
                if event is not None and not other.config.expects(event.level, event.progress):
                    is_common = False
                    self.exempt.setdefault(other.name, {}).setdefault(writer, Intervals()).add(sequence, sequence)
            if is_common:
                summand = hash(content) if self._is_raw else hash(shown(event))
                block = sequence >> BLOCK_BITS
                sums[block] = (sums.get(block, 0) + summand) & MASK
        self._note_times(times, chunk.arrived)

    def again(self, logs: LogsResponse, wanted: dict[str, Intervals]) -> Generator[LogEvent]:
        """Scan once more where events may be that are wanted, and yield them.

        Args:
            logs: The stream.
            wanted: A writer → the numbers of its events that are wanted.

        Raises:
            Exception: As `Reader.read` does.
        """
        for may_have, group in groupby(self._stretches, lambda stretch: stretch.may_have(wanted)):
            if not may_have:
                continue
            stretches = list(group)
            ordinal, left = stretches[0].ordinal, sum(stretch.records for stretch in stretches)
            for chunk in self.source.scanner.scan(logs, stretches[0].token):
                writer, sequences = self._numbered(chunk, ordinal)
                if writer in wanted and wanted[writer].touches(*_bounds(sequences)):
                    for place, sequence in enumerate(sequences):
                        if sequence in wanted[writer]:
                            content = chunk.contents[place]
                            event = as_event(self.source.scanner, content, self._stream, ordinal + place)
                            if event is not None:
                                yield event
                ordinal += 0 if chunk.writer else len(chunk.contents)
                left -= len(chunk.contents)
                if left <= 0:
                    break

    def _numbered(self, chunk: Scanned, ordinal: int) -> tuple[str, Sequence[int]]:
        """Return the writer and the numbers of records, whoever wrote them."""
        if chunk.writer:
            return chunk.writer, chunk.sequences
        return foreign_writer(self._stream.id), range(ordinal, ordinal + len(chunk.contents))

    def _note_times(self, times: Sequence[int], arrived: int | None) -> None:
        if not times:
            return
        bounds = [bound * 1e9 for bound in DELAYS_SECONDS]

        def classes(place: int) -> tuple[int, int]:
            delay = bisect_left(bounds, arrived - times[place]) if arrived is not None else 0
            return times[place] // _MINUTE, delay

        # Between two of the same classes lie others of these: so few of them need be looked at.
        pieces = [(0, classes(0), len(times) - 1, classes(len(times) - 1))]
        while pieces:
            first, of_first, last, of_last = pieces.pop()
            if of_first == of_last:
                minute, delay = of_first
                self.minutes[minute] += last - first + 1
                if arrived is not None:
                    self.delays[delay] += last - first + 1
            else:
                middle = (first + last) // 2
                pieces += [(first, of_first, middle, classes(middle)), (middle + 1, classes(middle + 1), last, of_last)]


def shown(event: LogEvent | None) -> tuple[Any, ...]:
    """Return what every reader shows of an event, or would."""
    if event is None:
        return ()
    level = max(0, min(event.level // 10 * 10, 50))
    place = (event.file, event.line) if event.file else ("", 0)
    return (event.sequence, event.text, level, event.logger_name, event.time_unix_nano // 1000, *place)
