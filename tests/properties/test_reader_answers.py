"""Whatever a backend answers to a search, a reader returns a page that ZenML can show, or raises its errors."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from zenml.enums import LoggingLevels
from zenml.exceptions import DoesNotExistException

from composite_logstore import HttpResponse, HttpSearches, KeysetReader, PageRequest
from composite_logstore.testing import make_logs, make_stream
from composite_logstore.zenml import LogsEntriesFilter, LogStoreError
from composite_logstore_clickhouse.config import ClickHouseReaderConfig
from composite_logstore_cloudwatch.config import CloudwatchChildConfig
from composite_logstore_cloudwatch.reader import CloudwatchReader
from composite_logstore_elasticsearch.config import ElasticsearchChildConfig, ElasticsearchReaderConfig
from composite_logstore_loki.config import LokiReaderConfig
from composite_logstore_victorialogs.config import VictoriaLogsReaderConfig
from tests.simulated_cloudwatch import SimulatedCloudWatch

STREAM = make_stream()
LOGS = make_logs(STREAM)
NOW = time.time_ns()
URL = "http://backend.example"
TEXTS = {
    "zenml.log.id": str(STREAM.id),
    "zenml.log.writer": "0123456789abcde",
    "zenml.log.sequence": "3",
    "log.record.uid": "01234567-89ab-8cde-8000-000000000003",
    "exception.type": "ValueError",
    "code.file.path": "/code/train.py",
    "code.line.number": "7",
    "zenml.log.rank": "1",
}
ATTRIBUTES: dict[str, Any] = {**TEXTS, "zenml.log.sequence": 3, "code.line.number": 7}
ROW = [str(NOW), "body", 9, "INFO", "train", "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331", 1, "3"]
COLUMNS = b'["Timestamp", "DateTime64(9)"]\n["Body", "String"]\n["LogAttributes", "Map(String, String)"]'
NESTED = {"zenml": {"log": {"id": str(STREAM.id), "writer": "0123456789abcde", "sequence": 3}}}
SHARDS = {"timed_out": False, "_shards": {"total": 1, "failed": 0}}


class Case(NamedTuple):
    """A reader, and an answer with one record; with `by_line`, each item of the answer is a line of its own."""

    make_reader: Callable[[], Any]
    answer: Any
    by_line: bool = False


def hit(source: dict[str, Any]) -> dict[str, Any]:
    return {**SHARDS, "hits": {"hits": [{"_source": source}]}}


CASES = {
    "clickhouse": Case(
        lambda: ClickHouseReaderConfig(type="clickhouse", url=URL).create_reader(None), [[*ROW, TEXTS]], True
    ),
    "clickhouse json": Case(
        lambda: ClickHouseReaderConfig(type="clickhouse", url=URL).create_reader(None),
        [[*ROW, json.dumps(NESTED)]],
        True,
    ),
    "loki": Case(
        lambda: LokiReaderConfig(type="loki", query_url=URL).create_reader(None),
        {
            "status": "success",
            "data": {
                "resultType": "streams",
                "result": [
                    {
                        "stream": {"service_name": "zenml"},
                        "values": [
                            [
                                str(NOW),
                                "line",
                                {"structuredMetadata": {name.replace(".", "_"): text for name, text in TEXTS.items()}},
                            ]
                        ],
                    }
                ],
            },
        },
    ),
    "victorialogs": Case(
        lambda: VictoriaLogsReaderConfig(type="victorialogs", url=URL).create_reader(None),
        [{"_time": time.strftime("%Y-%m-%dT%H:%M:%S.123456789Z", time.gmtime()), "_msg": "text", **TEXTS}],
        True,
    ),
    "elasticsearch": Case(
        lambda: ElasticsearchChildConfig(name="e", type="elasticsearch", url=URL).create_reader(),
        hit({"timestamp_nanos": NOW, "message": "text", "severity_number": 9, "severity_text": "INFO", **ATTRIBUTES}),
    ),
    "elasticsearch, otel": Case(
        lambda: ElasticsearchReaderConfig(type="elasticsearch", url=URL).create_reader(None),
        hit(
            {
                "@timestamp": f"{NOW // 10**6}.{NOW % 10**6}",
                "body": {"text": "text"},
                "severity_number": 9,
                "attributes": ATTRIBUTES,
                "resource": {"attributes": {"service.name": "zenml"}},
            }
        ),
    ),
}

ODD: list[Any] = [
    *(None, True, 0, -1, 1.5, 1e308, float("nan"), 2**63, -(2**63), 10**40, "", "x", "-1", "1e5", "9" * 50, "\x00"),
    *("\ud800", "²", "١٢", "a" * 3_000, "null", "{}", "NaN", "2026-13-01T00:00:00Z", "0000-00-00T00:00:00Z"),
    *("9999-12-31T23:59:59.999999999Z", "1.5.5", [], {}, [1], [[]], {"a": 1}, {"a": {"b": [1]}}),
]


def places(answer: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield place
    inner = answer.items() if isinstance(answer, dict) else enumerate(answer) if isinstance(answer, list) else ()
    for key, value in inner:
        yield from places(value, (*place, key))


def changed(answer: Any, place: tuple[Any, ...], value: Any) -> Any:
    if not place:
        return value
    answer = copy.deepcopy(answer)
    inner = answer
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return answer


def encoded(case: Case, answer: Any) -> bytes:
    lines = answer if case.by_line and isinstance(answer, list) else [answer]
    return b"\n".join(json.dumps(line).encode() for line in lines)


def assert_reads(case: Case, body: bytes, monkeypatch: pytest.MonkeyPatch, filter_: LogsEntriesFilter) -> None:
    """Read pages and the whole stream, with this answer to each search."""
    searches = 0

    def ask(self: HttpSearches, method: str, path: str, sent: bytes | None, allowance: Any) -> HttpResponse:
        nonlocal searches
        searches += 1
        assert searches < 1_000
        answer = COLUMNS if sent is not None and b"DESCRIBE" in sent else body
        allowance.take(len(answer))
        return HttpResponse(200, {}, answer, None)

    monkeypatch.setattr(HttpSearches, "ask", ask)
    monkeypatch.setattr(KeysetReader, "_sleep", lambda self, seconds: None)
    reader = case.make_reader()
    for direction in ("newer", "older"):
        try:
            page = reader.read(PageRequest(LOGS, direction, None, 10, filter_))  # type: ignore[arg-type]
            for read in page.entries:
                read.entry.model_dump_json()
        except (LogStoreError, DoesNotExistException):
            pass
    try:
        for chunk in reader.scan(LOGS):
            for content in chunk.contents:
                event = reader.event_of(content, STREAM)
                assert event is not None or reader.entry_of(content) is not None
            if searches > 100:
                # It answers the same for ever.
                return
    except (LogStoreError, DoesNotExistException):
        pass


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example("clickhouse", 0, [[]], LogsEntriesFilter())
@example("clickhouse", 3, "\ud800", LogsEntriesFilter())
@example("clickhouse", 11, None, LogsEntriesFilter())
@example("clickhouse json", 11, "-1", LogsEntriesFilter())
@given(
    st.sampled_from(sorted(CASES)),
    st.integers(0, 30),
    st.sampled_from(ODD),
    st.sampled_from([LogsEntriesFilter(), LogsEntriesFilter(search="b"), LogsEntriesFilter(level=LoggingLevels.INFO)]),
)
def test_a_value_of_another_kind(
    monkeypatch: pytest.MonkeyPatch, name: str, number: int, value: Any, filter_: LogsEntriesFilter
) -> None:
    case = CASES[name]
    every = list(places(case.answer))
    with monkeypatch.context() as patch:
        assert_reads(case, encoded(case, changed(case.answer, every[number % len(every)], value)), patch, filter_)


@pytest.mark.parametrize("field", ["zenml.log.writer", "exception.type", "code.file.path"])
@pytest.mark.parametrize("depth", [300, 990, 1_020])
@pytest.mark.parametrize("name", sorted(CASES))
def test_a_value_that_is_nested_deeply(name: str, depth: int, field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    nested = '{"a":' * depth + "1" + "}" * depth
    if name == "clickhouse json":
        objects = {"zenml": {"log": {"id": str(STREAM.id)}}}
        body = json.dumps([*ROW, json.dumps(objects)[:-1] + f', "{field}": {nested}}}']).encode()
    else:
        field = field.replace(".", "_") if name == "loki" else field
        before, after = f'"{field}": ', json.dumps(TEXTS[field.replace("_", ".")])
        body = encoded(case, case.answer)
        assert (before + after).encode() in body
        body = body.replace((before + after).encode(), (before + nested).encode())
    assert_reads(case, body, monkeypatch, LogsEntriesFilter())


@pytest.mark.parametrize("depth", [300, 990, 1_020])
def test_an_event_of_cloudwatch_that_is_nested_deeply(depth: int) -> None:
    nested = '{"a":' * depth + "1" + "}" * depth
    cloudwatch = SimulatedCloudWatch()
    messages = [f'{{"body": "b", "attributes": {{"exception.type": {nested}}}}}', f'{{"body": {nested}}}', nested]
    cloudwatch.streams[str(STREAM.id)] = [(NOW // 10**6, n, message) for n, message in enumerate(messages)]
    reader = CloudwatchReader(CloudwatchChildConfig(name="aws", type="cloudwatch"))
    reader._connection = cloudwatch  # type: ignore[assignment]
    page = reader.read(PageRequest(LOGS, "newer", None, 10, LogsEntriesFilter()))
    assert len(page.entries) == len(messages)
    for read in page.entries:
        read.entry.model_dump_json()


@pytest.mark.parametrize("name", sorted(CASES))
def test_a_part_of_an_answer_and_anything_else(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    whole = encoded(case, case.answer)
    parts = [whole[:end] for end in range(0, len(whole), 23)]
    others = [b"null", b"1", b"[]", b"{}", b"\xff\xfe", b"<html>", b"[[[]]]", b"[" * 10_000, b'{"a":' * 10_000]
    for body in (*parts, *others, whole * 3, whole + b"\x00"):
        assert_reads(case, body, monkeypatch, LogsEntriesFilter())
