"""Log stores within log stores: bounds on their depth, their number and the time that reading them takes.

Registering a log store that breaks a bound is refused. But nested log stores are updated one by one, so reading
enforces the same bounds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from uuid import UUID

from composite_logstore import clock
from composite_logstore.zenml import LogStoreError, LogStoreRateLimitError, LogStoreUnavailableError

if TYPE_CHECKING:
    from zenml.models import ComponentResponse

DEEPEST = 4
"""How many levels of log stores may be nested in each other."""

LONGEST_SECONDS = 60.0
"""How long a page may take, with all nested log stores, until no further child is asked in place of one that failed."""

MOST = 20
"""How many log stores may be nested in one, on all levels together. For one page at most so many are read."""


def nested_in(
    top: ComponentResponse, below: Callable[[ComponentResponse], Iterable[ComponentResponse]]
) -> list[ComponentResponse]:
    """Return a log store and all log stores that are nested in it, each once.

    Args:
        top: The log store.
        below: Finds the log stores that another one contains.

    Raises:
        ValueError: The log store contains itself, or too many log stores, or they are nested too deeply. The message
            says how to mend it.
    """
    found: dict[UUID, ComponentResponse] = {}
    # The ID of a log store → how many levels it has, itself included.
    heights: dict[UUID, int] = {}

    def visit(model: ComponentResponse, path: tuple[ComponentResponse, ...]) -> int:
        if model.id in {component.id for component in path}:
            way = " → ".join(component.name for component in (*path, model))
            raise ValueError(
                f"'{model.name}' contains itself ({way}); take it out of the children of '{path[-1].name}'"
            )
        if len(path) + heights.get(model.id, 1) > DEEPEST:
            raise ValueError(f"'{top.name}' is nested too deeply; nest log stores at most {DEEPEST} deep")
        if model.id not in heights:
            found[model.id] = model
            if len(found) > MOST:
                raise ValueError(f"'{top.name}' has too many nested in it; nest at most {MOST} log stores in one")
            heights[model.id] = 1 + max((visit(component, (*path, model)) for component in below(model)), default=0)
        return heights[model.id]

    visit(top, ())
    return list(found.values())


@dataclass
class _Page:
    """What is read for one page.

    Attributes:
        began: When the page was asked for, in seconds of the clock that never goes back.
        path: The IDs of the log stores that are being read, each nested in the one before it.
        known: The IDs of all log stores that were read for the page.
        failed: The ID of a log store that could not be read → whether it may be readable later. It is not asked again
            for this page.
    """

    began: float
    path: list[UUID]
    known: set[UUID] = field(default_factory=set)
    failed: dict[UUID, bool] = field(default_factory=dict)


_page: ContextVar[_Page | None] = ContextVar("composite_logstore_page", default=None)


@contextmanager
def page(store_id: UUID) -> Iterator[_Page]:
    """Note that a page of this log store is read, unless it is part of another log store's page."""
    current = _page.get()
    if current is not None:
        yield current
        return
    current = _Page(clock.current.now(), [store_id])
    token = _page.set(current)
    try:
        yield current
    finally:
        _page.reset(token)


def may_go_on() -> bool:
    """Return whether there is time to ask another child for the page that is being read."""
    current = _page.get()
    return current is None or clock.current.now() - current.began < LONGEST_SECONDS


@contextmanager
def reading_through(store_id: UUID, name: str) -> Iterator[None]:
    """Guard the reading of a nested log store: use it as a context manager around the read.

    Args:
        store_id: The ID of the nested log store.
        name: Its name.

    Raises:
        zenml.exceptions.LogStoreError: The log store contains itself; is nested too deeply; is one too many; or has
            already failed for this page.
    """
    is_outermost = _page.get() is None
    with page(store_id) as current:
        if is_outermost:
            yield
            return
        if store_id in current.path:
            raise LogStoreError(f"Log store '{name}' contains itself; take it out of one of those that it contains.")
        if store_id in current.failed:
            # The reason is not repeated: where many ways lead to this log store, the message would grow with each.
            kind = LogStoreUnavailableError if current.failed[store_id] else LogStoreError
            raise kind(f"Log store '{name}' could not be read just now.")
        if len(current.path) > DEEPEST:
            raise LogStoreError(f"Log store '{name}' is nested too deeply; nest log stores at most {DEEPEST} deep.")
        if store_id not in current.known and len(current.known) >= MOST:
            raise LogStoreError(f"Log store '{name}' is one too many; nest at most {MOST} log stores in one.")
        current.known.add(store_id)
        current.path.append(store_id)
        try:
            yield
        except Exception as error:
            current.failed[store_id] = isinstance(error, LogStoreUnavailableError | LogStoreRateLimitError)
            raise
        finally:
            current.path.pop()
