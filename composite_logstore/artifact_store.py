"""Artifact stores beside the active stack's own."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, cast

from zenml.artifacts.utils import instantiate_artifact_store
from zenml.client import Client
from zenml.constants import ENV_ZENML_SERVER
from zenml.io.filesystem_registry import default_filesystem_registry
from zenml.stack import Flavor

if TYPE_CHECKING:
    from zenml.artifact_stores import BaseArtifactStore, BaseArtifactStoreConfig
    from zenml.models import ComponentResponse

_registering = threading.Lock()


def open_artifact_store(model: ComponentResponse) -> BaseArtifactStore:
    """Return an artifact store, without taking the place of the active stack's own.

    An artifact store registers itself as *the* filesystem of its URL schemes, and refuses paths outside
    its own root: a pipeline on another bucket could then no longer read or write its artifacts.

    Args:
        model: What ZenML has registered.

    Returns:
        The artifact store. It may be shared with the active stack or, on ZenML's server, between requests: never
        clean it up.

    Raises:
        ImportError: What its flavor needs is not installed.
        Exception: Whatever it raises itself when it is loaded.
    """
    if ENV_ZENML_SERVER in os.environ:
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
