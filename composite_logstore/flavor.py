"""The flavor, through which ZenML finds the log store and its settings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from zenml.log_stores.base_log_store import BaseLogStoreFlavor

from composite_logstore.config import CompositeLogStoreConfig

if TYPE_CHECKING:
    from composite_logstore.log_store import CompositeLogStore


class CompositeLogStoreFlavor(BaseLogStoreFlavor):
    """The flavor `composite`. ZenML imports its log store to register it, so that has to import little."""

    @property
    def name(self) -> str:
        """The flavor's name."""
        return "composite"

    @property
    def config_class(self) -> type[CompositeLogStoreConfig]:
        """The configuration class."""
        return CompositeLogStoreConfig

    @property
    def implementation_class(self) -> type[CompositeLogStore]:
        """The log store class."""
        from composite_logstore.log_store import CompositeLogStore

        return CompositeLogStore
