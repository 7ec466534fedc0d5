"""What is captured: a log record, once, as an immutable `LogEvent` of its `Stream`."""

from __future__ import annotations

import hashlib
import logging
import re
import reprlib
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from itertools import chain, islice, repeat
from operator import index, itemgetter
from typing import Any, NamedTuple, SupportsFloat, TypeAlias
from uuid import UUID

from opentelemetry.context import get_current
from opentelemetry.trace import get_current_span

from composite_logstore.backend import shorten

Plain: TypeAlias = "bool | int | float | str | list[Plain] | dict[str, Plain] | None"
"""A value that every backend can encode."""

MOST_BYTES = 16 * 1024 * 1024
"""The most bytes of each text of an event, and of its attributes together; longer ones say how much they lack."""

MOST_NAME_BYTES = 4096
"""The most bytes of what names a record's place: its level, logger, file and function."""

_INT64 = 1 << 63
_INT32 = 1 << 31
_DEEPEST = 8
_MOST_VALUES = 10_000
# What an attribute counts besides its text, and a value within one, so that there is a bound for their number too.
_VALUE_BYTES = 64
_ITEM_BYTES = 8
EVENT_BYTES = 512
"""Roughly how many bytes an event takes besides its texts and attributes."""
# What `getsizeof` counts for any text.
_TEXT_BYTES = sys.getsizeof("")
# A text of fewer characters cannot have too many bytes.
_LONG = MOST_BYTES // 4
# In seconds since the epoch: what 64 bits can hold in nanoseconds. A later time is not in seconds, or none at all.
_LATEST = (1 << 63) // 1_000_000_000
_ABBREVIATED = reprlib.Repr()
_ABBREVIATED.maxlevel = 2

# The attributes of every `logging.LogRecord`; what a record has besides was given to it as `extra`.
# https://docs.python.org/3/library/logging.html#logrecord-attributes
_RECORD_ATTRIBUTES = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_RECORD_LENGTH = len(vars(logging.makeLogRecord({})))

# What a named tuple's own constructor comes to, in half of its time.
_tuple: Any = tuple.__new__


class ExceptionInfo(NamedTuple):
    """The exception of a record, as text: a traceback object would keep its frames alive."""

    type: str
    message: str
    stacktrace: str


class TraceContext(NamedTuple):
    """The span that was current when the record was emitted."""

    trace_id: int
    span_id: int
    flags: int


class Stream:
    """One ZenML log stream, as a writer sees it.

    Attributes:
        id: The id of ZenML's `LogsResponse`.
        artifact_store_id: The artifact store of the stack that was active when the stream was
            registered, if that could be found out. ZenML itself notes it only for its own store.
        metadata: The origin's metadata. ZenML adds to it after the first records were emitted, so
            read it through `attributes`, at the latest moment.
        last: The sequence number of its last event, of those that this process has numbered.
    """

    __slots__ = ("__weakref__", "artifact_store_id", "id", "last", "metadata")

    def __init__(self, id: UUID, metadata: dict[str, Any], artifact_store_id: UUID | None = None) -> None:
        self.id = id
        self.metadata = metadata
        self.artifact_store_id = artifact_store_id
        self.last: deque[int] = deque(maxlen=1)

    @property
    def attributes(self) -> dict[str, Plain]:
        """What is true of every event of the stream, as known now."""
        return plain_mapping(self.metadata)


Note: TypeAlias = tuple[Any, ...]
"""What `emit` notes of a log record: all that may change afterwards, as it is. `numbered` makes sense of it later.

Its last item is roughly how many bytes it takes."""


class Capture(NamedTuple):
    """What a log record says, before the journal gives it its numbers."""

    time_unix_nano: int
    level: int
    level_name: str
    message: str
    logger_name: str
    file: str
    line: int
    function: str
    exception: ExceptionInfo | None
    trace: TraceContext | None
    attributes: Mapping[str, Plain]
    metadata: Mapping[str, Plain]
    progress: bool

    @property
    def size(self) -> int:
        """Roughly how many bytes it takes."""
        return _size_of(self)


