"""Backfill against a plain model: whatever two archives hold, the one lacks nothing then, and no more comes."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from zenml.artifact_stores import BaseArtifactStore
from zenml.log_stores.artifact.artifact_log_store import prepare_logs_uri

from composite_logstore import PageRequest, Stream
from composite_logstore.parity.backfill import Backfill
from composite_logstore.parity.compare import compare
from composite_logstore.parity.ledger import open_ledger
from composite_logstore.parity.result import Copied
from composite_logstore.parity.scan import open_source
from composite_logstore.parity.sender import Sender
from composite_logstore.reading.cursor import without_duplicates
from composite_logstore.testing import make_logs, make_stream
from composite_logstore.zenml import LogEntry, LogsEntriesFilter
from composite_logstore_artifact import reader as artifact_reader
from composite_logstore_artifact.config import ArtifactChildConfig
from composite_logstore_artifact.encoding import encode
from composite_logstore_artifact.exporter import ArtifactExporter
from composite_logstore_artifact.reader import ArtifactReader
from tests.artifact_stores import local_store, object_store, with_faults
from tests.events import make_events

NOON = datetime(2026, 1, 1, 12, tzinfo=timezone.utc)

WRITERS = ("0123456789abcde", "fedcba987654321")

# What lies in an archive: runs of a writer's events, and lines of another program.
runs = st.tuples(st.sampled_from([*WRITERS, ""]), st.integers(0, 40), st.integers(1, 30))
held = st.lists(runs, max_size=5)
# What becomes of each attempt to write: nothing, an error, and for a file how much room the disk has, for an object an
# answer that is lost.
faults = st.lists(st.sampled_from([None, OSError(errno.EIO, "broken"), 0, 100, 700]), max_size=8)


@pytest.fixture(autouse=True, scope="module")
def small_pieces() -> Iterator[None]:
    """What is scanned comes in many pieces."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("composite_logstore.parity.holding._STRETCH", 5)
        for name, size in {"_SCANNED_LINES": 1, "_FIRST_BLOCK": 1_500, "_LARGEST_BLOCK": 3_000}.items():
            patch.setattr(artifact_reader, name, size)
        yield


class Archive(ArtifactChildConfig):
    """An archive, in a store that may fail where it is written to."""

    stores: Any

    def create_exporter(self) -> ArtifactExporter:
        return ArtifactExporter(find=lambda stream: self.stores[1])

    def create_reader(self) -> ArtifactReader:
        return ArtifactReader(find=lambda logs: self.stores[0], is_in_progress=lambda logs: False)


def archive(name: str, store: BaseArtifactStore, faulty: BaseArtifactStore | None = None, **settings: Any) -> Archive:
    return Archive(name=name, type="artifact", stores=(store, faulty or store), **settings)


def fill(store: BaseArtifactStore, stream: Stream, held: Sequence[tuple[str, int, int]]) -> None:
    """Lay down lines as they would come in such an order."""
    if store.config.is_local:
        path = Path(prepare_logs_uri(store, stream.id))
        os.makedirs(path.parent)
        with open(path, "wb") as file:
            for line in lines_of(stream, held):
                file.write(line)
        return
    exporter = ArtifactExporter(find=lambda stream: store)
    for writer, first, count in held:
        if writer:
            exporter.export(make_events(messages(first, count), stream, first, writer))
            # What comes once more is written once more.
            exporter.end_stream(stream)
    exporter.close()


def lines_of(stream: Stream, held: Sequence[tuple[str, int, int]]) -> Iterator[bytes]:
    for writer, first, count in held:
        if writer:
            yield from map(encode, make_events(messages(first, count), stream, first, writer))
        else:
            for message in messages(first, count):
                yield (
                    LogEntry(message=message, level=20, timestamp=NOON).model_dump_json(exclude_none=True).encode()
                    + b"\n"
                )


def messages(first: int, count: int) -> list[str]:
    return [f"said {number}" for number in range(first, first + count)]


def copy(source: Archive, target: Archive, stream: Stream, folder: Path) -> Copied:
    with ExitStack() as stack:
        ledger = stack.enter_context(open_ledger(folder, UUID(int=1), target.name, 0.0))
        sender = stack.enter_context(closing(Sender(target, ledger, sleep=lambda seconds: None)))
        result = Backfill(open_source(source), open_source(target), sender).copy(make_logs(stream), stream)
        ledger.complete()
        return result


def fetched(child: Archive, stream: Stream) -> list[str]:
    page = child.create_reader().read(PageRequest(make_logs(stream), "newer", None, 10_000, LogsEntriesFilter()))
    return [str(read.entry.id) for read in without_duplicates(page.entries, "newer", {})]


@settings(deadline=None)
@given(held, held, st.booleans(), faults, st.integers(1, 50))
def test_afterwards_the_one_lacks_nothing_of_the_other(
    ones: list[tuple[str, int, int]],
    others: list[tuple[str, int, int]],
    is_file: bool,
    faults: list[Any],
    batch_size: int,
) -> None:
    stream = make_stream()
    # Lines of another program are told apart by their place: there are none yet. And what was late before is not shown.
    others = sorted(run for run in others if run[0])
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        store, there = local_store(root / "a"), (local_store if is_file else object_store)(root / "b")
        fill(store, stream, ones)
        fill(there, stream, others)
        if not is_file:
            faults = [(TimeoutError("no answer"),) if isinstance(fault, int) else fault for fault in faults]
        again = (local_store if is_file else object_store)(root / "b")
        source = archive("a", store)
        target = archive("b", there, with_faults(again, faults), max_export_batch_size=batch_size)
        before = {(writer, number) for writer, first, count in others for number in range(first, first + count)}
        wanted = {(writer, number) for writer, first, count in ones if writer for number in range(first, first + count)}
        foreign = sum(count for writer, _, count in ones if not writer)

        result = copy(source, target, stream, root / "one")

        assert result.copied == len(wanted - before) + foreign
        compared = compare(make_logs(stream), "", [open_source(source), open_source(target)])
        assert compared.children["b"].missing == len(holes(before | wanted))
        assert compared.children["b"].different == compared.children["a"].different == 0
        # By pages, too, each is there once.
        if before | wanted or foreign:
            shown = fetched(target, stream)
            assert len(shown) == len(set(shown)) == len(before | wanted) + foreign
        once_more = copy(source, target, stream, root / "other")
        assert once_more.copied == 0


def holes(events: set[tuple[str, int]]) -> set[tuple[str, int]]:
    """Return what nobody has, before the last that somebody has."""
    last = {writer: max((number for of, number in events if of == writer), default=-1) for writer in WRITERS}
    return {(writer, number) for writer in WRITERS for number in range(last[writer])} - events
