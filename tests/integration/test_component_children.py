"""Children of type `component`: ZenML's own log stores and a colleague's, registered and used as they are."""

from __future__ import annotations

import json
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from uuid import UUID

import pytest
import requests
from zenml.client import Client
from zenml.constants import ENV_ZENML_SERVER
from zenml.enums import StackComponentType
from zenml.exceptions import DoesNotExistException, IllegalOperationError
from zenml.log_stores.artifact.artifact_log_store import remove_ansi_escape_codes
from zenml.log_stores.datadog import datadog_log_store
from zenml.stack import StackComponent

from composite_logstore import (
    CompositeLogStore,
    CompositeLogStoreConfig,
    Exporter,
    LogEvent,
    Page,
    PageRequest,
    ReadEntry,
    RetryableError,
    Stream,
    UnavailableError,
)
from composite_logstore.testing import (
    ExporterContract,
    Fault,
    ReaderContract,
    Received,
    SimulatedBackend,
    make_event,
    make_events,
    make_logs,
    make_stream,
)
from composite_logstore.testing.contract import walk
from composite_logstore.testing.reader_contract import fetched, walked
from composite_logstore.zenml import LogsEntriesFilter, LogStoreError, LogStoreUnavailableError
from composite_logstore_component.config import ComponentChildConfig
from composite_logstore_component.reader import ComponentReader
from tests import simulation
from tests.events import capture
from tests.own_flavor import OwnLogStore
from tests.patience import PATIENCE_SECONDS
from tests.servers.datadog import API_KEY, APPLICATION_KEY, Datadog
from tests.servers.s3 import s3_server
from tests.simulation import make_child, make_store
from tests.watching import wait_until

pytestmark = pytest.mark.integration

LOG_STORE = StackComponentType.LOG_STORE
ARTIFACT_STORE = StackComponentType.ARTIFACT_STORE


# No export is overdue because the machine has other things to do.
PATIENT: dict[str, Any] = {"schedule_delay_millis": 0, "export_timeout_millis": 60_000}


def component_child(component: str, **settings: Any) -> ComponentChildConfig:
    return ComponentChildConfig(
        **{"name": "theirs", "type": "component", "component": component, **PATIENT, **settings}
    )


@contextmanager
def registered(name: str, flavor: str, kind: StackComponentType = LOG_STORE, **settings: Any) -> Iterator[None]:
    Client().create_stack_component(name, flavor, kind, settings)
    try:
        yield
    finally:
        Client().delete_stack_component(name, kind)


@pytest.fixture(scope="module")
def datadog() -> Iterator[Datadog]:
    with Datadog() as server:
        yield server


@pytest.fixture(scope="module")
def flavors() -> Iterator[None]:
    """The flavors `own` and `composite`."""
    own = Client().create_flavor("tests.own_flavor.OwnLogStoreFlavor", LOG_STORE)
    composite = Client().create_flavor("composite_logstore.CompositeLogStoreFlavor", LOG_STORE)
    yield
    Client().delete_flavor(str(own.id))
    Client().delete_flavor(str(composite.id))


@pytest.fixture
def own(flavors: None) -> Iterator[None]:
    """A log store of the flavor `own`."""
    OwnLogStore.waiting.clear()
    OwnLogStore.kept.clear()
    OwnLogStore.origins.clear()
    with registered("own", "own", prefix="> "):
        yield


def emit(store: CompositeLogStore, messages: Sequence[str]) -> Any:
    logs = simulation.make_logs(store)
    origin = store.register_origin(str(logs.id), logs, {})
    for number, message in enumerate(messages):
        record = logging.LogRecord("train", logging.INFO, "/a.py", 1, message, (), None)
        # A millisecond apart, and not in the future.
        record.created += (number - len(messages)) / 1_000
        store.emit(origin, record)
    store.deregister_origin(origin)
    return logs


def composite(child: ComponentChildConfig, **settings: Any) -> CompositeLogStore:
    return make_store(make_child("archive", SimulatedBackend()), child, **settings)


def said(store: CompositeLogStore, logs: Any, **arguments: Any) -> list[str]:
    return [entry.message for entry in store.fetch(logs, **arguments).items]


