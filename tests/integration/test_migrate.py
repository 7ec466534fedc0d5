"""`migrate` with ZenML's real client and database: from each kind of log store, and with trouble on the way."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path

import pytest

from tests.migrating import House, names
from tests.servers.datadog import API_KEY, APPLICATION_KEY, Datadog
from tests.servers.otlp_receiver import OtlpReceiver
from tests.servers.zenml_server import ZenML

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]

DISK = {"name": "disk", "type": "artifact", "artifact_store": "disk"}
EPOCHS = [f"epoch {number}" for number in range(5)]


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    zenml = ZenML(tmp_path_factory.mktemp("migrate") / "zenml")
    house = House(zenml)
    house.do("make_stack('plain')")
    yield house
    house.close()


def test_each_stage_is_done_once_and_can_be_undone(house: House) -> None:
    house.do("make_stack('prod'); run('prod', 'before')")
    to = json.dumps(DISK)

    refused = house.migrate("prod", "--to", to, input="n\n")
    assert refused.returncode == 1
    assert "Stopped: you answered no." in refused.stderr
    status = house.move("prod", "--status", to=DISK)
    assert (status["next"], status["log_store"], status["done"]) == ("build", None, [])

    # A dry run makes all checks, as if the log store were there, and leaves nothing.
    would = house.move("prod", "--dry-run", to=DISK)
    assert names(would) == ["build", "check", "switch", "watch", "backfill", "verify", "promote", "retire"]
    assert would["backfill"]["copied"] > 5
    assert would["done"][1]["what"] == "children 'earlier' and 'disk' work"
    assert (would["next"], would["log_store"], house.messages("before", "--from", "disk")) == ("build", None, [])
    assert house.move("prod", "--status", to=DISK) == status

    # No run has begun yet.
    waits = house.move("prod", to=DISK, code=1)
    assert names(waits) == ["build", "check", "switch"]
    assert waits["next"] == "watch"
    assert "run a pipeline on stack 'prod'" in waits["stopped"]
    assert waits["log_store"]["name"] == "prod-logs"

    house.do("run('prod', 'between')")
    verified = house.move("prod", "--stop-after", "verify")
    assert names(verified) == ["watch", "backfill", "verify"]
    assert verified["backfill"]["copied"] > 5
    assert verified["verify"]["parity"]
    assert verified["next"] == "promote"

    # Events that are deleted meanwhile are copied again; events that are changed stop the move.
    path = house.archived("before")
    content = path.read_bytes()
    path.write_bytes(b"".join(line for line in content.splitlines(keepends=True) if b"epoch 3" not in line))
    assert house.move("prod", "--stop-after", "verify")["backfill"]["copied"] == 1
    path.write_bytes(content.replace(b"epoch 3", b"epoch 7"))
    stopped = house.move("prod", code=1)
    assert (
        "missing from child 'disk', or different there: 1 event; `composite-logstore verify prod-logs"
        in stopped["stopped"]
    )
    assert (stopped["next"], stopped["stages"]["promote"]) == ("verify", False)
    path.write_bytes(content)

    assert names(house.move("prod"))[-2:] == ["promote", "retire"]
    house.do("run('prod', 'after')")
    assert house.messages("after") == EPOCHS
    assert house.messages("after", "--from", "earlier") == []
    for run in ("before", "between"):
        assert house.messages(run) == house.messages(run, "prod-logs", "--from", "disk") == EPOCHS
    over = house.move("prod")
    assert (over["done"], over["next"]) == ([], None)

    for stage in ("retire", "promote", "switch"):
        assert names(house.move("prod", "--undo")) == [stage]
    nothing = house.move("prod", "--undo", code=1)
    assert "nothing to undo" in nothing["stopped"]
    house.do("run('prod', 'back')")
    assert house.messages("back") == EPOCHS
    assert house.messages("back", "prod-logs", "--from", "disk") == []

    # Forward again: new events are copied, in both directions if necessary.
    assert names(house.move("prod"))[-1] == "retire"
    assert house.messages("back", "prod-logs", "--from", "disk") == EPOCHS


def test_a_run_that_began_before_the_switch_is_waited_for(house: House) -> None:
    house.do("make_stack('busy'); run('busy', 'finished')")
    begin = """
