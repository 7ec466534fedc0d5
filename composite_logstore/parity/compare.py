"""Comparing: whether several children hold the same events of a stream, and which events differ.

See the theory of operation at the head of the package.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from itertools import islice
from typing import TYPE_CHECKING

from zenml.exceptions import DoesNotExistException

from composite_logstore import clock
from composite_logstore.backend import PAGES
from composite_logstore.event import LogEvent, Stream
from composite_logstore.intervals import Intervals
from composite_logstore.parity.fields import Seen, differing, hash_of
from composite_logstore.parity.holding import BLOCK, BLOCK_BITS, MASK, Holding
from composite_logstore.parity.result import NAMED, ChildParity, Difference, StreamParity, Tell
from composite_logstore.parity.scan import Source, foreign_writer, is_foreseen
from composite_logstore.processing.budget import is_notice, passes
from composite_logstore.processing.redaction import Redactor
from composite_logstore.processing.repeats import MOST_REMEMBERED, Repeats

if TYPE_CHECKING:
    from zenml.models import LogsResponse


_MOST_BLOCKS = 4_096
"""Of how many blocks the events are compared one by one at a time: 32 MiB of hashes for each child."""

_MOST_BYTES = 32 * 1024 * 1024
"""Roughly how many bytes of redacted events are compared at a time."""

_ROUNDS = 3

_STRIPPED = (
    ": they come without 'zenml.log.writer' or 'zenml.log.sequence'. Let no processor of the collector remove them"
)


class _Comparison:
    """Compares one stream between several children. The arguments are those of `compare`."""

    def __init__(
        self,
        logs: LogsResponse,
        label: str,
        sources: Sequence[Source],
        is_in_progress: bool,
        tell: Tell,
        stream: Stream | None,
    ) -> None:
        self._logs = logs
        self._stream = stream or Stream(logs.id, {})
        self._tell = tell
        self._is_in_progress = is_in_progress
        formats = {source.scanner.scan_format for source in sources}
        self._is_raw = len(formats) == 1 and PAGES not in formats
        self._is_thinned = any(source.config.is_thinned for source in sources)
        self._sources = sources
        self._over_budget: dict[str, dict[str, Intervals]] = {}
        # Made when an event is named: most streams have no difference.
        self._redactors: list[Redactor] | None = None
        self._masks = {source.name: source.masks() for source in sources}
        self._holdings = {source.name: self._holding_of(source) for source in sources}
        children = {name: holding.child for name, holding in self._holdings.items()}
        self.result = StreamParity(str(logs.id), label, children)

    def _holding_of(self, source: Source) -> Holding:
        return Holding(source, self._stream, [other for other in self._sources if other is not source], self._is_raw)

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
        missing = self._without_repeats(missing)
        if self._waited(missing):
            missing = self._without_repeats(self._missing())
        self._over_budget = self._find_over_budget(missing)
        self._count(missing)
        self._compare_contents()
        self._describe()
        return self.result

    def _waited(self, missing: dict[str, dict[str, Intervals]]) -> bool:
        """Wait until the children have had the time that they usually need to show events, and scan them anew.

        What appears late may lie before what was scanned already, so a scan cannot just continue.

        Returns:
            Whether a child that is missing events has been scanned again.
        """
        delayed = [self._holdings[name] for name in missing if self._holdings[name].source.config.delay_seconds]
        newest = max((holding.newest for holding in self._holdings.values()), default=0)
        now = time.time()
        waits = [holding.source.config.delay_seconds - max(0.0, now - newest / 1e9) for holding in delayed]
        if max(waits, default=0.0) <= 0:
            return False
        clock.current.signal().wait(max(waits))
        for holding, wait in zip(delayed, waits, strict=True):
            if wait > 0:
                name = holding.source.name
                self._holdings[name] = self._holding_of(holding.source)
                self.result.children[name] = self._holdings[name].child
                self._scan(name, self._holdings[name])
        return True

    def _scan(self, name: str, holding: Holding) -> None:
        try:
            holding.scan(self._logs, self._tell)
        except DoesNotExistException:
            pass
        except Exception as error:
            # Only a part of the stream was counted.
            self.result.children[name] = ChildParity()
            self._give_up(name, error)

    def _give_up(self, name: str, error: Exception) -> None:
        """Leave out a child that cannot be read."""
        self.result.children[name].error = (
            str(error) if is_foreseen(error) else f"its reader raised {type(error).__name__}"
        )
        self._holdings.pop(name, None)

    def _excuse(self) -> None:
        """Leave out children whose entries have no event IDs, if those of other children have."""
        foreign = foreign_writer(self._logs.id)
        holdings = self._holdings
        known = [name for name, holding in holdings.items() if holding.numbers.keys() - {foreign}]
        copied = any(foreign in holdings[name].numbers for name in known)
        for name, holding in list(holdings.items()):
            if holding.events and name not in known and known and not copied:
                excuse = "its entries do not say which events they are"
                if holding.stripped & {writer for other in known for writer in holdings[other].numbers}:
                    excuse += _STRIPPED
                self.result.children[name] = ChildParity(events=holding.events, excuse=excuse)
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
                absent = expected - holding.numbers.get(writer, Intervals()) - holding.notices.get(writer, Intervals())
                # No child has these events, so nothing tells whether a child that does not get all should have them.
                if gaps and holding.source.config.wants_all:
                    absent |= gaps
                if absent:
                    missing.setdefault(name, {})[writer] = absent
        return missing

    def _without_repeats(self, missing: dict[str, dict[str, Intervals]]) -> dict[str, dict[str, Intervals]]:
        """Return which events are missing that are no repeats of others which the child has, or should have.

        Only children that collapse repeats need this, and only for missing events. The other children are read again.
        """
        found = False
        for name, of_child in missing.items():
            if name not in self._holdings or not (settings := self._holdings[name].source.config.collapse_repeats):
                continue
            # What precedes the missing events says whether they are repeats.
            wanted = {writer: Intervals([(0, absent.last)]) for writer, absent in of_child.items()}
            # The event in whose place there is a notice has opened a window, too.
            lacking = self._holdings[name]
            held = {w: lacking.numbers.get(w, Intervals()) | lacking.notices.get(w, Intervals()) for w in wanted}
            for other, holding in list(self._holdings.items()):
                if other == name or not any(holding.numbers.get(w, Intervals()) for w in wanted):
                    continue
                repeats = Repeats(settings, MOST_REMEMBERED)
                seen: dict[str, Intervals] = {writer: Intervals() for writer in wanted}
                for event in self._again(other, wanted):
                    writer, sequence = event.writer, event.sequence
                    if sequence in seen[writer]:
                        continue
                    seen[writer].add(sequence, sequence)
                    if sequence in held[writer]:
                        repeats.note_held(event)
                    elif sequence in of_child[writer] and not repeats.expects(event):
                        holding.exempt.setdefault(name, {}).setdefault(writer, Intervals()).add(sequence, sequence)
                        found = True
        return self._missing() if found else missing

    def _find_over_budget(self, missing: dict[str, dict[str, Intervals]]) -> dict[str, dict[str, Intervals]]:
        """Return which of the missing events their child's budget may have withheld.

        The other children, which are read again, show whether the events would have passed a used-up budget.
        """
        found: dict[str, dict[str, Intervals]] = {}
        for name, of_child in missing.items():
            holding = self._holdings.get(name)
            if holding is None or (budget := holding.source.config.budget) is None:
                continue
            wanted = {writer: _common(absent, holding.over_budget(writer)) for writer, absent in of_child.items()}
            wanted = {writer: numbers for writer, numbers in wanted.items() if numbers}
            for other in list(self._holdings) if wanted else ():
                if other == name:
                    continue
                for event in self._again(other, wanted):
                    if not passes(event, budget) and not is_notice(event):
                        of_writer = found.setdefault(name, {}).setdefault(event.writer, Intervals())
                        of_writer.add(event.sequence, event.sequence)
        return found

    def _count(self, missing: dict[str, dict[str, Intervals]]) -> None:
        for name, holding in self._holdings.items():
            child = self.result.children[name]
            child.events = holding.events
            child.excluded = self._excluded(name)
            named: list[tuple[str, int]] = []
            for writer, absent in missing.get(name, {}).items():
                last = holding.numbers.get(writer, Intervals()).last
                arriving = absent - Intervals([(0, last)]) if self._is_in_progress else Intervals()
                absent = absent - arriving if arriving else absent
                child.arriving += len(arriving)
                child.missing += len(absent)
                child.over_budget += len(_common(absent, self._over_budget.get(name, {}).get(writer, Intervals())))
                named += islice(((writer, number) for number in _numbers(absent)), NAMED - len(named))
            self._name("missing", name, named)
            self._name("duplicated", name, holding.duplicates)
            self._name("out of order", name, holding.late)

    def _excluded(self, name: str) -> int:
        """Return how many events a child need not have by its settings, and does not have."""
        excluded = 0
        for writer in {writer for holding in self._holdings.values() for writer in holding.numbers}:
            exempt = Intervals()
            for holding in self._holdings.values():
                exempt |= holding.exempt.get(name, {}).get(writer, Intervals())
            exempt |= self._holdings[name].notices.get(writer, Intervals())
            excluded += len(exempt - self._holdings[name].numbers.get(writer, Intervals()))
        return excluded

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
            are_masks_in = self._masks[name].are_in
            for event in self._compared(name, wanted):
                # The last bit says whether the event is redacted. 0 stands for one that the child does not hold.
                hashed = hash_of(event, self._is_raw) << 1 & MASK or 2
                of_block = found[name][event.writer, event.sequence >> BLOCK_BITS]
                of_block[event.sequence & (BLOCK - 1)] = hashed | are_masks_in(event)
        # A child with redacted events, and the one that they are compared with → a writer → their numbers.
        redacted: dict[tuple[str, str], dict[str, Intervals]] = {}
        names = list(self._holdings)
        for writer, block in blocks:
            for place in range(BLOCK):
                said = [(name, hashed) for name in names if (hashed := found[name][writer, block][place])]
                # What is compared with others should be whole.
                said.sort(key=lambda one: one[1] & 1)
                sequence = (block << BLOCK_BITS) + place
                for other, hashed in said[1:]:
                    if hashed == said[0][1]:
                        continue
                    if hashed & 1:
                        of_pair = redacted.setdefault((other, said[0][0]), {})
                        of_pair.setdefault(writer, Intervals()).add(sequence, sequence)
                    else:
                        self._differs(other, writer, sequence)
        for (name, reference), numbers in redacted.items():
            self._compare_redacted(name, reference, numbers)

    def _compare_redacted(self, name: str, reference: str, wanted: dict[str, Intervals]) -> None:
        """Compare redacted events of a child by what is not masked in them."""
        waiting: dict[tuple[str, int], LogEvent] = {}
        size = 0
        for event in self._compared(name, wanted):
            waiting[event.writer, event.sequence] = event
            size += event.size
            if size > _MOST_BYTES:
                self._compare_waiting(name, reference, waiting)
                waiting, size = {}, 0
        self._compare_waiting(name, reference, waiting)

    def _compare_waiting(self, name: str, reference: str, waiting: dict[tuple[str, int], LogEvent]) -> None:
        wanted: dict[str, Intervals] = {}
        for writer, sequence in waiting:
            wanted.setdefault(writer, Intervals()).add(sequence, sequence)
        for event in self._compared(reference, wanted):
            redacted = waiting[event.writer, event.sequence]
            if self._differing(name, redacted, reference, event):
                self._differs(name, event.writer, event.sequence)

    def _differing(self, name: str, event: LogEvent, reference: str, other: LogEvent) -> list[str]:
        """Return the names of the fields in which two children's events differ otherwise than by what is masked."""
        seen = Seen(event, self._masks[name].pieces_of(event))
        return differing(seen, Seen(other, self._masks[reference].pieces_of(other)), self._is_raw)

    def _differs(self, name: str, writer: str, sequence: int) -> None:
        child = self.result.children[name]
        child.different += 1
        if child.different <= NAMED:
            self._name("different", name, [(writer, sequence)])

    def _compared(self, name: str, wanted: dict[str, Intervals]) -> Iterator[LogEvent]:
        """Read a child again, and yield those of these events whose contents count. Of duplicates the first does."""
        if name not in self._holdings:
            return
        read: dict[str, Intervals] = {writer: Intervals() for writer in wanted}
        for event in self._again(name, wanted):
            if event.sequence in read[event.writer] or (event.progress and self._is_thinned) or is_notice(event):
                continue
            read[event.writer].add(event.sequence, event.sequence)
            yield event

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
        wanted: dict[str, Intervals] = {}
        for named in self.result.differences:
            wanted.setdefault(named.writer, Intervals()).add(named.sequence, named.sequence)
        said: dict[tuple[str, int], dict[str, LogEvent]] = {}
        for name, holding in list(self._holdings.items()):
            held = holding.numbers
            here = {writer: numbers - (numbers - held[writer]) for writer, numbers in wanted.items() if writer in held}
            left = sum(map(len, here.values()))
            with closing(self._again(name, here)) as events:
                for event in events:
                    by_child = said.setdefault((event.writer, event.sequence), {})
                    if name not in by_child:
                        by_child[name] = event
                        left -= 1
                    if not left:
                        break
        for named in self.result.differences:
            by_child = said.get((named.writer, named.sequence), {})
            if not by_child:
                named.detail = "no child has it, although later events of its writer arrived"
                continue
            event = next(iter(by_child.values()))
            named.uid, named.time_unix_nano = event.uid, event.time_unix_nano
            named.message = self._masked(event.message)[:500]
            lacking = self._holdings.get(named.child)
            if named.kind == "missing" and lacking is not None and named.writer in lacking.stripped:
                named.detail = f"the child has records of this writer that do not say which events they are{_STRIPPED}"
            elif named.kind == "missing":
                named.detail = self._doubt(named, by_child)
            if named.kind == "different" and named.child in by_child:
                # What is compared with others is whole, if a child holds it so.
                reference = min(
                    (name for name in self.result.children if name in by_child),
                    key=lambda name: self._masks[name].are_in(by_child[name]),
                )
                other = by_child[named.child]
                differ = self._differing(named.child, other, reference, by_child[reference])
                named.detail = f"{', '.join(differ)}: not as in '{reference}'"
                if "[shortened by " in other.text[-40:] and "message" in differ:
                    named.detail += " (its backend had to shorten it)"

    def _masked(self, text: str) -> str:
        """Return a text with everything masked that one of the children masks: a report is passed on."""
        if self._redactors is None:
            settings = (source.config.redact for source in self._sources)
            self._redactors = [Redactor(redact) for redact in settings if redact is not None]
        for redactor in self._redactors:
            text, _ = redactor.redact(text)
        return text

    def _doubt(self, named: Difference, holders: Iterable[str]) -> str:
        """Return why an event may rightly be missing, in words; an empty text if nothing says so."""
        if named.sequence in self._over_budget.get(named.child, {}).get(named.writer, Intervals()):
            return "it may have been over the child's 'budget', which was used up then"
        holdings = (self._holdings[name] for name in holders if name in self._holdings)
        doubts = [holding.doubt(named.child, named.writer, named.sequence) for holding in holdings]
        # One child that shows enough leaves no doubt.
        return doubts[0] if doubts and all(doubts) else ""


def _common(one: Intervals, other: Intervals) -> Intervals:
    return one - (one - other)


def _numbers(intervals: Intervals) -> Iterator[int]:
    for first, last in intervals:
        yield from range(first, last + 1)


def compare(
    logs: LogsResponse,
    label: str,
    sources: Sequence[Source],
    is_in_progress: bool = False,
    tell: Tell = lambda number: None,
    stream: Stream | None = None,
) -> StreamParity:
    """Compare a stream between children.

    Args:
        logs: The stream, as ZenML knows it.
        label: The stream's name in reports.
        sources: The children, at least one.
        is_in_progress: Whether the stream may still grow.
        tell: Is told how many more records were read.
        stream: The stream, with the attributes that its events get: children may have rules about them.
    """
    return _Comparison(logs, label, sources, is_in_progress, tell, stream).run()