class KnownByMessage(ComponentChildConfig):
    """A child whose reader gives each entry the id of the event with its message.

    ZenML's log stores do not keep which event an entry is, and the kit has to know.
    """

    uids: ClassVar[dict[tuple[UUID, str], str]] = {}

    def create_exporter(self) -> Exporter:
        exporter = super().create_exporter()
        export = exporter.export

        def noting(batch: Sequence[LogEvent]) -> int:
            self.uids.update({(event.stream.id, event.message): event.uid for event in batch})
            return export(batch)

        exporter.export = noting  # type: ignore[method-assign]
        return exporter

    def create_reader(self) -> ComponentReader:
        reader = super().create_reader()
        read = reader.read

        def knowing(request: PageRequest) -> Page:
            page = read(request)
            # A long message is in pieces, and one with colours has lost them.
            ids = [
                UUID(self.uids.get((request.logs.id, read.entry.message)) or str(read.entry.id))
                for read in page.entries
            ]
            known = [read.entry.model_copy(update={"id": id}) for read, id in zip(page.entries, ids, strict=True)]
            return replace(page, entries=[ReadEntry(entry, None) for entry in known])

        reader.read = knowing  # type: ignore[method-assign]
        return reader


def known_by_message(component: str, **settings: Any) -> ComponentChildConfig:
    return KnownByMessage(**{"name": "theirs", "type": "component", "component": component, **PATIENT, **settings})


class StockReading(ReaderContract):
    """What ZenML's log stores can do of it. They do not keep which event an entry is."""

    def test_the_newest_page_comes_first(self, reader: Any, fill: Any) -> None:
        events = make_events([f"message {number}" for number in range(10)])
        fill(events)
        newest = next(walk(reader, make_logs(events[0].stream), "older", 3))
        assert [read.entry.message for read in newest.entries] == [event.message for event in events[-3:]]
        assert newest.older is not None

    @pytest.mark.parametrize("start", ["oldest", "newest"])
    @pytest.mark.parametrize("limit", [4, 1_000])
    def test_what_arrived_twice_is_fetched_once(  # type: ignore[override]  # it is fetched twice
        self, child: Any, exporter: Any, received: Any, start: str, limit: int
    ) -> None:
        """It is not: what arrived twice is there twice. But nothing is missing."""
        events = make_events([f"message {number}" for number in range(14)])
        exporter.deliver(events[:8])
        exporter.close()
        exporter.deliver(events[4:])
        entries = [entry.message for entry in fetched(child, events[0].stream, start, limit)]
        assert len(entries) == 18
        assert sorted(set(entries)) == sorted(event.message for event in events)


# ZenML's own log store for Datadog


