"""Which lines of an archive a filter selects."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import orjson
from zenml.models import LogEntry, LogsEntriesFilter

from composite_logstore import BACKFILLED, Event, ReadEntry
from composite_logstore_artifact.lines import (
    Summary,
    identity_of,
    is_piece,
    is_surely_entry,
    plain_entry,
    to_micros,
    to_utc,
)

# What JSON may write in another way than as itself, so that a line that has it need not show it.
_ESCAPED = re.compile(r'[\x00-\x1f"\\/]')
# An escape that may stand for any character. Those of control characters stand for nothing that is looked for.
_ODD_ESCAPE = re.compile(rb"\\u(?!00[01])")


class LineFilter:
    """What a filter wants."""

    def __init__(self, filter_: LogsEntriesFilter) -> None:
        """Prepare to look for it."""
        self._search = filter_.search.casefold() if filter_.search else None
        self._level = filter_.level.value if filter_.level else 0
        self._since = filter_.since
        self._until = filter_.until
        self._since_micros = to_micros(filter_.since) if filter_.since else None
        self._until_micros = to_micros(filter_.until) if filter_.until else None
        # Of what is searched for, the longest piece that is in every line that has it, whatever JSON escapes.
        self._piece = max(_ESCAPED.split(self._search or ""), key=len)
        self._piece_bytes = self._piece.encode("utf-8", "replace")

    @property
    def is_all(self) -> bool:
        """Whether everything is wanted."""
        return self._search is None and not self.is_summarized

    @property
    def is_summarized(self) -> bool:
        """Whether a summary may tell that nothing is wanted."""
        return bool(self._level) or self._since is not None or self._until is not None

    def may_be_in(self, summary: Summary) -> bool:
        """Return whether it may be among the lines that were summarized."""
        return (
            summary.level >= self._level
            and (self._since_micros is None or summary.newest >= self._since_micros)
            and (self._until_micros is None or summary.oldest <= self._until_micros)
            and (summary.oldest <= summary.newest or (self._since is None and self._until is None))
        )

    def find(self, content: bytes, backwards: bool) -> Iterator[tuple[int, int]]:
        """Yield where the lines begin and end that may be wanted, without their newlines."""
        if self._piece and not self._may_be_in(content):
            return
        end = len(content)
        if backwards:
            if content.endswith(b"\n"):
                end -= 1
            while end >= 0:
                begin = content.rfind(b"\n", 0, end) + 1
                if not self._piece or self._may_be_in(content[begin:end]):
                    yield begin, end
                end = begin - 1
            return
        begin = 0
        while begin < end:
            newline = content.find(b"\n", begin)
            last = end if newline < 0 else newline
            if not self._piece or self._may_be_in(content[begin:last]):
                yield begin, last
            begin = last + 1

    def _may_be_in(self, content: bytes) -> bool:
        """Judge bytes by what is searched for, at the speed of a search in bytes."""
        if content.isascii():
            found = self._piece_bytes in content.lower()
        else:
            found = self._piece in content.decode("utf-8", "replace").casefold()
        return found or _ODD_ESCAPE.search(content) is not None

    def parse(self, text: bytes) -> ReadEntry | None:
        """Return the line as an entry, None if it is empty or not wanted.

        A line that is not an entry is one all the same, of plain text, as ZenML has it, but for a piece of one.
        """
        event: Event | None = None
        try:
            fields = orjson.loads(text)
            event = identity_of(fields)
            if event is not None and self._is_surely_unwanted(fields):
                return None
            if event is not None and type(attributes := fields.get("attributes")) is dict and BACKFILLED in attributes:
                # It lies after later ones of its writer: its number says nothing of what is missing around it.
                event = None
            entry: LogEntry | None = LogEntry.model_validate(fields)
        except ValueError:
            if is_piece(text):
                return None
            event = None
            entry = plain_entry(text)
        if entry is None or not self._wants(entry):
            return None
        return ReadEntry(entry, event)

    def _is_surely_unwanted(self, fields: dict[str, Any]) -> bool:
        """Judge an event's line before it is validated, which takes four times as long as the rest."""
        if self.is_all or not is_surely_entry(fields):
            return False
        if fields["level"] < self._level or (self._search and self._search not in fields["message"].casefold()):
            return True
        if self._since is None and self._until is None:
            return False
        timestamp = datetime.fromisoformat(fields["timestamp"])
        return (self._since is not None and timestamp < self._since) or (
            self._until is not None and timestamp > self._until
        )

    def _wants(self, entry: LogEntry) -> bool:
        if self._level and (entry.level is None or entry.level.value < self._level):
            return False
        if self._search is not None and self._search not in entry.message.casefold():
            return False
        if self._since is None and self._until is None:
            return True
        timestamp = to_utc(entry.timestamp)
        if timestamp is None:
            return False
        return (self._since is None or self._since <= timestamp) and (self._until is None or timestamp <= self._until)
