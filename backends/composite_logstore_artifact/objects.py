"""The names of an archive's objects: when an object arrived, which events it has, and a summary of them."""

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
    """The name of an object that was written once, or of a merged object, which replaces several of these.

    Attributes:
        arrival: When the object was written, in nanoseconds since the epoch; of a merged object, when the first of its
            originals was written. Names sort by it.
        until: Of a merged object, when the last of its originals was written; otherwise the same as `arrival`. So a
            merged object sorts right after the first of its originals.
        writer: The writer of its events.
        first: The number of its first event.
        last: The number of its last event.
        summary: The summary of its events. With it, a filter excludes objects by the listing alone.
        size: Of a merged object, the size in bytes that it should have; with another size it is incomplete.
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
        """Return the parsed name; None if our exporter does not write such names."""
        match = _NAME.fullmatch(name)
        if match is None:
            return None
        arrival, until, writer, first, last, oldest, newest, level, size = match.groups()
        summary = Summary(int(oldest), int(newest), int(level))
        return cls(int(arrival), int(until), writer, int(first), int(last), summary, int(size) if size else None)

    @classmethod
    def of_merged(cls, names: Sequence[str], size: int) -> ObjectName:
        """Return the name of the object into which objects of one writer are merged.

        Args:
            names: The names of the originals, in their order.
            size: The size of all originals together, in bytes.
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
        """Return whether the other object was merged into this one."""
        return (
            self.size is not None
            and other.size is None
            and self.writer == other.writer
            and self.arrival <= other.arrival <= self.until
            and self.first <= other.first
            and other.last <= self.last
        )


def writer_in_names(writer: str) -> str:
    """Return 15 hexadecimal digits that stand for a writer in the names of its objects.

    A backfilled event may name any writer, even one that as a path would lead out of the folder.
    """
    if _WRITER.fullmatch(writer):
        return writer
    return hashlib.sha256(writer.encode("utf-8", "replace")).hexdigest()[:15]


def superseded(parts: Iterable[Part]) -> set[str]:
    """Return the names of the objects to ignore.

    These are the originals of a merged object, as long as they are not removed; or the merged object, if it is
    incomplete.

    Args:
        parts: All objects of a stream.
    """
    parsed = [(one, part) for part in parts if (one := ObjectName.parse(part.name)) is not None]
    ignored: set[str] = set()
    merged: dict[str, list[tuple[ObjectName, Part]]] = {}
    for one, part in parsed:
        if one.size is not None:
            merged.setdefault(one.writer, []).append((one, part))
    for one, part in parsed:
        if one.size is not None:
            continue
        # If a writer's clock went back, objects of others may lie between its own.
        for into, whole in merged.get(one.writer, ()):
            if into.has_merged(one):
                ignored.add(part.name if into.size == whole.size else whole.name)
    return ignored
