"""The reader, without a network: what it asks, and what it makes of each answer."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from itertools import count
from random import Random
from types import SimpleNamespace
from typing import Any, Literal
from uuid import NAMESPACE_URL, UUID, uuid4, uuid5

import orjson
import pytest
import requests
from requests.structures import CaseInsensitiveDict
from zenml.enums import LoggingLevels
from zenml.log_stores.datadog.datadog_log_store import DatadogLogStore

from composite_logstore import Bounds, Event, HttpResponse, Page, PageRequest
from composite_logstore.reading import searches
from composite_logstore.zenml import (
    LogsEntriesFilter,
    LogStoreError,
    LogStoreRateLimitError,
    LogStoreUnavailableError,
    make_logs,
)
from composite_logstore_datadog import reader as datadog
from composite_logstore_datadog.config import DatadogChildConfig
from composite_logstore_datadog.reader import DatadogReader

KEY = "test-key"
APPLICATION_KEY = "test-application-key"
NOON = datetime(2026, 9, 21, 12, tzinfo=timezone.utc)
CREATED = datetime(2026, 9, 21, 11)


class Search:
    """Stands where the HTTP client is: remembers requests and gives the answers that it was told."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.answers: list[Any] = []

    def request(self, method: str, url: str, **arguments: Any) -> Any:
        self.requests.append({"url": url, "json": orjson.loads(arguments["body"]), **arguments})
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        if callable(answer):
            answer = answer()
        status, headers, content, *fault = answer
        return HttpResponse(status, CaseInsensitiveDict(headers), content, *(fault or [None]))

    def close(self) -> None:
        """Close nothing."""

    def finds(self, *logs: Any, after: str | None = None, **meta: Any) -> None:
        page = {"page": {"after": after}} if after else {}
        content = orjson.dumps({"data": list(logs), "meta": {"status": "done", **page, **meta}})
        self.answers.append((200, {}, content))

    @property
    def bodies(self) -> list[dict[str, Any]]:
        return [request["json"] for request in self.requests]


@pytest.fixture
def search(monkeypatch: pytest.MonkeyPatch) -> Search:
    search = Search()
    monkeypatch.setattr(searches, "HttpClient", lambda **_: search)
    monkeypatch.setattr(datadog, "utc_now", lambda tz_aware: NOON)
    return search


def make_reader(**settings: Any) -> DatadogReader:
    keys = {"api_key": KEY, "application_key": APPLICATION_KEY}
    return DatadogReader(DatadogChildConfig(**{"name": "live", "type": "datadog", **keys, **settings}))


LOGS = make_logs(uuid4(), "step", CREATED)


def read(
    direction: Literal["newer", "older"] = "older",
    token: str | None = None,
    limit: int = 100,
    reader: DatadogReader | None = None,
    **filters: Any,
) -> Page:
    request = PageRequest(LOGS, direction, token, limit, LogsEntriesFilter(**filters))
    return (reader or make_reader()).read(request)


def make_log(
    sequence: int = 0, writer: str = "a" * 15, moment: datetime = NOON, message: str | None = None
) -> dict[str, Any]:
    """Return what Datadog's search says of an event of ours."""
    nanos = int((moment - datetime(1970, 1, 1, tzinfo=timezone.utc)) / timedelta(microseconds=1)) * 1_000
    return {
        "id": uuid4().hex,
        "type": "log",
        "attributes": {
            "message": message or f"m{sequence}",
            "status": "info",
            "service": "zenml",
            "timestamp": moment.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "tags": [],
            "attributes": {
                "otel": {"timestamp": str(nanos)},
                "log": {"record": {"uid": str(uuid5(NAMESPACE_URL, f"{writer}{sequence}"))}},
                "zenml": {"log": {"writer": writer, "sequence": sequence}},
            },
        },
    }


def messages(page: Page) -> list[str]:
    return [read.entry.message for read in page.entries]


