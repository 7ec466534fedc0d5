"""ZenML's real server reads through a child of type `component`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.conftest import PATIENT, PATIENT_CHILD
from tests.servers.zenml_server import ZenML

pytestmark = pytest.mark.e2e

LINES = 30

PROGRAM = f"""
import logging, sys
from zenml import pipeline, step
from zenml.client import Client
from zenml.enums import StackComponentType
from zenml.stack import StackComponent

client = Client()
children = [{{"name": "theirs", "type": "component", "component": "default", **{PATIENT_CHILD}}}]
settings = {{"primary": "theirs", "children": children, **{PATIENT}}}
model = client.create_stack_component("through", "composite", StackComponentType.LOG_STORE, settings)
store = StackComponent.from_model(model)

@step
def nothing() -> None:
    pass

@pipeline(enable_cache=False)
def one_step():
    nothing()

found = client.active_stack_model.id
client.activate_stack("default")
run = one_step()
client.activate_stack(found)
logs_id = store.activate(run.id, source="elsewhere")
for number in range({LINES}):
    logging.getLogger("train").warning("line %d", number)
store.deactivate()
assert store.stats()["theirs"]["delivered"] == {LINES}, store.stats()
open(sys.argv[1], "w").write(str(logs_id))
"""


def test_the_server_reads_zenml_s_own_log_store_through_the_child(zenml: ZenML, tmp_path: Path) -> None:
    program, output = tmp_path / "program.py", tmp_path / "id"
    program.write_text(PROGRAM)
    zenml.python(str(program), str(output))
    url = f"{zenml.url}/api/v1/logs/{output.read_text()}/entries"

    answer = zenml.session.get(url, params={"limit": 20})
    assert answer.status_code == 200, answer.text
    page = answer.json()
    assert [entry["message"] for entry in page["items"]] == [f"line {number}" for number in range(10, LINES)]
    older = zenml.session.get(url, params={"before": page["before"]}).json()
    assert [entry["message"] for entry in older["items"]] == [f"line {number}" for number in range(10)]
    refused = zenml.session.get(url, params={"search": "line 7"})
    assert refused.status_code == 400
    assert "only reads a log file from its start" in refused.text
