"""However a stream at Loki or VictoriaLogs is paged through, the pages together are a plain list of its records."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple
from urllib.parse import parse_qsl

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from zenml.enums import LoggingLevels

from composite_logstore import HttpResponse, HttpSearches, LogEvent, PageRequest, ReadEntry, Stream
from composite_logstore.testing import make_events, make_logs, make_stream
from composite_logstore.zenml import LogsEntriesFilter
from composite_logstore_loki.config import LokiReaderConfig
from composite_logstore_loki.reader import LokiReader
from composite_logstore_otlp.encoding import encode_request, encode_resource
from composite_logstore_victorialogs.config import VictoriaLogsReaderConfig
from composite_logstore_victorialogs.reader import VictoriaLogsReader
from tests.servers.loki import Loki
from tests.servers.standin import Asked
from tests.servers.victorialogs import VictoriaLogs

Direction = Literal["newer", "older"]
Key = tuple[int, str, int, str]

WRITERS = ["0123456789abcde", "0a3", "0a21"]
LEVELS = {5: "TRACE", 10: "DEBUG", 20: "INFO", 25: "SUCCESS", 30: "WARNING", 40: "ERROR"}
RESOURCE = encode_resource({"service.name": "zenml", "service.version": "1"})


class Backend(NamedTuple):
    """A stand-in without a network, and its reader."""

    server: Any
    push: Callable[[bytes], None]
    make_reader: Callable[[], Any]
    added: Callable[[LogEvent], Mapping[str, str | int]]

    def send(self, events: list[LogEvent]) -> None:
        self.push(encode_request(events, RESOURCE, 1 << 24, self.added).payload)

    def send_foreign(self, stream: Stream, nanos: int, body: str, **attributes: str) -> None:
        request = ExportLogsServiceRequest()
        resource_logs = request.resource_logs.add()
        resource_logs.resource.MergeFromString(RESOURCE)
        record = resource_logs.scope_logs.add().log_records.add(time_unix_nano=nanos, severity_number=9)
        record.body.string_value = body
        for name, value in {"zenml.log.id": str(stream.id), **attributes}.items():
            record.attributes.add(key=name).value.string_value = value
        self.push(request.SerializeToString())


def backend_of(name: str) -> Backend:
    if name == "loki":
        loki = Loki()
        config = LokiReaderConfig(type="loki", query_url="http://loki.example")
        return Backend(loki, loki.push, lambda: LokiReader(config, "zenml"), config.added_attributes)
    victoria = VictoriaLogs()
    victoria.numbers, victoria.prefixes = name.endswith("new"), name.endswith("new")
    settings_ = VictoriaLogsReaderConfig(type="victorialogs", url="http://victorialogs.example")
    return Backend(victoria, victoria.insert, lambda: VictoriaLogsReader(settings_), settings_.added_attributes)


@pytest.fixture(scope="module", params=["loki", "victorialogs", "victorialogs new"])
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """One with answers so small that a nanosecond has more records."""
    backend = backend_of(request.param)

    def ask(self: HttpSearches, method: str, path: str, body: bytes | None, allowance: Any) -> HttpResponse:
        allowance.take(0)
        headers = {name.lower(): value for name, value in self._headers.items()}
        reply = backend.server.reply(Asked(path, dict(parse_qsl((body or b"").decode())), headers, body or b""))
        assert reply.status == 200, reply.body
        return HttpResponse(200, {}, reply.body, None)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HttpSearches, "ask", ask)
        for kind in (LokiReader, VictoriaLogsReader):
            patch.setattr(kind, "max_records", 6)
        # A stream of an hour may be longer than one query, too.
        patch.setattr(LokiReader, "longest_nanos", 1_000_000_000_000)
        patch.setattr("composite_logstore.reading.keyset._MARGIN", 1)
        yield backend


@st.composite
def streams(draw: st.DrawFn) -> list[LogEvent]:
    """Events of several writers, most of them within a few nanoseconds; a clock may go back."""
    stream = make_stream()
    start = time.time_ns() - 3_300_000_000_000
    numbers = dict.fromkeys(WRITERS, 0)
    step = draw(st.sampled_from([1, 1, 1_000_000, 600_000_000_000]))
    events = []
    for writer in draw(st.lists(st.sampled_from([*WRITERS, WRITERS[0]]), max_size=40)):
        level = draw(st.sampled_from(list(LEVELS)))
        body = draw(st.sampled_from(['loss "1" \\', "Lİ\nLoss", "done", "", "a|b`{{.x}}"]))
        made = make_events([body], stream, numbers[writer], writer, level=level, level_name=LEVELS[level])
        nanos = start + draw(st.sampled_from([0, 0, 0, 1, 2, 5])) * step
        events.append(made[0]._replace(time_unix_nano=nanos))
        numbers[writer] += 1
    return events


def key_of(event: LogEvent) -> Key:
    return (event.time_unix_nano, event.writer, event.sequence, event.message)


def shown(read: ReadEntry) -> tuple[str, int, str]:
    assert read.event is not None
    return (*read.event, read.entry.message)


def wanted(events: list[LogEvent], filter_: LogsEntriesFilter) -> list[Key]:
    return sorted(
        {
            key_of(event)
            for event in events
            if (filter_.level is None or min(event.level // 10 * 10, 50) >= filter_.level.value)
            and (filter_.search is None or filter_.search.lower() in event.message.lower())
        }
    )


@settings(max_examples=50, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(
    streams(),
    st.lists(st.integers(0, 39), max_size=4),
    st.sampled_from(["newer", "older"]),
    st.lists(st.integers(1, 9), min_size=1, max_size=3),
    st.sampled_from([None, None, LoggingLevels.INFO, LoggingLevels.WARNING, LoggingLevels.ERROR]),
    st.sampled_from([None, None, "loss", 's "1" \\', "i", "{{."]),
    st.lists(st.integers(0, 39), max_size=3),
)
def test_pages_are_a_plain_list(
    backend: Backend,
    events: list[LogEvent],
    copied: list[int],
    direction: Direction,
    limits: list[int],
    level: LoggingLevels | None,
    search: str | None,
    late: list[int],
) -> None:
    if not events:
        return
    backend.server.forget()
    later = {place % len(events) for place in late}
    arrived = [event for place, event in enumerate(events) if place not in later]
    pending = [event for place, event in enumerate(events) if place in later]
    if arrived:
        backend.send(arrived)
    for place in copied:  # a redelivery repeats a run
        if repeated := arrived[place % len(events) :][:3]:
            backend.send(repeated)
    filter_ = LogsEntriesFilter(level=level, search=search)
    reader, logs = backend.make_reader(), make_logs(events[0].stream)
    token: str | None = None
    place: Key | None = None
    is_newer = direction == "newer"
    for number in range(400):
        rest = wanted(arrived, filter_)
        if place is not None:
            rest = [key for key in rest if (key > place if is_newer else key < place)]
        rest = rest if is_newer else rest[::-1]
        limit = limits[number % len(limits)]
        page = reader.read(PageRequest(logs, direction, token, limit, filter_))
        found = [shown(read) for read in (page.entries if is_newer else reversed(page.entries))]
        assert found == [key[1:] for key in rest[: len(found)]]
        assert len(found) <= limit
        token = page.newer if is_newer else page.older
        if found:
            place = rest[len(found) - 1]
        if token is None or (is_newer and not found and token is not None and not pending):
            assert len(found) == len(rest) or not found
            assert found or not rest
            return
        if pending:
            backend.send([pending[0]])
            # Filters are by the edge that was looked at, so what arrives before it is not seen.
            if filter_ == LogsEntriesFilter():
                arrived.append(pending[0])
            else:
                return
            pending.pop(0)
    raise AssertionError("the pages have no end")
