"""Whole lines of printed text: joins what a thread writes to a file, until the line is complete.

`print("a", "b")` writes four times. ZenML makes a record of each write, and this module makes one note of a whole
line, with the time of its first part. Parts are joined for each stream, thread and file. A part whose line does not
end is noted after a second, with a flush, and at the process's end.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

from composite_logstore import zenml
from composite_logstore.capture.record import LOGGER_NAME, PRINTED, Note, line_of, note, text_in
from composite_logstore.capture.terminal import Terminal
from composite_logstore.capture.tracebacks import Tracebacks
from composite_logstore.clock import Clock
from composite_logstore.event import Stream
from composite_logstore.service import Service, Wait

HELD_SECONDS = 1.0
"""How long a part waits for the rest of its line."""
_BAR_SECONDS = 0.05
"""How long after an update of a progress bar more text belongs to it. What comes later, without a movement of the
cursor, is a line that another part of the program has printed behind the bar."""
_MOST_PENS = 256
"""How many threads and files are remembered."""
_MANY_CHARACTERS = 1 << 16
_MOST_CHARACTERS = 1 << 24
"""How many characters may be held, all lines together."""
_MOST_INDENT = 100

# In the place of a note, besides a newline: show everything that is held, or only what is complete.
_ALL, _COMPLETE = "all", "complete"


class _Pen:
    """One thread's writing to one file of a stream.

    Written text waits in `inbox`. The thread that gets the lock `busy` takes it in. No thread waits for that lock: its
    holder journals lines, so a thread that waited for it under the journal's lock could deadlock.
    """

    __slots__ = ("busy", "held_since", "inbox", "lines", "stream", "terminal", "tracebacks", "written_at")

    def __init__(self, lines: Lines, stream: Stream) -> None:
        self.lines = lines
        self.stream = stream
        self.terminal = Terminal()
        self.tracebacks = Tracebacks()
        self.inbox: deque[Note | str] = deque()
        self.busy = threading.Lock()
        self.held_since: float | None = None
        self.written_at = 0.0

    @property
    def is_holding(self) -> bool:
        return bool(self.inbox) or self.terminal.is_holding or self.tracebacks.is_open

    @property
    def size(self) -> int:
        return self.terminal.size + self.tracebacks.size


class _Here(threading.local):
    """What belongs to a thread. It ends with the thread: a later one with the same number begins anew.

    Attributes:
        source: The source of the present print: the thread itself, or a process for which it prints. None outside of a
            print.
        pens: A file, a source and a stream → the pen.
        last: A file and a source → the pen that was used last.
        indents: A file and a source → notes of blank texts that were written before any other text.
    """

    def __init__(self) -> None:
        self.source: Hashable | None = None
        self.pens: dict[tuple[str, Hashable, Stream], _Pen] = {}
        self.last: dict[tuple[str, Hashable], _Pen] = {}
        self.indents: dict[tuple[str, Hashable], list[Note]] = {}


_here = _Here()


unsettled: dict[_Pen, None] = {}
"""The pens that hold something complete, a traceback or an update of a progress bar, which waits for what may belong
to it. Looked at for each record of a logger, so it is as near as possible."""


def _forget_parent() -> None:
    """Begin anew in a forked process: what its parent holds is the parent's."""
    global _here
    _here = _Here()
    unsettled.clear()


os.register_at_fork(after_in_child=_forget_parent)


