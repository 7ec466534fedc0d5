"""Every mistake in the settings is refused where a component is registered or updated, by ZenML's own CLI.

Nothing is logged here, so no agent would have anything to deliver.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from zenml.cli.cli import cli
from zenml.client import Client
from zenml.enums import StackComponentType

from tests.programs import Programs
from tests.servers.zenml_server import ZenML

pytestmark = pytest.mark.e2e

KEY = "test-key-that-nobody-may-see"
ARCHIVE = {"name": "archive", "type": "artifact"}
COLLECTOR = {"name": "collector", "type": "otlp", "endpoint": "http://127.0.0.1:4318"}
LIVE = {"name": "live", "type": "datadog", "api_key": KEY, "application_key": KEY}

# What is wrong; what is given besides `--primary=archive` and three good children; what the message names.
MISTAKES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "unknown key": (
        {"children": [ARCHIVE, {**LIVE, "min_levle": KEY}]},
        ["child 'live'", "unknown key 'min_levle'", "did you mean 'min_level'?", "the keys of this type are: name,"],
    ),
    "unknown type": (
        {"children": [ARCHIVE, {"name": "cloud", "type": "datadgo"}]},
        [
            "child 'cloud'",
            "'type'",
            "did you mean 'datadog'?",
            "set one of: artifact, cloudwatch, component, datadog, elasticsearch, otel, otlp",
        ],
    ),
    "no such primary": (
        {"primary": "archiv"},
        ["'primary'", "no child 'archiv'", "did you mean 'archive'?", "set one of: archive, live"],
    ),
    "no primary": ({"primary": None}, ["primary"]),
    "primary is disabled": (
        {"children": [{**ARCHIVE, "enabled": False}, LIVE]},
        ["'primary'", "child 'archive' is disabled", "set one of: live"],
    ),
    "primary cannot be read": (
        {"primary": "collector"},
        ["'primary'", "child 'collector': children of type 'otlp' cannot be read", "set one of: archive, live"],
    ),
    "duplicate name": ({"children": [ARCHIVE, {**LIVE, "name": "archive"}]}, ["child 'archive'", "'name'", "its own"]),
    "characters of a name": (
        {"children": [ARCHIVE, {**LIVE, "name": "Live!"}]},
        ["child 'Live!'", "'name'", "a-z 0-9"],
    ),
    "no name": ({"children": [ARCHIVE, {"type": "datadog", "api_key": KEY}]}, ["child number 2", "'name' is required"]),
    "no type": ({"children": [ARCHIVE, {"name": "live", "api_key": KEY}]}, ["child 'live'", "'type' is required"]),
    "batch above the backend's limit": (
        {"children": [ARCHIVE, {**LIVE, "max_export_batch_size": 1001}]},
        ["child 'live'", "'max_export_batch_size'", "at most 1000"],
    ),
    "no such level": ({"children": [{**ARCHIVE, "min_level": "LOUD"}]}, ["child 'archive'", "'min_level'", "INFO"]),
    "queue without room": (
        {"children": [{**ARCHIVE, "max_queue_size": 0}]},
        ["child 'archive'", "'max_queue_size'", "greater than 0"],
    ),
    "retries": (
        {"children": [{**ARCHIVE, "retry_max_interval_millis": 10}]},
        ["child 'archive'", "'retry_max_interval_millis'", "'retry_initial_interval_millis'"],
    ),
    "no key": (
        {"children": [ARCHIVE, {"name": "live", "type": "datadog", "application_key": KEY}]},
        ["child 'live'", "'api_key' is required"],
    ),
    "key of the wrong kind": (
        {"children": [ARCHIVE, {**LIVE, "api_key": [KEY]}]},
        ["child 'live'", "'api_key'", "string"],
    ),
    "site": (
        {"children": [ARCHIVE, {**LIVE, "site": f"https://{KEY}.datadoghq.com"}]},
        ["child 'live'", "'site'", "'datadoghq.eu'"],
    ),
    "intake": (
        {"children": [ARCHIVE, {**LIVE, "endpoint": f"{KEY}:443/logs"}]},
        ["child 'live'", "'endpoint'", "https://"],
    ),
    "endpoint": (
        {"children": [ARCHIVE, {**COLLECTOR, "endpoint": f"{KEY} :4318"}]},
        ["child 'collector'", "'endpoint'"],
    ),
    "protocol": (
        {"children": [ARCHIVE, {**COLLECTOR, "protocol": KEY}]},
        ["child 'collector'", "'protocol'", "'http/protobuf'", "'grpc'"],
    ),
    "compression": (
        {"children": [ARCHIVE, {**COLLECTOR, "compression": KEY}]},
        ["child 'collector'", "'compression'", "'gzip'"],
    ),
    "no such fallback": (
        {"fetch_fallback": ["lvie"]},
        ["'fetch_fallback'", "no child 'lvie'", "did you mean 'live'?"],
    ),
    "fallback is the primary": ({"fetch_fallback": ["archive"]}, ["'fetch_fallback'", "child 'archive'", "once"]),
    "served, and the primary is no archive": (
        {"primary": "live", "serve_from_artifact_store": "true"},
        ["'serve_from_artifact_store'", "child 'live' is the primary", "set 'primary' to one of: archive"],
    ),
    "served, and a fallback": (
        {"fetch_fallback": ["live"], "serve_from_artifact_store": "true"},
        ["'fetch_fallback'", "leave one of the two out"],
    ),
    "no children": ({"children": []}, ["'children'", "at least one"]),
    "children that are no list": ({"children": {"live": LIVE}}, ["'children'", "list"]),
    "child that is no object": ({"children": [ARCHIVE, KEY]}, ["child number 2", "'name'", "'type'"]),
    "children that are no JSON": (
        {"children": f"[{json.dumps(LIVE)},]"},
        ["'children' is not valid JSON", "line 1", "--children=@file.json"],
    ),
    "durability": ({"durability": "always"}, ["durability", "'spill'"]),
    "spool directory": ({"spool_directory": "here"}, ["'spool_directory'", "absolute path"]),
    "unknown setting of the composite": ({"flush_timeout": 1}, ["flush_timeout"]),
}


def options(changes: dict[str, Any]) -> list[str]:
    """Return the CLI's options for the settings."""
    settings = {"primary": "archive", "children": [ARCHIVE, COLLECTOR, LIVE], **changes}
    return [
        f"--{key}={value if isinstance(value, str) else json.dumps(value)}"
        for key, value in settings.items()
        if value is not None
    ]


