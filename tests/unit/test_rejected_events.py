"""Rejected events on disk: which are kept, with what, and what happens if they cannot be."""

from __future__ import annotations

import errno
import os
import stat
import threading
from pathlib import Path
from uuid import uuid4

import pytest

from composite_logstore.backend import RejectedError, TooLargeError
from composite_logstore.delivery import worker
from composite_logstore.delivery.backoff import rejection
from composite_logstore.event import ExceptionInfo, LogEvent, Stream, TraceContext
from composite_logstore.spool import rejected as on_disk
from composite_logstore.spool.format import RejectedEvent, encode_rejected
from composite_logstore.spool.rejected import RejectedFolder
from composite_logstore.testing import SimulatedClock
from tests.events import NOON, make_events
from tests.simulation import Machine, assert_accounts_add_up

MOST = 1 << 20


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    told: list[str] = []
    monkeypatch.setattr(worker.logger, "warning", lambda text, *_: told.append(text))
    return told


@pytest.fixture
def folder(tmp_path: Path) -> RejectedFolder:
    return RejectedFolder(tmp_path / "component", MOST)


def of(machine: Machine) -> RejectedFolder:
    return RejectedFolder(machine.disk / str(machine.id))


def rejected(events: list[LogEvent], reason: str = "too old") -> list[RejectedEvent]:
    return [RejectedEvent(event, reason, NOON) for event in events]


def kept(folder: RejectedFolder, child: str = "a") -> list[RejectedEvent]:
    return [line.rejected for line in folder.read(child) if line.rejected]


def messages(folder: RejectedFolder, child: str = "a") -> list[str]:
    return [one.event.message for one in kept(folder, child)]


def damaged(folder: RejectedFolder, child: str = "a") -> int:
    return sum(line.rejected is None for line in folder.read(child))


# What an error says of the events


def test_which_events_an_error_names() -> None:
    events = make_events(list("abc"))

    def of_error(error: BaseException, sent: list[LogEvent]) -> tuple[int, list[str]] | None:
        found = rejection(error, sent)
        return found and (found.number, [event.message for event in found.events])

    assert of_error(RejectedError("no", events=events[1:2]), events) == (1, ["b"])
    assert of_error(RejectedError("no", 2, events=events[1:]), events) == (2, ["b", "c"])
    assert of_error(RejectedError("no"), events[:1]) == (1, ["a"])
    assert of_error(TooLargeError("no"), events[:1]) == (1, ["a"])
    assert of_error(RejectedError("no", 3), events) == (3, ["a", "b", "c"])
    # Among these.
    assert of_error(RejectedError("no", 1), events) == (1, ["a", "b", "c"])
    # They will be sent again.
    assert of_error(RejectedError("no"), events) is None
    assert of_error(TooLargeError("no"), events) is None
    assert of_error(RejectedError("no", 0), events) is None
    assert of_error(ValueError("no"), events[:1]) is None


@pytest.mark.parametrize(
    "named",
    [
        pytest.param(lambda events: make_events(["x"], first=7), id="another event"),
        pytest.param(lambda events: [events[0], events[0]], id="one event twice"),
        pytest.param(lambda events: ["b", None], id="no events"),
        pytest.param(lambda events: 5, id="no list"),
    ],
)
def test_an_error_that_names_other_events_than_it_counts_names_none(named: object) -> None:
    events = make_events(list("abc"))
    error = RejectedError("no", 2)
    error.events = named(events)  # type: ignore[operator]
    found = rejection(error, events)
    assert found is not None
    assert (found.number, list(found.events)) == (2, events)


# The files


def test_everything_that_is_needed_to_send_an_event_again_is_on_disk(folder: RejectedFolder) -> None:
    stream = Stream(uuid4(), {"zenml.step.run.name": "train", "nested": {"a": [1]}}, uuid4())
    event = make_events(["two\n\0\x1b[1m ünï😀"], stream)[0]._replace(
        exception=ExceptionInfo("ValueError", "broken", "Traceback"),
        trace=TraceContext(2**127 + 1, 2**63 + 5, 1),
        attributes={"loss": 0.5},
        metadata={"zenml.event.type": "exception"},
        progress=5,
    )
    folder.keep("a", [RejectedEvent(event, "too \x1b old", NOON, 2, 3)])
    (one,) = kept(folder)
    found = one.event.stream
    assert one._replace(event=event) == RejectedEvent(event, "too \x1b old", NOON, 2, 3)
    assert one.event._replace(stream=stream) == event
    assert (found.id, found.attributes, found.artifact_store_id) == (
        stream.id,
        stream.attributes,
        stream.artifact_store_id,
    )


