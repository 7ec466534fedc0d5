"""From a log record to an event: `note` in the thread that logs, `numbered` when the journal numbers it."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, SupportsFloat, TypeAlias
from uuid import UUID

from opentelemetry.context import get_current
from opentelemetry.trace import get_current_span

from composite_logstore.capture.levels import level_of_stderr
from composite_logstore.capture.process import attributes
from composite_logstore.event import PROGRESS_BAR, ExceptionInfo, LogEvent, Stream, TraceContext
from composite_logstore.plain import (
    HIGHEST_LEVEL,
    LOWEST_LEVEL,
    MOST_BYTES,
    MOST_NAME_BYTES,
    Plain,
    plain_exception,
    shorten,
    sized_mapping,
    text_of,
    whole,
)

PRINTED = ("stdout", "stderr")
"""The names of the loggers of printed text: ZenML makes a record of each `write` to one of these streams."""

_LAST_LINE = (1 << 31) - 1
# A text of fewer characters cannot have too many bytes.
_LONG = MOST_BYTES // 4
# In seconds since the epoch: the most that 64 bits can hold in nanoseconds. A larger time is not in seconds.
_LATEST = (1 << 63) // 1_000_000_000
_UNREADABLE = "<a record that cannot be read>"
_NOTHING: Mapping[str, Plain] = {}

# The attributes of every `logging.LogRecord`; all others were given to it as `extra`.
# https://docs.python.org/3/library/logging.html#logrecord-attributes
_RECORD_ATTRIBUTES = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_RECORD_LENGTH = len(vars(logging.makeLogRecord({})))

_MESSAGE = 3

# A named tuple's own constructor calls this, and takes twice the time.
_tuple: Any = tuple.__new__

Note: TypeAlias = tuple[Any, ...]
"""What `emit` notes of a log record: every value that may change later, unchecked. `numbered` checks them.

The last item is roughly how many bytes the note takes. The one before is the number of the progress bar that printed
text updates, False if it updates none, None if the text is as it was printed."""

LOGGER_NAME = 4
"""Where a note has the name of its record's logger."""

NOWHERE = Stream(UUID(int=0), {})
"""The stream of an event that has no numbers yet."""


def note(record: logging.LogRecord, metadata: Mapping[str, Any] | None = None) -> Note:
    """Note a record's values, as of now, in objects that do not change later.

    The pipeline waits for this function, so all work that can wait is left to `numbered`. It never raises, whatever
    the record contains.

    Args:
        record: The record.
        metadata: The attributes that ZenML gives to `emit` with the record.
    """
    try:
        fields = record.__dict__
        # `extra` makes the dictionary longer. So do formatters, which add a message and a time.
        has_extra = (
            len(fields) != _RECORD_LENGTH
            and len(fields) - ("message" in fields) - ("asctime" in fields) != _RECORD_LENGTH
        )
        exc_info = record.exc_info
        if has_extra and _is_structlogs(fields):
            said = fields["msg"]
            message, exc_info = text_of(said["event"]), exc_info or said.get("exc_info")
        else:
            try:
                message = record.getMessage()
            except Exception:
                message = _unformatted(record)
        exception = None
        extra = given = _NOTHING
        size = len(message) if message.isascii() else sys.getsizeof(message)
        if has_extra:
            extra, characters = sized_mapping(_extra(fields))
            size += characters
        if metadata:
            given, characters = sized_mapping(metadata)
            size += characters
        if exc_info:
            exception = _exception(exc_info)
            size += sum(map(len, exception)) if exception else 0
        # From the dictionary, which takes half as long as seven attributes. One that a subclass computes is not in it,
        # and `_noted_with_care` reads it.
        return (
            fields["created"],
            fields["levelno"],
            fields["levelname"],
            message,
            fields["name"],
            fields["pathname"],
            fields["lineno"],
            fields["funcName"],
            exception,
            # Without a current span the context is nearly always empty, and that is quicker to see.
            _trace() if get_current() else None,
            extra,
            given,
            None,
            size,
        )
    except Exception:
        return _noted_with_care(record, metadata)


