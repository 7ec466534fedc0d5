"""Cursors: where a page ended, and all that its continuation has to agree with.

They are plain text that anybody can write. So a cursor holds no secret, and what it says is checked before it is used.
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
from zenml.exceptions import LogStoreError
from zenml.models import LogsEntriesFilter

from composite_logstore.backend import Event, ReadEntry
from composite_logstore.parity.intervals import Interval, Intervals

LONGEST_CURSOR = 64 * 1024
"""In characters. Ours have a few hundred to six thousand, unless what is searched for or a reader's token is long."""

LARGEST_SEEN = 3_000
"""How many bytes a cursor has for the events that were returned, compressed: a whole URL should stay below 8 kB."""

# How many bytes that may be before it is compressed, and thus how much work a forged one can make.
_LARGEST_EXPANDED = 128 * 1024
_HIGHEST = 1 << 62

Direction: TypeAlias = Literal["newer", "older"]
SeenEvents: TypeAlias = dict[str, Intervals]
"""A writer → which of its events have been returned. The writer that came last is the last."""


def within_bounds(seen: SeenEvents, direction: Direction) -> SeenEvents:
    """Return as much as a cursor has room for: of each writer what was returned last, or of those that came last.

    What is forgotten would be returned once more, if it came once more. That is better than an event that is hidden.

    Args:
        seen: What was returned. A stream without losses has one interval for each writer; a filter makes many.
        direction: The way in which the pages go.
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
    """Return the intervals that were passed last, since a writer's events mostly come in their order."""
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
    """Yield how far it is from the end of one interval to the beginning of the next, and to its end: small numbers."""
    place = 0
    for first, last in intervals:
        yield first - place
        yield last - first
        place = last


def _encode_seen(seen: SeenEvents) -> str:
    return base64.b85encode(zlib.compress(_expanded(seen))).decode()


def _decode_seen(value: Any) -> SeenEvents:
    """Return what was encoded, or what is not encoded as it is.

    Raises:
        ValueError: It is malformed.
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
    if sum(steps) >= _HIGHEST:
        raise ValueError("too far")
    places = list(accumulate(steps))
    return Intervals(zip(places[::2], places[1::2], strict=True))


class Cursor(BaseModel):
    """Where a page ended, and everything that its continuation has to agree with.

    Attributes:
        child: The child that made it: its token means nothing to another.
        limit: The most entries of a page.
        token: Where the child's reader goes on.
        seen: Which events have been returned in the direction, so that what arrived twice is returned once.
        from_oldest: Whether all pages since the oldest entry came before, so that `seen` has every writer.
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
        """Return the cursor as ZenML passes it on, safe in a URL.

        Raises:
            LogStoreError: The child's reader has given a token that is too long.
        """
        text = base64.urlsafe_b64encode(self.model_dump_json(exclude_none=True).encode()).decode("ascii")
        if len(text) > LONGEST_CURSOR:
            raise LogStoreError(
                f"Child '{self.child}' cannot be read page by page: where it goes on takes {len(text)} characters "
                f"to say, and a cursor may have {LONGEST_CURSOR}."
            )
        return text

    @classmethod
    def decode(cls, text: str) -> Cursor:
        """Return the cursor that was encoded.

        Raises:
            ValueError: It is malformed.
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
    reads: Iterable[ReadEntry] = map(_with_checked_event, entries)
    if direction == "older":
        # Of duplicates on one page the first stays where it is, as in the other direction.
        reads = reversed({read.event or place: read for place, read in enumerate(reads)}.values())
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


def _with_checked_event(read: ReadEntry) -> ReadEntry:
    """Return the entry, without the event that its backend names if there can be no such event."""
    event = read.event and Event.of(*read.event)
    return read if event == read.event else ReadEntry(read.entry, None)
