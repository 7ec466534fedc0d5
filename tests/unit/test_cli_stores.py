"""The catalog: log stores, runs and streams in ZenML, and the errors if they are not found."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from uuid import UUID, uuid4

import pytest
from click.testing import CliRunner
from zenml.exceptions import CredentialsNotValid

from composite_logstore import CompositeLogStoreConfig
from composite_logstore.catalog.errors import ArgumentError, NoAnswerError
from composite_logstore.catalog.runs import count_runs, find_run, streams_of_project, streams_of_run
from composite_logstore.catalog.stores import find_store
from composite_logstore.cli.console import Command
from tests.simulated_zenml import SimulatedZenML
from tests.simulation import make_child


@pytest.fixture
def zenml(monkeypatch: pytest.MonkeyPatch) -> SimulatedZenML:
    return SimulatedZenML.take_place(monkeypatch)


def test_a_log_store_is_found_by_its_name_and_by_its_id(zenml: SimulatedZenML) -> None:
    for number in range(5):
        zenml.register_other(f"stock-{number}", "artifact")
    store = zenml.register(make_child("a"))
    assert find_store("logs").store is find_store(str(store.id)).store is store


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("lgos", "there is no log store 'lgos' (did you mean 'logs'?)"),
        ("zzz", "there is no log store 'zzz'; there are: logs. ZenML uses its local configuration"),
        ("stock", "log store 'stock' is of flavor 'datadog'; name one of flavor 'composite'"),
    ],
)
def test_an_unknown_log_store_is_refused(zenml: SimulatedZenML, name: str, words: str) -> None:
    zenml.register(make_child("a"))
    zenml.register_other("stock", "datadog")
    with pytest.raises(ArgumentError) as refusal:
        find_store(name)
    assert words in str(refusal.value)


def test_settings_that_cannot_be_read_are_named_without_their_values(zenml: SimulatedZenML) -> None:
    child = {"name": "a", "type": "artifact", "from_a_later_version": "a secret"}
    id = zenml.register_other("logs", "composite")
    zenml._component(id).build = lambda: CompositeLogStoreConfig(primary="a", children=[child])  # type: ignore[list-item]
    with pytest.raises(NoAnswerError) as refusal:
        find_store("logs")
    assert "child 'a': unknown key 'from_a_later_version'" in str(refusal.value)
    assert "a secret" not in str(refusal.value)


def test_an_unknown_child_is_named_with_the_nearest(zenml: SimulatedZenML) -> None:
    zenml.register(make_child("archive"), make_child("live"))
    found = find_store("logs")
    assert found.child("live").name == "live"
    with pytest.raises(ArgumentError, match=r"no child 'archiv' .did you mean 'archive'"):
        found.child("archiv")
    with pytest.raises(ArgumentError, match="no child 'x'; there are: archive, live"):
        found.child("x")


@pytest.mark.parametrize(
    ("trouble", "words"),
    [
        (CredentialsNotValid("Bearer a secret"), "log in with `zenml login`"),
        (ConnectionError("http://user:a secret@host"), r"ZenML cannot be reached \(ConnectionError\); `zenml status`"),
    ],
)
def test_without_zenml_there_is_no_answer(zenml: SimulatedZenML, trouble: Exception, words: str) -> None:
    run = zenml.begin_run("run")
    zenml.trouble = trouble
    for question in (
        lambda: find_store("logs"),
        lambda: find_run("run"),
        lambda: list(streams_of_run(run)),
        lambda: list(streams_of_project()),
        count_runs,
    ):
        with pytest.raises(NoAnswerError, match=words) as refusal:
            question()
        assert "secret" not in str(refusal.value)
        command = Command("command", callback=question)
        assert CliRunner().invoke(command).exit_code == 3


def test_a_run_is_found_or_the_nearest_is_named(zenml: SimulatedZenML) -> None:
    for name in ("train-1", "twice", "twice"):
        zenml.begin_run(name)
    run = zenml.runs[0]
    assert find_run("train-1") is find_run(str(run.id)) is run
    for name, words in (
        ("train-2", "no run 'train-2' .did you mean 'train-1'"),
        ("zzz", "no run 'zzz'; `zenml pipeline runs list`"),
        ("twice", "more than one run 'twice'; give the run's id"),
    ):
        with pytest.raises(ArgumentError, match=words):
            find_run(name)


def test_the_streams_of_a_run_are_its_own_and_those_of_its_steps(zenml: SimulatedZenML) -> None:
    id = uuid4()
    run = zenml.begin_run("run", in_progress=True)
    zenml.open_stream(run, "client", id)
    # A retried step.
    for name in ("load", "train", "train", *(f"map_{number}" for number in range(5))):
        step = zenml.begin_step(run, name)
        zenml.open_stream(step, "step", id)
    zenml.open_stream(step, "hook", id)

    def labels(*how: object) -> list[str]:
        return [stream.label for stream in streams_of_run(run, *how)]  # type: ignore[arg-type]

    maps = [f"map_{number}/step" for number in range(5)]
    assert labels() == ["client", "load/step", "train/step", "train/step", *maps, "map_4/hook"]
    assert labels("train") == ["train/step"] * 2
    assert labels(None, "client") == ["client"]
    streams = list(streams_of_run(run))
    assert {(stream.run_id, stream.run_name, stream.run_in_progress) for stream in streams} == {(run.id, "run", True)}


def test_runs_are_read_page_by_page(zenml: SimulatedZenML) -> None:
    id = uuid4()
    for number in range(10):
        run = zenml.begin_run(f"run-{number}")
        zenml.open_stream(run, "client", id)
        zenml.open_stream(zenml.begin_step(run, "train"), "step", id)
    streams = streams_of_project()
    first = [next(streams) for _ in range(3)]
    assert [stream.run_name for stream in first] == ["run-0", "run-1", "run-2"]
    # Only the pages that are needed were asked for.
    assert zenml.asked == ["list_pipeline_runs"]
    late = zenml.begin_run("late")
    zenml.open_stream(late, "client", id)
    names = [(stream.run_name, stream.label) for stream in (*first, *streams)]
    expected = {(f"run-{number}", label) for number in range(10) for label in ("client", "train/step")}
    assert len(names) == len(set(names))
    assert set(names) == expected | {("late", "client")}
    assert count_runs() == 11


def test_a_range_of_time_selects_the_runs_that_were_active_in_it(zenml: SimulatedZenML) -> None:
    begin = zenml.now.astimezone(timezone(timedelta(hours=5)))
    id = uuid4()
    for name, how in (
        ("before", {}),
        ("reaches into it", {"minutes": 90}),
        ("still runs", {"in_progress": True}),
        ("in it", {}),
        ("after", {}),
    ):
        zenml.open_stream(zenml.begin_run(name, **how), "client", id)  # type: ignore[arg-type]

    def names(since: datetime | None, until: datetime | None) -> set[str]:
        streams = [stream.run_name for stream in streams_of_project(since, until)]
        assert len(streams) == len(set(streams)) == count_runs(since, until)
        return set(streams)

    since, until = begin + timedelta(hours=3, minutes=10), begin + timedelta(hours=4, minutes=30)
    assert names(since, until) == {"reaches into it", "still runs", "in it"}
    assert names(None, begin + timedelta(hours=2, minutes=30)) == {"before", "reaches into it"}
    assert names(since, None) == {"reaches into it", "still runs", "in it", "after"}


def test_a_run_that_ends_meanwhile_is_found_once(zenml: SimulatedZenML) -> None:
    id = UUID(int=5)
    run = zenml.begin_run("run", in_progress=True)
    zenml.open_stream(run, "client", id)
    since = zenml.now + timedelta(minutes=30)
    streams = streams_of_project(since)
    found = [next(streams).run_name]
    run.in_progress, run.updated = False, (since + timedelta(minutes=1)).replace(tzinfo=None)
    assert found + [stream.run_name for stream in streams] == ["run"]