class TestDatadogLogStore(ExporterContract, StockReading):
    # It sends whole milliseconds.
    time_unit_nanos = 1_000_000

    def assert_same(self, found: Received, event: LogEvent) -> None:
        # ZenML's exporter calculates the milliseconds with floats, and some times are a millisecond early.
        super().assert_same(found, event._replace(time_unix_nano=int(event.time_unix_nano / 1e6) * 1_000_000))

    @pytest.fixture
    def child(self, datadog: Datadog, monkeypatch: pytest.MonkeyPatch) -> Iterator[ComponentChildConfig]:
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        search_the_stand_in(datadog, monkeypatch)
        datadog.control(forget=True)
        settings = {"api_key": API_KEY, "application_key": APPLICATION_KEY, "endpoint": datadog.settings["endpoint"]}
        with registered("stock-datadog", "datadog", **settings):
            yield known_by_message("stock-datadog")

    @pytest.fixture
    def received(self, datadog: Datadog) -> Callable[[Stream], list[Received]]:
        levels = {"debug": 10, "info": 20, "warn": 30, "error": 40, "fatal": 50}

        def look(stream: Stream) -> list[Received]:
            return [
                Received(
                    entry["log.record.uid"],
                    entry["zenml.log.writer"],
                    entry["zenml.log.sequence"],
                    entry["message"],
                    levels.get(entry["status"], 20),
                    entry["timestamp"] * 1_000_000,
                )
                for entry in datadog.seen()["entries"]
                if entry["zenml.log.id"] == str(stream.id)
            ]

        return look

    @pytest.fixture
    def faults(self, datadog: Datadog) -> Mapping[str, Fault]:
        @contextmanager
        def refusing(status: int) -> Iterator[None]:
            datadog.fail("intake", status, times=3)
            yield

        return {
            "wrong key": Fault(partial(refusing, 403), RetryableError),
            "malformed": Fault(partial(refusing, 400), RetryableError),
        }

    @pytest.mark.parametrize("what", ["reserved names"])
    def test_an_odd_event_arrives_as_it_is(self, exporter: Any, received: Any, what: str) -> None:
        """Its exporter raises for attributes of names that it uses itself: this is as far as it goes."""
        with pytest.raises(RetryableError, match=r"^the exporter raised TypeError"):
            exporter.deliver([make_event(attributes={"status": "mine"})])

    @pytest.mark.parametrize("direction", ["newer", "older"])
    @pytest.mark.parametrize("limit", [2, 1_000])
    def test_pages_lead_through_the_whole_stream(self, reader: Any, fill: Any, direction: Any, limit: int) -> None:
        """What is of one millisecond comes in any order."""
        stream = make_stream()
        events = make_events([f"message {number}" for number in range(15)], stream, step_nanos=250_000)
        fill(events)
        found = walked(reader, stream, direction, limit)
        millis = {event.uid: event.time_unix_nano // 1_000_000 for event in events}
        assert sorted(found) == sorted(millis)
        assert [millis[uid] for uid in found] == sorted(millis.values())


def search_the_stand_in(datadog: Datadog, monkeypatch: pytest.MonkeyPatch) -> None:
    """ZenML's log store knows only the search of a real site: here it is sent to the stand-in."""
    post = requests.post
    monkeypatch.setattr(
        datadog_log_store.requests,
        "post",
        lambda url, **settings: post(url.replace("https://api.datadoghq.com", datadog.url), **settings),
    )


def test_datadog_is_read_with_its_own_keys(datadog: Datadog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    search_the_stand_in(datadog, monkeypatch)
    datadog.control(forget=True)
    Client().create_secret("stock-datadog", {"api": API_KEY, "app": APPLICATION_KEY})
    settings = {"api_key": "{{stock-datadog.api}}", "application_key": "{{stock-datadog.app}}"}
    with registered("stock-datadog", "datadog", endpoint=datadog.settings["endpoint"], **settings):
        store = composite(component_child("stock-datadog"), primary="theirs")
        messages = [f"message {number}" for number in range(9)]
        logs = emit(store, messages)
        newest = store.fetch(logs, limit=4)
        older = store.fetch(logs, before=newest.before)
        assert [entry.message for entry in [*older.items, *newest.items]] == messages[1:]
        assert said(store, logs, start="oldest", limit=2) == messages[:2]
        assert said(store, logs, filter_=LogsEntriesFilter(search="message 7")) == ["message 7"]
        assert store.stats()["theirs"]["delivered"] == 9
    Client().delete_secret("stock-datadog")


# ZenML's own log store in an artifact store


@pytest.mark.deep
class TestArtifactLogStore(ExporterContract, StockReading):
    """It keeps messages and levels, and nothing by which an event could be known again."""

    @pytest.fixture
    def child(self, tmp_path: Path) -> Iterator[ComponentChildConfig]:
        with registered("stock-artifact", "local", ARTIFACT_STORE, path=str(tmp_path / "store")):
            yield known_by_message("stock-artifact")

    @pytest.fixture
    def received(self, child: ComponentChildConfig) -> Callable[[Stream], list[Received]]:
        def look(stream: Stream) -> list[Received]:
            reader = child.create_reader()
            request = PageRequest(make_logs(stream), "newer", None, reader.max_page_size, LogsEntriesFilter())
            messages: dict[Any, list[str]] = {}
            for number, (entry, _) in enumerate(reader.read(request).entries):
                # A long message is cut into pieces with the same id.
                messages.setdefault(entry.id if entry.total_chunks > 1 else number, []).append(entry.message)
            return [Received("", "", 0, "".join(pieces), 20, 0) for pieces in messages.values()]

        return look

    def assert_received(self, received: Any, events: Sequence[LogEvent], copies: bool = False) -> None:
        for stream in dict.fromkeys(event.stream for event in events):
            expected = [event for event in events if event.stream is stream]
            found = [event.message for event in received(stream)]
            if copies:
                found = list(dict.fromkeys(found))
            for writer in dict.fromkeys(event.writer for event in expected):
                sent = [as_archived(event) for event in expected if event.writer == writer]
                assert [message for message in found if message in sent] == sent
            assert len(found) == len(expected)

    def wait_for(self, received: Any, events: Sequence[LogEvent]) -> list[Received]:
        found = received(events[0].stream)[-len(events) :]
        return [event._replace(uid=sent.uid) for event, sent in zip(found, events, strict=True)]

    @pytest.fixture
    def faults(self, tmp_path: Path) -> Mapping[str, Fault]:
        @contextmanager
        def file_in_its_place() -> Iterator[None]:
            folder = tmp_path / "store"
            moved = folder.rename(tmp_path / "moved")
            folder.touch()
            yield
            folder.unlink()
            moved.rename(folder)

        return {"a file in the folder's place": Fault(file_in_its_place, RetryableError)}

    def test_a_fault_is_reported_and_outlived(self, child: Any, received: Any, faults: Any, caplog: Any) -> None:
        """One that has never worked cannot even load its artifact store then."""
        exporter = child.create_exporter()
        events = make_events(["a", "b"])
        exporter.export(events[:1])
        with faults["a file in the folder's place"].begin():
            with pytest.raises(RetryableError, match=r"reports a failure: Failed"):
                exporter.export(events[1:])
            with pytest.raises(UnavailableError, match="'component': 'stock-artifact' cannot be loaded here"):
                child.create_exporter()
        exporter.export(events[1:])
        self.assert_received(received, events)
        assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


def as_archived(event: LogEvent) -> str:
    """It leaves out colours, blanks at the end, and exceptions that say nothing."""
    text = event.text if event.exception is None or event.exception.message else event.message
    return str(remove_ansi_escape_codes(text)).rstrip()


def test_an_artifact_store_is_read_from_either_end(tmp_path: Path) -> None:
    with registered("stock-artifact", "local", ARTIFACT_STORE, path=str(tmp_path / "store")):
        store = composite(component_child("stock-artifact"), primary="theirs")
        messages = [f"message {number}" for number in range(9)]
        logs = emit(store, messages)
        assert said(store, logs) == messages
        newest = store.fetch(logs, limit=4)
        assert [entry.message for entry in newest.items] == messages[5:]
        older = store.fetch(logs, before=newest.before)
        assert [entry.message for entry in older.items] == messages[1:5]
        oldest = store.fetch(logs, start="oldest", limit=5)
        assert [entry.message for entry in oldest.items] == messages[:5]
        assert [entry.message for entry in store.fetch(logs, after=oldest.after).items] == messages[5:]
        with pytest.raises(ValueError, match="only reads a log file from its start"):
            store.fetch(logs, filter_=LogsEntriesFilter(search="7"))


def test_an_artifact_store_on_s3_is_written_and_read() -> None:
    with s3_server() as s3:
        settings = s3.artifact_store().config.model_dump(exclude_unset=True)
        with registered("stock-s3", "s3", ARTIFACT_STORE, **settings):
            store = composite(component_child("stock-s3"), primary="theirs")
            messages = [f"message {number}" for number in range(9)]
            logs = emit(store, messages[:4])
            origin = store.register_origin(str(logs.id), logs, {})
            for message in messages[4:]:
                store.emit(origin, logging.LogRecord("train", logging.INFO, "/a.py", 1, message, (), None))
            store.deregister_origin(origin)
            wait_until(lambda: store.stats()["theirs"]["delivered"] == 9, "all is delivered")
            assert said(store, logs) == messages


@pytest.mark.parametrize("token", ["nonsense", "-1", "…"])
def test_a_token_that_is_none_is_refused(tmp_path: Path, token: str) -> None:
    with registered("stock-artifact", "local", ARTIFACT_STORE, path=str(tmp_path / "store")):
        reader = ComponentReader("stock-artifact")
        with pytest.raises(ValueError, match="malformed"):
            reader.read(PageRequest(make_logs(make_stream()), "newer", token, 1, LogsEntriesFilter()))


# ZenML's own log store for OpenTelemetry


def test_what_an_otel_log_store_s_collector_refuses_is_known_and_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    # A conformant collector answers 400 to what this log store sends.
    answers = deque([400, 503, 400])
    received: list[tuple[int, str | None, Any]] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status = answers.popleft() if answers else 200
            received.append((status, self.headers["key"], payload))
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Collector) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_port}/v1/logs"
        with registered("stock-otel", "otel", endpoint=endpoint, headers={"key": "top-secret"}, service_name="mine"):
            store = composite(component_child("stock-otel", retry_initial_interval_millis=50))
            emit(store, ["hello"])
            wait_until(lambda: store.stats()["theirs"]["delivered"] == 1, "it is delivered")
        server.shutdown()
    assert [(status, key) for status, key, _ in received] == [(n, "top-secret") for n in (400, 503, 400, 200)]
    (resource,) = received[-1][2]["resource_logs"]
    assert {"key": "service.name", "value": {"string_value": "mine"}} in resource["resource"]["attributes"]
    (record,) = resource["scope_logs"][0]["log_records"]
    assert record["body"] == {"string_value": "hello"}
    assert "child 'theirs': backend unavailable: the exporter reports a failure" in caplog.text
    assert "Retrying" not in caplog.text


