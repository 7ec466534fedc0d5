"""What a terminal shows of printed text: whole lines, and the updates of progress bars.

A `Terminal` gets what one thread writes to one file, in any pieces, and says which lines it would show. Text without
a control sequence becomes one line for each newline, unchanged. As soon as the cursor moves back, text is drawn into
rows of cells. A row that is drawn over is a progress bar: each state of it that a person could have seen is an update.

The grammar is that of ECMA-48, as far as programs use it that draw bars: carriage return, backspace, movements of the
cursor, erasures, and styles (https://www.ecma-international.org/publications-and-standards/standards/ecma-48/).
Rows have no right margin, since the width of the terminal is not known here.
"""

from __future__ import annotations

import re
import secrets
import unicodedata
from collections import deque
from functools import lru_cache
from itertools import count
from typing import Any, NamedTuple

from composite_logstore.ansi import ESCAPE, without_escapes

MOST_CHARACTERS = 1 << 20
"""The longest line. What is longer becomes several lines."""
_MOST_ROWS = 64
"""How many drawn rows are remembered, above the cursor and below: a cursor that moves further finds empty ones."""
_MOST_COLUMNS = 1 << 14
"""The longest drawn row. A cursor that moves further stays there."""
_MOST_STYLE = 256
_MOST_TAIL = 4096

# These alone change where the next character appears, or how.
_SPECIAL = re.compile(r"[\r\b\x1b\x9b]")
# Text that appears behind the cursor, whatever its style.
_PRINTS = re.compile(r"(?:\x1b\[[\d;]*m)*[^\n\r\b\x1b\x9b]")
_TOKEN = re.compile(r"[^\n\r\b\x1b\x9b]+|[\n\r\b]")
# The beginning of a sequence whose rest may follow.
_BEGUN = re.compile(r"(?:\x1b\[|\x9b)[0-?]*[ -/]*\Z|\x1b[\]PX^_][^\x07\x1b\x9c\n]*\x1b?\Z|\x1b[ -/]*\Z")
_CONTROL = re.compile(r"(?:\x1b\[|\x9b)([0-?]*)[ -/]*([@-~])\Z")
_RESET = re.compile(r"0*\Z|0*;")
_FULL = "100%"
# What stands before a percentage or a count names the bar.
_COUNTED = re.compile(r"([^\d%|]*)\d[^%/]{0,200}(?:%|/)")
_MOST_LABELS = 8
"""How many bars may take turns in one row."""

# Unique in a process and, nearly always, in a stream, which several processes may write to. They fit into a double.
_bars = count(secrets.randbits(52) + 2)


class Shown(NamedTuple):
    """A line, or an update of a progress bar.

    Attributes:
        text: The text, with escape sequences for its style. It may be blank.
        bar: The number of the progress bar that it updates, 0 for a line.
        mark: The mark of the first piece of text in it.
    """

    text: str
    bar: int
    mark: Any


class _Row:
    """A row that is drawn cell by cell.

    Attributes:
        cells: The characters. A wide one is followed by an empty one; one without width is part of the one before.
        styles: The style of each cell, as escape sequences.
        is_bar: Whether it was drawn over, or the cursor has left it as only a program does that draws.
        bars: A label → the number of the progress bar with that label, and whether it was complete when last shown.
        is_dirty: Whether it has changed since it was last shown.
        mark: The mark of the first piece of text since then.
        shown: What was shown last.
    """

    __slots__ = ("bars", "cells", "is_bar", "is_dirty", "mark", "shown", "styles")

    def __init__(self, mark: Any) -> None:
        self.cells: list[str] = []
        self.styles: list[str] = []
        self.is_bar = False
        self.bars: dict[str, tuple[int, bool]] = {}
        self.is_dirty = False
        self.mark = mark
        self.shown = ""

    def write(self, column: int, cells: list[str], style: str) -> None:
        self.pad(column)
        end = column + len(cells)
        if end < len(self.cells) and not self.cells[end]:
            # The right half of a wide character goes with its left half.
            self.cells[end] = " "
        self.cells[column:end] = cells
        self.styles[column:end] = [style] * len(cells)

    def pad(self, column: int) -> None:
        missing = column - len(self.cells)
        if missing > 0:
            self.cells += [" "] * missing
            self.styles += [""] * missing

    def erase(self, begin: int, end: int) -> None:
        if end >= len(self.cells):
            del self.cells[begin:], self.styles[begin:]
        else:
            self.write(begin, [" "] * (end - begin), "")

    @property
    def text(self) -> str:
        """The text, without the blanks at its end."""
        if not any(self.styles):
            return "".join(self.cells).rstrip()
        end = len(self.cells)
        while end and self.cells[end - 1] in ("", " ") and not self.styles[end - 1]:
            end -= 1
        parts, before = [], ""
        for cell, style in zip(self.cells[:end], self.styles[:end], strict=True):
            if style != before:
                parts.append(f"\x1b[0m{style}" if before else style)
                before = style
            parts.append(cell)
        return "".join(parts).rstrip() + ("\x1b[0m" if before else "")

    @property
    def is_blank(self) -> bool:
        return not "".join(self.cells).strip()


