"""What a page lacks: the entry that says where a child has lost events, so that a gap is never silent.

A writer numbers the events of each stream without gaps, and a child gets them in that order. So what is missing
before an event that is there will not come any more, once the stream has ended. It may still be elsewhere in the
child, and is called lost only if it was looked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, NamedTuple
from uuid import NAMESPACE_URL, uuid5

from zenml.client import Client
from zenml.enums import LoggingLevels
from zenml.models import LogEntry, LogsEntriesFilter
from zenml.utils.time_utils import to_utc_timezone

from composite_logstore import clock
from composite_logstore.backend import Event, PageRequest, ReadEntry, Reader, Scanner
from composite_logstore.parity.intervals import Intervals
from composite_logstore.reading.cursor import Direction, SeenEvents

if TYPE_CHECKING:
    from zenml.models import LogsResponse

    from composite_logstore.config import ChildConfig

INDEXED_AFTER = timedelta(minutes=10)
"""How old events have to be, before a backend without order must show them."""

MOST = 20
"""How many gaps of a page are told one by one."""

LONGEST_LOOK_SECONDS = 2.0
"""How long a stream is looked through for what a page seems to lack."""

_NEARBY = timedelta(seconds=5)
# A backend may allow few searches: Datadog 300 in an hour.
_MOST_LOOKS = 3


class Gap(NamedTuple):
    """Events of one writer, one after the other, that are not there.

    Attributes:
        place: How many of the page's entries come before it.
        writer: The writer.
        first: The sequence number of the first that is missing.
        last: That of the last.
    """

    place: int
    writer: str
    first: int
    last: int

    @property
    def number(self) -> int:
        """How many are missing."""
        return self.last - self.first + 1


class Gaps(NamedTuple):
    """What is known of the gaps of a page.

    Attributes:
        gaps: Those that the child was asked for once more, and has nothing of.
        unchecked: Those that it was not asked for, since that would take too long. They may be elsewhere in it.
    """

    gaps: Sequence[Gap] = ()
    unchecked: Sequence[Gap] = ()


def shows_all(child: ChildConfig, filter_: LogsEntriesFilter) -> bool:
    """Return whether the child's pages, with this filter, should have every event."""
    return child.wants_all and not (filter_.search or filter_.level or filter_.since or filter_.until)


def find_gaps(entries: Sequence[ReadEntry], seen: SeenEvents, direction: Direction, reaches_oldest: bool) -> list[Gap]:
    """Return the gaps between events that were returned, both of which are known only with this page.

    So each is found once, whichever the direction and in whatever order events come.

    Args:
        entries: The page's, oldest first, without duplicates.
        seen: Which events were returned, on this page and on those before it.
        direction: The way in which the pages go.
        reaches_oldest: Whether the page, or one before it, begins with the stream's oldest entry.
    """
    broken = {
        writer: numbers
        for writer, numbers in seen.items()
        if numbers.count > 1 or (reaches_oldest and 0 not in numbers)
    }
    places_of: dict[str, dict[int, int]] = {writer: {} for writer in broken}
    for place, read in enumerate(entries if broken else ()):
        if read.event is not None and read.event.writer in broken:
            places_of[read.event.writer][read.event.sequence] = place
    gaps: list[Gap] = []
    for writer, numbers in broken.items():
        places = places_of[writer]
        # What comes before the first event is known from the beginning, or else at the end.
        before = -1 if reaches_oldest else None
        is_new = direction == "older"
        for first, last in numbers:
            if before is not None and first > before + 1 and (is_new or first in places):
                gaps.append(Gap(places.get(first, len(entries)), writer, before + 1, first - 1))
            before, is_new = last, last in places
    return sorted(gaps)


def is_finished(logs: LogsResponse) -> bool:
    """Return whether the stream is known to have ended: its step, or else its run."""
    if not (logs.step_run_id or logs.pipeline_run_id or logs.hook_invocation_id):
        return False
    try:
        zen_store = Client().zen_store
        if logs.step_run_id:
            return zen_store.get_run_step(logs.step_run_id, hydrate=False).status.is_finished
        run_id = logs.pipeline_run_id
        if run_id is None and logs.hook_invocation_id:
            run_id = zen_store.get_hook_invocation(logs.hook_invocation_id, hydrate=False).pipeline_run_id
        return run_id is not None and zen_store.get_run(run_id, hydrate=False).status.is_finished
    except Exception:
        # A page must not fail for want of what is said about it.
        return False


def looked_for(
    gaps: Sequence[Gap], entries: Sequence[ReadEntry], reader: Reader, logs: LogsResponse, give_up_at: float
) -> Gaps:
    """Look for what seems to be missing, since it may be elsewhere, and return what is then known.

    Of a gap of which something is found, the rest is one between what is found and its neighbours: it is told on the
    page that has these.

    Args:
        gaps: What seems to be missing.
        entries: The page's.
        reader: What has read the page.
        logs: The stream.
        give_up_at: Until when to look, by the clock that never goes back.
    """
    try:
        if isinstance(reader, Scanner):
            return _looked_through(gaps, reader, logs, min(give_up_at, clock.current.now() + LONGEST_LOOK_SECONDS))
        if reader.in_order:
            return Gaps(gaps)
        return _looked_around(gaps, entries, reader, logs, give_up_at)
    except Exception:
        # The page is there. What it lacks is said when it can be found out.
        return Gaps()


