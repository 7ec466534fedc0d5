"""`composite-logstore promote`."""

from __future__ import annotations

import json
import shlex
import threading
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from zenml.exceptions import IllegalOperationError

from composite_logstore import UnavailableError, operations
from composite_logstore.catalog.stores import RegisteredStore
from composite_logstore.clock import Clock
from composite_logstore.delivery.budgets import Budgets
from composite_logstore.event import Stream
from composite_logstore.operations import asking
from composite_logstore.operations.progress import Reporter
from composite_logstore.operations.promote import Verdict
from composite_logstore.parity.result import ChildParity, StreamParity
from composite_logstore.parity.summary import ParitySummary
from composite_logstore.processing.processor import Processed
from composite_logstore.testing import SimulatedBackend, SimulatedChildConfig, make_events
from tests.artifact_stores import FolderArchive
from tests.simulated_zenml import SimulatedZenML
from tests.simulation import make_child
from tests.unit.test_backfilling import write

# The package has functions of these names.
VERIFY = import_module("composite_logstore.operations.verify")
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
    assert "of child 'b' excludes" in result.stderr


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


# What a rule excludes


def log(zenml: SimulatedZenML, store: Any, *, levels: list[int], runs: int = 1, **settings: Any) -> None:
    """Begin runs, and give each child the events that it wants, as a delivery does."""
    for number in range(runs):
        stream = Stream(zenml.open_stream(zenml.begin_run(f"run-{number}"), "client", store.id).id, {})
        events = make_events([f"event {place}" for place in range(len(levels))], stream, levels=levels, **settings)
        for child in store.config.children:
            backend(child.name).received += [event for event in events if child.wants(event.level, event.progress)]


def backend(name: str) -> SimulatedBackend:
    return SimulatedChildConfig.backends[name]


@pytest.fixture
def thin(zenml: SimulatedZenML) -> Any:
    """A log store with a child that gets 1 of 164 events."""
    store = zenml.register(make_child("all"), make_child("errors", min_level="ERROR"), name="thin log store")
    log(zenml, store, levels=[20] * 163 + [40])
    return store


@pytest.mark.usefixtures("thin")
def test_verify_counts_what_a_rule_excludes_and_calls_it_no_difference(zenml: SimulatedZenML) -> None:
    shown = zenml.run_command("verify", "thin log store", "--all")
    assert shown.exit_code == 0
    header, _, all_events, errors = shown.stdout.splitlines()[:4]
    assert "EXCLUDED BY RULE" in header
    assert all_events.split() == ["all", "1", "164", "0", "0", "0", "0", "0", "0"]
    assert errors.split() == ["errors", "1", "1", "0", "0", "163", "0", "0", "0"]
    values = json.loads(zenml.run_command("verify", "thin log store", "--all", "--output", "json").stdout)
    assert {name: child["excluded"] for name, child in values["children"].items()} == {"all": 0, "errors": 163}


@pytest.mark.usefixtures("thin")
@pytest.mark.parametrize("options", [[], ["--dry-run"]])
def test_a_child_whose_rule_excludes_events_is_promoted_only_by_force(
    zenml: SimulatedZenML, options: list[str]
) -> None:
    refused = zenml.run_command("promote", "thin log store", "errors", "--yes", *options)
    assert refused.exit_code == 1
    assert "163 of 164 events will not be visible: 'min_level' of child 'errors'" in refused.stderr
    assert zenml.updates == []
    # The command that does it, as a shell takes it.
    anyway = shlex.split(refused.stderr.splitlines()[-1])
    assert anyway == ["composite-logstore", "promote", "thin log store", "errors", "--force"]
    assert zenml.run_command(*anyway[1:], "--yes").exit_code == 0
    assert zenml.updates == [{"primary": "errors"}]