class LogEvent(NamedTuple):
    """One captured log record, immutable, shared by all children.

    Attributes:
        stream: The stream it belongs to.
        writer: The writer that numbered it, 15 hexadecimal digits.
        number: Its number in the writer's journal, from 0.
        sequence: Its number within (writer, stream), from 0, without gaps.
        time_unix_nano: When the record was created, in nanoseconds since the epoch.
        level: Python's level number.
        level_name: Python's level name.
        message: The formatted message.
        logger_name: The logger; `stdout` and `stderr` for what was printed.
        file: The path of the source file, empty if unknown.
        line: The line in it, 0 if unknown.
        function: The function, empty if unknown.
        exception: The record's exception, if it has one.
        trace: The span that was current, if there was one.
        attributes: The record's extra attributes.
        metadata: What was given to `emit` beside the record.
        progress: Whether it is one of a progress bar's updates: a carriage return on stdout or stderr.
    """

    stream: Stream
    writer: str
    number: int
    sequence: int
    time_unix_nano: int
    level: int
    level_name: str
    message: str
    logger_name: str
    file: str
    line: int
    function: str
    exception: ExceptionInfo | None
    trace: TraceContext | None
    attributes: Mapping[str, Plain]
    metadata: Mapping[str, Plain]
    progress: bool

    @property
    def uid(self) -> str:
        """The event's UUID (version 8, RFC 9562): 60 bits of writer, 62 bits of number.

        It is OpenTelemetry's `log.record.uid`, the same in every child.
        """
        number = self.number
        if number < 1 << 48:
            return f"{_uid_of(self.writer)}8000-{number:012x}"
        return f"{_uid_of(self.writer)}{0x8000 | number >> 48:04x}-{number & 0xFFFFFFFFFFFF:012x}"

    @property
    def identity(self) -> dict[str, Plain]:
        """The attributes by which the event is known again, in every backend."""
        return {
            "log.record.uid": self.uid,
            "zenml.log.writer": self.writer,
            "zenml.log.sequence": self.sequence,
        }

    @property
    def details(self) -> dict[str, Plain]:
        """The event's own attributes, under OpenTelemetry's names, without the stream's and its identity.

        https://opentelemetry.io/docs/specs/semconv/attributes-registry/code/ and .../exception/
        """
        details: dict[str, Plain] = dict(self.attributes)
        if self.file:
            details["code.file.path"] = self.file
            details["code.line.number"] = self.line
        if self.function:
            details["code.function.name"] = self.function
        if self.exception:
            details["exception.type"] = self.exception.type
            details["exception.message"] = self.exception.message
            details["exception.stacktrace"] = self.exception.stacktrace
        details.update(self.metadata)
        return details

    @property
    def is_ordinary(self) -> bool:
        """Whether it has neither an exception, nor a span, nor attributes of its own: most events are like this."""
        return self.exception is None and self.trace is None and not self.attributes and not self.metadata

    @property
    def size(self) -> int:
        """Roughly how many bytes it takes, in memory as well as encoded."""
        return EVENT_BYTES + _size_of(self)

    @property
    def severity_text(self) -> str:
        """OpenTelemetry's name of the level, as ZenML's own stores write it.

        https://opentelemetry.io/docs/specs/otel/logs/data-model/#field-severitytext
        """
        return {"WARNING": "WARN", "CRITICAL": "FATAL"}.get(self.level_name, self.level_name)

    @property
    def severity_number(self) -> int:
        """OpenTelemetry's number of the level, 0 where it has none.

        Python's tens are OpenTelemetry's fours: DEBUG 10 is 5, INFO 20 is 9, CRITICAL 50 is 21. What
        lies between goes up by ones.
        https://opentelemetry.io/docs/specs/otel/logs/data-model/#field-severitynumber
        """
        if self.level < 10:
            return 0
        tens, ones = divmod(min(self.level, 53), 10)
        return 4 * tens + 1 + min(ones, 3)

    @property
    def text(self) -> str:
        """The message with its exception beneath, as ZenML's stores show it to people."""
        if self.exception is None:
            return self.message
        error = self.exception
        return f"{self.message}\n{error.type}: {error.message}\n{error.stacktrace}".rstrip()


_WRITER = re.compile(r"[0-9a-f]{15}")


