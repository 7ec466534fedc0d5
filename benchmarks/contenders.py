"""Who delivers the same records to the same backends, each in a process of its own.

    python -m benchmarks.contenders NAME PLACES RECORDS

prints what it cost, as JSON. `PLACES` is what `backends.backends` returns.
"""

from __future__ import annotations

import http.client
import json
import logging
import os
import queue
import resource
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from logging.handlers import QueueHandler, QueueListener
from pathlib import Path
from statistics import quantiles
from typing import Any, ClassVar
from urllib.parse import urlsplit
from uuid import uuid4

import zenml.stack  # noqa: F401  (ZenML is imported as a pipeline does it)
from opentelemetry.exporter.otlp.proto.http._log_exporter import OTLPLogExporter
from opentelemetry.sdk._logs import LoggerProvider, LoggingHandler
from opentelemetry.sdk._logs.export import BatchLogRecordProcessor
from zenml.artifact_stores import BaseArtifactStore
from zenml.log_stores import OtelLogStore, OtelLogStoreConfig
from zenml.log_stores.artifact.artifact_log_store import ArtifactLogStore, prepare_logs_uri
from zenml.log_stores.datadog.datadog_flavor import DatadogLogStoreConfig
from zenml.log_stores.datadog.datadog_log_store import DatadogLogStore

from benchmarks.stores import composite, emitter, make, make_records
from composite_logstore import Stream
from composite_logstore_artifact.config import ArtifactChildConfig
from composite_logstore_artifact.exporter import ArtifactExporter
from composite_logstore_datadog.config import DatadogChildConfig
from composite_logstore_otlp.config import OtlpChildConfig
from tests.artifact_stores import local_store
from tests.servers.datadog import API_KEY, APPLICATION_KEY
from tests.servers.s3 import S3Server


@dataclass
class Contender:
    """Somebody who delivers.

    Attributes:
        emit: What a log call ends in.
        flush: Returns when everything has been delivered.
        delivered: How many records are known to have arrived at each backend; None if nobody knows.
    """

    emit: Callable[[Any], None]
    flush: Callable[[], None]
    delivered: Callable[[], Mapping[str, int]] | None = None


class ArchiveConfig(ArtifactChildConfig):
    """The artifact child with an artifact store that is not registered in ZenML."""

    stores: ClassVar[dict[str, BaseArtifactStore]] = {}

    def create_exporter(self) -> ArtifactExporter:
        def find(_: Stream) -> BaseArtifactStore:
            return self.stores[self.name]

        return ArtifactExporter(find=find)


def _archive(places: Mapping[str, str], on_s3: bool) -> BaseArtifactStore:
    if on_s3:
        return S3Server(places["s3"], places["bucket"]).artifact_store()
    return local_store(Path(places["folder"]) / uuid4().hex)


def composite_log_store(places: Mapping[str, str], on_s3: bool = False) -> Contender:
    """The composite with its three backends."""
    ArchiveConfig.stores["archive"] = _archive(places, on_s3)
    keys: dict[str, Any] = {"api_key": API_KEY, "application_key": APPLICATION_KEY}
    store = composite(
        f"{places['folder']}/{uuid4().hex}",
        ArchiveConfig(name="archive", type="artifact"),
        OtlpChildConfig(name="collector", type="otlp", endpoint=places["collector"]),
        DatadogChildConfig(name="live", type="datadog", endpoint=places["datadog"] + "/api/v2/logs", **keys),
    )

    def delivered() -> dict[str, int]:
        return {name: stats["delivered"] for name, stats in store.stats().items()}

    return Contender(emitter(store), store.flush, delivered)


def _stock_stores(places: Mapping[str, str], on_s3: bool) -> dict[str, tuple[OtelLogStore, dict[str, Any]]]:
    archive = _archive(places, on_s3)
    datadog = DatadogLogStoreConfig(
        api_key=API_KEY, application_key=APPLICATION_KEY, endpoint=places["datadog"] + "/api/v2/logs"
    )
    return {
        "otel": (make(OtelLogStore, OtelLogStoreConfig(endpoint=places["collector"] + "/v1/logs")), {}),
        "datadog": (make(DatadogLogStore, datadog), {}),
        "artifact": (
            ArtifactLogStore.from_artifact_store(archive),
            {"uri": prepare_logs_uri(artifact_store=archive, log_id=uuid4())},
        ),
    }  # type: ignore[return-value]


