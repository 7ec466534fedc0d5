"""A network that fails: a proxy before a real server, whose connections go wrong in the way it is told."""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import threading
import time

FAULTS = ("refused", "silent", "late", "reset", "cut", "trickle", "far", "narrow", "dead")
"""What can be wrong.

- `refused`: nobody listens.
- `silent`: connections are accepted, and nothing is ever read or answered.
- `late`: the server takes the request; its answer comes after `late_seconds`.
- `reset`: the connection is reset after the first 1000 bytes, which is in the middle of a request's body.
- `cut`: the server takes the request; its answer ends after `kept_bytes`.
- `trickle`: the server takes the request; its answer comes in single bytes, `trickle_seconds` apart.
- `far`: nothing is wrong, but all that the server says takes `far_seconds` to arrive.
- `narrow`: nothing is wrong, but only `bytes_per_second` of what the client says get through.
- `dead`: the connections that there are stay open, and nothing passes any more, as after a NAT or a balancer has
  forgotten them. New ones are well.
"""

_RESET_AFTER_BYTES = 1_000
_POLL_SECONDS = 0.02
_NARROW_BYTES = 4_096
_HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_HEADERS_FRAME = 1
_RST_STREAM_FRAME = 3


class FaultyProxy:
    """Passes connections to a loopback port on to another one, until `fault` says otherwise.

    Whenever `fault` is set, the connections that there are end with a reset, since a fault holds for new ones; but for
    `dead`, which is about those that there are.

    Attributes:
        port: Where it listens; it stays the same.
        connections: How many it has accepted.
        lost: How many answers may not have come through, or too late, after the server had been asked.
        late_seconds: How late an answer comes.
        kept_bytes: How much there is of an answer that is cut.
        trickle_seconds: How far apart the bytes of an answer come.
        far_seconds: How long the way is.
        bytes_per_second: How wide it is.
    """

    def __init__(self, port: int) -> None:
        self.connections = 0
        self.lost = 0
        self.late_seconds = 2.5
        self.kept_bytes = 10
        self.trickle_seconds = 0.05
        self.far_seconds = 0.5
        self.bytes_per_second = 100_000
        self._target = port
        self._fault: str | None = None
        self._over = threading.Event()
        self._forgotten = threading.Event()
        self._threads: list[threading.Thread] = []
        # While nobody listens, the port is held by a socket that does not.
        self._socket = _bound(0)
        self.port = self._socket.getsockname()[1]

    @property
    def fault(self) -> str | None:
        """What is wrong: one of `FAULTS`, or None."""
        return self._fault

    @fault.setter
    def fault(self, fault: str | None) -> None:
        assert fault is None or fault in FAULTS, fault
        if fault == "dead":
            self._fault = fault
            self._forgotten.set()
            self._forgotten = threading.Event()
            return
        self._stop()
        self._fault = fault
        self._start()

    def __enter__(self) -> FaultyProxy:
        self._start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()
        self._socket.close()

    def _start(self) -> None:
        self._over = threading.Event()
        if self._fault != "refused":
            if self._fault == "narrow":
                # What the system takes in advance counts as passed to the client.
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _NARROW_BYTES)
            self._socket.listen(16)
            self._run(self._accept, self._socket, self._over)

    def _stop(self) -> None:
        self._over.set()
        while self._threads:
            self._threads.pop().join()
        self._socket.close()
        self._socket = _bound(self.port)

    def _run(self, target: object, *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)  # type: ignore[arg-type]
        thread.start()
        self._threads.append(thread)

    def _accept(self, listener: socket.socket, over: threading.Event) -> None:
        while not over.is_set():
            if select.select([listener], [], [], _POLL_SECONDS)[0]:
                client, _ = listener.accept()
                self.connections += 1
                self._run(self._serve, client, over)

    def _serve(self, client: socket.socket, over: threading.Event) -> None:
        # One thread for both directions: a socket that another thread waits for could not be reset.
        with contextlib.suppress(OSError), client:
            # Closing it sends a reset, and drops what has not been read.
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            if self._fault == "silent":
                over.wait()
                return
            with socket.create_connection(("127.0.0.1", self._target)) as server:
                for end in (client, server):
                    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if not _Connection(self, client, server, over, self._forgotten).pass_on():
                    # It ends as its server, or its client, has ended it.
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 0, 0))


