"""What it costs to turn an event into what a backend takes, in the worker threads of the children.

python -m benchmarks.encode
"""

from __future__ import annotations

import gzip
import platform
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any
from uuid import uuid4

import orjson

from composite_logstore import LogEvent, Stream
from composite_logstore_artifact.encoding import encode
from composite_logstore_cloudwatch.batches import Line
from composite_logstore_cloudwatch.config import CloudwatchChildConfig
from composite_logstore_cloudwatch.exporter import CloudwatchExporter
from composite_logstore_datadog.config import DatadogChildConfig
from composite_logstore_datadog.exporter import DatadogExporter
from composite_logstore_elasticsearch.config import ElasticsearchChildConfig
from composite_logstore_elasticsearch.exporter import ElasticsearchExporter
from composite_logstore_otlp.encoding import encode_request, encode_resource

ROUNDS = 25
RECORDS = 1_000


class UnsentExporter(DatadogExporter):
    """Encodes a batch and keeps it."""

    sent: bytes = b""

    def _send(self, entries: list[bytes]) -> None:
        self.sent = b"[" + b",".join(entries) + b"]"


class UnsentElasticsearchExporter(ElasticsearchExporter):
    """Encodes a batch and keeps it."""

    sent: bytes = b""

    def _send(self, operations: Sequence[bytes], deadline: float) -> dict[int, Any]:
        self.sent = b"".join(operations)
        return {}


class UnsentCloudwatchExporter(CloudwatchExporter):
    """Encodes a batch as the requests that it would send."""

    def _put(self, stream: Stream, request: Sequence[Line], end: float, refused: Any) -> None:
        self.sent = orjson.dumps([{"timestamp": line.millis, "message": line.message.decode()} for line in request])


def make_events() -> list[LogEvent]:
    """Return events with 19 attributes: 13 of their stream, 3 of their identity, 3 of their own."""
    things = ("pipeline", "pipeline.run", "project", "stack", "step.run", "user")
    metadata = {f"zenml.{thing}.{key}": str(uuid4()) for thing in things for key in ("id", "name")}
    stream = Stream(uuid4(), {**metadata, "zenml.log.source": "step"})
    now = time.time_ns()
    return [
        LogEvent(
            stream=stream,
            writer="0123456789abcde",
            number=number,
            sequence=number,
            time_unix_nano=now + number * 1000,
            level=20,
            level_name="INFO",
            message=f"epoch {number}, loss {1 / (number + 1):.3f}",
            logger_name="train",
            file="/code/train.py",
            line=42,
            function="fit",
            exception=None,
            trace=None,
            attributes={},
            metadata={},
            progress=False,
        )
        for number in range(RECORDS)
    ]


def measure(work: Callable[[Sequence[LogEvent]], object], events: Sequence[LogEvent]) -> float:
    """Return the microseconds for each event."""
    begin = time.perf_counter()
    work(events)
    return (time.perf_counter() - begin) / len(events) * 1e6


def main() -> None:
    resource = encode_resource({"service.name": "zenml"})
    datadog = UnsentExporter(DatadogChildConfig(name="live", type="datadog", api_key="test-key"))  # type: ignore[arg-type]
    elasticsearch = UnsentElasticsearchExporter(
        ElasticsearchChildConfig(name="search", type="elasticsearch", url="https://search.example")
    )
    cloudwatch = UnsentCloudwatchExporter(CloudwatchChildConfig(name="aws", type="cloudwatch"))
    works: dict[str, Callable[[Sequence[LogEvent]], object]] = {
        "artifact": lambda events: [encode(event) for event in events],
        "otlp": lambda events: encode_request(events, resource, 20_000_000),
        "datadog": datadog.export,
        "elasticsearch": elasticsearch.export,
        "cloudwatch": cloudwatch.export,
        "datadog, with gzip": lambda events: (datadog.export(events), gzip.compress(datadog.sent, compresslevel=1)),
        "elasticsearch, with gzip": lambda events: (
            elasticsearch.export(events),
            gzip.compress(elasticsearch.sent, compresslevel=1),
        ),
    }
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(ROUNDS):
        events = make_events()
        for name, work in works.items():
            times[name].append(measure(work, events))
    print(f"Python {platform.python_version()}, orjson {orjson.__version__}, {ROUNDS} rounds of {RECORDS} events")
    for name in works:
        print(f"{name:24} {median(times[name]):5.1f} µs an event")


if __name__ == "__main__":
    main()
