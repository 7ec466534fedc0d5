"""An `endpoint` that leads elsewhere: the error names the other protocol and port, or the URL and what was expected."""

from __future__ import annotations

import socket
import ssl
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme

from composite_logstore import RetryableError, UnavailableError
from composite_logstore_otlp.config import OtlpChildConfig
from composite_logstore_otlp.protocols import is_settings, says_http, speaks_http2_alone
from tests.events import make_events
from tests.servers.otlp_receiver import Answer, OtlpReceiver
from tests.servers.tls_proxy import TlsProxy


@pytest.fixture(scope="module")
def receiver() -> Iterator[OtlpReceiver]:
    with OtlpReceiver() as receiver:
        yield receiver


class Http2Alone:
    """A server that speaks HTTP/2 and resets every connection that begins otherwise, as receivers in Rust do.

    Attributes:
        asked: How each connection began.
    """

    def __init__(self, answer: bytes, to_head: bytes = b"") -> None:
        """Begin to listen.

        Args:
            answer: What it answers to HTTP/2.
            to_head: What it answers to a HEAD request over HTTP/1.
        """
        self.asked: list[bytes] = []
        self._answer = answer
        self._to_head = to_head
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            with client:
                asked = client.recv(100)
                self.asked.append(asked)
                if asked.startswith(b"PRI "):
                    client.sendall(self._answer)
                elif self._to_head and asked.startswith(b"HEAD "):
                    client.sendall(self._to_head)
                else:
                    # Closing then resets the connection.
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def __enter__(self) -> Http2Alone:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


def refusal(endpoint: str, protocol: str, **settings: Any) -> str:
    """Return why a child takes no event."""
    config = OtlpChildConfig(
        name="collector",
        type="otlp",
        endpoint=endpoint,
        protocol=protocol,
        **settings,  # type: ignore[arg-type]
    )
    exporter = config.create_exporter()
    try:
        with pytest.raises(UnavailableError) as refused:
            exporter.export(make_events(["one"]))
    finally:
        exporter.close()
    return str(refused.value)


def test_http_to_the_port_for_grpc(receiver: OtlpReceiver) -> None:
    said = refusal(f"http://{receiver.grpc_endpoint}", "http/protobuf")
    assert (
        f"gRPC answers at port {receiver.grpc_port}, and 'protocol' is 'http/protobuf'; set 'protocol' to 'grpc'"
        in said
    )
    assert "4318" in said


def test_grpc_to_the_port_for_http(receiver: OtlpReceiver) -> None:
    said = refusal(f"127.0.0.1:{receiver.http_port}", "grpc", insecure=True)
    assert f"HTTP server answers at port {receiver.http_port}, and 'protocol' is 'grpc'; set 'protocol' to" in said
    assert "'http/protobuf'" in said
    assert "4317" in said


@pytest.mark.parametrize("alpn", [["h2"], []])
def test_over_tls_too(receiver: OtlpReceiver, tmp_path: Path, alpn: list[str]) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    if alpn:
        context.set_alpn_protocols(alpn)
    port, protocol = (receiver.grpc_port, "http/protobuf") if alpn else (receiver.http_port, "grpc")
    with TlsProxy(context, port) as proxy:
        said = refusal(f"https://localhost:{proxy.port}", protocol, certificate_file=str(tmp_path / "ca.pem"))
    assert f"answers at port {proxy.port}, and 'protocol' is '{protocol}'" in said


SETTINGS = bytes((0, 0, 6, 4, 0, 0, 0, 0, 0)) + bytes(6)


def test_http_to_a_server_that_resets_it_and_speaks_http_2() -> None:
    with Http2Alone(SETTINGS) as server:
        assert f"gRPC answers at port {server.port}" in refusal(f"http://127.0.0.1:{server.port}", "http/protobuf")


def test_a_server_that_speaks_both_has_reset_it_for_another_reason() -> None:
    with Http2Alone(SETTINGS, b"HTTP/1.1 404 Not Found\r\n\r\n") as server:
        config = OtlpChildConfig(name="collector", type="otlp", endpoint=f"http://127.0.0.1:{server.port}")
        exporter = config.create_exporter()
        with pytest.raises(RetryableError):
            exporter.export(make_events(["one"]))
        exporter.close()


def test_over_tls_a_server_that_offers_both_is_none_for_grpc(receiver: OtlpReceiver) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("localhost").configure_cert(context)
    for offered, expected in ((["h2"], True), (["h2", "http/1.1"], False), (["http/1.1"], False), ([], False)):
        context.set_alpn_protocols(offered)
        with TlsProxy(context, receiver.http_port) as proxy:
            assert speaks_http2_alone(f"https://localhost:{proxy.port}", 5) is expected, offered


def test_a_server_that_resets_everything_is_asked_once_and_retried() -> None:
    with Http2Alone(b"") as server:
        config = OtlpChildConfig(name="collector", type="otlp", endpoint=f"http://127.0.0.1:{server.port}")
        exporter = config.create_exporter()
        for _ in range(3):
            with pytest.raises(RetryableError):
                exporter.export(make_events(["one"]))
        exporter.close()
        assert sum(asked.startswith(b"PRI ") for asked in server.asked) == 1


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (SETTINGS, True),
        (bytes((0, 0, 0, 4, 0, 0, 0, 0, 0)), True),
        (SETTINGS[:8], False),
        (b"", False),
        (b"HTTP/1.1 400 Bad Request", False),
        (b"SSH-2.0-OpenSSH", False),
        (bytes((0, 0, 5, 4, 0, 0, 0, 0, 0)), False),
        (bytes((0, 0, 6, 4, 0, 0, 0, 0, 1)), False),
    ],
)
def test_a_settings_frame_is_recognized(answer: bytes, expected: bool) -> None:
    assert is_settings(answer) is expected


@pytest.mark.parametrize(
    ("details", "status", "expected"),
    [
        ("Failed parsing HTTP/2 (Expected SETTINGS frame as the first frame, got frame type 79)", None, True),
        ("Trying to connect an http1.x server (HTTP status 400)", None, True),
        ("Cannot check peer: missing selected ALPN property.", None, True),
        *[("Received http2 header with status", status, True) for status in (404, 405, 415, 501)],
        *[("Received http2 header with status", status, False) for status in (302, 401, 413, 502)],
        ("Connection refused", None, False),
    ],
)
def test_what_grpc_says_of_an_http_server(details: str, status: int | None, expected: bool) -> None:
    assert says_http(details, status) is expected


@pytest.mark.parametrize("status", [301, 404, 405, 410, 421, 501])
def test_a_wrong_path_is_answered_with_the_url_and_what_was_expected(receiver: OtlpReceiver, status: int) -> None:
    receiver.answers.append(Answer(status))
    said = refusal(f"{receiver.http_endpoint}/v1/log?key=s3cret", "http/protobuf")
    assert f"{receiver.http_endpoint}/v1/log" in said
    assert "s3cret" not in said
    if status >= 400:
        assert "where a receiver for OTLP is expected, mostly with the path /v1/logs" in said


def test_tls_to_a_port_without_it_says_so(receiver: OtlpReceiver) -> None:
    said = refusal(f"https://127.0.0.1:{receiver.http_port}", "http/protobuf")
    assert f"the server at port {receiver.http_port} does not speak TLS; begin 'endpoint' with http://" in said
