"""Gaps: the entries that say where a child is missing events, so that no loss is silent.

See the theory of operation at the head of the package.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, NamedTuple
from uuid import NAMESPACE_URL, uuid5

from zenml.client import Client
from zenml.enums import LoggingLevels
from zenml.utils.time_utils import to_utc_timezone

from composite_logstore import clock
from composite_logstore.backend import Event, PageRequest, ReadEntry, Reader, Scanner, checked_entry
from composite_logstore.intervals import Intervals
from composite_logstore.reading.cursor import Direction, SeenEvents
from composite_logstore.zenml import LogEntry, LogsEntriesFilter, hook_of

if TYPE_CHECKING:
    from zenml.models import LogsResponse, PipelineRunResponse, StepRunResponse

    from composite_logstore.child_config import ChildConfig

INDEXED_AFTER = timedelta(minutes=10)
"""How old events have to be until a backend without order must show them: it indexes them some time after it accepts
them."""

MOST = 20
"""The most gaps of a page that get an entry each; if there are more, one entry sums them up."""

LONGEST_LOOK_SECONDS = 2.0
"""How long a stream is scanned for the events that a page seems to be missing."""

_NEARBY = timedelta(seconds=5)
# A backend may allow few searches: Datadog allows 300 in an hour.
_MOST_SEARCHES = 3


class Gap(NamedTuple):
    """Consecutive events of one writer that are missing.

    Attributes:
        place: How many of the page's entries precede the gap.
        writer: The writer.
        first: The sequence number of the first missing event.
        last: The sequence number of the last one.
    """

    place: int
    writer: str
    first: int
    last: int

    @property
    def number(self) -> int:
        """How many events are missing."""
        return self.last - self.first + 1


class Gaps(NamedTuple):
    """The gaps of a page.

    Attributes:
        missing: The child was searched for these events, and has none of them.
        unchecked: The child was not searched for these events, since that would take too long. It may have them.
    """

    missing: Sequence[Gap] = ()
    unchecked: Sequence[Gap] = ()


def shows_all(child: ChildConfig, filter_: LogsEntriesFilter) -> bool:
    """Return whether the child's pages, with this filter, should show every event."""
    return child.wants_all and not (filter_.search or filter_.level or filter_.since or filter_.until)


def find_gaps(entries: Sequence[ReadEntry], seen: SeenEvents, direction: Direction, reaches_oldest: bool) -> list[Gap]:
    """Return the gaps that this page reveals: one of the events around them is on it, and the other was known before.

    So each gap is found once, whatever the direction, and in whatever order the events are.

    Args:
        entries: The page's entries, oldest first, without duplicates.
        seen: The events that were returned, on this page and on earlier ones.
        direction: The direction in which pages follow each other.
        reaches_oldest: Whether this page, or an earlier one, begins with the stream's oldest entry.
    """
    places = {read.event: place for place, read in enumerate(entries) if read.event is not None}
    gaps: list[Gap] = []
    for writer, numbers in seen.items():
        # Only where the stream's beginning was seen is it known that nothing precedes the first event.
        before = -1 if reaches_oldest else None
        is_new = direction == "older"
        for first, last in numbers:
            place = places.get(Event(writer, first))
            if before is not None and first > before + 1 and (is_new or place is not None):
                gaps.append(Gap(len(entries) if place is None else place, writer, before + 1, first - 1))
            before, is_new = last, Event(writer, last) in places
    return sorted(gaps)


def is_finished(logs: LogsResponse) -> bool:
    """Return whether the stream is known to have ended: its step, or else its run."""
    origin = _origin(logs)
    return origin is not None and origin.status.is_finished


def ended_at(logs: LogsResponse) -> datetime | None:
    """Return when the stream's step, or else its run, has ended; None if that is not known, or it has not ended."""
    # ZenML tells the time of a run's end only with all the rest.
    origin = _origin(logs, hydrate=True)
    if origin is None or not origin.status.is_finished or origin.end_time is None:
        return None
    return to_utc_timezone(origin.end_time)


def _origin(logs: LogsResponse, hydrate: bool = False) -> StepRunResponse | PipelineRunResponse | None:
    """Return the stream's step, or else its run; None if that is not known."""
    if not (logs.step_run_id or logs.pipeline_run_id or hook_of(logs)):
        return None
    try:
        zen_store = Client().zen_store
        if logs.step_run_id:
            return zen_store.get_run_step(logs.step_run_id, hydrate=False)
        run_id = logs.pipeline_run_id
        if run_id is None and (hook_id := hook_of(logs)):
            run_id = zen_store.get_hook_invocation(hook_id, hydrate=False).pipeline_run_id
        return None if run_id is None else zen_store.get_run(run_id, hydrate=hydrate)
    except Exception:
        # A page must not fail for lack of information about its gaps.
        return None


