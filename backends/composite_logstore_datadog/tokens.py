"""Tokens: where a page of Datadog's log search ended."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta, timezone
from hashlib import blake2b
from typing import Literal, NamedTuple
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field

from composite_logstore import Event, ReadEntry
from composite_logstore_datadog.decoding import EPOCH

CLOCK_SKEW = timedelta(hours=1)
"""A stream's creation has the server's time, and its first events the client's, which may be behind."""

# The latest time that is accepted: a `datetime` has to have room for a millisecond more.
_LAST_MICROS = (datetime(9999, 12, 31, tzinfo=timezone.utc) - EPOCH) // timedelta(microseconds=1)

LONGEST_TOKEN = 24 * 1024
"""In characters. The events of the last millisecond take a few hundred, unless a thousand logs of other programs have
the same time."""


class Token(BaseModel):
    """Where a page ended.

    A token is a time, and not Datadog's own cursor. Datadog sorts equal times in an arbitrary order, so a page that
    ends where Datadog's page ends would tear the events of a millisecond apart.

    Attributes:
        direction: The direction in which pages follow each other.
        edge_millis: The time of the page's last entry, in milliseconds since the epoch.
        edge: A writer → the intervals of the numbers of its events at that time that were returned. An event that was
            sent twice is there twice, at the same time.
        others: Short hashes of the IDs of the other entries at that time that were returned.
    """

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True, strict=True)

    version: Literal[2] = 2
    direction: Literal["newer", "older"]
    edge_millis: int = Field(ge=0, le=_LAST_MICROS // 1_000)
    edge: dict[str, list[tuple[int, int]]]
    others: list[str] = Field(default_factory=list)

    def has(self, item: Found) -> bool:
        """Return whether the entry was returned."""
        if item.millis != self.edge_millis:
            return (item.millis < self.edge_millis) == (self.direction == "newer")
        event = item.read.event
        if event is None:
            return _short(item.read.entry.id) in self.others
        return any(first <= event.sequence <= last for first, last in self.edge.get(event.writer, []))


class Found(NamedTuple):
    """An entry, and the time by which Datadog sorts it, in milliseconds since the epoch."""

    millis: int
    read: ReadEntry


def parse_token(text: str | None) -> Token | None:
    """Return the token that a page returned; None if there is none.

    Raises:
        ValueError: It is malformed.
    """
    if text is None:
        return None
    try:
        if len(text) > LONGEST_TOKEN:
            raise ValueError("too long")
        return Token.model_validate_json(text)
    except ValueError:
        raise ValueError("The token is malformed. Pass it as a page returned it.") from None


def check(token: Token, direction: str, since: datetime, until: datetime) -> None:
    """Check that a page in this direction can have ended at the token.

    Raises:
        ValueError: No such page can have ended there.
    """
    edge = moment_of(token.edge_millis)
    # Differences cannot overflow, as sums can.
    if token.direction != direction or since - edge > timedelta(milliseconds=1) or edge - until > CLOCK_SKEW:
        raise ValueError("The token is malformed: no page in this direction ended there. Begin anew without a cursor.")


def token_after(page: Sequence[Found], direction: Literal["newer", "older"], before: Token | None) -> Token:
    """Return the token at the end of the page."""
    millis = page[-1 if direction == "newer" else 0].millis
    at_edge = [item.read for item in page if item.millis == millis]
    edge = _intervals({read.event for read in at_edge if read.event})
    others = [_short(read.entry.id) for read in at_edge if read.event is None]
    if before is not None and before.edge_millis == millis:
        for writer, intervals in before.edge.items():
            edge[writer] = _joined([*intervals, *edge.get(writer, [])])
        others = before.others + others
    return Token(direction=direction, edge_millis=millis, edge=edge, others=others)


def _short(id: UUID) -> str:
    return blake2b(id.bytes, digest_size=8).hexdigest()


def moment_of(millis: int) -> datetime:
    """Return a time that is given in milliseconds since the epoch."""
    return EPOCH + timedelta(milliseconds=millis)


def _intervals(events: set[Event]) -> dict[str, list[tuple[int, int]]]:
    """Return the intervals of each writer's numbers."""
    numbers: dict[str, list[tuple[int, int]]] = {}
    for writer, sequence in events:
        numbers.setdefault(writer, []).append((sequence, sequence))
    return {writer: _joined(intervals) for writer, intervals in numbers.items()}


def _joined(intervals: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Join the intervals that touch each other."""
    joined: list[tuple[int, int]] = []
    for first, last in sorted(intervals):
        if joined and first <= joined[-1][1] + 1:
            joined[-1] = joined[-1][0], max(joined[-1][1], last)
        else:
            joined.append((first, last))
    return joined
