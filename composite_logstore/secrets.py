"""References to ZenML secrets inside a child's settings: `{{secret.key}}`, alone or as part of a value.

ZenML resolves a reference only where it is the whole value of a top-level field.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, SecretStr, ValidationError
from zenml.utils.secret_utils import SecretReference

from composite_logstore.backend import UnavailableError

if TYPE_CHECKING:
    from composite_logstore.config import ChildConfig

Config = TypeVar("Config", bound="ChildConfig")

_REFERENCE = re.compile(r"\{\{\s*([^\s{}.]+)\.([^\s{}]+)\s*\}\}")


def has_reference(value: str | SecretStr) -> bool:
    """Return whether the value holds a reference, so that it cannot be checked before it is used."""
    return bool(_REFERENCE.search(_revealed(value)))


def references(config: BaseModel) -> Iterator[SecretReference]:
    """Yield the references in a child's settings."""
    for _, value in _texts(config):
        for match in _REFERENCE.finditer(_revealed(value)):
            yield SecretReference(match[1], match[2])


def clear_text_fields(config: BaseModel) -> Iterator[str]:
    """Yield the fields meant for secrets whose values are written in clear text."""
    for field, value in _texts(config):
        if isinstance(value, SecretStr) and not has_reference(value):
            yield field


def resolve(config: Config) -> Config:
    """Return the settings with every reference replaced by what it refers to.

    Raises:
        UnavailableError: A secret or its key does not exist, or may not be read.
    """
    if not any(True for _ in references(config)):
        return config

    def replace(value: str | SecretStr) -> Any:
        resolved = _REFERENCE.sub(lambda match: _look_up(match[1], match[2]), _revealed(value))
        return SecretStr(resolved) if isinstance(value, SecretStr) else resolved

    values = config.model_dump(exclude_unset=True)
    try:
        return type(config)(**_map_texts(values, replace))
    except ValidationError as error:
        fields = ", ".join(sorted({".".join(str(part) for part in detail["loc"]) for detail in error.errors()}))
        raise UnavailableError(f"what a secret holds does not fit '{fields}'; correct the secret") from None


def _look_up(name: str, key: str) -> str:
    from zenml.client import Client

    try:
        values = Client().get_secret_by_name_and_private_status(name=name).secret_values
    except (KeyError, NotImplementedError):
        raise UnavailableError(f"secret '{name}' does not exist, or may not be read here; create it") from None
    if key not in values:
        raise UnavailableError(f"secret '{name}' has no key '{key}'; add it")
    return str(values[key])


def _revealed(value: str | SecretStr) -> str:
    return value.get_secret_value() if isinstance(value, SecretStr) else value


def _texts(config: BaseModel) -> Iterator[tuple[str, str | SecretStr]]:
    """Yield each text in the settings with its place."""

    def walk(place: str, value: Any) -> Iterator[tuple[str, str | SecretStr]]:
        if isinstance(value, str | SecretStr):
            yield place, value
        elif isinstance(value, Mapping):
            for key, item in value.items():
                yield from walk(f"{place}.{key}" if place else str(key), item)
        elif isinstance(value, list | tuple):
            for number, item in enumerate(value):
                yield from walk(f"{place}.{number}", item)

    yield from walk("", config.model_dump())


def _map_texts(value: Any, replace: Callable[[str | SecretStr], Any]) -> Any:
    if isinstance(value, str | SecretStr):
        return replace(value)
    if isinstance(value, Mapping):
        return {key: _map_texts(item, replace) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_map_texts(item, replace) for item in value]
    return value
