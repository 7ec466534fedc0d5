from __future__ import annotations

import pytest

from tests.properties.transitions import Watched


@pytest.fixture
def transitions(monkeypatch: pytest.MonkeyPatch) -> Watched:
    """The table that deliveries use in this test."""
    watched = Watched()
    monkeypatch.setattr("composite_logstore.delivery.delivery.TRANSITIONS", watched)
    return watched
