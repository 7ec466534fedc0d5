from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry.metrics import _internal as metrics_api
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from composite_logstore import RejectedError, RetryableError
from composite_logstore.delivery import metrics, writers
from composite_logstore.testing import SimulatedBackend, SimulatedClock
from tests.simulation import make_child, make_logs, make_store

Points = dict[tuple[str, str, str], float]


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemoryMetricReader]:
    """A process whose application has set up metrics."""
    reader = InMemoryMetricReader()
    provider = MeterProvider(metric_readers=[reader])
    monkeypatch.setattr(metrics_api, "_METER_PROVIDER", provider)
    monkeypatch.setattr(writers, "_writers", {})
    writers._offer_metrics.cache_clear()
    metrics.export_duration.cache_clear()
    yield reader
    provider.shutdown()
    writers._offer_metrics.cache_clear()
    metrics.export_duration.cache_clear()


def collected(reader: InMemoryMetricReader) -> Points:
    """Return the numbers by (metric, child, `error.type`)."""
    points: Points = {}
    data: Any = reader.get_metrics_data()
    for metric in data.resource_metrics[0].scope_metrics[0].metrics:
        for point in metric.data.data_points:
            key = (metric.name, point.attributes["otel.component.name"], point.attributes.get("error.type", ""))
            points[key] = point.count if hasattr(point, "count") else point.value
    return points


def test_every_child_is_observed_under_the_names_of_the_semantic_conventions(reader: InMemoryMetricReader) -> None:
    with SimulatedClock() as clock:
        living, dead, odd = SimulatedBackend(), SimulatedBackend(), SimulatedBackend()
        dead.fault = RetryableError("refused")
        odd.faults = [RejectedError("too old", count=2)]
        store = make_store(
            make_child("living", living),
            make_child("dead", dead, max_queue_size=4, max_export_batch_size=2),
            make_child("odd", odd),
        )
        logs = make_logs(store)
        origin = store.register_origin(str(logs.id), logs, {})
        for number in range(3):
            store.emit(origin, logging.LogRecord("train", 20, "/code/train.py", 1, f"{number}", (), None))
        clock.advance(0.1)
        for number in range(6):
            store.emit(origin, logging.LogRecord("train", 20, "/code/train.py", 1, f"{number}", (), None))
        clock.advance(0.1)
        points = collected(reader)
        stats = store.stats()
    assert points["otel.sdk.exporter.log.exported", "living", ""] == 9
    assert points["otel.sdk.exporter.log.exported", "living", "rejected"] == 0
    assert points["otel.sdk.exporter.log.exported", "odd", ""] == 7
    assert points["otel.sdk.exporter.log.exported", "odd", "rejected"] == 2
    assert points["otel.sdk.processor.log.processed", "odd", ""] == 9
    assert points["otel.sdk.processor.log.processed", "dead", "queue_full"] == stats["dead"]["dropped"] > 0
    assert points["otel.sdk.processor.log.queue.size", "dead", ""] == 4
    assert points["otel.sdk.processor.log.queue.capacity", "dead", ""] == 4
    assert points["otel.sdk.exporter.log.inflight", "dead", ""] == 2
    assert points["otel.sdk.exporter.operation.duration", "living", ""] == living.exports
    assert points["otel.sdk.exporter.operation.duration", "dead", "RetryableError"] == dead.exports


def test_what_was_masked_is_observed_by_name(reader: InMemoryMetricReader) -> None:
    with SimulatedClock() as clock:
        pattern = {"name": "pin", "pattern": "[0-9]{4}"}
        store = make_store(make_child("a", SimulatedBackend(), redact={"patterns": [pattern]}))
        logs = make_logs(store)
        origin = store.register_origin(str(logs.id), logs, {})
        for text in ("1234", "1234 5678", "none"):
            store.emit(origin, logging.LogRecord("train", 20, "/code/train.py", 1, text, (), None))
        clock.advance(1)
        data: Any = reader.get_metrics_data()
    metrics = data.resource_metrics[0].scope_metrics[0].metrics
    (redacted,) = (metric for metric in metrics if metric.name == "composite_logstore.redacted")
    assert [
        (dict(point.attributes)["composite_logstore.redaction"], point.value) for point in redacted.data.data_points
    ] == [("pin", 2)]


def test_the_metrics_of_two_writers_of_one_component_are_added(reader: InMemoryMetricReader) -> None:
    with SimulatedClock() as clock:
        backend = SimulatedBackend()
        first = make_store(make_child("a", backend))
        second = make_store(make_child("a", backend, max_queue_size=7), id=first.id)
        for store in (first, second):
            logs = make_logs(store)
            origin = store.register_origin(str(logs.id), logs, {})
            store.emit(origin, logging.LogRecord("train", 20, "/code/train.py", 1, "hello", (), None))
        clock.advance(1)
        assert collected(reader)["otel.sdk.exporter.log.exported", "a", ""] == 2
