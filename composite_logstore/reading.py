"""Reading: `fetch()` answered from the primary, or from what there is to fall back on, page by page.

Here are the checks of ZenML's page contract, the cursors, and the dropping of copies. A backend's reader
knows its own tokens alone.
"""

from __future__ import annotations

import base64
import binascii
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal
from uuid import UUID, uuid4

from pydantic import BaseModel, ConfigDict, Field
from zenml.enums import LoggingLevels
from zenml.exceptions import (
    DoesNotExistException,
    IllegalOperationError,
    LogStoreError,
    LogStoreRateLimitError,
    LogStoreUnavailableError,
)
from zenml.models import LogEntry, LogsEntriesFilter, LogsEntriesResponse

from composite_logstore import clock, missing, nesting, secrets, server
from composite_logstore.backend import Event, PageRequest, ReadEntry, UnavailableError
from composite_logstore.backoff import bounded_seconds

if TYPE_CHECKING:
    from zenml.models import LogsResponse

    from composite_logstore.log_store import CompositeLogStore

REMEMBERED_SECONDS = 30.0
"""How long the process remembers that a child could not be read: on the server every page is a new store."""

LONGEST_SECONDS = 10.0
"""How long one page looks for entries before it returns without any, with a cursor to go on from."""

# What one reader may not read another may, and what their errors say is for them.
_unreadable: dict[tuple[UUID, str, UUID | None], tuple[float, str]] = {}
_unreadable_lock = threading.Lock()


class Cursor(BaseModel):
    """Where a page ended, and everything that its continuation has to agree with.

    Attributes:
        child: The child that made it: its token means nothing to another.
        seen: A writer → the last sequence number returned in the direction. A redelivery repeats a
            contiguous run, so this is enough to drop what arrived twice.
        from_oldest: Whether all pages since the oldest entry came before, so that `seen` has every writer.
    """

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    version: Literal[1] = 1
    log_store_id: UUID
    logs_id: UUID
    child: str
    direction: Literal["newer", "older"]
    limit: int = Field(gt=0)
    filter: LogsEntriesFilter
    token: str
    seen: dict[str, int]
    from_oldest: bool = False

    def encode(self) -> str:
        """Return the cursor as ZenML passes it on, safe in a URL."""
        return base64.urlsafe_b64encode(self.model_dump_json(exclude_none=True).encode()).decode("ascii")

    @classmethod
    def decode(cls, text: str) -> Cursor:
        """Return the cursor that was encoded.

        Raises:
            ValueError: It is malformed.
        """
        try:
            return cls.model_validate_json(base64.b64decode(text.encode("ascii"), altchars=b"-_", validate=True))
        except (binascii.Error, UnicodeError, ValueError):
            raise ValueError("The cursor is malformed. Pass `before` or `after` as a page returned it.") from None


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
    text = before if before is not None else after
    if text is not None:
        cursor = _checked(Cursor.decode(text), store, logs, start, limit, before is not None, filter_)
        return _read(store, logs, cursor.child, cursor.direction, cursor.limit, cursor.filter, cursor)
    direction: Literal["newer", "older"] = "newer" if start == "oldest" else "older"
    return _read_first(store, logs, direction, store.resolve_limit(limit), filter_ or LogsEntriesFilter())


def _checked(
    cursor: Cursor,
    store: CompositeLogStore,
    logs: LogsResponse,
    start: str | None,
    limit: int | None,
    is_before: bool,
    filter_: LogsEntriesFilter | None,
) -> Cursor:
    """Return the cursor if it belongs here and the other arguments agree with it."""
    direction = "older" if is_before else "newer"
    if (cursor.log_store_id, cursor.logs_id, cursor.direction) != (store.id, logs.id, direction):
        raise ValueError("The cursor is not one for this log store, stream and direction.")
    if cursor.child not in {child.name for child in store.config.enabled_children}:
        raise ValueError(f"The cursor was made by child '{cursor.child}', which is no longer there. Begin anew.")
    if start is not None and (start == "oldest") != (direction == "newer"):
        raise ValueError("`start` conflicts with the cursor.")
    if limit is not None and store.resolve_limit(limit) != cursor.limit:
        raise ValueError("`limit` conflicts with the cursor.")
    for name, value in (filter_ or LogsEntriesFilter()).model_dump(exclude_none=True).items():
        if value != getattr(cursor.filter, name):
            raise ValueError(f"`{name}` conflicts with the cursor.")
    return cursor


