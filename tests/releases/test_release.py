"""A release of ZenML with its own CLI and its own server: every field of every entry, in every backend.

`make test-releases` runs this in an environment of each release. It writes down what it has found for the table of
docs/compatibility.md, into the file that `RELEASE_FEATURES` names. `RELEASE_SERVER` names the interpreter of the
server, if that has another release.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from composite_logstore.ansi import without_escapes
from tests.e2e.conftest import PIPELINE, Run, assert_balanced, assert_equal, micros
from tests.programs import Programs
from tests.servers.collector import Collector, start_collector
from tests.servers.datadog import API_KEY, APPLICATION_KEY, Datadog
from tests.servers.otlp_receiver import OtlpReceiver, Record
from tests.servers.zenml_server import HostedZenML
from tests.watching import wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.deep]

LINES = 150
READABLE = ["archive", "live", "theirs"]
CHILDREN = ["archive", "collector", "live", "sdk", "theirs"]
RANKS = Path(__file__).with_name("ranks.py")
YES, NO = "yes", "no"

Observe = Callable[[str, bool], None]


@dataclass(frozen=True)
class Site:
    """A server, a client whose active stack logs to a child of each type, and what these children log to."""

    zenml: HostedZenML
    collector: Collector
    receiver: OtlpReceiver
    datadog: Datadog

    @property
    def has_pages(self) -> bool:
        """Whether the server offers pages of logs, which releases before 0.97 do not."""
        paths = self.zenml.session.get(f"{self.zenml.url}/openapi.json", timeout=60).json()["paths"]
        return "/api/v1/logs/{logs_id}/entries" in paths

    def update(self, **settings: Any) -> None:
        """Change settings of the log store."""
        texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in settings.items()}
        self.zenml.cli("log-store", "update", "logs", *(f"--{name}={text}" for name, text in texts.items()))


@pytest.fixture(scope="module")
def observe() -> Iterator[Observe]:
    """Takes down whether a feature is there; a feature whose test fails is not taken down."""
    features: dict[str, str] = {}

    def observe(feature: str, is_there: bool = True) -> None:
        features[feature] = YES if is_there else NO

    yield observe
    if file := os.environ.get("RELEASE_FEATURES"):
        Path(file).write_text(json.dumps(features))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, programs: Programs) -> Iterator[Site]:
    directory = tmp_path_factory.mktemp("release")
    server = os.environ.get("RELEASE_SERVER", sys.executable)
    with (
        start_collector() as collector,
        OtlpReceiver() as receiver,
        Datadog() as datadog,
        HostedZenML(directory / "zenml", server, programs) as zenml,
    ):
        # ZenML logs to stdout that client and server differ, and there commands print JSON.
        zenml.env["ZENML_DISABLE_CLIENT_SERVER_MISMATCH_WARNING"] = "true"
        register(zenml, collector, receiver, datadog)
        yield Site(zenml, collector, receiver, datadog)


def register(zenml: HostedZenML, collector: Collector, receiver: OtlpReceiver, datadog: Datadog) -> None:
    keys = {"api_key": "{{datadog.api_key}}", "application_key": "{{datadog.application_key}}"}
    exporter = "opentelemetry.exporter.otlp.proto.http._log_exporter.OTLPLogExporter"
    to_receiver = {"endpoint": f"{receiver.http_endpoint}/v1/logs", "timeout": 60}
    children: list[dict[str, Any]] = [
        {"name": "archive", "type": "artifact"},
        {"name": "collector", "type": "otlp", "endpoint": collector.http_endpoint},
        {"name": "live", "type": "datadog", **datadog.settings, **keys},
        {"name": "sdk", "type": "otel", "exporter": exporter, "arguments": to_receiver},
        {"name": "theirs", "type": "component", "component": "elsewhere"},
    ]
    assert [child["name"] for child in children] == CHILDREN
    # However slow the machine is, no export is overdue, and what is logged is there when a run has ended.
    children = [{**child, "export_timeout_millis": 100_000} for child in children]
    patience = ("--flush_timeout_millis=100000", "--flush_limit_millis=100000")
    zenml.cli("artifact-store", "register", "elsewhere", "--flavor", "local", f"--path={zenml.directory / 'elsewhere'}")
    zenml.cli("secret", "create", "datadog", f"--api_key={API_KEY}", f"--application_key={APPLICATION_KEY}")
    zenml.cli("log-store", "flavor", "register", "composite_logstore.CompositeLogStoreFlavor")
    settings = ("--primary=archive", f"--children={json.dumps(children)}", *patience)
    zenml.cli("log-store", "register", "logs", "--flavor", "composite", *settings)
    zenml.cli("stack", "register", "five", "-o", "default", "-a", "default", "--log_store", "logs", "--set")


@pytest.fixture(scope="module")
def run(site: Site, tmp_path_factory: pytest.TempPathFactory) -> Run:
    directory = tmp_path_factory.mktemp("run")
    site.zenml.python(str(PIPELINE), str(directory), str(LINES), timeout=600)
    return Run.read(site.zenml, directory)


def shown(run: Run, source: str) -> list[dict[str, Any]]:
    """Return what the dashboard of each release asks for: the entries of a stream of a run or of its step."""
    (step,) = run.zenml.get("/steps", pipeline_run_id=run.id)["items"]
    of = f"/runs/{run.id}" if source in ("client", "orchestrator") else f"/steps/{step['id']}"
    entries: list[dict[str, Any]] = run.zenml.get(f"{of}/logs", source=source)
    return entries


def everything(run: Run) -> dict[str, list[dict[str, Any]]]:
    assert {"client", "step"} <= run.streams.keys()
    return {source: shown(run, source) for source in sorted(run.streams)}


@pytest.fixture(scope="module")
def archived(run: Run) -> dict[str, list[dict[str, Any]]]:
    """What the archive has of the run: a source → its entries."""
    return everything(run)


def test_the_dashboard_gets_every_field_from_the_archive(
    run: Run, archived: dict[str, list[dict[str, Any]]], observe: Observe
) -> None:
    for source, entries in archived.items():
        assert_equal(entries, run.said(source))
        assert len(entries) > (LINES if source == "step" else 0)
    # Coloured as it was said.
    assert "\x1b[31mred\x1b[0m" in [entry["message"] for entry in archived["step"]]
    observe("`artifact` children")


def test_and_the_same_from_datadog(
    site: Site, run: Run, archived: dict[str, list[dict[str, Any]]], observe: Observe
) -> None:
    site.update(primary="live")
    try:
        found = everything(run)
    finally:
        site.update(primary="archive")
    # Datadog gets no escape sequences.
    assert found == {
        source: [entry | {"message": without_escapes(entry["message"])} for entry in entries]
        for source, entries in archived.items()
    }
    observe("`datadog` children")


def test_and_from_a_log_store_of_zenml_s_own(
    site: Site, run: Run, archived: dict[str, list[dict[str, Any]]], observe: Observe
) -> None:
    site.update(primary="theirs")
    try:
        found = everything(run)
    finally:
        site.update(primary="archive")
    # It gives entries ids and times of its own. It keeps neither escape sequences, nor line breaks at an end, nor where
    # an entry comes from.
    lost = {"name": "unknown", "module": None, "filename": None, "lineno": None}
    for source, entries in archived.items():
        theirs = whole(found[source])
        for entry, own in zip(entries, theirs, strict=True):
            kept = {"id": own["id"], "timestamp": own["timestamp"]}
            message = without_escapes(entry["message"]).rstrip("\n")
            assert own == entry | kept | lost | {"message": message}
            assert micros(own["timestamp"]) >= micros(entry["timestamp"])
        assert len({own["id"] for own in theirs}) == len(entries)
    observe("`component` children")


def whole(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Join the pieces into which ZenML's own log store cuts long messages."""
    joined: list[dict[str, Any]] = []
    for entry in entries:
        if entry["chunk_index"]:
            joined[-1]["message"] += entry["message"]
        else:
            joined.append(entry | {"total_chunks": 1})
    return joined


