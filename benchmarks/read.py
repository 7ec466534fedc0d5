"""What it takes to read from an archive, and to write one to S3, beside ZenML's own log store.

`file`: a million lines in a local file, and the same lines ten times over; 3.4 GB in the directory for temporary
files. `s3`: a million lines in a real S3 server on this machine. `hour`: what an hour of 100 lines/s takes to write
there. Ours is the log store as it is, in simulated time. ZenML's own is given what its batches would be, one after the
other, for as long as `STOCK_SECONDS`. Without an argument, all of them. Times are medians.

    python -m benchmarks.read [file | s3 | hour]
"""

from __future__ import annotations

import logging
import platform
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

import orjson
from zenml.artifact_stores import BaseArtifactStore
from zenml.constants import LOGS_OTEL_SCHEDULE_DELAY_MILLIS
from zenml.enums import LoggingLevels
from zenml.log_stores.artifact.artifact_log_exporter import ArtifactLogExporter
from zenml.log_stores.artifact.artifact_log_store import fetch_log_records, prepare_logs_uri
from zenml.models import LogsResponse

from composite_logstore import Page, PageRequest, Stream, log_store
from composite_logstore.testing import SimulatedClock, make_events, make_logs, make_stream
from composite_logstore.zenml import LogEntry, LogsEntriesFilter
from composite_logstore_artifact import exporter as exporter_module
from composite_logstore_artifact.config import ArtifactChildConfig
from composite_logstore_artifact.exporter import ArtifactExporter
from composite_logstore_artifact.objects import ObjectName
from composite_logstore_artifact.reader import ArtifactReader
from tests.artifact_stores import local_store
from tests.servers.s3 import s3_server
from tests.simulation import make_store

ROUNDS = 7
LINES = 1_000_000
BATCH = 10_000
NOTHING = "a text that no line has"
SECONDS, RATE = 3_600, 100
STOCK_SECONDS = 300


def messages(first: int, count: int) -> list[str]:
    return [f"epoch {number}, loss {1 / (number + 1):.3f}" for number in range(first, first + count)]


def write(store: BaseArtifactStore, lines: int, batch: int) -> Stream:
    """Archive the lines as one stream."""
    exporter = ArtifactExporter(find=lambda stream: store)
    stream = make_stream()
    for first in range(0, lines, batch):
        exporter.export(make_events(messages(first, batch), stream, first))
    exporter.end_stream(stream)
    exporter.close()
    return stream


def measure(work: Callable[[], object], rounds: int = ROUNDS) -> float:
    """Return the milliseconds it takes."""
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return median(times) * 1e3


def show(what: str, figure: str) -> None:
    print(f"{what:60} {figure}", flush=True)


class Archive:
    """A stream to read."""

    def __init__(self, store: BaseArtifactStore, logs: LogsResponse) -> None:
        self.reader = ArtifactReader(find=lambda logs: store)
        self.logs = logs

    def read(self, limit: int, token: str | None = None, **filters: Any) -> Page:
        return self.reader.read(PageRequest(self.logs, "older", token, limit, LogsEntriesFilter(**filters)))

    def search(self, **filters: Any) -> None:
        """Look through all of it, for something that is not there."""
        page = Page(older="")
        while page.older is not None:
            page = self.read(1_000, page.older or None, **filters)
            assert not page.entries


def measure_files() -> None:
    with tempfile.TemporaryDirectory(prefix="composite-logstore-read-") as root:
        store = local_store(Path(root))
        small = Archive(store, make_logs(write(store, LINES, BATCH)))
        large = Archive(store, make_logs(make_stream()))
        content = Path(prepare_logs_uri(store, small.logs.id))
        tenfold = Path(prepare_logs_uri(store, large.logs.id))
        with tenfold.open("wb") as file:
            for _ in range(10):
                with content.open("rb") as one:
                    shutil.copyfileobj(one, file, 8 * 1024 * 1024)
        size = content.stat().st_size
        show("bytes of 1,000,000 lines", f"{size / 1e6:.0f} MB")
        show("its index", f"{Path(f'{content}.index').stat().st_size / 1e3:.1f} kB")
        times: dict[str, float] = {}
        for name, archive in (("1,000,000", small), ("10,000,000", large)):
            assert len(archive.read(1_000).entries) == 1_000
            times[name] = measure(lambda archive=archive: archive.read(1_000), 21)
            show(f"{name}: the newest 1,000", f"{times[name]:.1f} ms")
        show("their ratio", f"{times['10,000,000'] / times['1,000,000']:.2f}")
        stock = measure(lambda: fetch_log_records(store, str(content), 1_000), 21)
        show("1,000,000: the oldest 1,000, ZenML's own reader", f"{stock:.1f} ms")
        show("1,000,000: the newest 50,000", f"{measure(lambda: small.read(50_000), 3):.0f} ms")
        searched = measure(lambda: small.search(search=NOTHING), 5)
        show("1,000,000: all, for a text not there", f"{searched:.0f} ms, {size / searched / 1e3:.0f} MB/s")
        page = measure(lambda: large.read(1_000, search=NOTHING), 5)
        show("10,000,000: one page of that, 128 MB", f"{page:.0f} ms")
        show("1,000,000: for a level not there", f"{measure(lambda: small.search(level='ERROR'), 3):.1f} ms")


