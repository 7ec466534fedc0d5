"""The `elasticsearch` child and the reader of that name on a stand-in: the contract, deliveries, other documents."""

from __future__ import annotations

import logging
import ssl
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal
from uuid import uuid4

import orjson
import pytest
import requests
import trustme
from zenml.models import LogsResponse

from composite_logstore import (
    ChildConfig,
    ExceptionInfo,
    Exporter,
    LogEvent,
    PageRequest,
    Reader,
    RejectedError,
    RetryableError,
    Stream,
    TooLargeError,
    UnavailableError,
)
from composite_logstore.testing import ExporterContract, Fault, ReaderContract, make_events, make_logs, make_stream
from composite_logstore.testing.contract import Contract
from composite_logstore.zenml import (
    LogEntry,
    LogsEntriesFilter,
    LogStoreError,
    LogStoreRateLimitError,
    LogStoreUnavailableError,
)
from composite_logstore_elasticsearch.config import ElasticsearchChildConfig, ElasticsearchReaderConfig
from tests import simulation
from tests.copying import move_there_and_back
from tests.servers.elasticsearch import API_KEY, MAX_RESULT_WINDOW, PASSWORD, USERNAME, Elasticsearch, Refusal
from tests.servers.tls_proxy import TlsProxy
from tests.watching import wait_until

pytestmark = pytest.mark.integration

Direction = Literal["newer", "older"]

BULK, SEARCH = "/zenml-logs/_bulk", "/zenml-logs/_search"
TEMPLATE = "/_index_template/composite-logstore-zenml-logs"


@pytest.fixture(scope="module")
def server() -> Iterator[Elasticsearch]:
    with Elasticsearch() as server:
        yield server


@pytest.fixture(autouse=True)
def fresh(server: Elasticsearch, monkeypatch: pytest.MonkeyPatch) -> None:
    # No test depends on the proxy of whoever runs it.
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server.forget()


def child_of(server: Elasticsearch, **settings: Any) -> ElasticsearchChildConfig:
    given = {"name": "search", "type": "elasticsearch", "export_timeout_millis": 60_000, **server.settings}
    return ElasticsearchChildConfig(**{**given, **settings})


# The contract


class _OnTheStandIn(Contract):
    patience_seconds: ClassVar[float] = 60.0

    @pytest.fixture
    def faults(self, server: Elasticsearch) -> Mapping[str, Fault]:
        @contextmanager
        def killed() -> Iterator[None]:
            server.stop()
            yield
            server.start()

        @contextmanager
        def answering(path: str, status: int, body: bytes = b"") -> Iterator[None]:
            server.fail(path, status, body, times=3)
            yield

        @contextmanager
        def refusing(status: int, kind: str) -> Iterator[None]:
            server.refused = "", Refusal(status, kind, "told to refuse it")
            yield
            server.refused = None

        broken = b'{"timed_out":false,"_shards":{"total":2,"failed":1},"hits":{"hits":[]}}'
        return {
            "killed": Fault(killed, RetryableError, LogStoreUnavailableError),
            "busy": Fault(partial(answering, BULK, 429), export=RetryableError),
            "a full queue": Fault(partial(refusing, 429, "es_rejected_execution_exception"), export=RetryableError),
            "a full disk": Fault(partial(refusing, 403, "cluster_block_exception"), export=UnavailableError),
            "malformed": Fault(partial(refusing, 400, "document_parsing_exception"), export=RejectedError),
            "wrong key": Fault(partial(answering, BULK, 401), export=UnavailableError),
            "too large for a proxy": Fault(partial(answering, BULK, 413), export=TooLargeError),
            "rate limit of the search": Fault(partial(answering, SEARCH, 429), read=LogStoreRateLimitError),
            "no permission to read": Fault(partial(answering, SEARCH, 403), read=LogStoreError),
            "a shard is missing": Fault(partial(answering, SEARCH, 200, body=broken), read=LogStoreUnavailableError),
        }


class TestWithoutATemplate(_OnTheStandIn, ExporterContract):
    @pytest.fixture
    def child(self, server: Elasticsearch) -> ElasticsearchChildConfig:
        return child_of(server)


