"""Events for tests, at a time that stands still."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from composite_logstore import testing
from composite_logstore.event import Capture, LogEvent, Stream, capture
from composite_logstore.testing import make_stream

WRITER = "0123456789abcde"
SECOND = 1_000_000_000
NOON = 1_790_000_000 * SECOND
"""Some time, in nanoseconds since the epoch."""

__all__ = ["NOON", "SECOND", "WRITER", "make_capture", "make_events", "make_stream"]


def make_capture(message: str = "hello", level: int = logging.INFO, **changes: Any) -> Capture:
    """Return what a record says; `changes` are fields of `Capture`."""
    record = logging.LogRecord("train", level, "/code/train.py", 42, message, (), None, "fit")
    return capture(record)._replace(**{"time_unix_nano": NOON, **changes})


def make_events(
    messages: Sequence[str], stream: Stream | None = None, first: int = 0, writer: str = WRITER, **changes: Any
) -> list[LogEvent]:
    """Return one event for each message, a millisecond apart, numbered from `first`."""
    return testing.make_events(messages, stream, first, writer, start_unix_nano=NOON, **changes)