def test_an_otel_log_store_cannot_be_read_and_says_so() -> None:
    with registered("stock-otel", "otel", endpoint="http://127.0.0.1:9/v1/logs"):
        store = composite(component_child("stock-otel"), primary="theirs")
        with pytest.raises(LogStoreError, match=r"'stock-otel' of flavor 'otel' cannot be read\. Set another child"):
            store.fetch(emit(store, []))


# A colleague's own


def test_any_other_log_store_gets_each_event_once_with_its_identity_and_is_flushed(own: None) -> None:
    store = composite(component_child("own"), primary="theirs")
    logs = emit(store, ["one", "two"])
    assert store.stats()["theirs"]["delivered"] == 2
    assert [(id, record.getMessage()) for id, record, _ in OwnLogStore.kept] == [(logs.id, "one"), (logs.id, "two")]
    _, record, metadata = OwnLogStore.kept[0]
    assert (record.name, record.levelname, record.pathname, record.lineno) == ("train", "INFO", "/a.py", 1)
    assert metadata["zenml.log.sequence"] == 0
    assert metadata["zenml.log.source"] == "step"
    # With its own settings, and page by page.
    assert said(store, logs) == ["> one", "> two"]
    newest = store.fetch(logs, limit=1)
    assert [entry.message for entry in store.fetch(logs, before=newest.before).items] == ["> one"]
    store.writer.close(5.0)


