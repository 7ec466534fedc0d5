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
    from composite_logstore.config import ChildConfig, CompositeLogStoreConfig, Secret
    from composite_logstore.distributions import distributions_of
    from composite_logstore.event import ExceptionInfo, LogEvent, Stream, TraceContext
    from composite_logstore.flavor import CompositeLogStoreFlavor
    from composite_logstore.handler import CompositeHandler
    from composite_logstore.http_client import HttpClient, HttpResponse
    from composite_logstore.log_store import CompositeLogStore
    from composite_logstore.otel import OtelExporter
    from composite_logstore.plain import shorten
    from composite_logstore.reading.nesting import nested_in, reading_through
    from composite_logstore.secret_references import has_reference

_HOMES = {
    "AnswerTooLargeError": "bounded_http",
    "BACKFILLED": "backend",
    "Bounds": "bounds",
    "ChildConfig": "config",
    "CompositeHandler": "handler",
    "CompositeLogStore": "log_store",
    "CompositeLogStoreConfig": "config",
    "CompositeLogStoreFlavor": "flavor",
    "Copier": "backend",
    "Event": "backend",
    "ExceptionInfo": "event",
    "Exporter": "backend",
    "HttpClient": "http_client",
    "HttpResponse": "http_client",
    "LogEvent": "event",
    "OtelExporter": "otel",
    "Page": "backend",
    "PageRequest": "backend",
    "ReadEntry": "backend",
    "Reader": "backend",
    "RejectedError": "backend",
    "RetryableError": "backend",
    "Scanned": "backend",
    "Scanner": "backend",
    "Secret": "config",
    "Stream": "event",
    "TooLargeError": "backend",
    "TraceContext": "event",
    "UNENCODABLE": "backend",
    "UnavailableError": "backend",
    "distributions_of": "distributions",
    "has_reference": "secret_references",
    "nested_in": "reading.nesting",
    "open_artifact_store": "artifact_store",
    "open_log_store": "artifact_store",
    "quote": "backend",
    "reading_through": "reading.nesting",
    "shorten": "plain",
}

__all__ = [
    "BACKFILLED",
    "UNENCODABLE",
    "AnswerTooLargeError",
    "Bounds",
    "ChildConfig",
    "CompositeHandler",
    "CompositeLogStore",
    "CompositeLogStoreConfig",
    "CompositeLogStoreFlavor",
    "Copier",
    "Event",
    "ExceptionInfo",
    "Exporter",
    "HttpClient",
    "HttpResponse",
    "LogEvent",
    "OtelExporter",
    "Page",
    "PageRequest",
    "ReadEntry",
    "Reader",
    "RejectedError",
    "RetryableError",
    "Scanned",
    "Scanner",
    "Secret",
    "Stream",
    "TooLargeError",
    "TraceContext",
    "UnavailableError",
    "distributions_of",
    "has_reference",
    "nested_in",
    "open_artifact_store",
    "open_log_store",
    "quote",
    "reading_through",
    "shorten",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
