"""The reader: reads pages through a log store's own `fetch()`."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from zenml.constants import LOGS_MAX_ENTRIES_PER_REQUEST
from zenml.exceptions import DoesNotExistException, LogStoreError, LogStoreUnavailableError

from composite_logstore import Page, PageRequest, ReadEntry, reading_through
from composite_logstore_component.components import ComponentError, find, load
from composite_logstore_component.streams import as_its_own, extends_artifact

if TYPE_CHECKING:
    from zenml.log_stores import ArtifactLogStore, BaseLogStore
    from zenml.models import ComponentResponse, LogsEntriesResponse


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
    try:
        return _page_from_start(store, request) if extends_artifact(store) else _page(store, request)
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


def _page(store: BaseLogStore, request: PageRequest) -> Page:
    is_newer = request.direction == "newer"
    start = None if request.token is not None else "oldest" if is_newer else "newest"
    found = store.fetch(
        as_its_own(request.logs, store),
        start=start,
        limit=request.limit,
        before=None if is_newer else request.token,
        after=request.token if is_newer else None,
        filter_=request.filter,
    )
    entries = _entries(found)
    tokens = (found.before, found.after)
    if len(entries) > request.limit or not all(token is None or isinstance(token, str) for token in tokens):
        # Cutting the page would lose entries, since its cursors continue after all of them.
        raise LogStoreError(f"Log store '{store.name}' returned a page that does not match the request.")
    return Page(entries, *tokens)


def _page_from_start(store: ArtifactLogStore, request: PageRequest) -> Page:
    """Return a page of a log store that reads only from a stream's start: read all of it, and cut out the page."""
    token = request.token
    if token is not None and not _PLACE.fullmatch(token):
        raise ValueError("The token is malformed: pass on what an earlier page returned.")
    found = _entries(store.fetch(as_its_own(request.logs, store), start="oldest", filter_=request.filter))
    if request.direction == "newer":
        begin = int(token or 0)
        end = min(begin + request.limit, len(found))
    else:
        end = len(found) if token is None else min(int(token), len(found))
        begin = max(0, end - request.limit)
    entries = found[begin:end]
    return Page(entries, str(begin) if begin > 0 and entries else None, str(end) if entries else None)


def _entries(found: LogsEntriesResponse) -> list[ReadEntry]:
    return [ReadEntry(entry, None) for entry in found.items]