class Lines:
    """Joins what is printed to whole lines, for one writer."""

    def __init__(
        self,
        append: Callable[[Stream, Note], object],
        clock: Clock,
        service: Callable[..., Service],
        may_wait: Callable[[], bool],
    ) -> None:
        """Prepare; nothing is started.

        Args:
            append: Gets each line, noted.
            clock: The source of time.
            service: Makes a service of a thread's name and its step.
            may_wait: Whether this process may have a thread that waits for the rest of a line.
        """
        self._append = append
        self._clock = clock
        self._may_wait = may_wait
        # The pens that hold something. A dictionary, since a set does not keep the order.
        self._pens: dict[_Pen, None] = {}
        self._due = clock.signal()
        self._service = service("composite-logstore lines", self._look)
        self._is_asleep = True
        self._has_written = self._is_registered = False

    def write(self, stream: Stream, said: Note) -> None:
        """Take in what this thread has written.

        Args:
            stream: The stream that it belongs to.
            said: The text, noted as a record of `stdout` or `stderr`.
        """
        where = said[LOGGER_NAME], _here.source
        pen = _here.last.get(where)
        if pen is None or pen.stream is not stream or pen.lines is not self:
            pen = self._pen(stream, where)
        if unsettled:
            settle(pen)
        pen.inbox.append(said)
        self._take_in(pen)

    def flush(self, stream: Stream | None = None) -> None:
        """Note everything that is held.

        Args:
            stream: Only what is held of this stream.
        """
        for pen in list(self._pens):
            if stream is None or pen.stream is stream:
                pen.inbox.append(_ALL)
                self._take_in(pen)
        if stream is not None:
            for key in [key for key in _here.pens if key[2] is stream]:
                del _here.pens[key]

    def _pen(self, stream: Stream, where: tuple[str, Hashable]) -> _Pen:
        """Return this thread's pen for a stream that it has not written to last."""
        here = _here
        if len(here.pens) > _MOST_PENS:
            here.pens = {key: pen for key, pen in here.pens.items() if pen.is_holding}
            here.last = {key: pen for key, pen in here.last.items() if pen.is_holding}
        file, source = where
        pen = here.pens.get((file, source, stream))
        if pen is None or pen.lines is not self:
            pen = here.pens[file, source, stream] = _Pen(self, stream)
        pen.inbox.extend(here.indents.pop(where, ()))
        here.last[where] = pen
        return pen

    def _take_in(self, pen: _Pen) -> None:
        """Take in what waits in a pen's inbox, unless another thread does, or the code that this call interrupts."""
        while pen.inbox and pen.busy.acquire(blocking=False):
            try:
                while pen.inbox:
                    self._take(pen, pen.inbox.popleft())
            finally:
                pen.busy.release()

    def _take(self, pen: _Pen, said: Note | str) -> None:
        terminal, tracebacks = pen.terminal, pen.tracebacks
        is_command = said is _ALL or said is _COMPLETE
        if said is _ALL:
            terminal.rest()
        elif said is _COMPLETE:
            terminal.show_bar()
        elif isinstance(said, str):
            # A newline, which no line begins with.
            terminal.write(said, None)
        else:
            now = self._clock.now()
            is_late, pen.written_at = now - pen.written_at > _BAR_SECONDS, now
            terminal.write(text_in(said), said, is_late)
        has_shown = bool(terminal.out)
        while terminal.out:
            tracebacks.add(terminal.out.popleft())
        if is_command:
            tracebacks.end()
        while tracebacks.out:
            text, bar, mark = tracebacks.out.popleft()
            self._append(pen.stream, line_of(mark, text, bar))
        self._hold(pen, has_shown)

    def _hold(self, pen: _Pen, has_shown: bool) -> None:
        """Note whether a pen holds something, and have a thread look after it."""
        is_open, is_holding = pen.tracebacks.is_open, pen.terminal.is_holding
        if is_open or (is_holding and pen.terminal.is_at_bar):
            unsettled[pen] = None
        elif unsettled:
            unsettled.pop(pen, None)
        if not (is_open or is_holding):
            pen.held_since = None
            self._pens.pop(pen, None)
            return
        if has_shown or pen.held_since is None:
            pen.held_since = pen.written_at
        self._pens[pen] = None
        self._has_written = True
        if self._is_asleep:
            self._wake()
        if len(self._pens) > _MOST_PENS or (
            pen.size > _MANY_CHARACTERS and sum(one.size for one in list(self._pens)) > _MOST_CHARACTERS
        ):
            self._show_others(pen)

    def _show_others(self, pen: _Pen) -> None:
        """Show what is held, since it is too much."""
        for one in list(self._pens):
            one.inbox.append(_ALL)
            # This pen is taken care of by the loop that leads here.
            if one is not pen:
                self._take_in(one)

    # Time

    def _wake(self) -> None:
        if self._may_wait() and self._service.start():
            self._is_asleep = False
            self._due.set()
            return
        # Without a thread, the next print looks after the others, and so does the process's end: `multiprocessing`
        # ends its processes without exit handlers.
        self._show_old()
        util = sys.modules.get("multiprocessing.util")
        if util is not None and not self._is_registered:
            self._is_registered = True
            util.Finalize(None, self.flush, exitpriority=-100)

    def _look(self) -> Wait | None:
        """Show what has been held for a second."""
        wait = self._show_old()
        if wait is None and not self._has_written:
            self._is_asleep = True
            if not self._pens:
                return self._due.wait
            self._is_asleep = False
        self._has_written = False
        # Not the signal: each line would set it.
        return partial(self._clock.signal().wait, HELD_SECONDS if wait is None else wait)

    def _show_old(self) -> float | None:
        """Show what has been held for a second. Returns after how many seconds more is due, None if nothing is held."""
        now = self._clock.now()
        wait = None
        for pen in list(self._pens):
            since = pen.held_since
            left = HELD_SECONDS if since is None else since + HELD_SECONDS - now
            if left <= 0:
                pen.inbox.append(_ALL)
                self._take_in(pen)
            else:
                wait = left if wait is None else min(wait, left)
        return wait


