"""A real pipeline, three real children, and what ZenML's own server returns of what was logged."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import ANY
from uuid import uuid4

import pytest

from composite_logstore.ansi import without_escapes
from tests.deep import mostly_deep
from tests.e2e.conftest import PIPELINE, Run, assert_balanced, assert_equal, micros
from tests.servers.collector import Collector
from tests.servers.datadog import API_KEY, APPLICATION_KEY
from tests.servers.otlp_receiver import Record
from tests.servers.zenml_server import ZenML
from tests.watching import wait_until

pytestmark = pytest.mark.e2e

SOURCES = ["client", "prepare_step", "step"]
LINES = 2500


@pytest.fixture(scope="module")
def zenml(shared: ZenML, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ZenML]:
    # What another test's runs may have left is not for this one to deliver, and to account for.
    spool = tmp_path_factory.mktemp("spool")
    shared.cli("log-store", "update", "logs", "--primary=archive", f"--spool_directory={spool}")
    with shared.chosen_agent("--spool-directory", str(spool)):
        yield shared
    shared.cli("log-store", "remove-attribute", "logs", "spool_directory")


@pytest.fixture(scope="module", params=mostly_deep(["archive", "live"]))
def primary(request: pytest.FixtureRequest, zenml: ZenML) -> str:
    """The child that answers, in the component that is registered."""
    zenml.cli("log-store", "update", "logs", f"--primary={request.param}")
    return str(request.param)


@pytest.fixture(scope="module")
def run(primary: str, zenml: ZenML, tmp_path_factory: pytest.TempPathFactory) -> Run:
    directory = tmp_path_factory.mktemp("run")
    zenml.python(str(PIPELINE), str(directory), str(LINES))
    return Run.read(zenml, directory)


def received(collector: Collector, run: Run, source: str, count: int) -> list[Record]:
    """Return what the collector has of a stream, as soon as it has so many records."""

    def records() -> list[Record]:
        logs_id = run.streams[source]["id"]
        return [record for record in collector.records() if record.attributes["zenml.log.id"] == logs_id]

    wait_until(lambda: len(records()) >= count, f"the collector has {count} records of the stream")
    return records()


@pytest.mark.parametrize("start", ["oldest", "newest"])
@pytest.mark.parametrize("source", SOURCES)
def test_server_returns_what_was_logged(run: Run, source: str, start: str) -> None:
    said = run.said(source)
    assert len(said) > (LINES if source == "step" else 1)
    assert_equal(run.entries(source, start, limit=97), said)


@pytest.mark.parametrize("source", SOURCES)
def test_default_page_is_the_newest_entries(run: Run, primary: str, source: str) -> None:
    said, shown = run.said(source), run.page(source)["items"]
    # ZenML's server asks for 50,000. Datadog gives 1,000 at once, and the reader shows whole milliseconds.
    at_least = min(900, len(said)) if primary == "live" else len(said)
    assert len(shown) >= at_least
    assert_equal(shown, said[-len(shown) :])
    assert_equal(run.page(source, limit=2)["items"], said[-2:])


def test_dashboard_shows_the_default_page(run: Run) -> None:
    (step,) = run.zenml.get("/steps", pipeline_run_id=run.id)["items"]
    for path, source in [
        (f"/runs/{run.id}/logs", "client"),
        (f"/steps/{step['id']}/logs", "prepare_step"),
        (f"/steps/{step['id']}/logs", "step"),
    ]:
        entries = run.zenml.get(path, source=source)
        assert entries
        assert entries == run.page(source)["items"]


def test_filters(run: Run) -> None:
    said = run.said("step")
    assert_equal(run.page("step", level="ERROR")["items"], [line for line in said if line["level"] >= 40])
    found = run.page("step", search="printed", start="oldest")["items"]
    assert_equal(found, [line for line in said if "printed" in line["message"]])


def test_what_cannot_be_asked_for_is_the_mistake_of_whoever_asks(run: Run) -> None:
    """Never a 500, and never another page than the one that was asked for."""
    stream, other = run.streams["step"]["id"], run.streams["client"]["id"]
    cursor = run.page("step", limit=5)["before"]
    foreign = json.loads(base64.urlsafe_b64decode(cursor)) | {"log_store_id": str(uuid4())}
    of_another_store = base64.urlsafe_b64encode(json.dumps(foreign).encode()).decode()

    def status(id: str = stream, **parameters: Any) -> int:
        url = f"{run.zenml.url}/api/v1/logs/{id}/entries"
        code: int = run.zenml.session.get(url, params=parameters, timeout=60).status_code
        return code

    assert status(before=cursor) == 200
    for parameters in (
        {"before": "nonsense"},
        {"before": "…"},
        {"before": ""},
        {"before": cursor[:-9]},
        {"before": cursor[9:]},
        {"before": of_another_store},
        {"after": cursor},
        {"before": cursor, "after": cursor},
        {"before": cursor, "start": "oldest"},
        {"before": cursor, "limit": 6},
        {"before": cursor, "search": "loss"},
        {"since": "2026-01-02T00:00:00Z", "until": "2026-01-01T00:00:00Z"},
        {"since": "yesterday"},
        {"limit": 0},
        {"limit": -1},
        {"limit": "many"},
        {"level": "LOUD"},
        {"start": "middle"},
    ):
        assert status(**parameters) in (400, 422), parameters
    assert status(other, before=cursor) in (400, 422)
    assert status(str(uuid4())) == 404
    assert status(limit=1_000_000) == 200
    assert run.page("step", limit=1_000_000) == run.page("step", limit=50_000) | {"before": ANY, "after": ANY}


def test_collector_received_the_same(run: Run, collector: Collector) -> None:
    for source in SOURCES:
        entries = run.entries(source)
        records = received(collector, run, source, len(entries))
        assert [record.attributes["log.record.uid"] for record in records] == [entry["id"] for entry in entries]
        for record, entry, said in zip(records, entries, run.said(source), strict=True):
            # What an exception adds has attributes of its own there.
            assert without_escapes(said["message"]).startswith(record.body)
            assert record.time_unix_nano == micros(entry["timestamp"]) * 1000
            assert record.attributes.get("code.file.path") == said["filename"]
            assert record.attributes.get("code.line.number") == said["lineno"]
            assert record.attributes["zenml.log.source"] == source


def test_children_hold_the_same(run: Run, primary: str) -> None:
    found = {primary: [entry for source in SOURCES for entry in run.entries(source)]}
    other = "live" if primary == "archive" else "archive"
    run.zenml.cli("log-store", "update", "logs", f"--primary={other}")
    try:
        found[other] = [entry for source in SOURCES for entry in run.entries(source)]
    finally:
        run.zenml.cli("log-store", "update", "logs", f"--primary={primary}")
    assert "\x1b[31mred\x1b[0m" in [entry["message"] for entry in found["archive"]]
    # Datadog gets no escape sequences.
    plain = [entry | {"message": without_escapes(entry["message"])} for entry in found["archive"]]
    assert plain != found["archive"]
    assert found["live"] == plain


def test_accounts(run: Run) -> None:
    at_the_end_of_the_run, in_the_end = run.report["stats"]
    assert_balanced(at_the_end_of_the_run)
    assert_balanced(in_the_end)
    for child in in_the_end.values():
        assert child["accepted"] == len(run.report["said"])
        assert child["delivered"] == child["accepted"]
        assert child["state"] == "healthy"


def test_step_shows_the_accounts(run: Run) -> None:
    (step,) = run.zenml.get("/steps", pipeline_run_id=run.id, hydrate=True)["items"]
    metadata = step["metadata"]["run_metadata"]
    for child in ("archive", "collector", "live"):
        account = metadata[f"log_store.{child}"]
        assert account["state"] == "healthy", account
        # What ZenML asked for before the last flush has given way to what was true after it.
        assert (account["as_of"], account["pending"]) == ("the last flush", 0)
        assert account["delivered"] == run.report["stats"][0][child]["delivered"]


def test_describe_shows_no_key(zenml: ZenML) -> None:
    output = zenml.cli("log-store", "describe", "logs")
    assert "{{datadog.api_key}}" in output
    assert API_KEY not in output
    assert APPLICATION_KEY not in output


@pytest.fixture
def missing_secret(zenml: ZenML) -> Iterator[None]:
    """The active stack's log store refers to a secret that is not there."""
    children = [{"name": "live", "type": "datadog", "api_key": "{{nobody.knows}}", "application_key": "{{nobody.too}}"}]
    settings = ("--primary=live", f"--children={json.dumps(children)}")
    zenml.cli("log-store", "register", "secretless", "--flavor", "composite", *settings)
    stack = ("-o", "default", "-a", "default", "--log_store", "secretless", "--set")
    zenml.cli("stack", "register", "secretless", *stack)
    yield
    zenml.cli("stack", "set", "three")


