"""What is sent to Datadog says what the events say, and is within Datadog's limits."""

from __future__ import annotations

import gzip
import logging
from datetime import date
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import orjson
from datadog_api_client import ApiClient, Configuration
from datadog_api_client.v2.model.http_log import HTTPLog
from hypothesis import example, given, settings
from hypothesis import strategies as st

from composite_logstore import Event, HttpResponse, LogEvent, Stream
from composite_logstore.event import ExceptionInfo, TraceContext
from composite_logstore.plain import plain_mapping
from composite_logstore_datadog.config import DatadogChildConfig
from composite_logstore_datadog.decoding import parse
from composite_logstore_datadog.encoding import MAX_ENTRY_BYTES, StreamEncoder, _fields
from composite_logstore_datadog.exporter import DatadogExporter
from tests.events import NOON, SECOND, make_capture, make_stream
from tests.servers.datadog import _processed

CLIENT = ApiClient(Configuration())

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
names = st.one_of(
    texts,
    st.sampled_from(["message", "status", "timestamp", "service", "host", "ddtags", "otel.timestamp"]),
    st.sampled_from(["service.name", "service.version"]),
    st.sampled_from(["a", "a.b", "a.b.c", "zenml.run.name", "log.record.uid", "exception.type"]),
)
leaves = st.one_of(st.none(), st.booleans(), st.integers(-(1 << 63), (1 << 63) - 1), st.floats(allow_nan=True), texts)
values = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3), max_leaves=5
)
attributes = st.dictionaries(names, values, max_size=5)
exceptions = st.builds(ExceptionInfo, texts, texts, texts)
traces = st.builds(TraceContext, st.integers(1, (1 << 128) - 1), st.integers(1, (1 << 64) - 1), st.integers(0, 1))
levels = st.sampled_from([5, 10, 15, 20, 25, 30, 40, 50, 60])


@st.composite
def events(draw: st.DrawFn, stream: Stream, message: st.SearchStrategy[str] = texts) -> LogEvent:
    level = draw(levels)
    captured = make_capture(
        message=draw(message),
        level=level,
        level_name=logging.getLevelName(level),
        time_unix_nano=NOON + draw(st.integers(-SECOND, SECOND)),
        logger_name=draw(texts),
        file=draw(texts),
        line=draw(st.integers(0, 1 << 31)),
        function=draw(texts),
        exception=draw(st.none() | exceptions),
        trace=draw(st.none() | traces),
        attributes=plain_mapping(draw(attributes)),
        metadata=plain_mapping(draw(attributes)),
    )
    writer = f"{draw(st.integers(0, (1 << 60) - 1)):015x}"
    number = draw(st.integers(0, (1 << 62) - 1))
    sequence = draw(st.integers(0, 1 << 40))
    return captured._replace(stream=stream, writer=writer, number=number, sequence=sequence)


@st.composite
def batches(draw: st.DrawFn) -> list[LogEvent]:
    streams = [make_stream(**plain_mapping(draw(attributes))) for _ in range(draw(st.integers(1, 2)))]
    return draw(st.lists(st.sampled_from(streams).flatmap(events), min_size=1, max_size=6))


def send(batch: list[LogEvent]) -> tuple[bytes, int]:
    """Return what would be sent, and how many events were shortened."""
    bodies = []

    def request(method: str, url: str, **arguments: Any) -> Any:
        bodies.append(gzip.decompress(arguments["body"]))
        return HttpResponse(202, {}, b"", None)

    config = DatadogChildConfig(name="live", type="datadog", api_key="test-key")
    exporter = DatadogExporter(config, clock=lambda: NOON / SECOND)
    exporter._http = SimpleNamespace(request=request)  # type: ignore[assignment]
    shortened = exporter.export(batch)
    (body,) = bodies
    return body, shortened


def finite(value: Any) -> Any:
    """Return the value as JSON has it: without numbers that are none."""
    return orjson.loads(orjson.dumps(value))


def is_as_read(read: Any, sent: Any) -> bool:
    """Return whether Datadog's model has read what was sent: it makes a date of a text such as 15 digits.

    Its version 2.30 also makes UUIDs, and up to 2.52 it rounds large integers.
    """
    if isinstance(read, date | UUID):
        return isinstance(sent, str)
    if isinstance(read, float) and type(sent) is int and abs(sent) > 1 << 53:
        return read == float(sent)
    return bool(read == sent)


