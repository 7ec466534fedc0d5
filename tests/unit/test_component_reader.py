"""The reader over somebody else's log store: what it believes of a page."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest
from zenml.utils.time_utils import utc_now

from composite_logstore import Page, PageRequest, Stream
from composite_logstore.reading.ranks import rank_of
from composite_logstore.testing import SimulatedBackend, SimulatedChildConfig, make_events
from composite_logstore.zenml import LogEntry, LogsEntriesFilter, LogStoreError, fetch_page, moved
from composite_logstore.zenml import make_logs as describe
from composite_logstore_component.reader import ComponentReader
from tests.simulation import make_child, make_logs, make_store

LOGS = describe(uuid4(), "step", utc_now())


def reader_of(store: Any) -> ComponentReader:
    reader = ComponentReader("theirs")
    reader._model = SimpleNamespace(id=uuid4(), name="theirs")  # type: ignore[assignment]
    reader._store = store
    return reader


def somebody_s(fetch: Callable[..., Any]) -> Any:
    """Return a log store of somebody else's class."""
    return SimpleNamespace(id=uuid4(), name="theirs", flavor="own", fetch=fetch, cleanup=lambda: None)


def read(found: Any, limit: int = 2) -> Page:
    reader = reader_of(somebody_s(lambda *_, **__: found))
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


@pytest.mark.needs_paged_fetch
@pytest.mark.parametrize("is_wrapped", [False, True], ids=["itself", "by way of somebody's log store"])
def test_a_composite_within_another_shows_a_rank_once(is_wrapped: bool) -> None:
    backend = SimulatedBackend()
    inner = make_store(make_child("archive", backend))
    logs = make_logs(inner)
    backend.received += make_events(["m0", "m1"], Stream(logs.id, {}), metadata={"zenml.log.rank": 2})
    store = somebody_s(lambda *_, **asked: inner.fetch(logs)) if is_wrapped else inner

    class Nesting(SimulatedChildConfig):
        def create_reader(self) -> Any:
            return reader_of(store)

    outer = make_store(Nesting(name="nesting", type="simulated"))
    logs_of_outer = moved(logs, log_store_id=outer.id)
    assert [entry.message for entry in outer.fetch(logs_of_outer).items] == ["[rank 2] m0", "[rank 2] m1"]
    if not is_wrapped:
        # This package's own commands read it as if it were the only one.
        own = fetch_page(outer, logs_of_outer).items
        assert [(rank_of(entry), entry.message) for entry in own] == [(2, "m0"), (2, "m1")]
