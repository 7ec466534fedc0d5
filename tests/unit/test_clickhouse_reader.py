"""The reader of ClickHouse without a server: what it asks, and what it makes of each answer."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from typing import Any
from urllib.parse import parse_qs, urlsplit
from uuid import UUID

import orjson
import pytest
import requests
from requests.structures import CaseInsensitiveDict
from zenml.enums import LoggingLevels

from composite_logstore import Event, HttpResponse, Page, PageRequest
from composite_logstore.reading import searches
from composite_logstore.zenml import (
    LogsEntriesFilter,
    LogStoreError,
    LogStoreRateLimitError,
    LogStoreUnavailableError,
    make_logs,
)
from composite_logstore_clickhouse.config import ClickHouseReaderConfig
from composite_logstore_clickhouse.reader import ClickHouseReader

NOW = datetime.now(timezone.utc)
LOGS = make_logs(UUID(int=5), "step", (NOW - timedelta(minutes=10)).replace(tzinfo=None))
NANOS = int(NOW.timestamp()) * 10**9 - 60 * 10**9
SECRET = "a-long-password"
COLUMNS = {
    "Timestamp": "DateTime64(9)",
    "Body": "String",
    "SeverityNumber": "UInt8",
    "LogAttributes": "Map(LowCardinality(String), String)",
}


class Server:
    """Stands where the HTTP client is: remembers requests and gives the answers that it was told."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.answers: list[Any] = []

    def request(self, method: str, url: str, **arguments: Any) -> HttpResponse:
        given = {name: values[0] for name, values in parse_qs(urlsplit(url).query).items()}
        self.requests.append({"url": url, "sql": arguments["body"].decode(), **given, **arguments})
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        status, headers, content, *fault = answer
        return HttpResponse(status, CaseInsensitiveDict(headers), content, *(fault or [None]))

    def close(self) -> None:
        """Close nothing."""

    def describes(self, **columns: str) -> None:
        self.answers.append((200, {}, b"\n".join(orjson.dumps([*one, ""]) for one in (columns or COLUMNS).items())))

    def finds(self, *rows: list[Any]) -> None:
        self.answers.append((200, {}, b"\n".join(map(orjson.dumps, rows))))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    server = Server()
    monkeypatch.setattr(searches, "HttpClient", lambda **_: server)
    return server


def reader(**settings: Any) -> ClickHouseReader:
    section = {"type": "clickhouse", "url": "https://clickhouse.example:8443/", "username": "me", "password": SECRET}
    found = ClickHouseReaderConfig(**{**section, **settings}).create_reader(None)
    assert isinstance(found, ClickHouseReader)
    return found


def read(direction: Any = "newer", token: str | None = None, limit: int = 10, **filter_: Any) -> Page:
    return reader().read(PageRequest(LOGS, direction, token, limit, LogsEntriesFilter(**filter_)))


def row(number: int = 0, nanos: int = NANOS, **attributes: Any) -> list[Any]:
    identity = {"zenml.log.id": str(LOGS.id), "zenml.log.writer": "a" * 15, "zenml.log.sequence": str(number)}
    return [nanos, f"m{number}", 9, "INFO", "train", "", "", 0, number, {**identity, **attributes}]


def test_a_question(server: Server) -> None:
    server.describes()
    server.finds(row(0), row(1))
    page = read(search="50% o'clock\n", level=LoggingLevels.WARNING)
    assert page.entries == []
    describe, select = server.requests
    assert describe["url"].startswith("https://clickhouse.example:8443/?")
    assert (select["wait_end_of_query"], select["param_id"]) == ("1", str(LOGS.id))
    assert (select["param_search"], select["param_severity"]) == (r"50% o'clock\n", "13")
    assert "o'clock" not in select["sql"]
    assert select["headers"]["Authorization"].startswith("Basic ")
    assert SECRET not in select["url"] + select["sql"]


def test_the_next_page_continues_at_the_place(server: Server) -> None:
    server.describes()
    server.finds(*map(row, range(5)))
    page = read(limit=2)
    assert [one.event for one in page.entries] == [Event("a" * 15, 0), Event("a" * 15, 1)]
    server.describes()
    server.finds(*map(row, range(1, 5)))
    page = read(limit=2, token=page.newer)
    assert [one.event for one in page.entries] == [Event("a" * 15, 2), Event("a" * 15, 3)]
    asked = server.requests[-1]
    assert (asked["param_nanos"], asked["param_writer"], asked["param_sequence"]) == (str(NANOS), "a" * 15, "1")


@pytest.mark.parametrize(
    "sequence", ["", "no", "-5", " 3", "1e3", "9" * 30, "٣", None], ids=lambda value: repr(value)[:10]
)
def test_a_sequence_that_is_none_is_no_event(server: Server, sequence: str | None) -> None:
    server.describes()
    server.finds(row(0, **{"zenml.log.sequence": sequence}), row(1, nanos=NANOS + 1))
    page = read()
    assert [one.event for one in page.entries] == [None, Event("a" * 15, 1)]


def test_rows_of_other_streams_are_left_out(server: Server) -> None:
    server.describes()
    server.finds(row(0, **{"zenml.log.id": "other"}), row(1), row(2, nanos=NANOS - 10**15))
    assert [one.entry.message for one in read().entries] == ["m1"]


