"""The core of a reader: pages by a keyset, for any backend that sorts log records by time.

A reader for a new backend is a `ReaderConfig` (usually an `HttpReaderConfig`) and a `KeysetReader`, of which it writes
one method, `search`: it asks the backend for some `Record`s, of one stream and from one time to another, and names the
backend's own errors. All else is here: tokens, both directions, filters, duplicates, ties and bounds.

    class LinesReader(KeysetReader):
        max_records = 5_000

        def __init__(self, config, service_name):
            self._searches = HttpSearches("Lines", config.url, config.authorization, refusal, config.certificate_file)

        def search(self, query, allowance):
            answer = self._searches.ask("POST", "/search", question(query), allowance)
            records = [Record(...) for row in orjson.loads(answer.body)]
            return Answer(records, is_all=len(records) < query.limit)

        def close(self):
            self._searches.close()

# How it works

**Places.** A record's place is (time, writer, sequence), and a token is the place of a page's first or last record.
So a token stays valid whatever arrives later, works in both directions, and an event that the backend has twice is
one place: duplicates need no memory. A record of another program has no writer and no number; a hash of its content
takes their place, and two equal ones of one nanosecond count as one.

**Ties.** A search asks again for the time at which the page before ended, and drops what was returned. A backend that
can sort by (time, writer, sequence) says so with `sorts_ties`, and narrows by `query.edge`: then any number of events
may have the same time. For others, the last time of an answer that is not complete is left for the next search, and a
search asks for more where an answer has one time alone.

**Filters.** The backend's filters only narrow. Each record is checked again here: its stream, its time, its level and
its text. So a search that cannot narrow by something leaves that out.

**Bounds.** `Bounds` has them all: a page ends with what was found when its searches, bytes or seconds are used up, and
its token leads on.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple
from uuid import UUID

import orjson
from zenml.utils.time_utils import to_utc_timezone, utc_now

from composite_logstore.backend import PAGES, Event, Page, PageRequest, ReadEntry, Scanned
from composite_logstore.bounded_http import AnswerTooLargeError
from composite_logstore.delivery.backoff import PASSING, READ_ATTEMPTS, seconds_until_read
from composite_logstore.event import HIGHEST
from composite_logstore.reading.gaps import ended_at
from composite_logstore.reading.records import (
    STREAM,
    Position,
    Record,
    as_event,
    entry_of,
    event_of,
    position_of,
    shown_of,
)
from composite_logstore.reading.searches import Allowance
from composite_logstore.zenml import LogsEntriesFilter, LogStoreError, LogStoreUnavailableError

if TYPE_CHECKING:
    from zenml.models import LogsResponse

    from composite_logstore.event import LogEvent, Stream
    from composite_logstore.zenml import LogEntry

CLOCK_SKEW = timedelta(hours=1)
"""A stream's creation has the server's time, and its first events the client's, which may be behind."""

FURTHEST_AHEAD = timedelta(hours=2)
"""A client's time may also be ahead of this machine's."""

AFTER_ITS_END = timedelta(days=1)
"""Processes that outlive their step may still log, and ZenML may call a run failed that still continues."""

LONGEST_TOKEN = 2_000
"""In characters. Tokens have about a hundred, unless another program has named its writer oddly."""

_MARGIN = 50
"""How many more records to ask for than wanted, so that an answer mostly ends beyond a tie or some duplicates."""
_FEWER = 8
"""If an answer is too large, the next search asks for so many times fewer records; if a tie is, for more."""

_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
_INT64 = 1 << 63


class Query(NamedTuple):
    """The records to search for: all of one stream within some times, or the first of them in a direction.

    Attributes:
        logs_id: The stream: records whose attribute `zenml.log.id` is this.
        direction: `newer`: the oldest ones first. `older`: the newest ones first.
        first_nanos: The time of the oldest record that is wanted, in nanoseconds since the epoch.
        last_nanos: The time of the newest one.
        edge: Where the page before ended. Records at this place are wanted, none that lie before it in the direction.
            A backend with `sorts_ties` has to narrow by its time, writer and sequence; others may ignore it.
        limit: The most records to return.
        severity_number: The least severity. Records without a number (0) are wanted, too, since their level may be in
            their severity's text. 0 for all.
        search: A text that is in a record's body or its exception, whatever its case. None for all. It is None, too,
            where letters of another case may have another length: then the backend cannot narrow.
    """

    logs_id: UUID
    direction: Literal["newer", "older"]
    first_nanos: int
    last_nanos: int
    edge: Position | None
    limit: int
    severity_number: int
    search: str | None


