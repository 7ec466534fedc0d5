"""Processes that log and then die: started at once, as often as one likes.

Python takes seconds to import ZenML. So one process, the nursery, imports everything, logs nothing, and
forks all the others, each before there is a writer in it: an ordinary process, with a journal of its own.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import multiprocessing
import os
import pickle
import random
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, NoReturn
from uuid import UUID, uuid4

import pydantic_core
from zenml.client import Client
from zenml.zen_stores.sql_zen_store import SqlZenStore

from composite_logstore import ChildConfig, CompositeLogStore
from tests.patience import PATIENCE_SECONDS
from tests.simulation import make_logs, make_store
from tests.watching import wait_until

# What the nursery is asked: to start a process, whose pipes come along, or to wait for the end of one.
_ASK = struct.Struct("<?i")
_ANSWER = struct.Struct("<i")


@dataclass
class LogStoreSettings:
    """A log store, as each of its processes has it.

    Attributes:
        children: Its children. The first is the primary.
        settings: Its own settings.
        id: The component's id, the same in all processes.
        streams: The ids of the streams that they log to.
    """

    children: Sequence[ChildConfig]
    settings: dict[str, Any]
    id: UUID = field(default_factory=uuid4)
    streams: Sequence[UUID] = field(default_factory=lambda: [uuid4()])

    def open(self, primary: str | None = None) -> CompositeLogStore:
        return make_store(*self.children, id=self.id, primary=primary, **self.settings)


class Said(NamedTuple):
    """What a process has said.

    Attributes:
        time: When, on the clock that all processes of the machine share, in seconds.
        text: What.
    """

    time: float
    text: str


class Pipeline:
    """In a process that dies: logs, and says of each event when `emit` has returned."""

    def __init__(self, name: str, log_store: LogStoreSettings, orders: int, answers: int) -> None:
        self.name = name
        self.log_store = log_store
        self.store = log_store.open()
        self._orders = orders
        self._answers = answers
        self._numbers: Counter[int] = Counter()
        self._origins = []
        for id in log_store.streams:
            logs = make_logs(self.store, id=id)
            self._origins.append(self.store.register_origin(str(id), logs, {}))

    def say(self, what: str, text: str = "") -> None:
        # So short that it is never mixed with what another thread or process says.
        os.write(self._answers, f"{what} {time.monotonic()} {text}\n".encode())

    def listen(self) -> None:
        """Wait until the test says something."""
        os.read(self._orders, 1)

    def log(self, thread: int = 0, size: int = 0) -> None:
        """Log the thread's next event. Its message says which one it is, and how long it has to be."""
        name = f"{self.name}/{thread}/{self._numbers[thread]}"
        self._numbers[thread] += 1
        record = logging.LogRecord("train", logging.INFO, "/code/train.py", 1, message(name, size), (), None, "fit")
        self.store.emit(self._origins[thread % len(self._origins)], record)
        self.say("emitted", name)

    def log_while(self, goes_on: Callable[[], bool], thread: int = 0) -> None:
        """Log almost a hundred events a second."""
        while goes_on():
            self.log(thread)
            time.sleep(0.01)

    def log_for(self, seconds: float, thread: int = 0) -> None:
        end = time.monotonic() + seconds
        self.log_while(lambda: time.monotonic() < end, thread)

    def accounts(self, what: str) -> list[int]:
        """Return an account of each child: `delivered`, `pending` and so on."""
        return [child[what] for child in self.store.stats().values()]


def message(name: str, size: int) -> str:
    return f"{name} {size} {'x' * size}"


def name_of(text: str) -> str:
    """Return the name of a message, once it is sure that it is whole."""
    name, size, _ = text.split(" ", 2)
    assert text == message(name, int(size))
    return name


