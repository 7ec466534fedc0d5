"""What logging costs the process that trains, with and without an agent, and where that time goes.

First one process at a time logs to three children whose exporters do nothing: with a log store that does nothing, with
ZenML's own, and with ours, which delivers by itself or has an agent do it. The agent has the first core, and the
process has the others. Then each step of a record's way to the agent is measured by itself. It takes two minutes.

    python -m benchmarks.hot_path
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import platform
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import count, repeat
from operator import methodcaller
from statistics import quantiles
from typing import Any

from benchmarks.agent import Place, others, place
from benchmarks.backends import on_cores
from benchmarks.contenders import Contender, measure
from benchmarks.durability import busy
from benchmarks.stores import (
    ENDPOINT,
    NullLogStore,
    NullOtelLogStore,
    composite,
    emitter,
    make,
    make_records,
    null_children,
    register,
)
from benchmarks.training import calibrated, loop_seconds, quiet_console, slowdown, zenml_context
from composite_logstore.capture.record import note, numbered
from composite_logstore.delivery.journal import MOST_CAPTURED
from composite_logstore.spool.format import encode_event

NULL, STOCK = "a log store that does nothing", "ZenML, one log store"
PROCESS, AGENT = "three children, `delivery: process`", "three children, `delivery: agent`"
RECORDS = 50_000
ITERATIONS = 50_000
THREADS = 3
STEPS = 40 * MOST_CAPTURED

_fork = multiprocessing.get_context("fork")


def processor_micros(store: Any) -> float:
    """Return what the process uses for each record until all are delivered, in µs."""
    micros: float = measure(Contender(emitter(store), store.flush), RECORDS)["cpu_micros"]
    return micros


def loop_slowdown(store: Any) -> float:
    """Return how much longer a loop takes that logs 10,000 records a second, as a share."""
    quiet_console()
    size = calibrated()
    with zenml_context(store):
        return slowdown(partial(loop_seconds, size), ITERATIONS, True, store.flush)


def slowest_millis(store: Any) -> float:
    """Return the 99.9th percentile of `emit` beside three threads that compute, in milliseconds."""
    emit = emitter(store)
    times = []
    with busy(THREADS):
        for record in make_records(RECORDS // 5):
            begin = time.perf_counter()
            emit(record)
            times.append(time.perf_counter() - begin)
            # As a training loop would, it computes in between.
            sum(range(100))
    return quantiles(times, n=1000)[998] * 1e3


MEASURES: tuple[Callable[[Any], float], ...] = (processor_micros, loop_slowdown, slowest_millis)


def in_process(one: Place | None, build: Callable[[], Any], measured: Callable[[Any], float]) -> float:
    """Measure in a process of its own, beside the agent if there is one."""
    here, there = _fork.Pipe()

    def run() -> None:
        logging.disable(logging.NOTSET)
        with on_cores(others):
            there.send(measured(build()))
        os._exit(0)

    process = _fork.Process(target=run)
    process.start()
    try:
        if one is not None:
            one.run(here.poll)
        found: float = here.recv()
    finally:
        process.kill()
        process.join()
    return found


def costs(name: str) -> list[float]:
    """Return the three measures of one log store."""
    from zenml.log_stores import OtelLogStoreConfig

    with tempfile.TemporaryDirectory() as disk, place(*null_children(3), durability="spill") as one:
        builds: dict[str, Callable[[], Any]] = {
            NULL: lambda: make(NullLogStore, None),
            STOCK: lambda: make(NullOtelLogStore, OtelLogStoreConfig(endpoint=ENDPOINT)),
            PROCESS: lambda: composite(disk, *null_children(3), durability="spill", delivery="process"),
            AGENT: one.store,
        }
        return [in_process(one if name == AGENT else None, builds[name], measured) for measured in MEASURES]


def steps() -> dict[str, float]:
    """Return how many µs each step of a record's way to the agent takes."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as disk:
        store = composite(disk, *null_children(3), durability="spill", delivery="agent")
        stream = register(store).stream
        journal: Any = store.writer._journal
        spent: Counter[str] = Counter()

        def timed(name: str, step: Callable[[], Any]) -> Any:
            begin = time.thread_time()
            result = step()
            spent[name] += (time.thread_time() - begin) / STEPS * 1e6
            return result

        # Under the lock, nobody else numbers or writes meanwhile.
        with journal.lock:
            # Twice, since the memory is new the first time.
            for _ in range(2):
                spent.clear()
                for _ in range(STEPS // MOST_CAPTURED):
                    some = make_records(MOST_CAPTURED)
                    timed("format", partial(list, map(methodcaller("getMessage"), some)))
                    notes = timed("note", partial(list, map(note, some)))
                    numbering = map(numbered, notes, repeat(stream), repeat("0" * 15), count(), count())
                    events = timed("number", partial(list, numbering))
                    timed("encode", partial(list, map(encode_event, events, repeat(str(stream.id)))))
                    journal._captured.extend((stream, said) for said in notes)
                    timed("hand out", journal._hand_out)
                    timed("write", journal.spilling.write)
    return {
        "`note`: the formatted message": spent["format"],
        "`note`: all other values": spent["note"] - spent["format"],
        "numbering: the event": spent["number"],
        "numbering: queues, counts, bytes in memory": spent["hand out"] - spent["number"],
        "writing: JSON and checksum": spent["encode"],
        "writing: the copy into the segment, and what it has": spent["write"] - spent["encode"],
        "in all": spent["note"] + spent["hand out"] + spent["write"],
    }


def main() -> None:
    logging.disable(logging.CRITICAL)
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print("|  | processor time a record, µs | slowdown of a loop | `emit` beside three threads, 99.9 %, ms |")
    print("|---|---|---|---|")
    for name in (NULL, STOCK, PROCESS, AGENT):
        used, slower, slowest = costs(name)
        print(f"| {name} | {used:.1f} | {slower:.0%} | {slowest:.1f} |", flush=True)
    print("\n| step | µs a record |\n|---|---|")
    for step, micros in steps().items():
        print(f"| {step} | {micros:.1f} |", flush=True)
    # What it has not delivered is nobody's.
    os._exit(0)


if __name__ == "__main__":
    main()
