"""Encodes events as the bytes of OTLP's `ExportLogsServiceRequest`.

A request is concatenated from messages that are serialized one by one. So its size is known while it grows, and the
attributes that all events of a stream share are serialized once. This relies on protobuf's encoding: the fields of a
message may be concatenated, and a nested message follows its length.
https://protobuf.dev/programming-guides/encoding/#structure

An ordinary event is written field by field, in a quarter of the time that a `LogRecord` takes. Any other event is
serialized as a `LogRecord`. `tests/properties/test_otlp_encoding.py` checks that both are the same.

https://github.com/open-telemetry/opentelemetry-proto/blob/main/opentelemetry/proto/logs/v1/logs.proto
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from itertools import groupby
from operator import attrgetter
from struct import Struct
from struct import error as struct_error
from typing import Any, NamedTuple, TypeAlias

from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, InstrumentationScope
from opentelemetry.proto.logs.v1.logs_pb2 import LogRecord, ResourceLogs, ScopeLogs, SeverityNumber
from opentelemetry.proto.resource.v1.resource_pb2 import Resource

from composite_logstore import LogEvent, Stream, TooLargeError, shorten

MAX_EVENT_BYTES = 3 * 1024 * 1024
"""A larger event is shortened: it has to fit into a request, of which gRPC's receivers accept 4 MiB."""

MAX_TEXT_BYTES = 1024 * 1024
"""The most bytes of each text in a shortened event; fewer if that is not enough."""

MIN_TEXT_BYTES = 1024
"""If texts of this length are still too much, an event loses attributes instead."""

Added: TypeAlias = Callable[[LogEvent], Mapping[str, str | int]] | None
"""Returns the attributes that a reader needs besides an event's own; None if it needs none."""


class Encoded(NamedTuple):
    """An encoded request.

    Attributes:
        payload: The serialized `ExportLogsServiceRequest`.
        shortened: How many of the events had to be shortened.
    """

    payload: bytes
    shortened: int


class _StreamAttributes(NamedTuple):
    """A stream's attributes, which are the same for all events of one batch.

    Attributes:
        attributes: The attributes.
        encoded: The serialized attributes.
        are_apart: Whether an ordinary event has no attribute of the same name.
    """

    attributes: Mapping[str, Any]
    encoded: bytes
    are_apart: bool


def encode_resource(attributes: Mapping[str, Any]) -> bytes:
    """Return the serialized `Resource`."""
    resource = Resource()
    _add(resource.attributes, attributes)
    return resource.SerializeToString()


def encode_request(batch: Sequence[LogEvent], resource: bytes, max_bytes: int, added: Added = None) -> Encoded:
    """Encode a batch in its order.

    A logger is a scope in OTLP. The records of a scope need not be together: consecutive events of one logger get a
    `ScopeLogs` of their own, so that the order on the wire is that of the journal.

    Args:
        batch: The events.
        resource: The serialized `Resource`.
        max_bytes: The most bytes of one request.
        added: Returns the attributes that an event gets besides its own.

    Raises:
        TooLargeError: The request would be larger.
        ValueError: An event has a value that protobuf cannot encode.
    """
    streams: dict[Stream, _StreamAttributes] = {}
    # All parts, which are copied once, at the end. The first one is filled in last.
    parts = [b""]
    size = len(resource)
    size_of_scopes = shortened = 0
    for logger_name, run in groupby(batch, key=attrgetter("logger_name")):
        scope = _field(ScopeLogs.SCOPE_FIELD_NUMBER, InstrumentationScope(name=logger_name).SerializeToString())
        place, size_of_scope = len(parts), len(scope)
        parts += (b"", scope)
        for event in run:
            stream = streams.get(event.stream)
            if stream is None:
                stream = streams[event.stream] = _stream_attributes(event.stream)
            more = added(event) if added is not None else {}
            if event.is_ordinary and stream.are_apart and stream.attributes.keys().isdisjoint(more):
                record = _encode_ordinary(event, stream, more)
            else:
                record = _encode_any(event, stream, more)
            if len(record) > MAX_EVENT_BYTES:
                record = _encode_shortened(event, stream, more)
                shortened += 1
            size += len(record)
            # Check for each event: a batch may need far more memory than a request may have.
            if size > max_bytes:
                raise TooLargeError(f"the request is larger than {max_bytes} bytes")
            before = _before_record(len(record))
            size_of_scope += len(before) + len(record)
            parts += (before, record)
        parts[place] = _before(ResourceLogs.SCOPE_LOGS_FIELD_NUMBER, size_of_scope)
        size_of_scopes += len(parts[place]) + size_of_scope
    beginning = _field(ResourceLogs.RESOURCE_FIELD_NUMBER, resource)
    size_of_all = len(beginning) + size_of_scopes
    parts[0] = _before(ExportLogsServiceRequest.RESOURCE_LOGS_FIELD_NUMBER, size_of_all) + beginning
    if len(parts[0]) + size_of_scopes > max_bytes:
        raise TooLargeError(f"the request is larger than {max_bytes} bytes")
    return Encoded(b"".join(parts), shortened)


