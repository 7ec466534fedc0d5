"""Somebody deletes or replaces files of a living process's folder: they are restored, and delivery continues."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from composite_logstore.spool.folder import Spool, process_folders
from composite_logstore.spool.lock import is_alive
from composite_logstore.testing import SimulatedClock
from tests.events import make_events
from tests.simulation import Machine, assert_accounts_add_up, folders_of_processes


@pytest.fixture(autouse=True)
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("composite_logstore.spool.segments.SEGMENT_BYTES", 4096)


def segments(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.log"))


def replace(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)


TIDYING: dict[str, Callable[[Path], object]] = {
    "the spare segment deleted": lambda folder: (folder / "spare").unlink(),
    "the spare segment replaced": lambda folder: replace(folder / "spare", Path.mkdir),
    "the segment in use deleted": lambda folder: segments(folder)[-1].unlink(),
    "the segment in use renamed": lambda folder: segments(folder)[-1].rename(folder / "old.log.1"),
    "the segment in use moved away": lambda folder: shutil.move(segments(folder)[-1], folder.parents[2] / "moved"),
    "the segment in use replaced by its copy": lambda folder: replace(
        segments(folder)[-1], lambda path: path.write_bytes(b"a copy")
    ),
    "the segment in use replaced by a pipe": lambda folder: replace(segments(folder)[-1], os.mkfifo),
    "the segment in use replaced by a folder": lambda folder: replace(segments(folder)[-1], Path.mkdir),
    "the segment in use replaced by a link": lambda folder: replace(
        segments(folder)[-1], lambda path: path.symlink_to("/etc/hostname")
    ),
    "a full segment deleted": lambda folder: segments(folder)[0].unlink(),
    "all segments deleted": lambda folder: [path.unlink() for path in segments(folder)],
    "a position deleted": lambda folder: (folder / "a.settled").unlink(),
    "all positions deleted": lambda folder: [path.unlink() for path in folder.glob("*.settled")],
    "a position replaced": lambda folder: replace(folder / "a.settled", Path.mkdir),
    "the lock deleted": lambda folder: (folder / "owner.lock").unlink(),
    "the lock replaced": lambda folder: replace(folder / "owner.lock", Path.touch),
    "the lock replaced by a pipe": lambda folder: replace(folder / "owner.lock", os.mkfifo),
    "all files deleted": lambda folder: [path.unlink() for path in folder.iterdir()],
    "the folder removed": shutil.rmtree,
    "the folder renamed": lambda folder: folder.rename(folder.with_name("old")),
    "the folder moved away": lambda folder: shutil.move(folder, folder.parents[2] / "moved"),
    "the folder replaced by an empty one": lambda folder: (shutil.rmtree(folder), folder.mkdir()),
    "the folder replaced by a full one": lambda folder: (
        shutil.rmtree(folder),
        folder.mkdir(),
        (folder / "note.txt").write_text("mine"),
    ),
    "the folder replaced by a file": lambda folder: (shutil.rmtree(folder), folder.write_text("mine")),
    "the log store's folder removed": lambda folder: shutil.rmtree(folder.parent),
    "the log store's folder removed and made again": lambda folder: (
        shutil.rmtree(folder.parent),
        folder.parent.mkdir(mode=0o700),
    ),
    "the log store's folder moved away": lambda folder: folder.parent.rename(folder.parents[2] / "moved"),
    "the spool's directory removed": lambda folder: shutil.rmtree(folder.parents[1]),
    "nobody may write in the folder": lambda folder: folder.chmod(0o500),
    "nobody may use the folder": lambda folder: folder.chmod(0),
    "everybody may write in the folder": lambda folder: folder.chmod(0o777),
    "a stranger's file": lambda folder: (folder / "note.txt").write_text("mine"),
}


@pytest.mark.parametrize("durability", ["spill", "write_ahead"])
@pytest.mark.parametrize("what", TIDYING)
def test_whatever_is_taken_away_is_restored_and_the_next_process_delivers_it(
    tmp_path: Path, clock: SimulatedClock, durability: str, what: str
) -> None:
    machine = Machine(clock, tmp_path / "spool", durability, a={}, b={})
    machine.backends["a"].fault = "refused"
    machine.start()
    # Two segments and a part of a third.
    messages = [f"{number} " + "x" * 1_400 for number in range(7)]
    machine.log(*messages)
    clock.advance(2)
    assert machine.store.writer._journal.spilling
    spool = machine.store.writer._journal.spilling.folder.spool
    assert spool is not None
    TIDYING[what](spool.folder)
    clock.advance(2)
    later = [f"later {number} " + "x" * 1_400 for number in range(7)]
    machine.log(*later)
    # More events than fit into the segment in use.
    clock.advance(2)
    assert machine.store.writer._journal.spilling.folder.error is None
    assert_accounts_add_up(machine.store.stats())
    machine.die()
    machine.backends["a"].fault = None
    machine.start()
    machine.log("next")
    clock.advance(60)
    assert sorted(machine.backends["a"].messages) == sorted([*messages, *later, "next"])
    assert sorted(set(machine.backends["b"].messages)) == sorted([*messages, *later, "next"])
    assert_accounts_add_up(machine.store.stats())


@pytest.mark.parametrize("what", ["the lock deleted", "the lock replaced"])
def test_a_folder_is_not_recovered_if_only_its_lock_is_deleted(
    tmp_path: Path, clock: SimulatedClock, what: str
) -> None:
    machine = Machine(clock, tmp_path / "spool", "write_ahead", a={})
    machine.backends["a"].fault = "refused"
    machine.start()
    machine.log("event")
    clock.advance(1)
    (folder,) = folders_of_processes(tmp_path / "spool")
    TIDYING[what](folder)
    if what == "the lock deleted":
        assert is_alive(folder)
        assert Spool.recover(folder) is None
    clock.advance(1)
    assert is_alive(folder)
    assert Spool.recover(folder) is None
    machine.die()
    recovered = Spool.recover(folder)
    assert recovered is not None
    recovered.abandon()


def test_a_folder_that_another_process_has_recovered_is_abandoned(tmp_path: Path, clock: SimulatedClock) -> None:
    """A process of an earlier version may, or one on another machine: both check the lock's file only."""
    machine = Machine(clock, tmp_path / "spool", "write_ahead", a={})
    machine.backends["a"].fault = "refused"
    machine.start()
    machine.log("event")
    clock.advance(1)
    (folder,) = folders_of_processes(tmp_path / "spool")
    (folder / "owner.lock").unlink()
    with (folder / "owner.lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        clock.advance(1)
        machine.log("later")
        clock.advance(1)
        assert sorted(path.name for path in folders_of_processes(tmp_path / "spool")) == [
            folder.name,
            f"{folder.name}-2",
        ]
        machine.die()
        found = Spool.recover(folder.with_name(f"{folder.name}-2"))
        assert found is not None
        assert [event.message for event in found.reader.read(-1, 10)] == ["event", "later"]
        found.abandon()


def test_two_folders_of_one_writer_are_both_found(tmp_path: Path) -> None:
    writer = "0123456789abcde"
    for number in range(3):
        spool = Spool.create(tmp_path, writer, ["a"])
        spool.segments.append(make_events([str(number)], first=number)[0], lambda size: True)
        spool.abandon()
    found = [Spool.recover(folder) for folder in process_folders(tmp_path)]
    assert [[event.message for event in spool.reader.read(-1, 10)] for spool in found if spool] == [["0"], ["1"], ["2"]]
    assert len(found) == 3


ERRORS = [
    errno.ENOENT,
    errno.EACCES,
    errno.ENOSPC,
    errno.EIO,
    errno.EMFILE,
    errno.ESTALE,
    errno.ENOTEMPTY,
    errno.ENOTDIR,
]
CALLS = ["open", "stat", "mkdir", "rename", "unlink", "listdir", "dup", "posix_fallocate"]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("error", ERRORS, ids=errno.errorcode.get)
def test_errors_of_the_system_lose_no_event(
    tmp_path: Path, clock: SimulatedClock, monkeypatch: pytest.MonkeyPatch, error: int, call: str
) -> None:
    """Written events stay on disk while the system reports errors for some seconds, and later ones follow."""
    machine = Machine(clock, tmp_path / "spool", "write_ahead", a={})
    machine.backends["a"].fault = "refused"
    machine.start()
    before = [f"before {number} " + "x" * 1_000 for number in range(3)]
    machine.log(*before)
    clock.advance(1)
    (folder,) = folders_of_processes(tmp_path / "spool")

    def failing(path: Any, *arguments: Any, **options: Any) -> Any:
        is_of_spool = options.keys() & {"dir_fd", "src_dir_fd"} or call in ("dup", "posix_fallocate", "listdir")
        if is_of_spool or str(path).startswith(str(tmp_path)):
            raise OSError(error, os.strerror(error))
        return real(path, *arguments, **options)

    real = getattr(os, call)
    during = [f"during {number} " + "x" * 1_000 for number in range(9)]
    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing)
        for message in during:
            machine.log(message)
            clock.advance(0.3)
    clock.advance(3)
    after = [f"after {number} " + "x" * 1_000 for number in range(9)]
    machine.log(*after)
    assert machine.store.writer._journal.spilling
    assert machine.store.writer._journal.spilling.folder.error is None
    is_said_to_be_gone = (call, error) in {("stat", errno.ENOENT), ("stat", errno.ENOTDIR)}
    if not is_said_to_be_gone:
        assert folders_of_processes(tmp_path / "spool") == [folder]
    machine.die()
    machine.backends["a"].fault = None
    machine.start()
    machine.log("next")
    clock.advance(60)
    messages = machine.backends["a"].messages
    assert sorted(set(messages) if is_said_to_be_gone else messages) == sorted([*before, *during, *after, "next"])


