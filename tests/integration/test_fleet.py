"""A fleet of two hundred runs is verified, copied, mended and promoted; also by a ZenML pipeline, in slices."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tests.commands import Commands
from tests.servers.collector import Collector, start_collector
from tests.servers.datadog import API_KEY, APPLICATION_KEY, Datadog
from tests.servers.s3 import ACCESS_KEY, SECRET_KEY, s3_server
from tests.servers.zenml_server import ZenML

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]

RUNS, STOCK_RUNS, OLD_RUNS = 160, 40, 5
MESSAGES = 3
OLD_SECONDS = 20 * 3600.0
HEADER = "a-key-that-nobody-may-see"

# What a terminal or a browser would obey: escape sequences, markup of rich and of HTML, directions of writing.
HOSTILE = "\x1b[2J\x1b]0;owned\x07[bold red]big[/bold red]<script>alert(1)</script>&amp;\"'\u202eevil\x9b31m\u2066"
OBEYED = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


class Fleet(Commands):
    """What the tests share.

    Attributes:
        directory: Where the default artifact store and all else is.
        collector: What the child `collector` writes to.
        datadog: What the child `live` writes to.
    """

    def __init__(self, zenml: ZenML, collector: Collector, datadog: Datadog) -> None:
        super().__init__(zenml)
        self.directory = zenml.directory
        self.collector = collector
        self.datadog = datadog

    def archived(self, message: str) -> Path:
        """Return the file of the archive that has a message."""
        needle = json.dumps(message, ensure_ascii=False)[1:-1].encode()
        return next(path for path in self.directory.rglob("local_stores/*/logs/*.log") if needle in path.read_bytes())

    def lose(self, message: str) -> None:
        """Cut the event with a message out of the archive."""
        path = self.archived(message)
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join(line for line in lines if message.encode() not in line))


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    directory = tmp_path_factory.mktemp("fleet")
    zenml = ZenML(directory / "zenml")
    zenml.env["PYTHONPATH"] = f"{ROOT}:{ROOT / 'backends'}"
    other = directory / "other"
    other.mkdir()
    with Datadog() as datadog, start_collector() as collector, s3_server() as s3:
        headers = {"headers": {"x-key": HEADER}}
        keys = {"api_key": API_KEY, "application_key": APPLICATION_KEY}
        children: list[dict[str, Any]] = [
            {"name": "archive", "type": "artifact", "artifact_store": "default"},
            {"name": "old", "type": "component", "component": "default", "enabled": False},
            {"name": "bucket", "type": "artifact", "artifact_store": "bucket", "enabled": False},
            {"name": "second", "type": "artifact", "artifact_store": "second", "enabled": False},
            {"name": "live", "type": "datadog", **datadog.settings, **keys, "enabled": False},
            {"name": "collector", "type": "otlp", "endpoint": collector.http_endpoint, **headers, "enabled": False},
        ]
        bucket = {
            "path": f"s3://{s3.bucket}/store",
            "key": ACCESS_KEY,
            "secret": SECRET_KEY,
            "client_kwargs": {"endpoint_url": s3.endpoint, "region_name": "us-east-1"},
        }
        ages = [OLD_SECONDS if number < OLD_RUNS else 3600.0 for number in range(RUNS)]
        runs = [
            ["s", f"run-{number}", age, [f"run {number} epoch {epoch}" for epoch in range(MESSAGES)]]
            for number, age in enumerate(ages)
        ]
        runs[7][1:] = [f"run-7 {HOSTILE}", 3600.0, ["run 7 epoch 0", f"hostile {HOSTILE}", "run 7 epoch 2"]]
        runs += [["stock", f"stock-{n}", 3600.0, [f"stock {n} line {m}" for m in range(MESSAGES)]] for n in range(40)]
        stores = {"bucket": ["s3", bucket], "second": ["local", {"path": str(other)}]}
        settings = {"primary": "archive", "children": children, "stores": stores, "runs": runs}
        zenml.python("-m", "tests.fleet", json.dumps(settings))
        fleet = Fleet(zenml, collector, datadog)
        yield fleet
        fleet.close()


def test_a_fleet_is_copied_to_s3_verified_mended_and_promoted(fleet: Fleet, tmp_path: Path) -> None:
    copied = fleet.values("backfill", "logs", "--from", "archive", "--to", "bucket", "--all")
    assert copied["copied"] == RUNS * MESSAGES
    assert copied["streams"] >= RUNS
    stock = fleet.values("backfill", "logs", "--from", "old", "--to", "bucket", "--all")
    assert stock["copied"] == STOCK_RUNS * MESSAGES
    found = fleet.values("verify", "logs", "--all", "--child", "old", "--child", "archive", "--child", "bucket")
    assert found["parity"], found
    assert found["streams"] >= RUNS + STOCK_RUNS
    assert found["children"]["bucket"]["events"] == (RUNS + STOCK_RUNS) * MESSAGES

    lost = ["run 3 epoch 0", "run 80 epoch 2", "run 159 epoch 1"]
    for message in lost:
        fleet.lose(message)
    hostile = fleet.archived("hostile")
    hostile.write_bytes(
        hostile.read_bytes().replace(b"run 7 epoch 0", b"run 7 epoch x").replace(b"hostile", b"Hostile")
    )
    report = tmp_path / "report.html"
    arguments = ("verify", "logs", "--all", "--child", "archive", "--child", "bucket")
    named = fleet.values(*arguments, "--html", str(report), code=1)
    assert sorted(event["message"] for event in named["events"] if event["kind"] == "missing") == sorted(lost)
    differing = [event for event in named["events"] if event["kind"] == "different"]
    assert {event["stream"] for event in differing} == {f"run-7 {HOSTILE} train/step"}
    assert any(HOSTILE in event["message"] for event in differing)

    assert is_inert(report.read_text())
    shown = fleet.command(*arguments)
    assert shown.returncode == 1
    assert "alert(1)" in shown.stdout
    assert "[bold red]big[/bold red]" in shown.stdout
    assert not OBEYED.search(shown.stdout)
    assert not OBEYED.search(shown.stderr)

    hostile.write_bytes(
        hostile.read_bytes().replace(b"run 7 epoch x", b"run 7 epoch 0").replace(b"Hostile", b"hostile")
    )
    assert fleet.values("backfill", "logs", "--from", "bucket", "--to", "archive", "--all")["copied"] == len(lost)
    fleet.update("bucket", enabled=True)
    promoted = fleet.values("promote", "logs", "bucket", "--yes")
    assert promoted["primary"] == "bucket"
    assert f"{RUNS * MESSAGES} events" in promoted["verdict"]["reason"]


def is_inert(page: str) -> bool:
    """Return whether a page holds nothing that a browser would run, load or turn around."""
    tags: list[tuple[str, list[tuple[str, str | None]]]] = []

    class Parser(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            tags.append((tag, attrs))

    Parser().feed(page)
    known = {"html", "head", "meta", "title", "style", "body", "h1", "h2", "q", "p", "table", "tr", "th", "td", "span"}
    known |= {"svg", "line", "text", "circle", "rect"}
    names = {name for _, attributes in tags for name, _ in attributes}
    return (
        {tag for tag, _ in tags} <= known
        and not any(name.startswith("on") or name in ("src", "href") for name in names)
        and not OBEYED.search(page)
        and "alert(1)" in page
    )


def test_a_collector_gets_the_fleet_once(fleet: Fleet) -> None:
    arguments = ("backfill", "logs", "--from", "archive", "--to", "collector", "--all")
    assert fleet.values(*arguments)["copied"] == RUNS * MESSAGES
    assert fleet.values(*arguments)["copied"] == 0
    records = fleet.collector.wait_for_records(RUNS * MESSAGES)
    assert len({record.attributes["log.record.uid"] for record in records}) == len(records) == RUNS * MESSAGES


def test_datadog_gets_what_is_not_too_old_and_the_rest_is_counted(fleet: Fleet) -> None:
    done = fleet.command("backfill", "logs", "--from", "archive", "--to", "live", "--all", "--output", "json")
    assert done.returncode == 1
    assert "takes nothing older than 18 h" in done.stderr
    values = json.loads(done.stdout)
    assert values["too_old"] == OLD_RUNS * MESSAGES
    assert values["copied"] == (RUNS - OLD_RUNS) * MESSAGES
    seen = fleet.values("verify", "logs", "--run", "run-100", "--child", "archive", "--child", "live")
    assert seen["parity"]
    lacking = fleet.values("verify", "logs", "--run", "run-0", "--child", "archive", "--child", "live", code=1)
    assert lacking["children"]["live"]["missing"] == MESSAGES


def test_a_pipeline_copies_the_fleet_in_slices_and_then_nothing(fleet: Fleet) -> None:
    arguments = ("backfill", "logs", "--from", "archive", "--to", "second", "--all", "--pipeline", "--slices", "3")
    copied = fleet.values(*arguments)
    assert (copied["copied"], copied["stopped"]) == (RUNS * MESSAGES, "")
    # Its own run, which is in progress meanwhile, and those of earlier pipelines have no logs.
    assert copied["in_progress"] == 0
    again = fleet.values(*arguments)
    assert (again["copied"], again["there"], again["streams"]) == (0, RUNS * MESSAGES, copied["streams"])
    steps = fleet.query("SELECT name FROM step_run WHERE name LIKE '%copy_slice%'")
    assert sorted(name for (name,) in steps) == sorted(2 * [f"map:copy_slice:{number}" for number in range(3)])
