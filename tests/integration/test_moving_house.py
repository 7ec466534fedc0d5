"""check, logs and promote with ZenML's real client and database, an archive, a collector and Datadog's stand-in."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.servers.collector import Collector, start_collector
from tests.servers.datadog import API_KEY, APPLICATION_KEY, Datadog
from tests.servers.zenml_server import ZenML

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]

REGISTER = """
import json, sys
from zenml.client import Client
from zenml.enums import StackComponentType as Type

client = Client()
client.create_secret("datadog", json.loads(sys.argv[2]))
client.create_flavor("composite_logstore.CompositeLogStoreFlavor", Type.LOG_STORE)
client.create_stack_component("logs", "composite", Type.LOG_STORE, json.loads(sys.argv[1]))
client.create_stack("s", {Type.ORCHESTRATOR: "default", Type.ARTIFACT_STORE: "default", Type.LOG_STORE: "logs"}, )
client.activate_stack("s")
"""

RUN = """
import logging, sys, time
from pathlib import Path
from zenml import pipeline, step

logger = logging.getLogger("train")
signs = Path(sys.argv[2])

@step(enable_cache=False)
def load() -> int:
    for number in range(3):
        logger.info("load %s", number)
    return 3

@step(enable_cache=False)
def train(number: int) -> None:
    for epoch in range(number):
        logger.warning("epoch %s", epoch)
        print("printed", epoch)
    if sys.argv[3:]:
        (signs / "middle").touch()
        while not (signs / "go").exists():
            time.sleep(0.05)
        logger.error("the last epoch")

@pipeline
def fit() -> None:
    train(load())

fit.with_options(run_name=sys.argv[1])()
"""


class House:
    """A ZenML with a log store of three children, in which the run `first` has ended."""

    def __init__(self, zenml: ZenML, directory: Path) -> None:
        self.zenml = zenml
        self.directory = directory
        self.program = directory / "fit.py"
        self.program.write_text(RUN)

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run the real command line."""
        return subprocess.run(
            [sys.executable, "-m", "composite_logstore", *arguments],
            env=self.zenml.env,
            cwd=self.zenml.directory,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
        )

    def entries(self, *arguments: str) -> list[dict[str, Any]]:
        """Return what `logs` shows."""
        done = self.command("logs", *arguments, "--output", "json")
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with start_collector() as collector:
        yield collector


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory, collector: Collector) -> Iterator[House]:
    directory = tmp_path_factory.mktemp("house")
    zenml = ZenML(directory / "zenml")
    zenml.env["PYTHONPATH"] = f"{ROOT}:{ROOT / 'backends'}"
    with Datadog() as datadog:
        keys = {"api_key": API_KEY, "application_key": APPLICATION_KEY}
        references = {name: f"{{{{datadog.{name}}}}}" for name in keys}
        children = [
            {"name": "archive", "type": "artifact"},
            {"name": "collector", "type": "otlp", "endpoint": collector.http_endpoint},
            {"name": "live", "type": "datadog", **datadog.settings, **references},
            {"name": "gone", "type": "otlp", "endpoint": "http://127.0.0.1:9", "enabled": False},
        ]
        settings = {"primary": "archive", "fetch_fallback": ["live"], "children": children}
        program = directory / "register.py"
        program.write_text(REGISTER)
        zenml.python(str(program), json.dumps(settings), json.dumps(keys))
        house = House(zenml, directory)
        zenml.python(str(house.program), "first", str(directory))
        yield house


def test_check_finds_what_it_wrote_in_each_child(house: House, collector: Collector) -> None:
    done = house.command("check", "logs", "--output", "json")
    assert done.returncode == 0, done.stdout + done.stderr
    children = {child["name"]: child for child in json.loads(done.stdout)["children"]}
    results = {name: {one["what"]: one["result"] for one in child["findings"]} for name, child in children.items()}
    steps = ("settings", "secrets", "write", "read", "clock")
    assert {name: [found[step] for step in steps] for name, found in results.items()} == {
        "archive": ["ok", "unknown", "ok", "ok", "unknown"],
        "collector": ["ok", "unknown", "ok", "unknown", "ok"],
        "live": ["ok", "ok", "ok", "ok", "ok"],
    }
    assert API_KEY not in done.stdout
    collector.wait_for("composite-logstore check of log store 'logs'")
    # No run has the stream.
    assert not any("composite-logstore check" in entry["message"] for entry in house.entries("first"))


def test_check_says_what_is_wrong_and_what_to_do(house: House) -> None:
    done = house.command("check", "logs", "--child", "gone", "--child", "archive")
    assert done.returncode == 1
    assert "gone, write: cannot reach the collector: Connection refused." in done.stdout
    assert "What to do: see whether it runs, and can be reached from this machine." in done.stdout
    assert "1 of 2 children do not work: gone." in done.stdout