class Process:
    """A process that was started.

    Attributes:
        name: Its name.
        pid: Its id.
    """

    def __init__(self, name: str, pid: int, nursery: Nursery, orders: int, answers: int) -> None:
        self.name = name
        self.pid = pid
        self._nursery = nursery
        self._orders = orders
        self._said: dict[str, list[Said]] = {}
        self._new = threading.Condition()
        self._is_over = False
        self._ending = threading.Lock()
        self._status: int | None = None
        threading.Thread(target=self._hear, args=(answers,), daemon=True).start()

    def _hear(self, answers: int) -> None:
        with os.fdopen(answers) as lines:
            for line in lines:
                what, at, text = line.rstrip("\n").split(" ", 2)
                with self._new:
                    self._said.setdefault(what, []).append(Said(float(at), text))
                    self._new.notify_all()
        with self._new:
            self._is_over = True
            self._new.notify_all()

    def said(self, what: str) -> list[Said]:
        with self._new:
            return list(self._said.get(what, []))

    @property
    def emitted(self) -> list[Said]:
        """The names of the events for which `emit` has returned."""
        return self.said("emitted")

    def wait_until_said(self, what: str, times: int = 1, seconds: float = PATIENCE_SECONDS) -> bool:
        """Wait until it has said something so often, or has ended, and return whether it has said it."""
        with self._new:
            self._new.wait_for(lambda: self._is_over or len(self._said.get(what, [])) >= times, seconds)
            return len(self._said.get(what, [])) >= times

    def tell(self) -> None:
        """Say something to it."""
        os.write(self._orders, b".")

    @property
    def is_over(self) -> bool:
        """Whether it and all that it has forked have ended."""
        with self._new:
            return self._is_over

    def send(self, signal_number: int) -> None:
        """Send it a signal, if it is still there."""
        with self._ending:
            # Its id stays its own until the nursery has waited for it.
            if self._status is None:
                os.kill(self.pid, signal_number)

    def kill(self) -> None:
        self.send(signal.SIGKILL)

    def kill_group(self) -> None:
        """Kill it and all that it has forked, if it has a process group of its own."""
        self.kill()
        with self._ending, contextlib.suppress(ProcessLookupError):
            if self._status is None:
                os.killpg(self.pid, signal.SIGKILL)

    def wait(self, seconds: float = PATIENCE_SECONDS) -> int:
        """Wait until it and all that it has forked have ended; return its exit code, or minus the signal."""
        with self._new:
            assert self._new.wait_for(lambda: self._is_over, seconds), f"process {self.name} does not end"
        with self._ending:
            if self._status is None:
                self._status = self._nursery.wait(self.pid)
                os.close(self._orders)
            return self._status


class Nursery:
    """Starts processes. Safe for threads."""

    def __init__(self, module: str = "tests.crashing") -> None:
        """Prepare.

        Args:
            module: What is run as the nursery: it calls `serve`.
        """
        self._module = module
        self._lock = threading.Lock()
        self._started: list[Process] = []

    def __enter__(self) -> Nursery:
        # If there is no database of ZenML's yet, two processes must not begin it at once.
        Client().active_stack  # noqa: B018
        self._socket, theirs = socket.socketpair()
        self._process = subprocess.Popen(
            [sys.executable, "-m", self._module, str(theirs.fileno())],
            cwd=Path(__file__).parents[1],
            pass_fds=[theirs.fileno()],
            # Those that are killed could not say what they have covered; the others would be slower.
        )
        theirs.close()
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._started:
            process.kill()
            process.wait()
        self._socket.close()
        self._process.wait()

    def start(
        self,
        program: Callable[..., None],
        log_store: LogStoreSettings,
        *arguments: Any,
        name: str = "a",
        output: Path | None = None,
    ) -> Process:
        """Start a process.

        Args:
            program: What it does: a function of a module.
            log_store: Where it logs to.
            arguments: What else the function gets.
            name: Its name, which the names of its events begin with.
            output: Where what it prints goes.
        """
        their_orders, orders = os.pipe()
        answers, their_answers = os.pipe()
        with self._lock:
            socket.send_fds(self._socket, [_ASK.pack(True, 0)], [their_orders, their_answers])
            (pid,) = _ANSWER.unpack(self._socket.recv(_ANSWER.size))
        os.close(their_orders)
        os.close(their_answers)
        process = Process(name, pid, self, orders, answers)
        self._started.append(process)
        what = pickle.dumps((program, name, log_store, arguments, output and str(output)))
        os.write(orders, struct.pack("<I", len(what)) + what)
        return process

    def wait(self, pid: int) -> int:
        with self._lock:
            self._socket.send(_ASK.pack(False, pid))
            (status,) = _ANSWER.unpack(self._socket.recv(_ANSWER.size))
        return int(status)


def left_in(spool: Path) -> list[Path]:
    """Return the folders in the spool that have events of a process."""
    # Not with `glob`, which raises when a folder goes while it looks. What a kill has torn is kept aside.
    return sorted(
        Path(folder)
        for folder, _, files in os.walk(spool)
        if any(file.endswith(".log") for file in files) and not folder.endswith("/damaged")
    )


def succeed(nursery: Nursery, log_store: LogStoreSettings, spool: Path, output: Path, seconds: float = 60) -> Process:
    """Start the next process, and have it end once it has delivered what was left."""
    left = left_in(spool)
    process = nursery.start(log_and_deliver, log_store, name="next", output=output)
    process.tell()
    if not process.wait_until_said("emitted"):
        raise AssertionError(f"{process.pid} ended with {process.wait()}: {output.read_text()}")
    wait_until(lambda: not any(folder.exists() for folder in left), "what was left is delivered", seconds)
    process.tell()
    assert process.wait() == 0, output.read_text()
    assert left_in(spool) == []
    return process


