"""Written with the exporter to the stand-in for Datadog, and read back with our reader and with ZenML's own."""

from __future__ import annotations

import gzip
import logging
import ssl
import time
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import orjson
import pytest
import requests
import trustme
from zenml.enums import LoggingLevels, StackComponentType
from zenml.log_stores.datadog.datadog_flavor import DatadogLogStoreConfig
from zenml.log_stores.datadog.datadog_log_store import DatadogLogStore
from zenml.models import LogsResponse, LogsResponseBody

from composite_logstore import (
    Exporter,
    LogEvent,
    Page,
    PageRequest,
    Reader,
    RejectedError,
    RetryableError,
    TooLargeError,
    UnavailableError,
)
from composite_logstore.event import ExceptionInfo
from composite_logstore.zenml import (
    LogEntry,
    LogsEntriesFilter,
    LogStoreError,
    LogStoreRateLimitError,
    LogStoreUnavailableError,
)
from composite_logstore_datadog.config import DatadogChildConfig
from composite_logstore_datadog.exporter import MAX_REQUEST_BYTES
from tests.events import make_events, make_stream
from tests.servers.datadog import API_KEY, APPLICATION_KEY, Datadog
from tests.servers.tls_proxy import TlsProxy
from tests.watching import wait_until

pytestmark = pytest.mark.integration

Direction = Literal["newer", "older"]
LEVELS = [logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR, logging.CRITICAL]


@pytest.fixture(scope="module")
def server() -> Iterator[Datadog]:
    with Datadog() as server:
        yield server


@pytest.fixture(autouse=True)
def fresh(server: Datadog, monkeypatch: pytest.MonkeyPatch) -> None:
    # No test depends on the proxy of whoever runs it.
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server.control(forget=True, answer_after_seconds=0, found_after_seconds=0)


def make_config(server: Datadog, **settings: Any) -> DatadogChildConfig:
    return DatadogChildConfig(**{"name": "live", "type": "datadog", **server.settings, **settings})


@pytest.fixture
def exporter(server: Datadog) -> Iterator[Exporter]:
    exporter = make_config(server).create_exporter()
    yield exporter
    exporter.close()


@pytest.fixture
def reader(server: Datadog) -> Reader:
    return make_config(server).create_reader()


def lately(events: Sequence[LogEvent], step_nanos: int = 1_000_000) -> list[LogEvent]:
    """Return the events with times of the last minute: Datadog takes none that are old."""
    start = time.time_ns() - 60_000_000_000
    return [event._replace(time_unix_nano=start + number * step_nanos) for number, event in enumerate(events)]


def logs_of(event: LogEvent, log_store_id: Any = None) -> LogsResponse:
    created = datetime.fromtimestamp(time.time() - 120, timezone.utc).replace(tzinfo=None)
    body = LogsResponseBody(
        created=created, updated=created, project_id=uuid4(), source="step", log_store_id=log_store_id
    )
    return LogsResponse(id=event.stream.id, body=body)


def read(
    reader: Reader,
    logs: LogsResponse,
    direction: Direction = "newer",
    limit: int = 1_000,
    **filters: Any,
) -> Iterator[Page]:
    """Yield the pages of the stream."""
    token = None
    while True:
        page = reader.read(PageRequest(logs, direction, token, limit, LogsEntriesFilter(**filters)))
        yield page
        token = page.newer if direction == "newer" else page.older
        if token is None:
            break


def entries(
    reader: Reader,
    logs: LogsResponse,
    direction: Direction = "newer",
    limit: int = 1_000,
    **filters: Any,
) -> list[LogEntry]:
    pages = [[item.entry for item in page.entries] for page in read(reader, logs, direction, limit, **filters)]
    return [entry for page in (pages if direction == "newer" else pages[::-1]) for entry in page]


def zenml_store(server: Datadog, monkeypatch: pytest.MonkeyPatch) -> DatadogLogStore:
    """Return ZenML's own store, as it is, but for the host that it asks."""
    post = requests.post

    def post_here(url: str, **arguments: Any) -> requests.Response:
        return post(url.replace("https://api.datadoghq.com", server.url), **arguments)

    monkeypatch.setattr(requests, "post", post_here)
    return DatadogLogStore(
        name="datadog",
        id=uuid4(),
        config=DatadogLogStoreConfig(
            api_key=API_KEY, application_key=APPLICATION_KEY, endpoint=server.settings["endpoint"]
        ),
        flavor="datadog",
        type=StackComponentType.LOG_STORE,
        user=None,
        created=datetime.now(),
        updated=datetime.now(),
    )


