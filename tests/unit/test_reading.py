from __future__ import annotations

import base64
import json
import zlib
from dataclasses import replace
from datetime import datetime, timedelta
from itertools import chain
from random import Random
from typing import Any
from uuid import UUID, uuid4

import pytest
from zenml.enums import LoggingLevels
from zenml.exceptions import DoesNotExistException
from zenml.models import LogsResponse

from composite_logstore import Bounds, CompositeLogStore, Event, LogEvent, Page, PageRequest, ReadEntry, Stream, clock
from composite_logstore.delivery.backoff import LONGEST_RETRY_AFTER
from composite_logstore.reading import gaps, pages, unreachable
from composite_logstore.reading.ranks import rank_of
from composite_logstore.testing import SimulatedBackend, SimulatedChildConfig, SimulatedClock
from composite_logstore.testing.backend import SimulatedReader
from composite_logstore.zenml import (
    LogEntry,
    LogsEntriesFilter,
    LogsEntriesResponse,
    LogStoreError,
    LogStoreRateLimitError,
    LogStoreUnavailableError,
    fetch_page,
)
from tests.deep import mostly_deep
from tests.events import make_events
from tests.simulation import make_child, make_logs, make_store


def stored(store: CompositeLogStore, backend: SimulatedBackend, count: int, first: int = 0) -> LogsResponse:
    logs = make_logs(store)
    add(backend, logs, count, first)
    return logs


def add(backend: SimulatedBackend, logs: LogsResponse, count: int, first: int = 0, **changes: Any) -> list[LogEvent]:
    stream = Stream(logs.id, {})
    events = make_events([f"m{number}" for number in range(first, first + count)], stream, first=first, **changes)
    backend.received += events
    return events


def messages(page: LogsEntriesResponse) -> list[str]:
    return [entry.message for entry in page.items]


def numbered(first: int, last: int) -> list[str]:
    return [f"m{number}" for number in range(first, last)]


@pytest.fixture
def backend() -> SimulatedBackend:
    return SimulatedBackend()


@pytest.fixture
def store(backend: SimulatedBackend) -> CompositeLogStore:
    return make_store(make_child("archive", backend), make_child("live"))


def test_the_newest_page_comes_first_when_nothing_is_asked(store: CompositeLogStore, backend: SimulatedBackend) -> None:
    logs = stored(store, backend, 10)
    assert messages(store.fetch(logs, limit=3)) == numbered(7, 10)
    assert messages(store.fetch(logs)) == numbered(0, 10)
    assert messages(store.fetch(logs, start="oldest", limit=3)) == numbered(0, 3)


@pytest.mark.parametrize("limit", [1, 3, 10, 11])
def test_pages_lead_through_the_whole_stream_both_ways(
    store: CompositeLogStore, backend: SimulatedBackend, limit: int
) -> None:
    logs = stored(store, backend, 10)
    page = store.fetch(logs, limit=limit)
    read = messages(page)
    while page.before:
        page = store.fetch(logs, before=page.before)
        read = messages(page) + read
    assert read == numbered(0, 10)
    page = store.fetch(logs, start="oldest", limit=limit)
    read = messages(page)
    while page.after:
        page = store.fetch(logs, after=page.after)
        read += messages(page)
    assert read == numbered(0, 10)


@pytest.mark.parametrize("most_bytes", [1, 5, 9, 1_000])
@pytest.mark.parametrize("keeps_limit", [True, False])
def test_a_page_is_bounded_in_bytes_even_if_the_reader_does_not_bound_it(
    store: CompositeLogStore,
    backend: SimulatedBackend,
    monkeypatch: pytest.MonkeyPatch,
    most_bytes: int,
    keeps_limit: bool,
) -> None:
    """Both ends show the same entries. A reader that keeps no limit either has its page returned as it is."""
    monkeypatch.setattr(Bounds, "ENTRIES_BYTES", most_bytes)
    if not keeps_limit:
        read = SimulatedReader.read
        monkeypatch.setattr(SimulatedReader, "read", lambda self, request: read(self, replace(request, limit=1_000)))
    logs = stored(store, backend, 10)
    newest, oldest = store.fetch(logs), store.fetch(logs, start="oldest")
    backwards, forwards = [messages(newest)], [messages(oldest)]
    while newest.before:
        newest = store.fetch(logs, before=newest.before)
        backwards.insert(0, messages(newest))
    while oldest.after and messages(oldest):
        oldest = store.fetch(logs, after=oldest.after)
        forwards.append(messages(oldest))
    assert list(chain(*backwards)) == list(chain(*forwards)) == numbered(0, 10)
    if keeps_limit:
        # Each message has 2 bytes.
        assert max(map(len, [*backwards, *forwards])) == max(1, min(most_bytes // 2, 10))


def test_one_can_turn_around_on_any_page(store: CompositeLogStore, backend: SimulatedBackend) -> None:
    logs = stored(store, backend, 10)
    newest = store.fetch(logs, limit=3)
    older = store.fetch(logs, before=newest.before)
    assert messages(older) == numbered(4, 7)
    assert messages(store.fetch(logs, after=older.after)) == numbered(7, 10)


def test_a_cursor_stays_good_while_the_stream_grows(store: CompositeLogStore, backend: SimulatedBackend) -> None:
    logs = stored(store, backend, 5)
    page = store.fetch(logs)
    assert messages(store.fetch(logs, after=page.after)) == []
    add(backend, logs, 2, first=5)
    assert messages(store.fetch(logs, after=page.after)) == numbered(5, 7)


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 100])
@pytest.mark.parametrize("start", ["oldest", "newest"])
def test_what_arrived_twice_is_returned_once_across_pages(
    store: CompositeLogStore, backend: SimulatedBackend, limit: int, start: str
) -> None:
    logs = stored(store, backend, 6)
    add(backend, logs, 3, first=3)
    add(backend, logs, 2, first=6)
    page = store.fetch(logs, start=start, limit=limit)
    pages = [messages(page)]
    while cursor := page.before if start == "newest" else page.after:
        page = store.fetch(logs, **{"before" if start == "newest" else "after": cursor})
        pages.append(messages(page))
    ordered = pages[::-1] if start == "newest" else pages
    assert [message for part in ordered for message in part] == numbered(0, 8)
    assert all(pages[:-1]), "an empty page would look like the end"


