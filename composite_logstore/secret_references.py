"""References to ZenML secrets inside a child's settings: `{{secret.key}}`, alone or as part of a value.

ZenML resolves a reference only if it is the whole value of a top-level field. This module resolves references anywhere
in the fields that are meant for secrets, and in no other field: others can see, for example, the host of a URL.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeVar, get_args
from uuid import UUID

from pydantic import BaseModel, SecretStr, ValidationError
from zenml.utils.secret_utils import SecretReference, is_secret_field, is_secret_reference, parse_secret_reference

from composite_logstore import server
from composite_logstore.backend import UnavailableError, revealed, texts_in
from composite_logstore.names import did_you_mean
from composite_logstore.reader_config import ReaderConfig, reader_class

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo
    from zenml.models import ComponentResponse

Config = TypeVar("Config", bound=BaseModel)

_MASK = "***"
# The user name and password of a URL, and the values of its query.
_IN_A_URL = re.compile(r"(://)[^/?#\s]*(?=@)|([?&][^=&#\s]*=)[^&#\s]+")

_MOST_SECRETS = 1_000
_REFERENCE = re.compile(r"\{\{\s*([^\s{}.]+)\.([^\s{}]+)\s*\}\}")


def has_reference(value: str | SecretStr) -> bool:
    """Return whether the value contains a reference, so that it can be checked only when it is used."""
    return bool(_REFERENCE.search(revealed(value)))


def hides_in_a_url(text: str) -> bool:
    """Return whether the text is a URL with a user, a password or a query, which people must not see."""
    return bool(_IN_A_URL.search(text))


def references(config: BaseModel) -> Iterator[SecretReference]:
    """Yield the references in a child's settings."""
    for _, value in texts_in(config.model_dump()):
        for match in _REFERENCE.finditer(revealed(value)):
            yield SecretReference(match[1], match[2])


def clear_text_fields(config: BaseModel) -> Iterator[str]:
    """Yield the fields for secrets that contain clear text instead of a reference."""
    for place, value in texts_in(config.model_dump()):
        if isinstance(value, SecretStr) and not has_reference(value):
            yield place


