"""The exporter of Elasticsearch: what it writes, and what it makes of each answer."""

from __future__ import annotations

import gzip
import json
import ssl
from collections.abc import Callable, Sequence
from typing import Any

import orjson
import pytest
import requests
import urllib3

from composite_logstore import (
    AnswerTooLargeError,
    HttpResponse,
    LogEvent,
    RejectedError,
    RetryableError,
    TooLargeError,
    TraceContext,
    UnavailableError,
)
from composite_logstore.event import ExceptionInfo
from composite_logstore.testing import make_stream
from composite_logstore_elasticsearch.config import ElasticsearchChildConfig
from composite_logstore_elasticsearch.encoding import MAX_DOCUMENT_BYTES, StreamEncoder, packed, shorten_document
from composite_logstore_elasticsearch.exporter import ElasticsearchExporter
from tests.events import NOON, make_events

KEY = "dGhlLWlkOnRoZS1rZXk="
CREATED: dict[str, Any] = {"status": 201}


def make(**settings: Any) -> ElasticsearchChildConfig:
    base = {"name": "live", "type": "elasticsearch", "url": "https://search.example:9200", "api_key": KEY}
    return ElasticsearchChildConfig(**{**base, **settings})


class Cluster:
    """Stands where the HTTP client is."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.requests: list[dict[str, Any]] = []

    def request(self, method: str, url: str, **more: Any) -> HttpResponse:
        self.requests.append({"method": method, "url": url, **more})
        answer = self.answers.pop(0) if self.answers else None
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, HttpResponse):
            return answer
        return items(*(answer or [CREATED] * len(self.documents(-1))))

    def lines(self, number: int) -> list[Any]:
        return [orjson.loads(line) for line in gzip.decompress(self.requests[number]["body"]).splitlines()]

    def documents(self, number: int) -> list[Any]:
        return self.lines(number)[1::2]

    def close(self) -> None:
        """Close nothing."""


def respond(status: int, body: Any = b"", fault: Any = None, **headers: str) -> HttpResponse:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    text = body if isinstance(body, bytes) else orjson.dumps(body)
    return HttpResponse(status, requests.structures.CaseInsensitiveDict(named), text, fault)


def items(*results: Any, **more: Any) -> HttpResponse:
    errors = any("error" in result for result in results)
    return respond(200, {"errors": errors, "items": [{"create": result} for result in results]}, **more)


def error(status: int, type: str, reason: str = "because") -> dict[str, Any]:
    return {"status": status, "error": {"type": type, "reason": reason}}


def exporter_on(cluster: Cluster, **settings: Any) -> ElasticsearchExporter:
    exporter = ElasticsearchExporter(make(**settings))
    exporter._connection._client = cluster  # type: ignore[assignment]
    return exporter


# What it writes


def test_a_batch_is_one_request_of_creations_under_the_events_ids() -> None:
    cluster = Cluster()
    events = make_events(["a", "b"])
    assert exporter_on(cluster, index="logs").export(events) == 0
    (request,) = cluster.requests
    assert request["method"] == "POST"
    assert request["url"].startswith("https://search.example:9200/logs/_bulk?")
    assert request["headers"]["Authorization"] == f"ApiKey {KEY}"
    assert request["headers"]["Content-Type"] == "application/x-ndjson"
    assert cluster.lines(0)[::2] == [{"create": {"_id": event.uid}} for event in events]
    assert gzip.decompress(request["body"]).endswith(b"\n")


@pytest.mark.parametrize("name", ["OTEL_RESOURCE_ATTRIBUTES", "OTEL_SERVICE_NAME"])
def test_an_environment_that_is_no_unicode_costs_no_event(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "team=\udcff")
    cluster = Cluster()
    assert exporter_on(cluster).export(make_events(["hello"])) == 0
    assert cluster.lines(0)[1]["message"] == "hello"


def test_a_user_has_basic_authentication() -> None:
    cluster = Cluster()
    exporter_on(cluster, api_key=None, username="me", password="pässword").export(make_events(["a"]))
    assert cluster.requests[0]["headers"]["Authorization"] == "Basic bWU6cMOkc3N3b3Jk"


def test_a_document_has_the_fields_of_zenmls_own_store_and_ours() -> None:
    stream = make_stream(**{"zenml.run.name": "monday"})
    (event,) = make_events(["hello"], stream, level=30, level_name="WARNING", time_unix_nano=NOON + 5)
    document = orjson.loads(StreamEncoder(stream, {}).encode(event))
    assert document == {
        **stream.attributes,
        "timestamp_nanos": NOON + 5,
        "@timestamp": "2026-09-21T14:13:20.000000005Z",
        "message": "hello",
        "severity_number": 13,
        "severity_text": "WARN",
        "event_id": event.uid,
        "log.record.uid": event.uid,
        "zenml.log.id": str(stream.id),
        "zenml.log.writer": event.writer,
        "zenml.log.sequence": 0,
        "logger.name": "train",
        "code.file.path": "/code/train.py",
        "code.line.number": 42,
        "code.function.name": "fit",
    }


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"message": 'quo"te\n\x00 ünïcödé'},
        {"attributes": {"loss": 0.5, "nested": {"a": [1, None]}}},
        {"attributes": {"message": "mine", "@timestamp": "mine", "event_id": "mine", "zenml.log.id": "mine"}},
        {"attributes": {"log.record.uid": "mine", "zenml.log.writer": "mine", "zenml.log.sequence": "mine"}},
        {"metadata": {"zenml.log.source": "mine"}},
        {"exception": ExceptionInfo("ValueError", "no", "Traceback")},
        {"trace": TraceContext(2**127 + 1, 2**63 + 1, 1)},
        {"file": "", "line": 0, "function": "", "logger_name": ""},
        {"level": 25, "level_name": "NOTICE"},
        {"level": 5, "level_name": "Level 5"},
        {"progress": 7},
    ],
    ids=str,
)
def test_each_document_has_each_name_once_however_it_is_encoded(changes: dict[str, Any]) -> None:
    stream = make_stream()
    (event,) = make_events(["hello"], stream, **changes)
    encoder = StreamEncoder(stream, {"service.name": "zenml"})
    pairs: list[tuple[str, Any]] = []

    def take(found: list[tuple[str, Any]]) -> dict[str, Any]:
        pairs[:] = found
        return dict(found)

    # The outermost object comes last.
    document = json.loads(encoder.encode(event), object_pairs_hook=take)
    assert len(pairs) == len(document)
    assert document == orjson.loads(orjson.dumps(encoder.document(event)))
    assert document["zenml.log.id"] == str(stream.id)
    assert (document["log.record.uid"], document["event_id"]) == (event.uid, event.uid)
    assert (document["zenml.log.writer"], document["zenml.log.sequence"]) == (event.writer, event.sequence)
    assert document["message"] == event.message


def test_attributes_do_not_take_the_place_of_fields() -> None:
    (event,) = make_events(["hello"], attributes={"message": "mine", "timestamp_nanos": 3})
    document = orjson.loads(StreamEncoder(event.stream, {}).encode(event))
    assert (document["message"], document["extra.message"]) == ("hello", "mine")
    assert document["extra.timestamp_nanos"] == 3


@pytest.mark.parametrize(
    "changes",
    [
        {"message": "x" * 5_000_000},
        {"message": "\x1b" * 5_000_000},
        {"exception": ExceptionInfo("E", "x", "y" * 5_000_000)},
        {"attributes": {"a": "x" * 5_000_000}},
        {"attributes": {f"name {number}": "x" * 80 for number in range(60_000)}},
    ],
    ids=["message", "escapes", "stack trace", "attribute", "attributes"],
)
def test_a_large_document_is_shortened_so_that_it_can_be_read_again(changes: dict[str, Any]) -> None:
    (event,) = make_events(["hello"], **changes)
    shortened = shorten_document(StreamEncoder(event.stream, {}).document(event))
    assert len(shortened) <= MAX_DOCUMENT_BYTES
    assert orjson.loads(shortened)["log.record.uid"] == event.uid
    cluster = Cluster()
    assert exporter_on(cluster).export([event]) == 1


def test_a_batch_that_is_too_large_is_split() -> None:
    with pytest.raises(TooLargeError):
        exporter_on(Cluster()).export(make_events(["x" * 1_500_000] * 9))


@pytest.mark.parametrize("nanos", [-1, 1 << 63])
def test_a_time_that_no_index_can_keep_rejects_its_event_alone(nanos: int) -> None:
    cluster = Cluster()
    good, odd = make_events(["good", "odd"])
    with pytest.raises(RejectedError) as caught:
        exporter_on(cluster).export([good, odd := odd._replace(time_unix_nano=nanos)])
    assert (caught.value.count, caught.value.events) == (1, [odd])
    assert [document["message"] for document in cluster.documents(0)] == ["good"]


# What it makes of an answer to the whole request


@pytest.mark.parametrize(
    ("status", "body", "kind", "words"),
    [
        (400, error(400, "illegal_argument_exception"), RejectedError, "illegal_argument_exception"),
        (400, error(400, "invalid_index_name_exception"), UnavailableError, "'index'"),
        (401, error(401, "security_exception"), UnavailableError, "credentials"),
        (401, b"", UnavailableError, "'api_key'"),
        (403, error(403, "security_exception"), UnavailableError, "create_doc"),
        (403, error(403, "cluster_block_exception"), UnavailableError, "read-only"),
        (403, b"<html>", UnavailableError, "create_doc"),
        (404, error(404, "index_not_found_exception"), UnavailableError, "create it"),
        (404, b"not found", UnavailableError, "'url'"),
        (405, b"", UnavailableError, "'url'"),
        (302, b"", UnavailableError, "redirect"),
        (204, b"", UnavailableError, "'url'"),
        (408, b"", RetryableError, "408"),
        (413, b"", TooLargeError, "413"),
        (429, error(429, "circuit_breaking_exception"), RetryableError, "circuit_breaking_exception"),
        (500, b"", RetryableError, "500"),
        (502, b"<html>", RetryableError, "502"),
        (503, error(503, "unavailable_shards_exception"), RetryableError, "503"),
        (200, b"<html>welcome</html>", UnavailableError, "'url'"),
        (200, b"[]", UnavailableError, "'url'"),
        (200, b'{"acknowledged":true}', UnavailableError, "'url'"),
        (200, {"errors": False, "items": []}, UnavailableError, "'url'"),
        (200, {"errors": False, "items": [{"index": CREATED}]}, UnavailableError, "'url'"),
        (200, {"errors": False, "items": [{"create": {"status": "201"}}]}, UnavailableError, "'url'"),
        (200, {"error": {"type": "timeout", "reason": "late"}}, RetryableError, "timeout"),
    ],
)
def test_an_answer_to_the_whole_request(status: int, body: Any, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind) as caught:
        exporter_on(Cluster(respond(status, body))).export(make_events(["a"]))
    assert type(caught.value) is kind
    assert words in str(caught.value)
    if isinstance(caught.value, RetryableError):
        assert caught.value.smaller_may_pass


def test_a_pause_that_is_asked_for_is_kept() -> None:
    with pytest.raises(RetryableError) as caught:
        exporter_on(Cluster(respond(429, b"", Retry_After="7"))).export(make_events(["a"]))
    assert caught.value.retry_after_seconds == 7


@pytest.mark.parametrize("fault", ["too large", "too late", "cut", "undecodable"])
def test_an_incomplete_answer_is_asked_for_again(fault: str) -> None:
    with pytest.raises(RetryableError) as caught:
        exporter_on(Cluster(items(CREATED)._replace(fault=fault))).export(make_events(["a"]))  # type: ignore[arg-type]
    assert caught.value.smaller_may_pass


def test_keys_that_an_answer_repeats_are_not_shown() -> None:
    answer = respond(400, error(400, "bad", f"no {KEY} and no Basic bWU6c2VjcmV0LXdvcmQ= of secret-word"))
    for settings in ({}, {"api_key": None, "username": "me", "password": "secret-word"}):
        with pytest.raises(RejectedError) as caught:
            exporter_on(Cluster(answer), **settings).export(make_events(["a"]))
        secrets = [KEY] if not settings else ["secret-word", "bWU6c2VjcmV0LXdvcmQ="]
        for secret in secrets:
            assert secret not in str(caught.value)


# What it makes of an answer's items


def export(results: Sequence[Any], *, again: Sequence[Any] = (), events: Sequence[LogEvent] = ()) -> Cluster:
    cluster = Cluster(list(results), *([list(again)] if again else []))
    exporter_on(cluster).export(events or make_events([f"m{number}" for number in range(len(results))]))
    return cluster


def test_what_is_there_already_counts_as_delivered() -> None:
    export([CREATED, error(409, "version_conflict_engine_exception"), {"status": 200}])


@pytest.mark.parametrize(
    ("item", "kind", "words"),
    [
        (error(429, "es_rejected_execution_exception"), RetryableError, "429"),
        (error(503, "unavailable_shards_exception"), RetryableError, "503"),
        (error(500, "exception"), RetryableError, "500"),
        (error(403, "cluster_block_exception"), UnavailableError, "read-only"),
        (error(429, "cluster_block_exception"), UnavailableError, "read-only"),
        (error(403, "security_exception"), UnavailableError, "create_doc"),
        (error(404, "index_not_found_exception"), UnavailableError, "create it"),
        (error(400, "index_closed_exception"), UnavailableError, "closed"),
        (error(403, "unknown"), UnavailableError, "permit"),
        (error(400, "document_parsing_exception"), RejectedError, "document_parsing_exception"),
        (error(400, "mapper_parsing_exception"), RejectedError, "mapper_parsing_exception"),
        ({"status": 400, "error": "a text"}, RejectedError, "a text"),
        ({"status": 400}, RejectedError, "400"),
    ],
)
def test_one_item_decides_about_a_batch(item: Any, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind) as caught:
        export([CREATED, item, CREATED])
    assert type(caught.value) is kind
    assert words in str(caught.value)
    if isinstance(caught.value, RejectedError):
        assert caught.value.count == 1


def test_a_retry_goes_before_a_rejection_which_comes_back() -> None:
    with pytest.raises(RetryableError):
        export([error(400, "document_parsing_exception"), error(429, "es_rejected_execution_exception")])


def test_if_none_of_several_is_taken_the_batch_is_rejected_as_a_whole() -> None:
    with pytest.raises(RejectedError) as caught:
        export([error(400, "illegal_argument_exception", "no write index is defined for alias [logs]")] * 3)
    assert caught.value.count is None


def test_a_reason_repeats_nothing_of_the_event() -> None:
    failed = "[1:1337] failed to parse field [loss] of type [long]"
    reason = f"{failed} in document with id 'e1'. Preview of field's value: 'seven'"
    with pytest.raises(RejectedError) as caught:
        export([CREATED, error(400, "document_parsing_exception", reason)])
    assert "failed to parse field [loss] of type [long]" in str(caught.value)
    for part in ("e1'", "seven", "1337"):
        assert part not in str(caught.value)


def test_reasons_are_bounded() -> None:
    with pytest.raises(RejectedError) as caught:
        export([CREATED, *(error(400, "x", f"{number} " + "long " * 10_000) for number in range(50))])
    assert caught.value.count == 50
    assert len(str(caught.value)) < 1_000


# An index that refuses an attribute


REFUSES: dict[str, Any] = {
    "another type": error(400, "document_parsing_exception", "failed to parse field [loss] of type [long]"),
    "a contradiction": error(400, "mapper_parsing_exception", "object mapping for [a] tried to parse field [a]"),
    "too many": error(400, "illegal_argument_exception", "Limit of total fields [1000] has been exceeded"),
    "no new ones": error(400, "strict_dynamic_mapping_exception", "dynamic introduction of [loss] is not allowed"),
    "no name": error(400, "illegal_argument_exception", "field name cannot be an empty string"),
}


@pytest.mark.parametrize("why", REFUSES)
def test_an_event_is_worth_more_than_the_place_of_its_attribute(why: str) -> None:
    events = make_events(["a", "b", "c"], attributes={"loss": "high", "a": {"b": 1}})
    cluster = export([CREATED, REFUSES[why], CREATED], again=[CREATED], events=events)
    assert len(cluster.requests) == 2
    action, document = cluster.lines(1)
    assert action == {"create": {"_id": events[1].uid}}
    assert "loss" not in document
    extra = orjson.loads(document["zenml.log.extra"])
    assert (extra["loss"], extra["a"]) == ("high", {"b": 1})
    for name in ("message", "zenml.log.id", "zenml.log.writer", "zenml.log.sequence", "code.file.path"):
        assert document[name] == cluster.documents(0)[1][name]


def test_what_is_refused_twice_is_rejected() -> None:
    events = make_events(["a", "b"], attributes={"loss": "high"})
    with pytest.raises(RejectedError) as caught:
        export([CREATED, REFUSES["another type"]], again=[REFUSES["another type"]], events=events)
    assert caught.value.count == 1


def test_what_has_no_attributes_of_its_own_is_not_packed() -> None:
    assert packed({"message": "a", "zenml.log.id": "x"}) is None
    assert packed({"message": "a", "zenml.log.extra": "{}"}) is None


# No answer


def refused_connection(_: str) -> Exception:
    pool = urllib3.connectionpool.HTTPConnectionPool("search.example")
    cause = urllib3.exceptions.NewConnectionError(pool, "refused")  # type: ignore[arg-type]
    cause.__cause__ = ConnectionRefusedError(111, "Connection refused")
    return requests.ConnectionError(cause)


NO_ANSWER: dict[str, tuple[Callable[[str], Exception], type[Exception], bool | None]] = {
    "refused": (refused_connection, RetryableError, False),
    "reset": (
        lambda key: requests.ConnectionError(ConnectionResetError(104, "Connection reset")),
        RetryableError,
        True,
    ),
    "late": (lambda key: requests.ReadTimeout(f"https://{key}@search.example"), RetryableError, True),
    "not trusted": (
        lambda key: requests.exceptions.SSLError(ssl.SSLCertVerificationError(1, f"certificate of {key}")),
        UnavailableError,
        None,
    ),
    "no TLS": (lambda key: requests.exceptions.SSLError(ssl.SSLError(1, "wrong version")), UnavailableError, None),
    "a header": (lambda key: requests.exceptions.InvalidHeader(f"Invalid {key}"), UnavailableError, None),
    "a URL": (lambda key: requests.exceptions.InvalidURL(f"Invalid {key}"), UnavailableError, None),
    "a file": (
        lambda key: OSError(f"Could not find a suitable TLS CA certificate bundle {key}"),
        UnavailableError,
        None,
    ),
    "too many headers": (lambda key: AnswerTooLargeError("the answer is too large"), UnavailableError, None),
}


@pytest.mark.parametrize("why", NO_ANSWER)
def test_no_answer(why: str) -> None:
    raised, kind, smaller_may_pass = NO_ANSWER[why]
    with pytest.raises(kind) as caught:
        exporter_on(Cluster(raised(KEY))).export(make_events(["a"]))
    assert type(caught.value) is kind
    assert KEY not in str(caught.value)
    assert "https://search.example:9200" in str(caught.value) or "'" in str(caught.value)
    assert getattr(caught.value, "smaller_may_pass", None) is smaller_may_pass