@pytest.mark.parametrize("direction", ["newer", "older"])
@pytest.mark.parametrize("limit", [7, 50, 1_000])
def test_every_event_comes_back_page_by_page(
    exporter: Exporter, reader: Reader, direction: Direction, limit: int
) -> None:
    # Several in each millisecond, which the stand-in, as Datadog, keeps in no order.
    events = lately(make_events([f"m{n}" for n in range(100)]), step_nanos=300_000)
    assert exporter.export(events[:60]) == 0
    assert exporter.export(events[60:]) == 0
    pages = list(read(reader, logs_of(events[0]), direction, limit))
    assert all(len(page.entries) <= limit for page in pages)
    found = entries(reader, logs_of(events[0]), direction, limit)
    assert sorted(str(entry.id) for entry in found) == [event.uid for event in events]
    if limit == 1_000:
        assert [entry.message for entry in found] == [f"m{n}" for n in range(100)]


def test_an_event_comes_back_as_it_was(exporter: Exporter, reader: Reader) -> None:
    error = ExceptionInfo("ValueError", "no", "Traceback ...\nValueError: no\n")
    (event,) = lately(make_events(["hello ünïcödé"], exception=error, level=40, level_name="ERROR"))
    exporter.export([event])
    (page, end) = read(reader, logs_of(event))
    assert end == Page()
    ((entry, origin),) = page.entries
    assert origin == (event.writer, event.sequence)
    assert str(entry.id) == event.uid
    assert entry.message == event.text
    assert entry.level is LoggingLevels.ERROR
    assert entry.timestamp is not None
    assert (entry.timestamp - datetime(1970, 1, 1, tzinfo=timezone.utc)) // timedelta(microseconds=1) == (
        event.time_unix_nano // 1_000
    )
    assert (entry.name, entry.filename, entry.lineno, entry.module) == ("train", "/code/train.py", 42, "fit")


@pytest.mark.parametrize("direction", ["newer", "older"])
@pytest.mark.parametrize("limit", [1, 3, 10, 1_000])
def test_what_was_sent_twice_is_read_once(exporter: Exporter, reader: Reader, direction: Direction, limit: int) -> None:
    events = lately(make_events([f"m{n}" for n in range(40)]), step_nanos=300_000)
    exporter.export(events[:25])
    exporter.export(events[10:25])
    exporter.export(events[20:])
    found = entries(reader, logs_of(events[0]), direction, limit)
    assert sorted(entry.message for entry in found) == sorted(event.message for event in events)


def test_streams_are_kept_apart(exporter: Exporter, reader: Reader) -> None:
    mine, theirs = lately([*make_events(["mine"]), *make_events(["theirs"], first=1)])
    exporter.export([mine, theirs])
    assert [entry.message for entry in entries(reader, logs_of(mine))] == ["mine"]
    assert [entry.message for entry in entries(reader, logs_of(theirs))] == ["theirs"]


@pytest.mark.parametrize(
    ("filters", "wanted"),
    [
        ({"level": "DEBUG"}, "abcde"),
        ({"level": "WARNING"}, "cde"),
        ({"level": "CRITICAL"}, "e"),
        ({"search": "EPOCH"}, "abcde"),
        ({"search": "loss of b"}, "b"),
        ({"search": 'c: "x+y"'}, "c"),
        ({"search": "x+y"}, "c"),
        ({"search": "d:*?"}, "d"),
        ({"search": "epoch", "level": "ERROR"}, "de"),
        ({"search": "nothing"}, ""),
    ],
)
def test_filters(
    server: Datadog,
    exporter: Exporter,
    reader: Reader,
    monkeypatch: pytest.MonkeyPatch,
    filters: dict[str, Any],
    wanted: str,
) -> None:
    texts = ["epoch a", "epoch loss of b", 'epoch c: "x+y"', "epoch d:*?", "epoch e"]
    events = lately(make_events(texts))
    events = [
        event._replace(level=level, level_name=logging.getLevelName(level))
        for event, level in zip(events, LEVELS, strict=True)
    ]
    exporter.export(events)
    expected = [text for letter, text in zip("abcde", texts, strict=True) if letter in wanted]
    assert [entry.message for entry in entries(reader, logs_of(events[0]), **filters)] == expected
    store = zenml_store(server, monkeypatch)
    page = store.fetch(logs_of(events[0], store.id), filter_=LogsEntriesFilter(**filters))
    assert [entry.message for entry in page.items] == expected


