from __future__ import annotations

import logging
import os
import pickle
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, ClassVar
from uuid import UUID, uuid4

import pytest
from zenml.models import LogsRequest
from zenml.utils.logging_utils import LoggingContext

import composite_logstore
from composite_logstore import joining, log_store, zenml
from composite_logstore.capture.open_streams import VARIABLE, Reference
from composite_logstore.capture.process import PID
from composite_logstore.log_store import CompositeLogStore, existing_stream, open_stream
from composite_logstore.testing import SimulatedBackend
from tests.forks import in_fork
from tests.simulation import dispatch, make_child, make_logs, make_store


@pytest.fixture(autouse=True)
def _outside_of_any_step(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(joining, "_joining", joining._Joining())
    yield
    log_store.adopting.detach()


@pytest.fixture
def backend() -> SimulatedBackend:
    return SimulatedBackend()


def begin_step(store: CompositeLogStore, source: str = "step") -> Any:
    logs = make_logs(store, source)
    return store.register_origin(str(logs.id), logs, {"zenml.step.run.name": "train"})


def in_thread(function: Any, *arguments: Any) -> None:
    thread = threading.Thread(target=function, args=arguments)
    thread.start()
    thread.join()


def log(message: str) -> None:
    logging.getLogger("train").warning(message)


def warnings_in(caplog: pytest.LogCaptureFixture) -> int:
    """Return how many warnings there are: ZenML may say at its own level that it has begun."""
    return sum(record.levelno >= logging.WARNING for record in caplog.records)


# Threads


def context_of(origin: Any, store: CompositeLogStore) -> LoggingContext:
    context = object.__new__(LoggingContext)
    context._disabled, context._origin, context._log_store = False, origin, store
    return context


def test_a_function_in_context_logs_to_the_step_from_any_thread(backend: SimulatedBackend) -> None:
    store = make_store(make_child("a", backend))
    origin = begin_step(store)
    token = zenml.activate(context_of(origin, store))

    def work(number: int) -> int:
        record = logging.LogRecord("train", 20, "", 0, f"line {number}", (), None)
        dispatch(record)
        return number

    try:
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(composite_logstore.in_context(work), range(500))) == list(range(500))
            assert list(pool.map(work, range(3))) == list(range(3))
    finally:
        token.var.reset(token)
    store.deregister_origin(origin)
    assert sorted(backend.messages) == sorted(f"line {number}" for number in range(500))


