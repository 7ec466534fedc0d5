"""Decodes documents to log records: those of this package, of ZenML's own store, and of OpenTelemetry's mapping."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from datetime import datetime, timedelta, timezone
from typing import Any

import orjson

from composite_logstore import Record
from composite_logstore_elasticsearch.encoding import EXTRA, RESERVED

_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
_INT64 = 1 << 63
_DEEPEST = 20
"""Elasticsearch itself takes no document that is nested deeper."""

_MILLIS = re.compile(r"(-?[0-9]{1,16})(?:\.([0-9]{1,9}))?")
_FRACTION = re.compile(r"(.*[0-9])\.([0-9]{1,9})[0-9]*(Z|[+-][0-9:]{2,6})?")

# Fields of a document that are fields of a record, and not among its attributes.
_OWN = RESERVED | {"logger.name", EXTRA}


def record_of(source: Mapping[str, Any]) -> Record | None:
    """Return a document of this package, or of ZenML's own Elasticsearch store, as a record; None if it has no time."""
    fields = dict(flattened(source))
    nanos = _integer(fields.get("timestamp_nanos"))
    if nanos is None:
        nanos = nanos_of(fields.get("@timestamp"))
    if nanos is None:
        return None
    attributes = {_original(name): value for name, value in fields.items() if name not in _OWN}
    attributes = {**_unpacked(fields.get(EXTRA)), **attributes}
    return Record(
        nanos,
        _text(fields.get("message")),
        _integer(fields.get("severity_number")) or 0,
        _text(fields.get("severity_text")),
        _text(fields.get("logger.name")),
        attributes,
        _text(fields.get("trace_id")),
        _text(fields.get("span_id")),
    )


def otel_record_of(source: Mapping[str, Any]) -> Record | None:
    """Return a document in OpenTelemetry's mapping as a record; None if it has no time.

    https://github.com/open-telemetry/opentelemetry-collector-contrib/tree/main/exporter/elasticsearchexporter
    """
    nanos = nanos_of(source.get("@timestamp"))
    if nanos is None:
        return None
    # Without the attributes, whose names need not be those of the document's own fields.
    fields = dict(flattened({name: value for name, value in source.items() if name != "attributes"}))
    attributes = source.get("attributes")
    found = dict(flattened(attributes)) if isinstance(attributes, Mapping) else {}
    for name in [name for name in fields if name.startswith("attributes.")]:
        found.setdefault(name.removeprefix("attributes."), fields[name])
    body = fields.get("body.text", fields.get("message"))
    if body is None and isinstance(source.get("body"), Mapping):
        body = source["body"].get("structured")
    return Record(
        nanos,
        _text(body),
        _integer(fields.get("severity_number")) or 0,
        _text(fields.get("severity_text")),
        _text(fields.get("scope.name")),
        found,
        _text(fields.get("trace_id")),
        _text(fields.get("span_id")),
    )


def flattened(values: Mapping[str, Any], prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Yield the values of nested objects under dotted names: an ingest pipeline may have made objects of the dots."""
    for name, value in values.items():
        if isinstance(value, Mapping) and value and depth < _DEEPEST:
            yield from flattened(value, f"{prefix}{name}.", depth + 1)
        else:
            yield prefix + name, value


def nanos_of(value: Any) -> int | None:
    """Return a time in nanoseconds since the epoch; None if it is none.

    Args:
        value: ISO's form; or milliseconds, as a number or a text, in which the nanoseconds within the millisecond may
            follow a dot, without leading zeros.
    """
    if isinstance(value, int | float) and not isinstance(value, bool):
        # Binary fractions of a number are no nanoseconds.
        return _integer(value * 1_000_000 if isinstance(value, int) else _integer(value, 1_000_000))
    if not isinstance(value, str):
        return None
    if match := _MILLIS.fullmatch(value):
        return _integer(int(match[1]) * 1_000_000 + int(match[2] or 0))
    fraction = 0
    if match := _FRACTION.fullmatch(value):
        fraction = int(match[2].ljust(9, "0"))
        value = match[1] + (match[3] or "")
    try:
        moment = datetime.fromisoformat(value.replace("Z", "+00:00"))
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=timezone.utc)
        return _integer((moment - _EPOCH) // timedelta(seconds=1) * 1_000_000_000 + fraction)
    except (ValueError, OverflowError):
        return None


def _unpacked(text: Any) -> Mapping[str, Any]:
    """Return the attributes that an exporter has put into one text."""
    try:
        values = orjson.loads(text) if isinstance(text, str) else None
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}


def _original(name: str) -> str:
    original = name.removeprefix("extra.")
    return original if original in RESERVED else name


def _integer(value: Any, unit: int = 1) -> int | None:
    try:
        number = int(value) * unit if isinstance(value, str | int | float) else None
    except (ValueError, OverflowError):
        return None
    return number if number is not None and -_INT64 <= number < _INT64 else None


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    try:
        return orjson.dumps(value).decode()
    except orjson.JSONEncodeError:
        return str(value)[:1_000]
