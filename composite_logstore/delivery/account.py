"""The account of a child: how many of its events were delivered, rejected or dropped."""

from __future__ import annotations

from collections import Counter
from collections.abc import MutableMapping
from dataclasses import dataclass

_MOST_REASONS = 20


@dataclass(frozen=True)
class ChildStats:
    """The account of a child. At every moment `accepted = delivered + rejected + dropped + pending`.

    Attributes:
        state: `healthy`, `retrying` or `unavailable`.
        accepted: Events meant for the child.
        delivered: Events that the backend has taken.
        rejected: Events that the backend refused for good.
        dropped: Events that were lost before the backend answered: a queue or the spool was full.
        pending: Events that wait in memory or on disk, or are being exported.
        shortened: Delivered events that the exporter had to shorten for the backend.
        rejected_reasons: A reason → how many events were rejected for it.
        last_error: The last problem, None if there was none.
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
        """Return the sum of two accounts of one child: of this process, and of a journal that it recovers."""
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
