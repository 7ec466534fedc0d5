"""What ZenML has from 0.97 on, for the releases before: pages, filters, errors; and the lists of those releases."""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any
from uuid import NAMESPACE_URL, UUID, uuid5

from pydantic import BaseModel, BeforeValidator, Field, field_validator, model_validator
from zenml.enums import LoggingLevels
from zenml.exceptions import DoesNotExistException, ZenMLBaseException
from zenml.utils.time_utils import to_utc_timezone

from composite_logstore import clock
from composite_logstore.zenml import LogEntry

if TYPE_CHECKING:
    from zenml.log_stores import BaseLogStore
    from zenml.models import LogsRequest, LogsResponse
    from zenml.zen_stores.base_zen_store import BaseZenStore

LONGEST_SECONDS = 20.0
"""How long a list looks for entries before it ends, in seconds."""

MOST_CHARACTERS = 64 * 1024 * 1024
"""About the most characters of the messages of a list."""


class LogStoreError(ZenMLBaseException):
    """A backend refuses a request, or returns what is no log."""


class LogStoreUnavailableError(LogStoreError):
    """A backend cannot be reached at present."""


class LogStoreRateLimitError(LogStoreError):
    """A backend gets too many requests."""

    def __init__(self, message: str | None = None, *, retry_after: int | None = None) -> None:
        """Keep when to ask again.

        Args:
            message: What is wrong.
            retry_after: In how many seconds to ask again, if it is known.
        """
        super().__init__(message)
        self.retry_after = retry_after


def parse_log_level(value: Any) -> Any:
    """Return the level that a name or the text of a number stands for, other values as they are.

    Raises:
        ValueError: The text is neither.
    """
    if not isinstance(value, str):
        return value
    text = value.strip().upper()
    if text in LoggingLevels.__members__:
        return LoggingLevels[text]
    if text.isdigit():
        return int(text)
    raise ValueError(f"'{value}' is not a log level; use one of {', '.join(LoggingLevels.__members__)}, or a number")


NamedLoggingLevel = Annotated[LoggingLevels, BeforeValidator(parse_log_level)]


class LogsEntriesFilter(BaseModel):
    """Which entries to return.

    Attributes:
        search: Text that the message contains.
        level: The lowest level.
        since: The time of the oldest entry. Without a zone, it is in UTC.
        until: The time of the newest entry.
    """

    search: str | None = None
    level: NamedLoggingLevel | None = None
    since: datetime | None = None
    until: datetime | None = None

    @field_validator("since", "until")
    @classmethod
    def _in_utc(cls, value: datetime | None) -> datetime | None:
        return None if value is None else to_utc_timezone(value)

    @model_validator(mode="after")
    def _in_order(self) -> LogsEntriesFilter:
        if self.since and self.until and self.since > self.until:
            raise ValueError("`since` must be earlier than `until`.")
        return self


class LogsEntriesResponse(BaseModel):
    """A page of entries.

    Attributes:
        items: The entries, oldest first.
        before: A cursor towards older entries, None if there are none.
        after: A cursor towards newer entries, None if there are none.
    """

    items: list[LogEntry] = Field(default_factory=list)
    before: str | None = None
    after: str | None = None


def listed(fetch: Callable[..., Any]) -> Callable[..., list[LogEntry]]:
    """Return a `fetch` that returns a list as this release of ZenML wants it, from one that returns pages."""
    from zenml.log_stores.base_log_store import BaseLogStore

    # Some releases take the limit before the times, some after them.
    signature = inspect.signature(BaseLogStore.fetch)

    @functools.wraps(fetch)
    def fetch_list(self: BaseLogStore, /, *arguments: Any, **keywords: Any) -> list[LogEntry]:
        asked = signature.bind_partial(self, *arguments, **keywords).arguments
        if "logs_model" not in asked:
            raise TypeError("fetch() needs 'logs_model'")
        since, until = asked.get("start_time"), asked.get("end_time")
        return _list(functools.partial(fetch, self), asked["logs_model"], asked.get("limit"), since, until)

    fetch_list.__signature__ = signature  # type: ignore[attr-defined]
    del fetch_list.__wrapped__
    return fetch_list


