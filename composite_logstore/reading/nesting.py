"""Log stores within log stores: each is visited once, by its id, and only so many, so deep.

What can be seen where a log store is registered is refused there. But log stores are changed one by one, so whoever
reads holds to the same bounds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from uuid import UUID

from zenml.exceptions import LogStoreError, LogStoreRateLimitError, LogStoreUnavailableError

from composite_logstore import clock

if TYPE_CHECKING:
    from zenml.models import ComponentResponse

DEEPEST = 4
"""How many log stores deep a log store may be nested."""

LONGEST_SECONDS = 60.0
"""For how long other children are asked for a page in the place of those that cannot be read."""

MOST = 20
"""How many log stores may be nested in one, in all: for one page at most so many are read through."""


def nested_in(
    top: ComponentResponse, below: Callable[[ComponentResponse], Iterable[ComponentResponse]]
) -> list[ComponentResponse]:
    """Return a log store and all that are nested in it, each once.

    Args:
        top: The log store.
        below: Finds those that one reads and writes through.

    Raises:
        ValueError: It contains itself, or too many are nested in it, or too deeply. The message says what to do.
    """
    found: dict[UUID, ComponentResponse] = {}
    # The id of one → how many are nested in one another from it on, itself included.
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
    """What is read through for one page.

    Attributes:
        began: When it was asked for, in seconds by the clock that never goes back.
        path: The ids of the log stores that are being read, each through the one before.
        known: The ids of all that have been.
        failed: The id of one that could not be read → whether it may be later: nobody else asks it for this page.
    """

    began: float
    path: list[UUID]
    known: set[UUID] = field(default_factory=set)
    failed: dict[UUID, bool] = field(default_factory=dict)


_page: ContextVar[_Page | None] = ContextVar("composite_logstore_page", default=None)


@contextmanager
def page(store_id: UUID) -> Iterator[_Page]:
    """Note that a page of this log store is read, unless that is a part of a page of another one."""
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
    """Return whether there is time left to ask another child for the page that is being read."""
    current = _page.get()
    return current is None or clock.current.now() - current.began < LONGEST_SECONDS


@contextmanager
def reading_through(store_id: UUID, name: str) -> Iterator[None]:
    """Wrap the reading from another log store that ZenML has registered.

    Args:
        store_id: Its id.
        name: Its name.

    Raises:
        zenml.exceptions.LogStoreError: It is being read already, since it contains itself; it is nested too deeply;
            there are too many; or it could not be read before, for the same page.
        Exception: Why it could not be read before, for the same page.
    """
    is_outermost = _page.get() is None
    with page(store_id) as current:
        if is_outermost:
            yield
            return
        if store_id in current.path:
            raise LogStoreError(f"Log store '{name}' contains itself; take it out of one of those that it contains.")
        if store_id in current.failed:
            # Without saying again why: where many ways lead to it, that would grow with each.
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
