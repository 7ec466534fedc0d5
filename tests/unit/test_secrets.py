"""Where references to secrets are resolved, and where they are refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from pydantic import BaseModel, Field, SecretStr
from zenml.client import Client
from zenml.config.global_config import GlobalConfiguration
from zenml.constants import ENV_ZENML_SERVER
from zenml.exceptions import IllegalOperationError
from zenml.utils.secret_utils import SecretField, SecretReference

from composite_logstore import (
    ChildConfig,
    CompositeHandler,
    CompositeLogStoreConfig,
    Secret,
    UnavailableError,
    secret_references,
    server,
)
from composite_logstore.child_types import UnknownChild
from tests.unit.test_config import ARCHIVE, LIVE

VALUE = "v4lue"
WHOLE, PART = "{{vault.key}}", "Bearer {{ vault.key }}!"

OTLP = {"name": "other", "type": "otlp"}
DATADOG = {**LIVE, "name": "other"}
OTEL = {"name": "other", "type": "otel", "exporter": "console"}
CLOUDWATCH = {"name": "other", "type": "cloudwatch"}
ELASTIC = {"name": "other", "type": "elasticsearch", "url": "https://search.example.com"}

# The settings → whether references are resolved there.
PLACES: list[tuple[dict[str, Any], bool]] = [
    (DATADOG | {"api_key": WHOLE}, True),
    (DATADOG | {"api_key": "k-{{vault.key}}"}, True),
    (DATADOG | {"application_key": WHOLE}, True),
    (DATADOG | {"site": WHOLE}, False),
    (DATADOG | {"endpoint": WHOLE}, False),
    (DATADOG | {"endpoint": "https://{{vault.key}}.example.com/api/v2/logs"}, False),
    (DATADOG | {"api_endpoint": WHOLE}, False),
    (DATADOG | {"api_endpoint": "https://example.com/{{vault.key}}"}, False),
    (DATADOG | {"service_name": WHOLE}, False),
    (DATADOG | {"service_version": WHOLE}, False),
    (DATADOG | {"tags": ["env:prod", "key:{{vault.key}}"]}, False),
    (OTLP | {"headers": {"authorization": PART}}, True),
    (OTLP | {"headers": {"x-plain": "plain", "authorization": WHOLE}}, True),
    (OTLP | {"endpoint": WHOLE}, False),
    (OTLP | {"endpoint": "https://example.com/{{vault.key}}"}, False),
    (OTLP | {"certificate_file": "/certificates/{{vault.key}}"}, False),
    (OTLP | {"client_certificate_file": "/a.pem", "client_key_file": WHOLE}, False),
    (OTLP | {"client_certificate_file": WHOLE}, False),
    (OTLP | {"service_name": WHOLE}, False),
    (OTLP | {"service_version": WHOLE}, False),
    (OTLP | {"resource_attributes": {"owner": PART}}, False),
    (OTEL | {"arguments": {"formatter": WHOLE}}, True),
    (OTEL | {"arguments": {"formatter": ["deep", {"down": PART}]}}, True),
    (OTEL | {"exporter": "package.{{vault.key}}"}, False),
    (OTEL | {"service_name": WHOLE}, False),
    (OTEL | {"service_version": WHOLE}, False),
    (CLOUDWATCH | {"log_group": WHOLE}, False),
    (CLOUDWATCH | {"log_stream_prefix": "{{vault.key}}/"}, False),
    (CLOUDWATCH | {"region": WHOLE}, False),
    (CLOUDWATCH | {"connector": WHOLE}, False),
    (CLOUDWATCH | {"endpoint_url": "https://example.com/{{vault.key}}"}, False),
    (ELASTIC | {"api_key": WHOLE}, True),
    (ELASTIC | {"username": "reader", "password": WHOLE}, True),
    (ELASTIC | {"username": WHOLE, "password": "word"}, False),
    (ELASTIC | {"url": "https://{{vault.key}}.example.com"}, False),
    (ELASTIC | {"index": WHOLE}, False),
    (ELASTIC | {"certificate_file": "/certificates/{{vault.key}}"}, False),
    (ELASTIC | {"client_certificate_file": "/a.pem", "client_key_file": WHOLE}, False),
    (ELASTIC | {"client_certificate_file": WHOLE}, False),
    ({"name": "other", "type": "artifact", "artifact_store": WHOLE}, False),
    ({"name": "other", "type": "component", "component": WHOLE}, False),
]


def place_of(settings: dict[str, Any]) -> str:
    """Return the field with the reference to the vault."""
    return next(name for name, value in settings.items() if "vault" in str(value))


PARAMETERS = [
    pytest.param(settings, meant, id=f"{settings['type']} {place_of(settings)} {number}")
    for number, (settings, meant) in enumerate(PLACES)
]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the secrets that a pipeline's process asks ZenML for."""
    names: list[str] = []

    class Answer:
        secret_values: ClassVar = {"key": VALUE, "api_key": "k1", "application_key": "k2"}

    def get(_: Any, name: str) -> Answer:
        names.append(name)
        return Answer()

    monkeypatch.setattr(Client, "get_secret_by_name_and_private_status", get)
    monkeypatch.setattr(Client, "__init__", lambda *_: None)
    monkeypatch.setattr(Client, "_global_client", None)
    return names


