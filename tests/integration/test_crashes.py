"""A process that is killed at any instant, again and again, has lost nothing that `emit` has returned for.

The order of things prints its seed; `CRASH_SEED` in the environment plays it again, if not to the millisecond.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from tests import crashing
from tests.crashing import LogStoreSettings, Nursery, Process, backlogs_in, deliver_backlog, name_of
from tests.servers.otlp_receiver import Answer, OtlpReceiver, Record
from tests.servers.three_backends import CHILDREN, Servers, ThreeBackends, assert_in_order, without_copies
from tests.simulation import make_logs
from tests.watching import fetched, wait_until

pytestmark = pytest.mark.integration

THREADS = 4
STREAMS = 3
FAULTS = ("refused", "silent", "late", "reset", "cut")
MOMENTS = (
    "before the first event",
    "while it adopts",
    "in a burst",
    "when the collector has an export",
    "when the archive has an export",
    "at any time",
)


@pytest.fixture(scope="module")
def backends(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ThreeBackends]:
    with Servers.running(tmp_path_factory.mktemp("crashes")) as servers, ThreeBackends(servers) as backends:
        yield backends


def kill(process: Process, moment: str, rand: random.Random, backends: ThreeBackends) -> None:
    """Kill the process at such a moment, or after some time if that does not come."""
    if moment == "before the first event":
        time.sleep(rand.uniform(0, 0.05))
    elif moment == "while it adopts":
        process.wait_until_said("emitted")
        time.sleep(rand.uniform(0, 0.2))
    elif moment == "in a burst":
        process.wait_until_said("emitted", rand.randrange(1, 1_000), seconds=2)
    elif moment == "when the collector has an export":
        kill_in_an_export_to_the_collector(process, rand.randrange(1, 8), backends.servers.receiver)
    elif moment == "when the archive has an export":
        kill_in_an_export_to_the_archive(process, rand.randrange(1, 8), backends.servers.folder)
    else:
        time.sleep(rand.uniform(0, 1))
    process.kill()


def kill_in_an_export_to_the_collector(process: Process, number: int, receiver: OtlpReceiver) -> None:
    """Kill it when the collector has its nth export, and it has no answer."""
    remaining = [None] * number
    killed = threading.Event()

    def judge(records: list[Record]) -> Answer:
        remaining.pop()
        if not remaining:
            receiver.judge = None
            process.kill()
            killed.set()
        return Answer()

    receiver.judge = judge
    killed.wait(2)
    receiver.judge = None


def kill_in_an_export_to_the_archive(process: Process, number: int, folder: Path) -> None:
    """Kill it when a file in the archive has grown for the nth time."""

    def size() -> int:
        return sum(file.stat().st_size for file in folder.glob("logs/*.log"))

    end = time.monotonic() + 2
    for _ in range(number):
        before = size()
        # Without a pause: there is little time until it has noted that the export is done.
        while size() == before and time.monotonic() < end:
            pass
    process.kill()


@pytest.mark.parametrize("kills", [20, pytest.param(200, marks=pytest.mark.deep)])
def test_write_ahead_loses_nothing_however_often_the_process_is_killed(
    nursery: Nursery,
    backends: ThreeBackends,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
    kills: int,
) -> None:
    seed = int(os.environ.get("CRASH_SEED") or random.randrange(10**6))
    print(f"seed {seed}")
    rand = random.Random(seed)
    spool, output = tmp_path / "spool", tmp_path / "output"
    log_store = LogStoreSettings(
        backends.children(
            schedule_delay_millis=20,
            max_export_batch_size=200,
            retry_initial_interval_millis=50,
            retry_max_interval_millis=200,
            export_timeout_millis=2_000,
        ),
        {"durability": "write_ahead", "spool_directory": str(spool)},
        streams=[uuid4() for _ in range(STREAMS)],
    )
    moments = [MOMENTS[number % len(MOMENTS)] for number in range(kills)]
    rand.shuffle(moments)
    processes = []
    absent: set[str] = set()
    for number, moment in enumerate(moments):
        for child in CHILDREN:
            if child in absent and rand.random() < 0.4:
                absent.remove(child)
                backends.mend(child)
            elif child not in absent and rand.random() < 0.2:
                absent.add(child)
                backends.fail(child, rand.choice(FAULTS))
        arguments = (THREADS, rand.randrange(10**6))
        process = nursery.start(crashing.log_in_bursts, log_store, *arguments, name=f"{number}", output=output)
        kill(process, moment, rand, backends)
        assert process.wait() == -signal.SIGKILL, output.read_text()
        processes.append(process)
        print(
            f"{number}: {moment}, {len(process.emitted)} events, {len(backlogs_in(spool))} folders; no {sorted(absent)}"
        )

    for child in absent:
        backends.mend(child)
    last = deliver_backlog(nursery, log_store, spool, output, seconds=250)

    acknowledged = {said.text for process in (*processes, last) for said in process.emitted}
    copies = backends.held(log_store.streams)
    held = {child: without_copies(copies[child]) for child in CHILDREN}
    numbers = ", ".join(f"{child} {len(held[child])} and {len(copies[child]) - len(held[child])}" for child in CHILDREN)
    record_property("said at the end", f"seed {seed}: {len(acknowledged)} acknowledged; held, and copies: {numbers}")
    for events in held.values():
        names = Counter(name_of(event.message) for event in events)
        assert acknowledged - set(names) == set()
        # What was not acknowledged is what each thread was about to say when it was killed.
        assert len(names) <= len(acknowledged) + kills * THREADS
        assert set(names.values()) == {1}
        assert_in_order(events)
        # They all have the same, what was not acknowledged as well.
        assert {event.uid for event in events} == {event.uid for event in held["archive"]}
    for primary in ("archive", "live"):
        store = log_store.open(primary)
        shown = [name_of(text) for id in log_store.streams for text in fetched(store, make_logs(store, id=id))]
        assert sorted(shown) == sorted(name_of(event.message) for event in held[primary])
        assert_threads_in_order(shown)


def assert_threads_in_order(names: list[str]) -> None:
    """Check that what each thread of each process has said is shown in the order in which it said it."""
    next_numbers: Counter[str] = Counter()
    for name in names:
        thread, _, number = name.rpartition("/")
        assert int(number) == next_numbers[thread]
        next_numbers[thread] += 1


def test_processes_that_start_at_once_deliver_nothing_twice(
    nursery: Nursery, backends: ThreeBackends, tmp_path: Path
) -> None:
    spool, output = tmp_path / "spool", tmp_path / "output"
    children = backends.children(
        schedule_delay_millis=50, retry_initial_interval_millis=50, retry_max_interval_millis=200
    )
    log_store = LogStoreSettings(children, {"durability": "write_ahead", "spool_directory": str(spool)})
    for child in CHILDREN:
        backends.fail(child, "refused")
    dead = [
        nursery.start(crashing.log_and_wait, log_store, 50, 100, name=f"dead-{number}", output=output)
        for number in range(5)
    ]
    for process in dead:
        assert process.wait_until_said("stats")
        process.kill()
        assert process.wait() == -signal.SIGKILL
    left = backlogs_in(spool)
    assert len(left) == len(dead)
    for child in CHILDREN:
        backends.mend(child)

    living = [
        nursery.start(crashing.log_and_deliver, log_store, name=f"living-{number}", output=output)
        for number in range(8)
    ]
    for process in living:
        process.tell()
    wait_until(lambda: not any(folder.exists() for folder in left), "what was left is delivered")
    for process in living:
        process.tell()
        assert process.wait() == 0, output.read_text()
    assert backlogs_in(spool) == []
    emitted = Counter(said.text for process in (*dead, *living) for said in process.emitted)
    for copies in backends.held(log_store.streams).values():
        assert Counter(name_of(event.message) for event in copies) == emitted
        assert_in_order(copies)


def test_a_line_that_a_kill_tore_is_no_damage(nursery: Nursery, backends: ThreeBackends, tmp_path: Path) -> None:
    spool, output = tmp_path / "spool", tmp_path / "output"
    children = backends.children(schedule_delay_millis=50, retry_initial_interval_millis=50)
    log_store = LogStoreSettings(children, {"durability": "write_ahead", "spool_directory": str(spool)})
    backends.fail("collector", "refused")
    killed = nursery.start(crashing.log_and_wait, log_store, 3, 1_000, output=output)
    assert killed.wait_until_said("stats")
    killed.kill()
    assert killed.wait() == -signal.SIGKILL
    # A kill in the middle of a copy leaves any part of the line that was copied. `emit` had not returned.
    (segment,) = spool.rglob("*.log")
    content = segment.read_bytes()
    begin = content.rindex(b"\n", 0, content.rindex(b"\n")) + 1
    end = content.rindex(b"\n") + 1
    torn = bytes(100) + content[begin + 100 : begin + 500] + bytes(end - begin - 500)
    segment.write_bytes(content[:begin] + torn + content[end:])
    backends.mend("collector")

    deliver_backlog(nursery, log_store, spool, output)
    names = sorted(name_of(event.message) for event in backends.held(log_store.streams)["collector"])
    assert names == ["a/0/0", "a/0/1", "next/0/0"]
    assert not list(spool.rglob("damaged"))
    assert "cannot be read" not in output.read_text()
