"""verify and backfill with ZenML's real client and database, S3, a collector and Datadog's stand-in."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tests.integration.test_moving_house import ROOT, House
from tests.servers.datadog import API_KEY, APPLICATION_KEY, Datadog
from tests.servers.otlp_receiver import OtlpReceiver
from tests.servers.s3 import ACCESS_KEY, SECRET_KEY, s3_server
from tests.servers.zenml_server import ZenML

pytestmark = pytest.mark.integration

REGISTER = """
import json, sys
from zenml.client import Client
from zenml.enums import StackComponentType as Type

client = Client()
children, bucket = json.loads(sys.argv[1]), json.loads(sys.argv[2])
client.create_stack_component("bucket", "s3", Type.ARTIFACT_STORE, bucket)
client.create_flavor("composite_logstore.CompositeLogStoreFlavor", Type.LOG_STORE)
client.create_stack_component("logs", "composite", Type.LOG_STORE, {"primary": "archive", "children": children})
client.create_stack("s", {Type.ORCHESTRATOR: "default", Type.ARTIFACT_STORE: "default", Type.LOG_STORE: "logs"})
"""


# Commands one after the other in one process: importing ZenML takes longer than any of them.
SERVE = """
import json, sys
from click.testing import CliRunner
from composite_logstore.cli.main import main

for line in sys.stdin:
    done = CliRunner().invoke(main, json.loads(line))
    print("\\n> " + json.dumps([done.exit_code, done.stdout, done.stderr]), flush=True)
