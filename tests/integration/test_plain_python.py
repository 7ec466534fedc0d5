"""Programs that are no pipelines, run as processes of their own, and a run whose logs come from elsewhere."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.servers.otlp_receiver import OtlpReceiver

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "plain-python.md"


@pytest.fixture
def receiver() -> Iterator[OtlpReceiver]:
    with OtlpReceiver() as receiver:
        yield receiver


def run(program: str, directory: Path, endpoint: str = "", *arguments: str) -> str:
    """Run a program, and return what it has printed."""
    file = directory / "program.py"
    file.write_text(program)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "backends")]),
        "ZENML_CONFIG_PATH": str(directory / "zenml"),
        "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint,
        "NO_PROXY": "127.0.0.1",
    }
    command = [sys.executable, str(file), *arguments]
    done = subprocess.run(command, env=environment, cwd=directory, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def examples() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.deep
def test_the_page_s_first_example_delivers_to_both_of_its_children(tmp_path: Path, receiver: OtlpReceiver) -> None:
    printed = run(examples()[0], tmp_path, receiver.http_endpoint)

    said = [(record.body, record.severity_text) for record in receiver.records()]
    assert said == [
        ("epoch 0", "INFO"),
        ("epoch 1", "INFO"),
        ("epoch 2", "INFO"),
        ("the loss is not a number", "WARN"),
    ]
    assert receiver.records()[1].attributes["epoch"] == 1
    assert {record.attributes["team"] for record in receiver.records()} == {"vision"}
    assert [line for line in printed.splitlines() if '"body"' in line] == ['    "body": "the loss is not a number",']
    assert printed.splitlines()[-1] == "4"


@pytest.mark.deep
def test_the_page_s_second_example_delivers(tmp_path: Path, receiver: OtlpReceiver) -> None:
    run(examples()[1], tmp_path, receiver.http_endpoint)
    assert [record.body for record in receiver.records()] == ["from a dictionary"]


QUIET = """
import logging, sys
root = logging.getLogger()
found = root.level, list(root.handlers)
from composite_logstore import CompositeHandler
handler = CompositeHandler("trainer", [{"name": "collector", "type": "otlp"}])
assert (root.level, root.handlers) == found, (root.level, root.handlers)
handler.attach()
logging.getLogger("train").warning("hello")
"""


@pytest.mark.process
def test_importing_zenml_leaves_the_root_logger_as_it_was_and_a_program_delivers_at_its_end(
    tmp_path: Path, receiver: OtlpReceiver
) -> None:
    run(QUIET, tmp_path, receiver.http_endpoint)
    assert [record.body for record in receiver.records()] == ["hello"]


@pytest.mark.deep
@pytest.mark.process
def test_what_a_dead_collector_did_not_take_is_delivered_by_the_next_process(
    tmp_path: Path, receiver: OtlpReceiver
) -> None:
    run(QUIET, tmp_path, "http://127.0.0.1:9")
    # It ends at once: give what is adopted the time that it takes.
    run(QUIET.replace('"hello"', '"again"') + "\nimport time\ntime.sleep(2)\n", tmp_path, receiver.http_endpoint)
    assert sorted(record.body for record in receiver.records()) == ["again", "hello"]


ACTIVATE = """
import json, logging, sys, uuid
from zenml import pipeline, step
from zenml.client import Client
from zenml.enums import StackComponentType

client = Client()
client.create_flavor("composite_logstore.CompositeLogStoreFlavor", StackComponentType.LOG_STORE)
children = [{"name": "archive", "type": "artifact"}]
client.create_stack_component("logs", "composite", StackComponentType.LOG_STORE, {
    "primary": "archive", "children": children})
components = {StackComponentType.ORCHESTRATOR: "default", StackComponentType.ARTIFACT_STORE: "default"}
client.create_stack("logging", {**components, StackComponentType.LOG_STORE: "logs"})
client.activate_stack("logging")

@step
def train() -> None:
    logging.getLogger("train").info("in the step")

@pipeline(enable_cache=False)
def learn():
    train()

run = learn()
store = client.active_stack.log_store
step_run = client.get_pipeline_run(run.id).steps["train"]
root = logging.getLogger()
found = root.level, list(root.handlers)
report = {}

def collect(message, *arguments, **keywords):
    id = store.activate(*arguments, **keywords)
    logging.getLogger("elsewhere").warning(message)
    store.deactivate()
    logging.getLogger("elsewhere").warning("not collected")
    return id

def read(id):
    return [entry.message for entry in store.fetch(client.zen_store.get_logs(id)).items]

one = collect("of the run", run.id, source="elsewhere")
assert collect("again", str(run.id), source="elsewhere") == one
report["run"] = read(one)
report["step"] = read(collect("of the step", run.id, step_run.id))
report["sources"] = sorted(logs.source for logs in client.get_pipeline_run(run.id).log_collection)
logs = client.zen_store.get_logs(one)
report["belongs"] = [logs.pipeline_run_id == run.id, logs.log_store_id == store.id]
report["restored"] = (root.level, list(root.handlers)) == found
store.deactivate()

def refused(*arguments):
    try:
        store.activate(*arguments)
    except (KeyError, ValueError) as error:
        return type(error).__name__ + " " + str(error)

report["no run"] = refused(uuid.uuid4())
report["no step"] = refused(run.id, uuid.uuid4())
report["other run's step"] = refused(learn().id, step_run.id)
store.activate(run.id)
report["twice"] = refused(run.id)
open(sys.argv[1], "w").write(json.dumps(report))
"""


def test_what_is_logged_between_activate_and_deactivate_becomes_logs_of_the_run(tmp_path: Path) -> None:
    output = tmp_path / "report.json"
    run(ACTIVATE, tmp_path, "", str(output))
    report = json.loads(output.read_text())
    assert report["run"] == ["of the run", "again"]
    assert report["step"] == ["in the step", "of the step"]
    assert "elsewhere" in report["sources"]
    assert report["belongs"] == [True, True]
    assert report["restored"] is True
    assert report["no run"].startswith("KeyError")
    assert report["no step"].startswith("KeyError")
    assert re.match(r"ValueError step 'train' .* run '.*'; pass", report["other run's step"])
    assert re.match(r"ValueError log store 'logs' .* deactivate\(\)", report["twice"])
