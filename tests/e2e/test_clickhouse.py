"""ZenML's real server reads what a collector has written into ClickHouse: the child is the primary."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from tests.patience import PATIENCE_SECONDS
from tests.servers.clickhouse import ClickHouse, RotelToClickHouse, is_installed
from tests.servers.zenml_server import ZenML

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(not is_installed(), reason="there is no engine of ClickHouse for this machine"),
]

LINES = 30

PROGRAM = f"""
import json, logging, sys
from zenml import pipeline, step
from zenml.client import Client
from zenml.enums import StackComponentType
from zenml.stack import StackComponent

client = Client()
model = client.create_stack_component(
    "in-clickhouse",
    "composite",
    StackComponentType.LOG_STORE,
    {{"primary": "sent", "children": [json.loads(sys.argv[2])]}},
)
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
logging.getLogger("train").error("the last line")
store.deactivate()
assert store.stats()["sent"]["delivered"] == {LINES + 1}, store.stats()
open(sys.argv[1], "w").write(str(logs_id))
"""


def test_the_server_reads_clickhouse(zenml: ZenML, tmp_path: Path) -> None:
    program, output = tmp_path / "program.py", tmp_path / "id"
    program.write_text(PROGRAM)
    zenml.cli("secret", "create", "clickhouse", "--password=right")
    with ClickHouse() as clickhouse, RotelToClickHouse(clickhouse) as collector:
        section = {"type": "clickhouse", "url": clickhouse.url, "database": "otel"}
        section |= {"username": "reader", "password": "{{clickhouse.password}}"}
        child: dict[str, Any] = {"name": "sent", "type": "otlp", "endpoint": collector.http_endpoint, "read": section}
        # However slow the machine is, no export is overdue.
        child["export_timeout_millis"] = 100_000
        zenml.python(str(program), str(output), json.dumps(child))
        url = f"{zenml.url}/api/v1/logs/{output.read_text()}/entries"

        def page(**parameters: Any) -> dict[str, Any]:
            answer = zenml.session.get(url, params=parameters)
            assert answer.status_code == 200, answer.text
            found: dict[str, Any] = answer.json()
            return found

        deadline = time.monotonic() + PATIENCE_SECONDS
        # The collector passes on what it has accepted a little later.
        while len(page(limit=100)["items"]) <= LINES and time.monotonic() < deadline:
            time.sleep(0.2)
        newest = page(limit=20)
        older = page(before=newest["before"])
        said = [entry["message"] for entry in [*older["items"], *newest["items"]]]
        assert said == [*(f"line {number}" for number in range(LINES)), "the last line"]
        oldest = page(start="oldest", limit=20)
        newer = page(after=oldest["after"])
        assert [entry["message"] for entry in [*oldest["items"], *newer["items"]]] == said
        assert [entry["message"] for entry in page(search="LINE 7")["items"]] == ["line 7"]
        assert [entry["message"] for entry in page(level="ERROR")["items"]] == ["the last line"]