from zenml.enums import ExecutionStatus
from zenml.models import PipelineRunRequest, PipelineRunUpdate, StepRunRequest, StepRunUpdate
from zenml.utils.logging_utils import setup_logging_context
from zenml.utils.time_utils import utc_now
snapshot = client.get_pipeline_run("finished").snapshot.id
request = PipelineRunRequest(project=client.active_project.id, name="open", snapshot=snapshot,
                             orchestrator_run_id="open", status=ExecutionStatus.RUNNING)
opened, _ = client.zen_store.get_or_create_run(request)
step_run = client.zen_store.create_run_step(StepRunRequest(
    project=client.active_project.id, name="train", pipeline_run_id=opened.id, status=ExecutionStatus.RUNNING,
    start_time=utc_now()))
context = setup_logging_context("client", pipeline_run=opened)
context.__enter__()
"""
    house.do(begin)
    house.move("busy", "--stop-after", "switch", to=DISK)
    house.do("run('busy', 'new')")
    waits = house.move("busy", code=1)
    assert "run 'open' began before the switch" in waits["stopped"]
    assert waits["next"] == "backfill"
    end = """
import logging
logging.getLogger("train").warning("the last epoch")
context.__exit__(None, None, None)
client.zen_store.update_run_step(step_run.id, StepRunUpdate(status=ExecutionStatus.COMPLETED, end_time=utc_now()))
client.zen_store.update_run(opened.id, PipelineRunUpdate(status=ExecutionStatus.COMPLETED, end_time=utc_now()))
"""
    house.do(end)
    assert names(house.move("busy"))[-1] == "retire"
    shown = house.command("logs", "open", "busy-logs")
    assert "the last epoch" in shown.stdout


def test_from_zenml_s_datadog_log_store_copies_are_compared_and_later_events_counted(house: House) -> None:
    with Datadog() as datadog:
        house.make_datadog_store("dd", datadog)
        house.do("make_stack('watched', 'dd'); run('watched', 'in-datadog')")
        house.move("watched", "--stop-after", "switch", to=DISK)
        house.do("run('watched', 'in-both')")
        moved = house.move("watched")
        assert moved["backfill"]["unidentified"] > 5
        assert names(moved) == ["watch", "backfill", "verify", "promote", "retire"]
        assert moved["backfill"]["copied"] > 5
        assert moved["verify"]["children"]["disk"]["missing"] == 0
        for run in ("in-datadog", "in-both"):
            # Datadog stores milliseconds, and keeps no order within one.
            assert sorted(house.messages(run, "watched-logs", "--from", "disk")) == EPOCHS
        assert names(house.move("watched", "--undo")) == ["retire"]


def test_from_a_log_store_that_cannot_be_read_nothing_is_copied(house: House) -> None:
    with OtlpReceiver() as receiver:
        settings = {"endpoint": receiver.http_endpoint + "/v1/logs"}
        house.do(f"client.create_stack_component('ot', 'otel', Type.LOG_STORE, {settings!r})")
        house.do("make_stack('unread', 'ot')")
        built = house.move("unread", "--stop-after", "build", to=DISK)
        assert "'earlier' cannot be read; its events are not copied" in built["done"][0]["what"]
        assert built["stages"]["promote"]


def test_the_example_on_the_page_of_operations_is_true(house: House) -> None:
    page = (ROOT / "docs" / "operations.md").read_text()
    (example,) = re.findall(r"```python\n(from .*?)```", page, re.DOTALL)

    def as_assertion(line: re.Match[str]) -> str:
        return f"assert str({line[1]}).startswith({line[2].removesuffix(' ...')!r})"

    checked, number = re.subn(r"^print\((.*)\)  # (.*)$", as_assertion, example, flags=re.MULTILINE)
    assert number == 3
    house.do("make_stack('production')")
    house.do(checked)


def test_a_child_that_does_not_work_stops_the_move_before_any_run_depends_on_it(house: House) -> None:
    gone = Datadog()
    with gone:
        settings = {**gone.settings, "api_key": API_KEY, "application_key": APPLICATION_KEY}
    child = {"name": "gone", "type": "datadog", **settings}
    house.do("make_stack('careful')")
    would = house.move("careful", "--dry-run", to=child, code=1)
    assert (names(would), would["log_store"]) == (["build"], None)
    assert "child 'gone' does not work: write:" in would["stopped"]
    stopped = house.move("careful", to=child, code=1)
    assert names(stopped) == ["build"]
    assert "child 'gone' does not work: write:" in stopped["stopped"]
    assert API_KEY not in json.dumps(stopped)
    assert not stopped["stages"]["switch"]


def test_a_composite_gets_another_child_and_moves_to_it_and_old_runs_stay_behind(house: House) -> None:
    archive = {"name": "archive", "type": "artifact"}
    config = {"primary": "archive", "children": [archive]}
    house.do(
        "from composite_logstore.operations.migrate import _register_flavor; _register_flavor()\n"
        f"client.create_stack_component('mine', 'composite', Type.LOG_STORE, {config!r}); make_stack('own', 'mine')"
    )
    house.do("run('own', 'early')")
    # ZenML filters runs by whole seconds.
    time.sleep(1.1)
    since = datetime.now(timezone.utc).isoformat()
    assert names(house.move("own", "--stop-after", "switch", to=DISK)) == ["build"]
    house.do("run('own', 'late')")
    moved = house.move("own", "--since", since)
    assert (moved["from"], moved["next"]) == ("archive", None)
    assert house.messages("late") == house.messages("early", "--from", "archive") == EPOCHS
    assert house.messages("early") == []
    # A stack that had the composite before keeps it.
    assert names(house.move("own", "--undo")) == ["retire"]
    assert names(house.move("own", "--undo")) == ["promote"]
    assert "nothing to undo" in house.move("own", "--undo", code=1)["stopped"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("prdo", "--to", "disk"), "there is no stack 'prdo' (did you mean 'prod'?)"),
        (("default", "--to", json.dumps(DISK)), "copy it with `zenml stack copy default NAME`"),
        (("plain", "--to", "disk"), "there is no child 'disk' yet; give its settings as JSON, or '@file.json'"),
        (("plain", "--to", '{"name"'), "it is not valid JSON; give one child, such as {"),
        (("plain", "--to", "@nowhere.json"), "'nowhere.json' cannot be read: No such file or directory"),
        (("plain", "--to", '{"type": "artifact"}'), "it is no child with a 'name'"),
        (("plain", "--to", '{"name": "x", "type": "artifcat"}'), "did you mean 'artifact'?"),
        (
            ("plain", "--to", '{"name": "x", "type": "artifact", "artifact_store": "nowhere"}'),
            "no artifact store 'nowhere'",
        ),
        (("plain", "--to", '{"name": "x", "type": "artifact", "artifact_store": "default"}'), "'earlier'"),
        (("plain", "--to", '{"name": "x", "type": "otlp", "endpoint": "http://127.0.0.1:1"}'), "child 'x'"),
        (("plain", "--to", json.dumps(DISK), "--name", "mine"), "does not belong to this move; give another name"),
    ],
)
def test_wrong_input_is_refused_and_nothing_changes(house: House, arguments: tuple[str, ...], words: str) -> None:
    for options in ((), ("--dry-run",)):
        done = house.migrate(*arguments, "--yes", *options)
        assert done.returncode == 2, done
        assert words in done.stderr
    house.do("assert not client.list_stack_components(name='plain-logs').items")
    status = house.move("plain", "--status", to=DISK)
    assert status["log_store"] is None
