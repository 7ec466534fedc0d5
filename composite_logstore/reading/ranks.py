"""The rank of an entry: where a reader tells it, and how ZenML shows it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from composite_logstore.zenml import LogEntry


def rank_of(entry: LogEntry) -> int | None:
    """Return the rank of the process that wrote an entry; None if it has none, or the backend does not tell it.

    ZenML's entries have no place for it: a backend's reader returns entries of a class of its own, with a `rank`.

    Examples:
        >>> [rank_of(entry) for stream, entry in tail("train-1", step="fit").entries()]
        [None, None, None]
    """
    rank = getattr(entry, "rank", None)
    return rank if type(rank) is int else None


def with_rank_shown(entry: LogEntry) -> LogEntry:
    """Return an entry for ZenML: if it has a rank, one of ZenML's own class, whose message begins with the rank.

    As that has no `rank`, a log store that passes it on to another one does not show the rank twice.
    """
    rank = rank_of(entry)
    if rank is None:
        return entry
    from composite_logstore.zenml import LogEntry

    # Where a message is cut into several chunks, the first one has its beginning.
    label = f"[rank {rank}] " if entry.chunk_index == 0 else ""
    return LogEntry(**entry.model_dump() | {"message": label + entry.message})
