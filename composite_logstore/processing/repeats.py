"""Repeats: of equal events within a window of time, a child gets one, which says how many it stands for.

Events are equal that have the same stream, writer, logger, level and message. The first of them is shown. For
`window_millis` after it, equal ones are withheld, and counted: by the shown event if it is in the same batch, otherwise
by the next one that is shown after the window. At the end of its stream, the last of the withheld events is shown if no
other could tell their number. So the events of a child always stand for all that were logged.

Which events are shown depends on the times of the events, not on those of exports. So a comparison can say which events
a child must have: those that open a window.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple
from uuid import UUID

from composite_logstore.ansi import without_escapes
from composite_logstore.backend import BACKFILLED
from composite_logstore.event import LogEvent, Stream
from composite_logstore.processing.processor import Processed, Step
from composite_logstore.processing.settings import RepeatSettings

REPEATED = "zenml.log.repeated"
"""The attribute of an event that stands for several: how many, itself included."""

REASON = "collapse_repeats"
"""The reason for which repeats are withheld."""

MOST_WINDOWS = 1_000
"""How many windows are remembered. Of an event whose window was forgotten, a further one is shown."""

MOST_REMEMBERED = 100_000
"""How many windows are remembered by a command, which needs them for a short time."""

MOST_BYTES = 8_192
"""Larger events are never withheld, so that what is remembered has a bound."""

_Key = tuple[UUID, str, str, int, bytes]


class _Window(NamedTuple):
    """A window of time in which equal events are withheld.

    Attributes:
        opened: The time of the event that opened it, in nanoseconds since the epoch.
        untold: How many withheld events are not counted in a shown event yet.
        last: The last of these.
        is_counted: Whether withheld events are counted. They are not in the window of an event that the child had
            before: it got their number at that time.
    """

    opened: int
    untold: int = 0
    last: LogEvent | None = None
    is_counted: bool = True


class Repeats(Step):
    """Withholds repeats."""

    remembers = True

    def __init__(self, settings: RepeatSettings, most_windows: int = MOST_WINDOWS) -> None:
        """Remember no window yet, and later at most so many."""
        self._length = settings.window_millis * 1_000_000
        self._most_windows = most_windows
        # The window that was used least recently is the first one.
        self._windows: dict[_Key, _Window] = {}

    def process(self, batch: Processed) -> None:
        """Withhold the repeats, and have the others say how many events they stand for."""
        windows: dict[_Key, _Window] = {}
        shown: list[LogEvent] = []
        stands_for: list[int] = []
        places: dict[_Key, int] = {}
        for event in batch.events:
            key = _key_of(event)
            if key is None:
                shown.append(event)
                stands_for.append(1)
                continue
            window = windows.get(key) or self._windows.get(key)
            if window is not None and self._is_within(window, event):
                batch.withheld[REASON] += 1
                if key in places:
                    stands_for[places[key]] += 1
                elif window.is_counted:
                    windows[key] = _Window(window.opened, window.untold + 1, event)
                else:
                    windows[key] = window
                continue
            places[key] = len(shown)
            shown.append(event)
            stands_for.append(1 + (window.untold if window is not None else 0))
            windows[key] = _Window(event.time_unix_nano)
        batch.events = [
            event if number == 1 else _counting(event, number) for event, number in zip(shown, stands_for, strict=True)
        ]
        batch.notes[self] = windows

    def commit(self, batch: Processed) -> None:
        """Remember the windows of the batch."""
        for key, window in batch.notes.get(self, {}).items():
            self._remember(key, window)

    def note_held(self, event: LogEvent) -> None:
        """Note that the child has an event: it has opened a window."""
        key = _key_of(event)
        if key is not None:
            before = self._windows.get(key, _Window(0))
            self._remember(key, before._replace(opened=event.time_unix_nano, is_counted=False))

    def expects(self, event: LogEvent) -> bool:
        """Return whether an event opens a window, and remember that."""
        key = _key_of(event)
        if key is None:
            return True
        window = self._windows.get(key)
        if window is not None and self._is_within(window, event):
            return False
        self._remember(key, _Window(event.time_unix_nano))
        return True

    def last_of(self, stream: Stream) -> list[LogEvent]:
        """Forget the windows of a stream, and return events that count the withheld ones which no event has counted."""
        over = {key: window for key, window in self._windows.items() if key[0] == stream.id}
        for key in over:
            del self._windows[key]
        # They come after later events.
        last = [
            _counting(window.last, window.untold, {BACKFILLED: True})
            for window in over.values()
            if window.last is not None
        ]
        return sorted(last, key=lambda event: event.number)

    def _is_within(self, window: _Window, event: LogEvent) -> bool:
        return 0 <= event.time_unix_nano - window.opened < self._length

    def _remember(self, key: _Key, window: _Window) -> None:
        self._windows.pop(key, None)
        self._windows[key] = window
        if len(self._windows) > self._most_windows:
            del self._windows[next(iter(self._windows))]


def _key_of(event: LogEvent) -> _Key | None:
    """Return what equal events share; None for one that is never withheld, since it is large or has an exception."""
    if event.exception is not None or event.progress or event.size > MOST_BYTES:
        return None
    # Without escape sequences, which some children have and others do not.
    message = without_escapes(event.message)
    digest = hashlib.blake2b(message.encode("utf-8", "replace"), digest_size=16).digest()
    return event.stream.id, event.writer, event.logger_name, event.level, digest


def _counting(event: LogEvent, number: int, more: dict[str, bool] | None = None) -> LogEvent:
    return event._replace(metadata={**event.metadata, REPEATED: number, **(more or {})})
