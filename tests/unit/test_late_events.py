"""Taken is not there: `verify` waits for a backend's usual delay, and `check` says why an event does not appear."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import closing
from types import SimpleNamespace
from typing import Any

import pytest

from composite_logstore import Answer, ChildConfig, LogEvent, Query, Record
from composite_logstore.child_types import backends as installed
from composite_logstore.operations.check import FIND_SECONDS
from composite_logstore.parity import compare as comparing
from composite_logstore.parity.compare import compare
from composite_logstore.parity.scan import Source, open_source
from composite_logstore.reading.keyset import KeysetReader
from composite_logstore.testing import SimulatedBackend, SimulatedClock
from composite_logstore.testing.backend import SimulatedChildConfig
from composite_logstore.testing.events import make_events, make_logs
from composite_logstore_otlp.config import OtlpChildConfig
from tests.simulated_zenml import SimulatedZenML
from tests.simulation import make_child

SECOND = 1_000_000_000


class Clock:
    """A clock whose waits take no time; each is noted, and something happens meanwhile."""

    def __init__(self) -> None:
        self.waits: list[float] = []
        self.meanwhile: Any = lambda: None

    def signal(self) -> Clock:
        return self

    def wait(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.meanwhile()

    def time(self) -> float:
        return NOW + sum(self.waits)


NOW = 2_000_000_000.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(comparing, "clock", SimpleNamespace(current=clock))
    monkeypatch.setattr(comparing, "time", clock)
    return clock


class LateChildConfig(SimulatedChildConfig):
    @property
    def delay_seconds(self) -> float:
        return 10.0


def source(config: type[ChildConfig], name: str, backend: SimulatedBackend) -> Source:
    SimulatedChildConfig.backends[name] = backend
    return open_source(config(name=name, type="simulated"))


@pytest.fixture
def backends() -> tuple[SimulatedBackend, SimulatedBackend]:
    return SimulatedBackend(), SimulatedBackend()


@pytest.fixture
def zenml(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimulatedZenML]:
    with SimulatedClock():
        yield SimulatedZenML.take_place(monkeypatch)


def events_aged(seconds: float) -> list[LogEvent]:
    return make_events(["a", "b", "c"], start_unix_nano=int((NOW - seconds) * SECOND), step_nanos=0)


@pytest.mark.parametrize("arrives", [True, False])
def test_verify_waits_for_the_usual_delay(clock: Clock, backends: Sequence[SimulatedBackend], arrives: bool) -> None:
    """Then what has appeared counts, also before what was scanned already, and the rest is missing."""
    archive, late = backends
    events = events_aged(4)
    archive.received += events
    late.received += events[1:]
    if arrives:
        clock.meanwhile = lambda: late.received.insert(0, events[0])
    with closing(source(SimulatedChildConfig, "a", archive)) as one, closing(source(LateChildConfig, "b", late)) as two:
        result = compare(make_logs(events[0].stream), "label", [one, two])
    assert clock.waits == [pytest.approx(6)]
    assert (result.children["b"].events, result.children["b"].missing) == ((3, 0) if arrives else (2, 1))
    assert result.children["a"].missing == 0


@pytest.mark.parametrize(("age", "config"), [(11, LateChildConfig), (0, SimulatedChildConfig)])
def test_verify_does_not_wait_for_old_events_and_prompt_backends(
    clock: Clock, backends: Sequence[SimulatedBackend], age: float, config: type[ChildConfig]
) -> None:
    archive, late = backends
    events = events_aged(age)
    archive.received += events
    late.received += events[1:]
    with closing(source(SimulatedChildConfig, "a", archive)) as one, closing(source(config, "b", late)) as two:
        result = compare(make_logs(events[0].stream), "label", [one, two])
    assert (clock.waits, result.children["b"].missing) == ([], 1)


def test_verify_does_not_wait_where_nothing_is_missing_and_never_longer_than_the_delay(
    clock: Clock, backends: Sequence[SimulatedBackend]
) -> None:
    archive, late = backends
    # Logged by a machine whose clock is an hour ahead.
    events = events_aged(-3600)
    archive.received += events
    late.received += events
    with closing(source(SimulatedChildConfig, "a", archive)) as one, closing(source(LateChildConfig, "b", late)) as two:
        compare(make_logs(events[0].stream), "label", [one, two])
        assert clock.waits == []
        del late.received[0]
        compare(make_logs(events[0].stream), "label", [one, two])
    assert clock.waits == [10]


@pytest.mark.parametrize(
    ("settings", "is_prompt"),
    [
        ({"type": "artifact"}, True),
        ({"type": "datadog", "api_key": "key", "application_key": "key"}, False),
        ({"type": "elasticsearch", "url": "https://search.example:9200"}, False),
        ({"type": "cloudwatch"}, False),
        ({"type": "otlp", "read": {"type": "loki", "query_url": "https://loki.example"}}, False),
    ],
)
def test_every_backend_that_shows_events_later_says_so(settings: dict[str, Any], is_prompt: bool) -> None:
    child = installed()[settings["type"]].load()(name="c", **settings)
    assert child.unreadable is None
    assert (child.delay_seconds == 0) is is_prompt
    # `check` looks for so long, and `verify` waits for so long.
    assert child.delay_seconds <= FIND_SECONDS


# check


class StrippedReader(KeysetReader):
    """A backend behind a collector's processor that has removed the writer and the sequence."""

    def __init__(self, backend: SimulatedBackend, stripped: Sequence[str] = ("a", "b", "c")) -> None:
        self.backend = backend
        self.stripped = stripped

    def search(self, query: Query, allowance: Any) -> Answer:
        allowance.take(0)
        kept = ("log.record.uid", "zenml.log.id")
        records = []
        for event in self.backend.received:
            values = {**event.stream.attributes, **event.identity}
            if event.message in self.stripped or event.message.startswith("composite-logstore check"):
                values = {name: value for name, value in values.items() if name in kept}
            records.append(Record(event.time_unix_nano, event.message, 9, "INFO", "x", values))
        return Answer(records, True)

    def close(self) -> None:
        """Close nothing."""


