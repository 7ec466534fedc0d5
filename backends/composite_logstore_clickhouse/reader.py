"""The reader: searches of ClickHouse over HTTP."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

import orjson

from composite_logstore import Allowance, Answer, HttpSearches, KeysetReader, Query, Record, quote, whole_number
from composite_logstore.zenml import LogStoreError, LogStoreRateLimitError, LogStoreUnavailableError
from composite_logstore_clickhouse.tables import Table, table_of

if TYPE_CHECKING:
    from composite_logstore import HttpResponse
    from composite_logstore_clickhouse.config import ClickHouseReaderConfig

_SEQUENCE = "zenml.log.sequence"
_CODE = re.compile(rb"Code: ([0-9]{1,4})\. ?DB::")
_COLUMNS = 9
_FLOAT_DIGITS = 18

# https://github.com/ClickHouse/ClickHouse/blob/master/src/Common/ErrorCodes.cpp
_NO_TABLE, _NO_DATABASE, _DENIED, _QUOTA = 60, 81, 497, 201
_UNKNOWN_USERS = (192, 193, 194, 516)
_NO_COLUMNS = (16, 47)
# Too slow, too many queries, too much memory; also a replica or a server that is not reached.
_TROUBLE = (159, 160, 202, 203, 209, 210, 241, 242, 279, 439)
_LIMITS = (158, 307, 396)

_LOOKED_AT = 20
"""How many records to look at for why a stream has none."""


class ClickHouseReader(KeysetReader):
    """Reads the collector's table. ClickHouse sorts by time, writer and sequence.

    Attributes:
        max_page_size: ZenML's own limit is lower.
        max_records: Their rows mostly take less than the largest answer.
    """

    max_page_size = 5_000
    max_records = 5_000
    sorts_ties = True

    def __init__(self, config: ClickHouseReaderConfig) -> None:
        """Connect to nothing yet.

        Args:
            config: The settings, with secrets resolved.
        """
        self._config = config
        self._secrets = [config.password, config.api_key, config.authorization]
        self._place = f"{config.database}.{config.table}"
        headers = {"Content-Type": "text/plain; charset=utf-8", **config.authorization}
        self._searches = HttpSearches("ClickHouse", config.url, headers, self._refusal, config.certificate_file)
        self._table: Table | None = None

    def search(self, query: Query, allowance: Allowance) -> Answer:
        """Return the rows of a stream as records."""
        rows = self._rows(*self._known_table(allowance).select(query), allowance)
        if len(rows) > query.limit:
            raise self._strange()
        try:
            return Answer([parse(row) for row in rows], len(rows) < query.limit)
        except (ValueError, RecursionError):
            raise self._strange() from None

    def explain_nothing(self, query: Query, allowance: Allowance) -> None:
        """Raise an error if the newest records of ours have no attribute `zenml.log.id`."""
        rows = self._rows(*self._known_table(allowance).select_ours(query, _LOOKED_AT), allowance)
        try:
            names = [sorted(_attributes(row)) for row in rows]
        except (ValueError, RecursionError):
            raise self._strange() from None
        # A single record that lost it says nothing about this stream.
        if names and not any("zenml.log.id" in one for one in names):
            raise LogStoreError(
                f"Table {self._place} has records without the attribute 'zenml.log.id', by which they are found. A "
                "processor of the collector must have removed or renamed it; keep it as it is. Such a record has: "
                f"{quote(', '.join(names[0]))}."
            )

    def close(self) -> None:
        """Close the connections."""
        self._searches.close()

    def _known_table(self, allowance: Allowance) -> Table:
        if self._table is None:
            sql = "DESCRIBE TABLE {database:Identifier}.{table:Identifier} FORMAT JSONCompactEachRow"
            columns = {str(row[0]): str(row[1]) for row in self._rows(sql, {}, allowance) if len(row) > 1}
            self._table = table_of(columns, self._place)
        return self._table

    def _rows(self, sql: str, parameters: Mapping[str, str], allowance: Allowance) -> list[list[Any]]:
        """Return the rows of a query's result."""
        given = {"database": self._config.database, "table": self._config.table, **parameters}
        # Without waiting for its end, a query could fail after status 200 and some rows.
        options = {"wait_end_of_query": "1", **{f"param_{name}": value for name, value in given.items()}}
        response = self._searches.ask("POST", f"/?{urlencode(options)}", sql.encode(), allowance)
        rows = _parse_rows(response.body)
        if rows is None:
            raise self._error(response) or self._strange()
        return rows

    def _strange(self) -> LogStoreError:
        return LogStoreError(
            f"{self._config.url} did not answer as ClickHouse does. Check 'read.url': ClickHouse's HTTP interface "
            "mostly has port 8123, or 8443 with TLS."
        )

    def _refusal(self, response: HttpResponse) -> LogStoreError | None:
        return None if response.status == 200 else self._error(response)

    def _error(self, response: HttpResponse) -> LogStoreError | None:
        """Return the error that ClickHouse reports, None if it reports none."""
        found = _CODE.search(response.body)
        text = response.headers.get("X-ClickHouse-Exception-Code") or (found[1].decode() if found else "")
        if not text.isdigit():
            return None
        code, config = int(text), self._config
        begin = found.start() if found else 0
        said = quote(response.body[begin:].decode("utf-8", "replace"), self._secrets)
        if code in (_NO_TABLE, _NO_DATABASE):
            return LogStoreError(
                f"ClickHouse has no table {self._place}. Set 'read.database' and 'read.table' to where the collector "
                "writes its logs."
            )
        if code in _UNKNOWN_USERS:
            who = f"user '{config.username}'" if config.username else "a request without 'read.username'"
            return LogStoreError(
                f"ClickHouse does not accept {who}. Check 'read.username' and 'read.password' (or 'read.api_key')."
            )
        if code == _DENIED:
            return LogStoreError(
                f"ClickHouse does not allow reading table {self._place}: {said} Grant SELECT on it to the user of "
                "'read.username'."
            )
        if code in _NO_COLUMNS:
            return LogStoreError(f"Table {self._place} does not have the columns that it had a moment ago: {said}")
        if code == _QUOTA:
            return LogStoreRateLimitError(f"ClickHouse's quota is used up: {said}")
        if code in _TROUBLE:
            return LogStoreUnavailableError(f"ClickHouse could not finish the search: {said} Try again later.")
        if code in _LIMITS:
            return LogStoreError(f"ClickHouse limits what a search may read: {said} Raise the limit for its user.")
        return LogStoreError(f"ClickHouse refused the search: {said}")


