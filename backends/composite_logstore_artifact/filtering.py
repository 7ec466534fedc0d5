"""Finds the lines of an archive that a filter selects, most of them without parsing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import orjson

from composite_logstore import BACKFILLED, Event, ReadEntry
from composite_logstore.zenml import LogEntry, LogsEntriesFilter
from composite_logstore_artifact.lines import (
    Summary,
    entry_from,
    identity_of,
    is_piece,
    is_surely_entry,
    plain_entry,
    to_micros,
    to_utc,
)

# JSON may escape these characters, so a line that contains one in its message need not contain its byte.
_ESCAPED = re.compile(r'[\x00-\x1f"\\/]')
# Such an escape may stand for any character. Escapes of control characters are excepted: no search contains one.
_ODD_ESCAPE = re.compile(rb"\\u(?!00[01])")


class LineFilter:
    """Selects lines by a filter: by summaries first, then by bytes, and last by the parsed entry."""

    def __init__(self, filter_: LogsEntriesFilter) -> None:
        """Prepare the search.

        Args:
            filter_: The filter.
        """
        self._search = filter_.search.casefold() if filter_.search else None
        self._level = filter_.level.value if filter_.level else 0
        self._since = filter_.since
        self._until = filter_.until
        self._since_micros = to_micros(filter_.since) if filter_.since else None
        self._until_micros = to_micros(filter_.until) if filter_.until else None
        # The longest piece of the search text without characters that JSON may escape: every match contains it.
        self._piece = max(_ESCAPED.split(self._search or ""), key=len)
        self._piece_bytes = self._piece.encode("utf-8", "replace")

    @property
    def is_all(self) -> bool:
        """Whether the filter selects every line."""
        return self._search is None and not self.is_summarized

    @property
    def is_summarized(self) -> bool:
        """Whether a summary of lines may tell that the filter selects none of them."""
        return bool(self._level) or self._since is not None or self._until is not None

    def may_be_in(self, summary: Summary) -> bool:
        """Return whether the filter may select a line of those that were summarized."""
        return (
            summary.level >= self._level
            and (self._since_micros is None or summary.newest >= self._since_micros)
            and (self._until_micros is None or summary.oldest <= self._until_micros)
            and (summary.oldest <= summary.newest or (self._since is None and self._until is None))
        )

    def find(self, content: bytes, backwards: bool) -> Iterator[tuple[int, int]]:
        """Yield the beginning and the end, without the newline, of each line that the filter may select."""
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
        """Return whether bytes may contain the search text. This is as fast as a search in bytes."""
        if content.isascii():
            found = self._piece_bytes in content.lower()
        else:
            found = self._piece in content.decode("utf-8", "replace").casefold()
        return found or _ODD_ESCAPE.search(content) is not None

    def parse(self, text: bytes) -> ReadEntry | None:
        """Return the line as an entry; None if it is empty or the filter does not select it.

        As in ZenML, a line that is no JSON is an entry with the line as its message. A torn line of ours is none.
        """
        event: Event | None = None
        try:
            fields = orjson.loads(text)
            event = identity_of(fields)
            if event is not None and self._is_surely_unwanted(fields):
                return None
            if event is not None and type(attributes := fields.get("attributes")) is dict and BACKFILLED in attributes:
                # A backfilled event lies behind later ones of its writer, so its number tells nothing of gaps around
                # it.
                event = None
            entry: LogEntry | None = entry_from(fields)
        except ValueError:
            if is_piece(text):
                return None
            event = None
            entry = plain_entry(text)
        if entry is None or not self._wants(entry):
            return None
        return ReadEntry(entry, event)

    def _is_surely_unwanted(self, fields: dict[str, Any]) -> bool:
        """Return whether the filter surely excludes a line. Validation takes four times as long as all else."""
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
