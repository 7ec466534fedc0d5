"""The exporter, without a network: what an entry is, and what each answer means."""

from __future__ import annotations

import gzip
import logging
import ssl
from collections.abc import Callable, Mapping
from http.client import BadStatusLine
from types import SimpleNamespace
from typing import Any

import orjson
import pytest
import urllib3
from opentelemetry._logs import SeverityNumber
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from requests.structures import CaseInsensitiveDict
from zenml.log_stores.datadog.datadog_log_exporter import DatadogLogExporter

from composite_logstore import (
    AnswerTooLargeError,
    HttpResponse,
    LogEvent,
    RejectedError,
    RetryableError,
    TooLargeError,
    UnavailableError,
)
from composite_logstore.event import ExceptionInfo, TraceContext
from composite_logstore.otel import ReadableLogRecord
from composite_logstore_datadog import exporter as datadog
from composite_logstore_datadog.config import DatadogChildConfig
from composite_logstore_datadog.exporter import DatadogExporter
from tests.events import NOON, SECOND, make_events, make_stream

KEY = "test-key"


class Transport:
    """Stands where the HTTP client is: remembers requests and gives answers."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.status = 202
        self.headers: dict[str, str] = {}
        self.error: Exception | None = None

    def request(self, method: str, url: str, **arguments: Any) -> Any:
        self.requests.append({"method": method, "url": url, **arguments})
        if self.error is not None:
            raise self.error
        return HttpResponse(self.status, CaseInsensitiveDict(self.headers), b"", None)

    def close(self) -> None:
        """Close nothing."""

    @property
    def payload(self) -> bytes:
        return gzip.decompress(self.requests[-1]["body"])

    @property
    def entries(self) -> list[dict[str, Any]]:
        entries: list[dict[str, Any]] = orjson.loads(self.payload)
        return entries


@pytest.fixture
def transport() -> Transport:
    return Transport()


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    for name in ("OTEL_RESOURCE_ATTRIBUTES", "OTEL_SERVICE_NAME", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(datadog.socket, "gethostname", lambda: "worker-1")


Make = Callable[..., DatadogExporter]


@pytest.fixture
def make(transport: Transport) -> Make:
    def make(now: float = NOON / SECOND, **settings: Any) -> DatadogExporter:
        config = DatadogChildConfig(**{"name": "live", "type": "datadog", "api_key": KEY, **settings})
        exporter = DatadogExporter(config, clock=lambda: now)
        exporter._http = transport  # type: ignore[assignment]
        return exporter

    return make


def test_a_batch_is_one_compressed_request(make: Make, transport: Transport) -> None:
    assert make(export_timeout_millis=5_000).export(make_events(["one", "two"])) == 0
    (request,) = transport.requests
    assert (request["method"], request["url"]) == (
        "POST",
        "https://http-intake.logs.datadoghq.com/api/v2/logs",
    )
    assert request["headers"]["DD-API-KEY"] == KEY
    assert request["headers"]["Content-Type"] == "application/json"
    assert request["headers"]["Content-Encoding"] == "gzip"
    assert request["headers"]["User-Agent"].startswith("datadog-api-client-python/")
    assert request["timeout_seconds"] == pytest.approx(4.5)
    assert [entry["message"] for entry in transport.entries] == ["one", "two"]


def test_an_entry(make: Make, transport: Transport) -> None:
    stream = make_stream(**{"zenml.run.name": "monday"})
    (event,) = make_events(
        ["hello"],
        stream,
        first=7,
        time_unix_nano=NOON + 123_456_789,
        level=logging.WARNING,
        level_name="WARNING",
        exception=ExceptionInfo("ValueError", "no", "Traceback ...\nValueError: no\n"),
        trace=TraceContext(0x0123456789ABCDEF_FEDCBA9876543210, 0x00F067AA0BA902B7, 1),
        attributes={"epoch": 3, "loss": float("nan"), "nested": {"a": [1, None]}},
        metadata={"step": "fit"},
    )
    make(service_name="training", service_version="2", tags=["env:prod", "team:ml"]).export([event])
    assert transport.entries == [
        {
            "message": "hello",
            "status": "warn",
            "timestamp": NOON // 1_000_000 + 123,
            "service": "training",
            "version": "2",
            "source": "zenml",
            "ddsource": "zenml",
            "ddtags": "env:prod,team:ml",
            "hostname": "worker-1",
            "service.name": "training",
            "service.version": "2",
            "logger.name": "train",
            "code.file.path": "/code/train.py",
            "code.line.number": 42,
            "code.function.name": "fit",
            "exception.type": "ValueError",
            "exception.message": "no",
            "exception.stacktrace": "Traceback ...\nValueError: no\n",
            "zenml.log.id": str(stream.id),
            "zenml.log.source": "step",
            "zenml.log_store.id": "7a0dc2ae-6a0a-4d2c-8c4b-3f4b8e4c1b11",
            "zenml.log_store.name": "logs",
            "zenml.run.name": "monday",
            "epoch": 3,
            "loss": None,
            "nested": {"a": [1, None]},
            "step": "fit",
            "otel.timestamp": str(NOON + 123_456_789),
            "otel.severity_text": "WARN",
            "otel.severity_number": "13",
            "otel.trace_id": "0123456789abcdeffedcba9876543210",
            "otel.span_id": "00f067aa0ba902b7",
            "dd.trace_id": str(0xFEDCBA9876543210),
            "dd.span_id": str(0x00F067AA0BA902B7),
            "log.record.uid": event.uid,
            "zenml.log.writer": event.writer,
            "zenml.log.sequence": 7,
        }
    ]


def test_an_entry_has_all_that_zenml_writes(make: Make, transport: Transport) -> None:
    stream = make_stream(**{"zenml.run.name": "monday"})
    (event,) = make_events(["hello"], stream, attributes={"epoch": 3}, metadata={"step": "fit"})
    make(service_version="2").export([event])
    resource = Resource({"service.name": "zenml", "service.version": "2"})
    record = SimpleNamespace(
        body="hello",
        attributes={"epoch": 3, **stream.metadata, "step": "fit"},
        timestamp=event.time_unix_nano,
        severity_text="INFO",
        severity_number=SeverityNumber.INFO,
        observed_timestamp=event.time_unix_nano,
        context=None,
    )
    readable = ReadableLogRecord(record, resource, InstrumentationScope("train"))  # type: ignore[arg-type]
    written = DatadogLogExporter._encode_log(readable)
    assert written.items() <= transport.entries[0].items()


def test_what_wins_where_names_are_equal(make: Make, transport: Transport) -> None:
    stream = make_stream(a="stream", b="stream")
    events = make_events(
        ["hello"], stream, attributes={"a": "extra", "b": "extra", "c": "extra"}, metadata={"b": "metadata"}
    )
    make().export(events)
    entry = transport.entries[0]
    assert (entry["a"], entry["b"], entry["c"]) == ("stream", "metadata", "extra")


@pytest.mark.parametrize("place", ["attributes", "metadata", "stream"])
def test_no_attribute_takes_a_reserved_place(make: Make, transport: Transport, place: str) -> None:
    strange: Mapping[str, Any] = {
        "message": "x",
        "status": "x",
        "timestamp": 1,
        "@timestamp": 1,
        "service": "x",
        "ddtags": "x",
        "host": "x",
        "log.record.uid": "x",
        "zenml.log.sequence": -1,
    }
    if place == "stream":
        events = make_events(["hello"], make_stream(**strange))
    else:
        events = make_events(["hello"], make_stream(), **{place: strange})
    make().export(events)
    entry = transport.entries[0]
    assert (entry["message"], entry["status"], entry["service"]) == ("hello", "info", "zenml")
    assert entry["timestamp"] == NOON // 1_000_000
    assert entry["log.record.uid"] == events[0].uid
    assert entry["zenml.log.sequence"] == 0
    assert not {"@timestamp", "host", "ddtags"} & entry.keys()
    assert (entry["extra.status"], entry["extra.host"], entry["extra.@timestamp"]) == ("x", "x", 1)


def test_attributes_of_the_environment_are_added(
    make: Make, transport: Transport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=prod,host=x")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "other")
    make().export(make_events(["hello"]))
    entry = transport.entries[0]
    assert entry["deployment.environment.name"] == "prod"
    assert (entry["service"], entry["service.name"], entry["extra.host"]) == ("zenml", "zenml", "x")


def test_an_environment_that_is_no_unicode_costs_no_event(
    make: Make, transport: Transport, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "team=\udcff,zone=1")
    make().export(make_events(["hello"]))
    assert (transport.entries[0]["message"], transport.entries[0]["zone"]) == ("hello", "1")


@pytest.mark.parametrize(
    ("level", "level_name", "status"),
    [
        (10, "DEBUG", "debug"),
        (20, "INFO", "info"),
        (30, "WARNING", "warn"),
        (40, "ERROR", "error"),
        (50, "CRITICAL", "fatal"),
        (25, "AUDIT", "info"),
        (35, "Level 35", "warn"),
        (5, "TRACE", "debug"),
        (5, "INFO", "debug"),
        (20, "FATAL", "info"),
        (60, "FIRE", "fatal"),
    ],
)
def test_status(make: Make, transport: Transport, level: int, level_name: str, status: str) -> None:
    make().export(make_events(["hello"], level=level, level_name=level_name))
    assert transport.entries[0]["status"] == status


def test_attributes_of_a_stream_are_computed_once_a_batch(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    computed = datadog.Stream.attributes
    monkeypatch.setattr(datadog.Stream, "attributes", property(lambda self: asked.append(self) or computed.fget(self)))
    one, other = make_stream(), make_stream()
    batch = [*make_events(["a", "b"], one), *make_events(["c"], other, first=2), *make_events(["d"], one, first=3)]
    make().export(batch)
    assert asked == [one, other]


@pytest.mark.parametrize(
    ("status", "headers", "error", "message"),
    [
        (400, {}, RejectedError, "malformed"),
        (401, {}, UnavailableError, "'api_key'"),
        (403, {}, UnavailableError, "'api_key'"),
        (404, {}, UnavailableError, r"'endpoint'.*\(https?://\S+/api/v2/logs, where Datadog's log intake is expected"),
        (302, {"Location": "https://elsewhere.test/"}, UnavailableError, "'endpoint'"),
        (408, {}, RetryableError, "408"),
        (413, {}, TooLargeError, "too large"),
        (429, {}, RetryableError, "429"),
        (500, {}, RetryableError, "500"),
        (503, {}, RetryableError, "503"),
    ],
)
def test_what_an_answer_means(
    make: Make,
    transport: Transport,
    status: int,
    headers: dict[str, str],
    error: type[Exception],
    message: str,
) -> None:
    transport.status, transport.headers = status, headers
    with pytest.raises(error, match=message) as caught:
        make().export(make_events(["hello"]))
    assert type(caught.value) is error
    assert KEY not in str(caught.value)
    assert getattr(caught.value, "count", None) is None
    assert len(transport.requests) == 1


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"X-RateLimit-Reset": "7"}, 7),
        ({"Retry-After": "3", "X-RateLimit-Reset": "7"}, 3),
        ({"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}, None),
        ({"X-RateLimit-Reset": "1790000000"}, None),
        ({"Retry-After": "-1"}, None),
        ({"Retry-After": "nan"}, None),
        ({"Retry-After": "inf"}, None),
        ({"Retry-After": "1_0"}, None),
        ({"Retry-After": "3 "}, 3),
        ({"Retry-After": "\u0663"}, None),
        ({"Retry-After": "9" * 5000}, None),
        ({}, None),
    ],
)
def test_when_to_try_again(make: Make, transport: Transport, headers: dict[str, str], seconds: float | None) -> None:
    transport.status, transport.headers = 429, headers
    with pytest.raises(RetryableError) as caught:
        make().export(make_events(["hello"]))
    assert caught.value.retry_after_seconds == seconds


def refused() -> Exception:
    """As urllib3 raises it; a kind of `TimeoutError` of its own."""
    error = urllib3.exceptions.NewConnectionError(urllib3.connection.HTTPConnection("x"), "Failed")
    error.__cause__ = ConnectionRefusedError(111, "Connection refused")
    return error


def certificate_error(verify_message: str) -> Exception:
    error = ssl.SSLCertVerificationError("certificate verify failed")
    error.verify_message = verify_message
    return error


@pytest.mark.parametrize(
    ("cause", "error", "message"),
    [
        (urllib3.exceptions.ConnectTimeoutError("late"), RetryableError, "in time"),
        (
            urllib3.exceptions.ReadTimeoutError(urllib3.HTTPConnectionPool("x"), "/", "late"),
            RetryableError,
            "in time",
        ),
        (refused(), RetryableError, "cannot reach http-intake.logs.datadoghq.com: Connection refused$"),
        (urllib3.exceptions.ProtocolError("gone"), RetryableError, "cannot reach .*ProtocolError"),
        (
            urllib3.exceptions.ProtocolError("Connection aborted.", BadStatusLine(KEY)),
            RetryableError,
            "cannot reach .*: BadStatusLine$",
        ),
        (urllib3.exceptions.ProtocolError("Connection aborted.", TimeoutError(KEY)), RetryableError, "in time$"),
        (AnswerTooLargeError(KEY), UnavailableError, "too large to be Datadog's"),
        (
            urllib3.exceptions.ProtocolError("Connection aborted.", ConnectionResetError(104, "reset by peer")),
            RetryableError,
            "cannot reach .*: reset by peer$",
        ),
        (
            urllib3.exceptions.ProtocolError("Connection aborted.", TimeoutError("timed out")),
            RetryableError,
            "did not answer in time",
        ),
        (OSError("no route"), RetryableError, "cannot reach .*OSError"),
        (urllib3.exceptions.SSLError("end of file"), RetryableError, "cannot reach .*SSLError"),
        (
            urllib3.exceptions.SSLError(certificate_error("Hostname mismatch")),
            UnavailableError,
            r"\(Hostname mismatch\); check 'endpoint' and 'site', .* REQUESTS_CA_BUNDLE",
        ),
    ],
)
def test_what_no_answer_means(
    make: Make, transport: Transport, cause: Exception, error: type[Exception], message: str
) -> None:
    transport.error = cause
    with pytest.raises(error, match=message) as caught:
        make().export(make_events(["hello"]))
    assert KEY not in str(caught.value)
    # Before there is a connection, the size of a request does not matter.
    is_connected = not isinstance(cause, urllib3.exceptions.ConnectTimeoutError | urllib3.exceptions.NewConnectionError)
    assert getattr(caught.value, "smaller_may_pass", is_connected) is is_connected


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_an_answer_that_may_be_about_size(make: Make, transport: Transport, status: int) -> None:
    transport.status = status
    with pytest.raises(RetryableError) as caught:
        make().export(make_events(["hello"]))
    assert caught.value.smaller_may_pass


def at(event: LogEvent, seconds_from_noon: float) -> LogEvent:
    return event._replace(time_unix_nano=NOON + int(seconds_from_noon * SECOND))


def test_old_events_are_rejected_and_the_others_sent(make: Make, transport: Transport) -> None:
    events = make_events(["old", "as old as may be", "young", "early", "too early"])
    hour = 3600
    batch = [
        at(event, seconds)
        for event, seconds in zip(events, (-18 * hour - 0.1, -18 * hour, 0, 2 * hour, 2 * hour + 0.1), strict=True)
    ]
    with pytest.raises(RejectedError, match=r"^older than 18 hours$") as caught:
        make().export(batch[:3])
    assert caught.value.count == 1
    assert [entry["message"] for entry in transport.entries] == ["as old as may be", "young"]
    with pytest.raises(RejectedError, match=r"^more than 2 hours ahead$") as caught:
        make().export(batch[2:])
    assert caught.value.count == 1
    with pytest.raises(RejectedError, match="older than 18 hours or more than 2 hours ahead") as caught:
        make().export(batch)
    assert (caught.value.count, caught.value.events) == (2, [batch[0], batch[-1]])


def test_nothing_is_sent_of_old_events_alone(make: Make, transport: Transport) -> None:
    with pytest.raises(RejectedError) as caught:
        make(now=NOON / SECOND + 19 * 3600).export(make_events(["a", "b"]))
    assert caught.value.count == 2
    assert transport.requests == []


def test_an_answer_comes_before_the_rejection_of_old_events(make: Make, transport: Transport) -> None:
    transport.status = 503
    old, young = make_events(["old", "young"])
    with pytest.raises(RetryableError):
        make().export([at(old, -19 * 3600), young])


def test_a_batch_too_large_is_not_sent(make: Make, transport: Transport) -> None:
    with pytest.raises(TooLargeError, match="5000000 bytes"):
        make().export(make_events(["x" * 900_000] * 6))
    with pytest.raises(TooLargeError, match="1000 entries"):
        make().export(make_events(["x"] * 1001))
    assert transport.requests == []
    make().export(make_events(["x" * 900_000] * 5))
    assert len(transport.payload) <= 5_000_000


@pytest.mark.parametrize(
    "message",
    ["x" * 5_000_000, "ä" * 3_000_000, "\0" * 1_000_000, '"' * 900_000, "\0" * 900_000 + "x" * 900_000],
    ids=["plain", "two bytes", "control", "quotes", "uneven"],
)
def test_a_long_message_is_shortened_and_counted(make: Make, transport: Transport, message: str) -> None:
    events = make_events([message, "short"])
    assert make().export(events) == 1
    long, short = transport.entries
    assert 900_000 < len(orjson.dumps(long)) <= 1_000_000
    assert "shortened by" in long["message"][-50:]
    assert long["message"][:1000] == message[:1000]
    assert short["message"] == "short"
    assert long.keys() == short.keys()


def test_the_message_is_cut_before_the_stack_trace_and_both_before_attributes(make: Make, transport: Transport) -> None:
    (event,) = make_events(
        ["m" * 700_000],
        exception=ExceptionInfo("E", "e", "s" * 700_000),
        attributes={"large": "a" * 700_000, "list": ["b" * 100] * 1_000},
    )
    assert make().export([event]) == 1
    entry = transport.entries[0]
    assert len(orjson.dumps(entry)) <= 1_000_000
    assert 9_000 < len(entry["message"]) < 10_000
    assert 100_000 < len(entry["exception.stacktrace"]) < 700_000
    assert len(entry["large"]) == 700_000
    assert len(entry["list"]) == 1_000


def test_what_is_short_stays_whole(make: Make, transport: Transport) -> None:
    (event,) = make_events(["short"], attributes={"large": ["b" * 1_000_000, "c" * 1_000_000]})
    assert make().export([event]) == 1
    entry = transport.entries[0]
    assert entry["message"] == "short"
    assert entry["large"].startswith('["bbb')
    assert len(orjson.dumps(entry)) <= 1_000_000


def test_an_entry_fits_however_many_attributes_it_has(make: Make, transport: Transport) -> None:
    (event,) = make_events(
        ["m" * 100_000],
        make_stream(endless="x" * 2_000_000),
        logger_name="l" * 1_000_000,
        file="f" * 1_000_000,
        attributes={**{f"number {n}": n for n in range(50_000)}, "k" * 1_000_000: "v"},
    )
    assert make().export([event]) == 1
    entry = transport.entries[0]
    assert len(orjson.dumps(entry)) <= 1_000_000
    assert entry["log.record.uid"] == event.uid
    assert entry["zenml.log.id"] == str(event.stream.id)
    assert entry["message"].startswith("mmm")
    assert "number 1" in entry
    left_out = sum(f"number {n}" not in entry for n in range(50_000))
    assert 0 < left_out < entry["otel.dropped_attributes_count"] < left_out + 20


def test_shortened_events_are_counted_beside_rejected_ones(make: Make) -> None:
    long, old = make_events(["x" * 1_500_000, "old"])
    with pytest.raises(RejectedError) as caught:
        make().export([long, at(old, -19 * 3600)])
    assert (caught.value.count, caught.value.shortened) == (1, 1)


def test_proxies_of_the_environment(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    assert make()._client.configuration.proxy is None
    monkeypatch.setenv("HTTPS_PROXY", "http://me:pass%40word@proxy.test:3128")
    configuration = make()._client.configuration
    assert configuration.proxy == "http://proxy.test:3128"
    assert configuration.proxy_headers == urllib3.make_headers(proxy_basic_auth="me:pass@word")
    assert make(endpoint="http://127.0.0.1:8126/in")._client.configuration.proxy is None
    monkeypatch.setenv("NO_PROXY", "datadoghq.com")
    assert make()._client.configuration.proxy is None
    assert make(site="datadoghq.eu")._client.configuration.proxy == "http://proxy.test:3128"


@pytest.mark.parametrize(
    "proxy",
    [
        "socks5://me:secret@proxy.test:1080",
        "http://me:secret#1@proxy.test:3128",
        "http://me:secret/1@proxy.test:3128",
        "http://me:secret@proxy.test:port",
        "http://me:secret@[proxy.test:3128",
    ],
)
def test_a_proxy_that_is_none(proxy: str, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", proxy)
    with pytest.raises(UnavailableError, match="NO_PROXY") as caught:
        make()
    assert "secret" not in str(caught.value)
    monkeypatch.setenv("HTTPS_PROXY", "proxy.test:3128")
    assert make()._client.configuration.proxy == "http://proxy.test:3128"


def test_certificates_of_the_environment(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    assert make()._client.configuration.ssl_ca_cert is None
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/etc/corporate.pem")
    assert make()._client.configuration.ssl_ca_cert == "/etc/corporate.pem"


def test_datadogs_variables_change_nothing(make: Make, transport: Transport, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DD_API_KEY", "DD_APP_KEY", "DD_SITE"):
        monkeypatch.setenv(name, "other")
    make().export(make_events(["hello"]))
    (request,) = transport.requests
    assert request["url"].startswith("https://http-intake.logs.datadoghq.com/")
    assert request["headers"]["DD-API-KEY"] == KEY
    assert "DD-APPLICATION-KEY" not in request["headers"]


def test_the_pipelines_logging_is_left_alone(make: Make) -> None:
    logger = logging.getLogger("urllib3")
    logger.setLevel(logging.ERROR)
    try:
        make()
        assert logger.level == logging.ERROR
    finally:
        logger.setLevel(logging.NOTSET)


def test_close_and_end_stream(make: Make) -> None:
    exporter = make()
    exporter.end_stream(make_stream())
    exporter.close()