def test_a_program_that_closes_all_descriptors_and_opens_files_of_its_own(
    tmp_path: Path, clock: SimulatedClock
) -> None:
    """The log store does not touch these files, and locks the folder again."""
    machine = Machine(clock, tmp_path / "spool", "write_ahead", a={})
    machine.backends["a"].fault = "refused"
    machine.start()
    machine.log("event")
    clock.advance(1)
    (folder,) = folders_of_processes(tmp_path / "spool")
    assert machine.store.writer._journal.spilling
    spool = machine.store.writer._journal.spilling.folder.spool
    assert spool is not None
    assert spool.lock is not None
    assert spool.lock.guard is not None
    own = os.open(tmp_path / "own", os.O_RDWR | os.O_CREAT)
    for descriptor in (spool.lock.file, spool.lock.guard):
        os.dup2(own, descriptor)
    reused = spool.lock.file, spool.lock.guard
    clock.advance(3)
    (folder / "note.txt").write_text("so that it is looked at")
    clock.advance(3)
    machine.log("later")
    assert is_alive(folder)
    machine.die()
    assert {os.fstat(descriptor).st_ino for descriptor in reused} == {os.fstat(own).st_ino}
    found = Spool.recover(folder)
    assert found is not None
    assert [event.message for event in found.reader.read(-1, 10)] == ["event", "later"]
    found.abandon()
    for descriptor in (own, *reused):
        os.close(descriptor)
