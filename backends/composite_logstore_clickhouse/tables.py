"""The tables that hold log records in ClickHouse, told by their columns, and the SQL that reads them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from composite_logstore import Query
from composite_logstore.zenml import LogStoreError

# A DateTime has 32 bits.
_LAST_SECOND = 0xFFFFFFFF

_EXCEPTION = ("exception.type", "exception.message", "exception.stacktrace")


@dataclass(frozen=True)
class Table:
    """How a table keeps a log record: an SQL expression for each of its fields.

    Attributes:
        time: The column that it is sorted by.
        nanos: The time in nanoseconds since the epoch, an Int64.
        body: The text.
        severity_number: OpenTelemetry's number of the severity.
        severity_text: Its name.
        scope: The logger's name.
        attributes: All attributes, as maps or JSON.
        attribute: The text of one attribute, with `{}` in the place of its name; empty if there is none.
        trace: The trace, the span and the trace's flags.
        first: The condition that a record is not older than `{first:Int64}`, in terms of the table's index.
        last: The condition that it is not newer than `{last:Int64}`.
    """

    time: str
    nanos: str
    body: str
    severity_number: str
    severity_text: str
    scope: str
    attributes: tuple[str, ...]
    attribute: str
    trace: tuple[str, str, str]
    first: str
    last: str

    @property
    def columns(self) -> str:
        """The columns of a result, in the order in which `reader.parse` takes them."""
        fields = (self.nanos, self.body, self.severity_number, self.severity_text, self.scope, *self.trace)
        return ", ".join((*fields, self.sequence, *self.attributes))

    @property
    def writer(self) -> str:
        """The attribute `zenml.log.writer`."""
        return self.named("zenml.log.writer")

    @property
    def sequence(self) -> str:
        """The attribute `zenml.log.sequence` as a number, 0 if it is none."""
        return f"greatest(0, ifNull(toInt64OrNull({self.named('zenml.log.sequence')}), 0))"

    def named(self, name: str) -> str:
        """Return the SQL of an attribute's text."""
        return self.attribute.replace("{}", name)

    def select(self, query: Query) -> tuple[str, dict[str, str]]:
        """Return the SQL that searches, and its parameters."""
        is_newer = query.direction == "newer"
        conditions = [f"{self.named('zenml.log.id')} = {{id:String}}", self.first, self.last]
        parameters = {
            "id": str(query.logs_id),
            "first": str(query.first_nanos),
            "last": str(query.last_nanos),
            "limit": str(query.limit),
        }
        if query.edge is not None:
            place = "({nanos:Int64}, {writer:String}, {sequence:Int64})"
            conditions.append(f"({self.nanos}, {self.writer}, {self.sequence}) {'>=' if is_newer else '<='} {place}")
            nanos, writer, sequence, _ = query.edge
            parameters |= {"nanos": str(nanos), "writer": escaped(writer), "sequence": str(sequence)}
        if query.severity_number:
            number = self.severity_number
            conditions.append(f"({number} >= {{severity:UInt8}} OR {number} = 0)")
            parameters["severity"] = str(query.severity_number)
        if query.search:
            kind, reason, stacktrace = map(self.named, _EXCEPTION)
            text = f"concat({self.body}, '\\n', {kind}, ': ', {reason}, '\\n', {stacktrace})"
            conditions.append(f"positionCaseInsensitiveUTF8({text}, {{search:String}}) > 0")
            parameters["search"] = escaped(query.search)
        way = "ASC" if is_newer else "DESC"
        order = ", ".join(f"{one} {way}" for one in (self.time, self.writer, self.sequence))
        return (
            f"SELECT {self.columns} FROM {{database:Identifier}}.{{table:Identifier}} "
            f"WHERE {' AND '.join(conditions)} ORDER BY {order} LIMIT {{limit:UInt64}} FORMAT JSONCompactEachRow",
            parameters,
        )

    def select_ours(self, query: Query, limit: int) -> tuple[str, dict[str, str]]:
        """Return the SQL for the attributes of the newest records of ours, of any stream, and its parameters."""
        ours = " OR ".join(
            f"{self.named(name)} != ''"
            for name in ("log.record.uid", "zenml.log.writer", "log_record_uid", "zenml_log_id", "zenml_log_writer")
        )
        return (
            f"SELECT {', '.join(self.attributes)} FROM {{database:Identifier}}.{{table:Identifier}} "
            f"WHERE {self.first} AND {self.last} AND ({ours}) "
            f"ORDER BY {self.time} DESC LIMIT {{limit:UInt64}} FORMAT JSONCompactEachRow",
            {"first": str(query.first_nanos), "last": str(query.last_nanos), "limit": str(limit)},
        )


