"""What is special about Loki and VictoriaLogs: an OTLP child sends to stand-ins of them, and its reader reads."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import orjson
import pytest
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from zenml.enums import LoggingLevels
from zenml.models import LogsResponse

from composite_logstore import (
    ExceptionInfo,
    LogEvent,
    PageRequest,
    ReadEntry,
    RejectedError,
    Scanner,
    Stream,
    operations,
)
from composite_logstore.testing import make_events, make_logs, make_stream
from composite_logstore.zenml import LogsEntriesFilter, LogStoreError, LogStoreRateLimitError, LogStoreUnavailableError
from composite_logstore_loki.reader import LokiReader
from composite_logstore_otlp.config import OtlpChildConfig
from composite_logstore_victorialogs.config import VictoriaLogsReaderConfig
from tests import simulation
from tests.artifact_stores import FolderArchive
from tests.copying import move_there_and_back
from tests.servers.loki import QUERY, Loki
from tests.servers.standin import StandIn
from tests.servers.victorialogs import NO_MESSAGE, VictoriaLogs
from tests.servers.victorialogs import QUERY as SELECT
from tests.simulated_zenml import SimulatedZenML

pytestmark = pytest.mark.integration

SECOND = 1_000_000_000
DAY = 86_400 * SECOND


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def loki() -> Iterator[Loki]:
    with Loki() as server:
        yield server


@pytest.fixture
def victorialogs() -> Iterator[VictoriaLogs]:
    with VictoriaLogs() as server:
        yield server


def loki_child(loki: Loki, read: dict[str, Any] | None = None, **settings: Any) -> OtlpChildConfig:
    section = {"type": "loki", "query_url": loki.url, **(read or {})}
    return OtlpChildConfig(name="loki", type="otlp", endpoint=f"{loki.url}/otlp/v1/logs", read=section, **settings)


def victoria_child(server: VictoriaLogs, read: dict[str, Any] | None = None, **settings: Any) -> OtlpChildConfig:
    section = {"type": "victorialogs", "url": server.url, **(read or {})}
    endpoint = f"{server.url}/insert/opentelemetry/v1/logs"
    return OtlpChildConfig(name="victoria", type="otlp", endpoint=endpoint, read=section, **settings)


def send(child: OtlpChildConfig, events: Sequence[LogEvent]) -> None:
    exporter = child.create_exporter()
    try:
        exporter.export(events)
    finally:
        exporter.close()


def read(
    child: OtlpChildConfig, stream: Stream | LogsResponse, direction: Any = "newer", limit: int = 1_000, **filter_: Any
) -> list[ReadEntry]:
    """All entries, oldest first."""
    logs = make_logs(stream) if isinstance(stream, Stream) else stream
    reader = child.create_reader()
    found: list[ReadEntry] = []
    token: str | None = None
    for _ in range(100):
        page = reader.read(PageRequest(logs, direction, token, limit, LogsEntriesFilter(**filter_)))
        found = [*found, *page.entries] if direction == "newer" else [*page.entries, *found]
        token = page.newer if direction == "newer" else page.older
        if token is None or (direction == "newer" and not page.entries):
            reader.close()
            return found
    raise AssertionError("the pages have no end")


def messages(entries: Sequence[ReadEntry]) -> list[str]:
    return [read.entry.message for read in entries]


def sequences(entries: Sequence[ReadEntry]) -> list[int]:
    return [read.event.sequence for read in entries if read.event is not None]


def foreign(child: OtlpChildConfig, logs_id: str, body: str) -> bytes:
    """A record that another program has written to the stream."""
    request = ExportLogsServiceRequest()
    resource_logs = request.resource_logs.add()
    resource_logs.resource.attributes.add(key="service.name").value.string_value = "zenml"
    record = resource_logs.scope_logs.add().log_records.add(time_unix_nano=time.time_ns(), severity_number=17)
    record.body.string_value = body
    record.attributes.add(key="zenml.log.id").value.string_value = logs_id
    return request.SerializeToString()


# Both


@pytest.mark.parametrize("direction", ["newer", "older"])
@pytest.mark.parametrize("kind", ["loki", "victorialogs"])
def test_a_nanosecond_may_have_more_events_than_an_answer(
    kind: str, direction: str, loki: Loki, victorialogs: VictoriaLogs, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = loki_child(loki) if kind == "loki" else victoria_child(victorialogs)
    server: StandIn = loki if kind == "loki" else victorialogs
    monkeypatch.setattr("composite_logstore_loki.reader.LokiReader.max_records", 40)
    monkeypatch.setattr("composite_logstore_victorialogs.reader.VictoriaLogsReader.max_records", 40)
    stream = make_stream()
    events = [event._replace(time_unix_nano=time.time_ns() // DAY * DAY) for event in make_events(["x"] * 240, stream)]
    other = make_events(["y"] * 60, stream, writer="fedcba987654321")
    other = [event._replace(time_unix_nano=events[0].time_unix_nano) for event in other]
    logs = make_logs(stream)
    logs.get_body().created = datetime.now(timezone.utc).replace(tzinfo=None) - timedelta(days=2)
    send(child, [*events[:140], *other])
    send(child, events[100:])

    asked = len(server.asked)
    found = read(child, logs, direction, 60)
    assert [read.event for read in found] == [(e.writer, e.sequence) for e in (*events, *other)]
    # Each of some 20 pages has a search that is full, those for the writers, and those for parts of a writer's events.
    assert len(server.asked) - asked < 20 * 12


@pytest.mark.parametrize("kind", ["loki", "victorialogs"])
@pytest.mark.parametrize(
    ("search", "wanted"),
    [
        ("LOSS", ["the loss", "Loss: 0.1"]),
        ('"\\', ['a "\\" b']),
        ("\n", ["two\nlines", "failed\nValueError: out of [range]\ntraceback"]),
        ("a|b", ["a|b"]),
        ("of [range]", ["failed\nValueError: out of [range]\ntraceback"]),
        ("i", ["İstanbul", "two\nlines", "failed\nValueError: out of [range]\ntraceback"]),
        ("straße", ["Straße", "STRASSE, no: STRAßE"]),
        ("{{", ["{{ .x }}"]),
        ("nowhere", []),
    ],
)
def test_a_text_is_found_whatever_it_has(
    kind: str, search: str, wanted: list[str], loki: Loki, victorialogs: VictoriaLogs
) -> None:
    child = loki_child(loki) if kind == "loki" else victoria_child(victorialogs)
    texts = ["the loss", "Loss: 0.1", 'a "\\" b', "a|b", "İstanbul", "Straße", "STRASSE, no: STRAßE", "{{ .x }}"]
    texts += ["two\nlines", ""]
    events = make_events(texts)
    error = ExceptionInfo("ValueError", "out of [range]", "traceback")
    failed = make_events(["failed"], events[0].stream, len(events), exception=error)
    send(child, [*events, *failed])

    for direction in ("newer", "older"):
        assert sorted(messages(read(child, events[0].stream, direction, search=search))) == sorted(wanted)


@pytest.mark.parametrize("kind", ["loki", "victorialogs"])
def test_other_programs_records_are_shown_and_other_streams_are_not(
    kind: str, loki: Loki, victorialogs: VictoriaLogs
) -> None:
    child = loki_child(loki) if kind == "loki" else victoria_child(victorialogs)
    events = make_events(["ours"])
    send(child, events)
    send(child, make_events(["of another stream"]))
    payload = foreign(child, str(events[0].stream.id), "of another program")
    loki.push(payload) if kind == "loki" else victorialogs.insert(payload)

    found = read(child, events[0].stream)
    assert messages(found) == ["ours", "of another program"]
    assert found[1].event is None
    assert found[1].entry.level is LoggingLevels.ERROR


@pytest.mark.parametrize("kind", ["loki", "victorialogs"])
def test_levels_are_those_of_the_events(kind: str, loki: Loki, victorialogs: VictoriaLogs) -> None:
    child = loki_child(loki) if kind == "loki" else victoria_child(victorialogs)
    levels = {5: "Level 5", 10: "DEBUG", 20: "INFO", 25: "NOTICE", 35: "INFO", 40: "ERROR", 45: "ALARM", 50: "CRITICAL"}
    stream = make_stream()
    for number, (level, name) in enumerate(levels.items()):
        send(child, make_events([name], stream, number, level=level, level_name=name))

    found = read(child, stream)
    assert [read.entry.level.value for read in found if read.entry.level] == [0, 10, 20, 20, 30, 40, 40, 50]
    assert sequences(read(child, stream, level=LoggingLevels.WARNING)) == [4, 5, 6, 7]
    assert sequences(read(child, stream, "older", level=LoggingLevels.ERROR)) == [5, 6, 7]


@pytest.mark.parametrize("kind", ["loki", "victorialogs"])
def test_a_refusal_gives_the_server_s_reason_without_keys(kind: str, loki: Loki, victorialogs: VictoriaLogs) -> None:
    section = {"api_key": "top-secret"}
    child = loki_child(loki, section) if kind == "loki" else victoria_child(victorialogs, section)
    (loki if kind == "loki" else victorialogs).fail(
        QUERY if kind == "loki" else SELECT, 400, b"too many unhealthy instances\nfor Bearer top-secret"
    )
    with pytest.raises(LogStoreError, match="too many unhealthy instances for") as error:
        read(child, make_stream())
    assert "top-secret" not in str(error.value)


@pytest.mark.parametrize("kind", ["loki", "victorialogs"])
def test_a_wrong_url_is_named(kind: str, loki: Loki, victorialogs: VictoriaLogs) -> None:
    if kind == "loki":
        child, setting = loki_child(loki, {"query_url": f"{loki.url}/grafana"}), "read.query_url"
    else:
        child, setting = victoria_child(victorialogs, {"url": f"{victorialogs.url}/vmui"}), "read.url"

    with pytest.raises(LogStoreError, match=setting):
        read(child, make_stream())


def test_the_credentials_are_those_of_the_section(loki: Loki, victorialogs: VictoriaLogs) -> None:
    secret = {"username": "12345", "password": "top-secret"}
    loki.user = victorialogs.user = ("12345", "top-secret")
    for child, wrong in (
        (loki_child(loki, secret), loki_child(loki, {**secret, "password": "top-secret-2"})),
        (victoria_child(victorialogs, secret), victoria_child(victorialogs, {**secret, "password": "top-secret-2"})),
    ):
        assert read(child, make_stream()) == []
        with pytest.raises(LogStoreError, match=r"read\.password") as error:
            read(wrong, make_stream())
        assert "top-secret" not in str(error.value)


@pytest.mark.parametrize("kind", ["loki", "victorialogs"])
def test_a_stream_moves_from_an_archive_and_back(
    kind: str, loki: Loki, victorialogs: VictoriaLogs, tmp_path: Path
) -> None:
    child = loki_child(loki) if kind == "loki" else victoria_child(victorialogs)

    def with_more(stream: Stream) -> list[LogEvent]:
        return make_events(["with more"], stream, 301, attributes={"epoch": 3, "a.b": "c"})

    move_there_and_back(child, tmp_path, with_more)


@pytest.mark.parametrize("kind", ["loki", "victorialogs"])
def test_what_a_log_store_delivers_is_fetched(kind: str, loki: Loki, victorialogs: VictoriaLogs) -> None:
    """Two processes write to one stream: two log stores, with a writer each."""
    child = loki_child(loki) if kind == "loki" else victoria_child(victorialogs)
    stores = [simulation.make_store(child) for _ in range(2)]
    logs = simulation.make_logs(stores[0])
    logs.get_body().created = datetime.now(timezone.utc).replace(tzinfo=None)
    for number, store in enumerate(stores):
        origin = store.register_origin("step", logs, {})
        for message in range(40):
            text = f"message {message} of {number}"
            record = logging.LogRecord("train", logging.WARNING, "/code/train.py", 42, text, (), None, "fit")
            store.emit(origin, record)
        store.deregister_origin(origin)
    page = stores[0].fetch(logs, start="oldest", limit=30)
    entries = list(page.items)
    # On a busy machine a page may be empty and not the last one.
    for _ in range(20):
        if page.after is None or len(entries) >= 80:
            break
        page = stores[0].fetch(logs, after=page.after)
        entries += page.items
    for store in stores:
        assert store.stats()[child.name]["delivered"] == 40
        store.cleanup()

    for number in range(2):
        own = [entry.message for entry in entries if entry.message.endswith(f"of {number}")]
        assert own == [f"message {message} of {number}" for message in range(40)]
    assert len(entries) == 80


def test_a_scan_waits_for_a_backend_that_asks_for_a_pause(loki: Loki, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(LokiReader, "_sleep", lambda self, seconds: waits.append(seconds))
    monkeypatch.setattr(LokiReader, "max_records", 10)
    child = loki_child(loki)
    events = make_events([str(number) for number in range(35)])
    send(child, events)
    reader = child.create_reader()
    assert isinstance(reader, Scanner)
    found: list[int] = []
    for chunk in reader.scan(make_logs(events[0].stream)):
        found += chunk.sequences
        if len(found) < 20:
            loki.fail(QUERY, 429, b"too many outstanding requests", headers={"Retry-After": "7"})
            loki.fail(QUERY, 503)
    assert found == list(range(35))
    assert waits[:2] == [7, 1]

    waits.clear()
    loki.fail(QUERY, 429, times=100)
    with pytest.raises(LogStoreRateLimitError):
        list(reader.scan(make_logs(events[0].stream)))
    assert waits == [2, 4, 8]
    reader.close()


def test_backfill_and_verify_say_which_events_a_backend_drops(
    victorialogs: VictoriaLogs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZENML_CONFIG_PATH", str(tmp_path / "zenml"))
    # Verify waits so long for what may still arrive.
    monkeypatch.setattr(VictoriaLogsReaderConfig, "delay_seconds", 0.0)
    zenml = SimulatedZenML.take_place(monkeypatch)
    archive = FolderArchive.model_validate(
        {"name": "archive", "type": "artifact", "root": str(tmp_path / "archive"), "is_file": True}
    )
    store = zenml.register(archive, victoria_child(victorialogs))
    stream = Stream(zenml.open_stream(zenml.begin_step(zenml.begin_run("r"), "fit"), "step", store.id).id, {}, None)
    stream.metadata["zenml.log.id"] = str(stream.id)
    events = make_events(["old", "new"], stream, start_unix_nano=time.time_ns() - 8 * DAY, step_nanos=8 * DAY)
    exporter = archive.create_exporter()
    exporter.export(events)
    exporter.close()
    notices: list[str] = []
    operations.backfill("logs", "archive", "victoria", progress=lambda now: notices.append(now.notice))
    assert any("-retentionPeriod" in notice for notice in notices)

    summary = operations.verify("logs")
    assert summary.children["victoria"].missing == 1
    assert ["-retentionPeriod" in hint for hint in summary.hints] == [True]
    assert summary.as_dict()["hints"] == summary.hints


# Loki


def test_grafana_cloud_has_two_hosts(loki: Loki) -> None:
    loki.tells, loki.user = False, ("1", "write-token")
    with Loki(loki) as query:
        query.takes, query.user = False, ("1", "read-token")
        child = loki_child(
            loki,
            {"query_url": f"{query.url}/", "username": "1", "password": "read-token"},
            headers={"Authorization": "Basic MTp3cml0ZS10b2tlbg=="},
        )
        events = make_events(["a", "b"])
        send(child, events)
        assert messages(read(child, events[0].stream)) == ["a", "b"]


def test_a_tenant_sees_its_own(loki: Loki) -> None:
    loki.multi_tenant = True
    one = loki_child(loki, {"tenant_id": "one"}, headers={"X-Scope-OrgID": "one"})
    events = make_events(["a"])
    send(one, events)

    assert messages(read(one, events[0].stream)) == ["a"]
    assert read(loki_child(loki, {"tenant_id": "two"}), events[0].stream) == []
    assert messages(read(loki_child(loki, {"tenant_id": "one|two"}), events[0].stream)) == ["a"]
    with pytest.raises(LogStoreError, match=r"read\.tenant_id"):
        read(loki_child(loki), events[0].stream)


def test_a_stream_may_be_longer_than_a_query(loki: Loki) -> None:
    loki.rejects_after_seconds = None
    child = loki_child(loki)
    now = time.time_ns()
    stream = make_stream()
    # The youngest first: Loki takes nothing that is an hour older, unless it has labels of its own.
    events = make_events(["a", "b", "c"], stream, start_unix_nano=now - 65 * DAY, step_nanos=32 * DAY)
    send(child, events)
    logs = make_logs(stream)
    logs.get_body().created = datetime.now(timezone.utc).replace(tzinfo=None) - timedelta(days=66)

    for direction in ("newer", "older"):
        assert messages(read(child, logs, direction, 1)) == ["a", "b", "c"]
        assert messages(read(child, logs, direction)) == ["a", "b", "c"]


@pytest.mark.parametrize("direction", ["newer", "older"])
def test_a_search_that_comes_to_no_end_is_no_empty_stream(
    loki: Loki, direction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LokiReader, "longest_nanos", SECOND)
    child = loki_child(loki)
    events = make_events(["a"])
    send(child, events)
    with pytest.raises(LogStoreUnavailableError):
        read(child, events[0].stream, direction)
    assert len(loki.asked) < 200


def test_a_server_may_allow_fewer_entries(loki: Loki) -> None:
    loki.max_entries = 40
    child = loki_child(loki)
    events = make_events([str(number) for number in range(150)])
    send(child, events)
    for direction in ("newer", "older"):
        assert sequences(read(child, events[0].stream, direction)) == list(range(150))


def test_old_events_are_refused_with_loki_s_reason(loki: Loki) -> None:
    child = loki_child(loki)
    events = make_events(["old"], start_unix_nano=time.time_ns() - 8 * DAY)
    with pytest.raises(RejectedError, match="too old"):
        send(child, events)
    assert child.read is not None
    assert "reject_old_samples_max_age" in str(child.read.known_losses)


@pytest.mark.parametrize(("merges_lines", "wanted"), [(True, [0]), (False, [0, 1])])
def test_before_3_7_equal_lines_of_one_time_are_one(loki: Loki, merges_lines: bool, wanted: list[int]) -> None:
    loki.merges_lines = merges_lines
    child = loki_child(loki)
    events = make_events(["same", "same"], step_nanos=0)
    send(child, events)
    assert sequences(read(child, events[0].stream)) == wanted


def test_an_id_that_loki_drops_is_named(loki: Loki) -> None:
    child = loki_child(loki)
    events = make_events(["a"])
    assert read(child, events[0].stream) == []
    loki.drops = {"zenml.log.id"}
    send(child, events)

    with pytest.raises(LogStoreError, match=r"zenml_log_id.*otlp_config"):
        read(child, events[0].stream)
    # A filter may leave nothing, and the events of other streams prove nothing.
    assert read(child, events[0].stream, search="x") == []
    loki.drops = set()
    send(child, make_events(["b"]))
    assert read(child, events[0].stream) == []


def test_a_proxy_may_drop_the_header_for_metadata(loki: Loki, monkeypatch: pytest.MonkeyPatch) -> None:
    child = loki_child(loki)
    events = make_events(["a", "b"], levels=[30, 40])
    send(child, events)
    answer = loki.answer

    def without_header(asked: Any) -> Any:
        asked.headers.pop("x-loki-response-encoding-flags", None)
        return answer(asked)

    monkeypatch.setattr(loki, "answer", without_header)
    found = read(child, events[0].stream)
    assert [(read.entry.message, read.entry.level, read.event) for read in found] == [
        ("a", LoggingLevels.WARNING, (events[0].writer, 0)),
        ("b", LoggingLevels.ERROR, (events[1].writer, 1)),
    ]


@pytest.mark.parametrize(
    "body",
    [
        {"status": "error", "error": "boom"},
        {"status": "success", "data": {"resultType": "matrix", "result": []}},
        {"status": "success", "data": {"resultType": "streams", "result": [{"stream": {}, "values": [["x", "y"]]}]}},
        {"status": "success", "data": {"resultType": "streams", "result": [{"stream": {}, "values": [["1", 5]]}]}},
        {
            "status": "success",
            "data": {"resultType": "streams", "result": [{"stream": {"flags": 1}, "values": [["1"]]}]},
        },
        [],
        None,
    ],
)
def test_an_answer_that_is_no_list_of_entries_is_an_error(loki: Loki, body: Any) -> None:
    loki.fail(QUERY, 200, orjson.dumps(body))
    with pytest.raises(LogStoreError, match=r"read\.query_url"):
        read(loki_child(loki), make_stream())


def test_values_of_any_shape_are_an_entry_or_an_error(loki: Loki) -> None:
    stream = make_stream()
    values: list[Any] = [[str(time.time_ns()), "line", {"structuredMetadata": {"zenml_log_id": str(stream.id)}}]]
    for odd in (1, None, [], {"a": 1}):
        metadata = {"zenml_log_id": str(stream.id), "severity_text": odd, "scope_name": odd, "zenml_log_writer": odd}
        answer = {
            "resultType": "streams",
            "result": [{"stream": {}, "values": [*values, [values[0][0], "odd", {"structuredMetadata": metadata}]]}],
        }
        loki.fail(QUERY, 200, orjson.dumps({"status": "success", "data": answer}), times=2)
        reader = loki_child(loki).create_reader()
        assert isinstance(reader, LokiReader)
        try:
            page = reader.read(PageRequest(make_logs(stream), "older", None, 10, LogsEntriesFilter()))
        except LogStoreError:
            continue
        finally:
            loki.mend()
        assert "line" in messages(page.entries)


# VictoriaLogs


def test_without_its_attribute_the_severity_is_known_by_its_name(victorialogs: VictoriaLogs) -> None:
    child = victoria_child(victorialogs)
    sender = OtlpChildConfig(name="sender", type="otlp", endpoint=child.endpoint)
    stream = make_stream()
    for number, name in enumerate(["DEBUG", "INFO", "WARNING", "ERROR"]):
        send(sender, make_events([name], stream, number, level=10 + 10 * number, level_name=name))

    found = read(child, stream)
    assert [read.entry.level.name for read in found if read.entry.level] == ["DEBUG", "INFO", "WARN", "ERROR"]
    assert sequences(read(child, stream, level=LoggingLevels.WARNING)) == [2, 3]


@pytest.mark.parametrize("prefixes", [False, True])
@pytest.mark.parametrize("numbers", [False, True])
def test_all_versions_are_read(victorialogs: VictoriaLogs, prefixes: bool, numbers: bool) -> None:
    victorialogs.prefixes, victorialogs.numbers = prefixes, numbers
    child = victoria_child(victorialogs)
    texts = ["", "b", f"{NO_MESSAGE}: said by somebody"]
    events = make_events(texts, levels=[30, 20, 40])
    events = [event._replace(logger_name=name) for event, name in zip(events, ["", "unknown", "train"], strict=True)]
    send(child, events)

    found = read(child, events[0].stream)
    assert messages(found) == texts
    assert [read.entry.name for read in found] == [None, "unknown", "train"]
    assert sequences(read(child, events[0].stream, level=LoggingLevels.WARNING)) == [0, 2]
    assert found[0].entry.filename == events[0].file


def test_what_its_retention_excludes_is_lost_without_an_error(victorialogs: VictoriaLogs) -> None:
    child = victoria_child(victorialogs)
    old = make_events(["old"], start_unix_nano=time.time_ns() - 8 * DAY)
    send(child, old)
    assert victorialogs.dropped == 1
    assert child.read is not None
    assert "retentionPeriod" in str(child.read.known_losses)


def test_an_id_that_victorialogs_drops_is_named(victorialogs: VictoriaLogs) -> None:
    child = victoria_child(victorialogs)
    events = make_events(["a"])
    assert read(child, events[0].stream) == []
    victorialogs.ignores = {"zenml.log.id"}
    send(child, events)

    with pytest.raises(LogStoreError, match=r"zenml\.log\.id"):
        read(child, events[0].stream)
    assert read(child, events[0].stream, search="x") == []
    # One entry that lost it does not make every silent stream an error.
    victorialogs.ignores = set()
    send(child, make_events(["of another stream"]))
    assert read(child, events[0].stream) == []


def test_its_tenants_are_numbers(victorialogs: VictoriaLogs) -> None:
    headers = {"AccountID": "3", "ProjectID": "7"}
    child = victoria_child(victorialogs, {"account_id": 3, "project_id": 7}, headers=headers)
    events = make_events(["a"])
    send(child, events)
    assert messages(read(child, events[0].stream)) == ["a"]
    assert read(victoria_child(victorialogs), events[0].stream) == []


@pytest.mark.parametrize(
    "end", [b"error: cannot execute query: timeout\n", b'{"_msg": "b", "_ti', b'{"_msg": 1}\n', b"[]\n", b'{"a":"b"}\n']
)
def test_an_error_in_the_middle_of_an_answer_is_an_error(victorialogs: VictoriaLogs, end: bytes) -> None:
    stream = make_stream()
    line = {"_msg": "a", "_time": "2026-01-01T00:00:00Z", "zenml.log.id": str(stream.id)}
    victorialogs.fail(SELECT, 200, orjson.dumps(line) + b"\n" + end)
    with pytest.raises(LogStoreError, match="broke off"):
        read(victoria_child(victorialogs), stream)