def test_an_emit_that_raises_is_tried_again_from_there(own: None, monkeypatch: pytest.MonkeyPatch) -> None:
    exporter = component_child("own").create_exporter()
    events = make_events(["one", "two", "three"])
    monkeypatch.setattr(OwnLogStore, "error", ValueError("top-secret"))
    monkeypatch.setattr(OwnLogStore, "fails_at", "two")
    with pytest.raises(RetryableError, match=r"^log store 'own' raised ValueError$"):
        exporter.export(events)
    monkeypatch.setattr(OwnLogStore, "error", None)
    exporter.export(events)
    assert [record.getMessage() for _, record, _ in OwnLogStore.kept] == ["one", "two", "three"]


def test_an_exception_reaches_any_other_log_store_as_text(own: None) -> None:
    exporter = component_child("own").create_exporter()
    (event,) = make_events(["failed"])
    store = composite(component_child("own"))
    try:
        raise ValueError("out of range")
    except ValueError:
        record = logging.makeLogRecord({"msg": "failed", "exc_info": True})
        event = event._replace(exception=capture(record).exception)
    exporter.export([event])
    _, record, metadata = OwnLogStore.kept[0]
    assert "ValueError: out of range" in logging.Formatter().format(record)
    assert metadata["exception.type"] == "ValueError"
    assert store.stats()["theirs"]["accepted"] == 0


def test_origins_are_deregistered_with_their_streams_and_with_the_exporter(own: None) -> None:
    exporter = component_child("own").create_exporter()
    one, other = make_events(["one"])[0], make_events(["other"], first=1)[0]
    exporter.export([one, other])
    assert len(OwnLogStore.origins) == 2
    exporter.end_stream(one.stream)
    exporter.end_stream(one.stream)
    assert len(OwnLogStore.origins) == 1
    exporter.close()
    assert OwnLogStore.origins == []


