from __future__ import annotations

import json
from typing import Any, ClassVar

import pytest
from pydantic import BaseModel, SecretStr, ValidationError
from zenml.client import Client
from zenml.enums import LoggingLevels
from zenml.utils.secret_utils import SecretReference

from composite_logstore import CompositeLogStoreConfig, UnavailableError, secret_references
from composite_logstore.child_types import UnknownChild, backends
from composite_logstore.config import HandlerConfig
from composite_logstore.mistakes import sections_in
from composite_logstore.reader_config import readers

ARCHIVE = {"name": "archive", "type": "artifact"}
COLLECTOR = {"name": "collector", "type": "otlp", "endpoint": "http://127.0.0.1:4318"}
LIVE = {
    "name": "live",
    "type": "datadog",
    "site": "datadoghq.eu",
    "min_level": "INFO",
    "api_key": "{{datadog.api_key}}",
    "application_key": "{{datadog.application_key}}",
}


def make_config(*children: Any, **settings: Any) -> CompositeLogStoreConfig:
    """Parse and check as ZenML does where a component is registered."""
    config = CompositeLogStoreConfig(**{"primary": "archive", "children": list(children), **settings})
    assert config.is_valid
    return config


def test_zenml_may_check_settings_twice_and_people_are_warned_once(caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        make_config({"name": "archive", "type": "artifact"}, {**LIVE, "api_key": "0123"})
    assert sum("'api_key'" in record.getMessage() for record in caplog.records) == 1


def mistake(*children: Any, **settings: Any) -> str:
    with pytest.raises(ValueError) as raised:  # noqa: PT011 - the callers look at the message
        make_config(*children, **settings)
    return str(raised.value)


def test_the_designs_example_is_accepted() -> None:
    config = make_config(ARCHIVE, COLLECTOR, LIVE)
    assert [child.name for child in config.enabled_children] == ["archive", "collector", "live"]
    assert config.child("live").min_level == LoggingLevels.INFO


def test_the_defaults_are_those_of_the_reference() -> None:
    config = make_config(ARCHIVE)
    assert (config.flush_timeout_millis, config.flush_limit_millis, config.durability) == (5000, 30000, "spill")
    assert (config.spool_directory, config.spool_max_bytes) == (None, 1024**3)
    child = config.child("archive")
    assert (child.enabled, child.min_level, child.progress, child.max_queue_size) == (True, None, "all", 100_000)
    assert (child.schedule_delay_millis, child.export_timeout_millis) == (1000, 10000)
    assert (child.retry_initial_interval_millis, child.retry_max_interval_millis) == (500, 30000)


def sections_of(settings: type[BaseModel]) -> set[type[BaseModel]]:
    found = {settings}
    for field in settings.model_fields.values():
        for section in sections_in(field.annotation):
            found |= sections_of(section)
    return found


def test_true_is_no_number_in_any_setting() -> None:
    classes: list[type[BaseModel]] = [CompositeLogStoreConfig, HandlerConfig]
    classes += [entry_point.load() for entry_point in (*backends().values(), *readers().values())]
    checked = set()
    for settings in set().union(*map(sections_of, classes)):
        for name, schema in settings.model_json_schema()["properties"].items():
            text = json.dumps(schema)
            if ('"integer"' in text or '"number"' in text or '"DEBUG"' in text) and not (
                '"boolean"' in text or '"detect"' in text
            ):
                with pytest.raises(ValidationError) as raised:
                    settings.model_validate({name: True})
                assert [one["loc"] for one in raised.value.errors() if "true" in one["msg"]] == [(name,)]
                checked.add(name)
    assert checked >= {"events", "bytes", "ratio", "window_millis", "max_queue_size", "min_level", "spool_max_bytes"}


def test_children_are_bounded_in_number_where_a_log_store_is_loaded_too() -> None:
    def children(number: int) -> list[dict[str, str]]:
        return [ARCHIVE, *({**COLLECTOR, "name": f"c{n}"} for n in range(number - 1))]

    assert len(CompositeLogStoreConfig(primary="archive", children=children(100)).children) == 100
    with pytest.raises(ValueError, match="'children' has 101 children; give at most 100"):
        CompositeLogStoreConfig(primary="archive", children=children(101))


def test_children_may_be_given_as_json_text_as_the_cli_does() -> None:
    config = CompositeLogStoreConfig(
        primary="archive",
        children=json.dumps([ARCHIVE]),
        fetch_fallback="[]",  # type: ignore[arg-type]
    )
    assert config.child("archive").type == "artifact"


def test_what_zenml_stores_gives_the_same_configuration_back() -> None:
    config = make_config(ARCHIVE, COLLECTOR, LIVE)
    stored = config.model_dump(mode="json", exclude_unset=True)
    assert stored["children"][2] == LIVE | {"min_level": 20}
    assert CompositeLogStoreConfig(**stored) == config


@pytest.mark.parametrize(
    ("children", "settings", "parts"),
    [
        ([ARCHIVE, COLLECTOR | {"endpont": "x"}], {}, ["child 'collector'", "'endpont'", "did you mean 'endpoint'"]),
        ([ARCHIVE, {"name": "x", "type": "otpl"}], {}, ["child 'x'", "'otpl'", "did you mean 'otlp'", "artifact"]),
        ([ARCHIVE, {"type": "otlp"}], {}, ["child number 2", "'name' is required"]),
        ([ARCHIVE, {"name": "x"}], {}, ["child 'x'", "'type' is required"]),
        ([ARCHIVE, "collector"], {}, ["child number 2", "must be an object"]),
        ([ARCHIVE, ARCHIVE], {}, ["child 'archive'", "more than once"]),
        ([ARCHIVE, {"name": "Bad Name", "type": "artifact"}], {}, ["child 'Bad Name'", "'name'", "a-z 0-9 - _"]),
        ([ARCHIVE], {"primary": "archiv"}, ["'primary'", "'archiv'", "did you mean 'archive'", "set one of: archive"]),
        ([ARCHIVE | {"enabled": False}, LIVE], {}, ["'primary'", "'archive' is disabled", "set one of: live"]),
        ([ARCHIVE, COLLECTOR], {"primary": "collector"}, ["'primary'", "'collector'", "'otlp' cannot be read"]),
        (
            [LIVE | {"application_key": None}],
            {"primary": "live"},
            ["'primary'", "child 'live'", "'application_key' is needed to read it; set it"],
        ),
        ([ARCHIVE], {"fetch_fallback": ["archive"]}, ["'fetch_fallback'", "'archive'", "once"]),
        ([ARCHIVE], {"fetch_fallback": ["live"]}, ["'fetch_fallback'", "'live'"]),
        ([], {}, ["'children' is empty"]),
        ([ARCHIVE, LIVE | {"max_export_batch_size": 1001}], {}, ["child 'live'", "max_export_batch_size", "1000"]),
        ([ARCHIVE | {"max_queue_size": 0}], {}, ["child 'archive'", "'max_queue_size'", "greater than 0"]),
        ([ARCHIVE | {"min_level": "LOUD"}], {}, ["child 'archive'", "'min_level'"]),
        ([ARCHIVE | {"retry_max_interval_millis": 1}], {}, ["child 'archive'", "'retry_max_interval_millis'"]),
        ([ARCHIVE | {"progress": "some"}], {}, ["child 'archive'", "'progress'"]),
        ([ARCHIVE], {"durability": "always"}, ["durability", "'spill'"]),
        ([ARCHIVE], {"delivery": "agent", "durability": "memory"}, ["'delivery'", "'durability'", "'spill'"]),
        ([ARCHIVE], {"delivery": "auto", "durability": "memory"}, ["'delivery'", "'durability'", "'spill'"]),
        ([ARCHIVE], {"delivery": "always"}, ["delivery", "'agent'"]),
        ([ARCHIVE], {"spool_directory": "spool"}, ["'spool_directory'", "absolute path"]),
        ([ARCHIVE], {"children": "[{]"}, ["'children'", "not valid JSON", "column"]),
        ([ARCHIVE], {"children": {"archive": {}}}, ["'children'", "must be a list"]),
    ],
)
def test_a_mistake_is_refused_in_words_that_name_the_child_the_field_and_the_fix(
    children: list[Any], settings: dict[str, Any], parts: list[str]
) -> None:
    message = mistake(*children, **settings)
    for part in parts:
        assert part in message


def test_two_archives_in_one_place_are_refused() -> None:
    elsewhere = {"artifact_store": "elsewhere"}
    second = {"name": "second", "type": "artifact"}
    assert mistake(ARCHIVE, second) == (
        "children 'archive' and 'second': both write to the stack's artifact store, where each line would be twice; "
        "set another for one of them, or disable one"
    )
    message = mistake(ARCHIVE | elsewhere, second | elsewhere)
    assert message.startswith("children 'archive' and 'second': both write to artifact store 'elsewhere'")
    make_config(ARCHIVE, second | elsewhere)
    make_config(ARCHIVE, second | {"enabled": False})


def test_two_archives_in_one_place_are_no_mistake_where_they_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZENML_SERVER", "true")
    make_config(ARCHIVE, {"name": "second", "type": "artifact"})


@pytest.mark.parametrize(
    "child",
    [
        LIVE | {"api_key": "s3cr3t-value", "unknown": "s3cr3t-value"},
        LIVE | {"api_key": ["s3cr3t-value"]},
        LIVE | {"site": ["s3cr3t-value"]},
        COLLECTOR | {"headers": "s3cr3t-value"},
        COLLECTOR | {"endpoint": "ftp://s3cr3t-value"},
        {"name": "archive2", "type": "artifact", "max_queue_size": "s3cr3t-value"},
    ],
)
def test_a_mistake_never_repeats_a_value(child: dict[str, Any]) -> None:
    assert "s3cr3t-value" not in mistake(ARCHIVE, child)


def test_broken_json_is_not_repeated_either() -> None:
    with pytest.raises(ValidationError) as raised:
        CompositeLogStoreConfig(primary="a", children='[{"api_key": "s3cr3t-value"')  # type: ignore[arg-type]
    assert "s3cr3t-value" not in str(raised.value)


def test_secrets_are_in_no_representation() -> None:
    config = make_config(ARCHIVE, LIVE | {"api_key": "s3cr3t-value"})
    assert "s3cr3t-value" not in repr(config)
    assert "s3cr3t-value" not in str(config.model_dump())


def test_a_key_in_clear_text_is_a_warning_and_a_reference_is_not(caplog: pytest.LogCaptureFixture) -> None:
    make_config(ARCHIVE, LIVE)
    assert caplog.text == ""
    make_config(ARCHIVE, LIVE | {"api_key": "s3cr3t-value"})
    assert "child 'live': 'api_key'" in caplog.text
    assert "s3cr3t-value" not in caplog.text


def test_where_it_is_loaded_a_child_of_an_unknown_type_does_not_hide_the_others() -> None:
    config = CompositeLogStoreConfig(
        primary="archive",
        children=[ARCHIVE, {"name": "x", "type": "elsewhere", "url": "u"}],  # type: ignore[list-item]
    )
    unknown = config.child("x")
    assert isinstance(unknown, UnknownChild)
    with pytest.raises(UnavailableError, match="'elsewhere'"):
        unknown.create_exporter()
    stored = config.model_dump(mode="json", exclude_unset=True)
    assert stored["children"][1] == {"name": "x", "type": "elsewhere", "url": "u"}


def test_a_server_without_a_backend_accepts_what_the_client_has_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZENML_SERVER", "true")
    make_config(ARCHIVE, {"name": "x", "type": "elsewhere"})


def test_a_backend_that_cannot_be_imported_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def load(self) -> Any:
            raise ImportError("no module")

    monkeypatch.setitem(backends(), "broken", Broken())  # type: ignore[arg-type]
    assert "'broken' is installed but cannot be imported" in mistake(ARCHIVE, {"name": "x", "type": "broken"})


class TestSecrets:
    @pytest.fixture(autouse=True)
    def _zenml_has_secrets(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Answer:
            secret_values: ClassVar = {"api_key": "k1", "application_key": "k2", "token": "k3"}

        def get(_: Any, name: str) -> Answer:
            if name != "datadog":
                raise KeyError(name)
            return Answer()

        monkeypatch.setattr(Client, "get_secret_by_name_and_private_status", get)
        monkeypatch.setattr(Client, "__init__", lambda *_: None)
        # ZenML keeps the first client for the whole process: not this one.
        monkeypatch.setattr(Client, "_global_client", None)

    def test_references_are_reported_for_zenmls_check_of_a_stack(self) -> None:
        headers = {"headers": {"Authorization": "Bearer {{ tokens.collector }}"}}
        config = make_config(ARCHIVE, COLLECTOR | headers, LIVE)
        assert config.required_secrets == {
            SecretReference("datadog", "api_key"),
            SecretReference("datadog", "application_key"),
            SecretReference("tokens", "collector"),
        }

    def test_a_disabled_child_needs_no_secret(self) -> None:
        assert make_config(ARCHIVE, LIVE | {"enabled": False}).required_secrets == set()

    def test_references_are_resolved_when_used_alone_or_as_part_of_a_value(self) -> None:
        headers = {"Authorization": "Bearer {{datadog.token}}", "x": "plain"}
        config = make_config(ARCHIVE, COLLECTOR | {"headers": headers}, LIVE)
        collector: Any = secret_references.resolve(config.child("collector"))
        assert collector.headers["Authorization"].get_secret_value() == "Bearer k3"
        live: Any = secret_references.resolve(config.child("live"))
        assert live.api_key == SecretStr("k1")
        assert live.site == "datadoghq.eu"

    def test_a_secret_that_does_not_fit_its_field_makes_a_child_unavailable_without_being_repeated(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(
            Client,
            "get_secret_by_name_and_private_status",
            lambda *_, **__: type(
                "Answer", (), {"secret_values": {"api_key": "s3cr3t value\n", "application_key": "k"}}
            ),
        )
        with pytest.raises(UnavailableError, match="'api_key'") as raised:
            secret_references.resolve(make_config(ARCHIVE, LIVE).child("live"))
        assert "s3cr3t" not in str(raised.value)

    def test_a_missing_secret_or_key_makes_a_child_unavailable_in_words(self) -> None:
        config = make_config(ARCHIVE, LIVE | {"api_key": "{{nowhere.key}}"})
        with pytest.raises(UnavailableError, match="secret 'nowhere' does not exist"):
            secret_references.resolve(config.child("live"))
        config = make_config(ARCHIVE, LIVE | {"api_key": "{{datadog.nokey}}"})
        with pytest.raises(UnavailableError, match="secret 'datadog' has no key 'nokey'"):
            secret_references.resolve(config.child("live"))


def test_the_environment_decides_who_delivers(monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(ARCHIVE, delivery="auto")
    assert config.chosen_delivery == "auto"
    monkeypatch.setenv("COMPOSITE_LOGSTORE_DELIVERY", "process")
    assert config.chosen_delivery == "process"
    monkeypatch.setenv("COMPOSITE_LOGSTORE_DELIVERY", "always")
    with pytest.raises(ValueError, match=r"COMPOSITE_LOGSTORE_DELIVERY.*'agent'"):
        _ = config.chosen_delivery
    monkeypatch.setenv("COMPOSITE_LOGSTORE_DELIVERY", "agent")
    with pytest.raises(ValueError, match=r"COMPOSITE_LOGSTORE_DELIVERY.*'durability'"):
        _ = make_config(ARCHIVE, durability="memory").chosen_delivery
