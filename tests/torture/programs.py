"""What processes do while they are tortured: they log, fork, get new settings and new times, and end somehow."""

from __future__ import annotations

import copy
import faulthandler
import json
import logging
import multiprocessing
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from zenml.artifact_stores import BaseArtifactStore, LocalArtifactStore

from composite_logstore import CompositeHandler
from tests.artifact_stores import Faulty, FolderArchive
from tests.crashing import LogStoreSettings, Pipeline, message
from tests.properties.planted import BUGS, DURABILITY_BUGS
from tests.simulation import make_logs
from tests.torture import stepping

PROGRAM = "torture"
"""The name of the program whose processes log with a handler."""

SEGMENT_BYTES = 16 * 1024
"""How large a segment of the spool is."""

_WATCH_SECONDS = 0.05

EXIT_CODE = 3
"""That of a process that ends by `os._exit`."""


FULL = "full"
"""The name of the file that says that an archive's disk is full."""


class Archive(FolderArchive):
    """An archive in a folder whose disk may be full. It may have two names at once: the old one, and the new one."""

    def store(self) -> LocalArtifactStore:
        store = super().store()
        open_file = store.open

        def open_on_disk(path: str, mode: str = "r") -> Any:
            if mode.startswith("a") and path.endswith(".log") and Path(self.root, FULL).exists():
                # Now and then somebody makes room for a part of a line.
                return Faulty(path, random.choice([0] * 9 + [random.randrange(1_000)]))
            return open_file(path, mode)

        store.open = open_on_disk  # type: ignore[method-assign, assignment]
        return store

    def places(self, artifact_store: BaseArtifactStore | None) -> Mapping[str, str]:
        return {}


@dataclass(frozen=True)
class Fork:
    """A process that is forked.

    Attributes:
        at: When, in seconds from the beginning.
        seconds: How long it logs, whatever becomes of its parent.
        way: `os.fork` or `multiprocessing`.
    """

    at: float
    seconds: float
    way: str


@dataclass(frozen=True)
class Life:
    """What a process does.

    Attributes:
        seconds: How long it logs.
        pauses: For each thread that logs: how long it waits after an event, on average, in seconds.
        end: `in order`, or `os._exit`.
        with_handler: Whether it logs with a `CompositeHandler`, and not with a log store.
        forks: The processes that it forks.
        steps: When its clock steps, in seconds from the beginning, and how far.
        update: When it gets new settings, in seconds from the beginning, and which.
        bug: The name of what is wrong with the core, None if nothing is known to be.
    """

    seconds: float
    pauses: tuple[float, ...]
    end: str = "in order"
    with_handler: bool = False
    forks: tuple[Fork, ...] = ()
    steps: tuple[tuple[float, float], ...] = ()
    update: tuple[float, LogStoreSettings] | None = None
    bug: str | None = None


class Source:
    """Logs with one store, under one name, and says of each event when `emit` has returned."""

    def __init__(self, name: str, log_store: LogStoreSettings, with_handler: bool, pipeline: Pipeline) -> None:
        self.name = name
        self._say = pipeline.say
        self._numbers: Counter[str] = Counter()
        self._emits: list[Callable[[logging.LogRecord], None]]
        self._stats: Callable[[], dict[str, dict[str, Any]]]
        delivery = log_store.settings["delivery"]
        if with_handler:
            # An agent knows no handler.
            delivery = "process"
            settings = {name: value for name, value in log_store.settings.items() if name != "delivery"}
            handlers = [
                CompositeHandler(PROGRAM, log_store.children, stream_id=id, **settings) for id in log_store.streams
            ]
            self._emits = [handler.emit for handler in handlers]
            self._stats, writer = handlers[0].stats, handlers[0]._writer
        else:
            store = log_store.open()
            logs = [make_logs(store, id=id) for id in log_store.streams]
            origins = [store.register_origin(str(one.id), one, {}) for one in logs]
            self._emits = [partial(store.emit, origin) for origin in origins]
            self._stats, writer = store.stats, store.writer
        self._writer = writer.writer_id
        self._say("component", str(writer._component_id))
        self._say("writer", self._writer)
        # Of this process as a whole: all that is to be alive at its end.
        self.threads = set()
        if delivery == "process":
            self.threads |= {f"composite-logstore {child.name}" for child in log_store.children if child.enabled}
        if log_store.settings["durability"] != "memory":
            self.threads.add("composite-logstore spool")

    def of_fork(self, name: str) -> Source:
        """Return the same in a process that was forked."""
        forked = copy.copy(self)
        forked.name, forked._numbers = name, Counter()
        return forked

    def log(self, thread: str, size: int = 0) -> None:
        """Log the thread's next event. Its message says which one it is, and how long it has to be."""
        number = self._numbers[thread]
        self._numbers[thread] += 1
        name = f"{self.name}/{thread}/{number}"
        record = logging.LogRecord("train", logging.INFO, "/code/train.py", 1, message(name, size), (), None, "fit")
        self._emits[number % len(self._emits)](record)
        self._say("emitted", name)

    def say_accounts(self) -> None:
        """Say how each child stands, in lines so short that none is mixed with what forked processes say."""
        for child, account in self._stats().items():
            del account["last_error"]
            self._say("account", json.dumps([f"{child} of {self._writer}", account]))


def _prepare(pipeline: Pipeline) -> None:
    # All that it forks can be ended with it.
    os.setpgid(0, 0)
    faulthandler.register(signal.SIGUSR1)
    threading.excepthook = partial(_thread_died, pipeline)
    # A life has several segments, so that some are freed.
    pytest.MonkeyPatch().setattr("composite_logstore.spool.segments.SEGMENT_BYTES", SEGMENT_BYTES)