@pytest.mark.parametrize("child", ["collector", "sdk"])
def test_and_so_do_collectors(
    child: str, site: Site, run: Run, archived: dict[str, list[dict[str, Any]]], observe: Observe
) -> None:
    server: Collector | OtlpReceiver = site.collector if child == "collector" else site.receiver
    for source, entries in archived.items():
        records = received(server, run.streams[source]["id"], len(entries))
        attributes = [record.attributes for record in records]
        assert [each["log.record.uid"] for each in attributes] == [entry["id"] for entry in entries]
        assert len({each["zenml.log.writer"] for each in attributes}) == 1
        sequences = [each["zenml.log.sequence"] for each in attributes]
        assert sequences == list(range(len(entries)))
        for record, entry, said in zip(records, entries, run.said(source), strict=True):
            # What an exception adds has attributes of its own there.
            assert without_escapes(said["message"]).startswith(without_escapes(record.body))
            assert ("exception.type" in record.attributes) == (record.body == "caught")
            assert record.time_unix_nano == micros(entry["timestamp"]) * 1000
            # DEBUG is 5, INFO is 9, and so on.
            assert (record.severity_number + 3) // 4 * 10 - 10 == said["level"]
            assert record.attributes.get("logger.name", record.scope) == said["name"]
            assert record.attributes.get("code.file.path") == said["filename"]
            assert record.attributes.get("code.line.number") == said["lineno"]
            assert record.attributes["zenml.log.source"] == source
            assert record.attributes["zenml.log_store.name"] == "logs"
            assert record.resource["service.name"] == "zenml"
            if source == "step":
                # ZenML adds this to other streams only after their first records, which may be exported by then.
                # Before 0.93.3, it gives this attribute another name.
                names = ("zenml.pipeline.run.id", "pipeline.run.id")
                assert run.id in [record.attributes.get(name) for name in names]
            if record.body == "with attributes":
                assert (record.attributes["epoch"], record.attributes["rate"]) == (3, 0.5)
    observe({"collector": "`otlp` children", "sdk": "`otel` children"}[child])