@lru_cache(maxsize=1_000)
def _uid_of(writer: str) -> str:
    """Return what the UUIDs of all of a writer's events begin with, also if a backend has given it an odd name."""
    if not _WRITER.fullmatch(writer):
        writer = hashlib.sha256(writer.encode("utf-8", "replace")).hexdigest()[:15]
    return f"{writer[:8]}-{writer[8:12]}-8{writer[12:]}-"


_message_of = itemgetter(LogEvent._fields.index("message"))
_exception_of = itemgetter(LogEvent._fields.index("exception"))
_attributes_of = itemgetter(LogEvent._fields.index("attributes"))
_metadata_of = itemgetter(LogEvent._fields.index("metadata"))


def total_size(events: Sequence[LogEvent]) -> int:
    """Return the sum of the events' sizes, in a fraction of the time that adding them up takes."""
    parts = chain(map(_exception_of, events), map(_attributes_of, events), map(_metadata_of, events))
    messages = sum(map(sys.getsizeof, map(_message_of, events)))
    return (EVENT_BYTES - _TEXT_BYTES) * len(events) + messages + sum(map(_bytes_of, filter(None, parts)))


def _size_of(said: Capture | LogEvent) -> int:
    size = sys.getsizeof(said.message) - _TEXT_BYTES
    for part in (said.exception, said.attributes, said.metadata):
        if part:
            size += _bytes_of(part)
    return size


def _bytes_of(value: Any) -> int:
    """Return roughly how many bytes a value takes in memory, with all that it consists of."""
    size = 0
    # What another program has written may be nested deeper than Python can recur.
    waiting = [value]
    while waiting:
        value = waiting.pop()
        size += sys.getsizeof(value)
        if type(value) is dict:
            size += sum(map(sys.getsizeof, value))
            value = value.values()
        elif type(value) not in _NESTING:
            continue
        if _NESTING.isdisjoint(map(type, value)):
            size += sum(map(sys.getsizeof, value))
        else:
            waiting.extend(value)
    return size


_NESTING = {dict, list, ExceptionInfo}


def note(record: logging.LogRecord, metadata: Mapping[str, Any] | None = None) -> Note:
    """Take down what a record says, now, in values that nobody changes afterwards.

    The pipeline waits for this, so what can be done later is left to `numbered`. Never raises, whatever the
    record holds.

    Args:
        record: The record.
        metadata: What ZenML gives to `emit` beside the record.
    """
    try:
        fields = record.__dict__
        # Whoever adds something makes the dictionary longer. Formatters add a message and a time.
        has_extra = (
            len(fields) != _RECORD_LENGTH
            and len(fields) - ("message" in fields) - ("asctime" in fields) != _RECORD_LENGTH
        )
        try:
            message = record.getMessage()
        except Exception:
            message = _unformatted(record)
        exception = None
        extra = given = _NOTHING
        size = len(message) if message.isascii() else _bytes_of(message)
        if has_extra:
            extra, characters = _sized(_extra(fields))
            size += characters
        if metadata:
            given, characters = _sized(metadata)
            size += characters
        if record.exc_info:
            exception = _exception(record.exc_info)
            size += sum(map(len, exception)) if exception else 0
        return (
            record.created,
            record.levelno,
            record.levelname,
            message,
            record.name,
            record.pathname,
            record.lineno,
            record.funcName,
            exception,
            # Without a span the context is empty, nearly always.
            _trace() if get_current() else None,
            extra,
            given,
            size,
        )
    except Exception:
        return _noted_with_care(record, metadata)


def _noted_with_care(record: logging.LogRecord, metadata: Any) -> Note:
    """Take down a record some part of which cannot be read: what can be."""

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
    return (
        created,
        level,
        level_name,
        message,
        *rest,
        # What is being handled here is no exception of the record's.
        part(lambda: _exception(record.exc_info) if isinstance(record.exc_info, tuple | BaseException) else None),
        part(_trace),
        part(lambda: plain_mapping(_extra(vars(record))), {"…": _UNREADABLE}),
        plain_mapping(metadata),
        # It may be anything.
        MOST_BYTES,
    )


def _unformatted(record: logging.LogRecord) -> str:
    """Return the message of a record whose arguments do not match the format: better both of them than neither."""
    return f"{text_of(record.msg)} {text_of(record.args)}"