def test_one_that_blocks_costs_the_others_nothing(own: None, monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    monkeypatch.setattr(OwnLogStore, "flush", lambda self, blocking=True: release.wait(PATIENCE_SECONDS))
    store = composite(component_child("own"), flush_timeout_millis=100)
    emit(store, ["hello"])
    wait_until(lambda: store.stats()["archive"]["delivered"] == 1, "the archive has it")
    assert store.stats()["theirs"]["pending"] == 1
    release.set()


def test_a_composite_can_be_a_child_of_another(own: None, tmp_path: Path) -> None:
    children = [{"name": "theirs", "type": "component", "component": "own"}]
    with registered("inner", "composite", primary="theirs", children=children):
        store = composite(component_child("inner"), primary="theirs")
        logs = emit(store, ["hello"])
        assert said(store, logs) == ["> hello"]


def test_on_the_server_whoever_may_not_read_the_component_does_not_read_through_it(
    own: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from zenml.zen_server import utils
    from zenml.zen_server.rbac import endpoint_utils

    asked: list[Any] = []

    def refuse(id: Any, get_method: Any) -> None:
        asked.append(id)
        raise IllegalOperationError("not yours")

    monkeypatch.setenv(ENV_ZENML_SERVER, "true")
    monkeypatch.setattr(utils, "zen_store", lambda: Client().zen_store)
    monkeypatch.setattr(endpoint_utils, "verify_permissions_and_get_entity", refuse)
    request = PageRequest(make_logs(make_stream()), "older", None, 10, LogsEntriesFilter())
    with pytest.raises(IllegalOperationError):
        ComponentReader("own").read(request)
    assert asked == [Client().get_stack_component(LOG_STORE, "own").id]


# Bad input


def registering(component: str) -> bool:
    children = [
        {"name": "archive", "type": "artifact"},
        {"name": "theirs", "type": "component", "component": component},
    ]
    return CompositeLogStoreConfig(primary="archive", children=children).is_valid


def test_a_component_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="child 'theirs': 'component': there is no log store 'nowhere'; name one that"):
        registering("nowhere")
    with pytest.raises(ValueError, match="'component': there is no log store '5ed6c1b1-"):
        registering("5ed6c1b1-1f3a-4d9c-9a36-21f3a9c3a111")
    with pytest.raises(UnavailableError, match="'component': there is no log store 'nowhere'"):
        component_child("nowhere").create_exporter()
    store = composite(component_child("nowhere"), primary="theirs")
    with pytest.raises(LogStoreUnavailableError, match="'component' of this child: there is no log store 'nowhere'"):
        store.fetch(emit(store, []))


def test_a_component_of_another_type_is_refused() -> None:
    with registered("kitchen", "local", StackComponentType.ORCHESTRATOR):
        id = str(Client().get_stack_component(StackComponentType.ORCHESTRATOR, "kitchen").id)
        for component in ("kitchen", id):
            with pytest.raises(ValueError, match=f"'component': '{component}' is of type orchestrator; name a log"):
                registering(component)


def test_a_component_is_found_by_its_id(own: None) -> None:
    assert registering(str(Client().get_stack_component(LOG_STORE, "own").id))


def test_a_composite_that_contains_itself_is_refused(flavors: None) -> None:
    archive = {"name": "archive", "type": "artifact"}

    def containing(component: str) -> dict[str, Any]:
        return {"children": [archive, {"name": "theirs", "type": "component", "component": component}]}

    with registered("outer", "composite", primary="archive", children=[archive]):
        Client().update_stack_component("outer", LOG_STORE, configuration=containing("outer"))
        message = r"'component': 'outer' contains itself \(outer → outer\); take it out of the children of 'outer'"
        assert_refused("outer", message)
        with registered("inner", "composite", primary="archive", children=[archive]):
            Client().update_stack_component("outer", LOG_STORE, configuration=containing("inner"))
            Client().update_stack_component("inner", LOG_STORE, configuration=containing("outer"))
            assert_refused("outer", r"'component': 'inner' contains itself \(inner → outer → inner\); take it out")


def test_two_children_in_one_artifact_store_are_refused_before_a_run(flavors: None, tmp_path: Path) -> None:
    """Both would write the same file, as other lines: a reader cannot tell that these say the same."""
    active = Client().active_stack
    archive, theirs = {"name": "archive", "type": "artifact"}, {"name": "theirs", "type": "component"}
    default = active.artifact_store

    def why_not(*children: dict[str, Any]) -> str:
        config = CompositeLogStoreConfig(primary="archive", children=list(children))
        assert config.is_valid
        is_fine, message = make_store(*config.children).validator._custom_validation_function(active)  # type: ignore[misc]
        assert is_fine is not bool(message)
        return message.removeprefix("log store 'logs', ")

    mistake = "children 'archive' and 'theirs': both write to artifact store '{}', where each line would be twice; "
    mistake += "set another for one of them, or disable one"
    path = str(tmp_path / "elsewhere")
    with (
        registered("elsewhere", "local", ARTIFACT_STORE, path=path),
        registered("same", "local", ARTIFACT_STORE, path=f"{path}/"),
        registered("inner", "composite", primary="archive", children=[archive]),
        registered("nowhere", "local", ARTIFACT_STORE, path=str(tmp_path / "nowhere")),
        registered("broken", "composite", primary="archive", children=[archive | {"artifact_store": "nowhere"}]),
    ):
        # Registration refuses an artifact store that does not exist, but it may be deleted later.
        Client().delete_stack_component("nowhere", ARTIFACT_STORE)
        named = archive | {"artifact_store": "elsewhere"}
        for one, other, label in (
            (archive, theirs | {"component": "default"}, "default"),
            (archive, theirs | {"component": str(default.id)}, "default"),
            (archive | {"artifact_store": "default"}, theirs | {"component": "default"}, "default"),
            (archive, {**archive, "name": "theirs", "artifact_store": "default"}, "default"),
            (named, theirs | {"component": "same"}, "same"),
            (archive, theirs | {"component": "inner"}, "default"),
        ):
            assert why_not(one, other) == mistake.format(label)
        for one, other in (
            (archive, theirs | {"component": "elsewhere"}),
            (named, theirs | {"component": "default"}),
            (named, theirs | {"component": "inner"}),
            (archive, theirs | {"component": "default", "enabled": False}),
            # Children of children that are unavailable stand in nobody's way.
            (archive, theirs | {"component": "broken"}),
        ):
            assert why_not(one, other) == ""
        # For the end of the block.
        Client().create_stack_component("nowhere", "local", ARTIFACT_STORE, {"path": str(tmp_path / "nowhere")})


def assert_refused(name: str, message: str) -> None:
    """Check that the log store is refused before a run, and that its child is unavailable all the same."""
    store = StackComponent.from_model(Client().get_stack_component(LOG_STORE, name))
    assert isinstance(store, CompositeLogStore)
    with pytest.raises(Exception, match=f"child 'theirs': {message}"):
        store.validator.validate(Client().active_stack)
    with pytest.raises(UnavailableError, match=message):
        store.config.child("theirs").create_exporter()


def test_a_component_whose_flavor_cannot_be_imported_is_unavailable(own: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ImportError("no module")

    monkeypatch.setattr(StackComponent, "from_model", fail)
    with pytest.raises(UnavailableError, match="'own' cannot be loaded here; install what its flavor 'own' needs"):
        component_child("own").create_exporter()
    with pytest.raises(ValueError, match="install what its flavor"):
        component_child("own").check()


def test_a_secret_that_is_missing_makes_the_child_unavailable() -> None:
    Client().create_secret("gone", {"api": "x", "app": "y"})
    with registered("stock-datadog", "datadog", api_key="{{gone.api}}", application_key="{{gone.app}}"):
        Client().delete_secret("gone")
        with pytest.raises(UnavailableError, match="'stock-datadog' cannot create its exporter"):
            component_child("stock-datadog").create_exporter()


def test_remote_steps_install_what_the_component_s_flavor_needs(own: None) -> None:
    assert component_child("own").requirements == {"composite-logstore"}
    assert component_child("nowhere").requirements == {"composite-logstore"}


def test_a_stream_that_is_not_there_is_an_empty_page_or_said_so(own: None, tmp_path: Path) -> None:
    with registered("stock-artifact", "local", ARTIFACT_STORE, path=str(tmp_path / "store")):
        for component in ("own", "stock-artifact"):
            reader = ComponentReader(component)
            request = PageRequest(make_logs(make_stream()), "older", None, 10, LogsEntriesFilter())
            with suppress(DoesNotExistException):
                assert list(reader.read(request).entries) == []
            reader.close()
            reader.close()
