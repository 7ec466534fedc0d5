"""Marks in this process's folder: which streams are open or have ended, and whether the process ends in order.

Other processes learn from them whether this one was killed (see `last_words`). No event makes room for a mark, and no
error is told: nobody loses an event if a mark is missing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from math import inf

from composite_logstore.capture.process import may_be_killed
from composite_logstore.delivery.own_folder import OwnFolder
from composite_logstore.event import LogEvent, Stream
from composite_logstore.spool.folder import Spool

_MOST_ENDED = 10_000
"""Of how many streams it is remembered that they have ended."""


class StreamMarks:
    """Writes the marks. The journal's lock guards every call.

    Attributes:
        waiting: The streams that have ended and whose mark is not written yet → the number below which their events
            are. The numbers ascend.
        may_try: Whether to try to write marks. After an error that waits for the next tick.
        is_closed: Whether the process ends in order.
    """

    def __init__(self, folder: OwnFolder, unwritten: deque[LogEvent]) -> None:
        """Begin without a mark.

        Args:
            folder: Where to write.
            unwritten: The events that are not on disk, oldest first.
        """
        self.waiting: dict[Stream, int] = {}
        self.may_try = True
        self.is_closed = False
        self._folder = folder
        self._unwritten = unwritten
        # All streams that have ended → the number below which their events are.
        self._ended: dict[Stream, int] = {}
        self._may_name = True

    def begin_folder(self) -> None:
        """Write all marks once more, into a folder that was just made."""
        self.is_closed = self.is_closed or may_be_killed()
        self.waiting = dict(self._ended)
        self.write()

    def open_stream(self, stream: Stream) -> None:
        """Note that a stream gets events, even if it has ended before."""
        self._ended.pop(stream, None)
        self.waiting.pop(stream, None)
        if self._folder.spool is not None:
            self._folder.spool.segments.open_again(stream)

    def end_stream(self, stream: Stream, before: int) -> None:
        """Note that a stream has ended. Its mark follows its events, once they are on disk or need not be.

        Args:
            stream: The stream.
            before: The number below which its events are.
        """
        for ended in (self._ended, self.waiting):
            # The numbers ascend.
            ended.pop(stream, None)
            ended[stream] = before
            if len(ended) > _MOST_ENDED:
                del ended[next(iter(ended))]

    def name(self, event: LogEvent, opened: Callable[[], Spool]) -> None:
        """Write that the stream of an event is open, though no child needs the event on disk.

        Args:
            event: The event.
            opened: Returns the folder, and makes it if there is none.
        """
        if not self._may_name or event.stream in self._ended:
            return
        try:
            spool = opened()
            if not self.is_closed:
                spool.segments.name(event.stream, event.number, self._folder.space.take)
        except Exception:
            self._may_name = False

    def write(self) -> None:
        """Write the marks of the streams whose events are on disk or acknowledged, and of the process's end."""
        if not (self.waiting or self.is_closed) or not self.may_try:
            return
        spool = self._folder.spool
        number = self._unwritten[0].number if self._unwritten else inf
        try:
            for stream, before in list(self.waiting.items()):
                if before > number:
                    break
                if spool is not None:
                    spool.segments.end(stream, self._folder.space.take)
                del self.waiting[stream]
            if spool is not None and self.is_closed:
                spool.segments.mark_closed()
        except OSError:
            self.may_try = False