def _noted_with_care(record: logging.LogRecord, metadata: Any) -> Note:
    """Note those parts of a record that can be read. Some part raises."""

    def part(read: Callable[[], Any], otherwise: Any = None) -> Any:
        try:
            return read()
        except Exception:
            return otherwise

    names = ("created", "levelno", "levelname", "name", "pathname", "lineno", "funcName")
    created, level, level_name, *rest = [part(lambda name=name: getattr(record, name)) for name in names]  # type: ignore[misc]
    message = part(lambda: record.getMessage())
    if message is None:
        message = part(lambda: _unformatted(record), part(lambda: text_of(record.msg), _UNREADABLE))
    message = text_of(message)
    # `exc_info=True` would mean the exception that is being handled here.
    exception = part(
        lambda: _exception(record.exc_info) if isinstance(record.exc_info, tuple | BaseException) else None
    )
    extra, extra_size = sized_mapping(part(lambda: _extra(vars(record)), {"…": _UNREADABLE}))
    given, given_size = sized_mapping(metadata)
    size = sys.getsizeof(message) + sum(map(len, exception or ())) + extra_size + given_size
    return (created, level, level_name, message, *rest, exception, part(_trace), extra, given, None, size)


def text_in(said: Note) -> str:
    """Return the text of a note, as its record has it."""
    text = said[_MESSAGE]
    return text if type(text) is str else text_of(text)


def line_of(said: Note, text: str, bar: int) -> Note:
    """Return the note of a line of printed text.

    Args:
        said: The note of its first part.
        text: The line.
        bar: The number of the progress bar that it updates, 0 if it updates none.
    """
    bar = bar or False
    size = said[-1] - len(text_in(said)) + (len(text) if text.isascii() else sys.getsizeof(text))
    return (*said[:_MESSAGE], text, *said[_MESSAGE + 1 : -2], bar, size)


def _unformatted(record: logging.LogRecord) -> str:
    """Return format and arguments of a record whose arguments do not match its format."""
    return f"{text_of(record.msg)} {text_of(record.args)}"


def numbered(said: Note | LogEvent, stream: Stream, writer: str, number: int, sequence: int) -> LogEvent:
    """Return a record as an event with numbers, and with values that every backend can encode. Never raises.

    Args:
        said: The record's note, or the event that another process has captured.
        stream: The stream that it belongs to.
        writer: The writer that numbers it.
        number: Its number in the writer's journal.
        sequence: Its number in the stream.
    """
    event: LogEvent
    if isinstance(said, LogEvent):
        event = _tuple(LogEvent, (stream, writer, number, sequence, *said[4:]))
        return event
    created, level, level_name, message, name, file, line, function, exception, trace, extra, metadata, bar, _ = said
    try:
        try:
            place = _places[level, level_name, name, file, line, function]
        except Exception:
            place = _place(level, level_name, name, file, line, function)
        level, level_name, name, file, line, function, is_printed = place
        if type(created) is float and 0.0 <= created < _LATEST:
            # A float holds a present time to a fraction of a microsecond: further digits are noise.
            time_unix_nano = round(created * 1e6) * 1000
        else:
            time_unix_nano = _time(created)
        if type(message) is not str or not message.isascii():
            message = text_of(message)
        if len(message) > _LONG:
            message = shorten(message, MOST_BYTES)
        if trace is not None:
            trace = _checked(trace)
    except BaseException as error:
        if not isinstance(error, Exception) and threading.current_thread() is threading.main_thread():
            # A Ctrl-C, or an exception of a signal handler.
            raise
        # Some value raises. This record must not block the ones behind it.
        place = _place(None, None, None, None, None, None)
        level, level_name, name, file, line, function, is_printed = place
        time_unix_nano, message, trace = time.time_ns(), _UNREADABLE, None
    progress: bool | int = False
    if is_printed:
        # Another log store that forwards an update says so in the metadata.
        progress = bar if bar is not None else _bar_in(metadata) or LogEvent.is_update(message)
        # The end of the line is not part of the message.
        message = message.rstrip("\r\n")
        # ZenML gives all of stderr this level; a record with another one was forwarded by a log store that has decided.
        if name == "stderr" and level == logging.ERROR:
            level, level_name = level_of_stderr(message, stream.stderr_level)
    event = _tuple(
        LogEvent,
        (
            stream,
            writer,
            number,
            sequence,
            time_unix_nano,
            level,
            level_name,
            message,
            name,
            file,
            line,
            function,
            exception,
            trace,
            extra,
            metadata,
            progress,
        ),
    )
    return event


