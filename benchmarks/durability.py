"""What durability costs: `emit` in each mode, ways to bring a line to disk, and draining a million events.

Alone, and beside three threads that compute: whatever gives up the interpreter lock waits for it then. All
that is compared is measured in turn, in one run. It takes about two minutes and 1 GB of disk.

    python -m benchmarks.durability
"""

from __future__ import annotations

import logging
import mmap
import os
import platform
import resource
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean, median, quantiles
from uuid import UUID

from benchmarks.dead_child import FileChildConfig, log, refusing
from benchmarks.scale import micros
from benchmarks.stores import NullChildConfig, composite, emitter, make_records, null_children, register
from composite_logstore import CompositeLogStore
from composite_logstore_otlp.config import OtlpChildConfig

MODES = ("memory", "spill", "write_ahead")
RECORDS = 4_000
LINES = 20_000
EVENTS = 1_000_000
PART = 10_000
STORE = UUID(int=1, version=4)


@contextmanager
def busy(threads: int) -> Iterator[None]:
    """Have threads compute meanwhile."""
    stop = False

    def spin() -> None:
        while not stop:
            sum(range(1000))

    running = [threading.Thread(target=spin) for _ in range(threads)]
    for thread in running:
        thread.start()
    try:
        yield
    finally:
        stop = True
        for thread in running:
            thread.join()


def emits(disk: str, threads: int, rounds: int) -> None:
    stores = {}
    for mode in MODES:
        store = composite(disk, *null_children(3), durability=mode)
        stores[mode] = store, emitter(store)
    times: dict[str, list[float]] = {mode: [] for mode in MODES}
    with busy(threads):
        for _ in range(rounds):
            for mode, (store, emit) in stores.items():
                times[mode].append(micros(emit, make_records(RECORDS)))
                store.flush()
    for mode in MODES:
        # Beside other threads a few long waits are most of the time, so means say more than medians.
        ratio = fmean(times[mode]) / fmean(times["memory"])
        print(f"  {mode:<12} {fmean(times[mode]):6.1f} µs a record, {ratio:.2f} of memory's")


def lines(disk: str, threads: int) -> None:
    """Three ways to bring a line of 400 bytes to disk, so that it survives the death of the process."""
    line = b"x" * 399 + b"\n"
    with open(os.path.join(disk, "mapped"), "w+b") as mapped, open(os.path.join(disk, "written"), "ab") as written:
        mapped.truncate(LINES * len(line))
        os.posix_fallocate(mapped.fileno(), 0, LINES * len(line))
        memory = mmap.mmap(mapped.fileno(), LINES * len(line))
        database = sqlite3.connect(os.path.join(disk, "events.db"), isolation_level=None)
        database.execute("PRAGMA journal_mode=WAL")
        database.execute("PRAGMA synchronous=OFF")
        database.execute("CREATE TABLE events (number INTEGER PRIMARY KEY, line BLOB)")

        def copy(number: int) -> None:
            memory[number * len(line) : (number + 1) * len(line)] = line

        ways: dict[str, Callable[[int], object]] = {
            "copied into a mapped file": copy,
            "appended with write()": lambda number: os.write(written.fileno(), line),
            "inserted into SQLite": lambda number: database.execute("INSERT INTO events VALUES (?, ?)", (number, line)),
        }
        with busy(threads):
            for name, way in ways.items():
                took = []
                for number in range(LINES if not threads else LINES // 20):
                    begin = time.perf_counter()
                    way(number)
                    took.append((time.perf_counter() - begin) * 1e6)
                    if not number % 50:
                        # As a training loop would, it computes in between.
                        sum(range(1000))
                print(
                    f"  {name:<26} mean {sum(took) / len(took):7.1f} µs, median {median(took):5.1f} µs, "
                    f"99.9th percentile {quantiles(took, n=1000)[998]:9.1f} µs"
                )
        memory.close()
        database.close()


def draining_store(disk: str, endpoint: str | None, mode: str) -> CompositeLogStore:
    """The store whose child is dead if it has an endpoint, and else writes to a file."""
    child = (
        OtlpChildConfig(name="child", type="otlp", endpoint=endpoint, max_queue_size=PART)
        if endpoint
        else FileChildConfig(name="child", type="file", path=Path(disk) / "delivered")
    )
    living = NullChildConfig(name="living", type="null")
    store = composite(disk, living, child, durability=mode)
    store.id = STORE
    return store


def leave_behind(disk: str) -> None:
    """Log a million events to a dead child, and die."""
    with refusing() as endpoint:
        store = draining_store(disk, endpoint, "write_ahead")
        log(store, register(store), EVENTS)
        os._exit(0)


def drain(disk: str) -> None:
    """Deliver what the dead process has left."""
    store = draining_store(disk, None, "spill")
    begin = time.perf_counter()
    log(store, register(store), 1)
    sizes: list[float] = []
    while (delivered := store.stats()["child"]["delivered"]) <= EVENTS:
        if delivered > len(sizes) * EVENTS / 10:
            sizes.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        time.sleep(0.02)
    rate = EVENTS / (time.perf_counter() - begin)
    print("  the draining process's memory after each 100,000, in MB: " + " ".join(f"{size:.0f}" for size in sizes))
    print(f"  drained                      {rate:9,.0f} events/s, counting them first included")


def live(disk: str) -> None:
    """Deliver as many as they are logged."""
    store = draining_store(disk, None, "memory")
    origin = register(store)
    begin = time.perf_counter()
    for logged in range(PART, EVENTS + 1, PART):
        log(store, origin, PART)
        while store.stats()["child"]["delivered"] < logged:
            store.flush(blocking=False)
            time.sleep(0.0005)
    print(f"  live delivery to the same    {EVENTS / (time.perf_counter() - begin):9,.0f} events/s")


def main() -> None:
    logging.disable(logging.CRITICAL)
    if len(sys.argv) > 1:
        {"leave_behind": leave_behind, "drain": drain, "live": live}[sys.argv[1]](sys.argv[2])
        return
    print(f"Python {platform.python_version()}, rounds of {RECORDS} records")
    with tempfile.TemporaryDirectory() as disk:
        for threads, rounds in ((0, 25), (3, 25)):
            beside = f"beside {threads} threads that compute" if threads else "alone"
            print(f"emit with three children, {beside}:")
            emits(disk, threads, rounds)
    for threads in (0, 3):
        with tempfile.TemporaryDirectory() as disk:
            print(f"A line of 400 bytes, {f'beside {threads} threads that compute' if threads else 'alone'}:")
            lines(disk, threads)
    print(f"{EVENTS:,} events that a dead process has left:", flush=True)
    with tempfile.TemporaryDirectory() as disk:
        for part in ("leave_behind", "live", "drain"):
            subprocess.run([sys.executable, "-m", "benchmarks.durability", part, disk], check=True)


if __name__ == "__main__":
    main()
