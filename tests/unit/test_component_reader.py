"""The reader over somebody else's log store: what it believes of a page."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest
from zenml.utils.time_utils import utc_now

from composite_logstore import Page, PageRequest
from composite_logstore.zenml import LogEntry, LogsEntriesFilter, LogStoreError, make_logs
from composite_logstore_component.reader import ComponentReader

LOGS = make_logs(uuid4(), "step", utc_now())


def read(found: Any, limit: int = 2) -> Page:
    reader = ComponentReader("theirs")
    reader._model = SimpleNamespace(id=uuid4(), name="theirs")  # type: ignore[assignment]
    reader._store = SimpleNamespace(  # type: ignore[assignment]
        id=uuid4(), name="theirs", flavor="own", fetch=lambda *_, **__: found, cleanup=lambda: None
    )
    return reader.read(PageRequest(LOGS, "newer", None, limit, LogsEntriesFilter()))


def found(entries: int, before: Any = None, after: Any = None) -> Any:
    return SimpleNamespace(items=[LogEntry(message="m")] * entries, before=before, after=after)


def test_a_page_as_it_should_be() -> None:
    page = read(found(2, after="c"))
    assert (len(page.entries), page.older, page.newer) == (2, None, "c")


@pytest.mark.parametrize("page", [found(3), found(100_000), found(1, after=7), found(1, before=b"c"), None, 7, found])
def test_one_that_makes_no_sense_is_an_error_of_the_log_store(page: Any) -> None:
    with pytest.raises(LogStoreError, match="'theirs'"):
        read(page)
