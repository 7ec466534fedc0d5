"""`composite-logstore check`, in simulated time, with backends that fail in every way."""

from __future__ import annotations

import json
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from click.testing import Result

from composite_logstore.backend import RejectedError, UnavailableError
from composite_logstore.event import LogEvent
from composite_logstore.operations.check import FIND_SECONDS
from composite_logstore.testing import SimulatedBackend, SimulatedChildConfig, SimulatedClock
from tests.simulated_zenml import SimulatedZenML
from tests.simulation import make_child


@pytest.fixture
def zenml(monkeypatch: pytest.MonkeyPatch, clock: SimulatedClock) -> SimulatedZenML:
    return SimulatedZenML.take_place(monkeypatch)


def backend(name: str) -> SimulatedBackend:
    return SimulatedChildConfig.backends[name]


def findings(result: Result, child: str) -> dict[str, dict[str, Any]]:
    """Return the findings about a child by step."""
    children = {one["name"]: one for one in json.loads(result.stdout)["children"]}
    return {finding["what"]: finding for finding in children[child]["findings"]}


def test_each_healthy_child_gets_one_test_event_in_a_stream_of_no_run(zenml: SimulatedZenML) -> None:
    store = zenml.register(make_child("a"), make_child("b"))
    result = zenml.run_command("check", "logs")
    assert result.exit_code == 0
    assert "Log store 'logs': all children work." in result.stdout
    zenml.run_command("check", "logs")
    events: list[LogEvent] = [*backend("a").received, *backend("b").received]
    assert len(events) == 4
    assert len({event.uid for event in events}) == 4
    assert len({event.stream.id for event in events}) == 1
    assert {event.stream.attributes["zenml.log_store.id"] for event in events} == {str(store.id)}
    assert events[0].stream.id not in {store.id}
    assert (backend("a").closed, len(backend("a").ended)) == (2, 2)
    assert not {"create_logs", "update_stack_component"} & set(zenml.asked)


@pytest.mark.parametrize(
    ("fault", "message", "advice"),
    [
        ("refused", "connection refused", "check that it runs and that this machine can reach it"),
        ("unavailable", "the key is wrong", ""),
        (UnavailableError("the bucket is gone; make it"), "the bucket is gone", "make it"),
        (RejectedError("bad request"), "bad request", "look into the backend's own logs"),
        ("defect", "it fails with TypeError", "report it as a bug"),
    ],
)
def test_a_problem_of_one_child_is_named_and_the_others_are_checked(
    zenml: SimulatedZenML, fault: Any, message: str, advice: str
) -> None:
    zenml.register(make_child("a"), make_child("b"))
    backend("a").fault = fault
    result = zenml.run_command("check", "logs", "--output", "json")
    assert result.exit_code == 1
    found = findings(result, "a")
    assert (found["write"]["result"], found["write"]["message"], found["write"]["advice"]) == (
        "problem",
        message,
        advice,
    )
    # Later steps are not tried.
    assert "read" not in found
    assert {finding["result"] for finding in findings(result, "b").values()} == {"ok", "unknown"}
    assert backend("a").closed == 1
    text = zenml.run_command("check", "logs").stdout
    assert f"a, write: {message}." in text
    assert (f"What to do: {advice}." in text) is bool(advice)
    assert "Log store 'logs': 1 of 2 children does not work: a." in text


def test_a_backend_that_never_answers_delays_no_other(zenml: SimulatedZenML, clock: SimulatedClock) -> None:
    zenml.register(make_child("a", export_timeout_millis=7_000), make_child("b"))
    backend("a").fault = "silent"
    begin = clock.now()
    result = zenml.run_command("check", "logs", "--output", "json")
    assert result.exit_code == 1
    assert findings(result, "a")["write"]["message"] == "it has not returned and cannot be interrupted"
    assert findings(result, "b")["write"]["result"] == "ok"
    assert clock.now() - begin < 60


