"""OTLP over HTTP: https://opentelemetry.io/docs/specs/otlp/#otlphttp."""

from __future__ import annotations

import gzip
import ssl
import zlib
from http.client import BadStatusLine, RemoteDisconnected
from typing import TYPE_CHECKING

from google.protobuf.message import DecodeError
from google.rpc.status_pb2 import Status
from requests.exceptions import InvalidHeader, InvalidProxyURL, InvalidURL, Timeout
from requests.utils import get_environ_proxies, select_proxy
from urllib3.exceptions import (
    ConnectTimeoutError,
    HTTPError,
    LocationValueError,
    NewConnectionError,
    ProxyError,
    ReadTimeoutError,
)
from urllib3.exceptions import InvalidHeader as InvalidHeaderOfAnswer

from composite_logstore import (
    AnswerTooLargeError,
    Bounds,
    HttpClient,
    RejectedError,
    RetryableError,
    TooLargeError,
    UnavailableError,
    cause_of,
    retry_after,
)
from composite_logstore_otlp.protocols import is_settings, port_of, speaks_http2_alone, takes_grpc
from composite_logstore_otlp.statuses import error_of, says_too_large

if TYPE_CHECKING:
    from composite_logstore import HttpResponse
    from composite_logstore_otlp.connection import Connection

# How long a server may take to say that it speaks HTTP/2.
_ASK_SECONDS = 1.0

# Without a connection, the size of the request is not the cause.
_NOT_CONNECTED: tuple[type[HTTPError], ...] = (NewConnectionError, ConnectTimeoutError, ProxyError, LocationValueError)


class HttpTransport:
    """Sends requests over a connection that stays open."""

    def __init__(self, connection: Connection) -> None:
        """Prepare the session.

        Args:
            connection: The settings of the connection.
        """
        self._connection = connection
        self._client = HttpClient(None, connection.certificate_file, connection.client_certificate)
        self._has_answered = False
        self._headers = {"User-Agent": "composite-logstore", **connection.headers}
        self._headers["Content-Type"] = "application/x-protobuf"
        if connection.compression != "none":
            self._headers["Content-Encoding"] = connection.compression

    def send(self, payload: bytes, timeout_seconds: float) -> bytes:
        """Send a request once.

        A connection that turns out to be closed does not lead to a second attempt, unlike in OpenTelemetry's own
        exporter: the collector may have accepted the request, with only the answer lost.

        Args:
            payload: The serialized request.
            timeout_seconds: How long connecting, sending and waiting may take together.

        Returns:
            The serialized response.

        Raises:
            RetryableError: The collector cannot be reached, or asks for a retry.
            RejectedError: The collector rejected the request.
            TooLargeError: The collector accepts no requests of that size.
            UnavailableError: The user has to mend the settings or the collector.
        """
        try:
            response = self._client.request(
                "POST",
                self._connection.endpoint,
                headers=self._headers,
                body=self._compress(payload),
                timeout_seconds=timeout_seconds,
                max_bytes=Bounds.EXPORT_BYTES,
            )
        except AnswerTooLargeError:
            raise UnavailableError("the answer is too large to be a collector's; check 'endpoint'") from None
        except (HTTPError, OSError) as error:
            # The cause is left out, since it repeats the URL.
            raise self._failure(error, timeout_seconds) from None
        self._has_answered = True
        return self._judge(response, timeout_seconds)

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def _failure(self, error: Exception, timeout_seconds: float) -> RetryableError | UnavailableError:
        """Return the error for a request without an answer."""
        place = self._connection.place
        bad_line = cause_of(error, BadStatusLine)
        if bad_line is not None and is_settings(str(bad_line).encode("latin-1", "replace")):
            return takes_grpc(place)
        if not self._has_answered and _was_cut_off(error) and not _proxy_of(place):
            # A server that has never answered may not know HTTP/1. This is found out once.
            self._has_answered = True
            if speaks_http2_alone(place, min(timeout_seconds, _ASK_SECONDS)):
                return takes_grpc(place)
        return _failure(error, timeout_seconds, place)

    def _compress(self, payload: bytes) -> bytes:
        # Level 6 is zlib's own default; gzip's 9 takes far longer for next to nothing.
        if self._connection.compression == "gzip":
            return gzip.compress(payload, compresslevel=6)
        if self._connection.compression == "deflate":
            return zlib.compress(payload)
        return payload

    def _judge(self, response: HttpResponse, timeout_seconds: float) -> bytes:
        status, headers, body, fault = response
        content_type = headers.get("Content-Type", "").lower()
        if 200 <= status < 300:
            if response.is_web_page:
                raise UnavailableError("a web page answered, and no collector; check 'endpoint'")
            # The missing part of the answer may say which events were rejected. An answer that is too large or cannot
            # be decoded would be so each time, and the collector has accepted the events.
            if fault == "too late":
                raise _late(timeout_seconds)
            if fault == "cut":
                raise RetryableError("the collector's answer was cut off", smaller_may_pass=True)
            return body
        said = self._connection.quote(_message(content_type, body))
        answer = f"the collector answered {status}{': ' if said else ''}{said}"
        retry_after_seconds = retry_after(headers)
        error = error_of(status, answer, retry_after_seconds, self._connection.place)
        if (error is None or status >= 500) and retry_after_seconds is None and says_too_large(said):
            raise TooLargeError(answer)
        raise error or RejectedError(answer)