class TestWithTheTemplate(_OnTheStandIn, ReaderContract):
    @pytest.fixture
    def child(self, server: Elasticsearch) -> ElasticsearchChildConfig:
        child = child_of(server)
        child.prepare()
        return child


class CollectorExporter:
    """Writes as the collector's exporter does in mapping mode `otel`."""

    def __init__(self, config: CollectorChildConfig) -> None:
        self._url = f"{config.url}/logs-zenml.otel-default/_bulk"
        self._headers = config.authorization

    def export(self, batch: Sequence[LogEvent]) -> int:
        lines: list[bytes] = []
        for event in batch:
            millis, rest = divmod(event.time_unix_nano, 1_000_000)
            # Without the record's own ones: the stand-in refuses more of them than the collector's streams do.
            plain = event._replace(attributes={}, metadata={})
            attributes = {**plain.details, **event.stream.attributes, **event.identity}
            document = {
                # Not padded with zeros.
                "@timestamp": f"{millis}.{rest}",
                "severity_text": event.severity_text,
                "severity_number": event.severity_number,
                "body": {"text": event.message},
                "attributes": attributes,
                "resource": {"attributes": {"service.name": "zenml"}},
                "scope": {"name": event.logger_name},
            }
            # The collector chooses no id: what is sent again is there again.
            lines += [orjson.dumps({"create": {"_id": str(uuid4())}}), orjson.dumps(document)]
        body = b"\n".join(lines) + b"\n"
        requests.post(self._url, data=body, headers=self._headers, timeout=60).raise_for_status()
        return 0

    def end_stream(self, stream: Stream) -> None:
        pass

    def close(self) -> None:
        pass


class CollectorChildConfig(ElasticsearchChildConfig):
    """Stands for an `otlp` child, its collector, and a `read` section."""

    def create_exporter(self) -> Exporter:
        return CollectorExporter(self)

    def create_reader(self) -> Reader:
        return section_of(self.url).create_reader(None)


def section_of(url: str, **settings: Any) -> ElasticsearchReaderConfig:
    return ElasticsearchReaderConfig(**{"type": "elasticsearch", "url": url, "api_key": API_KEY, **settings})


@pytest.mark.deep
class TestOpenTelemetrysMapping(ReaderContract):
    patience_seconds: ClassVar[float] = 60.0

    @pytest.fixture
    def child(self, server: Elasticsearch) -> ChildConfig:
        keyword = {"type": "keyword", "ignore_above": 1024}
        mappings = {
            "dynamic_templates": [{"texts": {"match_mapping_type": "string", "mapping": keyword}}],
            "properties": {
                "@timestamp": {"type": "date"},
                "body": {"properties": {"text": {"type": "match_only_text"}}},
                "attributes": {"type": "object", "dynamic": True},
            },
        }
        template = {"index_patterns": ["logs-*.otel-*"], "template": {"mappings": mappings}}
        url, headers = f"{server.url}/_index_template/logs-otel", {"Authorization": f"ApiKey {API_KEY}"}
        requests.put(url, json=template, headers=headers, timeout=60).raise_for_status()
        return CollectorChildConfig(**child_of(server).model_dump(exclude_unset=True))


# Through deliveries


def log_to(store: Any, logs: LogsResponse, messages: Sequence[str], **extra: Any) -> None:
    origin = store.register_origin("step", logs, {})
    for message in messages:
        record = logging.LogRecord("train", logging.WARNING, "/code/train.py", 42, message, (), None, "fit")
        record.__dict__.update(extra)
        store.emit(origin, record)
    store.flush()
    store.deregister_origin(origin)


