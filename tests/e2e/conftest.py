from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest

from composite_logstore.ansi import without_escapes
from tests.programs import Programs
from tests.servers.cloudwatch import CloudWatch
from tests.servers.collector import Collector, start_collector
from tests.servers.datadog import API_KEY, APPLICATION_KEY, Datadog
from tests.servers.zenml_server import ZenML

PIPELINE = Path(__file__).with_name("pipeline.py")
# Of log stores whose backends are all well: however slow the machine is, what is logged is there when a run has ended.
PATIENT = {"flush_timeout_millis": 100_000, "flush_limit_millis": 100_000}
PATIENT_CHILD = {"export_timeout_millis": 100_000}


@pytest.fixture(scope="session")
def collector() -> Iterator[Collector]:
    with start_collector() as collector:
        yield collector


@pytest.fixture(scope="session")
def datadog() -> Iterator[Datadog]:
    with Datadog() as datadog:
        yield datadog


@pytest.fixture(scope="session")
def shared(
    tmp_path_factory: pytest.TempPathFactory, programs: Programs, collector: Collector, datadog: Datadog
) -> Iterator[ZenML]:
    """What all files share of `zenml`."""
    zenml = ZenML(tmp_path_factory.mktemp("zenml") / "zenml", programs=programs)
    # With these the server, too, reads from CloudWatch.
    zenml.env |= CloudWatch().environment
    with zenml:
        register_three_children(zenml, collector, datadog)
        yield zenml


@pytest.fixture(scope="module")
def zenml(shared: ZenML) -> Iterator[ZenML]:
    """A ZenML with its server, and an active stack whose log store `logs` has three children.

    `make test-deep` runs all these tests once more with an agent: each file has its own, which has to deliver.
    """
    with shared.chosen_agent():
        yield shared


def register_three_children(zenml: ZenML, collector: Collector, datadog: Datadog) -> None:
    """Register everything with the real CLI, and make the stack `three` the active one."""
    keys = {"api_key": "{{datadog.api_key}}", "application_key": "{{datadog.application_key}}"}
    children = [
        {"name": "archive", "type": "artifact", **PATIENT_CHILD},
        {"name": "collector", "type": "otlp", "endpoint": collector.http_endpoint, **PATIENT_CHILD},
        {"name": "live", "type": "datadog", **datadog.settings, **keys, **PATIENT_CHILD},
    ]
    zenml.cli("secret", "create", "datadog", f"--api_key={API_KEY}", f"--application_key={APPLICATION_KEY}")
    zenml.cli("log-store", "flavor", "register", "composite_logstore.CompositeLogStoreFlavor")
    patience = (f"--{name}={value}" for name, value in PATIENT.items())
    settings = ("--primary=archive", f"--children={json.dumps(children)}", *patience)
    zenml.cli("log-store", "register", "logs", "--flavor", "composite", *settings)
    zenml.cli("stack", "register", "three", "-o", "default", "-a", "default", "--log_store", "logs", "--set")


@dataclass(frozen=True)
class Run:
    """A run of `pipeline.py` that has ended.

    Attributes:
        zenml: Where it ran.
        id: ZenML's id of it.
        report: What the program wrote down.
        streams: A source → ZenML's model of the stream.
    """

    zenml: ZenML
    id: str
    report: dict[str, Any]
    streams: dict[str, dict[str, Any]]

    @classmethod
    def read(cls, zenml: ZenML, directory: Path) -> Run:
        """Read what the program left in its directory."""
        report = json.loads((directory / "report.json").read_text())
        return cls(zenml, report["run_id"], report, zenml.streams(report["run_id"]))

    def said(self, source: str) -> list[dict[str, Any]]:
        """Return what was logged to a stream."""
        return [said for said in self.report["said"] if said["source"] == source]

    def page(self, source: str, **parameters: Any) -> dict[str, Any]:
        """Return a page of a stream, as the server gives it."""
        page: dict[str, Any] = self.zenml.get(f"/logs/{self.streams[source]['id']}/entries", **parameters)
        return page

    def entries(self, source: str, start: str = "oldest", limit: int = 1000) -> list[dict[str, Any]]:
        """Return a whole stream, page by page from one of its ends, oldest entry first."""
        direction = "after" if start == "oldest" else "before"
        pages = [self.page(source, start=start, limit=limit)]
        while pages[-1]["items"] and pages[-1][direction]:
            assert len(pages[-1]["items"]) <= limit
            pages.append(self.page(source, **{direction: pages[-1][direction]}))
        if start == "newest":
            pages.reverse()
        return [entry for page in pages for entry in page["items"]]


def assert_equal(entries: list[dict[str, Any]], said: list[dict[str, Any]]) -> None:
    """Check that the entries of a page, or of several, are what was logged: all of it, in order, once.

    Only some children keep escape sequences, so these do not count.
    """
    messages = [[without_escapes(one["message"]) for one in ones] for ones in (entries, said)]
    assert messages[0] == messages[1]
    assert len({entry["id"] for entry in entries}) == len(entries)
    for entry, line in zip(entries, said, strict=True):
        for field in ("level", "name", "filename", "lineno"):
            assert entry[field] == line[field]
        # A print's record is made by ZenML while it prints; any other time is known to the microsecond.
        assert line["earliest"] <= micros(entry["timestamp"]) <= line["latest"]


def micros(timestamp: str) -> int:
    """Return the time in microseconds since the epoch."""
    since = datetime.fromisoformat(timestamp.replace("Z", "+00:00")) - datetime.fromtimestamp(0, timezone.utc)
    return (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds


def assert_balanced(stats: dict[str, dict[str, Any]]) -> None:
    """Check that every event of every child is accounted for."""
    for name, child in stats.items():
        accounted = child["delivered"] + child["rejected"] + child["dropped"] + child["pending"]
        assert child["accepted"] == accounted, (name, child)
