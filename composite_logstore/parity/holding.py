"""Which events of a stream one child holds, and a checksum of their contents."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any

from composite_logstore.backend import BACKFILLED, PAGES, Scanned
from composite_logstore.event import HIGHEST, LogEvent, Stream
from composite_logstore.intervals import Intervals
from composite_logstore.parity.expected import Expectation
from composite_logstore.parity.fields import shown
from composite_logstore.parity.result import DELAYS_SECONDS, NAMED, ChildParity, Tell
from composite_logstore.parity.scan import Source, as_event, numbered
from composite_logstore.processing.budget import is_notice, passes

if TYPE_CHECKING:
    from zenml.models import LogsResponse


BLOCK_BITS = 10
BLOCK = 1 << BLOCK_BITS
"""How many of a writer's numbers share one checksum."""

MASK = (1 << 64) - 1
"""A checksum is a sum of hashes modulo 2^64, so that no order is needed."""

_MINUTE = 60_000_000_000
# How many records at least lie between two places at which a scan can begin again.
_STRETCH = 16_384
_LOOKED_AT = 20
"""So many records without a writer are looked at in each chunk."""
_MOST_KINDS = 1000
"""So many levels are remembered: an archive may name any number as a level."""


@dataclass
class _Stretch:
    """A piece of a stream that was scanned: where to scan again for some of its events.

    Attributes:
        token: The token with which a scan begins there; None at the beginning of the stream.
        ordinal: How many records of other programs precede it.
        records: How many records it has.
        bounds: A writer → the lowest and the highest number of its events in the piece.
    """

    token: str | None
    ordinal: int
    records: int = 0
    bounds: dict[str, tuple[int, int]] = field(default_factory=dict)

    def add(self, writer: str, sequences: Sequence[int]) -> None:
        """Add the numbers of some records of one writer."""
        self.records += len(sequences)
        lowest, highest = _bounds(sequences)
        if writer in self.bounds:
            lowest, highest = min(lowest, self.bounds[writer][0]), max(highest, self.bounds[writer][1])
        self.bounds[writer] = lowest, highest

    def may_have(self, wanted: dict[str, Intervals]) -> bool:
        """Return whether the piece may contain some of these events."""
        return any(writer in wanted and wanted[writer].touches(*bounds) for writer, bounds in self.bounds.items())


def _is_backfilled(event: LogEvent) -> bool:
    return BACKFILLED in event.attributes or BACKFILLED in event.metadata


def _bounds(sequences: Sequence[int]) -> tuple[int, int]:
    # Most sequences are ranges, and the ends of a range are known at once.
    return (sequences[0], sequences[-1]) if isinstance(sequences, range) else (min(sequences), max(sequences))


