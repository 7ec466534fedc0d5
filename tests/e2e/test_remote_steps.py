"""What ZenML installs in the image of a remote step is enough for each mix of children, and a step runs with it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import PATIENT, PATIENT_CHILD
from tests.environments import build_wheel, execute, with_only
from tests.servers.collector import Collector
from tests.servers.datadog import Datadog
from tests.servers.zenml_server import ZenML

pytestmark = [pytest.mark.e2e, pytest.mark.deep]

# A name → the types of its children, what ZenML has to install, and what is there by that. ZenML's own images have
# ZenML.
MIXES: dict[str, tuple[list[str], set[str], set[str]]] = {
    "archive": (["artifact"], {"composite-logstore"}, set()),
    "collector": (
        ["artifact", "otlp"],
        {"composite-logstore", "composite-logstore[otlp]"},
        {"opentelemetry.proto", "grpc"},
    ),
    "live": (["artifact", "datadog"], {"composite-logstore", "composite-logstore[datadog]"}, {"datadog_api_client"}),
    "all": (
        ["artifact", "otlp", "datadog", "otel", "component"],
        {
            "composite-logstore",
            "composite-logstore[otlp]",
            "composite-logstore[datadog]",
            # Of the exporter of OpenTelemetry that the child names.
            "opentelemetry-sdk",
        },
        {"opentelemetry.proto", "grpc", "datadog_api_client"},
    ),
}

# What the client does that starts a run: it registers a stack, and gathers what its images have to have.
REGISTER = """
import json, sys
from zenml.client import Client
from zenml.config import DockerSettings
from zenml.enums import StackComponentType
from zenml.stack import Stack
from zenml.utils.pipeline_docker_image_builder import PipelineDockerImageBuilder

client, answer = Client(), {}
client.create_stack_component("elsewhere", "local", StackComponentType.ARTIFACT_STORE, {"path": sys.argv[3]})
for name, children in json.loads(sys.argv[1]).items():
    settings = {"primary": "artifact", "children": children, **json.loads(sys.argv[4])}
    client.create_stack_component(f"remote-{name}", "composite", StackComponentType.LOG_STORE, settings)
    components = {StackComponentType(kind): "default" for kind in ("orchestrator", "artifact_store")}
    model = client.create_stack(f"remote-{name}", {**components, StackComponentType.LOG_STORE: f"remote-{name}"})
    stack = Stack.from_model(model)
    ((_, text, options),) = PipelineDockerImageBuilder.gather_requirements_files(DockerSettings(), stack)
    assert not options
    answer[name] = {"stack": str(model.id), "requirements": text.split()}
open(sys.argv[2], "w").write(json.dumps(answer))
"""

# What the image runs.
STEP = """
import json, logging, sys
from importlib.util import find_spec
from zenml import pipeline, step
from zenml.client import Client
import composite_logstore

def is_there(name):
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:
        return False

@step(enable_cache=False)
def train() -> None:
    for number in range(100):
        logging.getLogger("train").warning("line %d", number)

@pipeline(enable_cache=False)
def training() -> None:
    train()

run = training()
there = [name for name in ("datadog_api_client", "grpc", "opentelemetry.proto") if is_there(name)]
stats = Client().active_stack.log_store.stats()
said = {"file": composite_logstore.__file__, "there": there, "stats": stats, "run": str(run.id)}
open(sys.argv[1], "w").write(json.dumps(said))
"""


@dataclass(frozen=True)
class Image:
    """What ZenML makes of a stack.

    Attributes:
        stack: The stack's id.
        requirements: What the images of its steps have to have.
    """

    stack: str
    requirements: list[str]


@pytest.fixture(scope="module")
def zenml(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ZenML]:
    """A ZenML of its own: a run with ZENML_ACTIVE_STACK_ID leaves that stack active, as ZenML writes it down."""
    with ZenML(tmp_path_factory.mktemp("zenml") / "zenml") as zenml:
        zenml.cli("log-store", "flavor", "register", "composite_logstore.CompositeLogStoreFlavor")
        with zenml.chosen_agent():
            yield zenml


@pytest.fixture(scope="module")
def images(
    zenml: ZenML, collector: Collector, datadog: Datadog, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Image]:
    """A stack for each mix."""
    directory = tmp_path_factory.mktemp("images")
    settings: dict[str, dict[str, Any]] = {
        "artifact": {},
        "otlp": {"endpoint": collector.http_endpoint},
        "datadog": datadog.settings,
        "otel": {"exporter": "console"},
        # Not the stack's, where the archive is.
        "component": {"component": "elsewhere"},
    }
    mixes = {
        name: [{"name": kind, "type": kind, **settings[kind], **PATIENT_CHILD} for kind in kinds]
        for name, (kinds, _, _) in MIXES.items()
    }
    program = directory / "register.py"
    program.write_text(REGISTER)
    output, elsewhere = str(directory / "answer.json"), str(directory / "elsewhere")
    zenml.python(str(program), json.dumps(mixes), output, elsewhere, json.dumps(PATIENT))
    return {name: Image(**image) for name, image in json.loads((directory / "answer.json").read_text()).items()}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.mark.parametrize("mix", MIXES)
def test_a_step_runs_with_what_its_image_has(
    mix: str, images: dict[str, Image], wheel: Path, zenml: ZenML, tmp_path: Path
) -> None:
    kinds, names, there = MIXES[mix]
    requirements = images[mix].requirements
    version = wheel.name.split("-")[1]
    assert set(requirements) == {
        f"{name}=={version}" if name.startswith("composite-logstore") else name for name in names
    }
    python = with_only(tmp_path / "environment", wheel, "zenml", *requirements)
    program, output = tmp_path / "step.py", tmp_path / "said.json"
    program.write_text(STEP)
    environment = {**zenml.env, "ZENML_ACTIVE_STACK_ID": images[mix].stack}
    environment.pop("PYTHONPATH", None)
    execute(python, str(program), str(output), environment=environment)

    said = json.loads(output.read_text())
    assert Path(said["file"]).is_relative_to(tmp_path / "environment")
    assert set(said["there"]) == there
    assert set(said["stats"]) == set(kinds)
    for child in said["stats"].values():
        assert (child["state"], child["pending"], child["dropped"], child["rejected"]) == ("healthy", 0, 0, 0)
        assert child["delivered"] == child["accepted"] > 100
    page = zenml.get(f"/logs/{zenml.streams(said['run'])['step']['id']}/entries")
    assert [entry["message"] for entry in page["items"]] == [f"line {number}" for number in range(100)]
