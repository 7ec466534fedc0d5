"""Reading: `fetch()` answered from the primary, or from what there is to fall back on, page by page.

Here are the checks of ZenML's page contract, and the dropping of duplicates. A backend's reader knows its own
tokens alone.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

from zenml.enums import LoggingLevels
from zenml.exceptions import (
    DoesNotExistException,
    IllegalOperationError,
    LogStoreError,
    LogStoreRateLimitError,
    LogStoreUnavailableError,
)
from zenml.models import LogEntry, LogsEntriesFilter, LogsEntriesResponse

from composite_logstore import clock, secret_references, server
from composite_logstore.backend import Event, PageRequest, ReadEntry, UnavailableError
from composite_logstore.delivery.backoff import bounded_seconds
from composite_logstore.parity.intervals import Intervals
from composite_logstore.reading import gaps, nesting
from composite_logstore.reading.cursor import Cursor, Direction, SeenEvents, within_bounds

if TYPE_CHECKING:
    from zenml.models import LogsResponse

    from composite_logstore.log_store import CompositeLogStore

REMEMBERED_SECONDS = 30.0
"""How long the process remembers that a child could not be read: on the server every page is a new store."""

LONGEST_SECONDS = 10.0
"""How long one page looks for entries before it returns without any, with a cursor to go on from."""

LONGEST_SEARCH = 2_000
"""In characters: each cursor repeats what is searched for."""

# What one reader may not read another may, and what their errors say is for them.
_unreadable: dict[tuple[UUID, str, UUID | None], tuple[float, str]] = {}
_unreadable_lock = threading.Lock()


def fetch(
    store: CompositeLogStore,
    logs: LogsResponse,
    start: str | None,
    limit: int | None,
    before: str | None,
    after: str | None,
    filter_: LogsEntriesFilter | None,
) -> LogsEntriesResponse:
    """Return one page. The arguments and what is raised are those of `CompositeLogStore.fetch`."""
    if not store.has(logs):
        raise ValueError(
            "logs_model.log_store_id does not match the id of the log store. These entries were collected by "
            "another log store, which is the one that can read them back."
        )
    if before is not None and after is not None:
        raise ValueError("Pass only one of `before` and `after`.")
    if start not in (None, "oldest", "newest"):
        raise ValueError("`start` must be `oldest` or `newest`.")
    if filter_ is not None and not isinstance(filter_, LogsEntriesFilter):
        raise ValueError("`filter_` must be a `LogsEntriesFilter`.")
    if filter_ is not None and filter_.search and len(filter_.search) > LONGEST_SEARCH:
        raise ValueError(f"`search` must have at most {LONGEST_SEARCH} characters.")
    size = None if limit is None else _page_size(store, limit)
    text = before if before is not None else after
    if text is not None:
        cursor = _checked(Cursor.decode(text), store, logs, start, size, before is not None, filter_)
        return _read(store, logs, cursor.child, cursor.direction, cursor.limit, cursor.filter, cursor)
    direction: Direction = "newer" if start == "oldest" else "older"
    return _read_first(store, logs, direction, size or store.resolve_limit(None), filter_ or LogsEntriesFilter())


def _page_size(store: CompositeLogStore, limit: Any) -> int:
    """Return how many entries a page has at most, whatever was asked for."""
    try:
        number = operator.index(limit)
    except TypeError:
        number = 0
    if isinstance(limit, bool) or number <= 0:
        raise ValueError("`limit` must be a positive integer.")
    return store.resolve_limit(number)


def _checked(
    cursor: Cursor,
    store: CompositeLogStore,
    logs: LogsResponse,
    start: str | None,
    limit: int | None,
    is_before: bool,
    filter_: LogsEntriesFilter | None,
) -> Cursor:
    """Return the cursor if a page of this stream can have given it, and the other arguments agree with it."""
    direction = "older" if is_before else "newer"
    if (cursor.log_store_id, cursor.logs_id, cursor.direction) != (store.id, logs.id, direction):
        raise ValueError("The cursor is not one for this log store, stream and direction.")
    if cursor.child not in {child.name for child in store.config.enabled_children}:
        raise ValueError(f"The cursor was made by child '{cursor.child}', which is no longer there. Begin anew.")
    if cursor.child not in _read_children(store):
        raise ValueError(
            f"The cursor was made by child '{cursor.child}', which is neither 'primary' nor in 'fetch_fallback'. "
            f"Begin anew."
        )
    if _page_size(store, cursor.limit) != cursor.limit or len(cursor.filter.search or "") > LONGEST_SEARCH:
        raise ValueError("The cursor is malformed: no page has such a `limit` or `search`. Begin anew.")
    if start is not None and (start == "oldest") != (direction == "newer"):
        raise ValueError("`start` conflicts with the cursor.")
    if limit is not None and limit != cursor.limit:
        raise ValueError("`limit` conflicts with the cursor.")
    for name, value in (filter_ or LogsEntriesFilter()).model_dump(exclude_none=True).items():
        if value != getattr(cursor.filter, name):
            raise ValueError(f"`{name}` conflicts with the cursor.")
    return cursor


def _read_children(store: CompositeLogStore) -> list[str]:
    """Return the names of the children that answer `fetch()`, in the order in which they are asked."""
    return [store.config.primary, *store.config.fetch_fallback]


def _read_first(
    store: CompositeLogStore,
    logs: LogsResponse,
    direction: Direction,
    limit: int,
    filter_: LogsEntriesFilter,
) -> LogsEntriesResponse:
    """Read a first page from the primary, or from the first child that answers in its place."""
    names = _read_children(store)
    excuses: list[str] = []
    may_pass = False  # whether any of them may answer when it is asked again later
    for name in names:
        if excuses and not nesting.may_go_on():
            may_pass = True
            excuses.append(f"'{name}' was not asked, since the others took too long")
            break
        is_last = name == names[-1]
        excuse = None if is_last else _remembered(store.id, name)
        if excuse is None:
            try:
                page = _read(store, logs, name, direction, limit, filter_, None)
            except LogStoreError as error:
                if len(names) == 1:
                    raise
                may_pass = may_pass or isinstance(error, LogStoreUnavailableError | LogStoreRateLimitError)
                excuse = str(error)
            except (ValueError, DoesNotExistException) as error:
                # That would be the same in every child; but what stands in for another may lack what that has.
                if not excuses:
                    raise
                excuse = str(error)
            else:
                if excuses:
                    page.items = [_notice(excuses, name, page.items), *page.items]
                return page
        else:
            may_pass = True
        excuses.append(f"'{name}' could not be read: {excuse}")
    raise (LogStoreUnavailableError if may_pass else LogStoreError)(_sentence(excuses))


def _read(
    store: CompositeLogStore,
    logs: LogsResponse,
    name: str,
    direction: Direction,
    limit: int,
    filter_: LogsEntriesFilter,
    cursor: Cursor | None,
) -> LogsEntriesResponse:
    """Read one page from one child, and remember for the process whether it could be read."""
    try:
        page = _read_page(store, logs, name, direction, limit, filter_, cursor)
    except (ValueError, DoesNotExistException):
        raise
    except Exception as raised:
        error = raised
        if isinstance(error, IllegalOperationError):
            error = LogStoreError("ZenML does not let you read what it names")
        if not isinstance(error, LogStoreError):
            error = LogStoreError(f"its reader has a defect: {type(error).__name__}")
        if isinstance(error, LogStoreUnavailableError | LogStoreRateLimitError):
            _remember(store.id, name, error)
        raise (error if cursor is None else _continued_in_vain(name, error)) from raised
    _forget(store.id, name)
    return page


def _continued_in_vain(name: str, error: LogStoreError) -> LogStoreError:
    """Return the error of a page that a cursor continues: no other child can know what the cursor means."""
    message = (
        f"Child '{name}', which made the cursor, could not be read: {str(error).rstrip('.')}. Try again later, or "
        f"begin anew without a cursor."
    )
    if isinstance(error, LogStoreRateLimitError):
        return LogStoreRateLimitError(message, retry_after=error.retry_after)
    return (LogStoreUnavailableError if isinstance(error, LogStoreUnavailableError) else LogStoreError)(message)


def _read_page(
    store: CompositeLogStore,
    logs: LogsResponse,
    name: str,
    direction: Direction,
    limit: int,
    filter_: LogsEntriesFilter,
    cursor: Cursor | None,
) -> LogsEntriesResponse:
    try:
        reader = secret_references.resolve(store.config.child(name), store.user).create_reader()
    except (UnavailableError, ImportError) as error:
        raise LogStoreUnavailableError(f"Child '{name}' cannot be read: {error}") from error
    try:
        give_up_at = clock.current.now() + LONGEST_SECONDS
        token = cursor.token if cursor else None
        seen = cursor.seen if cursor else {}
        size = min(limit, reader.max_page_size)
        while True:
            page = reader.read(PageRequest(logs, direction, token, size, filter_))
            fresh = _fresh(page.entries, direction, seen)
            before, token = token, page.newer if direction == "newer" else page.older
            # A page without entries is not the end where it has a token: a reader looks through so much at a
            # time, and there may be nothing but duplicates. But no request may take minutes.
            if fresh or token in (None, before) or clock.current.now() >= give_up_at:
                break
        from_oldest = direction == "newer" and (cursor is None or cursor.from_oldest)
        found = gaps.Missing()
        if gaps.shows_all(store.config.child(name), filter_):
            reaches_oldest = from_oldest if direction == "newer" else page.older is None
            open_gaps = gaps.find_gaps(fresh, seen, direction, reaches_oldest)
            if open_gaps and gaps.is_finished(logs):
                found = gaps.looked_for(open_gaps, fresh, reader, logs, give_up_at)
    finally:
        reader.close()

    def cursor_to(way: Direction, token: str | None) -> str | None:
        if token is None:
            return None
        passed = seen
        if way != direction:
            passed = {}
            _fresh(fresh, way, passed)
        kept = within_bounds(passed, way)
        return Cursor(
            log_store_id=store.id,
            logs_id=logs.id,
            child=name,
            direction=way,
            limit=limit,
            filter=filter_,
            token=token,
            seen=kept,
            from_oldest=from_oldest and way == "newer" and len(kept) == len(passed),
        ).encode()

    return LogsEntriesResponse(
        items=gaps.with_notices(fresh, found, name, logs),
        before=cursor_to("older", page.older),
        after=cursor_to("newer", page.newer),
    )


def _fresh(entries: Sequence[ReadEntry], direction: Direction, seen: SeenEvents) -> list[ReadEntry]:
    """Return the entries that were not returned before, and note in `seen` that they are now.

    A writer's events need not come in their order, since clocks go back and are sent again what may have arrived.
    So an entry is a duplicate only if this very one was returned, whatever its number.

    Args:
        entries: Oldest first.
        direction: The way in which the pages go.
        seen: Which events were returned on earlier pages.
    """
    fresh: list[ReadEntry] = []
    writer, numbers = "", Intervals()
    reads: Iterable[ReadEntry] = map(_with_checked_event, entries)
    if direction == "older":
        # Of copies on one page the first stays where it is, from this end too: later ones need not be in their order.
        reads = reversed({read.event or place: read for place, read in enumerate(reads)}.values())
    for read in reads:
        event = read.event
        if event is not None:
            if event.writer != writer:
                writer, numbers = event.writer, seen.pop(event.writer, Intervals())
                seen[writer] = numbers
            if event.sequence in numbers:
                continue
            numbers.add(event.sequence, event.sequence)
        fresh.append(read)
    return fresh if direction == "newer" else fresh[::-1]


def _with_checked_event(read: ReadEntry) -> ReadEntry:
    """Return the entry without what a backend says of its event, if that makes no sense."""
    event = read.event and Event.of(*read.event)
    return read if event == read.event else ReadEntry(read.entry, None)


def _notice(excuses: list[str], name: str, entries: Sequence[LogEntry]) -> LogEntry:
    """Return the entry that says that another child answered."""
    return LogEntry(
        id=uuid4(),
        name="composite_logstore",
        level=LoggingLevels.WARNING,
        timestamp=entries[0].timestamp if entries else None,
        message=f"{_sentence(excuses)} The entries below come from child '{name}'.",
    )


def _sentence(excuses: list[str]) -> str:
    return f"Child {'; child '.join(excuse.rstrip('.') for excuse in excuses)}."


def _remembered(store_id: UUID, name: str) -> str | None:
    with _unreadable_lock:
        until, excuse = _unreadable.get((store_id, name, server.reader()), (0.0, ""))
        return excuse if clock.current.now() < until else None


def _remember(store_id: UUID, name: str, error: LogStoreError) -> None:
    seconds = REMEMBERED_SECONDS
    if isinstance(error, LogStoreRateLimitError):
        seconds = bounded_seconds(error.retry_after) or seconds
    with _unreadable_lock:
        _unreadable[store_id, name, server.reader()] = (clock.current.now() + seconds, str(error))


def _forget(store_id: UUID, name: str) -> None:
    with _unreadable_lock:
        _unreadable.pop((store_id, name, server.reader()), None)
