"""Divides log events into requests within the limits of PutLogEvents.

https://docs.aws.amazon.com/AmazonCloudWatchLogs/latest/APIReference/API_PutLogEvents.html
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

MOST_BYTES = 1_048_576
"""The most bytes of a request: those of the messages, and `EVENT_BYTES` for each event."""
EVENT_BYTES = 26
MOST_EVENTS = 10_000
SPAN_MILLIS = 24 * 3600 * 1000
"""The longest time between the first and the last event of a request, in milliseconds."""


class Line(NamedTuple):
    """An encoded event.

    Attributes:
        millis: Its time, in milliseconds since the epoch.
        message: Its message, in UTF-8.
        key: Its writer and number.
        is_shortened: Whether it had to be shortened.
    """

    millis: int
    message: bytes
    key: tuple[str, int]
    is_shortened: bool = False


def requests_of(lines: Iterable[Line]) -> Iterator[list[Line]]:
    """Yield the lines of each request, in the order of their times; lines of one millisecond keep their order."""
    request: list[Line] = []
    size = 0
    for line in sorted(lines, key=lambda line: line.millis):
        taken = len(line.message) + EVENT_BYTES
        is_full = len(request) == MOST_EVENTS or size + taken > MOST_BYTES
        if request and (is_full or line.millis - request[0].millis >= SPAN_MILLIS):
            yield request
            request, size = [], 0
        request.append(line)
        size += taken
    if request:
        yield request


def rejected_in(answer: Any, count: int) -> dict[str, range]:
    """Return which events of a request CloudWatch has rejected: a reason → their places in the request.

    Args:
        answer: `rejectedLogEventsInfo` of the answer. It may have any shape.
        count: How many events the request has.
    """
    if not isinstance(answer, dict):
        return {}

    def place(name: str, missing: int) -> int:
        value = answer.get(name)
        return max(0, min(value, count)) if type(value) is int else missing

    # The ends are exclusive, the start is inclusive. An event may be too old as well as expired.
    old = place("tooOldLogEventEndIndex", 0)
    expired = place("expiredLogEventEndIndex", 0)
    new = max(place("tooNewLogEventStartIndex", count), old, expired)
    rejected = {
        "older than CloudWatch takes": range(old),
        "older than the log group's retention": range(old, max(old, expired)),
        "more than 2 hours ahead": range(new, count),
    }
    return {reason: places for reason, places in rejected.items() if places}
