"""Encodes an event as a document, with the fields of ZenML's own Elasticsearch store."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timezone
from functools import lru_cache
from typing import Any

import orjson

from composite_logstore import LogEvent, Stream, shorten_fields

MAX_DOCUMENT_BYTES = 2 * 1024 * 1024
"""A larger document is shortened. Elasticsearch takes more, but a page that holds it has to be read as well."""

EXTRA = "zenml.log.extra"
"""The field with the attributes that the index has no place for, as one JSON text."""

RESERVED = frozenset(
    {
        "@timestamp",
        "event_id",
        "message",
        "severity_number",
        "severity_text",
        "span_id",
        "timestamp_nanos",
        "trace_id",
    }
)
"""The fields whose place an attribute of the same name must not take."""

# A document keeps these fields, each in its place, whatever else has to go. All are short once the message is cut.
_INDISPENSABLE = RESERVED | {
    "code.file.path",
    "code.function.name",
    "code.line.number",
    "exception.message",
    "exception.stacktrace",
    "exception.type",
    "log.record.uid",
    "logger.name",
    "zenml.log.id",
    "zenml.log.rank",
    "zenml.log.sequence",
    "zenml.log.writer",
}


class StreamEncoder:
    """Encodes the events of one stream."""

    def __init__(self, stream: Stream, common: Mapping[str, Any]) -> None:
        # An event that was copied from an archive belongs to its stream even if its attributes do not say so.
        self._shared = {**unreserved(common), **unreserved(stream.attributes), "zenml.log.id": str(stream.id)}
        # Most of a document is the same for every event of the batch, so it is encoded once.
        self._encoded = b"," + orjson.dumps(self._shared)[1:]
        self._rest = self._encoded.decode()
        self._is_apart = _ORDINARY_NAMES.isdisjoint(self._shared)
        # Consecutive events mostly share their second.
        self._seconds, self._second = -1, ""

    def operation(self, event: LogEvent) -> bytes:
        """Return the event's two lines of a bulk request: the action, whose `_id` is the event's uid, and the document.

        Raises:
            ValueError: Its time is before 1970, or JSON cannot say what it holds.
        """
        uid = event.uid
        if self._is_apart and event.is_ordinary:
            return f'{{"create":{{"_id":"{uid}"}}}}\n{self._ordinary(event, uid)}\n'.encode()
        return operation_of(uid, self.encode(event))

    def encode(self, event: LogEvent) -> bytes:
        """Return the event's document, encoded. Raises what `operation` raises."""
        if self._is_apart and event.is_ordinary:
            return self._ordinary(event, event.uid).encode()
        own = {**unreserved(event.details), **_fields(event)}
        if own.keys().isdisjoint(self._shared):
            return orjson.dumps(own)[:-1] + self._encoded
        return orjson.dumps(self.document(event))

    def _ordinary(self, event: LogEvent, uid: str) -> str:
        nanos = event.time_unix_nano
        seconds, rest = divmod(nanos, 1_000_000_000)
        if seconds != self._seconds:
            self._seconds, self._second = seconds, iso(nanos)[:-10]
        place = _place(
            event.level, event.level_name, event.logger_name, event.file, event.line, event.function, event.writer
        )
        return (
            f'{{"message":{orjson.dumps(event.message).decode()},"timestamp_nanos":{nanos},'
            f'"@timestamp":"{self._second}{rest:09}Z","event_id":"{uid}","log.record.uid":"{uid}",'
            f'"zenml.log.sequence":{event.sequence},{place}{self._rest}'
        )

    def document(self, event: LogEvent) -> dict[str, Any]:
        """Return the event's document. If a name occurs twice, the last one here wins, as in ZenML."""
        return {**unreserved(event.details), **self._shared, **unreserved(event.metadata), **_fields(event)}


def operation_of(uid: str, document: bytes) -> bytes:
    """Return the two lines of a bulk request that create a document."""
    return b'{"create":{"_id":"%b"}}\n%b\n' % (uid.encode(), document)


def unreserved(attributes: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the attributes. Names that are reserved are prefixed with `extra.`."""
    if RESERVED.isdisjoint(attributes):
        return attributes
    return {f"extra.{key}" if key in RESERVED else key: value for key, value in attributes.items()}


def iso(nanos: int) -> str:
    """Return a time since the epoch as text, with all nanoseconds.

    Raises:
        ValueError: It is before 1970, or beyond what 64 bits of nanoseconds can say.
    """
    if not 0 <= nanos < 1 << 63:
        raise ValueError("the time is before 1970 or after 2262")
    seconds, rest = divmod(nanos, 1_000_000_000)
    moment = datetime.fromtimestamp(seconds, timezone.utc)
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{rest:09}Z"


def _fields(event: LogEvent) -> dict[str, Any]:
    """Return the fields that differ between events."""
    uid = event.uid
    fields: dict[str, Any] = {
        "message": event.message,
        "timestamp_nanos": event.time_unix_nano,
        "@timestamp": iso(event.time_unix_nano),
        # By this ZenML's own store sorts the entries of one nanosecond.
        "event_id": uid,
        "severity_number": event.severity_number,
        "severity_text": event.severity_text,
        "logger.name": event.logger_name,
        **event.identity,
    }
    if trace := event.trace:
        fields["trace_id"] = f"{trace.trace_id:032x}"
        fields["span_id"] = f"{trace.span_id:016x}"
    return fields


_OWN_NAMES = ("message", "timestamp_nanos", "@timestamp", "event_id", "log.record.uid", "zenml.log.sequence")

_ORDINARY_NAMES = frozenset(_fields(LogEvent.at())) | set(LogEvent.at(file="f", line=1, function="f").details)


@lru_cache(maxsize=10_000)
def _place(level: int, level_name: str, logger_name: str, file: str, line: int, function: str, writer: str) -> str:
    """Return the fields that all documents from one place in the code share, encoded, without braces."""
    event = LogEvent.at(level, level_name, logger_name, file, line, function, writer)
    document = {**event.details, **_fields(event)}
    return orjson.dumps({name: value for name, value in document.items() if name not in _OWN_NAMES})[1:-1].decode()


def packed(document: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the document with its variable attributes in one text, for an index that refuses one of them.

    Another record may have used the same name for another type of value, names may contradict each other (`a` and
    `a.b`), or the index has as many fields as it may have.

    Returns:
        The document; None if it has no attributes but those that ZenML gives to every record.
    """
    rest = {name: value for name, value in document.items() if name not in _INDISPENSABLE and name != EXTRA}
    if all(name.startswith("zenml.") and isinstance(value, str) for name, value in rest.items()):
        return None
    kept = {name: value for name, value in document.items() if name in _INDISPENSABLE}
    return {**kept, EXTRA: orjson.dumps(rest).decode()}


def shorten_document(document: dict[str, Any]) -> bytes:
    """Return the document, encoded, and shortened to `MAX_DOCUMENT_BYTES`."""
    return shorten_fields(document, MAX_DOCUMENT_BYTES, _INDISPENSABLE)