def test_a_first_page(search: Search) -> None:
    search.finds(make_log(2), make_log(1))
    page = read(limit=50)
    (request,) = search.requests
    assert request["url"] == "https://api.datadoghq.com/api/v2/logs/events/search"
    keys = {"dd-api-key": KEY, "dd-application-key": APPLICATION_KEY}
    assert request["headers"] == {"Content-Type": "application/json", **keys}
    assert request["timeout_seconds"] == pytest.approx(30, abs=1)
    assert request["json"] == {
        "filter": {
            "query": f'service:"zenml" AND @zenml.log.id:{LOGS.id}',
            # An hour before the stream was created: the client's clock may be behind the server's.
            "from": "2026-09-21T10:00:00+00:00",
            # And two hours after now: the client's clock may be ahead of the server's.
            "to": "2026-09-21T14:00:00+00:00",
        },
        # A few more than wanted, so that the last millisecond is complete.
        "page": {"limit": 100},
        "sort": "-timestamp",
    }
    assert messages(page) == ["m1", "m2"]
    assert (page.older, page.newer) == (None, None)


def test_a_page_is_no_longer_than_datadogs(search: Search) -> None:
    search.finds()
    assert read(limit=5_000) == Page()
    assert search.bodies[0]["page"] == {"limit": 1_000}


@pytest.mark.parametrize("direction", ["older", "newer"])
def test_pages_continue_the_same_search(
    search: Search, direction: Literal["newer", "older"], monkeypatch: pytest.MonkeyPatch
) -> None:
    second = NOON - timedelta(seconds=1)
    logs = [make_log(0, moment=second - timedelta(seconds=1)), make_log(1, moment=second), make_log(2)]
    search.finds(*(logs if direction == "newer" else logs[::-1]), after="c1")
    search.finds(*(logs[1:] if direction == "newer" else logs[1::-1]), after="c2")
    filters = {"search": "m", "level": "INFO", "limit": 2}
    page = read(direction, **filters)
    assert messages(page) == (["m0", "m1"] if direction == "newer" else ["m1", "m2"])
    token = getattr(page, direction)
    assert getattr(page, "newer" if direction == "older" else "older") is None
    # A minute later.
    monkeypatch.setattr(datadog, "utc_now", lambda tz_aware: NOON + timedelta(minutes=1))
    page = read(direction, token, **filters)
    assert messages(page) == (["m2"] if direction == "newer" else ["m0"])
    before, after = search.bodies
    assert before["filter"]["query"] == after["filter"]["query"]
    assert before["sort"] == after["sort"] == ("timestamp" if direction == "newer" else "-timestamp")
    begin, end = "2026-09-21T10:00:00+00:00", "2026-09-21T14:00:00+00:00"
    assert (before["filter"]["from"], before["filter"]["to"]) == (begin, end)
    # It goes on at the millisecond where the page ended: Datadog's own cursor may stand in its middle.
    if direction == "newer":
        # What has been logged meanwhile is newer, too.
        later = "2026-09-21T14:01:00+00:00"
        assert (after["filter"]["from"], after["filter"]["to"]) == (second.isoformat(), later)
    else:
        assert (after["filter"]["from"], after["filter"]["to"]) == (begin, (second + MILLISECOND).isoformat())
    assert KEY not in token


@pytest.mark.parametrize("direction", ["older", "newer"])
def test_what_a_clock_ahead_of_the_servers_has_logged_is_shown(
    search: Search, direction: Literal["newer", "older"]
) -> None:
    moment = NOON + timedelta(hours=1, minutes=59)
    search.finds(make_log(1, moment=moment))
    assert messages(read(direction)) == ["m1"]
    assert datetime.fromisoformat(search.bodies[0]["filter"]["to"]) > moment


