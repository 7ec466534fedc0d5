"""Importing, configuring and registering load nothing heavy: that waits until a child is first used."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.patience import PATIENCE_SECONDS

# What only exporters and remote artifact stores need. OpenTelemetry's API and SDK are part of ZenML's own imports.
HEAVY = (
    "aiobotocore",
    "boto3",
    "botocore",
    "datadog_api_client",
    "google.protobuf",
    "grpc",
    "opentelemetry.exporter",
    "opentelemetry.proto",
    "s3fs",
)

# What people do before the first record, in their order. Each stage goes on where the one before ended.
STAGES = {
    "importing the package": "import composite_logstore",
    "importing its public names": """
from composite_logstore import CompositeLogStore, CompositeLogStoreConfig, CompositeLogStoreFlavor
""",
    "resolving the flavor": """
flavor = CompositeLogStoreFlavor()
assert flavor.implementation_class is CompositeLogStore
assert flavor.config_class is CompositeLogStoreConfig
""",
    "configuring a child of each type": """
settings = {
    "primary": "archive",
    "children": [
        {"name": "archive", "type": "artifact"},
        {"name": "over-http", "type": "otlp", "endpoint": "http://collector.example:4318"},
        {"name": "over-grpc", "type": "otlp", "endpoint": "collector.example:4317", "protocol": "grpc"},
        {"name": "screen", "type": "otel", "exporter": "console"},
        {"name": "aws", "type": "cloudwatch", "region": "eu-central-1"},
        {"name": "live", "type": "datadog", "api_key": "{{datadog.api_key}}", "application_key": "{{datadog.key}}"},
        {"name": "search", "type": "elasticsearch", "url": "https://search.example:9200"},
    ],
}
config = CompositeLogStoreConfig(**settings)
assert config.is_valid
assert len(config.required_secrets) == 2
""",
    "checking that each child can be used": """
for child in config.enabled_children:
    child.check()
""",
    "registering": """
from zenml.client import Client
from zenml.enums import StackComponentType
client = Client()
client.create_flavor("composite_logstore.CompositeLogStoreFlavor", StackComponentType.LOG_STORE)
component = client.create_stack_component("logs", "composite", StackComponentType.LOG_STORE, settings)
""",
    "building the component as ZenML's server does": """
from zenml.stack import StackComponent
store = StackComponent.from_model(component)
assert isinstance(store, CompositeLogStore)
store.cleanup()
""",
}

# What checks the settings where that takes more than looking at them.
CHECKS = ("composite_logstore_otel.exporters", "composite_logstore_otlp.checks")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """The modules that a new process has loaded after each stage."""
    parts = ["import json, sys", "loaded = {}"]
    for stage, lines in STAGES.items():
        parts += [lines, f"loaded[{stage!r}] = list(sys.modules)"]
    directory: Path = tmp_path_factory.mktemp("lightness")
    output = directory / "loaded.json"
    parts += [f"open({str(output)!r}, 'w').write(json.dumps(loaded))"]
    # A file: ZenML registers nothing for a program that has none.
    program = directory / "program.py"
    program.write_text("\n".join(parts))
    done = subprocess.run(
        [sys.executable, str(program)],
        # Registering needs a database, which is made for it.
        env={**os.environ, "ZENML_CONFIG_PATH": str(directory / "zenml")},
        cwd=directory,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=4 * PATIENCE_SECONDS,
    )
    assert done.returncode == 0, done.stdout
    modules: dict[str, list[str]] = json.loads(output.read_text())
    return modules


@pytest.mark.parametrize("stage", STAGES)
def test_nothing_heavy_is_loaded_by(stage: str, loaded: dict[str, list[str]]) -> None:
    modules = loaded[stage]
    assert [module for module in modules if module.startswith(tuple(f"{name}." for name in HEAVY))] == []
    assert [module for module in modules if module in HEAVY] == []


@pytest.mark.parametrize("stage", STAGES)
def test_of_a_backend_nothing_but_its_settings_is_loaded_by(stage: str, loaded: dict[str, list[str]]) -> None:
    modules = [module for module in loaded[stage] if module.startswith("composite_logstore_")]
    assert [module for module in modules if "." in module and not module.endswith((".config", *CHECKS))] == []


def test_importing_the_package_does_not_even_load_zenml(loaded: dict[str, list[str]]) -> None:
    assert [module for module in loaded["importing the package"] if module.partition(".")[0] == "zenml"] == []


def test_all_stages_have_been_gone_through(loaded: dict[str, list[str]]) -> None:
    """What is never loaded at all would pass the tests above for nothing."""
    last = loaded["building the component as ZenML's server does"]
    for module in ("composite_logstore.log_store", "composite_logstore_otlp.config", "zenml.client"):
        assert module in last


# What a command needs only once it works. Of Rich, `rich.filesize` costs nothing.
NEEDED_TO_WORK = (
    "composite_logstore_",
    "opentelemetry",
    "pydantic",
    "requests",
    "rich.console",
    "rich.progress",
    "rich.table",
    "sqlmodel",
    "zenml",
)


def run(program: str) -> Any:
    """Return what a program prints as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=2 * PATIENCE_SECONDS, check=True
    )
    return json.loads(done.stdout)


HELP = """
import json, sys
from click.testing import CliRunner
from composite_logstore.cli.main import main

def look(command, *words):
    done = CliRunner().invoke(main, [*words, "--help"])
    assert done.exit_code == 0, done.output
    for name, inner in getattr(command, "commands", {}).items():
        look(inner, *words, name)

look(main)
json.dump(list(sys.modules), sys.stdout)
"""


def test_the_help_of_each_command_loads_neither_zenml_nor_an_operation() -> None:
    done = subprocess.run(
        [sys.executable, "-c", HELP], capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=True
    )
    modules = json.loads(done.stdout)
    assert "composite_logstore.cli.migrate" in modules
    assert [module for module in modules if module.startswith(NEEDED_TO_WORK)] == []
    # Such as `composite_logstore.operations.check`.
    assert [module for module in modules if module.startswith("composite_logstore.operations.")] == []


NAMES = """
import importlib, json, pkgutil, sys
from composite_logstore import operations

for module in pkgutil.iter_modules(operations.__path__):
    importlib.import_module(f"composite_logstore.operations.{module.name}")
json.dump(
    {
        "modules": list(sys.modules),
        "not callable": [name for name in operations.__all__ if not callable(getattr(operations, name))],
    },
    sys.stdout,
)
"""


@pytest.fixture(scope="module")
def operations_loaded() -> dict[str, list[str]]:
    done = subprocess.run(
        [sys.executable, "-c", NAMES], capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=True
    )
    found: dict[str, list[str]] = json.loads(done.stdout)
    return found


def test_an_operation_is_a_function_whichever_module_was_imported_before(
    operations_loaded: dict[str, list[str]],
) -> None:
    assert operations_loaded["not callable"] == []


def test_operations_leave_zenml_s_database_to_those_who_use_one(operations_loaded: dict[str, list[str]]) -> None:
    """Importing it takes nearly as long as ZenML itself, and a client of a server needs none."""
    database = ("alembic", "sqlalchemy", "sqlmodel", "zenml.zen_stores.sql_zen_store")
    assert [name for name in database if name in operations_loaded["modules"]] == []
