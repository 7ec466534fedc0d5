"""The settings of the artifact backend."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from composite_logstore import ChildConfig

if TYPE_CHECKING:
    from zenml.artifact_stores import BaseArtifactStore

    from composite_logstore_artifact.exporter import ArtifactExporter
    from composite_logstore_artifact.reader import ArtifactReader


class ArtifactChildConfig(ChildConfig):
    """A child that archives events in a ZenML artifact store.

    Attributes:
        artifact_store: The name or ID of the artifact store. If not set: the one of the run's own stack, both for
            writing and for reading.
    """

    # In a remote artifact store every export is an object, and fewer objects are better: one in 10 s, or one for each
    # 8 MB. A line has about 400 bytes.
    default_batch_size: ClassVar[int] = 20_000
    max_batch_bytes: ClassVar[int] = 8 * 1024 * 1024
    remote_delay_millis: ClassVar[int] = 10_000
    readable: ClassVar[bool] = True

    artifact_store: str | None = Field(default=None, min_length=1)

    @property
    def requirements(self) -> frozenset[str]:  # type: ignore[override]  # it depends on the artifact store
        """The packages that the named artifact store needs. A stack brings those of its own artifact store itself."""
        own = frozenset({"composite-logstore"})
        if self.artifact_store is None:
            return own
        from composite_logstore_artifact.artifact_stores import requirements_of

        return own | requirements_of(self.artifact_store)

    def create_exporter(self) -> ArtifactExporter:
        """Create the exporter. It looks up its artifact store for the first event."""
        from composite_logstore_artifact.exporter import ArtifactExporter

        is_set = "schedule_delay_millis" in self.model_fields_set
        return ArtifactExporter(self.artifact_store, remote_delay_millis=None if is_set else self.remote_delay_millis)

    def create_reader(self) -> ArtifactReader:
        """Create the reader. It looks up the artifact store of each stream."""
        from composite_logstore_artifact.reader import ArtifactReader

        return ArtifactReader(self.artifact_store)

    def unservable(self, artifact_store: BaseArtifactStore | None) -> str | None:
        """Return why ZenML's server does not find the child's logs: it reads the stack's artifact store alone.

        Args:
            artifact_store: The stack's artifact store, if it is known.
        """
        named = self.artifact_store
        if artifact_store is None or named in (None, artifact_store.name, str(artifact_store.id)):
            return None
        return (
            f"'artifact_store' is '{named}', but with 'serve_from_artifact_store' ZenML's server looks in that of the "
            f"stack, '{artifact_store.name}'; leave 'artifact_store' out, or give the stack that artifact store"
        )

    def places(self, artifact_store: BaseArtifactStore | None) -> Mapping[str, str]:
        """Return the artifact store: two children would write a stream to the same file of it.

        Args:
            artifact_store: The stack's artifact store, if it is known.
        """
        named = self.artifact_store
        if artifact_store is None:
            return {named or "": f"artifact store '{named}'" if named else "the stack's artifact store"}
        if named is None:
            return {artifact_store.config.path or str(artifact_store.id): f"artifact store '{artifact_store.name}'"}
        from composite_logstore_artifact.artifact_stores import ArtifactStoreNotFoundError, find_model

        try:
            model = find_model(named)
        except ArtifactStoreNotFoundError:
            # The check of the child reports it.
            return {}
        return {model.configuration.get("path") or str(model.id): f"artifact store '{model.name}'"}

    def check(self) -> None:
        """Check that the named artifact store exists.

        Raises:
            ValueError: It does not.
        """
        if self.artifact_store is None:
            return
        from composite_logstore_artifact.artifact_stores import ArtifactStoreNotFoundError, find_model

        try:
            find_model(self.artifact_store)
        except ArtifactStoreNotFoundError as error:
            raise ValueError(f"'artifact_store': {error}") from None
