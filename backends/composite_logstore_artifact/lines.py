"""Decodes the lines of an archive, to entries and to events, and summarizes them."""

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
from zenml.utils.time_utils import to_utc_timezone

from composite_logstore import Event, ExceptionInfo, LogEvent, RankedEntry, Stream, TraceContext, shown_fields
from composite_logstore.zenml import LogEntry

SCAN_FORMAT = "archive"
"""The name of the format of an archive's lines: archives share it, so their lines are compared and copied undecoded."""

STANDARD_LEVELS = {0: "NOTSET", 10: "DEBUG", 20: "INFO", 30: "WARNING", 40: "ERROR", 50: "CRITICAL"}
"""The number of each standard level → its name."""

_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
# Each line that our exporter writes begins like this.
_BEGINNING = b'{"timestamp":'
# Later than any time that a filter can ask for, and within 64 bits.
_ETERNITY = 1 << 62
# The time and the ID as our exporter writes them. Lines that differ are left to the checks of `LogEntry`.
_TIMESTAMP = re.compile(
    r"(?!0000)\d{4}-"
    r"(?:(?:0[13578]|1[02])-(?:0[1-9]|[12]\d|3[01])|(?:0[469]|11)-(?:0[1-9]|[12]\d|30)|02-(?:0[1-9]|1\d|2[0-8]))"
    r"T(?:[01]\d|2[0-3]):[0-5]\d:[0-5]\d(?:\.\d{6})?\+00:00",
    re.ASCII,
)
_UID = re.compile(r"[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}")
_INT64 = 1 << 63
# Captured attributes are never nested that deep.
_DEEPEST = 16


_time_of = attrgetter("time_unix_nano")
_level_of = attrgetter("level")


class Summary(NamedTuple):
    """The times and levels of some lines: enough for a filter to exclude all of them.

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
        """Summarize lines, of which the times, in microseconds since the epoch, and the levels are given."""
        times, levels = [], [0]
        for time, level in times_and_levels:
            levels.append(level)
            if time is not None:
                times.append(max(-_ETERNITY, min(time, _ETERNITY)))
        # If no line has a time, the newest is before the oldest: no filter by time selects that.
        return cls(min(times, default=1), max(times, default=0), max(levels))


def standard_level(level: int) -> int:
    """Return the number of the standard level at or below a level."""
    return max(0, min(level // 10 * 10, 50))


def summarize_events(events: Sequence[LogEvent]) -> Summary:
    """Summarize the lines that these events will be."""
    times = list(map(_time_of, events))
    # The highest level has the highest standard level.
    return Summary.of(
        zip((min(times) // 1000, max(times) // 1000), repeat(standard_level(max(map(_level_of, events)))))
    )


def summarize_lines(lines: Iterable[bytes]) -> Summary:
    """Summarize lines, whichever program wrote them."""
    timestamps: list[str] = []
    summarized: list[tuple[int | None, int]] = []
    levels = [0]
    for text in lines:
        try:
            fields = orjson.loads(text)
        except ValueError:
            fields = None
        if type(fields) is dict and is_surely_entry(fields):
            # These timestamps sort as text in the order of time.
            timestamps.append(fields["timestamp"])
            levels.append(fields["level"])
        else:
            summarized.append(_time_and_level(text, fields))
    if timestamps:
        ends = map(datetime.fromisoformat, (min(timestamps), max(timestamps)))
        summarized += [(to_micros(time), max(levels)) for time in ends]
    return Summary.of(summarized)


def find_event(content: bytes, writer: str, number: int) -> int | None:
    """Return where the line of an event begins; None if the content does not have it."""
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
    """Return whether a line without a newline is a complete entry."""
    try:
        return isinstance(orjson.loads(text), dict)
    except ValueError:
        return False


def event_of(text: bytes, stream: Stream) -> LogEvent | None:
    """Return the event of a line; None if another program wrote the line.

    If a line has a valid writer and number but the rest makes no sense, the event has the line as its message.
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


