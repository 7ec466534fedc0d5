"""Processes that log and then die, and that start at once.

Python takes seconds to import ZenML. So one process, the nursery, imports everything, logs nothing, and forks all the
others. It has no writer, so each of them is an ordinary process with a journal of its own.
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
from dataclasses import dataclass, field, replace
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

# A request to the nursery: start a process with the pipes that are sent along, or wait for the end of one.
_ASK = struct.Struct("<?i")
_ANSWER = struct.Struct("<i")


@dataclass
class LogStoreSettings:
    """The settings with which each process opens the log store.

    Attributes:
        children: Its children. The first is the primary.
        settings: Its own settings.
        id: The component's id, the same in all processes.
        streams: The ids of the streams that the processes log to.
    """

    children: Sequence[ChildConfig]
    settings: dict[str, Any]
    id: UUID = field(default_factory=uuid4)
    streams: Sequence[UUID] = field(default_factory=lambda: [uuid4()])

    def open(self, primary: str | None = None) -> CompositeLogStore:
        return make_store(*self.children, id=self.id, primary=primary, **self.settings)


class Said(NamedTuple):
    """A line that a process has reported.

    Attributes:
        time: The time in seconds, on the clock that all processes of the machine share.
        text: The text.
    """

    time: float
    text: str


class Pipeline:
    """Logs in a process that will die, and reports each event once `emit` has returned."""

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
        # Short enough for the system to write it in one piece, beside other threads and processes.
        os.write(self._answers, f"{what} {time.monotonic()} {text}\n".encode())

    def listen(self) -> None:
        """Wait until the test calls `tell`."""
        os.read(self._orders, 1)

    def log(self, thread: int = 0, size: int = 0) -> None:
        """Log the thread's next event. Its message contains its name and its length."""
        name = f"{self.name}/{thread}/{self._numbers[thread]}"
        self._numbers[thread] += 1
        record = logging.LogRecord("train", logging.INFO, "/code/train.py", 1, message(name, size), (), None, "fit")
        self.store.emit(self._origins[thread % len(self._origins)], record)
        self.say("emitted", name)

    def log_while(self, condition: Callable[[], bool], thread: int = 0) -> None:
        """Log almost a hundred events a second while a condition holds."""
        while condition():
            self.log(thread)
            time.sleep(0.01)

    def log_for(self, seconds: float, thread: int = 0) -> None:
        end = time.monotonic() + seconds
        self.log_while(lambda: time.monotonic() < end, thread)

    def log_first(self, events: int) -> None:
        """Log the first events of thread 0."""
        self.log_while(lambda: self._numbers[0] < events)

    def accounts(self, what: str) -> list[int]:
        """Return one number of each child's account: `delivered`, `pending` and so on."""
        return [child[what] for child in self.store.stats().values()]


def message(name: str, size: int) -> str:
    return f"{name} {size} {'x' * size}"


