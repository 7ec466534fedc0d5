"""Reads events from VictoriaLogs: LogsQL in, one JSON object a line out.

https://docs.victoriametrics.com/victorialogs/querying/#querying-logs and .../logsql/
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta, timezone
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

import orjson

from composite_logstore import HttpSearches, Record, TimeSortedReader, quote, quoted_text, re2_pattern, whole_number
from composite_logstore.zenml import LogStoreError
from composite_logstore_victorialogs.config import IS_MESSAGE, LOGGER, NO_MESSAGE, SEVERITY_NUMBER

if TYPE_CHECKING:
    from composite_logstore import Allowance, HttpResponse, Query, Span
    from composite_logstore_victorialogs.config import VictoriaLogsReaderConfig

PATH = "/select/logsql/query"

_PREFIXES = ("", "attributes.")
"""What precedes an attribute's name: nothing, or with `-opentelemetry.enableFieldPrefixes` this."""

_LOOKED_AT = 20
"""How many entries to look at for why a stream has none."""

_SECOND = 1_000_000_000
_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
_TIME = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?(?:Z|\+00:00)", re.ASCII)

# VictoriaLogs' name of a scope that was sent without one.
_NO_SCOPE = "unknown"

# The names of severities, each below the number that is the next one's.
_NAMES_BELOW = {9: ("TRACE", "DEBUG"), 13: ("INFO", "NOTICE"), 17: ("WARN", "WARNING"), 21: ("ERROR",)}
# If a record has no severity's name, older versions keep that of its number, such as `Warn` and `Warn2`.
_NUMBERS = {
    f"{name}{'' if more == 0 else more + 1}": 4 * place + 1 + more
    for place, name in enumerate(("Trace", "Debug", "Info", "Warn", "Error", "Fatal"))
    for more in range(4)
}
# What VictoriaLogs keeps besides the attributes; with prefixes it has the resource's under names of their own.
_FIELDS = frozenset(
    {
        "_msg",
        "_stream",
        "_stream_id",
        "_time",
        "flags",
        "scope.name",
        "scope.version",
        "severity",
        "severity_number",
        "severity_text",
        "span_id",
        "trace_id",
        IS_MESSAGE,
        LOGGER,
        SEVERITY_NUMBER,
    }
)
_RESOURCE = ("resource.", "service.", "telemetry.")


class VictoriaLogsReader(TimeSortedReader):
    """Reads pages with queries for the first or the last entries of some times."""

    max_records = 5_000

    def __init__(self, config: VictoriaLogsReaderConfig) -> None:
        """Connect to nothing yet.

        Args:
            config: The settings, with secrets resolved.
        """
        headers = {
            **config.authorization,
            "Content-Type": "application/x-www-form-urlencoded",
            "AccountID": str(config.account_id),
            "ProjectID": str(config.project_id),
        }
        self._searches = HttpSearches(
            "VictoriaLogs", config.url, headers, partial(_refusal, headers), config.certificate_file
        )

    def ask(self, query: Query, span: Span, allowance: Allowance) -> Sequence[Record]:
        """Ask VictoriaLogs for entries."""
        records = self._records(build_query(query, span), allowance)
        if len(records) > span.limit:
            raise LogStoreError("VictoriaLogs returned more entries than it was asked for.")
        return records

    def explain_nothing(self, query: Query, allowance: Allowance) -> None:
        """Raise an error if the newest entries of ours lack the attribute that names their stream.

        Raises:
            LogStoreError: They do.
        """
        ours = _either([*_named("log.record.uid", ":*"), *_named("zenml.log.writer", ":*")])
        times = _times(query.first_nanos, query.last_nanos + 1)
        records = self._records(f"{times} {ours} | sort by (_time) desc limit {_LOOKED_AT}", allowance)
        # A single entry that lost it says nothing about this stream.
        if records and not any("zenml.log.id" in record.attributes for record in records):
            raise LogStoreError(
                "VictoriaLogs has entries from this time without the attribute 'zenml.log.id', by which they are "
                "found. Remove the rule that drops or renames it: in a processor of the collector, or "
                "'VL-Ignore-Fields'."
            )

    def _records(self, query: str, allowance: Allowance) -> list[Record]:
        answer = self._searches.ask("POST", PATH, urlencode({"query": query}).encode(), allowance)
        try:
            return [_record(orjson.loads(line)) for line in answer.body.split(b"\n") if line.strip()]
        except (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError):
            # An error after the first entries is a line of its own.
            raise LogStoreError(
                "VictoriaLogs returned an answer that is no list of log entries, or broke off. Check 'read.url'."
            ) from None

    def close(self) -> None:
        """Close the connections."""
        self._searches.close()