class Answer(NamedTuple):
    """What a search has found.

    Attributes:
        records: The first records of the query in its direction, in any order.
        is_all: Whether these are all: no other record fits the query.
    """

    records: Sequence[Record]
    is_all: bool


class _Placed(NamedTuple):
    position: Position
    record: Record
    event: Event | None


class _Step(NamedTuple):
    """What was found with one search.

    Attributes:
        records: Records of the stream, in the direction.
        edge: The place of the last record that was looked at.
        is_all: Whether no other record follows.
    """

    records: list[_Placed]
    edge: Position | None
    is_all: bool


class _Slices:
    """Cuts the times of a scan into slices with about as many records as a search returns.

    Otherwise a backend would sort the rest of the stream for each search.

    Attributes:
        span: How long the next slice is, in nanoseconds; None for all the rest.
        begin: Where it begins, if the edge is not beyond, in nanoseconds since the epoch.
    """

    def __init__(self) -> None:
        self.span: int | None = None
        self.begin = -_INT64

    def cut(self, query: Query, unit: int) -> Query:
        """Return the query for the next slice."""
        first = max(query.first_nanos, self.begin)
        if self.span is None or first > query.last_nanos:
            return query
        last = (first + self.span) // unit * unit + unit - 1
        edge = query.edge if first <= query.first_nanos else None
        return query._replace(first_nanos=first, last_nanos=min(last, query.last_nanos), edge=edge)

    def note(self, query: Query, answer: Answer, place: Position | None) -> None:
        """Learn from the answer to a query how long the next slice should be."""
        if answer.is_all:
            self.begin = query.last_nanos + 1
            if self.span is not None and 2 * len(answer.records) < query.limit:
                self.span = min(4 * self.span, _INT64)
        elif place is not None:
            # The stream may begin long after it was created.
            begin = query.first_nanos if query.edge else min(record.nanos for record in answer.records)
            self.span = max(1, 2 * (place.nanos - begin))


