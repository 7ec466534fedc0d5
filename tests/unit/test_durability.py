"""Which events survive a process with each `durability`, in simulated time. Real processes die in tests/integration."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from zenml.stack import Stack

from composite_logstore.delivery import recovery, writer, writers
from composite_logstore.spool.folder import Spool
from composite_logstore.spool.reader import SegmentReader
from composite_logstore.testing import SimulatedBackend, SimulatedClock
from tests.deep import mostly_deep
from tests.simulation import Machine, assert_accounts_add_up, folders_of_processes, make_child, make_store


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The warnings about the spool."""
    told: list[str] = []
    monkeypatch.setattr(writer.logger, "warning", told.append)
    return told


def test_with_write_ahead_an_event_is_on_disk_before_emit_returns(tmp_path: Path, clock: SimulatedClock) -> None:
    machine = Machine(clock, tmp_path, "write_ahead", a={})
    machine.start()
    machine.log(*"abc")
    machine.die()
    machine.start()
    machine.log("d")
    clock.advance(5)
    assert sorted(machine.backends["a"].messages) == list("abcd")
    assert machine.store.stats()["a"]["accepted"] == 4
    assert_accounts_add_up(machine.store.stats())


def test_with_spill_undelivered_events_are_on_disk_within_a_second(tmp_path: Path, clock: SimulatedClock) -> None:
    machine = Machine(clock, tmp_path, "spill", a={}, dead={})
    machine.backends["dead"].fault = "refused"
    machine.start()
    machine.log(*"abc")
    clock.advance(1)
    machine.log("lost")
    machine.die()
    assert machine.backends["a"].messages == list("abc")
    machine.backends["dead"].fault = None
    machine.start()
    machine.log("d")
    clock.advance(60)
    assert sorted(machine.backends["dead"].messages) == list("abcd")
    assert machine.backends["a"].messages == list("abcd")
    # The new process lives, and has nothing on disk but the name of its stream.
    (folder,) = folders_of_processes(tmp_path)
    assert list(Spool.look(folder).reader.read(-1, 99)) == []


@pytest.mark.parametrize("tenths", range(0, 16))
def test_acknowledged_events_are_not_delivered_again_whenever_the_process_is_killed(
    tmp_path: Path, clock: SimulatedClock, tenths: int
) -> None:
    """Including events that were written later, for another child."""
    machine = Machine(clock, tmp_path, "spill", healthy={}, dead={})
    machine.backends["dead"].fault = "unavailable"
    machine.start()
    machine.log(*"abc")
    machine.store.flush(blocking=False)
    clock.advance(0)
    machine.log("d")
    clock.advance(tenths / 10)
    machine.die()
    machine.start()
    machine.log("e")
    clock.advance(5)
    received = machine.backends["healthy"].messages
    assert sorted(received) == sorted(set(received))
    assert set(received) - {"d"} == set("abce")


def test_with_spill_events_of_healthy_children_never_touch_the_disk(tmp_path: Path, clock: SimulatedClock) -> None:
    machine = Machine(clock, tmp_path, "spill", a={}, b={})
    machine.start()
    for _ in range(100):
        machine.log(*"abc")
        clock.advance(0.5)
    # The file of `composite-logstore status` has numbers alone, and the spool the name of the stream.
    (folder,) = folders_of_processes(tmp_path)
    assert {path.parent.name for path in tmp_path.rglob("*") if path.is_file()} == {"status", folder.name}
    assert list(Spool.look(folder).reader.read(-1, 999)) == []


@pytest.mark.parametrize("durability", ["spill", "write_ahead"])
def test_a_full_queue_loses_nothing(tmp_path: Path, clock: SimulatedClock, durability: str) -> None:
    machine = Machine(clock, tmp_path, durability, a={"max_queue_size": 10, "max_export_batch_size": 4})
    machine.backends["a"].fault = "refused"
    machine.start()
    messages = [str(number) for number in range(500)]
    for message in messages:
        machine.log(message)
    assert machine.store.stats()["a"]["pending"] == 500
    clock.advance(10)
    machine.backends["a"].fault = None
    clock.advance(60)
    assert machine.backends["a"].messages == messages
    assert machine.store.stats()["a"]["delivered"] == 500


