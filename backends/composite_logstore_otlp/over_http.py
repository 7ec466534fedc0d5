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
from urllib3.exceptions import HTTPError, ReadTimeoutError
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

if TYPE_CHECKING:
    from composite_logstore import HttpResponse
    from composite_logstore_otlp.connection import Connection

# Their fault is in the request as a whole or in where it went, not in the events: mending it saves them.
# The specification only says that such a request must not be repeated as it is.
# https://opentelemetry.io/docs/specs/otlp/#failures-1
_TO_MEND = {
    401: "check the credentials in 'headers'",
    402: "check your account there",
    403: "check the credentials in 'headers', and what they permit",
    404: "check 'endpoint': there is nothing at its path",
    405: "check 'endpoint': there is no OTLP receiver at its path",
    406: "check 'endpoint' and 'protocol'",
    407: "a proxy wants credentials",
    410: "check 'endpoint': there is nothing at its path any more",
    411: "check the proxy before the collector",
    415: "check 'protocol' and 'compression': the collector does not take this kind of request",
    421: "check 'endpoint'",
    426: "check 'endpoint' and 'protocol'",
    431: "make 'headers' shorter",
    451: "check 'endpoint'",
    501: "check 'endpoint': there is no OTLP receiver at its path",
    505: "check 'endpoint': there is no OTLP receiver at its path",
    511: "the network wants you to log in",
}

# 429, 502, 503 and 504 by the specification, which has all others given up. But a request that timed out
# or came too early (408, 425) is by their own definition to be repeated, and a collector that fails with any
# other 5xx may be mended before the queue is full: giving up would lose the events for certain.
_RETRYABLE = {408, 425, 429}

Cause = TypeVar("Cause", bound=BaseException)


class HttpTransport:
    """Sends requests over a connection that is kept open."""

    def __init__(self, connection: Connection) -> None:
        """Prepare the session.

        Args:
            connection: Where and how to send.
        """
        self._connection = connection
        self._client = HttpClient(None, connection.certificate_file, connection.client_certificate)
        self._headers = {"User-Agent": "composite-logstore", **connection.headers}
        self._headers["Content-Type"] = "application/x-protobuf"
        if connection.compression != "none":
            self._headers["Content-Encoding"] = connection.compression

    def send(self, payload: bytes, timeout_seconds: float) -> bytes:
        """Send a request once.

        Not even a connection that turns out to be closed leads to a second try, unlike in OpenTelemetry's
        own exporter: the collector may have taken the request before, and then the acknowledgement is lost.

        Args:
            payload: The serialized request.
            timeout_seconds: How long connecting, sending and waiting may take together.

        Returns:
            The serialized response.

        Raises:
            RetryableError: The collector cannot be reached, or asks to be tried again.
            RejectedError: The collector refused the request.
            TooLargeError: The collector takes no requests of that size.
            UnavailableError: Somebody must mend something.
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
            # Without its cause, which repeats the URL.
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
            # Which events it rejected may be in the rest. What is too large or cannot be decoded will be so each time,
            # and the collector has taken the events all the same.
            if fault == "too late":
                raise _late(timeout_seconds)
            if fault == "cut":
                raise RetryableError("the collector's answer was cut off")
            return body
        said = self._connection.quote(_message(content_type, body))
        answer = f"the collector answered {status}{': ' if said else ''}{said}"
        if status == 413:
            raise TooLargeError(answer)
        if status < 200:
            raise UnavailableError(f"{answer}; check 'endpoint'")
        if status < 400:
            raise UnavailableError(f"{answer} (a redirect); set 'endpoint' to where it leads")
        if status in _TO_MEND:
            raise UnavailableError(f"{answer}; {_TO_MEND[status]}")
        if status in _RETRYABLE or status >= 500:
            raise RetryableError(answer, _retry_after(headers.get("Retry-After")))
        raise RejectedError(answer)


def _message(content_type: str, body: bytes) -> str:
    """Return what an error response says: OTLP has it as a `Status` message.

    https://opentelemetry.io/docs/specs/otlp/#failures-1
    """
    if content_type.startswith("application/x-protobuf"):
        try:
            return str(Status.FromString(body).message)
        except DecodeError:
            return ""
    return "" if content_type.startswith("text/html") else body.decode("utf-8", "replace")


def _retry_after(value: str | None) -> float | None:
    """Return the seconds to wait: the header has their number or a date.

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
    """Return what it means that no answer came. Libraries' own messages repeat the URL, and are not shown."""
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
    if isinstance(error, Timeout | ReadTimeoutError) or _cause(error, TimeoutError):
        return _late(timeout_seconds)
    system = _cause(error, OSError)
    if system is not None:
        return RetryableError(f"cannot reach the collector: {system.strerror}")
    return RetryableError(f"the connection to the collector failed ({type(error).__name__})")


def _late(timeout_seconds: float) -> RetryableError:
    return RetryableError(f"no answer within {timeout_seconds:.1f} seconds")


def _cause(error: BaseException, kind: type[Cause]) -> Cause | None:
    """Return the exception of that kind beneath an error of `requests`; of `OSError`, one from the system."""
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
