"""Pages through a stream, as people do who change the size of the page on the way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from composite_logstore import PageRequest, ReadEntry, Reader, Stream
from composite_logstore.testing import make_logs
from composite_logstore.zenml import LogsEntriesFilter


def walked(
    make_reader: Callable[[], Reader],
    stream: Stream,
    direction: Literal["newer", "older"],
    limits: Sequence[int],
    filter_: LogsEntriesFilter,
    most_bytes: int | None = None,
) -> list[ReadEntry]:
    """Return all entries, oldest first. Each page has a reader of its own, as on ZenML's server, and the next limit."""
    logs = make_logs(stream)
    found: list[ReadEntry] = []
    token: str | None = None
    for number in range(100):
        limit = limits[number % len(limits)]
        page = make_reader().read(PageRequest(logs, direction, token, limit, filter_, most_bytes))
        assert len(page.entries) <= limit
        assert most_bytes is None or len(page.entries) <= 1 or sum(read.size for read in page.entries) <= most_bytes
        found = [*found, *page.entries] if direction == "newer" else [*page.entries, *found]
        token = page.newer if direction == "newer" else page.older
        if token is None:
            return found
    raise AssertionError("the pages have no end")
