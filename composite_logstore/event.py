"""One log record as an immutable `LogEvent` of its `Stream`: what the journal numbers and every backend gets."""

from __future__ import annotations

import hashlib
import logging
import re
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import chain
from operator import itemgetter
from typing import Any, Literal, NamedTuple
from uuid import UUID

from composite_logstore.ansi import without_escapes
from composite_logstore.plain import Plain, bytes_of, fitting, plain_mapping, shorten

WRITER = re.compile(r"[0-9a-f]{15}")
"""The name of a writer of this package."""
HIGHEST = (1 << 62) - 1
"""The highest number of an event, and the highest sequence number: the event's UUID has 62 bits for its number."""
PROGRESS_BAR = "zenml.log.progress_bar"
"""The attribute of an update of a progress bar, with the number of the bar."""
LEVEL = "zenml.log.level"
"""The attribute with a level below 10, for which OpenTelemetry has no number but the one for no severity."""

EVENT_BYTES = 512
"""Roughly how many bytes an event takes besides its texts and attributes."""
# `getsizeof` counts this much for every text.
_TEXT_BYTES = sys.getsizeof("")


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
        artifact_store_id: The artifact store of the stack that was active when the stream was registered, None if
            unknown. ZenML itself records it only for its own log store.
        metadata: The origin's metadata. ZenML adds to it after the first records, so read it through
            `attributes`, as late as possible.
        stderr_level: The level of what is printed to stderr: a number, or `detect`.
        last: The sequence number of the last event that this process has numbered, empty before the first.
    """

    __slots__ = ("__weakref__", "artifact_store_id", "id", "last", "metadata", "stderr_level")

    def __init__(
        self,
        id: UUID,
        metadata: dict[str, Any],
        artifact_store_id: UUID | None = None,
        stderr_level: int | Literal["detect"] = logging.ERROR,
    ) -> None:
        self.id = id
        self.metadata = metadata
        self.artifact_store_id = artifact_store_id
        self.stderr_level = stderr_level
        self.last: deque[int] = deque(maxlen=1)

    @property
    def attributes(self) -> dict[str, Plain]:
        """The attributes of every event of the stream, as of now."""
        return plain_mapping(self.metadata)


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
        logger_name: The logger's name; `stdout` or `stderr` for printed text.
        file: The path of the source file, empty if unknown.
        line: The line in it, 0 if unknown.
        function: The function, empty if unknown.
        exception: The record's exception, if it has one.
        trace: The span that was current, if there was one.
        attributes: The record's extra attributes.
        metadata: The attributes that ZenML gives to `emit` with the record.
        progress: False if it updates no progress bar, otherwise the number of the bar, above 1. True if the number is
            not known: then all such updates of the logger count as one bar's.
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
    progress: bool | int

    @classmethod
    def at(
        cls,
        level: int = 20,
        level_name: str = "",
        logger_name: str = "",
        file: str = "",
        line: int = 0,
        function: str = "",
        writer: str = "",
    ) -> LogEvent:
        """Return an event with nothing but what all events from one place in the code share.

        Encoders find out from it what they need to encode only once for each place.
        """
        stream = Stream(UUID(int=0), {})
        return cls(
            stream, writer, 0, 0, 0, level, level_name, "", logger_name, file, line, function, None, None, {}, {}, False
        )

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
        """The attributes that identify the event in every backend."""
        return {
            "log.record.uid": self.uid,
            "zenml.log.writer": self.writer,
            "zenml.log.sequence": self.sequence,
        }

    @property
    def details(self) -> dict[str, Plain]:
        """The event's own attributes under OpenTelemetry's names: neither its stream's nor its `identity`.

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
        if self.progress > 1:
            details[PROGRESS_BAR] = self.progress
        if self.level < logging.DEBUG:
            details[LEVEL] = self.level
        details.update(self.metadata)
        return details

    @property
    def is_ordinary(self) -> bool:
        """Whether it has no exception, span, progress bar, level below 10 or attributes of its own, as most events."""
        is_plain = self.exception is None and self.trace is None and not self.attributes and not self.metadata
        return is_plain and self.progress < 2 and self.level >= logging.DEBUG

    @staticmethod
    def is_update(printed: str) -> bool:
        """Return whether printed text updates a progress bar: it returns to the start of a line that has not ended."""
        return "\r" in printed and "\r" in printed.replace("\r\n", "\n")

    @property
    def size(self) -> int:
        """Roughly how many bytes it takes, in memory or encoded."""
        size = EVENT_BYTES - _TEXT_BYTES + sys.getsizeof(self.message)
        for part in (self.exception and tuple(self.exception), self.attributes, self.metadata):
            if part:
                size += bytes_of(part)
        return size

    @property
    def severity_text(self) -> str:
        """OpenTelemetry's name of the level, as ZenML's own log stores write it.

        https://opentelemetry.io/docs/specs/otel/logs/data-model/#field-severitytext
        """
        return {"WARNING": "WARN", "CRITICAL": "FATAL"}.get(self.level_name, self.level_name)

    @property
    def severity_number(self) -> int:
        """OpenTelemetry's number of the level, 0 where it has none."""
        return severity_number_of(self.level)

    @property
    def text(self) -> str:
        """The message followed by its exception, as ZenML's log stores show it."""
        if self.exception is None:
            return self.message
        error = self.exception
        return f"{self.message}\n{error.type}: {error.message}\n{error.stacktrace}".rstrip()


