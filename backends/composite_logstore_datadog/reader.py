"""The reader: answers pages from Datadog's log search.

It runs on ZenML's server, so it uses `requests` and not Datadog's client, which need not be there. Its
queries and its errors are those of ZenML's own Datadog store.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timedelta, timezone
from hashlib import blake2b
from math import ceil
from typing import TYPE_CHECKING, Any, Literal, NamedTuple
from uuid import NAMESPACE_URL, UUID, uuid5

import orjson
from pydantic import BaseModel, ConfigDict, Field
from urllib3.exceptions import HTTPError
from zenml.enums import LoggingLevels
from zenml.exceptions import LogStoreError, LogStoreRateLimitError, LogStoreUnavailableError
from zenml.logger import get_logger
from zenml.models import LogEntry, LogsEntriesFilter
from zenml.utils.time_utils import to_utc_timezone, utc_now

from composite_logstore import AnswerTooLargeError, Bounds, Event, HttpClient, Page, PageRequest, ReadEntry
from composite_logstore_datadog.config import seconds_asked_for

if TYPE_CHECKING:
    from composite_logstore import HttpResponse
    from composite_logstore_datadog.config import DatadogChildConfig

logger = get_logger(__name__)

CLOCK_SKEW = timedelta(hours=1)
"""A stream is created at the server's time, its first events at the client's, which may be behind."""

FURTHEST_AHEAD = timedelta(hours=2)
"""A client's time may be ahead of the server's, too. What is further ahead than this, Datadog does not keep."""

# What Datadog calls ZenML's levels.
# https://docs.datadoghq.com/logs/log_configuration/processors/log_status_remapper/
_STATUSES: Sequence[tuple[LoggingLevels, Sequence[str]]] = (
    (LoggingLevels.DEBUG, ("trace", "debug")),
    (LoggingLevels.INFO, ("info", "notice")),
    (LoggingLevels.WARNING, ("warn", "warning")),
    (LoggingLevels.ERROR, ("err", "error")),
    (LoggingLevels.CRITICAL, ("crit", "critical", "alert", "emerg", "emergency", "fatal")),
)
_LEVELS = {status: level for level, statuses in _STATUSES for status in statuses}

# https://docs.datadoghq.com/logs/explorer/search_syntax/#escape-special-characters-and-spaces
_SPECIAL = re.compile(r'([+\-=!&|><(){}\[\]^"~*?:\\/#@])')

_MARGIN = 50
"""How many more logs are asked for than wanted, so that the last millisecond is mostly complete."""

_NO_EVENT = Event("", -1)
_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
_NOTHING = timedelta(0)
_MILLISECOND = timedelta(milliseconds=1)
# The last time that is believed; there must be room for a millisecond more.
_LAST_MICROS = (datetime(9999, 12, 31, tzinfo=timezone.utc) - _EPOCH) // timedelta(microseconds=1)

LONGEST_TOKEN = 24 * 1024
"""In characters. What of a millisecond has been returned takes a few hundred, unless a thousand logs of others have
the same time."""

_SHORTER = 8
"""How many times fewer logs are asked for when those that came are too large."""

# How an answer can be incomplete that may be whole next time.
_INCOMPLETE = {"too late": "came too late", "cut": "was cut off"}

_INT64 = 1 << 63


class _Token(BaseModel):
    """Where a page ended.

    It is a place in time and not Datadog's own cursor: Datadog sorts equal times in an order that means
    nothing, so a page that ends where Datadog's does would tear the events of a millisecond apart.

    Attributes:
        direction: The way in which the pages go.
        edge_millis: The time of the last entry of the page.
        edge: A writer → the first and last sequence numbers of its runs of entries at that time which
            have been returned. An event that was sent twice is there twice, at the same time.
        others: Short hashes of the ids of returned entries at that time that no writer of ours has numbered.
    """

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True, strict=True)

    version: Literal[2] = 2
    direction: Literal["newer", "older"]
    edge_millis: int = Field(ge=0, le=_LAST_MICROS // 1_000)
    edge: dict[str, list[tuple[int, int]]]
    others: list[str] = Field(default_factory=list)

    def has(self, item: _Found) -> bool:
        """Return whether the entry has been returned."""
        if item.millis != self.edge_millis:
            return (item.millis < self.edge_millis) == (self.direction == "newer")
        event = item.read.event
        if event is None:
            return _short(item.read.entry.id) in self.others
        return any(first <= event.sequence <= last for first, last in self.edge.get(event.writer, []))


class _Found(NamedTuple):
    """An entry, and the time that Datadog sorts it by, in milliseconds since the epoch."""

    millis: int
    read: ReadEntry


class _Allowance:
    """What the searches of one page may still take.

    Attributes:
        seconds: How long the next one may take.
        max_bytes: The most bytes of its answer.
        is_left: Whether there may be a next one.
    """

    def __init__(self) -> None:
        self._ends_at = time.monotonic() + Bounds.SEARCH_SECONDS
        self._searches, self._bytes = Bounds.SEARCHES, Bounds.SEARCH_BYTES

    @property
    def seconds(self) -> float:
        return self._ends_at - time.monotonic()

    @property
    def max_bytes(self) -> int:
        return min(self._bytes, Bounds.PAGE_BYTES)

    @property
    def is_left(self) -> bool:
        return self.seconds > 0 and self._searches > 0 and self._bytes > 0

    def take(self, response: HttpResponse) -> None:
        self._searches -= 1
        self._bytes -= len(response.body)


class DatadogReader:
    """Reads one page with one search, mostly.

    Attributes:
        max_page_size: Datadog's own limit.
        in_order: Datadog sorts by time, which need not be the order of a writer's events.
    """

    max_page_size = 1_000
    in_order = False

    def __init__(self, config: DatadogChildConfig) -> None:
        """Connect to nothing yet.

        Args:
            config: The child's settings, with secrets resolved and an application key.
        """
        self._http = HttpClient()
        self._url = config.search_url
        self._service = config.service_name
        self._headers = {"Content-Type": "application/json", "dd-api-key": config.api_key.get_secret_value()}
        if config.application_key is not None:
            self._headers["dd-application-key"] = config.application_key.get_secret_value()

    def read(self, request: PageRequest) -> Page:
        """Read one page.

        Raises:
            ValueError: The token is malformed.
            LogStoreUnavailableError: Datadog cannot be reached, or fails.
            LogStoreRateLimitError: Datadog asks to be left alone for a while.
            LogStoreError: Datadog refuses, or its answer makes no sense.
        """
        token = _parse_token(request.token)
        since = request.filter.since or to_utc_timezone(request.logs.created) - CLOCK_SKEW
        # What was logged since the first page is newer, too.
        until = request.filter.until or utc_now(tz_aware=True) + FURTHEST_AHEAD
        if token is not None:
            _check(token, request.direction, since, until)
        if since > until:
            return Page()
        # Datadog keeps milliseconds; what else there is in the first and the last is left out below.
        begin, end = since.replace(microsecond=since.microsecond // 1_000 * 1_000), until
        if token is not None and request.direction == "newer":
            begin = _moment(token.edge_millis)
        elif token is not None:
            # Whether Datadog counts the last moment in is not documented, so ask for one more.
            end = _moment(token.edge_millis + 1)
        if begin > end:
            # The clock of the machine that was asked before is ahead.
            return Page()
        limit = min(request.limit, self.max_page_size)
        body: dict[str, Any] = {
            "filter": {
                "query": build_query(self._service, request.logs.id, request.filter),
                "from": begin.isoformat(),
                "to": end.isoformat(),
            },
            "page": {"limit": min(limit + _MARGIN, self.max_page_size)},
            "sort": "timestamp" if request.direction == "newer" else "-timestamp",
        }
        entries, is_all = self._find(body, token, (since, until), (begin, end))
        if request.direction == "older":
            entries.reverse()
        entries.sort(key=lambda found: (found.millis, found.read.event or _NO_EVENT))
        page = entries[:limit] if request.direction == "newer" else entries[-limit:]
        reads = [found.read for found in page]
        if not page:
            return Page()
        text = _continued(page, request.direction, token).model_dump_json()
        if len(text) > LONGEST_TOKEN:
            raise LogStoreError(
                "Datadog has too many logs of one millisecond to be read page by page. Ask for another time, or search."
            )
        if request.direction == "newer":
            return Page(reads, newer=text)
        return Page(reads, older=None if is_all and len(page) == len(entries) else text)

    def _find(
        self,
        body: dict[str, Any],
        token: _Token | None,
        wanted: tuple[datetime, datetime],
        searched: tuple[datetime, datetime],
    ) -> tuple[list[_Found], bool]:
        """Search until something new is found, and return all of each millisecond or nothing of it.

        Where the bounds are reached before a millisecond comes to its end, what there is of it is returned.

        Args:
            body: The search.
            token: Where the page before ended.
            wanted: From when to when entries are wanted.
            searched: From when to when Datadog is asked.

        Returns:
            What was found, in Datadog's order, and whether there is no more.
        """
        page = body["page"]
        found: list[_Found] = []
        cursors: set[str] = set()
        allowance = _Allowance()
        least, most = ((moment - _EPOCH) // _MILLISECOND for moment in searched)
        place = least if body["sort"] == "timestamp" else most
        while allowance.is_left:
            try:
                logs, cursor = self._search(body, allowance)
            except AnswerTooLargeError:
                if page["limit"] == 1:
                    if found:
                        break
                    raise LogStoreError("Datadog returned a log that is too large to be read.") from None
                page["limit"] = max(1, page["limit"] // _SHORTER)
                continue
            for log in logs:
                # Datadog sorts by time, so one that says none of this search is of the time of its neighbour.
                millis = _millis(log)
                place = millis if millis is not None and least <= millis <= most else place
                found.append(_Found(place, parse(log)))
            # A page that is not full is the last; one that is full may end within a millisecond.
            is_all = cursor is None or len(logs) < page["limit"]
            whole = found if is_all else [item for item in found if item.millis != found[-1].millis]
            fresh = _fresh(whole, token, *wanted)
            if fresh or cursor is None or is_all:
                return fresh, is_all
            if cursor in cursors:
                raise LogStoreError("Datadog returned a continuation token that leads nowhere.")
            cursors.add(cursor)
            page["cursor"] = cursor
        if fresh := _fresh(found, token, *wanted):
            return fresh, False
        raise LogStoreUnavailableError(
            "Datadog's log search came to no end. Try again later, or ask for a shorter time."
        )

    def close(self) -> None:
        """Close the connection."""
        self._http.close()

    def _search(self, body: dict[str, Any], allowance: _Allowance) -> tuple[list[dict[str, Any]], str | None]:
        """Return what was found, and Datadog's own cursor if it gives one.

        https://docs.datadoghq.com/api/latest/logs/#search-logs-post

        Raises:
            AnswerTooLargeError: It is too much at once.
            LogStoreError: As `read` does.
        """
        try:
            response = self._http.request(
                "POST",
                self._url,
                headers=self._headers,
                body=orjson.dumps(body),
                timeout_seconds=allowance.seconds,
                max_bytes=allowance.max_bytes,
            )
        except (HTTPError, OSError) as error:
            # Not chained: what `requests` says of a header repeats it.
            logger.debug("Datadog log search failed: %s", type(error).__name__)
            raise LogStoreUnavailableError(
                f"Could not reach Datadog to read these logs ({type(error).__name__})."
            ) from None
        if response.status != 200:
            raise _refusal(response)
        allowance.take(response)
        if response.fault == "too large":
            raise AnswerTooLargeError
        if response.fault in _INCOMPLETE:
            raise LogStoreUnavailableError(f"Datadog's answer {_INCOMPLETE[response.fault]}. Try again later.")
        return _parse_answer(response, body["page"]["limit"])


def build_query(service: str, logs_id: UUID, filter_: LogsEntriesFilter) -> str:
    """Return the query that finds a stream's events, as ZenML's own store puts it."""
    terms = [f'service:"{_quoted(service)}"', f"@zenml.log.id:{logs_id}"]
    if search := filter_.search:
        # Datadog knows phrases, which are quoted, and wildcards, which are not.
        if any(character.isspace() for character in search):
            terms.append(f'message:"{_quoted(search)}"')
        else:
            terms.append("message:*" + _SPECIAL.sub(r"\\\1", search) + "*")
    if filter_.level and filter_.level.value > LoggingLevels.DEBUG.value:
        wanted = [status for level, statuses in _STATUSES if level.value >= filter_.level.value for status in statuses]
        terms.append(f"status:({' OR '.join(wanted)})")
    return " AND ".join(terms)


def parse(log: Mapping[str, Any]) -> ReadEntry:
    """Return what can be shown of one of Datadog's logs, whoever wrote it and whatever has become of it."""
    fields = _mapping(log.get("attributes"))
    attributes = _mapping(fields.get("attributes"))
    function = _text(_get(attributes, "code.function.name"))
    filename = _text(_get(attributes, "code.file.path"))
    module = function
    if module is None and filename is not None:
        module = filename.rsplit("/", 1)[-1].removesuffix(".py")
    name = _text(_get(attributes, "logger.name"))
    if name is None:
        name = _text(_get(attributes, "otel.library.name"))
    entry = LogEntry(
        id=_id(log, attributes),
        message=_message(fields, attributes),
        name=name,
        level=_LEVELS.get((_text(fields.get("status")) or "").lower(), LoggingLevels.INFO),
        timestamp=_timestamp(fields, attributes),
        filename=filename,
        lineno=_integer(_get(attributes, "code.line.number")),
        module=module,
    )
    writer = _text(_get(attributes, "zenml.log.writer"))
    return ReadEntry(entry, Event.of(writer, _integer(_get(attributes, "zenml.log.sequence"))))


