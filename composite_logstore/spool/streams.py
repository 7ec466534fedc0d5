"""The streams of a spool: one object for each id, however many lines name it."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from composite_logstore.event import Stream


class Streams:
    """The streams that the lines of a spool name.

    Segments of a living process add the streams that they write, so that an event that is read back has the same
    stream as one that stayed in memory. Streams of other processes are learned from the lines.
    """

    def __init__(self) -> None:
        self._by_id: dict[str, Stream] = {}

    def add(self, stream: Stream) -> str:
        """Add a stream that is written. Returns its id as lines have it."""
        id = str(stream.id)
        self._by_id[id] = stream
        return id

    def forget(self, stream: Stream) -> None:
        """Remove a stream that was added."""
        del self._by_id[str(stream.id)]

    def of(self, id: Any) -> Stream | None:
        """Return the stream with an id, None if the id is not valid.

        An id that no line has described gets a stream all the same: that line may be damaged, and the id is enough for
        backends to find the stream's events.
        """
        if not isinstance(id, str):
            return None
        stream = self._by_id.get(id)
        if stream is None and (valid := _uuid(id)):
            stream = self._by_id.setdefault(id, Stream(valid, {"zenml.log.id": str(valid)}))
        return stream

    def learned(self, line: dict[str, Any], is_scan: bool) -> Stream | None:
        """Learn a stream's attributes from a line.

        Args:
            line: The line's value.
            is_scan: Whether all lines are read in order, so that later attributes replace earlier ones. Otherwise only
                a stream that is new learns: reading may begin at an old line.

        Returns:
            The stream, None if the line does not describe one.
        """
        id, store_id, attributes = line.get("stream"), line.get("artifact_store_id"), line.get("attributes")
        is_known = isinstance(id, str) and id in self._by_id
        stream = self.of(id)
        artifact_store_id = None if store_id is None else _uuid(store_id)
        if stream is None or (store_id is not None and artifact_store_id is None) or not isinstance(attributes, dict):
            return None
        if is_scan or not is_known:
            stream.artifact_store_id = artifact_store_id
            stream.metadata = attributes
        return stream


def _uuid(text: Any) -> UUID | None:
    try:
        return UUID(text) if type(text) is str else None
    except ValueError:
        return None
