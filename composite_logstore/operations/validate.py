"""Validates the settings of a log store before they are registered, without asking ZenML or a backend."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from composite_logstore import secret_references
from composite_logstore.catalog.differences import Difference, differences
from composite_logstore.catalog.stores import find_store
from composite_logstore.child_config import ChildConfig
from composite_logstore.child_types import parse_child
from composite_logstore.config import CompositeLogStoreConfig, HandlerConfig
from composite_logstore.mistakes import mistakes_in
from composite_logstore.names import did_you_mean


@dataclass
class Validation:
    """The result of validating settings.

    Attributes:
        children: The names of the children whose settings can be read.
        mistakes: The mistakes that registration would refuse, each with its fix and without a full stop.
        warnings: What registration would warn of.
        unchecked: What only registration finds out, since it asks ZenML.
        differences: The differences from the registered log store, if there is one to compare with.
    """

    children: list[str] = field(default_factory=list)
    mistakes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)

    @property
    def is_valid(self) -> bool:
        """Whether there are no mistakes."""
        return not self.mistakes

    @property
    def dropped(self) -> list[Difference]:
        """The settings that an update with this list would take away from children that remain."""
        return [one for one in self.differences if one.after is None and one.child in self.children]


def validate(settings: Any, store: str | None = None) -> Validation:
    """Validate the children of a log store, or all of its settings, and find every mistake of every child.

    Asks neither ZenML nor a backend, unless `store` is given. Files that children name must be on this machine.

    Examples:
        >>> validate([{"name": "archive", "type": "artefact"}]).mistakes[0].partition(";")[0]
        "child 'archive': 'type': there is no backend 'artefact' here (did you mean 'artifact'?)"

    Args:
        settings: A list of children, or an object with `children`, `primary` and other settings.
        store: The name or id of a registered log store to compare the children with.

    Raises:
        ArgumentError: There is no such log store.
        NoAnswerError: ZenML cannot be reached.
    """
    result = Validation()
    if isinstance(settings, Mapping):
        # Editors find the schema by this key.
        whole = {key: value for key, value in settings.items() if key != "$schema"}
        for key in whole:
            if key not in CompositeLogStoreConfig.model_fields:
                known = list(CompositeLogStoreConfig.model_fields)
                hint = did_you_mean(str(key), known)
                result.mistakes.append(f"unknown key '{key}'{hint}; the keys are: {', '.join(known)}")
    else:
        whole = {"children": settings}
    raw = whole.get("children")
    children = _children(raw, result) if isinstance(raw, list) and raw else []
    if not isinstance(raw, list) or len(children) == len(raw):
        config_class = CompositeLogStoreConfig if isinstance(settings, Mapping) else _class_for(children, whole, result)
        try:
            config = config_class(**{**whole, "children": children or raw})
        except ValidationError as error:
            result.mistakes += mistakes_in(config_class, error)
        else:
            if twice := config.doubled(None):
                result.mistakes.append(twice)
            result.warnings += config.warnings
    if store is not None:
        before = find_store(store).raw_children
        if isinstance(raw, list):
            valid = {child.name: child.as_registered() for child in children}
            after = [valid.get(str(one.get("name")), one) for one in raw if isinstance(one, Mapping)]
            result.differences = differences(before, after)
    return result


def _class_for(children: list[ChildConfig], whole: dict[str, Any], result: Validation) -> type[CompositeLogStoreConfig]:
    """Name a primary in place of a list that names none, and return the class of its settings."""
    readable = [child.name for child in children if child.enabled and not child.unreadable]
    if children and not readable:
        result.warnings.append("no child can be read, so none can be the primary; only `CompositeHandler` takes these")
        return HandlerConfig
    whole["primary"] = readable[0] if readable else ""
    return CompositeLogStoreConfig


def _children(raw: list[Any], result: Validation) -> list[ChildConfig]:
    children = []
    for number, one in enumerate(raw, start=1):
        try:
            child = parse_child(number, one)
        except ValueError as error:
            result.mistakes.append(str(error))
            continue
        children.append(child)
        result.children.append(child.name)
        label = f"child '{child.name}'"
        try:
            secret_references.check(child)
            if child.asks_zenml:
                result.unchecked.append(f"{label}: whether what it names in ZenML exists")
            else:
                child.check_registration()
        except ValueError as error:
            result.mistakes.append(f"{label}: {error}")
        result.warnings += [
            f"{label}: '{place}' is written in clear text, which ZenML stores and shows as it is; put it into a ZenML "
            "secret, and refer to the secret"
            for place in secret_references.clear_text_fields(child)
        ]
    return children