def _looked_through(gaps: Sequence[Gap], scanner: Scanner, logs: LogsResponse, give_up_at: float) -> Gaps:
    """Look through the whole stream: what was copied there later is at its end, and clocks go back."""
    there = {gap.writer: Intervals() for gap in gaps}
    is_whole = True
    for chunk in scanner.scan(logs):
        numbers = there.get(chunk.writer)
        if numbers is not None:
            if isinstance(chunk.sequences, range):
                numbers.add(chunk.sequences[0], chunk.sequences[-1])
            else:
                for sequence in chunk.sequences:
                    numbers.add(sequence, sequence)
        if clock.current.now() >= give_up_at:
            is_whole = False
            break
    left = [gap for gap in gaps if not there[gap.writer].touches(gap.first, gap.last)]
    return Gaps(left) if is_whole else Gaps((), left)


def _looked_around(
    gaps: Sequence[Gap], entries: Sequence[ReadEntry], reader: Reader, logs: LogsResponse, give_up_at: float
) -> Gaps:
    """Look around each gap, where the reader sorts by time: that need not be the order of the numbers.

    What was sent a moment ago may not have been indexed.
    """
    times = [time for time in map(_time_of, entries) if time is not None]
    if not times or max(times) > datetime.now(timezone.utc) - INDEXED_AFTER:
        return Gaps()
    found: dict[str, Intervals] = {}
    looks = 0
    checked: set[Gap] = set()
    for since, until, around in _windows(gaps, entries):
        token: str | None = None
        while looks < _MOST_LOOKS and clock.current.now() < give_up_at:
            looks += 1
            filter_ = LogsEntriesFilter(since=since, until=until)
            # Towards older ones a reader knows where there is no more: what is newer may still come.
            page = reader.read(PageRequest(logs, "older", token, reader.max_page_size, filter_))
            for read in page.entries:
                if read.event is not None and (event := Event.of(*read.event)):
                    found.setdefault(event.writer, Intervals()).add(event.sequence, event.sequence)
            before, token = token, page.older
            if token in (None, before):
                checked.update(around)
                break
    left = [gap for gap in gaps if gap.writer not in found or not found[gap.writer].touches(gap.first, gap.last)]
    return Gaps([gap for gap in left if gap in checked], [gap for gap in left if gap not in checked])


def _windows(gaps: Sequence[Gap], entries: Sequence[ReadEntry]) -> Iterator[tuple[datetime, datetime, list[Gap]]]:
    """Yield the times to look through for what is missing: around the neighbours of each gap."""
    windows: list[tuple[datetime, datetime, list[Gap]]] = []
    for gap in gaps:
        around = map(_time_of, entries[max(0, gap.place - 1) : gap.place + 1])
        times = [time for time in around if time is not None]
        if not times:
            continue
        begin, end = min(times) - _NEARBY, max(times) + _NEARBY
        if windows and windows[-1][0] <= begin <= windows[-1][1]:
            since, until, of_window = windows.pop()
            windows.append((since, max(until, end), [*of_window, gap]))
        else:
            windows.append((begin, end, [gap]))
    return iter(windows)


def _time_of(read: ReadEntry) -> datetime | None:
    try:
        return to_utc_timezone(read.entry.timestamp) if read.entry.timestamp else None
    except OverflowError:
        return None


def with_notices(entries: Sequence[ReadEntry], found: Gaps, child: str, logs: LogsResponse) -> list[LogEntry]:
    """Return the entries, with one that says what is missing wherever something is."""
    shown = [read.entry for read in entries]
    notices: list[LogEntry] = []
    if found.unchecked:
        first = found.unchecked[0]
        text = (
            f"{_total(found.unchecked)} not on this page, the first between {_between(first)}. Whether child "
            f"'{child}' has them elsewhere was not checked: that would take too long."
        )
        notices.append(_notice(text, first, shown, child, logs))
    if len(found.gaps) > MOST:
        first = found.gaps[0]
        text = (
            f"Child '{child}' lacks {sum(gap.number for gap in found.gaps)} entries of this page in "
            f"{len(found.gaps)} places, the first between {_between(first)}."
        )
        return [_notice(text, first, shown, child, logs), *notices, *shown]
    for gap in reversed(found.gaps):
        entry = "entry" if gap.number == 1 else "entries"
        text = f"Child '{child}' lacks {gap.number} {entry} here, between {_between(gap)}."
        shown.insert(gap.place, _notice(text, gap, shown, child, logs))
    return [*notices, *shown]


def _total(gaps: Sequence[Gap]) -> str:
    number = sum(gap.number for gap in gaps)
    places = f" in {len(gaps)} places" if len(gaps) > 1 else ""
    return f"{number} {'entry is' if number == 1 else 'entries are'}{places}"


def _between(gap: Gap) -> str:
    before = gap.first - 1 if gap.first else "the beginning"
    return f"{before} and {gap.last + 1} of writer {gap.writer}"


def _notice(text: str, gap: Gap, entries: Sequence[LogEntry], child: str, logs: LogsResponse) -> LogEntry:
    nearest = entries[min(gap.place, len(entries) - 1)] if entries else None
    return LogEntry(
        # The same each time that the page is read.
        id=uuid5(NAMESPACE_URL, f"composite-logstore/{logs.id}/{child}/{gap.writer}/{gap.first}/{gap.last}"),
        name="composite_logstore",
        level=LoggingLevels.WARNING,
        timestamp=nearest.timestamp if nearest else None,
        message=text,
    )
