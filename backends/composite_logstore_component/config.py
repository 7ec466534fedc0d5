"""The settings of a `component` child."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from composite_logstore import ChildConfig, UnavailableError

if TYPE_CHECKING:
    from zenml.artifact_stores import BaseArtifactStore

    from composite_logstore import Exporter
    from composite_logstore_component.reader import ComponentReader


class ComponentChildConfig(ChildConfig):
    """Sends events to a log store that is registered in ZenML, and reads from it, with that log store's settings.

    Attributes:
        component: The name or ID of the log store; or of an artifact store, for ZenML's own log store in it.
    """

    # ZenML's own log store for Datadog sends so many at once, the fewest of the log stores that ship with ZenML.
    default_batch_size: ClassVar[int] = 500
    readable: ClassVar[bool] = True
    asks_zenml: ClassVar[bool] = True

    component: Annotated[str, Field(min_length=1)]

    @property
    def requirements(self) -> frozenset[str]:  # type: ignore[override]  # it depends on the component
        """The packages that the component's flavor needs, if they are installed here."""
        from composite_logstore_component.components import requirements_of

        return frozenset({"composite-logstore"} | requirements_of(self.component))

    def create_exporter(self) -> Exporter:
        """Create the exporter, and load the log store for it.

        Raises:
            UnavailableError: The log store does not exist, or cannot be used on this machine.
        """
        from composite_logstore_component.components import ComponentError
        from composite_logstore_component.exporter import create

        try:
            return create(self.component)
        except ComponentError as error:
            raise UnavailableError(f"'component': {error}") from error

    def create_reader(self) -> ComponentReader:
        """Create the reader. It loads the log store for the first page."""
        from composite_logstore_component.reader import ComponentReader

        return ComponentReader(self.component)

    def places(self, artifact_store: BaseArtifactStore | None) -> Mapping[str, str]:
        """Return the component itself if it is an artifact store, or the ones to which a composite's children write.

        Args:
            artifact_store: The stack's artifact store; None if it is not known: then nothing is looked up.
        """
        if artifact_store is None:
            return {}
        from composite_logstore_component.components import ComponentError, places_of

        try:
            return places_of(self.component, artifact_store)
        except ComponentError:
            # The check of the child reports it.
            return {}

    def check_registration(self) -> None:
        """Check that the component exists, is a log store, does not contain itself, and is not nested too deeply.

        Raises:
            ValueError: One of these is not true.
        """
        from composite_logstore_component.components import ComponentError, find_model

        try:
            find_model(self.component)
        except ComponentError as error:
            raise ValueError(f"'component': {error}") from error

    def check(self) -> None:
        """Check the same, and that the log store can be loaded, on the machine that starts a run.

        Raises:
            ValueError: The log store cannot be used.
        """
        from composite_logstore_component.components import ComponentError, find_model, load

        try:
            load(find_model(self.component))
        except ComponentError as error:
            raise ValueError(f"'component': {error}") from error
