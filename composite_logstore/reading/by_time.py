"""The core of a reader for a backend that sorts by time alone and can be asked for parts of a nanosecond.

Such a backend returns the first or the last records of a span of time. Which records of one nanosecond its limit leaves
out is open. So the last nanosecond of a full answer is left for the next search, and one that has more records than an
answer is asked for in parts: writer by writer, and among a writer's events by their sequence.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from statistics import median_low
from typing import ClassVar, NamedTuple

from composite_logstore.event import HIGHEST
from composite_logstore.reading.keyset import Answer, KeysetReader, Query
from composite_logstore.reading.records import Position, Record, event_of, position_of
from composite_logstore.reading.searches import Allowance
from composite_logstore.zenml import LogStoreError, LogStoreUnavailableError

_FEW = 4


class Span(NamedTuple):
    """Which records of a query to ask a backend for.

    Attributes:
        begin: The earliest time of a record, in nanoseconds since the epoch.
        end: The time before which a record has to be.
        limit: The most records to return: the first ones of the span, or the last ones, as the query's direction says.
        writer: The only writer wanted; empty for records without one, None for all.
        others: Writers whose records are not wanted; an empty one stands for records without one.
        sequences: The lowest and the highest sequence number wanted; None for all.
    """

    begin: int
    end: int
    limit: int
    writer: str | None = None
    others: tuple[str, ...] = ()
    sequences: tuple[int, int] | None = None


class TimeSortedReader(KeysetReader):
    """Reads from a backend that sorts by time alone. A subclass has `ask` and `close`.

    Attributes:
        longest_nanos: The longest span that the backend can be asked for, in nanoseconds. None for any.
    """

    # `search` sorts them.
    sorts_ties: ClassVar[bool] = True
    longest_nanos: ClassVar[int | None] = None

    @abstractmethod
    def ask(self, query: Query, span: Span, allowance: Allowance) -> Sequence[Record]:
        """Ask the backend for records of a span of time.

        Args:
            query: The stream, the direction and the filter.
            span: The times, and what else narrows.
            allowance: What the page may still use.

        Returns:
            The records, in any order. If they are fewer than the limit, the span has no others.

        Raises:
            Exception: As `search` does.
        """

    def search(self, query: Query, allowance: Allowance) -> Answer:
        """Return the first records beyond the query's edge, in their order, as far as none is missing."""

        def ask(span: Span) -> Sequence[Record]:
            if not allowance.is_left:
                raise LogStoreUnavailableError("The search came to no end. Try again later.")
            return self.ask(query, span, allowance)

        begin, end = query.first_nanos, query.last_nanos + 1
        edge, is_newer = query.edge, query.direction == "newer"
        while begin < end:
            span = self._first_span(begin, end, min(query.limit, self.max_records), is_newer)
            records = ask(span)
            if len(records) < span.limit:
                is_all = (span.begin, span.end) == (begin, end)
                if is_all or any(_is_beyond(record, edge, is_newer) for record in records):
                    return Answer(records, is_all)
                begin, end = (span.end, end) if is_newer else (begin, span.begin)
                continue
            last = max(record.nanos for record in records) if is_newer else min(record.nanos for record in records)
            # Other records of the last nanosecond may be missing.
            whole = [record for record in records if record.nanos != last]
            if not whole:
                # A small limit may be due to large records.
                limit = 8 * span.limit if span.limit > _FEW else span.limit + 1
                instant = Span(last, last + 1, min(limit, self.max_records))
                whole = [record for part in _crowded(ask, instant, is_newer, edge) for record in part]
                last += 1 if is_newer else -1
            if any(_is_beyond(record, edge, is_newer) for record in whole):
                return Answer(whole, is_all=False)
            begin, end = (last, end) if is_newer else (begin, last + 1)
        return Answer([], is_all=True)

    def _first_span(self, begin: int, end: int, limit: int, is_newer: bool) -> Span:
        longest = self.longest_nanos if self.longest_nanos is not None else end - begin
        if is_newer:
            return Span(begin, min(end, begin + longest), limit)
        return Span(max(begin, end - longest), end, limit)

    def _tie(self, position: Position, event: object) -> object:
        """Return None: an answer ends where no record is missing."""
        return None


def _position(record: Record) -> Position:
    return position_of(record, event_of(record))


def _is_beyond(record: Record, edge: Position | None, is_newer: bool) -> bool:
    return edge is None or (_position(record) > edge if is_newer else _position(record) < edge)


def _crowded(
    ask: Callable[[Span], Sequence[Record]], instant: Span, is_newer: bool, edge: Position | None
) -> Iterator[Sequence[Record]]:
    """Yield the records of a nanosecond beyond the edge in their order, in parts, until one has any.

    Raises:
        LogStoreError: Too many of them have no numbers.
    """
    at = edge if edge is not None and edge.nanos == instant.begin else None
    for writer in sorted(_writers(ask, instant), reverse=not is_newer):
        if at is not None and (writer < at.writer if is_newer else writer > at.writer):
            continue
        first, last = 0, HIGHEST
        if at is not None and at.writer == writer:
            first, last = (at.sequence, HIGHEST) if is_newer else (0, at.sequence)
        for records in _of_writer(ask, instant._replace(writer=writer), first, last, is_newer):
            yield records
            if any(_is_beyond(record, edge, is_newer) for record in records):
                return


def _writers(ask: Callable[[Span], Sequence[Record]], instant: Span) -> set[str]:
    """Return the writers of a nanosecond's records; an empty one stands for records without one."""
    writers: set[str] = set()
    while True:
        records = ask(instant._replace(others=tuple(sorted(writers))))
        found = {_position(record).writer for record in records}
        if len(records) < instant.limit or found <= writers:
            return writers | found
        writers |= found


def _of_writer(
    ask: Callable[[Span], Sequence[Record]], instant: Span, first: int, last: int, is_newer: bool
) -> Iterator[Sequence[Record]]:
    """Yield a writer's records of a nanosecond by their sequence, from the first number to the last, or backwards."""
    records = ask(instant)
    if len(records) < instant.limit:
        yield records
        return
    if not instant.writer:
        raise LogStoreError(
            f"One nanosecond has {instant.limit} records or more without 'zenml.log.writer' and 'zenml.log.sequence': "
            "they cannot be read page by page."
        )
    while first <= last:
        low, high = first, last
        while True:
            records = ask(instant._replace(sequences=(low, high)))
            # A full answer is any part of them, unless it has copies of one event alone.
            if len(records) < instant.limit or low == high:
                break
            middle = max(low, min(median_low([_position(record).sequence for record in records]), high))
            if is_newer:
                high = middle if middle < high else high - 1
            else:
                low = middle if middle > low else low + 1
        yield records
        first, last = (high + 1, last) if is_newer else (first, low - 1)
