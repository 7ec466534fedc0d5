"""HTTP to an untrusted server: its answers are bounded, and have no effect on later requests."""

from __future__ import annotations

import http.client
import io
import re
import time
import zlib
from collections.abc import Mapping
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from http.cookiejar import DefaultCookiePolicy
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar
from urllib.parse import urlsplit

import requests
import urllib3
from requests.adapters import HTTPAdapter
from requests.auth import HTTPBasicAuth
from requests.utils import get_auth_from_url
from urllib3.exceptions import HTTPError, ReadTimeoutError

from composite_logstore.bounded_http import (
    AT_ONCE_BYTES,
    AnswerTooLargeError,
    BoundedAdapter,
    Exchange,
    begin_exchange,
    bound_pools,
)
from composite_logstore.bounds import Bounds

Cause = TypeVar("Cause", bound=BaseException)
Fault: TypeAlias = Literal["too large", "too late", "cut", "undecodable"]

# The shortest timeout that urllib3 accepts.
_SHORTEST_SECONDS = 0.001
# With 32 added, zlib recognizes either header: https://docs.python.org/3/library/zlib.html#zlib.decompress
_GZIP_OR_ZLIB = 32 + zlib.MAX_WBITS
_PAGES = ("text/html", "application/xhtml+xml")
_TAGS = (b"<!doctype html", b"<html")
_LOOKED_AT_BYTES = 1024
_SECONDS = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?")


def seconds_asked_for(headers: Mapping[str, str]) -> float | None:
    """Return how many seconds an answer asks to wait; None if it does not ask, or the number makes no sense.

    More than an hour is not a number of seconds: some proxies give the time of day.
    """
    value = (headers.get("Retry-After") or headers.get("X-RateLimit-Reset") or "").strip()
    seconds = float(value) if _SECONDS.fullmatch(value) else None
    return seconds if seconds is not None and seconds <= Bounds.WAIT_SECONDS else None


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Return how many seconds an answer to an export asks to wait; None if it does not ask.

    Unlike a search, an export can wait as long as the header says, and the header may say until when.

    https://www.rfc-editor.org/rfc/rfc9110#name-retry-after
    """
    value = headers.get("Retry-After", "").strip()
    if not value:
        return None
    try:
        is_number = value.isascii() and value.isdecimal()
        seconds = float(value) if is_number else parsedate_to_datetime(value[:100]).timestamp() - time.time()
    except (ValueError, TypeError, OverflowError, OSError):
        return None
    return min(max(seconds, 0.0), Bounds.WAIT_SECONDS)


def cause_of(error: BaseException, kind: type[Cause]) -> Cause | None:
    """Return the exception of that kind that caused an error of `requests`. An `OSError` must come from the system."""
    for cause in _causes(error):
        if isinstance(cause, kind) and not (kind is OSError and not getattr(cause, "strerror", None)):
            return cause
    return None


def shown_url(url: str) -> str:
    """Return a URL as it may be shown: without a user, a password and a query, which may contain keys."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


class HttpResponse(NamedTuple):
    """An answer, or as much of it as was read.

    Attributes:
        status: The status code.
        headers: The headers, with names that ignore case.
        body: The decoded body; if there is a fault, the beginning of it.
        fault: Why the body is incomplete: it is `too large`, it came `too late`, it was `cut` off, or it is
            `undecodable`, for example in an encoding that was not requested. None if it is complete.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes
    fault: Fault | None

    @property
    def is_web_page(self) -> bool:
        """Whether it is a page for people, as a proxy's login page is: no backend has taken anything then."""
        kind = self.headers.get("Content-Type", "").strip().lower()
        return kind.startswith(_PAGES) or self.body[:_LOOKED_AT_BYTES].lstrip().lower().startswith(_TAGS)