@pytest.mark.parametrize("start", ["oldest", "newest"])
def test_a_copy_on_the_same_page_changes_no_order(
    store: CompositeLogStore, backend: SimulatedBackend, start: str
) -> None:
    logs = stored(store, backend, 5)
    # What was sent with it the second time, the backend then rejects.
    add(backend, logs, 1, first=2)
    assert messages(store.fetch(logs, start=start)) == numbered(0, 5)


@pytest.mark.parametrize("limit", [1, 2, 3, 5, 7, 100])
@pytest.mark.parametrize("in_order", [True, False])
def test_what_arrived_out_of_order_is_no_duplicate(
    store: CompositeLogStore,
    backend: SimulatedBackend,
    monkeypatch: pytest.MonkeyPatch,
    limit: int,
    in_order: bool,
) -> None:
    """A clock that goes back between a death and the recovery: names, or times, say another order than numbers."""
    monkeypatch.setattr(SimulatedReader, "in_order", in_order)
    logs = stored(store, backend, 10, first=10)
    add(backend, logs, 13)  # what was sent again, and what was not
    add(backend, logs, 5, first=18)
    for start, way in (("oldest", "after"), ("newest", "before")):
        entries = list(walked(store, logs, start, way, limit))
        assert sorted(int(entry.message[1:]) for entry in entries) == list(range(23))


def walked(store: CompositeLogStore, logs: LogsResponse, start: str, way: str, limit: int, **filters: Any) -> Any:
    """Yield all entries, page by page."""
    page = store.fetch(logs, start=start, limit=limit, filter_=LogsEntriesFilter(**filters))
    while True:
        yield from page.items
        cursor = getattr(page, way)
        if cursor is None:
            return
        assert len(cursor) < 8_000, "a URL has no room for it"
        page = store.fetch(logs, **{way: cursor})


@pytest.mark.parametrize(
    ("writers", "events", "kept"), mostly_deep([(40, 200, 3_000), (2_000, 2, 200), (1, 8_000, 3_000)])
)
@pytest.mark.parametrize(("start", "way"), [("oldest", "after"), ("newest", "before")])
def test_a_cursor_stays_short_and_what_it_forgets_is_not_hidden(
    store: CompositeLogStore, backend: SimulatedBackend, start: str, way: str, writers: int, events: int, kept: int
) -> None:
    """Of many writers, and of what a filter leaves of each: which of its events were returned is long to say."""
    random = Random(writers)
    logs = make_logs(store)
    stream = Stream(logs.id, {})
    for writer in random.sample(range(16**15), writers):
        said = [random.choice(["wanted", "not"]) for _ in range(events)]
        backend.received += make_events(said, stream, writer=f"{writer:015x}")
    # What comes twice is near to where it was first, mostly.
    again = backend.received[-kept:] if start == "oldest" else backend.received[:kept]
    backend.received = backend.received + again if start == "oldest" else again + backend.received

    found = [str(entry.id) for entry in walked(store, logs, start, way, 1_000, search="wanted")]

    assert sorted(found) == sorted({event.uid for event in backend.received if event.message == "wanted"})


@pytest.mark.deep
def test_what_came_long_ago_may_be_returned_again_but_all_is_there(
    store: CompositeLogStore, backend: SimulatedBackend
) -> None:
    logs = make_logs(store)
    stream = Stream(logs.id, {})
    random = Random(0)
    for writer in random.sample(range(16**15), 2_000):
        backend.received += make_events(["a", "b"], stream, writer=f"{writer:015x}")
    backend.received += backend.received

    found = [str(entry.id) for entry in walked(store, logs, "oldest", "after", 500)]

    assert set(found) == {event.uid for event in backend.received}


@pytest.mark.parametrize("sequence", [-1, 1 << 62, 10**30, True, 1.5, "3", None, [1]])
@pytest.mark.parametrize("writer", ["a" * 15, "", "w" * 1_000, "\ud800", 5, None])
def test_what_says_nonsense_of_itself_is_shown_each_time(
    store: CompositeLogStore, backend: SimulatedBackend, monkeypatch: pytest.MonkeyPatch, writer: Any, sequence: Any
) -> None:
    logs = stored(store, backend, 4)
    read = SimulatedReader.read

    def odd(reader: SimulatedReader, request: PageRequest) -> Page:
        page = read(reader, request)
        entries = [
            entry._replace(event=Event(writer, sequence)) if entry.entry.message != "m0" else entry
            for entry in page.entries
        ]
        return replace(page, entries=entries)

    monkeypatch.setattr(SimulatedReader, "read", odd)
    for start, way in (("oldest", "after"), ("newest", "before")):
        assert sorted(entry.message for entry in walked(store, logs, start, way, 1)) == numbered(0, 4)


