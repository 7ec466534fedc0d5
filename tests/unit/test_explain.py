"""What the rules of a child do to events, before they are switched on: `composite-logstore explain`."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from zenml.exceptions import ZenKeyError

from composite_logstore.event import ExceptionInfo, LogEvent, Stream
from composite_logstore.inert import inert
from composite_logstore.operations import ArgumentError, Explanation, NoAnswerError, explain
from composite_logstore.processing.known_secrets import KnownSecrets
from composite_logstore.testing import make_events
from tests.simulated_zenml import SimulatedZenML
from tests.unit.test_backfilling import archive, write
from tests.unit.test_inert import is_inert

EXPLAIN = import_module("composite_logstore.operations.explain")

KEY = "AKIAIOSFODNN7EXAMPLE"
PASSWORD = "sw0rdfish-of-the-sea"


def child(**settings: Any) -> list[dict[str, Any]]:
    return [{"name": "archive", "type": "artifact"}, {"name": "live", "type": "artifact", **settings}]


def of_lines(*lines: str, **settings: Any) -> Explanation:
    return explain("nowhere", "live", lines=lines, children=child(**settings))


def entry(message: str, **values: Any) -> str:
    return json.dumps({"message": message, "logger": "train", "level": "INFO", **values})


def counts(found: Explanation) -> dict[str, int]:
    return {one.rule: one.events for one in [found.sent, *found.withheld, *found.redacted]}


@pytest.fixture
def zenml(monkeypatch: pytest.MonkeyPatch) -> SimulatedZenML:
    return SimulatedZenML.take_place(monkeypatch)


class Run:
    """A run with two steps, whose events an archive holds."""

    def __init__(self, zenml: SimulatedZenML, root: Path) -> None:
        self.primary, live = archive("archive", root), archive("live", root).model_copy()
        self.zenml = zenml
        self.store = zenml.register(self.primary, live)
        self.run = zenml.begin_run("train-1")

    def step(self, name: str, *messages: str, **changes: Any) -> list[LogEvent]:
        logs = self.zenml.open_stream(self.zenml.begin_step(self.run, name), "step", self.store.id)
        events = make_events(messages, Stream(logs.id, {}), **changes)
        write(self.primary, events)
        return events

    def explain(self, **settings: Any) -> Explanation:
        return explain("logs", "live", run="train-1", children=child(**settings))


@pytest.fixture
def run(zenml: SimulatedZenML, tmp_path: Path) -> Run:
    return Run(zenml, tmp_path)


# Lines


def test_each_rule_tells_what_it_withholds_also_if_that_is_nothing() -> None:
    found = of_lines(
        "heartbeat 1",
        "epoch 1",
        entry("poll", logger="urllib3.pool"),
        entry("poll", logger="urllib3.pool", level="DEBUG"),
        entry("gone", level="ERROR"),
        min_level="INFO",
        drop=[{"logger": "urllib3.*"}, {"message": "^heartbeat"}, {"logger": "never"}],
        collapse_repeats={},
    )
    assert counts(found) == {
        "sent": 2,
        "min_level": 1,
        "drop.0": 1,
        "drop.1": 1,
        "drop.2": 0,
        "collapse_repeats": 0,
    }
    assert [one.rule for one in found.withheld] == ["min_level", "drop.0", "drop.1", "drop.2", "collapse_repeats"]
    assert found.sent.examples == ["epoch 1", "gone"]
    assert (found.events, round(found.saved_events, 2)) == (5, 0.6)
    assert 0.5 < found.saved_bytes < 0.7


def test_events_are_kept_sampled_and_collapsed() -> None:
    lines = [entry(f"step {number}") for number in range(1000)]
    found = of_lines(*lines, "other", sample={"ratio": 0.1}, keep=[{"logger": "train"}])
    assert found.withheld[0].rule == "keep"
    assert found.withheld[0].events == 1
    assert 50 < found.sent.events < 160
    assert sum(counts(found).values()) == 1001
    repeated = of_lines(*["retrying"] * 20, "done", collapse_repeats={"window_millis": 1000})
    assert counts(repeated) == {"sent": 2, "collapse_repeats": 19}
    apart = [entry("retrying", timestamp=f"2026-01-01T00:00:{second:02}Z") for second in range(20)]
    assert counts(of_lines(*apart, collapse_repeats={"window_millis": 5000})) == {"sent": 4, "collapse_repeats": 16}


def test_lines_of_logs_keep_step_source_level_and_time() -> None:
    lines = [entry("a", step="fit", source="step"), entry("a", step="load"), entry("a", source="client")]
    found = of_lines(*lines, drop=[{"step": "fit"}, {"source": "client"}, {"level": "INFO", "logger": "x"}])
    assert counts(found) == {"sent": 1, "drop.0": 1, "drop.1": 1, "drop.2": 0}
    assert counts(of_lines(entry("w", level="WARN"), drop=[{"logger": "train", "level": "INFO"}]))["sent"] == 1
    # Such lines are what a program prints.
    for text in ('{"message": 3, "logger": "x"}', '{"a": 1}', "{", "[1]", '{"message": "x"}', "{" * 5000):
        assert counts(of_lines(text, drop=[{"logger": "stdout"}])) == {"sent": 0, "drop.0": 1}
    for odd in ({"level": 7}, {"level": "LOUD"}, {"timestamp": "now"}, {"timestamp": 3}, {"step": []}, {"file": None}):
        assert of_lines(entry("x", **odd)).sent.events == 1
    assert of_lines("", " \n").events == 0


# What is masked


@pytest.mark.parametrize("settings", [{}, {"drop": [{"message": "."}]}, {"keep": [{"logger": "no"}]}])
def test_what_is_redacted_is_shown_nowhere(settings: dict[str, Any]) -> None:
    found = of_lines(
        f"id {KEY}",
        f"connect to mysql://etl:{PASSWORD}@db/x",
        f"{'far ' * 200}{KEY}{' away' * 200}",
        f"\x1b[31m{KEY[:9]}\x1b[0m{KEY[9:]}",
        "customer=anna and more",
        redact={"patterns": [{"name": "customer", "pattern": "customer=(?P<secret>\\w+)"}]},
        **settings,
    )
    shown = str(found)
    assert KEY[9:] not in shown
    assert PASSWORD not in shown
    assert "anna" not in shown
    assert "[redacted:aws_key]" in shown
    if not settings:
        assert counts(found) == {"sent": 5, "aws_key": 3, "url_password": 1, "customer": 1}
        # The part of a long message that was masked.
        assert all("[redacted:aws_key]" in example for example in found.redacted[0].examples)


def test_own_patterns_that_match_nothing_are_told() -> None:
    found = of_lines("x", redact={"formats": [], "patterns": [{"name": "iban", "pattern": "DE[0-9]{20}"}]})
    assert counts(found) == {"sent": 1, "iban": 0}


def test_a_key_in_the_settings_is_masked() -> None:
    children = [{"name": "live", "type": "datadog", "api_key": PASSWORD, "redact": {}}]
    found = explain("nowhere", "live", lines=[f"my {PASSWORD}"], children=children)
    assert PASSWORD not in str(found)
    assert counts(found) == {"sent": 1, "secret": 1}


def test_secrets_that_are_not_resolved_are_told() -> None:
    children = [{"name": "live", "type": "datadog", "api_key": "{{datadog.api_key}}", "redact": {}}]
    found = explain("nowhere", "live", lines=["x"], children=children)
    assert any("refer" in note for note in found.notes)


# What is not computed


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"budget": {"events": 1}}, "budget"),
        ({"progress": "latest"}, "progress"),
        ({"enabled": False}, "disabled"),
        ({"drop": [{"logger": "*"}]}, "drop.0"),
        ({"redact": {}}, "Secrets"),
    ],
)
def test_what_is_not_computed_is_told(settings: dict[str, Any], word: str) -> None:
    found = of_lines("a", "b", **settings)
    assert any(word in note for note in found.notes)
    if "budget" in settings:
        assert found.sent.events == 2


# A run


def test_the_events_of_a_run_are_read_from_the_primary(run: Run) -> None:
    run.step("load", "heartbeat", "loaded", f"key {KEY}")
    run.step("fit", "heartbeat", "epoch 1", levels=(logging.WARNING,))
    found = run.explain(
        drop=[{"message": "heartbeat", "level": "INFO"}, {"message": "^heart"}, {"source": "step", "level": "DEBUG"}],
        redact={},
    )
    assert counts(found) == {"sent": 3, "drop.0": 1, "drop.1": 1, "drop.2": 0, "aws_key": 1}
    assert found.is_whole


def test_the_registered_settings_are_the_default(zenml: SimulatedZenML, tmp_path: Path) -> None:
    run = Run(zenml, tmp_path)
    run.step("load", "a", "b")
    assert counts(explain("logs", "live", run="train-1")) == {"sent": 2}
    assert counts(explain("logs", "live", lines=["a"])) == {"sent": 1}


def test_exceptions_and_attributes_are_part_of_an_event(run: Run) -> None:
    run.step("fit", "failed", exception=ExceptionInfo("ValueError", f"bad key {KEY}", "Traceback"))
    run.step("load", "loaded", attributes={"key": KEY})
    found = run.explain(redact={})
    assert counts(found) == {"sent": 2, "aws_key": 2}
    assert KEY not in str(found)


def test_sampling_chooses_the_events_that_the_child_gets(run: Run) -> None:
    from composite_logstore.processing.sampling import Sampling
    from composite_logstore.processing.settings import SampleSettings

    events = run.step("fit", *map(str, range(200)))
    found = run.explain(sample={"ratio": 0.3})
    assert found.sent.events == sum(map(Sampling(SampleSettings(ratio=0.3)).wants, events))


def test_each_stream_of_a_large_run_gets_its_share(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EXPLAIN, "MOST_EVENTS", 30)
    run.step("load", *[f"load {number}" for number in range(100)])
    run.step("fit", "only one")
    run.step("test", *[f"test {number}" for number in range(100)])
    found = run.explain(drop=[{"message": "^load"}, {"message": "^only"}, {"message": "^test"}])
    assert counts(found) == {"sent": 0, "drop.0": 10, "drop.1": 1, "drop.2": 19}
    assert not found.is_whole


def test_a_sample_is_bounded_in_events_and_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    def lines() -> Iterator[str]:
        yield from ["x" * 1000] * 50
        raise AssertionError("it reads on")

    monkeypatch.setattr(EXPLAIN, "MOST_EVENTS", 20)
    found = explain("nowhere", "live", lines=lines(), children=child())
    assert (found.events, found.is_whole) == (20, False)
    monkeypatch.setattr(EXPLAIN, "MOST_BYTES", 5_000)
    found = explain("nowhere", "live", lines=lines(), children=child())
    assert (found.events, found.is_whole) == (4, False)


def test_a_primary_that_cannot_be_read_gives_no_answer(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from composite_logstore import UnavailableError

    run.step("fit", "a")

    def gone(*_: Any) -> Any:
        raise UnavailableError("the disk is gone")

    monkeypatch.setattr(EXPLAIN, "as_event", gone)
    with pytest.raises(NoAnswerError, match="disk is gone"):
        run.explain()


def test_while_zenml_cannot_be_asked_for_secrets_there_is_no_answer(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run.step("fit", "a")

    def unreached(*_: object) -> None:
        raise ConnectionError("connection refused")

    monkeypatch.setattr(KnownSecrets, "learn", unreached)
    with pytest.raises(NoAnswerError, match="connection refused"):
        run.explain(redact={})
    children = [{"name": "live", "type": "artifact", "redact": {}}]
    with pytest.raises(NoAnswerError, match="connection refused"):
        explain("logs", "live", lines=["a"], children=children)


# Arguments


@pytest.mark.usefixtures("zenml")
def test_wrong_arguments_are_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments, at_fault in [
        (({"run": "train-1", "lines": []}), "run"),
        (({}), "run"),
        (({"lines": [], "children": 7}), "children"),
        (({"lines": [], "children": [{"name": "live", "type": "artifact", "drop": [{}]}]}), "children"),
        (({"lines": [], "children": [{"name": "other", "type": "artifact"}]}), "child"),
        (({"run": "train-2"}), "run"),
    ]:
        with pytest.raises(ArgumentError) as raised:
            explain("logs", "live", **arguments)  # type: ignore[arg-type]
        assert raised.value.argument == at_fault
    for store, name, at_fault in [("lgos", "live", "store"), ("logs", "liev", "child")]:
        with pytest.raises(ArgumentError) as raised:
            explain(store, name, lines=[])
        assert raised.value.argument == at_fault


# The command


SETTINGS = child(drop=[{"message": "^heartbeat"}], redact={}, budget={"events": 5})


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "children.json"
    path.write_text(json.dumps(SETTINGS))
    return str(path)


def test_the_command_explains_lines_of_stdin(zenml: SimulatedZenML, file: str) -> None:
    lines = f"heartbeat {KEY}\n{'long ' * 100}\nkey {KEY}\n\x1b[2Jforged\x1b]0;x\x07\n"
    zenml.trouble = ZenKeyError("it is not asked")
    shown = zenml.run_command("explain", "soon", "live", "--children", file, input=lines)
    assert shown.exit_code == 0
    assert max(map(len, shown.stdout.splitlines()[:6])) <= 80
    assert is_inert(shown.output)
    assert KEY not in shown.output
    assert "drop.0" in shown.stdout
    assert "[redacted:aws_key]" in shown.stdout
    assert "4 events" in shown.stdout
    assert "25% of the events" in shown.stdout
    assert "'budget' is not computed" in shown.stdout
    asked = zenml.run_command("explain", "soon", "live", "--children", file, "--output", "json", input=lines)
    found = json.loads(asked.stdout)
    assert (found["events"], found["sent"]["events"], found["saved_events"]) == (4, 3, 0.25)
    assert found["withheld"][0]["rule"] == "drop.0"
    assert found["redacted"][0]["rule"] == "aws_key"
    assert KEY not in asked.output
    assert inert("\x1b") not in found["sent"]["examples"]


def test_the_command_explains_a_run(run: Run, file: str) -> None:
    run.step("fit", "heartbeat", "epoch 1")
    shown = run.zenml.run_command("explain", "logs", "live", "--run", "train-1", "--children", file)
    assert shown.exit_code == 0
    assert "drop.0" in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["live", "--children", "no such file"], 2),
        (["liev", "--children", "FILE"], 2),
        (["live", "--run", "x"], 2),
        (["live", "--children", "FILE"], 1),
    ],
)
@pytest.mark.usefixtures("run")
def test_the_exit_code_tells_why_there_is_nothing(
    zenml: SimulatedZenML, file: str, arguments: list[str], code: int
) -> None:
    given = [file if argument == "FILE" else argument for argument in arguments]
    shown = zenml.run_command("explain", "logs", *given, input="")
    assert shown.exit_code == code
    assert shown.stderr


def test_a_file_that_is_no_json_is_a_wrong_argument(zenml: SimulatedZenML, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("[{")
    shown = zenml.run_command("explain", "logs", "live", "--children", str(tmp_path / "bad.json"), input="x")
    assert shown.exit_code == 2
    assert "--children" in shown.stderr
