"""ClickHouse: its own engine (chdb), behind as much of its HTTP interface as the collector and the reader use.

The engine runs in a process of its own, since it takes memory and threads. It has one user, `reader` with the password
`right`, who may read all but the table `secret`; requests without a user may do everything.
"""

from __future__ import annotations

import argparse
import base64
import importlib.util
import json
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit
from urllib.request import Request, urlopen

from tests.patience import PATIENCE_SECONDS
from tests.servers.collector import Rotel, find_rotel

ROOT = Path(__file__).resolve().parents[2]

# The collector's own statements, without what the engine need not know: codecs, partitions, a time to live.
# https://github.com/open-telemetry/opentelemetry-collector-contrib/tree/main/exporter/clickhouseexporter
_COMMON = """
    TraceId String, SpanId String, TraceFlags UInt8, SeverityText LowCardinality(String), SeverityNumber UInt8,
    ServiceName LowCardinality(String), Body String, ResourceSchemaUrl LowCardinality(String),
    ResourceAttributes {map}, ScopeSchemaUrl LowCardinality(String), ScopeName String,
    ScopeVersion LowCardinality(String), ScopeAttributes {map}, LogAttributes {map}, EventName String"""
_MAP = "Map(LowCardinality(String), String)"
TABLES = {
    "v1": "CREATE TABLE {name} (Timestamp DateTime64(9), TimestampTime DateTime DEFAULT toDateTime(Timestamp),"
    + _COMMON.replace("{map}", _MAP)
    + ") ENGINE = MergeTree ORDER BY (ServiceName, TimestampTime, Timestamp)",
    "v2": "CREATE TABLE {name} (Timestamp DateTime64(9),"
    + _COMMON.replace("{map}", _MAP)
    + ") ENGINE = MergeTree ORDER BY (toStartOfFiveMinutes(Timestamp), ServiceName, Timestamp)",
    "json": "CREATE TABLE {name} (Timestamp DateTime64(9), TimestampTime DateTime DEFAULT toDateTime(Timestamp),"
    + _COMMON.replace("{map}", "JSON")
    + ") ENGINE = MergeTree ORDER BY (ServiceName, TimestampTime, Timestamp)",
    # https://github.com/SigNoz/signoz-otel-collector: a table of its own kind.
    "signoz": "CREATE TABLE {name} (ts_bucket_start UInt64, resource_fingerprint String, timestamp UInt64,"
    " observed_timestamp UInt64, id String, trace_id String, span_id String, trace_flags UInt32,"
    " severity_text LowCardinality(String), severity_number UInt8, body String,"
    " attributes_string Map(LowCardinality(String), String), attributes_number Map(LowCardinality(String), Float64),"
    " attributes_bool Map(LowCardinality(String), Bool), resources_string Map(LowCardinality(String), String),"
    " scope_name String, scope_version String, scope_string Map(LowCardinality(String), String))"
    " ENGINE = MergeTree ORDER BY (ts_bucket_start, resource_fingerprint, severity_text, timestamp, id)",
}

_STATUSES = {60: 404, 81: 404, 516: 403, 497: 403, 62: 400, 47: 404, 194: 401, 202: 500}


def is_installed() -> bool:
    return importlib.util.find_spec("chdb") is not None and find_rotel() is not None


class ClickHouse:
    """A server on a free port, with a database `otel` and the collector's table in each version.

    Attributes:
        url: Its URL.
    """

    def __init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self._port = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self._port}"
        self._folder = tempfile.TemporaryDirectory(prefix="clickhouse-")
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and wait until it answers."""
        command = [sys.executable, "-m", "tests.servers.clickhouse", str(self._port), self._folder.name]
        log = Path(self._folder.name, "log")
        with log.open("ab") as output:
            self._process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                socket.create_connection(("127.0.0.1", self._port), timeout=1).close()
                return
            except OSError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    self.kill()
                    raise RuntimeError(f"ClickHouse does not start:\n{log.read_text()[-2000:]}") from None
                time.sleep(0.05)

    def kill(self) -> None:
        """End it at once. It has its rows when it is started again."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def ask(self, sql: str, **parameters: str) -> list[list[Any]]:
        """The rows of a query, or nothing for a statement."""
        given = urlencode({"database": "otel", **{f"param_{name}": value for name, value in parameters.items()}})
        request = Request(f"{self.url}/?{given}", data=sql.encode())
        with urlopen(request, timeout=PATIENCE_SECONDS) as response:
            return [json.loads(line) for line in response.read().splitlines()]

    def create(self, version: str, name: str) -> None:
        """Create a table in one of the versions of `TABLES`."""
        self.ask(TABLES[version].replace("{name}", name))

    def insert(self, name: str, rows: Sequence[dict[str, Any]]) -> None:
        """Insert rows."""
        lines = "\n".join(json.dumps(row) for row in rows)
        self.ask(f"INSERT INTO {name} FORMAT JSONEachRow\n{lines}")

    def __enter__(self) -> ClickHouse:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._folder.cleanup()


