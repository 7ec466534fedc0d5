"""However a log store of somebody else is paged through, and however large its entries, the pages are the stream."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from types import SimpleNamespace
from typing import Any, Literal
from uuid import uuid4

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from composite_logstore import Page, PageRequest
from composite_logstore.testing import make_logs, make_stream
from composite_logstore.zenml import LogEntry, LogsEntriesFilter, LogsEntriesResponse
from composite_logstore_component import reader as reader_module
from composite_logstore_component.reader import ComponentReader

Direction = Literal["newer", "older"]
LOGS = make_logs(make_stream())
BOUND = 100


class Theirs:
    """A log store whose cursors fix the size and the direction of their pages, as those of ZenML's Datadog store do."""

    name, flavor, id = "theirs", "own", uuid4()

    def __init__(self, messages: list[str], both_ways: bool) -> None:
        self.messages = list(messages)
        self.both_ways = both_ways

    def fetch(self, logs: Any, **given: Any) -> LogsEntriesResponse:
        cursor = given["before"] or given["after"]
        direction = "newer" if given["after"] or given["start"] == "oldest" else "older"
        place = 0 if direction == "newer" else len(self.messages)
        if cursor is not None:
            fixed = json.loads(cursor)
            if (fixed["limit"], fixed["direction"]) != (given["limit"], direction):
                raise ValueError("the limit conflicts with the cursor")
            place = fixed["place"]
        limit = given["limit"]
        ends = (place, place + limit) if direction == "newer" else (max(0, place - limit), place)
        found = self.messages[slice(*ends)]

        def at(to: Direction, place: int) -> str | None:
            if not self.both_ways and to != direction:
                return None
            return json.dumps({"limit": limit, "direction": to, "place": place})

        return LogsEntriesResponse(
            items=[LogEntry(message=message) for message in found],
            before=at("older", ends[0]) if ends[0] else None,
            after=at("newer", ends[0] + len(found)) if found else None,
        )

    def cleanup(self) -> None:
        """Close nothing."""


@contextmanager
def reading(theirs: Theirs, extends_artifact: bool = False) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reader_module, "find", lambda name: SimpleNamespace(id=uuid4(), name=name))
        patch.setattr(reader_module, "load", lambda model: theirs)
        patch.setattr(reader_module, "as_its_own", lambda logs, store: logs)
        patch.setattr(reader_module, "extends_artifact", lambda store: extends_artifact)
        yield


def page(direction: Direction, token: str | None, limit: int) -> Page:
    found = ComponentReader("theirs").read(PageRequest(LOGS, direction, token, limit, LogsEntriesFilter(), BOUND))
    assert len(found.entries) <= limit
    assert len(found.entries) <= 1 or sum(read.size for read in found.entries) <= BOUND
    return found


def said(found: Page) -> list[str]:
    return [read.entry.message for read in found.entries]


def pages(direction: Direction, token: str | None, limit: int) -> Iterator[Page]:
    while True:
        found = page(direction, token, limit)
        yield found
        token = found.newer if direction == "newer" else found.older
        if token is None or not found.entries:
            return


sizes = st.lists(st.sampled_from([3, 20, 60, 99, 101, 500]), max_size=25)


@settings(max_examples=150, deadline=None)
@given(sizes, st.integers(1, 12), st.sampled_from(["newer", "older"]))
def test_pages_are_the_stream_and_tokens_lead_back_and_forth(
    sizes: list[int], limit: int, direction: Direction
) -> None:
    messages = [f"{number:03d}".ljust(size) for number, size in enumerate(sizes)]
    with reading(Theirs(messages, both_ways=True)):
        passed: list[str] = []
        for found in pages(direction, None, limit):
            begin = len(passed) if direction == "newer" else len(messages) - len(passed) - len(found.entries)
            end = begin + len(found.entries)
            assert said(found) == messages[begin:end]
            passed += said(found)
            older = [said(one) for one in pages("older", found.older, limit)] if found.older else []
            newer = [said(one) for one in pages("newer", found.newer, limit)] if found.newer else []
            assert list(chain(*reversed(older))) == messages[:begin]
            assert not found.newer or list(chain(*newer)) == messages[end:]
        assert sorted(passed) == messages


@settings(max_examples=100, deadline=None)
@given(sizes, st.integers(1, 12), st.sampled_from(["newer", "older"]), st.booleans())
def test_a_log_store_that_reads_one_way_is_read_to_its_end(
    sizes: list[int], limit: int, direction: Direction, extends_artifact: bool
) -> None:
    messages = [f"{number:03d}".ljust(size) for number, size in enumerate(sizes)]
    theirs = Theirs(messages, both_ways=False)
    with reading(theirs, extends_artifact):
        if extends_artifact:
            whole = LogsEntriesResponse(items=[LogEntry(message=message) for message in messages])
            theirs.fetch = lambda *_, **__: whole  # type: ignore[method-assign]
        found = [said(one) for one in pages(direction, None, limit)]
        assert list(chain(*(found if direction == "newer" else reversed(found)))) == messages


@settings(max_examples=100, deadline=None)
@given(sizes, sizes, st.integers(1, 12))
def test_what_is_added_meanwhile_moves_no_older_page(sizes: list[int], added: list[int], limit: int) -> None:
    messages = [f"{number:03d}".ljust(size) for number, size in enumerate(sizes)]
    theirs = Theirs(messages, both_ways=True)
    with reading(theirs):
        found: list[str] = []
        for one in pages("older", None, limit):
            found = said(one) + found
            theirs.messages += [f"later {size}" for size in added[:2]]
        assert found == messages


@pytest.mark.parametrize(
    "token",
    [
        "part:",
        "part:{}",
        "part:[]",
        "part:[1]",
        'part:[0,"newer","x",null]',
        'part:[99,"newer","x",0]',
        'part:[true,"newer","x",0]',
        'part:[2,"newer",null,0]',
        'part:[2,"newer","x",-1]',
        'part:[2,"newer","x",3]',
        'part:[2,"newer","x",true]',
        'part:[2,"sideways","x",1]',
        'part:[2,"older","x",null]',
    ],
)
def test_a_token_that_no_page_returned_is_refused(token: str) -> None:
    with reading(Theirs(["a"], both_ways=True)), pytest.raises(ValueError, match="malformed"):
        page("newer", token, 2)
