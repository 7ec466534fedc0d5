"""Decodes one of Datadog's logs to an entry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timedelta, timezone
from typing import Any
from uuid import NAMESPACE_URL, UUID, uuid5

import orjson
from zenml.enums import LoggingLevels
from zenml.utils.time_utils import to_utc_timezone

from composite_logstore import Event, RankedEntry, ReadEntry
from composite_logstore.zenml import LogEntry

# Datadog's statuses for ZenML's levels.
# https://docs.datadoghq.com/logs/log_configuration/processors/log_status_remapper/
STATUSES: Sequence[tuple[LoggingLevels, Sequence[str]]] = (
    (LoggingLevels.DEBUG, ("trace", "debug")),
    (LoggingLevels.INFO, ("info", "notice")),
    (LoggingLevels.WARNING, ("warn", "warning")),
    (LoggingLevels.ERROR, ("err", "error")),
    (LoggingLevels.CRITICAL, ("crit", "critical", "alert", "emerg", "emergency", "fatal")),
)

_LEVELS = {status: level for level, statuses in STATUSES for status in statuses}

EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)

_INT64 = 1 << 63


def parse(log: Mapping[str, Any]) -> ReadEntry:
    """Return a log as an entry, whichever program wrote it and however Datadog's pipelines changed it."""
    fields = _mapping(log.get("attributes"))
    attributes = _mapping(fields.get("attributes"))
    function = _text(_get(attributes, "code.function.name"))
    filename = _text(_get(attributes, "code.file.path"))
    module = function
    if module is None and filename is not None:
        module = filename.rsplit("/", 1)[-1].removesuffix(".py")
    name = _text(_get(attributes, "logger.name"))
    if name is None:
        name = _text(_get(attributes, "otel.library.name"))
    rank = _integer(_get(attributes, "zenml.log.rank"))
    kind, ranked = (LogEntry, {}) if rank is None else (RankedEntry, {"rank": rank})
    entry = kind(
        **ranked,
        id=_id(log, attributes),
        message=_message(fields, attributes),
        name=name,
        level=_level(fields, attributes),
        timestamp=_timestamp(fields, attributes),
        filename=filename,
        lineno=_integer(_get(attributes, "code.line.number")),
        module=module,
    )
    writer = _text(_get(attributes, "zenml.log.writer"))
    return ReadEntry(entry, Event.of(writer, _integer(_get(attributes, "zenml.log.sequence"))))


def _level(fields: Mapping[str, Any], attributes: Mapping[str, Any]) -> LoggingLevels:
    level = _LEVELS.get((_text(fields.get("status")) or "").lower(), LoggingLevels.INFO)
    # Only a level below DEBUG has the attribute, and Datadog has no status for it.
    is_lower = level is LoggingLevels.DEBUG and _get(attributes, "zenml.log.level") is not None
    return LoggingLevels.NOTSET if is_lower else level


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _get(attributes: Mapping[str, Any], name: str) -> Any:
    """Return an attribute. Datadog turns a name with dots into nested objects."""
    value: Any = attributes
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return attributes.get(name) if value is None else value


def _text(value: Any) -> str | None:
    return str(value) if isinstance(value, str | int | float) else None


def _integer(value: Any) -> int | None:
    """Return a value as an integer of 64 bits, whichever type it has; None if it is none."""
    try:
        number = int(value) if isinstance(value, str | int | float) else None
    except (ValueError, OverflowError):
        return None
    return number if number is not None and -_INT64 <= number < _INT64 else None


def _id(log: Mapping[str, Any], attributes: Mapping[str, Any]) -> UUID:
    try:
        return UUID(_get(attributes, "log.record.uid"))
    except (ValueError, TypeError, AttributeError):
        # ZenML's own store computes IDs like this for the logs that it wrote.
        own = _text(log.get("id"))
        if not own:
            # No program of ours writes logs that are nested too deep to be encoded, so they may share an ID.
            with suppress(orjson.JSONEncodeError):
                own = orjson.dumps(log).decode()
        return uuid5(NAMESPACE_URL, f"https://www.datadoghq.com/logs/{own}")


def _message(fields: Mapping[str, Any], attributes: Mapping[str, Any]) -> str:
    message = _text(fields.get("message")) or ""
    kind, reason, stacktrace = (
        _text(_get(attributes, f"exception.{part}")) for part in ("type", "message", "stacktrace")
    )
    if kind is None and reason is None and stacktrace is None:
        return message
    kind = "Exception" if kind is None else kind
    return f"{message}\n{kind}: {reason or ''}\n{stacktrace or ''}".rstrip()


def _timestamp(fields: Mapping[str, Any], attributes: Mapping[str, Any]) -> datetime | None:
    """Return the record's own time, of which Datadog's own field keeps only milliseconds; or else Datadog's time."""
    nanos = _integer(_get(attributes, "otel.timestamp"))
    for micros in (None if nanos is None else nanos // 1_000, _micros(fields, attributes)):
        try:
            if micros is not None:
                return EPOCH + timedelta(microseconds=micros)
        except OverflowError:
            pass
    return None


def _micros(fields: Mapping[str, Any], attributes: Mapping[str, Any]) -> int | None:
    for value in (fields.get("timestamp"), attributes.get("timestamp")):
        if isinstance(value, int | float):
            return _integer(value * 1_000)
        try:
            moment = to_utc_timezone(datetime.fromisoformat((_text(value) or "").replace("Z", "+00:00")))
        except (ValueError, OverflowError):
            continue
        return (moment - EPOCH) // timedelta(microseconds=1)
    return None


def millis_of(log: Mapping[str, Any]) -> int | None:
    """Return the time by which Datadog sorts, in milliseconds; None if the log does not contain it."""
    fields = _mapping(log.get("attributes"))
    micros = _micros(fields, _mapping(fields.get("attributes")))
    return None if micros is None else micros // 1_000
