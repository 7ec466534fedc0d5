"""Makes events and streams as backends get them, and streams as ZenML's server describes them."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from datetime import datetime, timedelta, timezone
from typing import Any
from uuid import UUID, uuid4

from zenml.models import LogsResponse

from composite_logstore import zenml
from composite_logstore.capture.record import note, numbered
from composite_logstore.event import LogEvent, Stream

WRITER = "0123456789abcde"

_SECOND = 1_000_000_000
_MILLISECOND = 1_000_000


def make_stream(**metadata: Any) -> Stream:
    """Return a new stream with the attributes that ZenML and the log store give it.

    Args:
        metadata: More attributes.
    """
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


def make_events(
    messages: Sequence[str],
    stream: Stream | None = None,
    first: int = 0,
    writer: str = WRITER,
    start_unix_nano: int | None = None,
    step_nanos: int = _MILLISECOND,
    levels: Sequence[int] = (logging.INFO,),
    **changes: Any,
) -> list[LogEvent]:
    """Return one event for each message.

    Args:
        messages: The events' messages.
        stream: The stream they belong to; a new one if not given.
        first: The number of the first event, in the writer's journal as well as in the stream.
        writer: The writer that numbered them, 15 hexadecimal digits.
        start_unix_nano: The time of event number 0, in nanoseconds since the epoch. A minute ago if not given:
            some backends take no older events.
        step_nanos: The time between two events, in nanoseconds.
        levels: The events' levels, used in turn.
        changes: Other fields of all these events.
    """
    stream = stream or make_stream()
    if start_unix_nano is None:
        # Whole microseconds, as a log record has them.
        start_unix_nano = (time.time_ns() - 60 * _SECOND) // 1000 * 1000
    events = []
    for number, message in enumerate(messages, start=first):
        level = levels[(number - first) % len(levels)]
        record = logging.LogRecord("train", level, "/code/train.py", 42, message, (), None, "fit")
        event = numbered(note(record), stream, writer, number, number)
        events.append(event._replace(time_unix_nano=start_unix_nano + number * step_nanos)._replace(**changes))
    return events


def make_event(message: str = "hello", stream: Stream | None = None, **changes: Any) -> LogEvent:
    """Return one event.

    Args:
        message: Its message.
        stream: The stream it belongs to; a new one if not given.
        changes: Other fields of it.
    """
    return make_events([message], stream)[0]._replace(**changes)


def make_logs(stream: Stream, log_store_id: UUID | None = None) -> LogsResponse:
    """Return the stream as ZenML's server describes it to a reader.

    Args:
        stream: The stream. Its description says that it began an hour ago.
        log_store_id: The log store that wrote it.
    """
    began = (datetime.now(timezone.utc) - timedelta(hours=1)).replace(tzinfo=None)
    return zenml.make_logs(stream.id, "step", began, project_id=uuid4(), log_store_id=log_store_id or uuid4())
