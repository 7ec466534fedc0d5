from __future__ import annotations

import os
import shutil
import tempfile
import threading
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest

from composite_logstore.capture import open_streams
from composite_logstore.capture.open_streams import VARIABLE, Board, OpenStream, OpenStreams, Reference, current
from composite_logstore.testing import SimulatedBackend
from tests.simulation import make_child, make_logs, make_store

STORE = uuid4()


def stream(source: str = "step", id: UUID | None = None, store_id: UUID = STORE, **metadata: Any) -> OpenStream:
    return OpenStream(id or uuid4(), source, None, store_id, metadata)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.delenv(VARIABLE, raising=False)
    streams = OpenStreams()
    yield streams
    streams.remove()


def told() -> Reference | None:
    return Reference.parse(os.environ.get(VARIABLE, ""))


def board() -> Board:
    reference = told()
    assert reference is not None
    return Board(reference.board)


@pytest.mark.parametrize(
    ("sources", "expected", "is_ambiguous"),
    [
        ([], None, False),
        (["client"], "client", False),
        (["client", "orchestrator"], "orchestrator", False),
        (["client", "orchestrator", "step"], "step", False),
        (["prepare_step", "step", "step_start_hook"], "step", False),
        (["step", "step"], None, True),
        (["orchestrator", "step", "step"], "orchestrator", True),
        (["client", "orchestrator", "orchestrator", "step", "step"], "client", True),
        (["prepare_step"], None, False),
    ],
)
def test_records_belong_to_the_one_step_that_runs_or_else_to_the_run(
    sources: list[str], expected: str | None, is_ambiguous: bool
) -> None:
    found, several = current([stream(source) for source in sources])
    assert (found and found.source, several) == (expected, is_ambiguous)


def test_the_variable_names_the_step_s_stream_while_it_is_open(here: OpenStreams) -> None:
    run, step = stream("client"), stream(**{"zenml.step.run.name": "train"})
    here.opened(run)
    assert told() is not None
    here.opened(step)
    assert (told().store_id, told().stream_id) == (STORE, step.id)  # type: ignore[union-attr]
    assert here.is_told_by_this_process()
    assert board().streams() == [run, step]
    here.closed(step.id)
    assert told().stream_id == run.id  # type: ignore[union-attr]
    here.closed(run.id)
    assert VARIABLE not in os.environ


def test_the_variable_holds_ids_and_a_path_and_nothing_else(here: OpenStreams) -> None:
    here.opened(stream(**{"token": "a-secret"}))
    store_id, stream_id, path = os.environ[VARIABLE].split(":", 2)
    assert UUID(store_id)
    assert UUID(stream_id)
    assert Path(path).is_file()
    assert Path(path).parent.stat().st_mode & 0o077 == 0
    assert "a-secret" not in os.environ[VARIABLE]


def test_a_nested_run_restores_the_outer_step_s_variable(here: OpenStreams, monkeypatch: pytest.MonkeyPatch) -> None:
    outer = str(Reference(uuid4(), uuid4(), "/elsewhere/streams"))
    monkeypatch.setenv(VARIABLE, outer)
    assert not here.is_told_by_this_process()
    inner = stream()
    here.opened(inner)
    assert told().stream_id == inner.id  # type: ignore[union-attr]
    here.closed(inner.id)
    assert os.environ[VARIABLE] == outer


def test_steps_in_threads_that_end_in_any_order_leave_nothing_behind(here: OpenStreams) -> None:
    run, steps = stream("orchestrator"), [stream() for _ in range(3)]
    here.opened(run)
    here.opened(steps[0])
    before = os.environ[VARIABLE]
    here.opened(steps[1])
    # Nobody can tell which of the two starts a process: it is the run's.
    assert told().stream_id == run.id  # type: ignore[union-attr]
    here.opened(steps[2])
    here.closed(steps[0].id)
    # A thread's temporary environment may bring an earlier value back.
    os.environ[VARIABLE] = before
    here.closed(steps[2].id)
    assert told().stream_id == steps[1].id  # type: ignore[union-attr]
    here.closed(steps[1].id)
    here.closed(run.id)
    assert VARIABLE not in os.environ


def test_the_variable_of_somebody_else_is_left_alone(here: OpenStreams) -> None:
    step = stream()
    here.opened(step)
    os.environ[VARIABLE] = other = str(Reference(uuid4(), uuid4(), "/other"))
    here.closed(step.id)
    assert os.environ[VARIABLE] == other


