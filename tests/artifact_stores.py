"""Artifact stores for tests, made without a ZenML client."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID, uuid4

from zenml.artifact_stores import BaseArtifactStore, BaseArtifactStoreConfig, LocalArtifactStore
from zenml.artifact_stores.local_artifact_store import LocalArtifactStoreConfig
from zenml.enums import StackComponentType
from zenml.models import LogsResponse, LogsResponseBody
from zenml.utils.time_utils import utc_now

ArtifactStore = TypeVar("ArtifactStore", bound=BaseArtifactStore)


class ObjectStoreConfig(LocalArtifactStoreConfig):
    """Says that it is remote, so that streams become folders of objects."""

    @property
    def is_local(self) -> bool:
        return False


def make_artifact_store(
    kind: type[ArtifactStore], config: BaseArtifactStoreConfig, flavor: str, name: str = "archive"
) -> ArtifactStore:
    """Return an artifact store as ZenML makes it of a registered component."""
    return kind(
        name=name,
        id=uuid4(),
        config=config,
        flavor=flavor,
        type=StackComponentType.ARTIFACT_STORE,
        user=uuid4(),
        created=utc_now(),
        updated=utc_now(),
    )


def local_store(root: Path) -> LocalArtifactStore:
    """Return ZenML's local artifact store: a file for each stream."""
    return make_artifact_store(LocalArtifactStore, LocalArtifactStoreConfig(path=str(root)), "local")


def object_store(root: Path) -> LocalArtifactStore:
    """Return one that has a folder of objects for each stream, in a local folder."""
    return make_artifact_store(LocalArtifactStore, ObjectStoreConfig(path=str(root)), "objects")


def make_logs(id: UUID | None = None, **fields: Any) -> LogsResponse:
    """Return what ZenML knows of a log stream; `fields` are those of its body."""
    now = utc_now()
    body = LogsResponseBody(created=now, updated=now, project_id=uuid4(), source="step", log_store_id=uuid4(), **fields)
    return LogsResponse(id=id or uuid4(), body=body)