def test_only_their_user_can_read_them(folder: RejectedFolder) -> None:
    before = os.umask(0)
    try:
        folder.keep("a", rejected(make_events(["secret"])))
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in folder.path.iterdir()} == {0o600}


def test_children_are_apart_and_events_in_order(folder: RejectedFolder) -> None:
    events = make_events(list("abcd"))
    folder.keep("a", rejected(events[:2]))
    folder.keep("b-a", rejected(events[2:3]))
    folder.keep("a", rejected(events[3:]))
    assert folder.children() == ["a", "b-a"]
    assert messages(folder) == ["a", "b", "d"]
    assert messages(folder, "b-a") == ["c"]
    # Few files, however often events are rejected.
    assert len(list(folder.path.glob("*.log"))) == 2


def test_without_a_folder_there_is_nothing(folder: RejectedFolder) -> None:
    with folder.alone():
        folder.purge("a")
        folder.remove([])
    assert (folder.children(), messages(folder), folder.size("a"), folder.discarded("a")) == ([], [], 0, 0)
    assert not folder.path.exists()


def test_the_oldest_make_room_and_are_counted(tmp_path: Path) -> None:
    folder = RejectedFolder(tmp_path / "component", 64_000)
    events = make_events([f"{number} " + "x" * 900 for number in range(200)])
    discarded = 0
    for event in events[:100]:
        discarded += folder.keep("a", rejected([event])).discarded
    discarded += folder.keep("b", rejected(events[100:])).discarded
    assert sum(file.stat().st_size for file in folder.path.glob("*.log")) <= 64_000
    found = [message.split()[0] for child in "ab" for message in messages(folder, child)]
    assert found == [str(number) for number in range(200 - len(found), 200)]
    assert discarded == folder.discarded("a") + folder.discarded("b") == 200 - len(found)
    folder.purge("a")
    assert folder.discarded("a") == 0


def test_an_event_that_is_larger_than_all_room_is_not_kept(tmp_path: Path) -> None:
    folder = RejectedFolder(tmp_path / "component", 10_000)
    small, large = make_events(["small", "x" * 20_000])
    found = folder.keep("a", rejected([small, large]))
    assert (found.number, found.discarded) == (1, 0)
    assert getattr(found.error, "errno", None) == errno.EFBIG
    assert messages(folder) == ["small"]


def test_an_event_that_json_cannot_say_is_not_kept_and_hides_no_other(folder: RejectedFolder) -> None:
    good, bad = make_events(["good", "bad"])
    found = folder.keep("a", rejected([bad._replace(message="\ud800"), good]))
    assert found.number == 1
    assert found.error is not None
    assert messages(folder) == ["good"]


def test_removed_lines_need_no_room_and_leave_no_file(folder: RejectedFolder) -> None:
    folder.keep("a", rejected(make_events(list("abc"))))
    first, second, third = folder.read("a")
    (file,) = folder.path.glob("*.log")
    size = file.stat().st_size
    folder.remove([second])
    assert messages(folder) == ["a", "c"]
    assert file.stat().st_size == size
    folder.remove([first, third, second])
    assert not file.exists()
    folder.remove([first])
    folder.keep("a", rejected(make_events(["d"])))
    assert messages(folder) == ["d"]


@pytest.mark.parametrize("at", [0, 9, 30, -2])
def test_a_damaged_line_hides_no_other(folder: RejectedFolder, at: int) -> None:
    folder.keep("a", rejected(make_events(list("abc"))))
    line = list(folder.read("a"))[1]
    (file,) = folder.path.glob("*.log")
    data = bytearray(file.read_bytes())
    data[line.offset + (at if at >= 0 else line.length + at)] ^= 1
    file.write_bytes(data)
    assert messages(folder) == ["a", "c"]
    assert damaged(folder) == 1


@pytest.mark.parametrize("lost", [2, 50])
def test_a_line_that_a_killed_process_has_not_finished_hides_no_other(folder: RejectedFolder, lost: int) -> None:
    folder.keep("a", rejected(make_events(["a", "torn"])))
    (file,) = folder.path.glob("*.log")
    os.truncate(file, file.stat().st_size - lost)
    folder.keep("a", rejected(make_events(["b"])))
    assert messages(folder) == ["a", "b"]
    assert damaged(folder) == 1


def test_a_line_with_values_that_no_event_has_is_damaged(folder: RejectedFolder) -> None:
    (event,) = make_events(["a"])
    folder.keep("a", rejected([event]))
    good = RejectedEvent(event, "no", NOON)
    lines = [
        good._replace(reason=None),  # type: ignore[arg-type]
        good._replace(time_unix_nano=-1),
        good._replace(number="1"),  # type: ignore[arg-type]
        good._replace(event=event._replace(number=-1)),
        good._replace(event=event._replace(writer="nobody")),
        good._replace(event=event._replace(level="high")),  # type: ignore[arg-type]
    ]
    (file,) = folder.path.glob("*.log")
    file.write_bytes(file.read_bytes() + b"".join(map(encode_rejected, lines)))
    assert messages(folder) == ["a"]
    assert damaged(folder) == len(lines)


