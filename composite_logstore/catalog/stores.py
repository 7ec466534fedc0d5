"""Composite log stores and their children, as ZenML has registered them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast
from uuid import UUID

import orjson

from composite_logstore.catalog.errors import ArgumentError, NoAnswerError, asking_zenml, nearest
from composite_logstore.child_config import ChildConfig
from composite_logstore.config import CompositeLogStoreConfig

if TYPE_CHECKING:
    from zenml.models import ComponentResponse

    from composite_logstore.log_store import CompositeLogStore
    from composite_logstore.parity.scan import Source

FLAVOR = "composite"


@dataclass(frozen=True)
class RegisteredStore:
    """A composite log store that is registered in ZenML.

    Attributes:
        store: The log store.
        model: Its registration in ZenML.
    """

    store: CompositeLogStore
    model: ComponentResponse

    @property
    def name(self) -> str:
        """The log store's name."""
        return self.store.name

    @property
    def id(self) -> UUID:
        """The log store's id."""
        return self.store.id

    @property
    def config(self) -> CompositeLogStoreConfig:
        """The log store's settings."""
        return self.store.config

    @property
    def raw_children(self) -> list[dict[str, Any]]:
        """The children's settings as ZenML stores them: references to secrets are not resolved."""
        children = self.model.configuration["children"]
        return [dict(child) for child in (orjson.loads(children) if isinstance(children, str) else children)]

    def child(self, name: str, argument: str = "child") -> ChildConfig:
        """Return the settings of a child.

        Args:
            name: The child's name.
            argument: The parameter that the name was given for.

        Raises:
            ArgumentError: The log store has no such child.
        """
        known = {child.name: child for child in self.config.children}
        if name not in known:
            raise ArgumentError(argument, f"log store '{self.name}' has no child '{name}'{nearest(name, known)}")
        return known[name]

    def readable_child(self, name: str, argument: str = "child") -> ChildConfig:
        """Return the settings of a child that can be read.

        Raises:
            ArgumentError: The log store has no such child, or the child cannot be read.
        """
        child = self.child(name, argument)
        if why := child.unreadable:
            raise ArgumentError(argument, f"child '{name}' of log store '{self.name}': {why}")
        return child

    def reading_from(self, name: str) -> CompositeLogStore:
        """Return the log store as one that reads from this child alone, even if the child is disabled."""
        children = [child.model_copy(update={"enabled": True}) for child in self.config.children if child.name == name]
        config = self.config.model_copy(update={"primary": name, "fetch_fallback": [], "children": children})
        store = self.store
        return type(store)(
            name=store.name,
            id=store.id,
            config=config,
            flavor=store.flavor,
            type=store.type,
            user=store.user,
            created=store.created,
            updated=store.updated,
        )

    def update(self, settings: dict[str, Any]) -> None:
        """Change some of the log store's settings in ZenML.

        ZenML merges them into the settings that it has, so the changes of others are kept. This object keeps the old
        settings; find the log store again to get the new ones.

        Raises:
            NoAnswerError: ZenML does not accept them, or cannot be reached.
        """
        from zenml.exceptions import IllegalOperationError

        with asking_zenml():
            from zenml.client import Client
            from zenml.enums import StackComponentType

            try:
                Client().update_stack_component(self.id, StackComponentType.LOG_STORE, configuration=settings)
            except IllegalOperationError:
                raise NoAnswerError(
                    f"ZenML does not allow you to update log store '{self.name}'; ask its owner."
                ) from None
            except ValueError as error:
                raise NoAnswerError(f"cannot update log store '{self.name}': {explain(error)}") from None

    def check_update(self, settings: dict[str, Any]) -> None:
        """Check whether ZenML would accept a change of some settings, as far as that can be known without making it.

        Raises:
            NoAnswerError: It would not.
        """
        try:
            CompositeLogStoreConfig(**{**dict(self.config), **settings}).check_registration(is_client=True)
        except ValueError as error:
            raise NoAnswerError(f"cannot update log store '{self.name}': {explain(error)}") from None


