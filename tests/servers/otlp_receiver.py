"""A small OTLP receiver: answers as it is told, and keeps all it got.

`python -m tests.servers.otlp_receiver --http-port N --grpc-port N` runs it as a process of its own, which
prints each record as one line of JSON: it stands in for a collector where there is none for this machine.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
import threading
import zlib
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

import grpc
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest, ExportLogsServiceResponse
from opentelemetry.proto.common.v1.common_pb2 import AnyValue


class Record(NamedTuple):
    """One received log record."""

    body: Any
    severity_number: int
    severity_text: str
    attributes: dict[str, Any]
    trace_id: str
    span_id: str
    flags: int
    time_unix_nano: int
    observed_time_unix_nano: int
    scope: str
    resource: dict[str, Any]


@dataclass
class Request:
    """One received request, whatever it was answered."""

    headers: dict[str, str]
    path: str
    payload: bytes
    connection: str


@dataclass
class Answer:
    """What to answer once: over HTTP `status`, `headers` and `body`, over gRPC `code`, `details` and `trailers`."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    code: grpc.StatusCode = grpc.StatusCode.OK
    details: str = ""
    trailers: tuple[tuple[str, str | bytes], ...] = ()
    delay_seconds: float = 0.0
    hang_up: bool = False


def partial_success(rejected: int, message: str) -> bytes:
    response = ExportLogsServiceResponse()
    response.partial_success.rejected_log_records = rejected
    response.partial_success.error_message = message
    return response.SerializeToString()


def decode_value(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    if kind is None:
        return None
    if kind == "array_value":
        return [decode_value(item) for item in value.array_value.values]
    if kind == "kvlist_value":
        return decode_attributes(value.kvlist_value.values)
    return getattr(value, kind)


def decode_attributes(key_values: Iterable[Any]) -> dict[str, Any]:
    attributes: dict[str, Any] = {}
    for key_value in key_values:
        # "The keys MUST be unique": a receiver may do anything with the second.
        assert key_value.key not in attributes, f"{key_value.key} occurs twice"
        attributes[key_value.key] = decode_value(key_value.value)
    return attributes


def decode_request(payload: bytes) -> list[Record]:
    """The records of a serialized request, in their order on the wire."""
    return [
        Record(
            decode_value(record.body),
            record.severity_number,
            record.severity_text,
            decode_attributes(record.attributes),
            record.trace_id.hex(),
            record.span_id.hex(),
            record.flags,
            record.time_unix_nano,
            record.observed_time_unix_nano,
            scope_logs.scope.name,
            decode_attributes(resource_logs.resource.attributes),
        )
        for resource_logs in ExportLogsServiceRequest.FromString(payload).resource_logs
        for scope_logs in resource_logs.scope_logs
        for record in scope_logs.log_records
    ]


class OtlpReceiver:
    """Receives over HTTP and gRPC on loopback ports, in threads of this process.

    Attributes:
        requests: What it was asked.
        answers: What to answer next; when there are none left, what `judge` says.
        judge: Says what to answer to these records; with success if it is None.
    """

    def __init__(self, http_port: int = 0, grpc_port: int = 0, print_records: bool = False) -> None:
        self.requests: list[Request] = []
        self.answers: deque[Answer] = deque()
        self.judge: Callable[[list[Record]], Answer] | None = None
        self._print_records = print_records
        self._records: list[Record] = []
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._http = _HttpServer(("127.0.0.1", http_port), _handler(self))
        self._grpc = grpc.server(ThreadPoolExecutor(4), options=[("grpc.so_reuseport", 0)])
        handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.unary_unary_rpc_method_handler(self._answer_grpc)
        service = "opentelemetry.proto.collector.logs.v1.LogsService"
        self._grpc.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {"Export": handler}),))
        self.grpc_port = self._grpc.add_insecure_port(f"127.0.0.1:{grpc_port}")
        self.http_port = self._http.server_address[1]

    @property
    def http_endpoint(self) -> str:
        return f"http://127.0.0.1:{self.http_port}"

    @property
    def grpc_endpoint(self) -> str:
        return f"127.0.0.1:{self.grpc_port}"

    def __enter__(self) -> OtlpReceiver:
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        self._grpc.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._http.shutdown()
        self._http.server_close()
        self._grpc.stop(0).wait()

    def records(self) -> list[Record]:
        """Every record of the requests that were answered with success."""
        with self._lock:
            return list(self._records)

    def receive(self, request: Request) -> Answer:
        with self._lock:
            self.requests.append(request)
            if self.answers:
                answer = self.answers.popleft()
            else:
                answer = self.judge(decode_request(request.payload)) if self.judge else Answer()
            if answer.status == 200 and answer.code is grpc.StatusCode.OK and not answer.hang_up:
                records = decode_request(request.payload)
                self._records += records
                if self._print_records:
                    print("".join(json.dumps(record) + "\n" for record in records), end="", flush=True)
        self._over.wait(answer.delay_seconds)
        return answer

    def _answer_grpc(self, payload: bytes, context: grpc.ServicerContext) -> bytes:
        headers = {key: str(value) for key, value in context.invocation_metadata()}
        answer = self.receive(Request(headers, "", payload, context.peer()))
        if answer.code is not grpc.StatusCode.OK:
            context.set_trailing_metadata(answer.trailers)
            context.abort(answer.code, answer.details)
        return answer.body


class _HttpServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Take it as it comes that a client hangs up."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


def _handler(receiver: OtlpReceiver) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            length = self.headers.get("Content-Length") or ""
            payload = self.rfile.read(int(length)) if length.isdecimal() else b""
            if not length.isdecimal() or len(payload) < int(length):
                raise ConnectionAbortedError("the client hung up in the middle of a request")
            encoding = self.headers.get("Content-Encoding")
            if encoding == "gzip":
                payload = gzip.decompress(payload)
            elif encoding == "deflate":
                payload = zlib.decompress(payload)
            headers = {key.lower(): value for key, value in self.headers.items()}
            answer = receiver.receive(Request(headers, self.path, payload, str(self.client_address)))
            if answer.hang_up:
                self.close_connection = True
                return
            self.send_response(answer.status)
            for name, value in {"Content-Type": "application/x-protobuf", **answer.headers}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(answer.body)))
            self.end_headers()
            self.wfile.write(answer.body)

        def log_message(self, *_: object) -> None:
            pass

    return Handler


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--http-port", type=int, default=4318)
    parser.add_argument("--grpc-port", type=int, default=4317)
    arguments = parser.parse_args()
    with OtlpReceiver(arguments.http_port, arguments.grpc_port, print_records=True):
        threading.Event().wait()


if __name__ == "__main__":
    main()
