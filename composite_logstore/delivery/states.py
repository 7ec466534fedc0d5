"""The states of a delivery, the outcomes of an export, and the actions that a delivery asks for."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias

from composite_logstore.event import LogEvent, Stream


class State(str, Enum):
    """The state of a child, as its exports end."""

    HEALTHY = "healthy"
    RETRYING = "retrying"
    UNAVAILABLE = "unavailable"


class Outcome(Enum):
    """How an export ends, as far as it matters to the state."""

    ANSWERED = "the backend took the batch, or rejected events of it for good"
    TOO_LARGE = "the batch has too many events or bytes for one request"
    REJECTED_ALL = "the backend rejects so many single events in a row that the events cannot be at fault"
    FAILED = "the backend did not take the batch this time"
    BROKEN_OFF = "as `FAILED`, and the batch may be too large: its export has timed out or broken off again"
    FAILED_LONG = "as `FAILED` or `BROKEN_OFF`, and the wait between retries has grown to its longest"
    REFUSED = "the backend takes nothing until somebody corrects something, such as a key"
    OVERDUE = "the export has not returned within export_timeout_millis"
    GIVEN_UP = "a flush saw no progress for flush_timeout_millis"


_NEXT = {
    # An outcome → the next state of a child that is healthy, retrying, and unavailable.
    Outcome.ANSWERED: (State.HEALTHY, State.HEALTHY, State.HEALTHY),
    Outcome.TOO_LARGE: (State.HEALTHY, State.HEALTHY, State.HEALTHY),
    Outcome.REJECTED_ALL: (State.UNAVAILABLE, State.UNAVAILABLE, State.UNAVAILABLE),
    Outcome.FAILED: (State.RETRYING, State.RETRYING, State.UNAVAILABLE),
    Outcome.BROKEN_OFF: (State.RETRYING, State.RETRYING, State.UNAVAILABLE),
    Outcome.FAILED_LONG: (State.UNAVAILABLE, State.UNAVAILABLE, State.UNAVAILABLE),
    Outcome.REFUSED: (State.UNAVAILABLE, State.UNAVAILABLE, State.UNAVAILABLE),
    Outcome.OVERDUE: (State.UNAVAILABLE, State.UNAVAILABLE, State.UNAVAILABLE),
    # A flush does not wait for an unavailable child, so it cannot give up on it.
    Outcome.GIVEN_UP: (State.UNAVAILABLE, State.UNAVAILABLE, None),
}
TRANSITIONS: dict[tuple[State, Outcome], State] = {
    (state, outcome): new for outcome, row in _NEXT.items() for state, new in zip(State, row, strict=True) if new
}


@dataclass(frozen=True)
class Export:
    """Export this batch now, and report the result to `exported` or `failed`."""

    batch: list[LogEvent]


@dataclass(frozen=True)
class Load:
    """Read the child's next events from the spool, and report them to `loaded` or `not_loaded`.

    Attributes:
        after: Exclusive lower bound of the events' numbers.
        events: The most events to read.
        expected: How many events the spool is expected to hold for the child.
    """

    after: int
    events: int
    expected: int


@dataclass(frozen=True)
class EndStream:
    """Tell the exporter that the stream has ended: the child has acknowledged all its events."""

    stream: Stream


@dataclass(frozen=True)
class Wait:
    """Wait.

    Attributes:
        seconds: For how long at most; None for no limit.
        events: End the wait once so many more events have arrived; None if events do not end it.
        urgent: Whether an event of level WARNING or above ends the wait, too.
    """

    seconds: float | None
    events: int | None = None
    urgent: bool = False


Action: TypeAlias = Export | Load | EndStream | Wait
