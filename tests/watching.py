"""A store that is watched while it works, and waiting for what it does, in real time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from zenml.models import LogsResponse

from composite_logstore import CompositeLogStore
from composite_logstore.zenml import LogEntry
from tests.patience import PATIENCE_SECONDS
from tests.simulation import assert_accounts_add_up


@contextmanager
def accounts_watched(store: CompositeLogStore, child: str) -> Iterator[list[str]]:
    """Check the accounts again and again, and note each state that the child has been in."""
    states: list[str] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.01):
            stats = store.stats()
            assert_accounts_add_up(stats)
            states.append(stats[child]["state"])

    with ThreadPoolExecutor(1) as pool:
        watching = pool.submit(watch)
        try:
            yield states
        finally:
            over.set()
        watching.result()


def wait_until(holds: Callable[[], bool], what: str, seconds: float = PATIENCE_SECONDS) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"it never happens that {what}"
        time.sleep(0.01)


LAST_WORDS = "ended without closing its logs"
"""What an entry says that tells of the death of a process."""


def fetched(store: CompositeLogStore, logs: LogsResponse) -> list[str]:
    """Return what the primary shows of a stream, page by page, without the entries that say that a process has died."""
    page = store.fetch(logs, start="oldest", limit=1_000)
    entries: list[LogEntry] = list(page.items)
    while page.items and page.after:
        page = store.fetch(logs, after=page.after)
        entries += page.items
    return [entry.message for entry in entries if LAST_WORDS not in entry.message]
