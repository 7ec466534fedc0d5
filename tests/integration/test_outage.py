"""A collector is killed while a step logs: what that costs the step, its other children, and the collector itself."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from zenml.client import Client
from zenml.enums import StackComponentType
from zenml.models import LogsResponse

from composite_logstore import CompositeLogStore
from composite_logstore_artifact.config import ArtifactChildConfig
from composite_logstore_datadog.config import DatadogChildConfig
from composite_logstore_otlp.config import OtlpChildConfig
from tests.servers.collector import Collector, start_collector
from tests.servers.datadog import Datadog
from tests.servers.otlp_receiver import Record
from tests.simulation import make_logs, make_store
from tests.watching import accounts_watched, fetched, wait_until

pytestmark = pytest.mark.integration

PROTOCOLS = ["http/protobuf", "grpc"]
FLUSH_TIMEOUT_SECONDS = 3.0
# What a busy machine may add to a flush.
MARGIN_SECONDS = 1.5


class Step:
    """Says numbered lines, in whichever thread runs it, and remembers them."""

    def __init__(self, store: CompositeLogStore) -> None:
        self._store = store
        self.logs: LogsResponse = make_logs(store)
        self.said: list[str] = []
        self._ended = threading.Event()
        self.begin()

    def begin(self) -> None:
        """Register the stream, as ZenML does where a step begins."""
        self._origin = self._store.register_origin(str(self.logs.id), self.logs, {})

    def say(self, count: int) -> None:
        for _ in range(count):
            line = f"line {len(self.said)}"
            record = logging.LogRecord("train", logging.INFO, "/code/train.py", 1, line, (), None, "fit")
            self._store.emit(self._origin, record)
            self.said.append(line)

    def say_until_told(self) -> None:
        """Log some thousand lines a second until `stop` is called."""
        while not self._ended.wait(0.005):
            self.say(10)

    def stop(self) -> None:
        self._ended.set()

    def end(self) -> float:
        """Deregister the stream, as ZenML does where a step ends, and return how many seconds that takes."""
        begin = time.monotonic()
        self._store.deregister_origin(self._origin)
        return time.monotonic() - begin


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The name of an artifact store on a local folder."""
    path: Path = tmp_path_factory.mktemp("archive")
    kind = StackComponentType.ARTIFACT_STORE
    component = Client().create_stack_component("outage", "local", kind, {"path": str(path)})
    yield component.name
    Client().delete_stack_component(component.id, kind)


@pytest.fixture(scope="module")
def datadog() -> Iterator[Datadog]:
    # Nobody waits for its thorough checks here, which would slow its child down.
    with Datadog(checked=False) as datadog:
        yield datadog


@pytest.fixture
def collector() -> Iterator[Collector]:
    with start_collector() as collector:
        yield collector


@pytest.fixture(params=PROTOCOLS)
def store(
    request: pytest.FixtureRequest,
    archive: str,
    datadog: Datadog,
    collector: Collector,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[CompositeLogStore]:
    # No test depends on the proxy of whoever runs it.
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    endpoint = collector.http_endpoint if request.param != "grpc" else f"http://{collector.grpc_endpoint}"
    store = make_store(
        # Small delays, so that much has been delivered, and much is under way, when the collector dies.
        ArtifactChildConfig(name="archive", type="artifact", artifact_store=archive, schedule_delay_millis=50),
        OtlpChildConfig(
            name="collector", type="otlp", endpoint=endpoint, protocol=request.param, schedule_delay_millis=50
        ),
        DatadogChildConfig(**{"name": "live", "type": "datadog", "schedule_delay_millis": 50, **datadog.settings}),
        flush_timeout_millis=int(FLUSH_TIMEOUT_SECONDS * 1000),
        flush_limit_millis=60_000,
    )
    yield store
    store.writer.close(5)


def shown(datadog: Datadog, logs: LogsResponse) -> list[str]:
    """Return what Datadog was sent of a stream."""
    entries = datadog.seen()["entries"]
    return [entry["message"] for entry in entries if entry["zenml.log.id"] == str(logs.id)]


def bodies(records: list[Record]) -> list[Any]:
    return [record.body for record in records]


def test_a_collector_killed_in_the_middle_of_a_step_costs_nothing_but_one_flush_timeout(
    store: CompositeLogStore, collector: Collector, datadog: Datadog
) -> None:
    step = Step(store)

    def account() -> dict[str, Any]:
        return store.stats()["collector"]

    def pending_of(*children: str) -> int:
        stats = store.stats()
        return sum(stats[child]["pending"] for child in children)

    with accounts_watched(store, "collector") as states, ThreadPoolExecutor(1) as pool:
        running = pool.submit(step.say_until_told)
        try:
            wait_until(lambda: len(collector.records()) > 500, "the collector has received 500 events")
            collector.kill()
            wait_until(lambda: account()["state"] == "retrying", "the outage is noticed")
            # Nobody takes any more, so this is what the collector has said that it took.
            acknowledged = account()["delivered"]
            noticed = len(step.said)
            wait_until(lambda: len(step.said) > noticed + 1_000, "the step goes on")
        finally:
            step.stop()
        # What `emit` may have raised is raised here.
        running.result()
        pending = len(step.said) - acknowledged
        assert account()["pending"] == pending > 1_000

        wait_until(lambda: pending_of("archive", "live") == 0, "its siblings keep up")
        # One flush waits for the collector, for as long as was asked for ...
        assert step.end() < FLUSH_TIMEOUT_SECONDS + MARGIN_SECONDS
        assert account()["state"] == "unavailable"
        step.begin()
        step.say(1)
        # ... and no other one does.
        assert step.end() < FLUSH_TIMEOUT_SECONDS / 2
        assert account()["delivered"] == acknowledged
        assert account()["pending"] == pending + 1

        # Its siblings have everything, while it is still gone.
        assert fetched(store, step.logs) == step.said
        assert shown(datadog, step.logs) == step.said

        # Of what it has acknowledged, a killed collector may have passed on only the first part.
        before = len(collector.records())
        assert bodies(collector.records()) == step.said[:before]
        collector.start()
        wait_until(lambda: account()["pending"] == 0, "all that the collector has missed is delivered")
        missed = step.said[acknowledged:]
        assert bodies(collector.wait_for_records(before + len(missed))[before:]) == missed

        step.begin()
        step.say(1)
        assert step.end() < FLUSH_TIMEOUT_SECONDS / 2
        assert bodies(collector.wait_for_records(before + len(missed) + 1)[before:]) == [*missed, step.said[-1]]

    assert [state for state, _ in groupby(states)] == ["healthy", "retrying", "unavailable", "healthy"]
    for child in store.stats().values():
        assert (child["state"], child["shortened"]) == ("healthy", 0)
        assert child["delivered"] == child["accepted"] == len(step.said)
