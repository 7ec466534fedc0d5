from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status
from grpc import StatusCode

from composite_logstore import LogEvent, RejectedError, RetryableError, TooLargeError, UnavailableError
from composite_logstore_otlp import encoding
from composite_logstore_otlp.config import OtlpChildConfig
from composite_logstore_otlp.exporter import MAX_GRPC_REQUEST_BYTES, OtlpExporter
from tests.events import make_events, make_stream
from tests.servers.faulty import FaultyProxy
from tests.servers.otlp_receiver import Answer, OtlpReceiver, decode_request, partial_success

MIB = 1024 * 1024


@pytest.fixture(scope="module")
def shared_receiver() -> Iterator[OtlpReceiver]:
    with OtlpReceiver() as receiver:
        yield receiver


@pytest.fixture
def receiver(shared_receiver: OtlpReceiver) -> OtlpReceiver:
    shared_receiver.requests.clear()
    shared_receiver.answers.clear()
    return shared_receiver


def make_exporter(receiver: OtlpReceiver, protocol: str, **settings: Any) -> OtlpExporter:
    if protocol == "grpc":
        settings = {"endpoint": receiver.grpc_endpoint, "insecure": True, **settings}
    else:
        settings = {"endpoint": receiver.http_endpoint, **settings}
    config = OtlpChildConfig(name="collector", type="otlp", **{"protocol": protocol, **settings})
    exporter = config.create_exporter()
    assert isinstance(exporter, OtlpExporter)
    return exporter


@pytest.fixture
def over_http(receiver: OtlpReceiver) -> Iterator[OtlpExporter]:
    exporter = make_exporter(receiver, "http/protobuf", export_timeout_millis=60_000)
    yield exporter
    exporter.close()


@pytest.fixture
def over_grpc(receiver: OtlpReceiver) -> Iterator[OtlpExporter]:
    exporter = make_exporter(receiver, "grpc", export_timeout_millis=60_000)
    yield exporter
    exporter.close()


@pytest.fixture(params=["http/protobuf", "grpc"])
def exporter(request: pytest.FixtureRequest) -> OtlpExporter:
    name = "over_grpc" if request.param == "grpc" else "over_http"
    found = request.getfixturevalue(name)
    assert isinstance(found, OtlpExporter)
    return found


def outcome_of(exporter: OtlpExporter, events: list[LogEvent] | None = None) -> Any:
    """How an export ended: what it raised, or how many events were shortened."""
    try:
        return exporter.export(events or make_events(["one", "two"]))
    except (RejectedError, RetryableError, TooLargeError, UnavailableError) as error:
        return error