def live(pipeline: Pipeline, life: Life) -> None:
    """Live a life, as far as somebody lets it."""
    _prepare(pipeline)
    if life.bug:
        PLANTED[life.bug](pytest.MonkeyPatch())
    threading.Thread(target=_watch_machine, args=(pipeline,), daemon=True).start()
    begin = time.monotonic()
    sources = [Source(pipeline.name, pipeline.log_store, life.with_handler, pipeline)]
    is_over = threading.Event()

    def log(thread: str, pause: float) -> None:
        rand = random.Random(f"{pipeline.name} {thread}")
        while not is_over.is_set():
            sources[-1].log(thread, 10_000 if rand.random() < 0.01 else rand.randrange(200))
            # Some at once, and some a while later.
            if rand.random() < 0.3:
                time.sleep(rand.uniform(0, 6 * pause))

    def update() -> None:
        assert life.update is not None
        sources.append(Source(f"{pipeline.name}+", life.update[1], life.with_handler, pipeline))

    events: list[tuple[float, Callable[[], None]]] = []
    events += [(at, partial(stepping.step, seconds)) for at, seconds in life.steps]
    events += [(fork.at, partial(_fork, number, fork, sources, pipeline)) for number, fork in enumerate(life.forks)]
    if life.update:
        events.append((life.update[0], update))
    threads = [
        threading.Thread(target=log, args=(f"{number}", pause), daemon=True) for number, pause in enumerate(life.pauses)
    ]
    for thread in threads:
        thread.start()
    for at, happen in sorted(events, key=lambda event: event[0]):
        time.sleep(max(0.0, begin + at - time.monotonic()))
        happen()
    time.sleep(max(0.0, begin + life.seconds - time.monotonic()))
    is_over.set()
    for thread in threads:
        thread.join()
    for source in sources:
        # It starts its threads with its first event, if there was one.
        source.log("last")
    wanted = set().union(*(source.threads for source in sources))
    end = time.monotonic() + 5
    while (missing := wanted - {thread.name for thread in threading.enumerate()}) and time.monotonic() < end:
        time.sleep(0.01)
    for name in missing:
        pipeline.say("thread-missing", name)
    if life.end == "os._exit":
        pipeline.say("dying", pipeline.name)
        os._exit(EXIT_CODE)
    stepping.last_words += [source.say_accounts for source in sources]


def _fork(number: int, fork: Fork, sources: list[Source], pipeline: Pipeline) -> None:
    source = sources[-1].of_fork(f"{sources[-1].name}~{number}")
    if fork.way == "multiprocessing":
        multiprocessing.get_context("fork").Process(target=_live_forked, args=(source, fork, pipeline)).start()
    elif os.fork() == 0:
        try:
            _live_forked(source, fork, pipeline)
        finally:
            os._exit(0)


def _live_forked(source: Source, fork: Fork, pipeline: Pipeline) -> None:
    rand = random.Random(source.name)
    end = time.monotonic() + fork.seconds
    while time.monotonic() < end:
        source.log("0", rand.randrange(200))
        time.sleep(rand.uniform(0, 0.04))
    pipeline.say("dying", source.name)


def _watch_machine(pipeline: Pipeline) -> None:
    """Say when the machine has let this process wait: what it promises within a second, it promises while it runs."""
    while True:
        begin = time.monotonic()
        time.sleep(_WATCH_SECONDS)
        if time.monotonic() - begin > 2 * _WATCH_SECONDS:
            pipeline.say("waited", str(begin + _WATCH_SECONDS))


def _thread_died(pipeline: Pipeline, args: threading.ExceptHookArgs) -> None:
    threading.__excepthook__(args)
    name = args.thread.name if args.thread else ""
    pipeline.say("thread-died", f"{name}: {args.exc_type.__name__}")


def be_agent(pipeline: Pipeline) -> None:
    """Deliver what the log store's processes log, until somebody ends it."""
    _prepare(pipeline)
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    agents: Any = import_module("composite_logstore.operations.agent")
    store = import_module("composite_logstore.operations.inventory").LogStore
    found = [store(pipeline.log_store.id, "logs", pipeline.store.config)]
    agents.registered, agents.check_server = lambda: found, lambda: None
    agent = agents.Agent(str(pipeline.log_store.settings["spool_directory"]), warn=lambda text: print(text, flush=True))
    agent.begin()
    agent.run(ended)
    agent.end()
    # The threads of exports that hang end with it.
    os._exit(0)


def recover(pipeline: Pipeline, with_handler: bool) -> None:
    """Take over what dead processes have left, and end when the test says so."""
    _prepare(pipeline)
    source = Source(pipeline.name, pipeline.log_store, with_handler, pipeline)
    source.log("0")
    stepping.last_words.append(source.say_accounts)
    pipeline.listen()


def _never_keeps(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("composite_logstore.delivery.keeper.Keeper._write", lambda keeper: None)


# That positions are not noted costs copies alone, which nobody is shown. What a child that never comes back has not
# got, the next process delivers.
_HARMLESS = {"positions are not noted", "a child never comes back"}
PLANTED: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    **{name: plant for name, plant in {**BUGS, **DURABILITY_BUGS}.items() if name not in _HARMLESS},
    "the keeper is dead": _never_keeps,
}
"""Bugs for the torture to find, by their names."""
