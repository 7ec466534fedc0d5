"""The exporter: writes each stream's events to a log stream of its own."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias
from uuid import UUID

from composite_logstore import (
    UNENCODABLE,
    AnswerTooLargeError,
    Bounds,
    LogEvent,
    RejectedError,
    RetryableError,
    Stream,
    TooLargeError,
    UnavailableError,
)
from composite_logstore_cloudwatch.batches import Line, rejected_in, requests_of
from composite_logstore_cloudwatch.config import DAY_SECONDS, NEWEST_SECONDS
from composite_logstore_cloudwatch.connection import Connection, ServiceError, UnreachedError
from composite_logstore_cloudwatch.encoding import MOST_MESSAGE_BYTES, StreamEncoder, shorten_record

if TYPE_CHECKING:
    from composite_logstore_cloudwatch.config import CloudwatchChildConfig

_SECOND = 1_000_000_000

Refused: TypeAlias = defaultdict[str, set[tuple[str, int]]]
"""A reason → the writers and numbers of the events that CloudWatch rejects for it."""


class CloudwatchExporter:
    """Sends each batch as one request for each of its streams, or as several if there are limits in the way."""

    def __init__(self, config: CloudwatchChildConfig, clock: Callable[[], float] = time.time) -> None:
        """Prepare; credentials are looked for with the first export.

        Args:
            config: The child's settings, with secrets resolved.
            clock: Returns the time in seconds since the epoch.
        """
        self._config = config
        self._clock = clock
        # Leave time for encoding, so that the export ends before it counts as overdue.
        self._timeout_seconds = 0.9 * config.export_timeout_millis / 1000
        self._connection: Connection | None = None
        # The streams whose log streams exist.
        self._ready: set[UUID] = set()
        self._owes_retention = False
        # Events that were taken by the first requests of an export of which a later request failed.
        self._taken: set[tuple[str, int]] = set()

    def export(self, batch: Sequence[LogEvent]) -> int:
        """Send the batch.

        Returns:
            How many of the events had to be shortened.

        Raises:
            RetryableError: CloudWatch could not be reached, or asks for a retry.
            RejectedError: CloudWatch rejects the batch, or some of its events.
            TooLargeError: Something on the way takes no request of this size.
            UnavailableError: Credentials, permissions or the log group are missing.
        """
        refused: Refused = defaultdict(set)
        streams = self._encode(batch, refused)
        end = time.monotonic() + self._timeout_seconds
        try:
            for stream, lines in streams.items():
                for request in requests_of(lines):
                    self._put(stream, request, end, refused)
        except ServiceError as error:
            raise self._judged(error) from None
        except UnreachedError as error:
            raise RetryableError(str(error), smaller_may_pass=error.smaller_may_pass) from None
        except AnswerTooLargeError:
            raise UnavailableError("the answer is too large to be CloudWatch's; check 'endpoint_url'") from None
        if self._taken:
            self._taken.difference_update((event.writer, event.number) for event in batch)
        shortened = sum(line.is_shortened for lines in streams.values() for line in lines)
        if refused:
            keys = {key for found in refused.values() for key in found}
            rejected = [event for event in batch if (event.writer, event.number) in keys]
            raise RejectedError(" or ".join(refused), shortened=shortened, events=rejected)
        return shortened

    def end_stream(self, stream: Stream) -> None:
        """Forget that its log stream exists."""
        self._ready.discard(stream.id)

    def close(self) -> None:
        """Close the connections."""
        self._disconnect()

    def _encode(self, batch: Sequence[LogEvent], refused: Refused) -> dict[Stream, list[Line]]:
        """Return the lines of each stream, and note the events that CloudWatch would reject."""
        now = int(self._clock() * _SECOND)
        oldest_seconds = self._config.oldest_seconds
        oldest = now - int(oldest_seconds) * _SECOND
        newest = now + NEWEST_SECONDS * _SECOND
        encoders: dict[Stream, StreamEncoder] = {}
        streams: dict[Stream, list[Line]] = {}
        for event in batch:
            key = event.writer, event.number
            try:
                if event.time_unix_nano < oldest:
                    refused[f"older than {oldest_seconds / DAY_SECONDS:g} days"].add(key)
                    continue
                if event.time_unix_nano > newest:
                    refused["more than 2 hours ahead"].add(key)
                    continue
                encoder = encoders.get(event.stream)
                if encoder is None:
                    encoder = encoders[event.stream] = StreamEncoder(event.stream)
                message = encoder.encode(event)
                is_shortened = len(message) > MOST_MESSAGE_BYTES
                if is_shortened:
                    message = shorten_record(encoder.record(event))
                line = Line(event.time_unix_nano // 1_000_000, message, key, is_shortened)
            except UNENCODABLE:
                # Another program wrote the event. A retry would fail too.
                refused["of something that JSON cannot say"].add(key)
                continue
            streams.setdefault(event.stream, []).append(line)
        return streams

    def _put(self, stream: Stream, request: Sequence[Line], end: float, refused: Refused) -> None:
        """Send the lines of one request, unless an earlier export has sent them, and note those that are rejected."""
        lines = [line for line in request if line.key not in self._taken] if self._taken else request
        if not lines:
            return
        name = f"{self._config.log_stream_prefix}{stream.id}"
        if stream.id not in self._ready:
            self._create(name, end)
            self._ready.add(stream.id)
        events = [{"timestamp": line.millis, "message": line.message.decode()} for line in lines]
        try:
            answer = self._call("PutLogEvents", {"logStreamName": name, "logEvents": events}, end)
        except ServiceError as error:
            if error.code == "ResourceNotFoundException":
                # It was deleted, or CloudWatch has not created it everywhere yet. The retry creates it.
                self._ready.discard(stream.id)
                raise RetryableError(f"log stream '{name}' does not exist") from None
            raise
        rejected = rejected_in(answer.get("rejectedLogEventsInfo"), len(lines))
        for reason, places in rejected.items():
            refused[reason].update(lines[place].key for place in places)
        missing = {place for places in rejected.values() for place in places}
        self._taken.update(line.key for place, line in enumerate(lines) if place not in missing)

    def _create(self, name: str, end: float) -> None:
        """Create a log stream, and the log group if it does not exist. Other processes may do so at the same time."""
        if self._owes_retention:
            self._retain(end)
        try:
            self._call("CreateLogStream", {"logStreamName": name}, end, "ResourceAlreadyExistsException")
            return
        except ServiceError as error:
            if error.code != "ResourceNotFoundException":
                raise
        try:
            self._call("CreateLogGroup", {}, end, "ResourceAlreadyExistsException")
        except ServiceError as error:
            if not error.is_refused or not error.code:
                raise
            raise UnavailableError(
                f"log group '{self._config.log_group}' does not exist, and AWS does not allow creating it "
                f"({error.code}); create it, allow logs:CreateLogGroup, or check 'log_group' and 'region'"
            ) from None
        self._owes_retention = self._config.retention_days is not None
        if self._owes_retention:
            self._retain(end)
        self._call("CreateLogStream", {"logStreamName": name}, end, "ResourceAlreadyExistsException")

    def _retain(self, end: float) -> None:
        self._call("PutRetentionPolicy", {"retentionInDays": self._config.retention_days}, end)
        self._owes_retention = False

    def _call(
        self, operation: str, request: Mapping[str, Any], end: float, harmless: str | None = None
    ) -> dict[str, Any]:
        """Call an operation on the log group.

        Args:
            operation: The operation.
            request: Its arguments, without the log group.
            end: When it has to be over, in seconds of the monotonic clock.
            harmless: The code of an error that is no failure, if there is one.
        """
        if self._connection is not None and self._connection.has_expired:
            self._disconnect()
        if self._connection is None:
            self._connection = Connection(self._config)
        seconds = end - time.monotonic()
        if seconds <= 0:
            raise RetryableError("CloudWatch did not answer in time", smaller_may_pass=True)
        request = {"logGroupName": self._config.log_group, **request}
        try:
            return self._connection.call(operation, request, seconds, Bounds.EXPORT_BYTES)
        except ServiceError as error:
            if error.code == harmless:
                return {}
            raise

    def _judged(self, error: ServiceError) -> Exception:
        """Return what an error of CloudWatch means for the batch."""
        if error.is_throttled:
            return RetryableError("CloudWatch asks for fewer requests", error.retry_after_seconds)
        if error.is_passing:
            return RetryableError(str(error), error.retry_after_seconds, smaller_may_pass=True)
        if error.is_refused:
            # Perhaps the environment has other credentials by now.
            self._disconnect()
            return UnavailableError(error.why_refused)
        if error.status == 413 or error.code == "RequestEntityTooLargeException":
            return TooLargeError("CloudWatch refuses the request as too large")
        if error.code == "InvalidParameterException" and error.operation == "PutLogEvents":
            return RejectedError("CloudWatch refuses it as invalid (InvalidParameterException)")
        said = f": {error.said}" if error.said else ""
        if error.code:
            return UnavailableError(f"{error}{said}; check 'log_group', 'log_stream_prefix' and AWS's quotas")
        return UnavailableError(
            f"the answer to {error.operation} is {error.status}, as CloudWatch's never is; check 'endpoint_url'"
        )

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