def _parse_token(text: str | None) -> _Token | None:
    if text is None:
        return None
    try:
        if len(text) > LONGEST_TOKEN:
            raise ValueError("too long")
        return _Token.model_validate_json(text)
    except ValueError:
        raise ValueError("The token is malformed. Pass it as a page returned it.") from None


def _check(token: _Token, direction: str, since: datetime, until: datetime) -> None:
    """Check that a page in this direction can have ended there.

    Raises:
        ValueError: It cannot.
    """
    edge = _moment(token.edge_millis)
    # Differences cannot overflow, as sums can.
    if token.direction != direction or since - edge > _MILLISECOND or edge - until > CLOCK_SKEW:
        raise ValueError("The token is malformed: no page in this direction ended there. Begin anew without a cursor.")


def _refusal(response: HttpResponse) -> LogStoreError:
    status = response.status
    if status == 429:
        seconds = seconds_asked_for(response.headers)
        return LogStoreRateLimitError(
            "Datadog rate limited the log search. Try again later.",
            retry_after=None if seconds is None else ceil(seconds),
        )
    if status >= 500:
        return LogStoreUnavailableError("Datadog is temporarily unavailable. Try again later.")
    message = f"Datadog rejected the log search with status {status}."
    if status in (401, 403):
        message += (
            " Check 'api_key' and 'application_key', that the application key may read logs (scope"
            " 'logs_read_data'), and that 'site' is the one they belong to."
        )
    return LogStoreError(message)