def stock_one(places: Mapping[str, str], on_s3: bool = False) -> Contender:
    """One of ZenML's own log stores."""
    store, fields = _stock_stores(places, on_s3)["otel"]
    return Contender(emitter(store, **fields), store.flush)


def stock_three(places: Mapping[str, str], on_s3: bool = False) -> Contender:
    """Three of ZenML's own log stores, one after the other."""
    stores = _stock_stores(places, on_s3).values()
    emitters = [emitter(store, **fields) for store, fields in stores]

    def emit(record: logging.LogRecord) -> None:
        for one in emitters:
            one(record)

    def flush() -> None:
        for store, _ in stores:
            store.flush()

    return Contender(emit, flush)


def sdk(places: Mapping[str, str], on_s3: bool = False) -> Contender:
    """OpenTelemetry's SDK: one provider, three batch processors, with its own exporter and two of ZenML's."""
    stores = _stock_stores(places, on_s3)
    provider = LoggerProvider()
    exporters = [OTLPLogExporter(places["collector"] + "/v1/logs")]
    exporters += [stores[name][0].get_exporter() for name in ("datadog", "artifact")]
    for exporter in exporters:
        provider.add_log_record_processor(BatchLogRecordProcessor(exporter, max_queue_size=1_000_000))
    handler = LoggingHandler(logger_provider=provider)
    uri = stores["artifact"][1]["uri"]

    def emit(record: logging.LogRecord) -> None:
        # It is how ZenML's archive knows the stream.
        vars(record)["zenml.log.uri"] = uri
        handler.emit(record)

    return Contender(emit, lambda: provider.force_flush(600_000) and None)


class Batches:
    """Posts JSON in batches of 1,000, as somebody would who writes a handler."""

    def __init__(self, url: str, body: Callable[[list[Any]], bytes], headers: Mapping[str, str]) -> None:
        self._url = urlsplit(url)
        self._connection = http.client.HTTPConnection(self._url.netloc)
        self._body = body
        self._headers = {"Content-Type": "application/json", **headers}
        self._batch: list[Any] = []

    def add(self, entry: Any) -> None:
        self._batch.append(entry)
        if len(self._batch) == 1000:
            self.send()

    def send(self) -> None:
        if self._batch:
            self._connection.request("POST", self._url.path, self._body(self._batch), self._headers)
            self._connection.getresponse().read()
            self._batch = []


