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
from composite_logstore_otlp.statuses import error_of, says_too_large

if TYPE_CHECKING:
    from composite_logstore_otlp.connection import Connection

SMALL_REQUEST_BYTES = 1024 * 1024
"""A request that no receiver calls too large."""

# What a server says is looked through no further.
_MOST_CHARACTERS = 1_000

# The first bytes of gzip. As a message of protobuf it would be a field of a type that does not exist.
_GZIP = b"\x1f\x8b"

_SERVICE = logs_service_pb2.DESCRIPTOR.services_by_name["LogsService"].full_name

# Not a round number, so that it is not taken for the limit of a collector, which says so in the same words.
_MAX_MESSAGE_BYTES = Bounds.EXPORT_BYTES + 1

_OPTIONS = [
    ("grpc.primary_user_agent", "composite-logstore"),
    # The delivery alone decides when to try again.
    ("grpc.enable_retries", 0),
    # A new channel connects anew. Otherwise all channels of the process to one address share a connection.
    ("grpc.use_local_subchannel_pool", 1),
    # Not a backoff, but how long connecting may take: with TLS that is four times the way there and back.
    ("grpc.min_reconnect_backoff_ms", 10_000),
    # Balancers forget a connection that was idle for minutes, and say so to neither side.
    ("grpc.client_idle_timeout_ms", 60_000),
    # More frequent pings, or pings without a call, are an attack to servers:
    # https://github.com/grpc/proposal/blob/master/A8-client-side-keepalive.md
    ("grpc.keepalive_time_ms", 300_000),
    # With it, Linux ends a connection whose other side has acknowledged nothing for so long (TCP_USER_TIMEOUT).
    ("grpc.keepalive_timeout_ms", 20_000),
    # What comes is bounded as it comes, and when it is decompressed, which is done here.
    ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.per_message_decompression", 0),
    ("grpc.max_metadata_size", Bounds.HEAD_BYTES // 4),
    ("grpc.absolute_max_metadata_size", Bounds.HEAD_BYTES),
    # Nor does a name's TXT record say how to send.
    ("grpc.service_config_disable_resolution", 1),
]

StatusCode = grpc.StatusCode

# After these the connection may be dead though it is open: a balancer or NAT has forgotten it, say. A channel would
# go on using it, or go on connecting for as long as nobody exports.
_CONNECTION_IN_DOUBT = {
    StatusCode.DEADLINE_EXCEEDED,
    StatusCode.UNAVAILABLE,
    StatusCode.CANCELLED,
    StatusCode.UNKNOWN,
    StatusCode.INTERNAL,
}

# By the specification: https://opentelemetry.io/docs/specs/otlp/#failures
# Besides, UNKNOWN and INTERNAL are what a collector that fails, or a proxy before it, answers, like HTTP's
# 500: giving up would lose the events for certain. RESOURCE_EXHAUSTED is judged by what it comes with.
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

# Nothing is wrong with the events; the specification only says not to repeat the request as it is.
_TO_MEND = {
    StatusCode.UNAUTHENTICATED: "check the credentials in 'headers'",
    StatusCode.PERMISSION_DENIED: "check the credentials in 'headers', and what they permit",
    StatusCode.UNIMPLEMENTED: "check 'endpoint' and 'compression': this is not taken there",
    StatusCode.NOT_FOUND: "check 'endpoint'",
    StatusCode.FAILED_PRECONDITION: "check your account there",
}

# How gRPC passes on what a proxy before the collector answers, which does not speak gRPC.
_HTTP_STATUS = re.compile(r"http2 header with status: (\d{3})")

_NOT_CONNECTED = re.compile(r"failed to connect to all addresses|errors resolving|(DNS|name) resolution", re.IGNORECASE)

# The same of the collector's answer, which is gRPC's own word and not the collector's, however it puts it.
_ANSWER_TOO_LARGE = re.compile(
    rf"CLIENT: received message larger|larger than max \(\d+ vs\. {_MAX_MESSAGE_BYTES}\)|metadata size exceeds",
    re.IGNORECASE,
)

# gRPC has no code of its own for it. TSI is its layer for TLS, and so says that a client certificate is wanted.
_TLS_FAILED = re.compile(
    r"handshake failed|security handshaker|SSL_ERROR_SSL|TSI_|verification check failed", re.IGNORECASE
)

_Version: TypeAlias = tuple[int, int, int] | None
"""What tells a file from its successor: when it was written, its size, its inode. None if it cannot be looked at."""


class GrpcTransport:
    """Sends requests over a channel. It is opened for a request, and closed when its connection is in doubt."""

    def __init__(self, connection: Connection) -> None:
        """Read the certificates; the channel is opened with the first request.

        Args:
            connection: Where and how to send.

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
            RetryableError: The collector cannot be reached, or asks to be tried again.
            RejectedError: The collector refused the request.
            TooLargeError: The collector takes no requests of that size.
            UnavailableError: Somebody must mend something.
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
        """What sends a request. It returns None where the status comes without a message."""
        if self._channel is None:
            endpoint = self._connection.endpoint
            compression = grpc.Compression.Gzip if self._connection.compression == "gzip" else None
            if self._credentials is not None:
                self._channel = grpc.secure_channel(endpoint, self._credentials, _OPTIONS, compression)
            else:
                self._channel = grpc.insecure_channel(endpoint, _OPTIONS, compression)
        # Not through the generated stub: it would serialize once more what is serialized already.
        return self._channel.unary_unary(f"/{_SERVICE}/Export")

    def _read_credentials(self) -> grpc.ChannelCredentials:
        connection = self._connection
        return grpc.ssl_channel_credentials(
            _read(connection.certificate_file),
            # One file may hold both.
            _read(connection.client_key_file or connection.client_certificate_file),
            _read(connection.client_certificate_file),
        )

    def _renew_credentials(self) -> None:
        """Connect anew with certificates that were replaced on disk: a channel keeps those that it was opened with."""
        if self._credentials is None or self._files == (versions := self._versions()):
            return
        try:
            self._credentials = self._read_credentials()
        except UnavailableError:
            # They are being replaced. Until they are there, the connection that is open is as good as it was.
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
        if (status := _HTTP_STATUS.search(details)) and (meaning := error_of(int(status[1]), answer, retry_after)):
            return meaning
        if code == StatusCode.UNAVAILABLE and _TLS_FAILED.search(details):
            return UnavailableError(f"{answer}; check 'endpoint', 'insecure' and the certificates")
        if code == StatusCode.RESOURCE_EXHAUSTED and retry_after is None and size > SMALL_REQUEST_BYTES:
            # Without a RetryInfo it is no call to wait but a limit: of a request's size, perhaps. If it is
            # still there for a small request it is another one, and has nothing to do with the events.
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
    """Return an answer as it was before it was compressed: whether it was is not told, but no message begins so.

    None at all, and one that takes more than may come, are no answers of OTLP's; the events were taken all the same.
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
    """Return the seconds to wait that the status comes with.

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
