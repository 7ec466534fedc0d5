"""The examples of docs/operations.md and of the operations' docstrings are true."""

from __future__ import annotations

import doctest
import inspect
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from uuid import uuid4

import pytest

from composite_logstore import operations
from composite_logstore.catalog.stores import find_store
from composite_logstore.event import Stream
from composite_logstore.operations.inventory import LogStore
from composite_logstore.operations.selection import Selection
from composite_logstore.spool.folder import Spool
from composite_logstore.spool.format import RejectedEvent
from composite_logstore.spool.lock import release_all
from composite_logstore.spool.rejected import RejectedFolder
from composite_logstore.spool.settings import spool_folder
from composite_logstore.testing import make_events
from tests.events import NOON
from tests.simulated_zenml import SimulatedZenML
from tests.unit.test_backfilling import archive, write

PAGE = Path(__file__).parents[2] / "docs" / "operations.md"
# ZenML's stacks are not simulated; tests/integration/test_migrate.py runs these.
MOVING = {"find_move", "migrate", "undo"}
PUBLIC = {name: value for name in operations.__all__ if inspect.isfunction(value := getattr(operations, name))}


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make the log store of the examples, whose child `live` is empty, the run, a dead process and rejected events."""
    monkeypatch.setenv("ZENML_CONFIG_PATH", str(tmp_path / "zenml"))
    zenml = SimulatedZenML.take_place(monkeypatch)
    first, second = archive("archive", tmp_path), archive("live", tmp_path)
    store = zenml.register(first, second)
    children = [
        {"name": "archive", "type": "artifact"},
        {
            "name": "live",
            "type": "otlp",
            "endpoint": "https://otlp.example",
            "headers": {"authorization": "Bearer {{collector.token}}"},
        },
    ]
    zenml.register_settings({"primary": "archive", "children": children}, name="production")
    step = zenml.begin_step(zenml.begin_run("train-1"), "fit")
    stream = Stream(zenml.open_stream(step, "step", store.id).id, {}, None)
    write(first, make_events([f"epoch {number}" for number in (1, 2, 3)], stream))
    writer = "0123456789abcde"
    dead = Spool.create(spool_folder(store.id, store.config), writer, ["live"])
    for event in make_events("xyz", Stream(uuid4(), {}), writer=writer):
        dead.segments.append(event, lambda _: True)
    dead.abandon()
    rejected = [RejectedEvent(event, "too old", NOON) for event in make_events(["one", "two"], Stream(uuid4(), {}))]
    RejectedFolder(spool_folder(store.id, store.config)).keep("live", rejected)
    inventory = import_module("composite_logstore.operations.inventory")
    monkeypatch.setattr(inventory, "registered", lambda: [LogStore(store.id, "logs", store.config)])
    yield
    release_all()


def run(text: str, name: str, **names: object) -> None:
    test = doctest.DocTestParser().get_doctest(text, names, name, None, 0)
    assert test.examples
    said: list[str] = []
    doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test, out=said.append)
    assert not said, "".join(said)


@pytest.mark.usefixtures("scene")
def test_the_examples_of_the_page_are_true() -> None:
    run(PAGE.read_text().replace("```", ""), "operations.md")


@pytest.mark.usefixtures("scene")
@pytest.mark.parametrize("name", sorted(PUBLIC.keys() - MOVING))
def test_the_example_of_each_operation_is_true(name: str) -> None:
    text = inspect.getdoc(PUBLIC[name]) or ""
    if name in ("promote", "verify"):
        operations.backfill("logs", "archive", "live")
    run(text, name, **vars(operations))


@pytest.mark.parametrize("name", sorted(MOVING))
def test_each_operation_on_a_move_has_an_example(name: str) -> None:
    assert doctest.DocTestParser().get_examples(inspect.getdoc(PUBLIC[name]) or "")


@pytest.mark.usefixtures("scene")
def test_progress_reports_runs_streams_and_events_and_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    told = []
    operations.backfill(
        "logs", "archive", "live", progress=lambda now: told.append((now.runs, now.runs_done, now.stream, now.events))
    )
    assert told[0] == (1, 0, "", 0)
    assert told[1] == (1, 0, "train-1 fit/step", 0)
    assert told[-1] == (1, 0, "train-1 fit/step", 3)
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("scene")
def test_a_promotion_that_is_not_confirmed_changes_nothing() -> None:
    asked: list[str] = []
    with pytest.raises(operations.PromotionRefusedError) as refusal:
        operations.promote("logs", "live", force=True, confirm=lambda question: bool(asked.append(question)))
    assert len(asked) == 1
    assert (refusal.value.promotion.primary, refusal.value.promotion.before) == ("archive", "archive")
    assert find_store("logs").config.primary == "archive"


@pytest.mark.usefixtures("scene")
def test_a_child_with_missing_events_is_not_promoted() -> None:
    with pytest.raises(operations.PromotionRefusedError, match=r"3 events missing.*'force'") as refusal:
        operations.promote("logs", "live")
    assert "--force" not in str(refusal.value)


@pytest.mark.usefixtures("scene")
@pytest.mark.parametrize(
    ("operation", "argument"),
    [
        (lambda: operations.check("lgos"), "store"),
        (lambda: operations.check("logs", ["x"]), "children"),
        (lambda: operations.verify("logs", Selection(run="x")), "run"),
        (lambda: operations.backfill("logs", "x", "live"), "source"),
        (lambda: operations.backfill("logs", "archive", "archive"), "target"),
        (lambda: operations.promote("logs", "x"), "child"),
        (lambda: operations.tail("train-1", step="x"), "step"),
        (lambda: operations.tail("train-1", store="x"), "store"),
        (lambda: operations.drain(["x"]), "stores"),
        (lambda: operations.drain(to="live"), "to"),
        (lambda: operations.list_rejected("x"), "store"),
        (lambda: operations.retry_rejected("logs", "x"), "child"),
        (lambda: operations.retry_rejected("logs", to="live"), "to"),
        (lambda: operations.retry_rejected("logs", "live", "x"), "to"),
        (lambda: operations.backfill("logs", "archive", "live", slices=3), "slices"),
        (lambda: operations.backfill("logs", "archive", "live", slices=0, pipeline=True), "slices"),
        (lambda: operations.backfill("logs", "archive", "live", slices=1001, pipeline=True), "slices"),
        (lambda: operations.backfill("logs", "archive", "live", rate=0), "rate"),
        (lambda: operations.find_move("prod", {"type": "artifact"}), "to"),
        (lambda: operations.find_move("prod", {"name": 3}), "to"),
        (lambda: operations.migrate(SimpleNamespace(), stop_after="swich"), "stop_after"),  # type: ignore[arg-type]
    ],
)
def test_the_error_of_a_wrong_argument_names_the_parameter(operation: Callable[[], object], argument: str) -> None:
    with pytest.raises(operations.ArgumentError) as refusal:
        operation()
    assert refusal.value.argument == argument


def test_each_public_name_exists() -> None:
    assert operations.__all__ == sorted(operations._HOMES)
    for name in operations.__all__:
        # An alias of a type has no name of its own.
        assert getattr(operations, name).__name__ in (name, "Callable")


def test_the_command_line_offers_all_stages_of_a_move() -> None:
    from composite_logstore.cli.migrate import _STAGES
    from composite_logstore.operations.migrate import STAGES

    assert [stage.name for stage in STAGES] == list(_STAGES)
