"""A reverse proxy as nginx and its like are: it ends connections of HTTP/1.1 and HTTP/2, and takes no large bodies."""

from __future__ import annotations

import contextlib
import http.client
import socket
import ssl
import struct
import threading

import grpc
import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.exceptions

CUTS = ("413", "413, hangs up", "408", "502", "503", "504", "closes", "resets", "stalls", "stream reset")
"""What becomes of a request whose body is too large.

- `413`, `408`, `502`, `503`, `504`: it is answered so, and the rest of its body is read and dropped, as by nginx.
- `413, hangs up`: it is answered so, and the connection is closed though there is more of the body to come.
- `closes`, `resets`: the connection ends in the middle of the body, without an answer.
- `stalls`: no more of the body is read, and nothing is answered.
- `stream reset`: over HTTP/2 the request alone ends so; over HTTP/1.1 the same as `resets`.
"""

_LINGER_SECONDS = 2.0


class ReverseProxy:
    """Takes requests on a loopback port and makes them anew to another one: those of HTTP/2 by gRPC.

    Attributes:
        port: Where it listens.
        most_bytes: The largest body that it takes. None: any.
        cut: What becomes of a larger one: one of `CUTS`.
        cuts: How many it has cut.
        passed: How many it has passed on.
    """

    def __init__(self, port: int, tls: ssl.SSLContext | None = None) -> None:
        """`tls` has the certificate, and the ALPN protocols that it offers."""
        self.most_bytes: int | None = None
        self.cut = "413"
        self.cuts = 0
        self.passed = 0
        self._target = port
        self._tls = tls
        self._over = threading.Event()
        self._connections: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        # A body is larger than what a connection holds on its way: else it is sent before it is cut.
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16_384)
        self.port = self._listener.getsockname()[1]

    def __enter__(self) -> ReverseProxy:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for connection in (self._listener, *self._connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def is_too_large(self, size: int) -> bool:
        """Say whether a body of so many bytes, or more, is not taken."""
        return self.most_bytes is not None and size > self.most_bytes

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self._connections.append(client)
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with contextlib.suppress(OSError, h2.exceptions.ProtocolError, http.client.HTTPException, grpc.RpcError):
            if self._tls is not None:
                client = self._tls.wrap_socket(client, server_side=True)
            with client:
                begin = client.recv(65_536)
                if begin.startswith(b"PRI"):
                    _Http2(self, client, self._target).serve(begin)
                else:
                    _Http1(self, client, self._target).serve(begin)

    def end(self, client: socket.socket) -> None:
        """End a connection as `cut` says. It may be the client that notices it first."""
        self.cuts += 1
        if self.cut == "stalls":
            self._over.wait(60)
        if self.cut in ("resets", "stream reset"):
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        elif self.cut == "closes" or self.cut.isdecimal():
            # Whoever closes with something unread sends a reset, which overtakes what was answered.
            client.shutdown(socket.SHUT_WR)
            client.settimeout(_LINGER_SECONDS)
            while client.recv(65_536):
                pass


class _Http1:
    def __init__(self, proxy: ReverseProxy, client: socket.socket, target: int) -> None:
        self._proxy = proxy
        self._client = client
        self._target = target

    def serve(self, rest: bytes) -> None:
        while True:
            while b"\r\n\r\n" not in rest:
                data = self._client.recv(65_536)
                if not data:
                    return
                rest += data
            head, _, rest = rest.partition(b"\r\n\r\n")
            request, *lines = head.decode("latin-1").split("\r\n")
            method, path, _ = request.split(" ")
            headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
            length = int(headers.get("content-length", 0))
            is_awaited = headers.pop("expect", None) is not None
            if is_awaited and not self._proxy.is_too_large(length):
                self._client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
                is_awaited = False
            # Of one that waits to be told to go on, no more comes.
            while not is_awaited and len(rest) < length and not self._proxy.is_too_large(len(rest)):
                data = self._client.recv(65_536)
                if not data:
                    return
                rest += data
            if self._proxy.is_too_large(length):
                status = self._proxy.cut[:3]
                if status.isdecimal():
                    page = b"<html>too large</html>"
                    self._client.sendall(
                        f"HTTP/1.1 {status} Cut\r\nContent-Type: text/html\r\nContent-Length: {len(page)}\r\n"
                        "Connection: close\r\n\r\n".encode()
                        + page
                    )
                self._proxy.end(self._client)
                return
            body, rest = rest[:length], rest[length:]
            self._client.sendall(self._pass_on(method, path, headers, body))
            self._proxy.passed += 1

    def _pass_on(self, method: str, path: str, headers: dict[str, str], body: bytes) -> bytes:
        connection = http.client.HTTPConnection("127.0.0.1", self._target, timeout=10)
        try:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            answer = response.read()
        finally:
            connection.close()
        lines = [f"HTTP/1.1 {response.status} {response.reason}"]
        lines += [f"{name}: {value}" for name, value in response.getheaders()]
        return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + answer


class _Http2:
    def __init__(self, proxy: ReverseProxy, client: socket.socket, target: int) -> None:
        self._proxy = proxy
        self._client = client
        self._channel = grpc.insecure_channel(f"127.0.0.1:{target}")
        configuration = h2.config.H2Configuration(client_side=False, header_encoding="utf-8")
        self._connection = h2.connection.H2Connection(configuration)
        self._requests: dict[int, tuple[dict[str, str], bytearray]] = {}

    def serve(self, data: bytes) -> None:
        self._connection.initiate_connection()
        with self._channel:
            while data:
                for event in self._connection.receive_data(data):
                    if self._is_over_after(event):
                        self._client.sendall(self._connection.data_to_send())
                        self._proxy.end(self._client)
                        return
                self._client.sendall(self._connection.data_to_send())
                data = self._client.recv(65_536)

    def _is_over_after(self, event: h2.events.Event) -> bool:
        """Do what follows from an event, and say whether the connection is to be ended."""
        if isinstance(event, h2.events.RequestReceived):
            self._requests[event.stream_id] = {str(name): str(value) for name, value in event.headers}, bytearray()
        elif isinstance(event, h2.events.DataReceived):
            # What is dropped, too, counts: else no other request could be sent.
            self._connection.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            if event.stream_id in self._requests:
                body = self._requests[event.stream_id][1]
                body += event.data
                if self._proxy.is_too_large(len(body)):
                    del self._requests[event.stream_id]
                    return self._cut(event.stream_id)
        elif isinstance(event, h2.events.StreamEnded) and event.stream_id in self._requests:
            headers, body = self._requests.pop(event.stream_id)
            answer, trailers = self._pass_on(headers, bytes(body))
            self._answer(event.stream_id, 200, [("content-type", "application/grpc")], answer, trailers)
            self._proxy.passed += 1
        return False

    def _pass_on(self, headers: dict[str, str], body: bytes) -> tuple[bytes, list[tuple[str, str]]]:
        """Return the answer to a request, framed as gRPC does, and its trailers."""
        metadata = tuple(item for item in headers.items() if not item[0].startswith((":", "grpc-")))
        metadata = tuple(item for item in metadata if item[0] not in ("content-type", "te", "user-agent"))
        call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = self._channel.unary_unary(headers[":path"])
        try:
            answer = call(body[5:], metadata=metadata, timeout=10)
        except grpc.RpcError as error:
            return b"", [("grpc-status", str(error.code().value[0])), ("grpc-message", error.details() or "")]
        return b"\0" + len(answer).to_bytes(4, "big") + answer, [("grpc-status", "0")]

    def _cut(self, stream: int) -> bool:
        status = self._proxy.cut[:3]
        if status.isdecimal():
            self._answer(stream, int(status), [("content-type", "text/html")], b"<html>too large</html>", [])
        if self._proxy.cut != "stream reset" and not self._proxy.cut.isdecimal():
            return True
        # The request is over, and the connection is there for the next one.
        self._proxy.cuts += 1
        code = h2.errors.ErrorCodes.NO_ERROR if status.isdecimal() else h2.errors.ErrorCodes.INTERNAL_ERROR
        with contextlib.suppress(h2.exceptions.StreamClosedError):
            self._connection.reset_stream(stream, code)
        return False

    def _answer(
        self, stream: int, status: int, headers: list[tuple[str, str]], body: bytes, trailers: list[tuple[str, str]]
    ) -> None:
        self._connection.send_headers(stream, [(":status", str(status)), *headers])
        self._connection.send_data(stream, body, end_stream=not trailers)
        if trailers:
            self._connection.send_headers(stream, trailers, end_stream=True)