def test_check_says_which_attributes_are_missing(monkeypatch: pytest.MonkeyPatch, zenml: SimulatedZenML) -> None:
    zenml.register(make_child("a"))
    reader = StrippedReader(SimulatedChildConfig.backends["a"])
    monkeypatch.setattr(SimulatedChildConfig, "create_reader", lambda self: reader)
    result = zenml.run_command("check", "logs", "--output", "json")
    [child] = json.loads(result.stdout)["children"]
    [finding] = [one for one in child["findings"] if one["what"] == "read"]
    assert finding["result"] == "problem"
    assert "'zenml.log.sequence'" in finding["message"]
    assert "processor" in finding["advice"]


@pytest.mark.parametrize(("stripped", "missing"), [(["a", "b", "c"], 0), (["b"], 1)])
def test_verify_says_which_attributes_are_missing(
    monkeypatch: pytest.MonkeyPatch, backends: Sequence[SimulatedBackend], stripped: list[str], missing: int
) -> None:
    """Of ours, and not of another program's records, which have no identity either."""
    archive, behind = backends
    events = make_events(["a", "b", "c"], logger_name="x")
    archive.received += events
    behind.received += events
    reader = StrippedReader(behind, stripped)
    monkeypatch.setattr(LateChildConfig, "create_reader", lambda self: reader)
    monkeypatch.setattr(LateChildConfig, "delay_seconds", 0.0)
    with closing(source(SimulatedChildConfig, "a", archive)) as one, closing(source(LateChildConfig, "b", behind)) as b:
        result = compare(make_logs(events[0].stream), "label", [one, b])
    child = result.children["b"]
    assert child.missing == missing
    said = [str(child.excuse), *(str(one.detail) for one in result.differences)]
    assert any("'zenml.log.sequence'" in one and "processor" in one for one in said)
    # Nothing is said of a record that another program wrote.
    monkeypatch.setattr(StrippedReader, "search", lambda self, query, allowance: theirs(events[0], allowance))
    with closing(source(SimulatedChildConfig, "a", archive)) as one, closing(source(LateChildConfig, "b", behind)) as b:
        result = compare(make_logs(events[0].stream), "label", [one, b])
    said = [str(result.children["b"].excuse), *(str(one.detail) for one in result.differences)]
    assert not any("'zenml.log.sequence'" in one for one in said)


def theirs(event: LogEvent, allowance: Any) -> Answer:
    allowance.take(0)
    attributes = {"zenml.log.id": str(event.stream.id)}
    return Answer([Record(event.time_unix_nano, event.message, 9, "INFO", "x", attributes)], True)


def test_the_advice_is_the_readers_own() -> None:
    section = {"type": "clickhouse", "url": "https://clickhouse.example:8443"}
    child = OtlpChildConfig(name="c", type="otlp", read=section)
    assert "'read.table'" in child.absence
    assert child.delay_seconds > 0
    plain = OtlpChildConfig(name="c", type="otlp")
    assert plain.delay_seconds == 0
    assert plain.absence
