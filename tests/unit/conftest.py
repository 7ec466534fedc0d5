from __future__ import annotations

from collections.abc import Iterator

import pytest

from composite_logstore import log_store
from composite_logstore.capture.open_streams import here
from composite_logstore.delivery import writers
from composite_logstore.operations import asking
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
def _no_streams_left() -> Iterator[None]:
    """A stream that a test leaves open is none of the next test's."""
    yield
    for stream in here:
        here.closed(stream.id)
    log_store._origins.clear()
