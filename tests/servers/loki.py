"""A stand-in for Grafana Loki: OTLP in, LogQL out.

It is built from Loki's published mapping, limits and answers; none was at hand to compare it with:
https://grafana.com/docs/loki/latest/reference/loki-http-api/ and .../send-data/otel/

- It takes protobuf at `/otlp/v1/logs`: a few resource attributes become labels, all other attributes structured
  metadata with `_` for each character that is neither a letter nor a digit.
- It refuses entries (400, all others of the request are taken): older than a week (`reject_old_samples`), more than 10
  minutes ahead, further behind their stream's newest than an hour, with too much structured metadata, too long a line.
- It answers `/loki/api/v1/query_range`: `start` is inclusive and `end` exclusive, at most 5,000 entries, at most
  30 days and an hour. Entries of one nanosecond come in no order, and a limit may cut them anywhere.
- It merges repetitions of an entry, before 3.7 without looking at structured metadata.
- It understands the LogQL that the reader writes, and nothing else (400).
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import orjson
from google.protobuf.message import DecodeError
from google.rpc.status_pb2 import Status

from tests.servers.otlp_receiver import Record, decode_request
from tests.servers.standin import Asked, RefusalError, Reply, StandIn

PUSH = "/otlp/v1/logs"
QUERY = "/loki/api/v1/query_range"

SECOND = 1_000_000_000
MAX_ENTRIES = 5_000
MAX_QUERY_NANOS = (30 * 24 + 1) * 3600 * SECOND
MAX_METADATA_BYTES = 64 * 1024
MAX_METADATA_ENTRIES = 128
MAX_LINE_BYTES = 256 * 1024
AHEAD_NANOS = 600 * SECOND
BEHIND_NANOS = 3600 * SECOND

# Some of https://grafana.com/docs/loki/latest/send-data/otel/#changing-the-default-mapping-of-otlp-to-loki-format
_INDEXED = {
    "service.name",
    "service.namespace",
    "service.instance.id",
    "deployment.environment",
    "cloud.region",
    "container.name",
    "k8s.cluster.name",
    "k8s.namespace.name",
    "k8s.pod.name",
}

_STRING = r'"(?:\\.|[^"\\])*"'
_SELECTOR = re.compile(rf"\{{\s*((?:\w+=(?:{_STRING})\s*,?\s*)+)\}}")
_MATCHER = re.compile(rf"(\w+)=({_STRING})")
_LABEL = rf"\w+\s*(?:=|!=|>=|<=|>|<)\s*(?:{_STRING}|\d+)"
_LABEL_FILTER = re.compile(rf"(\w+)\s*(=|!=|>=|<=|>|<)\s*(?:({_STRING})|(\d+))")
_STAGE = re.compile(
    rf"\s*(?:\|\s*line_format\s*(?P<template>{_STRING})|\|=\s*(?P<part>{_STRING})|\|~\s*(?P<pattern>{_STRING})"
    rf"|\|\s*(?P<labels>{_LABEL}(?:\s+or\s+{_LABEL})*))"
)


class Entry(NamedTuple):
    """One stored entry."""

    nanos: int
    line: str
    metadata: dict[str, str]
    place: str


@dataclass
class Stream:
    """The entries of one set of labels, in the order of arrival."""

    entries: list[Entry] = field(default_factory=list)
    newest: int = 0
    lines: set[tuple[int, str]] = field(default_factory=set)


Labels = tuple[tuple[str, str], ...]


class Loki(StandIn):
    """The stand-in.

    Attributes:
        rejects_after_seconds: The greatest age of an entry that it takes, None for any: `reject_old_samples_max_age`.
        merges_lines: Whether it is older than 3.7, and takes two entries of one time and line for one.
        drops: Attributes that its `otlp_config` drops.
        multi_tenant: Whether each request needs a tenant.
        user: The user and the password that a gateway before it asks for.
        token: The token that a gateway before it asks for.
        takes: Whether this host takes entries.
        tells: Whether this host answers queries.
        max_entries: `max_entries_limit_per_query`.
    """

    def __init__(self, data: Loki | None = None) -> None:
        """Prepare it.

        Args:
            data: Another face of the same server, as Grafana Cloud has two hosts.
        """
        super().__init__()
        self.rejects_after_seconds: float | None = 7 * 86400.0
        self.merges_lines = False
        self.drops: set[str] = set()
        self.multi_tenant = False
        self.user: tuple[str, str] | None = None
        self.token: str | None = None
        self.takes = self.tells = True
        self.max_entries = MAX_ENTRIES
        self.tenants: dict[str, dict[Labels, Stream]] = {} if data is None else data.tenants

    def forget(self) -> None:
        """Forget all entries."""
        with self.lock:
            self.tenants.clear()

    @property
    def entries(self) -> list[Entry]:
        """All stored entries."""
        with self.lock:
            return [
                entry for streams in self.tenants.values() for stream in streams.values() for entry in stream.entries
            ]

    def answer(self, asked: Asked) -> Reply:
        if self.user is not None:
            asked.check_basic(*self.user)
        if self.token is not None and asked.headers.get("authorization") != f"Bearer {self.token}":
            raise RefusalError(401, "unauthorized")
        tenant = asked.headers.get("x-scope-orgid", "") if self.multi_tenant else "fake"
        if not tenant:
            raise RefusalError(401, "no org id")
        if asked.path == PUSH and self.takes:
            if asked.headers.get("content-type") != "application/x-protobuf":
                raise RefusalError(400, "content type is not supported")
            self.push(asked.body, tenant)
            return Reply(204)
        if asked.path == QUERY and self.tells:
            answer = self.query(
                asked.parameters.get("query", ""),
                asked.number("start", time.time_ns() - 3600 * SECOND),
                asked.number("end", time.time_ns()),
                asked.number("limit", 100),
                asked.parameters.get("direction", "backward"),
                tenant.split("|"),
                "categorize-labels" in asked.headers.get("x-loki-response-encoding-flags", "").split(","),
            )
            return Reply(200, orjson.dumps(answer), {"Content-Type": "application/json"})
        raise RefusalError(404, "404 page not found")

    def refuse(self, asked: Asked, refusal: RefusalError) -> Reply:
        if asked.path != PUSH or refusal.status == 404:
            return super().refuse(asked, refusal)
        # The type is set after the head was written, and so has no effect.
        return Reply(refusal.status, Status(message=str(refusal)).SerializeToString(), refusal.headers)

    # Writing

    def push(self, payload: bytes, tenant: str = "fake") -> None:
        """Take a request with entries."""
        try:
            records = decode_request(payload)
        except DecodeError:
            raise RefusalError(400, "proto: illegal wireType 7") from None
        streams = self.tenants.setdefault(tenant, {})
        errors: list[str] = []
        for record in records:
            labels = tuple(
                sorted(
                    (_name(name), _text(value))
                    for name, value in record.resource.items()
                    if name in _INDEXED and name not in self.drops
                )
            ) or (("service_name", "unknown_service"),)
            stream = streams.setdefault(labels, Stream())
            nanos = record.time_unix_nano or record.observed_time_unix_nano or time.time_ns()
            metadata = dict(self._metadata(record))
            fault = self._fault(nanos, _text(record.body), metadata, stream.newest)
            if fault:
                errors.append(f"stream '{_shown(labels)}': {fault}")
            else:
                self._keep(stream, nanos, _text(record.body), metadata)
        if errors:
            raise RefusalError(400, f"{len(errors)} errors like: {errors[0]}")

    def _metadata(self, record: Record) -> Iterator[tuple[str, str]]:
        for name, value in [*record.attributes.items(), *record.resource.items()]:
            if name not in self.drops and not (name in record.resource and name in _INDEXED):
                yield from _flat(name, value)
        fields = {
            "observed_timestamp": record.observed_time_unix_nano if record.time_unix_nano else 0,
            "severity_number": record.severity_number,
            "severity_text": record.severity_text,
            "scope_name": record.scope,
            "flags": record.flags,
            "trace_id": record.trace_id,
            "span_id": record.span_id,
        }
        yield from ((name, _text(value)) for name, value in fields.items() if value)

    def _fault(self, nanos: int, line: str, metadata: Mapping[str, str], newest: int) -> str:
        now = time.time_ns()
        if self.rejects_after_seconds is not None and nanos < now - self.rejects_after_seconds * SECOND:
            return f"has timestamp too old: {_moment(nanos)}, oldest acceptable timestamp is: {_moment(now)}"
        if nanos > now + AHEAD_NANOS:
            return f"has timestamp too new: {_moment(nanos)}"
        if len(line.encode()) > MAX_LINE_BYTES:
            return f"max entry size '{MAX_LINE_BYTES}' bytes exceeded, length '{len(line)}' bytes"
        size = sum(len(name) + len(value.encode()) for name, value in metadata.items())
        if size > MAX_METADATA_BYTES:
            return f"has structured metadata too large: '{size}' bytes, limit: '{MAX_METADATA_BYTES}' bytes"
        if len(metadata) > MAX_METADATA_ENTRIES:
            return f"has too many structured metadata labels: '{len(metadata)}', limit: '{MAX_METADATA_ENTRIES}'"
        if nanos < newest - BEHIND_NANOS:
            return f"entry with timestamp {_moment(nanos)} ignored, reason: 'entry too far behind'"
        return ""

    def _keep(self, stream: Stream, nanos: int, line: str, metadata: dict[str, str]) -> None:
        last = stream.entries[-1] if stream.entries else None
        if self.merges_lines and (nanos, line) in stream.lines:
            return
        if last is not None and (last.nanos, last.line, last.metadata) == (nanos, line, metadata):
            return
        stream.lines.add((nanos, line))
        stream.newest = max(stream.newest, nanos)
        # In no order, so that entries of one time are in none either.
        place = hashlib.sha256(str(len(stream.entries)).encode()).hexdigest()
        stream.entries.append(Entry(nanos, line, metadata, place))

    # Reading

    def query(
        self,
        query: str,
        start: int,
        end: int,
        limit: int,
        direction: str,
        tenants: list[str],
        categorized: bool = True,
    ) -> dict[str, Any]:
        """Answer a query."""
        if limit <= 0:
            raise RefusalError(400, "limit must be a positive value")
        if limit > self.max_entries:
            raise RefusalError(
                400,
                "max entries limit per query exceeded, limit > max_entries_limit_per_query "
                f"({limit} > {self.max_entries})",
            )
        if end <= start:
            raise RefusalError(400, "end timestamp must not be before or equal to start time")
        if end - start > MAX_QUERY_NANOS:
            raise RefusalError(400, "the query time range exceeds the limit (query length: too long, limit: 30d1h)")
        if direction not in ("forward", "backward"):
            raise RefusalError(400, f"invalid direction '{direction}'")
        selector, stages = _parsed(query)
        found: list[tuple[int, str, Labels, _Looked]] = []
        for tenant in tenants:
            for labels, stream in self.tenants.get(tenant, {}).items():
                if not all(dict(labels).get(name, "") == value for name, value in selector.items()):
                    continue
                shown = (*labels, ("__tenant_id__", tenant)) if len(tenants) > 1 else labels
                for entry in stream.entries:
                    looked = _Looked(entry.line, {**dict(labels), **entry.metadata}, entry.metadata)
                    if start <= entry.nanos < end and all(stage(looked) for stage in stages):
                        found.append((entry.nanos, entry.place, shown, looked))
        found.sort(key=lambda item: item[:2], reverse=direction == "backward")
        streams: dict[Labels, dict[str, Any]] = {}
        for nanos, _, labels, looked in found[:limit]:
            value: list[Any] = [str(nanos), looked.line]
            if categorized:
                parsed = {"parsed": looked.parsed} if looked.parsed else {}
                value.append({"structuredMetadata": looked.metadata, **parsed})
            else:
                labels = tuple(sorted({**looked.labels, **looked.parsed}.items()))
            streams.setdefault(labels, {"stream": dict(labels), "values": []})["values"].append(value)
        data: dict[str, Any] = {"resultType": "streams", "result": list(streams.values()), "stats": {}}
        if categorized:
            data["encodingFlags"] = ["categorize-labels"]
        return {"status": "success", "data": data}


@dataclass
class _Looked:
    """An entry on its way through the stages of a query."""

    line: str
    labels: dict[str, str]
    metadata: dict[str, str]
    parsed: dict[str, str] = field(default_factory=dict)

    def value(self, name: str) -> str:
        return self.parsed.get(name, self.labels.get(name, ""))


Stage = Callable[[_Looked], bool]


def _parsed(query: str) -> tuple[dict[str, str], list[Stage]]:
    """Return what labels have to be, and what entries have to be like.

    https://grafana.com/docs/loki/latest/query/log_queries/
    """
    match = _SELECTOR.match(query)
    if match is None:
        raise RefusalError(400, "parse error at line 1, col 1: syntax error")
    selector = {name: _unquoted(text) for name, text in _MATCHER.findall(match[1])}
    if not any(selector.values()):
        raise RefusalError(400, "queries require at least one regexp or equality matcher that does not have an empty")
    stages: list[Stage] = []
    place = match.end()
    while query[place:].strip():
        stage = _STAGE.match(query, place)
        if stage is None:
            raise RefusalError(400, f"parse error at line 1, col {place}: the stand-in does not understand this")
        stages.append(_stage(stage))
        place = stage.end()
    return selector, stages


def _stage(match: re.Match[str]) -> Stage:
    terms = match.groupdict()
    if terms["template"]:
        return _formatting(_unquoted(terms["template"]))
    if terms["part"]:
        part = _unquoted(terms["part"])
        return lambda looked: part in looked.line
    if terms["pattern"]:
        try:
            # Of RE2's syntax the reader uses only what Python's has, too.
            pattern = re.compile(_unquoted(terms["pattern"]))
        except re.error:
            raise RefusalError(400, "parse error: invalid regular expression") from None
        return lambda looked: pattern.search(looked.line) is not None
    filters = [_label_filter(*groups) for groups in _LABEL_FILTER.findall(terms["labels"])]
    return lambda looked: any(one(looked) for one in filters)


def _label_filter(name: str, operator: str, text: str, digits: str) -> Stage:
    if text:
        wanted = _unquoted(text)
        if operator not in ("=", "!="):
            raise RefusalError(400, "parse error: unexpected STRING, expecting NUMBER")
        return lambda looked: (looked.value(name) == wanted) == (operator == "=")
    number = float(digits)

    def compare(looked: _Looked) -> bool:
        if name not in looked.labels:
            return False
        try:
            value = float(looked.labels[name])
        except ValueError:
            looked.parsed["__error__"] = "LabelFilterErr"
            return True
        return {
            "=": value == number,
            "!=": value != number,
            ">=": value >= number,
            "<=": value <= number,
            ">": value > number,
            "<": value < number,
        }[operator]

    return compare


def _formatting(template: str) -> Stage:
    """Return the stage `line_format`: https://grafana.com/docs/loki/latest/query/template_functions/."""
    if re.sub(r"\{\{\s*(?:\.\w+|__line__)\s*\}\}", "", template).count("{{"):
        raise RefusalError(400, "parse error: invalid line template")

    def change(looked: _Looked) -> bool:
        looked.line = re.sub(
            r"\{\{\s*(?:\.(\w+)|__line__)\s*\}\}",
            lambda place: looked.value(place[1]) if place[1] else looked.line,
            template,
        )
        return True

    return change


def _unquoted(text: str) -> str:
    try:
        return str(json.loads(text, strict=False))
    except ValueError:
        raise RefusalError(400, "parse error: invalid syntax in a string") from None


def _name(name: str) -> str:
    label = re.sub(r"[^A-Za-z0-9_]", "_", name)
    return f"key_{label}" if label[:1].isdecimal() else label


def _flat(name: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _flat(f"{name}_{key}", item)
    else:
        yield _name(name), _text(value)


def _text(value: Any) -> str:
    """Return a value as the collector's `AsString` does."""
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if isinstance(value, bool | list | dict):
        return json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _shown(labels: Labels) -> str:
    return "{" + ", ".join(f'{name}="{value}"' for name, value in labels) + "}"


def _moment(nanos: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(nanos // SECOND))
