"""However a log stream of CloudWatch is paged through, the pages together are the stream."""

from __future__ import annotations

import time
from datetime import datetime, timedelta, timezone
from typing import Any, Literal

import orjson
from hypothesis import example, given, settings
from hypothesis import strategies as st
from zenml.enums import LoggingLevels

from composite_logstore import Event, LogEvent, PageRequest
from composite_logstore.testing import make_events, make_logs, make_stream
from composite_logstore.zenml import LogsEntriesFilter
from composite_logstore_cloudwatch.config import CloudwatchChildConfig
from composite_logstore_cloudwatch.exporter import CloudwatchExporter
from composite_logstore_cloudwatch.reader import CloudwatchReader
from tests.properties.paging import walked
from tests.simulated_cloudwatch import SimulatedCloudWatch

Direction = Literal["newer", "older"]

CONFIG = CloudwatchChildConfig(name="aws", type="cloudwatch")
WRITERS = ["0123456789abcde", "fedcba987654321"]
LEVELS = {10: "DEBUG", 20: "INFO", 30: "WARNING", 40: "ERROR"}
EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)


@st.composite
def streams(draw: st.DrawFn) -> list[LogEvent]:
    """Events of two writers, many in one millisecond and some in one nanosecond; a clock may go back."""
    stream = make_stream()
    start = (time.time_ns() // 1_000_000 - 60_000) * 1_000_000
    numbers = dict.fromkeys(WRITERS, 0)
    events = []
    for writer in draw(st.lists(st.sampled_from(WRITERS), max_size=20)):
        level = draw(st.sampled_from(list(LEVELS)))
        moment = start + draw(st.integers(0, 3)) * 1_000_000 + draw(st.sampled_from([0, 0, 1, 1_000, 999_999]))
        message = draw(st.sampled_from(["loss 1", "Loss 2", "done"]))
        event = make_events([message], stream, numbers[writer], writer, level=level, level_name=LEVELS[level])[0]
        events.append(event._replace(time_unix_nano=moment))
        numbers[writer] += 1
    return events


def moment(event: LogEvent) -> datetime:
    return EPOCH + timedelta(microseconds=event.time_unix_nano // 1_000)


def expected(events: list[LogEvent], filter_: LogsEntriesFilter) -> list[Event]:
    wanted = [
        event
        for event in events
        if (filter_.level is None or event.level >= filter_.level.value)
        and (filter_.search is None or filter_.search.lower() in event.message.lower())
        and (filter_.since is None or moment(event) >= filter_.since)
        and (filter_.until is None or moment(event) <= filter_.until)
    ]
    wanted.sort(key=lambda event: (event.time_unix_nano, event.writer, event.sequence))
    return [Event(event.writer, event.sequence) for event in wanted]


def reader_of(cloudwatch: SimulatedCloudWatch) -> CloudwatchReader:
    reader = CloudwatchReader(CONFIG)
    reader._connection = cloudwatch  # type: ignore[assignment]
    return reader


def export(cloudwatch: SimulatedCloudWatch, events: list[LogEvent]) -> None:
    exporter = CloudwatchExporter(CONFIG)
    exporter._connection = cloudwatch  # type: ignore[assignment]
    if events:
        exporter.export(events)


@settings(max_examples=200, deadline=None)
@given(
    streams(),
    st.lists(st.integers(0, 19), max_size=4),
    st.sampled_from(["newer", "older"]),
    st.lists(st.integers(1, 7), min_size=1, max_size=3),
    st.sampled_from([None, None, LoggingLevels.INFO, LoggingLevels.ERROR]),
    st.sampled_from([None, None, "loss"]),
    st.tuples(st.integers(0, 19), st.integers(0, 19), st.booleans(), st.booleans()),
    st.sampled_from([1, 12, 40, 1_000_000]),
    st.integers(1, 8),
    st.sampled_from([0, 2, 3]),
)
def test_pages_are_the_stream(
    events: list[LogEvent],
    copied: list[int],
    direction: Direction,
    limits: list[int],
    level: LoggingLevels | None,
    search: str | None,
    bounds: tuple[int, int, bool, bool],
    most_bytes: int,
    page_events: int,
    empty_every: int,
) -> None:
    """With pages that end within a millisecond, empty pages, and events that arrived twice."""
    cloudwatch = SimulatedCloudWatch()
    cloudwatch.page_events, cloudwatch.empty_every = page_events, empty_every
    export(cloudwatch, events)
    export(cloudwatch, [events[number] for number in copied if number < len(events)])
    filters: dict[str, Any] = {"level": level, "search": search}
    for name, place, is_set in (("since", bounds[0], bounds[2]), ("until", bounds[1], bounds[3])):
        if is_set and place < len(events):
            filters[name] = moment(events[place])
    if filters.get("since") and filters.get("until") and filters["since"] > filters["until"]:
        filters["until"] = None
    filter_ = LogsEntriesFilter(**filters)
    if not events:
        return

    found = walked(lambda: reader_of(cloudwatch), events[0].stream, direction, limits, filter_, most_bytes)

    assert [read.event for read in found] == expected(events, filter_)
    contents = {Event(event.writer, event.sequence): event for event in events}
    for read in found:
        assert read.event is not None
        event = contents[read.event]
        assert (str(read.entry.id), read.entry.message) == (event.uid, event.message)
        assert read.entry.level is not None
        assert (read.entry.level.value, read.entry.timestamp) == (event.level, moment(event))


@settings(max_examples=60, deadline=None)
@given(streams(), st.integers(0, 20), st.integers(1, 5))
def test_a_stream_can_be_followed(events: list[LogEvent], first: int, limit: int) -> None:
    """Events that arrive later and have a later time are on the pages that follow, and no event is there twice."""
    events = sorted(events, key=lambda event: (event.time_unix_nano, event.writer, event.sequence))
    cloudwatch = SimulatedCloudWatch()
    if not events:
        return
    logs = make_logs(events[0].stream)
    reader = reader_of(cloudwatch)
    found: list[Event | None] = []
    token: str | None = None
    export(cloudwatch, events[:1])
    for part in (events[1:first], events[max(1, first) :]):
        export(cloudwatch, part)
        while (page := reader.read(PageRequest(logs, "newer", token, limit, LogsEntriesFilter()))).entries:
            found += [read.event for read in page.entries]
            token = page.newer
    assert found == expected(events, LogsEntriesFilter())


texts = st.text(max_size=20)
values = st.one_of(
    texts, st.none(), st.integers(-(1 << 70), 1 << 70), st.floats(allow_nan=False), st.lists(texts), st.booleans()
)
records = st.dictionaries(
    st.sampled_from(["body", "timeUnixNano", "severityNumber", "scope", "attributes", "message"]),
    st.one_of(
        values,
        st.dictionaries(
            st.sampled_from(
                ["zenml.log.writer", "zenml.log.sequence", "log.record.uid", "zenml.log.rank", "name", "exception.type"]
            ),
            values,
        ),
    ),
)


@settings(max_examples=150, deadline=None)
@example([(0, ""), (0, {"body": ""})], "newer", 1, 1)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.one_of(texts, records)), max_size=12),
    st.sampled_from(["newer", "older"]),
    st.integers(1, 5),
    st.integers(1, 5),
)
def test_what_other_programs_wrote_is_shown_once(
    written: list[tuple[int, Any]], direction: Direction, limit: int, page_events: int
) -> None:
    """Whatever it is: plain text, any JSON, and records that claim to be ours."""
    stream = make_stream()
    cloudwatch = SimulatedCloudWatch()
    cloudwatch.page_events = page_events
    start = int(time.time() * 1_000) - 60_000
    messages = [
        (start + millis, what if isinstance(what, str) else orjson.dumps(what, default=str).decode())
        if not _is_huge(what)
        else (start + millis, str(what))
        for millis, what in written
    ]
    cloudwatch.streams[str(stream.id)] = sorted(
        (millis, number, message) for number, (millis, message) in enumerate(messages)
    )

    found = walked(lambda: reader_of(cloudwatch), stream, direction, [limit], LogsEntriesFilter())

    foreign = [read for read in found if read.event is None]
    own = [read.event for read in found if read.event is not None]
    assert len(foreign) + len(own) <= len(messages)
    assert len({read.entry.id for read in foreign}) == len(foreign)
    claimed = sum('"zenml.log.writer"' in message and '"zenml.log.sequence"' in message for _, message in messages)
    assert len(foreign) >= len(messages) - claimed


def _is_huge(what: Any) -> bool:
    try:
        orjson.dumps(what)
    except (TypeError, OverflowError):
        return True
    return False
