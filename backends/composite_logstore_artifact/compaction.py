"""Many small objects of a stream become a few large ones, so that no listing has thousands.

What is merged is written first, as a whole, under a name that says which objects it has taken in; then those
are removed. So a reader that comes between, or after a process that died in between, knows the copies by their
names. Each object is merged once.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing
from typing import TYPE_CHECKING

from composite_logstore_artifact.lines import Summary
from composite_logstore_artifact.objects import ObjectName, superseded
from composite_logstore_artifact.parts import Part, fetched, open_archive

if TYPE_CHECKING:
    from zenml.artifact_stores import BaseArtifactStore

LARGEST_OBJECT = 32 * 1024 * 1024
"""In bytes: so much fits into memory, and ten million lines are a hundred objects."""


def compact(artifact_store: BaseArtifactStore, uri: str, writer: str) -> None:
    """Merge what one writer has written to a stream, where nothing of others lies between.

    Only the writer itself may ask for it: nothing of its own is on its way then.

    Args:
        artifact_store: Where the stream is.
        uri: Its folder.
        writer: The writer.

    Raises:
        Exception: The artifact store's own error. What was not merged is as it was.
    """
    archive = open_archive(artifact_store, uri)
    if archive is None or not archive.is_folder:
        return
    left_over = superseded(part.name for part in archive.parts)
    own = [name for name in left_over if (parsed := ObjectName.parse(name)) and parsed.writer == writer]
    _remove(artifact_store, uri, own)
    for group in _groups([part for part in archive.parts if part.name not in left_over], writer):
        contents = []
        with closing(fetched((part for part, _ in group), lambda part: (0, part.size))) as parts:
            for part in parts:
                with closing(part):
                    contents.append(part.read(0, part.size))
        names = [name for _, name in group]
        first, last = names[0], names[-1]
        summary = Summary(
            min(name.summary.oldest for name in names),
            max(name.summary.newest for name in names),
            max(name.summary.level for name in names),
        )
        merged = ObjectName(first.arrival, writer, first.first, last.last, summary, last.arrival)
        with artifact_store.open(os.path.join(uri, str(merged)), "wb") as file:
            file.write(b"".join(contents))
        _remove(artifact_store, uri, [str(name) for name in names])


def _groups(parts: list[Part], writer: str) -> Iterator[list[tuple[Part, ObjectName]]]:
    """Yield what can be merged: neighbours, so that everything stays in its order."""
    group: list[tuple[Part, ObjectName]] = []
    size = 0
    for part in parts:
        name = ObjectName.parse(part.name)
        fits = name is not None and name.writer == writer and name.merged is None
        if not fits or size + part.size > LARGEST_OBJECT:
            if len(group) > 1:
                yield group
            group, size = [], 0
        if fits and name is not None:
            group.append((part, name))
            size += part.size
    if len(group) > 1:
        yield group


def _remove(artifact_store: BaseArtifactStore, uri: str, names: list[str]) -> None:
    filesystem = getattr(artifact_store, "filesystem", None)
    if filesystem is not None and names:
        # One request for up to 1,000 of them.
        filesystem.rm([os.path.join(uri, name) for name in names])
        return
    for name in names:
        artifact_store.remove(os.path.join(uri, name))