class HttpClient:
    """Sends each request once, and reads answers within bounds.

    It uses proxies and certificate authorities from the environment (`HTTPS_PROXY`, `NO_PROXY`, `REQUESTS_CA_BUNDLE`),
    unless they are given. It ignores `.netrc`, keeps no cookies, and follows no redirects.
    """

    def __init__(
        self,
        pool_manager: urllib3.PoolManager | None = None,
        certificate_file: str | None = None,
        client_certificate: tuple[str, str] | str | None = None,
    ) -> None:
        """Prepare; connections are made later.

        Args:
            pool_manager: Sends the requests, with its own proxy and certificates. Requests of others through it are not
                bounded.
            certificate_file: The path of the certificate authorities to trust.
            client_certificate: The path of the client's certificate, with that of its key if it is another file.
        """
        self._pool_manager = pool_manager
        self._verify = certificate_file or True
        self._client_certificate = client_certificate
        self._session = requests.Session()
        _prepare(self._session)
        for prefix in ("https://", "http://"):
            self._session.mount(prefix, BoundedAdapter())
        if pool_manager is not None:
            bound_pools(pool_manager)

    def request(
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        body: bytes | None = None,
        timeout_seconds: float,
        max_bytes: int,
    ) -> HttpResponse:
        """Send a request once, and read the answer.

        Args:
            method: The method.
            url: The URL.
            headers: The request's headers.
            body: The request's body.
            timeout_seconds: How long connecting, sending and the whole answer may take together, in seconds. The
                system's own timeout applies to the lookup of the host.
            max_bytes: The most bytes of the answer's body, both encoded and decoded.

        Raises:
            AnswerTooLargeError: The answer has too many bytes before its body.
            OSError, urllib3.exceptions.HTTPError: No answer arrived. The error's text may contain the URL, headers and
                parts of an answer. `requests.RequestException` is an `OSError`.
        """
        with begin_exchange(timeout_seconds, max_bytes) as exchange:
            try:
                response = self._send(method, url, headers, body, timeout_seconds)
            except (HTTPError, OSError) as error:
                if any(isinstance(cause, AnswerTooLargeError) for cause in _causes(error)):
                    raise AnswerTooLargeError("the answer is too large") from None
                raise
            return _received(response, exchange)

    def _send(
        self, method: str, url: str, headers: Mapping[str, str] | None, body: bytes | None, timeout_seconds: float
    ) -> urllib3.BaseHTTPResponse:
        """Send a request, and read the head of the answer."""
        # A connection shortens each wait to the time that is left.
        timeout = urllib3.Timeout(total=max(timeout_seconds, _SHORTEST_SECONDS))
        if self._pool_manager is not None:
            return self._pool_manager.request(
                method,
                url,
                body=body,
                headers=headers,
                timeout=timeout,
                retries=False,
                redirect=False,
                preload_content=False,
                decode_content=False,
            )
        response: urllib3.BaseHTTPResponse = self._session.request(
            method,
            url,
            data=body,
            headers=headers,
            timeout=timeout,  # type: ignore[arg-type]  # passed on to urllib3 as it is
            verify=self._verify,
            cert=self._client_certificate,
            allow_redirects=False,
            stream=True,
        ).raw
        return response

    def time_at(self, url: str, timeout_seconds: float) -> datetime | None:
        """Ask a server for its time. Any answer contains it, so no key is needed.

        Args:
            url: A URL of the server.
            timeout_seconds: How long that may take, in seconds.

        Returns:
            The time, to the second; None if the answer does not contain it.

        Raises:
            Exception: As `request` does.
        """
        answer = self.request("HEAD", url, timeout_seconds=timeout_seconds, max_bytes=Bounds.EXPORT_BYTES)
        try:
            moment = parsedate_to_datetime(answer.headers.get("Date", ""))
        except (ValueError, TypeError, OverflowError):
            return None
        return moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)

    def close(self) -> None:
        """Close the connections."""
        self._session.close()
        if self._pool_manager is not None:
            self._pool_manager.clear()


def bound(session: requests.Session) -> None:
    """Bound the answers that third-party code gets through a session, and make answers have no effect on the session.

    The code gets each answer after it was read, with a body of at most `Bounds.EXPORT_BYTES`. The session no longer
    repeats requests by itself, and a redirect is an error, not a success.

    Args:
        session: The session. Adapters other than `HTTPAdapter` itself stay as they are.
    """
    _prepare(session)
    session.max_redirects = 0
    for prefix, adapter in list(session.adapters.items()):
        if type(adapter) is HTTPAdapter:
            session.mount(prefix, _GuestAdapter())


def _prepare(session: requests.Session) -> None:
    """Make sure that neither an answer nor a `.netrc` file changes the session's requests, and ask for gzip at most."""
    session.headers["Accept-Encoding"] = "gzip"
    session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
    # Without a function here, `requests` looks into `.netrc`.
    session.auth = session.auth or _of_the_url


