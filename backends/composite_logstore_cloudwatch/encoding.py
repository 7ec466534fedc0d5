"""Encodes an event as the message of a log event: a JSON object in the shape in which CloudWatch stores OTLP's records.

https://docs.aws.amazon.com/AmazonCloudWatch/latest/monitoring/CloudWatch-OTLPEndpoint.html
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import orjson

from composite_logstore import LogEvent, Stream, shorten_in_json
from composite_logstore_cloudwatch.batches import EVENT_BYTES, MOST_BYTES

MOST_MESSAGE_BYTES = MOST_BYTES - EVENT_BYTES

_KEPT_BYTES = 10_000
"""The least bytes that a text of a message that is too large keeps, before another text is shortened."""

# https://opentelemetry.io/docs/specs/otel/common/mapping-to-non-otlp/#dropped-attributes-count
_MARK = "otel.dropped_attributes_count"
_MARK_BYTES = len(_MARK) + 16

# A message keeps these attributes however large it is.
_INDISPENSABLE = frozenset(
    {
        "code.file.path",
        "code.function.name",
        "code.line.number",
        "exception.message",
        "exception.stacktrace",
        "exception.type",
        "log.record.uid",
        "zenml.log.id",
        "zenml.log.sequence",
        "zenml.log.writer",
    }
)

_OWN_NAMES = frozenset({*LogEvent.at().identity, *LogEvent.at(file="f", line=1, function="f").details})


class StreamEncoder:
    """Encodes the events of one stream."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream.attributes
        self._rest = b"".join((b",", orjson.dumps(self._stream)[1:])).decode() if self._stream else "}"
        self._is_apart = _OWN_NAMES.isdisjoint(self._stream)

    def encode(self, event: LogEvent) -> bytes:
        """Return the message of an event.

        Raises:
            Exception: One of `UNENCODABLE`: another program wrote the event.
        """
        if self._is_apart and event.is_ordinary:
            before, after = _place(
                event.level, event.level_name, event.logger_name, event.file, event.line, event.function, event.writer
            )
            return (
                f'{{"timeUnixNano":{event.time_unix_nano},{before},"body":{orjson.dumps(event.message).decode()},'
                f'"attributes":{{"log.record.uid":"{event.uid}","zenml.log.sequence":{event.sequence},{after}{self._rest}}}'
            ).encode()
        return orjson.dumps(self.record(event))

    def record(self, event: LogEvent) -> dict[str, Any]:
        """Return the event as an object. If an attribute's name occurs twice, the last one here wins, as in ZenML."""
        record: dict[str, Any] = {
            "timeUnixNano": event.time_unix_nano,
            "severityNumber": event.severity_number,
            "severityText": event.severity_text,
            "scope": {"name": event.logger_name},
            "body": event.message,
            "attributes": {**event.details, **self._stream, **event.metadata, **event.identity},
        }
        if trace := event.trace:
            record["traceId"] = f"{trace.trace_id:032x}"
            record["spanId"] = f"{trace.span_id:016x}"
            record["flags"] = trace.flags
        return record


@lru_cache(maxsize=10_000)
def _place(
    level: int, level_name: str, logger_name: str, file: str, line: int, function: str, writer: str
) -> tuple[str, str]:
    """Return the encoded fields and attributes that all events from one place in the code share, without braces."""
    event = LogEvent.at(level, level_name, logger_name, file, line, function, writer)
    fields = {
        "severityNumber": event.severity_number,
        "severityText": event.severity_text,
        "scope": {"name": logger_name},
    }
    attributes = {**event.details, "zenml.log.writer": writer}
    before, after = (orjson.dumps(part)[1:-1].decode() for part in (fields, attributes))
    return before, after


def shorten_record(record: dict[str, Any]) -> bytes:
    """Return a record, encoded, and shortened to the size that CloudWatch accepts.

    The body is shortened first, then the stack trace, then the largest of the other texts. If that is not enough, the
    largest attributes are left out, and counted.
    """
    attributes: dict[str, Any] = record["attributes"]
    places: list[tuple[dict[str, Any], str]] = [(record, "body")]
    places += [(attributes, "exception.stacktrace")] if "exception.stacktrace" in attributes else []
    others = [(record, "severityText"), (record["scope"], "name"), *((attributes, key) for key in attributes)]
    places += sorted(others, key=lambda place: _size(*place), reverse=True)
    excess = len(orjson.dumps(record)) - MOST_MESSAGE_BYTES
    for container, key in places:
        size = _size(container, key)
        if excess > 0 and size > _KEPT_BYTES:
            names = len(orjson.dumps(key)) + 2
            container[key] = shorten_in_json(container[key], max(_KEPT_BYTES, size - excess) - names)
            excess -= size - _size(container, key)
    if excess > 0:
        # Still too large: the record has very many attributes, or very long names.
        count = len(attributes)
        excess += _MARK_BYTES
        for key in sorted(attributes, key=lambda key: _size(attributes, key), reverse=True):
            if excess > 0 and key not in _INDISPENSABLE:
                excess -= _size(attributes, key)
                del attributes[key]
        attributes[_MARK] = count - len(attributes)
    return orjson.dumps(record)


def _size(container: dict[str, Any], key: str) -> int:
    return len(orjson.dumps(key)) + 2 + len(orjson.dumps(container[key]))
