"""The reader: reads pages through a log store's own `fetch()`."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Literal, NamedTuple

import orjson
from zenml.exceptions import DoesNotExistException

from composite_logstore import Page, PageRequest, ReadEntry, reading_through
from composite_logstore.zenml import (
    LOGS_MAX_ENTRIES_PER_REQUEST,
    LogStoreError,
    LogStoreUnavailableError,
    answers_pages,
    fetch_page,
)
from composite_logstore_component.components import ComponentError, find, load
from composite_logstore_component.streams import as_its_own, extends_artifact

if TYPE_CHECKING:
    from zenml.log_stores import BaseLogStore
    from zenml.models import ComponentResponse

    from composite_logstore.zenml import LogsEntriesResponse


_PLACE = re.compile(r"\d{1,9}", re.ASCII)
# Python raises these for a value of an unexpected shape.
_DEFECTS = (TypeError, LookupError, AttributeError, ArithmeticError, AssertionError)


class ComponentReader:
    """Reads pages of a log store. Its entries do not say which events they are.

    Attributes:
        max_page_size: The most entries of one page. A log store may return fewer.
        in_order: False, since it is not known.
    """

    max_page_size = LOGS_MAX_ENTRIES_PER_REQUEST
    in_order = False

    def __init__(self, component: str) -> None:
        """Prepare; nothing is looked up.

        Args:
            component: The name or ID of the log store.
        """
        self._component = component
        self._model: ComponentResponse | None = None
        self._store: BaseLogStore | None = None

    def read(self, request: PageRequest) -> Page:
        """Read one page.

        Args:
            request: Which page to read.

        Raises:
            ValueError: The log store does not know the token, a filter or the direction.
            LogStoreUnavailableError: The log store does not exist, or failed.
            LogStoreError: The log store cannot be read at all.
            DoesNotExistException: The log store does not have the stream.
            IllegalOperationError: On ZenML's server, the user may not read the log store.
        """
        try:
            model = self._model = self._model or find(self._component)
            with reading_through(model.id, model.name):
                store = self._store = self._store or load(model)
                return _read(store, request)
        except ComponentError as error:
            raise LogStoreUnavailableError(f"'component' of this child: {error}.") from error

    def close(self) -> None:
        """Clean up the log store, unless that would close an artifact store that others use."""
        if self._store is not None and not extends_artifact(self._store):
            self._store.cleanup()
        self._model = self._store = None


def _read(store: BaseLogStore, request: PageRequest) -> Page:
    reads_both_ways = answers_pages(store) and not extends_artifact(store)
    try:
        return _page(store, request) if reads_both_ways else _page_from_start(store, request)
    except (ValueError, LogStoreError, DoesNotExistException):
        raise
    except NotImplementedError as error:
        raise LogStoreError(
            f"Log store '{store.name}' of flavor '{store.flavor}' cannot be read. Set another child as 'primary'."
        ) from error
    except Exception as error:
        if request.token is not None and isinstance(error, _DEFECTS):
            # Some log stores do not check their own cursors. The log store is still available.
            raise ValueError(
                f"Log store '{store.name}' cannot use the token ({type(error).__name__}). Begin anew."
            ) from None
        raise LogStoreUnavailableError(f"Log store '{store.name}' raised {type(error).__name__}.") from error


class _Part(NamedTuple):
    """What a page is made of: a page of the log store, or the rest of one that has too many bytes.

    A log store's own cursors fix the size of their pages. So where the first page has too many bytes, fewer entries are
    asked for, then and from then on; and where a later page has, it is returned in several parts.

    Attributes:
        limit: The most entries of the log store's page.
        direction: Its direction.
        token: The log store's cursor for it, None for its first page.
        place: How many of its entries, oldest first, precede the place where a part ended; None for the whole page.
    """

    limit: int
    direction: Literal["newer", "older"]
    token: str | None
    place: int | None = None

    @classmethod
    def parse(cls, request: PageRequest) -> _Part:
        """Return what a request's token stands for.

        Raises:
            ValueError: It is malformed.
        """
        token = request.token
        if token is None or not token.startswith(_PART):
            return cls(request.limit, request.direction, token)
        try:
            limit, direction, token, place = orjson.loads(token.removeprefix(_PART))
        except ValueError:
            limit = direction = place = None
        if (
            type(limit) is int
            and 0 < limit <= request.limit
            and isinstance(token, str)
            and (direction == request.direction or (direction in ("newer", "older") and place is not None))
            and (place is None or (type(place) is int and 0 <= place <= limit))
        ):
            return cls(limit, direction, token, place)
        raise ValueError("The token is malformed: pass on what an earlier page returned.")

    def encode(self) -> str:
        return _PART + orjson.dumps(list(self)).decode()


_PART = "part:"


def _page(store: BaseLogStore, request: PageRequest) -> Page:
    part = _Part.parse(request)
    found = _fetch(store, request, part)
    entries = _entries(found)
    while part.token is None and (number := len(request.fitting(entries))) < len(entries):
        part = part._replace(limit=number)
        found = _fetch(store, request, part)
        entries = _entries(found)

    if request.direction == "newer":
        begin = min(part.place or 0, len(entries))
        end = begin + len(request.fitting(entries[begin:]))
    else:
        end = len(entries) if part.place is None else min(part.place, len(entries))
        begin = end - len(request.fitting(entries[:end]))

    def beyond(cursor: str | None, direction: Literal["newer", "older"]) -> str | None:
        if cursor is None or part.limit == request.limit:
            return cursor
        return _Part(part.limit, direction, cursor).encode()

    return Page(
        entries[begin:end],
        beyond(found.before, "older") if begin == 0 else part._replace(place=begin).encode(),
        beyond(found.after, "newer") if end == len(entries) else part._replace(place=end).encode(),
    )


def _fetch(store: BaseLogStore, request: PageRequest, part: _Part) -> LogsEntriesResponse:
    is_newer = part.direction == "newer"
    start = None if part.token is not None else "oldest" if is_newer else "newest"
    found = fetch_page(
        store,
        as_its_own(request.logs, store),
        start=start,
        limit=part.limit,
        before=None if is_newer else part.token,
        after=part.token if is_newer else None,
        filter_=request.filter,
    )
    if len(found.items) > part.limit or not all(
        token is None or isinstance(token, str) for token in (found.before, found.after)
    ):
        # Cutting the page would lose entries, since its cursors continue after all of them.
        raise LogStoreError(f"Log store '{store.name}' returned a page that does not match the request.")
    return found


def _page_from_start(store: BaseLogStore, request: PageRequest) -> Page:
    """Return a page of a log store that reads only from a stream's start: read all of it, and cut out the page."""
    token = request.token
    if token is not None and not _PLACE.fullmatch(token):
        raise ValueError("The token is malformed: pass on what an earlier page returned.")
    found = _entries(fetch_page(store, as_its_own(request.logs, store), start="oldest", filter_=request.filter))
    if request.direction == "newer":
        begin = int(token or 0)
        end = begin + len(request.fitting(found[begin:]))
    else:
        end = len(found) if token is None else min(int(token), len(found))
        begin = end - len(request.fitting(found[:end]))
    entries = found[begin:end]
    return Page(entries, str(begin) if begin > 0 and entries else None, str(end) if entries else None)


def _entries(found: LogsEntriesResponse) -> list[ReadEntry]:
    return [ReadEntry(entry, None) for entry in found.items]