@pytest.mark.parametrize("durability", ["spill", "write_ahead"])
def test_an_orderly_end_loses_nothing(tmp_path: Path, clock: SimulatedClock, durability: str) -> None:
    machine = Machine(clock, tmp_path, durability, a={"max_queue_size": 10}, b={})
    machine.backends["a"].fault = "silent"
    machine.start()
    messages = [str(number) for number in range(50)]
    machine.log(*messages)
    machine.store.writer.close(3)
    machine.die()
    machine.backends["a"].fault = None
    machine.backends["a"].received.clear()
    machine.start()
    machine.log("next")
    clock.advance(30)
    assert sorted(machine.backends["a"].messages, key=messages.__contains__)[-50:] == messages
    assert_accounts_add_up(machine.store.stats())


def test_a_full_spool_drops_the_oldest_events_and_counts_them(tmp_path: Path, clock: SimulatedClock) -> None:
    machine = Machine(clock, tmp_path, "write_ahead", a={"max_queue_size": 2, "max_export_batch_size": 1}, b={})
    machine.backends["a"].fault = "refused"
    machine.start(spool_max_bytes=17_000_000)
    for number in range(30):
        machine.log(f"{number} " + "x" * 1_000_000)
        clock.advance(0.1)
    assert sum(path.stat().st_size for path in tmp_path.glob("*/*/*.log")) <= 17_000_000
    machine.backends["a"].fault = None
    clock.advance(60)
    stats = machine.store.stats()
    assert_accounts_add_up(stats)
    assert stats["b"]["delivered"] == 30
    assert stats["a"]["pending"] == 0
    assert 0 < stats["a"]["dropped"] < 30
    numbers = [int(message.split()[0]) for message in machine.backends["a"].messages]
    assert numbers == sorted(set(numbers))
    assert len(numbers) == stats["a"]["delivered"]


def test_the_backlog_of_a_dead_child_delays_no_other_and_needs_one_thread(
    tmp_path: Path, clock: SimulatedClock
) -> None:
    machine = Machine(clock, tmp_path, "write_ahead", a={}, dead={})
    machine.backends["dead"].fault = machine.backends["a"].fault = "refused"
    for number in range(20):
        machine.start()
        machine.log(str(number))
        machine.die()
    machine.backends["a"].fault = None
    machine.start()
    machine.log("new")
    clock.advance(60)
    # Each process's events in its order; the last one's own are beside them.
    assert [message for message in machine.backends["a"].messages if message != "new"] == [str(n) for n in range(20)]
    assert len([thread for thread in clock.threads if thread == "composite-logstore dead"]) == 2
    machine.backends["dead"].fault = None
    clock.advance(60)
    assert sorted(machine.backends["dead"].messages) == sorted([*map(str, range(20)), "new"])
    assert machine.store.stats()["dead"]["delivered"] == 21
    machine.die()
    assert [path.name for path in folders_of_processes(tmp_path)] == [machine.store.writer.writer_id]


def test_two_processes_at_once_recover_no_folder_twice(tmp_path: Path, clock: SimulatedClock) -> None:
    machine = Machine(clock, tmp_path, "write_ahead", a={"max_export_batch_size": 1})
    machine.start()
    machine.log(*"abc")
    machine.die()
    first = machine.start()
    machine.log("d")
    # Another process: another writer, which has its own locks.
    writers._writers.clear()
    second = machine.start()
    machine.log("e")
    clock.advance(10)
    assert sorted(machine.backends["a"].messages) == list("abcde")
    assert first.stats()["a"]["accepted"] + second.stats()["a"]["accepted"] == 5


def test_a_renamed_child_keeps_its_backlog(tmp_path: Path, clock: SimulatedClock) -> None:
    machine = Machine(clock, tmp_path, "write_ahead", a={}, old={})
    machine.backends["old"].fault = machine.backends["a"].fault = "refused"
    machine.start()
    machine.log(*"abc")
    machine.die()
    machine.backends["a"].fault = None
    old = machine.children.pop("old")
    machine.children["new"] = old
    machine.backends["new"] = SimulatedBackend()
    machine.start()
    machine.log("d")
    clock.advance(10)
    assert sorted(machine.backends["a"].messages) == list("abcd")
    assert machine.backends["new"].messages == ["d"]
    machine.die()
    machine.children["old"] = machine.children.pop("new")
    machine.backends["old"].fault = None
    machine.start()
    machine.log("e")
    clock.advance(10)
    assert sorted(machine.backends["old"].messages) == list("abce")


