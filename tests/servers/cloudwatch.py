"""CloudWatch Logs for tests: moto as a server, behind a face that enforces what moto does not, and fails on request.

moto keeps the log groups in a process of its own. The face adds PutLogEvents' limits (10,000 events, 1 MiB with 26
bytes an event, chronological, 24 hours) and GetLogEvents' (1 MiB an answer), and answers with the errors that a test
asks for: https://docs.aws.amazon.com/AmazonCloudWatchLogs/latest/APIReference/API_PutLogEvents.html
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

REGION = "eu-central-1"
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test-access-key", "AWS_SECRET_ACCESS_KEY": "test-secret-key"}

_START_SECONDS = 120.0
_ANSWER_BYTES = 1_048_576
_DAY_MILLIS = 24 * 3600 * 1000


class CloudWatch:
    """A server that answers, as a context manager.

    Attributes:
        endpoint: Its URL.
        operations: The operations that were called, in order.
        limits: Refusals of requests beyond a limit: the exporter should cause none.
    """

    def __init__(self) -> None:
        self.operations: list[str] = []
        self.limits: list[str] = []
        # A log stream → the bytes of its largest event.
        self._largest: dict[str, int] = {}
        self._groups: set[str] = set()
        self._fault: tuple[str, int, str] | None = None
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._log: Any = None
        self._port = 0

    @property
    def environment(self) -> dict[str, str]:
        """The variables with which boto3 finds the credentials, and nothing else."""
        return {
            **CREDENTIALS,
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "NO_PROXY": "127.0.0.1",
        }

    @property
    def settings(self) -> dict[str, Any]:
        """A child's settings for it."""
        return {"endpoint_url": self.endpoint, "region": REGION, "log_group": "zenml-tests"}

    def __enter__(self) -> CloudWatch:
        self._log = tempfile.NamedTemporaryFile(prefix="cloudwatch-")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self._port)]
        self._process = subprocess.Popen(command, stdout=self._log, stderr=subprocess.STDOUT)
        try:
            self._wait()
            handler = type("Handler", (_Handler,), {"server_of_tests": self})
            self._face = _Server(("127.0.0.1", 0), handler)
        except BaseException:
            self._stop()
            raise
        self.endpoint = f"http://127.0.0.1:{self._face.server_address[1]}"
        threading.Thread(target=self._face.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._face.shutdown()
        self._face.server_close()
        self._stop()

    def fail(self, operation: str = "", status: int = 400, code: str = "") -> None:
        """Answer an operation, or all of them, with an error until `mend`. Status 0: hang up without an answer."""
        with self._lock:
            self._fault = operation, status, code

    def mend(self) -> None:
        """End the errors."""
        with self._lock:
            self._fault = None

    def fault_of(self, operation: str) -> tuple[int, str] | None:
        """Return the status and the code with which an operation is to be answered now."""
        with self._lock:
            self.operations.append(operation)
            if self._fault is None or self._fault[0] not in ("", operation):
                return None
            return self._fault[1:]

    def answer(self, operation: str, headers: dict[str, str], body: bytes) -> tuple[int, bytes, str]:
        """Return moto's status, body and name of an error, within CloudWatch's limits."""
        request = json.loads(body)
        name = request.get("logStreamName", "")
        if operation == "PutLogEvents":
            if broken := broken_limit(request["logEvents"]):
                self.limits.append(broken)
                return 400, json.dumps({"message": broken}).encode(), "InvalidParameterException"
            sizes = [len(event["message"].encode()) for event in request["logEvents"]]
            with self._lock:
                self._largest[name] = max(self._largest.get(name, 0), *sizes)
        elif operation == "GetLogEvents":
            most = max(1, _ANSWER_BYTES // max(1, self._largest.get(name, 1)))
            body = json.dumps({**request, "limit": min(request["limit"], most)}).encode()
        elif operation == "CreateLogGroup":
            self._groups.add(request["logGroupName"])
        kept = {name: value for name, value in headers.items() if name != "Content-Length"}
        status, answer, error = self._forward(kept, body)
        if b"ResourceNotFoundException" in answer and request["logGroupName"] in self._groups:
            # moto says "log group" here, too.
            answer = answer.replace(b"The specified log group", b"The specified log stream")
        return status, answer, error

    def _forward(self, headers: dict[str, str], body: bytes) -> tuple[int, bytes, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
        try:
            connection.request("POST", "/", body, headers)
            answer = connection.getresponse()
            return answer.status, answer.read(), answer.headers.get("x-amzn-errortype", "")
        finally:
            connection.close()

    def _wait(self) -> None:
        assert self._process is not None
        end = time.monotonic() + _START_SECONDS
        while time.monotonic() < end and self._process.poll() is None:
            try:
                connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=10)
                connection.request("GET", "/moto-api/")
                connection.getresponse().read()
                return
            except OSError:
                time.sleep(0.1)
            finally:
                connection.close()
        raise RuntimeError(f"moto did not start:\n{Path(self._log.name).read_text(errors='replace')[-4000:]}")

    def _stop(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        self._log.close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Take it as it comes that a client hangs up."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1
    disable_nagle_algorithm = True
    server_of_tests: CloudWatch

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        operation = self.headers.get("X-Amz-Target", "").partition(".")[2]
        fault = self.server_of_tests.fault_of(operation)
        if fault is not None and fault[0] == 0:
            self.close_connection = True
            return
        if fault is None and "Credential=test-access-key/" not in self.headers.get("Authorization", ""):
            fault = 400, "UnrecognizedClientException"
        if fault is not None:
            status, error = fault
            # A server that repeats what it was sent.
            answer = json.dumps({"__type": error, "message": f"told to {self.headers.get('Authorization')}"}).encode()
        else:
            status, answer, error = self.server_of_tests.answer(operation, dict(self.headers.items()), body)
        self._answer(status, answer, error)

    def do_HEAD(self) -> None:
        self._answer(200, b"", "")

    def _answer(self, status: int, body: bytes, error: str) -> None:
        self.send_response(status)
        if error:
            self.send_header("x-amzn-ErrorType", error)
        self.send_header("Content-Type", "application/x-amz-json-1.1")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


def broken_limit(events: list[dict[str, Any]]) -> str:
    """Return which limit of PutLogEvents a request breaks, empty if none."""
    times = [event["timestamp"] for event in events]
    size = sum(len(event["message"].encode()) + 26 for event in events)
    if not 0 < len(events) <= 10_000:
        return f"{len(events)} events"
    if size > 1_048_576:
        return f"{size} bytes"
    if times != sorted(times):
        return "not chronological"
    return "more than 24 hours" if times[-1] - times[0] > _DAY_MILLIS else ""
