"""The exporter, without a network: what a message is, which requests are sent, and what each answer means."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import orjson
import pytest

from composite_logstore import (
    AnswerTooLargeError,
    ExceptionInfo,
    LogEvent,
    RejectedError,
    RetryableError,
    TooLargeError,
    TraceContext,
    UnavailableError,
)
from composite_logstore_cloudwatch import exporter as exporter_module
from composite_logstore_cloudwatch.config import CloudwatchChildConfig
from composite_logstore_cloudwatch.connection import UnreachedError
from composite_logstore_cloudwatch.encoding import MOST_MESSAGE_BYTES, StreamEncoder, shorten_record
from composite_logstore_cloudwatch.exporter import CloudwatchExporter
from tests.events import NOON, SECOND, WRITER, make_events, make_stream
from tests.simulated_cloudwatch import SimulatedCloudWatch, failure

DAY = 24 * 3600 * SECOND


@pytest.fixture
def cloudwatch() -> SimulatedCloudWatch:
    return SimulatedCloudWatch()


@pytest.fixture
def create(cloudwatch: SimulatedCloudWatch, monkeypatch: pytest.MonkeyPatch) -> Callable[..., CloudwatchExporter]:
    monkeypatch.setattr(exporter_module, "Connection", lambda config: cloudwatch)

    def exporter(**settings: Any) -> CloudwatchExporter:
        config = CloudwatchChildConfig(name="aws", type="cloudwatch", **settings)
        return CloudwatchExporter(config, clock=lambda: NOON / SECOND + 60)

    return exporter


def arrived(cloudwatch: SimulatedCloudWatch) -> list[dict[str, Any]]:
    return [orjson.loads(message) for events in cloudwatch.streams.values() for _, _, message in events]


# Messages


def test_a_message_is_the_record_in_the_shape_of_otlp(
    create: Callable[..., CloudwatchExporter], cloudwatch: SimulatedCloudWatch
) -> None:
    stream = make_stream(**{"zenml.run.name": "run-1"})
    event = make_events(["hello"], stream, trace=TraceContext(1, 2, 1))[0]
    assert create(log_stream_prefix="zenml/").export([event]) == 0

    assert list(cloudwatch.streams) == [f"zenml/{stream.id}"]
    assert arrived(cloudwatch) == [
        {
            "timeUnixNano": NOON,
            "severityNumber": 9,
            "severityText": "INFO",
            "scope": {"name": "train"},
            "body": "hello",
            "attributes": {
                "code.file.path": "/code/train.py",
                "code.line.number": 42,
                "code.function.name": "fit",
                **stream.attributes,
                "log.record.uid": event.uid,
                "zenml.log.writer": WRITER,
                "zenml.log.sequence": 0,
            },
            "traceId": f"{1:032x}",
            "spanId": f"{2:016x}",
            "flags": 1,
        }
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"message": '"quoted"\n\\ ünïcödé \U0001f600 \x00'},
        {"level": 35, "level_name": 'a "level"'},
        {"file": "", "line": 0, "function": ""},
        {"logger_name": ""},
        {"exception": ExceptionInfo("ValueError", "out of range", "Traceback")},
        {"attributes": {"a": {"b": [1, None]}, "zenml.log.writer": "mine"}},
        {"metadata": {"zenml.log.source": "mine"}},
        {"progress": 7},
    ],
)
@pytest.mark.parametrize("metadata", [{}, {"code.file.path": "theirs"}])
def test_the_fast_way_and_the_general_way_say_the_same(changes: dict[str, Any], metadata: dict[str, Any]) -> None:
    event = make_events(["hello"], make_stream(**metadata))[0]._replace(**changes)
    encoder = StreamEncoder(event.stream)
    assert orjson.loads(encoder.encode(event)) == orjson.loads(orjson.dumps(encoder.record(event)))


HUGE: dict[str, dict[str, Any]] = {
    "message": {"message": "x" * 2_000_000},
    "message of escapes": {"message": "\x1b" * 2_000_000},
    "message beyond ASCII": {"message": "\U0001f600" * 500_000},
    "message just too large": {"message": "x" * MOST_MESSAGE_BYTES},
    "stack trace": {"exception": ExceptionInfo("ValueError", "x", "y\n" * 1_000_000)},
    "logger": {"logger_name": "x" * 2_000_000},
    "level": {"level_name": "x" * 2_000_000},
    "attribute": {"attributes": {"a": "x" * 2_000_000}},
    "attributes": {"attributes": {f"name {number}": "x" * 80 for number in range(20_000)}},
    "names": {"attributes": {f"{number} " + "x" * 100_000: 1 for number in range(20)}},
    "all": {
        "message": "x" * 2_000_000,
        "exception": ExceptionInfo("x" * 300_000, "y" * 300_000, "z" * 2_000_000),
        "attributes": {f"name {number}": "x" * 200_000 for number in range(20)},
    },
}


@pytest.mark.parametrize("what", HUGE)
def test_a_message_that_is_too_large_is_shortened_and_keeps_its_identity(what: str) -> None:
    event = make_events(["hello"])[0]._replace(**HUGE[what])
    encoder = StreamEncoder(event.stream)
    assert len(encoder.encode(event)) > MOST_MESSAGE_BYTES

    message = shorten_record(encoder.record(event))

    assert MOST_MESSAGE_BYTES // 2 < len(message) <= MOST_MESSAGE_BYTES
    record = orjson.loads(message)
    assert record["timeUnixNano"] == NOON
    assert record["attributes"].items() >= {**event.stream.attributes, **event.identity}.items()
    assert b"shortened by" in message or "otel.dropped_attributes_count" in record["attributes"]


# Requests


def test_log_streams_are_created_once_and_the_group_when_it_is_missing(
    create: Callable[..., CloudwatchExporter], cloudwatch: SimulatedCloudWatch
) -> None:
    cloudwatch.groups.clear()
    exporter = create(retention_days=7)
    one, two = make_events(["a", "b"]), make_events(["c"], make_stream())
    exporter.export(one)
    exporter.export(two)
    exporter.export(one)

    assert cloudwatch.operations == [
        *("CreateLogStream", "CreateLogGroup", "PutRetentionPolicy", "CreateLogStream", "PutLogEvents"),
        *("CreateLogStream", "PutLogEvents", "PutLogEvents"),
    ]
    assert cloudwatch.calls[2][1] == {"logGroupName": "zenml", "retentionInDays": 7}
    exporter.end_stream(one[0].stream)
    exporter.export(one)
    assert cloudwatch.operations[-2:] == ["CreateLogStream", "PutLogEvents"]


def test_another_process_may_create_them_first(
    create: Callable[..., CloudwatchExporter], cloudwatch: SimulatedCloudWatch
) -> None:
    cloudwatch.groups.clear()

    def hurried(operation: str, request: dict[str, Any]) -> None:
        if operation == "CreateLogGroup":
            cloudwatch.groups.add("zenml")
            cloudwatch.streams[str(events[0].stream.id)] = []

    cloudwatch.answer = hurried
    events = make_events(["a"])
    assert create(retention_days=7).export(events) == 0
    assert len(arrived(cloudwatch)) == 1


def test_what_was_deleted_is_created_again_by_the_retry(
    create: Callable[..., CloudwatchExporter], cloudwatch: SimulatedCloudWatch
) -> None:
    exporter, events = create(), make_events(["a"])
    exporter.export(events)
    cloudwatch.streams.clear()
    with pytest.raises(RetryableError, match="does not exist"):
        exporter.export(events)
    exporter.export(events)
    assert len(arrived(cloudwatch)) == 1


def test_a_retention_that_could_not_be_set_is_set_later(
    create: Callable[..., CloudwatchExporter], cloudwatch: SimulatedCloudWatch
) -> None:
    cloudwatch.groups.clear()
    allowed = False

    def deny(operation: str, request: dict[str, Any]) -> None:
        if operation == "PutRetentionPolicy" and not allowed:
            raise failure(operation, "AccessDeniedException")

    cloudwatch.answer = deny
    exporter, events = create(retention_days=7), make_events(["a"])
    for _ in range(2):
        with pytest.raises(UnavailableError, match="logs:PutRetentionPolicy"):
            exporter.export(events)
    allowed = True
    exporter.export(events)
    assert cloudwatch.operations.count("PutRetentionPolicy") == 3
    assert len(arrived(cloudwatch)) == 1


def test_a_batch_of_many_days_is_sent_in_order(
    create: Callable[..., CloudwatchExporter], cloudwatch: SimulatedCloudWatch
) -> None:
    events = [
        event._replace(time_unix_nano=NOON - (number * 7 % 13) * DAY)
        for number, event in enumerate(make_events([str(number) for number in range(13)]))
    ]
    assert create().export(events) == 0
    assert {record["body"] for record in arrived(cloudwatch)} == {str(number) for number in range(13)}


def test_what_the_first_requests_took_is_not_sent_again(
    create: Callable[..., CloudwatchExporter], cloudwatch: SimulatedCloudWatch
) -> None:
    events = [
        event._replace(time_unix_nano=NOON - number * DAY) for number, event in enumerate(make_events(["a", "b", "c"]))
    ]
    puts = 0

    def fail_third(operation: str, request: dict[str, Any]) -> None:
        nonlocal puts
        puts += operation == "PutLogEvents"
        if operation == "PutLogEvents" and puts == 3:
            raise UnreachedError("nobody answers", smaller_may_pass=True)

    cloudwatch.answer = fail_third
    exporter = create()
    with pytest.raises(RetryableError) as caught:
        exporter.export(events)
    assert caught.value.smaller_may_pass
    # The delivery may split the batch before it retries.
    exporter.export(events[:1])
    exporter.export(events[1:])
    assert sorted(record["body"] for record in arrived(cloudwatch)) == ["a", "b", "c"]
    # An event that is exported again, as a backfill does, is sent.
    exporter.export(events)
    assert len(arrived(cloudwatch)) == 6


# Answers


@pytest.mark.parametrize(
    ("age", "retention_days", "reason"),
    [
        (14 * DAY - 120 * SECOND, None, None),
        (14 * DAY, None, "older than 14 days"),
        (3 * DAY - 120 * SECOND, 3, None),
        (3 * DAY, 3, "older than 3 days"),
        (-7200 * SECOND, None, None),
        (-7300 * SECOND, None, "more than 2 hours ahead"),
    ],
)
def test_what_cloudwatch_would_reject_is_not_sent(
    create: Callable[..., CloudwatchExporter],
    cloudwatch: SimulatedCloudWatch,
    age: int,
    retention_days: int | None,
    reason: str | None,
) -> None:
    young, other = make_events(["young", "other"])
    exporter = create(retention_days=retention_days)
    batch = [young, other._replace(time_unix_nano=NOON - age)]
    if reason is None:
        assert exporter.export(batch) == 0
        assert len(arrived(cloudwatch)) == 2
        return
    with pytest.raises(RejectedError, match=reason) as caught:
        exporter.export(batch)
    assert caught.value.count == 1
    assert [record["body"] for record in arrived(cloudwatch)] == ["young"]


def test_rejected_events_are_counted_by_the_answer(
    create: Callable[..., CloudwatchExporter], cloudwatch: SimulatedCloudWatch
) -> None:
    info = {"tooOldLogEventEndIndex": 1, "expiredLogEventEndIndex": 3, "tooNewLogEventStartIndex": 9}
    cloudwatch.answer = lambda operation, request: (
        {"rejectedLogEventsInfo": info} if operation == "PutLogEvents" else None
    )
    with pytest.raises(RejectedError, match="retention") as caught:
        create().export(events := make_events([str(number) for number in range(10)]))
    assert (caught.value.count, caught.value.events) == (4, [*events[:3], events[9]])


def test_an_event_of_another_program_that_json_cannot_say_is_rejected_alone(
    create: Callable[..., CloudwatchExporter], cloudwatch: SimulatedCloudWatch
) -> None:
    good, bad, odd = make_events(["good", "bad", "odd"])
    events = [good, bad._replace(message="\ud800"), odd._replace(attributes={"a": 1 << 70})]
    with pytest.raises(RejectedError, match="JSON") as caught:
        create().export(events)
    assert (caught.value.count, caught.value.events) == (2, events[1:])
    assert [record["body"] for record in arrived(cloudwatch)] == ["good"]


ANSWERS: list[tuple[Exception, type[Exception], str]] = [
    (failure("PutLogEvents", "ThrottlingException", retry_after_seconds=9), RetryableError, "fewer requests"),
    (failure("PutLogEvents", "", 429), RetryableError, "fewer requests"),
    (failure("PutLogEvents", "ServiceUnavailableException", 503), RetryableError, "503"),
    (failure("PutLogEvents", "InternalFailure", 500), RetryableError, "500"),
    (failure("PutLogEvents", "OperationAbortedException"), RetryableError, "OperationAborted"),
    (failure("PutLogEvents", "", 502), RetryableError, "502"),
    (failure("PutLogEvents", "", 408), RetryableError, "408"),
    (failure("PutLogEvents", "", 413), TooLargeError, "too large"),
    (failure("PutLogEvents", "RequestEntityTooLargeException", 413), TooLargeError, "too large"),
    (failure("PutLogEvents", "InvalidParameterException"), RejectedError, "InvalidParameterException"),
    (failure("CreateLogStream", "InvalidParameterException"), UnavailableError, "log_stream_prefix"),
    (failure("CreateLogGroup", "LimitExceededException"), UnavailableError, "quotas"),
    (failure("PutLogEvents", "AccessDeniedException"), UnavailableError, "logs:PutLogEvents"),
    (failure("CreateLogStream", "AccessDeniedException"), UnavailableError, "logs:CreateLogStream"),
    (failure("PutLogEvents", "UnrecognizedClientException"), UnavailableError, "renew"),
    (failure("PutLogEvents", "ExpiredTokenException"), UnavailableError, "renew"),
    (failure("PutLogEvents", "InvalidSignatureException"), UnavailableError, "clock"),
    (failure("PutLogEvents", "", 403), UnavailableError, "renew"),
    (failure("PutLogEvents", "", 404), UnavailableError, "endpoint_url"),
    (failure("PutLogEvents", "", 302), UnavailableError, "endpoint_url"),
    (UnreachedError("nobody answers", smaller_may_pass=False), RetryableError, "nobody answers"),
    (AnswerTooLargeError("the answer is too large"), UnavailableError, "endpoint_url"),
]


@pytest.mark.parametrize(("answer", "kind", "words"), ANSWERS)
def test_what_an_answer_means(
    create: Callable[..., CloudwatchExporter],
    cloudwatch: SimulatedCloudWatch,
    answer: Exception,
    kind: type[Exception],
    words: str,
) -> None:
    operation = getattr(answer, "operation", "PutLogEvents")
    if operation == "CreateLogGroup":
        cloudwatch.groups.clear()

    def fail(called: str, request: dict[str, Any]) -> None:
        if called == operation:
            raise answer

    cloudwatch.answer = fail
    exporter, events = create(), make_events(["a", "b"])
    with pytest.raises(kind, match=words) as caught:
        exporter.export(events)
    if isinstance(caught.value, RetryableError):
        assert caught.value.retry_after_seconds == getattr(answer, "retry_after_seconds", None)
    cloudwatch.answer = lambda operation, request: None
    assert exporter.export(events) == 0
    assert [record["body"] for record in arrived(cloudwatch)] == ["a", "b"]


def test_a_log_group_that_may_not_be_created_is_named(
    create: Callable[..., CloudwatchExporter], cloudwatch: SimulatedCloudWatch
) -> None:
    cloudwatch.groups.clear()

    def deny(operation: str, request: dict[str, Any]) -> None:
        if operation == "CreateLogGroup":
            raise failure(operation, "AccessDeniedException")

    cloudwatch.answer = deny
    with pytest.raises(UnavailableError, match=r"'zenml' does not exist.*logs:CreateLogGroup"):
        create().export(make_events(["a"]))


def test_refused_and_expired_credentials_are_looked_for_again(
    create: Callable[..., CloudwatchExporter], cloudwatch: SimulatedCloudWatch
) -> None:
    exporter = create()
    exporter.export(make_events(["a"]))
    cloudwatch.has_expired = True
    exporter.export(make_events(["b"]))
    assert cloudwatch.closed > 0


def test_nothing_is_logged(create: Callable[..., CloudwatchExporter], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    events: list[LogEvent] = make_events(["a"])
    create().export(events)
    assert caplog.records == []
