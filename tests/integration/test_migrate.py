"""`migrate` with ZenML's real client and database: from each kind of log store, and with trouble on the way."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

from tests.commands import Commands, Done
from tests.servers.datadog import API_KEY, APPLICATION_KEY, Datadog
from tests.servers.otlp_receiver import OtlpReceiver
from tests.servers.zenml_server import ZenML

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]

FIT = """
import logging
from zenml import pipeline, step

logger = logging.getLogger("train")

@step(enable_cache=False)
def train() -> None:
    for epoch in range(5):
        logger.warning("epoch %s", epoch)

@pipeline
def fit() -> None:
    train()
"""

BEGIN = """
import sys
import composite_logstore.operations

# Events arrive soon here.
sys.modules["composite_logstore.operations.migrate"].ARRIVAL_SECONDS = 4


def run(stack, name):
    from fit import fit
    from zenml.stack import stack as stacks
    # As in a process of its own.
    stacks._STACK_CACHE.clear()
    client.activate_stack(stack)
    fit.with_options(run_name=name)()


def make_stack(name, log_store=None):
    parts = {Type.ORCHESTRATOR: "default", Type.ARTIFACT_STORE: "default"}
    client.create_stack(name, {**parts, **({Type.LOG_STORE: log_store} if log_store else {})})
"""


class House(Commands):
    """A ZenML with an artifact store `disk` to move to.

    Attributes:
        disk: Where that is.
    """

    def __init__(self, zenml: ZenML) -> None:
        super().__init__(zenml)
        self.disk = zenml.directory / "disk"
        (zenml.directory / "fit.py").write_text(FIT)
        self.do(BEGIN)
        self.do(f"client.create_stack_component('disk', 'local', Type.ARTIFACT_STORE, {{'path': '{self.disk}'}})")

    def migrate(self, *arguments: str, input: str = "") -> Done:
        """Run the command."""
        return self.command("migrate", *arguments, input=input)

    def move(self, stack: str, *arguments: str, to: Any = "disk", code: int = 0) -> dict[str, Any]:
        """Run the command without questions, and return the JSON that it prints."""
        to = to if isinstance(to, str) else json.dumps(to)
        done = self.migrate(stack, "--to", to, *arguments, "--yes", "--output", "json")
        assert done.returncode == code, done
        return dict(json.loads(done.stdout))

    def messages(self, run: str, *options: str) -> list[str]:
        """Return the messages that `logs` shows of a run's step."""
        done = self.command("logs", run, "--source", "step", "--search", "epoch", "--output", "json", *options)
        return [json.loads(line)["message"] for line in done.stdout.splitlines()]

    def archived(self, run: str) -> Path:
        """Return the file in `disk` with the logs of a run's step."""
        done = self.command("logs", run, "--source", "step", "--output", "json")
        return self.disk / "logs" / (json.loads(done.stdout.splitlines()[0])["logs_id"] + ".log")


DISK = {"name": "disk", "type": "artifact", "artifact_store": "disk"}
EPOCHS = [f"epoch {number}" for number in range(5)]


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    zenml = ZenML(tmp_path_factory.mktemp("migrate") / "zenml")
    zenml.env["PYTHONPATH"] = f"{ROOT}:{ROOT / 'backends'}"
    house = House(zenml)
    house.do("make_stack('plain')")
    yield house
    house.close()


def names(found: dict[str, Any]) -> list[str]:
    return [one["stage"] for one in found["done"]]


def test_each_stage_is_done_once_and_can_be_undone(house: House) -> None:
    house.do("make_stack('prod'); run('prod', 'before')")
    to = json.dumps(DISK)

    refused = house.migrate("prod", "--to", to, input="n\n")
    assert refused.returncode == 1
    assert "Stopped: you answered no." in refused.stderr
    status = house.move("prod", "--status", to=DISK)
    assert (status["next"], status["log_store"], status["done"]) == ("build", None, [])

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
        "1 events of child 'disk' are missing or different; `composite-logstore verify prod-logs" in stopped["stopped"]
    )
    assert (stopped["next"], stopped["stages"]["promote"]) == ("verify", False)
    path.write_bytes(content)

    assert names(house.move("prod"))[-2:] == ["promote", "retire"]
    house.do("run('prod', 'after')")
    assert house.messages("after") == EPOCHS
    assert house.messages("after", "--from", "earlier") == []
    for run in ("before", "between"):
        assert house.messages(run) == house.messages(run, "--store", "prod-logs", "--from", "disk") == EPOCHS
    over = house.move("prod")
    assert (over["done"], over["next"]) == ([], None)

    for stage in ("retire", "promote", "switch"):
        assert names(house.move("prod", "--undo")) == [stage]
    nothing = house.move("prod", "--undo", code=1)
    assert "nothing to undo" in nothing["stopped"]
    house.do("run('prod', 'back')")
    assert house.messages("back") == EPOCHS
    assert house.messages("back", "--store", "prod-logs", "--from", "disk") == []

    # Forward again: new events are copied, in both directions if necessary.
    assert names(house.move("prod"))[-1] == "retire"
    assert house.messages("back", "--store", "prod-logs", "--from", "disk") == EPOCHS


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
    shown = house.command("logs", "open", "--store", "busy-logs")
    assert "the last epoch" in shown.stdout


def test_from_zenml_s_datadog_log_store_copies_are_compared_and_later_events_counted(house: House) -> None:
    with Datadog() as datadog:
        # ZenML's log store can only search a real site.
        house.do(
            "from zenml.log_stores.datadog import datadog_log_store; import requests; post = requests.post\n"
            "datadog_log_store.requests.post = lambda url, **settings: post(url.replace("
            f"'https://api.datadoghq.com', {datadog.url!r}), **settings)"
        )
        settings = {"endpoint": datadog.settings["endpoint"], "api_key": API_KEY, "application_key": APPLICATION_KEY}
        house.do(f"client.create_stack_component('dd', 'datadog', Type.LOG_STORE, {settings!r})")
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
            assert sorted(house.messages(run, "--store", "watched-logs", "--from", "disk")) == EPOCHS
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
    done = house.migrate(*arguments, "--yes")
    assert done.returncode == 2, done
    assert words in done.stderr
    house.do("assert not client.list_stack_components(name='plain-logs').items")
    status = house.move("plain", "--status", to=DISK)
    assert status["log_store"] is None
