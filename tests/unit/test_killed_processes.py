"""A stream tells that one of its processes has died without closing its logs, whoever finds its folder."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import socket
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from composite_logstore.capture import process
from composite_logstore.clock import Clock
from composite_logstore.delivery import writers
from composite_logstore.delivery.last_words import MOST_STREAMS
from composite_logstore.delivery.recovery import RecoveredJournal
from composite_logstore.delivery.states import Load
from composite_logstore.event import LogEvent
from composite_logstore.spool import segments
from composite_logstore.spool.folder import Spool
from composite_logstore.spool.format import Process
from composite_logstore.testing import SimulatedBackend, SimulatedClock
from tests.agents import Living, Place
from tests.events import NOON, SECOND, WRITER, make_events, make_stream
from tests.hostile import make_record
from tests.simulation import Machine, assert_accounts_add_up, folders_of_processes, make_child, make_logs
from tests.watching import LAST_WORDS

pytestmark = pytest.mark.last_words

DURABILITIES = pytest.mark.parametrize("durability", ["spill", "write_ahead"])


def entries(backend: SimulatedBackend) -> list[LogEvent]:
    return [event for event in backend.received if LAST_WORDS in event.message]


def kill_and_recover(machine: Machine) -> list[LogEvent]:
    """Kill the process, have another one find its folder, and return the entries, without those of the new process."""
    machine.die()
    machine.start()
    machine.log("next")
    machine.clock.advance(120)
    writers._close_all()
    return entries(machine.backends["a"])


@DURABILITIES
def test_the_entry_comes_though_all_was_delivered(tmp_path: Path, clock: SimulatedClock, durability: str) -> None:
    machine = Machine(clock, tmp_path, durability, a={})
    machine.start()
    stream = machine.origin.stream  # type: ignore[attr-defined]
    machine.log("a", "b")
    clock.advance(1)
    assert machine.backends["a"].messages == ["a", "b"]
    (entry,) = kill_and_recover(machine)
    assert entry.stream.id == stream.id
    assert (entry.level, entry.level_name, entry.logger_name) == (logging.ERROR, "ERROR", "composite_logstore")
    assert entry.details["host.name"] == socket.gethostname()
    assert entry.details["process.pid"] == os.getpid()
    assert str(os.getpid()) in entry.message
    assert ("is missing" in entry.message) == (durability == "write_ahead")
    assert entry.writer != WRITER
    assert entry.sequence == 0
    assert sorted(machine.backends["a"].messages) == sorted(["a", "b", entry.message, "next"])
    assert not folders_of_processes(tmp_path)


@DURABILITIES
def test_each_child_gets_the_entry_behind_the_last_events(
    tmp_path: Path, clock: SimulatedClock, durability: str
) -> None:
    machine = Machine(clock, tmp_path, durability, a={}, dead={}, critical={"min_level": "CRITICAL"})
    machine.backends["dead"].fault = "refused"
    machine.start()
    machine.log("a")
    clock.advance(2)
    machine.log("b")
    clock.advance(2)
    machine.backends["dead"].fault = None
    (entry,) = kill_and_recover(machine)
    told = [event.uid for event in machine.backends["dead"].received]
    (again,) = entries(machine.backends["dead"])
    assert again.uid == entry.uid
    assert [text for text in machine.backends["dead"].messages if text != "next"] == ["a", "b", entry.message]
    assert len(told) == len(set(told))
    # By its usual rules.
    assert machine.backends["critical"].messages == []
    assert_accounts_add_up(machine.store.stats())


@DURABILITIES
@pytest.mark.parametrize("end", ["in order", "after its stream", "without a record", "as a worker of a pool"])
def test_another_end_adds_none(
    tmp_path: Path, clock: SimulatedClock, durability: str, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(clock, tmp_path, durability, a={})
    if end == "as a worker of a pool":
        monkeypatch.setattr("composite_logstore.delivery.stream_marks.may_be_killed", lambda: True)
    machine.start()
    if end != "without a record":
        machine.log("a")
        clock.advance(2)
    if end == "after its stream":
        machine.store.deregister_origin(machine.origin)
        clock.advance(1)
    if end == "in order":
        writers._close_all()
    assert kill_and_recover(machine) == []


def test_in_its_first_moments_or_without_a_spool_a_death_cannot_be_seen(tmp_path: Path, clock: SimulatedClock) -> None:
    machine = Machine(clock, tmp_path, "spill", a={})
    machine.start()
    machine.log("a")
    clock.advance(0.1)
    assert kill_and_recover(machine) == []
    machine = Machine(clock, tmp_path, "memory", a={})
    machine.start()
    machine.log("a")
    clock.advance(5)
    assert kill_and_recover(machine) == []


def test_a_second_step_in_the_same_process_is_told_alone(tmp_path: Path, clock: SimulatedClock) -> None:
    machine = Machine(clock, tmp_path, "spill", a={})
    machine.start()
    machine.log("a")
    clock.advance(2)
    machine.store.deregister_origin(machine.origin)
    machine.origin = machine.store.register_origin("two", make_logs(machine.store), {})
    second = machine.origin.stream  # type: ignore[attr-defined]
    machine.log("b")
    clock.advance(2)
    (entry,) = kill_and_recover(machine)
    assert entry.stream.id == second.id


def test_events_of_healthy_children_are_not_on_disk_though_the_stream_s_name_is(
    tmp_path: Path, clock: SimulatedClock
) -> None:
    machine = Machine(clock, tmp_path, "spill", a={})
    machine.start()
    for number in range(100):
        machine.log(f"said {number}")
        clock.advance(0.5)
    (segment,) = tmp_path.glob("*/*/*.log")
    assert segment.stat().st_size <= 1 << 16
    assert b"said" not in segment.read_bytes()
    assert not list(tmp_path.glob("*/*/spare"))


def test_streams_whose_events_alternate_are_all_named_and_again_when_the_folder_is_gone(
    tmp_path: Path, clock: SimulatedClock
) -> None:
    machine = Machine(clock, tmp_path, "spill", a={})
    machine.start()
    other = machine.store.register_origin("two", make_logs(machine.store), {})
    ids = [str(origin.stream.id).encode() for origin in (machine.origin, other)]  # type: ignore[attr-defined]
    for _ in range(2):
        for number in range(10):
            machine.log(f"said {number}")
            machine.store.emit(other, make_record("said by the other"))
        clock.advance(5)
        (segment,) = tmp_path.glob("*/*/*.log")
        content = segment.read_bytes()
        assert all(id in content for id in ids)
        assert b"said" not in content
        shutil.rmtree(segment.parent)
        clock.advance(5)


def test_where_the_spool_cannot_be_used_healthy_children_cause_no_warning(
    tmp_path: Path, clock: SimulatedClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(clock, tmp_path, "spill", a={})
    asked = 0

    def fail(*_: Any, **__: Any) -> Spool:
        nonlocal asked
        asked += 1
        raise OSError(errno.EROFS, "read-only")

    monkeypatch.setattr(Spool, "create", fail)
    machine.start()
    for _ in range(10):
        machine.log("a")
        clock.advance(2)
    assert asked == 1
    assert machine.store.stats()["a"]["last_error"] is None


# In the folder


RANKED = Process("gpu-7", 4711, 3, is_write_ahead=True, has_joined=True)


def dead_folder(tmp_path: Path, *messages: str, streams: int = 1, process: Process | None = RANKED) -> Path:
    """Return the folder of a process that was killed, each of whose events is of another stream in turn."""
    spool = Spool.create(tmp_path / "component", WRITER, ["a", "b"], process=process)
    origins = [make_stream() for _ in range(streams)]
    for number, message in enumerate(messages):
        (event,) = make_events([message], origins[number % streams], number)
        spool.segments.append(event, lambda size: True)
    spool.abandon()
    return spool.folder


def recovered(folder: Path, *children: str, clock: Clock | None = None) -> tuple[RecoveredJournal, list[LogEvent]]:
    """Return the recovered journal, and all events that the first child gets."""
    spool = Spool.recover(folder)
    assert spool is not None
    journal = RecoveredJournal(spool, {name: make_child(name) for name in children}, clock or Clock())
    read: list[LogEvent] = []
    if journal.deliveries:
        while batch := journal.load(journal.deliveries[0], Load(read[-1].number if read else -1, 500, 500)):
            read += batch
    return journal, read


def test_the_entry_says_which_process_it_was(tmp_path: Path) -> None:
    _, events = recovered(dead_folder(tmp_path, "a"), "a")
    assert [event.details.get("zenml.log.rank") for event in events] == [None, 3]
    assert "4711" in events[-1].message
    assert "gpu-7" in events[-1].message


@pytest.mark.parametrize(
    ("rank", "has_joined", "level"),
    [(None, False, "ERROR"), (0, False, "ERROR"), (3, True, "ERROR"), (None, True, "INFO")],
)
def test_a_worker_that_its_launcher_may_have_killed_is_no_error(
    tmp_path: Path, rank: int | None, has_joined: bool, level: str
) -> None:
    _, events = recovered(dead_folder(tmp_path, "a", process=RANKED._replace(rank=rank, has_joined=has_joined)), "a")
    assert [event.level_name for event in events[1:]] == [level]


def test_the_entry_is_there_once_however_often_the_folder_is_recovered(tmp_path: Path) -> None:
    folder = dead_folder(tmp_path, "a")
    found = []
    for children in (["a"], ["b"], [], ["a", "b"], ["c"]):
        journal, events = recovered(folder, *children)
        found.append([event.uid for event in events])
        journal.spool.abandon()
    first, second, none, both, other = found
    assert first == second == both
    assert len(first) == 2
    assert none == other == []


@pytest.mark.parametrize("call", ["create_file", "put", "rename"])
def test_a_recoverer_that_is_killed_while_it_adds_the_entry_leaves_none_or_a_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    from composite_logstore.spool.private_folder import PrivateFolder

    folder = dead_folder(tmp_path, "a")
    real = getattr(PrivateFolder, call)

    class KilledError(BaseException):
        pass

    def killed(self: PrivateFolder, *given: Any) -> Any:
        real(self, *given)
        raise KilledError

    spool = Spool.recover(folder)
    assert spool is not None
    with monkeypatch.context() as patched:
        patched.setattr(PrivateFolder, call, killed)
        with pytest.raises(KilledError):
            RecoveredJournal(spool, {"a": make_child("a")}, Clock())
    spool.abandon()
    journal, events = recovered(folder, "a")
    assert [LAST_WORDS in event.message for event in events] == [False, True]
    assert journal.deliveries[0].stats().pending == 2


def test_a_full_disk_costs_the_entry_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = dead_folder(tmp_path, "a")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    with monkeypatch.context() as patched:
        patched.setattr(segments, "_write_whole", full)
        journal, events = recovered(folder, "a")
        assert [event.message for event in events] == ["a"]
        journal.spool.abandon()
    _, events = recovered(folder, "a")
    assert len(events) == 2


def test_it_is_above_what_was_delivered_and_never_on_disk(tmp_path: Path) -> None:
    folder = dead_folder(tmp_path, "a")
    spool = Spool.recover(folder)
    assert spool is not None
    spool.acknowledge("a", 1_000)
    spool.abandon()
    journal, events = recovered(folder, "a")
    assert [event.number for event in events if event.number >= 1_000] == [1_000]
    assert journal.deliveries[0].stats().pending == 1


@pytest.mark.parametrize("seconds", [0.0, 4e9, -1.0])
def test_a_clock_that_is_far_off_moves_it_before_no_event(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    clock = Clock()
    monkeypatch.setattr(clock, "time", lambda: seconds)
    _, events = recovered(dead_folder(tmp_path, "a"), "a", clock=clock)
    assert events[-1].time_unix_nano >= max(NOON, int(seconds * SECOND))
    assert events[-1].time_unix_nano > events[0].time_unix_nano


def test_of_many_streams_those_with_the_latest_events_get_it(tmp_path: Path) -> None:
    folder = dead_folder(tmp_path, *(str(number) for number in range(10_000)), streams=10_000)
    _, events = recovered(folder, "a")
    told = [event for event in events if LAST_WORDS in event.message]
    assert len(told) == MOST_STREAMS
    assert [event.stream.id for event in told] == [
        event.stream.id for event in events[-2 * MOST_STREAMS : -MOST_STREAMS]
    ]
    assert {event.sequence for event in told} == {0}


def test_a_folder_that_does_not_say_whose_it_is_gets_none(tmp_path: Path) -> None:
    """Such as one of an earlier release, which has no marks."""
    _, events = recovered(dead_folder(tmp_path, "a", process=None), "a")
    assert [event.message for event in events] == ["a"]


@pytest.mark.parametrize(
    "value",
    [None, [], ["h", 1, None], ["h", 1, None, 1], [1, 1, None, True], ["h", True, None, True], ["h", -1, 0, True]],
)
def test_a_header_with_another_process_is_no_error(tmp_path: Path, value: Any) -> None:
    import orjson

    from composite_logstore.spool.format import encode_line

    folder = dead_folder(tmp_path, "a")
    (segment,) = folder.glob("*.log")
    header, rest = segment.read_bytes().split(b"\n", 1)
    segment.write_bytes(encode_line(orjson.dumps({**orjson.loads(header[9:]), "process": value})) + rest)
    _, events = recovered(folder, "a")
    assert [event.message for event in events] == ["a"]


def test_a_worker_of_a_pool_is_known_by_being_daemonic(monkeypatch: pytest.MonkeyPatch) -> None:
    import multiprocessing

    assert not process.may_be_killed()
    monkeypatch.setitem(multiprocessing.current_process()._config, "daemon", True)  # type: ignore[attr-defined]
    assert process.may_be_killed()


@pytest.mark.parametrize(("mode", "expected"), [(1, True), (0, False), (None, False)])
def test_a_worker_of_ray_is_known_by_ray(mode: int | None, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = SimpleNamespace(global_worker=SimpleNamespace(mode=mode), WORKER_MODE=1)
    monkeypatch.setitem(sys.modules, "ray._private.worker", ray)
    assert process.may_be_killed() is expected
    # Another release may keep it elsewhere.
    monkeypatch.setitem(sys.modules, "ray._private.worker", SimpleNamespace())
    assert not process.may_be_killed()


# Beside an agent


def test_an_agent_adds_it_to_what_a_dead_process_has_left(
    tmp_path: Path, clock: SimulatedClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place(clock, tmp_path)
    monkeypatch.setattr("composite_logstore.operations.agent.registered", place.registered)
    monkeypatch.setattr("composite_logstore.operations.agent.check_server", lambda: None)
    place.leave("a", "b")
    agent = place.agent()
    place.work(agent, 2)
    for child in place.children:
        assert [LAST_WORDS in text for text in place.delivered(child)] == [False, False, True]
    assert place.folders == []
    agent.end()


def test_an_agent_that_delivers_for_a_process_adds_it_behind_the_last_events(
    tmp_path: Path, clock: SimulatedClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place(clock, tmp_path)
    monkeypatch.setattr("composite_logstore.operations.agent.registered", place.registered)
    monkeypatch.setattr("composite_logstore.operations.agent.check_server", lambda: None)
    process = Living(place)
    process.spool.segments.process = RANKED
    agent = place.agent()
    process.log("a", "b")
    place.work(agent, 2)
    assert place.delivered("archive") == ["a", "b"]
    process.log("c")
    process.die()
    place.work(agent, 2)
    for child in place.children:
        assert [LAST_WORDS in text for text in place.delivered(child)] == [False, False, False, True]
        (entry,) = entries(place.backends[child])
        assert "4711" in entry.message
    assert place.folders == []
    agent.end()