def test_two_writers_of_one_stream_are_told_apart(store: CompositeLogStore, backend: SimulatedBackend) -> None:
    logs = stored(store, backend, 3)
    add(backend, logs, 3, writer="f" * 15)
    assert messages(store.fetch(logs)) == numbered(0, 3) * 2


def test_only_copies_on_the_same_page_are_known_where_order_is_not(
    store: CompositeLogStore, backend: SimulatedBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SimulatedReader, "in_order", False)
    logs = make_logs(store)
    events = add(backend, logs, 3)
    backend.received[:] = [events[1], events[0], events[0], events[2]]
    assert messages(store.fetch(logs)) == ["m1", "m0", "m2"]


def test_the_readers_own_page_size_is_kept(
    store: CompositeLogStore, backend: SimulatedBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SimulatedReader, "max_page_size", 4)
    logs = stored(store, backend, 10)
    assert messages(store.fetch(logs, limit=8)) == numbered(6, 10)


class Slow(SimulatedReader):
    """Looks through two events at a time, which takes 3 seconds."""

    def read(self, request: PageRequest) -> Page:
        clock.current.advance(3)  # type: ignore[attr-defined]
        page = super().read(replace(request, limit=2, filter=LogsEntriesFilter()))
        wanted = [read for read in page.entries if request.filter.search in (None, read.entry.message)]
        return replace(page, entries=wanted)


class PlainTuples(SimulatedReader):
    """A reader of a third party, which names events by tuples without a type."""

    def read(self, request: PageRequest) -> Page:
        page = super().read(request)
        return replace(page, entries=[read._replace(event=read.event and tuple(read.event)) for read in page.entries])


@pytest.mark.parametrize("start", ["oldest", "newest"])
def test_events_may_be_named_by_plain_tuples(monkeypatch: pytest.MonkeyPatch, start: str) -> None:
    monkeypatch.setattr(SimulatedChildConfig, "create_reader", lambda child: PlainTuples(child.backends[child.name]))
    backend = SimulatedBackend()
    store = make_store(make_child("archive", backend))
    logs = stored(store, backend, 3)
    add(backend, logs, 2)
    assert messages(store.fetch(logs, start=start)) == numbered(0, 3)


class TestLongSearches:
    @pytest.fixture(autouse=True)
    def _slow(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(SimulatedChildConfig, "create_reader", lambda child: Slow(child.backends[child.name]))

    @pytest.mark.parametrize(("start", "wanted"), [("newest", "m6"), ("oldest", "m13")])
    def test_a_page_that_has_looked_for_long_returns_what_it_has_with_a_cursor(
        self, backend: SimulatedBackend, start: str, wanted: str
    ) -> None:
        with SimulatedClock() as simulated:
            begin = simulated.now()
            store = make_store(make_child("archive", backend))
            logs = stored(store, backend, 20)
            page = store.fetch(logs, start=start, filter_=LogsEntriesFilter(search=wanted))
            assert messages(page) == []
            assert simulated.now() - begin <= pages.LONGEST_SECONDS + 3
            way = "before" if start == "newest" else "after"
            page = store.fetch(logs, **{way: getattr(page, way)})
            assert messages(page) == [wanted]

    def test_what_is_there_is_returned_at_once(self, backend: SimulatedBackend) -> None:
        with SimulatedClock() as simulated:
            begin = simulated.now()
            store = make_store(make_child("archive", backend))
            logs = stored(store, backend, 20)
            assert messages(store.fetch(logs, filter_=LogsEntriesFilter(search="m17"))) == ["m17"]
            assert simulated.now() - begin == 6


def test_a_reader_whose_token_leads_nowhere_is_not_asked_without_end(
    store: CompositeLogStore, backend: SimulatedBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SimulatedReader, "read", lambda reader, request: Page(newer="same", older="same"))
    assert store.fetch(make_logs(store)).items == []


class TestArguments:
    def test_a_stream_of_another_log_store_is_refused(self, store: CompositeLogStore) -> None:
        with pytest.raises(ValueError, match="another log store"):
            store.fetch(make_logs(make_store(make_child("archive"))))

    def test_since_after_until_is_refused(self) -> None:
        with pytest.raises(ValueError, match="`since` must be earlier than `until`"):
            LogsEntriesFilter(since="2026-01-02T00:00:00Z", until="2026-01-01T00:00:00Z")

    @pytest.mark.parametrize("limit", [0, -1, -(10**30), True, False, 1.5, "5", [5]])
    def test_a_limit_must_be_positive(self, store: CompositeLogStore, limit: Any) -> None:
        with pytest.raises(ValueError, match="positive"):
            store.fetch(make_logs(store), limit=limit)

    def test_a_limit_must_be_positive_beside_a_cursor_too(
        self, store: CompositeLogStore, backend: SimulatedBackend
    ) -> None:
        logs = stored(store, backend, 5)
        cursor = store.fetch(logs, limit=2).before
        with pytest.raises(ValueError, match="positive"):
            store.fetch(logs, before=cursor, limit=0)

    def test_a_limit_of_a_million_is_capped(self, store: CompositeLogStore, backend: SimulatedBackend) -> None:
        assert len(store.fetch(stored(store, backend, 10), limit=1_000_000).items) == 10

    def test_start_is_one_of_two_words(self, store: CompositeLogStore) -> None:
        with pytest.raises(ValueError, match="`start`"):
            store.fetch(make_logs(store), start="middle")

    @pytest.mark.parametrize("name", ["before", "after"])
    @pytest.mark.parametrize("value", [5, b"x", ["x"], {}, True])
    def test_a_cursor_is_text(self, store: CompositeLogStore, name: str, value: Any) -> None:
        with pytest.raises(ValueError, match="malformed"):
            store.fetch(make_logs(store), **{name: value})

    def test_a_filter_is_one(self, store: CompositeLogStore) -> None:
        with pytest.raises(ValueError, match="`filter_`"):
            store.fetch(make_logs(store), filter_={"search": "x"})  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="`search`"):
            store.fetch(make_logs(store), filter_=LogsEntriesFilter(search="x" * (pages.LONGEST_SEARCH + 1)))

    def test_only_one_cursor_at_a_time(self, store: CompositeLogStore) -> None:
        with pytest.raises(ValueError, match="only one"):
            store.fetch(make_logs(store), before="x", after="y")

    @pytest.mark.parametrize(
        "cursor",
        ["", "x", "ünï", "e30=", base64.urlsafe_b64encode(b'{"version": 2}').decode(), "A" * 10_000],
    )
    def test_a_malformed_cursor_is_refused(self, store: CompositeLogStore, cursor: str) -> None:
        with pytest.raises(ValueError, match="malformed"):
            store.fetch(make_logs(store), after=cursor)

    def test_a_cursor_cut_anywhere_is_refused(self, store: CompositeLogStore, backend: SimulatedBackend) -> None:
        logs = stored(store, backend, 5)
        cursor = store.fetch(logs, limit=2).before
        assert cursor is not None
        for end in range(len(cursor)):
            with pytest.raises(ValueError, match="cursor"):
                store.fetch(logs, before=cursor[:end])

    def test_a_foreign_cursor_is_refused(self, store: CompositeLogStore, backend: SimulatedBackend) -> None:
        logs = stored(store, backend, 5)
        cursor = store.fetch(logs, limit=2).before
        with pytest.raises(ValueError, match="not one for this"):
            store.fetch(stored(store, backend, 5), before=cursor)
        with pytest.raises(ValueError, match="not one for this"):
            store.fetch(logs, after=cursor)
        other = make_store(make_child("archive", backend))
        with pytest.raises(ValueError, match="not one for this"):
            other.fetch(make_logs(other, id=logs.id), before=cursor)

    @pytest.mark.parametrize(
        "changed",
        [
            {"limit": 3},
            {"start": "oldest"},
            {"filter_": LogsEntriesFilter(search="other")},
            {"filter_": LogsEntriesFilter(level="ERROR")},
        ],
    )
    def test_what_conflicts_with_the_cursor_is_refused(
        self, store: CompositeLogStore, backend: SimulatedBackend, changed: dict[str, Any]
    ) -> None:
        logs = stored(store, backend, 5)
        cursor = store.fetch(logs, limit=2, filter_=LogsEntriesFilter(search="m")).before
        assert store.fetch(logs, before=cursor, start="newest", limit=2, filter_=LogsEntriesFilter(search="m")).items
        with pytest.raises(ValueError, match="conflicts with the cursor"):
            store.fetch(logs, before=cursor, **changed)

    def test_a_cursor_of_a_child_that_is_gone_is_refused(self, backend: SimulatedBackend) -> None:
        id = uuid4()
        before = make_store(make_child("old", backend), id=id)
        logs = stored(before, backend, 5)
        cursor = before.fetch(logs, limit=2).before
        after = make_store(make_child("new", backend), id=id)
        with pytest.raises(ValueError, match="'old', which no longer exists"):
            after.fetch(logs, before=cursor)


