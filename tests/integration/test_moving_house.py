"""check, logs and promote with ZenML's real client and database, an archive, a collector and Datadog's stand-in."""

from __future__ import annotations

import base64
import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from composite_logstore.operations.asking import ANSWER_SECONDS
from tests.commands import Commands
from tests.patience import PATIENCE_SECONDS
from tests.servers.collector import Collector, start_collector
from tests.servers.datadog import API_KEY, APPLICATION_KEY, Datadog
from tests.servers.zenml_server import ZenML

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]

REGISTER = """
import json, os
from zenml.client import Client
from zenml.enums import StackComponentType as Type

client = Client()
client.create_secret("datadog", json.loads(os.environ["KEYS"]))
client.create_flavor("composite_logstore.CompositeLogStoreFlavor", Type.LOG_STORE)
client.create_stack_component("logs", "composite", Type.LOG_STORE, json.loads(os.environ["SETTINGS"]))
client.create_stack("s", {Type.ORCHESTRATOR: "default", Type.ARTIFACT_STORE: "default", Type.LOG_STORE: "logs"})
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


class House(Commands):
    """A ZenML with a log store of three children, in which the run `first` has ended and `followed` waits.

    Attributes:
        run: The process of the run that waits.
    """

    run: subprocess.Popen[str]

    def __init__(self, zenml: ZenML, directory: Path) -> None:
        super().__init__(zenml)
        self.directory = directory
        self.program = directory / "fit.py"
        self.program.write_text(RUN)

    def go(self) -> None:
        """Let the run go on."""
        (self.directory / "go").touch()

    def registered(self) -> dict[str, Any]:
        """Return the log store's settings as ZenML's database has them."""
        ((configuration,),) = self.query("SELECT configuration FROM stack_component WHERE name = 'logs'")
        return dict(json.loads(base64.b64decode(configuration)))

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
        zenml.env |= {"SETTINGS": json.dumps(settings), "KEYS": json.dumps(keys)}
        program = directory / "first.py"
        program.write_text(REGISTER + RUN)
        zenml.python(str(program), "first", str(directory))
        house = House(zenml, directory)
        # It waits in its middle, for the test that follows it.
        house.run = zenml.popen(str(house.program), "followed", str(directory), "wait")
        try:
            yield house
        finally:
            house.go()
            house.run.communicate(timeout=PATIENCE_SECONDS)
            house.close()


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
    assert any(
        "composite-logstore check of log store 'logs'" in record.body for record in collector.wait_for_records(1)
    )
    # No run has the stream.
    assert not any("composite-logstore check" in entry["message"] for entry in house.entries("first"))


def test_check_says_what_is_wrong_and_what_to_do(house: House) -> None:
    done = house.command("check", "logs", "--child", "gone", "--child", "archive")
    assert done.returncode == 1
    assert "gone, write: cannot reach the collector: Connection refused." in done.stdout
    assert "What to do: check that it runs and that this machine can reach it." in done.stdout
    assert "1 of 2 children does not work: gone." in done.stdout


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


def follow(house: House, child: str) -> subprocess.Popen[str]:
    how = ("followed", "--step", "train", "--source", "step", "--from", child, "--follow")
    return subprocess.Popen(
        [sys.executable, "-m", "composite_logstore", "logs", *how],
        env=house.zenml.env,
        cwd=house.zenml.directory,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # Whoever runs the tests may have it ignored, as shells do with what runs in the background.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def until_epoch_2(process: subprocess.Popen[str]) -> list[str]:
    """Return what it shows until all is shown that the step has said so far."""
    assert process.stdout is not None
    lines = [process.stdout.readline()]
    while not lines[-1].rstrip().endswith("printed 2"):
        lines.append(process.stdout.readline())
        assert lines[-1], lines
    return lines


def test_promote_changes_the_registered_component_there_and_back(house: House) -> None:
    before = house.registered()
    forced = house.command("promote", "logs", "live", "--yes", "--force")
    assert forced.returncode == 0, forced.stderr
    # They change places, and nothing else changes: neither a reference nor what is not set.
    assert house.registered() == {**before, "primary": "live", "fetch_fallback": ["archive"]}
    assert "load 0" in house.command("logs", "first").stdout
    back = forced.stdout.split("To go back: composite-logstore ")[1].split()
    assert house.command(*back, "--yes").returncode == 0
    assert house.registered() == before


def test_while_the_primary_is_down_promote_prints_the_way_back_within_seconds(house: House) -> None:
    before = house.registered()
    assert house.command("promote", "logs", "live", "--yes", "--force").returncode == 0
    (live,) = (child for child in json.loads(house.zenml.env["SETTINGS"])["children"] if child["name"] == "live")
    # Nobody listens there.
    house.update("live", api_endpoint="http://127.0.0.1:9")
    try:
        begin = time.monotonic()
        refused = house.command("promote", "logs", "archive", "--yes")
        assert time.monotonic() - begin < ANSWER_SECONDS + 5
        assert refused.returncode == 1
        assert "child 'live', first client: Could not reach Datadog" in refused.stderr
        back = shlex.split(refused.stderr.splitlines()[-1])
        assert house.command(*back[1:], "--yes").returncode == 0
    finally:
        house.update("live", api_endpoint=live["api_endpoint"])
    assert house.registered()["primary"] == before["primary"] == "archive"


def test_a_run_is_followed_to_its_end_or_to_a_ctrl_c(house: House) -> None:
    while not (house.directory / "middle").exists():
        assert house.run.poll() is None
        time.sleep(0.05)
    interrupted, to_the_end = follow(house, "archive"), follow(house, "live")
    lines = until_epoch_2(to_the_end)
    until_epoch_2(interrupted)
    interrupted.send_signal(signal.SIGINT)
    rest, _ = interrupted.communicate(timeout=PATIENCE_SECONDS)
    assert (interrupted.returncode, rest) == (130, "")
    house.go()
    rest, _ = to_the_end.communicate(timeout=PATIENCE_SECONDS)
    assert to_the_end.returncode == 0, rest
    said = [line.split(" ", 2)[2].strip() for line in (*lines, *rest.splitlines())]
    assert [line.split()[-1] for line in said if line.startswith("WARN")] == ["0", "1", "2"]
    assert sum("the last epoch" in line for line in said) == 1