@pytest.mark.parametrize("direction", ["older", "newer"])
@pytest.mark.parametrize("limit", [1, 2, 3, 7, 1_000])
def test_order_within_a_millisecond_is_the_writers_across_pages_too(
    monkeypatch: pytest.MonkeyPatch, direction: Literal["newer", "older"], limit: int
) -> None:
    """Datadog sorts equal times in an order that means nothing, here another one for each search."""
    logs = [make_log(n, moment=NOON + MILLISECOND * (n // 7)) for n in range(40)]
    random = Random(limit)

    rest: dict[str, list[dict[str, Any]]] = {}

    def search(_: Any, body: dict[str, Any], __: Any) -> tuple[list[dict[str, Any]], str | None]:
        begin, end = (datetime.fromisoformat(body["filter"][key]) for key in ("from", "to"))
        times = [(log["attributes"]["timestamp"], random.random(), log) for log in logs]
        found = [
            log
            for time, _, log in sorted(times, reverse=body["sort"] == "-timestamp")
            if begin <= datetime.fromisoformat(time.replace("Z", "+00:00")) <= end
        ]
        if "cursor" in body["page"]:
            found = rest[body["page"]["cursor"]]
        body["page"]["limit"] = size = min(body["page"]["limit"], limit + 3)
        cursor = str(random.random())
        rest[cursor] = found[size:]
        return found[:size], cursor if found else None

    monkeypatch.setattr(DatadogReader, "_search", search)
    until = NOON + timedelta(seconds=1)
    page = read(direction, limit=limit, until=until)
    pages = [messages(page)]
    while token := getattr(page, direction):
        page = read(direction, token, limit=limit, until=until)
        pages.append(messages(page))
    if direction == "older":
        pages.reverse()
    assert [message for part in pages for message in part] == [f"m{n}" for n in range(40)]
    assert max(map(len, pages)) <= limit


MILLISECOND = timedelta(milliseconds=1)
NAIVE = '{"direction":"newer","since":"2026-01-01","until":"2026-01-02","edge_millis":0,"edge":{}}'


@pytest.mark.parametrize("token", ["", "x", "{}", "null", '{"version": 2}', NAIVE])
def test_a_malformed_token(token: str) -> None:
    with pytest.raises(ValueError, match="malformed"):
        read(token=token)


YEAR = 365 * 86_400_000


@pytest.mark.parametrize(
    "changes",
    [
        {"direction": "older"},
        *({"edge_millis": value} for value in (0, -1, 1 << 62, 10**30, 1.5, "5", True, None, [])),
        *({"edge_millis": int(NOON.timestamp() * 1_000) + years * YEAR} for years in (-1, 1)),
        *(
            {"edge": value}
            for value in (5, None, [], {"a": 5}, {"a": [5]}, {"a": [[1]]}, {"a": [[1.5, 2]]}, {"a": [["1", 2]]})
        ),
        *({"others": value} for value in (5, None, {}, [5], [None])),
        *({"version": value} for value in (1, 3, "2", None)),
        # Whose it is and from when to when is for others to say.
        {"since": "2020-01-01T00:00:00Z"},
        {"until": "2030-01-01T00:00:00Z"},
        {"service": "other"},
        {"edge": {"a" * 15: [[number, number] for number in range(0, 10_000, 2)]}},
        {"others": ["0" * 16] * 3_000},
    ],
    ids=lambda changes: repr(changes)[:40],
)
def test_a_token_that_no_page_has_given(search: Search, changes: dict[str, Any]) -> None:
    search.finds(make_log(0), make_log(1))
    token = read("newer", limit=1).newer
    assert token is not None
    search.finds(make_log(0), make_log(1))
    assert messages(read("newer", token)) == ["m1"]
    with pytest.raises(ValueError, match="malformed"):
        read("newer", json.dumps(orjson.loads(token) | changes))
    assert len(search.requests) == 2


@pytest.mark.parametrize("until", [None, "9999-12-31T23:59:59Z"])
def test_a_token_of_a_machine_whose_clock_is_ahead(
    search: Search, monkeypatch: pytest.MonkeyPatch, until: str | None
) -> None:
    search.finds(make_log(0), make_log(1))
    token = read("newer", limit=1, until=until).newer
    monkeypatch.setattr(datadog, "utc_now", lambda tz_aware: NOON - datadog.FURTHEST_AHEAD - timedelta(minutes=1))
    search.finds(make_log(0), make_log(1))
    assert messages(read("newer", token, until=until)) == ([] if until is None else ["m1"])


@pytest.mark.parametrize("timestamp", [None, "noon", {}, 0, -5, 1e300, 10**18, "1970-01-01T00:00:00Z"])
@pytest.mark.parametrize("direction", ["older", "newer"])
def test_a_log_without_a_time_that_makes_sense_hides_no_others(
    search: Search, monkeypatch: pytest.MonkeyPatch, direction: Literal["newer", "older"], timestamp: Any
) -> None:
    """Datadog sorts by the time that it knows: such a one is of the time of its neighbour."""
    times = [NOON - timedelta(seconds=9 - number) for number in range(6)]
    logs = [make_log(number, moment=time) for number, time in enumerate(times)]
    for odd in (logs[2], logs[5] if direction == "newer" else logs[0]):
        for attributes in (odd["attributes"], odd["attributes"]["attributes"]):
            attributes["timestamp"] = timestamp

    def request(method: str, url: str, **arguments: Any) -> HttpResponse:
        body = orjson.loads(arguments["body"])
        begin, end = (datetime.fromisoformat(body["filter"][name]) for name in ("from", "to"))
        found = [log for log, time in zip(logs, times, strict=True) if begin <= time <= end]
        place = int(body["page"].get("cursor", 0))
        found = (found if direction == "newer" else found[::-1])[place : place + body["page"]["limit"]]
        meta = {"page": {"after": str(place + len(found))}}
        return HttpResponse(200, CaseInsensitiveDict(), orjson.dumps({"data": found, "meta": meta}), None)

    monkeypatch.setattr(datadog, "_MARGIN", 1)
    monkeypatch.setattr(search, "request", request)
    page = read(direction, limit=2)
    pages = [messages(page)]
    while token := getattr(page, direction):
        page = read(direction, token, limit=2)
        pages.append(messages(page))
        assert len(pages) < 9
    assert sorted(message for part in pages for message in part) == [f"m{number}" for number in range(6)]


def test_more_logs_of_one_moment_than_can_be_told_apart(search: Search) -> None:
    logs = [make_log(n, message=f"m{n}") for n in range(2_000)]
    for log in logs:
        log["attributes"]["attributes"] = {}
    token: str | None = None
    with pytest.raises(LogStoreError, match="too many logs of one millisecond") as raised:  # noqa: PT012
        for _ in range(5):
            search.finds(*logs[:1_000], after="c1")
            search.finds(*logs[1_000:])
            token = read("newer", token, limit=950).newer
            assert token is not None
            assert len(token) <= datadog.LONGEST_TOKEN
    assert type(raised.value) is LogStoreError


@pytest.mark.needs_paged_fetch
@pytest.mark.parametrize("service", ["zenml", 'my "service"', "back\\slash"])
@pytest.mark.parametrize("text", [None, "epoch", "two words", 'a"b c', "a*b?c", "(x)/y:z", 'q"\\'])
@pytest.mark.parametrize("level", [None, "NOTSET", "DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"])
def test_queries_are_those_of_zenmls_own_store(service: str, text: str | None, level: str | None) -> None:
    filter_ = LogsEntriesFilter(search=text, level=level)
    store: Any = SimpleNamespace(config=SimpleNamespace(service_name=service))
    assert datadog.build_query(service, LOGS.id, filter_) == DatadogLogStore._build_query(store, LOGS, filter_)


def test_times_asked_for(search: Search) -> None:
    moment = NOON - timedelta(minutes=5)
    early, first, last, late = (moment + timedelta(microseconds=shift) for shift in (100, 200, 800, 900))
    search.finds(*(make_log(n, moment=time) for n, time in enumerate((early, first, last, late))))
    page = read("newer", since=first, until=last)
    # Datadog keeps milliseconds: what is asked for begins where the millisecond does.
    assert search.bodies[0]["filter"]["from"] == moment.isoformat()
    assert search.bodies[0]["filter"]["to"] == last.isoformat()
    assert messages(page) == ["m1", "m2"]
    assert read(since=NOON + timedelta(days=1)) == Page()
    assert len(search.requests) == 1


def test_order_within_a_millisecond_is_the_writers(search: Search) -> None:
    later = NOON + timedelta(milliseconds=1)
    search.finds(
        make_log(1, "b" * 15, moment=later),
        make_log(4),
        make_log(6),
        make_log(5),
        make_log(0, "b" * 15),
    )
    page = read(until=later + timedelta(seconds=1))
    assert [read.event for read in page.entries] == [
        Event("a" * 15, 4),
        Event("a" * 15, 5),
        Event("a" * 15, 6),
        Event("b" * 15, 0),
        Event("b" * 15, 1),
    ]


@pytest.mark.parametrize("direction", ["older", "newer"])
def test_logs_of_others_stay_in_datadogs_order(search: Search, direction: Literal["newer", "older"]) -> None:
    logs = [make_log(n, message=text) for n, text in enumerate("abc")]
    for log in logs:
        log["attributes"]["attributes"] = {}
    search.finds(*(logs if direction == "newer" else logs[::-1]))
    assert messages(read(direction)) == ["a", "b", "c"]


@pytest.mark.parametrize("direction", ["older", "newer"])
def test_copies_are_dropped_on_a_page_and_across(search: Search, direction: Literal["newer", "older"]) -> None:
    # Numbers by time, in the direction of reading.
    order = [1, 2, 3, 4, 5] if direction == "newer" else [5, 4, 3, 2, 1]
    twice = [number for number in order for _ in range(2)]
    until = NOON + timedelta(seconds=1)
    search.finds(*map(make_log, twice))
    page = read(direction, limit=3, until=until)
    seen = [read.event.sequence for read in page.entries if read.event]
    assert seen == ([1, 2, 3] if direction == "newer" else [3, 4, 5])
    search.finds(*map(make_log, twice))
    page = read(direction, getattr(page, direction), limit=3, until=until)
    assert [read.event.sequence for read in page.entries if read.event] == sorted({1, 2, 3, 4, 5} - set(seen))


def test_logs_of_others_are_returned_once_each(search: Search) -> None:
    logs = [make_log(n, message=text) for n, text in enumerate("abcd")]
    for log in logs:
        log["attributes"]["attributes"] = {}
    search.finds(*logs)
    page = read("newer", limit=3)
    assert messages(page) == ["a", "b", "c"]
    search.finds(*logs)
    assert messages(read("newer", page.newer, limit=3)) == ["d"]


def test_a_millisecond_with_more_than_a_page_is_read_with_datadogs_cursor(search: Search) -> None:
    search.finds(*(make_log(n) for n in range(1_000)), after="c1")
    search.finds(*(make_log(n) for n in range(1_000, 1_500)))
    page = read("newer", limit=1_000)
    assert len(search.requests) == 2
    assert search.bodies[-1]["page"]["cursor"] == "c1"
    assert messages(page) == [f"m{n}" for n in range(1_000)]


def test_a_cursor_that_leads_nowhere(search: Search) -> None:
    for _ in range(3):
        search.finds(*(make_log(0) for _ in range(51)), after="c")
    with pytest.raises(LogStoreError, match="leads nowhere"):
        read(limit=1)


def test_a_token_stays_short_when_all_events_have_the_same_time(search: Search) -> None:
    search.finds(*(make_log(n) for n in range(999)))
    page = read("newer", limit=1_000)
    assert page.newer is not None
    assert len(page.newer) < 400


def test_an_entry(search: Search) -> None:
    log = make_log(7, moment=NOON - timedelta(microseconds=1), message="hello")
    log["attributes"]["status"] = "Emergency"
    log["attributes"]["attributes"] |= {
        "logger": {"name": "train"},
        "code": {"file": {"path": "/code/train.py"}, "line": {"number": 42}, "function": {"name": "fit"}},
        "exception": {"type": "ValueError", "message": "no", "stacktrace": "Traceback ...\nValueError: no\n"},
    }
    search.finds(log)
    ((entry, event),) = read().entries
    assert event == Event("a" * 15, 7)
    assert entry.id == uuid5(NAMESPACE_URL, "a" * 15 + "7")
    assert entry.message == "hello\nValueError: no\nTraceback ...\nValueError: no"
    assert entry.timestamp == NOON - timedelta(microseconds=1)
    assert entry.level is LoggingLevels.CRITICAL
    assert (entry.name, entry.module) == ("train", "fit")
    assert (entry.filename, entry.lineno) == ("/code/train.py", 42)


@pytest.mark.parametrize("level", [LoggingLevels.NOTSET, LoggingLevels.DEBUG, None])
def test_a_level_below_debug_is_read_back(search: Search, level: LoggingLevels | None) -> None:
    lower, debug = make_log(1, message="lower"), make_log(2, message="debug")
    for log in (lower, debug):
        log["attributes"]["status"] = "debug"
    lower["attributes"]["attributes"]["zenml"]["log"]["level"] = 5
    search.finds(lower, debug)
    found = [(read.entry.message, read.entry.level) for read in read("newer", level=level).entries]
    both = [("lower", LoggingLevels.NOTSET), ("debug", LoggingLevels.DEBUG)]
    assert found == (both[1:] if level is LoggingLevels.DEBUG else both)


def test_a_log_that_zenml_wrote_is_what_zenml_makes_of_it(search: Search) -> None:
    log = {
        "id": "AwAAAZ",
        "attributes": {
            "message": "hello",
            "status": "warn",
            "timestamp": "2026-09-21T11:59:59.123Z",
            "attributes": {
                "code": {"file": {"path": "/code/train.py"}, "line": {"number": 42}},
                "otel": {"library": {"name": "train"}},
                "exception": {"type": "E", "message": "m", "stacktrace": "s"},
                "zenml": {"log": {"id": str(LOGS.id)}},
            },
        },
    }
    search.finds(log)
    ((entry, event),) = read().entries
    assert event is None
    theirs = DatadogLogStore._parse_log_entry(SimpleNamespace(), log)  # type: ignore[arg-type]
    assert theirs is not None
    # Before 0.97, ZenML draws the id.
    assert entry.model_copy(update={"id": theirs.id}) == theirs


@pytest.mark.parametrize(
    "change",
    [
        {"id": None},
        {"attributes": None},
        {"attributes": {}},
        {"attributes": {"message": None, "status": None, "timestamp": None, "attributes": None}},
        {"attributes": {"message": 3.5, "status": 3, "timestamp": "noon", "attributes": []}},
        {"attributes": {"message": {"a": 1}, "timestamp": 1e300, "attributes": {"otel": {"timestamp": "x"}}}},
        {"attributes": {"timestamp": True, "attributes": {"otel": {"timestamp": "9" * 40}}}},
        {"attributes": {"attributes": {"exception": "text", "code": 1, "logger": [], "zenml": {"log": 1}}}},
        {"attributes": {"attributes": {"exception": {"type": None, "message": {}, "stacktrace": 1}}}},
        {"attributes": {"attributes": {"code": {"line": {"number": "x"}, "file": {"path": ["a"]}}}}},
        {"attributes": {"attributes": {"log": {"record": {"uid": "x"}}}}},
        {"attributes": {"attributes": {"log": {"record": {"uid": 1}}}}},
        {"attributes": {"attributes": {"zenml": {"log": {"writer": "a", "sequence": "x"}}}}},
    ],
)
def test_an_odd_log_hides_no_other(search: Search, change: dict[str, Any]) -> None:
    search.finds(make_log(0), {**make_log(1), **change}, make_log(2))
    entries = read("newer").entries
    assert len(entries) == 3
    assert {read.entry.message for read in entries} >= {"m0", "m2"}
    assert all(isinstance(read.entry.id, UUID) for read in entries)


def test_what_stayed_flat_is_found(search: Search) -> None:
    log = make_log(0)
    log["attributes"]["attributes"] = {
        "code.line.number": 3.0,
        "code": "x",
        "otel.timestamp": "1",
        "zenml.log.writer": "a",
        "zenml.log.sequence": "5",
    }
    search.finds(log)
    ((entry, event),) = read(since=datetime(1970, 1, 1)).entries
    assert (entry.lineno, event) == (3, Event("a", 5))
    assert entry.timestamp == datetime(1970, 1, 1, tzinfo=timezone.utc)


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (requests.ConnectionError(f"header {KEY}"), LogStoreUnavailableError, "Could not reach"),
        (requests.Timeout("late"), LogStoreUnavailableError, "Could not reach"),
        ((500, {}, b""), LogStoreUnavailableError, "temporarily unavailable"),
        ((503, {}, b""), LogStoreUnavailableError, "temporarily unavailable"),
        ((400, {}, b'{"errors":["x"]}'), LogStoreError, "status 400"),
        ((401, {}, KEY.encode()), LogStoreError, "'application_key'"),
        ((403, {}, KEY.encode()), LogStoreError, "'logs_read_data'"),
        ((404, {}, b""), LogStoreError, r" https://\S+/api/v2/logs/events/search .*status 404.*'site'"),
        ((302, {"Location": "https://elsewhere.test"}, b""), LogStoreError, "status 302"),
        ((200, {}, b"<html>"), LogStoreError, "could not be read"),
        ((200, {}, b"[]"), LogStoreError, "invalid log search result"),
        ((200, {}, b"{}"), LogStoreError, "invalid log search result"),
        ((200, {}, b'{"data": {"a": 1}}'), LogStoreError, "invalid log search result"),
        ((200, {}, b'{"data": [1]}'), LogStoreError, "invalid log search result"),
        ((200, {}, b'{"data": [], "meta": 1}'), LogStoreError, "pagination metadata"),
        ((200, {}, b'{"data": [], "meta": {"page": 1}}'), LogStoreError, "pagination metadata"),
        ((200, {}, b'{"data": [], "meta": {"status": "timeout"}}'), LogStoreUnavailableError, "timed out"),
        ((200, {}, b'{"data": [], "meta": {"status": "x"}}'), LogStoreError, "search metadata"),
        ((200, {}, b'{"data": [], "meta": {"warnings": [{}]}}'), LogStoreError, "incomplete"),
        ((200, {}, b'{"data": [], "meta": {"page": {"after": " "}}}'), LogStoreError, "continuation"),
        ((200, {}, b'{"data": [], "meta": {"page": {"after": 1}}}'), LogStoreError, "continuation"),
    ],
)
def test_errors(search: Search, answer: Any, error: type[Exception], message: str) -> None:
    search.answers = [answer]
    # On a thread of its own: what else runs in this one may leave an exception behind, which then is the context.
    with ThreadPoolExecutor(1) as pool, pytest.raises(error, match=message) as caught:
        pool.submit(read).result()
    assert type(caught.value) is error
    assert KEY not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_an_error_names_the_setting_that_has_the_address(search: Search) -> None:
    search.answers = [(404, {}, b"")]
    with pytest.raises(LogStoreError, match="'api_endpoint'"):
        read(reader=make_reader(api_endpoint="https://gateway.test"))


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "3", "X-RateLimit-Reset": "7"}, 3),
        ({"x-ratelimit-reset": "7"}, 7),
        ({"Retry-After": "soon"}, None),
        ({}, None),
    ],
)
def test_rate_limits(search: Search, headers: dict[str, str], seconds: int | None) -> None:
    search.answers = [(429, headers, b"")]
    with pytest.raises(LogStoreRateLimitError) as caught:
        read()
    assert caught.value.retry_after == seconds