def _stream_attributes(stream: Stream) -> _StreamAttributes:
    attributes = stream.attributes
    record = LogRecord()
    _add(record.attributes, attributes)
    return _StreamAttributes(attributes, record.SerializeToString(), attributes.keys().isdisjoint(_ORDINARY_NAMES))


_ORDINARY_NAMES = frozenset(
    (
        "log.record.uid",
        "zenml.log.writer",
        "zenml.log.sequence",
        "code.file.path",
        "code.line.number",
        "code.function.name",
    )
)
# The attribute's field number and length; its name's field number, length and text; its value's field number.
_UID = b"\x32\x38\x0a\x0elog.record.uid\x12\x26\x0a\x24"
_SEQUENCE = b"\x0a\x12zenml.log.sequence\x12"
# The field numbers of the time and the observed time, each followed by its value.
_times = Struct("<BQBQ").pack


def _encode_ordinary(event: LogEvent, stream: _StreamAttributes, more: Mapping[str, str | int]) -> bytes:
    """Encode an event that has neither an exception nor attributes of its own."""
    time = event.time_unix_nano
    try:
        times = _times(0x09, time, 0x59, time)
    except struct_error:
        raise ValueError("the time is before 1970") from None
    body = event.message.encode()
    sequence = _varint(event.sequence)
    return b"".join(
        (
            times,
            _severity(event.level, event.level_name),
            _before_body(len(body)),
            body,
            _UID,
            event.uid.encode(),
            _BEFORE_SEQUENCE[len(sequence)],
            sequence,
            _place(event.writer, event.file, event.line, event.function),
            _attributes(tuple(more.items())) if more else b"",
            stream.encoded,
        )
    )


@lru_cache(maxsize=10_000)
def _before_body(size: int) -> bytes:
    """Return the field number and length of the body, and those of its text."""
    length = _varint(size)
    return b"\x2a" + _varint(1 + len(length) + size) + b"\x0a" + length


@lru_cache(maxsize=100)
def _severity(level: int, level_name: str) -> bytes:
    event = LogEvent.at(level, level_name)
    number, text = SeverityNumber.ValueType(event.severity_number), event.severity_text
    return LogRecord(severity_number=number, severity_text=text).SerializeToString()


@lru_cache(maxsize=10_000)
def _place(writer: str, file: str, line: int, function: str) -> bytes:
    """Return the attributes that all events from one place in the code share."""
    event = LogEvent.at(writer=writer, file=file, line=line, function=function)
    return _attributes((*event.details.items(), ("zenml.log.writer", writer)))


@lru_cache(maxsize=1_000)
def _attributes(attributes: tuple[tuple[str, Any], ...]) -> bytes:
    """Return attributes as fields of a record."""
    record = LogRecord()
    _add(record.attributes, dict(attributes))
    return record.SerializeToString()


def _encode_any(event: LogEvent, stream: _StreamAttributes, more: Mapping[str, str | int]) -> bytes:
    identity = {**event.identity, **more}
    own = {**event.details, **identity}
    if stream.attributes.keys().isdisjoint(own):
        return _record(event, event.message, own).SerializeToString() + stream.encoded
    return _record(event, event.message, _all_attributes(event, stream, identity)).SerializeToString()


