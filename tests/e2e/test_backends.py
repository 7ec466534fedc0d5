"""ZenML's real server reads what was sent to each backend: the child is the primary."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e.conftest import PATIENT, PATIENT_CHILD
from tests.patience import PATIENCE_SECONDS
from tests.servers.backends import NAMES, Backend, backends
from tests.servers.zenml_server import ZenML

pytestmark = pytest.mark.e2e

LINES = 30
SAID = [*(f"line {number}" for number in range(LINES)), "the last line"]

PROGRAM = f"""
import json, logging, sys
from zenml import pipeline, step
from zenml.client import Client
from zenml.enums import StackComponentType
from zenml.stack import StackComponent

client = Client()

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
ids = {{}}
for child in json.loads(sys.argv[2]):
    name = child["name"]
    settings = {{"primary": name, "children": [child], **{PATIENT}}}
    model = client.create_stack_component(f"in-{{name}}", "composite", StackComponentType.LOG_STORE, settings)
    store = StackComponent.from_model(model)
    silent = store.activate(run.id, source=f"silent {{name}}")
    store.deactivate()
    logs_id = store.activate(run.id, source=name)
    for number in range({LINES}):
        logging.getLogger("train").warning("line %d", number)
    logging.getLogger("train").error("the last line")
    store.deactivate()
    assert store.stats()[name]["delivered"] == {LINES + 1}, store.stats()
    ids[name] = [str(logs_id), str(silent)]
open(sys.argv[1], "w").write(json.dumps(ids))
"""


@pytest.fixture(scope="module")
def running() -> Iterator[dict[str, Backend]]:
    with backends() as found:
        yield found


@pytest.fixture(scope="module")
def streams(
    zenml: ZenML, running: dict[str, Backend], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[str, str]]:
    """A backend → the stream that has been sent to it, and one without logs."""
    folder = tmp_path_factory.mktemp("backends")
    program, output = folder / "program.py", folder / "ids"
    program.write_text(PROGRAM)
    zenml.cli("secret", "create", "clickhouse", "--password=right")
    children = [json.loads(json.dumps(backend.child)) | PATIENT_CHILD for backend in running.values()]
    for child in children:
        if child["name"] == "clickhouse":
            # The server resolves it for each page.
            child["read"]["password"] = "{{clickhouse.password}}"
    zenml.python(str(program), str(output), json.dumps(children))
    found: dict[str, tuple[str, str]] = json.loads(output.read_text())
    return found


@pytest.mark.parametrize("backend", NAMES)
def test_the_server_reads_pages(
    zenml: ZenML, running: dict[str, Backend], streams: dict[str, tuple[str, str]], backend: str
) -> None:
    logs_id, silent = streams[backend]

    def page(logs_id: str = logs_id, **parameters: Any) -> dict[str, Any]:
        found: dict[str, Any] = zenml.get(f"/logs/{logs_id}/entries", **parameters)
        return found

    def said(*pages: dict[str, Any]) -> list[str]:
        return [entry["message"] for page in pages for entry in page["items"]]

    deadline = time.monotonic() + PATIENCE_SECONDS
    # A collector passes on what it has accepted a little later.
    while len(page(limit=100)["items"]) <= LINES and time.monotonic() < deadline:
        time.sleep(0.2)
    newest = page(limit=20)
    assert said(page(before=newest["before"]), newest) == SAID
    oldest = page(start="oldest", limit=20)
    newer = page(after=oldest["after"])
    assert said(oldest, newer) == SAID
    # Cursors lead back, too.
    assert said(page(before=newer["before"])) == said(oldest)
    assert said(page(search="LINE 7")) == ["line 7"]
    assert said(page(level="ERROR")) == ["the last line"]
    assert said(page(search="line", level="ERROR", start="oldest")) == ["the last line"]
    times = [entry["timestamp"] for entry in (*oldest["items"], *newer["items"])]
    assert times == sorted(times)
    assert said(page(since=times[10], until=times[12])) == [
        message for message, at in zip(SAID, times, strict=True) if times[10] <= at <= times[12]
    ]
    assert page(silent)["items"] == []


@pytest.mark.parametrize("backend", NAMES)
def test_the_server_says_that_a_backend_cannot_be_reached(
    zenml: ZenML, running: dict[str, Backend], streams: dict[str, tuple[str, str]], backend: str
) -> None:
    running[backend].stop()
    answer = zenml.session.get(f"{zenml.url}/api/v1/logs/{streams[backend][0]}/entries", timeout=60)
    assert answer.status_code == 503, answer.text
    assert backend in answer.text.lower()
    assert "right" not in answer.text