def test_damaged_events_count_as_dropped_and_one_warning_names_the_file(
    tmp_path: Path, clock: SimulatedClock, warnings: list[str]
) -> None:
    machine = Machine(clock, tmp_path, "write_ahead", a={})
    machine.start()
    machine.log("first", "second", "third")
    machine.die()
    (segment,) = tmp_path.glob("*/*/*.log")
    segment.write_bytes(segment.read_bytes().replace(b"second", b"sec\0nd").replace(b"third", b"th\0rd"))
    machine.start()
    machine.log("new")
    clock.advance(10)
    assert sorted(machine.backends["a"].messages) == ["first", "new"]
    stats = machine.store.stats()
    assert_accounts_add_up(stats)
    assert (stats["a"]["accepted"], stats["a"]["dropped"]) == (4, 2)
    (warning,) = [text for text in warnings if "cannot be read" in text]
    assert str(segment) in warning
    (aside,) = tmp_path.glob("*/damaged/*")
    assert str(aside) in warning
    assert b"sec\0nd" in aside.read_bytes()


@pytest.mark.parametrize("durability", ["spill", "write_ahead"])
def test_a_folder_that_cannot_be_used_is_one_warning_when_it_begins_and_one_when_it_ends(
    tmp_path: Path, clock: SimulatedClock, warnings: list[str], durability: str
) -> None:
    blocked = tmp_path / "spool"
    blocked.write_text("a file where the folder should be")
    machine = Machine(clock, blocked, durability, a={"max_queue_size": 50}, dead={"max_queue_size": 5})
    machine.backends["dead"].fault = "refused"
    machine.start()
    for number in range(20):
        machine.log(str(number))
        clock.advance(0.2)
    (warning,) = [text for text in warnings if "cannot be used" in text]
    assert str(blocked) in warning
    assert "set 'spool_directory' to a folder that can be written and locked" in warning
    assert machine.backends["a"].messages == [str(number) for number in range(20)]
    blocked.unlink()
    for number in range(20, 30):
        machine.log(str(number))
        clock.advance(0.2)
    assert len([text for text in warnings if "can be used again" in text]) == 1
    machine.backends["dead"].fault = None
    clock.advance(60)
    stats = machine.store.stats()
    assert_accounts_add_up(stats)
    assert stats["dead"]["pending"] == 0
    assert stats["dead"]["dropped"] > 0
    messages = machine.backends["dead"].messages
    assert len(messages) == stats["dead"]["delivered"]
    assert messages == sorted(messages, key=int)


def test_write_ahead_is_refused_before_a_run_if_the_folder_cannot_be_used(
    tmp_path: Path, clock: SimulatedClock
) -> None:
    (tmp_path / "spool").write_text("a file where the folder should be")
    machine = Machine(clock, tmp_path / "spool", "write_ahead", a={})
    check = machine.start().validator._custom_validation_function
    assert check is not None
    stack = cast("Stack", SimpleNamespace(artifact_store=None))
    is_fine, why = check(stack)
    assert not is_fine
    assert "'durability' is write_ahead" in why
    assert "set 'spool_directory' to a folder that can be written and locked" in why
    machine.disk = tmp_path / "other"
    assert machine.start().validator._custom_validation_function(stack) == (True, "")  # type: ignore[misc]
    assert list((tmp_path / "other").glob("*/*")) == []


def test_a_spool_that_is_removed_is_made_again(tmp_path: Path, clock: SimulatedClock) -> None:
    machine = Machine(clock, tmp_path, "spill", a={}, dead={})
    machine.backends["dead"].fault = "refused"
    machine.start()
    machine.log(*"abc")
    clock.advance(2)
    for folder in folders_of_processes(tmp_path):
        shutil.rmtree(folder)
    for message in "defghi":
        machine.log(message)
        clock.advance(1)
    assert machine.backends["a"].messages == list("abcdefghi")
    machine.die()
    machine.backends["dead"].fault = None
    machine.start()
    machine.log("j")
    clock.advance(60)
    assert set("efghij") <= set(machine.backends["dead"].messages)


