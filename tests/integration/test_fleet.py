"""A fleet of two hundred runs is verified, copied, mended and promoted; also by a ZenML pipeline, in slices."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import datetime, timezone
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tests.commands import Commands, wait_until
from tests.patience import PATIENCE_SECONDS
from tests.servers.collector import Collector, start_collector
from tests.servers.datadog import API_KEY, APPLICATION_KEY, Datadog
from tests.servers.otlp_receiver import OtlpReceiver
from tests.servers.s3 import ACCESS_KEY, SECRET_KEY, s3_server
from tests.servers.zenml_server import ZenML

# A fleet of runs takes a minute and a half in all.
pytestmark = [pytest.mark.integration, pytest.mark.deep]

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
        stopped: What the child `stopped` writes to.
        receiver: What the child `receiver` writes to.
        datadog: What the child `live` writes to.
    """

    def __init__(
        self, zenml: ZenML, collector: Collector, stopped: Collector, receiver: OtlpReceiver, datadog: Datadog
    ) -> None:
        super().__init__(zenml)
        self.datadog = datadog
        self.directory = zenml.directory
        self.collector = collector
        self.stopped = stopped
        self.receiver = receiver

    def until(self, name: str) -> tuple[str, int]:
        """Return about when a run was made, and how many with the composite had been by then."""
        ((created,),) = self.query(f"SELECT created FROM pipeline_run WHERE name = '{name}'")
        second = created.partition(".")[0]
        query = f"SELECT COUNT(*) FROM pipeline_run WHERE created <= '{second}' AND name LIKE 'run-%'"
        return second, self.query(query)[0][0]

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
    servers = Datadog(), start_collector(), start_collector(), OtlpReceiver()
    with ExitStack() as stack, s3_server() as s3:
        datadog, collector, stopped, receiver = map(stack.enter_context, servers)
        headers = {"headers": {"x-key": HEADER}}
        keys = {"api_key": API_KEY, "application_key": APPLICATION_KEY}
        children: list[dict[str, Any]] = [
            {"name": "archive", "type": "artifact", "artifact_store": "default"},
            {"name": "old", "type": "component", "component": "default", "enabled": False},
            {"name": "bucket", "type": "artifact", "artifact_store": "bucket", "enabled": False},
            {"name": "second", "type": "artifact", "artifact_store": "second", "enabled": False},
            {"name": "denied", "type": "artifact", "artifact_store": "denied", "enabled": False},
            {"name": "nowhere", "type": "artifact", "artifact_store": "nowhere", "enabled": False},
            {"name": "live", "type": "datadog", **datadog.settings, **keys, "enabled": False},
            {"name": "collector", "type": "otlp", "endpoint": collector.http_endpoint, "enabled": False},
            {"name": "stopped", "type": "otlp", "endpoint": stopped.http_endpoint, "enabled": False},
            {"name": "receiver", "type": "otlp", "endpoint": receiver.http_endpoint, **headers, "enabled": False},
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
        stores = {
            "bucket": ["s3", bucket],
            "denied": ["s3", {**bucket, "secret": "a-wrong-one"}],
            "nowhere": ["s3", {**bucket, "path": "s3://no-such-bucket/store"}],
            "second": ["local", {"path": str(other)}],
        }
        settings = {"primary": "archive", "children": children, "stores": stores, "runs": runs}
        fleet = Fleet(zenml, collector, stopped, receiver, datadog)
        fleet.make_fleet(settings)
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
    before = hostile.read_bytes()
    hostile.write_bytes(before.replace(b"run 7 epoch 0", b"run 7 epoch x").replace(b"hostile", b"Hostile"))
    report = tmp_path / "report.html"
    arguments = ("--child", "archive", "--child", "bucket")
    shown = fleet.command("verify", "logs", "--all", *arguments, "--html", str(report))
    assert shown.returncode == 1
    assert not OBEYED.search(shown.stdout)
    assert "[bold red]big[/bold red]" in shown.stdout
    page = report.read_text()
    assert is_inert(page)
    for message in lost:
        assert message in shown.stdout
        assert message in page
    named = fleet.values("verify", "logs", "--run", f"run-7 {HOSTILE}", *arguments, code=1)
    assert {event["kind"] for event in named["events"]} == {"different"}
    assert any(HOSTILE in event["message"] for event in named["events"])

    hostile.write_bytes(before)
    for run in ("run-3", "run-80", "run-159"):
        assert fleet.values("backfill", "logs", "--from", "bucket", "--to", "archive", "--run", run)["copied"] == 1
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
    again = fleet.values(*arguments[:-1], "--run", "run-100")
    assert (again["copied"], again["there"]) == (0, MESSAGES)
    records = fleet.collector.wait_for_records(RUNS * MESSAGES)
    assert len({record.attributes["log.record.uid"] for record in records}) == len(records) == RUNS * MESSAGES


def test_datadog_gets_what_is_not_too_old_and_the_rest_is_counted(fleet: Fleet) -> None:
    done = fleet.command("backfill", "logs", "--from", "archive", "--to", "live", "--all", "--output", "json")
    assert done.returncode == 1
    assert "older than 18 h" in done.stderr
    values = json.loads(done.stdout)
    assert values["too_old"] == OLD_RUNS * MESSAGES
    assert values["copied"] == (RUNS - OLD_RUNS) * MESSAGES
    seen = fleet.values("verify", "logs", "--run", "run-100", "--child", "archive", "--child", "live")
    assert seen["parity"]
    lacking = fleet.values("verify", "logs", "--run", "run-0", "--child", "archive", "--child", "live", code=1)
    assert lacking["children"]["live"]["missing"] == MESSAGES


def test_a_pipeline_copies_in_slices_and_then_nothing(fleet: Fleet) -> None:
    until, runs = fleet.until("run-30")
    arguments = ("backfill", "logs", "--from", "archive", "--to", "second", "--until", until)
    done = fleet.command(*arguments, "--pipeline", "--slices", "3", "--output", "json")
    assert done.returncode == 0, done
    copied = json.loads(done.stdout)
    assert copied["copied"] == runs * MESSAGES
    selected = ("--until", until, "--child", "archive", "--child", "second")
    assert fleet.values("verify", "logs", *selected)["parity"]
    steps = fleet.query("SELECT name FROM step_run WHERE name LIKE '%copy_slice%'")
    assert sorted(name for (name,) in steps) == [f"map:copy_slice:{number}" for number in range(3)]

    again = fleet.values(*arguments, "--pipeline", "--slices", "2")
    assert (again["copied"], again["there"]) == (0, copied["copied"])

    # Its own run is in progress meanwhile, and has no logs later.
    now = datetime.now(timezone.utc).isoformat()
    own = fleet.values(*arguments[:-2], "--since", now, "--pipeline")
    assert (own["streams"], own["in_progress"]) == (0, 0)


def test_a_pipeline_that_was_interrupted_goes_on_and_tells_nobody_a_secret(fleet: Fleet) -> None:
    until, runs = fleet.until("run-30")
    arguments = ("backfill", "logs", "--from", "archive", "--to", "receiver", "--until", until)
    process = fleet.start(*arguments, "--pipeline", "--slices", "2", "--rate", "4", "--output", "json")
    wait_until(lambda: len(fleet.receiver.records()) >= 3)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 3, err
    stopped = json.loads(out)
    assert stopped["stopped"] == "Interrupted"
    assert 3 <= stopped["copied"] == len(fleet.receiver.records()) < runs * MESSAGES

    copied = fleet.values(*arguments, "--pipeline", "--slices", "3")
    records = fleet.receiver.records()
    assert copied["there"] == stopped["copied"]
    assert copied["copied"] + copied["there"] == len(records) == runs * MESSAGES
    assert len({record.attributes["log.record.uid"] for record in records}) == len(records)
    assert all(HEADER.encode() not in path.read_bytes() for path in fleet.directory.rglob("*") if path.is_file())


def test_a_copy_that_is_interrupted_killed_and_held_up_goes_on_and_sends_nothing_twice(fleet: Fleet) -> None:
    until, runs = fleet.until("run-30")
    arguments = ("backfill", "logs", "--from", "archive", "--to", "stopped", "--until", until)
    rate = 20

    def received() -> list[str]:
        return [record.attributes["log.record.uid"] for record in fleet.stopped.records()]

    def start() -> subprocess.Popen[str]:
        before = len(received())
        process = fleet.start(*arguments, "--rate", str(rate), "--output", "json")
        wait_until(lambda: len(received()) > before + 6)
        return process

    process = start()
    second = fleet.command(*arguments)
    assert second.returncode == 3
    assert "another backfill to child 'stopped' runs on this machine" in second.stderr
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 3
    assert "Interrupted. Run the same command again to resume." in err
    wait_until(lambda: len(received()) == json.loads(out)["copied"])

    process = start()
    process.kill()
    assert process.wait() == -signal.SIGKILL
    process.communicate()

    before = len(received())
    with ThreadPoolExecutor(1) as thread:
        rest = thread.submit(fleet.command, *arguments, "--rate", str(rate))
        wait_until(lambda: len(received()) > before + 6)
        # Its backend is away for a while.
        fleet.stopped.kill()
        time.sleep(1)
        fleet.stopped.start()
        done = rest.result()
    assert done.returncode == 0, done
    assert "Resuming an interrupted backfill" in done.stderr

    assert fleet.values(*arguments)["copied"] == 0
    sent = received()
    assert len(set(sent)) == runs * MESSAGES
    # Who is killed may not have noted its last batch: so it is with the collector, too.
    assert len(sent) - len(set(sent)) <= 2 * rate


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_verify_that_ends_in_its_middle_goes_on(fleet: Fleet, how: signal.Signals) -> None:
    arguments = ("verify", "logs", "--all", "--child", "archive", "--child", "old")

    def compared() -> int:
        return sum(len(path.read_bytes().splitlines()) for path in fleet.directory.rglob("verify/*.jsonl"))

    process = fleet.start(*arguments)
    wait_until(lambda: compared() > 5)
    process.send_signal(signal.SIGSTOP)
    second = fleet.command(*arguments)
    process.send_signal(signal.SIGCONT)
    process.send_signal(how)
    _, err = process.communicate(timeout=PATIENCE_SECONDS)
    assert second.returncode == 3
    assert "the same verify already runs on this machine" in second.stderr
    if how == signal.SIGINT:
        assert process.returncode == 3
        assert "Interrupted. Run the same command again to resume." in err
    done = fleet.command(*arguments, "--output", "json")
    assert done.returncode == 0, done
    assert re.search(r"Resuming an interrupted verify, which compared [\d,]+ streams", done.stderr)
    values = json.loads(done.stdout)
    assert values["parity"]
    assert values["streams"] >= RUNS + STOCK_RUNS
    assert compared() == 0


def test_check_tells_a_bucket_that_works_from_one_that_refuses_and_one_that_is_not_there(fleet: Fleet) -> None:
    children = ("--child", "bucket", "--child", "denied", "--child", "nowhere")
    done = fleet.command("check", "logs", *children, "--output", "json")
    assert done.returncode == 1, done
    assert SECRET_KEY not in done.stdout
    assert ACCESS_KEY not in done.stdout
    found = {child["name"]: child["findings"] for child in json.loads(done.stdout)["children"]}
    results = {name: {one["what"]: one["result"] for one in findings} for name, findings in found.items()}
    assert [results["bucket"][step] for step in ("write", "read")] == ["ok", "ok"]
    assert results["denied"]["write"] == results["nowhere"]["write"] == "problem"
    shown = fleet.command("check", "logs", *children).stdout
    assert "denied, write: artifact store 'denied' refuses access." in shown
    assert "What to do: check its credentials, and that they may write to its path." in shown
    assert "nowhere, write: the bucket or folder of artifact store 'nowhere' does not exist." in shown
    assert "What to do: create it, or correct its path." in shown


@pytest.mark.parametrize(
    ("child", "words", "code"), [("denied", "refuses access", 3), ("nowhere", "takes no events: the bucket", 1)]
)
def test_a_bucket_that_takes_nothing_stops_a_copy_and_has_no_parity(
    fleet: Fleet, child: str, words: str, code: int
) -> None:
    stopped = fleet.command("backfill", "logs", "--from", "archive", "--to", child, "--run", "run-1")
    assert stopped.returncode == 3
    assert f"Stopped: child '{child}'" in stopped.stderr
    assert words in stopped.stderr
    found = fleet.values("verify", "logs", "--run", "run-1", "--child", "archive", "--child", child, code=code)
    # What refuses may have all of it; where there is no bucket, there is nothing.
    assert [one["child"] for one in found["not_compared"]] == ([child] if code == 3 else [])
    assert found["children"][child]["missing"] == (0 if code == 3 else MESSAGES)


def test_a_slice_that_fails_is_named_with_its_reason(fleet: Fleet) -> None:
    arguments = ("backfill", "logs", "--from", "archive", "--to", "denied", "--run", "run-1", "--pipeline")
    done = fleet.command(*arguments, "--output", "json")
    assert done.returncode == 3, done
    values = json.loads(done.stdout)
    assert values["copied"] == 0
    assert values["stopped"].startswith("Stopped: 1 of 1 slice did not finish: child 'denied'")
    assert "Run the same command again" in done.stderr
    (status,) = fleet.query("SELECT status FROM step_run WHERE name = 'map:copy_slice:0' ORDER BY created DESC LIMIT 1")
    assert status == ("failed",)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("verify", "logs"), "Select streams with '--run'"),
        (("verify", "lgos", "--all"), "did you mean 'logs'?"),
        (("verify", "logs", "--run", "run-1x"), "did you mean 'run-1"),
        (("verify", "logs", "--all", "--child", "collector"), "cannot be read"),
        (("backfill", "logs", "--from", "archive", "--to", "archive", "--all"), "cannot be copied to itself"),
        (("backfill", "logs", "--from", "collector", "--to", "archive", "--all"), "cannot be read"),
        (("backfill", "logs", "--from", "archive", "--to", "bukcet", "--all"), "did you mean 'bucket'?"),
    ],
)
def test_bad_input_is_named(fleet: Fleet, arguments: tuple[str, ...], words: str) -> None:
    done = fleet.command(*arguments)
    assert done.returncode == 2, done
    assert words in done.stderr


def test_where_nothing_is_found_nothing_is_proven(fleet: Fleet) -> None:
    copied = fleet.values("backfill", "logs", "--from", "nowhere", "--to", "second", "--run", "run-1", code=1)
    assert (copied["copied"], copied["absent"]) == (0, copied["streams"])


def test_a_backend_that_is_away_is_named_and_proves_nothing(fleet: Fleet) -> None:
    fleet.datadog.stop()
    found = fleet.values("verify", "logs", "--run", "run-1", "--child", "archive", "--child", "live", code=3)
    assert not found["parity"]
    assert {one["child"] for one in found["not_compared"]} == {"live"}
    assert "Could not reach Datadog" in found["not_compared"][0]["why"]