@pytest.mark.parametrize("content", [b'{"data": null}', b'{"data": [], "meta": {"page": {"after": "c"}}}'])
def test_an_empty_page_is_the_end(search: Search, content: bytes) -> None:
    search.answers = [(200, {}, content)]
    assert read() == Page()


# What is answered without end, or makes no sense


def full_pages(search: Search, logs: Callable[[int], dict[str, Any]], pages: int = 10_000) -> None:
    """Answer each search with as many logs as it asked for, and with a cursor that leads on."""
    numbers = count()

    def answer() -> tuple[int, dict[str, str], bytes]:
        limit = search.bodies[-1]["page"]["limit"]
        found = [logs(next(numbers)) for _ in range(limit)]
        meta = {"status": "done", "page": {"after": f"c{len(search.requests)}"}}
        return 200, {}, orjson.dumps({"data": found, "meta": meta})

    search.answers = [answer] * pages


@pytest.mark.parametrize("direction", ["older", "newer"])
def test_a_search_whose_cursor_never_ends_is_given_up(
    search: Search, direction: Literal["newer", "older"], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Bounds, "SEARCHES", 5)
    search.finds(make_log(0), make_log(1, moment=NOON + (MILLISECOND if direction == "newer" else -MILLISECOND)))
    token = getattr(read(direction, limit=1), direction)
    # What was shown is all that comes, again and again.
    full_pages(search, lambda _: make_log(0))
    search.requests.clear()
    with pytest.raises(LogStoreUnavailableError, match="no end"):
        read(direction, token, limit=1)
    assert len(search.requests) == 5


