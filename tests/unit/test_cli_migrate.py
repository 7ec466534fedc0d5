"""What `composite-logstore migrate` prints; tests/integration/test_migrate.py does the moves."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from importlib import import_module
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import pytest
from click.testing import CliRunner, Result
from zenml.exceptions import IllegalOperationError

from composite_logstore import operations
from composite_logstore.cli.main import main
from composite_logstore.operations.progress import Progress, Reporter

# The package has a function of this name.
MIGRATE = import_module("composite_logstore.operations.migrate")

MOVE = SimpleNamespace(
    stack=SimpleNamespace(id=UUID(int=1), name="prod"),
    log_store=None,
    artifact_store=SimpleNamespace(id=UUID(int=2)),
    name="prod-logs",
    to="s3",
    found=None,
    facts={},
    source=SimpleNamespace(name="earlier"),
    target=SimpleNamespace(name="s3"),
    was_checked=True,
    **dict.fromkeys(("is_built", "is_switched", "is_watched", "is_promoted", "is_retired"), True),
)

Run = Callable[..., Result]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return what runs the command on a move that does the given things."""

    def run(do: Callable[[Reporter], None], *options: str) -> Result:
        def migrate(move: Any, *, progress: Any, **_: object) -> Iterator[Any]:
            do(Reporter(progress))
            yield from ()

        monkeypatch.setattr(operations, "find_move", lambda *_, **__: MOVE)
        monkeypatch.setattr(operations, "migrate", migrate)
        return CliRunner().invoke(main, ["migrate", "prod", "--to", "s3", "--yes", *options])

    return run


@pytest.mark.parametrize("options", [[], ["--output", "json"]])
def test_that_a_backfill_is_resumed_is_said_on_stderr(run: Run, options: list[str]) -> None:
    result = run(lambda report: report.notice("Resuming an interrupted backfill."), *options)
    assert result.exit_code == 0, result.exception
    assert result.stderr == "Resuming an interrupted backfill.\n"
    assert "Resuming" not in result.stdout


def test_what_a_stage_waits_for_is_part_of_the_text(run: Run) -> None:
    def wait(report: Reporter) -> None:
        report.wait("watch: no run yet. Waiting ...")

    shown = run(wait)
    assert (shown.stdout.splitlines()[0], shown.stderr) == ("watch: no run yet. Waiting ...", "")
    shown = run(wait, "--output", "json")
    assert (json.loads(shown.stdout)["stopped"], shown.stderr) == ("", "")


def test_why_a_move_stops_is_made_inert_once(run: Run) -> None:
    def stop(report: Reporter) -> None:
        raise operations.MoveStoppedError("one\ntwo")

    assert run(stop).stderr == "Stopped: one\n    two.\n"
    assert json.loads(run(stop, "--output", "json").stdout)["stopped"] == "one\ntwo"


def test_without_permission_to_update_the_stack_somebody_has_to_act(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise IllegalOperationError("no")

    monkeypatch.setattr("zenml.client.Client", lambda: SimpleNamespace(update_stack=refuse))
    move = operations.Move(MOVE.stack, "prod-logs", "s3", None, None)
    result = run(lambda report: move.update_stack([]))
    assert result.exit_code == 1
    assert "update stack 'prod'; ask its owner" in result.stderr


def test_the_children_are_named_while_they_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, ...]] = []

    def note(progress: Progress) -> None:
        told.append(progress.checking)

    def check_children(*_: object) -> list[Any]:
        assert told == [("earlier", "s3")]
        return []

    monkeypatch.setattr(MIGRATE, "check_children", check_children)
    MIGRATE._check(MOVE, Reporter(note))
    assert told == [("earlier", "s3"), ()]
