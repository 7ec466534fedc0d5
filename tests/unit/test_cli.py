"""The commands of `composite-logstore spool`, with real folders, simulated time and backends, and no ZenML."""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

import click
import pytest
from click.testing import CliRunner, Result

from composite_logstore import CompositeLogStoreConfig, UnavailableError
from composite_logstore.cli import progress
from composite_logstore.cli.main import main
from composite_logstore.delivery.account import ChildStats
from composite_logstore.event import Stream
from composite_logstore.operations.drain import _END_SECONDS, GIVE_UP_SECONDS
from composite_logstore.operations.inventory import LogStore, registered
from composite_logstore.spool.folder import Spool
from composite_logstore.spool.lock import release_all
from composite_logstore.testing import SimulatedBackend, SimulatedChildConfig, SimulatedClock, make_events
from tests.simulation import make_child

# The package has a function of this name.
INVENTORY = import_module("composite_logstore.operations.inventory")

PAGE = (Path(__file__).parents[2] / "docs" / "command-line.md").read_text()

REASONS = [
    "the child is disabled",
    "the child is no longer configured",
    "'durability' is 'memory' now",
    "'spool_directory' is another one now",
    "in use by a running process",
    "the child's backend is not installed here",
    "its settings cannot be read by the version that is installed here",
    "not delivered yet",
    "the log store is no longer registered",
]


class Machine:
    """A machine with log stores and the folders of their processes."""

    def __init__(self, disk: Path, clock: SimulatedClock) -> None:
        self.disk = disk
        self.clock = clock
        self.stores: list[LogStore] = []
        self.trouble: BaseException | None = None

    def registered(self) -> list[LogStore]:
        if self.trouble:
            raise self.trouble
        return self.stores

    def register(self, *children: Any, name: str = "logs", id: UUID | None = None, **settings: Any) -> LogStore:
        settings = {"spool_directory": str(self.disk), **settings}
        config = CompositeLogStoreConfig(primary=children[0].name, children=list(children), **settings)
        store = LogStore(id or uuid4(), name, config)
        self.stores = [other for other in self.stores if other.name != name] + [store]
        return store

    def leave(
        self,
        store: LogStore | UUID,
        messages: Any,
        children: Any = "a",
        is_running: bool = False,
        root: Path | None = None,
        **how: Any,
    ) -> Path:
        """Make the folder of a process that was killed, or that runs."""
        writer = secrets.token_hex(8)[:15]
        id = store.id if isinstance(store, LogStore) else store
        left = Spool.create((root or self.disk) / str(id), writer, children)
        for event in make_events(messages, writer=writer, **how):
            left.segments.append(event, lambda _: True)
        if not is_running:
            left.abandon()
        return left.folder

    def run(self, *arguments: str, input: str | None = None) -> Result:
        result = CliRunner().invoke(main, ["spool", *arguments], input=input)
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        return result