class Shy(SimulatedBackend):
    """Finds its events only after a while, or never."""

    def __init__(self, clock: SimulatedClock, seconds: float) -> None:
        super().__init__()
        self.clock = clock
        self.seconds = seconds
        self.hidden: list[tuple[float, LogEvent]] = []

    def export(self, batch: Any) -> int:
        self.hidden += [(self.clock.now() + self.seconds, event) for event in batch]
        return 0

    @property
    def received(self) -> list[LogEvent]:  # type: ignore[override]
        return [event for time, event in self.hidden if time <= self.clock.now()]

    @received.setter
    def received(self, events: list[LogEvent]) -> None:
        """Create an empty one."""


@pytest.mark.parametrize(("seconds", "works"), [(20, True), (FIND_SECONDS + 5, False)])
def test_the_backend_may_find_the_event_after_a_while(
    zenml: SimulatedZenML, clock: SimulatedClock, seconds: float, works: bool
) -> None:
    zenml.register(make_child("a", Shy(clock, seconds)))
    result = zenml.run_command("check", "logs", "--output", "json")
    read = findings(result, "a")["read"]
    assert (result.exit_code, read["result"]) == ((0, "ok") if works else (1, "problem"))
    if works:
        assert seconds <= read["seconds"] <= seconds + 1
    else:
        assert "not found within 60 s" in read["message"]


def test_a_child_whose_reader_fails_is_still_written_to(zenml: SimulatedZenML, monkeypatch: pytest.MonkeyPatch) -> None:
    zenml.register(make_child("a"))

    def refuse(_: Any) -> None:
        raise UnavailableError("the application key is wrong; correct it")

    monkeypatch.setattr(SimulatedChildConfig, "create_reader", refuse)
    result = zenml.run_command("check", "logs", "--output", "json")
    assert result.exit_code == 1
    found = findings(result, "a")
    assert (found["write"]["result"], found["read"]["result"]) == ("ok", "problem")
    assert (found["read"]["message"], found["read"]["advice"]) == ("the application key is wrong", "correct it")


def test_a_child_without_a_reader_is_only_written_to(zenml: SimulatedZenML, monkeypatch: pytest.MonkeyPatch) -> None:
    zenml.register(make_child("a"))
    monkeypatch.setattr(SimulatedChildConfig, "readable", False)
    result = zenml.run_command("check", "logs", "--output", "json")
    assert result.exit_code == 0
    assert findings(result, "a")["read"]["result"] == "unknown"
    assert "cannot be read" in findings(result, "a")["read"]["message"]


@pytest.mark.parametrize("fix", [False, True])
def test_what_a_backend_lacks_is_named_and_made_if_wanted(
    zenml: SimulatedZenML, monkeypatch: pytest.MonkeyPatch, fix: bool
) -> None:
    made: list[str] = []
    monkeypatch.setattr(SimulatedChildConfig, "unprepared", lambda self: "the template is missing")
    monkeypatch.setattr(SimulatedChildConfig, "prepare", lambda self: made.append(self.name) or "made the template")
    zenml.register(make_child("a"))
    options = ["--fix"] if fix else []
    result = zenml.run_command("check", "logs", *options)
    assert result.exit_code == 0
    assert ("made the template" if fix else "the template is missing") in result.stdout
    assert ("--fix" in result.stdout) is not fix
    assert made == ["a"] * fix
    assert len(backend("a").received) == 1