def test_times(exporter: Exporter, reader: Reader) -> None:
    events = lately(make_events([f"m{n}" for n in range(20)]), step_nanos=300_000)
    exporter.export(events)
    epoch = datetime(1970, 1, 1, tzinfo=timezone.utc)
    since, until = (epoch + timedelta(microseconds=event.time_unix_nano // 1_000) for event in (events[5], events[14]))
    for direction in ("newer", "older"):
        found = entries(reader, logs_of(events[0]), direction, 4, since=since, until=until)
        assert sorted(entry.message for entry in found) == sorted(f"m{n}" for n in range(5, 15))


def test_zenmls_own_store_reads_what_we_write(
    server: Datadog, exporter: Exporter, reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = ExceptionInfo("ValueError", "no", "Traceback ...\nValueError: no")
    events = lately(make_events([f"m{n}" for n in range(25)], exception=error))
    exporter.export(events)
    ours = entries(reader, logs_of(events[0]))
    store = zenml_store(server, monkeypatch)
    logs = logs_of(events[0], store.id)
    for start in ("oldest", "newest"):
        found: list[LogEntry] = []
        cursor: dict[str, str] = {}
        while True:
            page = store.fetch(logs, start=start, limit=10, **cursor)  # type: ignore[arg-type]
            found = [*found, *page.items] if start == "oldest" else [*page.items, *found]
            if page.before:
                cursor = {"before": page.before}
            elif page.after:
                cursor = {"after": page.after}
            else:
                break
        for entry, other in zip(found, ours, strict=True):
            assert entry.timestamp is not None
            assert other.timestamp is not None
            assert timedelta(0) <= other.timestamp - entry.timestamp < timedelta(milliseconds=1)
            for field in ("message", "level", "module", "filename", "lineno"):
                assert getattr(entry, field) == getattr(other, field)


def test_we_read_what_zenmls_own_store_writes(server: Datadog, reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    store = zenml_store(server, monkeypatch)
    (event,) = make_events(["unused"])
    logs = logs_of(event, store.id)
    origin = store.register_origin("step", logs, {"zenml.run.name": "monday"})
    for number, level in enumerate(LEVELS):
        record = logging.LogRecord("train", level, "/code/train.py", 42, "m%d", (number,), None, "fit")
        # Of those that ZenML writes in the same millisecond, nothing tells the order.
        record.created += number - len(LEVELS)
        store.emit(origin, record)
    store.flush()
    store.deactivate()
    found = entries(reader, logs)
    assert [entry.message for entry in found] == [f"m{n}" for n in range(5)]
    assert [entry.level.value for entry in found if entry.level] == LEVELS
    theirs = store.fetch(logs)
    assert found == theirs.items


def test_saved_queries_find_both(server: Datadog, exporter: Exporter, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ZenML's own store writes is there under the same names, with the same values."""
    store = zenml_store(server, monkeypatch)
    stream = make_stream(**{"zenml.run.name": "monday"})
    (event,) = lately(make_events(["hello"], stream, metadata={"step": "fit"}))
    origin = store.register_origin("step", logs_of(event, store.id), {"zenml.run.name": "monday"})
    record = logging.LogRecord("train", logging.INFO, "/code/train.py", 42, "hello", (), None, "fit")
    store.emit(origin, record, {"step": "fit"})
    store.flush()
    store.deactivate()
    exporter.export([event])
    theirs, ours = server.seen()["entries"]
    own = {"timestamp", "zenml.log_store.id", "zenml.log_store.name", "service.instance.id"}
    for name, value in theirs.items():
        if name not in own and not name.startswith("telemetry.sdk."):
            assert ours[name] == value


def test_what_was_sent_is_found_later(server: Datadog, exporter: Exporter, reader: Reader) -> None:
    server.control(found_after_seconds=0.5)
    (event,) = lately(make_events(["hello"]))
    exporter.export([event])
    assert entries(reader, logs_of(event)) == []
    wait_until(lambda: bool(entries(reader, logs_of(event))), "it is found")


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (400, RejectedError),
        (403, UnavailableError),
        (408, RetryableError),
        (413, TooLargeError),
        (429, RetryableError),
        (500, RetryableError),
        (503, RetryableError),
    ],
)
def test_answers_to_the_exporter(server: Datadog, exporter: Exporter, status: int, error: type[Exception]) -> None:
    (event,) = lately(make_events(["hello"]))
    server.fail("intake", status)
    with pytest.raises(error) as caught:
        exporter.export([event])
    assert getattr(caught.value, "retry_after_seconds", 7) == (7 if status in (403, 400, 413, 429) else None)
    # One request and one answer: it does not try again by itself.
    assert server.seen()["statuses"]["intake"] == [status]
    assert exporter.export([event]) == 0
    assert len(server.seen()["entries"]) == 1


def test_answers_to_the_reader(server: Datadog, reader: Reader) -> None:
    (event,) = make_events(["hello"])
    for status, error in ((400, LogStoreError), (429, LogStoreRateLimitError), (503, LogStoreUnavailableError)):
        server.fail("search", status)
        with pytest.raises(error) as caught:
            entries(reader, logs_of(event))
        assert type(caught.value) is error
        assert getattr(caught.value, "retry_after", 7) == 7


def test_wrong_keys(server: Datadog) -> None:
    (event,) = lately(make_events(["hello"]))
    exporter = make_config(server, api_key="wrong-key").create_exporter()
    with pytest.raises(UnavailableError, match="403") as caught:
        exporter.export([event])
    assert "wrong-key" not in str(caught.value)
    exporter.close()
    for settings in ({"api_key": "wrong-key"}, {"application_key": "wrong-key"}):
        with pytest.raises(LogStoreError, match="403") as refused:
            entries(make_config(server, **settings).create_reader(), logs_of(event))
        assert "wrong-key" not in str(refused.value)


def test_nobody_is_there(server: Datadog) -> None:
    config = make_config(server, endpoint="http://127.0.0.1:9/api/v2/logs", api_endpoint="http://127.0.0.1:9")
    (event,) = lately(make_events(["hello"]))
    exporter = config.create_exporter()
    with pytest.raises(RetryableError, match=r"127\.0\.0\.1"):
        exporter.export([event])
    exporter.close()
    with pytest.raises(LogStoreUnavailableError):
        entries(config.create_reader(), logs_of(event))


def test_no_answer_in_time(server: Datadog) -> None:
    server.control(answer_after_seconds=2)
    (event,) = lately(make_events(["hello"]))
    exporter = make_config(server, export_timeout_millis=200).create_exporter()
    with pytest.raises(RetryableError, match="in time"):
        exporter.export([event])
    assert not server.seen()["entries"]
    exporter.close()
    # It is taken all the same, and must not come in the midst of another test.
    wait_until(lambda: bool(server.seen()["entries"]), "it is taken")


def test_through_a_proxy(server: Datadog, monkeypatch: pytest.MonkeyPatch) -> None:
    # The stand-in takes requests as a proxy gets them, too; nobody else knows these hosts.
    monkeypatch.delenv("NO_PROXY")
    monkeypatch.setenv("http_proxy", f"http://me:password@127.0.0.1:{server.port}")
    config = make_config(server, endpoint="http://intake.invalid/api/v2/logs", api_endpoint="http://api.invalid")
    (event,) = lately(make_events(["hello"]))
    exporter = config.create_exporter()
    exporter.export([event])
    exporter.close()
    assert [entry.message for entry in entries(config.create_reader(), logs_of(event))] == ["hello"]


def test_certificates(server: Datadog, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    bundle = tmp_path / "authority.pem"
    authority.cert_pem.write_to_path(str(bundle))
    (event,) = lately(make_events(["hello"]))
    with TlsProxy(context, server.port) as proxy:
        url = f"https://127.0.0.1:{proxy.port}"
        config = make_config(server, endpoint=f"{url}/api/v2/logs", api_endpoint=url)
        exporter = config.create_exporter()
        with pytest.raises(UnavailableError, match="REQUESTS_CA_BUNDLE"):
            exporter.export([event])
        exporter.close()
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(bundle))
        exporter = config.create_exporter()
        exporter.export([event])
        exporter.close()
        assert [entry.message for entry in entries(config.create_reader(), logs_of(event))] == ["hello"]


def test_a_batch_that_is_too_large_goes_through_in_parts(server: Datadog, exporter: Exporter) -> None:
    events = lately(make_events(["x" * 600_000] * 10))

    def export(batch: list[LogEvent]) -> None:
        # As the delivery does.
        try:
            exporter.export(batch)
        except TooLargeError:
            export(batch[: len(batch) // 2])
            export(batch[len(batch) // 2 :])

    export(events)
    seen = server.seen()
    assert [entry["zenml.log.sequence"] for entry in seen["entries"]] == list(range(10))
    assert seen["statuses"]["intake"] == [202, 202]
    assert seen["truncated"] == 0


def test_a_huge_message_is_shortened_and_counted(server: Datadog, exporter: Exporter, reader: Reader) -> None:
    (event,) = lately(make_events(["x" * 5_000_000]))
    assert exporter.export([event]) == 1
    assert server.seen()["truncated"] == 0
    (entry,) = entries(reader, logs_of(event))
    assert 900_000 < len(entry.message) < 1_000_000
    assert "shortened by" in entry.message[-50:]


def test_old_events_are_rejected_where_datadog_would_drop_them(server: Datadog, exporter: Exporter) -> None:
    old, young = lately(make_events(["old", "young"]))
    old = old._replace(time_unix_nano=old.time_unix_nano - 18 * 3600 * 1_000_000_000)
    with pytest.raises(RejectedError, match="older than 18 hours") as caught:
        exporter.export([old, young])
    assert caught.value.count == 1
    seen = server.seen()
    assert seen["dropped"] == 0
    assert [entry["message"] for entry in seen["entries"]] == ["young"]


def test_what_it_has_stored_survives_the_stand_in(exporter: Exporter) -> None:
    with Datadog() as server:
        exporter = make_config(server).create_exporter()
        reader = make_config(server).create_reader()
        first, second = lately(make_events(["first", "second"]))
        exporter.export([first])
        server.kill()
        with pytest.raises(RetryableError):
            exporter.export([second])
        with pytest.raises(LogStoreUnavailableError):
            entries(reader, logs_of(first))
        server.start()
        exporter.export([second])
        assert [entry.message for entry in entries(reader, logs_of(first))] == ["first", "second"]
        exporter.close()


def send(server: Datadog, body: bytes, **headers: str) -> int:
    headers = {"DD-API-KEY": API_KEY, "Content-Type": "application/json", **headers}
    return requests.post(server.settings["endpoint"], data=body, headers=headers, timeout=30).status_code


def test_the_stand_in_holds_to_datadogs_limits(server: Datadog) -> None:
    log = {"message": "x", "timestamp": time.time_ns() // 1_000_000}
    assert send(server, orjson.dumps([log])) == 202
    assert send(server, gzip.compress(orjson.dumps(log)), **{"Content-Encoding": "gzip"}) == 202
    assert send(server, orjson.dumps([log]), **{"Content-Encoding": "gzip"}) == 400
    assert send(server, orjson.dumps([log]), **{"DD-API-KEY": ""}) == 401
    assert send(server, b"[") == 400
    assert send(server, orjson.dumps([{"message": 1}])) == 400
    assert send(server, orjson.dumps([log] * 1_000)) == 202
    assert send(server, orjson.dumps([log] * 1_001)) == 413
    assert send(server, b" " * MAX_REQUEST_BYTES + b"[]") == 413
    server.control(forget=True)
    assert send(server, orjson.dumps([{**log, "message": "x" * 1_000_001}])) == 202
    assert send(server, orjson.dumps([{**log, "timestamp": log["timestamp"] - 18 * 3_600_000 - 1_000}])) == 202
    seen = server.seen()
    assert (seen["truncated"], seen["dropped"], len(seen["entries"])) == (1, 1, 1)


@pytest.mark.parametrize(
    "body",
    [
        {"page": {"limit": 1_001}},
        {"page": {"limit": 0}},
        {"sort": "message"},
        {"filter": {"query": "service:zenml OR @a:b"}},
        {"filter": {"query": '@a:b OR service:"zenml"'}},
        {"filter": {"from": "yesterday"}},
    ],
)
def test_the_stand_in_refuses_searches_that_it_does_not_know(server: Datadog, body: dict[str, Any]) -> None:
    headers = {"DD-API-KEY": API_KEY, "DD-APPLICATION-KEY": APPLICATION_KEY}
    url = f"{server.url}/api/v2/logs/events/search"
    assert requests.post(url, json=body, headers=headers, timeout=30).status_code == 400
    assert requests.post(url, json=body, headers={"DD-API-KEY": API_KEY}, timeout=30).status_code == 403
