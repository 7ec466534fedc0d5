"""Events for tests, at a time that stands still."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from composite_logstore import testing
from composite_logstore.capture.record import captured, note
from composite_logstore.event import LogEvent, Stream
from composite_logstore.testing import make_stream

WRITER = "0123456789abcde"
SECOND = 1_000_000_000
NOON = 1_790_000_000 * SECOND
"""Some time, in nanoseconds since the epoch."""

__all__ = ["NOON", "SECOND", "WRITER", "capture", "make_capture", "make_events", "make_stream"]


def capture(record: logging.LogRecord, metadata: Mapping[str, Any] | None = None) -> LogEvent:
    """Return a record as an event without numbers."""
    return captured(note(record, metadata))


def make_capture(message: str = "hello", level: int = logging.INFO, **changes: Any) -> LogEvent:
    """Return an event without numbers; `changes` are fields of it."""
    record = logging.LogRecord("train", level, "/code/train.py", 42, message, (), None, "fit")
    return capture(record)._replace(**{"time_unix_nano": NOON, **changes})


def make_events(
    messages: Sequence[str], stream: Stream | None = None, first: int = 0, writer: str = WRITER, **changes: Any
) -> list[LogEvent]:
    """Return one event for each message, a millisecond apart, numbered from `first`."""
    return testing.make_events(messages, stream, first, writer, start_unix_nano=NOON, **changes)
