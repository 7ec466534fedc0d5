"""Which artifact stores are looked up, and how often."""

from __future__ import annotations

import pytest
from zenml.constants import ENV_ZENML_SERVER

from composite_logstore_artifact import artifact_stores
from composite_logstore_artifact.artifact_stores import REMEMBERED_SECONDS, find_named


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of those that were looked up and opened."""
    names: list[str] = []
    monkeypatch.setattr(artifact_stores, "_stores", {})
    monkeypatch.setattr(artifact_stores, "find_model", lambda name: name)
    monkeypatch.setattr(artifact_stores, "_load", lambda name: names.append(name) or f"{name} {len(names)}")
    return names


def test_one_is_looked_up_once_in_a_while_and_not_for_each_stream(
    opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(artifact_stores.time, "monotonic", lambda: now)
    assert [find_named("s3") for _ in range(3)] == ["s3 1"] * 3
    assert find_named("other") == "other 2"
    now += REMEMBERED_SECONDS
    assert find_named("s3") == "s3 3"


def test_on_the_server_it_is_looked_up_for_each_reader(opened: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENV_ZENML_SERVER, "1")
    assert [find_named("s3") for _ in range(2)] == ["s3 1", "s3 2"]
