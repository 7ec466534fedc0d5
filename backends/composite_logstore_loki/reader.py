"""Reads events from Loki: LogQL in, streams of entries out.

https://grafana.com/docs/loki/latest/reference/loki-http-api/#query-logs-within-a-range-of-time
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

import orjson

from composite_logstore import (
    AnswerTooLargeError,
    HttpSearches,
    Record,
    TimeSortedReader,
    quote,
    quoted_text,
    re2_pattern,
    whole_number,
)
from composite_logstore.zenml import LogStoreError

if TYPE_CHECKING:
    from composite_logstore import Allowance, HttpResponse, Query, Span
    from composite_logstore_loki.config import LokiReaderConfig

PATH = "/loki/api/v1/query_range"

_LONGEST_RANGE = 30 * 86_400 * 1_000_000_000
"""The longest range of one query, in nanoseconds: `max_query_length` is an hour more."""

_LOOKED_AT = 100
"""How many entries to look at to find out why a stream has none."""

# Loki replaces all characters of a name but letters and digits. These are the names that have a meaning here.
_NAMES = {
    name.replace(".", "_"): name
    for name in (
        "code.file.path",
        "code.function.name",
        "code.line.number",
        "exception.message",
        "exception.stacktrace",
        "exception.type",
        "log.record.uid",
        "zenml.log.backfilled",
        "zenml.log.id",
        "zenml.log.level",
        "zenml.log.progress_bar",
        "zenml.log.rank",
        "zenml.log.sequence",
        "zenml.log.source",
        "zenml.log.writer",
        "zenml.log_store.id",
        "zenml.log_store.name",
        "zenml.pipeline.id",
        "zenml.pipeline.name",
        "zenml.pipeline.run.id",
        "zenml.pipeline.run.name",
        "zenml.project.id",
        "zenml.project.name",
        "zenml.stack.id",
        "zenml.stack.name",
        "zenml.step.run.id",
        "zenml.step.run.name",
        "zenml.user.id",
        "zenml.user.name",
        "zenml.workspace.id",
        "zenml.workspace.name",
    )
}
# What Loki adds to an entry besides its attributes.
_FIELDS = frozenset(
    {
        "detected_level",
        "dropped_attributes_count",
        "flags",
        "observed_timestamp",
        "scope_name",
        "scope_version",
        "severity_number",
        "severity_text",
        "span_id",
        "trace_id",
    }
)
_RESOURCE = ("service_", "telemetry_")
_EXCEPTION = ("exception_type", "exception_message", "exception_stacktrace")


class LokiReader(TimeSortedReader):
    """Reads pages with queries of at most 5,000 entries, Loki's own limit."""

    max_records = 5_000
    longest_nanos = _LONGEST_RANGE

    def __init__(self, config: LokiReaderConfig, service_name: str) -> None:
        """Connect to nothing yet.

        Args:
            config: The settings, with secrets resolved.
            service_name: The `service.name` of the events.
        """
        headers = {
            **config.authorization,
            "Content-Type": "application/x-www-form-urlencoded",
            # Loki then tells attributes from labels.
            "X-Loki-Response-Encoding-Flags": "categorize-labels",
        }
        if config.tenant_id:
            headers["X-Scope-OrgID"] = config.tenant_id
        self._service = service_name
        self._searches = HttpSearches(
            "Loki", config.query_url, headers, partial(_refusal, headers), config.certificate_file, "read.query_url"
        )

    def ask(self, query: Query, span: Span, allowance: Allowance) -> Sequence[Record]:
        """Ask Loki for entries."""
        text, is_newer = build_query(self._service, query, span), query.direction == "newer"
        entries = self._entries(text, span.begin, span.end, span.limit, is_newer, allowance)
        return [_record(nanos, line, fields, bool(query.search)) for nanos, line, fields in entries]

    def explain_nothing(self, query: Query, allowance: Allowance) -> None:
        """Raise an error if Loki seems to drop the attribute that names the stream.

        Raises:
            LogStoreError: It has entries of the service from this time, and none of them has the attribute.
        """
        end = query.last_nanos + 1
        begin = max(query.first_nanos, end - _LONGEST_RANGE)
        entries = self._entries(_selector(self._service), begin, end, _LOOKED_AT, False, allowance)
        names = [{name for name in fields if _is_attribute(name)} for _, _, fields in entries]
        if not entries or any("zenml_log_id" in one for one in names):
            return
        # Entries of other programs prove nothing.
        if any(one & _NAMES.keys() for one in names) or not any(names):
            raise LogStoreError(
                f"Loki has entries of service_name '{self._service}' from this time, but the newest {len(entries)} "
                "have no 'zenml_log_id', the attribute 'zenml.log.id'. Remove the rule that drops or renames it: in "
                "Loki's 'limits_config.otlp_config', or in a processor of the collector before it."
            )

    def close(self) -> None:
        """Close the connections."""
        self._searches.close()

    def _entries(
        self, query: str, begin: int, end: int, limit: int, is_newer: bool, allowance: Allowance
    ) -> list[tuple[int, str, dict[str, str]]]:
        """Return entries with their times and with all that Loki knows of them."""
        parameters = {
            "query": query,
            "start": begin,
            "end": end,
            "limit": limit,
            "direction": "forward" if is_newer else "backward",
        }
        try:
            answer = self._searches.ask("POST", PATH, urlencode(parameters).encode(), allowance)
        except _TooManyError as error:
            raise AnswerTooLargeError(str(error)) from None
        try:
            entries = list(_parsed(orjson.loads(answer.body)))
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            raise LogStoreError(
                "Loki returned an answer that is no list of log entries. Check 'read.query_url'."
            ) from None
        if len(entries) > limit:
            raise LogStoreError("Loki returned more entries than it was asked for.")
        return entries