def test_what_cannot_be_made_is_no_problem_as_long_as_events_arrive(
    zenml: SimulatedZenML, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepare(self: Any) -> str:
        raise UnavailableError("it may not be made; ask an administrator")

    monkeypatch.setattr(SimulatedChildConfig, "unprepared", lambda self: "the template is missing")
    monkeypatch.setattr(SimulatedChildConfig, "prepare", prepare)
    zenml.register(make_child("a"))
    result = zenml.run_command("check", "logs", "--fix")
    assert result.exit_code == 0
    assert "ask an administrator" in result.stdout


def test_a_backend_that_cannot_be_asked_what_it_lacks_is_written_to(
    zenml: SimulatedZenML, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(self: Any) -> str:
        raise UnavailableError("no answer; check 'url'")

    monkeypatch.setattr(SimulatedChildConfig, "unprepared", ask)
    zenml.register(make_child("a"))
    assert zenml.run_command("check", "logs").exit_code == 0
    assert len(backend("a").received) == 1


@pytest.mark.parametrize(
    ("seconds", "result", "words"),
    [
        (0, "ok", "0 s"),
        (90, "warning", "the backend's clock is 90 s ahead of this machine's"),
        (-4000, "warning", "the backend's clock is 4,000 s behind this machine's"),
    ],
)
def test_clocks_are_compared(
    zenml: SimulatedZenML, monkeypatch: pytest.MonkeyPatch, seconds: float, result: str, words: str
) -> None:
    zenml.register(make_child("a"))

    def tell(_: Any) -> datetime:
        return datetime.now(timezone.utc) + timedelta(seconds=seconds - 0.5)

    monkeypatch.setattr(SimulatedChildConfig, "backend_time", tell)
    said = zenml.run_command("check", "logs", "--output", "json")
    # Events are not lost.
    assert said.exit_code == 0
    assert findings(said, "a")["clock"]["result"] == result
    assert words in findings(said, "a")["clock"]["message"]


def test_a_backend_that_is_not_installed_is_named(zenml: SimulatedZenML) -> None:
    zenml.register(make_child("a"), {"name": "b", "type": "not-here"})  # type: ignore[arg-type]
    result = zenml.run_command("check", "logs", "--output", "json")
    assert result.exit_code == 1
    settings = findings(result, "b")["settings"]
    assert (settings["result"], list(findings(result, "b"))) == ("problem", ["settings"])
    assert "there is no backend 'not-here' here" in settings["message"]


def test_a_missing_secret_is_named_and_a_key_in_clear_text_is_not_repeated(zenml: SimulatedZenML) -> None:
    keys = {"api_key": "0123456789clear", "application_key": "{{datadog.missing}}"}
    zenml.register(make_child("a"), {"name": "live", "type": "datadog", **keys})  # type: ignore[arg-type]
    zenml.get_secret_by_name_and_private_status = lambda name: (_ for _ in ()).throw(KeyError(name))  # type: ignore[attr-defined]
    result = zenml.run_command("check", "logs", "--output", "json")
    found = findings(result, "live")
    assert found["settings"]["result"] == "warning"
    assert "'api_key': written in clear text" in found["settings"]["message"]
    assert (found["secrets"]["result"], found["secrets"]["advice"]) == ("problem", "create it")
    assert "0123456789clear" not in result.output


def test_a_disabled_child_is_checked_if_it_is_named(zenml: SimulatedZenML) -> None:
    zenml.register(make_child("a"), make_child("off", enabled=False))
    assert zenml.run_command("check", "logs").exit_code == 0
    assert backend("off").received == []
    assert zenml.run_command("check", "logs", "--child", "off").exit_code == 0
    assert (len(backend("off").received), len(backend("a").received)) == (1, 1)


def test_an_unusable_spool_is_reported(zenml: SimulatedZenML, tmp_path: Any) -> None:
    (tmp_path / "file").touch()
    for durability, code in (("spill", 0), ("write_ahead", 1)):
        directory = str(tmp_path / "file" / "spool")
        zenml.register(make_child("a"), name=durability, durability=durability, spool_directory=directory)
        result = zenml.run_command("check", durability)
        assert result.exit_code == code
        assert "set 'spool_directory' to a folder that can be written and locked" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["lgos"], 2, "there is no log store 'lgos' (did you mean 'logs'?)"),
        (["logs", "--child", "b"], 2, "log store 'logs' has no child 'b'; there are: a"),
    ],
)
def test_wrong_usage(zenml: SimulatedZenML, arguments: list[str], code: int, words: str) -> None:
    zenml.register(make_child("a"))
    result = zenml.run_command("check", *arguments)
    assert (result.exit_code, words in result.stderr) == (code, True)
    assert backend("a").received == []


def test_without_zenml_there_is_no_answer(zenml: SimulatedZenML) -> None:
    zenml.trouble = ConnectionError()
    assert zenml.run_command("check", "logs").exit_code == 3
