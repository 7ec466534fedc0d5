"""How the children are on this machine: what processes write down, and what `composite-logstore status` shows of it."""

from __future__ import annotations

import fcntl
import json
import os
import stat
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result

from composite_logstore import CompositeLogStoreConfig, RejectedError, RetryableError, UnavailableError
from composite_logstore.catalog.errors import ArgumentError
from composite_logstore.cli import status as command
from composite_logstore.cli.main import main
from composite_logstore.delivery import writers
from composite_logstore.operations import ChildStatus, StoreStatus, Watch, status
from composite_logstore.operations.inventory import LogStore
from composite_logstore.spool.lock import release_all
from composite_logstore.spool.status_files import StatusFile, read_statuses
from composite_logstore.testing import SimulatedClock
from tests.forks import idle_fork
from tests.simulation import Machine, make_child

INVENTORY = import_module("composite_logstore.operations.inventory")
SECRET = "a-secret-key"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimulatedClock]:
    with SimulatedClock() as clock:
        # The command line shows ages by the system's clock.
        monkeypatch.setattr(command, "time", SimpleNamespace(time=clock.time))
        yield clock
    release_all()


class Watched(Machine):
    """A machine whose log store is registered."""

    def __init__(self, clock: SimulatedClock, disk: Path, durability: str, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(clock, disk, durability, archive={}, live={})
        self.stores: list[Any] = []
        monkeypatch.setattr(INVENTORY, "registered", self.registered)
        monkeypatch.setenv("ZENML_CONFIG_PATH", str(disk / "zenml"))

    def registered(self) -> list[LogStore]:
        children = [make_child(name, self.backends[name]) for name in self.children]
        config = CompositeLogStoreConfig(
            primary="archive",
            children=children,  # type: ignore[arg-type]
            durability=self.durability,  # type: ignore[arg-type]
            spool_directory=str(self.disk),
        )
        return [LogStore(self.id, "logs", config)]

    @property
    def home(self) -> Path:
        return self.disk / str(self.id)

    def restart(self) -> None:
        """Start one more process, while the others live on."""
        self.stores.append(self.store)
        writers._writers.clear()
        self.start()


@pytest.fixture
def machine(clock: SimulatedClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Watched:
    return Watched(clock, tmp_path, "spill", monkeypatch)


def children(found: StoreStatus) -> dict[str, ChildStatus]:
    return {child.name: child for child in found.children}


def run(*arguments: str) -> Result:
    result = CliRunner().invoke(main, ["status", "logs", *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


# The numbers


def test_the_numbers_of_all_living_processes_are_added(machine: Watched, clock: SimulatedClock) -> None:
    machine.start()
    machine.log(*map(str, range(30)))
    machine.restart()
    machine.backends["live"].fault = UnavailableError("gone")
    machine.log(*map(str, range(20)))
    clock.advance(5)
    found = status("logs")
    archive, live = (children(found)[name] for name in ("archive", "live"))
    assert (archive.state, archive.processes, archive.delivered, archive.pending) == ("healthy", 2, 50, 0)
    assert archive.last_error is None
    assert archive.oldest is None
    assert live.state == "unavailable"
    assert live.delivered + live.pending == 50
    assert 0 < live.pending <= 50
    assert live.last_error is not None
    assert "gone" in live.last_error
    assert live.oldest is not None
    assert [process.is_alive for process in found.processes] == [True, True]
    assert found.unknown == []


def test_the_last_report_says_how_a_process_is_that_does_nothing_more(machine: Watched, clock: SimulatedClock) -> None:
    machine.start()
    for _ in range(7):
        machine.log(*"abc")
        clock.advance(0.3)
    clock.advance(500)
    archive = children(status("logs"))["archive"]
    assert (archive.delivered, archive.pending, archive.rate) == (21, 0, 0.0)


def test_the_rate_is_that_of_the_last_seconds(machine: Watched, clock: SimulatedClock) -> None:
    machine.start()
    machine.log(*map(str, range(1000)))
    clock.advance(3600)
    for _ in range(150):
        machine.log(*"ab")
        clock.advance(0.1)
    assert 15 < children(status("logs"))["archive"].rate < 25
    clock.advance(60)
    assert children(status("logs"))["archive"].rate == 0


def test_rejected_withheld_and_redacted_events_are_counted(machine: Watched, clock: SimulatedClock) -> None:
    machine.children["live"] = {"budget": {"events": 5, "then": "stop"}}
    machine.backends["archive"].fault = RejectedError("no", count=1)
    machine.start()
    machine.log(*map(str, range(20)))
    clock.advance(5)
    archive, live = (children(status("logs"))[name] for name in ("archive", "live"))
    assert archive.rejected >= 1
    assert (live.delivered, live.withheld, live.redacted) == (6, 14, 0)


def test_what_dead_processes_left_counts_as_backlog(machine: Watched, clock: SimulatedClock) -> None:
    machine.backends["live"].fault = RetryableError("away")
    machine.start()
    machine.log(*"abc")
    clock.advance(5)
    machine.die()
    found = status("logs")
    archive, live = (children(found)[name] for name in ("archive", "live"))
    assert (live.state, live.processes, live.pending, archive.pending) == (None, 0, 3, 0)
    assert live.oldest is not None
    assert [process.is_alive for process in found.processes] == [False]
    # The next process delivers them: they count once.
    watch = Watch("logs")
    assert children(watch.look())["live"].pending == 3
    machine.start()
    machine.log("d")
    clock.advance(5)
    found = watch.look()
    assert children(found)["live"].pending == 4
    assert found.unknown == []
    machine.backends["live"].fault = None
    clock.advance(60)
    assert children(watch.look())["live"].pending == 0


def test_a_process_that_ends_removes_its_file(machine: Watched, clock: SimulatedClock) -> None:
    machine.start()
    machine.log("a")
    clock.advance(5)
    (writer,) = writers._writers.values()
    assert [said.writer for said in read_statuses(machine.home)] == [writer.writer_id]
    writer.close(3)
    assert read_statuses(machine.home) == []
    clock.advance(5)
    assert read_statuses(machine.home) == []


def test_a_process_of_less_than_a_second_writes_nothing(machine: Watched, clock: SimulatedClock) -> None:
    machine.start()
    machine.log("a")
    clock.advance(0.5)
    for writer in writers._writers.values():
        writer.close(3)
    assert [path for path in machine.disk.rglob("*") if path.is_file()] == []


def test_in_memory_nothing_is_written_and_the_command_says_so(
    clock: SimulatedClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Watched(clock, tmp_path, "memory", monkeypatch)
    machine.start()
    machine.log("a")
    clock.advance(10)
    assert list(tmp_path.iterdir()) == []
    found = status("logs")
    assert [child.state for child in found.children] == [None, None]
    assert "'memory'" in found.unknown[0]
    assert "'memory'" in run().output


def test_a_running_process_that_says_nothing_is_told_and_its_backlog_counts(
    machine: Watched, clock: SimulatedClock
) -> None:
    machine.backends["live"].fault = RetryableError("away")
    machine.start()
    machine.log(*"abc")
    clock.advance(0.95)
    found = status("logs")
    assert children(found)["live"].pending == 3
    assert len(found.unknown) == 1
    clock.advance(20)
    assert status("logs").unknown == []


def test_an_unknown_log_store_is_refused(machine: Watched) -> None:
    machine.start()
    with pytest.raises(ArgumentError, match="lgos") as refusal:
        status("lgos")
    assert refusal.value.argument == "store"
    assert CliRunner().invoke(main, ["status", "lgos"]).exit_code == 2


def test_without_zenml_the_id_is_enough(clock: SimulatedClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZENML_CONFIG_PATH", str(tmp_path))
    machine = Watched(clock, tmp_path / "composite_logstore" / "spool", "spill", monkeypatch)
    monkeypatch.setenv("ZENML_CONFIG_PATH", str(tmp_path))
    machine.start()
    machine.log("a")
    clock.advance(5)

    def away() -> list[LogStore]:
        raise ConnectionError

    monkeypatch.setattr(INVENTORY, "registered", away)
    assert children(status(str(machine.id)))["archive"].delivered == 1


# The files


def test_a_file_is_private_and_holds_no_text_that_was_logged(machine: Watched, clock: SimulatedClock) -> None:
    machine.backends["live"].fault = UnavailableError("gone")
    machine.start()
    machine.log(SECRET)
    clock.advance(5)
    (file,) = (machine.home / "status").iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert SECRET not in file.read_text()
    assert file.stat().st_size < 10_000


def test_a_long_error_is_cut(machine: Watched, clock: SimulatedClock) -> None:
    machine.backends["live"].fault = UnavailableError("x" * 100_000)
    machine.start()
    machine.log("a")
    clock.advance(5)
    error = children(status("logs"))["live"].last_error
    assert error is not None
    assert len(error) < 1000


def test_a_forked_process_does_not_keep_a_dead_parent_s_file_locked(tmp_path: Path) -> None:
    file = StatusFile(tmp_path, "0123456789abcde")
    file.write({"pid": 1})
    with idle_fork():
        assert [said.is_alive for said in read_statuses(tmp_path)] == [True]
        release_all()
        assert [said.is_alive for said in read_statuses(tmp_path)] == [False]


def test_a_descriptor_that_a_program_has_taken_is_left_alone(tmp_path: Path) -> None:
    file = StatusFile(tmp_path, "0123456789abcde")
    file.write({"pid": 1})
    assert file._file is not None
    other = os.open(tmp_path / "other", os.O_RDWR | os.O_CREAT)
    os.dup2(other, file._file)
    taken = file._file
    file.write({"pid": 2})
    assert (tmp_path / "other").read_bytes() == b""
    os.write(taken, b"x")
    assert [said.status for said in read_statuses(tmp_path)] == [{"pid": 2}]
    for descriptor in (other, taken):
        os.close(descriptor)
    release_all()


@pytest.mark.parametrize("how", ["removed", "moved", "replaced by a link", "replaced by a folder"])
def test_a_file_that_was_taken_away_is_written_anew(tmp_path: Path, how: str) -> None:
    file = StatusFile(tmp_path, "0123456789abcde")
    file.write({"pid": 1})
    path = tmp_path / "status" / "0123456789abcde"
    (tmp_path / "elsewhere").write_bytes(b"")
    if how == "moved":
        path.rename(tmp_path / "away")
    else:
        path.unlink()
    if how == "replaced by a link":
        path.symlink_to(tmp_path / "elsewhere")
    if how == "replaced by a folder":
        path.mkdir()
    file.write({"pid": 2})
    assert [said.status for said in read_statuses(tmp_path)] == [{"pid": 2}]
    assert (tmp_path / "elsewhere").read_bytes() == b""
    release_all()


def test_files_of_processes_that_died_a_day_ago_are_removed(tmp_path: Path) -> None:
    for number in range(3):
        StatusFile(tmp_path, f"{number:015x}").write({"pid": number})
    release_all()
    living = StatusFile(tmp_path, f"{9:015x}")
    living.write({"pid": 9})
    for number in (0, 1, 9):
        os.utime(tmp_path / "status" / f"{number:015x}", (1, 1))
    StatusFile(tmp_path, "0123456789abcde").write({"pid": 1})
    names = [said.writer for said in read_statuses(tmp_path)]
    assert names == [f"{2:015x}", f"{9:015x}", "0123456789abcde"]
    release_all()


@pytest.mark.parametrize(
    "data", [b"", b"x", b"\0" * 4096, b"00000000 {}\n", b"[" * 3_000_000], ids=["empty", "x", "zeros", "wrong", "large"]
)
def test_a_damaged_file_hides_no_other(machine: Watched, clock: SimulatedClock, data: bytes) -> None:
    machine.start()
    machine.log("a")
    clock.advance(5)
    (machine.home / "status" / "0123456789abcde").write_bytes(data)
    os.chmod(machine.home / "status" / "0123456789abcde", 0o600)
    found = status("logs")
    assert children(found)["archive"].delivered == 1
    assert [process.pid for process in found.processes if process.is_alive] == [os.getpid()]
    assert "1 running process " in run().output


@pytest.mark.parametrize(
    "wrong",
    [
        {"state": "splendid"},
        {"delivered": -1},
        {"delivered": "5"},
        {"oldest": "yesterday"},
        {"last_error": "x" * 2000},
        {"pending": None},
    ],
    ids=str,
)
def test_a_status_of_another_shape_counts_for_nothing(
    machine: Watched, clock: SimulatedClock, wrong: dict[str, Any]
) -> None:
    machine.start()
    machine.log("a")
    clock.advance(5)
    (said,) = read_statuses(machine.home)
    forged = StatusFile(machine.home, "0123456789abcde")
    forged.write({**said.status, "children": {"archive": {**said.status["children"]["archive"], **wrong}}})
    found = status("logs")
    assert children(found)["archive"].delivered == 1
    assert [process.pid is None for process in found.processes] == [
        process.writer != said.writer for process in found.processes
    ]


def test_a_folder_that_others_can_write_is_named(machine: Watched, clock: SimulatedClock) -> None:
    machine.start()
    machine.log("a")
    clock.advance(5)
    os.chmod(machine.home / "status", 0o777)
    found = status("logs")
    assert "others can write" in found.unknown[0]


def test_a_reader_that_holds_the_lock_delays_a_report_alone(tmp_path: Path) -> None:
    file = StatusFile(tmp_path, "0123456789abcde")
    file.write({"pid": 1})
    release_all()
    with (tmp_path / "status" / "0123456789abcde").open("r+b") as reader:
        fcntl.flock(reader, fcntl.LOCK_EX)
        file.write({"pid": 2})
    assert [said.status for said in read_statuses(tmp_path)] == [{"pid": 2}]
    release_all()


# The command


def test_the_table_names_every_number(machine: Watched, clock: SimulatedClock) -> None:
    machine.backends["live"].fault = UnavailableError("gone\x1b[2J")
    machine.start()
    machine.log(*map(str, range(1500)))
    clock.advance(100)
    output = run().output
    header, _, archive, live, *rest = output.splitlines()
    names = ["CHILD", "STATE", "RATE", "BACKLOG", "OLDEST", "WITHHELD", "REDACTED", "REJECTED", "DROPPED"]
    assert header.split() == names
    assert archive.split() == ["archive", "healthy", "0/s", "0", "0", "0", "0", "0"]
    assert live.split()[:4] == ["live", "unavailable", "0/s", "1,500"]
    assert "\x1b" not in output
    assert rest[0] == "1 running process of log store 'logs'."
    assert "'live': gone" in rest[1]
    assert len(rest) == 2


def test_json_has_the_children_the_processes_and_what_is_unknown(machine: Watched, clock: SimulatedClock) -> None:
    machine.start()
    machine.log("a")
    clock.advance(5)
    machine.die()
    found = json.loads(run("--output", "json").output)
    assert found["log_store"] == {"id": str(machine.id), "name": "logs"}
    assert [child["name"] for child in found["children"]] == ["archive", "live"]
    assert found["children"][0].keys() == ChildStatus.__dataclass_fields__.keys()
    assert [(process["is_alive"], process["pid"]) for process in found["processes"]] == [(False, os.getpid())]
    assert found["unknown"] == []
    assert "has died" in run().output


@pytest.mark.parametrize("output", ["text", "json"])
def test_watch_looks_every_second_until_ctrl_c(
    machine: Watched, clock: SimulatedClock, monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    machine.start()
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        machine.log("a")
        clock.advance(5)
        if len(waits) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(command, "time", SimpleNamespace(time=clock.time, sleep=sleep))
    result = run("--watch", "--output", output)
    assert result.exit_code == 130
    assert waits == [1.0, 1.0, 1.0]
    if output == "json":
        lines = [json.loads(line) for line in result.output.splitlines()]
        assert [line["children"][0]["delivered"] for line in lines] == [0, 1, 2]
    else:
        assert result.output.count("CHILD") == 3


def test_the_folders_of_dead_processes_are_read_only_now_and_then(
    machine: Watched, clock: SimulatedClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.backends["live"].fault = RetryableError("away")
    machine.start()
    machine.log(*"abc")
    clock.advance(5)
    machine.die()
    module = import_module("composite_logstore.operations.status")
    reads: list[Any] = []
    real = module.backlog_in
    monkeypatch.setattr(module, "backlog_in", lambda *where: (reads.append(where), real(*where))[1])
    watch = Watch("logs")
    for _ in range(20):
        assert children(watch.look())["live"].pending == 3
        clock.advance(1)
    assert len(reads) == 2
