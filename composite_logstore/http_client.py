"""HTTP to a server that is not trusted: what it answers is bounded, and changes nothing that is sent later.

`requests` and urllib3 bound a single wait for bytes, and neither the sum of the waits nor what comes. So the bounds are
beneath them, where bytes leave the socket: there they hold for a status line as for a trailer, and through a proxy.
"""

from __future__ import annotations

import http.client
import io
import socket
import threading
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from http.cookiejar import DefaultCookiePolicy
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import requests
import urllib3
from requests.adapters import HTTPAdapter
from requests.auth import HTTPBasicAuth
from requests.utils import get_auth_from_url
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import ConnectTimeoutError, HTTPError, NewConnectionError, ReadTimeoutError
from urllib3.util.connection import allowed_gai_family

from composite_logstore.bounds import Bounds
from composite_logstore.clock import Clock

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

Fault: TypeAlias = Literal["too large", "too late", "cut", "undecodable"]

_AT_ONCE_BYTES = 64 * 1024
_CLOCK = Clock()
# urllib3 takes no less.
_SHORTEST_SECONDS = 0.001
# Either header is recognized: https://docs.python.org/3/library/zlib.html#zlib.decompress
_GZIP_OR_ZLIB = 32 + zlib.MAX_WBITS


class HttpResponse(NamedTuple):
    """What a server answered, as far as it was read.

    Attributes:
        status: The status code.
        headers: The headers; small and capital letters are the same in their names.
        body: The body, decoded; where there is a fault, the beginning of it.
        fault: Why the body is not whole: it is `too large`, it came `too late`, it is `cut` off, or it is
            `undecodable`, such as one in an encoding that nobody asked for. None if it is whole.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes
    fault: Fault | None


class AnswerTooLargeError(OSError):
    """A server sends more than it may. Where that is within a body, the answer has a fault instead."""


class HttpClient:
    """Sends requests, each of them once, and reads no more of an answer than may come.

    Proxies and certificate authorities are those of the environment (`HTTPS_PROXY`, `NO_PROXY`, `REQUESTS_CA_BUNDLE`),
    unless they are given. Its `.netrc` is left alone. Cookies are not kept, and redirects are not followed.
    """

    def __init__(
        self,
        pool_manager: urllib3.PoolManager | None = None,
        certificate_file: str | None = None,
        client_certificate: tuple[str, str] | str | None = None,
    ) -> None:
        """Prepare; nothing is connected yet.

        Args:
            pool_manager: What to send with, and then with its own proxy and certificates. Whatever else is sent with
                it is bounded, too.
            certificate_file: The certificate authorities to trust.
            client_certificate: The client's certificate, and its key if that is a file of its own.
        """
        self._pool_manager = pool_manager
        self._verify = certificate_file or True
        self._client_certificate = client_certificate
        self._session = requests.Session()
        self._session.headers["Accept-Encoding"] = "gzip"
        _keep_nothing(self._session)
        for prefix in ("https://", "http://"):
            self._session.mount(prefix, _Adapter())
        if pool_manager is not None:
            _bound(pool_manager)

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
            url: Where to send it.
            headers: Its headers.
            body: Its body.
            timeout_seconds: How long connecting, sending and the whole answer may take together. Only to look up an
                address is the system's own affair.
            max_bytes: The most bytes of the answer's body, as they come and decoded.

        Raises:
            AnswerTooLargeError: The head of the answer is.
            OSError, urllib3.exceptions.HTTPError: There is no answer. The text may repeat the URL, headers, and what
                came. `requests.RequestException` is one of these.
        """
        with _exchange(timeout_seconds, max_bytes) as exchange:
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
        # Each wait is shortened to what is left of it.
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
        """Ask a server what time it is, to the second. Any answer says so, and none needs a key.

        Args:
            url: Where to ask.
            timeout_seconds: How long that may take.

        Returns:
            The time, None if the answer does not tell it.

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
    """Bound the answers to a session of somebody else's code, and have it keep nothing of them.

    It gets each answer as one that has come already, with a body of at most `Bounds.EXPORT_BYTES`. It does not repeat a
    request by itself any more, whatever an answer asks for, and a redirect is an error, not a success.

    Args:
        session: The session. Adapters of kinds of their own are left as they are.
    """
    _keep_nothing(session)
    session.max_redirects = 0
    session.headers["Accept-Encoding"] = "gzip"
    for prefix, adapter in list(session.adapters.items()):
        if type(adapter) is HTTPAdapter:
            session.mount(prefix, _GuestAdapter())


def _keep_nothing(session: requests.Session) -> None:
    """Have neither an answer nor a `.netrc` file change what the session sends."""
    session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
    # Where there is none, `requests` looks for one in `.netrc`.
    session.auth = session.auth or _of_the_url


def _of_the_url(request: requests.PreparedRequest) -> requests.PreparedRequest:
    user, password = get_auth_from_url(request.url or "")
    return HTTPBasicAuth(user, password)(request) if user or password else request


class _Exchange:
    """One request and its answer.

    Attributes:
        max_bytes: The most bytes of the answer's body.
    """

    def __init__(self, seconds: float, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._ends_at = _CLOCK.now() + seconds
        self._room = Bounds.HEAD_BYTES

    def remaining(self) -> float:
        """Return how many seconds are left.

        Raises:
            TimeoutError: None is.
        """
        seconds = self._ends_at - _CLOCK.now()
        if seconds <= 0:
            raise TimeoutError("the exchange takes too long")
        return seconds

    def make_room(self) -> None:
        """Let the body come, now that the head is there."""
        self._room += self.max_bytes

    def take(self, count: int) -> None:
        """Note that bytes have come.

        Raises:
            AnswerTooLargeError: They are more than may come.
        """
        self._room -= count
        if self._room < 0:
            raise AnswerTooLargeError("the answer is too large")


class _Current(threading.local):
    """The exchange that the thread is in. Connections belong to pools, which know nothing of it."""

    exchange: _Exchange | None = None


_current = _Current()


@contextmanager
def _exchange(seconds: float, max_bytes: int) -> Iterator[_Exchange]:
    before = _current.exchange
    exchange = _current.exchange = _Exchange(seconds, max_bytes)
    try:
        yield exchange
    finally:
        _current.exchange = before


class _Socket(io.RawIOBase):
    """What comes through a socket, within the bounds of an exchange."""

    def __init__(self, connection: socket.socket, raw: io.RawIOBase, exchange: _Exchange) -> None:
        self._connection = connection
        self._raw = raw
        self._exchange = exchange

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int | None:
        self._connection.settimeout(self._exchange.remaining())
        count: int | None = self._raw.readinto(buffer)
        self._exchange.take(count or 0)
        return count

    def close(self) -> None:
        if not self.closed:
            self._raw.close()
        super().close()


class _Response(http.client.HTTPResponse):
    """An answer that is read within the bounds of the exchange that it belongs to."""

    def __init__(self, sock: socket.socket, *args: Any, **options: Any) -> None:
        super().__init__(sock, *args, **options)
        self._of_exchange = _current.exchange
        if self._of_exchange is not None:
            raw = self.fp.detach()
            self.fp = io.BufferedReader(_Socket(sock, raw, self._of_exchange))

    def begin(self) -> None:
        """Read the head, past all informational responses: `http.client` knows but one kind of them."""
        super().begin()
        while 100 <= self.status < 200 and self.status != http.client.SWITCHING_PROTOCOLS:
            self.headers = self.msg = None  # type: ignore[assignment]
            super().begin()
        if self._of_exchange is not None:
            # urllib3 would log what cannot be parsed, line by line. It is nobody's to see.
            self.headers.defects.clear()
            self.headers.set_payload("")
            self._of_exchange.make_room()


class _BoundedConnection(HTTPConnection):
    """A connection that is made and used within the bounds of the exchange that its thread is in."""

    response_class = _Response

    def _new_conn(self) -> socket.socket:
        """Connect to one address after the other. urllib3 would give each of them the whole of the time."""
        exchange = _current.exchange
        if exchange is None:
            return super()._new_conn()
        try:
            found = socket.getaddrinfo(self._dns_host.strip("[]"), self.port, allowed_gai_family(), socket.SOCK_STREAM)
        except (socket.gaierror, UnicodeError) as error:
            raise NewConnectionError(self, "the host has no address") from error
        failure: OSError = OSError("the host has no address")
        for family, kind, protocol, _, address in found:
            connection = socket.socket(family, kind, protocol)
            try:
                for option in self.socket_options or ():
                    connection.setsockopt(*option)
                connection.settimeout(exchange.remaining())
                if self.source_address:
                    connection.bind(self.source_address)
                connection.connect(address)
                connection.settimeout(exchange.remaining())
            except OSError as error:
                connection.close()
                failure = error
                continue
            return connection
        if isinstance(failure, TimeoutError):
            raise ConnectTimeoutError(self, "connecting takes too long") from failure
        raise NewConnectionError(self, "it cannot be connected to") from failure

    def send(self, data: Any) -> None:
        """Send, a piece at a time: within TLS each piece has the whole of the time."""
        exchange = _current.exchange
        if exchange is None or not isinstance(data, bytes):
            super().send(data)
            return
        if self.sock is None:
            self.connect()
        for begin in range(0, len(data), _AT_ONCE_BYTES):
            self.sock.settimeout(exchange.remaining())
            super().send(data[begin : begin + _AT_ONCE_BYTES])


class _BoundedTlsConnection(_BoundedConnection, HTTPSConnection):
    """The same within TLS."""


class _Pool(HTTPConnectionPool):
    ConnectionCls = _BoundedConnection


class _TlsPool(HTTPSConnectionPool):
    ConnectionCls = _BoundedTlsConnection


def _bound(pool_manager: urllib3.PoolManager) -> None:
    """Have all connections that it makes from now on be bounded ones."""
    pool_manager.pool_classes_by_scheme = {"http": _Pool, "https": _TlsPool}


class _Adapter(HTTPAdapter):
    """Sends with bounded connections."""

    def init_poolmanager(self, *args: Any, **options: Any) -> None:
        super().init_poolmanager(*args, **options)
        _bound(self.poolmanager)

    def proxy_manager_for(self, proxy: Any, **options: Any) -> Any:
        manager = super().proxy_manager_for(proxy, **options)
        _bound(manager)
        return manager


class _GuestAdapter(_Adapter):
    """For code that reads answers by itself, without bounds: what it gets has been read already."""

    def send(
        self, request: requests.PreparedRequest, stream: bool = False, timeout: Any = None, *args: Any, **options: Any
    ) -> requests.Response:
        with _exchange(_seconds(timeout), Bounds.EXPORT_BYTES) as exchange:
            answer = super().send(request, True, timeout, *args, **options)
            status, _, body, fault = _received(answer.raw, exchange)
        if fault == "too late":
            raise requests.ReadTimeout("the answer came too late", request=request)
        if fault == "cut":
            raise requests.ConnectionError("the answer was cut off", request=request)
        if not 200 <= status < 300 and status < 400:
            # To many an exporter all below 400 is success.
            raise requests.RequestException(f"the answer is {status}, which is neither success nor failure")
        answer.headers.pop("Content-Encoding", None)
        # Without its encoding, which is undone.
        answer.raw = urllib3.HTTPResponse(io.BytesIO(body), None, status, preload_content=False)
        return answer


def _seconds(timeout: Any) -> float:
    """Return how long an exchange may take, of what code of others says of it: `requests` takes many things."""
    if isinstance(timeout, urllib3.Timeout):
        timeout = timeout.total if timeout.total is not None else (timeout.connect_timeout, timeout.read_timeout)
    parts = timeout if isinstance(timeout, tuple) else (timeout,)
    numbers = [part for part in parts if isinstance(part, int | float) and part > 0]
    return sum(numbers) if len(numbers) == len(parts) else Bounds.GUEST_SECONDS


def _received(response: Any, exchange: _Exchange) -> HttpResponse:
    """Read the body of an answer.

    Args:
        response: urllib3's response, which has read the head.
        exchange: The exchange that it belongs to.
    """
    encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
    decoder = zlib.decompressobj(_GZIP_OR_ZLIB) if encoding in ("gzip", "x-gzip", "deflate") else None
    fault: Fault | None = None
    parts: list[bytes] = []
    room = exchange.max_bytes
    try:
        if decoder is None and encoding not in ("", "identity"):
            raise zlib.error("an encoding that nobody asked for")
        while part := response.read(_AT_ONCE_BYTES, decode_content=False):
            if decoder is not None:
                # What follows the end of what was compressed is of no use.
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
        # What is still to come must not be taken for the next answer.
        response.close()
        response.release_conn()
    return HttpResponse(response.status, response.headers, b"".join(parts), fault)


def _causes(error: BaseException) -> list[BaseException]:
    """Return an error and all that it was made of: urllib3 and `requests` each wrap it once more."""
    causes: list[BaseException] = []
    pending: list[object] = [error]
    while pending:
        candidate = pending.pop()
        if isinstance(candidate, BaseException) and not any(candidate is other for other in causes):
            causes.append(candidate)
            pending += [candidate.__cause__, candidate.__context__, *candidate.args]
    return causes


def _fault(error: BaseException) -> Fault:
    """Return what an error within a body means."""
    causes = _causes(error)
    if any(isinstance(cause, AnswerTooLargeError) for cause in causes):
        return "too large"
    if any(isinstance(cause, TimeoutError | ReadTimeoutError) for cause in causes):
        return "too late"
    return "undecodable" if isinstance(error, zlib.error) else "cut"