def test_the_limit_includes_the_folders_of_dead_processes(tmp_path: Path, clock: SimulatedClock) -> None:
    machine = Machine(clock, tmp_path, "write_ahead", a={"max_queue_size": 2, "max_export_batch_size": 1})
    machine.backends["a"].fault = "refused"
    for process in range(4):
        machine.start(spool_max_bytes=17_000_000)
        for number in range(7):
            machine.log(f"{process} {number} " + "x" * 1_000_000)
            clock.advance(0.5)
        assert sum(path.stat().st_size for path in tmp_path.glob("*/*/*.log")) <= 17_000_000
        dropped = machine.store.stats()["a"]["dropped"]
        machine.die()
    assert dropped > 0
    machine.backends["a"].fault = None
    machine.start(spool_max_bytes=17_000_000)
    machine.log("9 9 last")
    clock.advance(60)
    held = [tuple(map(int, message.split()[:2])) for message in machine.backends["a"].messages]
    # What is oldest gave way; what is newest is there.
    assert [(3, number) for number in range(7)] == [place for place in held if place[0] == 3]
    assert (0, 0) not in held
    assert_accounts_add_up(machine.store.stats())


def test_only_the_latest_update_of_each_second_arrives_from_the_spool(tmp_path: Path, clock: SimulatedClock) -> None:
    machine = Machine(clock, tmp_path, "write_ahead", a={"progress": "latest"}, b={})
    for backend in machine.backends.values():
        backend.fault = "refused"
    machine.start()
    for number in range(40):
        record = logging.LogRecord("stdout", 20, "", 0, f"\r{number} %", (), None)
        record.created = 1_790_000_000 + number / 10
        machine.store.emit(machine.origin, record)
    machine.die()
    for backend in machine.backends.values():
        backend.fault = None
    machine.start()
    machine.log("end")
    clock.advance(10)
    assert [text.strip() for text in machine.backends["a"].messages if "%" in text] == ["9 %", "19 %", "29 %", "39 %"]
    assert len(machine.backends["b"].messages) == 41
    assert machine.store.stats()["a"]["accepted"] == 5


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match="'spool_directory' must be an absolute path, or begin with ~/"):
        make_store(make_child("a"), spool_directory="here")
    with pytest.raises(ValueError, match="spool_max_bytes"):
        make_store(make_child("a"), spool_max_bytes=1000)


@pytest.mark.parametrize("durability", ["spill", "write_ahead"])
def test_a_child_that_wants_few_events_keeps_nothing_on_disk(
    tmp_path: Path, clock: SimulatedClock, durability: str
) -> None:
    machine = Machine(clock, tmp_path, durability, a={}, errors={"min_level": "ERROR"})
    machine.backends["a"].fault = "refused"
    machine.start()
    for number in range(50):
        machine.log(str(number))
        clock.advance(0.5)
    clock.advance(1)
    machine.die()
    machine.backends["a"].fault = None
    machine.start()
    machine.log("new")
    clock.advance(60)
    assert len(machine.backends["a"].messages) == 51
    machine.store.writer.close(3)
    assert folders_of_processes(tmp_path) == []