def search_child(
    gaps: Sequence[Gap], entries: Sequence[ReadEntry], reader: Reader, logs: LogsResponse, give_up_at: float
) -> Gaps:
    """Search the child for the events that a page is missing, and return the gaps that remain.

    If some events of a gap are found, the gap does not remain: the events that are still missing lie between the found
    ones and their neighbours, and the page that shows those reports them.

    Args:
        gaps: The gaps of the page.
        entries: The page's entries.
        reader: The reader that has read the page.
        logs: The stream.
        give_up_at: When to stop, in seconds of the clock that never goes back.
    """
    try:
        if isinstance(reader, Scanner) and reader.in_order:
            return _scan_stream(gaps, reader, logs, min(give_up_at, clock.current.now() + LONGEST_LOOK_SECONDS))
        if reader.in_order:
            return Gaps(gaps)
        return _search_by_time(gaps, entries, reader, logs, give_up_at)
    except Exception:
        # The page itself was read. Its gaps are reported when the child can be searched.
        return Gaps()


def _scan_stream(gaps: Sequence[Gap], scanner: Scanner, logs: LogsResponse, give_up_at: float) -> Gaps:
    """Scan the whole stream: events that were backfilled lie at its end, and clocks go back."""
    found = {gap.writer: Intervals() for gap in gaps}
    is_whole = True
    for chunk in scanner.scan(logs):
        numbers = found.get(chunk.writer)
        if numbers is not None:
            numbers.update(chunk.sequences)
        if clock.current.now() >= give_up_at:
            is_whole = False
            break
    left = [gap for gap in gaps if not found[gap.writer].touches(gap.first, gap.last)]
    return Gaps(left) if is_whole else Gaps((), left)


def _search_by_time(
    gaps: Sequence[Gap], entries: Sequence[ReadEntry], reader: Reader, logs: LogsResponse, give_up_at: float
) -> Gaps:
    """Search the time around each gap: the reader sorts by time, which need not be the order of the numbers.

    Young events may not be indexed yet, so their gaps are not reported.
    """
    times = [time for time in map(_time_of, entries) if time is not None]
    if not times or max(times) > datetime.now(timezone.utc) - INDEXED_AFTER:
        return Gaps()
    found: dict[str, Intervals] = {}
    searches = 0
    checked: set[Gap] = set()
    for since, until, around in _windows(gaps, entries):
        token: str | None = None
        while searches < _MOST_SEARCHES and clock.current.now() < give_up_at:
            searches += 1
            filter_ = LogsEntriesFilter(since=since, until=until)
            # Only towards older entries does a reader know where the stream ends: newer ones may still arrive.
            page = reader.read(PageRequest(logs, "older", token, reader.max_page_size, filter_))
            for _, event in map(checked_entry, page.entries):
                if event is not None:
                    found.setdefault(event.writer, Intervals()).add(event.sequence, event.sequence)
            before, token = token, page.older
            if token in (None, before):
                checked.update(around)
                break
    left = [gap for gap in gaps if gap.writer not in found or not found[gap.writer].touches(gap.first, gap.last)]
    return Gaps([gap for gap in left if gap in checked], [gap for gap in left if gap not in checked])


def _windows(gaps: Sequence[Gap], entries: Sequence[ReadEntry]) -> Iterator[tuple[datetime, datetime, list[Gap]]]:
    """Yield the times to search, each with its gaps: around the neighbours of each gap, joined where they overlap."""
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
    """Return the entries, with one more for each gap, in its place, that describes it."""
    shown = [read.entry for read in entries]
    notices: list[LogEntry] = []
    if found.unchecked:
        first = found.unchecked[0]
        text = (
            f"{_total(found.unchecked)} missing on this page, the first between {_between(first)}. Whether child "
            f"'{child}' has them elsewhere was not checked: that would take too long."
        )
        notices.append(_notice(text, first, shown, child, logs))
    if len(found.missing) > MOST:
        first = found.missing[0]
        text = (
            f"Child '{child}' is missing {sum(gap.number for gap in found.missing)} entries of this page in "
            f"{len(found.missing)} places, the first between {_between(first)}."
        )
        return [_notice(text, first, shown, child, logs), *notices, *shown]
    for gap in reversed(found.missing):
        entry = "entry" if gap.number == 1 else "entries"
        text = f"Child '{child}' is missing {gap.number} {entry} here, between {_between(gap)}."
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
        # The same ID each time that the page is read.
        id=uuid5(NAMESPACE_URL, f"composite-logstore/{logs.id}/{child}/{gap.writer}/{gap.first}/{gap.last}"),
        name="composite_logstore",
        level=LoggingLevels.WARNING,
        timestamp=nearest.timestamp if nearest else None,
        message=text,
    )