@pytest.mark.parametrize("direction", ["older", "newer"])
def test_a_millisecond_that_never_ends_comes_in_pieces(
    search: Search, direction: Literal["newer", "older"], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Bounds, "SEARCHES", 3)
    full_pages(search, make_log)
    page = read(direction, limit=100)
    assert (len(search.requests), len(page.entries)) == (3, 100)
    token = getattr(page, direction)
    assert token is not None
    # It goes on with those that were not shown, as long as Datadog shows any.
    following = read(direction, token, limit=100)
    assert len(search.requests) == 6
    assert not set(messages(page)) & set(messages(following))


@pytest.mark.parametrize(("bound", "most"), [("SEARCH_BYTES", 50_000), ("SEARCH_SECONDS", 0.2)])
def test_the_searches_of_a_page_have_a_bound_together(
    search: Search, bound: str, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Bounds, bound, most)
    monkeypatch.setattr(Bounds, "SEARCHES", 10_000)
    full_pages(search, make_log)
    begin = time.monotonic()
    assert len(read(limit=10).entries) == 10
    assert time.monotonic() - begin < 5
    assert len(search.requests) < 2_000
    asked = [(request["timeout_seconds"], request["max_bytes"]) for request in search.requests]
    assert asked == sorted(asked, reverse=True)


