"""What the marks in a spool say: which streams are open, and whether the process has ended in order."""

from __future__ import annotations

from composite_logstore.event import LogEvent, Stream
from composite_logstore.spool.format import Closed, Ended, Process


class Marks:
    """What the lines of a folder say, once they are noted in order.

    Attributes:
        open: The streams that have not ended, the one with the latest event last.
        is_closed: Whether the process has ended in order.
        process: Which process it is. None if no header says so: then there may be no marks either.
        last_unix_nano: The time of the last event, in nanoseconds since the epoch; 0 before the first.
    """

    def __init__(self) -> None:
        self.open: dict[Stream, None] = {}
        self.is_closed = False
        self.process: Process | None = None
        self.last_unix_nano = 0
        self._ended: set[Stream] = set()

    def note(self, item: object) -> None:
        """Note a line.

        Args:
            item: What a reader's `items` has yielded.
        """
        if isinstance(item, LogEvent):
            self.last_unix_nano = item.time_unix_nano
            # The line of its stream may be damaged.
            if item.stream not in self._ended:
                self.open.pop(item.stream, None)
                self.open[item.stream] = None
        elif isinstance(item, Stream):
            self._ended.discard(item)
            self.open[item] = None
        elif isinstance(item, Ended):
            self._ended.add(item.stream)
            self.open.pop(item.stream, None)
        elif isinstance(item, Closed):
            self.is_closed = True
        elif isinstance(item, Process):
            self.process = item
