from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

from composite_logstore import config, log_store
from composite_logstore.capture.open_streams import here
from composite_logstore.delivery import writers
from composite_logstore.operations import asking
from composite_logstore.spool.lock import release_all
from composite_logstore.testing import SimulatedClock
from tests.agents import Place
from tests.patience import PATIENCE_SECONDS


@pytest.fixture(autouse=True)
def _no_zenml_client(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unit tests have no active stack: looking for one would set up a database. Nor is ZenML's client connected."""
    from zenml.config.global_config import GlobalConfiguration

    monkeypatch.setattr(GlobalConfiguration, "is_initialized", property(lambda _: False))
    monkeypatch.setattr(log_store, "_active_artifact_store_id", lambda: None)


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine even a simulated backend may answer late."""
    monkeypatch.setattr(asking, "ANSWER_SECONDS", PATIENCE_SECONDS)


@pytest.fixture(autouse=True)
def _no_writers_left() -> Iterator[None]:
    """What a test leaves undelivered is no business of the test run's own exit."""
    yield
    writers._writers.clear()


@pytest.fixture(autouse=True)
def _not_warned_yet() -> None:
    """A process warns once of settings that it registers."""
    config._warn.cache_clear()


@pytest.fixture(autouse=True)
def _no_streams_left() -> Iterator[None]:
    """A stream that a test leaves open is none of the next test's."""
    yield
    for stream in here:
        here.closed(stream.id)
    log_store._origins.clear()


@pytest.fixture
def clock() -> Iterator[SimulatedClock]:
    """A clock that the test moves. Afterwards no folder is locked any more by a process that the test let die."""
    with SimulatedClock() as clock:
        yield clock
    release_all()


@pytest.fixture
def place(clock: SimulatedClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """A machine with a registered log store, on which agents run."""
    place = Place(clock, tmp_path / "spool")
    agent = import_module("composite_logstore.operations.agent")
    monkeypatch.setattr(agent, "registered", place.registered)
    monkeypatch.setattr(agent, "check_server", lambda: None)
    monkeypatch.setenv("ZENML_CONFIG_PATH", str(tmp_path / "zenml"))
    return place
