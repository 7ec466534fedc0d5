"""Pages by a keyset are the pages of a plain list: with ties, duplicates, late arrivals, and in both directions."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta, timezone
from typing import Any, Literal
from uuid import UUID, uuid4

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from composite_logstore import Allowance, Answer, AnswerTooLargeError, Event, KeysetReader, PageRequest, Query, Record
from composite_logstore.delivery.backoff import PASSING
from composite_logstore.parity.fields import shown
from composite_logstore.reading import keyset
from composite_logstore.reading.records import (
    SEQUENCE,
    STREAM,
    WRITER,
    as_event,
    event_of,
    position_of,
    shown_of,
    whole_number,
)
from composite_logstore.testing import make_stream
from composite_logstore.zenml import LogsEntriesFilter, LogStoreError, make_logs

pytestmark = pytest.mark.filterwarnings("error")

# Drawing takes long where other work keeps the machine busy.
BUSY = [HealthCheck.too_slow]

STREAM_ID = UUID(int=7)
NOW = datetime.now(timezone.utc)
BEGAN = int((NOW - timedelta(minutes=5)).timestamp()) * 1_000_000_000
LOGS = make_logs(STREAM_ID, "step", (NOW - timedelta(minutes=10)).replace(tzinfo=None))
Direction = Literal["newer", "older"]


class ListReader(KeysetReader):
    """A backend whose records are a plain list. What its answers leave open, it does in the most awkward way."""

    max_page_size = 50
    most_bytes = 10**9

    def __init__(self, records: Sequence[Record], ties: bool, most: int, unit: int = 1) -> None:
        self.records = list(records)
        self.sorts_ties = ties  # type: ignore[misc]
        self.max_records = most  # type: ignore[misc]
        self.time_unit_nanos = unit  # type: ignore[misc]
        self.searches = 0

    def search(self, query: Query, allowance: Allowance) -> Answer:
        allowance.take(0)
        self.searches += 1
        assert query.limit <= self.max_records
        is_newer = query.direction == "newer"
        found = [one for one in self.records if query.first_nanos <= one.nanos <= query.last_nanos]
        found = [one for one in found if one.attributes[STREAM] == str(query.logs_id)]
        if self.sorts_ties:
            edge = query.edge
            if edge is not None:
                found = [one for one in found if (key(one) >= edge[:3]) is is_newer or key(one) == edge[:3]]
            found.sort(key=key, reverse=not is_newer)
        else:
            # Equal times come in another order with each search.
            found.sort(key=lambda one: hash((one.body, self.searches)))
            found.sort(key=lambda one: one.nanos // self.time_unit_nanos, reverse=not is_newer)
        if query.severity_number:
            found = [one for one in found if one.severity_number >= query.severity_number or not one.severity_number]
        answer = found[: query.limit]
        if sum(len(one.body) for one in answer) > self.most_bytes:
            raise AnswerTooLargeError
        return Answer(answer, len(answer) < query.limit)

    def close(self) -> None:
        pass


def key(record: Record) -> tuple[int, str, int]:
    return (
        record.nanos,
        str(record.attributes.get(WRITER, "")),
        max(0, whole_number(record.attributes.get(SEQUENCE)) or 0),
    )


def make(nanos: int, writer: str | None = None, sequence: Any = None, body: str = "x", number: int = 9) -> Record:
    attributes: dict[str, Any] = {STREAM: str(STREAM_ID)}
    if writer is not None:
        attributes |= {WRITER: writer, SEQUENCE: sequence}
    return Record(BEGAN + nanos, body, number, "", "train", attributes)


def expected(records: Sequence[Record]) -> list[tuple[int, str]]:
    """What a plain list shows: each place once, in order."""
    placed = {position_of(one, event_of(one)): one for one in reversed(records)}
    return [(one.nanos // 1000, one.body) for _, one in sorted(placed.items(), key=lambda item: item[0])]


def walk(
    reader: KeysetReader, direction: Direction, limit: int, token: str | None = None, **filter_: Any
) -> tuple[list[tuple[int, str]], str | None]:
    """All entries from a token on, oldest first, and the last token."""
    pages: list[list[tuple[int, str]]] = []
    for _ in range(5_000):
        page = reader.read(PageRequest(LOGS, direction, token, limit, LogsEntriesFilter(**filter_)))
        assert len(page.entries) <= limit
        pages.append([(micros(read.entry.timestamp), read.entry.message) for read in page.entries])
        following = page.newer if direction == "newer" else page.older
        token = following or token
        if following is None:
            ordered = pages if direction == "newer" else pages[::-1]
            return [entry for one in ordered for entry in one], token
    raise AssertionError("the pages have no end")


def micros(moment: datetime | None) -> int:
    assert moment is not None
    return (moment - datetime(1970, 1, 1, tzinfo=timezone.utc)) // timedelta(microseconds=1)


NAMES = ["code.file.path", "code.line.number", "exception.type", "exception.message", "zenml.log.level", "mine"]
VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just({"a": [1]})


@given(
    record=st.builds(
        Record,
        nanos=st.integers(-(1 << 63), (1 << 63) - 1),
        body=st.text(max_size=5) | st.just("\x1b[1mbold\x1b[0m"),
        severity_number=st.integers(0, 30),
        severity_text=st.sampled_from(["", "INFO", "TRACE", "odd"]),
        scope=st.sampled_from(["train", "stderr", ""]),
        attributes=st.dictionaries(st.sampled_from(NAMES), VALUES),
    )
)
def test_what_is_compared_of_a_record_is_that_of_its_event(record: Record) -> None:
    identity = Event("a" * 15, 7)
    assert shown_of(record, identity) == shown(as_event(record, identity, make_stream()))


@st.composite
def streams(draw: st.DrawFn) -> list[Record]:
    """Records of some writers and of other programs, many of one time, some of them twice."""
    count = draw(st.integers(0, 40))
    records = []
    sequences: dict[str, int] = {}
    for number in range(count):
        nanos = draw(st.integers(0, 5)) * draw(st.sampled_from([1, 1_000, 1_000_000]))
        writer = draw(st.sampled_from(["a" * 15, "b" * 15, None]))
        if writer is None:
            odd = draw(st.sampled_from([(None, None), ("", 3), ("é", 1), ("w" * 100, 2), ("a" * 15, "no")]))
            records.append(make(nanos, *odd, body=f"other {number % 7}", number=draw(st.sampled_from([0, 9, 17]))))
        else:
            sequence = sequences[writer] = sequences.get(writer, -1) + 1
            text: Any = draw(st.sampled_from([sequence, str(sequence), float(sequence)]))
            records.append(make(nanos, writer, text, f"{writer[0]} {sequence}", draw(st.sampled_from([5, 9, 17]))))
        if draw(st.booleans()):
            records.append(records[draw(st.integers(0, len(records) - 1))])
    return records


@settings(max_examples=50, suppress_health_check=BUSY)
@given(
    records=streams(),
    ties=st.booleans(),
    unit=st.sampled_from([1, 1_000_000]),
    limit=st.integers(1, 12),
    direction=st.sampled_from(["newer", "older"]),
)
def test_pages_are_those_of_a_plain_list(
    records: list[Record], ties: bool, unit: int, limit: int, direction: Direction
) -> None:
    other = make(0)._replace(attributes={STREAM: str(uuid4())})
    reader = ListReader([other, *records], ties, 100, 1 if ties else unit)
    assert walk(reader, direction, limit)[0] == expected(records)
    late = [one for one in records if one.severity_number == 17]
    assert walk(reader, direction, limit, level="ERROR")[0] == expected(late)
    found = [one for one in records if "A 1" in one.body.upper()]
    assert walk(reader, direction, limit, search="A 1")[0] == expected(found)


@settings(max_examples=60, suppress_health_check=BUSY)
@given(records=streams(), ties=st.booleans(), limit=st.integers(1, 12), cut=st.integers(0, 40))
def test_what_arrives_later_is_read_later(records: list[Record], ties: bool, limit: int, cut: int) -> None:
    """Records that lie beyond the last page appear, those that lie before it do not, and none moves older pages."""
    reader = ListReader(records[:cut], ties, 100)
    before, token = walk(reader, "newer", limit)
    reader.records = list(records)
    after, _ = walk(reader, "newer", limit, token)
    places = [position_of(one, event_of(one)) for one in records[:cut]]
    edge = max(places, default=None)
    beyond = [one for one in records if edge is None or position_of(one, event_of(one)) > edge]
    assert (before, after) == (expected(records[:cut]), expected(beyond))


@settings(max_examples=60, suppress_health_check=BUSY)
@given(records=streams(), ties=st.booleans(), limit=st.integers(1, 12), turn=st.integers(0, 5))
def test_one_may_turn_round_at_any_page(records: list[Record], ties: bool, limit: int, turn: int) -> None:
    reader = ListReader(records, ties, 100)
    token = None
    for _ in range(turn + 1):
        page = reader.read(PageRequest(LOGS, "newer", token, limit, LogsEntriesFilter()))
        if page.newer is None or not page.entries:
            return
        token, back = page.newer, page.older
    first = (micros(page.entries[0].entry.timestamp), page.entries[0].entry.message)
    if back is not None:
        whole = expected(records)
        older, _ = walk(reader, "older", limit, back)
        assert [*older, first] == whole[: len(older) + 1]


@settings(max_examples=30, suppress_health_check=BUSY)
@given(records=streams(), ties=st.booleans())
def test_a_scan_is_the_stream(records: list[Record], ties: bool) -> None:
    reader = ListReader(records, ties, 60)
    chunks = list(reader.scan(LOGS))
    contents = [(one.record.nanos // 1000, one.record.body) for chunk in chunks for one in chunk.contents]
    assert contents == expected(records)
    for place, chunk in enumerate(chunks):
        if chunk.token is not None:
            again = [one for later in reader.scan(LOGS, chunk.token) for one in later.contents]
            assert again == [one for later in chunks[place + 1 :] for one in later.contents]


@settings(max_examples=40, suppress_health_check=BUSY)
@given(
    steps=st.lists(st.sampled_from([0, 1, 1_000, 10**6, 10**9, 200 * 10**9]), max_size=80),
    ties=st.booleans(),
    unit=st.sampled_from([1, 1_000_000]),
)
def test_a_scan_passes_pauses_of_any_length(steps: list[int], ties: bool, unit: int) -> None:
    """It searches slices of time, as long as it has found records to be apart."""
    nanos = 0
    records = []
    for number, step in enumerate(steps):
        nanos = min(nanos + step, 300 * 10**9)
        records.append(make(nanos, "a" * 15, number, f"m{number}"))
    reader = ListReader(records, ties, 100 if not ties else 7, 1 if ties else unit)
    contents = [(one.record.nanos // 1000, one.record.body) for chunk in reader.scan(LOGS) for one in chunk.contents]
    assert contents == expected(records)


def test_a_scan_asks_for_slices_of_time() -> None:
    """So a backend does not sort the rest of the stream for each search."""
    reader = ListReader([make(number * 1_000_000, "a" * 15, number) for number in range(2_000)], True, 50)
    asked: list[int] = []
    search = reader.search

    def noted(query: Query, allowance: Allowance) -> Answer:
        asked.append(sum(query.first_nanos <= one.nanos <= query.last_nanos for one in reader.records))
        return search(query, allowance)

    reader.search = noted  # type: ignore[method-assign]
    assert sum(len(chunk.contents) for chunk in reader.scan(LOGS)) == 2_000
    assert max(asked[1:-1]) <= 200
    assert len(asked) <= 100


@pytest.mark.parametrize("direction", ["newer", "older"])
@pytest.mark.parametrize("ties", [True, False])
def test_a_thousand_events_of_one_nanosecond(ties: bool, direction: Direction) -> None:
    records = [make(5, "a" * 15, number, f"m{number}") for number in range(1_000)]
    reader = ListReader(records, ties, 1_200)
    assert walk(reader, direction, 40)[0] == expected(records)


@pytest.mark.parametrize("direction", ["newer", "older"])
def test_a_tie_may_be_larger_than_any_answer_if_the_backend_sorts_ties(direction: Direction) -> None:
    records = [make(5, "a" * 15, number, f"m{number}") for number in range(300)]
    assert walk(ListReader(records, True, 60), direction, 40)[0] == expected(records)
    with pytest.raises(LogStoreError, match="one time"):
        walk(ListReader(records, False, 60), direction, 40)


@pytest.mark.parametrize("direction", ["newer", "older"])
def test_an_event_that_was_sent_a_hundred_times_is_one(direction: Direction) -> None:
    records = [make(5, "a" * 15, 0, "one")] * 100 + [make(5, "a" * 15, 1, "two"), make(6, "a" * 15, 2, "three")]
    reader = ListReader(records, True, 500)
    assert walk(reader, direction, 1)[0] == expected(records)


@pytest.mark.parametrize("direction", ["newer", "older"])
def test_an_answer_that_is_too_large_is_asked_for_in_pieces(direction: Direction) -> None:
    records = [make(number, "a" * 15, number, "x" * 100) for number in range(40)]
    reader = ListReader(records, True, 500)
    reader.most_bytes = 450
    assert len(walk(reader, direction, 20)[0]) == 40
    reader.most_bytes = 50
    with pytest.raises(LogStoreError, match="too large"):
        walk(reader, direction, 20)


@pytest.mark.parametrize(
    "token",
    [
        *("", "[]", "null", "[1]", "[1,2,3,4,5,6]", "[" * 10_000, '[2,0,"",0,0]', '[1,0,"",0,0]', '[1,"0","",0,0]'),
        *(f'[1,{2**63},"",0,0]', '[1,BEGAN,"",-1,0]', "[1,BEGAN,1,0,0]", '[1,BEGAN,"",0.5,0]', '[1,BEGAN,"",0,-1]'),
        *('[1,LATER,"",0,0]', f'[1,BEGAN,"{"x" * 3_000}",0,0]'),
        '[1,true,"",0,0]',
    ],
)
@pytest.mark.parametrize("direction", ["newer", "older"])
def test_a_forged_token_is_refused(token: str, direction: Direction) -> None:
    # Not among the parameters: processes that share the tests name them alike.
    token = token.replace("BEGAN", str(BEGAN)).replace("LATER", str(BEGAN + 10**15))
    reader = ListReader([make(1)], True, 100)
    with pytest.raises(ValueError, match="token"):
        reader.read(PageRequest(LOGS, direction, token, 5, LogsEntriesFilter()))
    assert reader.searches == 0


@pytest.mark.parametrize("passing", PASSING)
def test_what_was_found_before_a_search_fails_is_a_page(passing: type[Exception]) -> None:
    class Failing(ListReader):
        def search(self, query: Query, allowance: Allowance) -> Answer:
            if self.searches:
                raise passing("Try again later.")
            return super().search(query, allowance)

    reader = Failing([make(number) for number in range(9)], ties=True, most=3)
    page = reader.read(PageRequest(LOGS, "newer", None, 9, LogsEntriesFilter(search="x")))
    assert page.entries
    with pytest.raises(passing):
        reader.read(PageRequest(LOGS, "newer", page.newer, 9, LogsEntriesFilter(search="x")))


@pytest.mark.parametrize("scans", [False, True])
def test_zenml_is_asked_once_when_the_stream_ended(monkeypatch: pytest.MonkeyPatch, scans: bool) -> None:
    asked = []
    monkeypatch.setattr(keyset, "ended_at", lambda logs: asked.append(logs))
    reader = ListReader([make(number) for number in range(9)], ties=True, most=3)
    if scans:
        assert sum(len(scanned.contents) for scanned in reader.scan(LOGS)) == 9
    else:
        assert reader.read(PageRequest(LOGS, "older", None, 5, LogsEntriesFilter())).entries
    assert len(asked) == 1


@pytest.mark.parametrize(("narrows", "asked"), [(True, 60), (False, 80)])
def test_a_backend_that_cannot_narrow_is_asked_for_more(narrows: bool, asked: int) -> None:
    limits = []

    class Reader(ListReader):
        def search(self, query: Query, allowance: Allowance) -> Answer:
            limits.append(query.limit)
            return super().search(query, allowance)

    reader = Reader([make(number) for number in range(9)], ties=True, most=80)
    reader.narrows = narrows  # type: ignore[misc]
    reader.read(PageRequest(LOGS, "newer", None, 10, LogsEntriesFilter(search="x")))
    reader.read(PageRequest(LOGS, "newer", None, 10, LogsEntriesFilter()))
    assert limits == [asked, 60]