def masked(config_class: type[BaseModel], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings as people may see them. In fields for secrets, and in unknown fields, only references stay.

    Args:
        config_class: The class of the settings.
        settings: The settings as they are written down, valid or not.
    """
    fields = config_class.model_fields

    def hide(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: hide(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [hide(item) for item in value]
        if value is None or isinstance(value, bool):
            return value
        text = revealed(value) if isinstance(value, str | SecretStr) else str(value)
        ends = [end for match in _REFERENCE.finditer(text) for end in match.span()]
        parts = [text[begin:end] for begin, end in pairwise((0, *ends, len(text)))]
        # The references are at the odd places.
        return "".join(part if place % 2 else _MASK for place, part in enumerate(parts) if part.strip())

    def show(name: str, value: Any) -> Any:
        if name not in fields or is_meant(fields[name]):
            return hide(value)
        if (section := _section_class(fields[name], value)) is not None:
            return masked(section, value)
        return _map_texts(value, lambda text: _IN_A_URL.sub(rf"\1\2{_MASK}", revealed(text)))

    return {name: show(name, value) for name, value in settings.items()}


def check(config: BaseModel) -> None:
    """Check that every reference is in a field that is meant for secrets.

    Such a field is of the type `Secret`, also within lists and mappings, or is made with ZenML's `SecretField`. Fields
    of a backend that is not installed here are not checked.

    Raises:
        ValueError: A reference is in another field.
    """
    for place, value in texts_in(config.model_dump()):
        field = _field_at(config, place)
        if field is None or isinstance(value, SecretStr) or is_secret_field(field) or not has_reference(value):
            continue
        meant = [f"'{name}'" for name in _meant_fields(config)]
        where = f"only in {', '.join(meant)}" if meant else "in no field of this type"
        raise ValueError(f"'{place}': a reference to a secret is resolved {where}; write the value itself")


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
    if next(references(config), None) is None:
        return config
    try:
        check(config)
    except ValueError as error:
        raise UnavailableError(str(error)) from None

    def replace(value: str | SecretStr) -> Any:
        resolved = _REFERENCE.sub(lambda match: _look_up(match[1], match[2], owner), revealed(value))
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
    values = dict(model.configuration)
    for field, value in values.items():
        if is_secret_reference(value):
            reference = parse_secret_reference(value)
            values[field] = _look_up(reference.name, reference.key, model.user_id)
    # This setting of ZenML's names a whole secret.
    name = values.get("authentication_secret")
    if isinstance(name, str) and name:
        _values_of(name, model.user_id)


def _look_up(name: str, key: str, owner: UUID | None) -> str:
    values = _values_of(name, owner)
    if key not in values:
        # On the server the reader may not know the owner's secret.
        hint = "" if server.is_server() else did_you_mean(key, values)
        raise UnavailableError(f"secret '{name}' has no key '{key}'{hint}; {'correct' if hint else 'add'} it")
    return str(values[key])


def _values_of(name: str, owner: UUID | None) -> Mapping[str, str]:
    from zenml.client import Client

    try:
        if server.is_server():
            return server.find_secret(name, owner).secret_values
        return Client().get_secret_by_name_and_private_status(name=name).secret_values
    except (KeyError, NotImplementedError):
        if server.is_server():
            barred, fix = "it is private and not the log store owner's", "create it"
        else:
            hint = _nearest_secret(name)
            barred, fix = f"you may not read it{hint}", "correct the name" if hint else "create it"
        raise UnavailableError(f"secret '{name}' does not exist, or {barred}; {fix}") from None


def _nearest_secret(name: str) -> str:
    """Return the secret that was probably meant, as a hint; empty if there is none, or it cannot be found out."""
    from zenml.client import Client
    from zenml.config.global_config import GlobalConfiguration

    # ZenML has just been asked for the secret: without its store, something else has answered.
    if not GlobalConfiguration().is_initialized:
        return ""
    try:
        known = [secret.name for secret in Client().list_secrets(size=_MOST_SECRETS).items]
    except Exception:
        return ""
    return did_you_mean(name, known)


def is_meant(field: FieldInfo) -> bool:
    """Return whether a field is meant for secrets."""

    def has_secrets(annotation: object) -> bool:
        return annotation is SecretStr or any(map(has_secrets, get_args(annotation)))

    return is_secret_field(field) or has_secrets(field.annotation)


def _section_class(field: FieldInfo, value: Any) -> type[BaseModel] | None:
    """Return the class of a section with settings of its own, such as `read`; None if the value is no such section."""

    def is_section(annotation: object) -> bool:
        return annotation is ReaderConfig or any(map(is_section, get_args(annotation)))

    return reader_class(value) if isinstance(value, Mapping) and is_section(field.annotation) else None


def _field_at(config: BaseModel, place: str) -> FieldInfo | None:
    """Return the field that a place in settings, such as `read.password`, belongs to; None if it is not known."""
    name, _, rest = place.partition(".")
    section = getattr(config, name, None)
    if rest and isinstance(section, ReaderConfig):
        return _field_at(section, rest)
    return type(config).model_fields.get(name)


def _meant_fields(config: BaseModel, prefix: str = "") -> Iterator[str]:
    """Yield the names of the fields that are meant for secrets, also those of sections."""
    for name, field in type(config).model_fields.items():
        if is_meant(field):
            yield prefix + name
        elif isinstance(section := getattr(config, name, None), ReaderConfig):
            yield from _meant_fields(section, f"{prefix}{name}.")


def _map_texts(value: Any, replace: Callable[[str | SecretStr], Any]) -> Any:
    if isinstance(value, str | SecretStr):
        return replace(value)
    if isinstance(value, Mapping):
        return {key: _map_texts(item, replace) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_map_texts(item, replace) for item in value]
    return value
