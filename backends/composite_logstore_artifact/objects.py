"""What the name of an object says: when it arrived, which events are in it, and what they have among them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from zenml.log_stores.artifact.artifact_log_store import LOGS_EXTENSION

from composite_logstore_artifact.lines import Summary

_NAME = re.compile(
    r"(\d{20})-([0-9a-f]{15})-(\d+)-(\d+)-(-?\d+)-(-?\d+)-(\d+)(?:-(\d{20}))?" + re.escape(LOGS_EXTENSION)
)


class ObjectName(NamedTuple):
    """The name of an object that was written once, or of one that others were merged into.

    Attributes:
        arrival: When it was written, in nanoseconds since the epoch. Names sort by it.
        writer: Who wrote it.
        first: The number of its first event.
        last: The number of its last.
        summary: What its events have among them: a filter knows by the listing alone what to leave out.
        merged: The arrival of the last object that was merged into this one, None if none was.
    """

    arrival: int
    writer: str
    first: int
    last: int
    summary: Summary
    merged: int | None = None

    def __str__(self) -> str:
        text = f"{self.arrival:020d}-{self.writer}-{self.first}-{self.last}-{'-'.join(map(str, self.summary))}"
        return text + ("" if self.merged is None else f"-{self.merged:020d}") + LOGS_EXTENSION

    @classmethod
    def parse(cls, name: str) -> ObjectName | None:
        """Return what a name says, None if it is none of ours."""
        match = _NAME.fullmatch(name)
        if match is None:
            return None
        arrival, writer, first, last, oldest, newest, level, merged = match.groups()
        summary = Summary(int(oldest), int(newest), int(level))
        return cls(int(arrival), writer, int(first), int(last), summary, int(merged) if merged else None)

    def has_merged(self, other: ObjectName) -> bool:
        """Return whether the other one was merged into this one."""
        return (
            self.merged is not None
            and other.merged is None
            and self.writer == other.writer
            and self.arrival <= other.arrival <= self.merged
            and self.first <= other.first
            and other.last <= self.last
        )


def superseded(names: Iterable[str]) -> set[str]:
    """Return the names of the objects that are still there though they were merged into another that is, too."""
    parsed = {name: ObjectName.parse(name) for name in names}
    merged = [name for name in parsed.values() if name is not None and name.merged is not None]
    return {name for name, one in parsed.items() if one is not None and any(into.has_merged(one) for into in merged)}
