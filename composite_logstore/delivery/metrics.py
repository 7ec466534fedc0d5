"""The log store's own metrics, under OpenTelemetry's names for the self-observability of SDKs.

https://opentelemetry.io/docs/specs/semconv/otel/sdk-metrics/

No number is kept twice: when a reader collects, the metrics are read from the children's accounts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import lru_cache
from importlib.metadata import version
from typing import NamedTuple
from uuid import UUID

from opentelemetry.metrics import CallbackOptions, Histogram, Meter, Observation, get_meter

from composite_logstore.child_config import ChildConfig
from composite_logstore.delivery.account import ChildStats


class Observed(NamedTuple):
    """The account of a child, as one writer keeps it.

    Attributes:
        log_store_id: The log store's id.
        config: The child's settings.
        stats: Its account.
        queued: How many of the pending events wait; the others are being exported.
    """

    log_store_id: UUID
    config: ChildConfig
    stats: ChildStats
    queued: int


Measure = Callable[[Observed], dict[str, int]]
"""Returns the numbers of a child by an attribute's value, which is empty where there is no such attribute."""


_ERROR = "error.type"

COUNTERS: dict[str, tuple[Measure, str, str]] = {
    "otel.sdk.exporter.log.exported": (
        lambda child: {"": child.stats.delivered, "rejected": child.stats.rejected},
        _ERROR,
        "Events whose export has finished.",
    ),
    "otel.sdk.processor.log.processed": (
        lambda child: {
            "": child.stats.delivered + child.stats.rejected,
            "queue_full": child.stats.dropped,
            "withheld": child.stats.withheld,
        },
        _ERROR,
        "Events that have left a child's queue.",
    ),
    "composite_logstore.redacted": (
        lambda child: child.stats.redacted,
        "composite_logstore.redaction",
        "Delivered and rejected events in which something was masked.",
    ),
}
"""The name of a metric → its numbers, the attribute that tells them apart, and its description."""

LEVELS: dict[str, tuple[Measure, str]] = {
    "otel.sdk.exporter.log.inflight": (
        lambda child: {"": child.stats.pending - child.queued},
        "Events that are being exported.",
    ),
    "otel.sdk.processor.log.queue.size": (lambda child: {"": child.queued}, "Events that wait in a child's queue."),
    "otel.sdk.processor.log.queue.capacity": (
        lambda child: {"": child.config.max_queue_size},
        "Events that a child's queue has room for.",
    ),
}


def attributes(log_store_id: UUID, config: ChildConfig) -> dict[str, str]:
    """Return the attributes that tell one child's metrics from another's."""
    return {
        "otel.component.type": f"composite_logstore.{config.type}",
        "otel.component.name": config.name,
        "zenml.log_store.id": str(log_store_id),
    }


def observe(children: Callable[[], Iterable[Observed]]) -> None:
    """Register the metrics of all children with the meter provider that the process has, or gets later.

    Args:
        children: Returns the account of each child.
    """
    meter = _meter()
    for name, (measure, attribute, description) in COUNTERS.items():
        meter.create_observable_counter(name, [_callback(measure, children, attribute)], "{log_record}", description)
    for name, (measure, description) in LEVELS.items():
        meter.create_observable_up_down_counter(name, [_callback(measure, children)], "{log_record}", description)


def exported(seconds: float, attributes: dict[str, str]) -> None:
    """Record how long an export took. Never raises, so that no meter provider can disturb a delivery.

    Args:
        seconds: The duration of the export.
        attributes: The attributes of the child, and the `error.type` if the export failed.
    """
    with suppress(BaseException):
        export_duration().record(seconds, attributes)


@lru_cache(maxsize=1)
def export_duration() -> Histogram:
    """Return the histogram of the duration of exports, in seconds."""
    return _meter().create_histogram("otel.sdk.exporter.operation.duration", "s", "How long an export took.")


def _version() -> str:
    try:
        return version("composite-logstore")
    except Exception:
        # A program that is frozen into one file has no metadata. Without a free file descriptor Python finds none, too.
        return ""


# Read once, and early: later no file descriptor may be free.
_VERSION = _version()


def _meter() -> Meter:
    return get_meter("composite_logstore", _VERSION)


def _callback(
    measure: Measure, children: Callable[[], Iterable[Observed]], attribute: str = _ERROR
) -> Callable[[CallbackOptions], Iterable[Observation]]:
    def observations(_: CallbackOptions) -> Iterable[Observation]:
        # Two writers of one component, before and after an update of it, are one component to users.
        sums: Counter[tuple[tuple[str, str], ...]] = Counter()
        for child in children():
            for value, number in measure(child).items():
                kind = {attribute: value} if value else {}
                sums[tuple((attributes(child.log_store_id, child.config) | kind).items())] += number
        return [Observation(number, dict(key)) for key, number in sums.items()]

    return observations