class Requests:
    """Counts what goes to S3 and comes back."""

    def __init__(self, store: Any) -> None:
        self.kinds: Counter[str] = Counter()
        self.sent = self.received = self.merged = 0
        store.filesystem.connect()
        events = store.filesystem.s3.meta.events
        events.register("before-send.s3", self._sent)
        events.register("after-call.s3", self._received)

    def _sent(self, request: Any, **_: Any) -> None:
        self.kinds[request.method] += 1
        size = int(request.headers.get("Content-Length", 0))
        name = ObjectName.parse(request.url.rpartition("/")[2])
        if name is not None and name.size is not None:
            self.merged += size
        else:
            self.sent += size

    def _received(self, parsed: dict[str, Any], model: Any, **_: Any) -> None:
        # A question for an object's size is answered with it, and without the object.
        if model.name == "GetObject":
            self.received += int(parsed.get("ContentLength", 0))

    def __str__(self) -> str:
        merged = f" and {self.merged / 1e6:.1f} MB again" if self.merged else ""
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in self.kinds.most_common())
        return (
            f"{self.kinds.total():,} requests ({kinds}), {self.sent / 1e6:.1f} MB sent{merged}, "
            f"{self.received / 1e6:.1f} MB received"
        )


def measure_s3() -> None:
    with s3_server() as server:
        logs = make_logs(write(server.artifact_store(), LINES, BATCH))
        for what, read in (
            ("the newest 1,000", lambda archive: archive.read(1_000)),
            ("for a level not there", lambda archive: archive.search(level="ERROR")),
        ):
            store = server.artifact_store()
            archive = Archive(store, logs)
            requests = Requests(store)
            read(archive)
            counted = str(requests)
            show(f"S3, 1,000,000: {what}", f"{measure(lambda a=archive, r=read: r(a)):.0f} ms, {counted}")


def measure_hour() -> None:
    with s3_server() as server:
        store = server.artifact_store()
        requests = Requests(store)
        stream = log_for_an_hour(store)
        uri = prepare_logs_uri(store, stream.id)
        objects = server.artifact_store().listdir(uri)
        size = sum(server.artifact_store().size(f"{uri}/{name}") for name in objects)
        show("an hour of 100 lines/s", f"{size / 1e6:.1f} MB in {len(objects)} objects")
        show("what it took", str(requests))
        show("bytes sent, but for merging", f"{requests.sent / size:.3f} of its size")
        measure_stock(server.artifact_store())


def log_for_an_hour(store: BaseArtifactStore) -> Stream:
    """Log as a step does, in simulated time, with the settings as they are."""
    exporter_module.find_named = lambda name: store
    log_store._active_artifact_store_id = lambda: None
    with SimulatedClock() as clock:
        composite = make_store(ArtifactChildConfig(name="archive", type="artifact", artifact_store="s3"))
        logs = make_logs(make_stream(), composite.id)
        origin = composite.register_origin("step", logs, {})
        for second in range(SECONDS):
            for text in messages(second * RATE, RATE):
                composite.emit(origin, logging.LogRecord("train", 20, "/code/train.py", 42, text, (), None, "fit"))
            clock.advance(1)
        composite.deregister_origin(origin)
        composite.writer.close(3)
        # The threads that merge are real ones.
        clock.wait_until(lambda: all(worker.has_ended for worker in composite.writer._workers), 3)
        stats = composite.stats()["archive"]
        assert stats["delivered"] == stats["accepted"] == SECONDS * RATE
    return origin.stream


def measure_stock(store: Any) -> None:
    requests, size, begin = Requests(store), 0, time.monotonic()
    stock = ArtifactLogExporter(store)
    uri = prepare_logs_uri(store, make_stream().id)
    step = LOGS_OTEL_SCHEDULE_DELAY_MILLIS // 1_000
    for second in range(0, SECONDS, step):
        now = datetime.now(timezone.utc)
        batch = [
            LogEntry(
                message=text,
                name="unknown",
                level=LoggingLevels.INFO,
                timestamp=now,
                filename="/code/train.py",
                lineno=42,
                module="fit",
            ).model_dump_json(exclude_none=True)
            for text in messages(second * RATE, step * RATE)
        ]
        size += sum(len(line) + 1 for line in batch)
        stock._write(batch, uri)
        # It writes anew what it has written, or has it copied: each of its exports is dearer than the last.
        if time.monotonic() - begin > STOCK_SECONDS:
            break
    minutes = (second + step) / 60
    show("ZenML's own store, minutes of that hour that it was given", f"{minutes:.1f}")
    show("ZenML's own store, for these", f"{size / 1e6:.1f} MB: {requests}")


def main() -> None:
    print(f"Python {platform.python_version()}, orjson {orjson.__version__}, {ROUNDS} rounds")
    measures = {"file": measure_files, "s3": measure_s3, "hour": measure_hour}
    for name in sys.argv[1:] or measures:
        measures[name]()


if __name__ == "__main__":
    main()
