"""Encodes an event as an entry of Datadog's log intake."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import orjson

from composite_logstore import (
    LogEvent,
    Stream,
    shorten_fields,
)

MAX_ENTRY_BYTES = 1_000_000

# These names have a meaning of their own at the top level of an entry. `@timestamp` and `host` are not written here,
# but Datadog would prefer them to `timestamp` and `hostname`.
# https://docs.datadoghq.com/logs/log_configuration/pipelines/#preprocessing
_RESERVED = frozenset(
    {
        "@timestamp",
        "ddsource",
        "ddtags",
        "host",
        "hostname",
        "message",
        "service",
        "source",
        "status",
        "timestamp",
        "version",
    }
)

# An entry keeps these fields however large it is. All of them are short once the message is cut.
_INDISPENSABLE = _RESERVED | {
    "code.file.path",
    "code.function.name",
    "code.line.number",
    "dd.span_id",
    "dd.trace_id",
    "exception.message",
    "exception.stacktrace",
    "exception.type",
    "log.record.uid",
    "logger.name",
    "otel.severity_number",
    "otel.severity_text",
    "otel.span_id",
    "otel.timestamp",
    "otel.trace_id",
    "service.name",
    "service.version",
    "zenml.log.id",
    "zenml.log.sequence",
    "zenml.log.writer",
}


class StreamEncoder:
    """Encodes the events of one stream like ZenML's own Datadog store, with the fields that it leaves out."""

    def __init__(self, stream: Stream, common: dict[str, Any]) -> None:
        self._stream = unreserved(stream.attributes)
        self._common = common
        # Most of an entry is the same for every event of the batch, so it is encoded once.
        self._shared = {**self._stream, **common}
        self._encoded = b"," + orjson.dumps(self._shared)[1:]
        self._rest = self._encoded.decode()
        self._is_apart = _ORDINARY_NAMES.isdisjoint(self._shared)

    def encode(self, event: LogEvent) -> bytes:
        """Return the event's entry, encoded."""
        if self._is_apart and event.is_ordinary:
            place = _place(
                event.level, event.level_name, event.logger_name, event.file, event.line, event.function, event.writer
            )
            time_unix_nano = event.time_unix_nano
            return (
                f'{{"message":{orjson.dumps(event.message).decode()},"timestamp":{time_unix_nano // 1_000_000},'
                f'"otel.timestamp":"{time_unix_nano}","log.record.uid":"{event.uid}",'
                f'"zenml.log.sequence":{event.sequence},{place}{self._rest}'
            ).encode()
        own = {**unreserved(event.details), **_fields(event)}
        if own.keys().isdisjoint(self._shared):
            return orjson.dumps(own)[:-1] + self._encoded
        return orjson.dumps(self.entry(event))

    def entry(self, event: LogEvent) -> dict[str, Any]:
        """Return the event's entry. If a name occurs twice, the last one here wins, as in ZenML."""
        return {
            **unreserved(event.details),
            **self._stream,
            **unreserved(event.metadata),
            **self._common,
            **_fields(event),
        }


def unreserved(attributes: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the attributes. Names that are reserved at Datadog are prefixed with `extra.`."""
    if _RESERVED.isdisjoint(attributes):
        return attributes
    return {f"extra.{key}" if key in _RESERVED else key: value for key, value in attributes.items()}


def _fields(event: LogEvent) -> dict[str, Any]:
    """Return the fields that differ between events."""
    severity, number = event.severity_text, event.severity_number
    fields: dict[str, Any] = {
        "message": event.message,
        "status": _status(number),
        "timestamp": event.time_unix_nano // 1_000_000,
        "logger.name": event.logger_name,
        # Datadog's own mapping of OpenTelemetry's logs adds these, in these types.
        # https://github.com/DataDog/opentelemetry-mapping-go/blob/main/pkg/otlp/logs/transform.go
        "otel.timestamp": str(event.time_unix_nano),
        "otel.severity_text": severity,
        "otel.severity_number": str(number),
        **event.identity,
    }
    if trace := event.trace:
        fields["otel.trace_id"] = f"{trace.trace_id:032x}"
        fields["otel.span_id"] = f"{trace.span_id:016x}"
        # https://docs.datadoghq.com/tracing/other_telemetry/connect_logs_and_traces/opentelemetry/
        fields["dd.trace_id"] = str(trace.trace_id & 0xFFFF_FFFF_FFFF_FFFF)
        fields["dd.span_id"] = str(trace.span_id)
    return fields


def _status(severity_number: int) -> str:
    """Return the status for a level, whatever its name: Datadog would guess it by the first letter.

    https://docs.datadoghq.com/logs/log_configuration/processors/log_status_remapper/
    """
    return ("debug", "debug", "debug", "info", "warn", "error", "fatal")[(severity_number + 3) // 4]


_OWN_NAMES = ("message", "timestamp", "otel.timestamp", "log.record.uid", "zenml.log.sequence")


_ORDINARY_NAMES = frozenset(_fields(LogEvent.at())) | set(LogEvent.at(file="f", line=1, function="f").details)


@lru_cache(maxsize=10_000)
def _place(level: int, level_name: str, logger_name: str, file: str, line: int, function: str, writer: str) -> str:
    """Return the fields that all entries from one place in the code share, encoded, without braces."""
    event = LogEvent.at(level, level_name, logger_name, file, line, function, writer)
    entry = {**event.details, **_fields(event)}
    return orjson.dumps({name: value for name, value in entry.items() if name not in _OWN_NAMES})[1:-1].decode()


def shorten_entry(entry: dict[str, Any]) -> bytes:
    """Return the entry, encoded, and shortened to the size that Datadog accepts.

    Datadog itself would cut the JSON text where the megabyte ends.
    """
    return shorten_fields(entry, MAX_ENTRY_BYTES, _INDISPENSABLE)