class RotelToClickHouse(Rotel):
    """A collector that writes what it receives into ClickHouse: after at most 200 ms, in batches."""

    def __init__(self, clickhouse: ClickHouse, prefix: str = "otel", json: bool = False) -> None:
        super().__init__()
        self._options = ["--clickhouse-exporter-endpoint", clickhouse.url, "--clickhouse-exporter-database", "otel"]
        self._options += ["--clickhouse-exporter-table-prefix", prefix, "--clickhouse-exporter-compression", "none"]
        self._options += ["--clickhouse-exporter-enable-json"] if json else []

    def command(self) -> list[str]:
        command = super().command()
        return [*command[: command.index("--exporter")], "--exporter", "clickhouse", *self._options]


@contextmanager
def clickhouse() -> Iterator[ClickHouse]:
    with ClickHouse() as server:
        yield server


# The server


class _Engine:
    """The engine. It takes one query at a time."""

    def __init__(self, folder: str) -> None:
        from chdb.session import Session

        self._folder = Path(folder)
        self._session = Session(str(self._folder / "data"))
        self._lock = threading.Lock()
        self.query("CREATE DATABASE IF NOT EXISTS otel", "default", {})
        for version in ("v1",):
            statement = TABLES[version].replace("CREATE TABLE {name}", "CREATE TABLE IF NOT EXISTS otel.otel_logs")
            self.query(statement, "otel", {})

    def query(self, sql: str, database: str, parameters: dict[str, str]) -> bytes:
        with self._lock:
            self._session.query(f"USE {database}")
            found = self._session.query(sql, "JSONCompactEachRow", params=parameters or None)
            return bytes(found.bytes() or b"")

    def insert(self, statement: str, rows: bytes, database: str) -> bytes:
        """Insert rows in a binary format: the engine takes them from a file alone."""
        found = re.fullmatch(
            r"\s*INSERT INTO\s+(\S+?)\s*\(([^)]*)\)\s*(?:SETTINGS .*?)?\s*FORMAT (\w+)\s*", statement, re.S
        )
        assert found is not None, statement
        table, columns, form = found.groups()
        names = [name.strip().strip('`"') for name in columns.split(",")]
        described = self.query(f"DESCRIBE TABLE {table} FORMAT JSONCompactEachRow", database, {})
        types = {row[0]: row[1] for row in map(json.loads, described.splitlines())}
        structure = ", ".join(f"{name} {types[name]}" for name in names).replace("'", "\\'")
        with tempfile.NamedTemporaryFile(dir=self._folder) as file:
            file.write(rows)
            file.flush()
            source = f"file('{file.name}', '{form}', '{structure}')"
            sql = f"INSERT INTO {table} ({columns}) SELECT {columns} FROM {source}"
            return self.query(sql + " SETTINGS input_format_binary_read_json_as_string=1", database, {})


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    engine: _Engine

    def do_POST(self) -> None:
        body = self._body()
        given = {name: values[-1] for name, values in parse_qs(urlsplit(self.path).query, True).items()}
        try:
            who = self._user()
            statement = given.get("query", "")
            if "INSERT" in statement.upper():
                found = self.engine.insert(statement, body, given.get("database", "default"))
            else:
                sql = statement + body.decode()
                parameters = {name[6:]: value for name, value in given.items() if name.startswith("param_")}
                if who and parameters.get("table") == "secret" and "DESCRIBE" not in sql:
                    raise PermissionError(497, f"{who}: Not enough privileges")
                found = self.engine.query(sql, given.get("database", "default"), parameters)
        except PermissionError as error:
            self._answer_error(error.args[0], str(error.args[1]))
        except Exception as error:
            code = re.search(r"Code: (\d+)", str(error))
            self._answer_error(int(code[1]) if code else 1000, str(error))
        else:
            self._answer(200, found)

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _user(self) -> str:
        user, key = self.headers.get("X-ClickHouse-User", ""), self.headers.get("X-ClickHouse-Key", "")
        kind, _, encoded = self.headers.get("Authorization", "").partition(" ")
        if kind == "Basic":
            user, _, key = base64.b64decode(encoded).decode().partition(":")
        if user not in ("", "default") and (user, key) != ("reader", "right"):
            raise PermissionError(516, f"{user}: Authentication failed")
        return "" if user == "default" else user

    def _answer_error(self, code: int, text: str) -> None:
        message = text if text.startswith("Code:") else f"Code: {code}. DB::Exception: {text}"
        self._answer(_STATUSES.get(code, 500), message.encode(), code)

    def _answer(self, status: int, body: bytes, code: int | None = None) -> None:
        self.send_response(status)
        if code is not None:
            self.send_header("X-ClickHouse-Exception-Code", str(code))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def _serve(port: int, folder: str) -> None:
    _Handler.engine = _Engine(folder)
    ThreadingHTTPServer(("127.0.0.1", port), _Handler).serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("port", type=int)
    parser.add_argument("folder")
    arguments = parser.parse_args()
    _serve(arguments.port, arguments.folder)
