from __future__ import annotations

import importlib
import logging
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from composite_logstore import CompositeLogStore, fork, loading
from composite_logstore.event import Capture, LogEvent
from composite_logstore.fork import Inbox, Outbox, ParentGoneError
from composite_logstore.testing import SimulatedBackend
from tests.events import make_capture, make_stream
from tests.simulation import assert_accounts_add_up, make_child, make_logs, make_store
from tests.watching import wait_until

pytestmark = pytest.mark.process


def log(store: CompositeLogStore, origin: Any, message: str, level: int = logging.INFO) -> None:
    store.emit(origin, logging.LogRecord("train", level, "/code/train.py", 1, message, (), None, "fit"))


def register(store: CompositeLogStore, **metadata: Any) -> Any:
    logs = make_logs(store)
    return store.register_origin(str(logs.id), logs, metadata)


def in_fork(run: Callable[[], None]) -> int:
    """Run something in a forked process; return that process's id once it has ended."""
    if (process := os.fork()) == 0:
        try:
            run()
        finally:
            os._exit(0)
    os.waitpid(process, 0)
    return process


def test_what_forked_processes_log_is_delivered_by_their_parent() -> None:
    backend = SimulatedBackend()
    store = make_store(make_child("a", backend))
    origin = register(store)
    log(store, origin, "parent")

    def child() -> None:
        log(store, origin, "child")
        in_fork(lambda: log(store, origin, "grandchild"))
        store.flush()
        assert store.stats()["a"]["accepted"] == 0

    in_fork(child)
    store.flush()
    assert backend.messages == ["parent", "child", "grandchild"]
    assert [event.sequence for event in backend.received] == [0, 1, 2]
    assert {event.writer for event in backend.received} == {store.writer.writer_id}
    assert_accounts_add_up(store.stats())


def test_a_fork_before_the_first_event() -> None:
    backend = SimulatedBackend()
    store = make_store(make_child("a", backend))
    origin = register(store)
    in_fork(lambda: log(store, origin, "child"))
    store.flush()
    assert backend.messages == ["child"]


def test_a_message_of_any_size_and_what_a_record_can_carry(monkeypatch: pytest.MonkeyPatch) -> None:
    # It is larger than the pipe, and the machine may be busy.
    monkeypatch.setattr(fork, "_PATIENCE_SECONDS", 30.0)
    backend = SimulatedBackend()
    store = make_store(make_child("a", backend))
    origin = register(store)

    def child() -> None:
        log(store, origin, "x" * 5_000_000)
        try:
            raise ValueError("broken")
        except ValueError as error:
            record = logging.makeLogRecord({"msg": "caught", "exc_info": (ValueError, error, error.__traceback__)})
            record.extra = {"loss": 0.5}
            store.emit(origin, record)

    in_fork(child)
    store.flush()
    assert [message[:10] for message in backend.messages] == ["x" * 10, "caught"], store.stats()
    assert backend.messages[0] == "x" * 5_000_000
    assert backend.received[1].exception is not None
    assert backend.received[1].exception.message == "broken"
    assert backend.received[1].attributes == {"extra": {"loss": 0.5}}


def test_a_stream_that_a_forked_process_registers() -> None:
    backend = SimulatedBackend()
    store = make_store(make_child("a", backend))
    outer = register(store)

    def child() -> None:
        origin = register(store, run="7")
        origin.metadata["late"] = "yes"
        log(store, origin, "hello")
        store.deregister_origin(origin)
        # That the forked process is done with its parent's stream does not end it.
        store.deregister_origin(outer)

    in_fork(child)
    store.writer.close(1.0)
    backend.wait_for_close()
    (event,) = backend.received
    assert event.stream.attributes["run"] == "7"
    assert event.stream.attributes["late"] == "yes"
    assert backend.ended == [event.stream]