@pytest.mark.usefixtures("missing_secret")
def test_missing_secret_is_found_before_the_first_step(zenml: ZenML, tmp_path: Path) -> None:
    steps = zenml.get("/steps")["total"]
    output = zenml.python(str(PIPELINE), str(tmp_path), "1", fails=True)
    assert "nobody" in output
    assert "has started" not in output
    assert zenml.get("/steps")["total"] == steps


def test_collector_killed_in_the_middle_of_a_step(zenml: ZenML, collector: Collector, tmp_path: Path) -> None:
    # Only the dead child is to be waited for: a flush goes on while another one makes progress.
    children = [
        {"name": "archive", "type": "artifact"},
        {"name": "collector", "type": "otlp", "endpoint": collector.http_endpoint},
    ]
    settings = ("--primary=archive", f"--children={json.dumps(children)}", "--flush_timeout_millis=3000")
    zenml.cli("log-store", "update", "logs", *settings)
    before = len(collector.records())
    program = zenml.popen(str(PIPELINE), str(tmp_path), str(LINES), "pause")
    try:
        wait_until((tmp_path / "middle").exists, "the step is in its middle")
        # A collector that is killed loses what it has taken and not yet passed on: that is not our test.
        delivered = int((tmp_path / "middle").read_text())
        assert delivered > LINES / 2
        assert len(collector.wait_for_records(before + delivered)) == before + delivered
        collector.kill()
        (tmp_path / "middle-go").touch()
        wait_until((tmp_path / "end").exists, "the run has ended")
        # The run has ended, and its process waits: what the collector missed is still to be delivered.
        collector.start()
        (tmp_path / "end-go").touch()
        output, _ = program.communicate(timeout=120)
    finally:
        if program.poll() is None:
            program.kill()
            program.communicate()
    assert program.returncode == 0, output
    run = Run.read(zenml, tmp_path)
    assert len(run.report["flushes"]) == 1
    # It waits for the dead child no longer than that, and not as long as it may for one that is well.
    assert 0.5 < run.report["flushes"][0] < 3 + 3
    at_end, after_return = run.report["stats"]
    assert_balanced(at_end)
    assert_balanced(after_return)
    assert at_end["archive"]["pending"] == 0
    assert at_end["collector"]["state"] == "unavailable"
    assert at_end["collector"]["pending"] > LINES / 2
    assert after_return["collector"]["state"] == "healthy"
    assert after_return["collector"]["delivered"] == after_return["collector"]["accepted"]
    for source in SOURCES:
        entries = run.entries(source)
        assert_equal(entries, run.said(source))
        records = received(collector, run, source, len(entries))
        assert [record.attributes["log.record.uid"] for record in records] == [entry["id"] for entry in entries]