def test_what_a_log_store_delivers_is_fetched_once_whatever_happens_meanwhile(server: Elasticsearch) -> None:
    """Two processes write to one stream: two log stores, with a writer each."""
    child = child_of(server)
    stores = [simulation.make_store(child) for _ in range(2)]
    logs = simulation.make_logs(stores[0])
    server.fail(BULK, 503)
    server.fail(BULK, 413)
    # The answer is lost, and not what was written.
    for number, store in enumerate(stores):
        log_to(store, logs, [f"message {message} of {number}" for message in range(40)], loss=0.5)
        log_to(store, logs, [f"later {message} of {number}" for message in range(5)], loss="too high")
    wait_until(
        lambda: all(store.stats()["search"]["delivered"] == 45 for store in stores), "everything is delivered", 120
    )
    page = stores[0].fetch(logs, start="oldest", limit=100)
    for store in stores:
        assert store.stats()["search"]["rejected"] == 0
        store.cleanup()

    wanted = {f"message {message} of {number}" for message in range(40) for number in range(2)}
    wanted |= {f"later {message} of {number}" for message in range(5) for number in range(2)}
    assert sorted(entry.message for entry in page.items) == sorted(wanted)
    # The second type of one attribute costs its place, and not the event.
    documents = server.documents("zenml-logs")
    packed = [one for one in documents if "zenml.log.extra" in one]
    assert {orjson.loads(one["zenml.log.extra"])["loss"] for one in packed} == {"too high"}
    assert len(packed) == 10


def test_what_was_delivered_before_its_answer_was_lost_is_there_once(server: Elasticsearch) -> None:
    exporter = child_of(server).create_exporter()
    events = make_events([f"m{number}" for number in range(20)])
    server.hang_ups = 1
    with pytest.raises(RetryableError) as caught:
        exporter.export(events)
    assert caught.value.smaller_may_pass
    assert exporter.export(events) == 0
    exporter.close()
    assert server.items == [201] * 20 + [409] * 20
    assert len(server.documents("zenml-logs")) == 20


def test_an_event_that_the_index_refuses_is_counted_and_holds_up_no_other(server: Elasticsearch) -> None:
    server.refused = "poison", Refusal(400, "document_parsing_exception", "failed to parse field [message]")
    exporter = child_of(server).create_exporter()
    with pytest.raises(RejectedError, match="failed to parse") as caught:
        exporter.export(make_events(["a", "poison", "b", "poison"]))
    exporter.close()
    assert caught.value.count == 2
    assert [one["message"] for one in server.documents("zenml-logs")] == ["a", "b"]


def test_an_index_that_is_full_of_fields_takes_events_all_the_same(server: Elasticsearch) -> None:
    exporter = child_of(server).create_exporter()
    many = {f"name{number}": number for number in range(600)}
    more = {f"other{number}": number for number in range(600)}
    events = [event._replace(attributes=given) for event, given in zip(make_events("ab"), (many, more), strict=True)]
    assert exporter.export(events) == 0
    exporter.close()
    first, second = server.documents("zenml-logs")
    assert "zenml.log.extra" not in first
    assert orjson.loads(second["zenml.log.extra"])["other7"] == 7


# Reading


def pages(reader: Reader, logs: LogsResponse, direction: Direction, limit: int, **filters: Any) -> list[LogEntry]:
    found: list[list[LogEntry]] = []
    token = None
    while True:
        page = reader.read(PageRequest(logs, direction, token, limit, LogsEntriesFilter(**filters)))
        found.append([read.entry for read in page.entries])
        token = page.newer if direction == "newer" else page.older
        if token is None:
            return [entry for entries in (found if direction == "newer" else found[::-1]) for entry in entries]


