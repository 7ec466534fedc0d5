"""Answers probes and Prometheus about an agent, over HTTP: at most some requests at a time, each for some seconds."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from composite_logstore.catalog.errors import ArgumentError, OperationError
from composite_logstore.operations.agent import Agent

LOOPBACK = "127.0.0.1"
_MOST_REQUESTS = 8
"""How many requests are answered at a time. Further ones are closed without an answer."""
REQUEST_SECONDS = 5.0
"""How long a request may take, in seconds. Its connection is closed then, however slowly the client sends or reads."""
_TEXT = "text/plain; charset=utf-8"
_METRICS = "text/plain; version=0.0.4; charset=utf-8"


def parsed_address(address: str) -> tuple[str, int]:
    """Return the host and the port of `HOST:PORT`; without a host, it is that of the loopback interface.

    Raises:
        ArgumentError: It is no such address.
    """
    try:
        parts = urlsplit(f"//{address}")
        if parts.port is not None and not parts.path and "@" not in address:
            return parts.hostname or LOOPBACK, parts.port
    except ValueError:
        pass
    raise ArgumentError("health_address", f"'{address}' is no HOST:PORT, such as {LOOPBACK}:8080 or [::1]:8080")


class Health:
    """Answers `/healthz`, `/readyz` and `/metrics` in threads of its own.

    Attributes:
        address: Where it answers, as HOST:PORT.
    """

    def __init__(self, agent: Agent, address: str) -> None:
        """Begin to answer.

        Args:
            agent: The agent.
            address: Where, as HOST:PORT. Port 0 stands for a free one.

        Raises:
            ArgumentError: It is no such address.
            OperationError: The address cannot be used.
        """
        host, port = parsed_address(address)
        try:
            self._server = _Server((host, port), agent)
        except (OSError, OverflowError) as error:
            why = (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
            raise OperationError(f"the health address {address} cannot be used: {why}") from error
        bound, port = self._server.server_address[:2]
        self.address = f"[{bound!s}]:{port}" if ":" in str(bound) else f"{bound!s}:{port}"
        threading.Thread(target=self._server.serve_forever, name="composite-logstore health", daemon=True).start()

    def close(self) -> None:
        """Answer no more."""
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, address: tuple[str, int], agent: Agent) -> None:
        self.agent = agent
        self._free = threading.BoundedSemaphore(_MOST_REQUESTS)
        # A connection → when it was accepted, in seconds of the monotonic clock.
        self._accepted: dict[socket.socket, float] = {}
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        super().__init__(address, _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._free.acquire(blocking=False):
            self.shutdown_request(request)
            return
        self._accepted[request] = time.monotonic()
        try:
            super().process_request(request, client_address)
        except BaseException:
            self._release(request)
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._release(request)

    def _release(self, request: Any) -> None:
        self._accepted.pop(request, None)
        self._free.release()

    def service_actions(self) -> None:
        """End requests that take too long. `serve_forever` calls this twice a second."""
        latest = time.monotonic() - REQUEST_SECONDS
        for request, accepted in list(self._accepted.items()):
            if accepted < latest:
                with contextlib.suppress(OSError):
                    # Its thread sees the end of the connection, and closes it.
                    request.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: the client has gone away, or was too slow."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        agent = self.server.agent
        path = urlsplit(self.path).path
        if path == "/healthz":
            self._say(agent.is_alive, "alive" if agent.is_alive else "the agent has not looked for dead processes")
        elif path == "/readyz":
            why = _why_not_ready(agent)
            self._say(not why, why or "ready")
        elif path == "/metrics":
            self._answer(HTTPStatus.OK, "".join(f"{line}\n" for line in metrics(agent)), _METRICS)
        else:
            self._answer(HTTPStatus.NOT_FOUND, "there are /healthz, /readyz and /metrics\n", _TEXT)

    def _say(self, is_well: bool, text: str) -> None:
        self._answer(HTTPStatus.OK if is_well else HTTPStatus.SERVICE_UNAVAILABLE, f"{text}\n", _TEXT)

    def _answer(self, status: HTTPStatus, text: str, content_type: str) -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def version_string(self) -> str:
        return "composite-logstore"

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: probes ask every few seconds."""


def _why_not_ready(agent: Agent) -> str:
    if not agent.is_alive:
        return "the agent has not looked for dead processes"
    return "" if agent.knows_settings else f"ZenML has not told the settings yet: {agent.zenml_error}"


def metrics(agent: Agent) -> Iterator[str]:
    """Yield the lines of Prometheus' text format.

    https://prometheus.io/docs/instrumenting/exposition_formats/
    """
    delivered = agent.delivered
    children = [({"log_store": one.store.label, "child": one.child}, one) for one in delivered]
    yield from _family(
        "events_total",
        "counter",
        "Events that the agent had to deliver, by what became of them.",
        [(labels | {"outcome": name}, number) for labels, one in children for name, number in one.outcomes.items()],
    )
    yield from _family(
        "pending_events",
        "gauge",
        "Events that wait for the agent to deliver them.",
        [(labels, one.pending) for labels, one in children],
    )
    yield from _family(
        "child_healthy",
        "gauge",
        "Whether the child's backend takes events.",
        [(labels, int(one.state == "healthy")) for labels, one in children],
    )
    states = [
        ({"log_store": store.label, "state": state}, number)
        for store, running, dead in agent.processes
        for state, number in (("running", running), ("dead", dead))
    ]
    yield from _family("processes", "gauge", "Processes that run, and dead ones whose events are delivered.", states)
    reachable = int(agent.knows_settings and not agent.zenml_error)
    yield from _family("zenml_reachable", "gauge", "Whether ZenML answered when it was last asked.", [({}, reachable)])


def _family(name: str, kind: str, text: str, samples: Iterable[tuple[dict[str, str], int]]) -> Iterator[str]:
    full = f"composite_logstore_agent_{name}"
    yield f"# HELP {full} {text}"
    yield f"# TYPE {full} {kind}"
    for labels, value in samples:
        shown = ",".join(f'{label}="{_escaped(text)}"' for label, text in labels.items())
        yield f"{full}{{{shown}}} {value}" if shown else f"{full} {value}"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