def _message(content_type: str, body: bytes) -> str:
    """Return the message of an error response: in OTLP it is a `Status`.

    https://opentelemetry.io/docs/specs/otlp/#failures-1
    """
    if content_type.startswith("application/x-protobuf"):
        try:
            return str(Status.FromString(body).message)
        except DecodeError:
            return ""
    return "" if content_type.startswith("text/html") else body.decode("utf-8", "replace")


def _was_cut_off(error: Exception) -> bool:
    """Return whether the server closed the connection without an answer, over TLS also before the request."""
    cut_off = (ConnectionResetError, ConnectionAbortedError, BrokenPipeError, RemoteDisconnected, ssl.SSLEOFError)
    tls = cause_of(error, ssl.SSLError)
    return any(cause_of(error, kind) is not None for kind in cut_off) or (
        tls is not None and "NO_APPLICATION_PROTOCOL" in (tls.reason or "")
    )


def _proxy_of(place: str) -> str | None:
    """Return the proxy through which requests to a URL are sent."""
    return select_proxy(place, get_environ_proxies(place))


def _failure(error: Exception, timeout_seconds: float, place: str) -> RetryableError | UnavailableError:
    """Return the error for a request without an answer. Libraries' own messages are not shown: they repeat the URL."""
    tls = cause_of(error, ssl.SSLError)
    if isinstance(tls, ssl.SSLCertVerificationError):
        return UnavailableError(
            f"the collector's certificate cannot be trusted ({tls.verify_message}); check 'certificate_file'"
        )
    if tls is not None and not isinstance(tls, ssl.SSLEOFError | ssl.SSLZeroReturnError):
        if tls.reason == "WRONG_VERSION_NUMBER":
            return UnavailableError(
                f"TLS fails (WRONG_VERSION_NUMBER): the server at port {port_of(place)} does not speak TLS; begin "
                f"'endpoint' with http://, or set the port for TLS"
            )
        return UnavailableError(f"TLS fails ({tls.reason or 'no reason given'}); check 'endpoint' and the certificates")
    answered_badly = cause_of(error, InvalidHeaderOfAnswer) is not None
    if isinstance(error, InvalidURL | InvalidHeader | InvalidProxyURL) and not answered_badly:
        return UnavailableError("'endpoint', 'headers' or the proxy's URL cannot be used; check them")
    smaller_may_pass = not any(cause_of(error, kind) for kind in _NOT_CONNECTED)
    if isinstance(error, Timeout | ReadTimeoutError) or cause_of(error, TimeoutError):
        return _late(timeout_seconds, smaller_may_pass)
    system = cause_of(error, OSError)
    words = f"the connection to the collector failed ({type(error).__name__})"
    if system is not None:
        words = f"cannot reach the collector: {system.strerror}"
    return RetryableError(words, smaller_may_pass=smaller_may_pass)


def _late(timeout_seconds: float, smaller_may_pass: bool = True) -> RetryableError:
    return RetryableError(f"no answer within {timeout_seconds:.1f} seconds", smaller_may_pass=smaller_may_pass)