@pytest.mark.parametrize("direction", ["newer", "older"])
def test_documents_of_zenmls_own_store_are_read_among_ours(server: Elasticsearch, direction: Direction) -> None:
    child = child_of(server)
    events = make_events([f"ours {number}" for number in range(6)], step_nanos=10)
    exporter = child.create_exporter()
    exporter.export(events)
    exporter.close()
    lines = []
    for number in range(6):
        id = str(uuid4())
        document = {
            "timestamp_nanos": events[number].time_unix_nano + 5,
            "event_id": id,
            "message": f"theirs {number}",
            "severity_number": 9,
            "severity_text": "INFO",
            "@timestamp": "2026-09-21T14:13:20+00:00",
            "zenml.log.id": str(events[0].stream.id),
        }
        lines += [orjson.dumps({"create": {"_id": id}}), orjson.dumps(document)]
    headers = {"Authorization": f"ApiKey {API_KEY}"}
    body = b"\n".join(lines) + b"\n"
    requests.post(f"{server.url}/zenml-logs/_bulk", data=body, headers=headers, timeout=60).raise_for_status()
    reader = child.create_reader()
    for limit in (1, 5, 100):
        entries = pages(reader, make_logs(events[0].stream), direction, limit)
        assert [entry.message for entry in entries] == [
            f"{whose} {number}" for number in range(6) for whose in ("ours", "theirs")
        ]
    reader.close()


@pytest.mark.parametrize("direction", ["newer", "older"])
def test_a_thousand_events_of_one_nanosecond(server: Elasticsearch, direction: Direction) -> None:
    child = child_of(server)
    stream = make_stream()
    events = make_events([f"a {number:04}" for number in range(1_000)], stream, step_nanos=0)
    start = events[0].time_unix_nano
    others = make_events(["b"] * 200, stream, writer="edcba9876543210", start_unix_nano=start, step_nanos=0)
    exporter = child.create_exporter()
    exporter.export(events)
    exporter.export(others)
    exporter.close()
    reader = child.create_reader()
    found = pages(reader, make_logs(stream), direction, 150)
    assert [str(entry.id) for entry in found] == [event.uid for event in [*events, *others]]
    reader.close()


@pytest.mark.parametrize("has_template", [True, False])
def test_a_part_of_a_word_is_found_in_the_message_and_in_the_exception(
    server: Elasticsearch, has_template: bool
) -> None:
    child = child_of(server)
    if has_template:
        child.prepare()
    stream = make_stream()
    error = ExceptionInfo("ValueError", "wateRMELon", "Traceback")
    events = [
        *make_events([f"apple {number}" for number in range(300)], stream),
        *make_events(["a WaterMelon*?", "x\\melon\ny", "MELON"], stream, 300),
        *make_events(["failed"], stream, 303, exception=error),
        # The sign of Kelvin is a K, too.
        *make_events(["273 \u212aiwi melon", "x" * 9_000 + "melon"], stream, 304),
    ]
    exporter = child.create_exporter()
    exporter.export(events)
    exporter.close()
    reader = child.create_reader()
    logs = make_logs(stream)
    for search, numbers in {
        "melon": range(300, 306),
        "wATERm": [300, 303],
        "melon*?": [300],
        "x\\m": [301],
        "melon\ny": [301],
        "kiwi": [304],
        "nothing": [],
    }.items():
        for direction in ("newer", "older"):
            found = pages(reader, logs, direction, 50, search=search)  # type: ignore[arg-type]
            assert [str(entry.id) for entry in found] == [events[number].uid for number in numbers], search
    reader.close()


def test_a_stream_moves_from_an_archive_and_back(server: Elasticsearch, tmp_path: Path) -> None:
    move_there_and_back(child_of(server), tmp_path)


# The connection, and the template


def test_a_cluster_with_a_certificate_of_its_own(server: Elasticsearch, tmp_path: Path) -> None:
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    bundle = tmp_path / "authority.pem"
    authority.cert_pem.write_to_path(str(bundle))
    (event,) = make_events(["hello"])
    with TlsProxy(context, server.port) as proxy:
        url = f"https://127.0.0.1:{proxy.port}"
        exporter = child_of(server, url=url).create_exporter()
        with pytest.raises(UnavailableError, match="'certificate_file'"):
            exporter.export([event])
        exporter.close()
        exporter = child_of(server, url=url, certificate_file=str(tmp_path / "nowhere.pem")).create_exporter()
        with pytest.raises(UnavailableError, match="'certificate_file'"):
            exporter.export([event])
        exporter.close()
        child = child_of(server, url=url, certificate_file=str(bundle))
        exporter = child.create_exporter()
        exporter.export([event])
        exporter.close()
        reader = child.create_reader()
        assert [entry.message for entry in pages(reader, make_logs(event.stream), "newer", 10)] == ["hello"]
        reader.close()