def name_of(text: str) -> str:
    """Return the name in a message, after checking that the message is complete."""
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
        """Wait until it has reported something a number of times or has ended; return whether it has reported it."""
        with self._new:
            self._new.wait_for(lambda: self._is_over or len(self._said.get(what, [])) >= times, seconds)
            return len(self._said.get(what, [])) >= times

    def tell(self) -> None:
        """Have its `listen` return."""
        os.write(self._orders, b".")

    @property
    def is_over(self) -> bool:
        """Whether it and all processes that it has forked have ended."""
        with self._new:
            return self._is_over

    def send(self, signal_number: int) -> None:
        """Send it a signal, unless it has ended."""
        with self._ending:
            # No other process gets its id before the nursery has waited for it.
            if self._status is None:
                os.kill(self.pid, signal_number)

    def kill(self) -> None:
        self.send(signal.SIGKILL)

    def kill_group(self) -> None:
        """Kill it and all processes that it has forked, if it has a process group of its own."""
        self.kill()
        with self._ending, contextlib.suppress(ProcessLookupError):
            if self._status is None:
                os.killpg(self.pid, signal.SIGKILL)

    def wait(self, seconds: float = PATIENCE_SECONDS) -> int:
        """Wait until it and all processes that it has forked have ended; return its exit code, or minus the signal."""
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
            module: The module to run as the nursery. It calls `serve`.
        """
        self._module = module
        self._lock = threading.Lock()
        self._started: list[Process] = []

    def __enter__(self) -> Nursery:
        # Two processes must not create ZenML's database at once.
        Client().active_stack  # noqa: B018
        self._socket, theirs = socket.socketpair()
        self._process = subprocess.Popen(
            [sys.executable, "-m", self._module, str(theirs.fileno())],
            cwd=Path(__file__).parents[1],
            pass_fds=[theirs.fileno()],
            # Coverage is not measured: killed processes could not report it, and the others would be slower.
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
            program: The function that it runs, of a module.
            log_store: The log store that it logs to.
            arguments: Further arguments of the function.
            name: Its name, with which the names of its events begin.
            output: The file for its output.
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


def backlogs_in(spool: Path) -> list[Path]:
    """Return the folders in the spool that have events of a process."""
    # Not with `glob`, which raises if a folder vanishes meanwhile. `damaged` keeps lines that a kill has cut off.
    return sorted(
        Path(folder)
        for folder, _, files in os.walk(spool)
        if any(file.endswith(".log") for file in files) and not folder.endswith("/damaged")
    )


def deliver_backlog(
    nursery: Nursery, log_store: LogStoreSettings, spool: Path, output: Path, seconds: float = PATIENCE_SECONDS
) -> Process:
    """Start the next process, and have it end once it has delivered the backlog."""
    left = backlogs_in(spool)
    # All is well now: on a busy machine exports that take longer are none that fail.
    patient = [child.model_copy(update={"export_timeout_millis": 30_000}) for child in log_store.children]
    log_store = replace(log_store, children=patient)
    process = nursery.start(log_and_deliver, log_store, name="next", output=output)
    process.tell()
    if not process.wait_until_said("emitted"):
        raise AssertionError(f"{process.pid} ended with {process.wait()}: {output.read_text()}")
    wait_until(lambda: not any(folder.exists() for folder in left), "the backlog is delivered", seconds)
    process.tell()
    assert process.wait() == 0, output.read_text()
    assert backlogs_in(spool) == []
    return process


def serve(listener: int) -> None:
    """Be the nursery."""
    for backend in ("artifact", "datadog", "otlp"):
        import_module(f"composite_logstore_{backend}.exporter")
    import_module("composite_logstore_otlp.over_http")
    Client().active_stack  # noqa: B018
    zen_store = Client().zen_store
    assert isinstance(zen_store, SqlZenStore)
    # A forked process must not use its parent's connection to SQLite.
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
    # This is the new process. It ends as any other does, at the end of its program.
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


# Programs


def log_in_bursts(pipeline: Pipeline, threads: int, seed: int) -> None:
    """Log in several threads until the process is killed: bursts of small events, and now and then a large one."""

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
    """Log one event at the first `tell`. After the second one deliver all events and end."""
    pipeline.listen()
    pipeline.log()
    pipeline.listen()
    while any(pipeline.accounts("pending")):
        time.sleep(0.02)


def log_and_wait(pipeline: Pipeline, events: int, size: int) -> None:
    """Log many events, no faster than one child accepts them, report the accounts, and wait to be killed."""
    for _ in range(events):
        pipeline.log(size=size)
        while min(pipeline.accounts("pending")) > 100:
            time.sleep(0.01)
    pipeline.say("stats", json.dumps(pipeline.store.stats()))
    pipeline.listen()


def log_and_die(pipeline: Pipeline, seconds: float, way: str) -> None:
    """Log for a while and die meanwhile."""
    # On a busy machine a second may be too short for enough events that are older than the last ones.
    pipeline.log_first(20)
    pipeline.log_for(seconds)
    # Some events have to be delivered before the process dies.
    pipeline.log_while(lambda: not any(pipeline.accounts("delivered")))
    pipeline.say("dying")
    WAYS_TO_DIE[way]()


def fork_and_die(pipeline: Pipeline, seconds: float, way: str) -> None:
    """Log for a while and die while forked processes continue, as a data loader's workers might."""
    for worker in (1, 2):
        work = multiprocessing.get_context("fork").Process(target=_work, args=(pipeline, worker, seconds, way))
        work.start()
    log_and_die(pipeline, seconds, way)


def _work(pipeline: Pipeline, worker: int, seconds: float, way: str) -> None:
    parent = os.getppid()
    pipeline.log_for(2 * seconds, worker)
    if way == "SIGKILL":
        # In the other ways to die the parent waits for this process.
        pipeline.log_while(lambda: os.getppid() == parent, worker)
        pipeline.log_for(seconds + 1, worker)
    # `multiprocessing` ends it by `os._exit`.
    pipeline.say("dying")


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + 64 * 1024 * 1024
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _run_out_of_memory() -> None:
    _limit_memory()
    blocks = []
    while True:
        blocks.append(bytearray(1024 * 1024))


def _abort_for_lack_of_memory() -> None:
    _limit_memory()
    text = "x" * 16 * 1024 * 1024
    # This is Rust, which aborts if it cannot allocate memory.
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
    "abort for want of memory": _abort_for_lack_of_memory,
}


if __name__ == "__main__":
    # Pickled functions refer to this module by its name.
    from tests import crashing

    crashing.serve(int(sys.argv[1]))
