"""The archive's lines and Datadog's entries, against what ZenML's own code reads and writes."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from typing import Any

import orjson
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from opentelemetry.sdk.resources import Resource
from zenml.log_stores.artifact.artifact_log_store import parse_log_entry
from zenml.log_stores.datadog.datadog_log_exporter import DatadogLogExporter
from zenml.utils.time_utils import to_utc_timezone

from composite_logstore import ExceptionInfo, LogEvent, TraceContext
from composite_logstore.parity.fields import shown
from composite_logstore.zenml import LogEntry, LogsEntriesFilter
from composite_logstore_artifact import encoding, lines, scanning
from composite_logstore_artifact.filtering import LineFilter
from composite_logstore_datadog import encoding as datadog
from tests.events import NOON, WRITER, make_capture, make_events, make_stream
from tests.properties.test_otlp_encoding import attributes, batches, by_the_sdk, exceptions, names, traces, values

# A line of ours with all that one can have, and what others may put in its place.
LINE: dict[str, Any] = orjson.loads(
    encoding.encode(
        make_events(["hello"])[0]._replace(
            level=25,
            level_name="NOTE",
            exception=ExceptionInfo("Error", "no", "Traceback"),
            trace=TraceContext(1, 2, 1),
            attributes={"loss": 1.5},
        )
    )
)
ODD_TIMES = ["2024-02-30T00:00:00+00:00", "0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59.999999-12:00", 5, 1e308]
ODD_NUMBERS = [0, -1, 20, 10.0, 20.5, 1 << 62, 1 << 63, 1 << 64, 10**30, True]
ODD_TEXTS = ["", "20", "x", "INFO", "\0", "\u00fc", "0123456789abcde", "../../x", "w" * 65, "0" * 5_000]
json_values = st.one_of(
    st.sampled_from([None, *ODD_TIMES, *ODD_NUMBERS, *ODD_TEXTS]),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=5), values, max_size=3),
        max_leaves=5,
    ),
)
changes = st.dictionaries(st.sampled_from([*LINE, "chunk_index", "total_chunks", "later"]), json_values, max_size=4)


@st.composite
def any_lines(draw: st.DrawFn) -> bytes:
    """Lines of ours with other fields, and damaged ones."""
    fields = LINE | draw(changes)
    for name in draw(st.lists(st.sampled_from([*LINE]), max_size=2)):
        fields.pop(name, None)
    line = json.dumps(fields, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
    line = draw(st.sampled_from([line, line, line.replace(b'": ', b'":').replace(b', "', b',"')]))
    if draw(st.booleans()):
        place = draw(st.integers(0, len(line)))
        piece = draw(st.sampled_from([b"\xff", b"\x00", b'"', b"}", b"[" * 2_000, b"\r", b"\xe2\x80"]))
        line = line[:place] + piece + line[place + 1 :]
    return line


filters = st.builds(
    LogsEntriesFilter,
    search=st.sampled_from([None, None, "hello", "writer"]),
    level=st.sampled_from([None, None, "INFO", "WARNING"]),
    since=st.sampled_from([None, None, "2026-09-21T14:13:20Z"]),
    until=st.sampled_from([None, None, "2026-09-21T14:13:20Z"]),
)

COMMON = {"service": "zenml", "source": "zenml", "service.name": "zenml"}
nothing: st.SearchStrategy[Any] = st.just({})


@st.composite
def events(draw: st.DrawFn) -> LogEvent:
    is_ordinary = draw(st.booleans())
    captured = make_capture(
        level=draw(st.integers(-5, 60)),
        level_name=draw(st.sampled_from(["INFO", "WARNING", "ERROR", "NOTICE", "", "\u00fc"])),
        message=draw(st.text(max_size=30)),
        time_unix_nano=draw(st.integers(-NOON, 2 * NOON) | st.integers(-(1 << 70), 1 << 70)),
        logger_name=draw(st.sampled_from(["train", "stdout", "", '"\\'])),
        file=draw(st.sampled_from(["/code/train.py", ""])),
        line=draw(st.integers(0, 5)),
        function=draw(st.sampled_from(["fit", ""])),
        exception=None if is_ordinary else draw(exceptions),
        trace=None if is_ordinary else draw(traces),
        attributes={} if is_ordinary else draw(attributes),
        metadata={} if is_ordinary else draw(nothing | attributes),
    )
    stream = make_stream(**draw(st.dictionaries(names, values, max_size=3)))
    number, sequence = draw(st.integers(0, 1 << 62)), draw(st.integers(0, 1 << 62))
    return captured._replace(stream=stream, writer=WRITER, number=number, sequence=sequence)


def in_micros(value: str | None) -> int | None:
    if value is None:
        return None
    since_epoch = datetime.fromisoformat(value) - datetime(1970, 1, 1, tzinfo=timezone.utc)
    return (since_epoch.days * 86_400 + since_epoch.seconds) * 1_000_000 + since_epoch.microseconds


@given(events())
def test_a_short_way_to_a_line_leads_to_the_same_line(event: LogEvent) -> None:
    line, plain = orjson.loads(encoding.encode(event)), orjson.loads(encoding._encode_any(event))
    assert in_micros(line.pop("timestamp", None)) == in_micros(plain.pop("timestamp", None))
    assert line == plain


@settings(max_examples=150)
@given(any_lines() | events().map(encoding.encode))
def test_a_short_way_to_what_is_compared_leads_to_the_same(line: bytes) -> None:
    assert lines.shown_of(line) in (None, shown(lines.event_of(line, make_stream())))


def test_most_lines_have_a_short_way_to_what_is_compared() -> None:
    assert lines.shown_of(encoding.encode(make_events(["hello"])[0])) is not None


@given(events())
def test_zenml_reads_every_line(event: LogEvent) -> None:
    entry = parse_log_entry(encoding.encode(event).decode())
    assert entry is not None
    assert entry.message == event.text
    assert (entry.name, str(entry.id)) == (event.logger_name, event.uid)
    assert (entry.filename, entry.module) == (event.file or None, event.function or None)
    if entry.timestamp is not None:
        assert in_micros(entry.timestamp.replace(tzinfo=timezone.utc).isoformat()) == event.time_unix_nano // 1000


@settings(max_examples=150)
@given(any_lines(), filters, st.booleans())
@example(orjson.dumps({**LINE, "attributes": 5}), LogsEntriesFilter(), True)
@example(b"0" * 5_000, LogsEntriesFilter(), True)
@example(b'"time_unix_nano":' + b"9" * 5_000 + b"}", LogsEntriesFilter(), True)
def test_any_line_is_one_entry_at_most_and_hides_no_other(
    line: bytes, filter_: LogsEntriesFilter, backwards: bool
) -> None:
    assume(not is_torn(line))
    before, after = (encoding.encode(event) for event in make_events(["before", "after"]))
    content = before + line + b"\n" + after
    wanted = LineFilter(filter_)

    read = [wanted.parse(content[begin:end]) for begin, end in wanted.find(content, backwards)]

    entries = [parse_log_entry(text.decode("utf-8", "replace")) for text in (before, line, after)]
    shown = [entry.message for entry in entries if entry is not None and is_wanted(entry, filter_)]
    assert [found.entry.message for found in read if found] == (shown[::-1] if backwards else shown)

    # So it is where whole streams are compared and copied, and what is copied can be written.
    stream = make_stream()
    scanned = list(scanning.scan(content, None))
    assert [text for chunk in scanned for text in chunk.contents] == [before[:-1], line, after[:-1]]
    assert all(isinstance(time, int) for chunk in scanned for time in chunk.times)
    for chunk in scanned:
        assert not chunk.writer or len(chunk.sequences) == len(chunk.contents)
        for place, text in enumerate(chunk.contents):
            event = lines.event_of(text, stream)
            assert (event is not None) == bool(chunk.writer)
            if event is None:
                assert lines.entry_of(text) is not None
                continue
            assert (event.writer, event.sequence) == (chunk.writer, chunk.sequences[place])
            again = orjson.loads(encoding.encode(event))
            assert (again["writer"], again["sequence"]) == (event.writer, event.sequence)
    summary = lines.summarize_lines(content.split(b"\n"))
    assert any(map(bool, read)) <= wanted.may_be_in(summary)


@given(st.integers(14, 400), st.text(max_size=5))
def test_a_piece_of_a_line_is_not_shown(cut: int, message: str) -> None:
    line = encoding.encode(make_events([message])[0]._replace(attributes={"a": {"b": [1, {"c": "\u00fc"}]}}))
    assert lines.entry_of(line[: min(cut, len(line) - 2)]) is None


def is_torn(line: bytes) -> bool:
    """Return whether a line only lacks its end: whoever was killed while writing it leaves one like that."""
    try:
        orjson.loads(line.decode("utf-8", "ignore"))
    except orjson.JSONDecodeError as error:
        return error.msg == "unexpected end of data"
    return False


def is_wanted(entry: LogEntry, filter_: LogsEntriesFilter) -> bool:
    """Judge in the plainest way."""
    if filter_.search and filter_.search not in entry.message.casefold():
        return False
    if filter_.level and (entry.level is None or entry.level.value < filter_.level.value):
        return False
    try:
        time = to_utc_timezone(entry.timestamp) if entry.timestamp else None
    except OverflowError:
        time = None
    if time is None:
        return not (filter_.since or filter_.until)
    return (not filter_.since or filter_.since <= time) and (not filter_.until or time <= filter_.until)


@given(events())
def test_a_short_way_to_an_entry_leads_to_the_same_entry(event: LogEvent) -> None:
    encoder = datadog.StreamEncoder(event.stream, COMMON)
    try:
        plain = orjson.dumps(encoder.entry(event))
    except orjson.JSONEncodeError:
        # A time beyond 64 bits, which the exporter has rejected before.
        return
    assert orjson.loads(encoder.encode(event)) == orjson.loads(plain)


@given(batches())
@example([])
def test_an_entry_has_what_zenml_s_own_exporter_writes(batch: list[LogEvent]) -> None:
    for event in batch:
        encoder = datadog.StreamEncoder(event.stream, {**COMMON, "version": "1", "service.version": "1"})
        resource = Resource({"service.name": "zenml", "service.version": "1"})
        written = DatadogLogExporter._encode_log(by_the_sdk(event, resource))
        entry = orjson.loads(encoder.encode(event))
        # Names that mean something else to Datadog get another, and a level of its own has a status of its own.
        for name in written.keys() - datadog._RESERVED - {"status"}:
            assert entry[name] == orjson.loads(orjson.dumps(written[name]))
        assert (entry["message"], entry["timestamp"]) == (event.message, event.time_unix_nano // 1_000_000)
