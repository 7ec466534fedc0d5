"""What no answer of a backend can do: take memory or time without end, or change what is sent next."""

from __future__ import annotations

import logging
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import orjson
import pytest
import trustme
from urllib3.exceptions import HTTPError
from zenml.models import LogsResponse, LogsResponseBody
from zenml.utils.time_utils import utc_now

from composite_logstore import (
    Bounds,
    ChildConfig,
    Exporter,
    Page,
    PageRequest,
    RejectedError,
    RetryableError,
    TooLargeError,
    UnavailableError,
)
from composite_logstore.zenml import LogsEntriesFilter, LogStoreError
from composite_logstore_cloudwatch.config import CloudwatchChildConfig
from composite_logstore_datadog.config import DatadogChildConfig
from composite_logstore_elasticsearch.config import ElasticsearchChildConfig
from composite_logstore_otel.config import OtelChildConfig
from composite_logstore_otlp.config import OtlpChildConfig
from tests.events import make_events
from tests.servers.hostile import ANSWERS, BODIES, GRPC_ANSWERS, HEADS, MIB, HostileServer, grpc_answer, plain
from tests.servers.tls_proxy import TlsProxy

KEY = "test-key-12345"
TIMEOUT_SECONDS = 0.5
# A busy machine is late itself.
SLACK_SECONDS = 1.5
# What lies in this machine's own buffers was sent, but not read.
BUFFERED_BYTES = 8 * MIB


@pytest.fixture(scope="module")
def shared_server() -> Iterator[HostileServer]:
    with HostileServer() as server:
        yield server


@pytest.fixture
def server(shared_server: HostileServer) -> HostileServer:
    shared_server.answer = plain()
    shared_server.requests.clear()
    shared_server.sent = 0
    return shared_server


@pytest.fixture(autouse=True)
def _credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test-access-key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", KEY)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


def otlp(server: HostileServer) -> ChildConfig:
    return OtlpChildConfig(
        name="hostile",
        type="otlp",
        endpoint=server.url,
        headers={"authorization": f"Bearer {KEY}"},  # type: ignore[dict-item]
        export_timeout_millis=int(TIMEOUT_SECONDS * 1000),
    )


def otlp_over_grpc(server: HostileServer) -> ChildConfig:
    child = otlp(server)
    return child.model_copy(update={"protocol": "grpc", "endpoint": f"127.0.0.1:{server.port}", "insecure": True})


def datadog(server: HostileServer) -> ChildConfig:
    return DatadogChildConfig(
        name="hostile",
        type="datadog",
        endpoint=f"{server.url}/api/v2/logs",
        api_endpoint=server.url,
        api_key=KEY,  # type: ignore[arg-type]
        application_key=f"{KEY}-application",  # type: ignore[arg-type]
        export_timeout_millis=int(TIMEOUT_SECONDS * 1000),
    )


def of_the_sdk(server: HostileServer) -> ChildConfig:
    return through("otlp_proto_http", server, timeout=TIMEOUT_SECONDS, headers={"key": KEY})


def of_zenml(server: HostileServer) -> ChildConfig:
    name = "zenml.log_stores.datadog.datadog_log_exporter.DatadogLogExporter"
    return through(name, server, timeout=TIMEOUT_SECONDS, headers={"DD-API-KEY": KEY})


def through(exporter: str, server: HostileServer, **arguments: Any) -> ChildConfig:
    return OtelChildConfig(
        name="hostile", type="otel", exporter=exporter, arguments={"endpoint": f"{server.url}/v1/logs", **arguments}
    )


def elasticsearch(server: HostileServer) -> ChildConfig:
    return ElasticsearchChildConfig(
        name="hostile",
        type="elasticsearch",
        url=server.url,
        api_key=KEY,  # type: ignore[arg-type]
        export_timeout_millis=int(TIMEOUT_SECONDS * 1000),
    )


def cloudwatch(server: HostileServer) -> ChildConfig:
    return CloudwatchChildConfig(
        name="hostile",
        type="cloudwatch",
        endpoint_url=server.url,
        region="eu-central-1",
        export_timeout_millis=int(TIMEOUT_SECONDS * 1000),
    )


def behind_a_collector(**section: Any) -> Callable[[HostileServer], ChildConfig]:
    def make(server: HostileServer) -> ChildConfig:
        read = {name: server.url if value == "URL" else value for name, value in section.items()}
        return OtlpChildConfig(name="hostile", type="otlp", endpoint=server.url, read={**read, "api_key": KEY})

    return make


