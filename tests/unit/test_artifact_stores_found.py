"""Which artifact stores are looked up, and how often."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from zenml.config.global_config import GlobalConfiguration
from zenml.constants import ENV_ZENML_SERVER

from composite_logstore.config import CompositeLogStoreConfig
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


# An artifact store that does not exist


@pytest.fixture
def zenml(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A ZenML with the artifact stores `default` and `bucket`; what it was asked for."""
    asked: list[str] = []

    class Zen:
        def get_stack_component(self, kind: Any, name_id_or_prefix: str, allow_name_prefix_match: bool) -> Any:
            asked.append(name_id_or_prefix)
            if name_id_or_prefix not in ("default", "bucket"):
                raise KeyError(name_id_or_prefix)
            return SimpleNamespace(type="artifact_store", name=name_id_or_prefix, id=1, configuration={})

        def list_stack_components(self, **_: Any) -> Any:
            return SimpleNamespace(items=[SimpleNamespace(name=name) for name in ("default", "bucket")])

    monkeypatch.setattr(artifact_stores, "Client", Zen)
    monkeypatch.setattr(GlobalConfiguration, "is_initialized", property(lambda _: True))
    return asked


def config(name: str, **settings: Any) -> CompositeLogStoreConfig:
    child = {"name": "archive", "type": "artifact", "artifact_store": name, **settings}
    second: Any = {"name": "second", "type": "artifact"}
    return CompositeLogStoreConfig(primary="second", children=[second, child])  # type: ignore[list-item]


@pytest.mark.usefixtures("zenml")
@pytest.mark.parametrize(("name", "hint"), [("buckte", r" \(did you mean 'bucket'\?\)"), ("nowhere", "")])
def test_one_that_does_not_exist_is_refused_at_registration(name: str, hint: str) -> None:
    mistake = f"child 'archive': 'artifact_store': there is no artifact store '{name}'{hint}; name one"
    with pytest.raises(ValueError, match=mistake):
        assert config(name).is_valid
    assert config("bucket").is_valid


@pytest.mark.usefixtures("zenml")
def test_a_disabled_child_may_name_one_that_is_gone() -> None:
    assert config("gone", enabled=False).is_valid


def test_on_the_server_and_without_a_connection_nobody_is_asked(
    zenml: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setenv(ENV_ZENML_SERVER, "1")
        assert config("nowhere").is_valid
    # A handler in a plain program does not wait for ZenML.
    monkeypatch.setattr(GlobalConfiguration, "is_initialized", property(lambda _: False))
    assert config("nowhere").is_valid
    assert zenml == []
