"""OTLP over gRPC: https://opentelemetry.io/docs/specs/otlp/#otlpgrpc."""

from __future__ import annotations

import os
import re
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from google.protobuf.message import DecodeError
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status
from opentelemetry.proto.collector.logs.v1 import logs_service_pb2

from composite_logstore import Bounds, RejectedError, RetryableError, TooLargeError, UnavailableError
from composite_logstore_otlp.grpc_guest import check_process, grpc
from composite_logstore_otlp.protocols import says_http, takes_http
from composite_logstore_otlp.statuses import error_of, says_too_large

if TYPE_CHECKING:
    from composite_logstore_otlp.connection import Connection

SMALL_REQUEST_BYTES = 1024 * 1024
"""No receiver finds a request of this size too large."""

# A server's text is searched no further.
_MOST_CHARACTERS = 1_000

# The first bytes of gzip. No message of protobuf begins like this: the field would have a type that does not exist.
_GZIP = b"\x1f\x8b"

_SERVICE = logs_service_pb2.DESCRIPTOR.services_by_name["LogsService"].full_name

# One more than a round number: a collector names its own limit in the same words, and must not be confused with this.
_MAX_MESSAGE_BYTES = Bounds.EXPORT_BYTES + 1

_OPTIONS = [
    ("grpc.primary_user_agent", "composite-logstore"),
    # Only the delivery decides when to retry.
    ("grpc.enable_retries", 0),
    # Let a new channel make a new connection. Otherwise all channels of a process to one address share one.
    ("grpc.use_local_subchannel_pool", 1),
    # Despite its name, this bounds the time of connecting, which takes four round trips with TLS.
    ("grpc.min_reconnect_backoff_ms", 10_000),
    # Load balancers drop a connection that was idle for minutes, and tell neither side.
    ("grpc.client_idle_timeout_ms", 60_000),
    # Servers take more frequent pings, or pings without a call, for an attack:
    # https://github.com/grpc/proposal/blob/master/A8-client-side-keepalive.md
    ("grpc.keepalive_time_ms", 300_000),
    # Linux then ends a connection whose other side has acknowledged nothing for so long (TCP_USER_TIMEOUT).
    ("grpc.keepalive_timeout_ms", 20_000),
    # Answers are bounded as they arrive, and again when this module decompresses them.
    ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.per_message_decompression", 0),
    ("grpc.max_metadata_size", Bounds.HEAD_BYTES // 4),
    ("grpc.absolute_max_metadata_size", Bounds.HEAD_BYTES),
    # A name's TXT record must not change how requests are sent.
    ("grpc.service_config_disable_resolution", 1),
]

StatusCode = grpc.StatusCode

# After these the connection may be dead although it is open, for example because a load balancer or NAT dropped it. A
# channel would continue to use it, or would try to connect while nothing is exported.
_CONNECTION_IN_DOUBT = {
    StatusCode.DEADLINE_EXCEEDED,
    StatusCode.UNAVAILABLE,
    StatusCode.CANCELLED,
    StatusCode.UNKNOWN,
    StatusCode.INTERNAL,
}

# By the specification: https://opentelemetry.io/docs/specs/otlp/#failures
# In addition UNKNOWN and INTERNAL: a collector that fails, or a proxy before it, answers with them, like HTTP's 500,
# and giving up would lose the events for certain. RESOURCE_EXHAUSTED depends on its details.
_RETRYABLE = {
    StatusCode.CANCELLED,
    StatusCode.DEADLINE_EXCEEDED,
    StatusCode.ABORTED,
    StatusCode.OUT_OF_RANGE,
    StatusCode.UNAVAILABLE,
    StatusCode.DATA_LOSS,
    StatusCode.UNKNOWN,
    StatusCode.INTERNAL,
}

# The events are not at fault; the specification only says not to retry the request unchanged.
_TO_MEND = {
    StatusCode.UNAUTHENTICATED: "check the credentials in 'headers'",
    StatusCode.PERMISSION_DENIED: "check the credentials in 'headers', and what they permit",
    StatusCode.UNIMPLEMENTED: "check 'endpoint' and 'compression': the receiver does not support one of them",
    StatusCode.NOT_FOUND: "check 'endpoint'",
    StatusCode.FAILED_PRECONDITION: "check your account there",
}

# gRPC's words for the answer of a proxy that does not speak gRPC.
_HTTP_STATUS = re.compile(r"http2 header with status: (\d{3})")

_NOT_CONNECTED = re.compile(r"failed to connect to all addresses|errors resolving|(DNS|name) resolution", re.IGNORECASE)

# gRPC's own words, rather than the collector's, for an answer of the collector that is too large.
_ANSWER_TOO_LARGE = re.compile(
    rf"CLIENT: received message larger|larger than max \(\d+ vs\. {_MAX_MESSAGE_BYTES}\)|metadata size exceeds",
    re.IGNORECASE,
)

# gRPC has no status code for TLS. TSI is its layer for TLS, which also reports a missing client certificate.
_TLS_FAILED = re.compile(
    r"handshake failed|security handshaker|SSL_ERROR_SSL|TSI_|verification check failed", re.IGNORECASE
)

_Version: TypeAlias = tuple[int, int, int] | None
"""Identifies the version of a file: its time of change, size and inode; None if the file cannot be examined."""


class GrpcTransport:
    """Sends requests over a channel, which it opens for a request, and closes when the connection may be dead."""

    def __init__(self, connection: Connection) -> None:
        """Read the certificates. The first request opens the channel.

        Args:
            connection: The settings of the connection.

        Raises:
            UnavailableError: A certificate cannot be read, or gRPC does not work in this process.
        """
        check_process()
        self._connection = connection
        self._metadata = tuple(connection.headers.items())
        self._channel: grpc.Channel | None = None
        self._credentials: grpc.ChannelCredentials | None = None
        self._files: tuple[_Version, ...] = ()
        if connection.secure:
            self._files = self._versions()
            self._credentials = self._read_credentials()

    def send(self, payload: bytes, timeout_seconds: float) -> bytes:
        """Send a request once.

        Args:
            payload: The serialized request.
            timeout_seconds: How long it may take.

        Returns:
            The serialized response.

        Raises:
            RetryableError: The collector cannot be reached, or asks for a retry.
            RejectedError: The collector rejected the request.
            TooLargeError: The collector accepts no requests of that size.
            UnavailableError: The user has to mend the settings or the collector.
        """
        check_process()
        self._renew_credentials()
        try:
            answer = self._export(payload, timeout=timeout_seconds, metadata=self._metadata)
        except grpc.RpcError as error:
            if error.code() in _CONNECTION_IN_DOUBT:
                self.close()
            raise self._failure(error, len(payload)) from None
        return _decompressed(answer)

    def close(self) -> None:
        """Close the channel, if it is open."""
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()

    @property
    def _export(self) -> grpc.UnaryUnaryMultiCallable[bytes, bytes | None]:
        """The call that sends a request. It returns None if the status has no message."""
        if self._channel is None:
            endpoint = self._connection.endpoint
            compression = grpc.Compression.Gzip if self._connection.compression == "gzip" else None
            if self._credentials is not None:
                self._channel = grpc.secure_channel(endpoint, self._credentials, _OPTIONS, compression)
            else:
                self._channel = grpc.insecure_channel(endpoint, _OPTIONS, compression)
        # The generated stub would serialize the request again.
        return self._channel.unary_unary(f"/{_SERVICE}/Export")

    def _read_credentials(self) -> grpc.ChannelCredentials:
        connection = self._connection
        return grpc.ssl_channel_credentials(
            _read(connection.certificate_file),
            # One file may contain both.
            _read(connection.client_key_file or connection.client_certificate_file),
            _read(connection.client_certificate_file),
        )

    def _renew_credentials(self) -> None:
        """Reconnect if certificates were replaced on disk: a channel keeps those with which it was opened."""
        if self._credentials is None or self._files == (versions := self._versions()):
            return
        try:
            self._credentials = self._read_credentials()
        except UnavailableError:
            # The files are being replaced. Until that is done, an open connection remains usable.
            if self._channel is None:
                raise
        else:
            self._files = versions
            self.close()

    def _versions(self) -> tuple[_Version, ...]:
        connection = self._connection
        files = (connection.certificate_file, connection.client_key_file, connection.client_certificate_file)
        return tuple(_version(file) for file in files)

    def _failure(self, error: Any, size: int) -> Exception:
        code, details = error.code(), error.details() or ""
        said = self._connection.quote(details)
        details = details[:_MOST_CHARACTERS]
        answer = f"gRPC {code.name}{': ' if said else ''}{said}"
        retry_after = _retry_after(error)
        if code == StatusCode.RESOURCE_EXHAUSTED and _ANSWER_TOO_LARGE.search(details):
            return UnavailableError(f"the answer is too large to be a collector's: {answer}; check 'endpoint'")
        if code in _RETRYABLE | {StatusCode.RESOURCE_EXHAUSTED} and retry_after is None and says_too_large(details):
            return TooLargeError(answer)
        found = _HTTP_STATUS.search(details)
        status = int(found[1]) if found else None
        place = self._connection.place
        if says_http(details, status):
            return takes_http(place)
        if status is not None and (meaning := error_of(status, answer, retry_after, place)):
            return meaning
        if code == StatusCode.UNAVAILABLE and _TLS_FAILED.search(details):
            return UnavailableError(f"{answer}; check 'endpoint', 'insecure' and the certificates")
        if code == StatusCode.RESOURCE_EXHAUSTED and retry_after is None and size > SMALL_REQUEST_BYTES:
            # Without a RetryInfo this is a limit rather than a request to wait, perhaps of the size of a request. If a
            # small request meets it too, it is another limit, and has nothing to do with the events.
            return TooLargeError(answer)
        if code == StatusCode.RESOURCE_EXHAUSTED or code in _RETRYABLE:
            return RetryableError(answer, retry_after, smaller_may_pass=not _NOT_CONNECTED.search(details))
        if code in _TO_MEND:
            return UnavailableError(f"{answer}; {_TO_MEND[code]}")
        return RejectedError(answer)


def _version(file: str | None) -> _Version:
    try:
        status = os.stat(file) if file else None
    except OSError:
        return None
    return status and (status.st_mtime_ns, status.st_size, status.st_ino)


def _read(file: str | None) -> bytes | None:
    try:
        return Path(file).read_bytes() if file else None
    except OSError as error:
        raise UnavailableError(f"a certificate cannot be read ({error.strerror})") from None


def _decompressed(answer: bytes | None) -> bytes:
    """Return an answer decompressed. gRPC does not tell whether it is compressed, but no message begins like gzip.

    A missing answer, or one that is larger than answers may be, counts as empty: the collector has accepted the events.
    """
    if answer is None or not answer.startswith(_GZIP):
        return answer or b""
    decoder = zlib.decompressobj(16 + zlib.MAX_WBITS)
    try:
        message = decoder.decompress(answer, Bounds.EXPORT_BYTES)
    except zlib.error:
        return b""
    return message if decoder.eof else b""


def _retry_after(error: Any) -> float | None:
    """Return how many seconds the status asks to wait; None if it does not.

    https://opentelemetry.io/docs/specs/otlp/#otlpgrpc-throttling
    """
    for name, value in error.trailing_metadata() or ():
        if name != "grpc-status-details-bin" or not isinstance(value, bytes):
            continue
        try:
            for detail in Status.FromString(value).details:
                retry_info = RetryInfo()
                if detail.Unpack(retry_info):
                    delay = retry_info.retry_delay
                    seconds = float(delay.seconds) + float(delay.nanos) / 1e9
                    return min(max(seconds, 0.0), Bounds.WAIT_SECONDS)
        except DecodeError:
            return None
    return None
