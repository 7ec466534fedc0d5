"""Log records as a backend returns them, and what ZenML shows of them."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta, timezone
from functools import lru_cache
from hashlib import blake2b
from typing import Any, NamedTuple
from uuid import NAMESPACE_URL, UUID, uuid5

from zenml.enums import LoggingLevels

from composite_logstore.backend import Event, ReadEntry
from composite_logstore.event import (
    HIGHEST,
    LEVEL,
    PROGRESS_BAR,
    ExceptionInfo,
    LogEvent,
    Stream,
    TraceContext,
    shown_fields,
)
from composite_logstore.zenml import LogEntry

WRITER = "zenml.log.writer"
SEQUENCE = "zenml.log.sequence"
UID = "log.record.uid"
STREAM = "zenml.log.id"

_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
_INT64 = 1 << 63
_LONGEST_NUMBER = 40

_LEVELS = {
    "TRACE": 10,
    "DEBUG": 10,
    "INFO": 20,
    "NOTICE": 20,
    "WARN": 30,
    "WARNING": 30,
    "ERROR": 40,
    "FATAL": 50,
    "CRITICAL": 50,
}
_SHOWN = {level: LoggingLevels(level) for level in range(0, 60, 10)}
_NAMES = {"WARN": "WARNING", "FATAL": "CRITICAL"}
# The attributes that a `LogEvent` has as fields, or that its exporter adds again.
_OWN = frozenset(
    {
        WRITER,
        SEQUENCE,
        UID,
        STREAM,
        PROGRESS_BAR,
        LEVEL,
        "code.file.path",
        "code.line.number",
        "code.function.name",
        "exception.type",
        "exception.message",
        "exception.stacktrace",
    }
)


class RankedEntry(LogEntry):
    """An entry of one of the processes of a distributed training. ZenML's own entries have no place for a rank.

    Attributes:
        rank: The rank of the process.
    """

    rank: int


class Position(NamedTuple):
    """Where a record lies among all records of its stream.

    Attributes:
        nanos: Its time, in nanoseconds since the epoch.
        writer: Its attribute `zenml.log.writer`, empty if it has none.
        sequence: Its attribute `zenml.log.sequence`, 0 if it has none.
        tie: 0 for an event; for a record of another program a hash of its content, since those have no numbers.
    """

    nanos: int
    writer: str
    sequence: int
    tie: int = 0


class Record(NamedTuple):
    """A log record of OpenTelemetry's, as a backend returned it.

    Attributes:
        nanos: Its time, in nanoseconds since the epoch.
        body: Its text.
        severity_number: OpenTelemetry's number of the severity, 0 if there is none.
        severity_text: OpenTelemetry's name of the severity, empty if there is none.
        scope: The name of its scope, which is the logger's.
        attributes: Its attributes under OpenTelemetry's names, with dots. Numbers may be texts.
        trace_id: The trace as hexadecimal digits, empty if there is none.
        span_id: The span as hexadecimal digits, empty if there is none.
        flags: The trace's flags.
    """

    nanos: int
    body: str
    severity_number: int
    severity_text: str
    scope: str
    attributes: Mapping[str, Any]
    trace_id: str = ""
    span_id: str = ""
    flags: int = 0


def whole_number(value: Any) -> int | None:
    """Return a number or a text as an integer of 64 bits; None if it is none."""
    if type(value) is not int:
        try:
            if isinstance(value, str) and len(value) > _LONGEST_NUMBER:
                return None
            number = int(value) if isinstance(value, str | int | float) else None
        except (ValueError, OverflowError):
            return None
        if number is None or (isinstance(value, float) and number != value):
            return None
        value = number
    return value if -_INT64 <= value < _INT64 else None


def event_of(record: Record) -> Event | None:
    """Return the identity of a record, None if another program wrote it."""
    attributes = record.attributes
    return Event.of(attributes.get(WRITER), whole_number(attributes.get(SEQUENCE)))


def position_of(record: Record, event: Event | None) -> Position:
    """Return where a record lies."""
    if event is not None:
        return Position(record.nanos, event.writer, event.sequence)
    attributes = record.attributes
    writer, sequence = attributes.get(WRITER), whole_number(attributes.get(SEQUENCE))
    return Position(
        record.nanos, writer if isinstance(writer, str) else "", max(0, sequence or 0), _hash(record) >> 1 or 1
    )


def _hash(record: Record) -> int:
    return int.from_bytes(blake2b(_content(record), digest_size=8).digest(), "big")


def _content(record: Record) -> bytes:
    own = [record.nanos, record.body, record.severity_number, record.scope]
    try:
        text = repr([*own, sorted(record.attributes.items(), key=str)])
    except RecursionError:
        # JSON may be nested more deeply than Python's own functions can follow.
        text = repr([*own, sorted(record.attributes)])
    return text.encode("utf-8", "replace")


def level_of(record: Record) -> int:
    """Return the level of a record, as Python's number: by its severity's number, or else by its name."""
    number = record.severity_number
    if number > 0:
        tens, ones = divmod(min(number, 24) - 1, 4)
        return 10 * tens + ones
    level = whole_number(record.attributes.get(LEVEL))
    if level is not None and level < 10:
        return level
    if record.severity_text:
        return _LEVELS.get(record.severity_text.upper(), 0)
    # An event has a name. So this is another program's record, without a severity.
    return 20


def _level(record: Record) -> LoggingLevels:
    level = max(0, min(level_of(record) // 10 * 10, 50))
    if level == 0 and record.severity_number:
        # OpenTelemetry's TRACE.
        level = 10
    return _SHOWN[level]


def _text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    try:
        return str(value)
    except RecursionError:
        return "nested too deeply"


def exception_of(attributes: Mapping[str, Any]) -> ExceptionInfo | None:
    """Return a record's exception, None if it has none."""
    kind = attributes.get("exception.type")
    reason = attributes.get("exception.message")
    stacktrace = attributes.get("exception.stacktrace")
    if kind is None and reason is None and stacktrace is None:
        return None
    name = _text(kind)
    return ExceptionInfo("Exception" if name is None else name, _text(reason) or "", _text(stacktrace) or "")