def numbered(said: Note | Capture, stream: Stream, writer: str, number: int, sequence: int) -> LogEvent:
    """Return the event that a record becomes with its numbers. Never raises.

    Args:
        said: What the record says.
        stream: The stream that it belongs to.
        writer: The writer that numbers it.
        number: Its number in the writer's journal.
        sequence: Its number in the stream.
    """
    event: LogEvent
    if isinstance(said, Capture):
        event = _tuple(LogEvent, (stream, writer, number, sequence, *said))
        return event
    created, level, level_name, message, logger_name, file, line, function, exception, trace, extra, metadata, _ = said
    try:
        try:
            place = _places[level, level_name, logger_name, file, line, function]
        except Exception:
            place = _place(level, level_name, logger_name, file, line, function)
        level, level_name, logger_name, file, line, function, is_printed = place
        if type(created) is float and 0.0 <= created < _LATEST:
            # A float holds the time to a fraction of a microsecond; what looks like nanoseconds in it is noise.
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
            # A Ctrl-C, or what a signal handler raises.
            raise
        # A part of it raises what nobody handles. It must not hold up what comes after it.
        place = _place(None, None, None, None, None, None)
        level, level_name, logger_name, file, line, function, is_printed = place
        time_unix_nano, message, trace = time.time_ns(), _UNREADABLE, None
    progress = False
    if is_printed:
        progress = "\r" in message and "\r" in message.replace("\r\n", "\n")
        # The end of the line is not part of what was said.
        message = message.rstrip("\r\n")
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
            logger_name,
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


def captured(said: Note | Capture) -> Capture:
    """Return what a record says in values that can go to another process. Never raises."""
    if isinstance(said, Capture):
        return said
    capture: Capture = _tuple(Capture, numbered(said, _NOWHERE, "", 0, 0)[4:])
    return capture


def capture(record: logging.LogRecord, metadata: Mapping[str, Any] | None = None) -> Capture:
    """Return what a record says, in values that every backend can encode. Never raises.

    Args:
        record: The record.
        metadata: What ZenML gives to `emit` beside the record.
    """
    return captured(note(record, metadata))


_Place: TypeAlias = tuple[int, str, str, str, int, str, bool]
_places: dict[Any, _Place] = {}
_MOST_PLACES = 10_000


def _place(level: Any, level_name: Any, logger_name: Any, file: Any, line: Any, function: Any) -> _Place:
    """Return where a record comes from, and remember it: a program has many records of few places."""
    key = (level, level_name, logger_name, file, line, function)
    name, path = _name(logger_name), _name(file)
    place = (
        _whole(level, -_INT32, _INT32 - 1),
        _name(level_name),
        name,
        path,
        _whole(line, 0, _INT32 - 1),
        _name(function),
        # ZenML makes a record of each `write` to stdout and stderr.
        name in ("stdout", "stderr") and not path,
    )
    # What is as it should be: nothing else is kept alive by it, or asked whether it equals something.
    if all(plain is given or given is None for plain, given in zip(place, key, strict=False)):
        if len(_places) >= _MOST_PLACES:
            _places.clear()
        _places[key] = place
    return place


def _name(value: Any) -> str:
    return "" if value is None else shorten(text_of(value), MOST_NAME_BYTES)


def _whole(value: Any, lowest: int, highest: int) -> int:
    """Return a number as an ordinary integer within bounds, 0 if it is none."""
    if type(value) is int and lowest <= value <= highest:
        return value
    try:
        number = int(value) if isinstance(value, float) else index(value)
        # A subclass may have anything for its own `__int__`.
        return max(lowest, min(int.__add__(number, 0), highest))
    except Exception:
        return 0


def _time(created: Any) -> int:
    """Return a record's time in nanoseconds since the epoch: that of now, if it has none. Its unit is not guessed."""
    try:
        if isinstance(created, SupportsFloat) and not isinstance(created, bool):
            seconds = float(created)
            if 0 <= seconds < _LATEST:
                return round(seconds * 1e6) * 1000
    except Exception:
        # Whatever it is, it is no number.
        pass
    return time.time_ns()


def _trace() -> TraceContext | None:
    """Return what is current in the words of whoever made the span. `numbered` looks whether it makes sense."""
    try:
        context = get_current_span().get_span_context()
        return TraceContext(context.trace_id, context.span_id, context.trace_flags) if context.is_valid else None
    except Exception:
        return None


