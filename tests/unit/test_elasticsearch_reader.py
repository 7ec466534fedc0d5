"""The readers of Elasticsearch: documents of several programs, queries, and what an answer may be."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from typing import Any, Literal
from uuid import UUID, uuid4

import orjson
import pytest
import requests
from zenml.enums import LoggingLevels
from zenml.exceptions import DoesNotExistException

from composite_logstore import HttpResponse, Page, PageRequest
from composite_logstore.zenml import (
    LogsEntriesFilter,
    LogStoreError,
    LogStoreRateLimitError,
    LogStoreUnavailableError,
    make_logs,
)
from composite_logstore_elasticsearch.config import ElasticsearchChildConfig, ElasticsearchReaderConfig
from composite_logstore_elasticsearch.decoding import nanos_of, otel_record_of, record_of
from composite_logstore_elasticsearch.encoding import StreamEncoder, packed
from composite_logstore_elasticsearch.reader import ElasticsearchReader, OtelDocumentsReader
from tests.events import make_events

LOGS_ID = UUID(int=7, version=4)
NOW = datetime.now(timezone.utc)
NOON = int(NOW.timestamp()) * 1_000_000_000
LOGS = make_logs(LOGS_ID, "step", (NOW - timedelta(minutes=10)).replace(tzinfo=None))
COMPLETE = {"timed_out": False, "_shards": {"total": 1, "failed": 0}}
CHILD = {"name": "live", "type": "elasticsearch", "url": "https://search.example", "api_key": "test-key"}
SECTION = {"type": "elasticsearch", "url": "https://search.example", "api_key": "test-key"}


class Cluster:
    """Stands where the HTTP client is."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.requests: list[dict[str, Any]] = []

    def request(self, method: str, url: str, **more: Any) -> HttpResponse:
        self.requests.append({"method": method, "url": url, **more})
        answer = self.answers.pop(0) if self.answers else found()
        if isinstance(answer, Exception):
            raise answer
        assert isinstance(answer, HttpResponse)
        return answer

    @property
    def bodies(self) -> list[Any]:
        return [orjson.loads(request["body"]) for request in self.requests]

    def close(self) -> None:
        """Close nothing."""


def respond(status: int, body: Any = b"", fault: Any = None, **headers: str) -> HttpResponse:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    text = body if isinstance(body, bytes) else orjson.dumps(body)
    return HttpResponse(status, requests.structures.CaseInsensitiveDict(named), text, fault)


def found(*sources: Any, **more: Any) -> HttpResponse:
    return respond(200, {**COMPLETE, "hits": {"hits": [{"_source": source} for source in sources]}, **more})


def error(status: int, type: str) -> HttpResponse:
    return respond(status, {"error": {"type": type, "reason": "because of test-key"}, "status": status})


def child_reader(*answers: Any, **settings: Any) -> tuple[ElasticsearchReader, Cluster]:
    reader, cluster = ElasticsearchReader(ElasticsearchChildConfig(**{**CHILD, **settings})), Cluster(*answers)
    reader._searches._http = cluster  # type: ignore[assignment]
    return reader, cluster


def otel_reader(*answers: Any, **settings: Any) -> tuple[OtelDocumentsReader, Cluster]:
    reader = OtelDocumentsReader(ElasticsearchReaderConfig(**{**SECTION, **settings}), "train")
    cluster = Cluster(*answers)
    reader._searches._http = cluster  # type: ignore[assignment]
    return reader, cluster


def read(
    reader: Any,
    direction: Literal["newer", "older"] = "newer",
    token: str | None = None,
    limit: int = 10,
    **filters: Any,
) -> Page:
    page = reader.read(PageRequest(LOGS, direction, token, limit, LogsEntriesFilter(**filters)))
    assert isinstance(page, Page)
    return page


def document(sequence: int = 0, message: str = "hello", **more: Any) -> dict[str, Any]:
    (event,) = make_events([message], first=sequence, time_unix_nano=NOON + sequence)
    fields = orjson.loads(StreamEncoder(event.stream, {}).encode(event))
    return {**fields, "zenml.log.id": str(LOGS_ID), **more}


def otel_document(sequence: int = 0, message: str = "hello", **attributes: Any) -> dict[str, Any]:
    millis, rest = divmod(NOON + sequence, 1_000_000)
    return {
        "@timestamp": f"{millis}.{rest}",
        "observed_timestamp": f"{millis}.{rest}",
        "severity_text": "WARN",
        "severity_number": 13,
        "body": {"text": message},
        "attributes": {
            "zenml.log.id": str(LOGS_ID),
            "zenml.log.writer": "0123456789abcde",
            "zenml.log.sequence": sequence,
            "log.record.uid": str(UUID(int=sequence, version=4)),
            "code.file.path": "/code/train.py",
            "code.line.number": 42,
            **attributes,
        },
        "resource": {"attributes": {"service.name": "train"}},
        "scope": {"name": "train"},
    }


