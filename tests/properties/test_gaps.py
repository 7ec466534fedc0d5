"""Whatever is lost and however a stream is paged through, each gap is told once, where it is."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from composite_logstore import LogEvent, Stream
from composite_logstore.reading import gaps
from composite_logstore.testing import SimulatedBackend
from tests.events import make_events
from tests.simulation import make_child, make_logs, make_store

WRITERS = ["0123456789abcde", "fedcba987654321"]
NOTICE = re.compile(r"Child 'archive' is missing (\d+) entr(?:y|ies) here, between (.+) and (\d+) of writer (\w+)\.")


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(WRITERS), st.booleans()), max_size=14),
    st.lists(st.integers(0, 13), max_size=2),
    st.sampled_from(["oldest", "newest"]),
    st.integers(1, 6),
)
def test_each_gap_is_told_once(logged: list[tuple[str, bool]], copied: list[int], start: str, limit: int) -> None:
    backend = SimulatedBackend()
    store = make_store(make_child("archive", backend))
    logs = make_logs(store)
    stream = Stream(logs.id, {})
    numbers = dict.fromkeys(WRITERS, 0)
    kept: list[LogEvent] = []
    missing: list[tuple[str, int, int]] = []
    for writer, is_kept in logged:
        [event] = make_events(["m"], stream, numbers[writer], writer)
        numbers[writer] += 1
        if is_kept:
            last = max((other.sequence for other in kept if other.writer == writer), default=-1)
            if event.sequence > last + 1:
                missing.append((writer, last + 1, event.sequence - 1))
            kept.append(event)
    backend.received = list(kept)
    for place in copied:  # a redelivery repeats what came last
        backend.received[place:place] = backend.received[max(0, place - 3) : place]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gaps, "is_finished", lambda logs: True)
        way = "after" if start == "oldest" else "before"
        page = store.fetch(logs, start=start, limit=limit)
        items = list(page.items)
        while cursor := getattr(page, way):
            arguments: dict[str, Any] = {way: cursor}
            page = store.fetch(logs, **arguments)
            items = items + page.items if start == "oldest" else page.items + items

    told = []
    for place, entry in enumerate(items):
        if match := NOTICE.fullmatch(entry.message):
            count, before, after, writer = match.groups()
            first = 0 if before == "the beginning" else int(before) + 1
            assert int(count) == int(after) - first
            told.append((writer, first, int(after) - 1))
            # It stands before what follows in its writer's order.
            rest = [str(other.id) for other in items[place:]]
            assert next(event.uid for event in kept if event.writer == writer and event.sequence == int(after)) in rest
    assert [str(entry.id) for entry in items if entry.name != "composite_logstore"] == [event.uid for event in kept]
    assert sorted(told) == sorted(missing)
