"""Encodes an event as a line of an archive: ZenML's `LogEntry` as JSON, with further keys."""

from __future__ import annotations

import json
from datetime import datetime, timedelta, timezone
from functools import lru_cache
from typing import Any

import orjson

from composite_logstore import (
    UNENCODABLE,
    LogEvent,
    RejectedError,
)
from composite_logstore_artifact.lines import (
    STANDARD_LEVELS,
    standard_level,
)

_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)


def encode(event: LogEvent) -> bytes:
    """Return the event as a line, with its newline.

    The line is ZenML's `LogEntry` as JSON, with keys for the event's other fields: ZenML's readers ignore keys that
    they do not know. Empty fields are left out.

    Raises:
        RejectedError: A field cannot be encoded as JSON.
    """
    if event.is_ordinary:
        try:
            return _encode_ordinary(event)
        except (orjson.JSONEncodeError, OverflowError, OSError, ValueError):
            # A field has a value that only the general way can encode.
            pass
    try:
        return _encode_any(event)
    except UNENCODABLE as error:
        # Another program wrote the event. A retry would fail too.
        raise RejectedError(f"an event cannot be encoded ({type(error).__name__})") from error


def _encode_ordinary(event: LogEvent) -> bytes:
    """Return the same line as `_encode_any`, in less than half of the time."""
    second, nanos = divmod(event.time_unix_nano, 1_000_000_000)
    before, after = _place(
        event.level, event.level_name, event.logger_name, event.file, event.line, event.function, event.writer
    )
    message = orjson.dumps(event.message).decode()
    return (
        f'{{"timestamp":"{_second(second)}.{nanos // 1000:06d}+00:00",{before}"message":{message},"id":"{event.uid}",'
        f'{after}"sequence":{event.sequence},"number":{event.number},"time_unix_nano":{event.time_unix_nano}}}\n'
    ).encode()


@lru_cache(maxsize=100)
def _second(second: int) -> str:
    return datetime.fromtimestamp(second, timezone.utc).replace(tzinfo=None).isoformat()


@lru_cache(maxsize=10_000)
def _place(
    level: int, level_name: str, logger_name: str, file: str, line: int, function: str, writer: str
) -> tuple[str, str]:
    """Return the parts before and after the message that all lines from one place in the code share."""
    before: dict[str, Any] = {"level": standard_level(level), "name": logger_name}
    after: dict[str, Any] = {}
    if file:
        after |= {"filename": file, "lineno": line}
    if function:
        after["module"] = function
    after["writer"] = writer
    if level != before["level"]:
        after["level_number"] = level
    if level_name != STANDARD_LEVELS[before["level"]]:
        after["level_name"] = level_name
    return tuple(orjson.dumps(part)[1:-1].decode() + "," for part in (before, after))  # type: ignore[return-value]


def _encode_any(event: LogEvent) -> bytes:
    level = standard_level(event.level)
    line: dict[str, Any] = {
        "timestamp": _timestamp(event.time_unix_nano),
        "level": level,
        "name": event.logger_name,
        "message": event.text,
        "id": event.uid,
    }
    if event.file:
        line["filename"] = event.file
        line["lineno"] = event.line
    if event.function:
        line["module"] = event.function
    line["writer"] = event.writer
    line["sequence"] = event.sequence
    line["number"] = event.number
    line["time_unix_nano"] = event.time_unix_nano
    if event.level != level:
        line["level_number"] = event.level
    if event.level_name != STANDARD_LEVELS[level]:
        line["level_name"] = event.level_name
    if event.exception:
        # `message` ends with the exception. A reader removes that end to get the message that was logged.
        line["exception"] = event.exception._asdict()
    if event.trace:
        line["trace_id"] = f"{event.trace.trace_id:032x}"
        line["span_id"] = f"{event.trace.span_id:016x}"
        line["flags"] = event.trace.flags
    if event.progress > 1:
        line["progress_bar"] = event.progress
    if event.attributes or event.metadata:
        line["attributes"] = {**event.attributes, **event.metadata}
    try:
        # JSON has no infinities and no NaN: they become null.
        return orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE)
    except TypeError:
        # Another program may leave a lone surrogate in a path, or a number beyond 64 bits.
        return json.dumps(line, default=str, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


def _timestamp(time_unix_nano: int) -> datetime | None:
    try:
        return _EPOCH + timedelta(microseconds=time_unix_nano // 1000)
    except OverflowError:
        return None