def _parse_answer(response: HttpResponse, limit: int) -> tuple[list[dict[str, Any]], str | None]:
    """Return the logs and the cursor of an answer, if it makes sense and is whole."""
    try:
        answer = orjson.loads(response.body if response.fault is None else b"")
    except ValueError:
        raise LogStoreError("Datadog returned a response that could not be read as a log search result.") from None
    if not isinstance(answer, dict) or "data" not in answer:
        raise LogStoreError("Datadog returned an invalid log search result.")
    logs = answer["data"] or []
    if not isinstance(logs, list) or len(logs) > limit or not all(isinstance(log, dict) for log in logs):
        raise LogStoreError("Datadog returned an invalid log search result.")
    meta = answer.get("meta", {})
    if not isinstance(meta, dict) or not isinstance(meta.get("page", {}), dict):
        raise LogStoreError("Datadog returned invalid log pagination metadata.")
    if meta.get("status") == "timeout":
        raise LogStoreUnavailableError("Datadog timed out while searching these logs. Try again later.")
    if meta.get("status", "done") != "done":
        raise LogStoreError("Datadog returned invalid log search metadata.")
    if meta.get("warnings"):
        raise LogStoreError("Datadog returned an incomplete log search result.")
    cursor = meta.get("page", {}).get("after")
    if cursor is not None and (not isinstance(cursor, str) or not cursor.strip()):
        raise LogStoreError("Datadog returned an invalid continuation token.")
    # Only an empty page is the end.
    # https://docs.datadoghq.com/logs/guide/collect-multiple-logs-with-pagination/
    return logs, cursor if logs else None


