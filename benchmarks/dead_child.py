"""What a dead backend costs: the step's end, other threads, the other children, and memory.

The same backend, first one that refuses connections and then one that takes them and never answers, is
given to a composite log store and to ZenML's own OtelLogStore, in one run. It takes about three minutes,
nearly all of which the latter waits.

    python -m benchmarks.dead_child
"""

from __future__ import annotations

import logging
import platform
import resource
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median, quantiles
from typing import Any
from uuid import uuid4

from zenml.log_stores import OtelLogStore, OtelLogStoreConfig
from zenml.log_stores.base_log_store import BaseLogStore

from benchmarks.stores import NullChildConfig, composite, make, register
from composite_logstore import LogEvent
from composite_logstore_otlp.config import OtlpChildConfig

RECORDS = 1_000
ROUNDS = 5
EVENTS = 300_000
PART = 10_000


class FileExporter:
    """A sibling with something to do: it writes each event to a file."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a")

    def export(self, batch: list[LogEvent]) -> int:
        self._file.writelines(f"{event.uid} {event.time_unix_nano} {event.message}\n" for event in batch)
        self._file.flush()
        return 0

    def end_stream(self, stream: Any) -> None:
        pass

    def close(self) -> None:
        self._file.close()


class FileChildConfig(NullChildConfig):
    path: Path

    def create_exporter(self) -> Any:
        return FileExporter(self.path)


@contextmanager
def refusing() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    yield f"http://127.0.0.1:{port}"


@contextmanager
def silent() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0), backlog=128) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def log(store: BaseLogStore, origin: Any, records: int) -> None:
    for number in range(records):
        store.emit(origin, logging.LogRecord("train", 20, "/code/train.py", 42, "step %d", (number,), None, "fit"))


def seconds(run: Callable[[], None]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


class OtherThread:
    """A thread that logs while the first one ends its step."""

    def __init__(self, store: BaseLogStore) -> None:
        self._store = store
        self._origin = register(store)
        self._stop = threading.Event()
        self.times: list[float] = []
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._stop.wait(0.0005):
            self.times.append(seconds(lambda: log(self._store, self._origin, 1)))

    def __enter__(self) -> OtherThread:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def steps_end(kind: str, store: BaseLogStore, steps: int) -> None:
    for step in range(steps):
        origin = register(store)
        log(store, origin, RECORDS)
        with OtherThread(store) as other:
            # The other thread's stream is open, so the last origin's flush is called for here.
            took = seconds(lambda: (store.deregister_origin(origin), store.flush())[0])  # noqa: B023
        line = f"  {kind:<10} step {step + 1}: its end {took:6.2f} s"
        if other.times:
            cuts = [cut * 1e3 for cut in quantiles(other.times * 2, n=1000)]
            line += (
                f"; another thread's emit meanwhile p99 {cuts[989]:.3f} ms, p99.9 {cuts[998]:.3f} ms, "
                f"longest {max(other.times) * 1e3:.1f} ms"
            )
        print(line)


def ends() -> None:
    for name, backend in (("refuses connections", refusing), ("never answers", silent)):
        print(f"A backend that {name}")
        with backend() as endpoint, tempfile.TemporaryDirectory() as disk:
            dead = OtlpChildConfig(name="dead", type="otlp", endpoint=endpoint)
            steps_end("composite", composite(disk, NullChildConfig(name="living", type="null"), dead), steps=4)
            steps_end("stock", make(OtelLogStore, OtelLogStoreConfig(endpoint=f"{endpoint}/v1/logs")), steps=1)


def rate(folder: str, with_dead: bool) -> float:
    """Return how many events a second two healthy children take."""
    with refusing() as endpoint:
        children: list[Any] = [
            FileChildConfig(name=name, type="file", path=Path(folder) / uuid4().hex) for name in ("a", "b")
        ]
        if with_dead:
            children.append(OtlpChildConfig(name="dead", type="otlp", endpoint=endpoint))
        store = composite(folder, *children)
        origin = register(store)
        begin = time.perf_counter()
        for logged in range(PART, EVENTS + 1, PART):
            log(store, origin, PART)
            while any(store.stats()[name]["delivered"] < logged for name in ("a", "b")):
                store.flush(blocking=False)
                time.sleep(0.0005)
        return EVENTS / (time.perf_counter() - begin)


def siblings() -> None:
    with tempfile.TemporaryDirectory() as folder:
        pairs = [(rate(folder, False), rate(folder, True)) for _ in range(ROUNDS)]
    print(
        f"Siblings of a dead child: {median(b for _, b in pairs):,.0f} events/s, without it "
        f"{median(a for a, _ in pairs):,.0f}; ratio {median(b / a for a, b in pairs):.2f}"
    )


def memory(durability: str) -> None:
    with refusing() as endpoint, tempfile.TemporaryDirectory() as disk:
        dead = OtlpChildConfig(name="dead", type="otlp", endpoint=endpoint)
        store = composite(disk, NullChildConfig(name="living", type="null"), dead, durability=durability)
        origin = register(store)
        sizes = []
        for _ in range(10):
            log(store, origin, 100_000)
            store.flush(blocking=False)
            sizes.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        print(f"A million events with one dead child, {durability}: the process's memory after each 100,000, in MB:")
        print("  " + " ".join(f"{size:.0f}" for size in sizes))
        print(f"  {store.stats()['dead']['dropped']:,} dropped, {store.stats()['dead']['pending']:,} pending")


def main() -> None:
    logging.disable(logging.CRITICAL)
    print(f"Python {platform.python_version()}")
    memory("memory")
    memory("spill")
    siblings()
    ends()


if __name__ == "__main__":
    main()
