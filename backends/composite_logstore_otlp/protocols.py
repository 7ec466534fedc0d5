"""Tells a receiver for gRPC from one for HTTP: either one answers the other protocol in words that help nobody."""

from __future__ import annotations

import re
import socket
import ssl
from urllib.parse import urlsplit

from composite_logstore import UnavailableError

# https://www.rfc-editor.org/rfc/rfc9113#name-http-2-connection-preface, and an empty SETTINGS frame.
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
_HEAD_BYTES = 9
_SETTINGS = 4

# gRPC's words for a server that answers in HTTP/1, or does not offer HTTP/2 over TLS. The second ones are those of
# grpcio up to 1.70.
_HTTP_1 = re.compile(
    r"Expected SETTINGS frame|Failed parsing HTTP/2|http1\.x server|missing selected ALPN property", re.IGNORECASE
)
# The statuses with which an HTTP server refuses a path, a method or a type of content that it does not know.
_NOT_GRPC = {404, 405, 406, 415, 426, 501, 505}


def takes_grpc(place: str) -> UnavailableError:
    """Return the error of a request over HTTP to a receiver for gRPC.

    Args:
        place: The URL without a query.
    """
    return UnavailableError(
        f"a receiver for gRPC answers at port {port_of(place)}, and 'protocol' is 'http/protobuf'; set 'protocol' to "
        f"'grpc', or 'endpoint' to the port for HTTP (4318 of a collector)"
    )


def takes_http(place: str) -> UnavailableError:
    """Return the error of a request over gRPC to an HTTP server.

    Args:
        place: The host and the port.
    """
    return UnavailableError(
        f"an HTTP server answers at port {port_of(place)}, and 'protocol' is 'grpc'; set 'protocol' to "
        f"'http/protobuf', or 'endpoint' to the port for gRPC (4317 of a collector)"
    )


def says_http(details: str, status: int | None) -> bool:
    """Return whether the details of a failed call say that an HTTP server was called.

    Args:
        details: gRPC's words.
        status: The HTTP status in them.
    """
    return status in _NOT_GRPC or _HTTP_1.search(details) is not None


def is_settings(answer: bytes) -> bool:
    """Return whether an answer begins as that of a server for HTTP/2 does: with a SETTINGS frame."""
    # Its length is a multiple of 6, and its stream is number 0.
    return (
        len(answer) >= _HEAD_BYTES
        and answer[3] == _SETTINGS
        and int.from_bytes(answer[:3], "big") % 6 == 0
        and answer[5:_HEAD_BYTES] == bytes(4)
    )


def speaks_http2_alone(place: str, timeout_seconds: float) -> bool:
    """Ask the server at a URL whether it speaks HTTP/2 and no HTTP/1, as receivers for gRPC do.

    A server that speaks both has cut off a request for another reason.

    Args:
        place: The URL.
        timeout_seconds: How long each step may take, in seconds: connecting, and one answer.
    """
    try:
        if urlsplit(place).scheme == "https":
            return _chosen(place, "h2", timeout_seconds) and not _chosen(place, "http/1.1", timeout_seconds)
        if not is_settings(_answer(place, _PREFACE, timeout_seconds)):
            return False
        return not _answer(place, b"HEAD / HTTP/1.1\r\nHost: localhost\r\n\r\n", timeout_seconds).startswith(b"HTTP/1")
    except OSError:
        return False


def _answer(place: str, question: bytes, timeout_seconds: float) -> bytes:
    """Return the first bytes that a server answers without TLS; none if it closes the connection."""
    answer = b""
    with socket.create_connection(_address(place), timeout_seconds) as connection:
        connection.sendall(question)
        try:
            while len(answer) < _HEAD_BYTES and (part := connection.recv(_HEAD_BYTES - len(answer))):
                answer += part
        except ConnectionError:
            pass
    return answer


def _chosen(place: str, protocol: str, timeout_seconds: float) -> bool:
    """Return whether a server chooses a protocol over TLS, if it is offered nothing else."""
    # Nothing is sent over this connection, so nobody needs to be trusted.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols([protocol])
    host, port = _address(place)
    try:
        with (
            socket.create_connection((host, port), timeout_seconds) as plain,
            context.wrap_socket(plain, server_hostname=host) as secured,
        ):
            return secured.selected_alpn_protocol() == protocol
    except (ssl.SSLError, ConnectionError):
        return False


def _address(place: str) -> tuple[str, int]:
    return urlsplit(place).hostname or "", port_of(place)


def port_of(place: str) -> int:
    """Return the port of a URL, or of `host:port`."""
    url = urlsplit(place if "://" in place else f"//{place}")
    return url.port or (443 if url.scheme == "https" else 80)