def test_without_a_folder_for_the_board_the_variable_is_set_all_the_same(
    here: OpenStreams, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(prefix: str) -> str:
        raise OSError("no space")

    monkeypatch.setattr(open_streams.tempfile, "mkdtemp", no_space)
    step = stream()
    here.opened(step)
    assert told() == Reference(STORE, step.id, "")
    here.closed(step.id)
    assert VARIABLE not in os.environ


def test_a_board_that_was_tidied_up_is_there_again_for_the_next_step(here: OpenStreams) -> None:
    first, second = stream(), stream()
    here.opened(first)
    follower = board()
    shutil.rmtree(Path(follower._path).parent)
    here.closed(first.id)
    here.opened(second)
    assert follower.follow(first.id, STORE) == second
    here.closed(second.id)
    assert VARIABLE not in os.environ


def test_what_a_killed_process_has_left_is_removed_and_nothing_else(
    here: OpenStreams, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    left, new, other = (tmp_path / name for name in ("composite-logstore-step-a", "composite-logstore-step-b", "other"))
    for folder in (left, new, other):
        folder.mkdir()
        (folder / "streams").write_text("[]")
    for folder in (left, other):
        os.utime(folder, (0, 0))
    living = OpenStreams()
    living.opened(stream())
    assert not left.exists()
    [held] = set(tmp_path.iterdir()) - {new, other}
    os.utime(held, (0, 0))
    here.opened(stream())
    assert held.exists()
    assert new.exists()
    assert other.exists()
    living.remove()
    here.remove()
    assert set(tmp_path.iterdir()) == {new, other}


def test_threads_that_open_and_close_streams_at_once_end_with_none(here: OpenStreams) -> None:
    def work() -> None:
        for _ in range(20):
            one = stream()
            here.opened(one)
            here.closed(one.id)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(here) == []
    assert VARIABLE not in os.environ


def test_who_outlives_a_step_follows_to_the_next_one(here: OpenStreams) -> None:
    first, second = stream(), stream(**{"zenml.step.run.name": "second"})
    here.opened(first)
    follower = board()
    assert follower.follow(first.id, STORE) is None
    here.closed(first.id)
    # A last record between two steps belongs to the one that has ended.
    assert follower.follow(first.id, STORE) is None
    here.opened(stream("client"))
    assert follower.follow(first.id, STORE) is None
    here.opened(second)
    assert follower.follow(first.id, STORE) == second
    assert follower.follow(second.id, STORE) is None


def test_who_logs_to_a_step_that_still_runs_stays_with_it(here: OpenStreams) -> None:
    first = stream()
    here.opened(first)
    follower = board()
    here.opened(stream())
    assert follower.follow(first.id, STORE) is None


def test_nobody_follows_to_another_log_store_or_to_one_of_several_steps(here: OpenStreams) -> None:
    here.opened(stream(store_id=uuid4()))
    follower = board()
    assert follower.follow(uuid4(), STORE) is None
    here.opened(stream())
    assert follower.follow(uuid4(), STORE) is None


def test_once_the_step_s_process_is_gone_its_processes_stay_where_they_are(here: OpenStreams) -> None:
    here.opened(stream())
    follower = board()
    here.remove()
    assert follower.streams() is None
    assert follower.follow(uuid4(), STORE) is None


@pytest.mark.parametrize(
    "content", [b"", b"{", b"null", b"[1]", b'[{"id": 3}]', b'[{"id": "x", "source": "step"}]', b"\xff\x00"]
)
def test_a_board_that_makes_no_sense_tells_nothing(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "streams"
    path.write_bytes(content)
    assert Board(str(path)).streams() is None


@pytest.mark.parametrize("text", ["", "nonsense", "a:b", "a:b:c", f"{UUID(int=1)}:x:/path", f"{UUID(int=1)}", "::"])
def test_a_variable_that_makes_no_sense_names_nothing(text: str) -> None:
    assert Reference.parse(text) is None


def test_a_reference_is_what_was_written() -> None:
    for reference in (Reference(uuid4(), uuid4(), "/a:b/c"), Reference(uuid4(), None, "")):
        assert Reference.parse(str(reference)) == reference


def test_a_log_store_tells_which_of_its_streams_are_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    store = make_store(make_child("a", SimulatedBackend()))
    logs = make_logs(store)
    origin = store.register_origin(str(logs.id), logs, {"zenml.step.run.name": "train"})
    assert (told().store_id, told().stream_id) == (store.id, logs.id)  # type: ignore[union-attr]
    [found] = board().streams() or []
    assert found.metadata["zenml.step.run.name"] == "train"
    store.deregister_origin(origin)
    assert VARIABLE not in os.environ
