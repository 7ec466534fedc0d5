"""A stand-in for VictoriaLogs: OTLP in, LogsQL out.

It is built from VictoriaLogs' published mapping, limits and answers; none was at hand to compare it with:
https://docs.victoriametrics.com/victorialogs/querying/ and .../data-ingestion/opentelemetry/

- It takes protobuf at `/insert/opentelemetry/v1/logs`. All values become texts, and an empty one is no value. An entry
  without a message gets a message of VictoriaLogs' own. The severity's number is not stored by older versions.
- What is older than its retention, more than two days ahead, or larger than 2 MB, it drops without a word.
- It answers `/select/logsql/query` with one JSON object a line: in no order unless a pipe sorts, all entries unless
  there is a limit. `start` is inclusive, `end` exclusive.
- It understands the LogsQL that the reader writes, and nothing else (400).
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from typing import Any, NamedTuple

import orjson
from google.protobuf.message import DecodeError

from tests.servers.otlp_receiver import Record, decode_request
from tests.servers.standin import Asked, RefusalError, Reply, StandIn

INSERT = "/insert/opentelemetry/v1/logs"
QUERY = "/select/logsql/query"
NO_MESSAGE = "missing _msg field; see https://docs.victoriametrics.com/victorialogs/keyconcepts/#message-field"

SECOND = 1_000_000_000
MAX_REQUEST_BYTES = 64 * 1024 * 1024
MAX_ROW_BYTES = 2 * 1024 * 1024
MAX_NAME_BYTES = 128
MAX_FIELDS = 2_000
AHEAD_NANOS = 2 * 86400 * SECOND

_STRING = r'"(?:\\.|[^"\\])*"'
_NAME = rf"(?:{_STRING}|[\w.]+)"
_MOMENT = r"[0-9T:.\-]+Z"
_FILTER = re.compile(
    rf"(?P<name>{_NAME}):"
    rf"(?:(?P<any>\*)|(?P<range>\[(?P<from>{_MOMENT}),\s*(?P<to>{_MOMENT})\))|in\((?P<several>{_STRING}(?:,\s*{_STRING})*)\)|(?P<operator>=|>=|<=|>|<|~)(?P<value>{_STRING}|[\w.:\-]+))"
)
_SORT = re.compile(rf"\|\s*sort by \((?P<by>{_NAME}(?:,\s*{_NAME})*)\)(?P<desc> desc)?(?: limit (?P<limit>\d+))?")

Fields = Mapping[str, str]
Condition = Callable[[Fields], bool]


class Row(NamedTuple):
    """One stored entry."""

    nanos: int
    found_from: float
    fields: dict[str, str]
    place: str


class VictoriaLogs(StandIn):
    """The stand-in.

    Attributes:
        retention_seconds: How old an entry may be.
        numbers: Whether it is a version that stores the severity's number.
        ignores: Attributes that it drops: those of the header `VL-Ignore-Fields`.
        prefixes: Whether it was started with `-opentelemetry.enableFieldPrefixes`.
        user: The user and the password that it asks for.
        found_after_seconds: How long an entry takes to be found.
        rows: What it has stored, for each tenant: the headers AccountID and ProjectID.
        dropped: How many entries it has dropped without a word.
    """

    def __init__(self) -> None:
        super().__init__()
        self.retention_seconds = 7 * 86400.0
        self.numbers = False
        self.prefixes = False
        self.ignores: set[str] = set()
        self.user: tuple[str, str] | None = None
        self.found_after_seconds = 0.0
        self.rows: dict[tuple[str, str], list[Row]] = {}
        self.dropped = 0

    def forget(self) -> None:
        """Forget all entries."""
        with self.lock:
            self.rows.clear()
            self.dropped = 0

    def answer(self, asked: Asked) -> Reply:
        if self.user is not None:
            asked.check_basic(*self.user)
        tenant = (asked.headers.get("accountid", "0"), asked.headers.get("projectid", "0"))
        if not all(part.isdecimal() and int(part) < 1 << 32 for part in tenant):
            raise RefusalError(400, "cannot parse AccountID or ProjectID")
        if asked.path == INSERT:
            if "json" in asked.headers.get("content-type", ""):
                raise RefusalError(400, "json encoding isn't supported for opentelemetry format. Use protobuf encoding")
            self.insert(asked.body, tenant)
            return Reply(200)
        if asked.path == QUERY:
            return Reply(
                200,
                self.query(
                    asked.parameters.get("query", ""),
                    asked.parameters.get("start"),
                    asked.parameters.get("end"),
                    asked.number("limit", 0),
                    tenant,
                ),
                {"Content-Type": "application/stream+json"},
            )
        raise RefusalError(400, f"unsupported path requested: {asked.path!r}")

    # Writing

    def insert(self, payload: bytes, tenant: tuple[str, str] = ("0", "0")) -> None:
        """Take a request with entries."""
        if len(payload) > MAX_REQUEST_BYTES:
            raise RefusalError(400, "too big data size exceeding -opentelemetry.maxRequestSize=67108864 bytes")
        try:
            records = decode_request(payload)
        except DecodeError:
            raise RefusalError(400, "cannot decode LogsData request") from None
        rows = self.rows.setdefault(tenant, [])
        now = time.time_ns()
        for record in records:
            nanos = record.time_unix_nano or record.observed_time_unix_nano or now
            fields = self._fields(record)
            size = sum(len(name.encode()) + len(value.encode()) for name, value in fields.items())
            too_long = len(fields) > MAX_FIELDS or any(len(name.encode()) > MAX_NAME_BYTES for name in fields)
            if (
                not now - self.retention_seconds * SECOND <= nanos <= now + AHEAD_NANOS
                or size > MAX_ROW_BYTES
                or too_long
            ):
                self.dropped += 1
                continue
            place = hashlib.sha256(str(len(rows)).encode()).hexdigest()
            rows.append(Row(nanos, time.monotonic() + self.found_after_seconds, fields, place))

    def _fields(self, record: Record) -> dict[str, str]:
        fields: dict[str, str] = {}
        for name, value in record.resource.items():
            _flatten(fields, f"resource.{name}" if self.prefixes else name, value)
        fields["scope.name"] = record.scope or "unknown"
        fields["scope.version"] = "unknown"
        for name, value in record.attributes.items():
            _flatten(fields, f"attributes.{name}" if self.prefixes else name, value)
        fields["_msg"] = _text(record.body) or NO_MESSAGE
        if self.numbers:
            fields |= {"severity_text": record.severity_text, "severity_number": str(record.severity_number or "")}
        else:
            fields["severity"] = record.severity_text or _number_name(record.severity_number)
        fields |= {"trace_id": record.trace_id, "span_id": record.span_id}
        return {name: value for name, value in fields.items() if value and name not in self.ignores}

    # Reading

    def query(
        self, query: str, start: str | None, end: str | None, limit: int, tenant: tuple[str, str] = ("0", "0")
    ) -> bytes:
        """Answer a query."""
        conditions, by, descending, most = _parsed(query)
        begin, over = (_nanos(text) if text else None for text in (start, end))
        now = time.monotonic()
        found: list[tuple[Row, dict[str, str]]] = []
        for row in self.rows.get(tenant, []):
            if row.found_from > now:
                continue
            if (begin is not None and row.nanos < begin) or (over is not None and row.nanos >= over):
                continue
            fields = {**row.fields, "_time": _moment(row.nanos)}
            if all(condition(fields) for condition in conditions):
                found.append((row, fields))
        found.sort(key=lambda item: item[0].place)
        if by:
            # Sorting looks at numbers within texts.
            found.sort(key=lambda item: [_sort_key(item[1], name) for name in by], reverse=descending)
            found = found[:most] if most is not None else found
        if limit and len(found) > limit:
            found.sort(key=lambda item: item[0].nanos, reverse=True)
            found = found[:limit]
        return b"".join(orjson.dumps({"_stream": "{}", **fields}) + b"\n" for _, fields in found)


def _parsed(query: str) -> tuple[list[Condition], list[str], bool, int | None]:
    """Return what rows have to be like, by what they are sorted, whether descending, and how many at most.

    https://docs.victoriametrics.com/victorialogs/logsql/
    """
    filters, place = _conditions(query, 0)
    by: list[str] = []
    descending, most = False, None
    if query[place:].strip():
        sort = _SORT.match(query, place)
        if sort is None or query[sort.end() :].strip():
            raise RefusalError(400, f"cannot parse query: unexpected {query[place:][:50]!r}")
        by = [_unquoted(name) for name in re.findall(_NAME, sort["by"])]
        descending, most = bool(sort["desc"]), int(sort["limit"]) if sort["limit"] else None
    if not filters:
        raise RefusalError(400, "missing query")
    return filters, by, descending, most


def _conditions(query: str, place: int) -> tuple[list[Condition], int]:
    """Return the conditions from a place on, until a bracket, an `or`, or a pipe."""
    filters: list[Condition] = []
    while place < len(query) and not re.match(r"\||\)|or ", query[place:]):
        if query[place].isspace():
            place += 1
            continue
        is_not = query[place] == "-"
        place += is_not
        if query.startswith("(", place):
            condition, place = _alternatives(query, place + 1)
        else:
            match = _FILTER.match(query, place)
            if match is None:
                raise RefusalError(400, f"cannot parse query: the stand-in does not understand {query[place:][:50]!r}")
            condition, place = _condition(match), match.end()
        filters.append(_no(condition) if is_not else condition)
    return filters, place


def _alternatives(query: str, place: int) -> tuple[Condition, int]:
    """Return the condition within brackets."""
    alternatives: list[Condition] = []
    while True:
        filters, place = _conditions(query, place)
        if not filters:
            raise RefusalError(400, "cannot parse query: missing filter")
        alternatives.append(_all(filters))
        if query.startswith(")", place):
            return _any(alternatives), place + 1
        if not query.startswith("or ", place):
            raise RefusalError(400, f"cannot parse query: unexpected {query[place:][:50]!r}")
        place += len("or ")


def _no(condition: Condition) -> Condition:
    return lambda fields: not condition(fields)


def _all(filters: list[Condition]) -> Condition:
    return lambda fields: all(condition(fields) for condition in filters)


def _any(alternatives: list[Condition]) -> Condition:
    return lambda fields: any(condition(fields) for condition in alternatives)


def _condition(match: re.Match[str]) -> Condition:
    name = _unquoted(match["name"])
    if match["several"]:
        several = {_unquoted(text) for text in re.findall(_STRING, match["several"])}
        return lambda fields: fields.get(name, "") in several
    if match["any"]:
        return lambda fields: bool(fields.get(name))
    if match["range"]:
        begin, end = _nanos(match["from"]), _nanos(match["to"])
        return lambda fields: begin <= _nanos(fields[name]) < end
    operator, value = match["operator"], _unquoted(match["value"])
    if operator == "~":
        try:
            pattern = re.compile(value)
        except re.error:
            raise RefusalError(400, "cannot parse query: invalid regexp") from None
        return lambda fields: pattern.search(fields.get(name, "")) is not None
    if operator in ("=", ":="):
        return lambda fields: fields.get(name, "") == value
    try:
        number = float(value)
    except ValueError:
        raise RefusalError(400, "the stand-in compares numbers alone") from None

    def compare(fields: Fields) -> bool:
        try:
            found = float(fields.get(name, ""))
        except ValueError:
            return False
        return {">": found > number, ">=": found >= number, "<": found < number, "<=": found <= number}[operator]

    return compare


def _sort_key(fields: Fields, name: str) -> Any:
    """Return what rows are sorted by: the time, or the parts of a text, with numbers as numbers."""
    text = fields.get(name, "")
    if name == "_time":
        return _nanos(text)
    return [(int(digits) if digits else -1, rest) for digits, rest in re.findall(r"(\d*)(\D*)", text)]


def _number_name(number: int) -> str:
    if not 1 <= number <= 24:
        return "Unspecified"
    place, more = divmod(number - 1, 4)
    return ("Trace", "Debug", "Info", "Warn", "Error", "Fatal")[place] + (str(more + 1) if more else "")


def _flatten(fields: dict[str, str], name: str, value: Any) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            _flatten(fields, f"{name}.{key}", item)
    elif value is not None:
        fields[name] = _text(value)


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if isinstance(value, bool | list | dict):
        return json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    return str(value)


def _unquoted(text: str) -> str:
    if not text.startswith('"'):
        return text
    try:
        return str(json.loads(text, strict=False))
    except ValueError:
        raise RefusalError(400, "cannot parse query: invalid string") from None


def _moment(nanos: int) -> str:
    """Return a time as VictoriaLogs shows it: without zeros at the end."""
    seconds, rest = divmod(nanos, SECOND)
    text = datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%dT%H:%M:%S")
    return f"{text}.{rest:09d}".rstrip("0").rstrip(".") + "Z"


def _nanos(text: str) -> int:
    """Return a time in nanoseconds: it is written in RFC 3339, or as a number."""
    if text.isdecimal():
        # https://docs.victoriametrics.com/#timestamp-formats: the unit follows from the number of digits.
        return int(text) * 10 ** max(0, 19 - len(text)) if len(text) >= 13 else int(text) * SECOND
    match = re.fullmatch(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?Z", text)
    if match is None:
        raise RefusalError(400, f"cannot parse time {text[:50]!r}")
    moment = datetime.fromisoformat(match[1]).replace(tzinfo=timezone.utc)
    return int(moment.timestamp()) * SECOND + int((match[2] or "0").ljust(9, "0"))