# Times


@pytest.mark.parametrize(
    ("value", "nanos"),
    [
        ("1790000000123.5", 1790000000123_000005),
        ("1790000000123.000005", 1790000000123_000005),
        ("1790000000123.456789", 1790000000123_456789),
        ("1790000000123", 1790000000123_000000),
        (1790000000123, 1790000000123_000000),
        (1790000000123.9, 1790000000123_000000),
        ("2026-09-21T14:13:20.000000005Z", 1790000000_000000005),
        ("2026-09-21T14:13:20.5Z", 1790000000_500000000),
        ("2026-09-21T14:13:20.123456789123Z", 1790000000_123456789),
        ("2026-09-21T16:13:20+02:00", 1790000000_000000000),
        ("2026-09-21T14:13:20", 1790000000_000000000),
        ("1969-12-31T23:59:59.5Z", -500000000),
        ("yesterday", None),
        ("", None),
        ("9" * 16, None),
        ("9" * 5_000, None),
        (None, None),
        (True, None),
        (1e308, None),
        (float("nan"), None),
        ([], None),
    ],
)
def test_times(value: Any, nanos: int | None) -> None:
    assert nanos_of(value) == nanos


# Documents


def test_a_document_comes_back_as_the_event_it_was() -> None:
    (event,) = make_events(["hello"], time_unix_nano=NOON + 7, attributes={"loss": 0.5, "message": "mine"})
    record = record_of(orjson.loads(StreamEncoder(event.stream, {}).encode(event)))
    assert record is not None
    assert (record.nanos, record.body, record.severity_number, record.scope) == (NOON + 7, "hello", 9, "train")
    assert (record.attributes["loss"], record.attributes["message"]) == (0.5, "mine")
    assert record.attributes["zenml.log.id"] == str(event.stream.id)
    assert "event_id" not in record.attributes


def test_what_was_packed_is_unpacked() -> None:
    (event,) = make_events(["hello"], attributes={"loss": "high", "a.b": [1]})
    small = packed(orjson.loads(StreamEncoder(event.stream, {}).encode(event)))
    assert small is not None
    record = record_of(small)
    assert record is not None
    assert (record.attributes["loss"], record.attributes["a.b"]) == ("high", [1])
    assert "zenml.log.extra" not in record.attributes


def test_objects_in_the_place_of_dots_make_no_difference() -> None:
    nested = {
        "timestamp_nanos": NOON,
        "message": "m",
        "zenml": {"log": {"id": "x", "sequence": 3}},
        "code.file": {"path": "f"},
    }
    record = record_of(nested)
    assert record is not None
    assert record.attributes == {"zenml.log.id": "x", "zenml.log.sequence": 3, "code.file.path": "f"}


def test_a_document_of_zenmls_own_store() -> None:
    page = read(
        child_reader(
            found(
                {
                    "timestamp_nanos": NOON,
                    "event_id": str(uuid4()),
                    "message": "hello",
                    "severity_number": 17,
                    "severity_text": "ERROR",
                    "@timestamp": NOW.isoformat(),
                    "zenml.log.id": str(LOGS_ID),
                    "code.file.path": "/code/train.py",
                    "service.name": "zenml",
                }
            )
        )[0]
    )
    (only,) = page.entries
    assert only.event is None
    assert (only.entry.message, only.entry.level, only.entry.filename) == (
        "hello",
        LoggingLevels.ERROR,
        "/code/train.py",
    )


@pytest.mark.parametrize(
    "body",
    [{"body": {"text": "hello"}}, {"body.text": "hello"}, {"message": "hello"}, {"body": {"structured": "hello"}}],
    ids=str,
)
def test_the_body_of_a_document_in_opentelemetrys_mapping(body: dict[str, Any]) -> None:
    source = {key: value for key, value in otel_document().items() if key != "body"}
    record = otel_record_of({**source, **body})
    assert record is not None
    assert (record.body, record.scope, record.severity_number) == ("hello", "train", 13)
    assert record.attributes["zenml.log.sequence"] == 0


def test_attributes_under_their_whole_names() -> None:
    source = otel_document()
    attributes = source.pop("attributes")
    flat = {f"attributes.{name}": value for name, value in attributes.items()}
    record = otel_record_of({**source, **flat})
    assert record is not None
    assert record.attributes == attributes