def _of_the_url(request: requests.PreparedRequest) -> requests.PreparedRequest:
    user, password = get_auth_from_url(request.url or "")
    return HTTPBasicAuth(user, password)(request) if user or password else request


class _GuestAdapter(BoundedAdapter):
    """For third-party code that reads answers without bounds: this reads the answer first, within bounds."""

    def send(
        self, request: requests.PreparedRequest, stream: bool = False, timeout: Any = None, *args: Any, **options: Any
    ) -> requests.Response:
        with begin_exchange(_seconds(timeout), Bounds.EXPORT_BYTES) as exchange:
            answer = super().send(request, True, timeout, *args, **options)
            received = _received(answer.raw, exchange)
        status, _, body, fault = received
        if fault == "too late":
            raise requests.ReadTimeout("the answer came too late", request=request)
        if fault == "cut":
            raise requests.ConnectionError("the answer was cut off", request=request)
        if not 200 <= status < 300 and not 400 <= status < 600:
            # Many exporters take all others for success, too.
            raise requests.RequestException(f"the answer is {status}, which is neither success nor failure")
        if status < 300 and received.is_web_page:
            raise requests.RequestException("a web page answered")
        answer.headers.pop("Content-Encoding", None)
        # The body is decoded already.
        answer.raw = urllib3.HTTPResponse(io.BytesIO(body), None, status, preload_content=False)
        return answer


def _seconds(timeout: Any) -> float:
    """Return how long an exchange may take, in seconds, from any value that `requests` accepts as a timeout."""
    if isinstance(timeout, urllib3.Timeout):
        timeout = timeout.total if timeout.total is not None else (timeout.connect_timeout, timeout.read_timeout)
    parts = timeout if isinstance(timeout, tuple) else (timeout,)
    numbers = [part for part in parts if isinstance(part, int | float) and part > 0]
    return sum(numbers) if len(numbers) == len(parts) else Bounds.GUEST_SECONDS


def _received(response: Any, exchange: Exchange) -> HttpResponse:
    """Read the body of an answer.

    Args:
        response: urllib3's response, with its head read.
        exchange: Its exchange.
    """
    encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
    decoder = zlib.decompressobj(_GZIP_OR_ZLIB) if encoding in ("gzip", "x-gzip", "deflate") else None
    fault: Fault | None = None
    parts: list[bytes] = []
    room = exchange.max_bytes
    try:
        if decoder is None and encoding not in ("", "identity"):
            raise zlib.error("an encoding that was not requested")
        while part := response.read(AT_ONCE_BYTES, decode_content=False):
            if decoder is not None:
                # Ignore bytes after the end of the compressed data.
                part = b"" if decoder.eof else decoder.decompress(part, room + 1)
            parts.append(part[:room])
            if len(part) > room:
                raise AnswerTooLargeError("the answer is too large")
            room -= len(part)
        if decoder is not None and parts and not decoder.eof:
            fault = "undecodable"
    except (HTTPError, OSError, http.client.HTTPException, ValueError, zlib.error) as error:
        fault = _fault(error)
    if fault is not None:
        # Otherwise the rest of this answer could be taken for the next one.
        response.close()
        response.release_conn()
    return HttpResponse(response.status, response.headers, b"".join(parts), fault)


def _causes(error: BaseException) -> list[BaseException]:
    """Return an error with all its causes: urllib3 and `requests` each wrap errors once more."""
    causes: list[BaseException] = []
    pending: list[object] = [error]
    while pending:
        candidate = pending.pop()
        if isinstance(candidate, BaseException) and not any(candidate is other for other in causes):
            causes.append(candidate)
            pending += [candidate.__cause__, candidate.__context__, getattr(candidate, "reason", None), *candidate.args]
    return causes


def _fault(error: BaseException) -> Fault:
    """Return the fault that an error during the body means."""
    causes = _causes(error)
    if any(isinstance(cause, AnswerTooLargeError) for cause in causes):
        return "too large"
    if any(isinstance(cause, TimeoutError | ReadTimeoutError) for cause in causes):
        return "too late"
    return "undecodable" if isinstance(error, zlib.error) else "cut"