@pytest.mark.parametrize("child", ["archive", "live"])
def test_logs_shows_a_run_and_a_step_from_either_child(house: House, child: str) -> None:
    every = house.entries("first", "--from", child)
    times = [entry["timestamp"] for entry in every]
    assert times == sorted(times)
    assert {(entry["step"], entry["source"]) for entry in every} >= {
        (None, "client"),
        ("load", "step"),
        ("train", "step"),
    }
    messages = [
        entry["message"] for entry in house.entries("first", "--from", child, "--step", "load", "--source", "step")
    ]
    assert messages == ["load 0", "load 1", "load 2"]
    warnings = house.entries("first", "--from", child, "--level", "WARNING", "--search", "epoch")
    assert [entry["message"] for entry in warnings] == ["epoch 0", "epoch 1", "epoch 2"]


def test_what_is_not_there_is_named_with_the_nearest(house: House) -> None:
    for arguments, words in (
        (("logs", "frist"), "did you mean 'first'?"),
        (("logs", "first", "--from", "archiv"), "did you mean 'archive'?"),
        (("logs", "first", "--from", "collector"), "child 'collector' of log store 'logs' cannot be read"),
        (("check", "log"), "did you mean 'logs'?"),
        (("promote", "logs", "liv"), "did you mean 'live'?"),
        (("promote", "logs", "collector"), "cannot be read"),
    ):
        done = house.command(*arguments)
        assert (done.returncode, words in done.stderr) == (2, True), done.stderr


@pytest.mark.parametrize("child", ["archive", "live"])
def test_a_run_is_followed_to_its_end(house: House, child: str, tmp_path: Path) -> None:
    name = f"followed-{child}"
    run = house.zenml.popen(str(house.program), name, str(tmp_path), "wait")
    try:
        while not (tmp_path / "middle").exists():
            assert run.poll() is None
        following = house.zenml.popen(
            "-m", "composite_logstore", "logs", name, "--step", "train", "--source", "step", "--from", child, "--follow"
        )
        assert following.stdout is not None
        shown = [following.stdout.readline()]
        while "printed 2" not in shown[-1] and shown[-1].split()[-1] != "2":
            shown.append(following.stdout.readline())
            assert shown[-1], shown
        (tmp_path / "go").touch()
        rest, _ = following.communicate(timeout=60)
        assert following.returncode == 0, rest
        lines = [*shown, *rest.splitlines()]
        assert sum("the last epoch" in line for line in lines) == 1
        assert [line.split()[-1] for line in lines if " epoch " in line and "WARNING" in line] == ["0", "1", "2"]
    finally:
        (tmp_path / "go").touch()
        run.communicate(timeout=60)


def test_ctrl_c_ends_following_cleanly(house: House, tmp_path: Path) -> None:
    run = house.zenml.popen(str(house.program), "interrupted", str(tmp_path), "wait")
    try:
        while not (tmp_path / "middle").exists():
            assert run.poll() is None
        following = subprocess.Popen(
            [sys.executable, "-m", "composite_logstore", "logs", "interrupted", "-f"],
            env=house.zenml.env,
            cwd=house.zenml.directory,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        assert following.stdout is not None
        assert following.stdout.readline()
        following.send_signal(signal.SIGINT)
        _, errors = following.communicate(timeout=60)
        assert (following.returncode, errors) == (130, "")
    finally:
        (tmp_path / "go").touch()
        run.communicate(timeout=60)


def test_promote_changes_the_registered_component_there_and_back(house: House) -> None:
    def registered() -> dict[str, Any]:
        program = (
            "import json; from zenml.client import Client; from zenml.enums import StackComponentType as Type;"
            "print('>', json.dumps(Client().get_stack_component(Type.LOG_STORE, 'logs').configuration))"
        )
        return dict(json.loads(house.zenml.python("-c", program).split("> ")[-1]))

    before = registered()
    refused = house.command("promote", "logs", "live", "--yes")
    assert refused.returncode in (0, 1)
    forced = house.command("promote", "logs", "live", "--yes", "--force")
    assert forced.returncode == 0, forced.stderr
    # They change places, and nothing else changes: neither a reference nor what is not set.
    assert registered() == {**before, "primary": "live", "fetch_fallback": ["archive"]}
    assert "load 0" in house.command("logs", "first").stdout
    back = forced.stdout.split("To go back: composite-logstore ")[1].split()
    assert house.command(*back, "--yes").returncode == 0
    assert registered() == before


def test_without_a_server_that_answers_there_is_no_answer(house: House, tmp_path: Path) -> None:
    other = ZenML(tmp_path / "other")
    other.env["PYTHONPATH"] = house.zenml.env["PYTHONPATH"]
    other.env["ZENML_STORE_URL"] = "http://127.0.0.1:9"
    other.env["ZENML_STORE_API_KEY"] = "ZENKEY_nobody"
    for arguments in (("check", "logs"), ("logs", "first"), ("promote", "logs", "live")):
        done = subprocess.run(
            [sys.executable, "-m", "composite_logstore", *arguments],
            env=other.env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 3, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        assert "zenml" in done.stderr