def _checked(trace: TraceContext) -> TraceContext | None:
    """Return the span's context as W3C's Trace Context has it, None if it is none.

    https://www.w3.org/TR/trace-context/#traceparent-header-field-values
    """
    trace_id, span_id = _whole(trace.trace_id, 0, 1 << 128), _whole(trace.span_id, 0, 1 << 64)
    if not 0 < trace_id < 1 << 128 or not 0 < span_id < 1 << 64:
        return None
    return TraceContext(trace_id, span_id, _whole(trace.flags, 0, 0xFF))


_NOTHING: Mapping[str, Plain] = {}
_NOWHERE = Stream(UUID(int=0), {})
_UNREADABLE = "<a record that cannot be read>"


def _extra(fields: dict[str, Any]) -> dict[str, Any]:
    return {key: fields[key] for key in fields.keys() - _RECORD_ATTRIBUTES}


def _exception(exc_info: Any) -> ExceptionInfo | None:
    if isinstance(exc_info, BaseException):
        exc_info = (type(exc_info), exc_info, exc_info.__traceback__)
    try:
        kind, value, _ = exc_info if isinstance(exc_info, tuple) else sys.exc_info()
    except Exception:
        return ExceptionInfo("Exception", "", "")
    if kind is None:
        return None
    message = stacktrace = ""
    with suppress(Exception):
        # As ZenML's and OpenTelemetry's own handlers have it: the first argument is the message.
        message = text_of(value.args[0]) if value is not None and value.args else ""
    with suppress(Exception):
        stacktrace = "".join(traceback.format_exception(kind, value, None if value is None else value.__traceback__))
    return ExceptionInfo(
        shorten(name_of(kind), MOST_NAME_BYTES) if isinstance(kind, type) else "Exception",
        shorten(message, MOST_BYTES),
        shorten(_text(stacktrace), MOST_BYTES),
    )


def plain_mapping(values: Mapping[Any, Any]) -> dict[str, Plain]:
    """Return the mapping with text as keys and values that every backend can encode. Never raises.

    Together they have `MOST_BYTES` at most: what is larger is shortened, the largest values first.

    Args:
        values: The mapping. It may change meanwhile; what is none has nothing.
    """
    return _sized(values)[0]


def _sized(values: Mapping[Any, Any]) -> tuple[dict[str, Plain], int]:
    """Return what `plain_mapping` does, and roughly how many bytes it takes."""
    mapping: dict[str, Plain] = {}
    size = 0
    is_nested = False
    for key, value in _items(values):
        if type(key) is not str or not key.isascii():
            key = text_of(key)
        kind = type(value)
        if kind is str:
            if not value.isascii():
                value = _text(value)
            size += len(value)
        elif not (value is None or kind is float or kind is bool or (kind is int and -_INT64 <= value < _INT64)):
            value = plain(value)
            size += _size(value)
            is_nested = True
        size += len(key)
        mapping[key] = value
    size += _VALUE_BYTES * len(mapping)
    if size > MOST_BYTES:
        return _shortened(mapping, MOST_BYTES), MOST_BYTES
    return mapping, _bytes_of(mapping) if is_nested else size


