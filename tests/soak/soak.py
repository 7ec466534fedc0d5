"""A program that logs for long, in threads and forked workers, while its two backends fail by turns.

What its processes hold is looked at all the while. After a warm-up it is to stay as it is.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from statistics import linear_regression
from typing import Any, NamedTuple

import psutil

from tests.patience import PATIENCE_SECONDS
from tests.servers.faulty import FaultyProxy
from tests.servers.otlp_receiver import Answer, OtlpReceiver, Request, decode_request

ROOT = Path(__file__).resolve().parents[2]

FAULTS = ("refused", "silent", "reset", "late", "cut", "dead")
"""What goes wrong with a backend, one after the other."""
LONGEST_PHASE_SECONDS = 10.0
"""How long a backend fails, and how long both are well before the other one fails."""
WARM_UP = 1 / 6
"""The part of the time after which nothing is to grow any more."""

CHILD: Mapping[str, Any] = {
    "type": "otlp",
    "schedule_delay_millis": 200,
    "export_timeout_millis": 2_000,
    "retry_initial_interval_millis": 100,
    "retry_max_interval_millis": 1_000,
    # An outage fills it, so that events wait on disk.
    "max_queue_size": 500,
}

MOST_GROWTH = {"memory": 8.0, "threads": 1.0, "descriptors": 1.0}
"""How much more a process may hold at the end than after the warm-up: in MiB, and in numbers."""


class Sample(NamedTuple):
    """What a process holds: its resident memory in MiB, its threads and its descriptors, at a time in seconds."""

    time: float
    memory: float
    threads: int
    descriptors: int


def growth(times: Sequence[float], values: Sequence[float]) -> float:
    """Return by how much values have grown from the first time to the last: on the line that fits them best."""
    return linear_regression(times, values).slope * (times[-1] - times[0])


class Backend(OtlpReceiver):
    """Keeps of each event only how often it has arrived.

    Attributes:
        arrivals: Of each source, how often each number has arrived; 255 is that often or more.
    """

    def __init__(self) -> None:
        super().__init__()
        self.arrivals: dict[str, bytearray] = defaultdict(bytearray)

    def receive(self, request: Request) -> Answer:
        names = [str(record.body).split(" x")[0].rstrip() for record in decode_request(request.payload)]
        with self._lock:
            for name in names:
                source, _, number = name.partition("/")
                arrivals, place = self.arrivals[source], int(number)
                arrivals.extend(bytes(max(0, place + 1 - len(arrivals))))
                arrivals[place] = min(255, arrivals[place] + 1)
        return Answer()


@dataclass
class Soak:
    """One soak.

    Attributes:
        folder: An empty folder.
        seconds: How long the program logs.
        leak: What is to leak away, one of `tests.soak.program.LEAKS`; empty if nothing is known to.
        samples: Of each process, what it held, the warm-up left out.
        report: What there is to tell of it, line by line.
        failures: How often a backend has failed.
    """

    folder: Path
    seconds: float
    leak: str = ""
    samples: dict[str, list[Sample]] = field(default_factory=lambda: defaultdict(list))
    report: list[str] = field(default_factory=list)
    failures: int = 0

    def run(self) -> list[str]:
        """Do it, and return what was wrong, a line for each."""
        with ExitStack() as stack:
            backends = {"http": Backend(), "grpc": Backend()}
            for backend in backends.values():
                stack.enter_context(backend)
            ports = (backends["http"].http_port, backends["grpc"].grpc_port)
            proxies = [stack.enter_context(FaultyProxy(port)) for port in ports]
            children = [
                {**CHILD, "name": "http", "endpoint": f"http://127.0.0.1:{proxies[0].port}"},
                {**CHILD, "name": "grpc", "endpoint": f"http://127.0.0.1:{proxies[1].port}", "protocol": "grpc"},
            ]
            settings = {
                "children": children,
                "spool": str(self.folder / "spool"),
                "leak": self.leak,
                "seconds": self.seconds,
            }
            with (self.folder / "errors").open("w+") as errors:
                program = stack.enter_context(_program(settings, errors))
                # Its workers end when it does.
                stack.callback(program.kill)
                said = self._soak(program, proxies)
                code = program.wait(PATIENCE_SECONDS)
        return [
            *([] if code == 0 else [f"the program ended with {code}: {(self.folder / 'errors').read_text()[-2000:]}"]),
            *self._growing(),
            *self._missing(said, backends),
        ]

    def _soak(self, program: subprocess.Popen[str], proxies: Sequence[FaultyProxy]) -> dict[str, Any]:
        assert program.stdin is not None
        assert program.stdout is not None
        workers = json.loads(program.stdout.readline())["workers"]
        processes = {"parent": psutil.Process(program.pid)}
        processes |= {f"worker {number}": psutil.Process(pid) for number, pid in enumerate(workers)}
        is_over = threading.Event()
        failing = threading.Thread(target=self._fail_by_turns, args=(proxies, is_over))
        failing.start()
        begin = time.monotonic()
        while (now := time.monotonic() - begin) < self.seconds:
            for name, process in processes.items():
                memory, threads, descriptors = _held_by(process)
                if now > self.seconds * WARM_UP:
                    self.samples[name].append(Sample(now, memory, threads, descriptors))
            time.sleep(min(2.0, self.seconds / 100))
        is_over.set()
        failing.join()
        program.stdin.close()
        said: dict[str, Any] = json.loads(program.stdout.readline())
        return said

    def _fail_by_turns(self, proxies: Sequence[FaultyProxy], is_over: threading.Event) -> None:
        """Let one backend fail, then both be well, then the other one fail, and so on; in the end both are well."""
        phase_seconds = min(LONGEST_PHASE_SECONDS, self.seconds / 60)
        for fault in cycle(FAULTS):
            for proxy in proxies:
                proxy.fault = fault
                self.failures += 1
                is_over.wait(phase_seconds)
                proxy.fault = None
                if is_over.wait(phase_seconds):
                    return

    def _growing(self) -> Iterator[str]:
        for name, samples in self.samples.items():
            for kind, most in MOST_GROWTH.items():
                values = [float(getattr(sample, kind)) for sample in samples]
                grown = growth([sample.time for sample in samples], values)
                seconds = samples[-1].time - samples[0].time
                line = f"{name}: {kind} between {min(values):.1f} and {max(values):.1f}"
                self.report.append(f"{line}, growth {grown:+.2f} in {seconds:.0f} s")
                if grown > most:
                    yield f"{name}: {kind} {'grows' if kind == 'memory' else 'grow'} by {grown:.1f}, more than {most}"

    def _missing(self, said: dict[str, Any], backends: Mapping[str, Backend]) -> Iterator[str]:
        logged, stats = said["logged"], said["stats"]
        total = sum(logged.values())
        for child, backend in backends.items():
            missing = {source: logged[source] - sum(map(bool, backend.arrivals[source])) for source in logged}
            duplicates = sum(map(sum, backend.arrivals.values())) - total + sum(missing.values())
            line = f"{child}: {total} events logged, {sum(missing.values())} missing"
            self.report.append(f"{line}, {duplicates} duplicates, after {self.failures} failures by turns")
            self.report.append(f"{child}: {stats[child]}")
            for source, number in missing.items():
                if number:
                    yield f"{child}: {number} of {logged[source]} events of {source} are missing"
            account = stats[child]
            if (account["accepted"], account["delivered"]) != (total, total):
                yield f"{child}: {total} events were logged, and its account is {account}"


def _program(settings: dict[str, Any], errors: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.soak.program", json.dumps(settings)]
    return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True)


def _held_by(process: psutil.Process) -> tuple[float, int, int]:
    with process.oneshot():
        return process.memory_info().rss / 2**20, process.num_threads(), process.num_fds()
