"""Copies streams from a child to another, as `backfill` does."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from uuid import uuid4

from composite_logstore import ChildConfig, ExceptionInfo, LogEvent, Stream
from composite_logstore.parity.backfill import Backfill
from composite_logstore.parity.compare import compare
from composite_logstore.parity.ledger import open_ledger
from composite_logstore.parity.result import Copied
from composite_logstore.parity.scan import open_source
from composite_logstore.parity.sender import Sender
from composite_logstore.testing import make_events, make_logs, make_stream
from tests.artifact_stores import FolderArchive


def copy(source: ChildConfig, target: ChildConfig, stream: Stream, folder: Path) -> Copied:
    """Copy a stream.

    Args:
        source: The child that has its events.
        target: The child that gets them.
        stream: The stream.
        folder: Where the ledger is kept.
    """
    with open_ledger(folder / "ledgers", uuid4(), target.name, time.time() - 3600) as ledger:
        with closing(Sender(target, ledger)) as sender:
            result = Backfill(open_source(source), open_source(target), sender).copy(make_logs(stream), stream)
        ledger.complete()
    return result


def move_there_and_back(
    child: ChildConfig,
    folder: Path,
    more: Callable[[Stream], Sequence[LogEvent]] = lambda stream: [],
    arrive: Callable[[Stream, int], object] = lambda stream, count: None,
) -> None:
    """Check that a stream in an archive is copied to a child, and from there to another archive, as it was.

    Args:
        child: The child.
        folder: Where the archives and the ledgers are.
        more: Returns more events of the stream, besides those that every backend has to keep.
        arrive: Waits until the child has so many events of the stream.
    """
    archive, other = (
        FolderArchive.model_validate({"name": name, "type": "artifact", "root": str(folder / name), "is_file": True})
        for name in ("archive", "other")
    )
    stream = make_stream()
    error = ExceptionInfo("ValueError", "out of range", "Traceback (most recent call last):")
    events = [
        *make_events([f"ours {number}" for number in range(300)], stream, levels=(10, 20, 30, 40, 50)),
        *make_events([f"theirs {number}" for number in range(300)], stream, writer="edcba9876543210", step_nanos=7),
        *make_events(["failed"], stream, 300, exception=error),
        *more(stream),
    ]
    exporter = archive.create_exporter()
    for writer in dict.fromkeys(event.writer for event in events):
        exporter.export([event for event in events if event.writer == writer])
    exporter.close()

    for source, target in ((archive, child), (child, other)):
        assert copy(source, target, stream, folder).copied == len(events)
        if target is child:
            arrive(stream, len(events))
        # What is there already is not copied again.
        assert copy(source, target, stream, folder / "again").copied == 0
    with ExitStack() as opened:
        sources = [opened.enter_context(closing(open_source(one))) for one in (archive, child, other)]
        found = compare(make_logs(stream), "step", sources)
    assert {name: (one.events, one.missing, one.different) for name, one in found.children.items()} == dict.fromkeys(
        ("archive", child.name, "other"), (len(events), 0, 0)
    )
