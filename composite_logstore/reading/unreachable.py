"""Which children could not be read a moment ago, so that the next page need not wait for them again.

The process remembers it, since ZenML's server makes a new log store for each page. It remembers it for each user: a
child that refuses one user may answer another, and its error may be meant for that user alone.
"""

from __future__ import annotations

from uuid import UUID

from composite_logstore import clock, server
from composite_logstore.delivery.backoff import bounded_seconds
from composite_logstore.zenml import LogStoreError, LogStoreRateLimitError

REMEMBERED_SECONDS = 30.0
"""How long a child is not asked again after an error that does not say how long to wait."""

# Threads need no lock: each access is one operation of the dictionary.
_errors: dict[tuple[UUID, str, UUID | None], tuple[float, str]] = {}


def remembered(store_id: UUID, child: str) -> str | None:
    """Return why the child could not be read a moment ago; None if it could, or if that is too long ago."""
    until, message = _errors.get((store_id, child, server.reader()), (0.0, ""))
    return message if clock.current.now() < until else None


def remember(store_id: UUID, child: str, error: LogStoreError) -> None:
    """Remember that the child could not be read."""
    seconds = REMEMBERED_SECONDS
    if isinstance(error, LogStoreRateLimitError):
        seconds = bounded_seconds(error.retry_after) or seconds
    _errors[store_id, child, server.reader()] = (clock.current.now() + seconds, str(error))


def forget(store_id: UUID, child: str) -> None:
    """Forget the error of a child that has answered."""
    _errors.pop((store_id, child, server.reader()), None)