class Terminal:
    """Finds the lines in what one thread writes to one file. For one thread at a time.

    However the text is split into pieces, the lines are the same.

    Attributes:
        out: The lines that are complete, for the caller to take from the left.
    """

    def __init__(self) -> None:
        """Begin at the beginning of an empty row."""
        self.out: deque[Shown] = deque()
        # The row of the cursor as long as text is only appended to it.
        self._parts: list[str] = []
        self._size = 0
        self._mark: Any = None
        # The rows that are drawn, by their places, of which the cursor's is one once it is drawn.
        self._rows: dict[int, _Row] = {}
        self._row: _Row | None = None
        self._at = 0
        self._top: int | None = None
        self._column = 0
        self._saved = (0, 0)
        self._style = ""
        # Whether the cursor has moved back, or to another row, and nothing has changed since.
        self._has_moved = False
        # Whether everything was shown since the last piece of text.
        self._has_paused = False
        # The beginning of an escape sequence whose rest has not been written yet.
        self._tail = ""

    @property
    def is_holding(self) -> bool:
        """Whether there is text that no line has shown."""
        if self._parts or not self._rows:
            return bool(self._parts)
        return any(row.is_dirty for row in self._rows.values())

    @property
    def size(self) -> int:
        """About how many characters are held."""
        return self._size + (sum(len(row.cells) for row in self._rows.values()) if self._rows else 0)

    @property
    def is_at_bar(self) -> bool:
        """Whether the cursor stands behind an update of a progress bar."""
        return self._row is not None and self._row.is_bar and not self._has_moved and not self._row.is_blank

    def write(self, text: str, mark: Any, is_late: bool = False) -> None:
        """Take in a piece of text.

        Args:
            text: The text.
            mark: What a line remembers of the first piece of its text.
            is_late: Whether the text is written so late that it is no part of an update that precedes it.
        """
        if self._row is not None and (is_late or self._has_paused) and self.is_at_bar and _PRINTS.match(text):
            self._begin_row()
        self._has_paused = False
        if self._rows or self._has_moved or self._tail or _SPECIAL.search(text):
            self._draw(text, mark)
            return
        if "\n" not in text:
            self._append(text, mark)
            return
        begin, *rest = text.split("\n")
        self._at += len(rest)
        self._append(begin, mark)
        for line in rest:
            self._end_line(mark)
            self._append(line, mark)

    def rest(self) -> None:
        """Show what is held: nothing may follow soon."""
        if self._parts and not self._has_moved:
            self._show_parts()
        elif self._parts:
            # A carriage return at the end of an update, rather than at its beginning.
            self._drawn().is_bar = True
        for place in sorted(self._rows):
            self._show(self._rows[place])
        self._has_paused = True

    def show_bar(self) -> None:
        """Show the update of a progress bar that the cursor stands behind, if it stands behind one."""
        if self._row is not None and self.is_at_bar:
            self._show(self._row)
            self._has_paused = True

    def _begin_row(self) -> None:
        """Have the text that follows begin a row of its own: it is no part of the update that the cursor stands behind.

        A terminal would show both in one row, but they say nothing together.
        """
        if self._row is not None:
            self._show(self._row)
            self._go(self._at + 1)
            self._column, self._has_moved = 0, self._row is not None

    # Text that is only appended

    def _append(self, text: str, mark: Any) -> None:
        if not text:
            return
        if not self._parts:
            self._mark = mark
        while self._size + len(text) > MOST_CHARACTERS:
            room = MOST_CHARACTERS - self._size
            self._parts.append(text[:room])
            self._show_parts()
            self._mark, text = mark, text[room:]
        self._parts.append(text)
        self._size += len(text)

    def _end_line(self, mark: Any) -> None:
        if not self._parts:
            self._mark = mark
        self._show_parts()

    def _show_parts(self) -> None:
        parts, self._parts, self._size = self._parts, [], 0
        self.out.append(Shown("".join(parts), 0, self._mark))

    # Text with control sequences

    def _draw(self, text: str, mark: Any) -> None:
        if self._tail:
            text, self._tail = self._tail + text, ""
        place = 0
        while place < len(text):
            if text[place] in "\x1b\x9b":
                found = ESCAPE.match(text, place)
                if found:
                    self._escape(found[0], mark)
                elif _BEGUN.match(text, place) and len(text) - place <= _MOST_TAIL:
                    self._tail = text[place:]
                    return
                # Otherwise no sequence begins here, and the character shows nothing.
                place = found.end() if found else place + 1
                continue
            token = _TOKEN.match(text, place)
            assert token is not None
            place = token.end()
            if token[0] == "\n":
                self._line_feed(mark)
            elif token[0] == "\r":
                self._move(0)
            elif token[0] == "\b":
                self._move(self._place() - 1)
            else:
                self._text(token[0], mark)

    def _text(self, text: str, mark: Any) -> None:
        if self._row is None and not self._has_moved:
            self._append(text, mark)
            return
        cells = _cells(text)
        while cells:
            row = self._change(mark)
            room = _MOST_COLUMNS - self._column
            if room <= 0:
                self._show(row)
                row.erase(0, _MOST_COLUMNS)
                row.shown, self._column = "", 0
                continue
            part, cells = cells[:room], cells[room:]
            row.write(self._column, part, self._style)
            self._column += len(part)

    def _line_feed(self, mark: Any) -> None:
        if self._row is None:
            self._end_line(mark)
        else:
            self._show(self._row, mark)
        self._go(self._at + 1)
        self._column = 0
        self._has_moved = self._row is not None

    def _move(self, column: int) -> None:
        """Move the cursor within its row."""
        self._column = min(max(0, column), _MOST_COLUMNS)
        self._has_moved = True

    def _place(self) -> int:
        """Return the cursor's column. Where text is only appended, it is not counted."""
        if self._row is None and not self._has_moved:
            self._drawn()
        return self._column

    def _drawn(self) -> _Row:
        """Return the cursor's row, drawn."""
        if self._row is None:
            row = self._row = self._rows[self._at] = _Row(self._mark)
            parts, self._parts, self._size = self._parts, [], 0
            style = ""
            for text, sequence in _pieces("".join(parts)[:_MOST_COLUMNS]):
                row.write(len(row.cells), _cells(text), style)
                style = _styled(style, sequence)
            row.is_dirty = bool(row.cells)
            if not self._has_moved:
                self._column, self._style = len(row.cells), style
        return self._row

    def _change(self, mark: Any) -> _Row:
        """Return the cursor's row, which is about to change. What it said until now was an update."""
        row = self._drawn()
        if self._has_moved:
            self._has_moved = False
            row.is_bar = True
            self._show(row)
        if not row.is_dirty:
            row.is_dirty, row.mark = True, mark
        return row

    def _show(self, row: _Row, mark: Any = None) -> None:
        if not row.is_dirty:
            if not row.is_bar and mark is not None:
                self.out.append(Shown("", 0, mark))
            return
        row.is_dirty = False
        text = row.text
        if not row.is_bar:
            self.out.append(Shown(text, 0, row.mark))
        elif text != row.shown and (plain := without_escapes(text).strip()):
            row.shown = text
            self.out.append(Shown(text, _bar_in(row, plain), row.mark))

    def _go(self, place: int) -> None:
        """Move the cursor to another row."""
        self._at = place
        self._row = self._rows.get(place)
        if len(self._rows) > _MOST_ROWS or (self._rows and min(self._rows) < place - _MOST_ROWS):
            for other in [other for other in self._rows if abs(other - place) > _MOST_ROWS // 2]:
                self._show(self._rows.pop(other))

    def _leave(self, place: int) -> None:
        """Move the cursor to another row, as only a program does that draws."""
        if self._row is None and self._parts:
            self._drawn()
        if self._row is not None:
            if self._row.is_dirty:
                self._row.is_bar = True
            self._show(self._row)
        self._go(place)
        self._has_moved = True

    def _escape(self, sequence: str, mark: Any) -> None:
        found = _CONTROL.match(sequence)
        if found is None:
            self._escape_of_two(sequence, mark)
            return
        numbers, name = found.groups()
        if name == "m":
            self._set_style(sequence, mark)
            return
        values = [int(value[:5]) if value.isdecimal() else 0 for value in numbers.split(";")]
        first = values[0]
        steps = min(max(1, first), _MOST_COLUMNS)
        if name in "ABEF":
            column = 0 if name in "EF" else self._place()
            self._leave(self._at + (steps if name in "BE" else -steps))
            self._column = column
        elif name == "C":
            if self._row is None and not self._has_moved:
                self._append(" " * steps, mark)
            else:
                self._drawn()
                self._column = min(self._column + steps, _MOST_COLUMNS)
        elif name == "D":
            self._move(self._place() - steps)
        elif name in "G`":
            self._place()
            self._move(steps - 1)
        elif name in "Hf":
            if self._top is None or abs(self._at - self._top) > _MOST_ROWS:
                self._top = self._at
            self._leave(self._top + steps - 1)
            self._column = min(max(0, values[1] - 1), _MOST_COLUMNS) if len(values) > 1 else 0
        elif name in "KX":
            self._erase(3 if name == "X" else first, steps, mark)
        elif name == "J":
            self._erase_rows(first, mark)
        elif name == "s":
            self._saved = self._at, self._place()
        elif name == "u":
            self._restore()

    def _escape_of_two(self, sequence: str, mark: Any) -> None:
        if sequence == "\x1bM":
            self._escape("\x1b[A", mark)
        elif sequence in ("\x1bD", "\x1bE"):
            self._line_feed(mark)
        elif sequence == "\x1b7":
            self._saved = self._at, self._place()
        elif sequence == "\x1b8":
            self._restore()
        elif self._row is None and not self._has_moved:
            # A link, say, or the title of a window.
            self._append(sequence, mark)

    def _restore(self) -> None:
        place, column = self._saved
        if place == self._at:
            self._place()
            self._move(column)
        else:
            self._leave(place)
            self._column = column

    def _set_style(self, sequence: str, mark: Any) -> None:
        if self._row is None and not self._has_moved:
            self._append(sequence, mark)
        else:
            self._drawn()
            self._style = _styled(self._style, sequence)

    def _erase(self, what: int, steps: int, mark: Any) -> None:
        if what == 0 and self._row is None and not self._has_moved:
            # There is nothing behind the cursor.
            return
        column = self._place()
        if what in (1, 2):
            self._has_moved = True
        row = self._change(mark)
        begin = 0 if what in (1, 2) else column
        end = {0: _MOST_COLUMNS, 1: column + 1, 2: _MOST_COLUMNS}.get(what, column + steps)
        if begin < len(row.cells):
            row.erase(begin, end)
        if row.is_blank:
            row.is_dirty = False

    def _erase_rows(self, what: int, mark: Any) -> None:
        self._erase(min(what, 2), 0, mark)
        for place in list(self._rows):
            is_wanted = place > self._at if what == 0 else place < self._at if what == 1 else place != self._at
            if is_wanted:
                row = self._rows[place]
                self._show(row)
                row.erase(0, _MOST_COLUMNS)


def _bar_in(row: _Row, text: str) -> int:
    """Return the number of the bar that a row shows: two bars may take turns in it, or follow each other."""
    counted = _COUNTED.match(text)
    label = "".join(filter(str.isalpha, counted[1])) if counted else ""
    if label not in row.bars and len(row.bars) >= _MOST_LABELS:
        # This is no label, but the name of the item that the bar has reached.
        label = ""
    bar, was_full = row.bars.get(label, (0, False))
    is_full = _FULL in text
    if not bar or (was_full and not is_full and "%" in text):
        # The first one, or one that has begun where another one was complete.
        bar = next(_bars)
    row.bars[label] = bar, is_full
    return bar


def _pieces(text: str) -> list[tuple[str, str]]:
    """Return pieces of text, each with the escape sequence behind it."""
    pieces, place = [], 0
    for found in ESCAPE.finditer(text):
        pieces.append((text[place : found.start()], found[0]))
        place = found.end()
    return [*pieces, (text[place:], "")]


def _styled(style: str, sequence: str) -> str:
    """Return the style that applies after an escape sequence."""
    found = _CONTROL.match(sequence)
    if found is None or found[2] != "m":
        return style
    if not (reset := _RESET.match(found[1])):
        return (style + sequence)[-_MOST_STYLE:] if len(style + sequence) <= _MOST_STYLE else sequence
    return sequence if reset.end() < len(found[1]) else ""


def _cells(text: str) -> list[str]:
    """Return a text's characters as a terminal places them."""
    if text.isascii():
        return list(text)
    cells: list[str] = []
    for character in text:
        width = _width(character)
        if width:
            cells.append(character)
            if width == 2:
                cells.append("")
        elif cells:
            # It belongs to the character before, which may be wide.
            place = len(cells) - 1 if cells[-1] else len(cells) - 2
            cells[place] += character
    return cells


@lru_cache(maxsize=4096)
def _width(character: str) -> int:
    if unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1
