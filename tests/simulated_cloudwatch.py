"""CloudWatch Logs in memory, in place of a `Connection`: as documented, with pages as awkward as that allows."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from typing import Any

from composite_logstore_cloudwatch.connection import ServiceError
from tests.servers.cloudwatch import broken_limit


class SimulatedCloudWatch:
    """A log group with its log streams.

    Attributes:
        streams: A name → its events as (millisecond, number of arrival, message), in CloudWatch's order.
        calls: The operations and their arguments.
        groups: The log groups that exist.
        page_events: The most events of an answer, whatever was asked for.
        empty_every: Every so-many-th answer of GetLogEvents is an empty page that is not the end; 0 for none.
        answer: Called with each operation and its arguments. It may raise, or return an answer.
        has_expired: Whether the credentials have expired.
        region: The region.
        closed: How often it was closed.
    """

    def __init__(self, groups: tuple[str, ...] = ("zenml",)) -> None:
        self.streams: dict[str, list[tuple[int, int, str]]] = {}
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.groups = set(groups)
        self.page_events = 10_000
        self.empty_every = 0
        self.answer: Callable[[str, dict[str, Any]], dict[str, Any] | None] = lambda operation, request: None
        self.has_expired = False
        self.region = "eu-central-1"
        self.closed = 0
        self._arrivals = 0
        self._answers = 0

    @property
    def operations(self) -> list[str]:
        return [operation for operation, _ in self.calls]

    def call(self, operation: str, request: dict[str, Any], seconds: float, max_bytes: int) -> dict[str, Any]:
        self.calls.append((operation, request))
        assert seconds > 0
        if (answer := self.answer(operation, request)) is not None:
            return answer
        group, name = request["logGroupName"], request.get("logStreamName")
        if operation == "CreateLogGroup":
            if group in self.groups:
                raise failure(operation, "ResourceAlreadyExistsException")
            self.groups.add(group)
            return {}
        if group not in self.groups:
            raise failure(operation, "ResourceNotFoundException")
        if operation == "PutRetentionPolicy":
            return {}
        assert name is not None
        if operation == "CreateLogStream":
            if name in self.streams:
                raise failure(operation, "ResourceAlreadyExistsException")
            self.streams[name] = []
            return {}
        if name not in self.streams:
            raise failure(operation, "ResourceNotFoundException")
        return self._put(name, request) if operation == "PutLogEvents" else self._get(name, request)

    def close(self) -> None:
        self.closed += 1

    def _put(self, name: str, request: dict[str, Any]) -> dict[str, Any]:
        if broken := broken_limit(request["logEvents"]):
            raise failure("PutLogEvents", "InvalidParameterException", said=broken)
        for event in request["logEvents"]:
            self._arrivals += 1
            self.streams[name].append((event["timestamp"], self._arrivals, event["message"]))
        self.streams[name].sort()
        return {}

    def _get(self, name: str, request: dict[str, Any]) -> dict[str, Any]:
        is_forward, token = request["startFromHead"], request.get("nextToken")
        begin, end = request.get("startTime", 0), request.get("endTime", 1 << 62)
        events = [event for event in self.streams[name] if begin <= event[0] < end]
        limit = min(request["limit"], self.page_events)
        assert 1 <= request["limit"] <= 10_000
        self._answers += 1
        place: tuple[int, ...] = (0,) if is_forward else (1 << 62,)
        if token is not None:
            assert token[0] == ("f" if is_forward else "b"), "a token of the other direction"
            place = tuple(map(int, token.split("/")[1:3]))
        first = bisect_left(events, place, key=lambda event: event[: len(place)])
        chosen = events[first : first + limit] if is_forward else events[max(0, first - limit) : first]
        if chosen and self.empty_every and self._answers % self.empty_every == 0:
            chosen = []
        elif not chosen and token is not None:
            return {"events": [], "nextForwardToken": token, "nextBackwardToken": token}
        after = (chosen[-1][0], chosen[-1][1] + 1) if chosen else (*place, 0)
        before = chosen[0][:2] if chosen else (*place, 0)
        return {
            "events": [{"timestamp": millis, "ingestionTime": millis, "message": text} for millis, _, text in chosen],
            "nextForwardToken": f"f/{after[0]}/{after[1]}/{self._answers}",
            "nextBackwardToken": f"b/{before[0]}/{before[1]}/{self._answers}",
        }


def failure(
    operation: str, code: str, status: int = 400, said: str = "", retry_after_seconds: float | None = None
) -> ServiceError:
    return ServiceError(operation, status, code, said, retry_after_seconds)