READERS = {
    "datadog": datadog,
    "elasticsearch": elasticsearch,
    "cloudwatch": cloudwatch,
    "clickhouse": behind_a_collector(type="clickhouse", url="URL"),
    "loki": behind_a_collector(type="loki", query_url="URL"),
    "victorialogs": behind_a_collector(type="victorialogs", url="URL"),
    "elasticsearch behind a collector": behind_a_collector(type="elasticsearch", url="URL"),
}
CHILDREN = {"otlp": otlp, "datadog": datadog}
# Exporters of others, which answer nothing but success and failure.
GUESTS = {"otel with the SDK's exporter": of_the_sdk, "otel with ZenML's exporter": of_zenml}
EVERYBODY = {**CHILDREN, **GUESTS}

# Of each backend that sends: what it may be answered, and what is an honest answer.
EXPORTS = {
    "otlp": (otlp, ANSWERS, plain()),
    "datadog": (datadog, ANSWERS, plain(b"{}", "202 Accepted")),
    **{name: (make, ANSWERS, plain()) for name, make in GUESTS.items()},
    "elasticsearch": (
        elasticsearch,
        ANSWERS,
        plain(orjson.dumps({"errors": False, "items": [{"create": {"status": 201}}] * 2})),
    ),
    "cloudwatch": (cloudwatch, ANSWERS, plain(b"{}")),
    "otlp over grpc": (otlp_over_grpc, GRPC_ANSWERS, grpc_answer(b"\0\0\0\0\0")),
}


def _unless(name: str, *quick: str) -> Any:
    """Leave what shares its client with another one to the tests that take minutes."""
    return () if name in quick else pytest.mark.deep


LOGS = LogsResponse(
    id=uuid4(), body=LogsResponseBody(created=utc_now(), updated=utc_now(), project_id=uuid4(), source="step")
)


def outcome_of(exporter: Exporter) -> Any:
    """How an export ended: what it raised, or how many events were shortened."""
    try:
        return exporter.export(make_events(["one", "two"], time_unix_nano=time.time_ns()))
    except (RejectedError, RetryableError, TooLargeError, UnavailableError) as error:
        return error


def read(child: ChildConfig, direction: Any = "older", **filters: Any) -> Page | LogStoreError:
    reader = child.create_reader()
    try:
        return reader.read(PageRequest(LOGS, direction, None, 100, LogsEntriesFilter(**filters)))
    except LogStoreError as error:
        return error
    finally:
        reader.close()


def assert_fit_to_be_shown(text: str) -> None:
    assert text.isprintable()
    assert len(text) < 400
    assert KEY not in text


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        pytest.param(name, answer, marks=pytest.mark.deep if name in ("elasticsearch", "cloudwatch") else ())
        for name, (_, answers, _) in EXPORTS.items()
        for answer in answers
    ],
)
def test_an_export_takes_what_it_may_and_no_more(name: str, answer: str, server: HostileServer) -> None:
    make, answers, honest = EXPORTS[name]
    exporter = make(server).create_exporter()
    server.answer = answers[answer]
    begin = time.monotonic()
    outcome = outcome_of(exporter)
    # The SDK's exporter sends once more where a connection ends.
    assert time.monotonic() - begin < 2 * TIMEOUT_SECONDS + SLACK_SECONDS
    # gRPC answers pings and the like for as long as it waits, and keeps nothing of them.
    assert server.sent < BUFFERED_BYTES or name == "otlp over grpc"
    if answer in HEADS or outcome != 0:
        # No event is lost for it.
        assert isinstance(outcome, RetryableError | UnavailableError)
        assert_fit_to_be_shown(str(outcome))
    if answer in BODIES and name == "datadog":
        # That it was taken is in the status, and Datadog has nothing else to say.
        assert outcome == 0
    server.answer = honest
    server.hang_up()
    # That a connection has ended may be noticed with the next request only, and gRPC waits before it makes another.
    give_up_at = time.monotonic() + 5
    while outcome_of(exporter) != 0:
        assert time.monotonic() < give_up_at
        time.sleep(0.05)
    exporter.close()


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("name", [pytest.param(name, marks=_unless(name, "datadog")) for name in READERS])
def test_a_search_takes_what_it_may_and_no_more(
    name: str, answer: str, server: HostileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Bounds, "SEARCH_SECONDS", TIMEOUT_SECONDS)
    monkeypatch.setattr(Bounds, "PAGE_BYTES", 4096)
    server.answer = ANSWERS[answer]
    begin = time.monotonic()
    outcome = read(READERS[name](server))
    assert time.monotonic() - begin < TIMEOUT_SECONDS + SLACK_SECONDS
    assert isinstance(outcome, LogStoreError)
    assert_fit_to_be_shown(str(outcome))
    # An answer that is too large is asked for in smaller pieces.
    assert server.sent < BUFFERED_BYTES
    assert len(server.requests) <= 4
    if name != "datadog":
        return
    server.answer = plain(orjson.dumps({"data": []}))
    assert read(datadog(server)) == Page()


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("name", CHILDREN)
def test_the_time_is_asked_for_within_the_same_bounds(name: str, answer: str, server: HostileServer) -> None:
    server.answer = ANSWERS[answer]
    begin = time.monotonic()
    with suppress(OSError, HTTPError):
        assert CHILDREN[name](server).backend_time() is None
    assert time.monotonic() - begin < TIMEOUT_SECONDS + SLACK_SECONDS
    assert server.sent < BUFFERED_BYTES


