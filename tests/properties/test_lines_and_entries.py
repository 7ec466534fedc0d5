"""The archive's lines and Datadog's entries, against what ZenML's own code reads and writes."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any

import orjson
from hypothesis import example, given
from hypothesis import strategies as st
from opentelemetry.sdk.resources import Resource
from zenml.log_stores.artifact.artifact_log_store import parse_log_entry
from zenml.log_stores.datadog.datadog_log_exporter import DatadogLogExporter

from composite_logstore import LogEvent
from composite_logstore_artifact import exporter as artifact
from composite_logstore_datadog import exporter as datadog
from tests.events import NOON, WRITER, make_capture, make_stream
from tests.properties.test_otlp_encoding import attributes, batches, by_the_sdk, exceptions, names, traces, values

COMMON = {"service": "zenml", "source": "zenml", "service.name": "zenml"}
nothing: st.SearchStrategy[Any] = st.just({})


@st.composite
def events(draw: st.DrawFn) -> LogEvent:
    is_ordinary = draw(st.booleans())
    capture = make_capture(
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
    return LogEvent(stream, WRITER, draw(st.integers(0, 1 << 62)), draw(st.integers(0, 1 << 62)), *capture)


def in_micros(value: str | None) -> int | None:
    if value is None:
        return None
    since_epoch = datetime.fromisoformat(value) - datetime(1970, 1, 1, tzinfo=timezone.utc)
    return (since_epoch.days * 86_400 + since_epoch.seconds) * 1_000_000 + since_epoch.microseconds


@given(events())
def test_a_short_way_to_a_line_leads_to_the_same_line(event: LogEvent) -> None:
    line, plain = orjson.loads(artifact.encode(event)), orjson.loads(artifact._encode_any(event))
    assert in_micros(line.pop("timestamp", None)) == in_micros(plain.pop("timestamp", None))
    assert line == plain


@given(events())
def test_zenml_reads_every_line(event: LogEvent) -> None:
    entry = parse_log_entry(artifact.encode(event).decode())
    assert entry is not None
    assert entry.message == event.text
    assert (entry.name, str(entry.id)) == (event.logger_name, event.uid)
    assert (entry.filename, entry.module) == (event.file or None, event.function or None)
    if entry.timestamp is not None:
        assert in_micros(entry.timestamp.replace(tzinfo=timezone.utc).isoformat()) == event.time_unix_nano // 1000


@given(events())
def test_a_short_way_to_an_entry_leads_to_the_same_entry(event: LogEvent) -> None:
    encoder = datadog._Encoder(event.stream, COMMON)
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
        encoder = datadog._Encoder(event.stream, {**COMMON, "version": "1", "service.version": "1"})
        resource = Resource({"service.name": "zenml", "service.version": "1"})
        written = DatadogLogExporter._encode_log(by_the_sdk(event, resource))
        entry = orjson.loads(encoder.encode(event))
        # Names that mean something else to Datadog get another, and a level of its own has a status of its own.
        for name in written.keys() - datadog._RESERVED - {"status"}:
            assert entry[name] == orjson.loads(orjson.dumps(written[name]))
        assert (entry["message"], entry["timestamp"]) == (event.message, event.time_unix_nano // 1_000_000)
