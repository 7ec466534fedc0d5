"""The HTTP face of a stand-in for a log server, in threads of the test's own process.

A subclass answers requests. What it has stored stays when it is killed and started again on the same port.
"""

from __future__ import annotations

import base64
import gzip
import sys
import threading
import zlib
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlsplit

from typing_extensions import Self


class Reply(NamedTuple):
    """What a stand-in answers."""

    status: int
    body: bytes = b""
    headers: Mapping[str, str] = {}


class RefusalError(Exception):
    """The request is refused with a status and a text."""

    def __init__(self, status: int, text: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(text)
        self.status = status
        self.headers = dict(headers or {})


@dataclass
class Asked:
    """One request.

    Attributes:
        path: Its path, without a query.
        parameters: Those of the query and of a form.
        headers: Its headers, with names in lower case.
        body: Its body, decompressed.
        method: Its method.
    """

    path: str
    parameters: dict[str, str]
    headers: dict[str, str]
    body: bytes = field(repr=False)
    method: str = "POST"

    def number(self, name: str, default: int) -> int:
        """Return a parameter that is a number."""
        text = self.parameters.get(name, "") or str(default)
        if not text.removeprefix("-").isdecimal():
            raise RefusalError(400, f"'{name}' is no number: {text[:100]}")
        return int(text)

    def check_basic(self, user: str, password: str) -> None:
        """Refuse the request unless it has these credentials."""
        wanted = base64.b64encode(f"{user}:{password}".encode()).decode()
        if self.headers.get("authorization") != f"Basic {wanted}":
            raise RefusalError(401, "unauthorized")


class StandIn:
    """Answers on a free port of loopback within a `with` block.

    Attributes:
        asked: All requests, in the order of their arrival.
        port: The port.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.asked: list[Asked] = []
        self.port = 0
        self._faults: dict[str, deque[Reply]] = {}
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def answer(self, asked: Asked) -> Reply:
        """Answer a request, or raise `RefusalError`."""
        raise NotImplementedError

    def refuse(self, asked: Asked, refusal: RefusalError) -> Reply:
        """Return the answer for a request that is refused."""
        return Reply(refusal.status, str(refusal).encode() + b"\n", {"Content-Type": "text/plain", **refusal.headers})

    def fail(
        self, path: str, status: int, body: bytes = b"told to", times: int = 1, headers: Mapping[str, str] | None = None
    ) -> None:
        """Answer the next requests to a path with this."""
        with self.lock:
            self._faults.setdefault(path, deque()).extend([Reply(status, body, headers or {})] * times)

    def mend(self) -> None:
        """Fail no more."""
        with self.lock:
            self._faults.clear()

    def reply(self, asked: Asked) -> Reply:
        """Answer as told, or as the server would."""
        with self.lock:
            self.asked.append(asked)
            faults = self._faults.get(asked.path)
            if faults:
                return faults.popleft()
            try:
                return self.answer(asked)
            except RefusalError as refusal:
                return self.refuse(asked, refusal)

    def start(self) -> None:
        """Listen, on the same port as before."""
        standin = self

        class Handler(_Handler):
            owner = standin

        self._server = _Server(("127.0.0.1", self.port), Handler)
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Listen no more, and hang up."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server.hang_up()
            self._server = None
        if self._thread is not None:
            self._thread.join()
            self._thread = None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # One segment an answer, sent at once: otherwise every request waits 40 ms for an acknowledgement.
    wbufsize = -1
    disable_nagle_algorithm = True
    owner: StandIn

    def do_GET(self) -> None:
        self._do()

    def do_POST(self) -> None:
        self._do()

    def do_PUT(self) -> None:
        self._do()

    def do_HEAD(self) -> None:
        self._send(Reply(200))

    def _do(self) -> None:
        url = urlsplit(self.path)
        length = self.headers.get("Content-Length", "0")
        if not length.isdecimal():
            raise ConnectionAbortedError("the client hung up in the middle of the headers")
        body = self.rfile.read(int(length))
        headers = {name.lower(): value for name, value in self.headers.items()}
        try:
            if headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            elif headers.get("content-encoding", "identity") != "identity":
                self._send(Reply(400, b"unknown content encoding"))
                return
        except (OSError, EOFError, zlib.error):
            self._send(Reply(400, b"the payload is not compressed as it says"))
            return
        texts = parse_qs(url.query, keep_blank_values=True)
        if headers.get("content-type", "").startswith("application/x-www-form-urlencoded"):
            texts.update(parse_qs(body.decode(), keep_blank_values=True))
        parameters = {name: value[0] for name, value in texts.items()}
        self._send(self.owner.reply(Asked(url.path, parameters, headers, body, self.command)))

    def _send(self, reply: Reply) -> None:
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        if reply.status != 204:
            self.send_header("Content-Length", str(len(reply.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(reply.body)
        self.wfile.flush()

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: `asked` has all requests."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        self._clients: set[Any] = set()
        super().__init__(address, handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        self._clients.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._clients.discard(request)
        super().shutdown_request(request)

    def hang_up(self) -> None:
        """Close the connections that clients keep."""
        for client in list(self._clients):
            self.shutdown_request(client)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore that a client hangs up."""
        if not isinstance(sys.exc_info()[1], OSError | ValueError):
            super().handle_error(request, client_address)