def test_fewer_logs_are_asked_for_where_they_are_too_large(search: Search) -> None:
    search.answers = [(200, {}, b"", "too large")] * 3
    search.finds(make_log(2, moment=NOON + MILLISECOND), after="c")
    search.finds(make_log(1), after="d")
    page = read(limit=1_000)
    assert [body["page"]["limit"] for body in search.bodies] == [1_000, 125, 15, 1, 1]
    assert messages(page) == ["m2"]
    assert page.older is not None


def test_one_log_that_is_too_large_is_an_error(search: Search) -> None:
    search.answers = [(200, {}, b"x" * 1000, "too large")] * 10
    with pytest.raises(LogStoreError, match="too large"):
        read(limit=1_000)
    assert len(search.requests) == 4


@pytest.mark.parametrize(
    ("fault", "error"),
    [("too late", LogStoreUnavailableError), ("cut", LogStoreUnavailableError), ("undecodable", LogStoreError)],
)
def test_an_answer_that_is_not_whole_is_an_error(search: Search, fault: str, error: type[Exception]) -> None:
    search.answers = [(200, {}, b'{"data": []}', fault)]
    with pytest.raises(error) as caught:
        read()
    assert type(caught.value) is error


def test_more_logs_than_were_asked_for_are_an_error(search: Search) -> None:
    search.finds(*({} for _ in range(101)))
    with pytest.raises(LogStoreError, match="invalid"):
        read(limit=50)


@pytest.mark.parametrize(
    ("given", "rank"),
    [
        ({}, None),
        ({"zenml": {"log": {"rank": 3}}}, 3),
        ({"zenml.log.rank": 0}, 0),
        ({"zenml": {"log": {"rank": "x"}}}, None),
    ],
)
def test_an_entry_has_the_rank_of_its_process(given: dict[str, Any], rank: int | None, search: Search) -> None:
    log = make_log()
    attributes = log["attributes"]["attributes"]
    for name, value in given.items():
        if name == "zenml":
            value = {"log": {**attributes.get("zenml", {}).get("log", {}), **value["log"]}}
        attributes[name] = value
    search.finds(log)
    [found] = read().entries
    assert getattr(found.entry, "rank", None) == rank