def _read_first(
    store: CompositeLogStore,
    logs: LogsResponse,
    direction: Literal["newer", "older"],
    limit: int,
    filter_: LogsEntriesFilter,
) -> LogsEntriesResponse:
    """Read a first page from the primary, or from the first child that answers in its place."""
    names = [store.config.primary, *store.config.fetch_fallback]
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
    direction: Literal["newer", "older"],
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
    direction: Literal["newer", "older"],
    limit: int,
    filter_: LogsEntriesFilter,
    cursor: Cursor | None,
) -> LogsEntriesResponse:
    try:
        reader = secrets.resolve(store.config.child(name), store.user).create_reader()
    except (UnavailableError, ImportError) as error:
        raise LogStoreUnavailableError(f"Child '{name}' cannot be read: {error}") from error
    try:
        give_up_at = clock.current.now() + LONGEST_SECONDS
        token = cursor.token if cursor else None
        seen = dict(cursor.seen) if cursor else {}
        size = min(limit, reader.max_page_size)
        while True:
            seen_before = dict(seen)
            page = reader.read(PageRequest(logs, direction, token, size, filter_))
            fresh = _fresh(page.entries, direction, seen if reader.in_order else None)
            before, token = token, page.newer if direction == "newer" else page.older
            # A page without entries is not the end where it has a token: a reader looks through so much at a
            # time, and there may be nothing but copies. But no request may take minutes.
            if fresh or token in (None, before) or clock.current.now() >= give_up_at:
                break
        from_oldest = direction == "newer" and (cursor is None or cursor.from_oldest)
        holes: list[missing.Hole] = []
        if missing.takes_all(store.config.child(name), filter_):
            reaches_oldest = from_oldest if direction == "newer" else page.older is None
            neighbours = (seen_before, {}) if direction == "newer" else ({}, seen_before)
            holes = missing.find_holes(fresh, *neighbours, reaches_oldest)
            if holes:
                holes = missing.confirmed(holes, fresh, reader, logs) if missing.is_finished(logs) else []
    finally:
        reader.close()

    def cursor_to(direction: Literal["newer", "older"], token: str | None, seen: dict[str, int]) -> str | None:
        if token is None:
            return None
        return Cursor(
            log_store_id=store.id,
            logs_id=logs.id,
            child=name,
            direction=direction,
            limit=limit,
            filter=filter_,
            token=token,
            seen=seen,
            from_oldest=from_oldest and direction == "newer",
        ).encode()

    return LogsEntriesResponse(
        items=missing.with_notices(fresh, holes, name, logs),
        before=cursor_to("older", page.older, _edge(fresh, "older", seen if direction == "older" else {})),
        after=cursor_to("newer", page.newer, _edge(fresh, "newer", seen if direction == "newer" else {})),
    )


def _fresh(
    entries: Sequence[ReadEntry], direction: Literal["newer", "older"], seen: dict[str, int] | None
) -> list[ReadEntry]:
    """Return the entries without copies; note in `seen` how far each writer has come.

    Args:
        entries: Oldest first.
        direction: The way in which the pages go.
        seen: How far each writer has come on earlier pages. None where a writer's entries need not come
            in order: then only copies on the same page are known.
    """
    fresh: list[ReadEntry] = []
    known: set[Event] = set()
    for read in entries if direction == "newer" else reversed(entries):
        if read.event is not None:
            writer, sequence = read.event
            if seen is not None:
                last = seen.get(writer)
                if last is not None and (sequence <= last if direction == "newer" else sequence >= last):
                    continue
                seen[writer] = sequence
            elif read.event in known:
                continue
            known.add(read.event)
        fresh.append(read)
    return fresh if direction == "newer" else fresh[::-1]


def _edge(entries: Sequence[ReadEntry], direction: Literal["newer", "older"], seen: dict[str, int]) -> dict[str, int]:
    """Return how far each writer has come when reading goes on in this direction."""
    edge = dict(seen)
    for read in entries if direction == "newer" else reversed(entries):
        if read.event is not None:
            edge[read.event.writer] = read.event.sequence
    return edge


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