def build_query(service_name: str, query: Query, span: Span) -> str:
    """Return the LogQL for the records of a stream."""
    stages = [_selector(service_name), f"| zenml_log_id={quoted_text(str(query.logs_id))}"]
    if span.writer is not None:
        stages.append(f"| zenml_log_writer={quoted_text(span.writer)}")
    stages += [f"| zenml_log_writer!={quoted_text(writer)}" for writer in span.others]
    if span.sequences is not None:
        first, last = span.sequences
        stages += [f"| zenml_log_sequence >= {first}", f"| zenml_log_sequence <= {last}"]
    if query.severity_number:
        stages.append(f'| severity_number >= {query.severity_number} or severity_number=""')
    if query.search:
        # A line filter sees the line alone. So the line becomes the text that is shown.
        stages += [f"| line_format {quoted_text(_TEMPLATE)}", f"|~ {quoted_text(re2_pattern(query.search))}"]
    if span.sequences is not None or query.severity_number:
        # Loki keeps an entry whose value is no number.
        stages.append('| __error__=""')
    return " ".join(stages)


_TEMPLATE = "{{ __line__ }}\n{{ .exception_type }}: {{ .exception_message }}\n{{ .exception_stacktrace }}"


def _selector(service_name: str) -> str:
    return f"{{service_name={quoted_text(service_name)}}}"


def _parsed(answer: Any) -> Iterator[tuple[int, str, dict[str, str]]]:
    """Yield the time, the line and the fields of each entry of an answer."""
    data = answer["data"]
    if answer["status"] != "success" or data["resultType"] != "streams":
        raise ValueError("not a list of streams")
    for stream in data["result"]:
        for nanos, line, *categories in stream["values"]:
            if not isinstance(line, str):
                raise TypeError("a line is no text")
            fields = dict(stream["stream"])
            # An older Loki has all in the labels.
            for category in categories:
                fields = {
                    **{name: value for name, value in fields.items() if name in _NAMES},
                    **category.get("structuredMetadata", {}),
                }
            yield int(nanos), line, {name: str(value) for name, value in fields.items()}


def _record(nanos: int, line: str, fields: Mapping[str, str], is_formatted: bool) -> Record:
    if is_formatted:
        kind, reason, stacktrace = (fields.get(name, "") for name in _EXCEPTION)
        line = line.removesuffix(f"\n{kind}: {reason}\n{stacktrace}")
    return Record(
        nanos,
        line,
        whole_number(fields.get("severity_number")) or 0,
        fields.get("severity_text", ""),
        fields.get("scope_name", ""),
        {_NAMES.get(name, name): value for name, value in fields.items() if _is_attribute(name)},
        fields.get("trace_id", ""),
        fields.get("span_id", ""),
        whole_number(fields.get("flags")) or 0,
    )


def _is_attribute(name: str) -> bool:
    return name not in _FIELDS and not name.startswith(_RESOURCE)


class _TooManyError(LogStoreError):
    """The server allows fewer entries a query than it does by default."""


def _refusal(headers: Mapping[str, str], response: HttpResponse) -> LogStoreError | None:
    if response.status == 401 and b"no org id" in response.body[:200]:
        return LogStoreError("Loki has several tenants and was told none. Set 'read.tenant_id'.")
    if response.status == 400:
        said = response.body[:1_000]
        if b"max entries limit" in said:
            return _TooManyError("Loki allows fewer entries a query.")
        if b"time range exceeds the limit" in said:
            return LogStoreError("Loki allows less than 30 days a query. Raise its 'max_query_length'.")
        return LogStoreError(f"Loki rejected the search: {quote(said.decode('utf-8', 'replace'), headers)}")
    return None
