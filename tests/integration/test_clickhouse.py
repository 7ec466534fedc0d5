"""ClickHouse's own engine, fed by a real collector, read through the section `read` of an OTLP child."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from zenml.enums import LoggingLevels

from composite_logstore import LogEvent, PageRequest, Stream
from composite_logstore.parity.scan import open_source
from composite_logstore.testing import Fault, ReaderContract
from composite_logstore.testing.contract import walk
from composite_logstore.testing.events import WRITER, make_events, make_logs, make_stream
from composite_logstore.zenml import LogsEntriesFilter, LogStoreError, LogStoreUnavailableError
from composite_logstore_clickhouse.config import ClickHouseReaderConfig
from composite_logstore_clickhouse.reader import ClickHouseReader
from composite_logstore_otlp.config import OtlpChildConfig
from tests.copying import move_there_and_back
from tests.deep import mostly_deep
from tests.patience import PATIENCE_SECONDS
from tests.servers.clickhouse import ClickHouse, RotelToClickHouse, is_installed

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(not is_installed(), reason="there is no engine of ClickHouse for this machine"),
]


@pytest.fixture(scope="module")
def clickhouse() -> Iterator[ClickHouse]:
    with ClickHouse() as server:
        yield server


@pytest.fixture(scope="module")
def collector(clickhouse: ClickHouse) -> Iterator[RotelToClickHouse]:
    with RotelToClickHouse(clickhouse) as running:
        yield running


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


class TestReader(ReaderContract):
    patience_seconds = PATIENCE_SECONDS

    @pytest.fixture
    def child(self, clickhouse: ClickHouse, collector: RotelToClickHouse) -> OtlpChildConfig:
        section = {"type": "clickhouse", "url": clickhouse.url, "database": "otel"}
        section |= {"username": "reader", "password": "right"}
        return OtlpChildConfig(name="collector", type="otlp", endpoint=collector.http_endpoint, read=section)

    @pytest.fixture
    def faults(self, clickhouse: ClickHouse) -> Mapping[str, Fault]:
        @contextmanager
        def killed() -> Iterator[None]:
            clickhouse.kill()
            yield
            clickhouse.start()

        return {"killed": Fault(killed, read=LogStoreUnavailableError)}


def test_a_stream_moves_from_an_archive_and_back(
    clickhouse: ClickHouse, collector: RotelToClickHouse, tmp_path: Path
) -> None:
    section = {"type": "clickhouse", "url": clickhouse.url, "database": "otel"}
    # However slow the machine is, no export is overdue.
    child = OtlpChildConfig(
        name="sent", type="otlp", endpoint=collector.http_endpoint, read=section, export_timeout_millis=100_000
    )

    def arrive(stream: Stream, count: int) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        with closing(open_source(child)) as source:
            while sum(len(chunk.contents) for chunk in source.scanner.scan(make_logs(stream))) < count:
                assert time.monotonic() < deadline
                time.sleep(0.2)

    move_there_and_back(child, tmp_path, arrive=arrive)


# The tables


def reader_of(clickhouse: ClickHouse, **settings: Any) -> ClickHouseReader:
    section: dict[str, Any] = {"type": "clickhouse", "url": clickhouse.url, "database": "otel", **settings}
    reader = ClickHouseReaderConfig(**section).create_reader("zenml")
    assert isinstance(reader, ClickHouseReader)
    return reader


def attributes_of(event: LogEvent) -> dict[str, Any]:
    values = {**event.details, **event.stream.attributes, **event.metadata, **event.identity}
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}


def as_row(version: str, event: LogEvent) -> dict[str, Any]:
    """An event as a collector writes it into one of the tables."""
    attributes: dict[str, Any] = attributes_of(event)
    nanos = event.time_unix_nano
    if version == "signoz":
        numbers = {name: float(attributes.pop(name)) for name in ("zenml.log.sequence", "code.line.number")}
        return {
            "timestamp": nanos,
            "ts_bucket_start": nanos // 10**9 // 1800 * 1800,
            "body": event.message,
            "severity_text": event.severity_text,
            "severity_number": event.severity_number,
            "scope_name": event.logger_name,
            "attributes_string": attributes,
            "attributes_number": numbers,
        }
    if version == "json":
        attributes["zenml.log.sequence"] = event.sequence
    return {
        "Timestamp": f"{nanos // 10**9}.{nanos % 10**9:09}",
        "Body": event.message,
        "SeverityText": event.severity_text,
        "SeverityNumber": event.severity_number,
        "ScopeName": event.logger_name,
        "LogAttributes": attributes,
    }


def found(
    reader: ClickHouseReader, events: Sequence[LogEvent], direction: Any, limit: int, **filters: Any
) -> list[str]:
    pages = [
        [str(read.entry.id) for read in page.entries]
        for page in walk(reader, make_logs(events[0].stream), direction, limit, **filters)
    ]
    return [uid for page in (pages if direction == "newer" else pages[::-1]) for uid in page]


@pytest.mark.parametrize("version", mostly_deep(["v1", "v2", "json", "signoz"]))
def test_each_version_of_the_table(clickhouse: ClickHouse, version: str) -> None:
    """Pages, ties of a nanosecond, copies, filters and scans, with rows of other programs and streams between."""
    clickhouse.create(version, version)
    stream = make_stream()
    start = (time.time_ns() - 60 * 10**9) // 1000 * 1000
    levels = (10, 20, 30, 40)
    events = make_events([f"Message {n} Ünï" for n in range(60)], stream, 0, WRITER, start, 0, levels)
    events += make_events([f"later {n}" for n in range(60, 90)], stream, 60, WRITER, start, 1_000, levels)
    others = make_events(["another stream"] * 3, make_stream(), start_unix_nano=start)
    rows = [as_row(version, event) for event in (*events, *events[20:40], *others)]
    foreign = as_row(version, others[0])
    foreign["attributes_string" if version == "signoz" else "LogAttributes"] = {"app": "theirs"}
    clickhouse.insert(version, [foreign, *rows[::-1]])
    reader = reader_of(clickhouse, table=version)

    uids = [event.uid for event in events]
    for direction in ("newer", "older"):
        assert found(reader, events, direction, 7) == uids
        assert found(reader, events, direction, 50, level=LoggingLevels.ERROR) == [
            e.uid for e in events if e.level > 30
        ]
        assert found(reader, events, direction, 50, search="message 4") == [
            event.uid for event in events if "Message 4" in event.message
        ]
        assert found(reader, events, direction, 50, search="ÜNÏ") == uids[:60]
    contents = [content for chunk in reader.scan(make_logs(stream)) for content in chunk.contents]
    again = [reader.event_of(content, stream) for content in contents]
    assert [(e.uid, e.message, e.level, e.time_unix_nano, e.file, e.line, e.logger_name) for e in again if e] == [
        (e.uid, e.message, e.level, e.time_unix_nano, e.file, e.line, e.logger_name) for e in events
    ]
    reader.close()


def test_a_thousand_events_of_one_nanosecond_and_clocks_in_milliseconds(clickhouse: ClickHouse) -> None:
    clickhouse.ask(
        "CREATE TABLE millis (Timestamp DateTime64(3), Body String, LogAttributes Map(String, String))"
        " ENGINE = MergeTree ORDER BY Timestamp"
    )
    start = time.time_ns() // 10**9 * 10**9 - 60 * 10**9
    events = make_events([f"m {n}" for n in range(1_000)], start_unix_nano=start, step_nanos=0)
    rows = [{key: as_row("v1", e)[key] for key in ("Timestamp", "Body", "LogAttributes")} for e in events]
    clickhouse.insert("millis", rows)
    reader = reader_of(clickhouse, table="millis")
    for direction in ("newer", "older"):
        assert found(reader, events, direction, 300) == [event.uid for event in events]
    reader.close()


def test_texts_that_are_not_utf8_hide_no_other(clickhouse: ClickHouse) -> None:
    clickhouse.create("v1", "bytes")
    [event] = make_events(["text"])
    clickhouse.insert("bytes", [as_row("v1", event)])
    clickhouse.ask("INSERT INTO bytes SELECT * REPLACE (unhex('ff00fe') AS Body) FROM bytes")
    clickhouse.ask(
        "ALTER TABLE bytes UPDATE LogAttributes = map('zenml.log.id', LogAttributes['zenml.log.id'])"
        " WHERE Body != 'text' SETTINGS mutations_sync = 1"
    )
    reader = reader_of(clickhouse, table="bytes")
    page = reader.read(PageRequest(make_logs(event.stream), "newer", None, 10, LogsEntriesFilter()))
    assert sorted(read.entry.message for read in page.entries) == sorted(["text", "\ufffd\x00\ufffd"])
    reader.close()


# Errors


def error_of(clickhouse: ClickHouse, **settings: Any) -> str:
    reader = reader_of(clickhouse, **settings)
    with pytest.raises(LogStoreError) as caught:
        reader.read(PageRequest(make_logs(make_stream()), "older", None, 10, LogsEntriesFilter()))
    reader.close()
    assert "wr0ng-secret" not in str(caught.value)
    return str(caught.value)


def test_wrong_settings_name_the_field(clickhouse: ClickHouse) -> None:
    user = {"username": "reader", "password": "right"}
    assert "'read.table'" in error_of(clickhouse, table="nowhere")
    assert "'read.database'" in error_of(clickhouse, database="nowhere")
    assert "'read.password'" in error_of(clickhouse, username="reader", password="wr0ng-secret")
    clickhouse.create("v1", "secret")
    assert "Grant SELECT" in error_of(clickhouse, table="secret", **user)
    clickhouse.ask("CREATE TABLE other (id UInt64, Body String) ENGINE = MergeTree ORDER BY id")
    assert "Timestamp, LogAttributes" in error_of(clickhouse, table="other")
    clickhouse.ask("CREATE TABLE odd (Timestamp DateTime64(9), Body String, LogAttributes String) ENGINE = Memory")
    assert "LogAttributes" in error_of(clickhouse, table="odd")


def test_a_renamed_attribute_is_named(clickhouse: ClickHouse) -> None:
    clickhouse.create("v1", "renamed")
    [event] = make_events(["text"])
    row = as_row("v1", event)
    row["LogAttributes"]["zenml_log_id"] = row["LogAttributes"].pop("zenml.log.id")
    clickhouse.insert("renamed", [row])
    said = error_of(clickhouse, table="renamed")
    assert "'zenml.log.id'" in said
    assert "zenml_log_id" in said
    # One record that lost it does not make every silent stream an error.
    clickhouse.insert("renamed", [as_row("v1", event) for event in make_events(["another stream"])])
    reader = reader_of(clickhouse, table="renamed")
    assert reader.read(PageRequest(make_logs(make_stream()), "older", None, 10, LogsEntriesFilter())).entries == []
    reader.close()
