"""Whatever Elasticsearch answers, a page is what can be shown of it, or an error of the backend's."""

from __future__ import annotations

from contextlib import suppress
from datetime import datetime, timedelta, timezone
from typing import Any, Literal
from uuid import UUID

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from zenml.exceptions import DoesNotExistException

from composite_logstore import (
    Bounds,
    HttpResponse,
    PageRequest,
    RejectedError,
    RetryableError,
    TooLargeError,
    UnavailableError,
)
from composite_logstore.zenml import LogsEntriesFilter, LogStoreError, make_logs
from composite_logstore_elasticsearch.config import ElasticsearchChildConfig, ElasticsearchReaderConfig
from composite_logstore_elasticsearch.exporter import ElasticsearchExporter
from composite_logstore_elasticsearch.reader import ElasticsearchReader, OtelDocumentsReader
from tests.events import make_events

URL = "http://search.example"
CHILD = ElasticsearchChildConfig(name="search", type="elasticsearch", url=URL)
SECTION = ElasticsearchReaderConfig(type="elasticsearch", url=URL)
NOW = datetime.now(timezone.utc)
NANOS = int(NOW.timestamp()) * 1_000_000_000
LOGS_ID = UUID(int=7, version=4)
LOGS = make_logs(LOGS_ID, "step", NOW - timedelta(minutes=10))

LEAVES = (
    st.none()
    | st.booleans()
    | st.sampled_from([0, -1, 2**63 - 1, -(2**63), 2**64 - 1, 10**11, 4e15, 1e308, -1e308])
    | st.sampled_from(["", "9" * 4_000, "9" * 5_000, "-1", "nan", "1e999", "\x1b]0;x\x07", "2026-01-01T00:00:00Z"])
    | st.text(max_size=5)
    | st.just(orjson.Fragment(b"[" * 500 + b"]" * 500))
    | st.just(orjson.Fragment(b'{"a":' * 300 + b"1" + b"}" * 300))
)
ANYTHING = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


