"""Comparing: whether several children hold the same events of a stream, and which events differ.

See the theory of operation at the head of the package.
"""

from __future__ import annotations

from array import array
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from itertools import islice
from typing import TYPE_CHECKING, Any

from zenml.exceptions import DoesNotExistException, LogStoreError

from composite_logstore.backend import BACKFILLED, UnavailableError
from composite_logstore.event import LogEvent, Stream
from composite_logstore.intervals import Intervals
from composite_logstore.parity.holding import BLOCK, BLOCK_BITS, MASK, Holding, shown
from composite_logstore.parity.result import DELAYS_SECONDS, NAMED, ChildParity, Difference, StreamParity, Tell
from composite_logstore.parity.scan import PAGES, Source, foreign_writer

if TYPE_CHECKING:
    from zenml.models import LogsResponse


_MOST_BLOCKS = 4_096
_ROUNDS = 3


_SHOWN = ("sequence", "message", "level", "logger", "time", "file", "line")


def _whole(event: LogEvent | None) -> tuple[Any, ...]:
    """Return all fields of an event, for children that share a format."""
    if event is None:
        return ()
    attributes = {**event.attributes, **event.metadata}
    attributes.pop(BACKFILLED, None)
    return (
        *shown(event),
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
    """Compares one stream between several children."""

    def __init__(
        self,
        logs: LogsResponse,
        label: str,
        sources: Sequence[Source],
        is_in_progress: bool = False,
        tell: Tell = lambda number: None,
    ) -> None:
        """Prepare the comparison; nothing is read yet.

        Args:
            logs: The stream, as ZenML knows it.
            label: The stream's name in reports.
            sources: The children, at least one.
            is_in_progress: Whether the stream may still grow.
            tell: Is told how many more records were read.
        """
        self._logs = logs
        self._stream = Stream(logs.id, {})
        self._tell = tell
        self._is_in_progress = is_in_progress
        formats = {source.scanner.scan_format for source in sources}
        self._is_raw = len(formats) == 1 and PAGES not in formats
        self._fields = _whole if self._is_raw else shown
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
        """Read the children, and return the result."""
        for name, holding in list(self._holdings.items()):
            self._scan(name, holding)
        self._excuse()
        missing = self._missing()
        for _ in range(_ROUNDS):
            # The stream may have grown while the other children were read.
            before = {name: holding.events for name, holding in self._holdings.items()}
            for name, holding in list(self._holdings.items()):
                numbers = holding.numbers
                if any(absent.last > numbers.get(w, Intervals()).last for w, absent in missing.get(name, {}).items()):
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
        """Leave out a child that cannot be read."""
        is_known = isinstance(error, LogStoreError | UnavailableError | ValueError)
        self.result.children[name].error = str(error) if is_known else f"its reader raised {type(error).__name__}"
        self._holdings.pop(name, None)

    def _excuse(self) -> None:
        """Leave out children whose entries do not say which events they are, if those of other children do."""
        foreign = foreign_writer(self._logs.id)
        holdings = self._holdings
        known = [name for name, holding in holdings.items() if holding.numbers.keys() - {foreign}]
        copied = any(foreign in holdings[name].numbers for name in known)
        for name, holding in list(holdings.items()):
            if holding.events and name not in known and known and not copied:
                child = self.result.children[name]
                child.events = holding.events
                child.excuse = "its entries do not say which events they are"
                del holdings[name]

    def _missing(self) -> dict[str, dict[str, Intervals]]:
        """Return which events each child is missing: its name → a writer → numbers."""
        missing: dict[str, dict[str, Intervals]] = {}
        writers = {writer for holding in self._holdings.values() for writer in holding.numbers}
        for writer in sorted(writers):
            held = Intervals()
            for holding in self._holdings.values():
                held |= holding.numbers.get(writer, Intervals())
            gaps = Intervals([(0, held.last)]) - held
            for name, holding in self._holdings.items():
                expected = held
                for other in self._holdings.values():
                    exempt = other.exempt.get(name, {}).get(writer)
                    expected = expected - exempt if exempt else expected
                absent = expected - holding.numbers.get(writer, Intervals())
                # No child has these events, so their level is unknown: a child with `min_level` need not have them.
                if gaps and holding.source.config.wants_all:
                    absent |= gaps
                if absent:
                    missing.setdefault(name, {})[writer] = absent
        return missing

    def _count(self, missing: dict[str, dict[str, Intervals]]) -> None:
        for name, holding in self._holdings.items():
            child = self.result.children[name]
            child.events = holding.events
            child.duplicated = holding.duplicated
            child.out_of_order = holding.out_of_order
            child.minutes = dict(holding.minutes)
            child.delays = [holding.delays[place] for place in range(len(DELAYS_SECONDS) + 1)] if holding.delays else []
            named: list[tuple[str, int]] = []
            for writer, absent in missing.get(name, {}).items():
                last = holding.numbers.get(writer, Intervals()).last
                arriving = absent - Intervals([(0, last)]) if self._is_in_progress else Intervals()
                absent = absent - arriving if arriving else absent
                child.arriving += len(arriving)
                child.missing += len(absent)
                named += islice(((writer, number) for number in _numbers(absent)), NAMED - len(named))
            self._name("missing", name, named)
            self._name("duplicated", name, holding.duplicates)
            self._name("out of order", name, holding.late)

    def _name(self, kind: str, child: str, events: Iterable[tuple[str, int]]) -> None:
        self.result.differences += [Difference(kind, child, writer, sequence) for writer, sequence in events]

    def _compare_contents(self) -> None:
        """Find the events whose contents differ: only blocks whose checksums differ can contain one."""
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
        wanted: dict[str, Intervals] = {}
        for writer, block in blocks:
            wanted.setdefault(writer, Intervals()).add(block << BLOCK_BITS, (block << BLOCK_BITS) + BLOCK - 1)
        for name in list(self._holdings):
            found[name] = {key: array("Q", bytes(8 * BLOCK)) for key in blocks}
            for event in self._again(name, wanted):
                if event.progress and self._is_thinned:
                    continue
                of_block = found[name][event.writer, event.sequence >> BLOCK_BITS]
                place = event.sequence & (BLOCK - 1)
                # Of duplicates the first counts. 0 stands for an event that the child does not hold.
                of_block[place] = of_block[place] or (hash(self._fields(event)) & MASK or 1)
        names = list(self._holdings)
        for writer, block in blocks:
            for place in range(BLOCK):
                said = [(name, value) for name in names if (value := found[name][writer, block][place])]
                for name, value in said[1:]:
                    if value != said[0][1]:
                        child = self.result.children[name]
                        child.different += 1
                        if child.different <= NAMED:
                            self._name("different", name, [(writer, (block << BLOCK_BITS) + place)])

    def _again(self, name: str, wanted: dict[str, Intervals]) -> Generator[LogEvent]:
        """Read a child again, and yield these events. A child that fails now is left out of the comparison."""
        try:
            yield from self._holdings[name].again(self._logs, wanted)
        except DoesNotExistException:
            return
        except Exception as error:
            self._give_up(name, error)

    def _describe(self) -> None:
        """Read the events that are named in the result again, to say what they contain and what differs in them."""
        wanted = {(named.writer, named.sequence) for named in self.result.differences}
        said: dict[tuple[str, int], dict[str, LogEvent]] = {}
        for name in list(self._holdings):
            held = self._holdings[name].numbers
            here = {(writer, number) for writer, number in wanted if writer in held and number in held[writer]}
            if not here:
                continue
            of_writers: dict[str, Intervals] = {}
            for writer, number in sorted(here):
                of_writers.setdefault(writer, Intervals()).add(number, number)
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
                named.detail = "no child has it, although later events of its writer arrived"
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


def _numbers(intervals: Intervals) -> Iterator[int]:
    for first, last in intervals:
        yield from range(first, last + 1)


def compare(
    logs: LogsResponse,
    label: str,
    sources: Sequence[Source],
    is_in_progress: bool = False,
    tell: Tell = lambda number: None,
) -> StreamParity:
    """Compare a stream between children. The arguments are those of `Comparison`."""
    return Comparison(logs, label, sources, is_in_progress, tell).run()
