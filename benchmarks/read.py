"""What it takes to read from an archive of a million lines, from a file and from a folder of objects.

The lines are what the artifact backend writes; the objects are files in a local folder, so that it is this
code that is measured and no network. It needs 310 MB in the directory for temporary files. What is printed are
medians.

    python -m benchmarks.read
"""

from __future__ import annotations

import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import orjson
from zenml.artifact_stores import BaseArtifactStore
from zenml.models import LogsEntriesFilter, LogsResponse

from composite_logstore import Page, PageRequest
from composite_logstore.testing import make_events, make_logs, make_stream
from composite_logstore_artifact.exporter import ArtifactExporter
from composite_logstore_artifact.reader import ArtifactReader
from tests.artifact_stores import local_store, object_store

ROUNDS = 7
LINES = 1_000_000
BATCH = 5_000
NOTHING = "a text that no line has"


def write(store: BaseArtifactStore) -> LogsResponse:
    """Archive the lines as one stream."""
    exporter = ArtifactExporter(find=lambda stream: store)
    stream = make_stream()
    for first in range(0, LINES, BATCH):
        messages = [f"epoch {number}, loss {1 / (number + 1):.3f}" for number in range(first, first + BATCH)]
        exporter.export(make_events(messages, stream, first))
    return make_logs(stream)


def measure(work: Callable[[], object], rounds: int = ROUNDS) -> float:
    """Return the milliseconds it takes."""
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return median(times) * 1e3


def measure_archive(name: str, store: BaseArtifactStore) -> None:
    logs = write(store)
    reader = ArtifactReader(find=lambda logs: store)

    def read(limit: int, search: str | None = None) -> Page:
        return reader.read(PageRequest(logs, "older", None, limit, LogsEntriesFilter(search=search)))

    assert len(read(50_000).entries) == 50_000
    assert not read(1, NOTHING).entries
    print(f"{name}: the newest 1,000          {measure(lambda: read(1_000)):8.1f} ms")
    print(f"{name}: the newest 50,000         {measure(lambda: read(50_000)):8.1f} ms")
    print(f"{name}: all, for a text not there {measure(lambda: read(1, NOTHING), 3):8.1f} ms")


def main() -> None:
    print(f"Python {platform.python_version()}, orjson {orjson.__version__}, {LINES:,} lines, {ROUNDS} rounds")
    for name, make_store in (("a file ", local_store), ("objects", object_store)):
        with tempfile.TemporaryDirectory(prefix="composite-logstore-read-") as root:
            measure_archive(name, make_store(Path(root)))


if __name__ == "__main__":
    main()