UNAVAILABLE, LIMITED, REFUSED = LogStoreUnavailableError, LogStoreRateLimitError, LogStoreError


@pytest.mark.parametrize(
    ("answer", "kind", "words"),
    [
        (requests.ConnectionError(f"header {SECRET}"), UNAVAILABLE, ["clickhouse.example:8443", "'read.url'"]),
        ((429, {"Retry-After": "7"}, b""), LIMITED, []),
        ((503, {}, b""), UNAVAILABLE, []),
        ((404, {}, b"Code: 60. DB::Exception: Table default.otel_logs does not exist."), REFUSED, ["'read.table'"]),
        ((404, {"X-ClickHouse-Exception-Code": "81"}, b""), REFUSED, ["'read.database'"]),
        ((403, {}, b"Code: 516. DB::Exception: me: Authentication failed"), REFUSED, ["'me'", "'read.password'"]),
        ((403, {}, b"Code: 497. DB::Exception: me: Not enough privileges"), REFUSED, ["default.otel_logs", "SELECT"]),
        ((500, {}, b"Code: 497. DB::Exception: me: Not enough privileges"), REFUSED, ["default.otel_logs", "SELECT"]),
        ((500, {}, b"Code: 241. DB::Exception: Memory limit exceeded"), UNAVAILABLE, ["Memory limit"]),
        ((500, {}, b"Code: 201. DB::Exception: Quota exceeded"), LIMITED, []),
        ((500, {}, b"Code: 158. DB::Exception: Limit for rows exceeded"), REFUSED, ["limit"]),
        ((400, {}, b"Code: 62. DB::Exception: Syntax error " + SECRET.encode()), REFUSED, ["Syntax error"]),
        ((401, {}, b"who?"), REFUSED, ["'read.username'"]),
        ((404, {}, b"<html>"), REFUSED, ["'read.url'"]),
        ((302, {"Location": "https://elsewhere.example"}, b""), REFUSED, ["302"]),
        ((200, {}, b"<html></html>"), REFUSED, ["8123"]),
        ((200, {}, b"{}"), REFUSED, ["8123"]),
        ((200, {}, b"[1]", "cut"), UNAVAILABLE, []),
        ((200, {}, b"[1]", "too late"), UNAVAILABLE, []),
        ((200, {}, b"[1]", "undecodable"), REFUSED, []),
    ],
)
def test_errors(server: Server, answer: Any, kind: type[Exception], words: list[str]) -> None:
    server.answers = [answer]
    with pytest.raises(kind) as caught:
        read()
    assert type(caught.value) is kind
    for word in words:
        assert word in str(caught.value)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("tail", "kind"),
    [
        (b"Code: 241. DB::Exception: Memory limit exceeded", UNAVAILABLE),
        (b"\r\n__exception__\r\nCode: 159. DB::Exception: Timeout exceeded", UNAVAILABLE),
        (b"Code: 47. DB::Exception: Unknown identifier", REFUSED),
        (b'["half a r', REFUSED),
    ],
)
def test_an_error_in_the_middle_of_a_success_is_an_error(server: Server, tail: bytes, kind: type[Exception]) -> None:
    server.describes()
    server.answers.append((200, {}, orjson.dumps(row(0)) + b"\n" + tail))
    with pytest.raises(kind) as caught:
        read()
    assert type(caught.value) is kind


def test_fewer_rows_are_asked_for_where_an_answer_is_too_large(server: Server) -> None:
    server.describes()
    server.answers += [(200, {}, b"", "too large")]
    server.finds(row(0))
    assert len(read(limit=1_000).entries) == 1
    first, second = (int(one["param_limit"]) for one in server.requests[1:])
    assert second < first / 2


def test_missing_columns_are_named(server: Server) -> None:
    server.describes(Body="String", SeverityNumber="UInt8")
    with pytest.raises(LogStoreError, match="Timestamp, LogAttributes"):
        read()


def test_columns_that_may_be_missing(server: Server) -> None:
    server.describes(Timestamp="DateTime64(3)", Body="String", LogAttributes="Map(String, String)")
    server.finds(row(0))
    assert len(read().entries) == 1


@pytest.mark.parametrize("direction", ["newer", "older"])
def test_nothing_is_explained_once(server: Server, direction: str) -> None:
    """Where the stream seems empty, one more question finds out whether records of ours lack the attribute."""
    server.describes()
    server.finds()
    server.finds()
    assert read(direction) == Page()
    server.describes()
    server.finds()
    server.finds([{"zenml_log_id": "x", "app": SECRET}])
    with pytest.raises(LogStoreError, match=r"'zenml\.log\.id'.*app, zenml_log_id"):
        read(direction)
    server.describes()
    server.finds()
    assert read(direction, search="x") == Page()


def test_settings() -> None:
    config = ClickHouseReaderConfig(type="clickhouse", url="http://127.0.0.1:8123/")
    assert (config.url, config.database, config.table, config.authorization) == (
        "http://127.0.0.1:8123",
        "default",
        "otel_logs",
        {},
    )
    token = ClickHouseReaderConfig(type="clickhouse", url="https://a.example", api_key="jwt")
    assert token.authorization == {"Authorization": "Bearer jwt"}