def find_store(name_or_id: str) -> RegisteredStore:
    """Return a composite log store that ZenML's active configuration knows.

    Raises:
        ArgumentError: There is no such log store, or it is of another flavor.
        NoAnswerError: ZenML cannot be reached, or this version cannot read the log store's settings.
    """
    with asking_zenml():
        from zenml.client import Client
        from zenml.enums import StackComponentType
        from zenml.utils.pagination_utils import depaginate

        models = depaginate(Client().list_stack_components, type=StackComponentType.LOG_STORE, hydrate=True)
        is_local = Client().zen_store.is_local_store()
    for model in models:
        if name_or_id in (model.name, str(model.id)):
            return load_store(model)
    known = [model.name for model in models if model.flavor_name == FLAVOR]
    where = " ZenML uses its local configuration; `zenml login` connects to a server." if is_local else ""
    raise ArgumentError("store", f"there is no log store '{name_or_id}'{nearest(name_or_id, known)}.{where}")


def load_store(model: ComponentResponse, argument: str = "store") -> RegisteredStore:
    """Return the composite log store of a registration.

    Args:
        model: The registration in ZenML.
        argument: The parameter that named it.

    Raises:
        ArgumentError: The log store is of another flavor.
        NoAnswerError: The log store cannot be loaded here.
    """
    if model.flavor_name != FLAVOR:
        raise ArgumentError(
            argument, f"log store '{model.name}' is of flavor '{model.flavor_name}'; name one of flavor '{FLAVOR}'"
        )
    from zenml.stack import StackComponent

    try:
        return RegisteredStore(cast("CompositeLogStore", StackComponent.from_model(model)), model)
    except ValueError as error:
        # Another version of this package or of a backend wrote the settings.
        raise NoAnswerError(f"cannot read the settings of log store '{model.name}': {explain(error)}") from None
    except Exception as error:
        raise NoAnswerError(f"log store '{model.name}' cannot be loaded here ({type(error).__name__})") from error


def explain(error: ValueError) -> str:
    """Return the message of an error in a log store's settings: it names child, field and fix, but repeats no value."""
    from pydantic import ValidationError

    if not isinstance(error, ValidationError):
        return str(error)
    details = error.errors(include_url=False, include_input=False, include_context=False)
    return "; ".join(detail["msg"].removeprefix("Value error, ") for detail in details)


def open_child(child: ChildConfig) -> Source:
    """Open a child for reading.

    Raises:
        NoAnswerError: The child cannot be opened.
    """
    from composite_logstore.backend import UnavailableError
    from composite_logstore.parity.scan import open_source

    try:
        return open_source(child)
    except (UnavailableError, ImportError) as error:
        raise NoAnswerError(f"child '{child.name}' cannot be read: {error}") from error
    except Exception as error:
        # Its text may contain anything, such as a key.
        raise NoAnswerError(f"child '{child.name}' cannot be read: its reader raised {type(error).__name__}") from error


def collectors(store: RegisteredStore, children: list[ChildConfig]) -> dict[UUID | None, str]:
    """Return the log stores that collected streams which these children may hold: the composite, and earlier ones.

    Returns:
        The id of a log store → the name of the child that stands for it, empty for the composite itself.
    """
    found: dict[UUID | None, str] = {store.id: ""}
    for child in children:
        component = getattr(child, "component", None)
        if isinstance(component, str):
            with asking_zenml():
                from zenml.client import Client
                from zenml.enums import StackComponentType

                for kind in (StackComponentType.LOG_STORE, StackComponentType.ARTIFACT_STORE):
                    try:
                        model = Client().get_stack_component(kind, component, allow_name_prefix_match=False)
                    except (KeyError, ValueError):
                        continue
                    found.setdefault(model.id, child.name)
    return found


def may_hold(child: ChildConfig, collector: UUID | None, collectors: Mapping[UUID | None, str]) -> bool:
    """Return whether a child may hold events of a stream.

    A disabled child that stands for an earlier log store is kept for reading alone: it never got what the composite
    collected.

    Args:
        child: The child.
        collector: The log store that collected the stream.
        collectors: The log stores of the children, as `collectors` returns them.
    """
    return collectors.get(collector) != "" or child.enabled or child.name not in collectors.values()
