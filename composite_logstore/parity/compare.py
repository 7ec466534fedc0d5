"""Parity: whether several children hold the same events of a stream, and which they do not.

Each child is scanned once, one after the other. Of what it holds, only the runs of numbers are kept, and for each
1,024 numbers of a writer a sum over the contents: memory grows with the gaps, not with the events, and no order is
needed. Only where sums differ is it read again: it is remembered which numbers lie between which two places.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, fields
from itertools import groupby, islice
from typing import TYPE_CHECKING, Any, TypeAlias

from zenml.exceptions import DoesNotExistException, LogStoreError

from composite_logstore.backend import BACKFILLED, Scanned, UnavailableError
from composite_logstore.event import LogEvent, Stream
from composite_logstore.parity.intervals import Runs
from composite_logstore.parity.scan import PAGES, Source, as_event, foreign_writer

if TYPE_CHECKING:
    from zenml.models import LogsResponse

NAMED = 50
"""How many events are named of each kind of difference of a child in a stream."""

DELAYS_SECONDS = (0.1, 0.5, 1, 2, 5, 10, 30, 60, 300, 3600)
"""The bounds of the classes that delays are counted in."""

_MINUTE = 60_000_000_000
_BLOCK_BITS = 10
_BLOCK = 1 << _BLOCK_BITS
_MOST_BLOCKS = 4_096
# So many records at least lie between two places that are remembered.
_STRETCH = 16_384
_HIGHEST = 1 << 62
_64_BITS = (1 << 64) - 1
_ROUNDS = 3

Tell: TypeAlias = Callable[[int], None]
"""Told how many more records were read."""


@dataclass
class Difference:
    """One event in which children differ.

    Attributes:
        kind: `missing`, `duplicated`, `out of order` or `different`.
        child: Where.
        writer: The event's writer.
        sequence: Its number among the writer's events of the stream.
        uid: Its `log.record.uid`, if it could be read anywhere.
        time_unix_nano: When it was logged, the same.
        message: The beginning of what it says, the same.
        detail: What differs.
    """

    kind: str
    child: str
    writer: str
    sequence: int
    uid: str = ""
    time_unix_nano: int = 0
    message: str = ""
    detail: str = ""


@dataclass
class Counts:
    """How many events a child holds and lacks.

    Attributes:
        events: The events that it holds, copies left out.
        missing: How many it lacks which another holds, or which nobody holds although later ones of their writer are
            there.
        arriving: How many it lacks at the end of a stream that is still being written.
        duplicated: How many copies it holds besides.
        out_of_order: How many come after later ones of their writer, although it keeps their order.
        different: How many say something else than in the first child that holds them.
    """

    events: int = 0
    missing: int = 0
    arriving: int = 0
    duplicated: int = 0
    out_of_order: int = 0
    different: int = 0

    @property
    def differences(self) -> int:
        """How many events are not as they should be. A copy is one that `fetch()` leaves out: it is none of them."""
        return self.missing + self.out_of_order + self.different

    def count(self, other: Counts) -> None:
        """Add those of another stream."""
        for counted in fields(Counts):
            setattr(self, counted.name, getattr(self, counted.name) + getattr(other, counted.name))


@dataclass
class ChildParity(Counts):
    """What one child holds of a stream.

    Attributes:
        error: Why it could not be read to the end, empty if it could.
        excuse: Why it could be read and yet not be compared, empty if it could.
        minutes: A minute since the epoch → the events that it holds of it.
        delays: For each class of delay, in the order of `DELAYS_SECONDS`, the events that took so long; empty where
            it is not known when they arrived.
    """

    error: str = ""
    excuse: str = ""
    minutes: dict[int, int] = field(default_factory=dict)
    delays: list[int] = field(default_factory=list)


@dataclass
class StreamParity:
    """What became of the comparison of one stream.

    Attributes:
        logs_id: The stream.
        label: What to call it.
        children: A child's name → what it holds.
        differences: Some of the events that differ, the first ones of each kind.
    """

    logs_id: str
    label: str
    children: dict[str, ChildParity]
    differences: list[Difference] = field(default_factory=list)

    @property
    def was_compared(self) -> bool:
        """Whether every child could be read and compared."""
        return not any(child.error or child.excuse for child in self.children.values())

    def as_dict(self) -> dict[str, Any]:
        """Return it in plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> StreamParity:
        """Return it again, from JSON too."""
        children = {name: ChildParity(**child) for name, child in values["children"].items()}
        for child in children.values():
            child.minutes = {int(minute): number for minute, number in child.minutes.items()}
        return cls(
            values["logs_id"], values["label"], children, [Difference(**named) for named in values["differences"]]
        )


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

    def may_have(self, wanted: dict[str, Runs]) -> bool:
        """Return whether some of the events that are wanted may be in it."""
        return any(writer in wanted and wanted[writer].touches(*bounds) for writer, bounds in self.bounds.items())


