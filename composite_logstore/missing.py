"""What a page lacks: the entry that says where a child has lost events, so that a hole is never silent.

A writer numbers the events of each stream without gaps, and a child gets them in that order. So what is missing
before an event that is there will not come any more, once the stream has ended.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, NamedTuple
from uuid import NAMESPACE_URL, uuid5

from zenml.client import Client
from zenml.enums import LoggingLevels
from zenml.exceptions import LogStoreError
from zenml.models import LogEntry, LogsEntriesFilter

from composite_logstore.backend import Event, PageRequest, ReadEntry, Reader

if TYPE_CHECKING:
    from zenml.models import LogsResponse

    from composite_logstore.config import ChildConfig

INDEXED_AFTER = timedelta(minutes=10)
"""How old events have to be, before a backend without order must show them."""

MOST = 20
"""How many holes of a page are told one by one."""

_NEARBY = timedelta(seconds=5)
# A backend may allow few searches: Datadog 300 in an hour.
_MOST_LOOKS = 3


class Hole(NamedTuple):
    """Events of one writer that are not there.

    Attributes:
        place: How many of the page's entries come before it.
        writer: The writer.
        first: The sequence number of the first that is missing.
        last: That of the last.
        number: How many are missing.
    """

    place: int
    writer: str
    first: int
    last: int
    number: int


def takes_all(child: ChildConfig, filter_: LogsEntriesFilter) -> bool:
    """Return whether a page of the child, with this filter, should have every event."""
    return (
        child.min_level is None
        and child.progress == "all"
        and not (filter_.search or filter_.level or filter_.since or filter_.until)
    )


def find_holes(
    entries: Sequence[ReadEntry], older: Mapping[str, int], newer: Mapping[str, int], from_the_start: bool
) -> list[Hole]:
    """Return what is missing between the entries of a page, and between the page and its neighbours.

    Args:
        entries: Oldest first, without copies.
        older: A writer → its last sequence number on the older pages, as far as these are known.
        newer: A writer → its first sequence number on the newer pages, as far as these are known.
        from_the_start: Whether the writers that `older` does not have begin on this page, or later.
    """
    holes: list[Hole] = []
    sequences: dict[str, list[tuple[int, int]]] = {}
    for place, read in enumerate(entries):
        if read.event is not None:
            sequences.setdefault(read.event.writer, []).append((read.event.sequence, place))
    for writer in sequences.keys() | newer.keys():
        on_page = sorted(sequences.get(writer, []))
        if writer in newer:
            on_page.append((newer[writer], len(entries)))
        last = older.get(writer, -1 if from_the_start else None)
        for sequence, place in on_page:
            if last is not None and sequence > last + 1:
                holes.append(Hole(place, writer, last + 1, sequence - 1, sequence - last - 1))
            last = sequence if last is None else max(last, sequence)
    return sorted(holes)


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


def confirmed(holes: Sequence[Hole], entries: Sequence[ReadEntry], reader: Reader, logs: LogsResponse) -> list[Hole]:
    """Return the holes that are there, where the reader does not promise a writer's order.

    It sorts by time, which need not be the order of the numbers: what seems to be missing may be on another
    page. And what was sent a moment ago may not have been indexed.
    """
    if reader.in_order:
        return list(holes)
    times = [read.entry.timestamp for read in entries if read.entry.timestamp]
    if not times or max(times) > datetime.now(timezone.utc) - INDEXED_AFTER:
        return []
    found: set[Event] = set()
    looks = 0
    for since, until in _windows(holes, entries):
        token: str | None = None
        while looks < _MOST_LOOKS:
            looks += 1
            filter_ = LogsEntriesFilter(since=since, until=until)
            try:
                page = reader.read(PageRequest(logs, "newer", token, reader.max_page_size, filter_))
            except LogStoreError:
                # The page is there. What it lacks is said when it can be found out.
                return []
            found.update(read.event for read in page.entries if read.event is not None)
            if page.newer is None or not page.entries:
                break
            token = page.newer
    there = [_without(hole, found) for hole in holes]
    return [hole for hole in there if hole.number]


def _windows(holes: Sequence[Hole], entries: Sequence[ReadEntry]) -> Iterator[tuple[datetime, datetime]]:
    """Yield the times to look through for what is missing: around the neighbours of each hole."""
    since = until = None
    for hole in holes:
        around = [read.entry.timestamp for read in entries[max(0, hole.place - 1) : hole.place + 1]]
        times = [time for time in around if time is not None]
        if not times:
            continue
        begin, end = min(times) - _NEARBY, max(times) + _NEARBY
        if since is not None and until is not None and since <= begin <= until:
            until = max(until, end)
            continue
        if since is not None and until is not None:
            yield since, until
        since, until = begin, end
    if since is not None and until is not None:
        yield since, until


def _without(hole: Hole, found: Iterable[Event]) -> Hole:
    """Return what of a hole is one."""
    there = sum(event.writer == hole.writer and hole.first <= event.sequence <= hole.last for event in found)
    return hole._replace(number=hole.number - there)


def with_notices(entries: Sequence[ReadEntry], holes: Sequence[Hole], child: str, logs: LogsResponse) -> list[LogEntry]:
    """Return the entries, with one that says what is missing wherever something is."""
    shown = [read.entry for read in entries]
    if len(holes) > MOST:
        total = sum(hole.number for hole in holes)
        text = (
            f"Child '{child}' lacks {total} entries of this page in {len(holes)} places, the first between "
            f"{_between(holes[0])}."
        )
        return [_notice(text, holes[0], shown, child, logs), *shown]
    for hole in reversed(holes):
        entry = "entry" if hole.number == 1 else "entries"
        text = f"Child '{child}' lacks {hole.number} {entry} here, between {_between(hole)}."
        shown.insert(hole.place, _notice(text, hole, shown, child, logs))
    return shown


def _between(hole: Hole) -> str:
    before = hole.first - 1 if hole.first else "the beginning"
    return f"{before} and {hole.last + 1} of writer {hole.writer}"


def _notice(text: str, hole: Hole, entries: Sequence[LogEntry], child: str, logs: LogsResponse) -> LogEntry:
    nearest = entries[min(hole.place, len(entries) - 1)] if entries else None
    return LogEntry(
        # The same each time that the page is read.
        id=uuid5(NAMESPACE_URL, f"composite-logstore/{logs.id}/{child}/{hole.writer}/{hole.first}/{hole.last}"),
        name="composite_logstore",
        level=LoggingLevels.WARNING,
        timestamp=nearest.timestamp if nearest else None,
        message=text,
    )