"""


class Fleet(House):
    """Runs with a stock log store, then runs with the composite; two of its children have got nothing."""

    def __init__(self, zenml: ZenML, directory: Path, receiver: OtlpReceiver, datadog: Datadog) -> None:
        super().__init__(zenml, directory)
        self.receiver = receiver
        self.datadog = datadog
        self._process: subprocess.Popen[str] | None = None

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a command as the command line does."""
        if self._process is None:
            program = self.directory / "serve.py"
            program.write_text(SERVE)
            self._process = subprocess.Popen(
                [sys.executable, str(program)],
                env=self.zenml.env,
                cwd=self.zenml.directory,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(arguments) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("> "):
                code, out, err = json.loads(line[2:])
                return subprocess.CompletedProcess(arguments, code, out, err)
        raise AssertionError("the process has ended")

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def values(self, *arguments: str, code: int = 0) -> dict[str, Any]:
        """Return what a command prints for programs."""
        done = self.command(*arguments, "--output", "json")
        assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
        values = json.loads(done.stdout)
        assert isinstance(values, dict)
        return values


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    directory = tmp_path_factory.mktemp("fleet")
    zenml = ZenML(directory / "zenml")
    zenml.env["PYTHONPATH"] = f"{ROOT}:{ROOT / 'backends'}"
    with Datadog() as datadog, OtlpReceiver() as receiver, s3_server() as s3:
        keys = {"api_key": API_KEY, "application_key": APPLICATION_KEY}
        children = [
            {"name": "archive", "type": "artifact", "artifact_store": "default"},
            {"name": "live", "type": "datadog", **datadog.settings, **keys},
            {"name": "old", "type": "component", "component": "default", "enabled": False},
            {"name": "bucket", "type": "artifact", "artifact_store": "bucket", "enabled": False},
            {"name": "collector", "type": "otlp", "endpoint": receiver.http_endpoint, "enabled": False},
        ]
        bucket = {
            "path": f"s3://{s3.bucket}/store",
            "key": ACCESS_KEY,
            "secret": SECRET_KEY,
            "client_kwargs": {"endpoint_url": s3.endpoint, "region_name": "us-east-1"},
        }
        fleet = Fleet(zenml, directory, receiver, datadog)
        program = directory / "register.py"
        program.write_text(REGISTER)
        zenml.python(str(program), json.dumps(children), json.dumps(bucket))
        zenml.python(str(fleet.program), "stock", str(directory))
        zenml.cli("stack", "set", "s")
        zenml.python(str(fleet.program), "first", str(directory))
        yield fleet
        fleet.close()


def test_a_run_is_verified_copied_verified_again_and_a_loss_is_named(fleet: Fleet) -> None:
    found = fleet.values("verify", "logs", "--run", "first", "--child", "archive", "--child", "live")
    assert found["parity"]
    assert found["children"]["archive"]["events"] == found["children"]["live"]["events"] > 6
    events = found["children"]["archive"]["events"]

    lacking = fleet.values("verify", "logs", "--run", "first", "--child", "archive", "--child", "bucket", code=1)
    assert lacking["children"]["bucket"]["missing"] == events
    copied = fleet.values("backfill", "logs", "--from", "archive", "--to", "bucket", "--run", "first")
    assert copied["copied"] == events
    again = fleet.values("backfill", "logs", "--from", "archive", "--to", "bucket", "--run", "first", "--anew")
    assert (again["copied"], again["there"]) == (0, events)
    assert fleet.values("verify", "logs", "--run", "first", "--child", "archive", "--child", "bucket")["parity"]

    # What is not an archive has what its pages show.
    back = fleet.values("verify", "logs", "--run", "first", "--child", "bucket", "--child", "live")
    assert back["parity"], back["events"]

    # The stock log store's files are there too.
    files = {path: path.read_bytes() for path in fleet.zenml.directory.rglob("logs/*.log")}
    archive = next(path for path, content in files.items() if b'"epoch 1"' in content and b'"sequence"' in content)
    lines = archive.read_bytes().splitlines(keepends=True)
    lost = next(place for place, line in enumerate(lines) if b'"epoch 1"' in line)
    archive.write_bytes(b"".join([*lines[:lost], *lines[lost + 1 :]]))
    report = fleet.directory / "report.html"
    arguments = ("verify", "logs", "--run", "first", "--child", "archive", "--child", "bucket", "--html", str(report))
    named = fleet.values(*arguments, code=1)["events"]
    assert [(event["kind"], event["child"], event["message"]) for event in named] == [("missing", "archive", "epoch 1")]
    assert named[0]["uid"] == json.loads(lines[lost])["id"]
    page = report.read_text()
    HTMLParser().feed(page)
    assert "epoch 1" in page
    assert named[0]["uid"] in page
    assert "src=" not in page
    assert "http://" not in page

    mended = fleet.values("backfill", "logs", "--from", "bucket", "--to", "archive", "--run", "first")
    assert mended["copied"] == 1
    assert fleet.values("verify", "logs", "--run", "first", "--child", "archive", "--child", "bucket")["parity"]
    shown = [entry["message"] for entry in fleet.entries("first")]
    assert shown.count("epoch 1") == 1


def test_what_the_stock_log_store_has_is_copied_once(fleet: Fleet) -> None:
    arguments = ("backfill", "logs", "--from", "old", "--to", "bucket", "--run", "stock")
    copied = fleet.values(*arguments)["copied"]
    assert copied > 6
    assert fleet.values(*arguments)["copied"] == 0
    found = fleet.values("verify", "logs", "--run", "stock", "--child", "old", "--child", "bucket")
    assert found["parity"]
    assert found["children"]["bucket"]["events"] == copied


def test_a_collector_gets_what_the_archive_has_and_nothing_twice(fleet: Fleet) -> None:
    arguments = ("backfill", "logs", "--from", "bucket", "--to", "collector", "--run", "first")
    copied = fleet.values(*arguments)["copied"]
    records = fleet.receiver.records()
    assert copied == len(records) > 6
    assert {"zenml.pipeline.run.name", "zenml.log.id", "log.record.uid"} <= records[0].attributes.keys()
    assert fleet.values(*arguments)["copied"] == 0
    assert len(fleet.receiver.records()) == copied


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("verify", "logs"), "Say which streams are meant"),
        (("verify", "lgos", "--all"), "did you mean 'logs'?"),
        (("verify", "logs", "--run", "frist"), "did you mean 'first'?"),
        (("verify", "logs", "--all", "--child", "collector"), "cannot be read"),
        (("backfill", "logs", "--from", "archive", "--to", "archive", "--all"), "cannot be copied to itself"),
        (("backfill", "logs", "--from", "collector", "--to", "archive", "--all"), "cannot be read"),
        (("backfill", "logs", "--from", "archive", "--to", "bukcet", "--all"), "did you mean 'bucket'?"),
    ],
)
def test_bad_input_is_named(fleet: Fleet, arguments: tuple[str, ...], words: str) -> None:
    done = fleet.command(*arguments)
    assert done.returncode == 2
    assert words in done.stderr


def test_a_backend_that_is_away_is_named_and_proves_nothing(fleet: Fleet) -> None:
    fleet.datadog.__exit__(None, None, None)
    found = fleet.values("verify", "logs", "--run", "first", "--child", "archive", "--child", "live", code=3)
    assert not found["parity"]
    assert {one["child"] for one in found["not_compared"]} == {"live"}
    assert "Could not reach Datadog" in found["not_compared"][0]["why"]
