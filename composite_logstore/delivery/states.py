"""The states of a delivery, the outcomes of an export, and the actions that a delivery asks for."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias

from composite_logstore.event import LogEvent, Stream


class State(str, Enum):
    """How a child's backend is doing."""

    HEALTHY = "healthy"
    RETRYING = "retrying"
    UNAVAILABLE = "unavailable"


class Outcome(Enum):
    """What can happen to an export, as far as the state is concerned."""

    ANSWERED = "the backend took the batch, or said which of its events it will never take"
    TOO_LARGE = "the batch has too many events or bytes for one request"
    REJECTED_ALL = "the backend has rejected so many events in a row, one by one, that they cannot be at fault"
    FAILED = "the backend did not take the batch this time"
    BROKEN_OFF = "the same: the export timed out or broke off so often that the batch may be too large"
    FAILED_LONG = "either, and the wait between retries has grown to its longest"
    REFUSED = "the backend can take nothing until somebody mends something"
    OVERDUE = "the export has not returned within export_timeout_millis"
    GIVEN_UP = "a flush saw no progress for flush_timeout_millis"


TRANSITIONS: dict[tuple[State, Outcome], State] = {
    (State.HEALTHY, Outcome.ANSWERED): State.HEALTHY,
    (State.HEALTHY, Outcome.TOO_LARGE): State.HEALTHY,
    (State.HEALTHY, Outcome.REJECTED_ALL): State.UNAVAILABLE,
    (State.HEALTHY, Outcome.FAILED): State.RETRYING,
    (State.HEALTHY, Outcome.BROKEN_OFF): State.RETRYING,
    (State.HEALTHY, Outcome.FAILED_LONG): State.UNAVAILABLE,
    (State.HEALTHY, Outcome.REFUSED): State.UNAVAILABLE,
    (State.HEALTHY, Outcome.OVERDUE): State.UNAVAILABLE,
    (State.HEALTHY, Outcome.GIVEN_UP): State.UNAVAILABLE,
    (State.RETRYING, Outcome.ANSWERED): State.HEALTHY,
    (State.RETRYING, Outcome.TOO_LARGE): State.HEALTHY,
    (State.RETRYING, Outcome.REJECTED_ALL): State.UNAVAILABLE,
    (State.RETRYING, Outcome.FAILED): State.RETRYING,
    (State.RETRYING, Outcome.BROKEN_OFF): State.RETRYING,
    (State.RETRYING, Outcome.FAILED_LONG): State.UNAVAILABLE,
    (State.RETRYING, Outcome.REFUSED): State.UNAVAILABLE,
    (State.RETRYING, Outcome.OVERDUE): State.UNAVAILABLE,
    (State.RETRYING, Outcome.GIVEN_UP): State.UNAVAILABLE,
    (State.UNAVAILABLE, Outcome.ANSWERED): State.HEALTHY,
    (State.UNAVAILABLE, Outcome.TOO_LARGE): State.HEALTHY,
    (State.UNAVAILABLE, Outcome.REJECTED_ALL): State.UNAVAILABLE,
    (State.UNAVAILABLE, Outcome.FAILED): State.UNAVAILABLE,
    (State.UNAVAILABLE, Outcome.BROKEN_OFF): State.UNAVAILABLE,
    (State.UNAVAILABLE, Outcome.FAILED_LONG): State.UNAVAILABLE,
    (State.UNAVAILABLE, Outcome.REFUSED): State.UNAVAILABLE,
    (State.UNAVAILABLE, Outcome.OVERDUE): State.UNAVAILABLE,
    # A flush does not wait for an unavailable child, so it cannot give it up.
}


@dataclass(frozen=True)
class Export:
    """Export this batch now, then say how it ended."""

    batch: list[LogEvent]


@dataclass(frozen=True)
class Load:
    """Read the next events of the child back from the spool, then hand them over: those that its queue has not.

    Attributes:
        after: Only events with numbers above this are wanted.
        events: How many at most.
        there: How many are thought to be there.
    """

    after: int
    events: int
    there: int


@dataclass(frozen=True)
class EndStream:
    """Tell the exporter that the stream has ended: all its events are settled."""

    stream: Stream


@dataclass(frozen=True)
class Wait:
    """Do nothing.

    Attributes:
        seconds: For how long, None for as long as nothing happens.
        events: Unless so many events more are there before; None if events change nothing.
    """

    seconds: float | None
    events: int | None = None


Action: TypeAlias = Export | Load | EndStream | Wait
