"""Finds log stores that are registered in ZenML, and loads them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING
from uuid import UUID

from zenml.client import Client
from zenml.constants import ENV_ZENML_SERVER
from zenml.enums import StackComponentType

from composite_logstore import (
    ChildConfig,
    CompositeLogStoreConfig,
    UnavailableError,
    distributions_of,
    nested_in,
    open_log_store,
)
from composite_logstore_component.streams import extends_artifact

if TYPE_CHECKING:
    from zenml.artifact_stores import BaseArtifactStore
    from zenml.log_stores import BaseLogStore
    from zenml.models import ComponentResponse

TYPES = (StackComponentType.LOG_STORE, StackComponentType.ARTIFACT_STORE)
"""The types of component that can be a child, by precedence. An artifact store stands for ZenML's own log store in
it."""


FLAVOR = "composite"
TYPE = "component"


class ComponentError(Exception):
    """A component cannot be used. The message says why, and how to mend it."""


def find(name: str) -> ComponentResponse:
    """Return ZenML's model of the log store or artifact store with this name or ID.

    Raises:
        ComponentError: No such component exists.
        zenml.exceptions.IllegalOperationError: On ZenML's server, the user may not read the component.
    """
    try:
        if ENV_ZENML_SERVER not in os.environ:
            model = _find_by_name(name)
        else:
            # On the server, a user must not read through a component that the user may not read.
            from zenml.zen_server.rbac.endpoint_utils import verify_permissions_and_get_entity
            from zenml.zen_server.utils import zen_store

            id = _uuid(name) or _find_by_name(name).id
            model = verify_permissions_and_get_entity(id=id, get_method=zen_store().get_stack_component)
    except KeyError:
        raise ComponentError(_missing(name)) from None
    if model.type not in TYPES:
        raise ComponentError(_of_another_type(name, model.type))
    return model


def find_model(name: str) -> ComponentResponse:
    """Return ZenML's model of the component with this name or ID, after the checks of `find_all`.

    Raises:
        ComponentError: The component cannot be used.
    """
    return find_all(name)[0]


def find_all(name: str) -> list[ComponentResponse]:
    """Return the component with this name or ID, and all components that are nested in it, each once.

    Nested components that do not exist are left out: their children are unavailable, and report it themselves.

    Raises:
        ComponentError: The component does not exist, contains itself, or contains too many components or too deeply.
    """
    top = find(name)
    try:
        return nested_in(top, _below)
    except ValueError as error:
        raise ComponentError(str(error)) from None


def load(model: ComponentResponse) -> BaseLogStore:
    """Return the log store.

    Raises:
        ComponentError: Its flavor cannot be imported, or its settings cannot be used here.
    """
    try:
        return open_log_store(model)
    except UnavailableError as error:
        raise ComponentError(f"'{model.name}': {error}") from error
    except ImportError as error:
        raise ComponentError(
            f"'{model.name}' cannot be loaded here; install what its flavor '{model.flavor_name}' needs"
        ) from error
    except Exception as error:
        # The error's text is left out, since it may contain a key.
        raise ComponentError(
            f"'{model.name}' cannot be loaded here ({type(error).__name__}); check its settings with `zenml "
            f"{model.type.value.replace('_', '-')} describe {model.name}`"
        ) from error


def requirements_of(name: str) -> set[str]:
    """Return the packages that a remote step needs for the component, as far as they are installed here."""
    found: set[str] = set()
    try:
        for model in find_all(name):
            store = load(model)
            if isinstance(store.config, CompositeLogStoreConfig):
                found.update(*(child.requirements for child in _own_children(store.config)))
                continue
            module = type(store).__module__.partition(".")[0]
            if module not in ("zenml", "composite_logstore"):
                found.update(distributions_of(module))
            found.update((store._artifact_store if extends_artifact(store) else store).requirements)
    except ComponentError:
        pass
    return found


def places_of(name: str, artifact_store: BaseArtifactStore) -> dict[str, str]:
    """Return the artifact stores to which the component writes logs: a path or an ID → its name in an error.

    Args:
        name: The component's name or ID.
        artifact_store: The stack's artifact store.

    Raises:
        ComponentError: The component cannot be used.
    """
    places: dict[str, str] = {}
    for model in find_all(name):
        if model.type == StackComponentType.ARTIFACT_STORE:
            places[model.configuration.get("path") or str(model.id)] = f"artifact store '{model.name}'"
        elif model.flavor_name == FLAVOR:
            config = load(model).config
            if isinstance(config, CompositeLogStoreConfig):
                for child in _own_children(config):
                    places.update(child.places(artifact_store))
    return places


def _find_by_name(name: str) -> ComponentResponse:
    for kind in TYPES:
        try:
            return Client().get_stack_component(kind, name_id_or_prefix=name, allow_name_prefix_match=False)
        except KeyError:
            continue
    raise KeyError(name)


def _missing(name: str) -> str:
    """Return the message that no such log store exists, or that the name belongs to another component."""
    if ENV_ZENML_SERVER in os.environ:
        # The user may not be allowed to know of other components.
        return f"there is no log store '{name}'; name one that `zenml log-store list` shows, or register it"
    others = Client().list_stack_components(id=name) if _uuid(name) else Client().list_stack_components(name=name)
    if others.items:
        return _of_another_type(name, others.items[0].type)
    return f"there is no log store '{name}'; name one that `zenml log-store list` shows, or register it"


def _of_another_type(name: str, kind: StackComponentType) -> str:
    return f"'{name}' is of type {kind.value}; name a log store or an artifact store"


def _uuid(text: str) -> UUID | None:
    try:
        return UUID(text)
    except ValueError:
        return None


def _below(model: ComponentResponse) -> Iterator[ComponentResponse]:
    """Yield the components that are enabled children of a composite."""
    children = model.configuration.get("children") if model.flavor_name == FLAVOR else None
    for child in children if isinstance(children, list) else ():
        if isinstance(child, Mapping) and child.get("type") == TYPE and child.get("enabled", True):
            try:
                yield find(str(child.get("component")))
            except ComponentError:
                continue


def _own_children(config: CompositeLogStoreConfig) -> list[ChildConfig]:
    """Return the enabled children of other types than `component`."""
    return [child for child in config.enabled_children if child.type != TYPE]
