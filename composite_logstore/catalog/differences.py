"""The differences between two lists of children, as people may see them: without secrets."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from zenml.enums import LoggingLevels

from composite_logstore.child_config import ChildConfig
from composite_logstore.child_types import backends
from composite_logstore.secret_references import masked


@dataclass(frozen=True)
class Difference:
    """A setting that is different.

    Attributes:
        child: The child's name, empty for a setting of the log store itself.
        setting: The setting's name.
        before: Its value as JSON, None if it was not set. A secret is masked; a reference to one is not.
        after: The same afterwards.
    """

    child: str
    setting: str
    before: str | None
    after: str | None


def differences(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> list[Difference]:
    """Return the differences between two lists of children, by the children's names.

    Args:
        before: The children's settings as ZenML has them.
        after: The settings that are to replace them, valid or not.
    """
    old = {str(one.get("name")): one for one in before}
    new = {str(one.get("name")): one for one in after}
    return [one for name in {**old, **new} for one in _of_child(name, old.get(name, {}), new.get(name, {}))]


def masked_child(child: Mapping[str, Any]) -> dict[str, Any]:
    """Return a child's settings as people may see them: with secrets masked, and its level by name."""
    values = {**masked(_class_of(child), child)}
    with suppress(ValueError, KeyError):
        # ZenML stores the number.
        values["min_level"] = LoggingLevels(values["min_level"]).name
    return values


def shown(child: Mapping[str, Any]) -> dict[str, str]:
    """Return a child's settings as people may see them: each as JSON, with secrets masked."""
    values = masked_child(child)
    return {str(name): json.dumps(value, ensure_ascii=False) for name, value in values.items()}


def _of_child(name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[Difference]:
    was, becomes = shown(old), shown(new)
    for setting in {**old, **new}:
        if (setting in old) is not (setting in new) or old.get(setting) != new.get(setting):
            before, after = was.get(setting), becomes.get(setting)
            if before == after and after is not None:
                after = f"{after} (another value)"
            yield Difference(name, str(setting), before, after)


def _class_of(child: Mapping[str, Any]) -> type[ChildConfig]:
    """Return the class of a child's settings. Settings that only its missing backend knows count as secrets."""
    entry_point = backends().get(str(child.get("type")))
    try:
        found: type[ChildConfig] = entry_point.load() if entry_point else ChildConfig
    except ImportError:
        return ChildConfig
    return found
