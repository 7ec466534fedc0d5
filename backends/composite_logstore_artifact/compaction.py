"""Compaction: merges many small objects of a stream into a few large ones, so that no listing has thousands.

The objects may be the only copy of a team's logs. So an exporter merges only objects that it has written itself, and
only if a listing shows them with the size that they should have. It first writes the merged object as a whole, under a
name that says which objects are in it and which size it has. It removes the originals once a listing shows the merged
object. So a reader that lists in between, or after the process died in between, recognizes the originals by their
names. Each object is merged once.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from queue import Queue
from typing import TYPE_CHECKING, NamedTuple

from zenml.logger import get_logger

from composite_logstore_artifact.objects import ObjectName
from composite_logstore_artifact.parts import Archive, Part, contents_of, open_archive

if TYPE_CHECKING:
    from zenml.artifact_stores import BaseArtifactStore

logger = get_logger(__name__)

LARGEST_OBJECT = 32 * 1024 * 1024
"""The largest merged object, in bytes: it fits into memory, and ten million lines make a hundred of them."""


class _Due(NamedTuple):
    """Objects to merge: those that were written since the last time, by name, with their sizes in bytes."""

    artifact_store: BaseArtifactStore
    uri: str
    written: dict[str, int]
    is_last: bool


class Compaction:
    """Merges the objects of one exporter, on a thread of its own.

    Merging may take longer than an export may, and if it hangs, exports must continue. If it fails, the objects remain,
    and are merged with the next ones.
    """

    def __init__(self) -> None:
        """Start nothing."""
        self._due: Queue[_Due | None] = Queue()
        self._thread: threading.Thread | None = None
        self._loose: dict[str, Loose] = {}
        self._is_failing = False

    def begin(self, artifact_store: BaseArtifactStore, uri: str, written: dict[str, int], is_last: bool) -> None:
        """Merge these objects when the earlier ones are merged.

        Args:
            artifact_store: The artifact store.
            uri: The folder of the stream.
            written: The names of the objects, oldest first, and their sizes in bytes.
            is_last: Whether the stream has ended.
        """
        self._due.put(_Due(artifact_store, uri, written, is_last))
        if self._thread is None:
            thread = threading.Thread(target=self._work, name="composite-logstore compaction", daemon=True)
            # The system may limit threads, and none starts late in a process's exit. The next call tries again.
            with suppress(Exception):
                thread.start()
                self._thread = thread

    def wait(self) -> None:
        """Wait until all objects are merged."""
        if self._thread is not None:
            self._due.join()

    def close(self) -> None:
        """Wait until all objects are merged, and end the thread."""
        if self._thread is not None:
            self._due.put(None)
            self._thread.join()
            self._thread = None

    def _work(self) -> None:
        while (due := self._due.get()) is not None:
            error: BaseException | None = None
            try:
                loose = self._loose.setdefault(due.uri, Loose())
                loose.written.update(due.written)
                compact(due.artifact_store, due.uri, loose)
            except BaseException as raised:  # The thread must survive: `wait` would otherwise wait for ever.
                error = raised
            finally:
                if due.is_last:
                    self._loose.pop(due.uri, None)
                self._tell(error)
                self._due.task_done()
        self._due.task_done()

    def _tell(self, error: BaseException | None) -> None:
        """Warn once when merging begins to fail, and once when it works again. The error's text may be secret."""
        was_failing, self._is_failing = self._is_failing, error is not None
        with suppress(BaseException):
            if error is not None and not was_failing:
                logger.warning(
                    f"small objects of logs cannot be merged ({type(error).__name__}). The logs are complete, but "
                    "listing them takes longer until merging works again."
                )
            elif error is None and was_failing:
                logger.warning("small objects of logs are merged again.")


@dataclass
class Loose:
    """The objects of a stream that an exporter still has to merge or remove.

    Attributes:
        written: The names of the objects to merge, oldest first, and their sizes in bytes.
        merged: The names of the objects that were merged, and may not be removed yet.
    """

    written: dict[str, int] = field(default_factory=dict)
    merged: set[str] = field(default_factory=set)


def compact(artifact_store: BaseArtifactStore, uri: str, loose: Loose) -> None:
    """Merge objects that are neighbours in the listing.

    Raises:
        Exception: The artifact store's own error. Objects that were not merged are unchanged.
    """
    archive = open_archive(artifact_store, uri)
    if archive is not None and _are_there(loose.merged, archive):
        # Remove originals that could not be removed before. s3fs does not tell whether it removed them, so list again.
        _remove(artifact_store, uri, _are_there(loose.merged, archive))
        archive = open_archive(artifact_store, uri)
        if archive is not None and _are_there(loose.merged, archive):
            # Who may write here, but not remove, shall not get more and more copies.
            return
    if archive is None:
        return
    loose.merged.clear()
    sizes = {part.name: part.size for part in archive.parts}
    others = [name for name, size in loose.written.items() if sizes.get(name) != size]
    if others:
        # The listing is outdated, or another program has changed the folder, so what lies between two objects is not
        # known. These objects are never merged, so that a later listing lets the others be merged.
        for name in others:
            del loose.written[name]
        return
    for group in _groups(archive.parts, loose.written):
        _merge(archive, group, loose)


def _are_there(names: set[str], archive: Archive) -> list[str]:
    return [part.name for part in archive.parts if part.name in names]


def _groups(parts: Sequence[Part], written: dict[str, int]) -> Iterator[list[Part]]:
    """Yield groups to merge: neighbours of one writer, so that the order stays the same and one name describes a group.

    An exporter that delivers recovered events writes for several writers.
    """
    group: list[Part] = []
    size, before = 0, None
    for part in parts:
        name = ObjectName.parse(part.name) if part.name in written else None
        follows = name is not None and (before is None or (name.writer == before.writer and name.first > before.last))
        if not follows or size + part.size > LARGEST_OBJECT:
            if len(group) > 1:
                yield group
            group, size = [], 0
        if name is not None:
            group.append(part)
            size += part.size
        before = name
    if len(group) > 1:
        yield group


def _merge(archive: Archive, group: list[Part], loose: Loose) -> None:
    artifact_store, uri = archive.artifact_store, archive.uri
    names = [part.name for part in group]
    merged = str(ObjectName.of_merged(names, sum(part.size for part in group)))
    contents = contents_of(archive, group)
    is_needed = False
    try:
        with artifact_store.open(os.path.join(uri, merged), "wb") as file:
            while contents:
                file.write(contents.pop(0))
        # Remove nothing unless all objects are listed, side by side.
        there = open_archive(artifact_store, uri)
        found = [(part.name, part.size) for part in there.parts if names[0] <= part.name <= names[-1]] if there else []
        originals = [(part.name, part.size) for part in group]
        if found != [originals[0], (merged, sum(part.size for part in group)), *originals[1:]]:
            # If another program has removed an original, the merged object may be the only copy.
            is_needed = not set(originals) <= set(found)
            raise OSError("the merged object is not listed as it should be")
    except Exception:
        if not is_needed:
            with suppress(Exception):
                _remove(artifact_store, uri, [merged])
        raise
    for name in names:
        del loose.written[name]
    loose.merged.update(names)
    _remove(artifact_store, uri, names)


def _remove(artifact_store: BaseArtifactStore, uri: str, names: Sequence[str]) -> None:
    filesystem = getattr(artifact_store, "filesystem", None)
    if filesystem is not None:
        # One request removes up to 1,000 objects.
        filesystem.rm([os.path.join(uri, name) for name in names])
        return
    for name in names:
        artifact_store.remove(os.path.join(uri, name))
