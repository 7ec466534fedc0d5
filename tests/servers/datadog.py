"""A stand-in for Datadog's log intake and log search, in a process of its own.

It is held to the real thing: what it is sent and what it answers passes through the model classes of
Datadog's own client, and it enforces the limits that Datadog publishes:
https://docs.datadoghq.com/api/latest/logs/#send-logs

- 5 MB (uncompressed) and 1000 entries a request: 413. Datadog names 413 for the bytes alone; of the entries
  it only says that there may be no more.
- 1 MB an entry: taken, cut and counted. Datadog cuts the JSON text; here nothing but a piece of it remains.
- Older than 18 hours or more than 2 hours ahead: answered with 202 and dropped, and counted.
- 401 without an API key, 403 with a wrong one, and with a wrong or no application key where one is needed.

Its search understands the queries of ZenML's Datadog store and of ours, and nothing else (400). Logs with
the same millisecond come in an order of their own, as at Datadog.

    python -m tests.servers.datadog --port 8126

`GET /control` says what it has seen. `POST /control` takes an object with any of: `fail` (an object: `path`
is `intake` or `search`, `status`, `times`, `headers`), `mend` (true: an end to that), `refuse` (a text: the
intake answers 400 to a request with an entry whose message has it), `answer_after_seconds`,
`found_after_seconds`, and `forget` (true).
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from datetime import datetime, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import orjson
import requests
from datadog_api_client import ApiClient, Configuration
from datadog_api_client.exceptions import OpenApiException
from datadog_api_client.v2.model.http_log import HTTPLog
from datadog_api_client.v2.model.logs_list_request import LogsListRequest
from datadog_api_client.v2.model.logs_list_response import LogsListResponse
from typing_extensions import Self

API_KEY = "test-api-key"
APPLICATION_KEY = "test-application-key"

MAX_REQUEST_BYTES = 5_000_000
MAX_REQUEST_ENTRIES = 1_000
MAX_ENTRY_BYTES = 1_000_000
OLDEST_SECONDS = 18 * 3600
NEWEST_SECONDS = 2 * 3600

_INTAKE = "/api/v2/logs"
_SEARCH = "/api/v2/logs/events/search"
_TERM = re.compile(
    r'service:"(?P<service>(?:\\.|[^"\\])*)"'
    r"|@(?P<name>[\w.]+):(?P<value>[\w-]+)"
    r'|message:"(?P<phrase>(?:\\.|[^"\\])*)"'
    r"|message:\*(?P<part>(?:\\.|[^\\*\s])+)\*"
    r"|status:\((?P<statuses>\w+(?: OR \w+)*)\)"
)
# https://docs.datadoghq.com/logs/log_configuration/processors/log_status_remapper/
_STATUSES = (
    ("emerg", "emergency"),
    ("f", "emergency"),
    ("a", "alert"),
    ("c", "critical"),
    ("err", "error"),
    ("w", "warn"),
    ("n", "notice"),
    ("i", "info"),
    ("d", "debug"),
    ("t", "debug"),
    ("v", "debug"),
    ("o", "ok"),
    ("s", "ok"),
)


class Datadog:
    """Starts the stand-in on a free port of this machine, and stops it.

    What it has stored stays when it is killed and started again.
    """

    def __init__(self, checked: bool = True) -> None:
        """Choose how.

        Args:
            checked: Whether everything passes through Datadog's model classes, which takes a
                millisecond of this machine's processor for each entry. Benchmarks switch it off.
        """
        self._checked = checked
        self._process: subprocess.Popen[str] | None = None
        self._directory = tempfile.TemporaryDirectory(prefix="datadog-")
        self.port = 0

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()
        self._directory.cleanup()

    @property
    def url(self) -> str:
        """The base URL of both the intake and the search."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of a child that uses it, but for its name and type."""
        return {
            "api_key": API_KEY,
            "application_key": APPLICATION_KEY,
            "endpoint": self.url + _INTAKE,
            "api_endpoint": self.url,
        }

    def start(self) -> None:
        """Start it, on the same port as before, and wait until it answers."""
        command = [sys.executable, "-m", "tests.servers.datadog", "--port", str(self.port)]
        command += ["--store", str(Path(self._directory.name, "logs.jsonl"))]
        if not self._checked:
            command += ["--unchecked"]
        self._process = subprocess.Popen(command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the stand-in for Datadog ended with {self._process.wait()}")
        self.port = int(line)

    def stop(self) -> None:
        """End it in good order."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End it at once, as a crash would."""
        self._end(signal.SIGKILL)

    def fail(self, path: str, status: int, times: int = 1, headers: Mapping[str, str] | None = None) -> None:
        """Answer the next requests to `intake` or `search` with a status."""
        self.control(fail={"path": path, "status": status, "times": times, "headers": dict(headers or {})})

    def control(self, **settings: Any) -> None:
        """Change how it behaves from now on."""
        requests.post(self.url + "/control", json=settings, timeout=60).raise_for_status()

    def seen(self) -> dict[str, Any]:
        """Return what it has seen.

        `requests` (by path), `statuses` (of its answers, by path), `dropped`, `truncated`, and `entries`
        as they were sent and taken.
        """
        response = requests.get(self.url + "/control", timeout=60)
        response.raise_for_status()
        seen: dict[str, Any] = orjson.loads(response.content)
        return seen

    def _end(self, signal_number: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(signal_number)
            self._process.wait()
            assert self._process.stdout is not None
            self._process.stdout.close()
            self._process = None


class _Log(NamedTuple):
    millis: int
    id: str
    found_from: float
    entry: dict[str, Any]
    taken_at: float


class _Refusal(Exception):
    def __init__(self, status: int, detail: str) -> None:
        super().__init__(detail)
        self.status = status


class _State:
    """What all requests share."""

    def __init__(self, store: Path | None, checked: bool) -> None:
        self.lock = threading.Lock()
        self.answer_after_seconds = 0.0
        self.found_after_seconds = 0.0
        self._refused: str | None = None
        self._faults: list[dict[str, Any]] = []
        self._store = store
        # The client is not used to connect, only for its models.
        self._client = ApiClient(Configuration()) if checked else None  # type: ignore[no-untyped-call]
        self._clear()
        if store is not None and store.exists():
            for line in store.read_bytes().splitlines():
                self._keep(orjson.loads(line), time.time())

    def _clear(self) -> None:
        self.logs: list[_Log] = []
        self._answers: dict[str, dict[str, Any]] = {}
        self.answers: dict[str, list[int]] = {"intake": [], "search": []}
        self.dropped = 0
        self.truncated = 0

    def control(self, settings: dict[str, Any]) -> None:
        with self.lock:
            if settings.get("forget"):
                self._clear()
            if settings.get("forget") or settings.get("mend"):
                self._faults.clear()
                self._refused = None
            if settings.get("forget") and self._store is not None:
                self._store.unlink(missing_ok=True)
            if "fail" in settings:
                self._faults.append(settings["fail"])
            self._refused = settings.get("refuse", self._refused)
            self.answer_after_seconds = settings.get("answer_after_seconds", self.answer_after_seconds)
            self.found_after_seconds = settings.get("found_after_seconds", self.found_after_seconds)

    def seen(self) -> dict[str, Any]:
        with self.lock:
            return {
                "requests": {path: len(statuses) for path, statuses in self.answers.items()},
                "statuses": self.answers,
                "dropped": self.dropped,
                "truncated": self.truncated,
                "entries": [log.entry for log in self.logs],
            }

    def fault(self, path: str) -> dict[str, Any] | None:
        with self.lock:
            for fault in self._faults:
                if fault["path"] == path and fault["times"] > 0:
                    fault["times"] -= 1
                    return fault
        return None

    def model(self, text: bytes, kind: type) -> Any:
        """Return the JSON text as one of the models of Datadog's client."""
        if self._client is None:
            return None
        try:
            model = self._client.deserialize(text.decode(), (kind,), True)
        except (OpenApiException, UnicodeDecodeError, ValueError, TypeError) as error:
            raise _Refusal(400, str(error)[:500]) from None
        if model._unparsed:
            raise _Refusal(400, f"not a {kind.__name__}")
        return model

    def take(self, body: bytes) -> None:
        """Take a request to the intake."""
        if len(body) > MAX_REQUEST_BYTES:
            raise _Refusal(413, "the payload is too large")
        try:
            entries = orjson.loads(body)
        except ValueError:
            raise _Refusal(400, "invalid JSON") from None
        if isinstance(entries, dict):
            entries, body = [entries], b"[" + body + b"]"
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise _Refusal(400, "neither a log nor an array of logs")
        if len(entries) > MAX_REQUEST_ENTRIES:
            raise _Refusal(413, "too many logs")
        self.model(body, HTTPLog)
        if self._refused and any(self._refused in str(entry.get("message")) for entry in entries):
            raise _Refusal(400, "told to refuse one of the logs")
        now = time.time()
        with self.lock:
            taken = []
            for entry in entries:
                encoded = orjson.dumps(entry)
                if len(encoded) > MAX_ENTRY_BYTES:
                    self.truncated += 1
                    entry = {"message": encoded[:MAX_ENTRY_BYTES].decode("utf-8", "ignore")}
                    encoded = orjson.dumps(entry)
                millis = _millis(entry, now)
                if now - OLDEST_SECONDS <= millis / 1000 <= now + NEWEST_SECONDS:
                    self._keep(entry, now)
                    taken.append(encoded + b"\n")
                else:
                    self.dropped += 1
            if self._store is not None:
                with self._store.open("ab") as file:
                    file.write(b"".join(taken))

    def _keep(self, entry: dict[str, Any], now: float) -> None:
        # In no order, so that logs with the same time are in none either.
        id = hashlib.sha256(str(len(self.logs)).encode()).hexdigest()
        self.logs.append(_Log(_millis(entry, now), id, now + self.found_after_seconds, entry, now))

    def _answer(self, log: _Log) -> dict[str, Any]:
        """Return how the search shows a log. Most are never searched for."""
        if log.id not in self._answers:
            self._answers[log.id] = _processed(log.entry, log.taken_at)
        return self._answers[log.id]

    def search(self, body: bytes) -> bytes:
        """Answer a search."""
        request = orjson.loads(body)
        self.model(body, LogsListRequest)
        filter_, page = request.get("filter", {}), request.get("page", {})
        conditions = list(_conditions(filter_.get("query", "*")))
        since, until = _time(filter_.get("from", "0")), _time(filter_.get("to", str(1 << 62)))
        descending = request.get("sort", "timestamp") == "-timestamp"
        limit = page.get("limit", 10)
        if not 0 < limit <= 1_000:
            raise _Refusal(400, "'page.limit' must be between 1 and 1000")
        now = time.time()
        with self.lock:
            logs = list(self.logs)
        found = sorted(
            (
                log
                for log in logs
                if log.found_from <= now
                and since <= log.millis <= until
                and all(condition(self._answer(log)) for condition in conditions)
            ),
            reverse=descending,
        )
        if "cursor" in page:
            place = tuple(json.loads(base64.urlsafe_b64decode(page["cursor"])))
            found = [log for log in found if (log[:2] < place if descending else log[:2] > place)]
        found = found[:limit]
        meta: dict[str, Any] = {"elapsed": 1, "request_id": "stand-in", "status": "done"}
        if found:
            # There is a cursor as long as there is a log; the page after the last one is empty.
            # https://docs.datadoghq.com/logs/guide/collect-multiple-logs-with-pagination/
            place_text = json.dumps(found[-1][:2]).encode()
            meta["page"] = {"after": base64.urlsafe_b64encode(place_text).decode()}
        data = [{"id": log.id, "type": "log", "attributes": self._answer(log)} for log in found]
        answer = orjson.dumps({"data": data, "meta": meta})
        self.model(answer, LogsListResponse)
        return answer


def _millis(entry: Mapping[str, Any], now: float) -> int:
    value = entry.get("timestamp")
    return int(value) if isinstance(value, int | float) else int(now * 1000)


def _processed(entry: Mapping[str, Any], now: float) -> dict[str, Any]:
    """Return the log as the search shows it: without what Datadog has places of its own for."""
    attributes: dict[str, Any] = {}
    own = {"message", "status", "service", "hostname", "ddtags", "ddsource", "timestamp"}
    for name, value in entry.items():
        if name not in own:
            _nest(attributes, name, value)
    status = str(entry.get("status", "info")).lower()
    tags = [tag for tag in str(entry.get("ddtags", "")).split(",") if tag]
    moment = datetime.fromtimestamp(_millis(entry, now) / 1000, timezone.utc)
    answer = {
        "message": entry["message"],
        "status": next((official for start, official in _STATUSES if status.startswith(start)), "info"),
        "timestamp": moment.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "tags": [*tags, f"source:{entry.get('ddsource', 'undefined')}"],
        "attributes": attributes,
    }
    for name, place in (("service", "service"), ("hostname", "host")):
        if name in entry:
            answer[place] = entry[name]
    return answer


def _nest(attributes: dict[str, Any], name: str, value: Any) -> None:
    """Put `a.b` into the object `a`. Where `a` is something else, the name stays as it is."""
    place = attributes
    *parents, last = name.split(".")
    for parent in parents:
        child = place.setdefault(parent, {})
        if not isinstance(child, dict):
            attributes[name] = value
            return
        place = child
    if isinstance(place.get(last), dict):
        attributes[name] = value
    else:
        place[last] = value


def _time(text: str) -> float:
    """Return milliseconds since the epoch. Datadog also calculates with dates; nobody here does."""
    if re.fullmatch(r"\d+", text):
        return int(text)
    try:
        moment = datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError:
        raise _Refusal(400, "'from' or 'to' is no time") from None
    return moment.timestamp() * 1000


def _conditions(query: str) -> Iterator[Callable[[Mapping[str, Any]], bool]]:
    """Yield what a log has to be like.

    https://docs.datadoghq.com/logs/explorer/search_syntax/
    """
    place = 0
    while query[place:]:
        match = _TERM.match(query, place)
        if match is None:
            raise _Refusal(400, f"the stand-in does not understand the query from character {place} on")
        yield _condition(match)
        place = match.end()
        if query[place:]:
            if not query.startswith(" AND ", place):
                raise _Refusal(400, f"the stand-in knows no operator but AND, at character {place}")
            place += len(" AND ")


def _condition(match: re.Match[str]) -> Callable[[Mapping[str, Any]], bool]:
    term = {name: re.sub(r"\\(.)", r"\1", text) for name, text in match.groupdict(None).items() if text}
    if "service" in term:
        return lambda log: log.get("service") == term["service"]
    if "name" in term:
        return lambda log: str(_attribute(log["attributes"], term["name"])) == term["value"]
    if "statuses" in term:
        statuses = set(term["statuses"].split(" OR "))
        return lambda log: log["status"] in statuses
    # Search in the message looks at no case. A phrase is a sequence of words, whatever is between them.
    if "phrase" in term:
        phrase = _words(term["phrase"])
        return lambda log: f" {phrase} " in f" {_words(log['message'])} "
    return lambda log: term["part"].lower() in log["message"].lower()


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def _attribute(attributes: Any, name: str) -> Any:
    for part in name.split("."):
        attributes = attributes.get(part) if isinstance(attributes, dict) else None
    return attributes


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # One segment an answer, sent at once: otherwise every request waits 40 ms for an acknowledgement.
    wbufsize = -1
    disable_nagle_algorithm = True
    state: _State

    def do_GET(self) -> None:
        self._answer(200, orjson.dumps(self.state.seen()))

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "0")
        if not length.isdecimal():
            raise ConnectionAbortedError("the client hung up in the middle of the headers")
        body = self.rfile.read(int(length))
        path = {_INTAKE: "intake", _SEARCH: "search"}.get(urlsplit(self.path).path)
        if self.path == "/control":
            self.state.control(orjson.loads(body))
            return self._answer(200, b"{}")
        if path is None:
            return self._answer(404, b'{"errors":["Not found"]}')
        time.sleep(self.state.answer_after_seconds)
        headers: dict[str, str] = {}
        try:
            if fault := self.state.fault(path):
                headers = fault.get("headers", {})
                raise _Refusal(fault["status"], "told to")
            self._authenticate(path)
            if path == "intake":
                self.state.take(self._decompressed(body))
                status, answer = 202, b"{}"
            else:
                status, answer = 200, self.state.search(body)
        except _Refusal as refusal:
            status = refusal.status
            error: Any = str(refusal)
            if path == "intake":
                error = {"status": str(status), "title": "Refused", "detail": error}
            answer = orjson.dumps({"errors": [error]})
            if status == 429:
                # https://docs.datadoghq.com/api/latest/rate-limits/
                limits = {"Limit": "300", "Period": "3600", "Remaining": "0", "Reset": "7", "Name": "logs"}
                headers = {**{f"X-RateLimit-{name}": value for name, value in limits.items()}, **headers}
        with self.state.lock:
            self.state.answers[path].append(status)
        self._answer(status, answer, headers)

    def _authenticate(self, path: str) -> None:
        key = self.headers.get("DD-API-KEY")
        if not key:
            raise _Refusal(401, "Unauthorized")
        if key != API_KEY:
            raise _Refusal(403, "Forbidden")
        if path == "search" and self.headers.get("DD-APPLICATION-KEY") != APPLICATION_KEY:
            raise _Refusal(403, "Forbidden")

    def _decompressed(self, body: bytes) -> bytes:
        encoding = self.headers.get("Content-Encoding", "identity")
        try:
            if encoding == "gzip":
                return zlib.decompress(body, wbits=16 + zlib.MAX_WBITS)
            if encoding == "deflate":
                return zlib.decompress(body)
        except zlib.error:
            raise _Refusal(400, "the payload is not compressed as it says") from None
        if encoding != "identity":
            raise _Refusal(400, "unknown content encoding")
        return body

    def _answer(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: `/control` tells all there is to tell."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Take it as it comes that a client hangs up."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


def main() -> None:
    """Serve until the process is ended. The first line of output is the port."""
    parser = argparse.ArgumentParser(prog="python -m tests.servers.datadog")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--store", type=Path, help="the file in which logs are kept; none: in memory alone")
    parser.add_argument("--unchecked", action="store_true", help="leave out Datadog's model classes")
    arguments = parser.parse_args()
    _Handler.state = _State(arguments.store, not arguments.unchecked)
    server = _Server(("127.0.0.1", arguments.port), _Handler)
    print(server.server_address[1], flush=True)
    with suppress(KeyboardInterrupt):
        server.serve_forever()


if __name__ == "__main__":
    main()
