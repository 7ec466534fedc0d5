"""Events for tests."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any
from uuid import UUID, uuid4

from composite_logstore.event import Capture, LogEvent, Stream, capture

WRITER = "0123456789abcde"
SECOND = 1_000_000_000
NOON = 1_790_000_000 * SECOND
"""Some time, in nanoseconds since the epoch."""


def make_stream(**metadata: Any) -> Stream:
    """Return a new stream with the attributes that ZenML and the store give it."""
    logs_id = uuid4()
    return Stream(
        logs_id,
        {
            "zenml.log.id": str(logs_id),
            "zenml.log.source": "step",
            "zenml.log_store.id": "7a0dc2ae-6a0a-4d2c-8c4b-3f4b8e4c1b11",
            "zenml.log_store.name": "logs",
            **metadata,
        },
        artifact_store_id=UUID("11111111-2222-4333-8444-555555555555"),
    )


def make_capture(message: str = "hello", level: int = logging.INFO, **changes: Any) -> Capture:
    """Return what a record says; `changes` are fields of `Capture`."""
    record = logging.LogRecord("train", level, "/code/train.py", 42, message, (), None, "fit")
    return capture(record)._replace(**{"time_unix_nano": NOON, **changes})


def make_events(
    messages: Sequence[str], stream: Stream | None = None, first: int = 0, writer: str = WRITER, **changes: Any
) -> list[LogEvent]:
    """Return one event for each message, a millisecond apart, numbered from `first`."""
    stream = stream or make_stream()
    return [
        LogEvent(
            stream,
            writer,
            number,
            number,
            *make_capture(message, time_unix_nano=NOON + number * 1_000_000)._replace(**changes),
        )
        for number, message in enumerate(messages, start=first)
    ]
