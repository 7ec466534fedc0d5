"""A backend in a package of somebody else, installed with nothing but its entry point."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.integration

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "backend"
LINES = 2_500

# What somebody does with it who has never heard of its module, and what that gives.
PROGRAM = f"""
import json, logging, sys
from importlib.metadata import entry_points
from zenml.client import Client
from zenml.enums import StackComponentType
from composite_logstore.zenml import LogsEntriesFilter
from zenml.stack import StackComponent
from tests.simulation import make_logs

directory = sys.argv[1]
report = {{"loaded_before": "composite_logstore_lines" in sys.modules}}
(found,) = entry_points(group="composite_logstore.backends", name="lines")
report["distribution"] = found.dist.name

client = Client()
client.create_flavor("composite_logstore.CompositeLogStoreFlavor", StackComponentType.LOG_STORE)

def register(name, **settings):
    children = [
        {{"name": "mine", "type": "lines", "directory": directory, **settings}},
        {{"name": "archive", "type": "artifact", "artifact_store": "default"}},
    ]
    configuration = {{"primary": "mine", "children": children}}
    return client.create_stack_component(name, "composite", StackComponentType.LOG_STORE, configuration)

for mistake in ({{"directry": "elsewhere"}}, {{"directory": ""}}):
    try:
        register("mistaken", **mistake)
    except Exception as error:
        report.setdefault("mistakes", []).append(str(error))

store = StackComponent.from_model(register("logs"))
report["child"] = type(store.config.child("mine")).__name__
report["requirements"] = sorted(store.requirements)
logs = make_logs(store)
origin = store.register_origin(str(logs.id), logs, {{}})
for number in range({LINES}):
    level = logging.ERROR if number % 100 == 0 else logging.INFO
    message = f"line {{number}} \\ud800 ü"
    store.emit(origin, logging.LogRecord("train", level, "/code/train.py", 7, message, (), None, "fit"))
store.deregister_origin(origin)
report["stats"] = store.stats()

def read(start, **filters):
    step = "after" if start == "oldest" else "before"
    page = store.fetch(logs, start=start, limit=300, filter_=LogsEntriesFilter(**filters))
    pages = []
    while page.items:
        pages.append([entry.message for entry in page.items])
        cursor = getattr(page, step)
        if cursor is None:
            break
        page = store.fetch(logs, **{{step: cursor}})
    if start == "newest":
        pages.reverse()
    return [message for page in pages for message in page]

report["oldest"] = read("oldest")
report["newest"] = read("newest")
report["errors"] = read("oldest", level="ERROR")
report["found"] = read("newest", search="line 17")
(first,) = store.fetch(logs, start="oldest", limit=1).items
report["first"] = first.model_dump(mode="json")

# A mistake of the backend's own, with one event.
import composite_logstore_lines
right = composite_logstore_lines.to_fields
composite_logstore_lines.to_fields = lambda event: right(event) if event.message != "line 5" else [].pop()
logs = make_logs(store)
origin = store.register_origin(str(logs.id), logs, {{}})
for number in range(10):
    record = logging.LogRecord("train", logging.INFO, "/code/train.py", 7, f"line {{number}}", (), None, "fit")
    store.emit(origin, record)
store.deregister_origin(origin)
report["stats_with_rejected"] = store.stats()
report["oldest_without_rejected"] = read("oldest")
open(sys.argv[2], "w").write(json.dumps(report))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which pip has installed the package, and nothing else."""
    directory = tmp_path_factory.mktemp("installed")
    source = directory / "source"
    shutil.copytree(EXAMPLE, source, ignore=shutil.ignore_patterns("__pycache__"))
    # Neither its dependencies nor the builder are fetched: both are here.
    quietly = ["--quiet", "--no-input", "--disable-pip-version-check", "--no-index"]
    own = ["--no-deps", "--no-build-isolation", "--target", str(directory / "site")]
    run([sys.executable, "-m", "pip", "install", *quietly, *own, str(source)], dict(os.environ), directory)
    return directory / "site"


@pytest.fixture(scope="module")
def report(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the program has found."""
    directory = tmp_path_factory.mktemp("third_party")
    program = directory / "program.py"
    program.write_text(PROGRAM)
    root = str(Path(__file__).resolve().parents[2])
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(installed), root]),
        "ZENML_CONFIG_PATH": str(directory / "zenml"),
    }
    output = directory / "report.json"
    run([sys.executable, str(program), str(directory / "lines"), str(output)], environment, directory)
    found: dict[str, Any] = json.loads(output.read_text())
    return found


def run(command: list[str], environment: dict[str, str], directory: Path) -> None:
    done = subprocess.run(
        command,
        env=environment,
        cwd=directory,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout


def test_the_package_has_one_module_and_one_entry_point(installed: Path) -> None:
    assert [path.name for path in installed.glob("*.py")] == ["composite_logstore_lines.py"]
    (metadata,) = installed.glob("*.dist-info")
    entry_points = (metadata / "entry_points.txt").read_text().split()
    assert entry_points == ["[composite_logstore.backends]", "lines", "=", "composite_logstore_lines:LinesChildConfig"]


def test_it_is_found_by_its_entry_point_alone(report: dict[str, Any]) -> None:
    assert report["loaded_before"] is False
    assert report["distribution"] == "composite-logstore-lines"
    assert report["child"] == "LinesChildConfig"


def test_a_mistake_in_its_settings_is_refused_and_names_the_child_and_the_field(report: dict[str, Any]) -> None:
    unknown, empty = report["mistakes"]
    assert "child 'mine': unknown key 'directry' (did you mean 'directory'?)" in unknown
    assert "child 'mine': 'directory': " in empty
    assert "elsewhere" not in unknown


def test_remote_steps_install_its_package(report: dict[str, Any]) -> None:
    assert "composite-logstore-lines" in report["requirements"]


def test_events_are_delivered_through_it_beside_another_child(report: dict[str, Any]) -> None:
    for name in ("mine", "archive"):
        child = report["stats"][name]
        assert child["accepted"] == child["delivered"] == LINES
        assert (child["state"], child["last_error"]) == ("healthy", None)


def test_what_was_logged_is_fetched_from_it_from_either_end(report: dict[str, Any]) -> None:
    said = [f"line {number} ? ü" for number in range(LINES)]
    assert report["oldest"] == said
    assert report["newest"] == said
    assert report["errors"] == said[::100]
    assert report["found"] == [message for message in said if "line 17" in message]


def test_what_it_cannot_take_is_rejected_alone_and_counted(report: dict[str, Any]) -> None:
    child = report["stats_with_rejected"]["mine"]
    assert child["delivered"] == LINES + 9
    assert child["rejected_reasons"] == {"an event cannot be encoded (IndexError)": 1}
    assert report["stats_with_rejected"]["archive"]["delivered"] == LINES + 10
    assert report["oldest_without_rejected"] == [f"line {number}" for number in range(10) if number != 5]


def test_an_entry_has_all_that_zenml_shows(report: dict[str, Any]) -> None:
    first = report["first"]
    assert (first["name"], first["level"], first["filename"], first["lineno"]) == ("train", 40, "/code/train.py", 7)
    assert first["timestamp"] is not None