@pytest.mark.parametrize("status", ["301 Moved", "307 Temporary"])
@pytest.mark.parametrize("name", READERS)
def test_no_reader_follows_a_redirect(name: str, status: str, server: HostileServer) -> None:
    with HostileServer(plain(b"{}")) as elsewhere:
        server.answer = plain(status=status, headers=f"Location: {elsewhere.url}/\r\nRefresh: 0\r\n")
        outcome = read(READERS[name](server))
        assert isinstance(outcome, LogStoreError)
        assert_fit_to_be_shown(str(outcome))
        assert elsewhere.requests == []


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "303 See Other", "307 Temporary", "308 Permanent"])
@pytest.mark.parametrize("name", EVERYBODY)
def test_no_redirect_is_followed(name: str, status: str, server: HostileServer) -> None:
    with HostileServer(plain(orjson.dumps({"data": []}))) as elsewhere:
        server.answer = plain(status=status, headers=f"Location: {elsewhere.url}/api/v2/logs\r\nRefresh: 0\r\n")
        child = EVERYBODY[name](server)
        exporter = child.create_exporter()
        assert isinstance(outcome_of(exporter), RetryableError if name in GUESTS else UnavailableError)
        exporter.close()
        if child.readable:
            assert isinstance(read(child), LogStoreError)
        child.backend_time()
        assert elsewhere.requests == []


@pytest.mark.parametrize("status", ["600 Odd", "999 Odd"])
@pytest.mark.parametrize("name", EVERYBODY)
def test_a_status_that_there_is_not_is_no_success(name: str, status: str, server: HostileServer) -> None:
    server.answer = plain(status=status)
    exporter = EVERYBODY[name](server).create_exporter()
    assert isinstance(outcome_of(exporter), RetryableError | UnavailableError)
    exporter.close()


PAGES = {
    "of its type": ("text/html; charset=utf-8", b"Please log in"),
    "of another type": ("application/xhtml+xml", b""),
    "by its content": ("application/json", b"\r\n<!DOCTYPE html><title>Log in</title>"),
    "by its first element": ("", b"<HTML>"),
}


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("name", EVERYBODY)
def test_a_web_page_is_no_success(name: str, page: str, server: HostileServer) -> None:
    content_type, body = PAGES[page]
    server.answer = plain(body, content_type=content_type)
    exporter = EVERYBODY[name](server).create_exporter()
    assert isinstance(outcome_of(exporter), RetryableError if name in GUESTS else UnavailableError)
    exporter.close()


@pytest.mark.parametrize("name", EVERYBODY)
def test_an_answer_with_two_lengths_warns_of_nothing(
    name: str, server: HostileServer, caplog: pytest.LogCaptureFixture
) -> None:
    body = b"{}" if name in ("datadog", "otel with ZenML's exporter") else b""
    chunk = b"%x\r\n%s\r\n" % (len(body), body) if body else b""
    server.answer = plain(chunk + b"0\r\n\r\n", "202 Accepted", "Transfer-Encoding: chunked\r\n")
    exporter = EVERYBODY[name](server).create_exporter()
    assert outcome_of(exporter) == 0
    exporter.close()
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []


