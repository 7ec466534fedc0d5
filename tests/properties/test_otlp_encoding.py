"""The payload against OpenTelemetry's own encoder, and against its limit."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry._logs import LogRecord, SeverityNumber
from opentelemetry.exporter.otlp.proto.common._internal import _log_encoder
from opentelemetry.exporter.otlp.proto.common._log_encoder import encode_logs
from opentelemetry.proto.logs.v1.logs_pb2 import LogRecord as Message
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, set_span_in_context

from composite_logstore import LogEvent, Stream, TooLargeError
from composite_logstore.event import ExceptionInfo, TraceContext
from composite_logstore.otel import ReadableLogRecord
from composite_logstore_otlp import encoding
from composite_logstore_otlp.encoding import encode_request, encode_resource
from tests.events import NOON, WRITER, make_capture, make_stream
from tests.servers.otlp_receiver import Record, decode_request

MAX_BYTES = 4 * 1024 * 1024

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 63) - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=20)
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
# Names that meet: the record's own, the stream's, those of the identity, and OpenTelemetry's.
names = st.sampled_from(
    [
        "a",
        "",
        "zenml.log.id",
        "zenml.run",
        "log.record.uid",
        "zenml.log.sequence",
        "zenml.log.severity_number",
        "code.file.path",
        "exception.type",
    ]
) | st.text(max_size=5)
attributes = st.dictionaries(names, values, max_size=4)
traces = st.none() | st.builds(
    TraceContext, st.integers(1, (1 << 128) - 1), st.integers(1, (1 << 64) - 1), st.integers(0, 255)
)
exceptions = st.none() | st.builds(ExceptionInfo, st.text(max_size=9), st.text(max_size=9), st.text(max_size=30))


short_texts = st.text(max_size=30)


@st.composite
def batches(draw: st.DrawFn, texts: st.SearchStrategy[str] = short_texts) -> list[LogEvent]:
    streams = [make_stream(**draw(st.dictionaries(names, values, max_size=3))) for _ in range(draw(st.integers(1, 2)))]
    events: list[LogEvent] = []
    for number in range(draw(st.integers(1, 8))):
        stream: Stream = draw(st.sampled_from(streams))
        captured = make_capture(
            level=draw(st.integers(0, 60)),
            message=draw(texts),
            time_unix_nano=draw(st.integers(0, 2 * NOON)),
            logger_name=draw(st.sampled_from(["train", "stdout", "", "ünï"])),
            exception=draw(exceptions),
            trace=draw(traces),
            attributes=draw(attributes),
            metadata=draw(st.just({}) | attributes),
        )
        sequence = sum(event.stream is stream for event in events)
        events.append(captured._replace(stream=stream, writer=WRITER, number=number, sequence=sequence))
    return events


def merged(event: LogEvent) -> dict[str, Any]:
    """The event's attributes, by ZenML's precedence: the record's, the stream's, what `emit` was given."""
    found = dict(event.details)
    found.update(event.stream.attributes)
    found.update(event.metadata)
    found.update(event.identity)
    return found


def by_the_sdk(event: LogEvent, resource: Resource) -> ReadableLogRecord:
    context = None
    if event.trace:
        trace_id, span_id, flags = event.trace
        context = set_span_in_context(NonRecordingSpan(SpanContext(trace_id, span_id, False, TraceFlags(flags))))
    record = LogRecord(
        timestamp=event.time_unix_nano,
        observed_timestamp=event.time_unix_nano,
        context=context,
        severity_text=event.severity_text,
        severity_number=SeverityNumber(event.severity_number),
        body=event.message,
        attributes=merged(event),
    )
    return ReadableLogRecord(record, resource, InstrumentationScope(event.logger_name))


def by_uid(records: list[Record]) -> dict[str, Record]:
    return {record.attributes["log.record.uid"]: record for record in records}


def the_messages_own(**fields: Any) -> Message:
    """Make a record of those fields that the installed messages have: before 1.28 they have no name of an event."""
    return Message(**{name: value for name, value in fields.items() if name in Message.DESCRIPTOR.fields_by_name})


@given(batches())
def test_every_record_is_what_opentelemetry_s_encoder_makes_of_it(batch: list[LogEvent]) -> None:
    resource = Resource({"service.name": "zenml", "n": 7})
    payload, shortened = encode_request(batch, encode_resource(resource.attributes), MAX_BYTES)
    with patch.object(_log_encoder, "PB2LogRecord", the_messages_own):
        official = encode_logs([by_the_sdk(event, resource) for event in batch]).SerializeToString()
    ours = decode_request(payload)
    # Theirs groups the records by scope, and so gives up the order between scopes.
    assert by_uid(ours) == by_uid(decode_request(official))
    assert [record.attributes["log.record.uid"] for record in ours] == [event.uid for event in batch]
    assert shortened == 0


@settings(max_examples=30)
@given(batches())
def test_a_reader_may_want_more_attributes(batch: list[LogEvent]) -> None:
    payload, _ = encode_request(batch, b"", MAX_BYTES, lambda event: {"zenml.log.source": event.level, "more": "!"})
    plain, _ = encode_request(batch, b"", MAX_BYTES)
    for event, record, without in zip(batch, decode_request(payload), decode_request(plain), strict=True):
        assert record.attributes == {**merged(event), "zenml.log.source": event.level, "more": "!"}
        assert record._replace(attributes={}) == without._replace(attributes={})


@given(batches(), st.integers(0, 6_000))
def test_a_request_is_within_its_limit_or_too_large(batch: list[LogEvent], max_bytes: int) -> None:
    resource = encode_resource({"service.name": "zenml"})
    whole, _ = encode_request(batch, resource, MAX_BYTES)
    try:
        payload, _ = encode_request(batch, resource, max_bytes)
    except TooLargeError:
        assert len(whole) > max_bytes
    else:
        assert payload == whole
        assert len(payload) <= max_bytes


@given(
    batches(st.text(max_size=30) | st.integers(0, 9_000).map(lambda length: "x" * length)), st.integers(2_000, 6_000)
)
def test_an_event_always_fits_into_a_request_alone(batch: list[LogEvent], max_event_bytes: int) -> None:
    with (
        patch.object(encoding, "MAX_EVENT_BYTES", max_event_bytes),
        patch.object(encoding, "MAX_TEXT_BYTES", 4_000),
        patch.object(encoding, "MIN_TEXT_BYTES", 250),
    ):
        for event in batch:
            payload, shortened = encode_request([event], b"", max_event_bytes + 100)
            assert len(payload) <= max_event_bytes + 100
            (record,) = decode_request(payload)
            assert record.attributes["log.record.uid"] == event.uid
            if not shortened:
                assert record.body == event.message
                assert record.attributes == merged(event)
