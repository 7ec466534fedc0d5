"""The reader, without a network: how messages are understood, and what each answer means."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from typing import Any

import orjson
import pytest
from zenml.enums import LoggingLevels
from zenml.exceptions import DoesNotExistException
from zenml.models import LogsResponse

from composite_logstore import Allowance, AnswerTooLargeError, Bounds, PageRequest, Query, UnavailableError
from composite_logstore.testing import make_events, make_logs, make_stream
from composite_logstore.testing.contract import walk
from composite_logstore.zenml import (
    LogsEntriesFilter,
    LogStoreError,
    LogStoreRateLimitError,
    LogStoreUnavailableError,
)
from composite_logstore_cloudwatch import exporter as exporter_module
from composite_logstore_cloudwatch import reader as reader_module
from composite_logstore_cloudwatch.config import CloudwatchChildConfig
from composite_logstore_cloudwatch.connection import UnreachedError
from composite_logstore_cloudwatch.exporter import CloudwatchExporter
from composite_logstore_cloudwatch.reader import CloudwatchReader
from tests.simulated_cloudwatch import SimulatedCloudWatch, failure

CONFIG = CloudwatchChildConfig(name="aws", type="cloudwatch", log_stream_prefix="zenml/")


@pytest.fixture
def cloudwatch(monkeypatch: pytest.MonkeyPatch) -> SimulatedCloudWatch:
    cloudwatch = SimulatedCloudWatch()
    for module in (exporter_module, reader_module):
        monkeypatch.setattr(module, "Connection", lambda config: cloudwatch)
    return cloudwatch


def read(logs: Any, limit: int = 100, **filters: Any) -> list[Any]:
    request = PageRequest(logs, "older", None, limit, LogsEntriesFilter(**filters))
    return [one.entry for one in CloudwatchReader(CONFIG).read(request).entries]


MESSAGES: list[tuple[str, str, LoggingLevels]] = [
    ("plain text", "plain text", LoggingLevels.INFO),
    ("", "", LoggingLevels.INFO),
    ("[1, 2]", "[1, 2]", LoggingLevels.INFO),
    ('{"message": "another shape"}', '{"message": "another shape"}', LoggingLevels.INFO),
    ('{"body": {"nested": 1}}', '{"body": {"nested": 1}}', LoggingLevels.INFO),
    ('{"body": "torn', '{"body": "torn', LoggingLevels.INFO),
    ('{"body": "otlp", "severityNumber": 17}', "otlp", LoggingLevels.ERROR),
    (
        '{"body": "odd", "severityNumber": -3, "scope": 1, "attributes": [], "timeUnixNano": "x"}',
        "odd",
        LoggingLevels.INFO,
    ),
    ('{"body": "own", "attributes": {"zenml.log.writer": 1, "zenml.log.sequence": "x"}}', "own", LoggingLevels.INFO),
    (
        '{"body": "failed", "attributes": {"exception.type": "ValueError", "exception.stacktrace": "at fit"}}',
        "failed\nValueError: \nat fit",
        LoggingLevels.INFO,
    ),
]


@pytest.mark.parametrize(("message", "text", "level"), MESSAGES)
def test_every_message_is_shown(cloudwatch: SimulatedCloudWatch, message: str, text: str, level: LoggingLevels) -> None:
    logs = make_logs(make_stream())
    now = int(time.time() * 1_000)
    cloudwatch.streams[f"zenml/{logs.id}"] = [(now, 1, message)]

    (entry,) = read(logs)

    assert (entry.message, entry.level) == (text, level)
    assert entry.timestamp is not None
    assert int(entry.timestamp.timestamp() * 1_000) in (now - 1, now)


def test_a_nanosecond_that_is_not_the_events_is_not_believed(cloudwatch: SimulatedCloudWatch) -> None:
    """CloudWatch sorts by its own time: a page would end at another place."""
    logs = make_logs(make_stream())
    now = int(time.time()) * 1_000
    messages = [
        orjson.dumps({"body": str(number), "timeUnixNano": (1 - number) * 10**18}).decode() for number in range(3)
    ]
    cloudwatch.streams[f"zenml/{logs.id}"] = [(now + number, number, text) for number, text in enumerate(messages)]

    assert [entry.message for entry in read(logs)] == ["0", "1", "2"]
    assert [entry.message for entry in read(logs, limit=1)] == ["2"]


def test_as_many_events_are_asked_for_as_the_query_wants(cloudwatch: SimulatedCloudWatch) -> None:
    """After an answer that was too large, that is fewer, whatever the page is narrowed to."""
    stream = make_stream()
    asked: list[int] = []

    def answer(operation: str, request: dict[str, Any]) -> None:
        asked.append(request["limit"])

    cloudwatch.answer = answer
    cloudwatch.streams[f"zenml/{stream.id}"] = []
    now = time.time_ns()
    query = Query(stream.id, "older", now - 10**9, now, None, 15, 17, "x")
    CloudwatchReader(CONFIG).search(query, Allowance())
    assert set(asked) == {15}


def test_a_log_without_a_log_stream_is_empty(cloudwatch: SimulatedCloudWatch) -> None:
    def answer(operation: str, request: dict[str, Any]) -> None:
        raise failure(operation, "ResourceNotFoundException", said="The specified log stream does not exist.")

    cloudwatch.answer = answer
    assert read(make_logs(make_stream())) == []


ANSWERS: list[tuple[Exception, type[Exception], str]] = [
    (failure("GetLogEvents", "ResourceNotFoundException"), DoesNotExistException, "eu-central-1"),
    (failure("GetLogEvents", "ThrottlingException", retry_after_seconds=2.5), LogStoreRateLimitError, "Try again"),
    (failure("GetLogEvents", "ServiceUnavailableException", 503), LogStoreUnavailableError, "temporarily"),
    (failure("GetLogEvents", "", 502), LogStoreUnavailableError, "temporarily"),
    (failure("GetLogEvents", "AccessDeniedException"), LogStoreError, "logs:GetLogEvents"),
    (failure("GetLogEvents", "ExpiredTokenException"), LogStoreError, "renew"),
    (
        failure("GetLogEvents", "InvalidParameterException", said="bad name"),
        LogStoreError,
        "bad name.*log_stream_prefix",
    ),
    (failure("GetLogEvents", "", 404), LogStoreError, "endpoint_url"),
    (UnreachedError("nobody answers", smaller_may_pass=False), LogStoreUnavailableError, "nobody answers"),
    (UnavailableError("no credentials; set 'connector'"), LogStoreUnavailableError, "'connector'"),
]


@pytest.mark.parametrize(("answer", "kind", "words"), ANSWERS)
def test_what_an_answer_means(
    cloudwatch: SimulatedCloudWatch, answer: Exception, kind: type[Exception], words: str
) -> None:
    def fail(operation: str, request: dict[str, Any]) -> None:
        raise answer

    cloudwatch.answer = fail
    with pytest.raises(kind, match=words) as caught:
        read(make_logs(make_stream()))
    assert type(caught.value) is kind
    if isinstance(caught.value, LogStoreRateLimitError):
        assert caught.value.retry_after == 3


@pytest.mark.parametrize(
    "answer",
    [
        {"events": {}},
        {"events": [1]},
        {"events": [{"timestamp": "now", "message": "a"}]},
        {"events": [{"timestamp": -1, "message": "a"}]},
        {"events": [{"timestamp": 1 << 62, "message": "a"}]},
        {"events": [{"timestamp": 1, "message": None}]},
        {"events": [], "nextBackwardToken": 7},
        {"events": [], "nextForwardToken": ["a"]},
    ],
)
def test_an_answer_of_another_shape_is_refused(cloudwatch: SimulatedCloudWatch, answer: dict[str, Any]) -> None:
    cloudwatch.answer = lambda operation, request: answer
    with pytest.raises(LogStoreError, match="endpoint_url"):
        read(make_logs(make_stream()))


def test_fewer_events_are_asked_for_if_an_answer_is_too_large(cloudwatch: SimulatedCloudWatch) -> None:
    events = make_events([str(number) for number in range(30)])
    CloudwatchExporter(CONFIG).export(events)

    def too_large(operation: str, request: dict[str, Any]) -> None:
        if request.get("limit", 0) > 3:
            raise AnswerTooLargeError("the answer is too large")

    cloudwatch.answer = too_large
    found = [entry.message for entry in read(make_logs(events[0].stream), limit=5)]
    assert found
    assert found == [event.message for event in events[-len(found) :]]


def test_pages_without_events_come_to_an_end(cloudwatch: SimulatedCloudWatch) -> None:
    number = 0

    def empty(operation: str, request: dict[str, Any]) -> dict[str, Any]:
        nonlocal number
        number += 1
        return {"events": [], "nextForwardToken": f"f{number}", "nextBackwardToken": f"b{number}"}

    cloudwatch.answer = empty
    with pytest.raises(LogStoreUnavailableError, match="no end"):
        read(make_logs(make_stream()))
    assert number <= 100


def test_the_time_of_a_filter_is_asked_for(cloudwatch: SimulatedCloudWatch) -> None:
    events = make_events([str(number) for number in range(10)], step_nanos=10_000_000)
    CloudwatchExporter(CONFIG).export(events)
    logs = make_logs(events[0].stream)
    entries = read(logs)
    since, until = entries[3].timestamp, entries[6].timestamp

    assert [entry.message for entry in read(logs, since=since, until=until)] == ["3", "4", "5", "6"]
    asked = cloudwatch.calls[-1][1]
    assert asked["startTime"] == events[3].time_unix_nano // 1_000_000
    assert asked["endTime"] == events[6].time_unix_nano // 1_000_000 + 1
    assert read(logs, since=until + timedelta(seconds=1)) == []


def test_many_events_of_one_nanosecond_are_paged_through(cloudwatch: SimulatedCloudWatch) -> None:
    events = make_events([str(number) for number in range(5_000)], step_nanos=0)
    exporter = CloudwatchExporter(CONFIG)
    for begin in range(0, 5_000, 1_000):
        exporter.export(events[begin : begin + 1_000])
    logs, reader, token = make_logs(events[0].stream), CloudwatchReader(CONFIG), None
    found: list[str] = []
    while True:
        page = reader.read(PageRequest(logs, "newer", token, 1_000, LogsEntriesFilter()))
        found += [one.entry.message for one in page.entries]
        token = page.newer
        if token is None:
            break
    assert found == [str(number) for number in range(5_000)]


def test_credentials_that_have_expired_are_looked_for_again(
    cloudwatch: SimulatedCloudWatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    create: Callable[[Any], Any] = lambda config: made.append(config) or cloudwatch  # noqa: E731
    monkeypatch.setattr(reader_module, "Connection", create)
    logs = make_logs(make_stream())
    cloudwatch.streams[f"zenml/{logs.id}"] = []
    reader = CloudwatchReader(CONFIG)
    request = PageRequest(logs, "older", None, 10, LogsEntriesFilter())
    reader.read(request)
    reader.read(request)
    assert len(made) == 1
    cloudwatch.has_expired = True
    reader.read(request)
    assert len(made) > 1
    reader.close()


def test_a_copy_keeps_what_an_entry_does_not_show(cloudwatch: SimulatedCloudWatch) -> None:
    """A scan returns the event as it was: attributes, level and the exception by itself."""
    stream = make_stream()
    event = make_events(["hello"], stream, attributes={"epoch": 3, "nested": {"a": [1]}})[0]
    event = event._replace(level=25, level_name="NOTICE")
    CloudwatchExporter(CONFIG).export([event])

    (chunk,) = CloudwatchReader(CONFIG).scan(make_logs(stream))

    (content,) = chunk.contents
    found = CloudwatchReader(CONFIG).event_of(content, stream)
    assert found is not None
    # OpenTelemetry has no number for each level.
    assert found == event._replace(level=23)
    assert CloudwatchReader(CONFIG).event_of(content._replace(event=None), stream) is None


def test_a_millisecond_may_have_more_events_than_two_answers(
    cloudwatch: SimulatedCloudWatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are paged through as long as all of them together are within the bound of a page."""
    monkeypatch.setattr(CloudwatchReader, "max_records", 20)
    monkeypatch.setattr(reader_module, "MOST_EVENTS", 10)
    events = make_events([f"{number:03}" for number in range(250)], step_nanos=0)
    CloudwatchExporter(CONFIG).export(events[::-1])
    for number, text, millis in ((250, "earlier", -10), (251, "later", 10), (252, "last", 20)):
        other = make_events([text], events[0].stream, number)[0]
        nanos = events[0].time_unix_nano + millis * 1_000_000
        CloudwatchExporter(CONFIG).export([other._replace(time_unix_nano=nanos)])
    logs = make_logs(events[0].stream)
    expected = ["earlier", *(event.message for event in events), "later", "last"]
    for direction in ("newer", "older"):
        assert walked(logs, direction, 7) == expected
    monkeypatch.setattr(Bounds, "SEARCH_BYTES", 10_000)
    with pytest.raises(LogStoreError, match="too many records of one time"):
        walked(logs, "newer", 7)
    # What lies beyond can be read.
    begin = datetime.fromtimestamp(events[0].time_unix_nano / 1e9 + 0.005, timezone.utc)
    assert [entry.message for entry in read(logs, since=begin)] == ["later", "last"]


def walked(logs: LogsResponse, direction: Any, limit: int) -> list[str]:
    pages = [
        [one.entry.message for one in page.entries] for page in walk(CloudwatchReader(CONFIG), logs, direction, limit)
    ]
    return [message for page in (pages if direction == "newer" else pages[::-1]) for message in page]
