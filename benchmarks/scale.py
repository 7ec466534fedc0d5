"""What `emit` costs: by children, threads, sizes, streams and attributes, and beside ZenML's own log store.

No exporter does anything, so this is the time for which a log call holds up the pipeline, and the workers' share
of the interpreter. What is compared is measured in turn, many times over; medians.
"""

from __future__ import annotations

import io
import logging
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from statistics import median
from typing import Any

from zenml.log_stores import OtelLogStoreConfig
from zenml.log_stores.base_log_store import BaseLogStore

from benchmarks.stores import ENDPOINT, NullOtelLogStore, composite, emitter, make, make_records, null_children

Emit = Callable[[logging.LogRecord], None]


def micros(emit: Emit, records: list[logging.LogRecord]) -> float:
    """Return the microseconds for each record."""
    begin = time.perf_counter()
    for record in records:
        emit(record)
    return (time.perf_counter() - begin) / len(records) * 1e6


def in_turn(works: Mapping[Any, tuple[BaseLogStore, Callable[[], float]]], rounds: int) -> dict[str, float]:
    """Return the median of what each returns; its store is flushed in between, which is not measured."""
    times: dict[Any, list[float]] = {name: [] for name in works}
    for _ in range(rounds + 1):
        for name, (store, work) in works.items():
            times[name].append(work())
            store.flush()
    # The first time, everything is new.
    return {str(name): median(taken[1:]) for name, taken in times.items()}


class Scale:
    """Makes stores, and puts their spools away again."""

    def __init__(self, records: int, rounds: int) -> None:
        self._records = records
        self._rounds = rounds
        self._stack = ExitStack()

    def __enter__(self) -> Scale:
        self._disk = self._stack.enter_context(tempfile.TemporaryDirectory())
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _composite(self, children: int = 3) -> BaseLogStore:
        return composite(self._disk, *null_children(children))

    def beside_stock(self) -> dict[str, float]:
        """The composite with three children, ZenML's own with one exporter, and three of those in a loop."""
        ours = self._composite()
        stocks = [make(NullOtelLogStore, OtelLogStoreConfig(endpoint=ENDPOINT)) for _ in range(3)]
        emits = [emitter(store) for store in stocks]

        def three(record: logging.LogRecord) -> None:
            for emit in emits:
                emit(record)

        works = {
            "composite log store, three children": (ours, emitter(ours)),
            "ZenML, one log store": (stocks[0], emits[0]),
            "ZenML, three log stores": (stocks[1], three),
        }
        return self._measure(works)

    def by_children(self) -> dict[str, float]:
        """One child, three, eight."""
        stores = {number: self._composite(number) for number in (1, 3, 8)}
        return self._measure({number: (store, emitter(store)) for number, store in stores.items()})

    def by_threads(self) -> dict[str, float]:
        """Threads that emit at the same time, as fast as they can: the time from the first record to the last."""

        def work(store: BaseLogStore, threads: int) -> Callable[[], float]:
            emits = [emitter(store) for _ in range(threads)]
            parts = [make_records(self._records // threads) for _ in range(threads)]
            pool = self._stack.enter_context(ThreadPoolExecutor(threads))

            def run() -> float:
                together = threading.Barrier(threads)

                def emit_all(emit: Emit, part: list[logging.LogRecord]) -> tuple[float, float]:
                    together.wait()
                    begin = time.perf_counter()
                    for record in part:
                        emit(record)
                    return begin, time.perf_counter()

                begins, ends = zip(*pool.map(emit_all, emits, parts), strict=True)
                return (max(ends) - min(begins)) / sum(map(len, parts)) * 1e6

            return run

        works = {}
        for threads in (1, 2, 4, 8, 16, 32):
            store = self._composite()
            works[threads] = (store, work(store, threads))
        return in_turn(works, self._rounds)

    def by_size(self) -> dict[str, float]:
        """Messages of so many bytes."""
        works = {}
        for size in (20, 200, 2_000, 65_536):
            store = self._composite()
            works[size] = (store, emitter(store), "x" * (size - 8) + "%d %.2f")
        return self._measure(works)

    def by_streams(self) -> dict[str, float]:
        """So many streams in turn."""
        works = {}
        for streams in (1, 10, 100, 1_000):
            store = self._composite()
            emits = [emitter(store) for _ in range(streams)]

            def emit(record: logging.LogRecord, emits: list[Emit] = emits) -> None:
                emits[record.args[0] % len(emits)](record)  # type: ignore[index, operator]

            works[streams] = (store, emit)
        return self._measure(works)

    def by_attributes(self) -> dict[str, float]:
        """Records with so many attributes of their own."""
        works = {}
        for number in (0, 5, 20, 50):
            store = self._composite()
            extra = {f"attribute-{place}": place * 0.5 for place in range(number)}
            works[number] = (store, emitter(store), "epoch %d, loss %.3f", extra)
        return self._measure(works)

    def progress_bar(self) -> dict[str, float]:
        """A `tqdm` loop that refreshes 1,000 times a second: what each refresh costs in all."""
        from tqdm import tqdm

        def loop(write: Callable[[str], Any]) -> float:
            file = io.StringIO()
            file.write = write  # type: ignore[method-assign, assignment]
            taken = 0.0
            bar = tqdm(total=1_000, file=file, mininterval=0, miniters=1)
            for _ in range(1_000):
                begin = time.perf_counter()
                bar.update()
                taken += time.perf_counter() - begin
                time.sleep(max(0.0, 0.001 - (time.perf_counter() - begin)))
            return taken / 1_000 * 1e6

        def work(store: BaseLogStore) -> Callable[[], float]:
            emit = emitter(store)

            def write(text: str) -> None:
                emit(logging.LogRecord("stderr", logging.ERROR, "", 0, text, (), None))

            return lambda: loop(write)

        everything = self._composite()
        latest = composite(self._disk, *null_children(3, progress="latest"))
        stock = make(NullOtelLogStore, OtelLogStoreConfig(endpoint=ENDPOINT))
        return in_turn(
            {
                "nowhere": (stock, lambda: loop(lambda text: None)),
                "composite log store, three children": (everything, work(everything)),
                "composite log store, three children with 'latest'": (latest, work(latest)),
                "ZenML, one log store": (stock, work(stock)),
            },
            min(self._rounds, 3),
        )

    def _measure(self, works: Mapping[Any, tuple[Any, ...]]) -> dict[str, float]:
        def work(emit: Emit, message: str = "epoch %d, loss %.3f", extra: Mapping[str, Any] | None = None) -> Any:
            # Formatted once for each round: `logging` keeps nothing of it.
            records = make_records(self._records, message, **(extra or {}))
            return lambda: micros(emit, records)

        return in_turn({name: (store, work(*rest)) for name, (store, *rest) in works.items()}, self._rounds)


def run(records: int, rounds: int) -> dict[str, dict[str, float]]:
    """Measure all of it."""
    with Scale(records, rounds) as scale:
        return {
            "emit": scale.beside_stock(),
            "children": scale.by_children(),
            "threads": scale.by_threads(),
            "bytes": scale.by_size(),
            "streams": scale.by_streams(),
            "attributes": scale.by_attributes(),
            "progress bar": scale.progress_bar(),
        }
