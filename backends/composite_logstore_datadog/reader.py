"""The reader: reads pages through Datadog's log search.

It runs on ZenML's server, where Datadog's client need not be installed. Its queries are those of ZenML's own Datadog
store.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID

import orjson
from zenml.enums import LoggingLevels
from zenml.utils.time_utils import to_utc_timezone, utc_now

from composite_logstore import Allowance, AnswerTooLargeError, Event, HttpSearches, Page, PageRequest
from composite_logstore.zenml import LogsEntriesFilter, LogStoreError, LogStoreUnavailableError
from composite_logstore_datadog.decoding import EPOCH, STATUSES, millis_of, parse
from composite_logstore_datadog.tokens import (
    CLOCK_SKEW,
    LONGEST_TOKEN,
    Found,
    Token,
    check,
    moment_of,
    parse_token,
    token_after,
)

if TYPE_CHECKING:
    from composite_logstore import HttpResponse
    from composite_logstore_datadog.config import DatadogChildConfig

FURTHEST_AHEAD = timedelta(hours=2)
"""A client's time may also be ahead of the server's. Datadog drops events that are further ahead than this."""


# https://docs.datadoghq.com/logs/explorer/search_syntax/#escape-special-characters-and-spaces
_SPECIAL = re.compile(r'([+\-=!&|><(){}\[\]^"~*?:\\/#@])')

_MARGIN = 50
"""How many more logs to ask for than wanted, so that the last millisecond is mostly complete."""

_NO_EVENT = Event("", -1)
_NOTHING = timedelta(0)
_MILLISECOND = timedelta(milliseconds=1)


_SHORTER = 8
"""If the logs of an answer are too large, the next search asks for so many times fewer."""


class DatadogReader:
    """Reads pages, most of them with one search each.

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
        self._service = config.service_name
        headers = {"Content-Type": "application/json", "dd-api-key": config.api_key.get_secret_value()}
        if config.application_key is not None:
            headers["dd-application-key"] = config.application_key.get_secret_value()
        setting = "api_endpoint" if config.api_endpoint else "site"
        self._searches = HttpSearches("Datadog", config.search_url, headers, _refusal, url_setting=setting)

    def read(self, request: PageRequest) -> Page:
        """Read one page.

        Raises:
            ValueError: The token is malformed.
            LogStoreUnavailableError: Datadog cannot be reached, or fails.
            LogStoreRateLimitError: Datadog asks for a pause.
            LogStoreError: Datadog refuses, or its answer makes no sense.
        """
        token = parse_token(request.token)
        since = request.filter.since or to_utc_timezone(request.logs.created) - CLOCK_SKEW
        # Without a bound, pages towards newer entries show events that were logged after the first page.
        until = request.filter.until or utc_now(tz_aware=True) + FURTHEST_AHEAD
        if token is not None:
            check(token, request.direction, since, until)
        if since > until:
            return Page()
        # Datadog keeps milliseconds. `_fresh` leaves out other entries of the first and the last millisecond.
        begin, end = since.replace(microsecond=since.microsecond // 1_000 * 1_000), until
        if token is not None and request.direction == "newer":
            begin = moment_of(token.edge_millis)
        elif token is not None:
            # Datadog does not document whether the end is inclusive, so ask for one millisecond more.
            end = moment_of(token.edge_millis + 1)
        if begin > end:
            # The clock of the machine that read the page before is ahead.
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
        level = request.filter.level or LoggingLevels.NOTSET
        entries, is_all = self._find(body, token, (since, until, level), (begin, end))
        if request.direction == "older":
            entries.reverse()
        entries.sort(key=lambda found: (found.millis, found.read.event or _NO_EVENT))
        reads = replace(request, limit=limit).fitting([found.read for found in entries])
        if not reads:
            return Page()
        page = entries[: len(reads)] if request.direction == "newer" else entries[-len(reads) :]
        text = token_after(page, request.direction, token).model_dump_json()
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
        token: Token | None,
        wanted: tuple[datetime, datetime, LoggingLevels],
        searched: tuple[datetime, datetime],
    ) -> tuple[list[Found], bool]:
        """Search until new entries are found, and return either all entries of a millisecond or none of them.

        If the allowance ends within a millisecond, the entries that were found of it are returned.

        Args:
            body: The search.
            token: Where the page before ended.
            wanted: The first and the last time of entries to return, and their least level.
            searched: The first and the last time of the search.

        Returns:
            The entries, in Datadog's order, and whether these are all.
        """
        page = body["page"]
        found: list[Found] = []
        cursors: set[str] = set()
        allowance = Allowance()
        least, most = ((moment - EPOCH) // _MILLISECOND for moment in searched)
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
                # Datadog sorts by time, so a log without a time within the search gets the time of its neighbour.
                millis = millis_of(log)
                place = millis if millis is not None and least <= millis <= most else place
                found.append(Found(place, parse(log)))
            # A page that is not full is the last one. A full page may end within a millisecond.
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
        self._searches.close()

    def _search(self, body: dict[str, Any], allowance: Allowance) -> tuple[list[dict[str, Any]], str | None]:
        """Return the logs that were found, and Datadog's own cursor if there are more.

        https://docs.datadoghq.com/api/latest/logs/#search-logs-post

        Raises:
            AnswerTooLargeError: The answer is too large.
            LogStoreError: As `read` does.
        """
        response = self._searches.ask("POST", "", orjson.dumps(body), allowance)
        return _parse_answer(response.body, body["page"]["limit"])


def build_query(service: str, logs_id: UUID, filter_: LogsEntriesFilter) -> str:
    """Return the query that finds a stream's events, the same as that of ZenML's own store."""
    terms = [f'service:"{_quoted(service)}"', f"@zenml.log.id:{logs_id}"]
    if search := filter_.search:
        # Datadog has phrases, which are quoted, and wildcards, which are not.
        if any(character.isspace() for character in search):
            terms.append(f'message:"{_quoted(search)}"')
        else:
            terms.append("message:*" + _SPECIAL.sub(r"\\\1", search) + "*")
    if filter_.level and filter_.level.value > LoggingLevels.DEBUG.value:
        wanted = [status for level, statuses in STATUSES if level.value >= filter_.level.value for status in statuses]
        terms.append(f"status:({' OR '.join(wanted)})")
    return " AND ".join(terms)


def _refusal(response: HttpResponse) -> LogStoreError | None:
    if response.status not in (401, 403):
        return None
    return LogStoreError(
        f"Datadog rejected the search with status {response.status}. Check 'api_key' and 'application_key', that the "
        f"application key may read logs (scope 'logs_read_data'), and that 'site' is the one they belong to."
    )


def _parse_answer(body: bytes, limit: int) -> tuple[list[dict[str, Any]], str | None]:
    """Return the logs and the cursor of an answer, if the answer is valid."""
    try:
        answer = orjson.loads(body)
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


def _fresh(
    found: Sequence[Found], token: Token | None, since: datetime, until: datetime, level: LoggingLevels
) -> list[Found]:
    """Return the entries within these times that were not returned before, without duplicates."""
    known: set[Event] = set()
    fresh: list[Found] = []
    for item in found:
        entry, event = item.read
        # Leave out other entries of the first and the last millisecond. Differences cannot overflow, but sums can.
        moment = entry.timestamp
        if moment is not None and any(_NOTHING < gap < _MILLISECOND for gap in (since - moment, moment - until)):
            continue
        # Datadog has no status below DEBUG.
        if entry.level is LoggingLevels.NOTSET and level is LoggingLevels.DEBUG:
            continue
        if event is not None:
            if event in known:
                continue
            known.add(event)
        if token is not None and token.has(item):
            continue
        fresh.append(item)
    return fresh


def _quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')