# Queries


def test_a_search_has_the_stream_the_times_and_an_order_without_ties() -> None:
    reader, cluster = child_reader()
    read(reader)
    (request,), (body,) = cluster.requests, cluster.bodies
    assert request["url"].startswith("https://search.example/zenml-logs/_search?filter_path=")
    assert request["headers"]["Authorization"] == "ApiKey test-key"
    stream, times = body["query"]["bool"]["filter"]
    assert stream == {"match_phrase": {"zenml.log.id": str(LOGS_ID)}}
    assert times["range"]["timestamp_nanos"]["gte"] < NOON < times["range"]["timestamp_nanos"]["lte"]
    assert [next(iter(key)) for key in body["sort"]] == [
        "timestamp_nanos",
        "zenml.log.writer.keyword",
        "zenml.log.sequence",
    ]
    assert all("unmapped_type" in options for key in body["sort"] for options in key.values())
    assert body["track_total_hits"] is False


@pytest.mark.parametrize(("direction", "last"), [("newer", 3), ("older", 6)])
def test_a_page_continues_where_the_one_before_ended(direction: Literal["newer", "older"], last: int) -> None:
    reader, cluster = child_reader(found(*(document(sequence) for sequence in range(10))))
    page = read(reader, direction, limit=4)
    read(reader, direction, getattr(page, direction), limit=4)
    # Just before the last one, which is asked for again: others may be in its place.
    step = -1 if direction == "newer" else 1
    assert cluster.bodies[1]["search_after"] == [NOON + last, "0123456789abcde", last + step]


def test_filters_only_narrow_what_cannot_be_wanted() -> None:
    reader, cluster = child_reader(found(document(0, "a melon"), document(1, "a lemon")))
    page = read(reader, search="elon", level=LoggingLevels.WARNING)
    assert page.entries == []
    clauses = cluster.bodies[0]["query"]["bool"]["filter"][2:]
    assert {"bool": {"must_not": [{"range": {"severity_number": {"gt": 0, "lt": 13}}}]}} in clauses
    (search,) = [clause for clause in clauses if "should" in clause["bool"]]
    assert {"wildcard": {"message.wildcard": {"value": "*elon*", "case_insensitive": True}}} in search["bool"]["should"]
    assert {"exists": {"field": "exception.message"}} in search["bool"]["should"]


@pytest.mark.parametrize(
    ("search", "pattern"),
    # A capital beyond ASCII may stand for these: the Kelvin sign, and an I with a dot.
    [("a*b?c\\d", r"*a\*b\?c\\d*"), ("kiwi", "*??w?*"), ("ünï", "*"), ("a\nb", "*")],
)
def test_a_search_is_taken_literally(search: str, pattern: str) -> None:
    reader, cluster = child_reader()
    read(reader, search=search)
    (clause,) = [clause for clause in cluster.bodies[0]["query"]["bool"]["filter"][2:] if "should" in clause["bool"]]
    assert clause["bool"]["should"][0]["wildcard"]["message.wildcard"]["value"] == pattern


def test_what_is_found_is_checked_again() -> None:
    other = document(1, "other", **{"zenml.log.id": str(uuid4())})
    late = document(2, "late", timestamp_nanos=NOON + 10**15)
    page = read(child_reader(found(document(0, "mine"), other, late))[0])
    assert [entry.entry.message for entry in page.entries] == ["mine"]


def test_opentelemetrys_mapping_is_searched_by_milliseconds() -> None:
    reader, cluster = otel_reader(found(otel_document(0, "a"), otel_document(1, "b")), index="logs-zenml.otel-*")
    page = read(reader)
    assert [read.entry.message for read in page.entries] == ["a", "b"]
    assert [read.event and read.event.sequence for read in page.entries] == [0, 1]
    (body,) = cluster.bodies
    stream, times = body["query"]["bool"]["filter"]
    assert stream == {"match_phrase": {"attributes.zenml.log.id": str(LOGS_ID)}}
    assert times["range"]["@timestamp"]["format"] == "epoch_millis"
    assert cluster.requests[0]["url"].startswith("https://search.example/logs-zenml.otel-*/_search?")


# Answers