class TestHttp:
    @pytest.mark.parametrize(
        ("statuses", "outcome"),
        [
            ((200, 202, 204), int),
            ((300, 301, 302, 303, 304, 307, 308), UnavailableError),
            ((400, 409, 418, 422), RejectedError),
            ((401, 402, 403, 404, 405, 406, 407, 410, 411, 414, 415, 421, 426, 431, 451, 494), UnavailableError),
            ((408, 425, 429), RetryableError),
            ((413,), TooLargeError),
            ((500, 502, 503, 504, 520, 599), RetryableError),
            ((501, 505, 511), UnavailableError),
        ],
    )
    def test_status(
        self, receiver: OtlpReceiver, over_http: OtlpExporter, statuses: tuple[int, ...], outcome: type
    ) -> None:
        for number, status in enumerate(statuses, start=1):
            receiver.answers.append(Answer(status, headers={"Location": receiver.http_endpoint}))
            result = outcome_of(over_http)
            assert type(result) is outcome, status
            assert len(receiver.requests) == number
            if outcome is not int:
                assert str(status) in str(result)
            if isinstance(result, RejectedError):
                assert result.count is None

    @pytest.mark.parametrize(
        ("header", "low", "high"),
        [
            ("7", 7, 7),
            ("0", 0, 0),
            ("999999999", 3600, 3600),
            ("9" * 5000, 3600, 3600),
        ],
    )
    @pytest.mark.parametrize("status", [429, 503])
    def test_retry_after(
        self, receiver: OtlpReceiver, over_http: OtlpExporter, status: int, header: str, low: float, high: float
    ) -> None:
        receiver.answers.append(Answer(status, {"Retry-After": header}))
        seconds = outcome_of(over_http).retry_after_seconds
        assert low <= seconds <= high

    @pytest.mark.parametrize(("ahead", "low", "high"), [(1000, 900, 1001), (-1000, 0, 0)])
    def test_a_retry_after_that_is_a_date(
        self, receiver: OtlpReceiver, over_http: OtlpExporter, ahead: int, low: float, high: float
    ) -> None:
        date = format_datetime(datetime.now(timezone.utc) + timedelta(seconds=ahead), usegmt=True)
        receiver.answers.append(Answer(503, {"Retry-After": date}))
        assert low <= outcome_of(over_http).retry_after_seconds <= high

    @pytest.mark.parametrize("header", ["soon", "-1", "²", "1.5", "", "Fri, 32 Foo 2026 00:00:00 GMT"])
    def test_a_retry_after_that_makes_no_sense(
        self, receiver: OtlpReceiver, over_http: OtlpExporter, header: str
    ) -> None:
        receiver.answers.append(Answer(503, {"Retry-After": header.encode().decode("latin-1")}))
        assert outcome_of(over_http).retry_after_seconds is None

    def test_a_web_page_is_no_success(self, receiver: OtlpReceiver, over_http: OtlpExporter) -> None:
        receiver.answers.append(Answer(200, {"Content-Type": "text/html; charset=utf-8"}, b"<h1>Log in</h1>"))
        assert isinstance(outcome_of(over_http), UnavailableError)

    @pytest.mark.parametrize("body", [b"OK", b"{}", b"\xff\xff\xff"])
    def test_a_success_with_another_body_is_one(
        self, receiver: OtlpReceiver, over_http: OtlpExporter, body: bytes
    ) -> None:
        receiver.answers.append(Answer(200, {"Content-Type": "text/plain"}, body))
        assert outcome_of(over_http) == 0

    def test_what_the_collector_says_is_shown_in_a_few_words(
        self, receiver: OtlpReceiver, over_http: OtlpExporter
    ) -> None:
        status = Status(code=3, message="bad\n\x1b[31mrecord\x00 " + "x" * 500)
        receiver.answers.append(Answer(400, body=status.SerializeToString()))
        message = str(outcome_of(over_http))
        assert message.startswith("the collector answered 400: bad [31mrecord xxx")
        assert len(message) < 260

    def test_a_long_answer_is_not_read_to_its_end(self, receiver: OtlpReceiver, over_http: OtlpExporter) -> None:
        receiver.answers.append(Answer(400, {"Content-Type": "text/plain"}, b"x" * (4 * MIB)))
        assert len(str(outcome_of(over_http))) < 260
        assert outcome_of(over_http) == 0

    def test_the_connection_is_kept(self, receiver: OtlpReceiver, over_http: OtlpExporter) -> None:
        receiver.answers.extend([Answer(), Answer(503, body=b"later"), Answer(200, body=partial_success(0, "slow"))])
        for _ in range(5):
            outcome_of(over_http)
        assert len({request.connection for request in receiver.requests}) == 1

    def test_a_connection_that_breaks_is_not_tried_again_at_once(
        self, receiver: OtlpReceiver, over_http: OtlpExporter
    ) -> None:
        receiver.answers.extend([Answer(), Answer(hang_up=True)])
        assert outcome_of(over_http) == 0
        assert isinstance(outcome_of(over_http), RetryableError)
        assert len(receiver.requests) == 2
        assert outcome_of(over_http) == 0

    @pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
    def test_a_status_that_may_be_about_size(
        self, receiver: OtlpReceiver, over_http: OtlpExporter, status: int
    ) -> None:
        """A proxy that waits for too long, for the request or for the collector, answers with some of these."""
        receiver.answers.append(Answer(status))
        assert outcome_of(over_http).smaller_may_pass

    @pytest.mark.parametrize(
        ("status", "words", "outcome"),
        [
            (400, "http: request body too large", TooLargeError),
            (400, "Maximum request body size 1048576 exceeded, actual body size 2000000", TooLargeError),
            (400, "Request payload size exceeds the limit: 4194304 bytes.", TooLargeError),
            (500, "code = ResourceExhausted desc = grpc: received message larger than max (5 vs. 4)", TooLargeError),
            (400, "the time of message 7 is in the future", RejectedError),
            (500, "the request took too long", RetryableError),
            (429, "Ingestion rate limit exceeded (limit: 4194304 bytes/sec), reduce log volume", RetryableError),
        ],
    )
    def test_words_about_size(
        self, receiver: OtlpReceiver, over_http: OtlpExporter, status: int, words: str, outcome: type
    ) -> None:
        receiver.answers.append(Answer(status, {"Content-Type": "text/plain"}, words.encode()))
        assert type(outcome_of(over_http)) is outcome

    def test_path_and_headers(self, receiver: OtlpReceiver) -> None:
        exporter = make_exporter(receiver, "http/protobuf", headers={"Authorization": "Bearer test-key\n", "X-A": "b"})
        assert outcome_of(exporter) == 0
        request = receiver.requests[0]
        assert request.path == "/v1/logs"
        assert request.headers["content-type"] == "application/x-protobuf"
        assert request.headers["authorization"] == "Bearer test-key"
        assert request.headers["x-a"] == "b"
        assert "content-encoding" not in request.headers
        exporter.close()

    def test_a_netrc_file_does_not_replace_the_credentials(
        self, receiver: OtlpReceiver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        netrc = tmp_path / "netrc"
        netrc.write_text("machine 127.0.0.1 login somebody password test-password\n")
        monkeypatch.setenv("NETRC", str(netrc))
        exporter = make_exporter(receiver, "http/protobuf", headers={"authorization": "Bearer test-key"})
        assert outcome_of(exporter) == 0
        assert receiver.requests[0].headers["authorization"] == "Bearer test-key"
        exporter.close()

    @pytest.mark.parametrize("compression", ["gzip", "deflate"])
    def test_compression(self, receiver: OtlpReceiver, compression: str) -> None:
        exporter = make_exporter(receiver, "http/protobuf", compression=compression)
        events = make_events(["one", "two"])
        assert exporter.export(events) == 0
        request = receiver.requests[0]
        assert request.headers["content-encoding"] == compression
        assert [record.body for record in decode_request(request.payload)] == ["one", "two"]
        exporter.close()

    def test_tls_where_there_is_none(self, receiver: OtlpReceiver) -> None:
        exporter = make_exporter(receiver, "http/protobuf", endpoint=f"https://127.0.0.1:{receiver.http_port}")
        assert isinstance(outcome_of(exporter), UnavailableError)
        exporter.close()

    def test_a_body_that_never_ends_is_given_up(self) -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        is_over = threading.Event()

        def serve() -> None:
            client, _ = listener.accept()
            with client:
                client.recv(65536)
                client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
                is_over.wait(60)

        threading.Thread(target=serve, daemon=True).start()
        config = OtlpChildConfig(
            name="c",
            type="otlp",
            endpoint=f"http://127.0.0.1:{listener.getsockname()[1]}",
            export_timeout_millis=200,
        )
        exporter = config.create_exporter()
        with pytest.raises(RetryableError, match="no answer within"):
            exporter.export(make_events(["one"]))
        is_over.set()
        exporter.close()
        listener.close()


class TestGrpc:
    @pytest.mark.parametrize(
        ("code", "outcome"),
        [
            (StatusCode.CANCELLED, RetryableError),
            (StatusCode.DEADLINE_EXCEEDED, RetryableError),
            (StatusCode.ABORTED, RetryableError),
            (StatusCode.OUT_OF_RANGE, RetryableError),
            (StatusCode.UNAVAILABLE, RetryableError),
            (StatusCode.DATA_LOSS, RetryableError),
            (StatusCode.UNKNOWN, RetryableError),
            (StatusCode.INTERNAL, RetryableError),
            (StatusCode.RESOURCE_EXHAUSTED, RetryableError),
            (StatusCode.UNAUTHENTICATED, UnavailableError),
            (StatusCode.PERMISSION_DENIED, UnavailableError),
            (StatusCode.UNIMPLEMENTED, UnavailableError),
            (StatusCode.NOT_FOUND, UnavailableError),
            (StatusCode.FAILED_PRECONDITION, UnavailableError),
            (StatusCode.INVALID_ARGUMENT, RejectedError),
            (StatusCode.ALREADY_EXISTS, RejectedError),
        ],
    )
    def test_code(self, receiver: OtlpReceiver, over_grpc: OtlpExporter, code: StatusCode, outcome: type) -> None:
        receiver.answers.append(Answer(code=code, details="because"))
        result = outcome_of(over_grpc)
        assert type(result) is outcome
        assert f"gRPC {code.name}: because" in str(result)
        assert len(receiver.requests) == 1
        assert getattr(result, "count", None) is None

    @pytest.mark.parametrize("code", [StatusCode.RESOURCE_EXHAUSTED, StatusCode.UNAVAILABLE])
    def test_retry_info(self, receiver: OtlpReceiver, over_grpc: OtlpExporter, code: StatusCode) -> None:
        for delay, seconds in (
            (Duration(seconds=7, nanos=500_000_000), 7.5),
            (Duration(seconds=-1), 0),
            (Duration(seconds=10**12), 3600),
        ):
            detail = AnyMessage()
            detail.Pack(RetryInfo(retry_delay=delay))
            status = Status(code=code.value[0], details=[AnyMessage(type_url="x/y"), detail])
            trailers = (("grpc-status-details-bin", status.SerializeToString()),)
            receiver.answers.append(Answer(code=code, details="slow down", trailers=trailers))
            result = outcome_of(over_grpc)
            assert isinstance(result, RetryableError)
            assert result.retry_after_seconds == seconds

    def test_a_retry_info_that_makes_no_sense(self, receiver: OtlpReceiver, over_grpc: OtlpExporter) -> None:
        trailers = (("grpc-status-details-bin", b"\xff\xff"),)
        receiver.answers.append(Answer(code=StatusCode.UNAVAILABLE, trailers=trailers))
        assert outcome_of(over_grpc).retry_after_seconds is None

    @pytest.mark.parametrize(
        ("code", "details"),
        [
            (StatusCode.RESOURCE_EXHAUSTED, "grpc: received message larger than max (5000000 vs. 4194304)"),
            (StatusCode.RESOURCE_EXHAUSTED, "gRPC message exceeds maximum size 4194304: 5000000"),
            (StatusCode.OUT_OF_RANGE, "Error, decoded message length too large: found 5 bytes, the limit is: 4 bytes"),
        ],
    )
    def test_a_request_that_is_too_large(
        self, receiver: OtlpReceiver, over_grpc: OtlpExporter, code: StatusCode, details: str
    ) -> None:
        receiver.answers.append(Answer(code=code, details=details))
        assert isinstance(outcome_of(over_grpc), TooLargeError)

    @pytest.mark.parametrize(
        ("code", "details", "outcome"),
        [
            (StatusCode.UNKNOWN, "Received http2 header with status: 413", TooLargeError),
            (StatusCode.UNKNOWN, "Payload Too Large", TooLargeError),
            (StatusCode.INTERNAL, "Received message exceeds the maximum configured message size.", TooLargeError),
            (StatusCode.UNKNOWN, "Received http2 header with status: 302", UnavailableError),
            (StatusCode.UNKNOWN, "Received http2 header with status: 431", UnavailableError),
            (StatusCode.UNAVAILABLE, "Received http2 header with status: 502", RetryableError),
            (StatusCode.INTERNAL, "Received http2 header with status: 400", RetryableError),
            (StatusCode.RESOURCE_EXHAUSTED, "message rate exceeds 1000 per second", RetryableError),
            (StatusCode.RESOURCE_EXHAUSTED, "quota exceeded: request of 4000 bytes", RetryableError),
        ],
    )
    def test_what_a_proxy_says(
        self, receiver: OtlpReceiver, over_grpc: OtlpExporter, code: StatusCode, details: str, outcome: type
    ) -> None:
        receiver.answers.append(Answer(code=code, details=details))
        result = outcome_of(over_grpc)
        assert type(result) is outcome
        assert outcome is not RetryableError or result.smaller_may_pass

    def test_a_large_request_that_exhausts_something_is_split(
        self, receiver: OtlpReceiver, over_grpc: OtlpExporter
    ) -> None:
        receiver.answers.append(Answer(code=StatusCode.RESOURCE_EXHAUSTED, details="quota"))
        assert isinstance(outcome_of(over_grpc, make_events(["x" * 2 * MIB])), TooLargeError)

    def test_headers(self, receiver: OtlpReceiver) -> None:
        exporter = make_exporter(receiver, "grpc", headers={"Authorization": "Bearer test-key\n"})
        assert outcome_of(exporter) == 0
        assert receiver.requests[0].headers["authorization"] == "Bearer test-key"
        exporter.close()

    def test_compression(self, receiver: OtlpReceiver) -> None:
        exporter = make_exporter(receiver, "grpc", compression="gzip")
        assert outcome_of(exporter) == 0
        assert [record.body for record in decode_request(receiver.requests[0].payload)] == ["one", "two"]
        exporter.close()

    def test_a_collector_that_is_far_away_is_reached(self, receiver: OtlpReceiver) -> None:
        with FaultyProxy(receiver.grpc_port) as proxy:
            proxy.fault = "far"
            exporter = make_exporter(receiver, "grpc", endpoint=f"127.0.0.1:{proxy.port}", export_timeout_millis=60_000)
            assert outcome_of(exporter) == 0
            exporter.close()

    def test_a_name_without_address_is_looked_up_again_with_each_request(
        self, receiver: OtlpReceiver, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # Too long a name to ask a server for.
        nobody, receivers = f"{'x' * 64}.invalid:4317", receiver.grpc_endpoint
        endpoints = iter([nobody, nobody, receivers])
        make_channel = grpc.insecure_channel
        monkeypatch.setattr(grpc, "insecure_channel", lambda _, *options: make_channel(next(endpoints), *options))
        exporter = make_exporter(receiver, "grpc", endpoint=nobody)
        for _ in range(2):
            result = outcome_of(exporter)
            assert isinstance(result, RetryableError)
            assert "x" * 32 in str(result)
        assert outcome_of(exporter) == 0
        exporter.close()

    def test_tls_where_there_is_none(self, receiver: OtlpReceiver) -> None:
        exporter = make_exporter(receiver, "grpc", insecure=False)
        assert isinstance(outcome_of(exporter), UnavailableError)
        exporter.close()


class TestBoth:
    def test_partial_success(self, receiver: OtlpReceiver, exporter: OtlpExporter) -> None:
        receiver.answers.append(Answer(body=partial_success(1, "too\nold")))
        result = outcome_of(exporter)
        assert isinstance(result, RejectedError)
        assert str(result) == "the collector rejected events: too old"
        assert result.count == 1

    @pytest.mark.parametrize(("rejected", "count"), [(-1, None), (0, None), (2, 2), (99, 2)])
    def test_partial_success_that_makes_no_sense(
        self, receiver: OtlpReceiver, exporter: OtlpExporter, rejected: int, count: int | None
    ) -> None:
        receiver.answers.append(Answer(body=partial_success(rejected, "a warning")))
        assert getattr(outcome_of(exporter), "count", None) == count

    @pytest.mark.parametrize("protocol", ["http/protobuf", "grpc"])
    def test_no_answer(self, receiver: OtlpReceiver, protocol: str, monkeypatch: pytest.MonkeyPatch) -> None:
        exporter = make_exporter(receiver, protocol, export_timeout_millis=1_000)
        send = exporter._transport.send
        asked: list[float] = []
        monkeypatch.setattr(
            exporter._transport, "send", lambda payload, seconds: (asked.append(seconds), send(payload, seconds))[1]
        )
        receiver.answers.append(Answer(delay_seconds=60))
        before = time.monotonic()
        assert isinstance(outcome_of(exporter), RetryableError)
        assert 0.4 < time.monotonic() - before < 50
        # Before the delivery itself takes the child for one that is stuck, after one second.
        assert 0.4 < asked[0] <= 0.9
        exporter.close()

    def test_a_connection_that_ends_without_an_answer(self, receiver: OtlpReceiver, over_http: OtlpExporter) -> None:
        receiver.answers.append(Answer(hang_up=True))
        assert outcome_of(over_http).smaller_may_pass

    @pytest.mark.parametrize("protocol", ["http/protobuf", "grpc"])
    def test_nobody_there(self, receiver: OtlpReceiver, protocol: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        exporter = make_exporter(receiver, protocol, endpoint=f"http://127.0.0.1:{port}", insecure=None)
        result = outcome_of(exporter)
        assert isinstance(result, RetryableError)
        assert "Connection refused" in str(result)
        assert not result.smaller_may_pass
        exporter.close()

    @pytest.mark.parametrize("protocol", ["http/protobuf", "grpc"])
    def test_an_unknown_host(self, receiver: OtlpReceiver, protocol: str) -> None:
        # Too long a name to ask a server for.
        nobody = f"http://{'x' * 64}.invalid:4318"
        exporter = make_exporter(receiver, protocol, endpoint=nobody, insecure=None, export_timeout_millis=3_000)
        result = outcome_of(exporter)
        assert isinstance(result, RetryableError)
        assert not result.smaller_may_pass
        exporter.close()

    @pytest.mark.parametrize("protocol", ["http/protobuf", "grpc"])
    def test_no_error_repeats_a_key(self, receiver: OtlpReceiver, protocol: str) -> None:
        exporter = make_exporter(receiver, protocol, headers={"authorization": "Bearer test-key-1"})
        said = "no such key: test-key-1 (Bearer test-key-1)"
        receiver.answers.extend(
            [
                Answer(403, {"Content-Type": "text/plain"}, said.encode(), StatusCode.PERMISSION_DENIED, said),
                Answer(body=partial_success(1, said)),
            ]
        )
        for _ in range(2):
            message = str(outcome_of(exporter))
            assert "no such key: ***" in message
            assert "test-key-1" not in message
        exporter.close()

    def test_an_event_that_cannot_be_encoded_is_rejected(self, exporter: OtlpExporter) -> None:
        for change in ({"message": "\ud800"}, {"time_unix_nano": -1}, {"logger_name": "\udcff"}):
            assert isinstance(outcome_of(exporter, make_events(["one"], **change)), RejectedError)

    def test_the_end_of_a_stream_sends_nothing(self, receiver: OtlpReceiver, exporter: OtlpExporter) -> None:
        exporter.end_stream(make_stream())
        assert receiver.requests == []


class TestSize:
    def test_a_batch_beyond_a_request_is_not_sent(self, receiver: OtlpReceiver, over_grpc: OtlpExporter) -> None:
        events = make_events(["x" * MIB] * 5)
        assert isinstance(outcome_of(over_grpc, events), TooLargeError)
        assert receiver.requests == []
        assert outcome_of(over_grpc, events[:3]) == 0

    def test_http_takes_larger_ones(self, receiver: OtlpReceiver, over_http: OtlpExporter) -> None:
        assert outcome_of(over_http, make_events(["x" * MIB] * 5)) == 0
        assert isinstance(outcome_of(over_http, make_events(["x" * MIB] * 20)), TooLargeError)

    @pytest.mark.parametrize(
        "changes",
        [
            {"message": "ü" * (5 * MIB)},
            {"attributes": {"a": "x" * (9 * MIB)}},
            {"attributes": {"a": [["x" * MIB] * 3, {"b": "y" * (2 * MIB)}]}},
            {"attributes": {f"a{number}": "x" * 100_000 for number in range(100)}},
            {"message": "x" * (2 * MIB), "metadata": {"a": "y" * (2 * MIB)}},
        ],
    )
    def test_texts_are_shortened_until_the_event_fits(
        self, receiver: OtlpReceiver, over_grpc: OtlpExporter, changes: dict[str, Any]
    ) -> None:
        events = make_events(["one"], **changes)
        assert over_grpc.export(events) == 1
        payload = receiver.requests[0].payload
        assert len(payload) < MAX_GRPC_REQUEST_BYTES
        record = decode_request(payload)[0]
        assert (
            record.attributes.keys()
            == {
                **events[0].details,
                **events[0].stream.attributes,
                **events[0].identity,
            }.keys()
        )
        assert "[shortened by " in str(record)

    @pytest.mark.parametrize(
        "attributes",
        [
            {"a": [1] * 800_000},
            {f"attribute {number}": number for number in range(150_000)},
            {"x" * (4 * MIB): 1},
        ],
    )
    def test_where_that_is_not_enough_attributes_are_left_out(
        self, receiver: OtlpReceiver, over_grpc: OtlpExporter, attributes: dict[str, Any]
    ) -> None:
        events = make_events(["one"], attributes=attributes)
        assert over_grpc.export(events) == 1
        record = decode_request(receiver.requests[0].payload)[0]
        assert record.body == "one"
        assert record.attributes == {**events[0].stream.attributes, **events[0].identity}

    def test_even_the_stream_s_if_they_do_not_fit(self, receiver: OtlpReceiver, over_grpc: OtlpExporter) -> None:
        events = make_events(["one"], make_stream(**{f"a{n}": [1] * 8_000 for n in range(100)}))
        assert over_grpc.export(events) == 1
        assert decode_request(receiver.requests[0].payload)[0].attributes == events[0].identity

    def test_an_event_that_fits_is_not_touched(self, receiver: OtlpReceiver, over_grpc: OtlpExporter) -> None:
        message = "x" * (encoding.MAX_EVENT_BYTES - 2_000)
        assert over_grpc.export(make_events([message])) == 0
        assert decode_request(receiver.requests[0].payload)[0].body == message

    def test_rejections_say_how_many_were_shortened(self, receiver: OtlpReceiver, over_http: OtlpExporter) -> None:
        receiver.answers.append(Answer(body=partial_success(1, "")))
        result = outcome_of(over_http, make_events(["x" * (4 * MIB), "two"]))
        assert (result.count, result.shortened) == (1, 1)
        assert "no reason given" in str(result)