def _sinks(places: Mapping[str, str]) -> tuple[list[Callable[[str, int, str], None]], Callable[[], None]]:
    """Return three functions that take a message, its time and its level, and what sends what is left."""
    file = open(Path(places["folder"]) / f"{uuid4().hex}.log", "a")  # noqa: SIM115  (as long as the process)
    otlp = Batches(
        places["collector"] + "/v1/logs",
        lambda logs: json.dumps({"resourceLogs": [{"scopeLogs": [{"logRecords": logs}]}]}).encode(),
        {},
    )
    datadog = Batches(
        places["datadog"] + "/api/v2/logs", lambda logs: json.dumps(logs).encode(), {"DD-API-KEY": API_KEY}
    )

    def to_file(message: str, time_unix_nano: int, level: str) -> None:
        file.write(json.dumps({"timestamp": time_unix_nano, "level": level, "message": message}) + "\n")

    def to_collector(message: str, time_unix_nano: int, level: str) -> None:
        body = {"stringValue": message}
        otlp.add({"timeUnixNano": str(time_unix_nano), "severityText": level, "body": body})

    def to_datadog(message: str, time_unix_nano: int, level: str) -> None:
        datadog.add({"message": message, "timestamp": time_unix_nano // 1_000_000, "status": level, "service": "zenml"})

    def flush() -> None:
        file.flush()
        otlp.send()
        datadog.send()

    return [to_file, to_collector, to_datadog], flush


class SinkHandler(logging.Handler):
    """Hands records to a sink."""

    def __init__(self, sink: Callable[[str, int, str], None]) -> None:
        super().__init__()
        self._sink = sink

    def emit(self, record: logging.LogRecord) -> None:
        self._sink(record.getMessage(), int(record.created * 1e9), record.levelname)


def queue_handler(places: Mapping[str, str], on_s3: bool = False) -> Contender:
    """The standard library's queue with a listener and three handlers. No identity, no attributes, no retries."""
    records: queue.SimpleQueue[Any] = queue.SimpleQueue()
    sinks, flush_sinks = _sinks(places)
    listener = QueueListener(records, *(SinkHandler(sink) for sink in sinks))
    listener.start()

    def flush() -> None:
        listener.stop()
        flush_sinks()
        listener.start()

    return Contender(QueueHandler(records).emit, flush)


def loguru_sinks(places: Mapping[str, str], on_s3: bool = False) -> Contender:
    """Three enqueued sinks of loguru. No identity, no attributes, no retries."""
    from loguru import logger

    sinks, flush_sinks = _sinks(places)
    logger.remove()
    for sink in sinks:

        def receive(message: Any, sink: Callable[[str, int, str], None] = sink) -> None:
            record = message.record
            sink(record["message"], int(record["time"].timestamp() * 1e9), record["level"].name)

        logger.add(receive, enqueue=True, level="INFO")

    def flush() -> None:
        logger.complete()
        flush_sinks()

    return Contender(lambda record: logger.info(record.getMessage()), flush)


CONTENDERS: dict[str, Callable[..., Contender]] = {
    "composite log store, three children": composite_log_store,
    "ZenML, one log store": stock_one,
    "ZenML, three log stores": stock_three,
    "OpenTelemetry SDK, three processors": sdk,
    "logging.QueueHandler, three handlers": queue_handler,
    "loguru, three enqueued sinks": loguru_sinks,
}
ON_S3 = ("composite log store, three children", "ZenML, three log stores")
"""Whose archive is measured on S3, too."""


def cpu_seconds() -> float:
    """Return what this process has used of the processor."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def measure(contender: Contender, records: int) -> dict[str, Any]:
    """Emit so many records as fast as can be, and have them delivered."""
    first, second = make_records(records // 2), make_records(records - records // 2)
    # As many as are measured, so that their memory is there: the first use of a page costs a few microseconds.
    _emit_all(contender, make_records(records))
    contender.flush()
    before = contender.delivered() if contender.delivered else {}
    cpu, begin, thread = cpu_seconds(), time.perf_counter(), time.thread_time()
    _emit_all(contender, first)
    emitted, thread = time.perf_counter(), time.thread_time() - thread
    times = _times(contender, second)
    contender.flush()
    end, used = time.perf_counter(), cpu_seconds() - cpu
    cuts = [cut * 1e6 for cut in quantiles(times, n=1000)]
    result = {
        "emit_micros": (emitted - begin) / len(first) * 1e6,
        "emit_thread_micros": thread / len(first) * 1e6,
        "emit_median_micros": cuts[499],
        "emit_p99_micros": cuts[989],
        "emit_p999_micros": cuts[998],
        "cpu_micros": used / records * 1e6,
        "records_per_second": records / (end - begin),
    }
    if contender.delivered:
        result["delivered"] = {name: number - before[name] for name, number in contender.delivered().items()}
    return result


def _emit_all(contender: Contender, records: Iterable[logging.LogRecord]) -> None:
    emit = contender.emit
    for record in records:
        emit(record)


def _times(contender: Contender, records: Iterable[logging.LogRecord]) -> list[float]:
    emit, now = contender.emit, time.perf_counter
    times = []
    for record in records:
        begin = now()
        emit(record)
        times.append(now() - begin)
    return times


def main() -> None:
    name, places, records = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
    logging.disable(logging.CRITICAL)
    if hasattr(os, "sched_setaffinity"):
        # One core, whatever the machine: Python's threads take turns anyway.
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    contender = CONTENDERS[name](places, on_s3="s3" in sys.argv[4:])
    logging.disable(logging.NOTSET)
    logging.getLogger().setLevel(logging.CRITICAL)
    print("\n" + json.dumps(measure(contender, records)), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
