"""Finds log stores that are registered in ZenML, and loads them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.metadata import packages_distributions
from typing import TYPE_CHECKING, Any, cast
from uuid import UUID

from zenml.client import Client
from zenml.constants import ENV_ZENML_SERVER
from zenml.enums import StackComponentType
from zenml.log_stores import BaseLogStore
from zenml.log_stores.artifact.artifact_log_store import ArtifactLogStore
from zenml.stack import StackComponent

from composite_logstore import CompositeLogStoreConfig, open_artifact_store
from composite_logstore_component.streams import extends_artifact

if TYPE_CHECKING:
    from zenml.artifact_stores import BaseArtifactStore
    from zenml.models import ComponentResponse

TYPES = (StackComponentType.LOG_STORE, StackComponentType.ARTIFACT_STORE)
"""What can be a child, by precedence: an artifact store stands for ZenML's own log store in it."""


class ComponentError(Exception):
    """A component cannot be used. The message says why, and what to do."""


def find_model(name: str) -> ComponentResponse:
    """Return what ZenML knows of the log store or artifact store with this name or id.

    Raises:
        ComponentError: There is none, or it contains itself.
    """
    model = _find(name)
    _refuse_circles(model, ())
    return model


def load(model: ComponentResponse) -> BaseLogStore:
    """Return the log store.

    Raises:
        ComponentError: Its flavor cannot be imported, or its settings cannot be used here.
    """
    try:
        if model.type == StackComponentType.ARTIFACT_STORE:
            return ArtifactLogStore.from_artifact_store(open_artifact_store(model))
        return cast(BaseLogStore, StackComponent.from_model(model))
    except ImportError as error:
        raise ComponentError(
            f"'{model.name}' cannot be loaded here; install what its flavor '{model.flavor_name}' needs"
        ) from error
    except Exception as error:
        # Without its text, which may repeat a key.
        raise ComponentError(
            f"'{model.name}' cannot be loaded here ({type(error).__name__}); check its settings with `zenml "
            f"{model.type.value.replace('_', '-')} describe {model.name}`"
        ) from error


def requirements_of(name: str) -> set[str]:
    """Return what a remote step has to install for the component, as far as it is installed here."""
    try:
        store = load(_find(name))
    except ComponentError:
        return set()
    module = type(store).__module__.partition(".")[0]
    packages = set() if module in ("zenml", "composite_logstore") else set(packages_distributions().get(module, ()))
    component = store._artifact_store if extends_artifact(store) else store
    return packages | set(component.requirements)


def places_of(model: ComponentResponse, artifact_store: BaseArtifactStore) -> dict[str, str]:
    """Return the artifact stores that the component writes logs to: a path or an id → its name in an error.

    Args:
        model: What ZenML knows of the component.
        artifact_store: That of the stack.

    Raises:
        ComponentError: It cannot be used.
    """
    if model.type == StackComponentType.ARTIFACT_STORE:
        return {model.configuration.get("path") or str(model.id): f"artifact store '{model.name}'"}
    config = load(model).config
    if not isinstance(config, CompositeLogStoreConfig):
        return {}
    return {place: label for child in config.enabled_children for place, label in child.places(artifact_store).items()}


def _find(name: str) -> ComponentResponse:
    try:
        if ENV_ZENML_SERVER not in os.environ:
            model = _find_by_name(name)
        else:
            # Reading logs must not open a component that the reader may not read.
            from zenml.zen_server.rbac.endpoint_utils import verify_permissions_and_get_entity
            from zenml.zen_server.utils import zen_store

            id = _uuid(name) or _find_by_name(name).id
            model = verify_permissions_and_get_entity(id=id, get_method=zen_store().get_stack_component)
    except KeyError:
        raise ComponentError(_missing(name)) from None
    if model.type not in TYPES:
        raise ComponentError(_of_another_type(name, model.type))
    return model


def _find_by_name(name: str) -> ComponentResponse:
    for kind in TYPES:
        try:
            return Client().get_stack_component(kind, name_id_or_prefix=name, allow_name_prefix_match=False)
        except KeyError:
            continue
    raise KeyError(name)


def _missing(name: str) -> str:
    """Say that there is no such log store, or that the name is that of something else."""
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


def _refuse_circles(model: ComponentResponse, path: tuple[ComponentResponse, ...]) -> None:
    """Follow the children of a composite, whatever its own components are.

    Raises:
        ComponentError: A component contains itself.
    """
    if model.flavor_name != "composite":
        return
    if model.id in {component.id for component in path}:
        way = " → ".join(component.name for component in (*path, model))
        raise ComponentError(
            f"'{model.name}' contains itself ({way}); take it out of the children of '{path[-1].name}'"
        )
    for child in _children(model.configuration):
        if child.get("type") == "component" and child.get("enabled", True):
            try:
                component = _find(str(child.get("component")))
            except ComponentError:
                # That child is unavailable, and says so itself.
                continue
            _refuse_circles(component, (*path, model))


def _children(configuration: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    children = configuration.get("children")
    return [child for child in children if isinstance(child, Mapping)] if isinstance(children, list) else []