def text_of(record: Record) -> str:
    """Return a record's text followed by its exception, as ZenML's log stores show it."""
    error = exception_of(record.attributes)
    if error is None:
        return record.body
    return f"{record.body}\n{error.type}: {error.message}\n{error.stacktrace}".rstrip()


def moment_of(nanos: int) -> datetime | None:
    """Return a time that is given in nanoseconds since the epoch; None if it is beyond all dates."""
    try:
        return _EPOCH + timedelta(microseconds=nanos // 1000)
    except OverflowError:
        return None


def entry_of(record: Record, event: Event | None) -> ReadEntry:
    """Return a record as an entry, whichever program wrote it."""
    attributes = record.attributes
    filename = _text(attributes.get("code.file.path")) or None
    module = _text(attributes.get("code.function.name"))
    if module is None and filename is not None:
        module = filename.rsplit("/", 1)[-1].removesuffix(".py")
    fields: dict[str, Any] = {}
    kind: type[LogEntry] = LogEntry
    if (given := attributes.get("zenml.log.rank")) is not None and (rank := whole_number(given)) is not None:
        kind, fields = RankedEntry, {"rank": rank}
    entry = kind(
        id=_id(record),
        message=text_of(record),
        name=record.scope or None,
        level=_level(record),
        timestamp=moment_of(record.nanos),
        filename=filename,
        lineno=whole_number(attributes.get("code.line.number")),
        module=module,
        **fields,
    )
    return ReadEntry(entry, event)


def _id(record: Record) -> UUID:
    try:
        return UUID(record.attributes[UID])
    except (KeyError, ValueError, TypeError, AttributeError):
        return uuid5(NAMESPACE_URL, _content(record).hex())


def as_event(record: Record, identity: Event, stream: Stream) -> LogEvent:
    """Return a record that this package wrote as an event, as far as the backend has kept its fields."""
    attributes = record.attributes
    level = level_of(record)
    file = _text(attributes.get("code.file.path")) or ""
    line = whole_number(attributes.get("code.line.number")) or 0
    name = record.severity_text
    uid: Any = attributes.get(UID)
    known = _known(frozenset(stream.metadata))
    try:
        number = int(uid[19:].replace("-", ""), 16) & HIGHEST
    except (ValueError, TypeError, AttributeError, LookupError):
        number = identity.sequence
    event = LogEvent(
        stream,
        identity.writer,
        number,
        identity.sequence,
        record.nanos,
        level,
        _NAMES.get(name, name) or f"Level {level}",
        record.body,
        record.scope,
        file,
        line if file and line > 0 else 0,
        _text(attributes.get("code.function.name")) or "",
        exception_of(attributes),
        _trace(record),
        {name: value for name, value in attributes.items() if name not in known},
        {},
        whole_number(attributes.get(PROGRESS_BAR))
        or (record.scope in ("stdout", "stderr") and not file and LogEvent.is_update(record.body)),
    )
    return event if event.uid == uid else event._replace(number=identity.sequence)


def shown_of(record: Record, identity: Event) -> tuple[Any, ...]:
    """Return the `shown_fields` of the event that `as_event` returns."""
    attributes = record.attributes
    file = _text(attributes.get("code.file.path")) or ""
    line = max(0, whole_number(attributes.get("code.line.number")) or 0)
    return shown_fields(identity.sequence, text_of(record), level_of(record), record.scope, record.nanos, file, line)


@lru_cache(maxsize=100)
def _known(metadata: frozenset[str]) -> frozenset[str]:
    """Return the names that are no attributes of an event's own."""
    return _OWN | metadata


def _trace(record: Record) -> TraceContext | None:
    if not record.trace_id:
        return None
    try:
        trace_id, span_id = int(record.trace_id or "0", 16), int(record.span_id or "0", 16)
    except ValueError:
        return None
    if not (0 < trace_id < 1 << 128 and 0 <= span_id < 1 << 64):
        return None
    return TraceContext(trace_id, span_id, record.flags & 0xFF)
