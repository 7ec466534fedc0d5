"""A server on loopback that answers as no honest one would: without end, a byte at a time, with bombs.

It counts what it could send before the client had enough, keeps what it was asked, and sends to each connection for a
bounded time and a bounded number of bytes. `ANSWERS` are the answers over HTTP; each is a function that yields bytes.
"""

from __future__ import annotations

import gzip
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from types import TracebackType

from typing_extensions import Self

Answer = Callable[[], Iterator[bytes]]

MIB = 1024 * 1024
MOST_BYTES = 64 * MIB
MOST_SECONDS = 20.0


class HostileServer:
    """Answers each request with what `answer` yields, until the client has enough.

    Attributes:
        answer: What to answer.
        requests: What was asked: the head and the body of each request.
        sent: How many bytes were sent in all.
        port: Where it listens.
    """

    def __init__(self, answer: Answer | None = None) -> None:
        self.answer = answer or plain()
        self.requests: list[tuple[bytes, bytes]] = []
        self.sent = 0
        self._over = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        # What lies in buffers was sent, but not taken.
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 64 * 1024)
        self.port: int = self._listener.getsockname()[1]
        self._threads: list[threading.Thread] = []
        self._clients: set[socket.socket] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        self._start(self._accept)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._over.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in list(self._threads):
            thread.join(5)

    def hang_up(self) -> None:
        """End all connections that there are."""
        for client in list(self._clients):
            with suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)

    def _start(self, target: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._over.is_set():
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self._start(self._serve, client)

    def _serve(self, client: socket.socket) -> None:
        client.settimeout(0.2)
        self._clients.add(client)
        with client:
            try:
                while request := self._ask(client):
                    self.requests.append(request)
                    self._answer(client)
                    if request == _IN_FRAMES:
                        break
            except OSError:
                # The client has had enough.
                pass
            finally:
                self._clients.discard(client)

    def _ask(self, client: socket.socket) -> tuple[bytes, bytes] | None:
        """Read a request; None if there is no other."""
        data = b""
        while b"\r\n\r\n" not in data:
            part = self._receive(client)
            if not part:
                return None
            data += part
        if data.startswith(_PREFACE):
            return self._ask_in_frames(client, data[len(_PREFACE) :])
        head, _, body = data.partition(b"\r\n\r\n")
        length = 0
        for line in head.split(b"\r\n"):
            name, _, value = line.partition(b":")
            if name.lower() == b"content-length":
                length = int(value)
        while len(body) < length:
            part = self._receive(client)
            if not part:
                return None
            body += part
        return head, body

    def _receive(self, client: socket.socket) -> bytes:
        """Return what comes next; nothing when it is over."""
        while not self._over.is_set():
            with suppress(TimeoutError):
                return client.recv(65536)
        return b""

    def _ask_in_frames(self, client: socket.socket, data: bytes) -> tuple[bytes, bytes] | None:
        """Read frames of HTTP/2 until a stream has ended. There is one request for each connection."""
        if self.answer is not GRPC_ANSWERS["silence"]:
            client.sendall(_frame(_SETTINGS, 0, 0) + _frame(_SETTINGS, _ACK, 0))
        while True:
            while len(data) >= 9 and len(data) >= 9 + (length := int.from_bytes(data[:3], "big")):
                kind, flags = data[3], data[4]
                data = data[9 + length :]
                if kind == _DATA and flags & _END_STREAM:
                    return _IN_FRAMES
            part = self._receive(client)
            if not part:
                return None
            data += part

    def _answer(self, client: socket.socket) -> None:
        begin, sent = time.monotonic(), 0
        client.settimeout(MOST_SECONDS)
        for part in self.answer():
            client.sendall(part)
            sent += len(part)
            self.sent += len(part)
            if self._over.is_set() or sent > MOST_BYTES or time.monotonic() - begin > MOST_SECONDS:
                raise ConnectionAbortedError
        client.settimeout(0.2)


def plain(
    body: bytes = b"", status: str = "200 OK", headers: str = "", content_type: str = "application/json"
) -> Answer:
    """An honest answer."""
    head = f"HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n{headers}\r\n"

    def answer() -> Iterator[bytes]:
        yield head.encode("latin-1") + body

    return answer


def _endless(part: bytes) -> Iterator[bytes]:
    # Few large pieces: it is about what the client does, not this process.
    piece = part * max(1, 65536 // len(part))
    while True:
        yield piece


def _trickle(text: bytes, seconds: float = 0.02) -> Iterator[bytes]:
    for byte in text:
        time.sleep(seconds)
        yield bytes([byte])
    while True:
        time.sleep(seconds)
        yield b"x"


def _silence() -> Iterator[bytes]:
    while True:
        time.sleep(0.05)
        yield b""


def _then(head: bytes, rest: Callable[[], Iterator[bytes]]) -> Answer:
    def answer() -> Iterator[bytes]:
        yield head
        yield from rest()

    return answer


_OK = b"HTTP/1.1 200 OK\r\n"
_CHUNKED = _OK + b"Transfer-Encoding: chunked\r\n\r\n"


def _encoded(encoding: str, body: bytes) -> Answer:
    return plain(body, headers=f"Content-Encoding: {encoding}\r\n")


def bomb(mebibytes: int = 512) -> bytes:
    """As many MiB of zeros, compressed to a thousandth of that. Nobody is to come to its end, so it has none."""
    compressor = zlib.compressobj(9, zlib.DEFLATED, -15)
    mebibyte = compressor.compress(bytes(MIB)) + compressor.flush(zlib.Z_FULL_FLUSH)
    return b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x02\xff" + mebibyte * mebibytes


_BOMB = bomb()


HEADS: dict[str, Answer] = {
    "a status line without end": _then(b"HTTP/1.1 200 ", lambda: _endless(b"x")),
    "a status line that trickles": lambda: _trickle(b"HTTP/1.1 200 "),
    "no HTTP": lambda: _endless(b"\x1b]0;title\x07 \xff\x00\r"),
    "no HTTP, in lines": lambda: _endless(b"hello\r\n"),
    "continue without end": lambda: _endless(b"HTTP/1.1 100 Continue\r\n\r\n"),
    "hints without end": lambda: _endless(b"HTTP/1.1 103 Early Hints\r\nLink: <x>\r\n\r\n"),
    "one header without end": _then(_OK + b"X-A: ", lambda: _endless(b"x")),
    "headers without end": _then(_OK, lambda: _endless(b"X-A: x\r\n")),
    "large headers": _then(_OK, lambda: _endless(b"X-A: " + b"x" * 60_000 + b"\r\n")),
    "headers that trickle": _then(_OK, lambda: _trickle(b"X-A: x\r\n" * 1000)),
    "headers folded without end": _then(_OK + b"X-A: x\r\n", lambda: _endless(b" x\r\n")),
    "silence": _silence,
    "another protocol": plain(status="101 Switching Protocols", headers="Upgrade: websocket\r\n"),
    "a status of no number": lambda: iter([b"HTTP/1.1 2OO OK\r\n\r\n"]),
    "a status of many digits": lambda: iter([b"HTTP/1.1 " + b"2" * 60_000 + b" OK\r\n\r\n"]),
    "two lengths": lambda: iter([_OK + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nab"]),
}
"""Answers whose status never comes to be known, or is none."""

BODIES: dict[str, Answer] = {
    "a body without end": _then(_OK + b"\r\n", lambda: _endless(b"x")),
    "a body that trickles": _then(_OK + b"Content-Length: 100000\r\n\r\n", lambda: _trickle(b"")),
    "a body that never comes": _then(_OK + b"Content-Length: 100000\r\n\r\n", _silence),
    "a length beyond all": _then(_OK + b"Content-Length: " + b"9" * 30 + b"\r\n\r\n", lambda: _endless(b"x")),
    "chunks without end": _then(_CHUNKED, lambda: _endless(b"400\r\n" + b"x" * 1024 + b"\r\n")),
    "chunks of a byte": _then(_CHUNKED, lambda: _endless(b"1\r\nx\r\n")),
    "a chunk's size without end": _then(_CHUNKED, lambda: _endless(b"0")),
    "a chunk's extension without end": _then(_CHUNKED + b"1;", lambda: _endless(b"x")),
    "a chunk of less than nothing": _then(_CHUNKED + b"-1\r\n", lambda: _endless(b"x")),
    "a chunk of a wrong size": lambda: iter([_CHUNKED + b"zz\r\nx\r\n"]),
    "a chunk beyond all": _then(_CHUNKED + b"f" * 30 + b"\r\n", lambda: _endless(b"x")),
    "trailers without end": _then(_CHUNKED + b"0\r\n", lambda: _endless(b"X-A: x\r\n")),
    "one trailer without end": _then(_CHUNKED + b"0\r\nX-A: ", lambda: _endless(b"x")),
    "a gzip bomb": _encoded("gzip", _BOMB),
    "a deflate bomb": _encoded("deflate", b"\x78\xda" + _BOMB[10:]),
    "a bomb within a bomb": _encoded("gzip, gzip", gzip.compress(_BOMB)),
    "many encodings": _encoded(", ".join(["gzip"] * 1000), b"x"),
    "an encoding that nobody asked for": _encoded("br", b"\x0b\x02\x80{}\x03"),
    "no gzip": _encoded("gzip", b"{}"),
    "half of gzip": _encoded("gzip", gzip.compress(b"{}" * 1000)[:-9]),
    "gzip after gzip without end": _then(
        _OK + b"Content-Encoding: gzip\r\n\r\n" + gzip.compress(b"{}"), lambda: _endless(gzip.compress(b""))
    ),
}
"""Answers with the status 200 and a body that is none."""

ANSWERS: dict[str, Answer] = {**HEADS, **BODIES}


# Over gRPC

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _SETTINGS, _PUSH_PROMISE, _PING, _GOAWAY, _WINDOW_UPDATE, _CONTINUATION = 0, 1, 4, 5, 6, 7, 8, 9
_IN_FRAMES = (b"", b"")
_END_STREAM, _ACK, _END_HEADERS = 1, 1, 4


def _frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """https://www.rfc-editor.org/rfc/rfc9113#name-frame-format."""
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def _integer(value: int, bits: int) -> bytes:
    """https://www.rfc-editor.org/rfc/rfc7541#section-5.1."""
    most = (1 << bits) - 1
    if value < most:
        return bytes([value])
    value -= most
    encoded = [most]
    while value >= 128:
        encoded.append(value % 128 + 128)
        value //= 128
    return bytes([*encoded, value])


def _fields(*fields: tuple[bytes, bytes]) -> bytes:
    """Header fields, none of them put into a table."""
    return b"".join(b"\x00" + _integer(len(name), 7) + name + _integer(len(value), 7) + value for name, value in fields)


_RESPONSE = _fields((b":status", b"200"), (b"content-type", b"application/grpc"))


def _message(payload: bytes, compressed: bool = False, length: int | None = None) -> bytes:
    return bytes([compressed]) + (len(payload) if length is None else length).to_bytes(4, "big") + payload


def _data(payload: bytes) -> Iterator[bytes]:
    for begin in range(0, len(payload), 16384):
        yield _frame(_DATA, 0, 1, payload[begin : begin + 16384])


def grpc_answer(
    *parts: bytes | Callable[[], Iterator[bytes]],
    status: bytes = b"0",
    message: bytes = b"",
    trailers: bytes = b"",
    headers: bytes = b"",
) -> Answer:
    """An answer over gRPC that is as it should be, but for what it says."""

    def answer() -> Iterator[bytes]:
        yield _frame(_HEADERS, _END_HEADERS, 1, _RESPONSE + headers)
        for part in parts:
            yield from part() if callable(part) else _data(part)
        fields = _fields((b"grpc-status", status), (b"grpc-message", message)) + trailers
        yield _frame(_HEADERS, _END_HEADERS | _END_STREAM, 1, fields)

    return answer


def _in_frames(*frames: bytes, rest: Callable[[], Iterator[bytes]] = _silence) -> Answer:
    def answer() -> Iterator[bytes]:
        yield b"".join(frames)
        yield from rest()

    return answer


_GZIPPED = _fields((b"grpc-encoding", b"gzip"))
_BEGUN = _frame(_HEADERS, _END_HEADERS, 1, _RESPONSE)

GRPC_ANSWERS: dict[str, Answer] = {
    "silence": _silence,
    "HTTP/1": plain(b"{}"),
    "no HTTP": lambda: _endless(b"\x1b]0;title\x07 \xff\x00\r"),
    "frames that trickle": lambda: _trickle(_BEGUN * 100),
    "settings without end": lambda: _endless(_frame(_SETTINGS, 0, 0)),
    "pings without end": lambda: _endless(_frame(_PING, 0, 0, b"12345678")),
    "windows without end": lambda: _endless(_frame(_WINDOW_UPDATE, 0, 0, b"\x7f\xff\xff\xff")),
    "empty data without end": _in_frames(_BEGUN, rest=lambda: _endless(_frame(_DATA, 0, 1))),
    "informational responses without end": lambda: _endless(
        _frame(_HEADERS, _END_HEADERS, 1, _fields((b":status", b"103")))
    ),
    "fields without end": _in_frames(
        _frame(_HEADERS, 0, 1, _RESPONSE),
        rest=lambda: _endless(_frame(_CONTINUATION, 0, 1, _fields((b"x-a", b"x" * 1000)))),
    ),
    "empty continuations without end": _in_frames(
        _frame(_HEADERS, 0, 1, _RESPONSE), rest=lambda: _endless(_frame(_CONTINUATION, 0, 1))
    ),
    "a field beyond all": _in_frames(_frame(_HEADERS, 0, 1, _RESPONSE + b"\x00\x01a\x7f" + b"\xff" * 8)),
    "no message": grpc_answer(),
    "many fields": grpc_answer(trailers=_fields(*[(b"x-%d" % number, b"y" * 900) for number in range(15)])),
    "a frame beyond all": _in_frames(_BEGUN, b"\xff\xff\xff\x00\x00\x00\x00\x00\x01", rest=lambda: _endless(b"x")),
    "pushes": _in_frames(_frame(_PUSH_PROMISE, _END_HEADERS, 1, b"\x00\x00\x00\x02" + _RESPONSE)),
    "going away": _in_frames(_frame(_GOAWAY, 0, 0, b"\x00\x00\x00\x00\x00\x00\x00\x0b" + b"x\x1b" * 8000)),
    "a message that never comes": grpc_answer(_message(b"", length=0xFFFF), _silence),
    "a message that trickles": grpc_answer(
        _message(b"", length=0xFFFF), lambda: (_frame(_DATA, 0, 1, byte) for byte in _trickle(b""))
    ),
    "a message of 4 GiB": grpc_answer(
        _message(b"", length=0xFFFFFFFF), lambda: _endless(_frame(_DATA, 0, 1, b"x" * 100))
    ),
    "messages without end": grpc_answer(lambda: _endless(_frame(_DATA, 0, 1, _message(b"")))),
    "a large message": grpc_answer(_message(bytes(2 * MIB))),
    "a gzip bomb": grpc_answer(_message(_BOMB[:60_000], compressed=True), headers=_GZIPPED),
    "a gzip bomb that is large": grpc_answer(_message(_BOMB, compressed=True), headers=_GZIPPED),
    "no gzip": grpc_answer(_message(b"{}", compressed=True), headers=_GZIPPED),
    "gzip that was not told of": grpc_answer(_message(gzip.compress(b""), compressed=True)),
    "half of gzip": grpc_answer(_message(gzip.compress(b"")[:-5], compressed=True), headers=_GZIPPED),
    "a status of no number": grpc_answer(_message(b""), status=b"abc"),
    "a status that nobody knows": grpc_answer(_message(b""), status=b"999", message=b"hello"),
    "a status of many digits": grpc_answer(_message(b""), status=b"9" * 4000),
    "a status below zero": grpc_answer(_message(b""), status=b"-1"),
    "a text with control characters": grpc_answer(status=b"13", message=b"a%1B]0;title%07%0D%0A%00%C2%9B%FF" * 50),
    "a text that was too large": grpc_answer(
        status=b"8", message=b"CLIENT: Received message larger than max (5 vs. 4)" + b"message " * 800
    ),
    "details that are none": grpc_answer(
        status=b"14", trailers=_fields((b"grpc-status-details-bin", b"//////"), (b"grpc-retry-pushback-ms", b"-1"))
    ),
    "a retry that is pushed back": grpc_answer(status=b"14", trailers=_fields((b"grpc-retry-pushback-ms", b"9" * 300))),
}
"""Answers over gRPC, in frames of HTTP/2."""
