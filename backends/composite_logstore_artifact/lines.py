"""The lines of an archive as entries, and which of them a filter wants."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime, timedelta, timezone
from itertools import repeat
from operator import attrgetter
from typing import Any, NamedTuple, overload

import orjson
from zenml.enums import LoggingLevels
from zenml.log_stores.artifact.artifact_log_store import parse_log_entry
from zenml.models import LogEntry, LogsEntriesFilter
from zenml.utils.time_utils import to_utc_timezone

from composite_logstore import BACKFILLED, Event, ExceptionInfo, LogEvent, ReadEntry, Scanned, Stream, TraceContext

SCAN_FORMAT = "archive"
"""What an archive's lines are called where they are compared and copied as they are."""

STANDARD_LEVELS = {0: "NOTSET", 10: "DEBUG", 20: "INFO", 30: "WARNING", 40: "ERROR", 50: "CRITICAL"}
"""The numbers of the standard levels, and their names."""

_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
# What each line begins with that our exporter writes.
_BEGINNING = b'{"timestamp":'
# Later than any time that can be asked for, and no more than 64 bits.
_ETERNITY = 1 << 62
# What JSON may write in another way than as itself, so that a line that has it need not show it.
_ESCAPED = re.compile(r'[\x00-\x1f"\\/]')
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
# An escape that may stand for any character. Those of control characters stand for nothing that is looked for.
_ODD_ESCAPE = re.compile(rb"\\u(?!00[01])")


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
        if type(fields) is dict and _is_surely_entry(fields):
            # As texts, too, they are in the order of time.
            timestamps.append(fields["timestamp"])
            levels.append(fields["level"])
        else:
            summarized.append(_time_and_level(text, fields))
    if timestamps:
        ends = map(datetime.fromisoformat, (min(timestamps), max(timestamps)))
        summarized += [(_micros(time), max(levels)) for time in ends]
    return Summary.of(summarized)


class Wanted:
    """What a filter wants."""

    def __init__(self, filter_: LogsEntriesFilter) -> None:
        """Prepare to look for it."""
        self._search = filter_.search.casefold() if filter_.search else None
        self._level = filter_.level.value if filter_.level else 0
        self._since = filter_.since
        self._until = filter_.until
        self._since_micros = _micros(filter_.since) if filter_.since else None
        self._until_micros = _micros(filter_.until) if filter_.until else None
        # Of what is searched for, the longest piece that is in every line that has it, whatever JSON escapes.
        self._piece = max(_ESCAPED.split(self._search or ""), key=len)
        self._piece_bytes = self._piece.encode("utf-8", "replace")

    @property
    def is_all(self) -> bool:
        """Whether everything is wanted."""
        return self._search is None and not self.is_summarized

    @property
    def is_summarized(self) -> bool:
        """Whether a summary may tell that nothing is wanted."""
        return bool(self._level) or self._since is not None or self._until is not None

    def may_be_in(self, summary: Summary) -> bool:
        """Return whether it may be among the lines that were summarized."""
        return (
            summary.level >= self._level
            and (self._since_micros is None or summary.newest >= self._since_micros)
            and (self._until_micros is None or summary.oldest <= self._until_micros)
            and (summary.oldest <= summary.newest or (self._since is None and self._until is None))
        )

    def find(self, content: bytes, backwards: bool) -> Iterator[tuple[int, int]]:
        """Yield where the lines begin and end that may be wanted, without their newlines."""
        if self._piece and not self._may_be_in(content):
            return
        end = len(content)
        if backwards:
            if content.endswith(b"\n"):
                end -= 1
            while end >= 0:
                begin = content.rfind(b"\n", 0, end) + 1
                if not self._piece or self._may_be_in(content[begin:end]):
                    yield begin, end
                end = begin - 1
            return
        begin = 0
        while begin < end:
            newline = content.find(b"\n", begin)
            last = end if newline < 0 else newline
            if not self._piece or self._may_be_in(content[begin:last]):
                yield begin, last
            begin = last + 1

    def _may_be_in(self, content: bytes) -> bool:
        """Judge bytes by what is searched for, at the speed of a search in bytes."""
        if content.isascii():
            found = self._piece_bytes in content.lower()
        else:
            found = self._piece in content.decode("utf-8", "replace").casefold()
        return found or _ODD_ESCAPE.search(content) is not None

    def parse(self, text: bytes) -> ReadEntry | None:
        """Return the line as an entry, None if it is empty or not wanted.

        A line that is not an entry is one all the same, of plain text, as ZenML has it, but for a piece of one.
        """
        event: Event | None = None
        try:
            fields = orjson.loads(text)
            event = _event(fields)
            if event is not None and self._is_surely_unwanted(fields):
                return None
            if event is not None and type(attributes := fields.get("attributes")) is dict and BACKFILLED in attributes:
                # It lies after later ones of its writer: its number says nothing of what is missing around it.
                event = None
            entry: LogEntry | None = LogEntry.model_validate(fields)
        except ValueError:
            if _is_piece(text):
                return None
            event = None
            entry = _plain(text)
        if entry is None or not self._wants(entry):
            return None
        return ReadEntry(entry, event)

    def _is_surely_unwanted(self, fields: dict[str, Any]) -> bool:
        """Judge an event's line before it is validated, which takes four times as long as the rest."""
        if self.is_all or not _is_surely_entry(fields):
            return False
        if fields["level"] < self._level or (self._search and self._search not in fields["message"].casefold()):
            return True
        if self._since is None and self._until is None:
            return False
        timestamp = datetime.fromisoformat(fields["timestamp"])
        return (self._since is not None and timestamp < self._since) or (
            self._until is not None and timestamp > self._until
        )

    def _wants(self, entry: LogEntry) -> bool:
        if self._level and (entry.level is None or entry.level.value < self._level):
            return False
        if self._search is not None and self._search not in entry.message.casefold():
            return False
        if self._since is None and self._until is None:
            return True
        timestamp = _utc(entry.timestamp)
        if timestamp is None:
            return False
        return (self._since is None or self._since <= timestamp) and (self._until is None or timestamp <= self._until)


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


