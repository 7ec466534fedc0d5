"""Cursors: where a page ended, and which events were returned.

A cursor is plain text that anybody can write. So it contains no secret, and all of it is checked before it is used.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Iterable, Sequence
from itertools import accumulate, islice
from typing import Annotated, Any, Literal, TypeAlias
from uuid import UUID

import orjson
from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, PlainValidator

from composite_logstore.backend import Event, ReadEntry, checked_entry
from composite_logstore.event import HIGHEST
from composite_logstore.intervals import Interval, Intervals
from composite_logstore.zenml import LogsEntriesFilter, LogStoreError

LONGEST_CURSOR = 64 * 1024
"""In characters. Cursors have between a few hundred and six thousand, unless the text that is searched for or a
reader's token is long."""

LARGEST_SEEN = 3_000
"""The room of a cursor for the events that were returned, in bytes, compressed: a whole URL should stay below 8 kB."""

# The same before compression. It bounds the work that a forged cursor can cause.
_LARGEST_EXPANDED = 128 * 1024

Direction: TypeAlias = Literal["newer", "older"]
SeenEvents: TypeAlias = dict[str, Intervals]
"""A writer → the numbers of its events that were returned. The writer that was returned last comes last."""


def within_bounds(seen: SeenEvents, direction: Direction) -> SeenEvents:
    """Return the part of the returned events that a cursor has room for: those that were returned last.

    If the backend has a forgotten event twice, it is returned twice. That is better than hiding an event.

    Args:
        seen: The events that were returned. A writer without losses has one interval; a filter makes many.
        direction: The direction in which pages follow each other.
    """
    writers = list(seen.items())
    most = min(max((intervals.count for intervals in seen.values()), default=1), _LARGEST_EXPANDED // 4)
    while not _fits(kept := {writer: _nearest(intervals, most, direction) for writer, intervals in writers}):
        if most > 1:
            most //= 2
        else:
            writers = writers[(len(writers) + 1) // 2 :]
    return kept


def _nearest(intervals: Intervals, most: int, direction: Direction) -> Intervals:
    """Return the intervals that the pages passed last, given that a writer's events mostly lie in their order."""
    if intervals.count <= most:
        return intervals
    first = intervals.count - most if direction == "newer" else 0
    return Intervals(islice(intervals, first, first + most))


def _fits(seen: SeenEvents) -> bool:
    content = _expanded(seen)
    return len(content) <= _LARGEST_EXPANDED and len(zlib.compress(content)) <= LARGEST_SEEN


def _expanded(seen: SeenEvents) -> bytes:
    return orjson.dumps({writer: list(_steps(intervals)) for writer, intervals in seen.items()})


def _steps(intervals: Iterable[Interval]) -> Iterable[int]:
    """Yield the distances between the ends of intervals: these are small numbers, which compress well."""
    place = 0
    for first, last in intervals:
        yield first - place
        yield last - first
        place = last


def _encode_seen(seen: SeenEvents) -> str:
    return base64.b85encode(zlib.compress(_expanded(seen))).decode()


def _decode_seen(value: Any) -> SeenEvents:
    """Decode a cursor's set of returned events; return one that is decoded already as it is.

    Raises:
        ValueError: The text is malformed.
    """
    if isinstance(value, dict) and all(isinstance(intervals, Intervals) for intervals in value.values()):
        return value
    if not isinstance(value, str) or len(value) > 2 * LARGEST_SEEN:
        raise ValueError("not what a page had returned")
    decompressor = zlib.decompressobj()
    try:
        content = decompressor.decompress(base64.b85decode(value), _LARGEST_EXPANDED + 1)
    except zlib.error as error:
        raise ValueError("not compressed") from error
    if not decompressor.eof or decompressor.unused_data or len(content) > _LARGEST_EXPANDED:
        raise ValueError("incomplete, or too large")
    return {writer: _intervals(steps) for writer, steps in orjson.loads(content).items()}


def _intervals(steps: Any) -> Intervals:
    if not isinstance(steps, list) or not all(type(step) is int and step >= 0 for step in steps):
        raise ValueError("not steps")
    if sum(steps) > HIGHEST:
        raise ValueError("too far")
    places = list(accumulate(steps))
    return Intervals(zip(places[::2], places[1::2], strict=True))


class Cursor(BaseModel):
    """Where a page ended, and everything that the page after it has to agree with.

    Attributes:
        version: The version of this format.
        log_store_id: The log store.
        logs_id: The stream.
        child: The child that answered: its token means nothing to another child.
        direction: The direction in which pages follow each other.
        limit: The most entries of a page.
        filter: Which entries to return.
        token: Where the child's reader continues.
        seen: The events that were returned in this direction, so that none is returned twice.
        from_oldest: Whether the pages began with the oldest entry, so that `seen` has every writer that came so far.
    """

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True, strict=True)

    version: Literal[2] = 2
    log_store_id: UUID
    logs_id: UUID
    child: str = Field(pattern=r"^[a-z0-9_-]+$")
    direction: Direction
    limit: int = Field(gt=0)
    filter: LogsEntriesFilter
    token: str
    seen: Annotated[SeenEvents, PlainValidator(_decode_seen), PlainSerializer(_encode_seen)]
    from_oldest: bool = False

    def encode(self) -> str:
        """Return the cursor as text that is safe in a URL.

        Raises:
            LogStoreError: The token of the child's reader is too long.
        """
        text = base64.urlsafe_b64encode(self.model_dump_json(exclude_none=True).encode()).decode("ascii")
        if len(text) > LONGEST_CURSOR:
            raise LogStoreError(
                f"Child '{self.child}' cannot be read page by page: its cursor would have {len(text)} characters, "
                f"and a cursor may have at most {LONGEST_CURSOR}."
            )
        return text

    @classmethod
    def decode(cls, text: str) -> Cursor:
        """Return the cursor that a text encodes.

        Raises:
            ValueError: The text is malformed.
        """
        try:
            if len(text) > LONGEST_CURSOR:
                raise ValueError("too long")
            return cls.model_validate_json(base64.b64decode(text.encode("ascii"), altchars=b"-_", validate=True))
        except (ValueError, TypeError, AttributeError, RecursionError):
            raise ValueError(
                "The cursor is malformed, or another version of composite-logstore made it. Pass `before` or `after` "
                "as a page returned it, or begin anew without a cursor."
            ) from None


def without_duplicates(entries: Sequence[ReadEntry], direction: Direction, seen: SeenEvents) -> list[ReadEntry]:
    """Return the entries that were not returned before, and note in `seen` that they are now.

    A writer's events need not lie in their order: clocks go back, and a batch is sent again if it may have arrived.
    So an entry is a duplicate only if this very event was returned, whatever its number.

    Args:
        entries: Oldest first.
        direction: The direction in which pages follow each other.
        seen: Which events were returned on earlier pages.
    """
    fresh: list[ReadEntry] = []
    writer, numbers = "", Intervals()
    reads: Iterable[ReadEntry] = map(checked_entry, entries)
    if direction == "older":
        reads = reversed(_once_in_order(reads, seen))
    for read in reads:
        event = read.event
        if event is not None:
            if event.writer != writer:
                writer, numbers = event.writer, seen.pop(event.writer, Intervals())
                seen[writer] = numbers
            if event.sequence in numbers:
                continue
            numbers.add(event.sequence, event.sequence)
        fresh.append(read)
    return fresh if direction == "newer" else fresh[::-1]


def _once_in_order(reads: Iterable[ReadEntry], seen: SeenEvents) -> list[ReadEntry]:
    """Return the entries that were not returned before, each event once.

    A batch that was sent again may lie anywhere behind the first, and the page may begin within either. Of an event
    that the page has twice, the last entry is returned, unless it lies behind later events of its writer: then the
    first one is.
    """
    nothing = Intervals()
    fresh = [
        read for read in reads if read.event is None or read.event.sequence not in seen.get(read.event.writer, nothing)
    ]
    first: dict[Event, int] = {}
    last: dict[Event, int] = {}
    for place, read in enumerate(fresh):
        if read.event is not None:
            first.setdefault(read.event, place)
            last[read.event] = place
    if first == last:
        return fresh
    places: list[int] = []
    highest: dict[str, int] = {}
    for place, read in enumerate(fresh):
        event = read.event
        if event is None:
            places.append(place)
        elif last[event] == place:
            before = highest.get(event.writer, -1)
            places.append(first[event] if before > event.sequence else place)
            highest[event.writer] = max(before, event.sequence)
    return [fresh[place] for place in sorted(places)]
