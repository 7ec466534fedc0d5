"""The settings of the artifact backend."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import urlsplit

import orjson
from pydantic import Field

from composite_logstore import ChildConfig, UnavailableError

if TYPE_CHECKING:
    from zenml.artifact_stores import BaseArtifactStore

    from composite_logstore import CollectorExporter
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

    @property
    def asks_zenml(self) -> bool:  # type: ignore[override]  # it depends on the artifact store
        """Whether there is an artifact store to ask for."""
        return self.artifact_store is not None

    def create_exporter(self) -> ArtifactExporter:
        """Create the exporter. It looks up its artifact store for the first event."""
        from composite_logstore_artifact.exporter import ArtifactExporter

        is_set = "schedule_delay_millis" in self.model_fields_set
        return ArtifactExporter(self.artifact_store, remote_delay_millis=None if is_set else self.remote_delay_millis)

    def create_reader(self) -> ArtifactReader:
        """Create the reader. It looks up the artifact store of each stream."""
        from composite_logstore_artifact.reader import ArtifactReader

        return ArtifactReader(self.artifact_store)

    def collector_exporter(self) -> CollectorExporter:
        """Return the Collector's exporter for S3, if `artifact_store` is there.

        Raises:
            UnavailableError: It is elsewhere, or is that of each run's stack.
        """
        from composite_logstore import CollectorExporter
        from composite_logstore_artifact.artifact_stores import ArtifactStoreNotFoundError, find_model

        if self.artifact_store is None:
            raise UnavailableError("it writes to the artifact store of each run's stack; set 'artifact_store'")
        try:
            model = find_model(self.artifact_store)
        except ArtifactStoreNotFoundError as error:
            raise UnavailableError(f"'artifact_store': {error}") from None
        place = urlsplit(str(model.configuration.get("path", "")))
        if place.scheme != "s3":
            raise UnavailableError(f"artifact store '{model.name}' is not on S3, and the Collector writes to no other")
        client = model.configuration.get("client_kwargs") or {}
        client = orjson.loads(client) if isinstance(client, str) else client
        uploader: dict[str, Any] = {
            "s3_bucket": place.netloc,
            "s3_prefix": "/".join(filter(None, (place.path.strip("/"), "otlp_logs"))),
            "compression": "gzip",
        }
        losses = [
            "It writes files of OTLP, with an object for each batch, which no child reads",
            "It takes AWS's usual credentials on the Collector's machine, not those of the artifact store",
        ]
        if region := client.get("region_name"):
            uploader["region"] = region
        else:
            losses.append("Its 'region' is us-east-1 if you add no other")
        if endpoint := client.get("endpoint_url"):
            uploader |= {"endpoint": endpoint, "s3_force_path_style": True}
        settings: dict[str, Any] = {"marshaler": "otlp_proto", "s3uploader": uploader}
        if "schedule_delay_millis" not in self.model_fields_set:
            settings["sending_queue"] = {"batch": {"flush_timeout": f"{self.remote_delay_millis}ms"}}
        return CollectorExporter("awss3", settings, losses=losses)

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

    def check_registration(self) -> None:
        """Check the same at once, unless the child is disabled: such a child may be kept for what can still be read.

        Raises:
            ValueError: It does not exist.
        """
        if not self.enabled or self.artifact_store is None:
            # ZenML's configuration, which it would make, is not needed.
            return
        from zenml.config.global_config import GlobalConfiguration

        # ZenML's client has opened its store before it registers anything. A handler does not wait for ZenML.
        if GlobalConfiguration().is_initialized:
            self.check()

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