def mostly(usual: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(usual, usual, usual, ANYTHING)


def fields(usual: dict[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[Any]:
    """An object that lacks any of its fields, or has anything in their place."""
    return mostly(st.fixed_dictionaries({}, optional={name: mostly(value) for name, value in usual.items()}))


TIMES = st.integers(NANOS, NANOS + 3)
ATTRIBUTES: dict[str, st.SearchStrategy[Any]] = {
    "zenml.log.id": st.just(str(LOGS_ID)),
    "zenml.log.writer": st.sampled_from(["a" * 15, "b" * 15]),
    "zenml.log.sequence": st.integers(0, 5),
    "zenml.log.rank": st.integers(0, 5),
    "log.record.uid": st.uuids().map(str),
    "code.file.path": st.text(),
    "code.line.number": st.integers(),
    "exception.type": st.text(),
    "exception.stacktrace": st.text(),
}
OURS = fields(
    {
        "timestamp_nanos": TIMES,
        "@timestamp": TIMES.map(str),
        "message": st.text(),
        "severity_number": st.integers(0, 24),
        "severity_text": st.text(),
        "zenml": fields({"log": fields({"id": st.just(str(LOGS_ID))})}),
        "zenml.log.extra": st.just('{"a":1}'),
        **ATTRIBUTES,
    }
)
OTEL = fields(
    {
        "@timestamp": TIMES.map(lambda nanos: f"{nanos // 1_000_000}.{nanos % 1_000_000}"),
        "body": fields({"text": st.text(), "structured": ANYTHING}),
        "severity_number": st.integers(0, 24),
        "attributes": fields(ATTRIBUTES),
        "scope": fields({"name": st.text()}),
        "attributes.zenml.log.id": st.just(str(LOGS_ID)),
    }
)
HIT = fields({"_source": st.one_of(OURS, OTEL)})
SEARCH = fields(
    {
        "timed_out": st.just(False),
        "_shards": fields({"total": st.just(1), "failed": st.just(0)}),
        "hits": fields({"hits": st.lists(HIT, max_size=6)}),
        "error": fields({"type": st.sampled_from(["index_not_found_exception", "x"]), "reason": st.text()}),
    }
)
ERROR = fields({"type": st.sampled_from(["document_parsing_exception", "security_exception"]), "reason": st.text()})
ITEM = fields({"create": fields({"status": st.sampled_from([201, 409, 400, 429, 403]), "error": ERROR})})
BULK = fields({"errors": st.booleans(), "items": st.lists(ITEM, min_size=3, max_size=3), "error": ERROR})


def answers(bodies: st.SearchStrategy[Any]) -> st.SearchStrategy[HttpResponse]:
    return st.builds(
        HttpResponse,
        st.sampled_from([200] * 8 + [429, 503, 404, 400, 401, 413, 302]),
        st.fixed_dictionaries({}, optional={"Retry-After": st.sampled_from(["7", "9" * 400, "\u0663", "nan", "x"])}),
        bodies.map(encoded) | st.binary(max_size=20),
        st.sampled_from([None] * 8 + ["too large", "too late", "cut", "undecodable"]),  # type: ignore[list-item]
    )


def encoded(answer: Any) -> bytes:
    try:
        return orjson.dumps(answer)
    except TypeError:
        # Numbers beyond 64 bits, which another encoder would take.
        return b"{}"


class Server:
    """Stands where the HTTP client is, and answers anything, in turn."""

    def __init__(self, answers: list[HttpResponse]) -> None:
        self.answers = answers
        self.requests = 0

    def request(self, method: str, url: str, **_: Any) -> HttpResponse:
        self.requests += 1
        return self.answers[self.requests % len(self.answers)]

    def close(self) -> None:
        """Close nothing."""


@settings(max_examples=100, deadline=None)
@given(
    found=st.lists(answers(SEARCH), min_size=1, max_size=3),
    direction=st.sampled_from(["newer", "older"]),
    is_otel=st.booleans(),
    search=st.sampled_from([None, "a"]),
)
def test_a_page_or_an_error_of_the_backend_and_nothing_else(
    found: list[HttpResponse], direction: Literal["newer", "older"], is_otel: bool, search: str | None
) -> None:
    reader = OtelDocumentsReader(SECTION, None) if is_otel else ElasticsearchReader(CHILD)
    reader._searches._http = server = Server(found)  # type: ignore[assignment]
    token = None
    with pytest.MonkeyPatch.context() as patch, suppress(LogStoreError, DoesNotExistException):
        patch.setattr(Bounds, "SEARCHES", 10)
        for page_number in range(1, 4):
            page = reader.read(PageRequest(LOGS, direction, token, 4, LogsEntriesFilter(search=search)))
            assert server.requests <= 11 * page_number
            assert len(page.entries) <= 4
            for entry, event in page.entries:
                # As ZenML's server sends it on.
                orjson.loads(entry.model_dump_json())
                assert event is None or (len(event.writer) <= 64 and 0 <= event.sequence < 2**63)
            token = getattr(page, direction)
            if token is None:
                return
            assert len(token) < 10_000


@settings(max_examples=100, deadline=None)
@given(found=st.lists(answers(BULK), min_size=1, max_size=2), has_attributes=st.booleans())
def test_a_delivery_or_an_error_of_the_write_port_and_nothing_else(
    found: list[HttpResponse], has_attributes: bool
) -> None:
    exporter = ElasticsearchExporter(CHILD)
    exporter._connection._client = server = Server(found)  # type: ignore[assignment]
    attributes = {"loss": 0.5} if has_attributes else {}
    error: Exception | None = None
    try:
        assert exporter.export(make_events("abc", attributes=attributes)) == 0
    except (RejectedError, RetryableError, TooLargeError, UnavailableError) as raised:
        error = raised
    if isinstance(error, RejectedError):
        assert error.count is None or 0 < error.count <= 3
    if isinstance(error, RetryableError):
        assert error.retry_after_seconds is None or 0 <= error.retry_after_seconds <= Bounds.WAIT_SECONDS
    assert error is None or 0 < len(str(error)) < 2_000
    assert server.requests <= 2