def _fresh(found: Sequence[_Found], token: _Token | None, since: datetime, until: datetime) -> list[_Found]:
    """Return what is within the times asked for, without the copies."""
    known: set[Event] = set()
    fresh: list[_Found] = []
    for item in found:
        entry, event = item.read
        # What else there is in the first millisecond and in the last. Differences cannot overflow, as sums can.
        moment = entry.timestamp
        if moment is not None and any(_NOTHING < gap < _MILLISECOND for gap in (since - moment, moment - until)):
            continue
        if event is not None:
            if event in known:
                continue
            known.add(event)
        if token is not None and token.has(item):
            continue
        fresh.append(item)
    return fresh


def _continued(page: Sequence[_Found], direction: Literal["newer", "older"], before: _Token | None) -> _Token:
    """Return the token after the page."""
    millis = page[-1 if direction == "newer" else 0].millis
    at_edge = [item.read for item in page if item.millis == millis]
    edge = _runs({read.event for read in at_edge if read.event})
    others = [_short(read.entry.id) for read in at_edge if read.event is None]
    if before is not None and before.edge_millis == millis:
        for writer, runs in before.edge.items():
            edge[writer] = _joined([*runs, *edge.get(writer, [])])
        others = before.others + others
    return _Token(direction=direction, edge_millis=millis, edge=edge, others=others)