def test_threads_that_log_at_once_lose_nothing_though_zenml_disables_the_context_meanwhile() -> None:
    class Store:
        """Holds the first record until the second one has been there."""

        taken: ClassVar[list[str]] = []
        both = threading.Barrier(2, timeout=10)

        def emit(self, origin: Any, record: logging.LogRecord, metadata: Any = None) -> None:
            self.both.wait()
            self.taken.append(record.getMessage())

    token = zenml.activate(context_of(object(), Store()))  # type: ignore[arg-type]

    def work(name: str) -> None:
        dispatch(logging.LogRecord("train", 20, "", 0, name, (), None))

    try:
        run = composite_logstore.in_context(work)
        threads = [threading.Thread(target=run, args=(name,)) for name in "ab"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        token.var.reset(token)
    assert sorted(Store.taken) == ["a", "b"]


def test_a_function_in_context_keeps_its_name_arguments_and_exception() -> None:
    def fail(number: int, *, reason: str) -> None:
        """Fail."""
        raise ValueError(f"{number} {reason}")

    run = composite_logstore.in_context(fail)
    assert (run.__name__, run.__doc__) == ("fail", "Fail.")
    with pytest.raises(ValueError, match="3 because"):
        run(3, reason="because")


def test_in_another_process_the_function_joins_first(monkeypatch: pytest.MonkeyPatch) -> None:
    joined: list[int] = []
    monkeypatch.setattr(joining, "join", lambda: joined.append(os.getpid()))
    run = pickle.loads(pickle.dumps(composite_logstore.in_context(int)))
    assert pickle.loads(pickle.dumps(run))("7") == 7
    assert joined == [os.getpid()]


@pytest.mark.parametrize("adopts", [True, False])
def test_threads_without_a_context_belong_to_the_one_step_that_runs_if_that_is_set(
    adopts: bool, backend: SimulatedBackend
) -> None:
    store = make_store(make_child("a", backend), adopt_threads=adopts)
    run, origin = begin_step(store, "client"), begin_step(store)
    in_thread(log, "of a thread")
    second = begin_step(store)
    in_thread(log, "of one of two")
    store.deregister_origin(second)
    in_thread(log, "of one again")
    in_thread(log, "  ")
    store.deregister_origin(origin)
    in_thread(log, "of none")
    store.deregister_origin(run)
    assert backend.messages == (["of a thread", "of one again"] if adopts else [])
    assert {event.stream.id for event in backend.received} <= {origin.stream.id}


def test_another_log_store_s_step_adopts_nothing(backend: SimulatedBackend) -> None:
    adopting, other = make_store(make_child("a", backend), adopt_threads=True), make_store(make_child("b"))
    first = begin_step(adopting)
    adopting.deregister_origin(first)
    origin = begin_step(other)
    in_thread(log, "hello")
    other.deregister_origin(origin)
    assert backend.messages == []


def test_a_forked_process_joins_without_asking_zenml_and_nothing_is_there_twice(
    backend: SimulatedBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask() -> Any:
        raise AssertionError("ZenML was asked")

    monkeypatch.setattr("zenml.client.Client", ask)
    store = make_store(make_child("a", backend), adopt_threads=True)
    origin = begin_step(store)
    in_fork(lambda: in_thread(log, "adopted"))

    def child() -> None:
        if composite_logstore.join() == origin.stream.id:
            in_thread(log, "joined")

    in_fork(child)
    store.deregister_origin(origin)
    assert backend.messages == ["adopted", "joined"]
    assert len({event.metadata[PID] for event in backend.received}) == 2


# Processes


def as_if_started_by(store: CompositeLogStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `join` find the streams of this process as if another one had opened them, and ask no ZenML."""
    monkeypatch.setattr(joining.here, "is_told_by_this_process", lambda: False)
    monkeypatch.setattr(log_store, "opened_store", lambda id: {store.id: store}[id])


def test_a_process_joins_once_and_follows_to_the_next_step(
    backend: SimulatedBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make_store(make_child("a", backend))
    first = begin_step(store)
    as_if_started_by(store, monkeypatch)
    found = joining.find(os.environ[VARIABLE])
    take = found.take
    take(logging.LogRecord("train", 20, "", 0, "one", (), None))
    store.deregister_origin(first)
    take(logging.LogRecord("train", 20, "", 0, "late", (), None))
    second = begin_step(store)
    take(logging.LogRecord("train", 20, "", 0, "two", (), None))
    take(logging.LogRecord("train", 20, "", 0, "\n", (), None))
    found.flush()
    store.deregister_origin(second)
    streams = {event.message: event.stream.id for event in backend.received}
    assert streams == {"one": first.stream.id, "late": first.stream.id, "two": second.stream.id}
    assert {event.metadata[PID] for event in backend.received} == {os.getpid()}
    # Each stream has its attributes.
    assert {event.stream.metadata["zenml.step.run.name"] for event in backend.received} == {"train"}


def test_in_the_step_s_own_process_join_does_nothing() -> None:
    store = make_store(make_child("a"))
    origin = begin_step(store)
    before = logging.Logger.callHandlers
    assert composite_logstore.join() == origin.stream.id
    assert logging.Logger.callHandlers is before
    store.deregister_origin(origin)


def test_without_a_step_join_does_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert composite_logstore.join() is None
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "text", ["nonsense", *(str(Reference(UUID(int=1), id, "/no/board")) for id in (None, UUID(int=2)))]
)
def test_what_cannot_be_joined_is_one_warning_and_no_exception(
    text: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse() -> Any:
        raise ConnectionError("refused")

    monkeypatch.setenv(VARIABLE, text)
    monkeypatch.setattr("zenml.client.Client", refuse)
    monkeypatch.setattr("composite_logstore.catalog.errors.check_server", lambda: None)
    before = logging.Logger.callHandlers, sys.stdout.write
    for _ in range(2):
        assert composite_logstore.join() is None
    assert warnings_in(caplog) == 1
    assert (logging.Logger.callHandlers, sys.stdout.write) == before


def test_join_never_raises(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def fail(text: str) -> Any:
        raise RuntimeError("a defect")

    monkeypatch.setattr(joining, "find_in_time", fail)
    monkeypatch.setenv(VARIABLE, "a stream")
    assert composite_logstore.join() is None
    assert warnings_in(caplog) == 1


def test_a_zenml_that_does_not_answer_holds_up_no_process(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hangs = threading.Event()
    monkeypatch.setattr(joining, "JOIN_SECONDS", 0.05)
    monkeypatch.setattr(joining, "find", lambda text: hangs.wait(60))
    monkeypatch.setenv(VARIABLE, str(Reference(uuid4(), uuid4(), "")))
    assert composite_logstore.join() is None
    hangs.set()
    assert warnings_in(caplog) == 1


def test_with_several_steps_a_process_joins_the_run_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = make_store(make_child("a"))
    run, *steps = begin_step(store, "orchestrator"), begin_step(store), begin_step(store)
    as_if_started_by(store, monkeypatch)
    assert joining.find(os.environ[VARIABLE]).stream_id == run.stream.id
    assert warnings_in(caplog) == 1
    store.deregister_origin(run)
    with pytest.raises(LookupError, match="several steps"):
        joining.find(os.environ[VARIABLE])
    for step in steps:
        store.deregister_origin(step)


class SimulatedServer:
    """ZenML's client, of which several processes find no stream, and then create one."""

    def __init__(self, run: Any, processes: int) -> None:
        self.run = run
        self.zen_store = self
        self.logs: dict[UUID, Any] = {}
        self._looked = threading.Barrier(processes, timeout=10)
        self._lock = threading.Lock()

    def get_pipeline_run(self, id: Any, **_: Any) -> Any:
        return self.run

    def get_run_step(self, id: Any) -> Any:
        return SimpleNamespace(id=id, name="train", pipeline_run_id=self.run.id, log_collection=[])

    def create_logs(self, request: Any) -> Any:
        self._looked.wait()
        with self._lock:
            if request.id in self.logs:
                raise RuntimeError("(sqlite3.IntegrityError) UNIQUE constraint failed: logs.id")
            self.logs[request.id] = request
            return request

    def get_logs(self, id: UUID) -> Any:
        return self.logs[id]


@pytest.mark.skipif("step_run_id" not in LogsRequest.model_fields, reason="streams come with updates of their step")
@pytest.mark.parametrize("has_step", [True, False])
def test_processes_that_open_a_stream_at_once_share_it(has_step: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    run = SimpleNamespace(id=uuid4(), name="run", project_id=uuid4(), log_collection=[])
    server = SimulatedServer(run, 4)
    monkeypatch.setattr("zenml.client.Client", lambda: server)
    monkeypatch.setattr("zenml.utils.logging_utils.get_run_log_metadata", lambda run: {})
    store, step_id = make_store(make_child("a")), uuid4() if has_step else None
    with ThreadPoolExecutor(4) as pool:
        found = [pool.submit(open_stream, store, run.id, step_id, "workers") for _ in range(4)]
        assert len({future.result()[0].id for future in found}) == 1
    assert len(server.logs) == 1
    assert next(iter(server.logs.values())).step_run_id == step_id


def test_a_stream_that_zenml_does_not_create_is_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    run = SimpleNamespace(id=uuid4(), name="run", project_id=uuid4(), log_collection=[])
    server = SimulatedServer(run, 1)
    monkeypatch.setattr(server, "create_logs", lambda request: (_ for _ in ()).throw(PermissionError("not allowed")))
    monkeypatch.setattr("zenml.client.Client", lambda: server)
    monkeypatch.setattr("zenml.utils.logging_utils.get_run_log_metadata", lambda run: {})
    with pytest.raises(PermissionError):
        open_stream(make_store(make_child("a")), run.id, None, "workers")


def test_without_a_board_zenml_tells_whose_the_stream_is(monkeypatch: pytest.MonkeyPatch) -> None:
    run = SimpleNamespace(id=uuid4(), name="run", project_id=uuid4(), log_collection=[])
    server = SimulatedServer(run, 1)
    id, step_id, store_id = uuid4(), uuid4(), uuid4()
    server.logs[id] = SimpleNamespace(
        id=id, source="step", artifact_store_id=None, step_run_id=step_id, pipeline_run_id=None
    )
    monkeypatch.setattr("zenml.client.Client", lambda: server)
    monkeypatch.setattr("zenml.utils.logging_utils.get_run_log_metadata", lambda run: {"run": run.name})
    found = existing_stream(store_id, id)
    wanted = {"run": "run", "zenml.step.run.id": str(step_id), "zenml.step.run.name": "train"}
    # Besides the names that the oldest releases use.
    assert {name: value for name, value in found.metadata.items() if not name.startswith("step.")} == wanted
    assert (found.id, found.source, found.store_id) == (id, "step", store_id)
