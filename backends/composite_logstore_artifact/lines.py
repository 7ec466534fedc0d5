"""The lines of an archive as entries, and which of them a filter wants."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta, timezone
from itertools import repeat
from operator import attrgetter
from typing import Any, NamedTuple

import orjson
from zenml.enums import LoggingLevels
from zenml.log_stores.artifact.artifact_log_store import parse_log_entry
from zenml.models import LogEntry
from zenml.utils.time_utils import to_utc_timezone

from composite_logstore import Event, ExceptionInfo, LogEvent, Stream, TraceContext

SCAN_FORMAT = "archive"
"""What an archive's lines are called where they are compared and copied as they are."""

STANDARD_LEVELS = {0: "NOTSET", 10: "DEBUG", 20: "INFO", 30: "WARNING", 40: "ERROR", 50: "CRITICAL"}
"""The numbers of the standard levels, and their names."""

_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
# What each line begins with that our exporter writes.
_BEGINNING = b'{"timestamp":'
# Later than any time that can be asked for, and no more than 64 bits.
_ETERNITY = 1 << 62
# What a line of ours says of its time and its id; of others the entry's own checks have to tell.
_TIMESTAMP = re.compile(
    r"(?!0000)\d{4}-"
    r"(?:(?:0[13578]|1[02])-(?:0[1-9]|[12]\d|3[01])|(?:0[469]|11)-(?:0[1-9]|[12]\d|30)|02-(?:0[1-9]|1\d|2[0-8]))"
    r"T(?:[01]\d|2[0-3]):[0-5]\d:[0-5]\d(?:\.\d{6})?\+00:00",
    re.ASCII,
)
_UID = re.compile(r"[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}")
_INT64 = 1 << 63
# Deeper than what is captured may be nested.
_DEEPEST = 16


_time_of = attrgetter("time_unix_nano")
_level_of = attrgetter("level")


class Summary(NamedTuple):
    """What some lines have among them, for a filter to know that it wants none of them.

    Attributes:
        oldest: The earliest time, in microseconds since the epoch.
        newest: The latest.
        level: The highest level.
    """

    oldest: int
    newest: int
    level: int

    @classmethod
    def of(cls, times_and_levels: Iterable[tuple[int | None, int]]) -> Summary:
        """Summarize the times, in microseconds since the epoch, and the levels of some lines."""
        times, levels = [], [0]
        for time, level in times_and_levels:
            levels.append(level)
            if time is not None:
                times.append(max(-_ETERNITY, min(time, _ETERNITY)))
        # Where there is no time, the latest is before the earliest: no filter by time wants that.
        return cls(min(times, default=1), max(times, default=0), max(levels))


