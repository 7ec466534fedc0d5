"""The write port on top of OpenTelemetry's own: a `LogRecordExporter` of its SDK delivers a child's events.

Only this module uses the SDK's log classes, which are not stable and have been renamed before: it works with SDK 1.38
and later.
"""

from __future__ import annotations

import json
import logging
import re
import threading
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from opentelemetry._logs import LogRecord, SeverityNumber
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import INVALID_SPAN, NonRecordingSpan, SpanContext, TraceFlags, set_span_in_context

from composite_logstore.backend import UNENCODABLE, RejectedError, RetryableError, TooLargeError, quote
from composite_logstore.event import LogEvent, Stream
from composite_logstore.http_client import bound
from composite_logstore.plain import Plain, shorten
from composite_logstore.resource import detected_attributes

if TYPE_CHECKING:
    from opentelemetry.sdk._logs import ReadableLogRecord
    from opentelemetry.sdk._logs.export import LogRecordExporter
else:
    try:
        from opentelemetry.sdk._logs import ReadableLogRecord
        from opentelemetry.sdk._logs.export import LogRecordExporter
    except ImportError:
        # Their names in SDK 1.38, which warns of each record that it will rename them.
        from opentelemetry.sdk._logs import LogData, LogDeprecatedInitWarning
        from opentelemetry.sdk._logs import LogRecord as ReadWriteLogRecord
        from opentelemetry.sdk._logs.export import LogExporter as LogRecordExporter

        warnings.filterwarnings("ignore", category=LogDeprecatedInitWarning, module=re.escape(__name__))

        def ReadableLogRecord(record, resource, scope=None):
            """Return the record in the form that this SDK's exporters export."""
            made = ReadWriteLogRecord(**{name: getattr(record, name) for name in _FIELDS}, resource=resource)
            made.attributes = _Attributes(record.attributes)
            return LogData(made, scope)

        _FIELDS = ("timestamp", "observed_timestamp", "context", "severity_text", "severity_number", "body")

        class _Attributes(dict):
            """Attributes of any number: the SDK's own class drops those after the 128th."""

            dropped = 0


MAX_EVENT_BYTES = 900_000
"""The most bytes of an event as JSON in ASCII. Larger events are shortened, since a backend's limit is unknown."""

MAX_BATCH_BYTES = 4 * 1024 * 1024
"""About the most bytes of a batch: the default limit of gRPC's receivers."""

# One scope for all loggers: exporters group records by scope, and more scopes would change the order of a batch. The
# logger's name is an attribute instead.
_SCOPE = InstrumentationScope("composite_logstore")

_MAX_TEXT_BYTES = 64 * 1024
_MOST_BYTES_A_CHARACTER = 12


class OtelExporter:
    """Exports through one of the SDK's exporters.

    Such an exporter reports success or failure, and no cause, so each failure is retried. The reason in an error is
    the last warning that the exporter logs during the export; that warning is not logged again with each retry. Answers
    are bounded if the exporter sends with a `requests.Session`.

    Attributes:
        exporter_class: The class that the SDK's exporters extend: `LogRecordExporter`, which was `LogExporter` in 1.38.
    """

    exporter_class: ClassVar[type[LogRecordExporter]] = LogRecordExporter  # type: ignore[type-abstract]

    def __init__(
        self,
        exporter: LogRecordExporter,
        resource: Mapping[str, str],
        hidden: object = None,
        max_batch_size: int | None = None,
    ) -> None:
        """Take over an exporter. `close` shuts it down.

        Args:
            exporter: The exporter.
            resource: The resource's attributes. `OTEL_RESOURCE_ATTRIBUTES` adds to them.
            hidden: Secrets that no error may repeat: texts, and mappings and lists of texts.
            max_batch_size: The most events that the exporter takes at once, None without a limit.
        """
        self._exporter = exporter
        self._resource = Resource(detected_attributes(resource))  # type: ignore[arg-type]
        self._max_batch_size = max_batch_size
        _bound_sessions(exporter)
        self._listener = _Listener(exporter, hidden)
        self._is_open = True

    def attributes_of(self, stream: Stream) -> Mapping[str, Plain]:
        """Return the attributes of all events of the stream. A subclass may add to them."""
        return stream.attributes

    def export(self, batch: Sequence[LogEvent]) -> int:
        """Export the batch, once.

        Returns:
            How many of the events had to be shortened.

        Raises:
            RetryableError: The exporter reports a failure, or raises.
            RejectedError: An event cannot be encoded.
            TooLargeError: The batch has too many events or bytes.
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
                # Another program wrote it. A retry would not help.
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
            # The error's text may contain a secret that is not known here.
            words = f"the exporter raised {type(error).__name__}{self._listener.reason}"
            raise RetryableError(words, smaller_may_pass=True) from error
        # By its name: some exporters return a member of the enumeration that the SDK had earlier.
        if getattr(result, "name", None) != "SUCCESS":
            # Any cause is possible, the size included.
            raise RetryableError(f"the exporter reports a failure{self._listener.reason}", smaller_may_pass=True)
        return shortened

    def end_stream(self, stream: Stream) -> None:
        """Do nothing: the SDK's exporters have no streams."""

    def close(self) -> None:
        """Shut the exporter down once: it would warn the second time."""
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
    """Return body and attributes for an event. Where a name occurs twice, ZenML's precedence decides."""
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
        # Too many attributes, or too many values in one. Keep only those that identify the stream and the event.
        attributes = {**stream, **event.identity}
        size = _size(body, attributes)
    return _Content(body, attributes, size, True)


def _size(body: str, attributes: Mapping[str, Plain]) -> int:
    """Return roughly how many bytes they take; if that may be too many, exactly how many as JSON."""
    characters = len(body) + len(str(attributes))
    if characters * _MOST_BYTES_A_CHARACTER <= MAX_EVENT_BYTES:
        return characters
    return len(json.dumps([body, attributes]))


class _Listener(logging.Filter):
    """Catches the warnings that an exporter logs in the thread that uses it."""

    def __init__(self, exporter: LogRecordExporter, hidden: object) -> None:
        super().__init__()
        # Modules of the SDK, of its exporters and of urllib3, with which many send, log under their own names.
        modules = {kind.__module__ for kind in type(exporter).__mro__} | {"urllib3.connectionpool"}
        self._loggers = [logging.getLogger(module) for module in modules]
        self._hidden = hidden
        self._thread: int | None = None
        self._said = ""

    @property
    def reason(self) -> str:
        """The last warning, as the end of a sentence."""
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