def _short(id: UUID) -> str:
    return blake2b(id.bytes, digest_size=8).hexdigest()


def _moment(millis: int) -> datetime:
    return _EPOCH + timedelta(milliseconds=millis)


def _runs(events: set[Event]) -> dict[str, list[tuple[int, int]]]:
    """Return each writer's runs of consecutive numbers."""
    numbers: dict[str, list[tuple[int, int]]] = {}
    for writer, sequence in events:
        numbers.setdefault(writer, []).append((sequence, sequence))
    return {writer: _joined(runs) for writer, runs in numbers.items()}


def _joined(runs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return runs of numbers with those made one that touch each other."""
    joined: list[tuple[int, int]] = []
    for first, last in sorted(runs):
        if joined and first <= joined[-1][1] + 1:
            joined[-1] = joined[-1][0], max(joined[-1][1], last)
        else:
            joined.append((first, last))
    return joined


def _quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _get(attributes: Mapping[str, Any], name: str) -> Any:
    """Return an attribute: Datadog makes objects within objects of a name with dots."""
    value: Any = attributes
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return attributes.get(name) if value is None else value


def _text(value: Any) -> str | None:
    return str(value) if isinstance(value, str | int | float) else None


def _integer(value: Any) -> int | None:
    """Return a whole number of 64 bits, whatever it is written as."""
    try:
        number = int(value) if isinstance(value, str | int | float) else None
    except (ValueError, OverflowError):
        return None
    return number if number is not None and -_INT64 <= number < _INT64 else None


def _id(log: Mapping[str, Any], attributes: Mapping[str, Any]) -> UUID:
    try:
        return UUID(_get(attributes, "log.record.uid"))
    except (ValueError, TypeError, AttributeError):
        # As ZenML's own store does it for the logs that it wrote.
        own = _text(log.get("id"))
        if not own:
            # What is nested too deep to be encoded again is nobody's log: these are not told apart.
            with suppress(orjson.JSONEncodeError):
                own = orjson.dumps(log).decode()
        return uuid5(NAMESPACE_URL, f"https://www.datadoghq.com/logs/{own}")


def _message(fields: Mapping[str, Any], attributes: Mapping[str, Any]) -> str:
    message = _text(fields.get("message")) or ""
    kind, reason, stacktrace = (
        _text(_get(attributes, f"exception.{part}")) for part in ("type", "message", "stacktrace")
    )
    if kind is None and reason is None and stacktrace is None:
        return message
    kind = "Exception" if kind is None else kind
    return f"{message}\n{kind}: {reason or ''}\n{stacktrace or ''}".rstrip()


def _timestamp(fields: Mapping[str, Any], attributes: Mapping[str, Any]) -> datetime | None:
    """Return the record's own time, which Datadog keeps to the millisecond only, or else Datadog's."""
    nanos = _integer(_get(attributes, "otel.timestamp"))
    for micros in (None if nanos is None else nanos // 1_000, _micros(fields, attributes)):
        try:
            if micros is not None:
                return _EPOCH + timedelta(microseconds=micros)
        except OverflowError:
            pass
    return None


def _micros(fields: Mapping[str, Any], attributes: Mapping[str, Any]) -> int | None:
    for value in (fields.get("timestamp"), attributes.get("timestamp")):
        if isinstance(value, int | float):
            return _integer(value * 1_000)
        try:
            moment = to_utc_timezone(datetime.fromisoformat((_text(value) or "").replace("Z", "+00:00")))
        except (ValueError, OverflowError):
            continue
        return (moment - _EPOCH) // timedelta(microseconds=1)
    return None


def _millis(log: Mapping[str, Any]) -> int | None:
    """Return the time that Datadog sorts by, None if the log does not say it."""
    fields = _mapping(log.get("attributes"))
    micros = _micros(fields, _mapping(fields.get("attributes")))
    return None if micros is None else micros // 1_000