def received(server: Collector | OtlpReceiver, stream: str, count: int) -> list[Record]:
    """Return what a collector has of a stream, as soon as it has so many records."""

    def records() -> list[Record]:
        return [record for record in server.records() if record.attributes["zenml.log.id"] == stream]

    wait_until(lambda: len(records()) >= count, f"it has {count} records of the stream")
    return records()


def test_every_event_is_accounted_for(run: Run, observe: Observe) -> None:
    at_the_end_of_the_run, in_the_end = run.report["stats"]
    assert_balanced(at_the_end_of_the_run)
    assert_balanced(in_the_end)
    assert sorted(in_the_end) == CHILDREN
    for child in in_the_end.values():
        assert child["accepted"] == child["delivered"] == len(run.report["said"])
        assert child["state"] == "healthy"
    observe("accounts in `stats()`")


def test_a_step_s_metadata_tells_its_deliveries(run: Run, observe: Observe) -> None:
    (step,) = run.zenml.get("/steps", pipeline_run_id=run.id, hydrate=True)["items"]
    for child in CHILDREN:
        account = step["metadata"]["run_metadata"][f"log_store.{child}"]
        assert (account["state"], account["pending"], account["as_of"]) == ("healthy", 0, "the last flush")
        assert account["delivered"] == run.report["stats"][0][child]["delivered"]
    observe("[the delivery summary](remote.md#the-delivery-summary) on a step's page")


def test_check(site: Site, observe: Observe) -> None:
    report = json.loads(site.zenml.composite_logstore("check", "logs", "--output", "json"))
    assert [child["name"] for child in report["children"]] == CHILDREN
    for child in report["children"]:
        results = {finding["what"]: finding["result"] for finding in child["findings"]}
        assert (results["settings"], results["write"]) == ("ok", "ok"), child
        assert results["read"] == ("ok" if child["name"] in READABLE else "unknown"), child
    observe("`composite-logstore check`")


def test_verify(site: Site, run: Run, observe: Observe) -> None:
    # What ZenML's own log stores keep does not say which event an entry is.
    children = ("--child", "archive", "--child", "live")
    report = json.loads(site.zenml.composite_logstore("verify", "logs", "--run", run.id, *children, "--output", "json"))
    assert (report["parity"], report["streams"]) == (True, len(run.streams))
    assert {name: child["events"] for name, child in report["children"].items()} == dict.fromkeys(
        ("archive", "live"), len(run.report["said"])
    )
    observe("`composite-logstore verify`")


def test_logs(site: Site, run: Run, archived: dict[str, list[dict[str, Any]]], observe: Observe) -> None:
    output = site.zenml.composite_logstore("logs", run.id, "--step", "train", "--source", "step", "--output", "json")
    lines = [json.loads(line) for line in output.splitlines()]
    fields = {"id": "id", "logger": "name", "file": "filename", "line": "lineno"}
    for line, entry, said in zip(lines, archived["step"], run.said("step"), strict=True):
        assert {name: line[name] for name in fields} == {name: entry[field] for name, field in fields.items()}
        assert without_escapes(line["message"]) == without_escapes(entry["message"])
        assert micros(line["timestamp"]) == micros(entry["timestamp"])
        assert logging.getLevelName(line["level"]) == said["level"]
        assert (line["step"], line["source"], line["logs_id"]) == ("train", "step", run.streams["step"]["id"])
    observe("`composite-logstore logs`")


