"""Many processes of one log store, put to torture: they are killed and stopped, fork, and their clocks step.

Meanwhile backends fail, folders of the spool are damaged, and children are renamed, dropped and switched on again.
All that is random comes from one seed: what each process does, how and when it ends, which backend fails how, and what
is destroyed on disk. When exactly things meet is the machine's affair.
"""

from __future__ import annotations

import contextlib
import json
import random
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from math import inf
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

from zenml.exceptions import DoesNotExistException

from composite_logstore import ChildConfig, CompositeLogStore
from tests.crashing import LogStoreSettings, Nursery, Process, Said, backlogs_in
from tests.simulation import make_logs
from tests.torture import programs
from tests.torture.backends import Backends, name_in
from tests.torture.destruction import Destruction
from tests.torture.oracle import End, Evidence, Logged, Walk, judge, oldest_lost
from tests.torture.programs import Fork, Life
from tests.watching import LAST_WORDS

AT_ONCE = 6
"""How many processes live at a time, besides those that they fork."""
LONGEST_LIFE_SECONDS = 8.0
ENDING_SECONDS = 40.0
"""How long a process may take to end, with all that it has forked, before it counts as one that hangs."""
RECOVERY_SECONDS = 120.0
"""How long the last process may take to deliver what all the others have left."""
STREAMS = 12
"""How many streams there are. A cursor remembers what it has returned of 200 writers or so, as many as one has here."""
STREAMS_OF_EACH = 3
"""To how many of them a process logs."""

# What is said where something went wrong that nobody foresaw.
_DEFECT = re.compile(r"(?:.*defect of the backend|the thread '[^']*' failed|Traceback).*")

CHILD: Mapping[str, Any] = {
    "schedule_delay_millis": 100,
    "retry_initial_interval_millis": 100,
    "retry_max_interval_millis": 400,
    "export_timeout_millis": 2_000,
}


@dataclass(frozen=True)
class Settings:
    """A log store's settings, as they are for a while.

    Attributes:
        log_store: The log store.
        backends: The backends that its children deliver to.
    """

    log_store: LogStoreSettings
    backends: frozenset[str]


@dataclass(frozen=True)
class Lived:
    """A process that has ended.

    Attributes:
        process: The process.
        settings: Its settings; if it got new ones, those too.
        end: Its end.
    """

    process: Process
    settings: Sequence[Settings]
    end: End