def serve(listener: int) -> None:
    """Be the nursery."""
    for backend in ("artifact", "datadog", "otlp"):
        import_module(f"composite_logstore_{backend}.exporter")
    import_module("composite_logstore_otlp.over_http")
    Client().active_stack  # noqa: B018
    zen_store = Client().zen_store
    assert isinstance(zen_store, SqlZenStore)
    # A connection to SQLite must not be carried into a forked process.
    zen_store.engine.dispose()
    gc.collect()
    gc.freeze()
    with socket.socket(fileno=listener) as asked:
        while True:
            ask, pipes, _, _ = socket.recv_fds(asked, _ASK.size, 2)
            if not ask:
                return
            is_start, pid = _ASK.unpack(ask)
            if is_start:
                pid = os.fork()
                if pid == 0:
                    break
                for pipe in pipes:
                    os.close(pipe)
                asked.send(_ANSWER.pack(pid))
            else:
                asked.send(_ANSWER.pack(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])))
    # In the new process, which ends as any other does: by coming to the end of its program.
    _run(*pipes)


def _run(orders: int, answers: int) -> None:
    (length,) = struct.unpack("<I", os.read(orders, 4))
    what = b""
    while len(what) < length:
        what += os.read(orders, length - len(what))
    program, name, log_store, arguments, output = pickle.loads(what)
    if output:
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
    program(Pipeline(name, log_store, orders, answers), *arguments)


# What processes do


def log_in_bursts(pipeline: Pipeline, threads: int, seed: int) -> None:
    """Log in several threads until it is killed: bursts of small events, and now and then a large one."""

    def run(thread: int) -> None:
        rand = random.Random(f"{seed} {thread}")
        while True:
            pipeline.log(thread, 100_000 if rand.random() < 0.01 else rand.randrange(200))
            if rand.random() < 0.1:
                time.sleep(rand.uniform(0, 0.04))

    for thread in range(threads):
        threading.Thread(target=run, args=(thread,), daemon=True).start()
    threading.Event().wait()


def log_and_end(pipeline: Pipeline) -> None:
    """Log one event and end."""
    pipeline.log()


def log_and_deliver(pipeline: Pipeline) -> None:
    """Log one event when the test says so, and when it says so again end with everything delivered."""
    pipeline.listen()
    pipeline.log()
    pipeline.listen()
    while any(pipeline.accounts("pending")):
        time.sleep(0.02)


def log_and_wait(pipeline: Pipeline, events: int, size: int) -> None:
    """Log many events, no faster than one child takes them, say how the children stand, and wait for death."""
    for _ in range(events):
        pipeline.log(size=size)
        while min(pipeline.accounts("pending")) > 100:
            time.sleep(0.01)
    pipeline.say("stats", json.dumps(pipeline.store.stats()))
    pipeline.listen()


def log_and_die(pipeline: Pipeline, seconds: float, way: str) -> None:
    """Log for a while and die in the middle of it."""
    pipeline.log_for(seconds)
    # Whatever is going to be lost, something is delivered.
    pipeline.log_while(lambda: not any(pipeline.accounts("delivered")))
    pipeline.say("dying")
    WAYS_TO_DIE[way]()


def fork_and_die(pipeline: Pipeline, seconds: float, way: str) -> None:
    """Log for a while and die while processes that it has forked go on, as a data loader's workers might."""
    for worker in (1, 2):
        work = multiprocessing.get_context("fork").Process(target=_work, args=(pipeline, worker, seconds, way))
        work.start()
    log_and_die(pipeline, seconds, way)


def _work(pipeline: Pipeline, worker: int, seconds: float, way: str) -> None:
    parent = os.getppid()
    pipeline.log_for(2 * seconds, worker)
    if way == "SIGKILL":
        # Otherwise the parent waits for it.
        pipeline.log_while(lambda: os.getppid() == parent, worker)
        pipeline.log_for(seconds + 1, worker)
    # As `multiprocessing` has it die: without ceremony.
    pipeline.say("dying")


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + 64 * 1024 * 1024
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _run_out_of_memory() -> None:
    _limit_memory()
    hoard = []
    while True:
        hoard.append(bytearray(1024 * 1024))


def _abort_for_want_of_memory() -> None:
    _limit_memory()
    text = "x" * 16 * 1024 * 1024
    # It is written in Rust, which aborts where memory cannot be had.
    pydantic_core.to_json([text] * 100)


def _raise() -> NoReturn:
    raise ValueError("the step failed")


WAYS_TO_DIE: dict[str, Callable[[], None]] = {
    "end of program": lambda: None,
    "sys.exit": lambda: sys.exit(3),
    "exception": _raise,
    "MemoryError": _run_out_of_memory,
    "SIGTERM": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "SIGKILL": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "os._exit": lambda: os._exit(3),
    "abort for want of memory": _abort_for_want_of_memory,
}


if __name__ == "__main__":
    # What is pickled refers to this module by its own name.
    from tests import crashing

    crashing.serve(int(sys.argv[1]))