def forged(cursor: str | None, **changes: Any) -> str:
    assert cursor is not None
    fields = json.loads(base64.urlsafe_b64decode(cursor)) | changes
    return base64.urlsafe_b64encode(json.dumps(fields).encode()).decode()


def seen(content: bytes) -> str:
    return base64.b85encode(zlib.compress(content)).decode()


class TestForgedCursors:
    """They are plain base64: what one says is what anybody may have written."""

    @pytest.fixture
    def other(self) -> SimulatedBackend:
        return SimulatedBackend()

    @pytest.fixture
    def store(self, backend: SimulatedBackend, other: SimulatedBackend) -> CompositeLogStore:
        return make_store(make_child("archive", backend), make_child("live", other), make_child("spare"))

    def test_a_child_that_fetch_does_not_read_is_not_read(
        self, store: CompositeLogStore, backend: SimulatedBackend, other: SimulatedBackend
    ) -> None:
        logs = stored(store, backend, 5)
        add(other, logs, 5, level=10)
        cursor = store.fetch(logs, limit=2).before
        for child in ("live", "spare", "none", "", "Archive", "../x", None, 5):
            with pytest.raises(ValueError, match=r"[Bb]egin anew"):
                store.fetch(logs, before=forged(cursor, child=child))

    def test_the_cursor_of_a_fallback_is_good_while_it_is_one(
        self, backend: SimulatedBackend, other: SimulatedBackend
    ) -> None:
        children = make_child("archive", backend), make_child("live", other)
        id = uuid4()
        store = make_store(*children, id=id, fetch_fallback=["live"])
        logs = stored(store, other, 5)
        backend.fault = LogStoreUnavailableError("no route")
        unreachable._errors.clear()
        cursor = store.fetch(logs, limit=2).before
        assert messages(store.fetch(logs, before=cursor)) == numbered(1, 3)
        promoted = make_store(*children, id=id, primary="live")
        assert messages(promoted.fetch(logs, before=cursor)) == numbered(1, 3)
        without = make_store(*children, id=id)
        with pytest.raises(ValueError, match=r"child 'live', which is neither .* Begin anew"):
            without.fetch(logs, before=cursor)

    @pytest.mark.parametrize(
        "changes",
        [
            *({"limit": limit} for limit in (10**9, 1e9, 50_001, 0, -1, True, "5", None, 10**40, 2.0)),
            *({"filter": value} for value in (5, None, [], {"level": "x"}, {"search": 5}, {"search": "x" * 10_000})),
            {"filter": {"since": "2026-01-02T00:00:00Z", "until": "2026-01-01T00:00:00Z"}},
            *({"seen": value} for value in (5, None, {"a" * 15: 3}, "x", "", "\u00e9", "A" * 7_000, [])),
            *(
                {"seen": seen(content)}
                for content in (b"", b"[]", b"5", b'{"a": 5}', b'{"a": "12"}', b'{"a": {"0": 1}}')
            ),
            *({"seen": seen(content)} for content in (b'{"a": [1]}', b'{"a": [-1, 2]}', b'{"a": [1.0, 2]}')),
            *({"seen": seen(content)} for content in (b'{"a": [true, 2]}', b'{"a": [4611686018427387904, 1]}')),
            # What takes gigabytes once it is no longer compressed.
            {"seen": seen(b" " * 10_000_000)},
            {"seen": seen(b"[" * 100_000)},
            *({"token": value} for value in (5, None, ["1"], "x", "")),
            *({"direction": value} for value in ("newer", "both", None)),
            *({"version": value} for value in (1, 3, "2", None, True)),
            *({"logs_id": value} for value in (str(UUID(int=1)), "x", None, 5)),
            *({"log_store_id": value} for value in (str(UUID(int=1)), "x", None, 5)),
            *({"from_oldest": value} for value in ("x", None, 5)),
            {"later": 1},
        ],
        ids=lambda changes: repr(changes)[:40],
    )
    def test_what_no_page_has_given_is_the_callers_mistake(
        self, store: CompositeLogStore, backend: SimulatedBackend, changes: dict[str, Any]
    ) -> None:
        logs = stored(store, backend, 5)
        cursor = store.fetch(logs, limit=2).before
        assert messages(store.fetch(logs, before=forged(cursor))) == numbered(1, 3)
        with pytest.raises(ValueError, match=r"."):
            store.fetch(logs, before=forged(cursor, **changes))

    @pytest.mark.parametrize(
        "text",
        [
            "A" * 70_000,
            base64.urlsafe_b64encode(b"[" * 40_000).decode(),
            base64.urlsafe_b64encode(b'{"a":' * 8_000).decode(),
        ],
        ids=["long", "deep", "deep objects"],
    )
    def test_work_is_bounded_before_anything_is_decoded(self, store: CompositeLogStore, text: str) -> None:
        with pytest.raises(ValueError, match="malformed"):
            store.fetch(make_logs(store), after=text)

    def test_the_cursor_of_an_earlier_version_is_refused_in_words(
        self, store: CompositeLogStore, backend: SimulatedBackend
    ) -> None:
        logs = stored(store, backend, 5)
        cursor = forged(store.fetch(logs, limit=2).before, version=1, seen={"0123456789abcde": 3})
        with pytest.raises(ValueError, match=r"another version of composite-logstore.*begin anew"):
            store.fetch(logs, before=cursor)

    def test_a_reader_whose_token_is_too_long_for_a_cursor_says_so(
        self, store: CompositeLogStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(SimulatedReader, "read", lambda reader, request: Page(older="x" * 100_000))
        with pytest.raises(LogStoreError, match="'archive'"):
            store.fetch(make_logs(store))


class TestFallback:
    @pytest.fixture(autouse=True)
    def _nothing_remembered(self) -> None:
        unreachable._errors.clear()

    @pytest.fixture
    def spare(self) -> SimulatedBackend:
        return SimulatedBackend()

    @pytest.fixture
    def store(self, backend: SimulatedBackend, spare: SimulatedBackend) -> CompositeLogStore:
        return make_store(make_child("archive", backend), make_child("spare", spare), fetch_fallback=["spare"])

    @pytest.mark.parametrize(
        "error", [LogStoreUnavailableError("no route"), LogStoreRateLimitError("slow down"), LogStoreError("oops")]
    )
    def test_the_next_child_answers_and_the_first_entry_says_so(
        self, store: CompositeLogStore, backend: SimulatedBackend, spare: SimulatedBackend, error: Exception
    ) -> None:
        backend.fault = error
        logs = stored(store, spare, 2)
        page = store.fetch(logs)
        assert messages(page)[1:] == numbered(0, 2)
        assert "'archive' could not be read" in messages(page)[0]
        assert str(error) in messages(page)[0]
        assert "'spare'" in messages(page)[0]

    def test_the_process_remembers_it_for_a_while(
        self, store: CompositeLogStore, backend: SimulatedBackend, spare: SimulatedBackend
    ) -> None:
        backend.fault = LogStoreUnavailableError("no route")
        logs = stored(store, spare, 2)
        with SimulatedClock() as clock:
            store.fetch(logs)
            backend.fault = None
            add(backend, logs, 2)
            assert len(store.fetch(logs).items) == 3
            clock.advance(unreachable.REMEMBERED_SECONDS)
            assert messages(store.fetch(logs)) == numbered(0, 2)

    def test_a_child_that_answers_is_not_remembered_any_more(
        self, store: CompositeLogStore, backend: SimulatedBackend, spare: SimulatedBackend
    ) -> None:
        logs = stored(store, backend, 5)
        cursor = store.fetch(logs, limit=2).before
        backend.fault = LogStoreUnavailableError("no route")
        with SimulatedClock():
            assert "no route" in messages(store.fetch(logs))[0]
            backend.fault = None
            assert messages(store.fetch(logs, before=cursor)) == numbered(1, 3)
            assert messages(store.fetch(logs)) == numbered(0, 5)

    @pytest.mark.parametrize(
        ("asked_for", "remembered"),
        [
            (90, 90),
            (10**9, LONGEST_RETRY_AFTER),
            (float("inf"), LONGEST_RETRY_AFTER),
            (None, 30),
            (0, 30),
            (-5, 30),
            (float("nan"), 30),
            ("90", 30),
        ],
    )
    def test_a_child_that_asks_to_be_left_alone_is(
        self, store: CompositeLogStore, backend: SimulatedBackend, asked_for: Any, remembered: float
    ) -> None:
        logs = stored(store, backend, 2)
        backend.fault = LogStoreRateLimitError("slow down", retry_after=asked_for)
        with SimulatedClock() as clock:
            store.fetch(logs)
            backend.fault = None
            clock.advance(remembered - 1)
            assert "slow down" in messages(store.fetch(logs))[0]
            clock.advance(1)
            assert messages(store.fetch(logs)) == numbered(0, 2)

    def test_what_is_wrong_with_one_stream_is_not_remembered(
        self, store: CompositeLogStore, backend: SimulatedBackend, spare: SimulatedBackend
    ) -> None:
        logs = stored(store, backend, 2)
        backend.fault = LogStoreError("this one makes no sense")
        with SimulatedClock():
            store.fetch(logs)
            backend.fault = None
            assert messages(store.fetch(logs)) == numbered(0, 2)

    @pytest.mark.parametrize(
        "error", [LogStoreUnavailableError("no route."), LogStoreRateLimitError("wait", retry_after=7), TypeError("x")]
    )
    def test_a_cursor_belongs_to_the_child_that_made_it(
        self, store: CompositeLogStore, backend: SimulatedBackend, spare: SimulatedBackend, error: Exception
    ) -> None:
        logs = stored(store, backend, 5)
        add(spare, logs, 5)
        cursor = store.fetch(logs, limit=2).before
        backend.fault = error
        kind = type(error) if isinstance(error, LogStoreError) else LogStoreError
        with pytest.raises(kind, match=r"'archive', which made the cursor.*begin anew without a cursor\.") as raised:
            store.fetch(logs, before=cursor)
        assert type(raised.value) is kind
        assert getattr(raised.value, "retry_after", None) == getattr(error, "retry_after", None)

    def test_a_cursor_that_leads_nowhere_makes_the_next_first_page_fall_back_at_once(
        self, store: CompositeLogStore, backend: SimulatedBackend, spare: SimulatedBackend
    ) -> None:
        logs = stored(store, backend, 5)
        cursor = store.fetch(logs, limit=2).before
        with SimulatedClock():
            backend.fault = LogStoreUnavailableError("no route")
            with pytest.raises(LogStoreUnavailableError):
                store.fetch(logs, before=cursor)
            backend.fault = AssertionError("asked again")
            assert "no route" in messages(store.fetch(logs))[0]

    @pytest.mark.parametrize("error", [ValueError("bad filter"), DoesNotExistException("no such stream")])
    def test_what_would_fail_everywhere_is_no_reason_to_fall_back(
        self, store: CompositeLogStore, backend: SimulatedBackend, spare: SimulatedBackend, error: Exception
    ) -> None:
        backend.fault = error
        with pytest.raises(type(error)):
            store.fetch(stored(store, spare, 2))

    @pytest.mark.parametrize("fault", [ZeroDivisionError("secret"), LogStoreError("oops")])
    def test_a_reader_with_a_defect_is_a_reason(
        self, store: CompositeLogStore, backend: SimulatedBackend, spare: SimulatedBackend, fault: Exception
    ) -> None:
        backend.fault = fault
        page = store.fetch(stored(store, spare, 2))
        assert messages(page)[1:] == numbered(0, 2)
        assert "secret" not in messages(page)[0]

    @pytest.mark.parametrize(
        ("first", "second", "expected"),
        [
            (LogStoreError("first"), LogStoreUnavailableError("second"), LogStoreUnavailableError),
            (LogStoreRateLimitError("first"), LogStoreError("second"), LogStoreUnavailableError),
            (LogStoreUnavailableError("first"), DoesNotExistException("second"), LogStoreUnavailableError),
            (LogStoreUnavailableError("first"), ValueError("second"), LogStoreUnavailableError),
            (LogStoreError("first"), TypeError("second"), LogStoreError),
        ],
    )
    def test_when_all_fail_the_error_says_why_of_each(
        self,
        store: CompositeLogStore,
        backend: SimulatedBackend,
        spare: SimulatedBackend,
        first: Exception,
        second: Exception,
        expected: type[Exception],
    ) -> None:
        backend.fault, spare.fault = first, second
        for _ in range(2):  # asked, and remembered
            with pytest.raises(expected, match=r"Child 'archive' .*first; child 'spare'") as raised:
                store.fetch(make_logs(store))
            assert type(raised.value) is expected


def test_ids_are_the_events_own(store: CompositeLogStore, backend: SimulatedBackend) -> None:
    logs = make_logs(store)
    events = add(backend, logs, 3)
    assert [entry.id for entry in store.fetch(logs).items] == [UUID(event.uid) for event in events]


def ranked(backend: SimulatedBackend, logs: LogsResponse, *ranks: int | None) -> None:
    """Put an event of each of these ranks into a backend, and a second one."""
    for event in add(backend, logs, 2 * len(ranks)):
        if (rank := ranks[event.sequence // 2]) is not None:
            backend.received[event.sequence] = event._replace(metadata={"zenml.log.rank": rank})


SHOWN = ["m0", "m1", "[rank 0] m2", "[rank 0] m3", "[rank 12] m4", "[rank 12] m5"]


@pytest.mark.needs_paged_fetch
def test_zenml_shows_the_rank_in_the_message_and_this_package_beside_it(
    store: CompositeLogStore, backend: SimulatedBackend
) -> None:
    logs = make_logs(store)
    ranked(backend, logs, None, 0, 12)
    shown, raw = store.fetch(logs).items, fetch_page(store, logs).items
    assert [entry.message for entry in shown] == SHOWN
    # As the server's answers, which have no other class.
    assert {type(entry) for entry in shown} == {LogEntry}
    assert [entry.message for entry in raw] == numbered(0, 6)
    assert [rank_of(entry) for entry in raw] == [None, None, 0, 0, 12, 12]
    assert [entry.model_dump(exclude={"message"}) for entry in shown] == [
        entry.model_dump(exclude={"message", "rank"}) for entry in raw
    ]


@pytest.mark.needs_paged_fetch
def test_pages_and_searches_are_those_of_the_messages_without_ranks(
    store: CompositeLogStore, backend: SimulatedBackend
) -> None:
    logs = make_logs(store)
    ranked(backend, logs, None, 0, 12)
    page, raw = store.fetch(logs, limit=2), fetch_page(store, logs, limit=2)
    read = messages(page)
    while page.before:
        assert page.before == raw.before
        page, raw = store.fetch(logs, before=page.before), fetch_page(store, logs, before=raw.before)
        read = messages(page) + read
    assert read == SHOWN
    assert messages(store.fetch(logs, filter_=LogsEntriesFilter(search="m3"))) == SHOWN[3:4]
    assert messages(store.fetch(logs, filter_=LogsEntriesFilter(search="rank"))) == []


@pytest.mark.needs_paged_fetch
def test_only_the_first_chunk_of_a_message_begins_with_the_rank(
    store: CompositeLogStore, backend: SimulatedBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Theirs(LogEntry):
        rank: int

    chunks = [Theirs(message=text, rank=3, chunk_index=place, total_chunks=2) for place, text in enumerate("ab")]
    page = Page([ReadEntry(chunk, None) for chunk in chunks], None, None)
    monkeypatch.setattr(SimulatedReader, "read", lambda self, request: page)
    assert messages(store.fetch(make_logs(store))) == ["[rank 3] a", "b"]


class TestMissing:
    @pytest.fixture(autouse=True)
    def _finished(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(gaps, "is_finished", lambda logs: True)

    def test_an_entry_says_where_events_are_missing(self, store: CompositeLogStore, backend: SimulatedBackend) -> None:
        logs = stored(store, backend, 10)
        del backend.received[3:6], backend.received[-2]
        page = store.fetch(logs)

        writer = backend.received[0].writer
        assert messages(page) == [
            "m0", "m1", "m2",
            f"Child 'archive' is missing 3 entries here, between 2 and 6 of writer {writer}.",
            "m6", "m7",
            f"Child 'archive' is missing 1 entry here, between 7 and 9 of writer {writer}.",
            "m9",
        ]  # fmt: skip
        for place in (3, 6):
            notice = page.items[place]
            assert (notice.level, notice.name) == (LoggingLevels.WARNING, "composite_logstore")
            assert notice.timestamp == page.items[place + 1].timestamp
        assert [entry.id for entry in store.fetch(logs).items] == [entry.id for entry in page.items]

    @pytest.mark.parametrize("start", ["oldest", "newest"])
    def test_the_first_events_may_be_missing(
        self, store: CompositeLogStore, backend: SimulatedBackend, start: str
    ) -> None:
        logs = stored(store, backend, 5, first=2)
        page = store.fetch(logs, start=start)
        assert "is missing 2 entries here, between the beginning and 2 of" in messages(page)[0]
        assert messages(page)[1:] == numbered(2, 7)

    def test_many_holes_are_told_at_once(self, store: CompositeLogStore, backend: SimulatedBackend) -> None:
        logs = stored(store, backend, 100)
        del backend.received[1::2]
        page = store.fetch(logs)
        assert len(page.items) == 51
        assert "is missing 49 entries of this page in 49 places, the first between 0 and 2" in messages(page)[0]

    @pytest.mark.parametrize(
        "filter_",
        [{"search": "m"}, {"level": "INFO"}, {"since": "2020-01-01T00:00:00Z"}, {"until": "2040-01-01T00:00:00Z"}],
    )
    def test_a_filter_makes_holes_of_its_own(
        self, store: CompositeLogStore, backend: SimulatedBackend, filter_: dict[str, Any]
    ) -> None:
        logs = stored(store, backend, 10)
        del backend.received[3]
        assert len(store.fetch(logs, filter_=LogsEntriesFilter(**filter_)).items) == 9

    @pytest.mark.parametrize("settings", [{"min_level": "DEBUG"}, {"progress": "latest"}])
    def test_a_child_that_does_not_take_everything_has_gaps_by_its_settings(
        self, backend: SimulatedBackend, settings: dict[str, Any]
    ) -> None:
        store = make_store(make_child("archive", backend, **settings))
        logs = stored(store, backend, 10)
        del backend.received[3]
        assert len(store.fetch(logs).items) == 9

    def test_what_is_not_finished_may_still_come(
        self, store: CompositeLogStore, backend: SimulatedBackend, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(gaps, "is_finished", lambda logs: False)
        logs = stored(store, backend, 10)
        del backend.received[3]
        assert len(store.fetch(logs).items) == 9


class TestMissingWithoutOrder:
    """Of a backend that sorts by time, such as Datadog."""

    @pytest.fixture(autouse=True)
    def _unordered(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(gaps, "is_finished", lambda logs: True)
        monkeypatch.setattr(SimulatedReader, "in_order", False)

    @pytest.fixture
    def logs(self, store: CompositeLogStore, backend: SimulatedBackend) -> LogsResponse:
        return stored(store, backend, 10)

    def age(self, monkeypatch: pytest.MonkeyPatch, page: LogsEntriesResponse, age: timedelta) -> None:
        newest = page.items[-1].timestamp
        assert newest is not None

        class Now(datetime):
            @classmethod
            def now(cls, tz: Any = None) -> datetime:  # type: ignore[override]
                return newest + age

        monkeypatch.setattr(gaps, "datetime", Now)

    def test_what_is_missing_is_looked_for_once_more(
        self,
        store: CompositeLogStore,
        backend: SimulatedBackend,
        logs: LogsResponse,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        lost = backend.received.pop(3)
        self.age(monkeypatch, store.fetch(logs), gaps.INDEXED_AFTER + timedelta(seconds=1))
        assert "is missing 1 entry here, between 2 and 4" in messages(store.fetch(logs))[3]
        backend.received.append(lost)
        assert messages(store.fetch(logs, limit=7)) == ["m4", "m5", "m6", "m7", "m8", "m9", "m3"]

    def test_what_may_still_be_indexed_is_not_missing(
        self,
        store: CompositeLogStore,
        backend: SimulatedBackend,
        logs: LogsResponse,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        del backend.received[3]
        self.age(monkeypatch, store.fetch(logs), gaps.INDEXED_AFTER - timedelta(seconds=1))
        assert len(store.fetch(logs).items) == 9

    def test_what_nobody_looked_for_is_not_called_lost(
        self, store: CompositeLogStore, backend: SimulatedBackend, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """After three searches: all is there, since the times of those that seem to be missing differ a little."""
        logs = stored(store, backend, 60)
        hour = 3_600_000_000_000
        events = [
            event._replace(time_unix_nano=event.time_unix_nano + event.number // 6 * hour) for event in backend.received
        ]
        # Each sixth one comes a page later than its number says.
        late = [event for event in events if event.number % 6 == 3 and event.number < 54]
        backend.received = late + [event for event in events if event not in late]
        self.age(monkeypatch, store.fetch(logs, limit=51), timedelta(days=9))

        notices = [entry.message for entry in store.fetch(logs, limit=51).items if entry.name == "composite_logstore"]

        assert not [notice for notice in notices if "is missing" in notice]
        assert len(notices) == 1
        assert "6 entries" in notices[0]
        assert "not checked" in notices[0]

    def test_what_is_looked_for_in_vain_is_called_lost_whatever_was_not_looked_for(
        self, store: CompositeLogStore, backend: SimulatedBackend, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        logs = stored(store, backend, 60)
        hour = 3_600_000_000_000
        events = [
            event._replace(time_unix_nano=event.time_unix_nano + event.number // 6 * hour) for event in backend.received
        ]
        backend.received = [event for event in events if event.number % 6 != 3]
        self.age(monkeypatch, store.fetch(logs), timedelta(days=9))

        notices = [entry.message for entry in store.fetch(logs).items if entry.name == "composite_logstore"]

        assert "7 entries are in 7 places missing on this page" in notices[0]
        assert [
            f"between {first} and {first + 2} of" in notice
            for first, notice in zip((2, 8, 14), notices[1:], strict=True)
        ]

    def test_looking_once_more_takes_few_requests_and_fails_no_page(
        self,
        store: CompositeLogStore,
        backend: SimulatedBackend,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        logs = stored(store, backend, 400)
        # Every other one is missing, over hours.
        backend.received = [
            event._replace(time_unix_nano=event.time_unix_nano + event.number * 60_000_000_000)
            for event in backend.received[::2]
        ]
        requests: list[PageRequest] = []
        read = SimulatedReader.read

        def counting(reader: SimulatedReader, request: PageRequest) -> Page:
            requests.append(request)
            if is_limited and len(requests) > 1:
                raise LogStoreRateLimitError("rate limited")
            return read(reader, request)

        monkeypatch.setattr(SimulatedReader, "read", counting)
        is_limited = False
        self.age(monkeypatch, store.fetch(logs), timedelta(days=1))
        requests.clear()
        assert "is missing 199 entries of this page in 199 places" in messages(store.fetch(logs))[0]
        assert len(requests) <= 4

        requests.clear()
        is_limited = True
        assert len(store.fetch(logs).items) == 200
        assert len(requests) == 2


def test_children_that_take_long_to_fail_do_not_keep_a_page_waiting_without_end() -> None:
    """Each may take half a minute, and a log store may have a hundred."""
    with SimulatedClock() as clock:

        class Slow(SimulatedBackend):
            @property
            def fault(self) -> Any:
                clock.advance(30)
                return LogStoreUnavailableError("no route")

            @fault.setter
            def fault(self, fault: Any) -> None:
                pass

        names = [f"c{number}" for number in range(20)]
        store = make_store(*(make_child(name, Slow()) for name in names), fetch_fallback=names[1:])
        begin = clock.now()
        with pytest.raises(LogStoreUnavailableError, match="was not asked"):
            store.fetch(make_logs(store))
        assert 60 <= clock.now() - begin <= 90