class Torture:
    """One torture.

    Attributes:
        counted: How often things happened.
        figures: What there is to tell of it afterwards.
    """

    def __init__(self, folder: Path, seed: int, seconds: float, bug: str | None = None) -> None:
        """Prepare.

        Args:
            folder: An empty folder for all that there is to be on disk.
            seed: Where everything random comes from.
            seconds: How long processes begin. The last of them end, and all is read, some time after that.
            bug: What is to be wrong with the core: the name of something planted. None: what is wrong with it anyway.
        """
        self._seed = seed
        self._seconds = seconds
        self._bug = bug
        self._folder, self._spool, self._output = folder, folder / "spool", folder / "output"
        self._output.mkdir()
        self._id, self._streams = uuid4(), [uuid4() for _ in range(STREAMS)]
        self._processes: list[Process] = []
        self._lived: list[Lived] = []
        self._dead_writers: set[str] = set()
        self._complaints: list[str] = []
        self._is_over = threading.Event()
        self._disk = Destruction(self._spool, folder / "graves", self._dead_writers.__contains__)
        self.counted: Counter[str] = Counter()
        self.figures = ""

    def run(self) -> list[str]:
        """Do it, and return what was wrong, a line for each."""
        backends = Backends.running(self._folder / "backends")
        with Nursery("tests.torture") as self._nursery, backends as self._backends:
            try:
                self._let_live()
                for backend in Backends.NAMES:
                    self._backends.mend(backend)
                for with_handler in (False, True):
                    self._recover(with_handler)
                evidence = self._evidence()
            finally:
                for process in self._processes:
                    process.kill_group()
        self.figures = self._in_figures(evidence)
        return judge(evidence)

    def _let_live(self) -> None:
        numbers = count()
        with ThreadPoolExecutor(AT_ONCE + 3) as pool:
            parts = [pool.submit(self._fail_backends), pool.submit(self._destroy), pool.submit(self._run_agents)]
            parts += [pool.submit(self._start_and_end, numbers) for _ in range(AT_ONCE)]
            end = time.monotonic() + self._seconds
            try:
                # If one part fails, the others have no longer a meaning.
                while time.monotonic() < end and not any(part.done() for part in parts):
                    time.sleep(0.1)
            finally:
                self._is_over.set()
        for part in parts:
            part.result()

    # What is to be lived through

    def _draw_settings(self, rand: random.Random) -> Settings:
        """Return settings of which any child may have been renamed, dropped, disabled, or switched on again."""
        queue = rand.choice([30, 1_000, 100_000])
        backends = {backend for backend in Backends.NAMES if rand.random() < 0.85}
        # Something has to be the primary.
        backends.add(rand.choice(["archive", "objects"]))
        children = [
            self._child(backend, rand.choice(["", "", "", "-2"]), enabled=backend in backends, max_queue_size=queue)
            for backend in Backends.NAMES
            if backend in backends or rand.random() < 0.5
        ]
        durability = rand.choices(["write_ahead", "spill", "memory"], [6, 6, 1])[0]
        delivery = "process" if durability == "memory" else rand.choice(["process", "agent", "auto"])
        streams = rand.sample(self._streams, STREAMS_OF_EACH)
        return Settings(self._log_store(children, durability, streams, delivery), frozenset(backends))

    def _child(self, backend: str, suffix: str = "", **settings: Any) -> ChildConfig:
        return self._backends.child(backend, f"{backend}{suffix}", **CHILD, **settings)

    def _log_store(
        self, children: Sequence[ChildConfig], durability: str, streams: Sequence[UUID] = (), delivery: str = "process"
    ) -> LogStoreSettings:
        # The first is the primary.
        children = sorted(children, key=lambda child: (not child.enabled, child.type != "artifact"))
        settings = {
            "durability": durability,
            "delivery": delivery,
            "spool_directory": str(self._spool),
            "spool_max_bytes": 1 << 34,
        }
        return LogStoreSettings(children, settings, self._id, streams or self._streams)

    def _draw_life(self, rand: random.Random) -> tuple[list[Settings], Life]:
        seconds = rand.uniform(0.3, LONGEST_LIFE_SECONDS)
        settings = [self._draw_settings(rand) for _ in range(rand.choice([1, 1, 1, 2]))]
        return settings, Life(
            seconds,
            pauses=tuple(rand.choice([0.02, 0.1, 0.2, 0.5]) for _ in range(rand.randint(1, 3))),
            end=rand.choice(["in order", "in order", "os._exit"]),
            with_handler=rand.random() < 0.3,
            forks=tuple(
                Fork(rand.uniform(0.1, seconds), rand.uniform(0.2, 3.0), rand.choice(["os.fork", "multiprocessing"]))
                for _ in range(rand.choice([0, 0, 0, 1, 2]))
            ),
            steps=tuple(
                # From a millisecond to a quarter of an hour.
                (rand.uniform(0, seconds), rand.choice([-1, 1]) * 10 ** rand.uniform(-3, 3))
                for _ in range(rand.choice([0, 0, 1, 3]))
            ),
            update=(rand.uniform(0, seconds), settings[1].log_store) if len(settings) > 1 else None,
            bug=self._bug,
        )

    def _start_and_end(self, numbers: Iterator[int]) -> None:
        while not self._is_over.is_set():
            number = next(numbers)
            rand = random.Random(f"{self._seed} process {number}")
            settings, life = self._draw_life(rand)
            process = self._start(programs.live, settings[0].log_store, life, name=f"p{number}")
            end = self._live_through(process, life, rand)
            self._lived.append(Lived(process, settings, end))
            self._dead_writers.update(said.text for said in process.said("writer"))
            self.counted["processes"] += 1
            self.counted["updates of the log store"] += len(settings) - 1
            self.counted["steps of a clock"] += len(life.steps)
            self.counted["forks"] += len({name.text.split("/")[0] for name in process.emitted if "~" in name.text})

    def _start(self, program: Any, log_store: LogStoreSettings, *arguments: Any, name: str) -> Process:
        process = self._nursery.start(program, log_store, *arguments, name=name, output=self._output / name)
        self._processes.append(process)
        return process

    def _live_through(self, process: Process, life: Life, rand: random.Random) -> End:
        """Stop the process and let it go on, and kill it or leave it to itself."""
        begin = time.monotonic()
        pauses: list[tuple[float, float]] = []
        is_killed = rand.random() < 0.7
        for at in sorted(rand.uniform(0, life.seconds) for _ in range(rand.choice([0, 0, 1, 2]))):
            _sleep_until(begin + at)
            stopped_at = time.monotonic()
            process.send(signal.SIGSTOP)
            self.counted["stops"] += 1
            time.sleep(rand.choice([0.05, 0.5, 2.0]))
            if is_killed and rand.random() < 0.4:
                pauses.append((stopped_at, inf))
                break
            pauses.append((stopped_at, time.monotonic()))
            process.send(signal.SIGCONT)
        ended_at = inf
        if is_killed:
            is_stopped = bool(pauses) and pauses[-1][1] == inf
            if not is_stopped:
                _sleep_until(begin + rand.uniform(0, life.seconds))
            ended_at = time.monotonic()
            # What is stopped hears of nothing else.
            process.send(signal.SIGKILL if is_stopped or rand.random() < 0.8 else signal.SIGTERM)
        code = self._wait(process, life.seconds)
        if code in (0, programs.EXIT_CODE):
            # It was there first. These are its last words.
            last = [said for said in process.said("dying") if said.text == process.name] or process.said("account")
            ended_at = last[-1].time if last else time.monotonic()
        how = {0: "orderly ends", programs.EXIT_CODE: "os._exit", -signal.SIGKILL: "kills", -signal.SIGTERM: "SIGTERM"}
        if code not in how:
            self._complain(process, f"ended with {code}")
        self.counted[how.get(code, "other ends")] += 1
        pauses += [(float(said.text), said.time) for said in process.said("waited")]
        return End(ended_at, code != 0, pauses)

    def _wait(self, process: Process, seconds: float = 0) -> int:
        try:
            return process.wait(seconds + ENDING_SECONDS)
        except AssertionError:
            # It prints where its threads are.
            process.send(signal.SIGUSR1)
            time.sleep(1)
            self._complain(process, "hangs", lines=60)
            process.kill_group()
            return process.wait()

    def _complain(self, process: Process, what: str, lines: int = 10) -> None:
        file = self._output / process.name
        printed = file.read_text(errors="replace").splitlines()[-lines:] if file.exists() else []
        self._complaints.append("\n    ".join([f"{process.name} {what}", *printed]))

    def _fail_backends(self) -> None:
        rand = random.Random(f"{self._seed} backends")
        until: dict[str, float] = {}
        while not self._is_over.wait(rand.uniform(0.1, 1.0)):
            for backend in [backend for backend in until if time.monotonic() > until[backend]]:
                self._backends.mend(backend)
                del until[backend]
            backend = rand.choice(Backends.NAMES)
            fault, seconds = rand.choice(self._backends.faults(backend)), rand.choice([0.3, 1.0, 3.0, 8.0])
            if backend not in until:
                self._backends.fail(backend, fault)
                until[backend] = time.monotonic() + seconds
                self.counted["faults of a backend"] += 1

    def _destroy(self) -> None:
        rand = random.Random(f"{self._seed} disk")
        while not self._is_over.wait(rand.uniform(0.5, 4.0)):
            self._disk.destroy(rand)

    def _run_agents(self) -> None:
        """Have agents deliver, one after the other, for the children by their old names and by their new ones."""
        rand = random.Random(f"{self._seed} agents")
        log_store = self._log_store(self._all_children(), "write_ahead")
        for number in count():
            if self._is_over.wait(rand.choice([0.0, 0.5, 3.0])):
                return
            agent = self._start(programs.be_agent, log_store, name=f"agent{number}")
            self._is_over.wait(rand.uniform(0.5, LONGEST_LIFE_SECONDS))
            if rand.random() < 0.3:
                agent.send(signal.SIGSTOP)
                time.sleep(rand.choice([0.05, 0.5, 2.0]))
                agent.send(signal.SIGCONT)
                self.counted["stops of an agent"] += 1
            is_killed = rand.random() < 0.7
            agent.send(signal.SIGKILL if is_killed else signal.SIGTERM)
            self.counted["kills of an agent" if is_killed else "orderly ends of an agent"] += 1
            code = self._wait(agent)
            if code not in (0, -signal.SIGKILL, -signal.SIGTERM):
                self._complain(agent, f"ended with {code}")

    # The end

    def _all_children(self) -> list[ChildConfig]:
        """Return each child by its old name and by its new one."""
        return [self._child(backend, suffix) for backend in Backends.NAMES for suffix in ("", "-2")]

    def _recover(self, with_handler: bool) -> None:
        """Have a last process deliver what the others have left, to each child by its old name and by its new one."""
        settings = Settings(self._log_store(self._all_children(), "spill"), frozenset(Backends.NAMES))
        name = f"recovery-{with_handler:d}"
        process = self._start(programs.recover, settings.log_store, with_handler, name=name)
        end = time.monotonic() + RECOVERY_SECONDS
        left: list[Path] = []
        while time.monotonic() < end and not process.is_over:
            time.sleep(0.05)
            # It names the folder of its log store, which is made when there is something to put there.
            component = self._spool / next((said.text for said in process.said("component")), "none")
            own = {said.text for said in process.said("writer")}
            left = [folder for folder in backlogs_in(component) if folder.name not in own]
            if process.emitted and not left:
                break
        if left:
            files = {str(file.relative_to(self._spool)): file.stat().st_size for file in left[0].iterdir()}
            self._complain(process, f"has not recovered {len(left)} folders, such as {files}")
        with contextlib.suppress(BrokenPipeError):
            process.tell()
        if (code := self._wait(process)) != 0:
            self._complain(process, f"ended with {code}")
        self._lived.append(Lived(process, [settings], End(time.monotonic(), False)))

    def _evidence(self) -> Evidence:
        complaints = list(self._complaints)
        stats: dict[str, dict[str, Any]] = {}
        threads: dict[str, list[str]] = {}
        for process in self._processes:
            complaints += [f"{process.name}: a thread died: {said.text}" for said in process.said("thread-died")]
            output = self._output / process.name
            printed = output.read_text(errors="replace") if output.exists() else ""
            complaints += [f"{process.name}: {line}" for line in sorted(set(_DEFECT.findall(printed)))]
            stats[process.name] = dict(json.loads(said.text) for said in process.said("account"))
            threads[process.name] = [said.text for said in process.said("thread-missing")]
        damage = self._spool.glob("*/damaged/*")
        return Evidence(
            [logged for lived in self._lived for logged in _logged(lived, self._disk.harm)],
            self._disk.excused(),
            self._backends.held(),
            {backend: self._shown(backend) for backend in Backends.READABLE},
            by_time={"live"},
            stats=stats,
            destroyed=self._disk.times,
            threads=threads,
            damage=[str(file) for file in damage if file.name.partition("-")[0] not in self._disk.harm],
            other=complaints,
        )

    def _shown(self, backend: str) -> dict[str, Walk]:
        store = self._log_store([self._child(backend)], "memory").open()
        walks = {}
        for id in self._streams:
            logs = make_logs(store, id=id)
            with contextlib.suppress(DoesNotExistException):
                walks[str(id)] = Walk(*(_entries(store, logs, start) for start in ("oldest", "newest")))
        return walks

    def _in_figures(self, evidence: Evidence) -> str:
        emitted = sum(len(logged.emitted) for logged in evidence.logged)
        copies = sum(len(held) - len({copy.uid for copy in held}) for held in evidence.held.values())
        counted = [f"{what} {number}" for what, number in sorted((self.counted + self._disk.counted).items())]
        return (
            f"{emitted} events acknowledged, {len(evidence.excused)} destroyed on disk, {copies} copies; the oldest "
            f"that `spill` lost was {oldest_lost(evidence):.2f} s old; {', '.join(counted)}"
        )


