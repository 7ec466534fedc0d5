"""What becomes of the events that one child's backend rejects: they are kept on disk, or counted as not kept."""

from __future__ import annotations

import time
from collections.abc import Sequence

from composite_logstore.delivery.backoff import rejection
from composite_logstore.event import LogEvent
from composite_logstore.inert import described
from composite_logstore.spool.format import RejectedEvent
from composite_logstore.spool.rejected import RejectedFolder
from composite_logstore.spool.settings import SpoolSettings


class Rejections:
    """Keeps the events that one child's backend rejects. Only the child's worker calls `keep`.

    Attributes:
        fate: What becomes of rejected events, in words.
        losses: What was lost in keeping them: a kind → a sentence about it.
    """

    def __init__(self, child: str, spool: SpoolSettings | None) -> None:
        """Touch no disk yet.

        Args:
            child: The name of the child.
            spool: Where the log store's events are on disk, None if they never are.
        """
        self.losses: dict[str, str] = {}
        self._child = child
        self._folder: RejectedFolder | None = None
        if spool is None:
            self.fate = "stats() counts them, and they are not kept, since 'durability' is 'memory'"
        elif not spool.rejected_max_bytes:
            self.fate = "stats() counts them, and they are not kept, since 'rejected_max_bytes' is 0"
        else:
            self.fate = "stats() counts them, and `composite-logstore rejected` shows those that are kept"
            self._folder = RejectedFolder(spool.component, spool.rejected_max_bytes)

    def keep(self, error: BaseException, sent: Sequence[LogEvent], batch: Sequence[LogEvent]) -> int:
        """Keep the events that the backend has rejected for good, as they were logged. Never raises.

        Args:
            error: What the export raised.
            sent: The events of the export, as the child's settings have changed them.
            batch: The same events as they were logged, with those that the settings withhold.

        Returns:
            How many of the rejected events are not kept.
        """
        rejected = rejection(error, sent)
        if rejected is None:
            return 0
        if self._folder is None:
            return rejected.number
        logged = {event.number: event for event in batch}
        reason, number, events = rejected
        now, among = time.time_ns(), len(events)
        found = (RejectedEvent(logged.get(one.number, one), reason, now, number, among) for one in events)
        kept = self._folder.keep(self._child, found)
        if kept.discarded:
            self.losses["discarded"] = "'rejected_max_bytes' is reached: the oldest rejected events are discarded."
        if kept.error is not None:
            why = getattr(kept.error, "strerror", None) or described(kept.error)
            where = f"rejected events cannot be kept in {self._folder.path}"
            self.losses["not kept"] = f"{where}: {why}; stats() counts them."
        return min(number, among - kept.number)