def _bounds(sequences: Sequence[int]) -> tuple[int, int]:
    # Of a range that is known at once, and most are ranges.
    return (sequences[0], sequences[-1]) if isinstance(sequences, range) else (min(sequences), max(sequences))


class Holding:
    """What one child holds of one stream, as far as it was scanned.

    Attributes:
        runs: A writer → the numbers of its events that are there.
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
        self.runs: dict[str, Runs] = {}
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
        self.exempt: dict[str, dict[str, Runs]] = {}
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
        return sum(len(runs) for runs in self.runs.values())

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
        runs = self.runs.setdefault(writer, Runs())
        sums = self.sums.setdefault(writer, {})
        first, last = sequences[0], sequences[-1]
        is_plain = (
            last - first == size - 1
            and runs.last < first
            and first >= 0
            and last < _HIGHEST
            and (isinstance(sequences, range) or sequences == list(range(first, last + 1)))
        )
        if is_plain and not self._particular and self._is_raw:
            runs.add(first, last)
            hashes = list(map(hash, chunk.contents))
            for block in range(first >> _BLOCK_BITS, (last >> _BLOCK_BITS) + 1):
                begin, end = max(0, (block << _BLOCK_BITS) - first), ((block + 1) << _BLOCK_BITS) - first
                sums[block] = (sums.get(block, 0) + sum(hashes[begin:end])) & _64_BITS
            self._note_times(chunk.times, chunk.arrived)
            return
        times = []
        for place, (sequence, content) in enumerate(zip(sequences, chunk.contents, strict=True)):
            if not 0 <= sequence < _HIGHEST:
                continue
            event: LogEvent | None = None
            if sequence <= runs.last:
                if sequence in runs:
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
            runs.add(sequence, sequence)
            times.append(chunk.times[place])
            if self._particular or not self._is_raw:
                event = event or as_event(self.source.scanner, content, self._stream, first_ordinal + place)
            is_common = True
            for other in self._particular:
                if event is not None and not other.config.expects(event.level, event.progress):
                    is_common = False
                    self.exempt.setdefault(other.name, {}).setdefault(writer, Runs()).add(sequence, sequence)
            if is_common:
                summand = hash(content) if self._is_raw else hash(_shown(event))
                block = sequence >> _BLOCK_BITS
                sums[block] = (sums.get(block, 0) + summand) & _64_BITS
        self._note_times(times, chunk.arrived)

    def again(self, logs: LogsResponse, wanted: dict[str, Runs]) -> Generator[LogEvent]:
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


def _shown(event: LogEvent | None) -> tuple[Any, ...]:
    """Return what every reader shows of an event, or would."""
    if event is None:
        return ()
    level = max(0, min(event.level // 10 * 10, 50))
    place = (event.file, event.line) if event.file else ("", 0)
    return (event.sequence, event.text, level, event.logger_name, event.time_unix_nano // 1000, *place)


_SHOWN = ("sequence", "message", "level", "logger", "time", "file", "line")


def _whole(event: LogEvent | None) -> tuple[Any, ...]:
    """Return all of an event's own fields."""
    if event is None:
        return ()
    attributes = {**event.attributes, **event.metadata}
    attributes.pop(BACKFILLED, None)
    return (
        *_shown(event),
        event.time_unix_nano,
        event.level,
        event.level_name,
        event.message,
        event.function,
        event.exception,
        event.trace,
        repr(sorted(attributes.items())),
    )


_WHOLE = (*_SHOWN, "time", "level", "level", "message", "function", "exception", "trace", "attributes")


