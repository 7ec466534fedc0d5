"""Any record whatsoever between ordinary ones: every backend can encode what is numbered, and nothing is held up."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from opentelemetry.exporter.otlp.proto.common._log_encoder import encode_logs
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from zenml.log_stores import OtelLogStore, OtelLogStoreConfig

from benchmarks.stores import make
from composite_logstore import CompositeLogStore, LogEvent, OtelExporter, Stream
from composite_logstore.capture.outbox import Outbox
from composite_logstore.capture.record import note, numbered
from composite_logstore.testing import SimulatedBackend, SimulatedClock
from composite_logstore_artifact import exporter as archive
from composite_logstore_artifact.encoding import encode
from composite_logstore_artifact.lines import event_of
from composite_logstore_cloudwatch import encoding as cloudwatch
from composite_logstore_component import exporter as component
from composite_logstore_datadog import encoding as datadog
from composite_logstore_datadog.config import DatadogChildConfig
from composite_logstore_elasticsearch import encoding as elasticsearch
from composite_logstore_elasticsearch.decoding import record_of
from composite_logstore_otlp.encoding import encode_request, encode_resource
from composite_logstore_otlp.exporter import MAX_GRPC_REQUEST_BYTES, MAX_HTTP_REQUEST_BYTES
from tests.events import WRITER, capture
from tests.hostile import VALUES, assert_plain, make_record, records, values
from tests.otel_sdk import LogRecordExporter, LogRecordExportResult, text_of
from tests.simulation import assert_accounts_add_up, make_child, make_logs, make_store, process_dies

EXAMPLES = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def batches(draw: st.DrawFn) -> list[LogEvent]:
    """Events of records whatsoever, of streams whatsoever."""
    streams = [Stream(uuid4(), {"given": VALUES[draw(values)]()}) for _ in range(2)]
    events = []
    for number in range(draw(st.integers(1, 3))):
        metadata = {"given": VALUES[draw(values)]()} if draw(st.booleans()) else None
        said = note(draw(records()), metadata)
        events.append(numbered(said, draw(st.sampled_from(streams)), WRITER, number, number))
    return events


class _Encoding(LogRecordExporter):
    """An exporter of the SDK that does no more than encode: for OTLP, and for the console."""

    def __init__(self) -> None:
        self.encoded: list[Any] = []

    def export(self, batch: Any) -> LogRecordExportResult:
        self.encoded.append(encode_logs(batch))
        for record in batch:
            text_of(record)
        return LogRecordExportResult.SUCCESS

    def shutdown(self) -> None:
        pass

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return True


class _EncodingLogStore(OtelLogStore):
    """ZenML's own log store over it."""

    def get_exporter(self) -> LogRecordExporter:
        return _Encoding()


class _Recorded:
    """Stands for any log store of ZenML that formats records."""

    name = "recorded"

    def __init__(self) -> None:
        self.lines: list[str] = []

    def register_origin(self, name: str, logs: Any, metadata: dict[str, Any]) -> Any:
        return type("Origin", (), {"metadata": metadata})()

    def emit(self, origin: Any, record: logging.LogRecord, metadata: Any) -> None:
        self.lines.append(logging.Formatter("%(asctime)s %(levelname)s %(message)s").format(record))

    def flush(self, blocking: bool = True) -> None:
        pass


@EXAMPLES
@given(batch=batches())
def test_every_backend_encodes_every_numbered_event(batch: list[LogEvent]) -> None:
    for event in batch:
        assert_plain(event)
    check_archive(batch)
    check_otlp(batch)
    check_datadog(batch)
    check_cloudwatch(batch)
    check_elasticsearch(batch)
    check_otel(batch)
    check_component(batch)


def check_archive(batch: list[LogEvent]) -> None:
    for event in batch:
        line = encode(event)
        assert line.count(b"\n") == 1
        found = event_of(line[:-1], event.stream)
        assert found is not None
        assert found[1:6] == event[1:6]
    archive._Lines(WRITER, batch, encode, archive._number_of, archive.summarize_events).summary  # noqa: B018


def check_otlp(batch: list[LogEvent]) -> None:
    resource = encode_resource({})
    for most in (MAX_HTTP_REQUEST_BYTES, MAX_GRPC_REQUEST_BYTES):
        payload, _ = encode_request(batch, resource, most)
        (resource_logs,) = ExportLogsServiceRequest.FromString(payload).resource_logs
        assert sum(len(scope.log_records) for scope in resource_logs.scope_logs) == len(batch)


def check_datadog(batch: list[LogEvent]) -> None:
    config = DatadogChildConfig(name="live", type="datadog", api_key="k" * 32)
    for event in batch:
        encoder = datadog.StreamEncoder(event.stream, {"service": config.service_name})
        encoded = encoder.encode(event)
        assert isinstance(orjson.loads(encoded), dict)
        assert len(datadog.shorten_entry(encoder.entry(event))) <= datadog.MAX_ENTRY_BYTES


