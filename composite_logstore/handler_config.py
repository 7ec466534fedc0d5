"""The settings of a handler: those of a log store that is never read."""

from __future__ import annotations

from pydantic import ConfigDict, model_validator

from composite_logstore import secret_references
from composite_logstore.backend import UnavailableError
from composite_logstore.config import CompositeLogStoreConfig, UnknownChild


class HandlerConfig(CompositeLogStoreConfig):
    """The settings of a log store without a primary. What is refused at registration there is refused at once here.

    Attributes:
        primary: Nothing: a handler reads nothing.
    """

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    primary: str = ""

    def _must_be_readable(self, key: str, name: str) -> None:
        if name:
            raise ValueError(f"'{key}': a handler reads nothing; leave it out")

    @model_validator(mode="after")
    def _can_be_used(self) -> HandlerConfig:
        for child in self.children:
            try:
                if isinstance(child, UnknownChild):
                    child.create_exporter()
                secret_references.check(child)
                child.check_registration()
            except (ValueError, UnavailableError) as error:
                raise ValueError(f"child '{child.name}': {error}") from None
        if twice := self.doubled(None):
            raise ValueError(twice)
        return self
