"""The types of children: the backends that are installed, and how a child is made from its settings."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

from pydantic import ConfigDict, ValidationError
from zenml.logger import get_logger

from composite_logstore.backend import UnavailableError
from composite_logstore.child_config import ChildConfig
from composite_logstore.mistakes import mistakes_in, unknown_type

if TYPE_CHECKING:
    from zenml.artifact_stores import BaseArtifactStore

logger = get_logger(__name__)

BACKENDS = "composite_logstore.backends"
"""The entry-point group of backends. A name is a child's `type`, its value the backend's `ChildConfig`."""


class UnknownChild(ChildConfig):
    """A child whose backend is not installed here. It keeps its settings and is unavailable."""

    model_config = ConfigDict(extra="allow")

    readable: ClassVar[bool] = True

    def unservable(self, artifact_store: BaseArtifactStore | None) -> str | None:
        """Return None: whether it can is unknown."""
        return None

    @property
    def _problem(self) -> str:
        return unknown_type("type", "backend", self.type, backends())

    def create_exporter(self) -> NoReturn:
        """Raise `UnavailableError`."""
        raise UnavailableError(self._problem)

    def create_reader(self) -> NoReturn:
        """Raise `UnavailableError`."""
        raise UnavailableError(self._problem)

    def collector_exporter(self) -> NoReturn:
        """Raise `UnavailableError`."""
        raise UnavailableError(self._problem)

    def check_registration(self) -> NoReturn:
        """Raise `ValueError`."""
        raise ValueError(self._problem)

    def check(self) -> NoReturn:
        """Raise `ValueError`."""
        raise ValueError(self._problem)


def parse_child(number: int, raw: Any) -> ChildConfig:
    """Return a child from its settings.

    Args:
        number: Its place in the list, from 1.
        raw: Its settings.

    Raises:
        ValueError: Its settings are wrong. The message names the child, each mistake and its fix, but no value.
    """
    if isinstance(raw, ChildConfig):
        return raw
    if not isinstance(raw, Mapping):
        raise ValueError(f"child number {number}: must be an object with a 'name' and a 'type'")
    label = f"child '{raw['name']}'" if isinstance(raw.get("name"), str) else f"child number {number}"
    for key in ("name", "type"):
        if not isinstance(raw.get(key), str):
            raise ValueError(f"{label}: '{key}' is required; set it to a text")
    config_class: type[ChildConfig] = UnknownChild
    if raw["type"] in backends():
        try:
            config_class = backends()[raw["type"]].load()
        except ImportError as error:
            logger.debug("%s: backend '%s' cannot be imported: %s", label, raw["type"], error)
    try:
        return config_class(**raw)
    except ValidationError as error:
        mistakes = "; ".join(mistakes_in(config_class, error))
        raise ValueError(f"{label}: {mistakes}") from None


@lru_cache(maxsize=1)
def backends() -> dict[str, EntryPoint]:
    """Return the installed backends: a child's `type` → the entry point of its `ChildConfig`."""
    return {entry_point.name: entry_point for entry_point in entry_points(group=BACKENDS)}