def _sleep_until(moment: float) -> None:
    time.sleep(max(0.0, moment - time.monotonic()))


def _logged(lived: Lived, harm: Mapping[str, Sequence[str]]) -> Iterator[Logged]:
    """Yield what was logged in a process, and in those that it has forked, by their names."""
    process = lived.process
    emitted: dict[str, list[Said]] = {}
    for said in process.emitted:
        emitted.setdefault(said.text.split("/")[0], []).append(said)
    ends = {said.text: End(said.time, True) for said in process.said("dying")}
    for name, events in emitted.items():
        # With new settings it has a new name, and a new writer.
        settings, writer = lived.settings[name.count("+")], process.said("writer")[name.count("+")].text
        yield Logged(
            name,
            settings.log_store.settings["durability"],
            settings.backends,
            events,
            lived.end,
            # Who does not say that it dies was ended with all the others.
            ends.get(name, End(events[-1].time, True)) if "~" in name else None,
            [f"writer {writer}", *harm.get(writer, [])],
        )


def _entries(store: CompositeLogStore, logs: Any, start: str) -> list[tuple[str, str]]:
    """Return the ids and names of a stream's entries, oldest first, from all pages from one end on."""
    page = store.fetch(logs, start=start, limit=1_000)
    pages = [page.items]
    onward = {"oldest": "after", "newest": "before"}[start]
    while page.items and (cursor := getattr(page, onward)) is not None:
        page = store.fetch(logs, **{onward: cursor})
        pages.append(page.items)
    in_order = pages if start == "oldest" else reversed(pages)
    entries = [entry for items in in_order for entry in items]
    named = [(str(entry.id), name_in(entry.message)) for entry in entries if not _is_piece(entry.message)]
    return [(id, name) for id, name in named if name != LAST_WORDS]


def _is_piece(message: str) -> bool:
    """Return whether it is what a full disk has left of a line, which is shown, since nobody can tell what it was.

    It was cut after its first character, or in the moment before another process has appended a line of its own.
    """
    return message == "{" or message.count('{"timestamp":') > 1
