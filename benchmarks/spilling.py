"""How old an event is when it gets to disk, with `durability: spill` and a backend that refuses it.

Idle; with twice as many processes that compute as there are cores; beside what 300 dead processes left, which is
counted meanwhile; and beside threads of the same process that compute as well. The age is taken just before the line is
copied into the mapped file, from the time at which `emit` returned. It takes two minutes.

    python -m benchmarks.spilling
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import platform
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from shutil import rmtree
from statistics import median

from benchmarks.durability import busy
from benchmarks.stores import NullChildConfig, NullExporter, composite, emitter
from composite_logstore import LogEvent, RetryableError
from composite_logstore.spool import segments
from composite_logstore.spool.folder import Spool
from composite_logstore.spool.format import encode_event
from composite_logstore.testing import make_events

SECONDS = 25
RECORDS_PER_SECOND = 2_000
DEAD = 300
EVENTS_OF_EACH = 300
THREADS = 3


class RefusingExporter(NullExporter):
    def export(self, batch: Sequence[LogEvent]) -> int:
        raise RetryableError("not now")


class RefusingChildConfig(NullChildConfig):
    def create_exporter(self) -> NullExporter:
        return RefusingExporter()


def spin() -> None:
    while True:
        sum(range(1000))


@contextmanager
def computing(number: int) -> Iterator[None]:
    """Have processes compute meanwhile."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=spin, daemon=True) for _ in range(number)]
    for process in processes:
        process.start()
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.join()


def ages(disk: str, dead: int) -> list[float]:
    """Log for some time, and return the age at which each event got to disk, in seconds."""
    found: list[float] = []
    emitted: list[float] = []

    def timed(event: LogEvent, stream: str) -> bytes:
        # If `emit` has not returned yet, the event is on disk before it does.
        number = int(event.message)
        found.append(time.monotonic() - emitted[number] if number < len(emitted) else 0.0)
        return encode_event(event, stream)

    store = composite(disk, RefusingChildConfig(name="refusing", type="null"))
    for number in range(dead):
        writer = f"{number:015x}"
        left = Spool.create(store.writer._spool.component, writer, ["refusing"])  # type: ignore[union-attr]
        for event in make_events([f"event {one}" for one in range(EVENTS_OF_EACH)], writer=writer):
            left.segments.append(event, lambda size: True)
        left.abandon()
    emit = emitter(store)
    segments.encode_event = timed  # type: ignore[attr-defined]
    try:
        end = time.monotonic() + SECONDS
        while (now := time.monotonic()) < end:
            emit(logging.LogRecord("train", 20, "/code/train.py", 42, "%d", (len(emitted),), None, "fit"))
            emitted.append(time.monotonic())
            time.sleep(max(0.0, now + 1 / RECORDS_PER_SECOND - time.monotonic()))
        time.sleep(1.5)
    finally:
        segments.encode_event = encode_event  # type: ignore[attr-defined]
    return found


def measure(name: str, dead: int, threads: int) -> None:
    """Say how old events got, in a process of its own."""
    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as disk:
        with busy(threads):
            found = sorted(ages(disk, dead))
        print(
            f"  {name:<48} {len(found):7,} events, age in s: median {median(found):.2f}, "
            f"99.9 % {found[len(found) * 999 // 1000]:.2f}, highest {found[-1]:.2f}",
            flush=True,
        )
        # What it has not delivered is nobody's.
        rmtree(disk, ignore_errors=True)
        os._exit(0)


def main() -> None:
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    rows = [
        ("idle", 0, 0, 0),
        ("all cores busy", 2 * (os.cpu_count() or 1), 0, 0),
        (f"all cores busy, {DEAD} dead folders", 2 * (os.cpu_count() or 1), DEAD, 0),
        (f"the same, and {THREADS} threads that compute", 2 * (os.cpu_count() or 1), DEAD, THREADS),
    ]
    context = multiprocessing.get_context("spawn")
    for name, processes, dead, threads in rows:
        with computing(processes):
            process = context.Process(target=measure, args=(name, dead, threads))
            process.start()
            process.join()


if __name__ == "__main__":
    main()