def test_pages(site: Site, run: Run, observe: Observe) -> None:
    features = (
        "of a long log the newest entries, instead of the oldest",
        "cursors over the REST API",
        "filters over the REST API",
    )
    if site.has_pages:
        said = run.said("step")
        for start in ("oldest", "newest"):
            assert_equal(run.entries("step", start, limit=47), said)
        assert_equal(run.page("step", limit=5)["items"], said[-5:])
        assert_equal(run.page("step", level="ERROR")["items"], [line for line in said if line["level"] >= 40])
        assert_equal(
            run.page("step", search="printed", start="oldest")["items"],
            [line for line in said if "printed" in line["message"]],
        )
    else:
        url = f"{run.zenml.url}/api/v1/logs/{run.streams['step']['id']}/entries"
        assert run.zenml.session.get(url, timeout=60).status_code == 404
    for feature in features:
        observe(feature, site.has_pages)


@pytest.fixture
def live(site: Site) -> Iterator[None]:
    """Datadog is the primary."""
    site.update(primary="live")
    yield
    site.datadog.control(mend=True)
    site.update(primary="archive", fetch_fallback=[])


@pytest.mark.usefixtures("live")
def test_the_status_says_why_nothing_can_be_read(site: Site, run: Run, observe: Observe) -> None:
    (step,) = run.zenml.get("/steps", pipeline_run_id=run.id)["items"]
    url = f"{run.zenml.url}/api/v1/steps/{step['id']}/logs"
    for datadog_s, expected in ((429, 429), (503, 503), (403, 502)):
        site.datadog.fail("search", datadog_s, times=100)
        answer = run.zenml.session.get(url, params={"source": "step"}, timeout=120)
        site.datadog.control(mend=True)
        assert answer.status_code == (expected if site.has_pages else 500), answer.text
        assert "Datadog" in answer.text
    observe("statuses 429, 502 and 503 for what cannot be read, instead of 500", site.has_pages)


@pytest.mark.usefixtures("live")
def test_a_fallback_answers(site: Site, run: Run, archived: dict[str, list[dict[str, Any]]], observe: Observe) -> None:
    site.update(fetch_fallback=["archive"])
    site.datadog.fail("search", 503, times=100)
    assert shown(run, "step")[-len(archived["step"]) :] == archived["step"]
    observe("`fetch_fallback`")


def test_served_from_the_artifact_store_with_its_ranks(site: Site, tmp_path: Path, observe: Observe) -> None:
    """ZenML reads the archive by itself; in it are a step, its processes, and what is logged beside the run."""
    site.update(serve_from_artifact_store="true")
    site.zenml.python(str(RANKS), str(tmp_path / "id"), timeout=600)
    run_id = (tmp_path / "id").read_text()
    run = Run(site.zenml, run_id, {}, site.zenml.streams(run_id))
    for stream in run.streams.values():
        found = site.zenml.get(f"/logs/{stream['id']}", hydrate=True)
        # Before 0.97, ZenML holds ids apart.
        held = {**found["metadata"], **found["body"]}
        assert held.get("log_store_id") is None
        assert held["artifact_store_id"]
    # Each process delivers by itself, and leaves what it has no time for to the next one. What arrives twice is there
    # twice, since it is ZenML that reads.
    site.zenml.composite_logstore("spool", "drain", "logs")
    assert {entry["message"] for entry in shown(run, "step")} == {"in the step", "joined", "below run"}
    observe("`serve_from_artifact_store`")
    assert {entry["message"] for entry in site.zenml.get(f"/runs/{run_id}/logs", source="elsewhere")} == {"beside it"}
    observe("`activate()`")
    output = site.zenml.composite_logstore("logs", run_id, "logs", "--step", "train", "--output", "json")
    lines = [json.loads(line) for line in output.splitlines()]
    assert {line["message"]: line["rank"] for line in lines if line["source"] == "step"} == {
        "in the step": None,
        "joined": 0,
        "below run": 1,
    }
    observe("`join()` and `composite-logstore run`, with ranks")
