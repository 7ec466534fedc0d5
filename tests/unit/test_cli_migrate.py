"""What `composite-logstore migrate` prints; tests/integration/test_migrate.py does the moves."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import pytest
from click.testing import CliRunner, Result
from zenml.exceptions import IllegalOperationError

from composite_logstore import Stream, child_types, operations
from composite_logstore.cli.main import main
from composite_logstore.operations.progress import Progress, Reporter
from composite_logstore.parity import scan
from composite_logstore.parity.result import ChildParity, StreamParity
from composite_logstore.testing import SimulatedBackend, SimulatedChildConfig, make_events
from tests.simulated_zenml import SimulatedZenML
from tests.simulation import make_child

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


@pytest.mark.usefixtures("zenml")
def test_an_earlier_log_store_whose_package_is_missing_gives_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(model: object) -> None:
        raise ModuleNotFoundError("No module named 'acme'")

    monkeypatch.setattr("zenml.stack.StackComponent.from_model", fail)
    with pytest.raises(operations.NoAnswerError, match=r"'acme-logs'.*ModuleNotFoundError"):
        MIGRATE._is_readable(SimpleNamespace(id=UUID(int=3), name="acme-logs"))


# With a log store between whose children a stack moves


class House:
    """A stack `my prod` whose log store has children `a`, the primary, and `b`."""

    def __init__(self, zenml: SimulatedZenML, **of_b: Any) -> None:
        self.zenml = zenml
        self.store = zenml.register(make_child("a"), make_child("b", **of_b), name="my logs")
        # `begin_run` moves the clock on.
        self.stack = zenml.add_stack("my prod", "my logs")

    def log(self, run: str, in_b: bool = True, level: int = 20, in_progress: bool = False) -> None:
        """Begin a run that logs three events to `a`, and to `b` if it has them."""
        begun = self.zenml.begin_run(run, in_progress)
        events = make_events(
            "xyz", Stream(self.zenml.open_stream(begun, "client", self.store.id).id, {}), levels=[level]
        )
        for name in ("a", "b") if in_b else ("a",):
            backend(name).received += events

    def migrate(self, *options: str, code: int = 0, stack: str = "my prod", to: str = "b") -> Result:
        result = self.zenml.run_command("migrate", stack, "--to", to, *options)
        assert result.exit_code == code, result.output
        return result

    def values(self, *options: str, code: int = 0) -> dict[str, Any]:
        found = json.loads(self.migrate(*options, "--yes", "--output", "json", code=code).stdout)
        assert isinstance(found, dict)
        return found


def backend(name: str) -> SimulatedBackend:
    return SimulatedChildConfig.backends[name]


@pytest.fixture
def zenml(monkeypatch: pytest.MonkeyPatch) -> SimulatedZenML:
    return SimulatedZenML.take_place(monkeypatch)


@pytest.fixture
def house(zenml: SimulatedZenML, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> House:
    monkeypatch.setenv("ZENML_CONFIG_PATH", str(tmp_path / "zenml"))
    monkeypatch.setattr(MIGRATE, "ARRIVAL_SECONDS", 0.0)
    known = {**child_types.backends(), "simulated": SimpleNamespace(load=lambda: SimulatedChildConfig)}
    monkeypatch.setattr(child_types, "backends", lambda: known)
    return House(zenml)


CONTINUE = ["composite-logstore", "migrate", "my prod", "--to", "b"]


def next_command(result: Result) -> list[str]:
    """Return the command in the line after `Next`, as a shell takes it."""
    lines = result.stdout.splitlines()
    (place,) = [number for number, line in enumerate(lines) if line.startswith("Next: ")]
    return shlex.split(lines[place + 1])


def test_wherever_it_stops_the_command_that_continues_is_printed(house: House) -> None:
    house.log("run")
    assert next_command(house.migrate("--status")) == CONTINUE
    assert next_command(house.migrate("--stop-after", "watch", "--wait", "0.5", "--yes")) == [
        *CONTINUE,
        "--wait",
        "0.5",
    ]
    assert next_command(house.migrate("--dry-run")) == CONTINUE
    since = house.zenml.now.isoformat()
    assert next_command(house.migrate("--status", "--since", since)) == [*CONTINUE, "--since", since]
    no = house.zenml.run_command("migrate", "my prod", "--to", "b", input="n\n")
    assert (no.exit_code, next_command(no)) == (1, CONTINUE)
    values = house.values("--stop-after", "promote")
    assert (values["next"], shlex.split(values["next_command"])) == ("retire", CONTINUE)
    assert house.values()["next_command"] is None


def test_after_undo_the_next_command_goes_forward_and_the_other_one_back(house: House) -> None:
    house.log("run")
    house.migrate("--yes")
    undone = house.migrate("--undo", "--yes")
    assert next_command(undone) == CONTINUE
    assert "To undo stage 'promote' as well:" in undone.stdout
    assert shlex.split(undone.stdout.splitlines()[-1]) == [*CONTINUE, "--undo"]
    # As printed, it is repeated: the move goes forward again.
    assert house.zenml.run_command(*next_command(undone)[1:], "--yes").exit_code == 0
    assert house.zenml.updates[-1]["children"][0]["enabled"] is False
    house.migrate("--undo", "--yes")
    last = house.migrate("--undo", "--yes")
    assert "as well" not in last.stdout
    assert "nothing to undo" in house.migrate("--undo", "--yes", code=1).stderr


def test_a_dry_run_of_undo_changes_nothing(house: House) -> None:
    house.log("run")
    house.migrate("--yes")
    number = len(house.zenml.updates)
    would = house.migrate("--undo", "--dry-run")
    assert "Would be undone: retire: child 'a' is enabled again." in would.stdout
    assert "nothing has changed" in would.stdout
    assert len(house.zenml.updates) == number
    assert "Undone: retire" in house.migrate("--undo", "--yes").stdout


@pytest.mark.parametrize(
    "options", [("--status", "--undo"), ("--status", "--dry-run"), ("--undo", "--stop-after", "watch")]
)
def test_options_that_contradict_each_other_are_refused(house: House, options: tuple[str, ...]) -> None:
    house.log("run")
    house.migrate("--yes")
    number = len(house.zenml.updates)
    house.migrate(*options, "--yes", code=2)
    assert len(house.zenml.updates) == number


@pytest.mark.parametrize(
    ("to", "shown"),
    [
        ('{"name": "c", "type": "artifact"}', '{"name": "c", "type": "artifact"}'),
        ('{"name": "c", "type": "otlp", "headers": {"authorization": "s3cret"}}', "@FILE"),
        ('{"name": "c", "type": "otlp", "headers": {"authorization": "{{o.key}}"}}', None),
        ('{"name": "c", "type": "datadog", "nonsense": "s3cret"}', "@FILE"),
        ("@child.json", "@child.json"),
    ],
)
def test_before_the_child_exists_the_next_command_names_it_as_it_was_given(
    house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str, shown: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "child.json").write_text('{"name": "c", "type": "artifact"}')
    status = house.migrate("--status", to=to)
    following = next_command(status)
    assert "s3cret" not in status.stdout
    if shown is not None:
        assert following == [*CONTINUE[:-1], shown]


def test_another_name_is_part_of_the_next_command_until_the_stack_has_the_log_store(house: House) -> None:
    house.zenml.add_stack("plain")
    to = '{"name": "c", "type": "artifact"}'
    named = next_command(house.migrate("--status", "--name", "other", stack="plain", to=to))
    assert named[-2:] == ["--name", "other"]
    assert "--name" not in next_command(house.migrate("--status", stack="plain", to=to))


def test_without_a_terminal_a_question_stops_the_move_and_names_the_option(house: House) -> None:
    house.log("run")
    stopped = house.zenml.run_command("migrate", "my prod", "--to", "b", input="")
    assert stopped.exit_code == 1
    assert "there is no terminal. '--yes'" in stopped.stderr
    assert "you answered no" not in stopped.output
    assert house.zenml.updates == []


# --dry-run


def test_a_dry_run_makes_the_checks_of_each_stage_and_changes_nothing(house: House) -> None:
    house.log("run")
    would = house.values("--dry-run")
    assert [one["stage"] for one in would["done"]] == ["watch", "backfill", "verify", "promote", "retire"]
    what = {one["stage"]: one["what"] for one in would["done"]}
    assert what["watch"] == "child 'b' has all 3 events of run 'run'"
    assert what["backfill"] == "would copy 0 events to child 'b', which holds 3 already"
    assert what["verify"] == "child 'b' holds all 3 events of 1 stream"
    assert what["promote"] == "would read logs from child 'b' instead of 'a'"
    assert (would["dry_run"], would["next"], would["stages"]["promote"]) == (True, "watch", False)
    assert house.zenml.updates == []
    assert len(backend("b").received) == 3
    assert "nothing has changed" in house.migrate("--dry-run").stdout
    # The real run does what the dry run said.
    assert [one["stage"] for one in house.values()["done"]] == list(what)


def test_a_dry_run_counts_the_events_to_copy_and_does_not_verify_what_is_not_there(house: House) -> None:
    house.log("early", in_b=False)
    # Since then the log store has both children.
    house.zenml.models[0].updated = (house.zenml.now + timedelta(minutes=1)).replace(tzinfo=None)
    house.log("run")
    what = {one["stage"]: one["what"] for one in house.values("--dry-run")["done"]}
    assert what["backfill"] == "would copy 3 events to child 'b', which holds 3 already"
    assert what["verify"].startswith("would verify")
    assert len(backend("b").received) == 3
    assert house.values("--stop-after", "backfill")["backfill"]["copied"] == 3


@pytest.mark.parametrize("options", [(), ("--dry-run",)])
def test_a_dry_run_stops_where_a_real_run_stops(house: House, options: tuple[str, ...]) -> None:
    waits = house.values(*options, code=1)
    assert "no run has logged to both children" in waits["stopped"]
    assert waits["next"] == "watch"
    assert house.zenml.updates == []


@pytest.mark.parametrize("options", [(), ("--dry-run",)])
def test_a_rule_that_excludes_events_stops_the_move(
    house: House, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
) -> None:
    house.zenml.models.clear()
    house.zenml.stacks.clear()
    house = House(house.zenml, min_level="ERROR")
    house.log("quiet", in_b=False)
    house.log("loud", level=40)
    stopped = house.values(*options, code=1)
    assert "3 of 6 events will not be visible: 'min_level' of child 'b'" in stopped["stopped"]
    assert "`composite-logstore promote 'my logs' b --force`" in stopped["stopped"]
    assert house.zenml.updates == []


def test_a_dry_run_finds_settings_that_zenml_would_refuse(house: House) -> None:
    house.log("run")
    house.store._config = house.store.config.model_copy(update={"serve_from_artifact_store": True})
    refused = house.migrate("--dry-run", code=3)
    assert "'serve_from_artifact_store'" in refused.stderr


@pytest.mark.parametrize("options", [(), ("--dry-run",)])
@pytest.mark.parametrize("child", ["a", "b"])
def test_a_child_that_cannot_be_read_has_not_been_reached_by_any_event(
    house: House, monkeypatch: pytest.MonkeyPatch, child: str, options: tuple[str, ...]
) -> None:
    monkeypatch.setattr(scan, "READ_ATTEMPTS", 1)
    house.log("run")
    backend(child).fault = "refused"
    stopped = house.values(*options, code=1)
    assert (stopped["done"], stopped["next"]) == ([], "watch")
    assert (
        f"run 'run', client: child '{child}' could not be compared: the backend cannot be reached" in stopped["stopped"]
    )
    assert house.zenml.updates == []


def test_verify_stops_at_the_first_stream_of_a_child_that_cannot_be_read(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    house.log("run")
    for number in range(5):
        house.log(f"run-{number}")
    asked = []

    def compare(self: Any, stream: Any) -> StreamParity:
        asked.append(stream.run_name)
        # The first answer is that of the stage `watch`.
        error = "it is away." if len(asked) > 1 else ""
        return StreamParity("", stream.label, {"a": ChildParity(events=3), "b": ChildParity(events=3, error=error)})

    monkeypatch.setattr(MIGRATE._Comparison, "compare", compare)
    stopped = house.values(code=1)
    assert stopped["next"] == "verify"
    assert "child 'b', client: it is away" in stopped["stopped"]
    assert len(asked) == 2