def standard_level(level: int) -> int:
    """Return the number of the standard level at or below a level."""
    return max(0, min(level // 10 * 10, 50))


def summarize_events(events: Sequence[LogEvent]) -> Summary:
    """Summarize events as their lines will say it."""
    times = list(map(_time_of, events))
    # Of the standard levels, too, the highest is that of the highest level.
    return Summary.of(
        zip((min(times) // 1000, max(times) // 1000), repeat(standard_level(max(map(_level_of, events)))))
    )


def summarize_lines(lines: Iterable[bytes]) -> Summary:
    """Summarize lines, whoever wrote them."""
    timestamps: list[str] = []
    summarized: list[tuple[int | None, int]] = []
    levels = [0]
    for text in lines:
        try:
            fields = orjson.loads(text)
        except ValueError:
            fields = None
        if type(fields) is dict and is_surely_entry(fields):
            # As texts, too, they are in the order of time.
            timestamps.append(fields["timestamp"])
            levels.append(fields["level"])
        else:
            summarized.append(_time_and_level(text, fields))
    if timestamps:
        ends = map(datetime.fromisoformat, (min(timestamps), max(timestamps)))
        summarized += [(to_micros(time), max(levels)) for time in ends]
    return Summary.of(summarized)


def find_event(content: bytes, writer: str, number: int) -> int | None:
    """Return where the line of an event begins, None if it is not there."""
    wanted = b'"number":%d,' % number
    place = content.find(wanted)
    while place >= 0:
        begin = content.rfind(b"\n", 0, place) + 1
        end = content.find(b"\n", place)
        try:
            fields = orjson.loads(content[begin:end])
            if (fields["writer"], fields["number"]) == (writer, number):
                return begin
        except (ValueError, LookupError, TypeError):
            pass
        place = content.find(wanted, place + 1)
    return None


def is_complete(text: bytes) -> bool:
    """Return whether a line without a newline is a whole entry all the same."""
    try:
        return isinstance(orjson.loads(text), dict)
    except ValueError:
        return False


def event_of(text: bytes, stream: Stream) -> LogEvent | None:
    """Return the event that a line was made of, None if another program wrote it.

    A line that says which event it is, and of the rest what makes no sense, is an event with the line as its message.
    """
    try:
        fields = orjson.loads(text)
    except ValueError:
        return None
    event = identity_of(fields)
    if event is None:
        return None
    number, time_unix_nano = fields.get("number"), fields.get("time_unix_nano")
    if Event.of(event.writer, number) is None:
        number = event.sequence
    if not _is_integer(time_unix_nano, -_INT64, _INT64):
        time_unix_nano = 0
    what_it_is = stream, event.writer, number, event.sequence, time_unix_nano
    try:
        return LogEvent(*what_it_is, *_decode(fields))
    except ValueError:
        message = text.decode("utf-8", "replace")
        return LogEvent(
            *what_it_is, 20, "INFO", message, "", "", 0, "", None, None, _NO_ATTRIBUTES, _NO_ATTRIBUTES, False
        )


def _decode(fields: dict[str, Any]) -> tuple[Any, ...]:
    """Return what a line says, but for what says which event it is.

    Raises:
        ValueError: It is no entry.
    """
    if is_surely_entry(fields):
        level, message, name = fields["level"], fields["message"], fields.get("name", "")
        filename, lineno, module = fields.get("filename", ""), fields.get("lineno", 0), fields.get("module", "")
    else:
        entry = LogEntry.model_validate(fields)
        level, message, name = (entry.level or LoggingLevels.INFO).value, entry.message, entry.name or ""
        filename, lineno, module = entry.filename or "", entry.lineno or 0, entry.module or ""
    level_number, level_name, attributes = map(fields.get, ("level_number", "level_name", "attributes"))
    if exception := _exception(fields.get("exception")):
        message = message.removesuffix(f"\n{exception.type}: {exception.message}\n{exception.stacktrace}".rstrip())
    return (
        level_number if _is_integer(level_number, -_INT64, _INT64) else level,
        level_name if level_name and type(level_name) is str else STANDARD_LEVELS[level],
        message,
        name,
        filename,
        lineno if 0 <= lineno < _INT64 else 0,
        module,
        exception,
        _trace(fields) if "trace_id" in fields else None,
        attributes if attributes and type(attributes) is dict and _is_plain(attributes) else _NO_ATTRIBUTES,
        _NO_ATTRIBUTES,
        name in ("stdout", "stderr") and "\r" in message and not filename and "\r" in message.replace("\r\n", "\n"),
    )


def _exception(value: Any) -> ExceptionInfo | None:
    if type(value) is not dict:
        return None
    parts: list[Any] = [value.get(name) for name in ExceptionInfo._fields]
    return ExceptionInfo(*parts) if all(type(part) is str for part in parts) else None


def _trace(fields: dict[str, Any]) -> TraceContext | None:
    try:
        trace = TraceContext(int(fields["trace_id"], 16), int(fields["span_id"], 16), fields["flags"])
    except (LookupError, TypeError, ValueError):
        return None
    bounds = zip(trace, (1 << 128, 1 << 64, 1 << 32), strict=True)
    return trace if all(_is_integer(value, 0, bound) for value, bound in bounds) else None


def _is_integer(value: Any, least: int, bound: int) -> bool:
    return type(value) is int and least <= value < bound


def _is_plain(value: Any, depth: int = 0) -> bool:
    """Return whether every backend can encode a value that was read."""
    if isinstance(value, dict | list):
        values = value.values() if isinstance(value, dict) else value
        return depth < _DEEPEST and all(_is_plain(item, depth + 1) for item in values)
    return type(value) is not int or -_INT64 <= value < _INT64


def is_surely_entry(fields: dict[str, Any]) -> bool:
    """Return whether fields are those of an entry, as ours are. To have `LogEntry` tell takes four times as long."""
    get = fields.get
    level, timestamp, uid = get("level"), get("timestamp"), get("id")
    return (
        type(level) is int
        and level in STANDARD_LEVELS
        and type(get("message")) is str
        and type(get("name", "")) is str
        and type(get("filename", "")) is str
        and type(get("module", "")) is str
        and type(get("lineno", 0)) is int
        and type(timestamp) is str
        and _TIMESTAMP.fullmatch(timestamp) is not None
        and type(uid) is str
        and _UID.fullmatch(uid) is not None
        and "chunk_index" not in fields
        and "total_chunks" not in fields
    )


_NO_ATTRIBUTES: dict[str, Any] = {}


def entry_of(text: bytes) -> LogEntry | None:
    """Return a line as an entry, whoever wrote it; None if it is empty or a piece of one."""
    try:
        entry: LogEntry = LogEntry.model_validate(orjson.loads(text))
    except ValueError:
        return None if is_piece(text) else plain_entry(text)
    return entry


def is_piece(text: bytes) -> bool:
    """Return whether a line that is no entry is the beginning of one of ours.

    Its process was killed in the middle of writing it, or found the disk full. The event is written again. What
    makes no sense before it ends is a damaged line, and shown.
    """
    if not text.startswith(_BEGINNING):
        return len(text) > 1 and _BEGINNING.startswith(text)
    try:
        beginning = text.decode()
    except UnicodeDecodeError as error:
        if error.end < len(text) or error.reason != "unexpected end of data":
            return False
        beginning = text[: error.start].decode()
    try:
        orjson.loads(beginning)
    except orjson.JSONDecodeError as error:
        return error.pos >= len(beginning)
    return False


def _time_and_level(text: bytes, fields: Any) -> tuple[int | None, int]:
    """Return what a line that others may have written says of its time, in microseconds, and of its level."""
    try:
        entry: LogEntry | None = LogEntry.model_validate(fields)
    except ValueError:
        entry = plain_entry(text)
    timestamp = to_utc(entry.timestamp) if entry else None
    return to_micros(timestamp) if timestamp else None, entry.level.value if entry and entry.level else 0


def plain_entry(text: bytes) -> LogEntry | None:
    """Return the entry that ZenML makes of a line of plain text, None if it is empty."""
    line = text.decode("utf-8", "replace")
    try:
        return parse_log_entry(line)
    except ValueError:
        # It begins like a line of ZenML's old format, but with a time that is none.
        return LogEntry(message=line.strip(), level=LoggingLevels.INFO)


def to_utc(timestamp: datetime | None) -> datetime | None:
    """Return a time with its zone; None if there is none, or none that a `datetime` can hold in UTC."""
    try:
        return to_utc_timezone(timestamp) if timestamp else None
    except OverflowError:
        return None


def to_micros(time: datetime) -> int:
    """Return a time in microseconds since the epoch."""
    return (time - _EPOCH) // timedelta(microseconds=1)


def identity_of(fields: Any) -> Event | None:
    """Return which event the line is, None if another program wrote it."""
    return Event.of(fields.get("writer"), fields.get("sequence")) if isinstance(fields, dict) else None