def _parse_rows(body: bytes) -> list[list[Any]] | None:
    """Return the rows of an answer, one in each line; None if it has anything else."""
    # No text contains a line break: JSON escapes it. Parsing all lines at once takes less time.
    whole = b"[" + body.strip().replace(b"\n", b",") + b"]"
    try:
        rows = orjson.loads(whole)
    except ValueError:
        # Another program's text need not be Unicode.
        try:
            text = json.dumps(json.loads(whole.decode("utf-8", "replace")), ensure_ascii=False)
            rows = orjson.loads(text.encode("utf-8", "replace"))
        except (ValueError, RecursionError):
            return None
    return rows if all(isinstance(row, list) for row in rows) else None


def parse(row: list[Any]) -> Record:
    """Return a row, with the columns of `Table.columns`, as a record.

    Raises:
        ValueError: ClickHouse returns no such row.
    """
    nanos, body, severity_number, severity_text, scope, trace_id, span_id, flags, sequence = row[:_COLUMNS]
    if not (type(body) is type(severity_text) is type(scope) is type(trace_id) is type(span_id) is str):
        raise ValueError("a column is no text")
    attributes = _attributes(row[_COLUMNS:])
    nanos, severity_number, flags, sequence = map(_number, (nanos, severity_number, flags, sequence))
    text = str(attributes.get(_SEQUENCE, "")).removesuffix(".0")
    # As ClickHouse sorts it.
    if text.isascii() and text.isdigit() and len(text) <= _FLOAT_DIGITS:
        attributes[_SEQUENCE] = sequence
    else:
        attributes.pop(_SEQUENCE, None)
    return Record(nanos, body, severity_number, severity_text, scope, attributes, trace_id, span_id, flags)


def _number(value: Any) -> int:
    number = whole_number(value)
    if number is None:
        raise ValueError("a column is no number")
    return number


def _attributes(columns: list[Any]) -> dict[str, Any]:
    """Return all attributes in some columns: maps, or JSON texts of nested objects.

    Raises:
        ValueError: A column is neither.
    """
    found: dict[str, Any] = {}
    for column in columns:
        values = orjson.loads(column) if isinstance(column, str) else column
        if not isinstance(values, dict):
            raise ValueError("a column has no attributes")
        # The first one is mostly the only one. Its map belongs to nobody else.
        values = dict(_flat(values, "")) if isinstance(column, str) else values
        found = {**found, **values} if found else values
    return found


def _flat(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
