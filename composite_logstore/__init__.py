"""A ZenML log store that sends every log record to several backends and reads from one of them.

The names below are the public interface; everything else may change. They are imported when they are
first used, so that importing the package costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from composite_logstore.artifact_store import open_artifact_store, open_log_store
    from composite_logstore.backend import (
        BACKFILLED,
        UNENCODABLE,
        Copier,
        Event,
        Exporter,
        Page,
        PageRequest,
        ReadEntry,
        Reader,
        RejectedError,
        RetryableError,
        Scanned,
        Scanner,
        TooLargeError,
        UnavailableError,
        quote,
    )
    from composite_logstore.bounded_http import AnswerTooLargeError
    from composite_logstore.bounds import Bounds
    from composite_logstore.child_config import ChildConfig, Secret
    from composite_logstore.collector import CollectorExporter
    from composite_logstore.config import CompositeLogStoreConfig
    from composite_logstore.distributions import distributions_of
    from composite_logstore.event import ExceptionInfo, LogEvent, Stream, TraceContext, shown_fields
    from composite_logstore.flavor import CompositeLogStoreFlavor
    from composite_logstore.handler import CompositeHandler
    from composite_logstore.http_client import (
        HttpClient,
        HttpResponse,
        cause_of,
        retry_after,
        seconds_asked_for,
        shown_url,
    )
    from composite_logstore.joining import in_context, join
    from composite_logstore.log_store import CompositeLogStore
    from composite_logstore.otel import OtelExporter
    from composite_logstore.plain import shorten, shorten_fields, shorten_in_json
    from composite_logstore.reader_config import (
        HttpCredentialsConfig,
        HttpReaderConfig,
        ReaderConfig,
        ReadSection,
        checked_url,
    )
    from composite_logstore.reading.by_time import Span, TimeSortedReader
    from composite_logstore.reading.keyset import Answer, KeysetReader, Query
    from composite_logstore.reading.nesting import nested_in, reading_through
    from composite_logstore.reading.patterns import quoted_text, re2_pattern
    from composite_logstore.reading.records import RankedEntry, Record, whole_number
    from composite_logstore.reading.searches import Allowance, HttpSearches
    from composite_logstore.resource import detected_attributes, environment_attributes
    from composite_logstore.secret_references import has_reference

_HOMES = {
    "Allowance": "reading.searches",
    "Answer": "reading.keyset",
    "AnswerTooLargeError": "bounded_http",
    "BACKFILLED": "backend",
    "Bounds": "bounds",
    "ChildConfig": "child_config",
    "CollectorExporter": "collector",
    "CompositeHandler": "handler",
    "CompositeLogStore": "log_store",
    "CompositeLogStoreConfig": "config",
    "CompositeLogStoreFlavor": "flavor",
    "Copier": "backend",
    "Event": "backend",
    "ExceptionInfo": "event",
    "Exporter": "backend",
    "HttpClient": "http_client",
    "HttpCredentialsConfig": "reader_config",
    "HttpReaderConfig": "reader_config",
    "HttpResponse": "http_client",
    "HttpSearches": "reading.searches",
    "KeysetReader": "reading.keyset",
    "LogEvent": "event",
    "OtelExporter": "otel",
    "Page": "backend",
    "PageRequest": "backend",
    "Query": "reading.keyset",
    "RankedEntry": "reading.records",
    "ReadEntry": "backend",
    "ReadSection": "reader_config",
    "Reader": "backend",
    "ReaderConfig": "reader_config",
    "Record": "reading.records",
    "RejectedError": "backend",
    "RetryableError": "backend",
    "Scanned": "backend",
    "Scanner": "backend",
    "Secret": "child_config",
    "Span": "reading.by_time",
    "Stream": "event",
    "TimeSortedReader": "reading.by_time",
    "TooLargeError": "backend",
    "TraceContext": "event",
    "UNENCODABLE": "backend",
    "UnavailableError": "backend",
    "cause_of": "http_client",
    "checked_url": "reader_config",
    "detected_attributes": "resource",
    "distributions_of": "distributions",
    "environment_attributes": "resource",
    "has_reference": "secret_references",
    "in_context": "joining",
    "join": "joining",
    "nested_in": "reading.nesting",
    "open_artifact_store": "artifact_store",
    "open_log_store": "artifact_store",
    "quote": "backend",
    "quoted_text": "reading.patterns",
    "re2_pattern": "reading.patterns",
    "reading_through": "reading.nesting",
    "retry_after": "http_client",
    "seconds_asked_for": "http_client",
    "shorten": "plain",
    "shorten_fields": "plain",
    "shorten_in_json": "plain",
    "shown_fields": "event",
    "shown_url": "http_client",
    "whole_number": "reading.records",
}

__all__ = [
    "BACKFILLED",
    "UNENCODABLE",
    "Allowance",
    "Answer",
    "AnswerTooLargeError",
    "Bounds",
    "ChildConfig",
    "CollectorExporter",
    "CompositeHandler",
    "CompositeLogStore",
    "CompositeLogStoreConfig",
    "CompositeLogStoreFlavor",
    "Copier",
    "Event",
    "ExceptionInfo",
    "Exporter",
    "HttpClient",
    "HttpCredentialsConfig",
    "HttpReaderConfig",
    "HttpResponse",
    "HttpSearches",
    "KeysetReader",
    "LogEvent",
    "OtelExporter",
    "Page",
    "PageRequest",
    "Query",
    "RankedEntry",
    "ReadEntry",
    "ReadSection",
    "Reader",
    "ReaderConfig",
    "Record",
    "RejectedError",
    "RetryableError",
    "Scanned",
    "Scanner",
    "Secret",
    "Span",
    "Stream",
    "TimeSortedReader",
    "TooLargeError",
    "TraceContext",
    "UnavailableError",
    "cause_of",
    "checked_url",
    "detected_attributes",
    "distributions_of",
    "environment_attributes",
    "has_reference",
    "in_context",
    "join",
    "nested_in",
    "open_artifact_store",
    "open_log_store",
    "quote",
    "quoted_text",
    "re2_pattern",
    "reading_through",
    "retry_after",
    "seconds_asked_for",
    "shorten",
    "shorten_fields",
    "shorten_in_json",
    "shown_fields",
    "shown_url",
    "whole_number",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
