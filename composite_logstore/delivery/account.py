"""What became of a child's events, in numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import MutableMapping
from dataclasses import dataclass

_MOST_REASONS = 20


@dataclass(frozen=True)
class ChildStats:
    """What became of the events meant for a child: `accepted = delivered + rejected + dropped + pending`.

    Attributes:
        state: `healthy`, `retrying` or `unavailable`.
        accepted: Events that were meant for the child.
        delivered: Events that its backend has taken.
        rejected: Events that its backend will never take.
        dropped: Events that gave way to newer ones in a full queue.
        pending: Events that wait, or are being exported.
        shortened: Delivered events that were too large for the backend as they were.
        rejected_reasons: A reason → how many events were rejected for it.
        last_error: The last thing that went wrong, None if nothing has.
    """

    state: str
    accepted: int
    delivered: int
    rejected: int
    dropped: int
    pending: int
    shortened: int
    rejected_reasons: dict[str, int]
    last_error: str | None

    def plus(self, other: ChildStats) -> ChildStats:
        """Return the account of both: of this process, and of what it has adopted."""
        reasons = Counter(self.rejected_reasons) + Counter(other.rejected_reasons)
        return ChildStats(
            state=self.state,
            accepted=self.accepted + other.accepted,
            delivered=self.delivered + other.delivered,
            rejected=self.rejected + other.rejected,
            dropped=self.dropped + other.dropped,
            pending=self.pending + other.pending,
            shortened=self.shortened + other.shortened,
            rejected_reasons=dict(reasons),
            last_error=self.last_error or other.last_error,
        )


def count_reason(reasons: MutableMapping[str, int], reason: str, number: int) -> None:
    """Count rejected events by reason. Only the first 20 reasons are told apart: backends may put an ID into each.

    Args:
        reasons: A reason → how many events were rejected for it.
        reason: The reason.
        number: How many more.
    """
    if number > 0:
        known = reason if reason in reasons or len(reasons) < _MOST_REASONS else "other reasons"
        reasons[known] = reasons.get(known, 0) + number
