"""Lists the children of a log store, and changes one of them in ZenML."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from composite_logstore.catalog.differences import Difference, differences, shown
from composite_logstore.catalog.errors import ArgumentError, OperationError, nearest
from composite_logstore.catalog.stores import RegisteredStore, explain, find_store
from composite_logstore.config import CompositeLogStoreConfig


@dataclass(frozen=True)
class ListedChild:
    """A child as it is registered.

    Attributes:
        name: The child's name.
        type: The backend's type.
        role: Whether logs are read from it: it is the `primary`, or a `fallback`; or it is `disabled`.
        settings: Its other settings: a name → the value as JSON. Secrets are masked; references to them are not.
    """

    name: str
    type: str
    role: Literal["primary", "fallback", "disabled", ""]
    settings: dict[str, str]


@dataclass(frozen=True)
class ChildChange:
    """The change of one child.

    Attributes:
        store: The log store, as it was.
        child: The child's name.
        differences: The settings that change.
        dropped: The names of settings that the child loses without having been named.
        is_done: Whether ZenML has the new settings; otherwise they were only tried.
    """

    store: RegisteredStore
    child: str
    differences: list[Difference]
    dropped: list[str]
    is_done: bool


ConfirmChange = Callable[[ChildChange], bool]
"""Is shown a change, and answers whether to make it."""


class ChangeRefusedError(OperationError):
    """The log store needs the child, it has changed meanwhile, or the answer was no. Nothing has changed."""


def list_children(store: str) -> list[ListedChild]:
    """Return the children of a log store, in the order in which they are registered.

    Examples:
        >>> [(child.name, child.role) for child in list_children("production")]
        [('archive', 'primary'), ('live', '')]

    Args:
        store: The log store's name or id.

    Raises:
        ArgumentError: There is no such log store.
        NoAnswerError: ZenML cannot be reached.
    """
    found = find_store(store)
    listed = []
    for raw in found.raw_children:
        child = found.child(raw["name"])
        role: Literal["primary", "fallback", "disabled", ""] = ""
        if child.name == found.config.primary:
            role = "primary"
        elif child.name in found.config.fetch_fallback:
            role = "fallback"
        elif not child.enabled:
            role = "disabled"
        settings = {name: value for name, value in shown(raw).items() if name not in ("name", "type", "enabled")}
        listed.append(ListedChild(child.name, child.type, role, settings))
    return listed


def add_child(
    store: str, settings: Mapping[str, Any], *, dry_run: bool = False, confirm: ConfirmChange | None = None
) -> ChildChange:
    """Add a child to a log store. It gets the events of runs that begin afterwards.

    Examples:
        >>> screen = {"name": "screen", "type": "otel", "exporter": "console"}
        >>> change = add_child("production", screen, dry_run=True)
        >>> change.is_done, change.differences[-1].setting, change.differences[-1].after
        (False, 'exporter', '"console"')

    Args:
        store: The log store's name or id.
        settings: The child's settings, with its `name` and `type`.
        dry_run: Whether to check everything and change nothing.
        confirm: Is asked before anything changes.

    Raises:
        ArgumentError: There is no such log store, it has a child of that name, or the settings are wrong.
        ChangeRefusedError: The log store has changed meanwhile, or the answer was no.
        NoAnswerError: ZenML cannot be reached.
    """
    found = find_store(store)
    name = str(settings.get("name"))
    if any(child["name"] == name for child in found.raw_children):
        raise ArgumentError("settings", f"log store '{found.name}' has a child '{name}' already; give another name")
    return _change(found, name, [*found.raw_children, dict(settings)], {}, dry_run, confirm)


def set_child(
    store: str,
    child: str,
    settings: Mapping[str, Any] | None = None,
    *,
    unset: Collection[str] = (),
    whole: bool = False,
    dry_run: bool = False,
    confirm: ConfirmChange | None = None,
) -> ChildChange:
    """Change settings of a child. Runs that begin afterwards have them.

    Examples:
        >>> change = set_child("production", "live", {"min_level": "INFO"}, dry_run=True)
        >>> [(one.setting, one.before, one.after) for one in change.differences]
        [('min_level', None, '"INFO"')]

    Args:
        store: The log store's name or id.
        child: The child's name.
        settings: The settings to change.
        unset: The names of settings that get their defaults again.
        whole: Whether `settings` are all settings of the child: it loses the others.
        dry_run: Whether to check everything and change nothing.
        confirm: Is asked before anything changes.

    Raises:
        ArgumentError: There is no such log store or child, or the settings are wrong.
        ChangeRefusedError: The log store has changed meanwhile, or the answer was no.
        NoAnswerError: ZenML cannot be reached.
    """
    found = find_store(store)
    name = found.child(child).name
    before = next(one for one in found.raw_children if one["name"] == name)
    if settings and settings.get("name", name) != name:
        raise ArgumentError(
            "settings", f"a child keeps its name, by which its waiting events are known; leave '{name}' as its 'name'"
        )
    for one in unset:
        if one not in before:
            raise ArgumentError("unset", f"child '{name}' has no setting '{one}'{nearest(one, before)}")
    kept = {} if whole else {key: value for key, value in before.items() if key not in unset}
    after = {**kept, **(settings or {})}
    if whole:
        after = {"name": name, "type": before["type"], **after}
    children = [after if one["name"] == name else one for one in found.raw_children]
    return _change(found, name, children, {}, dry_run, confirm, [key for key in before if key not in {*after, *unset}])


def remove_child(store: str, child: str, *, dry_run: bool = False, confirm: ConfirmChange | None = None) -> ChildChange:
    """Remove a child from a log store. Its backend keeps the events that it has.

    Examples:
        >>> remove_child("production", "live", dry_run=True).is_done
        False

    Args:
        store: The log store's name or id.
        child: The child's name.
        dry_run: Whether to check everything and change nothing.
        confirm: Is asked before anything changes.

    Raises:
        ArgumentError: There is no such log store or child.
        ChangeRefusedError: The child is the primary, the log store has changed meanwhile, or the answer was no.
        NoAnswerError: ZenML cannot be reached.
    """
    found = find_store(store)
    name = found.child(child).name
    if name == found.config.primary:
        raise ChangeRefusedError(
            f"child '{name}' is the primary, from which logs are read; make another the primary first: "
            f"composite-logstore promote {found.name} CHILD"
        )
    fallback = found.config.fetch_fallback
    others = {"fetch_fallback": [one for one in fallback if one != name]} if name in fallback else {}
    children = [one for one in found.raw_children if one["name"] != name]
    return _change(found, name, children, others, dry_run, confirm)


def _change(
    found: RegisteredStore,
    child: str,
    children: list[dict[str, Any]],
    others: dict[str, Any],
    dry_run: bool,
    confirm: ConfirmChange | None,
    dropped: Collection[str] = (),
) -> ChildChange:
    before = found.raw_children
    changed = {**found.model.configuration, "children": children, **others}
    # ZenML checks it too, but after people were asked.
    if trouble := _trouble(changed):
        if trouble == _trouble(found.model.configuration):
            raise OperationError(
                f"ZenML refuses every update of log store '{found.name}', until this is mended: {trouble}"
            )
        raise ArgumentError("settings", trouble)
    config = CompositeLogStoreConfig(**changed)
    children = [one.as_registered() for one in config.children]
    settings = {"children": children, **others}
    differ = differences(before, children)
    for name, value in others.items():
        differ.append(Difference("", name, _text(getattr(found.config, name)), _text(value)))
    change = ChildChange(found, child, differ, sorted(dropped), False)
    if dry_run or not differ:
        return change
    if confirm and not confirm(change):
        raise ChangeRefusedError("The answer was no; nothing has changed.")
    # ZenML replaces the list as a whole, and so what others have changed in it.
    if find_store(str(found.id)).raw_children != before:
        raise ChangeRefusedError(f"log store '{found.name}' has changed meanwhile; run the same command again")
    found.update(settings)
    if find_store(str(found.id)).raw_children != children:
        raise OperationError(
            f"log store '{found.name}' does not have the children that it was given: it was changed at the same time; "
            f"`composite-logstore child list {found.name}` shows them"
        )
    return ChildChange(found, child, differ, change.dropped, True)


def _trouble(settings: dict[str, Any]) -> str:
    """Return why registration would refuse these settings, empty if it would not."""
    try:
        CompositeLogStoreConfig(**settings).check_registration(is_client=True)
    except ValueError as error:
        return explain(error)
    return ""


def _text(names: list[str]) -> str:
    return ", ".join(names) or "none"