@pytest.mark.parametrize(
    "wrong",
    [{"api_key": "wrong-key"}, {"api_key": None}, {"api_key": None, "username": "me", "password": "wrong-word"}],
)
def test_wrong_credentials(server: Elasticsearch, wrong: dict[str, Any]) -> None:
    child = child_of(server, **wrong)
    (event,) = make_events(["hello"])
    exporter, reader = child.create_exporter(), child.create_reader()
    with pytest.raises(UnavailableError) as refused:
        exporter.export([event])
    with pytest.raises(LogStoreError) as unread:
        pages(reader, make_logs(event.stream), "newer", 10)
    for error in (refused.value, unread.value):
        assert "'api_key'" in str(error) or "credentials" in str(error)
        # The stand-in repeats what it was sent.
        assert "wrong-key" not in str(error)
        assert "wrong-word" not in str(error)
    exporter.close()
    reader.close()


def test_a_user_and_a_password(server: Elasticsearch) -> None:
    child = child_of(server, api_key=None, username=USERNAME, password=PASSWORD)
    (event,) = make_events(["hello"])
    exporter, reader = child.create_exporter(), child.create_reader()
    exporter.export([event])
    assert [entry.message for entry in pages(reader, make_logs(event.stream), "newer", 10)] == ["hello"]
    exporter.close()
    reader.close()


def test_nobody_is_there(server: Elasticsearch) -> None:
    child = child_of(server, url="http://127.0.0.1:9")
    (event,) = make_events(["hello"])
    exporter, reader = child.create_exporter(), child.create_reader()
    with pytest.raises(RetryableError, match=r"127\.0\.0\.1:9") as caught:
        exporter.export([event])
    assert not caught.value.smaller_may_pass
    with pytest.raises(LogStoreUnavailableError, match=r"127\.0\.0\.1:9"):
        pages(reader, make_logs(event.stream), "newer", 10)
    exporter.close()
    reader.close()
    with pytest.raises(UnavailableError):
        child.unprepared()


def test_an_index_that_may_not_be_made_is_named(server: Elasticsearch) -> None:
    server.auto_create = False
    exporter = child_of(server).create_exporter()
    with pytest.raises(UnavailableError, match="index_not_found_exception"):
        exporter.export(make_events(["hello"]))
    exporter.close()


def test_the_template_is_made_once(server: Elasticsearch) -> None:
    child = child_of(server, index="logs-of-zenml")
    lack = child.unprepared()
    assert lack is not None
    assert "composite-logstore-logs-of-zenml" in lack
    assert "composite-logstore-logs-of-zenml" in child.prepare()
    assert child.unprepared() is None
    exporter = child.create_exporter()
    exporter.export(make_events(["hello"], attributes={"loss": 0.5, "a": {"b": 1}}))
    exporter.close()
    types = server.indices["logs-of-zenml"].types
    assert types["timestamp_nanos"] == types["zenml.log.sequence"] == "long"
    assert types["zenml.log.id"] == types["zenml.log_store.name"] == "keyword"
    assert (types["message"], types["message.wildcard"]) == ("text", "wildcard")
    assert not {"loss", "a.b", "a"} & types.keys()
    document = server.documents("logs-of-zenml")[0]
    assert document["loss"] == 0.5


def test_a_template_that_may_not_be_made_says_who_can(server: Elasticsearch) -> None:
    server.fail(TEMPLATE, 403)
    with pytest.raises(UnavailableError, match="manage_index_templates"):
        child_of(server).prepare()
    # Whether it is there may not be known.
    server.fail(TEMPLATE, 403)
    assert child_of(server).unprepared() is None


def test_a_cluster_without_wildcards_gets_a_template_without_them(server: Elasticsearch) -> None:
    refused = b'{"error":{"type":"mapper_parsing_exception","reason":"No handler for type [wildcard]"},"status":400}'
    server.fail(TEMPLATE, 400, body=refused)
    child = child_of(server)
    child.prepare()
    (template,) = server.templates.values()
    assert "fields" not in template["template"]["mappings"]["properties"]["message"]
    assert child.unprepared() is None


