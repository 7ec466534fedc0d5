"""`fetch()`: checks what is asked for, and answers it from the primary or from a child that stands in for it.

See the theory of operation at the head of the package.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any
from uuid import UUID, uuid4

from zenml.enums import LoggingLevels
from zenml.exceptions import DoesNotExistException, IllegalOperationError
from zenml.models import LogsResponse

from composite_logstore import clock, secret_references
from composite_logstore.backend import Page, PageRequest, ReadEntry, Reader, UnavailableError
from composite_logstore.bounds import Bounds
from composite_logstore.config import CompositeLogStoreConfig
from composite_logstore.reading import gaps, nesting, nothing, unreachable
from composite_logstore.reading.cursor import Cursor, Direction, SeenEvents, within_bounds, without_duplicates
from composite_logstore.zenml import (
    LogEntry,
    LogsEntriesFilter,
    LogsEntriesResponse,
    LogStoreError,
    LogStoreRateLimitError,
    LogStoreUnavailableError,
)

LONGEST_SECONDS = 10.0
"""How long one page looks for entries before it returns without any, with a cursor from which to continue."""

LONGEST_SEARCH = 2_000
"""In characters: each cursor repeats the text that is searched for."""


@dataclass(frozen=True)
class Pages:
    """Reads the pages of a log store's streams.

    Attributes:
        store_id: The log store's ID.
        config: Its settings.
        owner: Its owner, whose secrets the readers use.
        changed: When these settings were last changed.
        resolve_limit: Returns the size of a page for the limit that was asked for, as ZenML bounds it.
    """

    store_id: UUID
    config: CompositeLogStoreConfig
    owner: UUID | None
    changed: datetime
    resolve_limit: Callable[[int | None], int]

    def fetch(
        self,
        logs: LogsResponse,
        start: str | None,
        limit: int | None,
        before: str | None,
        after: str | None,
        filter_: LogsEntriesFilter | None,
    ) -> LogsEntriesResponse:
        """Return one page. The arguments and the errors are those of `CompositeLogStore.fetch`."""
        if before is not None and after is not None:
            raise ValueError("Pass only one of `before` and `after`.")
        if start not in (None, "oldest", "newest"):
            raise ValueError("`start` must be `oldest` or `newest`.")
        if filter_ is not None and not isinstance(filter_, LogsEntriesFilter):
            raise ValueError("`filter_` must be a `LogsEntriesFilter`.")
        filter_ = filter_ or LogsEntriesFilter()
        if len(filter_.search or "") > LONGEST_SEARCH:
            raise ValueError(f"`search` must have at most {LONGEST_SEARCH} characters.")
        size = None if limit is None else self._page_size(limit)
        text = before if before is not None else after
        if text is None:
            direction: Direction = "newer" if start == "oldest" else "older"
            return self._first_page(PageRequest(logs, direction, None, size or self.resolve_limit(None), filter_))
        cursor = Cursor.decode(text)
        self._check_origin(cursor, logs, "older" if before is not None else "newer")
        _check_agreement(cursor, start, size, filter_)
        request = PageRequest(logs, cursor.direction, cursor.token, cursor.limit, cursor.filter)
        return self._page(cursor.child, request, cursor)

    @property
    def _children(self) -> list[str]:
        """The names of the children that answer, in the order in which they are asked."""
        return [self.config.primary, *self.config.fetch_fallback]

    def _page_size(self, limit: Any) -> int:
        """Return how many entries a page has at most, whatever was asked for."""
        try:
            number = operator.index(limit)
        except TypeError:
            number = 0
        if isinstance(limit, bool) or number <= 0:
            raise ValueError("`limit` must be a positive integer.")
        return self.resolve_limit(number)

    def _check_origin(self, cursor: Cursor, logs: LogsResponse, direction: Direction) -> None:
        """Raise `ValueError` unless a page of this stream can have returned the cursor."""
        if (cursor.log_store_id, cursor.logs_id, cursor.direction) != (self.store_id, logs.id, direction):
            raise ValueError("The cursor is not one for this log store, stream and direction.")
        if cursor.child not in {child.name for child in self.config.enabled_children}:
            raise ValueError(f"The cursor was made by child '{cursor.child}', which no longer exists. Begin anew.")
        if cursor.child not in self._children:
            raise ValueError(
                f"The cursor was made by child '{cursor.child}', which is neither 'primary' nor in 'fetch_fallback'. "
                f"Begin anew."
            )
        if self._page_size(cursor.limit) != cursor.limit or len(cursor.filter.search or "") > LONGEST_SEARCH:
            raise ValueError("The cursor is malformed: no page has such a `limit` or `search`. Begin anew.")

    def _first_page(self, request: PageRequest) -> LogsEntriesResponse:
        """Read a first page from the primary, or from the first child that answers in its place."""
        names = self._children
        failures: list[str] = []
        may_pass = False  # Whether a child may answer if it is asked again later.
        for name in names:
            if failures and not nesting.may_go_on():
                may_pass = True
                failures.append(f"'{name}' was not asked, since the others took too long")
                break
            # The last child is asked even if it has just failed: no other can answer in its place.
            if name != names[-1] and (why := unreachable.remembered(self.store_id, name)) is not None:
                may_pass = True
            else:
                try:
                    page = self._page(name, request, None) if failures else self._page_of_primary(request)
                except LogStoreError as error:
                    if len(names) == 1:
                        raise
                    may_pass = may_pass or isinstance(error, LogStoreUnavailableError | LogStoreRateLimitError)
                    why = str(error)
                except (ValueError, DoesNotExistException) as error:
                    # It would be the same in every child; but a fallback may lack what the primary has.
                    if not failures:
                        raise
                    why = str(error)
                else:
                    if failures:
                        page.items = [_fallback_notice(failures, name, page.items), *page.items]
                    return page
            failures.append(f"'{name}' could not be read: {why}")
        raise (LogStoreUnavailableError if may_pass else LogStoreError)(_sentence(failures))

    def _page_of_primary(self, request: PageRequest) -> LogsEntriesResponse:
        """Read a first page from the primary. If it has no entries, tell silence from logs that are elsewhere."""
        name, logs = self.config.primary, request.logs
        absent: DoesNotExistException | None = None
        try:
            page = self._page(name, request, None)
            if page.items or page.before or page.after or request.filter != LogsEntriesFilter():
                return page
        except DoesNotExistException as error:
            absent, page = error, LogsEntriesResponse(items=[])
        is_finished = gaps.is_finished(logs)
        events = nothing.logged_events(logs) if is_finished else None
        if is_finished and events != 0:
            notice = nothing.explain(logs, self.config, name, self.changed, None if absent else events)
            page.items = [notice] if notice is not None else []
        if absent is not None and events != 0 and not page.items:
            raise absent
        return page

    def _page(self, name: str, request: PageRequest, cursor: Cursor | None) -> LogsEntriesResponse:
        """Read one page from one child, and remember for the process whether the child could be read."""
        try:
            page = self._read(name, request, cursor)
        except (ValueError, DoesNotExistException):
            raise
        except Exception as raised:
            error = raised
            if isinstance(error, IllegalOperationError):
                error = LogStoreError("ZenML does not let you read what it names")
            if not isinstance(error, LogStoreError):
                error = LogStoreError(f"its reader has a defect: {type(error).__name__}")
            if isinstance(error, LogStoreUnavailableError | LogStoreRateLimitError):
                unreachable.remember(self.store_id, name, error)
            raise (error if cursor is None else _not_continued(name, error)) from raised
        unreachable.forget(self.store_id, name)
        return page

    def _read(self, name: str, request: PageRequest, cursor: Cursor | None) -> LogsEntriesResponse:
        try:
            reader = secret_references.resolve(self.config.child(name), self.owner).create_reader()
        except (UnavailableError, ImportError) as error:
            raise LogStoreUnavailableError(f"Child '{name}' cannot be read: {error}") from error
        seen: SeenEvents = cursor.seen if cursor else {}
        from_oldest = request.direction == "newer" and (cursor is None or cursor.from_oldest)
        try:
            give_up_at = clock.current.now() + LONGEST_SECONDS
            page, fresh = _read_until_fresh(reader, request, seen, give_up_at)
            found = gaps.Gaps()
            if gaps.shows_all(self.config.child(name), request.filter):
                reaches_oldest = from_oldest if request.direction == "newer" else page.older is None
                open_gaps = gaps.find_gaps(fresh, seen, request.direction, reaches_oldest)
                if open_gaps and gaps.is_finished(request.logs):
                    found = gaps.search_child(open_gaps, fresh, reader, request.logs, give_up_at)
        finally:
            reader.close()

        def cursor_to(direction: Direction, token: str | None) -> str | None:
            if token is None:
                return None
            passed = seen
            if direction != request.direction:
                # A page in the other direction comes next: this page alone has been passed in it.
                passed = {}
                without_duplicates(fresh, direction, passed)
            kept = within_bounds(passed, direction)
            return Cursor(
                log_store_id=self.store_id,
                logs_id=request.logs.id,
                child=name,
                direction=direction,
                limit=request.limit,
                filter=request.filter,
                token=token,
                seen=kept,
                from_oldest=from_oldest and direction == "newer" and len(kept) == len(passed),
            ).encode()

        return LogsEntriesResponse(
            items=gaps.with_notices(fresh, found, name, request.logs),
            before=cursor_to("older", page.older),
            after=cursor_to("newer", page.newer),
        )


def _check_agreement(cursor: Cursor, start: str | None, limit: int | None, filter_: LogsEntriesFilter) -> None:
    """Raise `ValueError` if an argument contradicts the cursor."""
    if start is not None and (start == "oldest") != (cursor.direction == "newer"):
        raise ValueError("`start` conflicts with the cursor.")
    if limit is not None and limit != cursor.limit:
        raise ValueError("`limit` conflicts with the cursor.")
    for name, value in filter_.model_dump(exclude_none=True).items():
        if value != getattr(cursor.filter, name):
            raise ValueError(f"`{name}` conflicts with the cursor.")


def _read_until_fresh(
    reader: Reader, request: PageRequest, seen: SeenEvents, give_up_at: float
) -> tuple[Page, list[ReadEntry]]:
    """Read pages until one has entries that were not returned before; return it and these entries.

    A page without entries is not the end where it has a token: a reader looks through a bounded part of a stream at a
    time, which may contain duplicates alone. But no request may take minutes.
    """
    request = replace(request, limit=min(request.limit, reader.max_page_size), most_bytes=Bounds.ENTRIES_BYTES)
    while True:
        page = _bounded_page(reader, request)
        fresh = without_duplicates(page.entries, request.direction, seen)
        token = page.newer if request.direction == "newer" else page.older
        if fresh or token in (None, request.token) or clock.current.now() >= give_up_at:
            return page, fresh
        request = replace(request, token=token)


def _bounded_page(reader: Reader, request: PageRequest) -> Page:
    """Read a page within the bounds, from a reader that may not keep them: then once more, with fewer entries."""
    page = reader.read(request)
    while (number := len(request.fitting(page.entries))) < min(len(page.entries), request.limit):
        request = replace(request, limit=number)
        page = reader.read(request)
    return page


def _not_continued(name: str, error: LogStoreError) -> LogStoreError:
    """Return the error of a page that a cursor continues: no other child can know what the cursor means."""
    message = (
        f"Child '{name}', which made the cursor, could not be read: {str(error).rstrip('.')}. Try again later, or "
        f"begin anew without a cursor."
    )
    if isinstance(error, LogStoreRateLimitError):
        return LogStoreRateLimitError(message, retry_after=error.retry_after)
    return (LogStoreUnavailableError if isinstance(error, LogStoreUnavailableError) else LogStoreError)(message)


def _fallback_notice(failures: list[str], name: str, entries: Sequence[LogEntry]) -> LogEntry:
    """Return the entry that says which child answered, and why not the others."""
    return LogEntry(
        id=uuid4(),
        name="composite_logstore",
        level=LoggingLevels.WARNING,
        timestamp=entries[0].timestamp if entries else None,
        message=f"{_sentence(failures)} The entries below come from child '{name}'.",
    )


def _sentence(failures: list[str]) -> str:
    return f"Child {'; child '.join(failure.rstrip('.') for failure in failures)}."
