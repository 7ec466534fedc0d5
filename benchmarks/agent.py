"""What an agent delivers for the processes of a machine, and what it takes while they log nothing.

Eight processes log to three children, whose exporters do nothing, with `delivery: agent`. The agent has one core, and
they have the others. Then 200 processes log nothing any more. At last processes are killed, and the time is measured
until their last words have been exported to a file. It takes about two minutes.

    python -m benchmarks.agent
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import platform
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any
from uuid import uuid4

from benchmarks.backends import on_cores
from benchmarks.dead_child import FileChildConfig
from benchmarks.stores import emitter, make, make_records, null_children
from composite_logstore import CompositeLogStore, CompositeLogStoreConfig
from composite_logstore.operations.agent import Agent
from composite_logstore.operations.inventory import LogStore

PROCESSES = 8
RECORDS = 50_000
RATE = 6_500
"""How many records each of the processes logs in a second: together more than the agent has to deliver."""
IDLE = 200
SECONDS = 20
KILLED = 5

_fork = multiprocessing.get_context("fork")
others = set(range(1, os.cpu_count() or 1))


class Place:
    """A log store in which processes log, and its agent."""

    def __init__(self, disk: str, *children: Any, durability: str = "write_ahead") -> None:
        self.id = uuid4()
        self.children = children
        self.config = CompositeLogStoreConfig(
            primary=children[0].name,
            children=list(children),
            spool_directory=f"{disk}/spool",
            durability=durability,
            delivery="agent",
        )
        agents: Any = import_module("composite_logstore.operations.agent")
        agents.registered = lambda: [LogStore(self.id, "logs", self.config)]
        agents.check_server = lambda: None
        self.agent: Agent = agents.Agent(f"{disk}/spool", warn=print)

    def process(self, log: Callable[[Callable[[logging.LogRecord], None]], None]) -> Any:
        """Start a process that logs, and waits to be killed."""

        def run() -> None:
            with on_cores(others):
                log(emitter(self.store()))
                threading.Event().wait()

        process = _fork.Process(target=run, daemon=True)
        process.start()
        return process

    def store(self) -> CompositeLogStore:
        """Return the log store as a process has it."""
        store = make(CompositeLogStore, self.config)
        assert isinstance(store, CompositeLogStore)
        store.id = self.id
        return store

    def delivered(self) -> int:
        """Return how many events the child has that has the fewest."""
        counts = [one.outcomes["delivered"] for one in self.agent.delivered]
        return min(counts) if len(counts) == len(self.children) else 0

    def run(self, is_over: Callable[[], bool], seconds: float = 300) -> tuple[float, float]:
        """Run the agent. Returns how many seconds it took, and how many of processor time."""
        ended = threading.Event()

        def watch() -> None:
            end = time.monotonic() + seconds
            while not is_over() and time.monotonic() < end:
                time.sleep(0.1)
            ended.set()

        threading.Thread(target=watch, daemon=True).start()
        with on_cores({0}):
            begin, used = time.perf_counter(), time.process_time()
            self.agent.run(ended)
            return time.perf_counter() - begin, time.process_time() - used


def megabytes() -> float:
    """Return how much memory this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


@contextmanager
def place(*children: Any, **settings: str) -> Iterator[Place]:
    with tempfile.TemporaryDirectory() as disk:
        one = Place(disk, *children, **settings)
        one.agent.begin()
        yield one
        one.agent.end()


def log_steadily(emit: Callable[[logging.LogRecord], None]) -> None:
    begin = time.perf_counter()
    for first in range(0, RECORDS, 100):
        for record in make_records(100):
            emit(record)
        time.sleep(max(0.0, first / RATE - (time.perf_counter() - begin)))


def delivery() -> None:
    with place(*null_children(3)) as one:
        processes = [one.process(log_steadily) for _ in range(PROCESSES)]
        sizes: list[float] = []

        def is_over() -> bool:
            sizes.append(megabytes())
            return one.delivered() >= PROCESSES * RECORDS

        seconds, used = one.run(is_over)
        number = one.delivered()
        print(f"{PROCESSES} processes, three children, {number:,} records:")
        print(f"  in {seconds:.1f} s, {number / seconds:,.0f} records/s")
        print(f"  {used:.1f} s of processor time: {number / used:,.0f} records/s on one core")
        print("  memory in MB: " + " ".join(f"{size:.0f}" for size in sizes[:: max(1, len(sizes) // 10)]))
        for process in processes:
            process.kill()
            process.join()


def idle() -> None:
    with place(*null_children(3)) as one:
        processes = [one.process(lambda emit: emit(make_records(1)[0])) for _ in range(IDLE)]
        one.run(lambda: one.delivered() >= IDLE)
        one.run(lambda: False, 5)
        seconds, used = one.run(lambda: False, SECONDS)
        print(f"{IDLE} idle processes: {used / seconds:.2%} of a core")
        for process in processes:
            process.kill()
            process.join()


def last_words() -> None:
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{number}" for number in range(3)]
        children = [FileChildConfig(name=path.name, type="file", path=path) for path in paths]
        with place(*children) as one:
            taken = []
            for number in range(KILLED):
                text = f"last words of {number}"

                def log(emit: Callable[[logging.LogRecord], None], text: str = text) -> None:
                    for record in make_records(100):
                        emit(record)
                        time.sleep(0.01)
                    emit(make_records(1, text + " %d %f")[0])
                    os.kill(os.getpid(), signal.SIGKILL)

                process = one.process(log)
                died: list[float] = []

                def has_arrived(process: Any = process, died: list[float] = died, text: str = text) -> bool:
                    if not died and not process.is_alive():
                        died.append(time.monotonic())
                    return bool(died) and all(text in path.read_text() for path in paths if path.exists())

                one.run(has_arrived, 60)
                taken.append(time.monotonic() - died[0])
            print(f"last words after kill -9, in three files: {median(taken):.2f} s, at most {max(taken):.2f} s")


def main() -> None:
    logging.disable(logging.CRITICAL)
    print(f"Python {platform.python_version()}")
    delivery()
    idle()
    last_words()


if __name__ == "__main__":
    main()