class _Times(Sequence[int]):
    """The times of lines, in nanoseconds since the epoch: looked for when they are asked for, and few are."""

    def __init__(self, lines: Sequence[bytes]) -> None:
        self._lines = lines

    def __len__(self) -> int:
        return len(self._lines)

    @overload
    def __getitem__(self, place: int) -> int: ...

    @overload
    def __getitem__(self, place: slice) -> Sequence[int]: ...

    def __getitem__(self, place: int | slice) -> int | Sequence[int]:
        if isinstance(place, slice):
            return _Times(self._lines[place])
        line = self._lines[place]
        # That is how most of ours end.
        begin = line.rfind(b'"time_unix_nano":')
        digits = line[begin + 17 : -1] if begin > 0 else b""
        if digits.isdigit() and len(digits) < 20:
            return int(digits)
        row = _identity(line)
        return row[2] if row else 0


def scan(content: bytes, arrived: int | None) -> Iterator[Scanned]:
    """Yield what lines say of which event each is, and no more: most are not parsed.

    A writer's lines mostly follow each other, so it is known how the next one ends if it is one of them. An attribute
    cannot pass for that, since it stands in braces of its own, nor a text: in it, quotation marks are escaped.

    Args:
        content: Whole lines.
        arrived: When they were written, in nanoseconds since the epoch, if that is known.
    """
    lines = content.split(b"\n")
    begin, writer, sequence, expected = 0, "", 0, b""

    def until(end: int) -> Iterator[Scanned]:
        if begin < end:
            run = lines[begin:end]
            sequences = range(sequence - len(run), sequence) if writer else ()
            yield Scanned(writer, sequences, _Times(run), run, arrived, None)

    for place, line in enumerate(lines):
        # A line that was torn off does not end like this.
        if expected and line.startswith(expected % sequence, line.rfind(b'"writer":"')) and line.endswith(b"}"):
            sequence += 1
            continue
        row = _identity(line)
        if row is not None and begin < place and (row[0] == writer) and (not writer or row[1] == sequence):
            sequence += 1
            continue
        yield from until(place)
        begin = place
        if row is None:
            begin, expected = place + 1, b""
            continue
        writer, sequence = row[0], row[1] + 1
        # What a format would make something else of has to be written twice.
        expected = (
            b'"writer":%b,"sequence":%%d,"number":' % orjson.dumps(writer).replace(b"%", b"%%") if writer else b""
        )
    yield from until(len(lines))


def _identity(text: bytes) -> tuple[str, int, int] | None:
    """Return a line's writer (empty if another program wrote it), sequence and time; None if it is no entry."""
    if not text:
        return None
    try:
        fields = orjson.loads(text)
    except ValueError:
        fields = None
    event, entry = _event(fields), None
    if event is not None and type(fields.get("time_unix_nano")) is int:
        return event.writer, event.sequence, fields["time_unix_nano"]
    if (entry := entry_of(text)) is None:
        return None
    timestamp = _utc(entry.timestamp)
    micros = _micros(timestamp) if timestamp else 0
    return (event.writer, event.sequence, micros * 1000) if event else ("", 0, micros * 1000)


def event_of(text: bytes, stream: Stream) -> LogEvent | None:
    """Return the event that a line was made of, None if another program wrote it.

    A line that says which event it is, and of the rest what makes no sense, is an event with the line as its message.
    """
    try:
        fields = orjson.loads(text)
    except ValueError:
        return None
    event = _event(fields)
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
    if _is_surely_entry(fields):
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


def _is_surely_entry(fields: dict[str, Any]) -> bool:
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
        return None if _is_piece(text) else _plain(text)
    return entry


def _is_piece(text: bytes) -> bool:
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
        entry = _plain(text)
    timestamp = _utc(entry.timestamp) if entry else None
    return _micros(timestamp) if timestamp else None, entry.level.value if entry and entry.level else 0


def _plain(text: bytes) -> LogEntry | None:
    """Return the entry that ZenML makes of a line of plain text, None if it is empty."""
    line = text.decode("utf-8", "replace")
    try:
        return parse_log_entry(line)
    except ValueError:
        # It begins like a line of ZenML's old format, but with a time that is none.
        return LogEntry(message=line.strip(), level=LoggingLevels.INFO)


def _utc(timestamp: datetime | None) -> datetime | None:
    try:
        return to_utc_timezone(timestamp) if timestamp else None
    except OverflowError:
        return None


def _micros(time: datetime) -> int:
    return (time - _EPOCH) // timedelta(microseconds=1)


def _event(fields: Any) -> Event | None:
    """Return which event the line is, None if another program wrote it."""
    return Event.of(fields.get("writer"), fields.get("sequence")) if isinstance(fields, dict) else None