def shown_of(text: bytes) -> tuple[Any, ...] | None:
    """Return the `shown_fields` of a line's event; None if that takes more than a look at the line."""
    try:
        fields = orjson.loads(text)
    except ValueError:
        return None
    event = identity_of(fields)
    if event is None or not is_surely_entry(fields) or "exception" in fields or "level_number" in fields:
        return None
    get = fields.get
    nanos, lineno = get("time_unix_nano"), get("lineno", 0)
    if not _is_integer(nanos, -_INT64, _INT64) or not 0 <= lineno < _INT64:
        return None
    place = get("name", ""), nanos, get("filename", ""), lineno
    return shown_fields(event.sequence, fields["message"], fields["level"], *place)


def _decode(fields: dict[str, Any]) -> tuple[Any, ...]:
    """Return the fields of a line's event from `level` on.

    Raises:
        ValueError: The line is no entry.
    """
    if is_surely_entry(fields):
        level, message, name = fields["level"], fields["message"], fields.get("name", "")
        filename, lineno, module = fields.get("filename", ""), fields.get("lineno", 0), fields.get("module", "")
    else:
        entry = LogEntry.model_validate(fields)
        level, message, name = (entry.level or LoggingLevels.INFO).value, entry.message, entry.name or ""
        filename, lineno, module = entry.filename or "", entry.lineno or 0, entry.module or ""
    bar = fields.get("progress_bar")
    bar = bar if bar is not None and _is_integer(bar, 2, _INT64) else 0
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
        bar or (name in ("stdout", "stderr") and not filename and LogEvent.is_update(message)),
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
    """Return whether every backend can encode a decoded value."""
    if isinstance(value, dict | list):
        values = value.values() if isinstance(value, dict) else value
        return depth < _DEEPEST and all(_is_plain(item, depth + 1) for item in values)
    return type(value) is not int or -_INT64 <= value < _INT64


def is_surely_entry(fields: dict[str, Any]) -> bool:
    """Return whether fields are surely valid for `LogEntry`, whose own check takes four times as long."""
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
    """Return a line as an entry, whichever program wrote it; None if it is empty or torn."""
    try:
        return entry_from(orjson.loads(text))
    except ValueError:
        return None if is_piece(text) else plain_entry(text)


def entry_from(fields: Any) -> LogEntry:
    """Return the fields of a line as an entry.

    Raises:
        ValueError: They are none.
    """
    attributes = fields.get("attributes") if type(fields) is dict else None
    rank = attributes.get("zenml.log.rank") if type(attributes) is dict else None
    entry: LogEntry
    if type(rank) is int:
        entry = RankedEntry.model_validate({**fields, "rank": rank})
    else:
        entry = LogEntry.model_validate(fields)
    return entry


def is_piece(text: bytes) -> bool:
    """Return whether a line that is no entry is the beginning of a line that our exporter writes.

    Such a line is torn: its process was killed while writing it, or the disk was full. Its event is written again, so
    the torn line is not shown. A line with an error before its end is damaged, and is shown.
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
    """Return the time, in microseconds since the epoch, and the level of a line that any program may have written."""
    try:
        entry: LogEntry | None = LogEntry.model_validate(fields)
    except ValueError:
        entry = plain_entry(text)
    timestamp = to_utc(entry.timestamp) if entry else None
    return to_micros(timestamp) if timestamp else None, entry.level.value if entry and entry.level else 0


def plain_entry(text: bytes) -> LogEntry | None:
    """Return the entry that ZenML makes of a line of plain text; None if the line is empty."""
    line = text.decode("utf-8", "replace")
    try:
        return parse_log_entry(line)
    except ValueError:
        # The line begins like a line of ZenML's old format, but its time is invalid.
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
    """Return the identity of a line's event; None if another program wrote the line."""
    return Event.of(fields.get("writer"), fields.get("sequence")) if isinstance(fields, dict) else None