@pytest.mark.parametrize("name", EVERYBODY)
def test_nothing_that_was_answered_comes_back_with_the_next_request(
    name: str, server: HostileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login somebody password test-password\n")
    monkeypatch.setenv("NETRC", str(netrc))
    headers = (
        'Set-Cookie: a=cookie; Path=/\r\nAlt-Svc: h2=":1"\r\nStrict-Transport-Security: max-age=99\r\n'
        'WWW-Authenticate: Basic realm=x\r\nETag: "tag"\r\nLink: </>\r\n'
    )
    exporter = EVERYBODY[name](server).create_exporter()
    for status in ("200 OK", "401 Unauthorized", "200 OK"):
        server.answer = plain(orjson.dumps({"data": []}), status, headers)
        outcome_of(exporter)
        if EVERYBODY[name](server).readable:
            read(EVERYBODY[name](server))
        EVERYBODY[name](server).backend_time()
    exporter.close()
    sent: dict[bytes, list[set[bytes]]] = {}
    for head, _ in server.requests:
        request, *lines = head.split(b"\r\n")
        sent.setdefault(request, []).append({line for line in lines if not line.startswith(b"Content-Length")})
    for each in sent.values():
        assert len(each) == 3
        assert each[0] == each[1] == each[2]
        assert not any(line.lower().startswith(b"cookie") or b"Basic" in line for line in each[0])


@pytest.mark.parametrize("name", EVERYBODY)
def test_the_proxy_of_the_environment_is_used(
    name: str, server: HostileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with HostileServer(plain(orjson.dumps({"data": []}))) as proxy:
        monkeypatch.setenv("http_proxy", f"http://me:secret@127.0.0.1:{proxy.port}")
        monkeypatch.setenv("no_proxy", "")
        child = EVERYBODY[name](server)
        exporter = child.create_exporter()
        assert outcome_of(exporter) == 0
        exporter.close()
        if child.readable:
            assert read(child) == Page()
        child.backend_time()
        assert proxy.requests
        for head, _ in proxy.requests:
            assert head.split()[1].startswith(server.url.encode())
            assert b"\r\nproxy-authorization: basic " in head.lower()
        assert server.requests == []


@pytest.mark.parametrize("answer", HEADS)
@pytest.mark.parametrize("name", CHILDREN)
def test_a_proxy_is_trusted_no_more(
    name: str, answer: str, server: HostileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it may be spoken through with TLS is its own answer."""
    monkeypatch.setenv("https_proxy", server.url)
    monkeypatch.setenv("no_proxy", "")
    url = "https://127.0.0.1:9/api/v2/logs"
    exporter = CHILDREN[name](server).model_copy(update={"endpoint": url}).create_exporter()
    server.answer = ANSWERS[answer]
    begin = time.monotonic()
    outcome = outcome_of(exporter)
    exporter.close()
    assert time.monotonic() - begin < TIMEOUT_SECONDS + SLACK_SECONDS
    assert server.sent < BUFFERED_BYTES
    assert [head.split()[0] for head, _ in server.requests] == [b"CONNECT"]
    assert isinstance(outcome, RetryableError | UnavailableError)
    assert_fit_to_be_shown(str(outcome))


@pytest.mark.parametrize("answer", ["headers that trickle", "hints without end", "a body that trickles", "a gzip bomb"])
@pytest.mark.parametrize("name", CHILDREN)
def test_the_bounds_hold_within_tls(
    name: str, answer: str, server: HostileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    authority.cert_pem.write_to_path(str(tmp_path / "authority.pem"))
    # As it is set for all programs of a machine.
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "authority.pem"))
    server.answer = ANSWERS[answer]
    with TlsProxy(context, server.port) as proxy:
        url = f"https://127.0.0.1:{proxy.port}/api/v2/logs"
        exporter = CHILDREN[name](server).model_copy(update={"endpoint": url}).create_exporter()
        begin = time.monotonic()
        outcome = outcome_of(exporter)
        assert time.monotonic() - begin < TIMEOUT_SECONDS + SLACK_SECONDS
        exporter.close()
    assert len(server.requests) == 1
    if answer in HEADS or outcome != 0:
        assert isinstance(outcome, RetryableError | UnavailableError)


def test_a_process_does_not_grow(server: HostileServer) -> None:
    """Measured where nothing else takes memory."""
    names = ["a body without end", "a gzip bomb", "a bomb within a bomb", "large headers"]
    server.answer = plain(orjson.dumps({"data": []}))
    with ExitStack() as stack:
        hostile = [stack.enter_context(HostileServer(ANSWERS[name])) for name in names]
        program = [sys.executable, "-c", _MEASURE, server.url, *(other.url for other in hostile)]
        done = subprocess.run(program, capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    lines = done.stdout.split()
    assert len(lines) == len(names) * (len(EVERYBODY) + 1)
    # A body without end had 64 MiB, a bomb has 512 MiB.
    assert max(map(int, lines)) < 24 * 1024


_MEASURE = """
import resource, sys
from types import SimpleNamespace
from tests.integration.test_hostile_answers import EVERYBODY, datadog, outcome_of, read

def act(url):
    server = SimpleNamespace(url=url, port=0)
    yield read(datadog(server))
    for make in EVERYBODY.values():
        exporter = make(server).create_exporter()
        yield outcome_of(exporter)
        exporter.close()

honest, *hostile = sys.argv[1:]
# What all of them import.
list(act(honest))
for url in hostile:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in act(url):
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
