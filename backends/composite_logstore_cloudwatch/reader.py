"""The reader: reads a log stream by `GetLogEvents`, which knows times and directions, and nothing else.

CloudWatch sorts by the millisecond and, within one, by arrival. All else is the core's: it sorts by nanosecond, writer
and number, and honours filters. Its tokens are such places, not CloudWatch's own tokens, which expire after a day.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from math import ceil
from typing import TYPE_CHECKING, Any

import orjson
from zenml.exceptions import DoesNotExistException

from composite_logstore import (
    Allowance,
    Answer,
    AnswerTooLargeError,
    Bounds,
    KeysetReader,
    Query,
    Record,
    UnavailableError,
)
from composite_logstore.zenml import LogStoreError, LogStoreRateLimitError, LogStoreUnavailableError
from composite_logstore_cloudwatch.connection import Connection, ServiceError, UnreachedError

if TYPE_CHECKING:
    from composite_logstore_cloudwatch.config import CloudwatchChildConfig

# https://docs.aws.amazon.com/AmazonCloudWatchLogs/latest/APIReference/API_GetLogEvents.html
MOST_EVENTS = 10_000

_MILLION = 1_000_000
_INT64 = 1 << 63


class CloudwatchReader(KeysetReader):
    """Reads pages, most of them with one request or two, and whole streams."""

    max_records = 20_000
    time_unit_nanos = _MILLION
    narrows = False

    def __init__(self, config: CloudwatchChildConfig) -> None:
        """Prepare; credentials are looked for with the first page.

        Args:
            config: The child's settings, with secrets resolved.
        """
        self._config = config
        self._connection: Connection | None = None

    def search(self, query: Query, allowance: Allowance) -> Answer:
        """Ask for events until there are as many as the query wants, of more than one millisecond, or no more.

        Within a millisecond CloudWatch has an order of its own, so that its first events are known once all are.
        """
        is_newer = query.direction == "newer"
        arguments: dict[str, Any] = {
            "logStreamName": f"{self._config.log_stream_prefix}{query.logs_id}",
            "startFromHead": is_newer,
            "startTime": max(0, query.first_nanos // _MILLION),
            # The end is exclusive.
            "endTime": max(0, query.last_nanos // _MILLION + 1),
        }
        reached = None if query.edge is None else query.edge.nanos // _MILLION
        events: list[dict[str, Any]] = []
        token: str | None = None
        while allowance.is_left:
            missing = query.limit - len(events)
            arguments["limit"] = min(missing, MOST_EVENTS) if missing > 0 else MOST_EVENTS
            try:
                answer = self._get(arguments, allowance)
            except AnswerTooLargeError:
                if not events:
                    raise
                break
            found: list[dict[str, Any]] = answer.get("events") or []
            events = [*events, *found] if is_newer else [*found, *events]
            following = answer.get("nextForwardToken" if is_newer else "nextBackwardToken")
            # Only the same token again is the end. An answer without events is not.
            if following is None or following == token:
                return Answer(_records(events, query), is_all=True)
            arguments["nextToken"] = token = following
            if len(events) >= query.limit and _has_whole_moment(events, reached):
                break
        if not events:
            raise LogStoreUnavailableError("CloudWatch came to no end. Try again later, or ask for a shorter time.")
        return Answer(_records(events, query), is_all=False)

    def close(self) -> None:
        """Close the connections."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _get(self, arguments: Mapping[str, Any], allowance: Allowance) -> dict[str, Any]:
        """Return an answer of CloudWatch; an empty one if nothing was logged, and so there is no log stream.

        Raises:
            AnswerTooLargeError: The answer is too large: ask for fewer events.
            DoesNotExistException: The log group does not exist.
            LogStoreUnavailableError: CloudWatch cannot be reached, or fails.
            LogStoreRateLimitError: CloudWatch asks for a pause.
            LogStoreError: CloudWatch refuses, or its answer makes no sense.
            zenml.exceptions.IllegalOperationError: On ZenML's server, the user may not use the connector.
        """
        request = {"logGroupName": self._config.log_group, **arguments}
        try:
            if self._connection is not None and self._connection.has_expired:
                self.close()
            if self._connection is None:
                self._connection = Connection(self._config)
            answer = self._connection.call("GetLogEvents", request, allowance.seconds, Bounds.PAGE_BYTES)
        except ServiceError as error:
            if error.code == "ResourceNotFoundException" and "log stream" in error.said:
                return {}
            raise self._judged(error) from None
        except (UnreachedError, UnavailableError) as error:
            raise LogStoreUnavailableError(f"CloudWatch cannot be read: {error}.") from None
        events, tokens = answer.get("events", []), (answer.get("nextForwardToken"), answer.get("nextBackwardToken"))
        if not isinstance(events, list) or not all(map(_is_event, events)):
            raise LogStoreError("The answer to GetLogEvents has no log events; check 'endpoint_url'.")
        if not all(token is None or isinstance(token, str) for token in tokens):
            raise LogStoreError("The answer to GetLogEvents has an invalid token; check 'endpoint_url'.")
        allowance.take(sum(len(event["message"]) for event in events))
        return answer

    def _judged(self, error: ServiceError) -> Exception:
        """Return what an error of CloudWatch means for the page."""
        if error.code == "ResourceNotFoundException":
            group, region = self._config.log_group, self._connection.region if self._connection else ""
            return DoesNotExistException(f"There is no log group '{group}' in {region}.")
        if error.is_throttled:
            seconds = error.retry_after_seconds
            return LogStoreRateLimitError(
                "CloudWatch rate limited the reading of these logs. Try again later.",
                retry_after=None if seconds is None else ceil(seconds),
            )
        if error.is_passing:
            return LogStoreUnavailableError("CloudWatch is temporarily unavailable. Try again later.")
        if error.is_refused:
            # Perhaps the environment has other credentials by now.
            self.close()
            return LogStoreError(f"CloudWatch cannot be read: {error.why_refused}.")
        if error.code:
            said = f": {error.said}" if error.said else ""
            return LogStoreError(f"{error}{said}. Check 'log_group', 'log_stream_prefix' and 'region'.")
        return LogStoreError(f"{error}, which is no answer of CloudWatch. Check 'endpoint_url'.")


