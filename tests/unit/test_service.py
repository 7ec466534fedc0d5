"""The log store's threads survive every exception, and report it."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest
from opentelemetry.metrics import _internal as metrics_api

from composite_logstore import CompositeLogStore, service
from composite_logstore.capture.inbox import Inbox
from composite_logstore.clock import Clock, Signal
from composite_logstore.delivery import metrics, recovery, step_metadata, worker, writer, writers
from composite_logstore.delivery.delivery import Delivery
from composite_logstore.delivery.journal import Journal
from composite_logstore.delivery.own_folder import OwnFolder
from composite_logstore.delivery.spilling import Spilling
from composite_logstore.service import Service
from composite_logstore.spool.lock import release_all
from composite_logstore.testing import SimulatedBackend, SimulatedClock
from composite_logstore_artifact import compaction
from composite_logstore_artifact.compaction import Compaction
from tests.deep import mostly_deep
from tests.forks import in_fork
from tests.patience import PATIENCE_SECONDS
from tests.simulation import assert_accounts_add_up, make_child, make_logs, make_store, process_dies
from tests.watching import wait_until


class _Cancelled(BaseException):
    """An exception with which frameworks end a task. It is no `Exception`, so that user code does not handle it."""


class _Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no")


ERRORS = [
    RuntimeError("nobody foresaw it"),
    FileNotFoundError(2, "No such file or directory"),
    OSError(24, "Too many open files"),
    ValueError("mmap closed or invalid"),
    MemoryError(),
    RecursionError("maximum recursion depth exceeded"),
    SystemExit(3),
    KeyboardInterrupt(),
    GeneratorExit(),
    _Cancelled(),
    _Unprintable(),
]
errors = pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)

# Where an exception may come from → the thread that meets it.
PLACES: dict[str, tuple[Any, str, str]] = {
    "what a worker does next": (Delivery, "next", "composite-logstore a"),
    "what a worker tells": (Delivery, "stats", "composite-logstore a"),
    "what a worker concludes": (Delivery, "exported", "composite-logstore a"),
    "what a worker notes": (Journal, "acknowledge", "composite-logstore a"),
    "what a worker hands out": (worker.Worker, "_next", "composite-logstore a"),
    "the house": (OwnFolder, "maintain", "composite-logstore housekeeping"),
    "the keeper's streams": (OwnFolder, "refresh", "composite-logstore spool"),
    "the keeper's positions": (OwnFolder, "acknowledge_all", "composite-logstore spool"),
    "the keeper's ticks": (Spilling, "tick", "composite-logstore spool"),
    "the keeper's events": (Spilling, "write_due", "composite-logstore spool"),
    "the folders of dead processes": (recovery, "process_folders", "composite-logstore recovery"),
    "what becomes of a dead process's events": (recovery.Recovery, "_close_done", "composite-logstore recovery"),
    "a dead process's events": (recovery.RecoveredJournal, "load", "composite-logstore a"),
    "what a dead process's events come to": (recovery.RecoveredJournal, "acknowledge", "composite-logstore a"),
}


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The warnings that a user gets."""
    told: list[str] = []
    for module in (writer, worker):
        monkeypatch.setattr(module.logger, "warning", told.append)
    return told


def register(store: CompositeLogStore) -> Any:
    logs = make_logs(store)
    return store.register_origin(str(logs.id), logs, {})


def log(store: CompositeLogStore, origin: Any, *messages: str) -> None:
    for message in messages:
        store.emit(origin, logging.LogRecord("train", 20, "/code/train.py", 1, message, (), None))


class Failing:
    """Makes a function or a method raise until it is told to stop."""

    def __init__(self, patch: pytest.MonkeyPatch, owner: Any, name: str, error: BaseException) -> None:
        self.is_on = False
        self.calls = 0
        real = getattr(owner, name)

        def instead(*args: Any, **kwargs: Any) -> Any:
            # What the test itself calls is no thread's.
            if self.is_on and threading.current_thread() is not threading.main_thread():
                self.calls += 1
                raise error
            return real(*args, **kwargs)

        patch.setattr(owner, name, instead)


