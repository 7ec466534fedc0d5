"""Checks of an OTLP connection's settings that need no connection."""

from __future__ import annotations

import re
from typing import Literal
from urllib.parse import urlsplit

HTTP: Literal["http/protobuf"] = "http/protobuf"
GRPC: Literal["grpc"] = "grpc"

FILES = ("certificate_file", "client_key_file", "client_certificate_file")

# https://www.rfc-editor.org/rfc/rfc9110#name-tokens
_HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")

_HEADERS_OF_THE_EXPORTER = {
    "connection",
    "content-encoding",
    "content-length",
    "content-type",
    "te",
    "transfer-encoding",
}
_HOST_AND_PORT = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^\s/:@\[\]]+):[0-9]{1,5}")


def check_endpoint(label: str, endpoint: str, protocol: str, insecure: bool | None) -> None:
    """Check an endpoint without using it.

    Args:
        label: The endpoint's name in an error, which must not repeat its value: that may contain a key.
        endpoint: The endpoint.
        protocol: The protocol.
        insecure: The setting of that name.

    Raises:
        ValueError: The endpoint cannot be used.
    """
    if protocol == GRPC and "://" not in endpoint:
        if not _HOST_AND_PORT.fullmatch(endpoint):
            raise ValueError(f"{label} is not usable for gRPC; write it as host:port, or as a URL")
        return
    try:
        url = urlsplit(endpoint)
        host, port = url.hostname, url.port
    except ValueError:
        raise ValueError(f"{label} is not a URL that can be used; write it as http://host:port") from None
    if url.scheme not in ("http", "https"):
        other = f", or set 'protocol' to '{GRPC}'" if protocol == HTTP else ""
        raise ValueError(f"{label} must be a URL; begin it with http:// or https://{other}")
    if not host:
        raise ValueError(f"{label} has no host; write it as {url.scheme}://host:port")
    if url.username or url.password:
        raise ValueError(f"{label} holds a user or a password; put them into the header 'authorization'")
    if insecure is not None and insecure == (url.scheme == "https"):
        raise ValueError(f"'insecure' contradicts {label}, whose http:// or https:// decides; leave 'insecure' out")
    if protocol == GRPC:
        if url.path not in ("", "/") or url.query:
            raise ValueError(f"{label} has a path, and gRPC knows none; leave out what follows the port")
        if port is None and url.scheme == "http":
            raise ValueError(f"{label} has no port; add it (a collector's port for gRPC is 4317)")


def check_header(label: str, name: str, value: str, protocol: str) -> None:
    """Check that a header can be sent. Libraries would repeat a header that they refuse in their errors.

    Args:
        label: The header's name in an error.
        name: The header's name.
        value: The header's value.
        protocol: The protocol.

    Raises:
        ValueError: The header cannot be sent.
    """
    if not _HEADER_NAME.fullmatch(name):
        raise ValueError(f"{label} is not a header's name; use letters, digits and -")
    if name.lower() in _HEADERS_OF_THE_EXPORTER:
        raise ValueError(f"{label} is set by the exporter; leave it out")
    if protocol == GRPC and name.lower().startswith("grpc-"):
        raise ValueError(f"{label} begins with 'grpc-', which gRPC keeps for itself; leave it out")
    if protocol == GRPC and name.lower().endswith("-bin"):
        raise ValueError(f"{label} ends in '-bin', which gRPC keeps for binary values; use another name")
    if not all(" " <= character <= "~" or character == "\t" for character in value.strip()):
        raise ValueError(f"{label} has a line break or a character beyond ASCII; copy it again")


def check_compression(label: str, compression: str | None, protocol: str) -> None:
    """Check that the protocol supports the compression.

    Raises:
        ValueError: It does not.
    """
    if compression == "deflate" and protocol == GRPC:
        raise ValueError(f"{label} 'deflate' exists for '{HTTP}' alone; set 'gzip' or 'none'")
