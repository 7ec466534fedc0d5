"""What the name of an object says: when it arrived, which events are in it, and what they have among them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from zenml.log_stores.artifact.artifact_log_store import LOGS_EXTENSION

from composite_logstore_artifact.lines import Summary

if TYPE_CHECKING:
    from composite_logstore_artifact.parts import Part

_NUMBER = r"(\d{1,20})"
_TIME = r"(-?\d{1,20})"
_NAME = re.compile(
    rf"(\d{{20}})-(\d{{20}})-([0-9a-f]{{15}})-{_NUMBER}-{_NUMBER}-{_TIME}-{_TIME}-{_NUMBER}(?:-{_NUMBER})?"
    + re.escape(LOGS_EXTENSION),
    re.ASCII,
)
_WRITER = re.compile(r"[0-9a-f]{15}")


class ObjectName(NamedTuple):
    """The name of an object that was written once, or of one that others were merged into.

    Attributes:
        arrival: When it was written, in nanoseconds since the epoch, or the first of those that were merged. Names
            sort by it.
        until: When the last of those that were merged was written; its own arrival where none was. So it
            comes right after the first of them.
        writer: Who wrote it.
        first: The number of its first event.
        last: The number of its last.
        summary: What its events have among them: a filter knows by the listing alone what to leave out.
        size: Of one that others were merged into: its size in bytes. If it has another, it is not whole.
    """

    arrival: int
    until: int
    writer: str
    first: int
    last: int
    summary: Summary
    size: int | None = None

    def __str__(self) -> str:
        text = f"{self.arrival:020d}-{self.until:020d}-{writer_in_names(self.writer)}-{self.first}-{self.last}"
        text += "".join(f"-{value}" for value in self.summary)
        return text + ("" if self.size is None else f"-{self.size}") + LOGS_EXTENSION

    @classmethod
    def parse(cls, name: str) -> ObjectName | None:
        """Return what a name says, None if it is none of ours."""
        match = _NAME.fullmatch(name)
        if match is None:
            return None
        arrival, until, writer, first, last, oldest, newest, level, size = match.groups()
        summary = Summary(int(oldest), int(newest), int(level))
        return cls(int(arrival), int(until), writer, int(first), int(last), summary, int(size) if size else None)

    @classmethod
    def of_merged(cls, names: Sequence[str], size: int) -> ObjectName:
        """Return the name of what objects of one writer are merged into.

        Args:
            names: Their names, in their order.
            size: The size of them all, in bytes.
        """
        parsed = [one for one in map(cls.parse, names) if one is not None]
        first, last = parsed[0], parsed[-1]
        summary = Summary(
            min(one.summary.oldest for one in parsed),
            max(one.summary.newest for one in parsed),
            max(one.summary.level for one in parsed),
        )
        return cls(first.arrival, last.until, first.writer, first.first, last.last, summary, size)

    def has_merged(self, other: ObjectName) -> bool:
        """Return whether the other one was merged into this one."""
        return (
            self.size is not None
            and other.size is None
            and self.writer == other.writer
            and self.arrival <= other.arrival <= self.until
            and self.first <= other.first
            and other.last <= self.last
        )


def writer_in_names(writer: str) -> str:
    """Return what stands for a writer in the names of its objects, 15 hexadecimal digits.

    A copied event may say anything of its writer, also what leads out of the folder.
    """
    if _WRITER.fullmatch(writer):
        return writer
    return hashlib.sha256(writer.encode("utf-8", "replace")).hexdigest()[:15]


def superseded(parts: Iterable[Part]) -> set[str]:
    """Return the names of the objects that are still there though they were merged into another that is, too.

    If that one is not whole, its own name in their place.

    Args:
        parts: All objects of a stream.
    """
    parsed = [(one, part) for part in parts if (one := ObjectName.parse(part.name)) is not None]
    copies: set[str] = set()
    merged: dict[str, list[tuple[ObjectName, Part]]] = {}
    for one, part in parsed:
        if one.size is not None:
            merged.setdefault(one.writer, []).append((one, part))
    for one, part in parsed:
        if one.size is not None:
            continue
        # Of a writer whose clock went back, what others wrote may lie between.
        for into, whole in merged.get(one.writer, ()):
            if into.has_merged(one):
                copies.add(part.name if into.size == whole.size else whole.name)
    return copies