@pytest.mark.parametrize("error", mostly_deep(ERRORS[::3]), ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("place", PLACES)
def test_a_thread_survives_every_exception_and_warns_once(
    place: str,
    error: BaseException,
    tmp_path: Path,
    clock: SimulatedClock,
    told: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    owner, name, thread = PLACES[place]
    backend, slow = SimulatedBackend(), SimulatedBackend()
    id = uuid4()

    def start() -> tuple[CompositeLogStore, Any]:
        store = make_store(
            make_child("a", backend), make_child("slow", slow), id=id, durability="spill", spool_directory=str(tmp_path)
        )
        return store, register(store)

    backend.fault = slow.fault = "refused"
    store, origin = start()
    log(store, origin, "left")
    clock.advance(2)
    process_dies(clock)
    failing = Failing(monkeypatch, owner, name, error)
    failing.is_on = True
    backend.fault = None
    store, origin = start()
    log(store, origin, "first")
    clock.advance(65)
    assert failing.calls > 1
    assert type(error).__name__ in str([store.stats(), told])
    failing.is_on = False
    log(store, origin, "second")
    clock.advance(120)
    assert set(backend.messages) == {"left", "first", "second"}
    begins = [line for line in told if thread in line and "failed" in line]
    ends = [line for line in told if thread in line and "again." in line and "failed" not in line]
    # A child has two threads of one name: for what this process logs, and for what the dead have left.
    assert len(begins) == len(ends) <= 2, told
    # No thread is dead: all is delivered, and what is on disk goes.
    slow.fault = None
    clock.advance(600)
    assert set(slow.messages) == {"left", "first", "second"}
    stats = store.stats()
    assert_accounts_add_up(stats)
    assert [child["pending"] for child in stats.values()] == [0, 0]


@errors
@pytest.mark.parametrize("place", ["the house"])
def test_events_go_to_disk_even_if_housekeeping_fails(
    place: str, error: BaseException, tmp_path: Path, clock: SimulatedClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = SimulatedBackend()
    backend.fault = "refused"
    store = make_store(make_child("a", backend), durability="spill", spool_directory=str(tmp_path))
    origin = register(store)
    Failing(monkeypatch, *PLACES[place][:2], error).is_on = True
    for number in range(10):
        log(store, origin, str(number))
        clock.advance(1.5)
    on_disk = b"".join(path.read_bytes() for path in tmp_path.rglob("*.log"))
    assert [str(number) for number in range(10) if b'"%d"' % number in on_disk] == list("0123456789")


@pytest.mark.parametrize("error", [RuntimeError("can't start new thread"), MemoryError()], ids=["limit", "memory"])
@pytest.mark.parametrize("durability", ["memory", "spill", "write_ahead"])
@pytest.mark.parametrize(
    "thread", ["composite-logstore a", "composite-logstore spool", "composite-logstore recovery", ""]
)
def test_a_thread_that_cannot_be_started_is_started_later(
    thread: str,
    durability: str,
    error: Exception,
    tmp_path: Path,
    clock: SimulatedClock,
    told: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backend = SimulatedBackend()
    start, refused = clock.start, [True]

    def limited(run: Callable[[], None], name: str) -> None:
        if refused[0] and name.endswith(thread):
            raise error
        start(run, name)

    monkeypatch.setattr(clock, "start", limited)
    store = make_store(make_child("a", backend), durability=durability, spool_directory=str(tmp_path))
    origin = register(store)
    log(store, origin, *"abc")
    if not thread:
        assert "no thread can be started" in store.stats()["a"]["last_error"]
        # Nobody waits for what cannot come, and somebody is told.
        begin = clock.now()
        store.flush()
        assert clock.now() == begin
        assert store.stats()["a"]["state"] == "unavailable"
        assert sum("no thread can be started" in line for line in told) == 1
        if durability != "memory":
            assert sum(path.read_bytes().count(b'"train"') for path in tmp_path.rglob("*.log")) == 3
    refused[0] = False
    log(store, origin, "d")
    clock.advance(2)
    assert backend.messages == list("abcd")
    assert_accounts_add_up(store.stats())
    assert "composite-logstore a" in clock.threads
    assert ("composite-logstore spool" in clock.threads) == (durability != "memory")


def test_threads_that_cannot_be_started_cost_emit_little(
    clock: SimulatedClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[str] = []

    def refuse(run: Callable[[], None], name: str) -> None:
        tries.append(name)
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(clock, "start", refuse)
    store = make_store(make_child("a"))
    origin = register(store)
    log(store, origin, *(["hello"] * 2_000))
    assert len(tries) <= 200


class _Quarrelsome(logging.Handler):
    """A user's handler that raises instead of handling its own errors."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self._error = error

    def handle(self, record: logging.LogRecord) -> bool:
        raise self._error


@errors
def test_a_warning_that_cannot_be_given_ends_no_thread(
    error: BaseException, clock: SimulatedClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    handler = _Quarrelsome(error)
    backend = SimulatedBackend()
    backend.fault = "refused"
    store = make_store(make_child("a", backend))
    origin = register(store)
    failing = Failing(monkeypatch, Delivery, "next", RuntimeError("nobody foresaw it"))
    for logger in (worker.logger, writer.logger):
        logger.addHandler(handler)
    try:
        log(store, origin, "hello")
        clock.advance(10)
        failing.is_on = True
        log(store, origin, "again")
        clock.advance(10)
        failing.is_on = False
        backend.fault = None
        clock.advance(60)
    finally:
        for logger in (worker.logger, writer.logger):
            logger.removeHandler(handler)
    assert failing.calls > 1
    assert backend.messages == ["hello", "again"]


@errors
def test_a_step_may_raise_anything(error: BaseException, clock: SimulatedClock) -> None:
    told: list[str] = []
    problems: list[str] = []
    steps: list[float] = []

    def step() -> Callable[[], object]:
        steps.append(clock.now())
        if len(steps) < 4:
            raise error
        return lambda: clock.advance(1000)

    service = Service("odd", step, clock, told.append, problems.append)
    service.start()
    clock.advance(10)
    assert [later - steps[0] for later in steps] == pytest.approx([0, 0.1, 0.3, 0.7])
    assert len(problems) == 3
    assert all(type(error).__name__ in why for why in problems)
    assert [type(error).__name__ in line for line in told] == [True, False]


def test_a_thread_that_fails_again_and_again_pauses_longer_and_warns_once_a_minute(clock: SimulatedClock) -> None:
    told: list[str] = []
    problems: list[str] = []
    steps: list[float] = []

    def step() -> Callable[[], object]:
        steps.append(clock.now())
        if len(steps) % 2:
            raise RuntimeError("every other time")
        return lambda: None

    service = Service("flapping", step, clock, told.append, problems.append, longest_pause=8)
    assert service.start()
    clock.advance(300)
    pauses = [later - earlier for earlier, later in zip(steps[::2], steps[1::2], strict=False)]
    assert pauses[:8] == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 8])
    assert set(pauses[8:]) == {8.0}
    assert 2 <= len(told) <= 12
    assert problems[0] == "the thread 'flapping' failed: RuntimeError: every other time"
    assert service.is_running


def test_a_thread_that_was_ended_by_force_is_started_again(clock: SimulatedClock) -> None:
    """No code ends a thread by force today. The flag would still be right."""
    from composite_logstore.clock import Ended

    steps: list[None] = []

    def step() -> Callable[[], object]:
        steps.append(None)
        if len(steps) == 1:
            raise Ended
        return lambda: clock.advance(1000)

    service = Service("killed", step, clock, lambda text: None, lambda why: None)
    service.start()
    clock.advance(1)
    assert not service.is_running
    assert service.start()
    clock.advance(1)
    assert service.is_running
    assert len(steps) == 2


class _Interrupted(Clock):
    """A signal handler or a finalizer logs while a thread starts."""

    def __init__(self, log: Callable[[], object]) -> None:
        self._interruptions = [log]

    def start(self, run: Callable[[], None], name: str) -> None:
        while self._interruptions:
            self._interruptions.pop()()
        super().start(run, name)


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="the interpreter leaves its threads alone")
def test_a_thread_that_is_ended_at_the_process_s_end_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", said.append)

    def work() -> None:
        for _ in iter(int, 1):
            pass

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    monkeypatch.setattr(service, "_threads_not_to_be_unwound", lambda: [thread.ident] if thread.is_alive() else [])
    monkeypatch.setattr(service, "_END_SECONDS", PATIENCE_SECONDS)
    service._end_threads()
    thread.join(PATIENCE_SECONDS)
    assert not thread.is_alive()
    assert said == []


def test_a_record_logged_while_a_thread_starts_does_not_wait_for_it() -> None:
    steps: list[str] = []

    def step() -> None:
        steps.append(threading.current_thread().name)

    outcomes: list[bool] = []
    clock = _Interrupted(lambda: outcomes.append(service.start()))
    service = Service("composite-logstore a", step, clock, print, print)
    program = threading.Thread(target=lambda: outcomes.append(service.start()), daemon=True)
    program.start()
    program.join(10)
    assert outcomes == [True, True]
    wait_until(lambda: bool(steps), "the thread does its step")
    assert steps == ["composite-logstore a"]


def test_a_record_logged_while_the_first_writer_is_made_does_not_wait_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store(make_child("a", SimulatedBackend()))
    made: list[writer.Writer] = []

    class Interrupted(writer.Writer):
        def _begin(self) -> None:
            super()._begin()
            if not made:
                made.append(self)
                made.append(writers.writer_of(store.id, store.config))

    monkeypatch.setattr(writers, "Writer", Interrupted)
    program = threading.Thread(target=lambda: made.append(writers.writer_of(store.id, store.config)), daemon=True)
    program.start()
    program.join(10)
    # All go on with one of them: there is one queue and one order.
    assert made[1] is made[2]


def test_a_thread_that_has_ended_is_not_started_again(clock: SimulatedClock) -> None:
    steps: list[None] = []
    service = Service("short", lambda: steps.append(None), clock, lambda text: None, lambda why: None)
    for _ in range(3):
        assert service.start()
        clock.advance(1)
    assert len(steps) == 1


# What forked processes say


@pytest.mark.process
@errors
@pytest.mark.parametrize("name", ["receive", "wait"])
def test_the_listener_survives_every_exception(
    name: str, error: BaseException, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("composite_logstore.service.FIRST_PAUSE_SECONDS", 0.001)
    failing = Failing(monkeypatch, Inbox, name, error)
    failing.is_on = True
    backend = SimulatedBackend()
    store = make_store(make_child("a", backend, schedule_delay_millis=0))
    origin = register(store)
    in_fork(lambda: log(store, origin, "first"))
    wait_until(lambda: failing.calls > 1, "the listener fails")
    assert type(error).__name__ in store.stats()["a"]["last_error"]
    failing.is_on = False
    in_fork(lambda: log(store, origin, "second"))
    # Without a flush, which would take in what was said by itself.
    wait_until(lambda: backend.messages == ["first", "second"], "the listener goes on")
    wait_until(lambda: len(told) == 2, "somebody is told")
    assert "failed" in told[0]
    assert "again" in told[1]


@pytest.mark.process
def test_a_listener_that_cannot_be_started_is_started_later(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = SimulatedBackend()
    store = make_store(make_child("a", backend))
    origin = register(store)
    start, refused = Clock.start, [True]

    def limited(self: Clock, run: Callable[[], None], name: str) -> None:
        if refused[0] and "forked" in name:
            raise RuntimeError("can't start new thread")
        start(self, run, name)

    monkeypatch.setattr(Clock, "start", limited)
    in_fork(lambda: log(store, origin, "first"))
    assert "no thread can be started" in store.stats()["a"]["last_error"]
    refused[0] = False
    log(store, origin, "second")
    wait_until(lambda: sorted(backend.messages) == ["first", "second"], "the listener is there")


@pytest.mark.process
def test_without_a_file_descriptor_a_forked_process_delivers_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store(make_child("a"))
    origin = register(store)
    answers, answer = os.pipe()

    def exhausted() -> tuple[int, int]:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(os, "pipe", exhausted)
    before = os.listdir("/dev/fd")

    def child() -> None:
        log(store, origin, "hello")
        store.flush()
        os.write(answer, str(store.stats()["a"]["delivered"]).encode())

    in_fork(child)
    assert os.listdir("/dev/fd") == before
    monkeypatch.undo()
    assert os.read(answers, 10) == b"1"
    os.close(answers)
    os.close(answer)


# What is published, measured and merged beside


@errors
def test_a_failure_to_publish_step_metadata_does_not_delay_the_next(
    error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    published: list[Any] = []
    monkeypatch.setattr(step_metadata, "_publish", lambda *what: published.append(what))
    failing = Failing(monkeypatch, step_metadata, "_publish", error)
    store = make_store(make_child("a"))
    for is_on in (True, False):
        failing.is_on = is_on
        step = SimpleNamespace(step_run_id=uuid4())
        store.get_step_run_metadata(step)  # type: ignore[arg-type]
        store._publish_summaries(True)
        store.writer.summaries.wait(5)
        assert not store.writer.summaries._under_way
    ((_, steps, _),) = published
    assert steps == {step.step_run_id}


@pytest.mark.parametrize("error", [RuntimeError("can't start new thread"), MemoryError()])
def test_step_metadata_is_published_later_if_the_thread_cannot_be_started(
    error: Exception, clock: SimulatedClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    published: list[Any] = []
    monkeypatch.setattr(step_metadata, "_publish", lambda *what: published.append(what))
    store = make_store(make_child("a"))
    step = SimpleNamespace(step_run_id=uuid4())
    store.get_step_run_metadata(step)  # type: ignore[arg-type]

    def refuse(run: Callable[[], None], name: str) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(clock, "start", refuse)
        store._publish_summaries(True)
    store._publish_summaries(True)
    clock.advance(1)
    assert [steps for _, steps, _ in published] == [{step.step_run_id}]


class _BrokenMeters:
    """A defective meter provider, which raises at once, or when it records a measurement."""

    def __init__(self, error: BaseException, late: bool) -> None:
        self._error = error
        self._late = late

    def get_meter(self, *_: Any, **__: Any) -> Any:
        if not self._late:
            raise self._error
        return self

    def create_histogram(self, *_: Any, **__: Any) -> Any:
        return self

    def record(self, *_: Any, **__: Any) -> Any:
        raise self._error

    def create_observable_counter(self, *_: Any, **__: Any) -> Any:
        raise self._error

    create_observable_up_down_counter = create_observable_counter


@pytest.mark.parametrize("late", [False, True])
@errors
def test_a_meter_provider_that_raises_costs_no_delivery(
    error: BaseException, late: bool, clock: SimulatedClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics_api, "_METER_PROVIDER", _BrokenMeters(error, late))
    metrics.export_duration.cache_clear()
    writers._offer_metrics.cache_clear()
    if not isinstance(error, Exception):
        # In the thread of whoever builds a store, it is theirs.
        monkeypatch.setattr(writers, "_offer_metrics", lambda: None)
    try:
        backend = SimulatedBackend()
        store = make_store(make_child("a", backend))
        origin = register(store)
        log(store, origin, "hello")
        clock.advance(1)
        log(store, origin, "again")
        clock.advance(1)
    finally:
        metrics.export_duration.cache_clear()
        monkeypatch.undo()
        writers._offer_metrics.cache_clear()
    assert backend.batches
    assert backend.messages == ["hello", "again"]
    assert store.stats()["a"]["last_error"] is None


def test_metrics_that_could_not_be_offered_are_offered_by_the_next_writer(monkeypatch: pytest.MonkeyPatch) -> None:
    offered: list[str] = []

    def observe(_: object) -> None:
        offered.append("tried")
        if len(offered) == 1:
            raise RuntimeError("not yet")

    monkeypatch.setattr(metrics, "observe", observe)
    writers._offer_metrics.cache_clear()
    try:
        for _ in range(3):
            register(make_store(make_child("a")))
    finally:
        writers._offer_metrics.cache_clear()
    assert len(offered) == 2


def test_the_packages_metadata_is_not_read_where_no_file_descriptor_may_be_free(
    clock: SimulatedClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(*_: Any) -> Any:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr("importlib.metadata.Distribution.from_name", exhausted)
    monkeypatch.setattr("importlib.metadata.version", exhausted)
    monkeypatch.setattr(metrics, "version", exhausted)
    metrics.export_duration.cache_clear()
    backend = SimulatedBackend()
    store = make_store(make_child("a", backend))
    log(store, register(store), "hello")
    clock.advance(1)
    assert backend.messages == ["hello"]
    assert metrics.export_duration.cache_info().currsize == 1


@errors
def test_the_thread_that_merges_objects_survives_every_exception(
    error: BaseException, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    merged: list[str] = []
    failing = [True]

    def compact(artifact_store: Any, uri: str, loose: Any) -> None:
        if failing[0]:
            raise error
        merged.append(uri)

    monkeypatch.setattr(compaction, "compact", compact)
    merging = Compaction()
    for uri in ("one", "two"):
        merging.begin(None, uri, {}, is_last=True)  # type: ignore[arg-type]
    merging.wait()
    failing[0] = False
    merging.begin(None, "three", {}, is_last=True)  # type: ignore[arg-type]
    merging.wait()
    merging.close()
    assert merged == ["three"]
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 2
    assert type(error).__name__ in warnings[0]


def test_a_merge_whose_thread_cannot_be_started_is_done_with_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    merged: list[str] = []
    monkeypatch.setattr(compaction, "compact", lambda artifact_store, uri, loose: merged.append(uri))
    merging = Compaction()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", lambda self: (_ for _ in ()).throw(RuntimeError("no thread")))
        merging.begin(None, "one", {}, is_last=True)  # type: ignore[arg-type]
    merging.begin(None, "two", {}, is_last=True)  # type: ignore[arg-type]
    merging.wait()
    merging.close()
    assert merged == ["one", "two"]


# Around the threads


def test_a_writer_that_cannot_be_closed_does_not_keep_others_from_closing(monkeypatch: pytest.MonkeyPatch) -> None:
    stores = [make_store(make_child(name, SimulatedBackend())) for name in "ab"]
    for store in stores:
        log(store, register(store), "hello")
    closed: list[Any] = []

    def close(self: writer.Writer, seconds: float) -> None:
        closed.append(self)
        raise RuntimeError("no")

    monkeypatch.setattr(writer.Writer, "close", close)
    writers._close_all()
    assert {store.writer for store in stores} <= set(closed)


def test_a_ctrl_c_in_the_last_flush_leaves_the_events_on_disk(
    tmp_path: Path, clock: SimulatedClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = SimulatedBackend()
    backend.fault = "refused"
    store = make_store(make_child("a", backend), durability="spill", spool_directory=str(tmp_path))
    log(store, register(store), "hello")

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(store.writer, "flush", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store.writer.close(3.0)
    assert any(b'"hello"' in path.read_bytes() for path in tmp_path.rglob("*.log"))
    release_all()


@pytest.mark.parametrize("seconds", [1e15, 1e300, float("inf")])
def test_a_wait_may_exceed_the_longest_wait_of_the_system(seconds: float) -> None:
    signal = Signal()
    threading.Timer(0.05, signal.set).start()
    assert signal.wait(seconds)


def test_very_long_durations_in_settings_end_no_thread() -> None:
    ages = 10**18
    backend = SimulatedBackend()
    store = make_store(
        make_child("a", backend, schedule_delay_millis=ages), flush_timeout_millis=ages, flush_limit_millis=ages
    )
    origin = register(store)
    log(store, origin, "hello")
    store.flush()
    assert backend.messages == ["hello"]


@pytest.mark.parametrize("delay", [-1, 10**400, True, "soon", None, 0.5])
def test_events_are_delivered_whatever_delay_an_exporter_asks_for(delay: Any, clock: SimulatedClock) -> None:
    backend = SimulatedBackend()
    backend.schedule_delay_millis = delay  # type: ignore[attr-defined]
    store = make_store(make_child("a", backend))
    origin = register(store)
    log(store, origin, "hello")
    clock.advance(1)
    log(store, origin, "again")
    clock.advance(3601)
    assert backend.messages == ["hello", "again"]


class _Moody(SimulatedBackend):
    @property
    def schedule_delay_millis(self) -> int:
        raise RuntimeError("do not ask")


def test_an_exporter_whose_delay_raises_gets_no_event_twice(clock: SimulatedClock) -> None:
    backend = _Moody()
    store = make_store(make_child("a", backend))
    log(store, register(store), "hello")
    clock.advance(60)
    assert backend.messages == ["hello"]
    assert store.stats()["a"]["last_error"] is None
