"""The `read` section of an OTLP child: its settings, its secrets and its errors."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import EntryPoint
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest
from pydantic import ValidationError

from composite_logstore import HttpReaderConfig, UnavailableError, reader_config, secret_references
from composite_logstore.catalog.differences import shown
from composite_logstore.child_types import parse_child
from composite_logstore.config import CompositeLogStoreConfig
from composite_logstore.operations import schema, validate

COLLECTOR = {"name": "collector", "type": "otlp", "endpoint": "https://collector:4318"}
ARCHIVE = {"name": "archive", "type": "artifact"}
SECTION = {"type": "lines", "url": "https://lines.example", "table": "logs"}


class LinesReaderConfig(HttpReaderConfig):
    """Reads lines.

    Attributes:
        table: The table.
    """

    table: str = "lines"

    def create_reader(self, service_name: str | None) -> Any:
        return SimpleNamespace(config=self, service_name=service_name)


@pytest.fixture(autouse=True)
def _installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One reader is installed, and one whose module is missing."""
    found = {
        "lines": EntryPoint("lines", f"{__name__}:LinesReaderConfig", reader_config.READERS),
        "torn": EntryPoint("torn", "no_such_module:Config", reader_config.READERS),
    }
    reader_config.readers.cache_clear()
    monkeypatch.setattr(reader_config, "entry_points", lambda group: found.values())
    yield
    reader_config.readers.cache_clear()


def child(section: Any, **settings: Any) -> Any:
    return parse_child(1, {**COLLECTOR, **settings, "read": section})


def store(section: Any, **settings: Any) -> CompositeLogStoreConfig:
    return CompositeLogStoreConfig(**{"primary": "collector", "children": [{**COLLECTOR, "read": section}], **settings})


def test_a_child_with_the_section_can_be_primary_and_one_without_cannot() -> None:
    assert store(SECTION).child("collector").unreadable is None
    with pytest.raises(ValidationError, match=r"child 'collector'.*'read'"):
        CompositeLogStoreConfig(primary="collector", children=[COLLECTOR])
    with pytest.raises(UnavailableError, match="'read'"):
        parse_child(1, COLLECTOR).create_reader()


def test_the_reader_gets_its_settings_and_the_service_name() -> None:
    reader = child(SECTION, service_name="training").create_reader()
    assert (reader.config.table, reader.service_name) == ("logs", "training")


def test_settings_survive_registration() -> None:
    before = child({**SECTION, "username": "reader", "password": "{{lines.password}}"})
    after = parse_child(1, before.as_registered())
    assert after == before
    assert after.read.table == "logs"


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ([], ["'read'", "object"]),
        ("lines", ["'read'", "object"]),
        ({}, ["'read.type'", "lines"]),
        ({"type": 3}, ["'read.type'"]),
        ({"type": "lines"}, ["'read.url'", "required"]),
        ({**SECTION, "tabel": "x"}, ["'read.tabel'", "table"]),
        ({**SECTION, "url": "lines.example"}, ["'read.url'", "https://"]),
        ({**SECTION, "url": "https://me:s3cret@lines.example"}, ["'read.url'", "'username'"]),
        ({**SECTION, "url": "https://lines.example/?key=s3cret"}, ["'read.url'"]),
        ({**SECTION, "url": "https://lines.example:99999"}, ["'read.url'"]),
        ({**SECTION, "password": "s3cret"}, ["'read.password'", "'username'"]),
        ({**SECTION, "username": "a", "api_key": "s3cret"}, ["'read.api_key'", "'username'"]),
        ({**SECTION, "username": "a:b", "password": "s3cret"}, ["'read.username'", "colon"]),
        ({**SECTION, "username": "a\nb", "password": "s3cret"}, ["'read.username'", "control character"]),
        ({**SECTION, "api_key": "s3cret\nx"}, ["'read.api_key'", "line break"]),
        ({**SECTION, "api_key": " "}, ["'read.api_key'", "empty"]),
        ({**SECTION, "api_key": "s3crét"}, ["'read.api_key'", "copy it again"]),
    ],
)
def test_mistakes_name_child_field_and_fix(section: Any, words: list[str]) -> None:
    with pytest.raises(ValueError, match="child 'collector'") as caught:
        child(section)
    for word in words:
        assert word in str(caught.value)
    assert "s3cr" not in str(caught.value)
    [mistake] = validate([{**COLLECTOR, "read": section}]).mistakes
    assert mistake == str(caught.value)


@pytest.mark.parametrize("name", ["linse", "torn"])
def test_a_reader_that_is_not_installed_makes_the_child_unreadable_here_alone(name: str) -> None:
    unknown = child({"type": name, "url": "https://lines.example", "key": "s3cret"})
    assert parse_child(1, unknown.as_registered()) == unknown
    with pytest.raises(UnavailableError, match=name):
        unknown.create_reader()
    with pytest.raises(ValueError, match=r"'read\.type'"):
        unknown.check_registration()
    assert "s3cret" not in shown(unknown.as_registered())["read"]
    assert store({"type": name}).children


def test_references_are_resolved_in_fields_for_secrets_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secret_references, "_look_up", lambda name, key, owner: f"{name}-{key}")
    config = store({**SECTION, "username": "reader", "password": "{{lines.password}}"})
    assert [(one.name, one.key) for one in config.required_secrets] == [("lines", "password")]
    resolved = secret_references.resolve(config.child("collector")).create_reader().config
    assert resolved.authorization == {"Authorization": "Basic cmVhZGVyOmxpbmVzLXBhc3N3b3Jk"}
    wrong = child({**SECTION, "table": "{{lines.table}}"})
    with pytest.raises(ValueError, match=r"'read\.table'.*'read\.password'"):
        secret_references.check(wrong)
    with pytest.raises(UnavailableError, match=r"'read\.table'"):
        secret_references.resolve(wrong)


def test_an_invalid_secret_names_the_section(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secret_references, "_look_up", lambda name, key, owner: "s3cret\n")
    with pytest.raises(UnavailableError, match="'read'") as caught:
        secret_references.resolve(child({**SECTION, "api_key": "{{lines.key}}"}))
    assert "s3cret" not in str(caught.value)


def test_secrets_are_never_shown() -> None:
    section = {**SECTION, "username": "reader", "password": "s3cret"}
    config = child(section)
    assert list(secret_references.clear_text_fields(config)) == ["read.password"]
    assert "s3cret" not in shown({**COLLECTOR, "read": section})["read"]
    assert '"table": "logs"' in shown({**COLLECTOR, "read": section})["read"]
    assert "s3cret" not in repr(config)


def test_the_schema_knows_the_section() -> None:
    found = schema()
    jsonschema.Draft202012Validator.check_schema(found)
    check = jsonschema.Draft202012Validator(found)
    assert check.is_valid([{**COLLECTOR, "read": SECTION}])
    for wrong in ({"type": "lines"}, {**SECTION, "tabel": 1}, {"type": "nothing"}, [], {}):
        assert not check.is_valid([{**COLLECTOR, "read": wrong}])
    assert found["$defs"]["LinesReaderConfig"]["properties"]["password"]["writeOnly"]
    assert found["$defs"]["LinesReaderConfig"]["properties"]["table"]["description"] == "The table."
