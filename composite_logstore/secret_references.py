"""References to ZenML secrets inside a child's settings: `{{secret.key}}`, alone or as part of a value.

ZenML resolves a reference only if it is the whole value of a top-level field. This module resolves references anywhere
in the fields that are meant for secrets, and in no other field: others can see, for example, the host of a URL.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, get_args
from uuid import UUID

from pydantic import BaseModel, SecretStr, ValidationError
from zenml.utils.secret_utils import SecretReference, is_secret_field, is_secret_reference, parse_secret_reference

from composite_logstore import server
from composite_logstore.backend import UnavailableError

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo
    from zenml.models import ComponentResponse

Config = TypeVar("Config", bound=BaseModel)

_REFERENCE = re.compile(r"\{\{\s*([^\s{}.]+)\.([^\s{}]+)\s*\}\}")


def has_reference(value: str | SecretStr) -> bool:
    """Return whether the value contains a reference, so that it can be checked only when it is used."""
    return bool(_REFERENCE.search(_revealed(value)))


def references(config: BaseModel) -> Iterator[SecretReference]:
    """Yield the references in a child's settings."""
    for text in _texts(config):
        for match in _REFERENCE.finditer(_revealed(text.value)):
            yield SecretReference(match[1], match[2])


def clear_text_fields(config: BaseModel) -> Iterator[str]:
    """Yield the fields for secrets that contain clear text instead of a reference."""
    for text in _texts(config):
        if isinstance(text.value, SecretStr) and not has_reference(text.value):
            yield text.place


def check(config: BaseModel) -> None:
    """Check that every reference is in a field that is meant for secrets.

    Such a field is of the type `Secret`, also within lists and mappings, or is made with ZenML's `SecretField`. Fields
    of a backend that is not installed here are not checked.

    Raises:
        ValueError: A reference is in another field.
    """
    fields = type(config).model_fields
    for text in _texts(config):
        if has_reference(text.value) and not text.is_meant and text.place.partition(".")[0] in fields:
            meant = [f"'{name}'" for name, field in fields.items() if _is_meant(field)]
            where = f"only in {', '.join(meant)}" if meant else "in no field of this type"
            raise ValueError(f"'{text.place}': a reference to a secret is resolved {where}; write the value itself")


def resolve(config: Config, owner: UUID | None = None) -> Config:
    """Return the settings with every reference replaced by the value of the secret.

    A pipeline's process gets the secrets that ZenML shows to the user who runs it. ZenML's server gets those that the
    owner of the settings may use, whichever user reads.

    Args:
        config: The settings.
        owner: The user who owns the log store with these settings.

    Raises:
        UnavailableError: A secret or its key does not exist or may not be read, or a reference is in a field that is
            not meant for secrets.
    """
    if not any(True for _ in references(config)):
        return config
    try:
        check(config)
    except ValueError as error:
        raise UnavailableError(str(error)) from None

    def replace(value: str | SecretStr) -> Any:
        resolved = _REFERENCE.sub(lambda match: _look_up(match[1], match[2], owner), _revealed(value))
        return SecretStr(resolved) if isinstance(value, SecretStr) else resolved

    fields = type(config).model_fields
    values = config.model_dump(exclude_unset=True)
    values = {name: _map_texts(value, replace) if name in fields else value for name, value in values.items()}
    try:
        return type(config)(**values)
    except ValidationError as error:
        names = ", ".join(sorted({".".join(str(part) for part in detail["loc"]) for detail in error.errors()}))
        raise UnavailableError(f"the value of a secret is not valid for '{names}'; correct the secret") from None


def check_component(model: ComponentResponse) -> None:
    """Check the secrets in the settings of a component before ZenML loads it on its server.

    ZenML itself reads them as the user who asks for a page. An owner who writes the name of that user's private secret
    would get its value.

    Raises:
        UnavailableError: The component's owner may not use one of them.
    """
    if not server.is_server():
        return
    for value in model.configuration.values():
        if is_secret_reference(value):
            reference = parse_secret_reference(value)
            _look_up(reference.name, reference.key, model.user_id)
    # This setting of ZenML's names a whole secret. Its value may be a reference, too.
    name = model.configuration.get("authentication_secret")
    if isinstance(name, str) and name:
        if is_secret_reference(name):
            reference = parse_secret_reference(name)
            name = _look_up(reference.name, reference.key, model.user_id)
        _values_of(name, model.user_id)


def _look_up(name: str, key: str, owner: UUID | None) -> str:
    values = _values_of(name, owner)
    if key not in values:
        raise UnavailableError(f"secret '{name}' has no key '{key}'; add it")
    return str(values[key])


def _values_of(name: str, owner: UUID | None) -> Mapping[str, str]:
    from zenml.client import Client

    try:
        if server.is_server():
            return server.find_secret(name, owner).secret_values
        return Client().get_secret_by_name_and_private_status(name=name).secret_values
    except (KeyError, NotImplementedError):
        on_server = "it is private and not the log store owner's"
        barred = on_server if server.is_server() else "you may not read it"
        raise UnavailableError(f"secret '{name}' does not exist, or {barred}; create it") from None


def _revealed(value: str | SecretStr) -> str:
    return value.get_secret_value() if isinstance(value, SecretStr) else value


def _is_meant(field: FieldInfo) -> bool:
    def has_secrets(annotation: object) -> bool:
        return annotation is SecretStr or any(map(has_secrets, get_args(annotation)))

    return is_secret_field(field) or has_secrets(field.annotation)


class _Text(NamedTuple):
    """A text in the settings, its place there, and whether that is in a field for secrets."""

    place: str
    value: str | SecretStr
    is_meant: bool


def _texts(config: BaseModel) -> Iterator[_Text]:
    """Yield all texts in the settings."""

    def walk(place: str, value: Any, is_meant: bool) -> Iterator[_Text]:
        if isinstance(value, str | SecretStr):
            yield _Text(place, value, is_meant or isinstance(value, SecretStr))
        elif isinstance(value, Mapping):
            for key, item in value.items():
                yield from walk(f"{place}.{key}", item, is_meant)
        elif isinstance(value, list | tuple):
            for number, item in enumerate(value):
                yield from walk(f"{place}.{number}", item, is_meant)

    fields = type(config).model_fields
    for name, value in config.model_dump().items():
        yield from walk(name, value, name in fields and is_secret_field(fields[name]))


def _map_texts(value: Any, replace: Callable[[str | SecretStr], Any]) -> Any:
    if isinstance(value, str | SecretStr):
        return replace(value)
    if isinstance(value, Mapping):
        return {key: _map_texts(item, replace) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_map_texts(item, replace) for item in value]
    return value
