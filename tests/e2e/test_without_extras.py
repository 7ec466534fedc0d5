"""ZenML's server in an environment that has `zenml[server]` and this package, and none of its extras."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from composite_logstore.config import DELIVERY_VARIABLE
from tests.e2e.conftest import PIPELINE, Run, assert_equal, register_three_children
from tests.environments import build_wheel, execute, with_only
from tests.servers.collector import Collector
from tests.servers.datadog import Datadog
from tests.servers.zenml_server import ZenML

pytestmark = [pytest.mark.e2e, pytest.mark.deep]

LINES = 300
SOURCES = ["client", "prepare_step", "step"]

# What the extras bring, and what they bring along.
OF_EXTRAS = [
    "boto3",
    "datadog_api_client",
    "google.protobuf",
    "grpc",
    "opentelemetry.exporter.otlp",
    "opentelemetry.exporter",
    "opentelemetry.proto",
]

IS_THERE = """
import json, sys
from importlib.util import find_spec

def is_there(name):
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:
        # Not even what it would be a part of.
        return False

import composite_logstore
print(json.dumps([composite_logstore.__file__, [name for name in sys.argv[1:] if is_there(name)]]))
"""

# What a step does, but for ZenML's checks before the run.
LOG = """
import json, logging, sys
from datetime import datetime, timezone
from uuid import uuid4
from zenml.client import Client
from zenml.models import LogsResponse
from zenml.models.v2.core.logs import LogsResponseBody

store = Client().active_stack.log_store
now = datetime.now(timezone.utc)
body = LogsResponseBody(created=now, updated=now, project_id=uuid4(), source="step", log_store_id=store.id)
logs = LogsResponse(id=uuid4(), body=body)
origin = store.register_origin(str(logs.id), logs, {})
for number in range(100):
    store.emit(origin, logging.LogRecord("train", logging.INFO, "", 0, f"line {number}", (), None, None))
store.deregister_origin(origin)
open(sys.argv[1], "w").write(json.dumps(store.stats()))
"""


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of the environment."""
    directory = tmp_path_factory.mktemp("bare")
    return Path(with_only(directory / "environment", build_wheel(directory), "composite-logstore", "zenml[server]"))


@pytest.fixture(scope="module")
def zenml(
    bare: Path, tmp_path_factory: pytest.TempPathFactory, collector: Collector, datadog: Datadog
) -> Iterator[ZenML]:
    """A ZenML with its server in that environment, where everything is registered too."""
    zenml = ZenML(tmp_path_factory.mktemp("zenml") / "zenml", str(bare))
    # Of this environment nothing may be found there.
    zenml.env.pop("PYTHONPATH", None)
    with zenml:
        register_three_children(zenml, collector, datadog)
        with zenml.chosen_agent():
            yield zenml


@pytest.fixture(scope="module")
def run(zenml: ZenML, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of this environment, which has the extras, at that server."""
    directory = tmp_path_factory.mktemp("run")
    execute(sys.executable, str(PIPELINE), str(directory), str(LINES), environment=zenml.env)
    return Run.read(zenml, directory)


def test_none_of_the_extras_is_there(bare: Path, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    # Isolated: with the folder of this checkout in sight, it would be the checkout that is imported.
    package, found = json.loads(execute(str(bare), "-I", "-c", IS_THERE, *OF_EXTRAS, environment=environment))
    assert Path(package).is_relative_to(bare.parents[1])
    assert found == []
    # Each of them is a name that is there where the extras are.
    _, found = json.loads(execute(sys.executable, "-c", IS_THERE, *OF_EXTRAS))
    assert found == OF_EXTRAS


def test_the_command_line_is_there(zenml: ZenML, bare: Path) -> None:
    command = str(bare.with_name("composite-logstore"))
    assert "No undelivered events on this machine." in execute(command, "spool", "list", environment=zenml.env)


def test_the_server_runs_in_that_environment(zenml: ZenML, bare: Path) -> None:
    pid = (zenml.directory / "config" / "zen_server" / "daemon" / "service.pid").read_text().strip()
    assert execute("ps", "-o", "args=", "-p", pid).startswith(str(bare.parent))


@pytest.mark.parametrize("primary", ["archive", "live"])
def test_the_server_returns_what_was_logged(run: Run, zenml: ZenML, primary: str) -> None:
    zenml.cli("log-store", "update", "logs", f"--primary={primary}")
    for source in SOURCES:
        said = run.said(source)
        assert len(said) > (LINES if source == "step" else 1)
        for start in ("oldest", "newest"):
            assert_equal(run.entries(source, start, limit=97), said)
    assert_equal(run.page("step", level="ERROR")["items"], [line for line in run.said("step") if line["level"] >= 40])


def test_a_run_without_the_extras_is_refused_before_its_first_step(zenml: ZenML, tmp_path: Path) -> None:
    output = zenml.python(str(PIPELINE), str(tmp_path), "1", fails=True)
    assert "log store 'logs', child 'collector'" in output
    assert "install 'composite-logstore[otlp]'" in output
    assert "has started" not in output


def test_a_child_without_its_extra_says_so_and_holds_up_nobody(
    zenml: ZenML, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "log.py"
    program.write_text(LOG)
    # What a process does that delivers by itself: an agent has the extras.
    monkeypatch.setitem(zenml.env, DELIVERY_VARIABLE, "process")
    zenml.python(str(program), str(tmp_path / "stats.json"))
    stats: dict[str, dict[str, Any]] = json.loads((tmp_path / "stats.json").read_text())
    assert (stats["archive"]["delivered"], stats["archive"]["state"]) == (100, "healthy")
    for child, extra in (("collector", "otlp"), ("live", "datadog")):
        # What earlier processes have left for it is among them.
        assert stats[child]["pending"] >= 100
        assert stats[child]["state"] == "unavailable"
        assert f"install 'composite-logstore[{extra}]'" in stats[child]["last_error"]
