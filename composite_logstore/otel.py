"""The write port over OpenTelemetry's own: a `LogRecordExporter` of its SDK takes a child's events.

All that depends on the SDK's log classes is here, since they are not stable and have been renamed before.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from opentelemetry._logs import LogRecord, SeverityNumber
from opentelemetry.sdk._logs import ReadableLogRecord
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import INVALID_SPAN, NonRecordingSpan, SpanContext, TraceFlags, set_span_in_context

from composite_logstore.backend import UNENCODABLE, RejectedError, RetryableError, TooLargeError, quote
from composite_logstore.event import LogEvent, Stream
from composite_logstore.http_client import bound
from composite_logstore.plain import Plain, shorten

if TYPE_CHECKING:
    from opentelemetry.sdk._logs.export import LogRecordExporter

MAX_EVENT_BYTES = 900_000
"""The largest event that is passed on as it is, as JSON in ASCII: an exporter does not say what its backend takes."""

MAX_BATCH_BYTES = 4 * 1024 * 1024
"""About the largest batch that is passed on: what gRPC's receivers take unless they are told otherwise."""

# One for all loggers, and the logger is an attribute: exporters put together what is of one scope, and so would
# take the events of a batch out of their order.
_SCOPE = InstrumentationScope("composite_logstore")

_MAX_TEXT_BYTES = 64 * 1024
_MOST_BYTES_A_CHARACTER = 12


class OtelExporter:
    """Exports through one of the SDK's exporters.

    Answers to it are bounded where it sends with a session of `requests` of its own. What else it does is its affair.
    Such an exporter says success or failure, and no more: a failure is always tried again. Why it failed is
    taken from what it logs meanwhile, which would otherwise be repeated with each try.
    """

    def __init__(
        self,
        exporter: LogRecordExporter,
        resource: Mapping[str, str],
        hidden: object = None,
        max_batch_size: int | None = None,
    ) -> None:
        """Take over an exporter. It is shut down when this one is closed.

        Args:
            exporter: The exporter.
            resource: The resource's attributes. `OTEL_RESOURCE_ATTRIBUTES` adds to them.
            hidden: Texts that no error may repeat, themselves or in mappings and lists.
            max_batch_size: The most events that the exporter takes at once, if there is a limit.
        """
        self._exporter = exporter
        try:
            self._resource = Resource.create(dict(resource))
        except RuntimeError:
            # It looks for more in threads, and a process that is at its end cannot start any.
            self._resource = Resource(dict(resource))
        self._max_batch_size = max_batch_size
        _bound_sessions(exporter)
        self._listener = _Listener(exporter, hidden)
        self._is_open = True

    def attributes_of(self, stream: Stream) -> Mapping[str, Plain]:
        """Return the attributes of all events of the stream. A subclass may add to them."""
        return stream.attributes

    def export(self, batch: Sequence[LogEvent]) -> int:
        """Export the batch, once.

        Args:
            batch: The events.

        Returns:
            How many of the events had to be shortened.

        Raises:
            RetryableError: The exporter reports a failure, or raises.
            RejectedError: An event cannot be encoded.
            TooLargeError: There are more events, or more bytes, than can be passed on at once.
        """
        if self._max_batch_size is not None and len(batch) > self._max_batch_size:
            raise TooLargeError(f"the exporter takes at most {self._max_batch_size} events at once")
        streams: dict[Stream, Mapping[str, Plain]] = {}
        records: list[ReadableLogRecord] = []
        shortened = size = 0
        for event in batch:
            if event.stream not in streams:
                streams[event.stream] = self.attributes_of(event.stream)
            try:
                content = _content(event, streams[event.stream])
                record = self._record(event, content)
            except UNENCODABLE as error:
                # Of another program. No later try would change that.
                raise RejectedError(f"an event cannot be encoded ({type(error).__name__})") from error
            shortened += content.is_shortened
            size += content.size
            if size > MAX_BATCH_BYTES and len(batch) > 1:
                raise TooLargeError(f"the batch is larger than {MAX_BATCH_BYTES} bytes")
            records.append(record)
        try:
            with self._listener:
                result = self._exporter.export(records)
        except Exception as error:
            # Its text may hold a secret that is not known here.
            words = f"the exporter raised {type(error).__name__}{self._listener.reason}"
            raise RetryableError(words, smaller_may_pass=True) from error
        # By its name: exporters still use the enumeration under its earlier name, which is another one.
        if getattr(result, "name", None) != "SUCCESS":
            # It may be anything, size too.
            raise RetryableError(f"the exporter reports a failure{self._listener.reason}", smaller_may_pass=True)
        return shortened

    def end_stream(self, stream: Stream) -> None:
        """Do nothing: the SDK's exporters know no streams."""

    def close(self) -> None:
        """Shut the exporter down, once: a second time it would warn."""
        if self._is_open:
            self._is_open = False
            with self._listener:
                self._exporter.shutdown()  # type: ignore[no-untyped-call]

    def _record(self, event: LogEvent, content: _Content) -> ReadableLogRecord:
        trace = event.trace
        span = INVALID_SPAN
        if trace is not None:
            span = NonRecordingSpan(SpanContext(trace.trace_id, trace.span_id, False, TraceFlags(trace.flags)))
        record = LogRecord(
            timestamp=event.time_unix_nano,
            observed_timestamp=event.time_unix_nano,
            context=set_span_in_context(span),
            severity_text=event.severity_text,
            severity_number=SeverityNumber(event.severity_number),
            body=content.body,
            attributes=content.attributes,
        )
        return ReadableLogRecord(record, self._resource, _SCOPE)


