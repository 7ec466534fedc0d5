"""OTLP over HTTP: https://opentelemetry.io/docs/specs/otlp/#otlphttp."""

from __future__ import annotations

import gzip
import ssl
import time
import zlib
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, TypeVar

from google.protobuf.message import DecodeError
from google.rpc.status_pb2 import Status
from requests.exceptions import InvalidHeader, InvalidProxyURL, InvalidURL, Timeout
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
)
from composite_logstore_otlp.statuses import error_of, says_too_large

if TYPE_CHECKING:
    from composite_logstore import HttpResponse
    from composite_logstore_otlp.connection import Connection

# Without a connection, the size of the request is not the cause.
_NOT_CONNECTED: tuple[type[HTTPError], ...] = (NewConnectionError, ConnectTimeoutError, ProxyError, LocationValueError)

Cause = TypeVar("Cause", bound=BaseException)


class HttpTransport:
    """Sends requests over a connection that stays open."""

    def __init__(self, connection: Connection) -> None:
        """Prepare the session.

        Args:
            connection: The settings of the connection.
        """
        self._connection = connection
        self._client = HttpClient(None, connection.certificate_file, connection.client_certificate)
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
            raise _failure(error, timeout_seconds) from None
        return self._judge(response, timeout_seconds)

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

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
            if content_type.startswith("text/html"):
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
        retry_after_seconds = _retry_after(headers.get("Retry-After"))
        error = error_of(status, answer, retry_after_seconds)
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


def _retry_after(value: str | None) -> float | None:
    """Return the seconds to wait: the header contains their number or a date.

    https://www.rfc-editor.org/rfc/rfc9110#name-retry-after
    """
    if not value:
        return None
    try:
        seconds = float(value) if value.isdecimal() else parsedate_to_datetime(value[:100]).timestamp() - time.time()
    except (ValueError, TypeError, OverflowError, OSError):
        return None
    return min(max(seconds, 0.0), Bounds.WAIT_SECONDS)


def _failure(error: Exception, timeout_seconds: float) -> RetryableError | UnavailableError:
    """Return the error for a request without an answer. Libraries' own messages are not shown: they repeat the URL."""
    tls = _cause(error, ssl.SSLError)
    if isinstance(tls, ssl.SSLCertVerificationError):
        return UnavailableError(
            f"the collector's certificate cannot be trusted ({tls.verify_message}); check 'certificate_file'"
        )
    if tls is not None and not isinstance(tls, ssl.SSLEOFError | ssl.SSLZeroReturnError):
        return UnavailableError(f"TLS fails ({tls.reason or 'no reason given'}); check 'endpoint' and the certificates")
    answered_badly = _cause(error, InvalidHeaderOfAnswer) is not None
    if isinstance(error, InvalidURL | InvalidHeader | InvalidProxyURL) and not answered_badly:
        return UnavailableError("'endpoint', 'headers' or the proxy's URL cannot be used; check them")
    smaller_may_pass = not any(_cause(error, kind) for kind in _NOT_CONNECTED)
    if isinstance(error, Timeout | ReadTimeoutError) or _cause(error, TimeoutError):
        return _late(timeout_seconds, smaller_may_pass)
    system = _cause(error, OSError)
    words = f"the connection to the collector failed ({type(error).__name__})"
    if system is not None:
        words = f"cannot reach the collector: {system.strerror}"
    return RetryableError(words, smaller_may_pass=smaller_may_pass)


def _late(timeout_seconds: float, smaller_may_pass: bool = True) -> RetryableError:
    return RetryableError(f"no answer within {timeout_seconds:.1f} seconds", smaller_may_pass=smaller_may_pass)


def _cause(error: BaseException, kind: type[Cause]) -> Cause | None:
    """Return the exception of that kind that caused an error of `requests`. An `OSError` must come from the system."""
    seen: set[int] = set()
    pending: list[BaseException | None] = [error]
    while pending:
        candidate = pending.pop()
        if candidate is None or id(candidate) in seen:
            continue
        seen.add(id(candidate))
        if isinstance(candidate, kind) and not (kind is OSError and not getattr(candidate, "strerror", None)):
            return candidate
        pending += [candidate.__cause__, candidate.__context__]
        pending += [part for part in candidate.args if isinstance(part, BaseException)]
    return None
