from __future__ import annotations

from pathlib import Path

import pytest

from tests.properties.transitions import Watched


@pytest.fixture
def transitions(monkeypatch: pytest.MonkeyPatch) -> Watched:
    """The table that deliveries use in this test."""
    watched = Watched()
    monkeypatch.setattr("composite_logstore.delivery.TRANSITIONS", watched)
    return watched


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Measure no coverage here: it doubles the time of thousands of examples, and unit tests take the same lines."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker("no_cover")