def escaped(text: str) -> str:
    r"""Return a text as a parameter: ClickHouse reads it like a field of a TSV file, with escapes such as `\n`."""
    for character, escape in (("\\", "\\\\"), ("\t", "\\t"), ("\n", "\\n"), ("\r", "\\r"), ("\0", "\\0")):
        text = text.replace(character, escape)
    return text


def table_of(columns: Mapping[str, str], name: str) -> Table:
    """Return how a table keeps log records.

    Args:
        columns: The names of its columns → their types.
        name: Its name in an error.

    Raises:
        LogStoreError: Columns are missing.
    """
    signoz = "attributes_string" in columns and "ts_bucket_start" in columns
    needed = ("timestamp", "body") if signoz else ("Timestamp", "Body", "LogAttributes")
    missing = [column for column in needed if column not in columns]
    if missing:
        raise LogStoreError(
            f"Table {name} lacks {'columns' if len(missing) > 1 else 'column'} {', '.join(missing)}. Set 'read.table' "
            "to the table of the collector's ClickHouse exporter (otel_logs), or of SigNoz (distributed_logs_v2)."
        )
    return _signoz(columns) if signoz else _otel(columns, name)


def _or(columns: Mapping[str, str], name: str, otherwise: str) -> str:
    return name if name in columns else otherwise


_FROM, _TO = "fromUnixTimestamp64Nano({first:Int64})", "fromUnixTimestamp64Nano({last:Int64})"
_FROM_SECOND = "intDiv({first:Int64}, 1000000000)"
_TO_SECOND = "intDiv({last:Int64}, 1000000000)"


def _otel(columns: Mapping[str, str], name: str) -> Table:
    """Return the collector's table, in any of its versions.

    https://github.com/open-telemetry/opentelemetry-collector-contrib/tree/main/exporter/clickhouseexporter
    """
    kind = columns["LogAttributes"]
    if kind.startswith("Map("):
        attribute, attributes = "LogAttributes['{}']", "LogAttributes"
    elif kind.startswith(("JSON", "Object(")):
        # A dot in a name leads to a nested object.
        attribute, attributes = "ifNull(toString(LogAttributes.{}), '')", "toJSONString(LogAttributes)"
    else:
        raise LogStoreError(
            f"Column LogAttributes of table {name} is of type {kind[:100]}, not a Map or JSON. Set 'read.table' to the "
            "table of the collector's ClickHouse exporter."
        )
    first, last = f"Timestamp >= {_FROM}", f"Timestamp <= {_TO}"
    if "TimestampTime" in columns:
        first += f" AND TimestampTime >= toDateTime({_FROM_SECOND})"
        last += f" AND TimestampTime <= toDateTime(least({_TO_SECOND}, {_LAST_SECOND}))"
    else:
        first += f" AND toStartOfFiveMinutes(Timestamp) >= toStartOfFiveMinutes({_FROM})"
        last += f" AND toStartOfFiveMinutes(Timestamp) <= toStartOfFiveMinutes({_TO})"
    return Table(
        time="Timestamp",
        nanos="toUnixTimestamp64Nano(toDateTime64(Timestamp, 9))",
        body="toString(Body)",
        severity_number=_or(columns, "SeverityNumber", "0"),
        severity_text=_or(columns, "SeverityText", "''"),
        scope=_or(columns, "ScopeName", "''"),
        attributes=(attributes,),
        attribute=attribute,
        trace=(_or(columns, "TraceId", "''"), _or(columns, "SpanId", "''"), _or(columns, "TraceFlags", "0")),
        first=first,
        last=last,
    )


def _signoz(columns: Mapping[str, str]) -> Table:
    """Return SigNoz' table, whose time is a number. It keeps attributes in a column for each type."""
    numbers = "attributes_number" in columns
    text = "attributes_string['{}']"
    # Only one of the maps has the name.
    number = "if(mapContains(attributes_number, '{}'), toString(toInt64(attributes_number['{}'])), '')"
    maps = [name for name in ("attributes_string", "attributes_number", "attributes_bool") if name in columns]
    return Table(
        time="timestamp",
        nanos="toInt64(timestamp)",
        body="body",
        severity_number=_or(columns, "severity_number", "0"),
        severity_text=_or(columns, "severity_text", "''"),
        scope=_or(columns, "scope_name", "''"),
        attributes=tuple(maps),
        attribute=f"concat({text}, {number})" if numbers else text,
        trace=(_or(columns, "trace_id", "''"), _or(columns, "span_id", "''"), _or(columns, "trace_flags", "0")),
        # A bucket has 30 minutes, and its name is the second at which it begins.
        first=f"timestamp >= {{first:Int64}} AND ts_bucket_start >= {_FROM_SECOND} - 1800",
        last=f"timestamp <= {{last:Int64}} AND ts_bucket_start <= {_TO_SECOND}",
    )
