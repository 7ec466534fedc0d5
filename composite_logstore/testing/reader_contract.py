"""The contract of a reader, as tests: the pages that ZenML's `BaseLogStore.fetch` promises."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timedelta, timezone
from typing import Any, Literal
from uuid import uuid4

import pytest
from zenml.enums import LoggingLevels, StackComponentType
from zenml.exceptions import DoesNotExistException

from composite_logstore.backend import Page, PageRequest, Reader, Scanned, Scanner
from composite_logstore.child_config import ChildConfig
from composite_logstore.config import CompositeLogStoreConfig
from composite_logstore.event import ExceptionInfo, LogEvent, Stream
from composite_logstore.log_store import CompositeLogStore
from composite_logstore.testing.contract import (
    Backend,
    Contract,
    ExporterThread,
    Fault,
    PatientThread,
    Received,
    assert_error,
    to_received,
    walk,
)
from composite_logstore.testing.events import WRITER, make_events, make_logs, make_stream
from composite_logstore.testing.exporter_contract import ODD, OTHER_WRITER
from composite_logstore.zenml import LogEntry, LogsEntriesFilter, LogStoreError, fetch_page

Direction = Literal["newer", "older"]
DIRECTIONS: tuple[Direction, ...] = ("newer", "older")
Fill = Callable[[Sequence[LogEvent]], None]

WORDS_FOR_NOTHING = ("", "unknown", "unset", "unspecified", "null", "None", "-", "0", "{}", "TRACE", "Warn")
"""What backends write where a record has no value, and names of severities."""

_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)


class ReaderContract(Contract):
    """Inherit it in a test class together with `ExporterContract`, if the child can be read."""

    @pytest.fixture
    def reader(self, child: ChildConfig) -> Iterator[Reader]:
        """The child's reader."""
        reader = child.create_reader()
        yield reader
        reader.close()

    @pytest.fixture
    def fill(self, exporter: ExporterThread, received: Backend) -> Fill:
        """Exports events of one stream, and waits until the backend shows them."""

        def export_all(events: Sequence[LogEvent]) -> None:
            exporter.deliver(events)
            self.wait_for(received, events)

        return export_all

    # Pages

    def test_the_newest_page_comes_first(self, reader: Reader, fill: Fill) -> None:
        """In direction `older`, the first page has the newest entries, in order from oldest to newest."""
        events = make_events([f"message {number}" for number in range(10)])
        fill(events)
        newest = next(walk(reader, make_logs(events[0].stream), "older", 3))

        assert uids(newest) == ids(events)[-len(newest.entries) :]
        assert newest.older is not None, "the page has no token for the older entries"
        for entry, event in zip(reversed(newest.entries), reversed(events), strict=False):
            self.assert_same(to_received(entry), event)

    def test_the_oldest_page_can_be_asked_for(self, reader: Reader, fill: Fill) -> None:
        """In direction `newer`, the first page has the oldest entries."""
        events = make_events([f"message {number}" for number in range(10)])
        fill(events)
        oldest = next(walk(reader, make_logs(events[0].stream), "newer", 3))

        assert uids(oldest) == ids(events)[: len(oldest.entries)]
        assert oldest.newer is not None, "the page has no token for the newer entries"

    @pytest.mark.parametrize("direction", ["newer", "older"])
    @pytest.mark.parametrize("limit", [1, 2, 7, 1_000])
    def test_pages_lead_through_the_whole_stream(
        self, reader: Reader, fill: Fill, direction: Direction, limit: int
    ) -> None:
        """They have no gap and no duplicate, and are in order, even within a millisecond."""
        stream = make_stream()
        messages = [f"message {number}" for number in range(15)]
        events = make_events(messages, stream, step_nanos=250_000)
        fill(events[:9])
        # Another writer: the numbers of a writer are those of its journal, whatever the stream.
        fill(make_events(messages, make_stream(), writer=OTHER_WRITER))
        fill(events[9:])

        assert walked(reader, stream, direction, limit) == ids(events)

    def test_a_page_may_be_as_large_as_the_reader_says(self, reader: Reader, fill: Fill) -> None:
        """A page may have as many entries as `max_page_size`, and the stream more."""
        limit = min(reader.max_page_size, 1_200)
        events = make_events([f"message {number}" for number in range(limit + 10)])
        fill(events)
        for direction in DIRECTIONS:
            assert walked(reader, events[0].stream, direction, limit) == ids(events)

    def test_one_may_turn_round(self, reader: Reader, fill: Fill) -> None:
        """If a page has a token in the other direction, that leads to the adjacent entries there."""
        events = make_events([f"message {number}" for number in range(9)])
        fill(events)
        logs = make_logs(events[0].stream)
        for direction in DIRECTIONS:
            _, page, *_ = walk(reader, logs, direction, 3)
            token = page.older if direction == "newer" else page.newer
            if token is not None:
                back = uids(next(walk(reader, logs, "older" if direction == "newer" else "newer", 2, token)))
                both = [*back, *uids(page)] if direction == "newer" else [*uids(page), *back]
                assert back
                assert " ".join(both) in " ".join(ids(events)), "the two pages are not adjacent"

    def test_a_token_can_be_used_again(self, child: ChildConfig, reader: Reader, fill: Fill) -> None:
        """Another reader can use it, too: ZenML's server creates one for each page."""
        events = make_events([f"message {number}" for number in range(9)])
        fill(events)
        logs = make_logs(events[0].stream)
        for direction in DIRECTIONS:
            first = next(walk(reader, logs, direction, 3))
            token = first.newer if direction == "newer" else first.older
            assert token is not None, "the page has no token for the other entries"
            other = child.create_reader()
            one, two, three = (uids(next(walk(again, logs, direction, 3, token))) for again in (reader, other, reader))
            assert one == two == three
            assert not set(one) & set(uids(first))
            other.close()

    def test_a_stream_can_be_followed(self, reader: Reader, fill: Fill) -> None:
        """A reader can follow a stream from its beginning while it is being written."""
        events = make_events([f"message {number}" for number in range(12)])
        logs = make_logs(events[0].stream)
        seen: list[str] = []
        token: str | None = None
        for end in (4, 5, 12):
            fill(events[len(seen) : end])
            for page in walk(reader, logs, "newer", 3, token):
                seen += uids(page)
                token = page.newer or token
            assert seen == ids(events[:end])
            # The next page is empty, so no entry was missed.
            assert uids(next(walk(reader, logs, "newer", 3, token))) == []

    def test_what_is_written_meanwhile_does_not_move_older_pages(self, reader: Reader, fill: Fill) -> None:
        """Paging back yields each entry once."""
        events = make_events([f"message {number}" for number in range(12)])
        logs = make_logs(events[0].stream)
        fill(events[:6])
        newest = next(walk(reader, logs, "older", 2))
        fill(events[6:])

        assert newest.older is not None, "the page has no token for the older entries"
        older = [uids(page) for page in walk(reader, logs, "older", 2, newest.older)]
        assert [*flat(older[::-1]), *uids(newest)] == ids(events[:6])

    def test_order_holds_when_the_clock_goes_back(self, reader: Reader, fill: Fill) -> None:
        """The entries of a writer are in order if the reader says `in_order`: gaps are found by that."""
        if not reader.in_order:
            pytest.skip("this reader does not promise order")
        events = make_events([f"message {number}" for number in range(6)], step_nanos=-1_000_000)
        fill(events[:3])
        fill(events[3:])

        for direction in DIRECTIONS:
            assert walked(reader, events[0].stream, direction, 2) == ids(events)

    # Filters

    @pytest.mark.parametrize(
        "wanted", ["search", "level", "since", "until", "since and until", "search and level", "nothing"]
    )
    def test_a_filter_is_honoured_or_refused(self, reader: Reader, fill: Fill, wanted: str) -> None:
        """Pages contain exactly the matching entries, or the reader raises `ValueError`."""
        messages = [f"{('apple', 'melon')[number % 2]} {number}" for number in range(12)]
        start = (int(time.time()) - 60) * 1_000_000_000
        events = make_events(messages, start_unix_nano=start, step_nanos=1_000_000_000, levels=(10, 20, 30, 40, 50))
        fill(events)
        stream = events[0].stream
        since, until = (_EPOCH + timedelta(microseconds=events[n].time_unix_nano // 1_000) for n in (3, 8))
        filters: dict[str, Any] = {}
        if "search" in wanted:
            filters["search"] = "melon"
            events = [event for event in events if "melon" in event.message]
        if "level" in wanted:
            filters["level"] = LoggingLevels.WARNING
            events = [event for event in events if event.level >= 30]
        if "since" in wanted:
            filters["since"] = since
            events = [event for event in events if event.number >= 3]
        if "until" in wanted:
            filters["until"] = until
            events = [event for event in events if event.number <= 8]
        if wanted == "nothing":
            filters["search"] = "banana"
            events = []
        for direction in DIRECTIONS:
            try:
                found = walked(reader, stream, direction, 2, **filters)
            except ValueError:
                continue
            assert found == ids(events)

    # Missing streams and invalid tokens

    def test_a_stream_that_is_not_there(self, reader: Reader) -> None:
        """The reader returns an empty page or raises `DoesNotExistException`: maybe nothing was logged yet."""
        for direction in DIRECTIONS:
            try:
                page = next(walk(reader, make_logs(make_stream()), direction))
            except DoesNotExistException:
                continue
            assert list(page.entries) == []

    @pytest.mark.parametrize("token", ["nonsense", "{}", "…", "\x00"])
    def test_a_token_that_is_none_is_refused(self, reader: Reader, fill: Fill, token: str) -> None:
        """The reader raises `ValueError`, which ZenML's server reports as a mistake in the request."""
        events = make_events(["a", "b"])
        fill(events)
        for direction in DIRECTIONS:
            with pytest.raises(ValueError, match=r"."):
                next(walk(reader, make_logs(events[0].stream), direction, 1, token))

    # Scans, which are optional

    @pytest.fixture
    def scanner(self, reader: Reader) -> Scanner:
        """The child's reader, if it is a `Scanner`."""
        if not isinstance(reader, Scanner):
            pytest.skip("this reader does not scan")
        return reader

    def test_a_scan_agrees_with_pages(self, reader: Reader, scanner: Scanner, fill: Fill) -> None:
        """It yields the same events in the same order, with their identities and times."""
        stream = make_stream()
        for first, writer in ((0, WRITER), (0, OTHER_WRITER), (6, WRITER), (12, WRITER), (9, OTHER_WRITER)):
            fill(make_events([f"message {number}" for number in range(first, first + 6)], stream, first, writer))

        chunks = list(scanner.scan(make_logs(stream)))
        pages = [to_received(read) for page in walk(reader, make_logs(stream)) for read in page.entries]
        assert scanned(chunks) == [(event.writer, event.sequence) for event in pages]
        for chunk in chunks:
            assert len(chunk.contents) == len(chunk.sequences) == len(chunk.times)
        times = [time for chunk in chunks for time in chunk.times]
        unit = self.time_unit_nanos
        assert [time // unit for time in times] == [event.time_unix_nano // unit for event in pages]

    def test_a_scan_goes_on_from_each_token(self, child: ChildConfig, scanner: Scanner, fill: Fill) -> None:
        """Another reader can continue from it, and later events follow."""
        events = make_events([f"message {number}" for number in range(20)])
        logs = make_logs(events[0].stream)
        for end in (4, 8, 12):
            fill(events[end - 4 : end])
        chunks = list(scanner.scan(logs))
        assert chunks[-1].token is not None, "the last chunk has no token to continue with later events"
        other = child.create_reader()
        assert isinstance(other, Scanner)
        for place, chunk in enumerate(chunks):
            if chunk.token is not None:
                assert scanned(other.scan(logs, chunk.token)) == scanned(chunks[place + 1 :])
        fill(events[12:])
        other.close()

        later = scanned(scanner.scan(logs, chunks[-1].token))
        assert later == [(event.writer, event.sequence) for event in events[12:]]

    def test_what_was_scanned_is_the_event(self, scanner: Scanner, fill: Fill) -> None:
        """A scanned record becomes the event again, with its identity. Two scans return equal contents."""
        stream = make_stream()
        plain = make_events([f"message {number}" for number in range(len(ODD))], stream)
        events = [event._replace(**odd) for event, odd in zip(plain, ODD.values(), strict=True)]
        fill(events)

        contents = [content for chunk in scanner.scan(make_logs(stream)) for content in chunk.contents]
        again = [content for chunk in scanner.scan(make_logs(stream)) for content in chunk.contents]
        assert contents == again
        for content, event in zip(contents, events, strict=True):
            found = scanner.event_of(content, stream)
            assert found is not None, "event_of() returns no event"
            assert (found.stream, found.uid) == (stream, event.uid)
            self.assert_same(
                Received(found.uid, found.writer, found.sequence, found.message, found.level, found.time_unix_nano),
                event,
            )

    def test_words_that_backends_write_for_nothing_are_kept(self, scanner: Scanner, fill: Fill) -> None:
        """A field may hold any text, also one that the backend writes where there is none: `verify` compares them."""
        changes: list[dict[str, Any]] = []
        for word in WORDS_FOR_NOTHING:
            changes += [{name: word} for name in ("message", "logger_name", "file", "function")]
            changes += [{"level": level, "level_name": word} for level in (5, 20, 25)]
            changes.append({"exception": ExceptionInfo("ValueError", word, word)})
            changes.append({"attributes": {"scope.name": word, "severity": word}})
        plain = make_events(["message"] * len(changes))
        events = [event._replace(**change) for event, change in zip(plain, changes, strict=True)]
        stream = events[0].stream
        fill(events)

        contents = [content for chunk in scanner.scan(make_logs(stream)) for content in chunk.contents]
        for content, event, change in zip(contents, events, changes, strict=True):
            found = scanner.event_of(content, stream)
            assert found is not None, "event_of() returns no event"
            assert _compared(found) == _compared(event), change

    def test_a_scan_of_what_is_not_there(self, scanner: Scanner, fill: Fill) -> None:
        """It is empty or raises `DoesNotExistException`, and refuses an invalid token with `ValueError`."""
        with suppress(DoesNotExistException):
            assert scanned(scanner.scan(make_logs(make_stream()))) == []
        events = make_events(["a", "b"])
        fill(events)
        with pytest.raises(ValueError, match=r"."):
            list(scanner.scan(make_logs(events[0].stream), "nonsense"))

    def test_what_was_scanned_can_be_written(
        self, scanner: Scanner, exporter: ExporterThread, received: Backend, fill: Fill
    ) -> None:
        """If the exporter is a `Copier`, it writes scanned records unchanged, in pieces of any size."""
        if not exporter.takes_scanned(scanner.scan_format):
            pytest.skip("this exporter does not write scanned records")
        events = make_events([f"message {number}" for number in range(20)])
        fill(events)
        other = make_stream()
        for chunk in scanner.scan(make_logs(events[0].stream)):
            middle = len(chunk.contents) // 2
            for part in (slice(middle), slice(middle, None)):
                sequences, contents = chunk.sequences[part], chunk.contents[part]
                if contents:
                    exporter.export_scanned(other, Scanned(chunk.writer, sequences, (), contents, None, None))
        self.wait_for(received, [event._replace(stream=other) for event in events])

        one, two = (list(scanner.scan(make_logs(stream))) for stream in (events[0].stream, other))
        assert [content for chunk in two for content in chunk.contents] == [
            content for chunk in one for content in chunk.contents
        ]
        assert scanned(two) == [(event.writer, event.sequence) for event in events]

    # Through the log store

    @pytest.mark.parametrize("start", ["oldest", "newest"])
    @pytest.mark.parametrize("limit", [1, 4, 1_000])
    def test_what_arrived_twice_is_fetched_once(
        self, child: ChildConfig, exporter: ExporterThread, received: Backend, start: str, limit: int
    ) -> None:
        """After a lost answer or a crash, consecutive events are delivered again."""
        events = make_events([f"message {number}" for number in range(14)])
        exporter.deliver(events[:8])
        exporter.deliver(events[4:8])
        exporter.close()
        exporter.deliver(events[2:10])
        exporter.close()
        exporter.deliver(events[9:])
        self.wait_for(received, events)

        entries = fetched(child, events[0].stream, start, limit)
        assert [str(entry.id) for entry in entries] == ids(events)
        assert [entry.message for entry in entries] == [event.message for event in events]

    # Faults and the end

    def test_a_fault_is_reported_and_outlived_by_reading(
        self, child: ChildConfig, fill: Fill, faults: Mapping[str, Fault]
    ) -> None:
        """It raises the right error in time, without secrets, and the reader works again after the fault."""
        concerned = {name: fault for name, fault in faults.items() if fault.read is not None}
        if not concerned:
            pytest.skip("declare the backend's faults in a fixture 'faults'")
        events = make_events([f"message {number}" for number in range(4)])
        fill(events)
        logs = make_logs(events[0].stream)
        reader = child.create_reader()
        newest = next(walk(reader, logs, "older", 2))
        for name, fault in concerned.items():
            assert fault.read is not None
            with fault.begin():
                for again, token in ((reader, None), (reader, newest.older), (child.create_reader(), None)):
                    request = PageRequest(logs, "older", token, 2, LogsEntriesFilter())
                    assert_error(self._failure(again, request), fault.read, child, name)
            page = self.recovered(lambda: next(walk(reader, logs, "older", 2)), LogStoreError)
            assert uids(page) == uids(newest)
        reader.close()

    def _failure(self, reader: Reader, request: PageRequest) -> Exception | None:
        try:
            PatientThread().call("read()", self.read_seconds, lambda: reader.read(request))
        except Exception as error:
            return error
        return None

    def test_closing_a_reader_is_harmless(self, child: ChildConfig, fill: Fill) -> None:
        """A reader may be closed unused, and more than once, and other readers still work."""
        events = make_events(["a"])
        fill(events)
        child.create_reader().close()
        one, other = child.create_reader(), child.create_reader()
        assert walked(one, events[0].stream, "newer", 1) == ids(events)
        one.close()
        one.close()
        assert walked(other, events[0].stream, "newer", 1) == ids(events)
        other.close()


def _compared(event: LogEvent) -> tuple[Any, ...]:
    """Return what `verify` compares, without the time, whose unit the backend chooses."""
    return event.text, max(0, event.level // 10 * 10), event.logger_name, event.file, event.line if event.file else 0


def scanned(chunks: Iterable[Scanned]) -> list[tuple[str, int]]:
    """Return the identities of scanned events."""
    return [(chunk.writer, sequence) for chunk in chunks for sequence in chunk.sequences]


def ids(events: Sequence[LogEvent]) -> list[str]:
    """Return the events' uids."""
    return [event.uid for event in events]


def uids(page: Page) -> list[str]:
    """Return the uids of a page's entries."""
    return [str(read.entry.id) for read in page.entries]


def flat(pages: Sequence[Sequence[str]]) -> list[str]:
    """Return the uids of all pages in one list."""
    return [uid for page in pages for uid in page]


def walked(reader: Reader, stream: Stream, direction: Direction, limit: int, **filters: Any) -> list[str]:
    """Return the uids of all entries on the pages in a direction, oldest first."""
    pages = [uids(page) for page in walk(reader, make_logs(stream), direction, limit, **filters)]
    return flat(pages if direction == "newer" else pages[::-1])


def fetched(child: ChildConfig, stream: Stream, start: str, limit: int) -> list[LogEntry]:
    """Return all entries of a stream, oldest first, from a log store with the child as primary."""
    store = CompositeLogStore(
        name="logs",
        id=uuid4(),
        config=CompositeLogStoreConfig(primary=child.name, children=[child]),
        flavor="composite",
        type=StackComponentType.LOG_STORE,
        user=None,
        created=datetime.now(),
        updated=datetime.now(),
    )
    logs = make_logs(stream, store.id)
    page = fetch_page(store, logs, start=start, limit=limit)
    entries = list(page.items)
    while cursor := page.after if start == "oldest" else page.before:
        before, after = (None, cursor) if start == "oldest" else (cursor, None)
        page = fetch_page(store, logs, before=before, after=after)
        entries = [*entries, *page.items] if start == "oldest" else [*page.items, *entries]
    return entries