def run(*arguments: str) -> Result:
    """Run ZenML's CLI in this process: starting it takes seconds."""
    return CliRunner().invoke(cli, arguments)


def said(result: Result) -> str:
    """Return all that could be shown of a command, the chain of its exceptions included."""
    error = result.exception
    shown = "".join(traceback.format_exception(type(error), error, error.__traceback__)) if error else ""
    return result.output + shown


@pytest.fixture(scope="module", autouse=True)
def flavor() -> Iterator[None]:
    result = run("log-store", "flavor", "register", "composite_logstore.CompositeLogStoreFlavor")
    assert result.exit_code == 0, said(result)
    yield
    Client().delete_flavor("composite")


@pytest.fixture(scope="module")
def registered() -> Iterator[str]:
    """A component without mistakes."""
    result = run("log-store", "register", "good", "--flavor", "composite", *options({}))
    assert result.exit_code == 0, said(result)
    yield "good"
    Client().delete_stack_component("good", StackComponentType.LOG_STORE)


def names() -> set[str]:
    """Return the names of all log stores."""
    return {component.name for component in Client().list_stack_components(type="log_store").items}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_register_refuses(mistake: str) -> None:
    changes, words = MISTAKES[mistake]
    before = names()
    result = run("log-store", "register", "bad", "--flavor", "composite", *options(changes))
    assert result.exit_code != 0
    for word in words:
        assert word in str(result.exception) + result.output
    assert KEY not in said(result)
    assert names() == before


# An update keeps what it does not name, so a primary cannot be left out of it.
@pytest.mark.parametrize("mistake", sorted(MISTAKES.keys() - {"no primary"}))
def test_update_refuses(mistake: str, registered: str) -> None:
    changes, words = MISTAKES[mistake]
    before = Client().get_stack_component(StackComponentType.LOG_STORE, registered).configuration
    result = run("log-store", "update", registered, *options(changes))
    assert result.exit_code != 0
    for word in words:
        assert word in str(result.exception) + result.output
    assert KEY not in said(result)
    assert Client().get_stack_component(StackComponentType.LOG_STORE, registered).configuration == before


@pytest.fixture
def zenml(tmp_path: Path) -> Iterator[ZenML]:
    """A ZenML of its own, on a terminal of the usual width."""
    environment = ZenML(tmp_path / "imported").env | {"COLUMNS": "80"}
    with Programs(environment, tmp_path) as programs:
        zenml = ZenML(tmp_path / "zenml", programs=programs)
        zenml.env["COLUMNS"] = "80"
        yield zenml


def test_cli_itself_refuses_and_shows_no_key(zenml: ZenML) -> None:
    """The same once more in processes of their own, as people run it."""
    zenml.cli("log-store", "flavor", "register", "composite_logstore.CompositeLogStoreFlavor")

    def refused(*arguments: str) -> str:
        output = zenml.cli("log-store", *arguments, fails=True)
        assert KEY not in output
        # Only the settings may be to blame, and what they say comes last. Where a line is too long, it is broken.
        return " ".join(output.split())

    output = refused("register", "bad", "--flavor", "composite", *options(MISTAKES["unknown key"][0]))
    assert "child 'live': unknown key 'min_levle' (did you mean 'min_level'?)" in output
    assert "bad" not in zenml.cli("log-store", "list")

    output = zenml.cli("log-store", "register", "good", "--flavor", "composite", *options({}))
    assert "child 'live': 'api_key' is written in clear text" in " ".join(output.split())
    assert KEY not in output
    output = refused("update", "good", *options(MISTAKES["no such primary"][0]))
    assert "'primary': there is no child 'archiv' (did you mean 'archive'?)" in output