def _is_event(event: Any) -> bool:
    return (
        isinstance(event, dict)
        and type(event.get("timestamp")) is int
        and 0 <= event["timestamp"] < _INT64 // _MILLION
        and isinstance(event.get("message"), str)
    )


def _has_whole_moment(events: list[dict[str, Any]], reached: int | None) -> bool:
    """Return whether all events of some millisecond were returned, other than the one that was reached before."""
    first, last = events[0]["timestamp"], events[-1]["timestamp"]
    if reached not in (first, last):
        return bool(first != last)
    return len({event["timestamp"] for event in events} - {reached}) > 1


def _records(events: list[dict[str, Any]], query: Query) -> list[Record]:
    """Return log events as records of the stream, whichever program wrote them."""
    seen: Counter[str] = Counter()
    records = []
    for event in events:
        record = _record(event["timestamp"], event["message"], str(query.logs_id))
        if "zenml.log.writer" not in record.attributes:
            # Other programs' events have no numbers. Equal ones of a millisecond are not duplicates, even if one of
            # them is JSON and another one plain text.
            key = _content(record)
            if seen[key]:
                record = record._replace(attributes={**record.attributes, "aws.log.copy": seen[key]})
            seen[key] += 1
        records.append(record)
    return records


def _content(record: Record) -> str:
    try:
        return repr(record)
    except RecursionError:
        # Nested too deeply for that: equal names may count as equal events, which are shown all the same.
        return repr(record._replace(attributes=dict.fromkeys(record.attributes)))


def _record(millis: int, message: str, logs_id: str) -> Record:
    try:
        fields = orjson.loads(message)
    except ValueError:
        fields = None
    if type(fields) is not dict or type(fields.get("body")) is not str:
        # Plain text, or an object of another shape.
        fields = {"body": message}
    nanos = _integer(fields.get("timeUnixNano"), -1)
    return Record(
        nanos if nanos // _MILLION == millis else millis * _MILLION,
        fields["body"],
        _integer(fields.get("severityNumber"), 0),
        _text(fields.get("severityText")),
        _text(_mapping(fields.get("scope")).get("name")),
        # The log stream has the events of this log alone.
        {**_mapping(fields.get("attributes")), "zenml.log.id": logs_id},
        _text(fields.get("traceId")),
        _text(fields.get("spanId")),
        _integer(fields.get("flags"), 0),
    )


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _integer(value: Any, otherwise: int) -> int:
    return value if type(value) is int and 0 <= value < _INT64 else otherwise