def test_updates_of_progress_bars_that_a_child_does_not_get_are_excluded(zenml: SimulatedZenML, tmp_path: Path) -> None:
    every, calm = (
        FolderArchive(name=name, type="artifact", root=str(tmp_path / name), progress=progress)
        for name, progress in (("all", "all"), ("calm", "latest"))
    )
    store = zenml.register(every, calm, name="bars")
    stream = Stream(zenml.open_stream(zenml.begin_run("run"), "client", store.id).id, {})
    updates = make_events(["\r50%"] * 10, stream, progress=True)
    events = [event._replace(logger_name="stdout", file="", line=0) for event in updates]
    write(every, events)
    write(calm, events[4:6])
    values = json.loads(zenml.run_command("verify", "bars", "--all", "--output", "json").stdout)
    assert values["children"]["calm"]["excluded"] == 8
    assert values["children"]["calm"]["missing"] == 0
    refused = zenml.run_command("promote", "bars", "calm", "--yes")
    assert "8 of 10 events will not be visible: 'progress' of child 'calm'" in refused.stderr


def test_a_rule_that_has_excluded_nothing_so_far_is_named_and_allowed(zenml: SimulatedZenML) -> None:
    store = zenml.register(make_child("all"), make_child("errors", min_level="ERROR"), name="thin")
    log(zenml, store, levels=[40, 50])
    done = zenml.run_command("promote", "thin", "errors", "--yes")
    assert done.exit_code == 0
    assert "'min_level' of child 'errors' excludes" in done.stderr


@pytest.mark.parametrize("rule", [{"drop": [{"source": "cli*", "level": "INFO"}]}, {"keep": [{"level": "ERROR"}]}])
def test_what_rules_exclude_is_no_difference_but_would_not_be_visible(zenml: SimulatedZenML, rule: Any) -> None:
    store = zenml.register(make_child("all"), make_child("some", **rule), name="ruled")
    log(zenml, store, levels=[20] * 8 + [40])
    backend("some").received = [event for event in backend("some").received if event.level == 40]
    values = json.loads(zenml.run_command("verify", "ruled", "--all", "--output", "json").stdout)
    assert values["parity"]
    assert {name: child["excluded"] for name, child in values["children"].items()} == {"all": 0, "some": 8}
    refused = zenml.run_command("promote", "ruled", "some", "--yes")
    assert refused.exit_code == 1
    assert f"8 of 9 events will not be visible: '{next(iter(rule))}' of child 'some'" in refused.stderr
    assert zenml.updates == []


def test_verify_tells_events_over_a_budget_from_others_that_are_missing(zenml: SimulatedZenML) -> None:
    store = zenml.register(make_child("all"), make_child("some", budget={"events": 1}), name="budgeted")
    log(zenml, store, levels=[20] * 3)
    some = backend("some").received
    child = store.config.child("some")
    budget = Budgets(store.id, [child], None, Clock()).of(child)
    assert budget is not None
    batch = Processed(some[:])
    budget.process(batch)
    some[:] = batch.events
    # The second one is replaced by a notice.
    assert len(some) == 2
    verified = zenml.run_command("verify", "budgeted", "--all", "--output", "json")
    values = json.loads(verified.stdout)
    assert verified.exit_code == 4
    assert not values["parity"]
    counts = values["children"]["some"]
    assert (counts["missing"], counts["over_budget"], counts["excluded"], values["over_budget"]) == (1, 1, 1, 1)
    assert [hint for hint in values["hints"] if "'budget'" in hint]
    assert "OVER" in zenml.run_command("verify", "budgeted", "--all").stdout
    refused = zenml.run_command("promote", "budgeted", "some", "--yes")
    assert refused.exit_code == 1
    assert "1 of 3 events will not be visible: 'budget' of child 'some'" in refused.stderr
    assert "1 event missing, of which 1 may have been over 'budget'" in refused.stderr
    del some[1:]
    assert zenml.run_command("verify", "budgeted", "--all").exit_code == 1


# A primary that is down


@pytest.mark.parametrize("options", [[], ["--dry-run"]])
def test_while_the_primary_is_down_promote_fails_at_once_and_prints_the_command(
    zenml: SimulatedZenML, options: list[str]
) -> None:
    store = zenml.register(make_child("archive"), make_child("live"), name="two", primary="live")
    log(zenml, store, levels=[20], runs=12)
    backend("live").fault = "refused"
    begin = time.monotonic()
    refused = zenml.run_command("promote", "two", "archive", "--yes", *options)
    # A single retry would wait for half a second.
    assert time.monotonic() - begin < 0.4
    assert refused.exit_code == 1
    assert "child 'live', run-0 client: the backend cannot be reached: refused" in refused.stderr
    anyway = shlex.split(refused.stderr.splitlines()[-1])
    assert anyway == ["composite-logstore", "promote", "two", "archive", "--force"]
    assert zenml.updates == []
    assert zenml.run_command(*anyway[1:], "--yes").exit_code == 0
    assert zenml.updates == [{"primary": "archive"}]


