"""A real OpenTelemetry collector: rotel, or where there is none for this machine the project's own receiver.

It runs as a process of its own, so that it can be killed. What it prints of every record is read back.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import socket
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.patience import PATIENCE_SECONDS
from tests.servers.otlp_receiver import Record

ROOT = Path(__file__).resolve().parents[2]


class Collector:
    """A collector on free loopback ports, which it keeps when it is started again.

    Attributes:
        name: Which collector it is, as it can be told to people.
        http_port: Where it takes OTLP over HTTP.
        grpc_port: Where it takes OTLP over gRPC.
        pid: Its process.
    """

    name = "the project's own OTLP receiver"

    def __init__(self) -> None:
        self.http_port, self.grpc_port = _free_ports(2)
        descriptor, path = tempfile.mkstemp(prefix="collector-")
        os.close(descriptor)
        self._output = Path(path)
        self._process: subprocess.Popen[bytes] | None = None

    def command(self) -> list[str]:
        ports = ["--http-port", str(self.http_port), "--grpc-port", str(self.grpc_port)]
        return [sys.executable, "-m", "tests.servers.otlp_receiver", *ports]

    def parse(self, output: str) -> list[Record]:
        # A process that was killed may have left half a line.
        return [Record(*json.loads(line)) for line in output.split("\n") if line.endswith("}]")]

    @property
    def http_endpoint(self) -> str:
        return f"http://127.0.0.1:{self.http_port}"

    @property
    def grpc_endpoint(self) -> str:
        return f"127.0.0.1:{self.grpc_port}"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start it and wait until it accepts connections."""
        with self._output.open("ab") as output:
            self._process = subprocess.Popen(
                self.command(), cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )
        deadline = time.monotonic() + PATIENCE_SECONDS
        for port in (self.http_port, self.grpc_port):
            while not _accepts(port):
                if self._process.poll() is not None or time.monotonic() > deadline:
                    self.kill()
                    raise RuntimeError(f"{self.name} does not start:\n{self.output()[-2000:]}")
                time.sleep(0.02)

    def kill(self) -> None:
        """End it at once, as a crash would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def output(self) -> str:
        """All that it has printed."""
        return self._output.read_bytes().decode("utf-8", "replace")

    def records(self) -> list[Record]:
        """Every record it has received, in the order in which it received them."""
        return self.parse(self.output())

    def wait_for_records(self, count: int, timeout_seconds: float = PATIENCE_SECONDS) -> list[Record]:
        """Every record, as soon as there are so many; fewer if that takes too long."""
        deadline = time.monotonic() + timeout_seconds
        while len(records := self.records()) < count and time.monotonic() < deadline:
            time.sleep(0.05)
        return records

    def __enter__(self) -> Collector:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._output.unlink()


class Rotel(Collector):
    """https://github.com/streamfold/rotel, a collector in Rust. It prints every record it receives."""

    name = "rotel"

    def command(self) -> list[str]:
        binary = find_rotel()
        assert binary is not None
        receivers = ["--otlp-http-endpoint", f"127.0.0.1:{self.http_port}"]
        receivers += ["--otlp-grpc-endpoint", f"127.0.0.1:{self.grpc_port}"]
        printing = ["--exporter", "blackhole", "--debug-log", "logs", "--debug-log-verbosity", "detailed"]
        return [str(binary), "start", *receivers, *printing]

    def parse(self, output: str) -> list[Record]:
        return parse_rotel(output)


def find_rotel() -> Path | None:
    """The binary, if the package is installed; its wheel forgets to set the bit that lets it run."""
    found = importlib.util.find_spec("rotel")
    if found is None or found.origin is None:
        return None
    binary = Path(found.origin).with_name("rotel-agent")
    if not binary.exists():
        return None
    if not binary.stat().st_mode & stat.S_IXUSR:
        binary.chmod(binary.stat().st_mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)
    return binary


def start_collector() -> Collector:
    """A collector for a `with` statement; its `name` says which."""
    return Rotel() if find_rotel() else Collector()


# What rotel prints. Texts are printed as they are, so a record's fields are looked for in their fixed order.
_RESOURCE = re.compile(r"^ResourceLog #\d+$", re.MULTILINE)
_SCOPE = re.compile(r"^ScopeLogs #\d+\nScopeLogs SchemaURL: .*\nInstrumentationScope ", re.MULTILINE)
_RECORD = re.compile(
    r"^LogRecord #\d+\n"
    r"ObservedTimestamp: (?P<observed>\d+)\n"
    r"Timestamp: (?P<time>\d+)\n"
    r"SeverityText: (?P<text>.*)\n"
    r"SeverityNumber: \w+\((?P<number>\d+)\)\n"
    r"Body: (?P<body>(?s:.*?))\n"
    r"Attributes:\n(?P<attributes>(?:     -> (?s:.*?)\n)??)"
    r"    Trace ID       : (?P<trace>[0-9a-f]*)\n"
    r"    Span ID        : (?P<span>[0-9a-f]*)\n"
    r"Flags: (?P<flags>\d+)$",
    re.MULTILINE,
)
_ATTRIBUTE = re.compile(r"^     -> (?=\S+: (?:Empty|(?:Str|Int|Double|Bool|Bytes|Slice|Map)\())", re.MULTILINE)


def parse_rotel(output: str) -> list[Record]:
    """The records in rotel's output, without one that is not printed to its end."""
    records = []
    for resource_part in _RESOURCE.split(output)[1:]:
        resource_text, *scope_parts = _SCOPE.split(resource_part)
        resource = _parse_attributes(resource_text.partition("Resource attributes:\n")[2])
        for scope_part in scope_parts:
            first = _RECORD.search(scope_part)
            if first is None:
                continue
            scope = scope_part[: first.start()].removesuffix(" \n")
            for found in _RECORD.finditer(scope_part):
                records.append(
                    Record(
                        _parse_value(found["body"]),
                        int(found["number"]),
                        found["text"],
                        _parse_attributes(found["attributes"]),
                        found["trace"],
                        found["span"],
                        int(found["flags"]),
                        int(found["time"]),
                        int(found["observed"]),
                        scope,
                        resource,
                    )
                )
    return records


def _parse_attributes(text: str) -> dict[str, Any]:
    attributes = {}
    for part in _ATTRIBUTE.split(text)[1:]:
        name, _, value = part.removesuffix("\n").partition(": ")
        attributes[name] = _parse_value(value)
    return attributes


def _parse_value(text: str) -> Any:
    """A value as an object; what is inside of lists and maps stays as it is printed."""
    kind, _, rest = text.partition("(")
    content = rest.removesuffix(")")
    if kind == "Empty":
        return None
    if kind == "Int":
        return int(content)
    if kind == "Double":
        return float(content)
    if kind == "Bool":
        return content == "true"
    return content if kind == "Str" else text


def _accepts(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [listener.getsockname()[1] for listener in sockets]
    for listener in sockets:
        listener.close()
    return ports