@pytest.mark.parametrize("min_level", [None, "WARNING"])
def test_what_finds_no_room_is_counted_as_dropped(min_level: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("composite_logstore.writer.Writer.after_fork_in_parent", lambda self: None)
    monkeypatch.setattr("composite_logstore.fork._PATIENCE_SECONDS", 0.0)
    backend = SimulatedBackend()
    store = make_store(make_child("a", backend, min_level=min_level))
    origin = register(store)
    in_fork(lambda: [log(store, origin, "x" * 1000) for _ in range(3000)] and None)
    store.flush()
    stats = store.stats()["a"]
    assert_accounts_add_up({"a": stats})
    if min_level:
        assert stats["accepted"] == 0
    else:
        assert stats["accepted"] == 3000
        assert 0 < stats["dropped"] < 3000
        assert stats["delivered"] == len(backend.received)


def test_a_forked_process_whose_parent_is_gone_delivers_by_itself() -> None:
    backend = SimulatedBackend()
    store = make_store(make_child("a", backend))
    origin = register(store)
    log(store, origin, "parent")
    store.flush()
    answers, answer = os.pipe()
    parent_ends, parent_lives = os.pipe()

    def orphan() -> None:
        os.close(parent_lives)
        os.read(parent_ends, 1)
        # The process below is the parent of this one, and the test's process is not involved.
        log(store, origin, "orphan")
        store.flush()
        (event,) = (event for event in backend.received if event.message == "orphan")
        stats = store.stats()["a"]
        os.write(answer, f"{event.writer} {event.sequence} {stats['delivered']}".encode())

    def middle() -> None:
        # As a daemon is made: a process of its own store forks, and ends.
        own = make_store(make_child("a", backend))
        own_origin = register(own)
        nonlocal store, origin
        store, origin = own, own_origin
        if os.fork() == 0:
            try:
                orphan()
            finally:
                os._exit(0)

    writer = store.writer.writer_id
    in_fork(middle)
    os.close(parent_lives)
    os.close(answer)
    with os.fdopen(answers) as text:
        other, sequence, delivered = text.read().split()
    assert other != writer
    assert (sequence, delivered) == ("0", "1")


@pytest.fixture
def pipe() -> Iterator[tuple[Inbox, Outbox]]:
    """An inbox and, in the same process, its other end."""
    inbox = Inbox()
    yield inbox, Outbox(inbox)
    inbox.close()


STREAM = make_stream()


def texts(said: Iterable[Any]) -> list[str]:
    return [one.message if isinstance(one, Capture) else one.capture.message for one in said]


def test_what_the_parent_has_not_journaled_is_the_forked_process_s_own(pipe: tuple[Inbox, Outbox]) -> None:
    inbox, outbox = pipe
    for number in range(5):
        outbox.send(STREAM, False, make_capture(str(number)))
    receiving = inbox.receive()
    heard = [next(receiving), next(receiving)]
    # The second one is just being journaled.
    receiving.close()
    inbox.close()
    with pytest.raises(ParentGoneError):
        outbox.send(STREAM, False, make_capture("5"))
    left = outbox.take_back()
    assert texts(heard) == ["0", "1"]
    assert [(stream, capture and capture.message) for stream, capture in left] == [
        (STREAM, str(n)) for n in range(1, 5)
    ]
    assert outbox.take_back() == []


def test_what_is_journaled_while_the_pipe_is_gone_is_not_taken_back(pipe: tuple[Inbox, Outbox]) -> None:
    inbox, outbox = pipe
    for number in range(5):
        outbox.send(STREAM, False, make_capture(str(number)))
    (read_by_the_parent,) = ([*inbox._whole_messages(inbox._read(inbox._messages))] for _ in range(1))
    outbox._is_cut_off = True
    for number, (sender, _) in enumerate(read_by_the_parent):
        threading.Timer(0.02 * number, inbox.receipts.give, (sender, number + 1)).start()
    assert outbox.take_back() == []


def test_a_parent_that_never_journals_it_is_not_waited_for_long(
    pipe: tuple[Inbox, Outbox], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fork, "_CUT_OFF_SECONDS", 0.05)
    _, outbox = pipe
    outbox.send(STREAM, False, make_capture("hello"))
    outbox._is_cut_off = True
    assert len(outbox.take_back()) == 1


def test_receipts_of_more_processes_than_there_are_places() -> None:
    receipts = fork._Receipts()
    for sender in range(1, 3_000):
        receipts.give(sender, 7)
        receipts.give(1, sender)
    # One that is heard of keeps its place; of the others the latest have theirs.
    assert receipts.of(1) == 2_999
    assert receipts.of(2_999) == receipts.of(2_000) == 7
    assert receipts.of(2) == receipts.of(3_000) == 0


def test_what_a_forked_process_keeps_is_bounded(pipe: tuple[Inbox, Outbox], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fork, "_KEPT_BYTES", 10_000)
    inbox, outbox = pipe
    for number in range(300):
        outbox.send(STREAM, False, make_capture(f"{number} {'x' * 100}"))
        # What is journaled is not kept, whatever there is room for.
        if number < 200:
            list(inbox.receive())
    assert 0 < outbox._kept_bytes <= 10_000
    assert len(outbox.take_back()) < 100
    assert outbox._kept_bytes == 0


@pytest.mark.parametrize("end", ["_sending", "_losing"])
def test_nothing_is_written_into_a_file_that_has_the_pipe_s_descriptor(
    end: str, pipe: tuple[Inbox, Outbox], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A daemon closes all descriptors it has, and opens files of its own."""
    monkeypatch.setattr(fork, "_CUT_OFF_SECONDS", 0.0)
    _, outbox = pipe
    outbox.send(STREAM, False, make_capture("before"))
    with (tmp_path / "own").open("wb") as file:
        os.dup2(file.fileno(), getattr(outbox, end))
        for _ in range(2):
            with pytest.raises(ParentGoneError):
                outbox.send(STREAM, False, make_capture("after"))
        assert not outbox.is_heard()
        assert file.tell() == 0
    assert texts(capture for _, capture in outbox.take_back()) == ["before"]


def test_nothing_is_read_from_a_file_that_has_the_pipe_s_descriptor(tmp_path: Path) -> None:
    store = make_store(make_child("a", schedule_delay_millis=0))
    origin = register(store)
    in_fork(lambda: log(store, origin, "first"))
    store.flush()
    inbox = store.writer._inbox
    assert inbox is not None
    own = tmp_path / "own"
    own.write_bytes(pickle.dumps("own"))
    with own.open("rb") as file:
        for end in inbox._ends:
            os.dup2(file.fileno(), end)
        store.flush()
        assert file.tell() == 0
        # The next fork gets a pipe of its own.
        in_fork(lambda: log(store, origin, "second"))
        store.flush()
    assert store.stats()["a"]["delivered"] == 2
    for end in inbox._ends:
        os.close(end)


@pytest.mark.parametrize(
    ("way", "durability"), [("ends in order", "memory"), ("ends in order", "spill"), ("is killed", "write_ahead")]
)
def test_a_forked_process_that_outlives_its_parent_loses_nothing(way: str, durability: str, tmp_path: Path) -> None:
    number = 300
    received, all_received = tmp_path / "received", tmp_path / "all received"

    class Kept(SimulatedBackend):
        """Keeps what any process delivers."""

        def export(self, batch: Sequence[LogEvent]) -> int:
            with received.open("a") as file:
                file.write("".join(f"{event.writer} {event.message}\n" for event in batch))
            return 0

    def messages() -> set[int]:
        return {int(line.split()[1]) for line in received.read_text().splitlines()}

    def outlive(store: CompositeLogStore, origin: Any) -> None:
        for n in range(number):
            log(store, origin, f"{n}")
            time.sleep(0.001)
        store.flush()
        # What its parent has left on disk is delivered by it, beside its own.
        wait_until(lambda: messages() == set(range(number)), "all is delivered", 20)
        all_received.touch()

    def parent() -> None:
        child = make_child("a", Kept(), schedule_delay_millis=0)
        store = make_store(child, durability=durability, spool_directory=str(tmp_path / "spool"))
        origin = register(store)
        if os.fork() == 0:
            try:
                outlive(store, origin)
            finally:
                os._exit(0)
        wait_until(received.exists, "something is received", 10)
        if way == "is killed":
            os.kill(os.getpid(), signal.SIGKILL)
        store.writer.close(2.0)

    in_fork(parent)
    wait_until(all_received.exists, "the forked process is done", 30)
    lines = [line.split() for line in received.read_text().splitlines()]
    assert len({writer for writer, _ in lines}) == 2
    # A parent that is killed may not have said that it has journaled an event, or delivered a batch.
    if way == "ends in order":
        assert len(lines) == number


def test_a_fork_waits_while_a_backend_is_imported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Otherwise the forked process would wait for ever for a thread that it does not have."""
    (tmp_path / "slow_to_import.py").write_text(
        "import threading\nis_imported = threading.Event()\nis_imported.wait(0.3)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    is_importing = threading.Event()

    class Slow(SimulatedBackend):
        def export(self, batch: Any) -> int:
            is_importing.set()
            importlib.import_module("slow_to_import")
            return super().export(batch)

    store = make_store(make_child("a", Slow(), schedule_delay_millis=0))
    origin = register(store)
    log(store, origin, "first")
    assert is_importing.wait(10)
    process = os.fork()
    if process == 0:
        try:
            importlib.import_module("slow_to_import")
        finally:
            os._exit(0)
    try:
        wait_until(lambda: os.waitpid(process, os.WNOHANG) != (0, 0), "the forked process ends", 10)
    except BaseException:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        raise


def test_a_backend_is_loaded_while_another_hangs() -> None:
    hung, living = SimulatedBackend(), SimulatedBackend()
    hung.fault = "silent"
    children = [make_child(name, backend, schedule_delay_millis=0) for name, backend in (("a", hung), ("b", living))]
    store = make_store(*children)
    log(store, register(store), "first")
    wait_until(lambda: living.messages == ["first"], "the other child delivers", 10)
    hung.fault = None


@pytest.mark.parametrize("forks", [1, 3])
def test_forks_do_not_wait_long_for_a_first_export_that_hangs(monkeypatch: pytest.MonkeyPatch, forks: int) -> None:
    monkeypatch.setattr(loading, "LONGEST_SECONDS", 0.2)
    backend = SimulatedBackend()
    backend.fault = "silent"
    store = make_store(make_child("a", backend, schedule_delay_millis=0))
    origin = register(store)
    log(store, origin, "first")
    wait_until(lambda: loading._now.began, "the export hangs", 10)
    begin = time.monotonic()
    for _ in range(forks):
        in_fork(lambda: log(store, origin, "forked"))
    # The bound is for all of them together.
    assert time.monotonic() - begin < 5
    backend.fault = None
    store.flush()
    assert backend.messages == ["first", *["forked"] * forks]