def severity_number_of(level: int) -> int:
    """Return OpenTelemetry's number of one of Python's levels, 0 where it has none.

    Each 10 in Python are 4 in OpenTelemetry: DEBUG 10 becomes 5, INFO 20 becomes 9, CRITICAL 50 becomes 21. Levels
    between two tens count up by one, to the third at most.
    https://opentelemetry.io/docs/specs/otel/logs/data-model/#field-severitynumber
    """
    if level < 10:
        return 0
    tens, ones = divmod(min(level, 53), 10)
    return 4 * tens + 1 + min(ones, 3)


@lru_cache(maxsize=1_000)
def _uid_of(writer: str) -> str:
    """Return the first part of the UUIDs of a writer's events. A backend may have given the writer an odd name."""
    if not WRITER.fullmatch(writer):
        writer = hashlib.sha256(writer.encode("utf-8", "replace")).hexdigest()[:15]
    return f"{writer[:8]}-{writer[8:12]}-8{writer[12:]}-"


_message_of = itemgetter(LogEvent._fields.index("message"))
_exception_of = itemgetter(LogEvent._fields.index("exception"))
_attributes_of = itemgetter(LogEvent._fields.index("attributes"))
_metadata_of = itemgetter(LogEvent._fields.index("metadata"))


def total_size(events: Sequence[LogEvent]) -> int:
    """Return the sum of the events' sizes, in a fraction of the time that adding up `size` takes."""
    exceptions = map(tuple, filter(None, map(_exception_of, events)))
    mappings = filter(None, chain(map(_attributes_of, events), map(_metadata_of, events)))
    messages = sum(map(sys.getsizeof, map(_message_of, events)))
    return (EVENT_BYTES - _TEXT_BYTES) * len(events) + messages + sum(map(bytes_of, chain(exceptions, mappings)))


def shown_fields(
    sequence: int, text: str, level: int, logger_name: str, time_unix_nano: int, file: str, line: int
) -> tuple[int, str, int, str, int, str, int]:
    """Return the fields of an event that every reader shows, so that equal ones are the same event.

    Escape sequences do not count: a child may do without. The arguments are those of a `LogEvent`.
    """
    level = max(0, min(level // 10 * 10, 50))
    return sequence, without_escapes(text), level, logger_name, time_unix_nano // 1000, file, line if file else 0


def stripped(event: LogEvent) -> LogEvent:
    """Return an event without the escape sequences of its message and its exception."""
    error = event.exception
    if "\x1b" not in event.text and "\x9b" not in event.text:
        return event
    return event._replace(
        message=without_escapes(event.message),
        exception=error and ExceptionInfo(*map(without_escapes, error)),
    )


def abridged(event: LogEvent, most_bytes: int) -> LogEvent:
    """Return an event with at most so many bytes in each text, and in its attributes together."""
    error = event.exception
    if error is not None:
        message, stacktrace = (shorten(text, most_bytes) for text in (error.message, error.stacktrace))
        error = error._replace(message=message, stacktrace=stacktrace)
    return event._replace(
        message=shorten(event.message, most_bytes),
        exception=error,
        attributes=fitting(event.attributes, most_bytes),
        metadata=fitting(event.metadata, most_bytes),
    )