def check_cloudwatch(batch: list[LogEvent]) -> None:
    for event in batch:
        encoder = cloudwatch.StreamEncoder(event.stream)
        record = orjson.loads(encoder.encode(event))
        assert record["attributes"].items() >= event.identity.items()
        assert record == orjson.loads(orjson.dumps(encoder.record(event)))
        assert len(cloudwatch.shorten_record(encoder.record(event))) <= cloudwatch.MOST_MESSAGE_BYTES


def check_elasticsearch(batch: list[LogEvent]) -> None:
    for event in batch:
        encoder = elasticsearch.StreamEncoder(event.stream, {"service.name": "train"})
        encoded = encoder.encode(event)
        assert b"\n" not in encoded
        document = orjson.loads(encoded)
        assert document == orjson.loads(orjson.dumps(encoder.document(event)))
        record = record_of(document)
        assert record is not None
        assert (record.nanos, record.body) == (event.time_unix_nano, event.message)
        if (small := elasticsearch.packed(document)) is not None:
            assert record_of(small) is not None
            assert all(isinstance(value, str | int) for value in small.values())
        assert len(elasticsearch.shorten_document(encoder.document(event))) <= elasticsearch.MAX_DOCUMENT_BYTES


def check_otel(batch: list[LogEvent]) -> None:
    encoding = _Encoding()
    assert OtelExporter(encoding, {"service.name": "train"}).export(batch) <= len(batch)
    assert len(encoding.encoded) == 1


def check_component(batch: list[LogEvent]) -> None:
    recorded = _Recorded()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(component, "describe", lambda stream, store: None)
        component.EmittingExporter(recorded).export(batch)  # type: ignore[arg-type]
    assert len(recorded.lines) == len(batch)
    store = make_component()
    component.OtelStoreExporter(store).export(batch)


def make_component() -> _EncodingLogStore:
    store = make(_EncodingLogStore, OtelLogStoreConfig(endpoint="http://127.0.0.1:1/v1/logs"))
    assert isinstance(store, _EncodingLogStore)
    return store


@contextmanager
def machine() -> Iterator[tuple[SimulatedClock, str]]:
    with SimulatedClock() as clock, tempfile.TemporaryDirectory(prefix="composite-logstore-tests-") as disk:
        try:
            yield clock, disk
        finally:
            process_dies(clock)


ids = st.sampled_from(["memory", "spill", "write_ahead"])
ways = st.sampled_from(["here", "through a fork", "killed"])


@EXAMPLES
@given(odd=st.lists(records(), min_size=1, max_size=4), durability=ids, way=ways, metadata=values, small=st.booleans())
def test_what_is_odd_holds_up_nothing(
    odd: list[logging.LogRecord], durability: str, way: str, metadata: str, small: bool
) -> None:
    with machine() as (clock, disk):
        id = uuid4()
        backend = SimulatedBackend()

        def start() -> tuple[CompositeLogStore, Any]:
            child = make_child("a", backend, **({"max_queue_size": 2} if small and durability != "memory" else {}))
            # Some records have megabytes, and how many of those may wait is not what this is about.
            settings: dict[str, Any] = {"durability": durability, "spool_directory": disk, "max_queue_bytes": 1 << 30}
            store = make_store(child, id=id, **settings)
            logs = make_logs(store)
            return store, store.register_origin(str(logs.id), logs, {"given": VALUES[metadata]()})

        backend.fault = "refused" if way == "killed" else None
        store, origin = start()
        emit: Callable[..., None] = store.emit
        if way == "through a fork":
            store.writer.before_fork()
            inbox = store.writer._forked._inbox
            assert inbox is not None
            outbox = Outbox(inbox)

            def send(origin: Any, record: logging.LogRecord, metadata: Any = None) -> None:
                outbox.send(origin.stream, True, capture(record, metadata))

            emit = send

        ordinary = []
        for number, record in enumerate(odd):
            ordinary.append(f"ordinary {number}")
            emit(origin, make_record(ordinary[-1]))
            emit(origin, record, {"given": VALUES[metadata]()})
        ordinary.append("the last")
        emit(origin, make_record("the last"))
        store.flush()
        clock.advance(2)
        if way == "killed" and durability != "memory":
            process_dies(clock)
            backend.fault = None
            store, origin = start()
            store.emit(origin, make_record("after"))
            ordinary.append("after")
        backend.fault = None
        clock.advance(120)
        stats = store.stats()
        assert_accounts_add_up(stats)
        assert (stats["a"]["pending"], stats["a"]["dropped"], stats["a"]["rejected"]) == (0, 0, 0)
        expected = 2 * len(odd) + 1 + ("after" in ordinary)
        assert len(backend.received) == stats["a"]["delivered"] == expected
        messages = [event.message for event in backend.received]
        assert set(ordinary) <= set(messages)
        for event in backend.received:
            assert_plain(event)
        if way == "through a fork":
            _close(store)


def _close(store: CompositeLogStore) -> None:
    inbox = store.writer._forked._inbox
    assert inbox is not None
    inbox.close()
    store.writer._forked._inbox = None
