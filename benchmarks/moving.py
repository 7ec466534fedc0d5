"""How fast a log store's children are compared and copied, beside live delivery of the same events.

It compares two archives of a million events, one of which has lost one. It delivers events live to a collector and
to S3, as a pipeline's process does, and copies the same events there from an archive in a folder.

    python -m benchmarks.moving
"""

from __future__ import annotations

import logging
import resource
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zenml.artifact_stores import BaseArtifactStore
from zenml.models import LogsResponse

from benchmarks.backends import backends
from benchmarks.stores import composite, emitter, make_records, null_children
from composite_logstore import ChildConfig, LogEvent, Stream
from composite_logstore.backfilling import Backfill, open_ledger
from composite_logstore.parity import compare
from composite_logstore.scanning import Source, open_source
from composite_logstore.testing import make_events, make_logs, make_stream
from composite_logstore_artifact.config import ArtifactChildConfig
from composite_logstore_artifact.exporter import ArtifactExporter
from composite_logstore_artifact.reader import ArtifactReader
from composite_logstore_otlp.config import OtlpChildConfig
from tests.artifact_stores import local_store, object_store
from tests.servers.s3 import S3Server

COMPARED = 1_000_000
COPIED = 100_000
BATCH = 5_000


class PlacedChildConfig(ArtifactChildConfig):
    """An archive in an artifact store that ZenML does not know."""

    def create_exporter(self) -> ArtifactExporter:
        return ArtifactExporter(find=lambda stream: PLACES[self.name])

    def create_reader(self) -> ArtifactReader:
        return ArtifactReader(find=lambda logs: PLACES[self.name], is_in_progress=lambda logs: False)


PLACES: dict[str, BaseArtifactStore] = {}


def archive(name: str, place: BaseArtifactStore) -> PlacedChildConfig:
    PLACES[name] = place
    return PlacedChildConfig(name=name, type="artifact")


def events(first: int, stream: Stream) -> list[LogEvent]:
    messages = [f"epoch {number}, loss {1 / (number + 1):.3f}" for number in range(first, first + BATCH)]
    return make_events(messages, stream, first)


def measure_verify(folder: Path) -> None:
    stream = make_stream()
    lost = COMPARED * 3 // 4 + 7
    children = [archive("file", local_store(folder / "a")), archive("objects", object_store(folder / "b"))]
    exporters = [child.create_exporter() for child in children]
    for first in range(0, COMPARED, BATCH):
        batch = events(first, stream)
        exporters[0].export(batch)
        exporters[1].export([event for event in batch if event.sequence != lost])
    logs = make_logs(stream)
    for what, (one, other) in {"parity": (0, 0), "one lost": (0, 1)}.items():
        sources: list[Source] = [
            open_source(children[one]),
            open_source(children[other])._replace(name="the other"),
        ]
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        begin = time.perf_counter()
        result = compare(logs, "", sources)
        seconds = time.perf_counter() - begin
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        named = [f"{one.kind} in '{one.child}': {one.message}" for one in result.differences]
        print(
            f"verify, two archives, {what:9} {COMPARED / seconds:10,.0f} events/s, {grown:.0f} MB more; named: {named}"
        )


def live(child: ChildConfig, folder: Path) -> float:
    """Return how many events a second a process delivers that has nothing else to do."""
    # Something has to be readable; it gets nothing.
    primary = null_children(1, min_level="CRITICAL")
    store = composite(str(folder / f"live-{child.name}"), *primary, child, flush_limit_millis=600_000)
    emit = emitter(store)
    records: Sequence[logging.LogRecord] = make_records(COPIED)
    begin = time.perf_counter()
    for record in records:
        emit(record)
    store.flush()
    seconds = time.perf_counter() - begin
    assert store.stats()[child.name]["delivered"] == COPIED, store.stats()
    return COPIED / seconds


def copied(source: ChildConfig, target: ChildConfig, logs: LogsResponse, stream: Stream, folder: Path) -> float:
    """Return how many events a second are copied."""
    there = None if target.unreadable else open_source(target)
    with open_ledger(folder / "ledger", stream.id, target.name, 0) as ledger:
        begin = time.perf_counter()
        copying = Backfill(open_source(source), target, there, ledger)
        result = copying.copy(logs, stream)
        copying.close()
        seconds = time.perf_counter() - begin
    assert result.copied == COPIED, result
    return COPIED / seconds


def measure_backfill(folder: Path, places: dict[str, Any]) -> None:
    stream = make_stream()
    source = archive("source", local_store(folder / "source"))
    exporter = source.create_exporter()
    for first in range(0, COPIED, BATCH):
        exporter.export(events(first, stream))
    logs = make_logs(stream)
    targets: list[ChildConfig] = [
        OtlpChildConfig(name="collector", type="otlp", endpoint=places["collector"]),
        archive("s3", S3Server(places["s3"], places["bucket"]).artifact_store()),
    ]
    for target in targets:
        before, after = live(target, folder), copied(source, target, logs, stream, folder)
        print(f"{target.name:9} live {before:9,.0f} events/s, backfill {after:9,.0f} events/s: {after / before:.2f}")


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="composite-logstore-moving-") as root:
        measure_verify(Path(root))
        with backends() as places:
            measure_backfill(Path(root), places)


if __name__ == "__main__":
    main()
