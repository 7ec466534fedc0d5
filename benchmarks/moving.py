"""How fast a log store's children are compared and copied, beside live delivery of the same events.

It compares two archives of a million events, one of which has lost one. It delivers events live to a collector and
to S3, as a pipeline's process does, and copies the same events there from an archive in a folder. All of it in turn,
several times; it takes two minutes. Medians, and the lowest and highest of the rounds, as a table.

    python -m benchmarks.moving
"""

from __future__ import annotations

import logging
import resource
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from statistics import median
from typing import Any, TypeAlias

from zenml.artifact_stores import BaseArtifactStore

from benchmarks.backends import backends
from benchmarks.stores import composite, emitter, make_records, null_children
from composite_logstore import ChildConfig, LogEvent, Stream
from composite_logstore.parity.backfill import Backfill
from composite_logstore.parity.compare import compare
from composite_logstore.parity.ledger import open_ledger
from composite_logstore.parity.result import StreamParity
from composite_logstore.parity.scan import Source, open_source
from composite_logstore.parity.sender import Sender
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
ROUNDS = 5

Row: TypeAlias = tuple[str, str, str]
"""What was measured, what it should be, and what it is."""


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


def fill(children: Sequence[ChildConfig], count: int, lost: int | None = None) -> Stream:
    """Have a new stream archived by all of them; the last one does not get the event that is lost."""
    stream = make_stream()
    exporters = [child.create_exporter() for child in children]
    for first in range(0, count, BATCH):
        batch = events(first, stream)
        for exporter in exporters:
            is_last = exporter is exporters[-1]
            exporter.export([event for event in batch if event.sequence != lost] if is_last else batch)
    for exporter in exporters:
        exporter.end_stream(stream)
        exporter.close()
    return stream


def compared(stream: Stream, one: ChildConfig, other: ChildConfig) -> tuple[float, StreamParity]:
    """Return in how many seconds two children are compared, and what came out."""
    sources: list[Source] = [open_source(one), open_source(other)._replace(name="the other")]
    begin = time.perf_counter()
    result = compare(make_logs(stream), "", sources)
    return time.perf_counter() - begin, result


def measure_verify(folder: Path) -> Iterator[Row]:
    children = [archive("file", local_store(folder / "a")), archive("objects", object_store(folder / "b"))]
    file, objects = children
    lost = COMPARED * 3 // 4 + 7
    few, many = fill(children, COMPARED // 10), fill(children, COMPARED, lost)
    compared(few, file, file)
    before = peak_megabytes()
    compared(many, file, file)
    after = peak_megabytes()
    rates: dict[str, list[float]] = {"parity": [], "lost": []}
    for _ in range(ROUNDS):
        seconds, result = compared(many, file, file)
        assert not result.differences
        rates["parity"].append(COMPARED / seconds)
        seconds, result = compared(many, file, objects)
        (named,) = result.differences
        assert (named.kind, named.child, named.sequence) == ("missing", "the other", lost)
        rates["lost"].append(COMPARED / seconds)
    what = f"`verify`, two archives of {COMPARED:,} events"
    yield what, "at least 200,000 events/s", rate(rates["parity"])
    yield f"{what}, one of which lacks one: it is named", "at least 200,000 events/s", rate(rates["lost"])
    few_events = f"{COMPARED // 10:,} events"
    yield f"the process's memory after {few_events}, and after {COMPARED:,}", "flat", f"{before:.0f} MB, {after:.0f} MB"


def peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def rate(rates: Sequence[float]) -> str:
    return f"{median(rates):,.0f}/s ({min(rates):,.0f} to {max(rates):,.0f})"


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


def copied(source: ChildConfig, target: ChildConfig, stream: Stream, folder: Path) -> float:
    """Return how many events a second are copied."""
    there = None if target.unreadable else open_source(target)
    with open_ledger(folder / "ledger", stream.id, target.name, 0) as ledger:
        begin = time.perf_counter()
        with closing(Sender(target, ledger)) as sender:
            result = Backfill(open_source(source), there, sender).copy(make_logs(stream), stream)
        seconds = time.perf_counter() - begin
    assert result.copied == COPIED, result
    return COPIED / seconds


def measure_backfill(folder: Path, places: dict[str, Any]) -> Iterator[Row]:
    source = archive("source", local_store(folder / "source"))
    collector = OtlpChildConfig(name="collector", type="otlp", endpoint=places["collector"])
    s3 = archive("s3", S3Server(places["s3"], places["bucket"]).artifact_store())
    goals: dict[str, tuple[ChildConfig, float]] = {"a collector": (collector, 0.8), "an archive in S3": (s3, 1.5)}
    rates: dict[str, list[tuple[float, float]]] = {what: [] for what in goals}
    for number in range(ROUNDS):
        stream = fill([source], COPIED)
        for what, (target, _) in goals.items():
            place = folder / f"round-{number}"
            rates[what].append((live(target, place), copied(source, target, stream, place)))
    for what, (_, goal) in goals.items():
        before, after = ([pair[place] for pair in rates[what]] for place in (0, 1))
        times = median(one / other for other, one in rates[what])
        yield f"live delivery to {what}", "", rate(before)
        yield (
            f"`backfill` of {COPIED:,} events from an archive in a folder to {what}",
            f"at least {goal} times that",
            f"{times:.2f} times, {rate(after)}",
        )


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="composite-logstore-moving-") as root:
        rows = list(measure_verify(Path(root)))
        with backends() as places:
            rows += measure_backfill(Path(root), places)
    print("| | goal | measured |\n|---|---|---|")
    for row in rows:
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