def _bound_sessions(exporter: LogRecordExporter) -> None:
    """Bound the answers to an exporter that sends with `requests`, as OpenTelemetry's own and ZenML's do."""
    import requests

    for value in vars(exporter).values():
        if isinstance(value, requests.Session):
            bound(value)


class _Content(NamedTuple):
    body: str
    attributes: dict[str, Plain]
    size: int
    is_shortened: bool


def _content(event: LogEvent, stream: Mapping[str, Plain]) -> _Content:
    """Return what a record of the event says, with ZenML's precedence where a name occurs twice."""
    body = event.message
    attributes = {"logger.name": event.logger_name, **event.details, **stream, **event.metadata, **event.identity}
    size = _size(body, attributes)
    if size <= MAX_EVENT_BYTES:
        return _Content(body, attributes, size, False)
    body = shorten(body, _MAX_TEXT_BYTES)
    attributes = {
        name: shorten(value, _MAX_TEXT_BYTES) if isinstance(value, str) else value for name, value in attributes.items()
    }
    size = _size(body, attributes)
    if size > MAX_EVENT_BYTES:
        # Too many attributes, or too many values in one. What tells where the event belongs is kept.
        attributes = {**stream, **event.identity}
        size = _size(body, attributes)
    return _Content(body, attributes, size, True)


def _size(body: str, attributes: Mapping[str, Plain]) -> int:
    """Return about how many bytes it takes, and exactly what it takes as JSON where that may be too many."""
    characters = len(body) + len(str(attributes))
    if characters * _MOST_BYTES_A_CHARACTER <= MAX_EVENT_BYTES:
        return characters
    return len(json.dumps([body, attributes]))


class _Listener(logging.Filter):
    """Listens to what an exporter warns of in the thread that uses it, and keeps it from being logged."""

    def __init__(self, exporter: LogRecordExporter, hidden: object) -> None:
        super().__init__()
        # Each module of the SDK and of its exporters logs under its own name, and so does what many send with.
        modules = {kind.__module__ for kind in type(exporter).__mro__} | {"urllib3.connectionpool"}
        self._loggers = [logging.getLogger(module) for module in modules]
        self._hidden = hidden
        self._thread: int | None = None
        self._said = ""

    @property
    def reason(self) -> str:
        """What it has said last, to be put behind another text."""
        return f": {self._said}" if self._said else ""

    def __enter__(self) -> None:
        self._thread = threading.get_ident()
        for logger in self._loggers:
            logger.addFilter(self)

    def __exit__(self, *_: object) -> None:
        for logger in self._loggers:
            logger.removeFilter(self)

    def filter(self, record: logging.LogRecord) -> bool:
        if record.thread != self._thread or record.levelno < logging.WARNING:
            return True
        self._said = quote(record.getMessage(), self._hidden)
        return False