def _items(values: Mapping[Any, Any]) -> list[tuple[Any, Any]]:
    try:
        # Of a dictionary that is done in one step, whoever changes it meanwhile.
        return (
            list(values.items()) if type(values) is dict else list(islice(values.items(), MOST_BYTES // _VALUE_BYTES))
        )
    except Exception:
        return []


def _size(value: Plain) -> int:
    """Return about how many characters a value has, in all that it consists of."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, list):
        return sum(map(_size, value)) + _ITEM_BYTES * len(value)
    if isinstance(value, dict):
        return sum(map(len, value)) + sum(map(_size, value.values())) + _ITEM_BYTES * len(value)
    return 0


def _shortened(mapping: Mapping[str, Plain], most_bytes: int) -> dict[str, Plain]:
    """Return a mapping that is too large within its bounds: what one value leaves of its share, the others have."""
    kept = dict(islice(mapping.items(), most_bytes // (2 * _VALUE_BYTES)))
    room = most_bytes - _VALUE_BYTES * len(kept)
    fitting: dict[str, tuple[str, Plain]] = {}
    for place, (size, name) in enumerate(sorted((len(name) + _size(value), name) for name, value in kept.items())):
        share = room // (len(kept) - place)
        value = kept[name]
        fitting[name] = name, value
        if size > share:
            short = shorten(name, share // 2)
            text = shorten(value if isinstance(value, str) else str(value), share - len(short))
            fitting[name] = short, text
            size = len(short) + len(text)
        room -= size
    shortened = dict(fitting[name] for name in kept)
    if len(mapping) > len(kept):
        shortened["…"] = f"… [shortened by {len(mapping) - len(kept)} values]"
    return shortened


def abridged(event: LogEvent, most_bytes: int) -> LogEvent:
    """Return an event each text of which has so many bytes at most, and its attributes together."""
    error = event.exception
    if error is not None:
        message, stacktrace = (shorten(text, most_bytes) for text in (error.message, error.stacktrace))
        error = error._replace(message=message, stacktrace=stacktrace)
    return event._replace(
        message=shorten(event.message, most_bytes),
        exception=error,
        attributes=_fitting(event.attributes, most_bytes),
        metadata=_fitting(event.metadata, most_bytes),
    )


def _fitting(mapping: Mapping[str, Plain], most_bytes: int) -> Mapping[str, Plain]:
    size = _size(dict(mapping))
    return _shortened(mapping, most_bytes) if size > most_bytes else mapping


def plain(value: Any, depth: int = 0, room: Iterator[None] | None = None) -> Plain:
    """Return a value that every backend can encode, as near to the given one as can be. Never raises.

    Integers beyond 64 bits become text, since OTLP has none; objects of unknown types become what `str`
    makes of them. There is no end of paths through objects that refer to each other, so what is nested
    deeper than 8 levels is abbreviated, and beyond 10,000 values there is only a mark that says how many.

    Args:
        value: The value.
        depth: How deep it is nested.
        room: Has an item for each value that there may still be.
    """
    try:
        # A subclass may have anything for its own `__str__`, `__int__` and so on.
        if isinstance(value, str):
            return _text(str(value.value) if hasattr(value, "value") else str(value))
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, int):
            number = int.__add__(value, 0)
            return number if -_INT64 <= number < _INT64 else text_of(number)
        if isinstance(value, float):
            return float.__float__(value)
        if isinstance(value, bytes):
            return bytes.decode(value, "utf-8", "backslashreplace")
        if isinstance(value, bytearray):
            return bytearray.decode(value, "utf-8", "backslashreplace")
        is_mapping = isinstance(value, Mapping)
        if not is_mapping and not isinstance(value, list | tuple | set | frozenset | deque):
            return text_of(value)
        if depth == _DEEPEST:
            return _text(_ABBREVIATED.repr(value))
        room = room or repeat(None, _MOST_VALUES)
        # It may go on without end.
        items = list(islice(value.items() if is_mapping else value, _MOST_VALUES + 1))
        taken = [item for _, item in zip(room, items, strict=False)]
        mark = f"… [shortened by {max(len(items), len(value)) - len(taken)} values]"
        if is_mapping:
            mapping = {text_of(key): plain(item, depth + 1, room) for key, item in taken}
            return mapping if len(taken) == len(items) else {**mapping, "…": mark}
        sequence = [plain(item, depth + 1, room) for item in taken]
        return sequence if len(taken) == len(items) else [*sequence, mark]
    except Exception:
        # Even a question for its type may raise: that of a proxy outside of what it stands for.
        return text_of(value)


def text_of(value: Any) -> str:
    """Return what `str` makes of a value, in text that every backend can encode. Never raises."""
    if type(value) is str and value.isascii():
        return value
    try:
        return _text(str(value))
    except Exception:
        return f"<{name_of(type(value))}>"


def name_of(kind: type) -> str:
    """Return the name that a class was made with: a metaclass may have put something else in its place."""
    return _text(_name_of(kind))


_name_of: Callable[[type], str] = vars(type)["__name__"].__get__


def _text(text: str) -> str:
    """Return the text without lone surrogates, which neither JSON nor protobuf can hold."""
    if type(text) is not str:
        # A subclass may have anything for its own methods.
        text = "".join((text,))
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-8", "replace").decode()
    return text
