from __future__ import annotations

import importlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from composite_logstore import CompositeLogStore, loading
from composite_logstore.testing import SimulatedBackend
from tests.simulation import assert_accounts_add_up, make_child, make_logs, make_store
from tests.watching import wait_until


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