@pytest.fixture
def machine(tmp_path: Path, clock: SimulatedClock, monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.setenv("ZENML_CONFIG_PATH", str(tmp_path / "zenml"))
    machine = Machine(tmp_path / "spool", clock)
    monkeypatch.setattr(INVENTORY, "registered", machine.registered)
    return machine


def backend(name: str) -> SimulatedBackend:
    return SimulatedChildConfig.backends[name]


def rows(result: Result) -> list[list[str]]:
    """Return the cells of the table, without its header."""
    lines = [line for line in result.output.splitlines() if "   " in line or "  " in line.strip()]
    return [re.split(r" {2,}", line.strip()) for line in lines if not line.startswith("LOG STORE")]


def acknowledged(folder: Path, child: str) -> int:
    return Spool.look(folder).acknowledged(child)


# list


def test_list_shows_log_store_process_child_and_waiting_events(machine: Machine) -> None:
    store = machine.register(make_child("a"), make_child("b"))
    folder = machine.leave(store, ["x"] * 1200, "ab", start_unix_nano=0)
    left = Spool.recover(folder)
    assert left
    left.acknowledge("b", 1199)
    left.abandon()
    result = machine.run("list")
    assert result.exit_code == 0
    first, second = rows(result)
    assert first[:5] == ["logs", folder.name, "a", "1", "1,200"]
    assert re.fullmatch(r"1\d\d\.\d kB", first[5])
    assert re.fullmatch(r"\d+ d", first[6])
    assert second[:3] == ["b", "1", "1"]
    assert first[7] == second[4] == "not delivered yet"
    assert str(folder.parent) in result.output


def test_each_stream_counts_once(machine: Machine) -> None:
    store = machine.register(make_child("a"))
    streams = [Stream(uuid4(), {}) for _ in range(3)]
    writer = secrets.token_hex(8)[:15]
    left = Spool.create(machine.disk / str(store.id), writer, "a")
    for number in range(9):
        (event,) = make_events(["x"], streams[number % 3], first=number, writer=writer)
        left.segments.append(event, lambda _: True)
    left.abandon()
    assert rows(machine.run("list"))[0][3:5] == ["3", "9"]


def test_list_counts_only_events_that_the_child_wants(machine: Machine) -> None:
    store = machine.register(make_child("a"), make_child("b", min_level="WARNING"), make_child("c", progress="latest"))
    machine.leave(store, ["x"] * 10, "abc", levels=[20, 40])
    # Ten updates a second for two and a half seconds.
    machine.leave(store, ["\r50%"] * 25, "abc", step_nanos=100_000_000, start_unix_nano=10**18, progress=True)
    counts = [
        (row[-6] if len(row) > 6 else row[0], row[-4] if len(row) > 6 else row[2]) for row in rows(machine.run("list"))
    ]
    assert counts == [("a", "10"), ("b", "5"), ("c", "10"), ("a", "25"), ("c", "3")]


def test_list_says_why_events_wait(machine: Machine, tmp_path: Path) -> None:
    children = make_child("a"), make_child("off", enabled=False)
    machine.leave(machine.register(*children, name="one"), "xy", ["off"])
    machine.leave(machine.register(*children, name="two"), "xy", ["removed"])
    machine.leave(machine.register(*children, name="three", durability="memory"), "xy")
    machine.leave(machine.register(*children, name="four", spool_directory=str(tmp_path / "new")), "xy")
    machine.leave(machine.register(*children, name="five"), "xy", is_running=True)
    machine.leave(machine.register(make_child("a"), {"name": "x", "type": "not-here"}, name="six"), "xy", ["x"])
    unregistered = uuid4()
    machine.leave(unregistered, "xy", ["b"])
    unreadable = LogStore(uuid4(), "seven", why="its settings cannot be read by the version that is installed here")
    machine.stores.append(unreadable)
    machine.leave(unreadable, "xy", ["b"])
    machine.leave(machine.register(*children, name="eight"), "xy")
    why = {row[0]: row[-1] for row in rows(machine.run("list"))}
    names = ["one", "two", "three", "four", "five", "six", "seven", "eight", str(unregistered)]
    assert [why[name] for name in names] == REASONS


def test_list_shows_a_running_process_without_waiting_events(machine: Machine) -> None:
    folder = machine.leave(machine.register(make_child("a")), [], is_running=True)
    assert rows(machine.run("list")) == [["logs", folder.name, "0 bytes", "in use by a running process"]]


def test_without_zenml_list_shows_the_default_folder_by_ids_and_hides_the_error_s_message(
    machine: Machine, tmp_path: Path
) -> None:
    machine.trouble = RuntimeError("cannot connect to mysql://root:password@db")
    id = uuid4()
    machine.leave(id, "xy", root=tmp_path / "zenml" / "composite_logstore" / "spool")
    result = machine.run("list")
    assert result.exit_code == 0
    assert result.stderr.startswith("ZenML cannot be reached (RuntimeError;")
    assert len(result.stderr.splitlines()) == 1
    assert "password" not in result.output
    assert [(row[0], row[-1]) for row in rows(result)] == [(str(id), "ZenML cannot be reached")]


def test_list_reports_unreadable_pieces(machine: Machine) -> None:
    folder = machine.leave(machine.register(make_child("a")), "abc")
    damage(folder)
    result = machine.run("list")
    assert f"1 piece of {folder} cannot be read." in result.output
    machine.run("drain")
    result = machine.run("list")
    assert rows(result) == []
    assert re.search(r"kept aside: 1 file \(\d+ bytes\) in " + re.escape(f"{folder.parent}/damaged"), result.output)


def test_a_line_that_a_running_process_is_writing_is_not_damaged(machine: Machine) -> None:
    damage(machine.leave(machine.register(make_child("a")), "abc", is_running=True))
    assert "cannot be read" not in machine.run("list").output


def test_a_folder_that_is_deleted_while_it_is_read_is_not_listed(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = machine.register(make_child("a"))
    machine.leave(store, "xyz")
    stays = machine.leave(store, "xyz")

    def look(folder: Path) -> bool:
        if folder != stays:
            shutil.rmtree(folder)
        return False

    monkeypatch.setattr(INVENTORY, "is_alive", look)
    assert [row[1] for row in rows(machine.run("list"))] == [stays.name]


def damage(folder: Path) -> None:
    """Flip a bit in the event 'b'."""
    (segment,) = folder.glob("*.log")
    segment.write_bytes(segment.read_bytes().replace(b'"b"', b'"c"', 1))


def test_only_the_folder_that_others_can_write_is_refused(machine: Machine) -> None:
    store = machine.register(make_child("a"))
    first, odd = machine.leave(store, "x"), machine.leave(store, "y")
    other = machine.register(make_child("b"), name="other")
    machine.leave(other, "z", "b")
    odd.chmod(0o777)
    (machine.disk / str(other.id)).chmod(0o770)
    result = machine.run("list")
    assert [row[-1].partition(" (")[0] for row in rows(result)] == [
        "not delivered yet",
        "cannot be read: others can write in it",
        "cannot be read: others can write in it",
    ]
    assert f"chmod 700 {odd}" in " ".join(result.output.split())
    for command in ("drain", "purge"):
        result = machine.run(command, *["--yes"] * (command == "purge"))
        assert result.exit_code == 1
        assert result.output.count("others can write in it") >= 2
    assert backend("a").messages == ["x"]
    assert [path.exists() for path in (first, odd)] == [False, True]
    odd.chmod(0o700)
    (machine.disk / str(other.id)).chmod(0o700)
    assert machine.run("drain").exit_code == 0
    assert backend("a").messages == ["x", "y"]
    assert backend("b").messages == ["z"]


def test_pieces_kept_aside_may_be_any_kind_of_file(machine: Machine, tmp_path: Path) -> None:
    store = machine.register(make_child("a"))
    folder = machine.leave(store, "x")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "file").write_text("mine")
    (folder / "link").symlink_to(elsewhere)
    (folder / "to nothing").symlink_to(tmp_path / "nothing")
    os.mkfifo(folder / "pipe")
    (folder / "deep" / "deeper").mkdir(parents=True)
    (folder / "deep" / "deeper" / "file").write_text("x")
    assert machine.run("drain").exit_code == 0
    assert machine.run("purge", "--yes").exit_code == 0
    assert not list((machine.disk / str(store.id) / "damaged").iterdir())
    assert (elsewhere / "file").read_text() == "mine"


def test_the_owner_of_another_user_s_folder_is_named(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    store = machine.register(make_child("a"))
    folder = machine.leave(store, "xy")
    other = machine.register(make_child("a"), name="other")
    machine.leave(other, "xy")
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    refused = PermissionError(errno.EACCES, "Permission denied")

    def look(path: Any) -> Any:
        if str(path).endswith((folder.name, str(other.id))):
            raise refused
        return listdir(path)

    listdir = os.listdir
    monkeypatch.setattr(os, "listdir", look)
    monkeypatch.setattr(INVENTORY, "is_alive", look)
    why = "cannot be read: Permission denied; it belongs to user '"
    for command, code in (("list", 0), ("drain", 1), ("purge", 1)):
        result = machine.run(command)
        assert result.exit_code == code
        assert [(row[0], row[-1][: len(why)]) for row in rows(result)] == [("logs", why), ("other", why)]


@pytest.mark.parametrize("command", ["list", "drain", "purge"])
def test_every_command_says_that_no_events_wait(machine: Machine, command: str) -> None:
    machine.register(make_child("a"))
    result = machine.run(command)
    assert (result.exit_code, result.output[:15]) == (0, "No undelivered ")


# drain


def test_drain_delivers_all_events_in_order(machine: Machine) -> None:
    store = machine.register(make_child("a", max_export_batch_size=7), make_child("b"))
    folders = [machine.leave(store, [f"{process}-{n}" for n in range(100)], "ab") for process in range(3)]
    result = machine.run("drain")
    assert result.exit_code == 0
    assert result.output.splitlines() == [
        "logs: 300 events of child 'a' delivered.",
        "logs: 300 events of child 'b' delivered.",
        "No undelivered events.",
    ]
    for name in "ab":
        assert sorted(backend(name).messages, key=lambda message: int(message[0])) == backend(name).messages
        assert len(set(backend(name).messages)) == 300
        assert (len(backend(name).ended), backend(name).closed) == (3, 3)
    assert not any(folder.exists() for folder in folders)


def test_drain_deletes_a_folder_whose_last_events_no_child_wants(machine: Machine) -> None:
    store = machine.register(make_child("a", min_level="INFO"), make_child("b", min_level="CRITICAL"))
    folder = machine.leave(store, "wxyz", "ab", levels=[20, 10])
    assert machine.run("drain").exit_code == 0
    assert (backend("a").messages, backend("b").messages) == (["w", "y"], [])
    assert not folder.exists()


def test_drain_gives_up_on_an_unavailable_child_at_once_and_delivers_to_the_others(machine: Machine) -> None:
    store = machine.register(make_child("a"), make_child("b"))
    folders = [machine.leave(store, "xyz", "ab") for _ in range(3)]
    backend("b").fault = "unavailable"
    begin = machine.clock.now()
    result = machine.run("drain")
    assert machine.clock.now() - begin < 1
    assert result.exit_code == 1
    assert backend("b").exports == 1
    assert backend("a").messages == list("xyz") * 3
    assert result.output.splitlines()[:2] == ["logs: 9 events of child 'a' delivered.", "Undelivered events:"]
    assert [row[-1] for row in rows(result)] == ["the key is wrong"] * 3
    assert [(acknowledged(folder, "a"), acknowledged(folder, "b")) for folder in folders] == [(3, 0)] * 3


@pytest.mark.parametrize("fault", ["unavailable", "refused", "rejects one", "rejects all"])
def test_workers_print_nothing_while_draining(machine: Machine, fault: str, caplog: pytest.LogCaptureFixture) -> None:
    machine.leave(machine.register(make_child("a")), "xyz")
    backend("a").fault = fault
    result = machine.run("drain")
    assert "a" in result.output
    assert [record.getMessage() for record in caplog.records] == []


def test_drain_gives_up_on_a_child_after_thirty_seconds_without_progress(machine: Machine) -> None:
    machine.leave(machine.register(make_child("a", retry_max_interval_millis=600_000)), "xyz")
    backend("a").fault = "refused"
    begin = machine.clock.now()
    result = machine.run("drain")
    assert 30 <= machine.clock.now() - begin < 31
    assert (result.exit_code, rows(result)[0][-1]) == (1, "connection refused")


def test_drain_waits_for_a_child_that_makes_progress(machine: Machine) -> None:
    settings = {"max_export_batch_size": 1, "export_timeout_millis": 20_000}
    machine.leave(machine.register(make_child("a", **settings)), "uvwxyz")
    backend("a").fault = "slow"
    begin = machine.clock.now()
    assert machine.run("drain").exit_code == 0
    assert machine.clock.now() - begin == 6 * 15


def test_an_export_that_hangs_keeps_its_folder_until_the_process_ends(machine: Machine) -> None:
    store = machine.register(make_child("a"), make_child("b"))
    first, second = [machine.leave(store, "xyz", "ab") for _ in range(2)]
    backend("a").fault = "silent"
    result = machine.run("drain")
    assert result.exit_code == 1
    assert [row[-1] for row in rows(result)] == ["an export has not returned within 10 s"] * 2
    assert backend("b").messages == list("xyz") * 2
    assert Spool.recover(first) is None
    assert Spool.recover(second) is not None


def test_drain_resumes(machine: Machine) -> None:
    machine.leave(machine.register(make_child("a", max_export_batch_size=2)), "abcdefgh")
    backend("a").faults = [None, None]
    backend("a").fault = "unavailable"
    assert machine.run("drain").exit_code == 1
    backend("a").fault = None
    assert machine.run("drain").exit_code == 0
    assert backend("a").messages == list("abcdefgh")


def test_drain_finishes_running_exports_after_ctrl_c_and_resumes(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Steady(SimulatedBackend):
        def export(self, batch: Any) -> int:
            machine.clock.advance(1)
            return super().export(batch)

    store = machine.register(make_child("a", Steady(), max_export_batch_size=1), make_child("b"))
    folder = machine.leave(store, [str(number) for number in range(100)], "ab")

    def interrupt(bars: object, store: LogStore, accounts: dict[str, ChildStats]) -> None:
        if accounts and accounts["a"].delivered >= 10:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(progress.DrainBars, "show", interrupt)
        result = machine.run("drain")
    assert result.exit_code == 1
    assert result.stderr.startswith("Interrupted.")
    delivered = len(backend("a").messages)
    # Including the one that was running.
    assert delivered == 11
    assert acknowledged(folder, "a") == delivered
    assert f"logs: {delivered} events of child 'a' delivered." in result.output
    assert machine.run("drain").exit_code == 0
    assert backend("a").messages == backend("b").messages == [str(number) for number in range(100)]


def test_ctrl_c_before_drain_has_begun_aborts(machine: Machine) -> None:
    machine.leave(machine.register(make_child("a")), "xyz")
    machine.trouble = KeyboardInterrupt()
    result = machine.run("drain")
    assert (result.exit_code, result.output.strip()) == (1, "Aborted!")


def test_drain_reports_rejected_events_and_deletes_them(machine: Machine) -> None:
    machine.leave(machine.register(make_child("a")), "xyz")
    backend("a").faults = []
    backend("a").fault = "rejects one"
    result = machine.run("drain")
    assert result.exit_code == 0
    assert "2 events of child 'a' delivered, 1 rejected (too old)." in result.output


def test_drain_reports_withheld_events(machine: Machine) -> None:
    machine.leave(machine.register(make_child("a", budget={"events": 1, "then": "stop"})), "vwxyz")
    result = machine.run("drain")
    assert result.exit_code == 0
    assert "2 events of child 'a' delivered, 3 withheld (over budget)." in result.output


def test_drain_keeps_damaged_pieces_aside_and_delivers_the_rest(machine: Machine) -> None:
    folder = machine.leave(machine.register(make_child("a")), "abc")
    damage(folder)
    result = machine.run("drain")
    assert result.exit_code == 0
    assert "2 events of child 'a' delivered, 1 piece could not be read." in result.output
    assert "kept aside: 1 file" in result.output
    assert backend("a").messages == ["a", "c"]


def test_drain_delivers_to_the_chosen_children_alone(machine: Machine) -> None:
    folder = machine.leave(machine.register(make_child("a"), make_child("b")), "xyz", "ab")
    result = machine.run("drain", "--child", "a")
    assert (result.exit_code, result.output.splitlines()[-1]) == (0, "No undelivered events for child 'a'.")
    assert (backend("a").messages, backend("b").messages) == (list("xyz"), [])
    assert [event.message for event in Spool.look(folder).reader.read(-1, 9)] == list("xyz")


def test_drain_takes_names_and_ids_of_log_stores(machine: Machine) -> None:
    one = machine.register(make_child("a"), name="one")
    two = machine.register(make_child("b"), name="two")
    machine.register(make_child("c"), name="three")
    for store, child in zip(machine.stores, "abc", strict=True):
        machine.leave(store, "x", child)
    assert machine.run("drain", "--component", one.label, "--component", str(two.id)).exit_code == 0
    assert [backend(name).messages for name in "abc"] == [["x"], ["x"], []]


def test_without_positions_every_child_gets_all_events_even_if_only_one_is_drained(machine: Machine) -> None:
    folder = machine.leave(machine.register(make_child("a"), make_child("b")), "xyz", "ab")
    for position in folder.glob("*.settled"):
        position.unlink()
    assert machine.run("drain", "--child", "a").exit_code == 0
    assert machine.run("drain").exit_code == 0
    assert backend("a").messages == backend("b").messages == list("xyz")


def test_events_that_no_child_can_take_stay_even_without_positions(machine: Machine) -> None:
    folder = machine.leave(uuid4(), "xyz", ["b"])
    (folder / "b.settled").unlink()
    machine.register(make_child("a"))
    machine.run("drain")
    assert [event.message for event in Spool.look(folder).reader.read(-1, 9)] == list("xyz")


@pytest.mark.parametrize("old", ["removed", "disabled"])
def test_another_child_takes_the_events_of_a_removed_one(machine: Machine, old: str) -> None:
    store = machine.register(make_child("a"), make_child("disabled", enabled=False))
    folder = machine.leave(store, "xyz", ["a", old])
    result = machine.run("drain")
    assert result.exit_code == 1
    assert rows(result)[0][2] == old
    result = machine.run("drain", "--child", old, "--to", "a")
    assert result.exit_code == 0
    assert f"logs: 3 events of child '{old}' delivered through 'a'." in result.output
    assert backend("a").messages == list("xyzxyz")
    assert not folder.exists()


def test_a_child_that_takes_the_events_of_several_gets_each_event_once(machine: Machine) -> None:
    folder = machine.leave(machine.register(make_child("new")), "uvwxyz", ["one", "two", "new"])
    left = Spool.recover(folder)
    assert left
    left.acknowledge("one", 4)
    left.acknowledge("two", 2)
    left.acknowledge("new", 3)
    left.abandon()
    assert machine.run("drain", "--child", "one", "--child", "two", "--to", "new").exit_code == 0
    assert backend("new").messages == list("wxyz")
    assert not folder.exists()


def test_acknowledged_events_stay_acknowledged_when_the_child_that_takes_them_fails(
    machine: Machine,
) -> None:
    folder = machine.leave(machine.register(make_child("new")), "uvwxyz", ["one", "two"])
    left = Spool.recover(folder)
    assert left
    left.acknowledge("one", 4)
    left.abandon()
    backend("new").fault = "unavailable"
    assert machine.run("drain", "--child", "one", "--child", "two", "--to", "new").exit_code == 1
    assert (acknowledged(folder, "one"), acknowledged(folder, "two")) == (4, 0)


def test_a_child_that_is_further_behind_keeps_its_own_events(machine: Machine) -> None:
    folder = machine.leave(machine.register(make_child("new")), "uvwxyz", ["old", "new"])
    left = Spool.recover(folder)
    assert left
    left.acknowledge("old", 4)
    left.abandon()
    assert machine.run("drain", "--child", "old", "--to", "new").exit_code == 0
    assert backend("new").messages == list("yz")
    assert machine.run("drain").exit_code == 0
    assert set(backend("new").messages) == set("uvwxyz")


def test_drain_warns_that_the_child_that_takes_the_events_filters_some_out(machine: Machine) -> None:
    machine.leave(machine.register(make_child("a", min_level="ERROR")), "xyz", ["old"], levels=[20, 40])
    result = machine.run("drain", "--child", "old", "--to", "a")
    assert result.stderr.count("of child 'a' excludes") == 1
    assert backend("a").messages == ["y"]


def test_running_processes_are_named_and_left_alone(machine: Machine) -> None:
    store = machine.register(make_child("a"))
    folder = machine.leave(store, "xyz", is_running=True)
    for command in ("drain", "purge"):
        result = machine.run(command, input="y\n")
        assert result.exit_code == 1
        assert [(row[1], row[-1]) for row in rows(result)] == [(folder.name, "in use by a running process")]
    assert backend("a").messages == []
    assert [event.message for event in Spool.look(folder).reader.read(-1, 9)] == list("xyz")


def test_a_running_process_without_waiting_events_does_not_count_as_undelivered(machine: Machine) -> None:
    machine.leave(machine.register(make_child("a")), [], is_running=True)
    assert machine.run("drain").exit_code == 0
    assert machine.run("purge").exit_code == 0


def test_a_folder_that_another_process_takes_at_the_same_moment_is_left_to_it(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = machine.register(make_child("a"))
    machine.leave(store, "xyz")
    machine.leave(store, "xyz")
    recover = Spool.recover
    taken = []

    def too_late(folder: Path) -> Spool | None:
        if not taken:
            taken.append(recover(folder))
        return recover(folder)

    monkeypatch.setattr(Spool, "recover", too_late)
    result = machine.run("drain")
    assert result.exit_code == 1
    assert backend("a").messages == list("xyz")
    assert [row[-1] for row in rows(result)] == ["in use by a running process"]
    taken.clear()
    release_all()
    assert machine.run("purge", "--yes").exit_code == 1


def test_events_of_an_unregistered_log_store_stay_with_the_reason(machine: Machine) -> None:
    machine.register(make_child("a"))
    machine.leave(uuid4(), "xyz", ["b"])
    result = machine.run("drain")
    assert (result.exit_code, rows(result)[0][-1]) == (1, "the log store is no longer registered")


def test_drain_needs_zenml(machine: Machine) -> None:
    machine.trouble = ConnectionError()
    result = machine.run("drain")
    assert result.exit_code == 1
    assert "draining needs its settings and secrets" in result.stderr


def test_drain_skips_a_folder_that_it_cannot_use(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    store = machine.register(make_child("a"))
    broken = machine.leave(store, "xyz")
    machine.leave(store, "xyz")
    recover = Spool.recover

    def refuse(folder: Path) -> Spool | None:
        if folder == broken:
            raise OSError(errno.EROFS, "Read-only file system")
        return recover(folder)

    monkeypatch.setattr(Spool, "recover", refuse)
    result = machine.run("drain")
    assert result.exit_code == 1
    assert [row[-1] for row in rows(result)] == ["the folder cannot be used: Read-only file system"]
    assert backend("a").messages == list("xyz")
    result = machine.run("purge", "--yes")
    assert result.exit_code == 1
    assert rows(result)[-1][-1] == "cannot be purged: Read-only file system"


def test_drain_finds_the_folder_of_a_log_store_with_another_folder_or_durability_now(
    machine: Machine, tmp_path: Path
) -> None:
    moved = machine.register(make_child("a"), name="moved", spool_directory=str(tmp_path / "new"))
    default = tmp_path / "zenml" / "composite_logstore" / "spool"
    machine.leave(moved, "x", root=default)
    machine.leave(moved, "y", root=tmp_path / "new")
    machine.leave(machine.register(make_child("b"), name="memory", durability="memory"), "z", "b")
    assert machine.run("drain").exit_code == 0
    assert (sorted(backend("a").messages), backend("b").messages) == (["x", "y"], ["z"])


# purge


def test_purge_shows_the_loss_and_asks(machine: Machine) -> None:
    store = machine.register(make_child("a"), make_child("b"))
    folders = [machine.leave(store, "xyz", "ab"), machine.leave(store, "x", "a")]
    result = machine.run("purge", input="n\n")
    assert result.exit_code == 1
    said = (
        r"Lost for good: 4 events of 2 streams for child 'a', 3 events of 1 stream for child 'b', \d\.\d kB on disk\."
    )
    assert re.search(said, result.output)
    assert all(folder.exists() for folder in folders)
    # There is no answer.
    assert machine.run("purge", input="").exit_code == 1
    assert all(folder.exists() for folder in folders)
    result = machine.run("purge", input="y\n")
    assert (result.exit_code, result.output.splitlines()[-1]) == (0, "No undelivered events.")
    assert not any(folder.exists() for folder in folders)
    assert (backend("a").messages, backend("b").messages) == ([], [])


def test_purge_with_yes_shows_the_loss_and_does_not_ask(machine: Machine) -> None:
    machine.leave(machine.register(make_child("a")), "xyz")
    result = machine.run("purge", "--yes")
    assert result.exit_code == 0
    assert "Lost for good: 3 events of 1 stream for child 'a'" in result.output


def test_purging_one_child_keeps_the_events_of_the_others(machine: Machine) -> None:
    folder = machine.leave(machine.register(make_child("a")), "xyz", ["a", "removed"])
    result = machine.run("purge", "--child", "removed", "--yes")
    assert (result.exit_code, result.output.splitlines()[-1]) == (0, "No undelivered events for child 'removed'.")
    assert "Lost for good: 3 events of 1 stream for child 'removed'." in result.output
    assert machine.run("drain").exit_code == 0
    assert backend("a").messages == list("xyz")
    assert not folder.exists()


def test_purging_one_child_without_positions_keeps_the_events_of_the_others(machine: Machine) -> None:
    folder = machine.leave(machine.register(make_child("a"), make_child("b")), "xyz", "ab")
    for position in folder.glob("*.settled"):
        position.unlink()
    assert machine.run("purge", "--child", "a", "--yes").exit_code == 0
    assert machine.run("drain").exit_code == 0
    assert (backend("a").messages, backend("b").messages) == ([], list("xyz"))


def test_purging_one_child_keeps_folders_that_know_no_child(machine: Machine) -> None:
    id = uuid4()
    machine.leave(id, "x", ["b"])
    folder = machine.leave(id, "xyz", ["b"])
    (folder / "b.settled").unlink()
    machine.register(make_child("a"))
    assert machine.run("purge", "--child", "b", "--yes").exit_code == 0
    assert [event.message for event in Spool.look(folder).reader.read(-1, 9)] == list("xyz")


def test_purge_without_zenml_takes_ids(machine: Machine, tmp_path: Path) -> None:
    machine.trouble = ConnectionError()
    folders = [machine.leave(uuid4(), "x", root=tmp_path / "zenml/composite_logstore/spool") for _ in range(2)]
    result = machine.run("purge", "--component", folders[0].parent.name, "--yes")
    assert result.exit_code == 0
    assert [folder.exists() for folder in folders] == [False, True]


def test_a_log_store_s_folder_that_was_unreadable_for_a_moment_is_not_purged(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = machine.register(make_child("a"))
    dead, alive = machine.leave(store, "xyz"), machine.leave(store, "uv", is_running=True)

    def refuse(home: Path) -> list[Path]:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(INVENTORY, "process_folders", refuse)
        found = INVENTORY.backlogs(INVENTORY.inventory().folders)
    errors = INVENTORY.purge(found)
    assert list(errors) == [dead.parent]
    assert "Input/output error" in errors[dead.parent]
    assert sorted(path.name for path in dead.parent.iterdir()) == sorted([dead.name, alive.name])
    assert [(one.barred, [part.events for part in one.parts]) for one in INVENTORY.backlogs({dead.parent: store})] == [
        ("", [3]),
        ("in use by a running process", [2]),
    ]


def test_the_operation_purges_the_named_children_alone_and_no_running_process(machine: Machine) -> None:
    store, unknown = machine.register(make_child("a")), uuid4()
    folders = machine.leave(store, "xyz"), machine.leave(unknown, "uv", [], root=machine.disk)
    alive = machine.leave(store, "w", is_running=True)
    found = INVENTORY.backlogs(INVENTORY.inventory().folders)
    assert INVENTORY.purge(found, ["b"]) == {alive: "in use by a running process"}
    assert all(folder.exists() for folder in (*folders, alive))
    assert INVENTORY.purge(found, ["a"]) == {alive: "in use by a running process"}
    assert [folder.exists() for folder in (*folders, alive)] == [False, True, True]


@pytest.mark.parametrize("answer", ["y", "n"])
def test_purge_offers_to_delete_pieces_kept_aside(machine: Machine, answer: str) -> None:
    store = machine.register(make_child("a"))
    damage(machine.leave(store, "abc"))
    machine.run("drain")
    damage(machine.leave(store, "abc"))
    result = machine.run("purge", input=f"y\n{answer}\n")
    assert result.exit_code == 0
    assert "2 events of 1 stream for child 'a', 1 piece that cannot be read" in result.output
    assert "kept aside: 2 files" in result.output
    left = list((machine.disk / str(store.id) / "damaged").glob("*"))
    assert len(left) == (0 if answer == "y" else 2)


def test_purge_deletes_a_folder_in_the_place_of_a_file(machine: Machine) -> None:
    store = machine.register(make_child("a"))
    folder = machine.leave(store, "abc")
    (segment,) = folder.glob("*.log")
    segment.unlink()
    (segment / "folder").mkdir(parents=True)
    machine.run("drain")
    assert machine.run("purge", "--yes").exit_code == 0
    assert not list((machine.disk / str(store.id) / "damaged").glob("*"))


def test_purging_one_child_keeps_pieces_kept_aside(machine: Machine) -> None:
    store = machine.register(make_child("a"), make_child("b"))
    damage(machine.leave(store, "abc", "ab"))
    assert machine.run("purge", "--child", "a", "--yes").exit_code == 0
    assert len(list((machine.disk / str(store.id) / "damaged").glob("*"))) == 1
    machine.run("drain")
    assert backend("b").messages == ["a", "c"]


# --dry-run


def content(folder: Path) -> dict[str, bytes]:
    """Return all files below a folder, apart from locks."""
    return {str(file): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def test_a_dry_run_of_drain_shows_what_would_be_delivered_and_delivers_nothing(machine: Machine) -> None:
    store = machine.register(make_child("a"), make_child("off", enabled=False), make_child("gone"))
    machine.leave(store, "xyz", ["a", "off"])
    machine.leave(store, "uv", ["removed"])
    machine.leave(store, "w", ["gone"])
    machine.leave(store, "t", ["a"], is_running=True)
    before = content(machine.disk)
    with pytest.MonkeyPatch.context() as patch:

        def create(config: Any) -> Any:
            if config.name == "gone":
                raise UnavailableError("secret 'dd' does not exist; create it")
            return backend(config.name)

        patch.setattr(SimulatedChildConfig, "create_exporter", create)
        result = machine.run("drain", "--dry-run")
        assert result.exit_code == 1
        why = {row[-1] for row in rows(result)}
        assert why == {
            "would be delivered",
            "the child is disabled",
            "the child is no longer configured",
            "secret 'dd' does not exist; create it",
            "in use by a running process",
        }
        assert "nothing has changed" in result.output
        would = machine.run("drain", "--child", "off", "--child", "removed", "--to", "a", "--dry-run")
        assert (would.exit_code, would.output.count("would be delivered through 'a'")) == (0, 2)
    assert content(machine.disk) == before
    assert [backend(name).messages for name in ("a", "off", "gone")] == [[], [], []]
    # The real run does what the dry run said.
    assert machine.run("drain", "--child", "off", "--child", "removed", "--to", "a").exit_code == 0
    assert sorted(backend("a").messages) == list("uvxyz")


def test_a_dry_run_of_drain_finds_folders_that_cannot_be_used(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.leave(machine.register(make_child("a")), "xyz")

    def refuse(folder: Path) -> Spool | None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Spool, "recover", refuse)
    for command, words in (("drain", "the folder cannot be used"), ("purge", "cannot be purged")):
        result = machine.run(command, "--dry-run")
        assert result.exit_code == 1
        assert rows(result)[-1][-1] == f"{words}: Read-only file system"


@pytest.mark.parametrize("command", ["drain", "purge"])
def test_a_dry_run_refuses_what_a_real_run_refuses(machine: Machine, command: str) -> None:
    machine.register(make_child("a"))
    assert machine.run(command, "--child", "b", "--dry-run").exit_code == 2
    assert machine.run(command, "--component", "b", "--dry-run").exit_code == 2


def test_a_dry_run_of_drain_without_events_says_so(machine: Machine) -> None:
    machine.register(make_child("a"))
    assert machine.run("drain", "--dry-run").output == "No undelivered events.\n"


def test_a_dry_run_of_purge_shows_the_loss_asks_nothing_and_deletes_nothing(machine: Machine) -> None:
    store = machine.register(make_child("a"), make_child("b"))
    damage(machine.leave(store, "abc"))
    machine.leave(store, "xyz", "ab")
    before = content(machine.disk)
    result = machine.run("purge", "--child", "a", "--dry-run")
    assert result.exit_code == 0
    assert "Would be lost for good: 5 events of 2 streams for child 'a'" in result.output
    assert "nothing has changed" in result.output
    assert content(machine.disk) == before
    machine.leave(store, "w", is_running=True)
    before = content(machine.disk)
    result = machine.run("purge", "--dry-run")
    assert (result.exit_code, rows(result)[-1][-1]) == (1, "in use by a running process")
    assert content(machine.disk) == before


def test_a_question_that_nobody_can_answer_names_the_option(machine: Machine) -> None:
    folder = machine.leave(machine.register(make_child("a")), "xyz")
    result = machine.run("purge", input="")
    assert result.exit_code == 1
    assert "Purge it?" in result.stderr
    assert "there is no terminal. '--yes'" in result.stderr
    assert folder.exists()


# Wrong usage


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["drain", "--component", "lgos"], "there is no log store 'lgos' (did you mean 'logs'?)"),
        (["purge", "--component", "x"], "there is no log store 'x'; there are: "),
        (["drain", "--child", "archiv"], "there is no child 'archiv' (did you mean 'archive'?)"),
        (["purge", "--child", "x"], "there is no child 'x'; there are: archive, off, removed"),
        (["drain", "--to", "archive"], "'--to' needs '--child'"),
        (["drain", "--child", "removed", "--to", "archiv"], "'logs' has no child 'archiv' (did you mean 'archive'?)"),
        (["drain", "--child", "removed", "--to", "off"], "child 'off' of log store 'logs' is disabled; enable it"),
        (["drian"], "No such command 'drian'"),
    ],
)
def test_wrong_usage_names_the_nearest_and_changes_nothing(machine: Machine, arguments: list[str], words: str) -> None:
    store = machine.register(make_child("archive"), make_child("off", enabled=False))
    folder = machine.leave(store, "xyz", ["archive", "removed"])
    result = machine.run(*arguments)
    assert result.exit_code == 2
    assert words in result.stderr
    assert [event.message for event in Spool.look(folder).reader.read(-1, 9)] == list("xyz")
    assert backend("archive").messages == []


def test_a_log_store_with_unreadable_settings_is_found_by_name(machine: Machine) -> None:
    machine.stores.append(LogStore(uuid4(), "unreadable", why="its settings cannot be read"))
    assert machine.run("drain", "--component", "unreadable").exit_code == 0


def test_without_zenml_an_unknown_name_is_refused_with_the_reason(machine: Machine) -> None:
    machine.trouble = ConnectionError()
    result = machine.run("purge", "--component", "logs")
    assert result.exit_code == 2
    assert "there is no log store 'logs'; there are: none; without ZenML, give its id" in result.stderr


# Asking ZenML


def test_log_stores_are_read_page_by_page_and_unreadable_settings_hide_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    good = {"primary": "archive", "children": [{"name": "archive", "type": "artifact"}]}
    bad = {**good, "children": [{"name": "archive", "type": "artifact", "from_a_later_version": "a secret"}]}
    asked = []

    class Client:
        def list_stack_components(self, page: int = 1, **wanted: Any) -> Any:
            asked.append(wanted)
            component = SimpleNamespace(id=uuid4(), name=str(page), configuration=[good, bad][page - 1])
            return SimpleNamespace(items=[component], index=page, total_pages=2)

    monkeypatch.setattr("zenml.client.Client", Client)
    first, second = registered()
    assert {wanted["flavor"] for wanted in asked} == {"composite"}
    assert (first.label, list(first.children)) == ("1", ["archive"])
    assert (second.label, second.config) == ("2", None)
    assert "secret" not in repr(second)


# The page


def section(command: str) -> str:
    return PAGE.split(f"\n## composite-logstore {command}\n")[1].split("\n## ")[0]


def flattened(group: click.Group, *words: str) -> Iterator[tuple[str, click.Command]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from flattened(command, *words, name)
        else:
            yield " ".join((*words, name)), command


COMMANDS = dict(flattened(main))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_on_the_page(command: str) -> None:
    options = {
        option
        for parameter in COMMANDS[command].params
        for option in parameter.opts
        if parameter.param_type_name == "option"
    }
    rows = [line.split("|")[1] for line in section(command).splitlines() if line.startswith("| `-")]
    assert {option for row in rows for option in re.findall(r"`(-[^`]*)`", row)} == options


def test_every_reason_is_on_the_page() -> None:
    rows = re.findall(r"^\| `([^|]+)` \|", section("spool list"), re.MULTILINE)
    assert sorted(rows) == sorted([*REASONS, "cannot be read: …", "ZenML cannot be reached"])


def test_the_time_limits_are_on_the_page() -> None:
    assert f"given up after {GIVE_UP_SECONDS:.0f} s" in section("spool drain")
    assert f"waits up to {_END_SECONDS:.0f} s" in section("spool drain")


# As JSON, and with log stores as arguments


def values(machine: Machine, *arguments: str, code: int = 0, input: str | None = None) -> dict[str, Any]:
    done = machine.run(*arguments, "--output", "json", input=input)
    assert done.exit_code == code, done.output
    # Before 8.3, click's test runner echoes what is typed there.
    found = json.loads(done.stdout.removeprefix(f" {input}"))
    assert isinstance(found, dict)
    return found


def test_spool_prints_json(machine: Machine) -> None:
    store = machine.register(make_child("a"), make_child("b"))
    folder = machine.leave(store, ["x"] * 3, "ab", start_unix_nano=1_500_000_000_000_000_000)
    listed = values(machine, "list")
    (backlog,) = listed["backlogs"]
    assert backlog["log_store"] == {"id": str(store.id), "name": "logs"}
    assert (backlog["folder"], backlog["process"]) == (str(folder), folder.name)
    assert [(one["name"], one["events"], one["why"]) for one in backlog["children"]] == [
        ("a", 3, "not delivered yet"),
        ("b", 3, "not delivered yet"),
    ]
    assert backlog["children"][0]["oldest"] == 1_500_000_000
    assert values(machine, "drain", "--dry-run")["backlogs"][0]["children"][0]["why"] == "would be delivered"
    assert values(machine, "purge", "--dry-run")["purged"] == listed["backlogs"]
    drained = values(machine, "drain")
    assert [(one["child"], one["delivered"]) for one in drained["accounts"]] == [("a", 3), ("b", 3)]
    assert (drained["backlogs"], drained["interrupted"]) == ([], False)
    assert values(machine, "list")["backlogs"] == []


def test_purge_asks_on_stderr_when_it_prints_json(machine: Machine) -> None:
    store = machine.register(make_child("a"))
    folder = machine.leave(store, ["x"] * 3)
    refused = machine.run("purge", "--output", "json", input="n\n")
    assert refused.exit_code == 1
    assert "3 events" in refused.stderr
    assert folder.exists()
    purged = values(machine, "purge", input="y\n")
    assert [one["process"] for one in purged["purged"]] == [folder.name]
    assert purged["backlogs"] == []


def test_what_remains_is_an_exit_code_of_1_in_json_too(machine: Machine) -> None:
    store = machine.register(make_child("a"))
    machine.leave(store, "x", is_running=True)
    for arguments in (["drain"], ["drain", "--dry-run"], ["purge", "-y"], ["purge", "--dry-run"]):
        assert values(machine, *arguments, code=1)["dry_run" if "--dry-run" in arguments else "backlogs"]


def test_without_zenml_json_claims_nothing(machine: Machine) -> None:
    machine.trouble = ConnectionError()
    listed = values(machine, "list", code=3)
    assert listed["backlogs"] == []
    assert listed["zenml_error"]
    assert values(machine, "purge", "--yes", code=3)["purged"] == []


@pytest.mark.parametrize("how", [["one"], ["--component", "one"]])
@pytest.mark.parametrize("command", [["list"], ["drain"], ["purge", "--yes"]])
def test_a_log_store_is_an_argument(machine: Machine, command: list[str], how: list[str]) -> None:
    kept = machine.leave(machine.register(make_child("b"), name="two"), "y", "b")
    machine.leave(machine.register(make_child("a"), name="one"), "x")
    done = machine.run(*command, *how)
    assert done.exit_code == 0, done.output
    assert kept.name not in done.output
    assert kept.exists()
    unknown = machine.run(*command, "tow")
    assert unknown.exit_code == 2
    assert "(did you mean 'two'?)" in unknown.stderr