class _Connection:
    def __init__(
        self,
        proxy: FaultyProxy,
        client: socket.socket,
        server: socket.socket,
        over: threading.Event,
        forgotten: threading.Event,
    ) -> None:
        self._proxy = proxy
        self._client = client
        self._server = server
        self._over = over
        self._forgotten = forgotten
        self._asked = 0
        self._is_waiting = False
        self._is_http2 = False
        self._asking = _Frames(len(_HTTP2_PREFACE))
        self._frames = b""

    def pass_on(self) -> bool:
        """Pass bytes on until the connection ends, and say whether it is to end with a reset."""
        try:
            while not self._over.is_set():
                ready, _, _ = select.select([self._client, self._server], [], [], _POLL_SECONDS)
                for end, pass_on in ((self._client, self._ask), (self._server, self._answer)):
                    if end in ready:
                        data = end.recv(65_536)
                        if not data:
                            # A client keeps the connection whose answer it had in time.
                            self._is_waiting |= end is self._client and self._asked > 0
                            return False
                        # A box that drops packets does not keep anybody from sending them.
                        if not self._forgotten.is_set() and pass_on(data):
                            return self._proxy.fault == "reset"
            return True
        finally:
            self._proxy.lost += self._is_waiting

    def _ask(self, data: bytes) -> bool:
        """Pass on what the client has sent, and say whether that was the last."""
        if self._asked == 0:
            self._is_http2 = self._asking.is_looked_at = data.startswith(_HTTP2_PREFACE)
        # A client of HTTP/2 that waits no longer keeps the connection.
        self._proxy.lost += _RST_STREAM_FRAME in self._asking.kinds(data)
        if self._proxy.fault == "narrow":
            self._over.wait(len(data) / self._proxy.bytes_per_second)
        room = _RESET_AFTER_BYTES - self._asked
        self._asked += len(data)
        if self._proxy.fault == "reset" and len(data) > room:
            # The server never has the whole request, so no answer to it can be lost.
            self._is_waiting = False
            self._server.sendall(data[:room])
            return True
        self._server.sendall(data)
        self._is_waiting = True
        return False

    def _answer(self, data: bytes) -> bool:
        """Pass on what the server has sent, and say whether that was the last."""
        fault, proxy = self._proxy.fault, self._proxy
        if fault == "far":
            # The client may be gone by then.
            proxy.lost += 1
            if self._over.wait(proxy.far_seconds):
                return True
        if fault not in ("late", "cut", "trickle"):
            self._client.sendall(data)
            self._is_waiting = False
            return False
        handshake, answer = self._split(data)
        self._client.sendall(handshake)
        if not answer:
            return False
        if fault == "cut":
            self._client.sendall(answer[: proxy.kept_bytes])
            return True
        if fault == "late":
            if not self._over.wait(proxy.late_seconds):
                self._client.sendall(answer)
            return False
        for byte in answer:
            if self._over.wait(proxy.trickle_seconds):
                break
            self._client.sendall(bytes([byte]))
        return False

    def _split(self, data: bytes) -> tuple[bytes, bytes]:
        """Return what comes before the first answer, and the rest: HTTP/2 begins with a handshake."""
        if not self._is_http2:
            return b"", data
        self._frames += data
        end = 0
        while (length := _frame_length(self._frames, end)) is not None:
            if self._frames[end + 3] == _HEADERS_FRAME:
                handshake, answer = self._frames[:end], self._frames[end:]
                self._frames, self._is_http2 = b"", False
                return handshake, answer
            if len(self._frames) - end < length:
                break
            end += length
        handshake, self._frames = self._frames[:end], self._frames[end:]
        return handshake, b""


class _Frames:
    """The frames that one side of an HTTP/2 connection sends.

    Attributes:
        is_looked_at: Whether it is HTTP/2.
    """

    def __init__(self, preface: int) -> None:
        self.is_looked_at = False
        self._preface = preface
        self._rest = b""

    def kinds(self, data: bytes) -> set[int]:
        """Return of which kinds the frames are that end with these bytes."""
        if not self.is_looked_at:
            return set()
        self._rest += data
        end = 0
        if self._preface:
            end, self._preface = self._preface, 0
        kinds = set()
        while (length := _frame_length(self._rest, end)) is not None and len(self._rest) - end >= length:
            kinds.add(self._rest[end + 3])
            end += length
        self._rest = self._rest[end:]
        return kinds


def _frame_length(data: bytes, start: int) -> int | None:
    """Return how long the frame is that begins there: https://www.rfc-editor.org/rfc/rfc9113#name-frame-format."""
    return 9 + int.from_bytes(data[start : start + 3], "big") if len(data) - start >= 9 else None


def _bound(port: int) -> socket.socket:
    """Return a socket that has the port and does not listen, so that connections are refused."""
    bound = socket.socket()
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    end = time.monotonic() + 5
    while True:
        try:
            bound.bind(("127.0.0.1", port))
            return bound
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.01)