def test_a_full_disk_leaves_no_part_of_a_line(folder: RejectedFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.keep("a", rejected(make_events(["a"])))
    write = os.write
    written = 0

    def fill(descriptor: int, data: memoryview) -> int:
        nonlocal written
        if written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = write(descriptor, data[:10])
        return written

    monkeypatch.setattr(on_disk.os, "write", fill)
    found = folder.keep("a", rejected(make_events(["b"])))
    monkeypatch.undo()
    assert (found.number, getattr(found.error, "errno", None)) == (0, errno.ENOSPC)
    folder.keep("a", rejected(make_events(["c"])))
    assert messages(folder) == ["a", "c"]
    assert damaged(folder) == 0


def test_what_others_have_put_there_is_left_alone(folder: RejectedFolder, tmp_path: Path) -> None:
    folder.keep("a", rejected(make_events(["a"])))
    (file,) = folder.path.glob("*.log")
    other = tmp_path / "other"
    other.write_text("mine")
    file.unlink()
    file.symlink_to(other)
    (folder.path / "b.00000000000000000001.log").mkdir()
    assert folder.keep("a", rejected(make_events(["b"]))).error is None
    assert messages(folder) == ["b"]
    assert other.read_text() == "mine"


def test_a_folder_that_others_can_write_is_not_used(folder: RejectedFolder) -> None:
    folder.keep("a", rejected(make_events(["a"])))
    folder.path.chmod(0o777)
    found = folder.keep("a", rejected(make_events(["b"])))
    assert found.number == 0
    assert isinstance(found.error, PermissionError)


def test_processes_that_reject_at_once_lose_no_event(folder: RejectedFolder) -> None:
    writers = [f"{number:015x}" for number in range(8)]

    def work(writer: str) -> None:
        for event in make_events([str(number) for number in range(25)], writer=writer):
            # Each opens the files anew, as another process does.
            RejectedFolder(folder.path.parent, MOST).keep("a", rejected([event]))

    threads = [threading.Thread(target=work, args=(writer,)) for writer in writers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = sorted((one.event.writer, one.event.number) for one in kept(folder))
    assert found == [(writer, number) for writer in writers for number in range(25)]


def test_two_never_work_on_them_at_once(folder: RejectedFolder) -> None:
    folder.keep("a", rejected(make_events(["a"])))
    with folder.alone():
        with pytest.raises(BlockingIOError), folder.alone():
            pass
        # Other processes may reject events meanwhile.
        assert folder.keep("a", rejected(make_events(["b"]))).error is None
    with folder.alone():
        assert messages(folder) == ["a", "b"]


def test_a_process_that_holds_the_lock_for_long_costs_an_event_and_no_more(
    folder: RejectedFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.keep("a", rejected(make_events(["a"])))
    monkeypatch.setattr(on_disk, "_LOCK_SECONDS", 0.02)
    with on_disk.PrivateFolder.open(folder.path) as opened, on_disk.locked(opened, "lock", 0):
        found = folder.keep("a", rejected(make_events(["b"])))
    assert (found.number, type(found.error)) == (0, BlockingIOError)
    assert messages(folder) == ["a"]


# The worker


def test_a_rejected_event_is_kept_with_the_reason_as_it_was_logged(
    tmp_path: Path, clock: SimulatedClock, warnings: list[str]
) -> None:
    machine = Machine(clock, tmp_path, "spill", a={"ansi": "strip"}, b={})
    machine.backends["a"].faults = [RejectedError("no mapping")]
    machine.start()
    machine.log("\x1b[31mred\x1b[0m")
    clock.advance(1)
    (one,) = kept(of(machine))
    assert (one.event.message, one.reason, one.is_certain) == ("\x1b[31mred\x1b[0m", "no mapping", True)
    assert one.event.stream.id == machine.origin.stream.id
    stats = machine.store.stats()
    assert (stats["a"]["rejected"], stats["a"]["rejected_not_kept"]) == (1, 0)
    assert_accounts_add_up(stats)
    assert messages(of(machine), "b") == []
    assert [text for text in warnings if "no mapping" in text and "composite-logstore rejected" in text]


def test_of_a_batch_that_is_split_the_event_at_fault_is_kept(tmp_path: Path, clock: SimulatedClock) -> None:
    machine = Machine(clock, tmp_path, "spill", a={"schedule_delay_millis": 100})
    backend = machine.backends["a"]
    export = backend.export

    def refuse(batch: list[LogEvent]) -> int:
        if any(event.message == "bad" for event in batch):
            raise RejectedError("no")
        return export(batch)

    backend.export = refuse  # type: ignore[method-assign, assignment]
    machine.start()
    machine.log("one", "two", "bad", "three")
    clock.advance(1)
    assert messages(of(machine)) == ["bad"]
    assert backend.messages == ["one", "two", "three"]


def test_if_the_backend_does_not_say_which_all_of_the_batch_are_kept_as_uncertain(
    tmp_path: Path, clock: SimulatedClock
) -> None:
    machine = Machine(clock, tmp_path, "spill", a={"schedule_delay_millis": 100})
    machine.backends["a"].faults = [RejectedError("quota", 1)]
    machine.start()
    machine.log("one", "two", "three")
    clock.advance(1)
    assert [(one.event.message, one.number, one.among) for one in kept(of(machine))] == [
        ("one", 1, 3),
        ("two", 1, 3),
        ("three", 1, 3),
    ]
    assert not any(one.is_certain for one in kept(of(machine)))
    stats = machine.store.stats()["a"]
    assert (stats["delivered"], stats["rejected"], stats["rejected_not_kept"]) == (2, 1, 0)


@pytest.mark.parametrize(
    ("durability", "settings", "words"),
    [("memory", {}, "'memory'"), ("spill", {"rejected_max_bytes": 0}, "'rejected_max_bytes'")],
)
def test_if_they_are_not_kept_the_warning_and_the_account_say_so(
    tmp_path: Path,
    clock: SimulatedClock,
    warnings: list[str],
    durability: str,
    settings: dict[str, int],
    words: str,
) -> None:
    machine = Machine(clock, tmp_path, durability, a={})
    machine.backends["a"].faults = [RejectedError("no mapping")]
    machine.start(**settings)
    machine.log("one")
    clock.advance(1)
    assert machine.store.stats()["a"]["rejected_not_kept"] == 1
    assert not of(machine).path.exists()
    assert [text for text in warnings if "not kept" in text and words in text]


def test_a_full_disk_costs_nothing_but_the_rejected_event(
    tmp_path: Path, clock: SimulatedClock, warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(clock, tmp_path, "spill", a={})
    backend = machine.backends["a"]
    backend.faults = [RejectedError("no"), RejectedError("no")]

    def fail(descriptor: int, data: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(on_disk, "_write_at_end", fail)
    machine.start()
    for message in ("one", "two", "three"):
        machine.log(message)
        clock.advance(1)
    stats = machine.store.stats()["a"]
    assert (stats["rejected"], stats["rejected_not_kept"], stats["delivered"]) == (2, 2, 1)
    assert backend.messages == ["three"]
    assert len([text for text in warnings if "cannot be kept" in text]) == 1


def test_events_that_make_room_are_said_once(tmp_path: Path, clock: SimulatedClock, warnings: list[str]) -> None:
    machine = Machine(clock, tmp_path, "spill", a={})
    machine.backends["a"].faults = [RejectedError("no") for _ in range(9)]
    machine.start(rejected_max_bytes=4_000)
    for number in range(9):
        machine.log(str(number) + "x" * 1000)
        clock.advance(1)
    assert of(machine).discarded("a") + len(kept(of(machine))) == 9
    assert machine.store.stats()["a"]["rejected_not_kept"] == 0
    assert len([text for text in warnings if "'rejected_max_bytes' is reached" in text]) == 1


def test_a_folder_that_vanishes_is_made_again(tmp_path: Path, clock: SimulatedClock) -> None:
    machine = Machine(clock, tmp_path, "spill", a={})
    machine.backends["a"].faults = [RejectedError("no"), RejectedError("no")]
    machine.start()
    machine.log("one")
    clock.advance(1)
    of(machine).path.rename(tmp_path / "elsewhere")
    machine.log("two")
    clock.advance(1)
    assert messages(of(machine)) == ["two"]
    assert machine.store.stats()["a"]["rejected_not_kept"] == 0


def test_recovered_events_are_kept_too(tmp_path: Path, clock: SimulatedClock) -> None:
    machine = Machine(clock, tmp_path, "write_ahead", a={})
    machine.backends["a"].fault = "refused"
    machine.start()
    machine.log("one")
    machine.die()
    machine.backends["a"].fault = None
    machine.backends["a"].faults = [RejectedError("no")]
    machine.start()
    machine.log("two")
    clock.advance(5)
    assert len(messages(of(machine))) == 1
    assert machine.store.stats()["a"]["rejected"] == 1
    assert_accounts_add_up(machine.store.stats())