@pytest.fixture(params=[False, True], ids=["client", "server"])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param:
        monkeypatch.setenv(ENV_ZENML_SERVER, "true")


def load(settings: dict[str, Any]) -> CompositeLogStoreConfig:
    return CompositeLogStoreConfig(primary="archive", children=[ARCHIVE, settings])


def test_each_text_of_each_backend_is_in_the_table() -> None:
    from composite_logstore.child_types import backends

    own = ChildConfig.model_fields.keys()
    for kind, entry_point in backends().items():
        if not entry_point.value.startswith("composite_logstore_") or kind == "lines":
            continue
        config_class = entry_point.load()
        texts = {
            name
            for name, field in config_class.model_fields.items()
            if name not in own and any(word in str(field.annotation) for word in ("str", "Secret", "Json"))
        }
        # What has a list of words to choose from takes no others.
        texts -= {"protocol", "compression"}
        assert texts == {place_of(settings) for settings, _ in PLACES if settings["type"] == kind}, kind


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize(("settings", "meant"), PARAMETERS)
def test_a_reference_outside_of_what_is_meant_for_secrets_is_refused_at_registration(
    settings: dict[str, Any], meant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load(settings)
    monkeypatch.setattr(type(config.child("other")), "check_registration", lambda self: None)
    if meant:
        assert config.is_valid
        return
    with pytest.raises(ValueError, match=f"child 'other': '{place_of(settings)}") as raised:
        _ = config.is_valid
    assert "vault" not in str(raised.value)


@pytest.mark.parametrize(("settings", "meant"), PARAMETERS)
def test_it_is_resolved_where_it_is_meant_and_nowhere_else(
    settings: dict[str, Any], meant: bool, asked: list[str]
) -> None:
    """A log store that was registered before loads all the same, so that its other children can be used."""
    child = load(settings).child("other")
    if meant:
        resolved = secret_references.resolve(child)
        assert not list(secret_references.references(resolved))
        values = str({name: revealed(value) for name, value in resolved.model_dump().items()})
        assert VALUE in values
        assert "vault" not in values
        return
    with pytest.raises(UnavailableError, match=f"^'{place_of(settings)}") as raised:
        secret_references.resolve(child)
    assert "vault" not in str(raised.value)
    assert asked == []


def revealed(value: Any) -> Any:
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    if isinstance(value, dict):
        return {name: revealed(item) for name, item in value.items()}
    return value


@pytest.mark.parametrize(("settings", "meant"), PARAMETERS)
def test_zenml_is_told_of_every_secret(settings: dict[str, Any], meant: bool) -> None:
    assert SecretReference("vault", "key") in load(settings).required_secrets


def test_a_handler_refuses_it_at_once() -> None:
    with pytest.raises(ValueError, match="child 'other': 'endpoint'"):
        CompositeHandler("program", [OTLP | {"endpoint": "https://{{vault.key}}"}])


def test_settings_whose_backend_is_not_installed_are_left_alone(asked: list[str]) -> None:
    child = load({"name": "other", "type": "nowhere", "token": WHOLE, "url": WHOLE}).child("other")
    assert isinstance(child, UnknownChild)
    secret_references.check(child)
    assert secret_references.resolve(child) == child
    assert asked == []


def test_what_a_secret_says_is_not_taken_for_a_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"outer": SimpleNamespace(secret_values={"key": WHOLE})}
    monkeypatch.setattr(Client, "get_secret_by_name_and_private_status", lambda _, name: values[name])
    monkeypatch.setattr(Client, "__init__", lambda *_: None)
    monkeypatch.setattr(Client, "_global_client", None)
    child: Any = load(OTLP | {"headers": {"authorization": "{{outer.key}}"}}).child("other")
    assert secret_references.resolve(child).headers["authorization"].get_secret_value() == WHOLE


