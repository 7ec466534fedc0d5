"""Artifact stores for tests, made without a ZenML client."""

from __future__ import annotations

import errno
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID, uuid4

from fsspec.implementations.local import LocalFileSystem
from zenml.artifact_stores import BaseArtifactStore, BaseArtifactStoreConfig, LocalArtifactStore
from zenml.artifact_stores.local_artifact_store import LocalArtifactStoreConfig
from zenml.enums import StackComponentType
from zenml.models import LogsResponse
from zenml.utils.time_utils import utc_now

from composite_logstore import zenml
from composite_logstore_artifact.config import ArtifactChildConfig
from composite_logstore_artifact.exporter import ArtifactExporter
from composite_logstore_artifact.reader import ArtifactReader

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


class FolderArchive(ArtifactChildConfig):
    """A child that archives in a folder, without a ZenML client: a file for each stream, or objects.

    Attributes:
        root: The folder.
        is_file: Whether a stream is a file.
    """

    root: str
    is_file: bool = True

    def create_exporter(self) -> ArtifactExporter:
        store = self.store()
        return ArtifactExporter(find=lambda stream: store)

    def create_reader(self) -> ArtifactReader:
        store = self.store()
        return ArtifactReader(find=lambda logs: store, is_in_progress=lambda logs: False)

    def store(self) -> LocalArtifactStore:
        """Return the artifact store."""
        return (local_store if self.is_file else object_store)(Path(self.root))


class ListingFilesystem(LocalFileSystem):  # type: ignore[misc]
    """A local folder as S3 and its like show themselves: it remembers what it has listed.

    Attributes:
        requests: What was asked of it, and how many bytes were read.
    """

    cachable = False

    def __init__(self) -> None:
        super().__init__()
        self.requests: list[tuple[str, int]] = []
        self._listed: dict[str, list[dict[str, Any]]] = {}

    def invalidate_cache(self, path: str | None = None) -> None:
        self._listed.pop(str(path), None)

    def ls(self, path: str, detail: bool = False, **kwargs: Any) -> list[Any]:
        if path not in self._listed:
            self.requests.append(("list", 0))
            self._listed[path] = super().ls(path, detail=True)
        found = self._listed[path]
        return found if detail else [info["name"] for info in found]

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        content: bytes = super().cat_file(path, start, end, **kwargs)
        self.requests.append(("get", len(content)))
        return content


def listing_store(root: Path) -> LocalArtifactStore:
    """Return one with a folder of objects for each stream, read as from S3: by listings and ranges."""
    store = object_store(root)
    store.filesystem = ListingFilesystem()  # type: ignore[attr-defined]
    return store


def make_logs(id: UUID | None = None, **fields: Any) -> LogsResponse:
    """Return what ZenML knows of a log stream; `fields` are those of its body."""
    now = utc_now()
    logs = zenml.make_logs(id or uuid4(), "step", now, project_id=uuid4(), log_store_id=uuid4())
    return zenml.moved(logs, **fields)


class Faulty(io.RawIOBase):
    """A file on a disk that takes so many bytes more."""

    def __init__(self, path: str, room: int) -> None:
        self._file = io.FileIO(path, "a+b")
        self._room = room

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def read(self, size: int = -1) -> bytes:
        return self._file.read(size)

    def write(self, content: Any) -> int:
        if self._room == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = self._file.write(bytes(content)[: self._room])
        self._room -= taken
        return taken

    def close(self) -> None:
        self._file.close()
        super().close()


class AnswerLost(io.FileIO):
    """A file that is written, and then says that it was not."""

    def __init__(self, path: str, error: Exception) -> None:
        super().__init__(path, "wb")
        self._error = error

    def close(self) -> None:
        if not self.closed:
            super().close()
            raise self._error


def with_faults(store: LocalArtifactStore, faults: Iterable[Any]) -> LocalArtifactStore:
    """Return the store, whose next attempts to open a file to write go wrong.

    A number is the bytes that the disk has room for, an exception is raised, after writing if it comes in
    a tuple; None is no fault.
    """
    remaining = iter(faults)
    open_file = store.open

    def open_faulty(path: str, mode: str = "r") -> Any:
        if mode.startswith("r") or path.endswith(".index") or not Path(path).parent.is_dir():
            return open_file(path, mode)
        fault = next(remaining, None)
        if isinstance(fault, int):
            return Faulty(path, fault)
        if isinstance(fault, tuple):
            return AnswerLost(path, fault[0])
        if fault is not None:
            raise fault
        return open_file(path, mode)

    store.open = open_faulty  # type: ignore[method-assign, assignment]
    return store