# The stand-in


def ask(server: Elasticsearch, path: str, body: Any, **headers: str) -> requests.Response:
    data = body if isinstance(body, bytes) else orjson.dumps(body)
    return requests.post(
        f"{server.url}/{path}", data=data, headers={"Authorization": f"ApiKey {API_KEY}", **headers}, timeout=60
    )


def bulk(**documents: dict[str, Any]) -> bytes:
    lines = [line for id, source in documents.items() for line in ({"create": {"_id": id}}, source)]
    return b"".join(orjson.dumps(line) + b"\n" for line in lines)


def test_the_stand_in_judges_each_item(server: Elasticsearch) -> None:
    answer = ask(
        server,
        "x/_bulk",
        bulk(a={"n": 1}, b={"n": "no number"}, c={"n": {"m": 1}}, d={"": 1}, e={"_id": 1}, f={"n": "7"}),
    ).json()
    assert answer["errors"] is True
    assert [item["create"]["status"] for item in answer["items"]] == [201, 400, 400, 400, 400, 201]
    again = ask(server, "x/_bulk", bulk(a={"n": 1})).json()
    assert again["items"][0]["create"]["error"]["type"] == "version_conflict_engine_exception"
    assert ask(server, "x/_bulk", bulk(g={"n": 1})[:-1]).status_code == 400
    assert ask(server, "x/_bulk", bulk(g={"n": 1}), Authorization="").status_code == 401
    server.max_content_length = 10
    assert ask(server, "x/_bulk", bulk(g={"n": 1})).status_code == 413


@pytest.mark.parametrize(
    "body",
    [
        {"size": MAX_RESULT_WINDOW + 1},
        {"size": 1, "from": MAX_RESULT_WINDOW},
        {"sort": [{"text": "asc"}]},
        {"sort": [{"nowhere": "asc"}]},
        {"sort": [{"n": "asc"}], "search_after": [1, 2]},
        {"query": {"fuzzy": {"text": "x"}}},
        {"query": {"bool": {"filtre": []}}},
        {"aggs": {}},
    ],
    ids=str,
)
def test_the_stand_in_refuses_searches_that_it_does_not_know(server: Elasticsearch, body: dict[str, Any]) -> None:
    ask(server, "x/_bulk", bulk(a={"n": 1, "text": "some words"}))
    assert ask(server, "x/_search", body).status_code == 400
    assert ask(server, "x/_search", {}).status_code == 200
    assert ask(server, "y/_search", {}).status_code == 404
    assert ask(server, "y*/_search", {}).status_code == 200


def test_the_stand_in_finds_words_and_not_parts_of_them(server: Elasticsearch) -> None:
    ask(server, "x/_bulk", bulk(a={"text": "The Water-Melon is ripe", "id": "0b-1c"}))

    def found(query: Any) -> int:
        return len(ask(server, "x/_search", {"query": query}).json()["hits"]["hits"])

    assert found({"match_phrase": {"text": "water melon"}}) == 1
    assert found({"match_phrase": {"text": "wate"}}) == 0
    assert found({"term": {"text": "melon"}}) == 1
    assert found({"term": {"text": "Water-Melon"}}) == 0
    assert found({"term": {"id": "0b-1c"}}) == 0
    assert found({"term": {"id.keyword": "0b-1c"}}) == found({"match_phrase": {"id": "0B 1C"}}) == 1


def test_the_stand_in_finds_a_document_after_a_refresh(server: Elasticsearch) -> None:
    server.refresh_seconds = 1_000
    ask(server, "x/_bulk", bulk(a={"n": 1}))
    assert ask(server, "x/_search", {}).json()["hits"]["hits"] == []
    server.refresh_seconds = 0
    ask(server, "x/_bulk", bulk(b={"n": 1}))
    assert [hit["_id"] for hit in ask(server, "x/_search", {}).json()["hits"]["hits"]] == ["b"]