def test_a_primary_that_hangs_gets_a_bounded_time(zenml: SimulatedZenML, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "ANSWER_SECONDS", 0.1)
    store = zenml.register(make_child("archive"), make_child("live"), name="two", primary="live")
    log(zenml, store, levels=[20])
    over = threading.Event()
    create_reader = SimulatedChildConfig.create_reader

    def create(config: SimulatedChildConfig) -> Any:
        if config.name == "live":
            over.wait(60)
        return create_reader(config)

    monkeypatch.setattr(SimulatedChildConfig, "create_reader", create)
    refused = zenml.run_command("promote", "two", "archive", "--yes")
    over.set()
    assert refused.exit_code == 1
    assert "child 'live', run-0 client: it has not answered within 0.1 s" in refused.stderr


def test_a_primary_whose_secret_is_gone_is_no_dead_end(zenml: SimulatedZenML, monkeypatch: pytest.MonkeyPatch) -> None:
    store = zenml.register(make_child("archive"), make_child("live"), name="two", primary="live")
    log(zenml, store, levels=[20])

    def refuse(config: Any) -> Any:
        if config.name == "live":
            raise UnavailableError("secret 'dd' does not exist; create it")
        return backend(config.name)

    monkeypatch.setattr(SimulatedChildConfig, "create_reader", refuse)
    refused = zenml.run_command("promote", "two", "archive", "--yes")
    assert refused.exit_code == 1
    assert "secret 'dd' does not exist" in refused.stderr
    assert "composite-logstore promote two archive --force" in refused.stderr


def test_a_primary_that_goes_away_meanwhile_ends_the_comparison(
    zenml: SimulatedZenML, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared = 0
    store = zenml.register(make_child("archive"), make_child("live"), name="two", primary="live")
    log(zenml, store, levels=[20], runs=5)

    def compare(self: Any, stream: Any) -> StreamParity:
        nonlocal compared
        compared += 1
        error = "it is away" if compared == 2 else ""
        return StreamParity("", stream.label, {"archive": ChildParity(), "live": ChildParity(error=error)})

    monkeypatch.setattr(VERIFY.Comparison, "compare", compare)
    assert zenml.run_command("promote", "two", "archive", "--yes").exit_code == 1
    assert compared == 2


# --dry-run


def test_a_dry_run_makes_all_checks_asks_nothing_and_changes_nothing(zenml: SimulatedZenML) -> None:
    done = zenml.run_command("promote", "logs", "live", "--dry-run")
    assert done.exit_code == 0
    assert "Child 'live' would become the primary of log store 'logs'; it is 'archive'." in done.stdout
    assert "nothing has changed" in done.stdout
    assert zenml.updates == []
    values = json.loads(zenml.run_command("promote", "logs", "live", "--dry-run", "--output", "json").stdout)
    assert (values["dry_run"], values["primary"], values["before"]) == (True, "live", "archive")
    assert values["verdict"]["may"]
    assert zenml.run_command("promote", "logs", "off", "--dry-run").exit_code == 2


def test_a_dry_run_finds_settings_that_zenml_would_refuse(zenml: SimulatedZenML) -> None:
    zenml.register(make_child("a"), make_child("b"), name="served")
    store = zenml.models[-1].store
    store._config = store.config.model_copy(update={"serve_from_artifact_store": True})
    refused = zenml.run_command("promote", "served", "b", "--dry-run", "--force")
    assert refused.exit_code == 3
    assert "'serve_from_artifact_store'" in refused.stderr


def test_the_operation_returns_what_would_be(zenml: SimulatedZenML) -> None:
    asked: list[str] = []
    would = operations.promote("logs", "live", dry_run=True, confirm=lambda question: bool(asked.append(question)))
    assert (would.dry_run, would.before, would.primary) == (True, "archive", "live")
    assert (asked, zenml.updates) == ([], [])