def _bar_in(metadata: Mapping[str, Plain]) -> int:
    bar = metadata.get(PROGRESS_BAR)
    return bar if isinstance(bar, int) and bar > 1 else 0


def captured(said: Note | LogEvent, stream: Stream = NOWHERE) -> LogEvent:
    """Return a record of a stream as an event without numbers, which can be sent to another process. Never raises."""
    return said if isinstance(said, LogEvent) else numbered(said, stream, "", 0, 0)


def of_this_process(said: Note | LogEvent) -> LogEvent:
    """Return a record as `captured` does, with the attributes of the process that logs it. Never raises."""
    event = captured(said)
    return event._replace(metadata={**attributes(), **event.metadata})


_Place: TypeAlias = tuple[int, str, str, str, int, str, bool]
_places: dict[Any, _Place] = {}
_MOST_PLACES = 10_000


def _place(level: Any, level_name: Any, logger_name: Any, file: Any, line: Any, function: Any) -> _Place:
    """Return where a record comes from, checked, and remember it: most records of a program come from few places."""
    key = (level, level_name, logger_name, file, line, function)
    name, path = _name(logger_name), _name(file)
    place = (
        whole(level, LOWEST_LEVEL, HIGHEST_LEVEL),
        _name(level_name),
        name,
        path,
        whole(line, 0, _LAST_LINE),
        _name(function),
        name in PRINTED and not path,
    )
    # Only plain values become keys: others would be kept alive, and their own `__eq__` would run.
    if all(plain is given or given is None for plain, given in zip(place, key, strict=False)):
        if len(_places) >= _MOST_PLACES:
            _places.clear()
        _places[key] = place
    return place


def _name(value: Any) -> str:
    return "" if value is None else shorten(text_of(value), MOST_NAME_BYTES)


def _time(created: Any) -> int:
    """Return a record's time in nanoseconds since the epoch: the current time unless it is a number of seconds."""
    try:
        if isinstance(created, SupportsFloat) and not isinstance(created, bool):
            seconds = float(created)
            if 0 <= seconds < _LATEST:
                return round(seconds * 1e6) * 1000
    except Exception:
        pass
    return time.time_ns()


def _trace() -> TraceContext | None:
    """Return the ids of the current span as its author gives them. `numbered` checks them."""
    try:
        context = get_current_span().get_span_context()
        return TraceContext(context.trace_id, context.span_id, context.trace_flags) if context.is_valid else None
    except Exception:
        return None


def _checked(trace: TraceContext) -> TraceContext | None:
    """Return the span's context if W3C's Trace Context allows it, otherwise None.

    https://www.w3.org/TR/trace-context/#traceparent-header-field-values
    """
    trace_id, span_id = whole(trace.trace_id, 0, 1 << 128), whole(trace.span_id, 0, 1 << 64)
    if not 0 < trace_id < 1 << 128 or not 0 < span_id < 1 << 64:
        return None
    return TraceContext(trace_id, span_id, whole(trace.flags, 0, 0xFF))


def _extra(fields: dict[str, Any]) -> dict[str, Any]:
    extra = {key: fields[key] for key in fields.keys() - _RECORD_ATTRIBUTES}
    if _is_structlogs(fields):
        extra |= fields["msg"]
        extra = {key: extra[key] for key in extra.keys() - _STRUCTLOGS}
    return extra


# What structlog adds to a record for its formatter, and the parts of its event dictionary that are not attributes.
_STRUCTLOGS = {"_logger", "_name", "_record", "_from_structlog", "event", "exc_info"}


def _is_structlogs(fields: dict[str, Any]) -> bool:
    """Return whether a record's message is an event dictionary of structlog, prepared for its `ProcessorFormatter`.

    https://www.structlog.org/en/stable/standard-library.html#rendering-using-structlog-based-formatters-within-logging
    """
    return "_logger" in fields and isinstance(fields["msg"], dict) and "event" in fields["msg"]


def _exception(exc_info: Any) -> ExceptionInfo | None:
    if isinstance(exc_info, ExceptionInfo):
        # Another process has captured it.
        return ExceptionInfo(*(shorten(text_of(part), MOST_BYTES) for part in exc_info))
    parts = plain_exception(exc_info)
    return parts and ExceptionInfo(*parts)
