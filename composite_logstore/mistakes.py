"""Mistakes in settings: what all settings refuse, and words that name the field and the fix."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator
from zenml.enums import LoggingLevels

from composite_logstore.names import did_you_mean

LEVELS = ("DEBUG", "INFO", "WARN", "ERROR", "CRITICAL")
"""The names of levels that settings may have."""


_LEVEL_FIELDS = ("min_level", "level", "below")


def refuse_boolean(cls: type[BaseModel], value: Any, info: ValidationInfo) -> Any:
    """Validate any field before its type does: Python takes `true` for the number 1, which nobody means.

    Raises:
        ValueError: The value is `true` or `false`, and the field takes numbers.
    """
    if isinstance(value, bool):
        types = set(_types_in(cls.model_fields[str(info.field_name)].annotation))
        if bool not in types and types & {int, float, LoggingLevels}:
            raise ValueError(f"must be a number, and not {str(value).lower()}")
    return value


def _types_in(annotation: Any) -> Iterator[Any]:
    yield annotation
    for part in get_args(annotation):
        yield from _types_in(part)


class Section(BaseModel):
    """Settings that refuse keys which they do not know, and `true` or `false` for a number."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    _refuse_boolean = field_validator("*", mode="before")(refuse_boolean)


def mistakes_in(config_class: type[BaseModel], error: ValidationError) -> Iterator[str]:
    """Yield each mistake in words that name the field and the fix. Repeats no value, which may be a secret."""
    for detail in error.errors(include_url=False, include_input=False, include_context=False):
        field = ".".join(str(part) for part in detail["loc"])
        if detail["type"] == "extra_forbidden":
            *section, key = detail["loc"]
            known = list(_section(config_class, section).model_fields)
            whose = f"of '{'.'.join(map(str, section))}'" if section else "of this type"
            yield f"unknown key '{field}'{did_you_mean(str(key), known)}; the keys {whose} are: {', '.join(known)}"
        elif detail["type"] == "missing":
            yield f"'{field}' is required; set it"
        elif detail["loc"][-1:] and detail["loc"][-1] in _LEVEL_FIELDS:
            yield f"'{field}' is not a log level; set one of {', '.join(LEVELS)}, or its number"
        elif detail["type"] == "value_error":
            message = detail["msg"].removeprefix("Value error, ")
            if field and f"'{field}'" not in message and f"'{field}." not in message:
                message = f"'{field}' {message}" if message.startswith(("is ", "must ")) else f"'{field}': {message}"
            yield message
        elif field == "name":
            yield "'name' may only have the characters a-z 0-9 - _; choose another"
        else:
            yield f"'{field}': {detail['msg'][:1].lower()}{detail['msg'][1:]}"


def _section(config_class: type[BaseModel], path: Iterable[int | str]) -> type[BaseModel]:
    """Return the settings that a section of other settings has."""
    for part in path:
        field = config_class.model_fields.get(str(part))
        for section in () if field is None else sections_in(field.annotation):
            config_class = section
    return config_class


def sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield the classes of settings that a type is made of."""
    parts = get_args(annotation)
    # On Python 3.10 `list[Matcher]` says that it is a class.
    if not parts and isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in parts:
        yield from sections_in(part)


def unknown_type(field: str, kind: str, name: str, installed: Iterable[str]) -> str:
    """Return why settings with this `type` cannot be used, and the fix.

    Args:
        field: The field with the type.
        kind: What it is the type of: `backend` or `reader`.
        name: The type.
        installed: The types that are installed here.
    """
    known = sorted(installed)
    if name in known:
        return f"'{field}': {kind} '{name}' is installed but cannot be imported; reinstall the package that has it"
    return (
        f"'{field}': there is no {kind} '{name}' here{did_you_mean(name, known)}; set one of: {', '.join(known)}, or "
        f"install the package that has it"
    )