def _all_attributes(event: LogEvent, stream: _StreamAttributes, identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return an event's attributes. If a name occurs twice, the precedence is ZenML's."""
    return {**event.details, **stream.attributes, **event.metadata, **identity}


def _encode_shortened(event: LogEvent, stream: _StreamAttributes, more: Mapping[str, str | int]) -> bytes:
    identity = {**event.identity, **more}
    attributes = _all_attributes(event, stream, identity)

    def encode(limit: int) -> bytes:
        return _record(event, shorten(event.message, limit), _shorten(attributes, limit)).SerializeToString()

    # First try whether shorter texts help: if texts are not the large part, encoding takes long.
    shortest = encode(MIN_TEXT_BYTES)
    if len(shortest) <= MAX_EVENT_BYTES:
        limit = MAX_TEXT_BYTES
        while limit > MIN_TEXT_BYTES:
            record = encode(limit)
            if len(record) <= MAX_EVENT_BYTES:
                return record
            limit //= 4
        return shortest
    # There are too many attributes, or too many values in one. Keep those that tell where the event belongs.
    kept = {**stream.attributes, **identity}
    if len(stream.encoded) > MAX_EVENT_BYTES // 2:
        kept = identity
    rest = _record(event, shorten(event.message, MIN_TEXT_BYTES), kept)
    rest.dropped_attributes_count = len(attributes) - len(kept)
    return rest.SerializeToString()


def _shorten(value: Any, limit: int) -> Any:
    if isinstance(value, str):
        return shorten(value, limit)
    if isinstance(value, list):
        return [_shorten(item, limit) for item in value]
    if isinstance(value, dict):
        return {name: _shorten(item, limit) for name, item in value.items()}
    return value


def _record(event: LogEvent, message: str, attributes: Mapping[str, Any]) -> LogRecord:
    record = LogRecord(
        time_unix_nano=event.time_unix_nano,
        # "This is the time when the event was observed": if OpenTelemetry made the record, the time when it was made.
        # https://opentelemetry.io/docs/specs/otel/logs/data-model/#field-observedtimestamp
        observed_time_unix_nano=event.time_unix_nano,
        severity_number=SeverityNumber.ValueType(event.severity_number),
        severity_text=event.severity_text,
    )
    record.body.string_value = message
    if event.trace is not None:
        record.trace_id = event.trace.trace_id.to_bytes(16, "big")
        record.span_id = event.trace.span_id.to_bytes(8, "big")
        record.flags = event.trace.flags
    _add(record.attributes, attributes)
    return record


def _add(key_values: Any, attributes: Mapping[str, Any]) -> None:
    for name, value in attributes.items():
        key_value = key_values.add()
        key_value.key = name
        # Most values are texts.
        if isinstance(value, str):
            key_value.value.string_value = value
        else:
            _set(key_value.value, value)


def _set(target: AnyValue, value: Any) -> None:
    if isinstance(value, str):
        target.string_value = value
    elif isinstance(value, bool):
        target.bool_value = value
    elif isinstance(value, int):
        target.int_value = value
    elif isinstance(value, float):
        target.double_value = value
    elif isinstance(value, list | tuple):
        # An empty list has to differ from no value.
        target.array_value.SetInParent()
        for item in value:
            _set(target.array_value.values.add(), item)
    elif isinstance(value, dict):
        target.kvlist_value.SetInParent()
        _add(target.kvlist_value.values, value)
    else:
        # None is an empty value.
        target.SetInParent()


@lru_cache(maxsize=10_000)
def _before_record(size: int) -> bytes:
    return _before(ScopeLogs.LOG_RECORDS_FIELD_NUMBER, size)


def _field(number: int, payload: bytes) -> bytes:
    """Return a nested message as a field."""
    return _before(number, len(payload)) + payload


def _before(number: int, size: int) -> bytes:
    """Return the beginning of a nested message: its field number and wire type, and its size."""
    return _varint(number << 3 | 2) + _varint(size)


def _varint(number: int) -> bytes:
    if number < 0x80:
        return _SHORT[number]
    if number < 0x4000:
        return _SHORT[number & 0x7F | 0x80] + _SHORT[number >> 7]
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


_SHORT = [bytes((number,)) for number in range(0x100)]
# For each length of an encoded sequence number: the attribute up to the number.
_BEFORE_SEQUENCE = [
    b"".join((b"\x32", _varint(len(_SEQUENCE) + 2 + size), _SEQUENCE, _varint(1 + size), b"\x18")) for size in range(11)
]
