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
    return Summary.of(_time_and_level(text) for text in lines)


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
            if event is not None and BACKFILLED in (fields.get("attributes") or ()):
                # Later ones of its writer came before it: by its number alone it would pass for a copy.
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
        level, message, time_unix_nano = fields.get("level"), fields.get("message"), fields.get("time_unix_nano")
        if self.is_all or type(level) is not int or type(message) is not str or type(time_unix_nano) is not int:
            return False
        return (
            level < self._level
            or (self._since_micros is not None and time_unix_nano // 1000 < self._since_micros)
            or (self._until_micros is not None and time_unix_nano // 1000 > self._until_micros)
            or (self._search is not None and self._search not in message.casefold())
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
        digits = line[line.rfind(b'"time_unix_nano":') + 17 : -1]
        if digits.isdigit():
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
    """Return the event that a line was made of, None if another program wrote it."""
    try:
        fields = orjson.loads(text)
        event = _event(fields)
        if event is None:
            return None
        return _decode(fields, event, stream)
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def _decode(fields: dict[str, Any], event: Event, stream: Stream) -> LogEvent:
    level: int = fields["level"]
    message: str = fields["message"]
    exception = trace = None
    if raw := fields.get("exception"):
        exception = ExceptionInfo(raw["type"], raw["message"], raw["stacktrace"])
        message = message.removesuffix(f"\n{exception.type}: {exception.message}\n{exception.stacktrace}".rstrip())
    if "trace_id" in fields:
        trace = TraceContext(int(fields["trace_id"], 16), int(fields["span_id"], 16), fields["flags"])
    name = fields["name"]
    return LogEvent(
        stream,
        event.writer,
        fields["number"],
        event.sequence,
        fields["time_unix_nano"],
        fields.get("level_number", level),
        fields.get("level_name") or STANDARD_LEVELS[level],
        message,
        name,
        fields.get("filename", ""),
        fields.get("lineno", 0),
        fields.get("module", ""),
        exception,
        trace,
        fields.get("attributes", _NO_ATTRIBUTES),
        _NO_ATTRIBUTES,
        name in ("stdout", "stderr") and "\r" in message and "filename" not in fields,
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

    Its process was killed in the middle of writing it, or found the disk full. The event is written again.
    """
    return text.startswith(_BEGINNING) or (len(text) > 1 and _BEGINNING.startswith(text))


def _time_and_level(text: bytes) -> tuple[int | None, int]:
    try:
        fields = orjson.loads(text)
        level, time_unix_nano = fields.get("level"), fields.get("time_unix_nano")
        if type(level) is int and type(time_unix_nano) is int and _event(fields) is not None:
            return time_unix_nano // 1000, level
        entry: LogEntry | None = LogEntry.model_validate(fields)
    except (ValueError, AttributeError):
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
    if not isinstance(fields, dict):
        return None
    writer, sequence = fields.get("writer"), fields.get("sequence")
    return Event(writer, sequence) if type(writer) is str and type(sequence) is int else None
