"""Opens artifact stores and log stores that are registered in ZenML, besides those of the active stack."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, cast

from zenml.client import Client
from zenml.enums import StackComponentType
from zenml.io.filesystem_registry import default_filesystem_registry
from zenml.log_stores.artifact.artifact_log_store import ArtifactLogStore
from zenml.stack import Flavor, StackComponent

from composite_logstore.secret_references import check_component
from composite_logstore.server import is_server
from composite_logstore.zenml import instantiate_artifact_store

if TYPE_CHECKING:
    from zenml.artifact_stores import BaseArtifactStore, BaseArtifactStoreConfig
    from zenml.log_stores import BaseLogStore
    from zenml.models import ComponentResponse

_registering = threading.Lock()


def open_log_store(model: ComponentResponse) -> BaseLogStore:
    """Return a log store. For an artifact store, this is ZenML's own log store in it.

    Raises:
        ImportError: A package that its flavor needs is not installed.
        UnavailableError: On ZenML's server: it refers to a secret that its owner may not use.
        Exception: The component itself raises when it is loaded.
    """
    if model.type == StackComponentType.ARTIFACT_STORE:
        return ArtifactLogStore.from_artifact_store(open_artifact_store(model))
    check_component(model)
    return cast("BaseLogStore", StackComponent.from_model(model))


def open_artifact_store(model: ComponentResponse) -> BaseArtifactStore:
    """Return an artifact store, without replacing the active stack's as the filesystem of its URL schemes.

    An artifact store registers itself as *the* filesystem of its URL schemes, and refuses paths outside its own root:
    a pipeline on another bucket could then no longer read or write its artifacts.

    Returns:
        The artifact store. The active stack or, on ZenML's server, other requests may share it: never clean it up.

    Raises:
        ImportError: A package that its flavor needs is not installed.
        UnavailableError: On ZenML's server: it refers to a secret that its owner may not use.
        Exception: The component itself raises when it is loaded.
    """
    if is_server():
        check_component(model)
        return instantiate_artifact_store(model)
    active = Client().active_stack.artifact_store
    if model.id == active.id:
        return active
    config_class = cast("type[BaseArtifactStoreConfig]", Flavor.from_model(model.flavor).config_class)
    registered = []
    with _registering:
        for scheme in config_class.SUPPORTED_SCHEMES:
            try:
                registered.append(default_filesystem_registry.get_filesystem_for_scheme(scheme))
            except ValueError:
                continue
        try:
            return instantiate_artifact_store(model)
        finally:
            for filesystem in registered:
                default_filesystem_registry.register(filesystem)
