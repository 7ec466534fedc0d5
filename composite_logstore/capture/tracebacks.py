"""Lines that belong together: a traceback with all its causes is one entry, and so is a warning with its line of code.

The grammar is that of Python's `traceback` and `warnings`. It looks at whole lines, so the pieces in which a text was
written make no difference.
"""

from __future__ import annotations

import re
import sys
from collections import deque
from contextlib import suppress
from enum import Enum
from traceback import format_exception_only

from composite_logstore.ansi import without_escapes
from composite_logstore.capture.terminal import MOST_CHARACTERS, Shown

_TRACEBACK = re.compile(r"\s*Traceback \(most recent call last\):\s*\Z")
_GROUP = re.compile(r"\s*\+ Exception Group Traceback \(most recent call last\):\s*\Z")
# rich's tracebacks, which ZenML installs, are framed.
_FRAMED = re.compile(r"╭─+ Traceback \(most recent call last\) ─+╮\s*\Z")
_PREFACE = re.compile(r"Exception (?:in thread \S|ignored in: ?\S|ignored in \S)")
_EXCEPTION = re.compile(r"[^\W\d][\w.<>]*(?:\[[\w.]*\])?(?::|\s*\Z)")
_BETWEEN = re.compile(
    r"(?:During handling of the above exception, another exception occurred"
    r"|The above exception was the direct cause of the following exception):\s*\Z"
)
_WARNED = re.compile("Warning: |Category: ")
_WARNING = re.compile(r"\S.*:\d+: [\w.]*(?:Warning|Category): ")
_MOST_CAUSES = 20
_ALLOCATED = "Object allocated at (most recent call last):"


class _Phase(Enum):
    """Which line was the last one of the entry."""

    PREFACE = "says in which thread the exception was raised"
    FRAMES = "is the head of a traceback, or one of its frames"
    GROUP = "is in the traceback of an exception group, which names the exceptions within its frame"
    EXCEPTION = "names the exception"
    GAP = "is blank, behind the exception"
    CAUSE = "says how the next traceback relates to this one"
    WARNING = "is a warning"


class Tracebacks:
    """Joins the lines that belong together. For one thread at a time.

    Attributes:
        out: The entries that are complete, for the caller to take from the left.
    """

    def __init__(self) -> None:
        self.out: deque[Shown] = deque()
        self._lines: list[str] = []
        self._first: Shown | None = None
        self._phase = _Phase.FRAMES
        self._size = 0
        # The lines that the exception's own message still has.
        self._message: deque[str] = deque()

    @property
    def is_open(self) -> bool:
        """Whether there is an entry that the next line may belong to."""
        return self._first is not None

    @property
    def size(self) -> int:
        """How many characters that entry has."""
        return self._size

    def add(self, shown: Shown) -> None:
        """Take in the next line, or an update of a progress bar, which ends an entry."""
        text, bar, _ = shown
        phase = None
        if not bar:
            text = without_escapes(text)
            phase = self._after(text) if self._first is not None else None
        if phase is None:
            self.end()
            phase = None if bar else _beginning(text)
        if phase is None:
            if bar or (text and not text.isspace()):
                self.out.append(shown)
            return
        self._first = self._first or shown
        self._phase = phase
        self._lines.append(shown.text)
        self._size += len(shown.text) + 1
        if self._size > MOST_CHARACTERS:
            self.end()

    def end(self) -> None:
        """End the entry: the next line does not belong to it."""
        first, self._first = self._first, None
        if first is not None:
            lines, self._lines, self._size = self._lines, [], 0
            self._message.clear()
            self.out.append(first._replace(text="\n".join(lines).rstrip()))

    def _after(self, text: str) -> _Phase | None:
        """Return what a line is in the entry, None if it does not belong to it."""
        phase = self._phase
        if self._message:
            if text == self._message.popleft():
                return phase
            self._message.clear()
        is_blank = not text or text.isspace()
        is_inside = not is_blank and text[0] in " \t│╰"
        if phase is _Phase.WARNING:
            return phase if is_inside or text.startswith(_ALLOCATED) else None
        if (head := _head(text)) and phase in (_Phase.PREFACE, _Phase.CAUSE):
            return head
        if head and not is_inside:
            return None
        if phase is _Phase.PREFACE:
            return None
        if phase is _Phase.CAUSE:
            return phase if is_blank else None
        if is_inside and phase is not _Phase.GAP:
            return phase
        if phase is _Phase.FRAMES and not is_blank:
            if not _EXCEPTION.match(text):
                return None
            self._message = _rest_of_message(text)
            return _Phase.EXCEPTION
        if phase is _Phase.FRAMES:
            return phase
        if is_blank:
            return _Phase.GAP
        if phase is _Phase.GAP:
            return _Phase.CAUSE if _BETWEEN.match(text) else None
        return None


def _rest_of_message(line: str) -> deque[str]:
    """Return the lines behind the one that names an exception: the rest of its message, and its notes.

    They look like any other lines. But a thread that prints a traceback is usually about to handle the exception.
    """
    error = sys.exc_info()[1] or getattr(sys, "last_value", None)
    for _ in range(_MOST_CAUSES):
        if error is None:
            break
        with suppress(Exception):
            first, *rest = "".join(format_exception_only(type(error), error)).rstrip("\n").split("\n")
            if first == line:
                return deque(rest)
        error = error.__cause__ or error.__context__
    return deque()


def _head(text: str) -> _Phase | None:
    """Return what the first line of a traceback begins, None if it is no such line."""
    if _TRACEBACK.match(text) or _FRAMED.match(text):
        return _Phase.FRAMES
    return _Phase.GROUP if _GROUP.match(text) else None


def _beginning(text: str) -> _Phase | None:
    """Return what a line is as the first one of an entry of several lines, None if it is a line like any other."""
    # Most lines are none of these, and a search for a word is quicker than a pattern.
    if "Traceback (" in text and (head := _head(text)):
        return head
    if text.startswith("Exception i") and _PREFACE.match(text):
        return _Phase.PREFACE
    return _Phase.WARNING if _WARNED.search(text) and _WARNING.match(text) else None