@pytest.mark.parametrize("make", [child_reader, otel_reader])
@pytest.mark.parametrize(
    ("answer", "kind", "words"),
    [
        (error(401, "security_exception"), LogStoreError, "api_key"),
        (error(403, "security_exception"), LogStoreError, "'read'"),
        (error(400, "search_phase_execution_exception"), LogStoreError, "index"),
        (error(404, "resource_not_found_exception"), LogStoreError, "url"),
        (respond(404, b"<html>"), LogStoreError, "url"),
        (respond(302), LogStoreError, "url"),
        (respond(429, Retry_After="7"), LogStoreRateLimitError, "limit"),
        (error(503, "unavailable_shards_exception"), LogStoreUnavailableError, "unavailable"),
        (respond(200, b"<html>"), LogStoreError, "could not be read"),
        (respond(200, b"[]"), LogStoreError, "could not be read"),
        (respond(200, {}), LogStoreError, "invalid"),
        (found(timed_out=True), LogStoreUnavailableError, "part"),
        (found(terminated_early=True), LogStoreUnavailableError, "part"),
        (found(_shards={"total": 2, "failed": 1}), LogStoreUnavailableError, "part"),
        (found(error={"type": "x"}), LogStoreUnavailableError, "middle"),
        (found(hits={"hits": [1]}), LogStoreError, "_source"),
        (found(hits={"hits": [{"_source": "x"}]}), LogStoreError, "_source"),
        (found(hits=[]), LogStoreError, "invalid"),
        (found(hits={"hits": {}}), LogStoreError, "invalid"),
        (found(*[document()] * 100), LogStoreError, "invalid"),
        (respond(200, found().body, "cut"), LogStoreUnavailableError, "cut off"),
        (respond(200, found().body, "too late"), LogStoreUnavailableError, "late"),
        (respond(200, found().body, "undecodable"), LogStoreError, "read"),
        (requests.ConnectionError("with test-key"), LogStoreUnavailableError, "url"),
    ],
)
def test_an_answer_that_is_no_page(make: Any, answer: Any, kind: type[Exception], words: str) -> None:
    reader, _ = make(answer, answer)
    with pytest.raises(LogStoreError) as caught:
        read(reader)
    assert type(caught.value) is kind or (kind is LogStoreError and isinstance(caught.value, LogStoreError))
    assert words in str(caught.value)
    assert "test-key" not in str(caught.value)
    if make is child_reader:
        assert "'read." not in str(caught.value)


def test_an_index_that_nothing_was_written_to_has_an_empty_page() -> None:
    assert read(child_reader(error(404, "index_not_found_exception"))[0]) == Page()


def test_a_wrong_index_of_a_section_is_named() -> None:
    reader, _ = otel_reader(error(404, "index_not_found_exception"), index="logs-x")
    with pytest.raises(DoesNotExistException, match="'logs-x'"):
        read(reader)
    reader, _ = otel_reader(found(_shards={"total": 0, "failed": 0}), found(_shards={"total": 0, "failed": 0}))
    with pytest.raises(DoesNotExistException, match=r"read\.index"):
        read(reader)


def test_an_attribute_that_a_processor_has_dropped_is_named() -> None:
    lost = otel_document()
    del lost["attributes"]["zenml.log.id"]
    reader, cluster = otel_reader(found(), found(lost))
    with pytest.raises(LogStoreError, match=r"'zenml\.log\.id'"):
        read(reader)
    service = cluster.bodies[1]["query"]["bool"]["filter"][0]
    assert service == {"match_phrase": {"resource.attributes.service.name": "train"}}
    # Others' records say nothing.
    assert read(otel_reader(found(), found(otel_document()))[0]) == Page()
    assert read(otel_reader(found(), found())[0]) == Page()


@pytest.mark.parametrize(
    ("settings", "fix"),
    [
        ({"index": ""}, "'read.index'"),
        ({"index": "*"}, "begin each name"),
        ({"index": "_all"}, "begin each name"),
        ({"index": "logs,"}, "begin each name"),
        ({"index": "<logs-{now/d}>"}, "begin each name"),
        ({"index": "Logs-*"}, "small letters"),
        ({"index": "logs-*,-logs-secret"}, "begin each name"),
        ({"url": "search.example"}, "https://"),
    ],
    ids=str,
)
def test_mistakes_in_a_section(settings: dict[str, Any], fix: str) -> None:
    with pytest.raises(ValueError, match=r"must") as caught:
        ElasticsearchReaderConfig(**{**SECTION, **settings})
    assert fix.replace("'read.index'", "must") in str(caught.value)


def test_patterns_of_a_section() -> None:
    for index in ("logs-*.otel-*", "logs-a,logs-b", "other:logs-*"):
        assert ElasticsearchReaderConfig(**{**SECTION, "index": index}).index == index
