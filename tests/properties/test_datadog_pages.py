"""However a stream at Datadog is paged through, and whatever its times, the pages together are the stream."""

from __future__ import annotations

import gzip
import time
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from types import SimpleNamespace
from typing import Any, Literal
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from zenml.enums import LoggingLevels

from composite_logstore import Event, HttpResponse, LogEvent, PageRequest
from composite_logstore.reading import searches
from composite_logstore.testing import make_logs
from composite_logstore.zenml import LogsEntriesFilter
from composite_logstore_datadog import reader as reader_module
from composite_logstore_datadog.config import DatadogChildConfig
from composite_logstore_datadog.exporter import DatadogExporter
from composite_logstore_datadog.reader import DatadogReader
from tests.events import make_events, make_stream
from tests.properties.paging import walked
from tests.servers.datadog import _State

Direction = Literal["newer", "older"]

WRITERS = ["0123456789abcde", "fedcba987654321"]
LEVELS = {10: "DEBUG", 20: "INFO", 30: "WARNING", 40: "ERROR"}
CONFIG = DatadogChildConfig(name="live", type="datadog", api_key="test-key", application_key="test-application-key")
EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)


class Datadog:
    """The stand-in, without a network in between."""

    def __init__(self) -> None:
        self.state = _State(None, checked=False)
        self.exporter = DatadogExporter(CONFIG)
        self.exporter._http = SimpleNamespace(request=self._take)  # type: ignore[assignment]
        self.search = SimpleNamespace(request=self._search, close=lambda: None)

    def _take(self, method: str, url: str, **arguments: Any) -> Any:
        self.state.take(gzip.decompress(arguments["body"]))
        return HttpResponse(202, {}, b"", None)

    def _search(self, method: str, url: str, **arguments: Any) -> Any:
        return HttpResponse(200, {}, self.state.search(arguments["body"]), None)


@pytest.fixture(scope="module")
def datadog() -> Iterator[Datadog]:
    """One with pages so small that most of them end within a millisecond."""
    datadog = Datadog()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(searches, "HttpClient", lambda **_: datadog.search)
        patch.setattr(reader_module, "_MARGIN", 1)
        patch.setattr(DatadogReader, "max_page_size", 6)
        yield datadog


@st.composite
def streams(draw: st.DrawFn) -> list[LogEvent]:
    """Events of several writers, a few in each millisecond; a clock may go back."""
    stream = make_stream()
    start = (time.time_ns() // 1_000_000 - 60_000) * 1_000_000
    numbers = dict.fromkeys(WRITERS, 0)
    events = []
    for writer in draw(st.lists(st.sampled_from(WRITERS), max_size=20)):
        level = draw(st.sampled_from(list(LEVELS)))
        moment = start + draw(st.integers(0, 4)) * 1_000_000 + draw(st.sampled_from([0, 1_000, 999_000]))
        events += make_events(
            [draw(st.sampled_from(["loss 1", "Loss 2", "done"]))],
            stream,
            numbers[writer],
            writer,
            level=level,
            level_name=LEVELS[level],
        )
        events[-1] = events[-1]._replace(time_unix_nano=moment)
        numbers[writer] += 1
    return events


def moment(event: LogEvent) -> datetime:
    return EPOCH + timedelta(microseconds=event.time_unix_nano // 1_000)


def expected(events: list[LogEvent], filter_: LogsEntriesFilter) -> list[Event]:
    """The whole stream: in the order of time as far as Datadog keeps it, then in each writer's."""
    wanted = [
        event
        for event in events
        if (filter_.level is None or event.level >= filter_.level.value)
        and (filter_.search is None or filter_.search.lower() in event.message.lower())
        and (filter_.since is None or moment(event) >= filter_.since)
        and (filter_.until is None or moment(event) <= filter_.until)
    ]
    wanted.sort(key=lambda event: (event.time_unix_nano // 1_000_000, event.writer, event.sequence))
    return [Event(event.writer, event.sequence) for event in wanted]


@settings(max_examples=150, deadline=None)
@given(
    streams(),
    st.lists(st.integers(0, 19), max_size=4),
    st.sampled_from(["newer", "older"]),
    st.lists(st.integers(1, 7), min_size=1, max_size=3),
    st.sampled_from([None, None, LoggingLevels.INFO, LoggingLevels.ERROR]),
    st.sampled_from([None, None, "loss"]),
    st.tuples(st.integers(0, 19), st.integers(0, 19), st.booleans(), st.booleans()),
    st.sampled_from([1, 12, 40, 1_000_000]),
)
def test_pages_are_the_stream(
    datadog: Datadog,
    events: list[LogEvent],
    copied: list[int],
    direction: Direction,
    limits: list[int],
    level: LoggingLevels | None,
    search: str | None,
    times: tuple[int, int, bool, bool],
    page_bytes: int,
) -> None:
    if not events:
        return
    datadog.state.control({"forget": True})
    datadog.exporter.export(events)
    for place in copied:  # a redelivery repeats a run
        datadog.exporter.export(events[place % len(events) :][:3])
    bounds = sorted(moment(events[place % len(events)]) for place in times[:2])
    filter_ = LogsEntriesFilter(
        level=level, search=search, since=bounds[0] if times[2] else None, until=bounds[1] if times[3] else None
    )

    found = walked(lambda: DatadogReader(CONFIG), events[0].stream, direction, limits, filter_, page_bytes)
    assert [read.event for read in found] == expected(events, filter_)


def test_ids_are_the_events_own(datadog: Datadog) -> None:
    datadog.state.control({"forget": True})
    start = time.time_ns() - 60_000_000_000
    events = [event._replace(time_unix_nano=start) for event in make_events(["a", "b"])]
    datadog.exporter.export(events)

    page = DatadogReader(CONFIG).read(PageRequest(make_logs(events[0].stream), "older", None, 5, LogsEntriesFilter()))
    assert [read.entry.id for read in page.entries] == [UUID(event.uid) for event in events]