def test_the_number_of_open_recovered_journals_is_limited(
    tmp_path: Path, clock: SimulatedClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("composite_logstore.delivery.recovery._MOST_JOURNALS", 3)
    machine = Machine(clock, tmp_path, "write_ahead", a={})
    machine.backends["a"].fault = "refused"
    for number in range(12):
        machine.start()
        machine.log(str(number))
        machine.die()
    machine.start()
    machine.log("new")
    clock.advance(5)
    assert len(machine.store.writer._recovery.journals) == 3
    machine.backends["a"].fault = None
    clock.advance(60)
    assert machine.backends["a"].messages[-12:] == [str(number) for number in range(12)]
    assert machine.store.stats()["a"]["delivered"] == 13


def test_a_disk_that_cannot_be_read_for_a_while_costs_only_time(
    tmp_path: Path, clock: SimulatedClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(clock, tmp_path, "write_ahead", a={"max_queue_size": 5})
    machine.backends["a"].fault = "refused"
    machine.start()
    messages = [str(number) for number in range(50)]
    machine.log(*messages)
    machine.backends["a"].fault = None

    def too_many(*_: object) -> Any:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr("composite_logstore.spool.reader.SegmentReader.items", too_many)
        clock.advance(60)
        assert "Too many open files" in machine.store.stats()["a"]["last_error"]
        assert machine.store.stats()["a"]["pending"] > 0
    clock.advance(60)
    assert machine.backends["a"].messages == messages


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("nobody foresaw it"),
        RecursionError(),
        MemoryError(),
        OSError(24, "Too many open files"),
        KeyError(1),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize(
    ("owner", "name"),
    mostly_deep([(Spool, "recover"), (SegmentReader, "scan"), (Spool, "set_aside"), (Spool, "acknowledged")], kept=2),
)
def test_a_folder_that_cannot_be_recovered_delays_no_other_and_is_retried(
    tmp_path: Path,
    clock: SimulatedClock,
    monkeypatch: pytest.MonkeyPatch,
    warnings: list[str],
    error: Exception,
    owner: type,
    name: str,
) -> None:
    machine = Machine(clock, tmp_path, "write_ahead", a={})
    machine.backends["a"].fault = "refused"
    for number in range(3):
        machine.start()
        machine.log(str(number))
        machine.die()
    _, odd, _ = sorted(folders_of_processes(tmp_path), key=lambda folder: (folder / "owner.lock").stat().st_mtime_ns)
    machine.backends["a"].fault = None
    real = getattr(owner, name)

    def failing(one: Any, *arguments: Any) -> Any:
        path = one if isinstance(one, Path) else one._folder.path if owner is SegmentReader else one.folder
        if path == odd:
            raise error
        return real(one, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing)
        machine.start()
        machine.log("own")
        clock.advance(150)
        assert sorted(machine.backends["a"].messages) == ["0", "2", "own"]
    assert len([text for text in warnings if str(odd) in text]) == 1
    clock.advance(70)
    assert sorted(machine.backends["a"].messages) == ["0", "1", "2", "own"]
    assert_accounts_add_up(machine.store.stats())
    assert not odd.exists()


def test_folders_may_vanish_during_recovery(
    tmp_path: Path, clock: SimulatedClock, monkeypatch: pytest.MonkeyPatch, warnings: list[str]
) -> None:
    machine = Machine(clock, tmp_path, "write_ahead", a={})
    machine.backends["a"].fault = "refused"
    for number in range(6):
        machine.start()
        machine.log(str(number))
        machine.die()
    machine.backends["a"].fault = None
    found = recovery.process_folders

    def vanishing(component: Path) -> list[Path]:
        folders = found(component)
        for folder in folders[::2]:
            shutil.rmtree(folder)
        return folders

    monkeypatch.setattr(recovery, "process_folders", vanishing)
    machine.start()
    machine.log("own")
    clock.advance(5)
    assert sorted(machine.backends["a"].messages) == ["1", "3", "5", "own"]
    assert not warnings


def test_a_refused_folder_is_recovered_once_it_is_corrected(
    tmp_path: Path, clock: SimulatedClock, warnings: list[str]
) -> None:
    machine = Machine(clock, tmp_path, "spill", a={})
    machine.backends["a"].fault = "refused"
    machine.start()
    machine.log("left")
    clock.advance(1)
    machine.die()
    machine.backends["a"].fault = None
    (folder,) = folders_of_processes(tmp_path)
    folder.chmod(0o777)
    machine.start()
    machine.log("own")
    clock.advance(10)
    assert machine.backends["a"].messages == ["own"]
    (warning,) = [text for text in warnings if str(folder) in text]
    assert "others can write" in warning
    folder.chmod(0o700)
    clock.advance(60)
    assert sorted(machine.backends["a"].messages) == ["left", "own"]
    assert warnings == [warning]
