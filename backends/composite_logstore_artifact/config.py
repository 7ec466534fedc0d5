"""The settings of the artifact backend."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from composite_logstore import ChildConfig

if TYPE_CHECKING:
    from composite_logstore_artifact.exporter import ArtifactExporter
    from composite_logstore_artifact.reader import ArtifactReader


class ArtifactChildConfig(ChildConfig):
    """A child that archives events in a ZenML artifact store.

    Attributes:
        artifact_store: The name or id of the artifact store. Unset: the one of the run's own stack, when
            writing and when reading.
    """

    # On S3 every export is an object, the fewer the better: one in 10 s, unless there are 8 MB before. A line is
    # about 400 bytes.
    default_batch_size: ClassVar[int] = 20_000
    max_batch_bytes: ClassVar[int] = 8 * 1024 * 1024
    remote_delay_millis: ClassVar[int] = 10_000
    readable: ClassVar[bool] = True
    requirements: ClassVar[frozenset[str]] = frozenset({"composite-logstore"})

    artifact_store: str | None = Field(default=None, min_length=1)

    def create_exporter(self) -> ArtifactExporter:
        """Create the exporter. It looks for its artifact store with the first event."""
        from composite_logstore_artifact.exporter import ArtifactExporter

        is_set = "schedule_delay_millis" in self.model_fields_set
        return ArtifactExporter(self.artifact_store, remote_delay_millis=None if is_set else self.remote_delay_millis)

    def create_reader(self) -> ArtifactReader:
        """Create the reader. It looks for the artifact store of each stream that is read."""
        from composite_logstore_artifact.reader import ArtifactReader

        return ArtifactReader(self.artifact_store)

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