class KeysetReader(ABC):
    """Reads pages, and whole streams, with searches for records of some times. A subclass has `search` and `close`.

    Attributes:
        max_page_size: The most entries of one page.
        in_order: A backend that sorts by time need not have a writer's events in their order.
        max_records: The most records that one search can return.
        sorts_ties: Whether the backend sorts by time, then by writer as text, then by sequence as number, each missing
            one as empty or 0; and narrows by `Query.edge`. Otherwise it sorts by time alone.
        time_unit_nanos: The unit of the time that it sorts by, in nanoseconds.
        narrows: Whether the backend can narrow a search by severity and text.
        scan_format: Its records can be compared with those of other readers, as events.
    """

    max_page_size = 1_000
    in_order = False
    scan_format: ClassVar[str] = PAGES

    max_records: ClassVar[int] = 10_000
    sorts_ties: ClassVar[bool] = False
    time_unit_nanos: ClassVar[int] = 1
    narrows: ClassVar[bool] = True

    @abstractmethod
    def search(self, query: Query, allowance: Allowance) -> Answer:
        """Ask the backend once, or several times if it returns less than `query.limit` at a time.

        Args:
            query: The records to search for.
            allowance: What the page may still use. Pass it on to `HttpSearches`.

        Raises:
            AnswerTooLargeError: The answer is too large. The next query has a smaller `limit`.
            zenml.exceptions.LogStoreUnavailableError: The backend cannot be reached.
            zenml.exceptions.LogStoreRateLimitError: The backend asks for a pause.
            zenml.exceptions.LogStoreError: The backend refused, or its answer is not valid.
        """

    @abstractmethod
    def close(self) -> None:
        """Release connections."""

    def explain_nothing(self, query: Query, allowance: Allowance) -> None:
        """Raise an error if a stream seems empty because of how the backend keeps its records.

        It is called after a first page without a filter has found nothing. For example, a collector's processor may
        have renamed the attribute `zenml.log.id`.

        Raises:
            zenml.exceptions.LogStoreError: It is. The message says why, and how to fix it.
        """
        return

    # The read port

    def read(self, request: PageRequest) -> Page:
        """Read one page. Raises what `Reader.read` raises."""
        is_newer = request.direction == "newer"
        token = _parse(request.token)
        first, last = _window(request)
        self._check(token, first, last)
        if first > last or (token is not None and is_newer and token.nanos > last):
            # The clock of the machine that read the page before may be ahead.
            return Page()
        wanted = _Wanted(request, (first, last))
        limit = min(request.limit, self.max_page_size)
        allowance = Allowance()
        found: list[tuple[Position, ReadEntry]] = []
        step = _Step([], token, False)
        try:
            for step in self._walk(request, token, limit, (first, last), wanted, allowance):
                for position, record, event in step.records:
                    if (read := wanted.entry(record, event)) is not None:
                        found.append((position, read))
                if len(found) >= (1 if wanted.is_all else limit):
                    break
        except PASSING:
            # What was found is a page, and the next one may succeed.
            if not found and step.edge == token:
                raise
        edge, is_all = step.edge, step.is_all
        if not found and is_all and token is None and wanted.is_all:
            self.explain_nothing(self._query(request, None, limit, (first, last), wanted), allowance)
        if not is_newer:
            found.reverse()
        reads = replace(request, limit=limit).fitting([read for _, read in found])
        if not reads:
            # The stream has ended, or the page has used up its allowance.
            place = None if is_all or edge is None else _token(edge)
            return Page(newer=place) if is_newer else Page(older=place)
        page = found[: len(reads)] if is_newer else found[-len(reads) :]
        is_whole = len(reads) == len(found)
        oldest, newest = _token(page[0][0]), _token(page[-1][0])
        if is_newer:
            if is_whole and not is_all and edge is not None:
                newest = _token(edge)
            return Page(reads, older=None if token is None else oldest, newer=newest)
        if is_whole and not is_all and edge is not None:
            oldest = _token(edge)
        return Page(reads, older=None if is_all and is_whole else oldest, newer=newest)

    # The scan port

    def scan(self, logs: LogsResponse, token: str | None = None) -> Iterator[Scanned]:
        """Read a whole stream. Raises what `Reader.read` raises."""
        request = PageRequest(logs, "newer", token, self.max_records, LogsEntriesFilter())
        edge = _parse(token)
        first, last = _window(request)
        self._check(edge, first, last)
        wanted = _Wanted(request, (first, last))
        step = _Step([], edge, False)
        slices = _Slices()
        failures = 0
        while not step.is_all:
            # Each piece has an allowance of its own: a scan is as long as its stream.
            pieces = self._walk(request, step.edge, self.max_records, (first, last), wanted, Allowance(), slices)
            try:
                for step in pieces:
                    failures = 0
                    yield from _scanned(step)
            except PASSING as error:
                # A page leaves it to the reader of the page to ask again; a scan may be of millions of records.
                failures += 1
                if failures == READ_ATTEMPTS:
                    raise
                self._sleep(seconds_until_read(error, failures - 1))

    def event_of(self, content: _Placed, stream: Stream) -> LogEvent | None:
        """Return a scanned record as an event, None if another program wrote it."""
        return None if content.event is None else as_event(content.record, content.event, stream)

    def entry_of(self, content: _Placed) -> LogEntry | None:
        """Return a record of another program as an entry."""
        return entry_of(content.record, None).entry

    def shown_of(self, content: _Placed) -> tuple[Any, ...] | None:
        """Return what every reader shows of a scanned record's event, None if another program wrote it."""
        return None if content.event is None else shown_of(content.record, content.event)

    # Searches

    def _sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def _check(self, token: Position | None, first: int, last: int) -> None:
        """Raise `ValueError` unless a page within these times can have ended at the token."""
        slack = CLOCK_SKEW // timedelta(microseconds=1) * 1000
        if token is not None and not first - self.time_unit_nanos < token.nanos <= last + slack:
            raise ValueError("The token is malformed: no page of this stream ended there. Begin anew without a cursor.")

    def _query(
        self, request: PageRequest, edge: Position | None, limit: int, window: tuple[int, int], wanted: _Wanted
    ) -> Query:
        first, last = window
        unit = self.time_unit_nanos
        if edge is not None and request.direction == "newer":
            first = max(first, edge.nanos // unit * unit)
        elif edge is not None:
            last = min(last, edge.nanos // unit * unit + unit - 1)
        return Query(
            request.logs.id,
            request.direction,
            first // unit * unit,
            last // unit * unit + unit - 1,
            edge,
            limit,
            wanted.severity_number,
            wanted.narrowing,
        )

    def _walk(
        self,
        request: PageRequest,
        edge: Position | None,
        limit: int,
        window: tuple[int, int],
        wanted: _Wanted,
        allowance: Allowance,
        slices: _Slices | None = None,
    ) -> Iterator[_Step]:
        """Search on and on, and yield the records beyond the edge in the direction.

        It ends when all were found, or with the allowance; then an error is raised if it has found nothing.
        """
        is_newer = request.direction == "newer"
        most, has_moved = self.max_records, False
        # Where the backend cannot narrow, few of the records are wanted.
        is_narrowed = wanted.is_narrowed and (self.narrows or not (wanted.severity_number or wanted.narrowing))
        size = min(limit + _MARGIN, most) if is_narrowed else most
        while allowance.is_left:
            query = whole = self._query(request, edge, size, window, wanted)
            if slices is not None:
                query = slices.cut(whole, self.time_unit_nanos)
            try:
                answer = self.search(query, allowance)
            except AnswerTooLargeError:
                if size == 1:
                    raise LogStoreError("The backend returned a record that is too large to be read.") from None
                most = size - 1
                size = max(1, size // _FEWER)
                continue
            records, place = self._beyond(answer, edge, is_newer, wanted)
            if place is None and not answer.is_all:
                # All of them have the time of the edge, or were returned before.
                if size >= most or (allowance.seconds > 0 and not allowance.is_left):
                    raise LogStoreError(
                        "The backend has too many records of one time to be read page by page. Ask for another time."
                    )
                size = min(size * _FEWER, most)
                continue
            if slices is not None:
                slices.note(query, answer, place)
            has_moved = has_moved or place is not None or answer.is_all
            edge = place if place is not None else edge
            is_all = answer.is_all and query.last_nanos == whole.last_nanos
            yield _Step(records, edge, is_all)
            if is_all:
                return
        if not has_moved:
            raise LogStoreUnavailableError("The search came to no end. Try again later, or ask for a shorter time.")

    def _beyond(
        self, answer: Answer, edge: Position | None, is_newer: bool, wanted: _Wanted
    ) -> tuple[list[_Placed], Position | None]:
        """Return the records of an answer that lie beyond the edge, in the direction, each place once.

        Records at the end of an answer that is not complete are left out if others of their time may be missing.

        Returns:
            The records of the stream, and the place of the last record that need not be asked for again.
        """
        placed = sorted(map(_placed, answer.records), key=_place_of, reverse=not is_newer)
        if not placed:
            return [], None
        ordered: list[_Placed] = []
        before = edge
        for one in placed:
            if before is None or (one.position > before if is_newer else one.position < before):
                ordered.append(one)
                before = one.position
        if not answer.is_all:
            tie = self._tie(placed[-1].position, placed[-1].event)
            while ordered and tie is not None and self._tie(ordered[-1].position, ordered[-1].event) == tie:
                ordered.pop()
        place = ordered[-1].position if ordered else None
        return [one for one in ordered if wanted.is_of_stream(one.record)], place

    def _tie(self, position: Position, event: Event | None) -> object:
        """Return what records have in common that the backend returns in any order; None if no others are like it."""
        if self.sorts_ties:
            # Equal events are duplicates.
            return position[:3] if event is None else None
        return position.nanos // self.time_unit_nanos


class _Wanted:
    """Which records a page wants: the checks that hold whatever the backend has narrowed.

    Attributes:
        is_all: Whether all of the stream's records are wanted.
        severity_number: The least severity that the backend may narrow to.
        narrowing: The text that it may narrow to.
        is_narrowed: Whether it can narrow to the text that is wanted.
    """

    def __init__(self, request: PageRequest, window: tuple[int, int]) -> None:
        filter_ = request.filter
        self._logs_id = str(request.logs.id)
        self._first, self._last = window
        self._level = filter_.level.value if filter_.level else 0
        self._search = filter_.search.lower() if filter_.search else None
        self.is_all = filter_ == LogsEntriesFilter()
        self.severity_number = 4 * (self._level // 10) + 1 if self._level > 10 else 0
        self.narrowing = filter_.search if filter_.search and all(map(_is_simple, filter_.search)) else None
        self.is_narrowed = (self._search is None) is (self.narrowing is None)

    def is_of_stream(self, record: Record) -> bool:
        """Return whether a record belongs to the stream, and to the times that are wanted."""
        return record.attributes.get(STREAM) == self._logs_id and self._first <= record.nanos <= self._last

    def entry(self, record: Record, event: Event | None) -> ReadEntry | None:
        """Return a record as an entry, None if it is not wanted."""
        read = entry_of(record, event)
        entry = read.entry
        if self._level and (entry.level is None or entry.level.value < self._level):
            return None
        if self._search is not None and self._search not in entry.message.lower():
            return None
        return read


def _is_simple(character: str) -> bool:
    """Return whether a character has the same length in each case, so that all backends agree on its case."""
    lower, upper = character.lower(), character.upper()
    return character < "\u0250" and len(lower) == len(upper) == 1 and upper.lower() == lower == character.casefold()


def _placed(record: Record) -> _Placed:
    event = event_of(record)
    return _Placed(position_of(record, event), record, event)


_place_of = itemgetter(0)


def _scanned(step: _Step) -> Iterator[Scanned]:
    groups = [list(group) for _, group in groupby(step.records, _writer_of)]
    for place, group in enumerate(groups, start=1):
        events = [event for _, _, event in group if event is not None]
        is_last = place == len(groups)
        yield Scanned(
            events[0].writer if events else "",
            [event.sequence for event in events],
            [position.nanos for position, _, _ in group],
            group,
            None,
            _token(step.edge) if is_last and step.edge is not None else None,
        )


def _writer_of(placed: _Placed) -> str:
    return placed.event.writer if placed.event is not None else ""


def _nanos(moment: datetime) -> int:
    return (moment - _EPOCH) // timedelta(microseconds=1) * 1000


def _window(request: PageRequest) -> tuple[int, int]:
    """Return the times of the oldest and the newest record that may be wanted, in nanoseconds since the epoch.

    Times of filters have microseconds, as those of entries: a whole microsecond is wanted.
    """
    logs, filter_ = request.logs, request.filter
    begin = to_utc_timezone(logs.created) - CLOCK_SKEW
    end = utc_now(tz_aware=True) + FURTHEST_AHEAD
    if (ended := ended_at(logs)) is not None:
        end = min(end, ended + AFTER_ITS_END)
    begin = max(begin, filter_.since) if filter_.since else begin
    end = min(end, filter_.until) if filter_.until else end
    return _nanos(begin), _nanos(end) + 999


def _token(position: Position) -> str:
    try:
        text = orjson.dumps([1, *position]).decode()
    except TypeError:
        raise LogStoreError("A record's time or 'zenml.log.writer' cannot be read page by page.") from None
    if len(text) > LONGEST_TOKEN:
        raise LogStoreError("A record's attribute 'zenml.log.writer' is too long to be read page by page.")
    return text


def _parse(text: str | None) -> Position | None:
    """Return the place that a token stands for; None if there is no token.

    Raises:
        ValueError: It is malformed.
    """
    if text is None:
        return None
    try:
        values = orjson.loads(text) if len(text) <= LONGEST_TOKEN else None
    except ValueError:
        values = None
    version, nanos, writer, sequence, tie = values if isinstance(values, list) and len(values) == 5 else [None] * 5
    if (
        version != 1
        or not (type(nanos) is int and -_INT64 <= nanos < _INT64)
        or not isinstance(writer, str)
        or not (type(sequence) is int and 0 <= sequence <= max(HIGHEST, _INT64))
        or not (type(tie) is int and 0 <= tie < _INT64)
    ):
        raise ValueError("The token is malformed. Pass it as a page returned it.")
    return Position(nanos, writer, sequence, tie)