def build_query(query: Query, span: Span) -> str:
    """Return the LogsQL for the records of a stream."""
    filters = [
        _times(span.begin, span.end),
        _either(_named("zenml.log.id", f":={quoted_text(str(query.logs_id))}")),
    ]
    if span.writer:
        filters.append(_either(_named("zenml.log.writer", f":={quoted_text(span.writer)}")))
    elif span.writer is not None:
        filters.append("-" + _either(_named("zenml.log.writer", ":*")))
    if others := [writer for writer in span.others if writer]:
        filters.append("-" + _either(_named("zenml.log.writer", f":in({','.join(map(quoted_text, others))})")))
    if "" in span.others:
        filters.append(_either(_named("zenml.log.writer", ":*")))
    if span.sequences is not None:
        for operator, number in zip((">=", "<="), span.sequences, strict=True):
            filters.append(_either(_named("zenml.log.sequence", f":{operator}{number}")))
    if query.severity_number:
        filters.append(_severity(query.severity_number))
    if query.search:
        # The text that is shown has the exception, too, if there is one.
        exceptions = (_named(f"exception.{part}", ":*") for part in ("type", "message", "stacktrace"))
        filters.append(
            _either([f"_msg:~{quoted_text(re2_pattern(query.search))}", *(one for both in exceptions for one in both)])
        )
    order = " desc" if query.direction == "older" else ""
    return f"{' '.join(filters)} | sort by (_time){order} limit {span.limit}"


def _severity(least: int) -> str:
    """Return the filter for a severity. Another name without a number may be higher, and is looked at later."""
    lower = ",".join(quoted_text(name) for number, names in _NAMES_BELOW.items() if number <= least for name in names)
    numbers = [*_named(SEVERITY_NUMBER, f":>={least}"), f"severity_number:>={least}"]
    return _either([*numbers, f"(-severity:in({lower}) -severity_text:in({lower}))"])


def _named(name: str, condition: str) -> list[str]:
    return [f"{quoted_text(prefix + name)}{condition}" for prefix in _PREFIXES]


def _either(filters: Iterable[str]) -> str:
    return f"({' or '.join(filters)})"


def _times(begin: int, end: int) -> str:
    return f"_time:[{_moment(begin)}, {_moment(end)})"


def _moment(nanos: int) -> str:
    seconds, rest = divmod(nanos, _SECOND)
    return f"{_EPOCH + timedelta(seconds=seconds):%Y-%m-%dT%H:%M:%S}.{rest:09d}Z"


def _nanos(text: str) -> int:
    match = _TIME.fullmatch(text)
    if match is None:
        raise ValueError("not a time")
    moment = datetime.fromisoformat(match[1]).replace(tzinfo=timezone.utc)
    return (moment - _EPOCH) // timedelta(seconds=1) * _SECOND + int((match[2] or "").ljust(9, "0"))


def _record(row: dict[str, Any]) -> Record:
    fields = {name.removeprefix("attributes."): str(value) for name, value in row.items()}
    message, severity, scope = (fields.get(name, "") for name in ("_msg", "severity", "scope.name"))
    number = whole_number(fields.get(SEVERITY_NUMBER) or fields.get("severity_number"))
    return Record(
        _nanos(fields["_time"]),
        "" if message.startswith(NO_MESSAGE) and IS_MESSAGE not in fields else message,
        _NUMBERS.get(severity, 0) if number is None else number,
        fields.get("severity_text") or severity.removeprefix("Unspecified"),
        fields.get(LOGGER) or ("" if scope == _NO_SCOPE else scope),
        {name: value for name, value in fields.items() if name not in _FIELDS and not name.startswith(_RESOURCE)},
        fields.get("trace_id", ""),
        fields.get("span_id", ""),
    )


def _refusal(headers: Mapping[str, str], response: HttpResponse) -> LogStoreError | None:
    if response.status != 400:
        return None
    said = response.body[:1_000]
    if b"unsupported path" in said:
        return LogStoreError("VictoriaLogs does not know the path of the search. Check 'read.url'.")
    return LogStoreError(f"VictoriaLogs rejected the search: {quote(said.decode('utf-8', 'replace'), headers)}")
