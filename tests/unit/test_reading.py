from __future__ import annotations

import base64
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from zenml.enums import LoggingLevels
from zenml.exceptions import (
    DoesNotExistException,
    LogStoreError,
    LogStoreRateLimitError,
    LogStoreUnavailableError,
)
from zenml.models import LogsEntriesFilter, LogsEntriesResponse, LogsResponse

from composite_logstore import CompositeLogStore, LogEvent, Page, PageRequest, Stream, clock, missing, reading
from composite_logstore.backoff import LONGEST_RETRY_AFTER
from composite_logstore.testing import SimulatedBackend, SimulatedChildConfig, SimulatedClock
from composite_logstore.testing.backend import SimulatedReader
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
            assert simulated.now() - begin <= reading.LONGEST_SECONDS + 3
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

    @pytest.mark.parametrize("limit", [0, -1])
    def test_a_limit_must_be_positive(self, store: CompositeLogStore, limit: int) -> None:
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
        with pytest.raises(ValueError, match="child 'old', which is no longer there"):
            after.fetch(logs, before=cursor)


class TestFallback:
    @pytest.fixture(autouse=True)
    def _nothing_remembered(self) -> None:
        reading._unreadable.clear()

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
            clock.advance(reading.REMEMBERED_SECONDS)
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


class TestMissing:
    @pytest.fixture(autouse=True)
    def _finished(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(missing, "is_finished", lambda logs: True)

    def test_an_entry_says_where_events_are_missing(self, store: CompositeLogStore, backend: SimulatedBackend) -> None:
        logs = stored(store, backend, 10)
        del backend.received[3:6], backend.received[-2]
        page = store.fetch(logs)

        writer = backend.received[0].writer
        assert messages(page) == [
            "m0", "m1", "m2",
            f"Child 'archive' lacks 3 entries here, between 2 and 6 of writer {writer}.",
            "m6", "m7",
            f"Child 'archive' lacks 1 entry here, between 7 and 9 of writer {writer}.",
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
        assert "lacks 2 entries here, between the beginning and 2 of" in messages(page)[0]
        assert messages(page)[1:] == numbered(2, 7)

    def test_many_holes_are_told_at_once(self, store: CompositeLogStore, backend: SimulatedBackend) -> None:
        logs = stored(store, backend, 100)
        del backend.received[1::2]
        page = store.fetch(logs)
        assert len(page.items) == 51
        assert "lacks 49 entries of this page in 49 places, the first between 0 and 2" in messages(page)[0]

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
        monkeypatch.setattr(missing, "is_finished", lambda logs: False)
        logs = stored(store, backend, 10)
        del backend.received[3]
        assert len(store.fetch(logs).items) == 9


class TestMissingWithoutOrder:
    """Of a backend that sorts by time, such as Datadog."""

    @pytest.fixture(autouse=True)
    def _unordered(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(missing, "is_finished", lambda logs: True)
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

        monkeypatch.setattr(missing, "datetime", Now)

    def test_what_is_missing_is_looked_for_once_more(
        self,
        store: CompositeLogStore,
        backend: SimulatedBackend,
        logs: LogsResponse,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        lost = backend.received.pop(3)
        self.age(monkeypatch, store.fetch(logs), missing.INDEXED_AFTER + timedelta(seconds=1))
        assert "lacks 1 entry here, between 2 and 4" in messages(store.fetch(logs))[3]
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
        self.age(monkeypatch, store.fetch(logs), missing.INDEXED_AFTER - timedelta(seconds=1))
        assert len(store.fetch(logs).items) == 9

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
        assert "lacks 199 entries of this page in 199 places" in messages(store.fetch(logs))[0]
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
