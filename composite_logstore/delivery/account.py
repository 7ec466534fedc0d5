"""The account of a child: how many of its events were delivered, rejected or dropped."""

from __future__ import annotations

from collections import Counter
from collections.abc import MutableMapping
from dataclasses import dataclass, replace
from typing import Any

from composite_logstore.spool.account import ChildAccount

_MOST_REASONS = 20
OTHER_REASONS = "other reasons"
"""What counts the events of all further reasons."""


@dataclass(frozen=True)
class ChildStats:
    """The account of a child. At every moment `accepted = delivered + rejected + dropped + withheld + pending`.

    Attributes:
        state: `healthy`, `retrying` or `unavailable`.
        accepted: Events meant for the child.
        delivered: Events that the backend has taken.
        rejected: Events that the backend refused for good.
        rejected_not_kept: Those of them that are not kept on disk, so that they cannot be sent again.
        dropped: Events that were lost before the backend answered: a queue or the spool was full.
        withheld: Events that the child's settings keep from its backend.
        pending: Events that wait in memory or on disk, or are being exported.
        shortened: Delivered events that the exporter had to shorten for the backend.
        rejected_reasons: A reason → how many events were rejected for it.
        withheld_reasons: A reason → how many events were withheld for it.
        redacted: The name of a redaction → how many delivered or rejected events it has changed.
        last_error: The last problem, None if there was none.
    """

    state: str
    accepted: int
    delivered: int
    rejected: int
    rejected_not_kept: int
    dropped: int
    withheld: int
    pending: int
    shortened: int
    rejected_reasons: dict[str, int]
    withheld_reasons: dict[str, int]
    redacted: dict[str, int]
    last_error: str | None

    def plus(self, other: ChildStats) -> ChildStats:
        """Return the sum of two accounts of one child: of this process, and of a journal that it recovers."""
        sums: dict[str, Any] = {}
        for name, value in vars(self).items():
            if isinstance(value, int):
                sums[name] = value + getattr(other, name)
            elif isinstance(value, dict):
                sums[name] = dict(Counter(value) + Counter(getattr(other, name)))
        return replace(self, **sums, last_error=self.last_error or other.last_error)

    @classmethod
    def of_agents(cls, account: ChildAccount) -> ChildStats:
        """Return the account of the events that agents have dealt with. None of them is pending."""
        counts = account._asdict()
        del counts["since"], counts["before"]
        return cls(
            accepted=account.delivered + account.rejected + account.dropped + account.withheld, pending=0, **counts
        )


def count_reason(reasons: MutableMapping[str, int], reason: str, number: int) -> None:
    """Count events by reason. Only the first 20 reasons are told apart: backends may put an ID into each.

    Args:
        reasons: A reason → how many events were rejected or withheld for it.
        reason: The reason.
        number: How many more.
    """
    if number > 0:
        known = reason if reason in reasons or len(reasons) < _MOST_REASONS else OTHER_REASONS
        reasons[known] = reasons.get(known, 0) + number


NOTHING = ChildStats("healthy", 0, 0, 0, 0, 0, 0, 0, 0, {}, {}, {}, None)
"""The account of no events."""