class Comparison:
    """Compares one stream."""

    def __init__(
        self,
        logs: LogsResponse,
        label: str,
        sources: Sequence[Source],
        is_in_progress: bool = False,
        tell: Tell = lambda number: None,
    ) -> None:
        """Prepare.

        Args:
            logs: The stream, as ZenML knows it.
            label: What to call it.
            sources: The children, at least one.
            is_in_progress: Whether it may still grow.
            tell: Told how many more records were read.
        """
        self._logs = logs
        self._stream = Stream(logs.id, {})
        self._tell = tell
        self._is_in_progress = is_in_progress
        formats = {source.scanner.scan_format for source in sources}
        self._is_raw = len(formats) == 1 and PAGES not in formats
        self._fields = _whole if self._is_raw else _shown
        self._names = _WHOLE if self._is_raw else _SHOWN
        self._is_thinned = any(source.config.is_thinned for source in sources)
        self.result = StreamParity(str(logs.id), label, {source.name: ChildParity() for source in sources})
        self._holdings = {
            source.name: Holding(
                source, self._stream, [other for other in sources if other is not source], self._is_raw
            )
            for source in sources
        }

    def run(self) -> StreamParity:
        """Compare, and return what came out."""
        for name, holding in list(self._holdings.items()):
            self._scan(name, holding)
        self._excuse()
        missing = self._missing()
        for _ in range(_ROUNDS):
            # It may have grown while the others were read.
            before = {name: holding.events for name, holding in self._holdings.items()}
            for name, holding in list(self._holdings.items()):
                if any(runs.last > holding.runs.get(w, Runs()).last for w, runs in missing.get(name, {}).items()):
                    self._scan(name, holding)
            if before == {name: holding.events for name, holding in self._holdings.items()}:
                break
            missing = self._missing()
        self._count(missing)
        self._compare_contents()
        self._describe()
        return self.result

    def _scan(self, name: str, holding: Holding) -> None:
        try:
            holding.scan(self._logs, self._tell)
        except DoesNotExistException:
            pass
        except Exception as error:
            self._give_up(name, error)

    def _give_up(self, name: str, error: Exception) -> None:
        """Leave a child out that cannot be read."""
        is_known = isinstance(error, LogStoreError | UnavailableError | ValueError)
        self.result.children[name].error = str(error) if is_known else f"its reader raised {type(error).__name__}"
        self._holdings.pop(name, None)

    def _excuse(self) -> None:
        """Leave out who does not say which events it holds, where the others do."""
        foreign = foreign_writer(self._logs.id)
        holdings = self._holdings
        known = [name for name, holding in holdings.items() if holding.runs.keys() - {foreign}]
        copied = any(foreign in holdings[name].runs for name in known)
        for name, holding in list(holdings.items()):
            if holding.events and name not in known and known and not copied:
                child = self.result.children[name]
                child.events = holding.events
                child.excuse = "its entries do not say which events they are"
                del holdings[name]

    def _missing(self) -> dict[str, dict[str, Runs]]:
        """Return what each child lacks: its name → a writer → numbers."""
        missing: dict[str, dict[str, Runs]] = {}
        writers = {writer for holding in self._holdings.values() for writer in holding.runs}
        for writer in sorted(writers):
            held = Runs()
            for holding in self._holdings.values():
                held |= holding.runs.get(writer, Runs())
            gaps = Runs([(0, held.last)]) - held
            for name, holding in self._holdings.items():
                expected = held
                for other in self._holdings.values():
                    exempt = other.exempt.get(name, {}).get(writer)
                    expected = expected - exempt if exempt else expected
                lacks = expected - holding.runs.get(writer, Runs())
                # Of what nobody has, nobody knows whether it was meant for one that does not take everything.
                if gaps and holding.source.config.wants_all:
                    lacks |= gaps
                if lacks:
                    missing.setdefault(name, {})[writer] = lacks
        return missing

    def _count(self, missing: dict[str, dict[str, Runs]]) -> None:
        for name, holding in self._holdings.items():
            child = self.result.children[name]
            child.events = holding.events
            child.duplicated = holding.duplicated
            child.out_of_order = holding.out_of_order
            child.minutes = dict(holding.minutes)
            child.delays = [holding.delays[place] for place in range(len(DELAYS_SECONDS) + 1)] if holding.delays else []
            named: list[tuple[str, int]] = []
            for writer, lacks in missing.get(name, {}).items():
                last = holding.runs.get(writer, Runs()).last
                arriving = lacks - Runs([(0, last)]) if self._is_in_progress else Runs()
                lacks = lacks - arriving if arriving else lacks
                child.arriving += len(arriving)
                child.missing += len(lacks)
                named += islice(((writer, number) for number in _numbers(lacks)), NAMED - len(named))
            self._name("missing", name, named)
            self._name("duplicated", name, holding.duplicates)
            self._name("out of order", name, holding.late)

    def _name(self, kind: str, child: str, events: Iterable[tuple[str, int]]) -> None:
        self.result.differences += [Difference(kind, child, writer, sequence) for writer, sequence in events]

    def _compare_contents(self) -> None:
        """Find the events that do not say the same everywhere: where the sums of their blocks differ."""
        doubtful = []
        writers = {writer for holding in self._holdings.values() for writer in holding.sums}
        for writer in sorted(writers):
            sums = [holding.sums.get(writer, {}) for holding in self._holdings.values()]
            for block in sorted(set().union(*sums)):
                if len({of_child[block] for of_child in sums if block in of_child}) > 1:
                    doubtful.append((writer, block))
        for begin in range(0, len(doubtful), _MOST_BLOCKS):
            self._compare_blocks(doubtful[begin : begin + _MOST_BLOCKS])

    def _compare_blocks(self, blocks: list[tuple[str, int]]) -> None:
        found: dict[str, dict[tuple[str, int], array[int]]] = {}
        wanted: dict[str, Runs] = {}
        for writer, block in blocks:
            wanted.setdefault(writer, Runs()).add(block << _BLOCK_BITS, (block << _BLOCK_BITS) + _BLOCK - 1)
        for name in list(self._holdings):
            found[name] = {key: array("Q", bytes(8 * _BLOCK)) for key in blocks}
            for event in self._again(name, wanted):
                if event.progress and self._is_thinned:
                    continue
                of_block = found[name][event.writer, event.sequence >> _BLOCK_BITS]
                place = event.sequence & (_BLOCK - 1)
                # The first of its copies counts; 0 is none.
                of_block[place] = of_block[place] or (hash(self._fields(event)) & _64_BITS or 1)
        names = list(self._holdings)
        for writer, block in blocks:
            for place in range(_BLOCK):
                said = [(name, value) for name in names if (value := found[name][writer, block][place])]
                for name, value in said[1:]:
                    if value != said[0][1]:
                        child = self.result.children[name]
                        child.different += 1
                        if child.different <= NAMED:
                            self._name("different", name, [(writer, (block << _BLOCK_BITS) + place)])

    def _again(self, name: str, wanted: dict[str, Runs]) -> Generator[LogEvent]:
        """Read a child once more, and yield the events that are wanted; one that fails meanwhile is left out."""
        try:
            yield from self._holdings[name].again(self._logs, wanted)
        except DoesNotExistException:
            return
        except Exception as error:
            self._give_up(name, error)

    def _describe(self) -> None:
        """Find out what the events that were named say, and what differs in them."""
        wanted = {(named.writer, named.sequence) for named in self.result.differences}
        said: dict[tuple[str, int], dict[str, LogEvent]] = {}
        for name in list(self._holdings):
            runs = self._holdings[name].runs
            here = {(writer, number) for writer, number in wanted if writer in runs and number in runs[writer]}
            if not here:
                continue
            of_writers: dict[str, Runs] = {}
            for writer, number in sorted(here):
                of_writers.setdefault(writer, Runs()).add(number, number)
            with closing(self._again(name, of_writers)) as events:
                for event in events:
                    key = (event.writer, event.sequence)
                    said.setdefault(key, {}).setdefault(name, event)
                    here.discard(key)
                    if not here:
                        break
        for named in self.result.differences:
            by_child = said.get((named.writer, named.sequence))
            if not by_child:
                named.detail = "no child has it, but later ones of its writer"
                continue
            event = next(iter(by_child.values()))
            named.uid, named.time_unix_nano, named.message = event.uid, event.time_unix_nano, event.message[:500]
            if named.kind == "different" and named.child in by_child:
                reference = next(name for name in self.result.children if name in by_child)
                other = by_child[named.child]
                pairs = zip(self._names, self._fields(event), self._fields(other), strict=True)
                differ = list(dict.fromkeys(field for field, one, another in pairs if one != another))
                named.detail = f"{', '.join(differ)}: not as in '{reference}'"
                if "[shortened by " in other.text[-40:] and "message" in differ:
                    named.detail += " (its backend had to shorten it)"


def _numbers(runs: Runs) -> Iterator[int]:
    for first, last in runs:
        yield from range(first, last + 1)


def compare(
    logs: LogsResponse,
    label: str,
    sources: Sequence[Source],
    is_in_progress: bool = False,
    tell: Tell = lambda number: None,
) -> StreamParity:
    """Compare what children hold of a stream. The arguments are those of `Comparison`."""
    return Comparison(logs, label, sources, is_in_progress, tell).run()