class Holding:
    """What one child holds of one stream, as far as the stream was scanned.

    Attributes:
        source: The child.
        numbers: A writer → the numbers of its events that the child holds.
        sums: A writer → a block of `BLOCK` numbers → the checksum of the contents of these events.
        foreign: How many records other programs have written. They are numbered in the order in which they lie.
        stripped: Writers of this package that records without a writer seem to come from.
        token: Where the next scan begins.
        newest: The time of the newest event, in nanoseconds since the epoch; 0 if there is none.
        child: Counts duplicates, events that are out of order, minutes and delays.
        duplicates: The first duplicates: a writer and a number each.
        late: The first events that are out of order.
        exempt: A child's name → a writer → which of its events that child need not have.
        notices: A writer → the numbers of the events in whose place the child's budget has put a notice.
    """

    def __init__(self, source: Source, stream: Stream, others: Sequence[Source] = (), is_raw: bool = True) -> None:
        """Begin with nothing.

        Args:
            source: The child.
            stream: The stream.
            others: The children that it is compared with.
            is_raw: Whether all of them have the same format, so that records can be compared without decoding.
        """
        self.source = source
        self.numbers: dict[str, Intervals] = {}
        self.sums: dict[str, dict[int, int]] = {}
        self.foreign = 0
        self.stripped: set[str] = set()
        self.token: str | None = None
        self.newest = 0
        self.child = ChildParity()
        self.duplicates: list[tuple[str, int]] = []
        self.late: list[tuple[str, int]] = []
        self.exempt: dict[str, dict[str, Intervals]] = {}
        self.notices: dict[str, Intervals] = {}
        # A writer → the numbers of its events that a budget with something left has let pass.
        self._paid: dict[str, Intervals] = {}
        self._budget = source.config.budget
        self._stretches = [_Stretch(None, 0)]
        self._stream = stream
        # The children of which an event itself tells whether they get it. A thinned child is one of them even for its
        # own events: progress updates have another level there than elsewhere, so their contents are not compared.
        by_itself = {"collapse_repeats", "budget"}
        self._selective = [other for other in others if not by_itself.issuperset(other.config.excluded_by)]
        if source.config.is_thinned:
            self._selective.append(source)
        # A child's name → its rules and sampling, if it has any.
        judges = {other.name: Expectation(other.config, source, stream) for other in others}
        self._judges = {name: judge for name, judge in judges.items() if not judge.is_certain}
        # A level, and whether an event is a progress update → the children that need not have such an event.
        self._exempt_from: dict[tuple[int, bool], list[str]] = {}
        self._is_raw = is_raw and source.scanner.scan_format != PAGES

    @property
    def events(self) -> int:
        """How many events the child holds, without duplicates."""
        return sum(len(held) for held in self.numbers.values())

    def scan(self, logs: LogsResponse, tell: Tell) -> None:
        """Scan the stream from where the last scan ended.

        Raises:
            Exception: As `Reader.read` does.
        """
        for chunk in self.source.scanner.scan(logs, self.token):
            self.add(chunk)
            tell(len(chunk.contents))

    def add(self, chunk: Scanned) -> None:
        """Add records that lie one after the other."""
        ordinal, size = self.foreign, len(chunk.contents)
        writer, sequences = numbered(chunk, self._stream.id, ordinal)
        if not chunk.writer:
            self.foreign += size
            self._look_for_ours(chunk.contents)
        self._remember_place(chunk, writer, sequences)
        held = self.numbers.setdefault(writer, Intervals())
        self.sums.setdefault(writer, {})
        first, last = sequences[0], sequences[-1]
        is_plain = (
            last - first == size - 1
            and held.last < first
            and first >= 0
            and last <= HIGHEST
            and (isinstance(sequences, range) or sequences == list(range(first, last + 1)))
        )
        if is_plain and not self._selective and self._budget is None:
            contents = chunk.contents
            if not self._is_raw:
                contents = self._shown(contents, ordinal)
            held.add(first, last)
            self._sum(self.sums[writer], first, last, contents)
            self._note_times(chunk.times, chunk.arrived)
            return
        times = [
            chunk.times[place]
            for place, (sequence, content) in enumerate(zip(sequences, chunk.contents, strict=True))
            if 0 <= sequence <= HIGHEST and self._add_one(writer, sequence, content, ordinal + place, held)
        ]
        self._note_times(times, chunk.arrived)

    def _shown(self, contents: Sequence[Any], ordinal: int) -> list[tuple[Any, ...]]:
        """Return the fields that every reader shows of some records."""
        scanner, stream = self.source.scanner, self._stream
        shown_of = getattr(scanner, "shown_of", lambda content: None)
        return [
            shown_of(content) or shown(as_event(scanner, content, stream, ordinal + place))
            for place, content in enumerate(contents)
        ]

    def _remember_place(self, chunk: Scanned, writer: str, sequences: Sequence[int]) -> None:
        stretch = self._stretches[-1]
        stretch.add(writer, sequences)
        if chunk.token is not None:
            self.token = chunk.token
            if stretch.records >= _STRETCH:
                self._stretches.append(_Stretch(chunk.token, self.foreign))

    def _look_for_ours(self, contents: Sequence[Any]) -> None:
        """Note of a few records without a writer whether their id names one: on the way they lost the rest."""
        for content in contents[:_LOOKED_AT]:
            entry = self.source.scanner.entry_of(content)
            if entry is not None and entry.id.version == 8 and len(self.stripped) < _LOOKED_AT:
                # The form that `LogEvent.uid` gives it.
                self.stripped.add(entry.id.hex[:12] + entry.id.hex[13:16])

    @staticmethod
    def _sum(sums: dict[int, int], first: int, last: int, contents: Sequence[Any]) -> None:
        """Add the contents of consecutive events to the checksums of their blocks."""
        hashes = list(map(hash, contents))
        for block in range(first >> BLOCK_BITS, (last >> BLOCK_BITS) + 1):
            begin, end = max(0, (block << BLOCK_BITS) - first), ((block + 1) << BLOCK_BITS) - first
            sums[block] = (sums.get(block, 0) + sum(hashes[begin:end])) & MASK

    def _add_one(self, writer: str, sequence: int, content: Any, ordinal: int, held: Intervals) -> bool:
        """Add one record, and return whether it is an event that the child was not known to hold."""
        event: LogEvent | None = None
        if self._budget is not None:
            event = as_event(self.source.scanner, content, self._stream, ordinal)
            if event is not None and is_notice(event):
                self.notices.setdefault(writer, Intervals()).add(sequence, sequence)
                return False
            if event is not None and not passes(event, self._budget) and not _is_backfilled(event):
                self._paid.setdefault(writer, Intervals()).add(sequence, sequence)
        if sequence <= held.last:
            if sequence in held:
                self.child.duplicated += 1
                if len(self.duplicates) < NAMED:
                    self.duplicates.append((writer, sequence))
                return False
            if self.source.in_order:
                event = event or as_event(self.source.scanner, content, self._stream, ordinal)
                if event is None or not _is_backfilled(event):
                    self.child.out_of_order += 1
                    if len(self.late) < NAMED:
                        self.late.append((writer, sequence))
        held.add(sequence, sequence)
        if self._selective or not self._is_raw:
            event = event or as_event(self.source.scanner, content, self._stream, ordinal)
        if event is None or not self._is_exempt(writer, sequence, event, content):
            summand = hash(content) if self._is_raw else hash(shown(event))
            sums, block = self.sums[writer], sequence >> BLOCK_BITS
            sums[block] = (sums.get(block, 0) + summand) & MASK
        return True

    def _is_exempt(self, writer: str, sequence: int, event: LogEvent, content: Any) -> bool:
        """Note which children need not have an event, and return whether there is one."""
        kind = event.level, bool(event.progress)
        exempt = self._exempt_from.get(kind)
        if exempt is None:
            exempt = [child.name for child in self._selective if not child.config.expects(*kind)]
            if len(self._exempt_from) < _MOST_KINDS:
                self._exempt_from[kind] = exempt
        if self._judges:
            judges = self._judges.items()
            exempt = exempt + [
                name for name, judge in judges if name not in exempt and not judge.expects(event, content)
            ]
        for name in exempt:
            self.exempt.setdefault(name, {}).setdefault(writer, Intervals()).add(sequence, sequence)
        return bool(exempt)

    def doubt(self, child: str, writer: str, sequence: int) -> str:
        """Return why an event was expected of another child that it may rightly be missing, in words."""
        return self._judges[child].doubt(writer, sequence) if child in self._judges else ""

    def over_budget(self, writer: str) -> Intervals:
        """Return the numbers of a writer's events that may have been over the child's budget.

        They begin with a notice, and end before the next event that shows that there was something left again.
        """
        paid = self._paid.get(writer, Intervals())
        found = Intervals()
        for first, last in self.notices.get(writer, ()):
            _, end = next(iter(Intervals([(last, HIGHEST)]) - paid), (last, last))
            found.add(first, end)
        return found

    def again(self, logs: LogsResponse, wanted: dict[str, Intervals]) -> Generator[LogEvent]:
        """Scan again the pieces of the stream that may contain some events, and yield these events.

        Args:
            logs: The stream.
            wanted: A writer → the numbers of the events.

        Raises:
            Exception: As `Reader.read` does.
        """
        for may_have, group in groupby(self._stretches, lambda stretch: stretch.may_have(wanted)):
            if not may_have:
                continue
            stretches = list(group)
            ordinal, left = stretches[0].ordinal, sum(stretch.records for stretch in stretches)
            for chunk in self.source.scanner.scan(logs, stretches[0].token):
                writer, sequences = numbered(chunk, self._stream.id, ordinal)
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

    def _note_times(self, times: Sequence[int], arrived: int | None) -> None:
        if not times:
            return
        # They ascend, mostly.
        self.newest = max(self.newest, times[0], times[-1])
        minutes, delays = self.child.minutes, self.child.delays
        bounds = [bound * 1e9 for bound in DELAYS_SECONDS]
        if arrived is not None and not delays:
            delays += [0] * (len(bounds) + 1)

        def classes(place: int) -> tuple[int, int]:
            delay = bisect_left(bounds, arrived - times[place]) if arrived is not None else 0
            return times[place] // _MINUTE, delay

        # Times ascend, mostly: where the first and the last have the same classes, those between them have them too, so
        # that few need to be looked at.
        pieces = [(0, classes(0), len(times) - 1, classes(len(times) - 1))]
        while pieces:
            first, of_first, last, of_last = pieces.pop()
            if of_first == of_last:
                minute, delay = of_first
                minutes[minute] = minutes.get(minute, 0) + last - first + 1
                if arrived is not None:
                    delays[delay] += last - first + 1
            else:
                middle = (first + last) // 2
                pieces += [(first, of_first, middle, classes(middle)), (middle + 1, classes(middle + 1), last, of_last)]
