from __future__ import annotations

import errno
import importlib
import logging
import os
import pickle
import signal
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from composite_logstore import CompositeLogStore, loading
from composite_logstore.capture.frames import Loss
from composite_logstore.capture.inbox import CLOSED, Inbox, Shared
from composite_logstore.capture.outbox import Outbox, ParentGoneError
from composite_logstore.event import LogEvent
from composite_logstore.reading import gaps
from composite_logstore.testing import SimulatedBackend
from tests.artifact_stores import FolderArchive
from tests.events import make_capture, make_stream
from tests.forks import in_fork
from tests.patience import PATIENCE_SECONDS
from tests.simulation import assert_accounts_add_up, make_child, make_logs, make_store
from tests.watching import fetched, wait_until

pytestmark = pytest.mark.process


def log(store: CompositeLogStore, origin: Any, message: str, level: int = logging.INFO) -> None:
    store.emit(origin, logging.LogRecord("train", level, "/code/train.py", 1, message, (), None, "fit"))


def register(store: CompositeLogStore, **metadata: Any) -> Any:
    logs = make_logs(store)
    return store.register_origin(str(logs.id), logs, metadata)


def test_a_parent_delivers_the_events_of_forked_processes() -> None:
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


def test_a_message_of_any_size_and_what_a_record_can_carry() -> None:
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
def test_events_that_do_not_fit_into_the_file_count_as_dropped(
    min_level: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("composite_logstore.delivery.writer.Writer.after_fork_in_parent", lambda self: None)
    monkeypatch.setattr("composite_logstore.capture.frames.MOST_BYTES", 500_000)
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


def test_a_burst_that_the_parent_does_not_keep_up_with_loses_nothing() -> None:
    backend = SimulatedBackend()
    store = make_store(make_child("a", backend))
    origin = register(store)
    processes, lines = 4, 5_000

    def work(name: str) -> None:
        for number in range(lines):
            log(store, origin, f"{name} {number} {'x' * 100}")

    log(store, origin, "begin")
    # The parent takes nothing in for as long as they live.
    with store.writer._forked._receiving:
        ids = []
        for process in range(processes):
            if (forked := os.fork()) == 0:
                try:
                    work(str(process))
                finally:
                    os._exit(0)
            ids.append(forked)
        for forked in ids:
            os.waitpid(forked, 0)
    store.flush()
    stats = store.stats()["a"]
    assert (stats["delivered"], stats["dropped"]) == (processes * lines + 1, 0)
    names = [message.split() for message in backend.messages[1:]]
    for process in range(processes):
        assert [int(number) for name, number, _ in names if name == str(process)] == list(range(lines))


@pytest.mark.parametrize("signal_", [signal.SIGKILL, signal.SIGTERM])
def test_a_forked_process_that_is_killed_loses_nothing(signal_: signal.Signals) -> None:
    """A pool's workers are, whenever its `with` block ends."""
    backend = SimulatedBackend()
    store = make_store(make_child("a", backend))
    origin = register(store)
    number = 10_000

    def child() -> None:
        for n in range(number):
            log(store, origin, f"{n} {'x' * 100}")
        os.kill(os.getpid(), signal_)

    with store.writer._forked._receiving:
        in_fork(child)
    store.flush()
    assert [int(message.split()[0]) for message in backend.messages] == list(range(number))


def test_a_page_shows_the_gap_that_a_burst_leaves(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("composite_logstore.capture.frames.MOST_BYTES", 50_000)
    monkeypatch.setattr(gaps, "is_finished", lambda logs: True)
    store = make_store(FolderArchive(name="a", type="artifact", root=str(tmp_path)))
    logs = make_logs(store)
    origin = store.register_origin(str(logs.id), logs, {})
    hears, told = os.pipe()

    def child() -> None:
        for n in range(100):
            log(store, origin, f"{n} {'x' * 1000}")
        os.read(hears, 1)
        monkeypatch.undo()
        log(store, origin, "end")

    if (process := os.fork()) == 0:
        try:
            child()
        finally:
            os._exit(0)
    try:
        wait_until(lambda: bool(store.stats()["a"]["dropped"]), "something is lost")
    finally:
        os.write(told, b"x")
        os.waitpid(process, 0)
    store.flush()
    stats = store.stats()["a"]
    assert stats["accepted"] == 101
    assert 0 < stats["dropped"] < 100
    store.deregister_origin(origin)
    shown = fetched(store, logs)
    told_gaps = [line for line in shown if line.startswith("Child 'a' is missing")]
    assert sum(int(line.split()[4]) for line in told_gaps) == stats["dropped"]
    assert len(shown) - len(told_gaps) == 101 - stats["dropped"]
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len([line for line in warnings if "forked" in line]) == 1
    assert not [line for line in warnings if "oldest" in line]


def test_a_signal_handler_that_flushes_while_forked_processes_are_heard() -> None:
    backend = SimulatedBackend()
    store = make_store(make_child("a", backend))
    origin = register(store)
    take = store.writer._forked._take_in_message

    def interrupted(said: Any) -> None:
        store.flush()
        take(said)

    store.writer._forked._take_in_message = interrupted  # type: ignore[method-assign]
    in_fork(lambda: [log(store, origin, str(number)) for number in range(3)] and None)
    store.flush()
    assert backend.messages == ["0", "1", "2"]


def test_threads_of_a_forked_process_log_while_another_flushes() -> None:
    backend = SimulatedBackend()
    store = make_store(make_child("a", backend))
    origin = register(store)
    threads, lines = 3, 1_000

    def child() -> None:
        logging_threads = [
            threading.Thread(target=lambda name: [log(store, origin, name) for _ in range(lines)], args=(str(number),))
            for number in range(threads)
        ]
        for thread in logging_threads:
            thread.start()
        while any(thread.is_alive() for thread in logging_threads):
            store.flush()

    in_fork(child)
    store.flush()
    assert sorted(backend.messages) == sorted(str(number) for number in range(threads) for _ in range(lines))


def test_a_parent_that_has_logged_nothing_tells_forked_processes_of_its_end() -> None:
    backend = SimulatedBackend()
    store = make_store(make_child("a", backend))
    origin = register(store)
    hears, told = os.pipe()
    answers, answer = os.pipe()

    def child() -> None:
        os.read(hears, 1)
        log(store, origin, "late")
        store.flush()
        os.write(answer, b" ".join(message.encode() for message in backend.messages))

    if (process := os.fork()) == 0:
        try:
            child()
        finally:
            os._exit(0)
    store.writer.close(1.0)
    os.write(told, b"x")
    os.waitpid(process, 0)
    os.close(answer)
    with os.fdopen(answers) as text:
        assert text.read() == "late"


def test_an_event_of_a_stream_that_the_parent_has_forgotten_is_counted() -> None:
    store = make_store(make_child("a"))
    origin = register(store)

    def child() -> None:
        log(store, origin, "hello")

    with store.writer._forked._receiving:
        in_fork(child)
        store.writer._streams.clear()
    store.flush()
    assert store.stats()["a"]["dropped"] == 1


@pytest.mark.parametrize("is_held", [False, True])
def test_an_orphan_that_ends_delivers_what_its_parent_has_not_journaled(is_held: bool) -> None:
    backend = SimulatedBackend()
    answers, answer = os.pipe()

    def orphan(store: CompositeLogStore, origin: Any, parent: int) -> None:
        log(store, origin, "orphan")
        wait_until(lambda: os.getppid() != parent, "the parent is gone")
        # It logs no more.
        store.writer.close(5.0)
        os.write(answer, " ".join(backend.messages).encode())

    def middle() -> None:
        store = make_store(make_child("a", backend))
        origin = register(store)
        # It dies before it has taken anything in.
        store.writer._forked._receiving.acquire()
        if is_held:
            # As a process does that a C library forks, and, for a moment, a thread of the parent that is just dying.
            store.writer._forked.before_fork()
            assert store.writer._forked._inbox is not None
            os.dup(store.writer._forked._inbox._bell)
        parent = os.getpid()
        if os.fork() == 0:
            try:
                orphan(store, origin, parent)
            finally:
                os._exit(0)
        time.sleep(0.1)

    in_fork(middle)
    os.close(answer)
    with os.fdopen(answers) as text:
        assert text.read() == "orphan"


@pytest.fixture
def pipe() -> Iterator[tuple[Inbox, Outbox]]:
    """An inbox and, in the same process, its other end."""
    inbox = Inbox()
    yield inbox, Outbox(inbox)
    inbox.close()


STREAM = make_stream()


def texts(said: Iterable[Any]) -> list[str]:
    return [one.message if isinstance(one, LogEvent) else one.event.message for one in said]


def taken_back(outbox: Outbox) -> list[Any]:
    return [said.message if isinstance(said, LogEvent) else said for _, said in outbox.take_back()]


def test_a_forked_process_takes_back_events_that_the_parent_has_not_journaled(pipe: tuple[Inbox, Outbox]) -> None:
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
    assert texts(heard) == ["0", "1"]
    assert [(stream, said.message) for stream, said in outbox.take_back() if isinstance(said, LogEvent)] == [
        (STREAM, str(number)) for number in range(1, 6)
    ]
    assert taken_back(outbox) == []


def test_a_forked_process_waits_for_a_parent_that_journals_at_its_end(pipe: tuple[Inbox, Outbox]) -> None:
    inbox, outbox = pipe
    for number in range(5):
        outbox.send(STREAM, False, make_capture(str(number)))
    inbox.announce_end()
    with pytest.raises(ParentGoneError):
        outbox.send(STREAM, False, make_capture("5"))

    def journal_slowly() -> None:
        for _ in inbox.receive():
            time.sleep(0.01)
        inbox.shared.state = CLOSED

    parent = threading.Thread(target=journal_slowly)
    parent.start()
    assert taken_back(outbox) == ["5"]
    parent.join()


def test_a_forked_process_does_not_wait_long_for_a_parent_that_never_journals(
    pipe: tuple[Inbox, Outbox], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("composite_logstore.capture.outbox._CUT_OFF_SECONDS", 0.05)
    inbox, outbox = pipe
    outbox.send(STREAM, False, make_capture("hello"))
    inbox.announce_end()
    assert taken_back(outbox) == ["hello"]


def test_frames_appended_during_the_last_read_are_taken_back(pipe: tuple[Inbox, Outbox]) -> None:
    inbox, outbox = pipe
    size = inbox.size

    def is_closed_meanwhile(file: int) -> int:
        found = size(file)
        inbox.shared.state = CLOSED
        return found

    inbox.size = is_closed_meanwhile  # type: ignore[method-assign]
    with pytest.raises(ParentGoneError):
        outbox.send(STREAM, False, make_capture("hello"))
    assert taken_back(outbox) == ["hello"]


def test_acknowledgements_of_more_processes_than_slots() -> None:
    shared = Shared()
    for sender in range(1, 3_000):
        shared.acknowledge(sender, 7)
        shared.acknowledge(1, sender)
    # One that is heard of keeps its place; of the others the latest have theirs.
    assert shared.acknowledged(1) == 3_000
    assert shared.acknowledged(2_999) == shared.acknowledged(2_000) == 8
    assert shared.acknowledged(2) == shared.acknowledged(3_000) == 0
    assert (shared.current, shared.state) == (0, 0)


def test_the_frames_that_a_forked_process_keeps_are_bounded(
    pipe: tuple[Inbox, Outbox], monkeypatch: pytest.MonkeyPatch
) -> None:
    inbox, outbox = pipe
    for number in range(300):
        outbox.send(STREAM, False, make_capture(f"{number} {'x' * 100}"))
        # What is journaled is not kept.
        if number < 200:
            list(inbox.receive())
    assert 0 < len(outbox._kept) < 200
    # Nobody may acknowledge anything.
    monkeypatch.setattr(inbox.shared, "acknowledged", lambda sender: 0)
    monkeypatch.setattr("composite_logstore.capture.frames.MOST_BYTES", 50_000)
    for _ in range(300):
        inbox._positions = (0, 0)
        os.ftruncate(inbox.files[0], 0)
        outbox.send(STREAM, False, make_capture("x" * 1000))
    assert 0 < outbox._kept_bytes <= 50_000
    assert len(taken_back(outbox)) < 50
    assert outbox._kept_bytes == 0


def test_journaled_frames_take_no_space(pipe: tuple[Inbox, Outbox], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("composite_logstore.capture.inbox._TURN_BYTES", 10_000)
    monkeypatch.setattr("composite_logstore.capture.inbox._TURN_SECONDS", 0.0)
    monkeypatch.setattr("composite_logstore.capture.frames.MOST_BYTES", 40_000)
    inbox, outbox = pipe
    heard, files = [], set()
    for number in range(1000):
        outbox.send(STREAM, False, make_capture(f"{number} {'x' * 500}"))
        # It is behind now and then, also in the middle of a turn.
        if number % 20 == 0:
            heard += inbox.receive()
            files.add(inbox.shared.current)
    heard += inbox.receive()
    assert [int(text.split()[0]) for text in texts(heard)] == list(range(1000))
    assert files == {0, 1}


def test_memory_is_given_back_when_no_more_events_arrive(
    pipe: tuple[Inbox, Outbox], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("composite_logstore.capture.inbox._TURN_SECONDS", 0.05)
    inbox, outbox = pipe
    for _ in range(1000):
        outbox.send(STREAM, False, make_capture("x" * 500))
    assert inbox.size(0) > 500_000
    for _ in range(4):
        list(inbox.receive())
        if inbox.size(0):
            inbox.wait()
    assert inbox.size(0) + inbox.size(1) == 0


def test_without_files_in_memory_the_files_are_on_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delattr(os, "memfd_create", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    backend = SimulatedBackend()
    store = make_store(make_child("a", backend))
    origin = register(store)
    in_fork(lambda: [log(store, origin, str(number)) for number in range(100)] and None)
    store.flush()
    assert backend.messages == [str(number) for number in range(100)]
    # It has no name that anybody could open.
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.ENOMEM])
def test_events_are_counted_while_the_system_has_no_space(
    code: int, pipe: tuple[Inbox, Outbox], monkeypatch: pytest.MonkeyPatch
) -> None:
    inbox, outbox = pipe
    write = os.write

    def has_no_room(end: int, data: bytes) -> int:
        if end in inbox.files:
            raise OSError(code, os.strerror(code))
        return write(end, data)

    outbox.send(STREAM, False, make_capture("0"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "write", has_no_room)
        for number in range(3):
            outbox.send(STREAM, False, make_capture(str(number)))
    outbox.send(STREAM, False, make_capture("4"))
    first, lost, last = inbox.receive()
    assert texts([first, last]) == ["0", "4"]
    assert lost == Loss(logging.INFO, False, 3, STREAM.id)


def test_frames_appended_late_to_the_previous_file_come_first(
    pipe: tuple[Inbox, Outbox], monkeypatch: pytest.MonkeyPatch
) -> None:
    inbox, outbox = pipe
    outbox.send(STREAM, False, make_capture("0"))
    inbox.shared.current = 1
    outbox.send(STREAM, False, make_capture("1"))
    assert texts(inbox.receive()) == ["0", "1"]


def test_a_frame_that_is_written_twice_arrives_once(pipe: tuple[Inbox, Outbox]) -> None:
    """As after a Ctrl-C between writing it and noting that."""
    inbox, outbox = pipe
    write = os.write

    def interrupted(end: int, data: bytes) -> int:
        write(end, data)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            outbox.send(STREAM, False, make_capture("0"))
    outbox.send(STREAM, False, make_capture("1"))
    assert texts(inbox.receive()) == ["0", "1"]


def test_a_signal_handler_that_logs_while_something_is_sent(pipe: tuple[Inbox, Outbox]) -> None:
    inbox, outbox = pipe
    ring = outbox._ring

    def interrupted() -> None:
        outbox._ring = ring  # type: ignore[method-assign]
        outbox.send(STREAM, False, make_capture("from the handler"))
        ring()

    outbox._ring = interrupted  # type: ignore[method-assign]
    outbox.send(STREAM, False, make_capture("0"))
    outbox.send(STREAM, False, make_capture("1"))
    assert texts(inbox.receive()) == ["0", "from the handler", "1"]


@pytest.mark.parametrize("end", ["the file", "the pipe"])
def test_nothing_is_written_into_a_file_that_has_the_descriptor_of_ours(
    end: str, pipe: tuple[Inbox, Outbox], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A daemon closes all descriptors it has, and opens files of its own."""
    monkeypatch.setattr("composite_logstore.capture.outbox._CUT_OFF_SECONDS", 0.0)
    inbox, outbox = pipe
    outbox.send(STREAM, False, make_capture("before"))
    with (tmp_path / "own").open("wb") as file:
        os.dup2(file.fileno(), inbox.files[0] if end == "the file" else inbox.ringing)
        for _ in range(2):
            with pytest.raises(ParentGoneError):
                outbox.send(STREAM, False, make_capture("after"))
        assert file.tell() == 0
    assert taken_back(outbox) == ["before", "after", "after"]


def test_a_program_that_wants_to_be_killed_by_a_closed_pipe_is_not(tmp_path: Path) -> None:
    inbox = Inbox()

    def child() -> None:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        inbox.become_outbox()
        outbox = Outbox(inbox)
        with pytest.raises(ParentGoneError):
            outbox.send(STREAM, False, make_capture("hello"))
        (tmp_path / "lives").touch()

    ready, go = os.pipe()
    if (process := os.fork()) == 0:
        try:
            os.close(go)
            os.read(ready, 1)
            child()
        finally:
            os._exit(0)
    os.close(inbox._bell)
    os.close(go)
    os.waitpid(process, 0)
    assert (tmp_path / "lives").exists()


def test_nothing_is_read_from_a_file_that_has_the_pipe_s_descriptor(tmp_path: Path) -> None:
    store = make_store(make_child("a", schedule_delay_millis=0))
    origin = register(store)
    in_fork(lambda: log(store, origin, "first"))
    store.flush()
    inbox = store.writer._forked._inbox
    assert inbox is not None
    own = tmp_path / "own"
    own.write_bytes(pickle.dumps("own"))
    with own.open("rb") as file:
        for end in inbox._identities:
            os.dup2(file.fileno(), end)
        store.flush()
        assert file.tell() == 0
        # The next fork gets a pipe of its own.
        in_fork(lambda: log(store, origin, "second"))
        store.flush()
    assert store.stats()["a"]["delivered"] == 2
    for end in inbox._identities:
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
        wait_until(lambda: messages() == set(range(number)), "all is delivered")
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
        wait_until(received.exists, "something is received")
        if way == "is killed":
            os.kill(os.getpid(), signal.SIGKILL)
        store.writer.close(2.0)

    in_fork(parent)
    wait_until(all_received.exists, "the forked process is done")
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
    assert is_importing.wait(PATIENCE_SECONDS)
    process = os.fork()
    if process == 0:
        try:
            importlib.import_module("slow_to_import")
        finally:
            os._exit(0)
    try:
        wait_until(lambda: os.waitpid(process, os.WNOHANG) != (0, 0), "the forked process ends")
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
    wait_until(lambda: living.messages == ["first"], "the other child delivers")
    hung.fault = None


@pytest.mark.parametrize("forks", [1, 3])
def test_forks_do_not_wait_long_for_a_first_export_that_hangs(monkeypatch: pytest.MonkeyPatch, forks: int) -> None:
    monkeypatch.setattr(loading, "LONGEST_SECONDS", 0.2)
    backend = SimulatedBackend()
    backend.fault = "silent"
    store = make_store(make_child("a", backend, schedule_delay_millis=0))
    origin = register(store)
    log(store, origin, "first")
    wait_until(lambda: loading._began, "the export hangs")
    begin = time.monotonic()
    for _ in range(forks):
        in_fork(lambda: log(store, origin, "forked"))
    # The bound is for all of them together.
    assert time.monotonic() - begin < PATIENCE_SECONDS
    backend.fault = None
    # A flush does not wait for it: on a busy machine the export may have hung for longer than an export may.
    wait_until(lambda: len(backend.messages) > forks, "all events arrive")
    assert backend.messages == ["first", *["forked"] * forks]


def test_a_forked_process_that_outlives_its_step_logs_to_the_one_that_runs() -> None:
    backend = SimulatedBackend()
    store = make_store(make_child("a", backend))
    first = register(store, **{"zenml.step.run.name": "first"})
    to_child, from_parent = os.pipe()
    to_parent, from_child = os.pipe()

    def say(message: str) -> None:
        record = logging.LogRecord("train", 20, "", 0, message, (), None)
        record.step = "first"
        store.emit(first, record)

    def child() -> None:
        for number in ("one", "between", "two"):
            say(number)
            os.write(from_child, b".")
            os.read(to_child, 1)
        in_fork(lambda: say("of a grandchild"))

    process = os.fork()
    if process == 0:
        try:
            child()
        finally:
            os._exit(0)
    os.read(to_parent, 1)
    store.deregister_origin(first)
    os.write(from_parent, b".")
    os.read(to_parent, 1)
    second = register(store, **{"zenml.step.run.name": "second"})
    os.write(from_parent, b".")
    os.read(to_parent, 1)
    os.write(from_parent, b".")
    os.waitpid(process, 0)
    store.deregister_origin(second)
    for end in (to_child, from_parent, to_parent, from_child):
        os.close(end)
    found = [(event.message, event.stream.id, event.attributes["step"]) for event in backend.received]
    assert found == [
        ("one", first.stream.id, "first"),
        ("between", first.stream.id, "first"),
        ("two", second.stream.id, "second"),
        ("of a grandchild", second.stream.id, "second"),
    ]
    assert backend.received[2].stream.attributes["zenml.step.run.name"] == "second"
    assert len({event.metadata["process.pid"] for event in backend.received}) == 2


def test_the_records_of_a_forked_process_have_its_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = SimulatedBackend()
    store = make_store(make_child("a", backend))
    origin = register(store)
    monkeypatch.setenv("RANK", "0")

    def child() -> None:
        os.environ["RANK"] = "3"
        log(store, origin, "child")

    log(store, origin, "parent")
    in_fork(child)
    store.deregister_origin(origin)
    ranks = {event.message: event.metadata.get("zenml.log.rank") for event in backend.received}
    assert ranks == {"parent": None, "child": 3}