def _list(
    fetch: Callable[..., Any],
    logs: LogsResponse,
    limit: int | None,
    since: datetime | None,
    until: datetime | None,
) -> list[LogEntry]:
    """Return the oldest entries of a stream, and if there are more, one that says so."""
    if limit is not None:
        if isinstance(limit, bool) or operator.index(limit) <= 0:
            raise ValueError("`limit` must be a positive integer.")
        limit = operator.index(limit)
    give_up_at = clock.current.now() + LONGEST_SECONDS
    page = fetch(logs, "oldest", limit, None, None, LogsEntriesFilter(since=since, until=until))
    entries = list(page.items)
    characters = _characters(page.items)
    why, cursor = "", None
    # Without new entries, a reader returns the same cursor again.
    while page.after not in (None, cursor):
        # At the limit exactly, only the next page tells whether there are more.
        if limit is not None and len(entries) > limit:
            break
        if characters >= MOST_CHARACTERS:
            why = (
                f"There may be more entries: these have more than {MOST_CHARACTERS // 1024 // 1024} million characters"
            )
            break
        if clock.current.now() >= give_up_at:
            why = f"There may be more entries: reading these took longer than {LONGEST_SECONDS:.0f} s"
            break
        try:
            cursor = page.after
            page = fetch(logs, after=cursor)
        except (LogStoreError, DoesNotExistException, ValueError) as error:
            why = f"There may be more entries: reading further failed: {error}"
            break
        entries += page.items
        characters += _characters(page.items)
    if limit is not None and len(entries) > limit:
        entries = entries[:limit]
        why = f"There are more entries than the {limit} that were asked for"
    return [*entries, _notice(logs, entries, why)] if why else entries


def _characters(entries: list[LogEntry]) -> int:
    return sum(len(entry.message) for entry in entries)


def _notice(logs: LogsResponse, entries: list[LogEntry], why: str) -> LogEntry:
    return LogEntry(
        # The same ID each time that the list is read.
        id=uuid5(NAMESPACE_URL, f"composite-logstore/{logs.id}/{len(entries)}/more"),
        name="composite_logstore",
        level=LoggingLevels.WARNING,
        timestamp=entries[-1].timestamp if entries else None,
        message=(
            f"{why.rstrip('.')}. `composite-logstore logs` shows all of them, and "
            f"ZenML's dashboard does from ZenML 0.97 on."
        ),
    )


def page_of_list(
    store: BaseLogStore,
    logs: LogsResponse,
    start: str | None = None,
    limit: int | None = None,
    before: str | None = None,
    after: str | None = None,
    filter_: Any = None,
) -> Any:
    """Return the list of a log store as a page without cursors.

    Raises:
        ValueError: A cursor or a filter is given that lists do not know.
    """
    from zenml.log_stores.artifact.artifact_log_store import ArtifactLogStore

    from composite_logstore.zenml import LOGS_MAX_ENTRIES_PER_REQUEST as MOST

    if before is not None or after is not None:
        raise ValueError("The log store has no cursors.")
    wanted = filter_ or LogsEntriesFilter()
    if wanted.search or wanted.level:
        raise ValueError("The log store filters neither by `search` nor by `level`.")
    if (wanted.since or wanted.until) and isinstance(store, ArtifactLogStore):
        # It would ignore them.
        raise ValueError("The log store does not filter by `since` or `until`.")
    arguments: dict[str, Any] = {"start_time": wanted.since, "end_time": wanted.until}
    entries: Any = store.fetch(logs_model=logs, limit=min(limit or MOST, MOST), **arguments)
    return LogsEntriesResponse(items=list(entries))


def add_logs(zen_store: BaseZenStore, request: LogsRequest, run_id: UUID, step_id: UUID | None) -> None:
    """Make a stream by an update of its run or step.

    Args:
        zen_store: ZenML's store.
        request: The stream.
        run_id: The run.
        step_id: Its step; None for a stream of the run.
    """
    from zenml.models import PipelineRunUpdate, StepRunUpdate

    added: dict[str, Any] = {"add_logs": [request]}
    if step_id is None:
        zen_store.update_run(run_id=run_id, run_update=PipelineRunUpdate(**added))
    else:
        zen_store.update_run_step(step_run_id=step_id, step_run_update=StepRunUpdate(**added))