@given(batches())
def test_entries_pass_through_datadogs_model_and_say_what_the_events_say(batch: list[LogEvent]) -> None:
    body, shortened = send(batch)
    assert shortened == 0
    model = CLIENT.deserialize(body.decode(), (HTTPLog,), True)
    assert not model._unparsed
    items = model.value
    entries = orjson.loads(body)
    assert len(items) == len(entries) == len(batch)
    for event, item, entry in zip(batch, items, entries, strict=True):
        assert len(orjson.dumps(entry)) <= MAX_ENTRY_BYTES
        assert (item.message, item.service, item.ddsource) == (event.message, "zenml", "zenml")
        parsed = item.to_dict()
        assert parsed.keys() == entry.keys()
        assert [(name, value) for name, value in entry.items() if not is_as_read(parsed[name], value)] == []
        assert entry["timestamp"] == event.time_unix_nano // 1_000_000
        assert int(entry["otel.timestamp"]) == event.time_unix_nano
        assert entry["logger.name"] == event.logger_name
        assert entry["otel.severity_text"] == event.severity_text
        assert int(entry["otel.severity_number"]) == event.severity_number
        assert entry["log.record.uid"] == event.uid
        assert entry["zenml.log.writer"] == event.writer
        assert entry["zenml.log.sequence"] == event.sequence
        if event.trace:
            assert int(entry["otel.trace_id"], 16) == event.trace.trace_id
            assert int(entry["otel.span_id"], 16) == event.trace.span_id
            assert int(entry["dd.trace_id"]) == event.trace.trace_id % (1 << 64)
            assert int(entry["dd.span_id"]) == event.trace.span_id
        # Of attributes with the same name, the last one wins; none is lost but to those above.
        wanted = {**event.details, **event.stream.attributes, **event.metadata}
        for name, value in wanted.items():
            assert name in entry or f"extra.{name}" in entry
            if name in _fields(event) or (name, value) == ("hostname", None):
                continue
            if name in entry:
                # What the child says of the service is the service's.
                assert entry[name] == finite(value) or name in ("service", "service.name", "service.version")


@given(st.data())
def test_the_short_way_to_encode_is_the_long_one(data: st.DataObject) -> None:
    stream = make_stream(**plain_mapping(data.draw(attributes)))
    event = data.draw(events(stream))
    encoder = StreamEncoder(stream, {"service": "zenml", "source": "zenml"})
    assert orjson.loads(encoder.encode(event)) == finite(encoder.entry(event))


@given(st.data())
def test_what_was_written_is_read_back(data: st.DataObject) -> None:
    event = data.draw(events(make_stream()))
    # An attribute `zenml` of the user's own would be in the place where Datadog puts `zenml.log.id`.
    event = event._replace(attributes={}, metadata={})
    body, _ = send([event])
    (entry,) = orjson.loads(body)
    read, origin = parse({"id": "x", "attributes": _processed(entry, NOON / SECOND)})
    assert origin == Event(event.writer, event.sequence)
    assert str(read.id) == event.uid
    assert read.message == event.text
    assert read.timestamp is not None
    assert int(read.timestamp.timestamp() * 1e6 + 0.5) == event.time_unix_nano // 1_000
    assert read.name == event.logger_name
    assert read.filename == (event.file or None)
    assert read.lineno == (event.line if event.file else None)
    if event.function:
        assert read.module == event.function


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 2_000_000),
    st.sampled_from(["x", "ä", "\0", '"', "\U0001f600"]),
    st.integers(0, 400_000),
    st.integers(0, 20_000),
)
@example(2_000_000, "\0", 400_000, 20_000)
@example(900_000, "x", 200_000, 0)
@example(0, "x", 0, 20_000)
@example(0, "\0", 11, 11_481)
def test_every_entry_is_within_the_limit(length: int, character: str, stack: int, count: int) -> None:
    stream = make_stream()
    message = character * length
    error = ExceptionInfo("E", "e", character * stack)
    extras = {f"attribute number {n}": character * 10 for n in range(count)}
    captured = make_capture(message, exception=error, attributes=extras)
    event = captured._replace(stream=stream, writer="0" * 15)
    body, shortened = send([event])
    assert len(body) - 2 <= MAX_ENTRY_BYTES
    (entry,) = orjson.loads(body)
    assert entry["log.record.uid"] == event.uid
    whole = entry["message"] == message and entry["exception.stacktrace"] == error.stacktrace
    assert shortened == (0 if whole and extras.keys() <= entry.keys() else 1)
    if shortened:
        assert len(body) > MAX_ENTRY_BYTES // 2


def test_datadogs_model_sees_what_is_wrong() -> None:
    assert CLIENT.deserialize('[{"service": "zenml"}]', (HTTPLog,), True)._unparsed