# A backend of somebody else's


class Login(BaseModel):
    user: str
    password: Secret


class TheirConfig(ChildConfig):
    """The ways in which a backend says that a setting is meant for secrets."""

    host: str = "here"
    token: Secret | None = None
    tokens: dict[str, list[Secret]] = Field(default_factory=dict)
    login: Login | None = None
    plain_token: str = SecretField(default="")
    options: dict[str, Any] = SecretField(default_factory=dict)


@pytest.mark.usefixtures("asked")
@pytest.mark.parametrize(
    ("settings", "meant"),
    [
        ({"host": WHOLE}, False),
        ({"token": PART}, True),
        ({"tokens": {"a": ["x", WHOLE]}}, True),
        ({"login": {"user": "u", "password": WHOLE}}, True),
        ({"login": {"user": WHOLE, "password": "p"}}, False),
        ({"plain_token": PART}, True),
        ({"options": {"a": [{"b": WHOLE}]}}, True),
    ],
)
def test_a_backend_declares_what_is_meant_for_secrets(settings: dict[str, Any], meant: bool) -> None:
    child = TheirConfig(name="theirs", type="theirs", **settings)
    if meant:
        secret_references.check(child)
        assert not list(secret_references.references(secret_references.resolve(child)))
    else:
        with pytest.raises(ValueError, match="only in 'token', 'tokens', 'plain_token', 'options'"):
            secret_references.check(child)
        with pytest.raises(UnavailableError):
            secret_references.resolve(child)


# Names with a typo


@pytest.fixture
def vault(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ZenML with the secrets `datadog` and `vault`."""
    secrets = {"datadog": {"api_key": VALUE, "application_key": VALUE}, "vault": {"key": VALUE}}

    def find(_: Client, name: str) -> Any:
        return SimpleNamespace(secret_values=secrets[name])

    monkeypatch.setattr(Client, "get_secret_by_name_and_private_status", find)
    listed = SimpleNamespace(items=[SimpleNamespace(name=name) for name in secrets])
    monkeypatch.setattr(Client, "list_secrets", lambda *_, **__: listed)
    monkeypatch.setattr(GlobalConfiguration, "is_initialized", property(lambda _: True))


@pytest.mark.usefixtures("vault")
@pytest.mark.parametrize(
    ("reference", "said"),
    [
        (
            "{{datadgo.api_key}}",
            "secret 'datadgo' does not exist, or you may not read it (did you mean 'datadog'?); correct",
        ),
        ("{{datadog.apikey}}", "secret 'datadog' has no key 'apikey' (did you mean 'api_key'?); correct it"),
        ("{{zzz.api_key}}", "secret 'zzz' does not exist, or you may not read it; create it"),
        ("{{datadog.zzz}}", "secret 'datadog' has no key 'zzz'; add it"),
    ],
)
def test_a_typo_in_a_reference_names_the_nearest(reference: str, said: str) -> None:
    config = CompositeLogStoreConfig(primary="archive", children=[ARCHIVE, {**LIVE, "api_key": reference}])
    with pytest.raises(UnavailableError) as refused:
        secret_references.resolve(config.child("live"))
    assert said in str(refused.value)
    assert VALUE not in str(refused.value)


@pytest.mark.usefixtures("vault")
def test_without_permission_to_list_secrets_there_is_no_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise IllegalOperationError("no")

    monkeypatch.setattr(Client, "list_secrets", refuse)
    config = CompositeLogStoreConfig(primary="archive", children=[ARCHIVE, {**LIVE, "api_key": "{{datadgo.api_key}}"}])
    with pytest.raises(UnavailableError, match="'datadgo' does not exist, or you may not read it; create it"):
        secret_references.resolve(config.child("live"))


@pytest.mark.usefixtures("vault")
def test_on_the_server_no_key_of_the_owner_s_secret_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENV_ZENML_SERVER, "1")
    found = SimpleNamespace(secret_values={"api_key": VALUE})
    monkeypatch.setattr(server, "find_secret", lambda name, owner: found)
    config = CompositeLogStoreConfig(primary="archive", children=[ARCHIVE, {**LIVE, "api_key": "{{datadog.apikey}}"}])
    with pytest.raises(UnavailableError, match="secret 'datadog' has no key 'apikey'; add it"):
        secret_references.resolve(config.child("live"))
