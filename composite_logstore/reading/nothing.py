"""Why a stream has no entries: nothing was logged, or its logs are elsewhere.

"Nothing was logged" is an empty page, as with ZenML's own log stores. Anything else is said, in the page's one entry.
"""

from __future__ import annotations

from datetime import datetime
from uuid import NAMESPACE_URL, uuid5

from zenml.client import Client
from zenml.enums import LoggingLevels
from zenml.models import LogsResponse
from zenml.utils.time_utils import to_utc_timezone

from composite_logstore.config import CompositeLogStoreConfig
from composite_logstore.names import quoted
from composite_logstore.zenml import LogEntry

STEP_METADATA = "log_store"
"""The key of a step's metadata that says how many events its process has captured for it: `events`, for the id of each
stream."""


def logged_events(logs: LogsResponse) -> int | None:
    """Return how many events were logged in the stream, as its step's metadata says; None if that is not known.

    A step that was killed has no such metadata, and neither has a run.
    """
    if logs.step_run_id is None:
        return None
    try:
        said = Client().zen_store.get_run_step(logs.step_run_id).run_metadata.get(STEP_METADATA)
        events = said["events"].get(str(logs.id)) if isinstance(said, dict) else None
    except Exception:
        # A page must not fail for lack of such information.
        return None
    return events if type(events) is int and events >= 0 else None


def explain(
    logs: LogsResponse, config: CompositeLogStoreConfig, name: str, changed: datetime, events: int | None
) -> LogEntry | None:
    """Return the entry that says why a child has no entry of a stream; None if nothing but silence explains it.

    Args:
        logs: The stream.
        config: The log store's settings.
        name: The child.
        changed: When these settings were last changed.
        events: How many events were logged, at least one; None if that is not known.
    """
    child = config.child(name)
    others = [one.name for one in config.enabled_children if one.name != name and not one.unreadable]
    reasons: list[str] = []
    if child.min_level is not None:
        reasons.append(f"It gets only entries of level {child.min_level.name} and above ('min_level').")
    rules = [name for name in child.excluded_by if name not in ("min_level", "progress")]
    if rules:
        reasons.append(f"It does not get all entries ({quoted(rules)}).")
    if others and to_utc_timezone(changed) > to_utc_timezone(logs.created):
        reasons.append(
            f"The log store was changed after these logs began, at {to_utc_timezone(changed):%Y-%m-%d %H:%M} UTC: "
            f"another child may have been the primary before."
        )
    if events and not reasons and child.wants_all:
        reasons.append(f"{events} were logged: they were not delivered to it, or are no longer where they were.")
    if not reasons:
        return None
    if others:
        which = "Child" if len(others) == 1 else "Children"
        reasons.append(f"{which} {quoted(others)} may have more: `composite-logstore logs RUN --from {others[0]}`.")
    return LogEntry(
        # The same ID each time that the page is read.
        id=uuid5(NAMESPACE_URL, f"composite-logstore/{logs.id}/{name}/nothing"),
        name="composite_logstore",
        level=LoggingLevels.WARNING,
        timestamp=logs.created,
        message=f"Child '{name}' has no entries of these logs. {' '.join(reasons)}",
    )
