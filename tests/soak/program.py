"""The program of the soak: it logs in threads and in forked workers until its standard input ends.

`python -m tests.soak.program <settings>` prints `{"workers": [their process ids]}` when all of them log, and at its end
how many events each source has logged, and how the children stand.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import multiprocessing
import os
import random
import sys
import threading
import time
from collections.abc import Callable, MutableSequence, Sequence
from itertools import count
from typing import Any

import pytest

from composite_logstore import CompositeHandler, LogEvent
from composite_logstore.capture.outbox import Outbox
from composite_logstore.delivery.writer import Writer
from composite_logstore_otlp.exporter import OtlpExporter

WORKERS = 4
THREADS = 3
PAUSE_SECONDS = 0.05
"""How long a source waits after an event, on average."""
RECOVERY_SECONDS = 60.0
"""How long the backlog may take when all backends are well."""
ENDING_SECONDS = 3 * RECOVERY_SECONDS
"""How much longer than it is to log the program may take from its beginning to its end."""

_fork = multiprocessing.get_context("fork")


class Source:
    """Logs events with numbers, so that each of them can be looked for."""

    def __init__(self, name: str, handler: CompositeHandler) -> None:
        self.number = 0
        self.name = name
        self._logger = logging.Logger("train")
        self._logger.addHandler(handler)
        self._rand = random.Random(name)

    def log(self) -> None:
        size = 20_000 if self._rand.random() < 0.01 else self._rand.randrange(500)
        self._logger.info("%s/%d %s", self.name, self.number, "x" * size)
        # Its handler has returned.
        self.number += 1

    def change(self, handler: CompositeHandler) -> None:
        (old,) = self._logger.handlers
        self._logger.addHandler(handler)
        self._logger.removeHandler(old)

    def pause(self) -> None:
        time.sleep(self._rand.uniform(0, 2 * PAUSE_SECONDS))


def main(settings: dict[str, Any]) -> None:
    """Log, and end when nobody holds the standard input any more."""
    # What hangs says where.
    faulthandler.dump_traceback_later(settings["seconds"] + ENDING_SECONDS, exit=True)
    # What ZenML prints is not among the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if settings["leak"]:
        LEAKS[settings["leak"]]()
    handler = _open(settings)
    is_over = threading.Event()
    logged = _fork.Array("L", WORKERS, lock=False)
    stop = _fork.Event()
    workers = [
        _fork.Process(target=_work, args=(number, Source(f"worker {number}", handler), logged, stop))
        for number in range(WORKERS)
    ]
    # The first event starts the handler's threads; the workers are forked beside them.
    sources = [Source(f"thread {number}", handler) for number in range(THREADS)]
    for source in sources:
        source.log()
    for worker in workers:
        worker.start()

    def run(source: Source) -> None:
        while not is_over.is_set():
            source.log()
            source.pause()

    threads = [threading.Thread(target=run, args=(source,)) for source in sources[1:]]
    threads.append(threading.Thread(target=_come_and_go, args=(sources[0], settings, handler, is_over)))
    for thread in threads:
        thread.start()
    print(json.dumps({"workers": [worker.pid for worker in workers]}), file=answers, flush=True)
    sys.stdin.read()
    stop.set()
    for worker in workers:
        worker.join()
    is_over.set()
    for thread in threads:
        thread.join()
    counts = {source.name: source.number for source in sources}
    counts |= {f"worker {number}": logged[number] for number in range(WORKERS)}
    counts |= {f"passing {number}": 1 for number in range(_passed)}
    end = time.monotonic() + RECOVERY_SECONDS
    while any(child["pending"] for child in handler.stats().values()) and time.monotonic() < end:
        time.sleep(0.05)
    print(json.dumps({"logged": counts, "stats": handler.stats()}), file=answers, flush=True)


def _open(settings: dict[str, Any]) -> CompositeHandler:
    return CompositeHandler(
        "soak", settings["children"], durability="spill", spool_directory=settings["spool"], flush_limit_millis=100
    )


def _work(number: int, source: Source, logged: MutableSequence[int], stop: Any) -> None:
    parent = os.getppid()
    while not stop.is_set() and os.getppid() == parent:
        source.log()
        logged[number] = source.number
        source.pause()


_passed = 0


def _come_and_go(source: Source, settings: dict[str, Any], handler: CompositeHandler, is_over: threading.Event) -> None:
    """Log with a new handler, and fork a process that logs one event, every second."""
    global _passed
    begin = time.monotonic()
    last = handler
    for second in count(1):
        while time.monotonic() < begin + second:
            if is_over.is_set():
                return
            source.log()
            source.pause()
        new = _open(settings)
        source.change(new)
        if last is not handler:
            last.close()
        last = new
        process = os.fork()
        if not process:
            try:
                Source(f"passing {_passed}", handler).log()
            finally:
                os._exit(0)
        os.waitpid(process, 0)
        _passed += 1


# What the soak is to find


def _keep_what_is_exported() -> None:
    kept: list[Any] = []
    _at_each_export(lambda batch: kept.append([event.message + "." for event in batch]))


def _leave_threads() -> None:
    for_ever = threading.Event()
    _at_each_export(lambda _: threading.Thread(target=for_ever.wait, daemon=True).start())


def _leave_descriptors() -> None:
    _at_each_export(lambda _: os.dup(0))


def _at_each_export(leak: Callable[[Sequence[LogEvent]], object]) -> None:
    export = OtlpExporter.export

    def leaking(exporter: OtlpExporter, batch: Sequence[LogEvent]) -> int:
        leak(batch)
        return export(exporter, batch)

    pytest.MonkeyPatch().setattr(OtlpExporter, "export", leaking)


def _keep_what_workers_send() -> None:
    kept: list[bytearray] = []
    send = Outbox.send

    def leaking(outbox: Outbox, *arguments: Any) -> None:
        kept.append(bytearray(b"x" * 20_000))
        send(outbox, *arguments)

    pytest.MonkeyPatch().setattr(Outbox, "send", leaking)


def _lose_events() -> None:
    append = Writer.append

    def losing(writer: Writer, *arguments: Any) -> None:
        if random.random() > 0.001:
            append(writer, *arguments)

    pytest.MonkeyPatch().setattr(Writer, "append", losing)


LEAKS: dict[str, Callable[[], None]] = {
    "memory of the parent": _keep_what_is_exported,
    "memory of workers": _keep_what_workers_send,
    "threads": _leave_threads,
    "descriptors": _leave_descriptors,
    "events": _lose_events,
}
"""Defects that can be planted, by what leaks away."""


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
