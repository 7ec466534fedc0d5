"""Connections of urllib3 whose exchanges are bounded in bytes and seconds, for `http_client`.

`requests` and urllib3 bound a single wait for bytes, but neither the sum of the waits nor the number of bytes. So these
bounds are below them, at the socket, where they hold for all parts of an answer, and through a proxy.
"""

from __future__ import annotations

import http.client
import io
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import urllib3
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import ConnectTimeoutError, NewConnectionError
from urllib3.util.connection import allowed_gai_family

from composite_logstore.bounds import Bounds
from composite_logstore.clock import Clock

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

AT_ONCE_BYTES = 64 * 1024
"""How many bytes are sent or read in one call."""

_CLOCK = Clock()


class AnswerTooLargeError(OSError):
    """A server sends more than the bound before the body. A body that is too large is a fault of the answer instead."""


class Exchange:
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
            TimeoutError: The time is over.
        """
        seconds = self._ends_at - _CLOCK.now()
        if seconds <= 0:
            raise TimeoutError("the exchange takes too long")
        return seconds

    def make_room(self) -> None:
        """Allow for the bytes of the body, after the head has arrived."""
        self._room += self.max_bytes

    def take(self, count: int) -> None:
        """Count bytes that have arrived.

        Raises:
            AnswerTooLargeError: They exceed the bound.
        """
        self._room -= count
        if self._room < 0:
            raise AnswerTooLargeError("the answer is too large")


# The exchange of the current thread. Connections cannot hold it, since they belong to pools. There is none where others
# send through a pool manager that a client uses, too.
_current: ContextVar[Exchange | None] = ContextVar("exchange", default=None)


@contextmanager
def begin_exchange(seconds: float, max_bytes: int) -> Iterator[Exchange]:
    """Bound all that the current thread sends and reads over bounded connections, within a `with` block.

    Args:
        seconds: How long the exchange may take.
        max_bytes: The most bytes of the answer's body.
    """
    exchange = Exchange(seconds, max_bytes)
    token = _current.set(exchange)
    try:
        yield exchange
    finally:
        _current.reset(token)


class _Socket(io.RawIOBase):
    """Reads from a socket within the bounds of an exchange."""

    def __init__(self, connection: socket.socket, raw: io.RawIOBase, exchange: Exchange) -> None:
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
        self._raw.close()
        super().close()


class _Response(http.client.HTTPResponse):
    """An answer that is read within the bounds of its exchange."""

    def __init__(self, sock: socket.socket, *args: Any, **options: Any) -> None:
        super().__init__(sock, *args, **options)
        self._exchange = _current.get()
        if self._exchange is not None:
            self.fp = io.BufferedReader(_Socket(sock, self.fp.detach(), self._exchange))

    def begin(self) -> None:
        """Read the head after all informational responses: `http.client` skips only one kind of them."""
        super().begin()
        while 100 <= self.status < 200 and self.status != http.client.SWITCHING_PROTOCOLS:
            self.headers = self.msg = None  # type: ignore[assignment]
            super().begin()
        if self.chunked:
            # It does not count then, and urllib3 would warn of it each time.
            del self.headers["Content-Length"]
        if self._exchange is not None:
            # urllib3 would log all lines that cannot be parsed, and they may contain anything.
            self.headers.defects.clear()
            self.headers.set_payload("")
            self._exchange.make_room()


class _BoundedConnection(HTTPConnection):
    """A connection that respects the bounds of its thread's exchange."""

    response_class = _Response

    def _new_conn(self) -> socket.socket:
        """Connect to one address after the other. urllib3 would give the whole time to each of them."""
        exchange = _current.get()
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
                return connection
            except OSError as error:
                connection.close()
                failure = error
        if isinstance(failure, TimeoutError):
            raise ConnectTimeoutError(self, "connecting takes too long") from failure
        raise NewConnectionError(self, "it cannot be connected to") from failure

    def send(self, data: Any) -> None:
        """Send in pieces, each with the time that is left: over TLS, the timeout holds for each piece."""
        exchange = _current.get()
        if exchange is None or not isinstance(data, bytes):
            super().send(data)
            return
        if self.sock is None:
            self.connect()
        for begin in range(0, len(data), AT_ONCE_BYTES):
            self.sock.settimeout(exchange.remaining())
            super().send(data[begin : begin + AT_ONCE_BYTES])


class _BoundedTlsConnection(_BoundedConnection, HTTPSConnection):
    """The same over TLS."""


class _Pool(HTTPConnectionPool):
    ConnectionCls = _BoundedConnection


class _TlsPool(HTTPSConnectionPool):
    ConnectionCls = _BoundedTlsConnection


def bound_pools(pool_manager: urllib3.PoolManager) -> None:
    """Make the pool manager use bounded connections from now on."""
    pool_manager.pool_classes_by_scheme = {"http": _Pool, "https": _TlsPool}


class BoundedAdapter(HTTPAdapter):
    """Sends with bounded connections."""

    def init_poolmanager(self, *args: Any, **options: Any) -> None:
        """Make the pools of direct connections, bounded."""
        super().init_poolmanager(*args, **options)
        bound_pools(self.poolmanager)

    def proxy_manager_for(self, proxy: Any, **options: Any) -> Any:
        """Return the pools of connections through a proxy, bounded."""
        manager = super().proxy_manager_for(proxy, **options)
        bound_pools(manager)
        return manager
