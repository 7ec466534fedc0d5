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
        component: The name or id of the log store. That of an artifact store is ZenML's own log store in it.
    """

    # What ZenML's own log store for Datadog sends at once, and the least of those that come along.
    default_batch_size: ClassVar[int] = 500
    readable: ClassVar[bool] = True

    component: Annotated[str, Field(min_length=1)]

    @property
    def requirements(self) -> frozenset[str]:  # type: ignore[override]  # it depends on the component
        """What the component's flavor needs, if that is installed here."""
        from composite_logstore_component.components import requirements_of

        return frozenset({"composite-logstore"} | requirements_of(self.component))

    def create_exporter(self) -> Exporter:
        """Create the exporter, and with it the log store.

        Raises:
            UnavailableError: There is no such log store, or it cannot be used here.
        """
        from composite_logstore_component.components import ComponentError
        from composite_logstore_component.exporter import create

        try:
            return create(self.component)
        except ComponentError as error:
            raise UnavailableError(f"'component': {error}") from error

    def create_reader(self) -> ComponentReader:
        """Create the reader. It loads the log store with the first page."""
        from composite_logstore_component.reader import ComponentReader

        return ComponentReader(self.component)

    def places(self, artifact_store: BaseArtifactStore | None) -> Mapping[str, str]:
        """Return the artifact store that the component is, or those that a composite's children write to.

        Args:
            artifact_store: That of the stack, if it is known. If not, nothing is looked up.
        """
        if artifact_store is None:
            return {}
        from composite_logstore_component.components import ComponentError, places_of

        try:
            return places_of(self.component, artifact_store)
        except ComponentError:
            # That the child is unavailable is said elsewhere.
            return {}

    def check_registration(self) -> None:
        """Check that the component exists, is a log store, does not contain itself, and is not nested too deeply.

        Raises:
            ValueError: It is not so.
        """
        from composite_logstore_component.components import ComponentError, find_model

        try:
            find_model(self.component)
        except ComponentError as error:
            raise ValueError(f"'component': {error}") from error

    def check(self) -> None:
        """Check the same, and that the log store can be loaded, from where a run is started.

        Raises:
            ValueError: It cannot be used.
        """
        from composite_logstore_component.components import ComponentError, find_model, load

        try:
            load(find_model(self.component))
        except ComponentError as error:
            raise ValueError(f"'component': {error}") from error
