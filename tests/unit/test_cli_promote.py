"""`composite-logstore promote`."""

from __future__ import annotations

import json
from importlib import import_module

import pytest
from zenml.exceptions import IllegalOperationError

from composite_logstore.catalog.stores import RegisteredStore
from composite_logstore.operations.progress import Reporter
from composite_logstore.operations.promote import Verdict
from composite_logstore.parity.result import ChildParity, StreamParity
from composite_logstore.parity.summary import ParitySummary
from tests.simulated_zenml import SimulatedZenML
from tests.simulation import make_child

# The package has a function of this name.
PROMOTE = import_module("composite_logstore.operations.promote")


@pytest.fixture
def zenml(monkeypatch: pytest.MonkeyPatch) -> SimulatedZenML:
    zenml = SimulatedZenML.take_place(monkeypatch)
    children = make_child("archive"), make_child("live"), make_child("other"), make_child("off", enabled=False)
    zenml.register(*children, fetch_fallback=["other", "live"])
    return zenml


def say(monkeypatch: pytest.MonkeyPatch, verdict: Verdict) -> list[tuple[str, str]]:
    asked = []

    def judge(store: RegisteredStore, child: str, report: Reporter) -> Verdict:
        asked.append((store.name, child))
        return verdict

    monkeypatch.setattr(PROMOTE, "judge", judge)
    return asked


def test_a_child_that_was_verified_becomes_the_primary(zenml: SimulatedZenML, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = say(monkeypatch, Verdict(True, "child 'live' has all 12 events of child 'archive'"))
    result = zenml.run_command("promote", "logs", "live", input="y\n")
    assert result.exit_code == 0
    assert asked == [("logs", "live")]
    # They change places, so that no child is read twice.
    assert zenml.updates == [{"primary": "live", "fetch_fallback": ["other", "archive"]}]
    assert "Verified: child 'live' has all 12 events of child 'archive'." in result.stdout
    assert "Child 'live' is now the primary of log store 'logs'; it was 'archive'." in result.stdout
    assert "To go back: composite-logstore promote logs archive --force" in result.stdout
    back = zenml.run_command("promote", "logs", "archive", "--force", "--yes")
    assert back.exit_code == 0
    assert zenml.updates[1] == {"primary": "archive", "fetch_fallback": ["other", "live"]}


def test_a_child_with_missing_events_is_promoted_only_by_force(
    zenml: SimulatedZenML, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = say(monkeypatch, Verdict(False, "child 'live' lacks 3 events"))
    result = zenml.run_command("promote", "logs", "live", "--yes")
    assert result.exit_code == 1
    assert "not made the primary: child 'live' lacks 3 events." in result.stderr
    assert "--force" in result.stderr
    assert zenml.updates == []
    assert zenml.run_command("promote", "logs", "live", "--yes", "--force").exit_code == 0
    assert len(asked) == 1
    assert [update["primary"] for update in zenml.updates] == ["live"]


def test_a_child_that_could_not_be_compared_is_refused(zenml: SimulatedZenML, monkeypatch: pytest.MonkeyPatch) -> None:
    summary = ParitySummary("logs", ["archive", "live"])
    summary.add(StreamParity("", "first step", {"archive": ChildParity(), "live": ChildParity(error="it is away.")}))
    monkeypatch.setattr(PROMOTE, "compare_with_primary", lambda *_: summary)
    result = zenml.run_command("promote", "logs", "live", "--yes")
    assert result.exit_code == 1
    assert "not everything could be compared: child 'live', first step: it is away" in result.stderr
    assert zenml.updates == []


@pytest.mark.parametrize("answer", ["n\n", ""])
def test_promote_asks(zenml: SimulatedZenML, answer: str) -> None:
    result = zenml.run_command("promote", "logs", "live", "--force", input=answer)
    assert result.exit_code == 1
    assert "Read the logs of log store 'logs' from 'live' instead of 'archive'?" in result.stderr
    assert zenml.updates == []


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["lgos", "live"], 2, "there is no log store 'lgos' (did you mean 'logs'?)"),
        (["logs", "liv"], 2, "log store 'logs' has no child 'liv' (did you mean 'live'?)"),
        (["logs", "off"], 2, "child 'off' of log store 'logs' is disabled; enable it"),
        (["logs", "archive"], 0, "Child 'archive' is already the primary of log store 'logs'."),
    ],
)
def test_arguments_that_change_nothing(zenml: SimulatedZenML, arguments: list[str], code: int, words: str) -> None:
    result = zenml.run_command("promote", *arguments, "--force", "--yes")
    assert result.exit_code == code
    assert words in result.output
    assert zenml.updates == []


def test_a_child_that_cannot_be_read_is_refused_with_the_reason(
    zenml: SimulatedZenML, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(make_child("live")), "readable", False)
    result = zenml.run_command("promote", "logs", "live", "--force", "--yes")
    assert result.exit_code == 2
    assert "child 'live' of log store 'logs': children of type 'simulated' cannot be read" in result.stderr


def test_promote_warns_of_events_that_the_child_filters_out(zenml: SimulatedZenML) -> None:
    zenml.register(make_child("a"), make_child("b", min_level="WARNING"), name="thin")
    result = zenml.run_command("promote", "thin", "b", "--force", "--yes")
    assert result.exit_code == 0
    assert "'min_level' or 'progress' of child 'b'" in result.stderr


def test_without_permission_promote_reports_no_success(zenml: SimulatedZenML, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise IllegalOperationError("no")

    monkeypatch.setattr(zenml, "update_stack_component", refuse)
    result = zenml.run_command("promote", "logs", "live", "--force", "--yes")
    assert result.exit_code == 3
    assert "update log store 'logs'" in result.stderr
    assert "the primary" not in result.output


def test_the_primary_is_read_back_from_zenml(zenml: SimulatedZenML, monkeypatch: pytest.MonkeyPatch) -> None:
    # As if somebody else had made it the primary again at once.
    monkeypatch.setattr(zenml, "update_stack_component", lambda *_, **__: None)
    done = json.loads(zenml.run_command("promote", "logs", "live", "--output", "json", "--force", "-y").stdout)
    assert (done["before"], done["primary"], done["to_go_back"]) == ("archive", "archive", None)


def test_json_contains_the_verdict(zenml: SimulatedZenML, monkeypatch: pytest.MonkeyPatch) -> None:
    say(monkeypatch, Verdict(False, "child 'live' lacks 3 events"))
    refused = zenml.run_command("promote", "logs", "live", "--output", "json")
    assert json.loads(refused.stdout)["verdict"] == {"may": False, "reason": "child 'live' lacks 3 events"}
    done = json.loads(zenml.run_command("promote", "logs", "live", "--output", "json", "--force", "-y").stdout)
    assert (done["before"], done["primary"]) == ("archive", "live")
    assert done["to_go_back"] == "composite-logstore promote logs archive --force"