def settle(but: _Pen | None = None) -> None:
    """Note what this thread has printed and is complete, so that what it logs next comes after it.

    Args:
        but: A pen that continues.
    """
    for pen in list(_here.last.values()):
        if pen is not but and pen in unsettled:
            pen.inbox.append(_COMPLETE)
            pen.lines._take_in(pen)


# ZenML


def watch_prints() -> None:
    """Have ZenML hand on everything that is printed, as such. May be called again.

    ZenML makes a record of each text that is written to stdout or stderr, and drops those that are blank, such as the
    newline that `print` writes by itself. Its `dispatch` still sees all of them, whichever object is `sys.stdout` now.
    """
    zenml.wrap_dispatch(_watched)


def _watched(dispatch: zenml.Dispatch) -> zenml.Dispatch:
    if getattr(dispatch, "watches_prints", False):
        return dispatch
    active_context = zenml.active_context

    def dispatch_watched(record: logging.LogRecord, metadata: dict[str, Any] | None = None) -> None:
        if record.pathname or record.name not in PRINTED or active_context() is None:
            dispatch(record, metadata)
        else:
            hand_on(record, dispatch, record, metadata)

    dispatch_watched.watches_prints = True  # type: ignore[attr-defined]
    return dispatch_watched


def hand_on(record: logging.LogRecord, emit: Callable[..., object], *arguments: object, source: Hashable = "") -> None:
    """Hand a record to a log store, unless it is blank. A print's record is a part of a line, even if it is blank.

    Args:
        record: The record.
        emit: Has a log store emit it.
        arguments: What `emit` is called with.
        source: Who prints, if it is not this thread. Lines of two sources are never joined.
    """
    is_printed = record.name in PRINTED and not record.pathname
    is_blank = not record.getMessage().strip()
    if is_blank and not is_printed:
        return
    here = _here
    here.source = source if is_printed else None
    try:
        if is_blank:
            _write_blank(record)
        else:
            emit(*arguments)
    finally:
        here.source = None


def is_printing() -> bool:
    """Return whether the record that this thread is about to emit was handed on by `hand_on`.

    Any other record of the logger `stdout`, such as one that another log store forwards, is whole.
    """
    return _here.source is not None


def _write_blank(record: logging.LogRecord) -> None:
    """Take in a blank text, as a part of the line that this thread has written to last."""
    where = record.name, _here.source
    pen = _here.last.get(where)
    if pen is not None:
        pen.inbox.append("\n" if record.msg == "\n" else note(record))
        pen.lines._take_in(pen)
        return
    said = note(record)
    indent = _here.indents.setdefault(where, [])
    if "\n" in text_in(said) or len(indent) >= _MOST_INDENT:
        indent.clear()
    else:
        indent.append(said)
