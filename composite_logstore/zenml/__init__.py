"""Everything that differs between ZenML's releases, under one name each.

The rest of the package, and every backend, speaks the contract of ZenML 0.98. What moved, changed or is missing in
another release is imported from here, and from nowhere else. Each difference is found by looking at what the release
has, not at its version. The names are looked up when they are used, so importing this module costs nothing.

| before | what differs | the name here |
|---|---|---|
| 0.93.1 | a module variable holds the logging context, which is no `BaseContext` | `active_context`, `activate` |
| 0.93.3 | streams are made by updates of a run or step | `create_logs` |
| 0.93.3 | attributes begin without `zenml.`; those of a step need the run | `run_attributes`, `step_attributes` |
| 0.93.3 | the largest page is `base_log_store.MAX_ENTRIES_PER_REQUEST` | `LOGS_MAX_ENTRIES_PER_REQUEST` |
| 0.93.3 | the class method `LoggingContext.emit` takes no metadata | `wrap_dispatch` |
| 0.95.0 | all records pass through that method instead of `dispatch` | `wrap_dispatch` |
| 0.95.0 | hooks have no logs of their own | `hook_of` |
| 0.95.0 | OpenTelemetry's SDK is 1.38, which names its log classes differently | `composite_logstore.otel` |
| 0.96.0 | artifact stores are loaded like any component | `instantiate_artifact_store` |
| 0.97.0 | `fetch` returns a list instead of a page | `paged`, `fetch_page`, `answers_pages` |
| 0.97.0 | log stores do not bound the size of a page | `resolve_limit` |
| 0.97.0 | `LogEntry` is in `utils.logging_utils` | `LogEntry` |
| 0.97.0 | there are no pages, filters and named levels | `LogsEntriesResponse`, `LogsEntriesFilter`, ... |
| 0.97.0 | log stores have no errors of their own | `LogStoreError` and its subclasses |
| 0.97.0 | the ids of a stream are in its metadata instead of its body | `make_logs`, `moved` |

To a server before 0.97, `fetch` returns a list: the oldest entries, up to the limit, and a last entry that says why the
list is not complete, if it is not.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from datetime import datetime
from functools import cache, wraps
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeVar, cast
from uuid import UUID

if TYPE_CHECKING:
    from zenml.artifacts.utils import instantiate_artifact_store
    from zenml.constants import LOGS_MAX_ENTRIES_PER_REQUEST
    from zenml.exceptions import LogStoreError, LogStoreRateLimitError, LogStoreUnavailableError
    from zenml.log_stores import BaseLogStore
    from zenml.models import (
        LogEntry,
        LogsEntriesFilter,
        LogsEntriesResponse,
        LogsResponse,
        PipelineRunResponse,
        StepRunResponse,
    )
    from zenml.models.v2.misc.log_models import NamedLoggingLevel, parse_log_level
    from zenml.utils.logging_utils import LoggingContext
    from zenml.zen_stores.base_zen_store import BaseZenStore

    def active_context() -> LoggingContext | None:
        """Return the logging context of this thread, None if it has none."""

    def activate(context: LoggingContext) -> object:
        """Make a logging context the one of this thread."""


__all__ = [
    "LOGS_MAX_ENTRIES_PER_REQUEST",
    "NEWEST_TESTED",
    "OLDEST_TESTED",
    "LogEntry",
    "LogStoreError",
    "LogStoreRateLimitError",
    "LogStoreUnavailableError",
    "LogsEntriesFilter",
    "LogsEntriesResponse",
    "NamedLoggingLevel",
    "activate",
    "active_context",
    "answers_pages",
    "create_logs",
    "fetch_page",
    "hook_of",
    "instantiate_artifact_store",
    "make_logs",
    "moved",
    "named",
    "paged",
    "parse_log_level",
    "resolve_limit",
    "run_attributes",
    "step_attributes",
    "warn_if_untested",
    "wrap_dispatch",
    "wrap_secret_values",
]

OLDEST_TESTED = "0.93.0"
"""The oldest release of ZenML that this version was tested with."""

NEWEST_TESTED = "0.98.0"
"""The newest release of ZenML that this version was tested with."""

_OLDER = f"{__name__}.older"

# A name here → the places to look, the newest release's first. What only older releases have, or what is defined here
# for them, is not looked for in a release that returns pages: it would not match the rest of that release.
_PLACES: dict[str, tuple[str, ...]] = {
    "LOGS_MAX_ENTRIES_PER_REQUEST": (
        "zenml.constants:LOGS_MAX_ENTRIES_PER_REQUEST",
        "zenml.log_stores.base_log_store:MAX_ENTRIES_PER_REQUEST",
    ),
    "LogEntry": ("zenml.models:LogEntry", "zenml.utils.logging_utils:LogEntry"),
    "LogStoreError": ("zenml.exceptions:LogStoreError", f"{_OLDER}:LogStoreError"),
    "LogStoreRateLimitError": ("zenml.exceptions:LogStoreRateLimitError", f"{_OLDER}:LogStoreRateLimitError"),
    "LogStoreUnavailableError": ("zenml.exceptions:LogStoreUnavailableError", f"{_OLDER}:LogStoreUnavailableError"),
    "LogsEntriesFilter": ("zenml.models:LogsEntriesFilter", f"{_OLDER}:LogsEntriesFilter"),
    "LogsEntriesResponse": ("zenml.models:LogsEntriesResponse", f"{_OLDER}:LogsEntriesResponse"),
    "NamedLoggingLevel": ("zenml.models.v2.misc.log_models:NamedLoggingLevel", f"{_OLDER}:NamedLoggingLevel"),
    "activate": (
        "zenml.utils.logging_utils:LoggingContext.__context_var__.set",
        "zenml.utils.logging_utils:active_logging_context.set",
    ),
    "active_context": (
        "zenml.utils.logging_utils:LoggingContext.get",
        "zenml.utils.logging_utils:active_logging_context.get",
    ),
    "instantiate_artifact_store": (
        "zenml.artifacts.utils:instantiate_artifact_store",
        "zenml.stack:StackComponent.from_model",
    ),
    "parse_log_level": ("zenml.models.v2.misc.log_models:parse_log_level", f"{_OLDER}:parse_log_level"),
}


if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name not in _PLACES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        newest, *others = _PLACES[name]
        try:
            found = _look_up(newest)
        except (ImportError, AttributeError) as error:
            try:
                if not others or _returns_pages():
                    raise missing(newest)
                found = _look_up(others[0])
            except (ImportError, AttributeError):
                raise missing(newest) from error
        globals()[name] = found
        return found


def _look_up(place: str) -> Any:
    module, _, path = place.partition(":")
    found: Any = import_module(module)
    for part in path.split("."):
        found = getattr(found, part)
    return found


@cache
def _returns_pages() -> bool:
    """Return whether this release's log stores return pages."""
    from zenml.log_stores.base_log_store import BaseLogStore

    return "start_time" not in inspect.signature(BaseLogStore.fetch).parameters


def missing(place: str) -> ImportError:
    """Return the error that says that something is missing from this release of ZenML.

    Args:
        place: The module, a colon, and the name in it.
    """
    from zenml import __version__

    module, _, name = place.partition(":")
    return ImportError(
        f"ZenML {__version__} has no '{name}' in '{module}', which composite-logstore needs here. It was tested with "
        f"ZenML {OLDEST_TESTED} to {NEWEST_TESTED}; install one of these, or a newer composite-logstore",
        name=module,
    )


# Releases

_has_warned = False


def warn_if_untested(warn: Callable[[str], object]) -> None:
    """Warn, once in a process, if ZenML is newer than the releases that this version was tested with.

    Args:
        warn: Is told the sentence.
    """
    global _has_warned
    if _has_warned:
        return
    _has_warned = True
    from zenml import __version__

    if _release(__version__) > _release(NEWEST_TESTED):
        warn(
            f"This version of composite-logstore was tested with ZenML up to {NEWEST_TESTED}, and {__version__} is "
            f"installed. It is used all the same; if something fails, look for a newer composite-logstore."
        )


def _release(version: str) -> tuple[int, ...]:
    """Return the numbers of a version, up to what is no number."""
    numbers: list[int] = []
    for part in version.split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


# Reading

Fetch = TypeVar("Fetch", bound=Callable[..., "LogsEntriesResponse"])


def paged(show: Callable[[LogEntry], LogEntry]) -> Callable[[Fetch], Fetch]:
    """Return a decorator for a log store's `fetch`, which makes it what this release of ZenML calls.

    `fetch_page` reads the pages as they are, without what the decorator adds for ZenML.

    Args:
        show: Returns an entry as ZenML is to show it.
    """

    def decorate(fetch: Fetch) -> Fetch:
        @wraps(fetch)
        def fetch_shown(*arguments: Any, **keywords: Any) -> LogsEntriesResponse:
            page = fetch(*arguments, **keywords)
            page.items = [show(entry) for entry in page.items]
            return page

        called: Any = fetch_shown
        if not _returns_pages():
            from composite_logstore.zenml.older import listed

            called = listed(fetch_shown)
        called.pages = fetch
        return cast(Fetch, called)

    return decorate


def answers_pages(store: BaseLogStore) -> bool:
    """Return whether a log store returns pages: with this release of ZenML, others than a composite may not."""
    fetch = store.fetch
    return _returns_pages() or hasattr(fetch, "pages") or "start_time" not in inspect.signature(fetch).parameters


def fetch_page(store: BaseLogStore, logs: LogsResponse, **asked: Any) -> LogsEntriesResponse:
    """Return a page from any log store; from one that returns a list, the list as a page without cursors.

    Args:
        store: The log store.
        logs: The stream.
        asked: The other arguments of `fetch`, as in ZenML 0.97. A list begins at the oldest entry, whatever `start` is.

    Raises:
        ValueError: The log store supports neither cursors nor this filter.
    """
    if not answers_pages(store):
        from composite_logstore.zenml.older import page_of_list

        page: LogsEntriesResponse = page_of_list(store, logs, **asked)
        return page
    fetch = store.fetch
    pages = getattr(fetch, "pages", None)
    return fetch(logs, **asked) if pages is None else cast("LogsEntriesResponse", pages(store, logs, **asked))


def resolve_limit(store: BaseLogStore, limit: int | None) -> int:
    """Return the size of a log store's page for the limit that was asked for.

    Raises:
        ValueError: The limit is not positive.
    """
    if hasattr(store, "resolve_limit"):
        return store.resolve_limit(limit)
    from composite_logstore.zenml import LOGS_MAX_ENTRIES_PER_REQUEST as MOST

    if limit is None:
        return MOST
    if limit <= 0:
        raise ValueError("`limit` must be a positive integer.")
    return min(limit, MOST)


# Streams

_NO_PROJECT = UUID(int=0)


def create_logs(
    zen_store: BaseZenStore,
    id: UUID,
    run: PipelineRunResponse,
    step: StepRunResponse | None,
    source: str,
    place: dict[str, Any],
) -> LogsResponse:
    """Make a stream of a run or a step in ZenML, and return it.

    Args:
        zen_store: ZenML's store.
        id: The id of the stream.
        run: The run.
        step: Its step; None for a stream of the run.
        source: The name of the stream.
        place: The fields of ZenML's `LogsRequest` that say where the stream is stored.

    Raises:
        Exception: ZenML refuses, for example since the id exists.
    """
    from zenml.models import LogsRequest

    if hasattr(zen_store, "create_logs"):
        owner: dict[str, Any] = {"pipeline_run_id": run.id} if step is None else {"step_run_id": step.id}
        return zen_store.create_logs(LogsRequest(id=id, project=run.project_id, source=source, **owner, **place))
    from composite_logstore.zenml.older import add_logs

    add_logs(zen_store, LogsRequest(id=id, source=source, **place), run.id, step.id if step else None)
    return zen_store.get_logs(id)


def make_logs(
    id: UUID,
    source: str,
    created: datetime,
    *,
    project_id: UUID = _NO_PROJECT,
    log_store_id: UUID | None = None,
    artifact_store_id: UUID | None = None,
    uri: str | None = None,
) -> LogsResponse:
    """Return the description of a stream that ZenML's server would give, without asking it.

    Args:
        id: The id of the stream.
        source: Its name.
        created: When it was created, in UTC without a zone.
        project_id: Its project.
        log_store_id: The log store that it is in.
        artifact_store_id: The artifact store that it is in.
        uri: Its path in the artifact store.
    """
    from zenml.models import LogsResponse
    from zenml.models.v2.core.logs import LogsResponseBody, LogsResponseMetadata

    body = LogsResponseBody(created=created, updated=created, project_id=project_id, source=source)
    metadata = None if _has_ids(body) else LogsResponseMetadata()
    logs = LogsResponse(id=id, body=body, metadata=metadata)
    return moved(logs, log_store_id=log_store_id, artifact_store_id=artifact_store_id, uri=uri)


def moved(logs: LogsResponse, **place: Any) -> LogsResponse:
    """Return a stream as if it were stored elsewhere.

    Args:
        logs: The stream. It is not changed.
        place: `log_store_id`, `artifact_store_id` or `uri`, with the new values.
    """
    body = logs.get_body()
    if _has_ids(body):
        return logs.model_copy(update={"body": body.model_copy(update=place)})
    metadata = logs.get_metadata()
    ids = {name: place.pop(name) for name in list(place) if name in type(metadata).model_fields}
    return logs.model_copy(
        update={"body": body.model_copy(update=place), "metadata": metadata.model_copy(update=ids)},
    )


def _has_ids(body: Any) -> bool:
    return "log_store_id" in type(body).model_fields


def hook_of(logs: LogsResponse) -> UUID | None:
    """Return the id of the hook's invocation that a stream belongs to; None if it is not the stream of a hook."""
    return getattr(logs, "hook_invocation_id", None)


def run_attributes(run: PipelineRunResponse) -> dict[str, Any]:
    """Return the attributes that ZenML gives the streams of a run."""
    from zenml.utils.logging_utils import get_run_log_metadata

    return named(get_run_log_metadata(run))


def step_attributes(step: StepRunResponse, run: PipelineRunResponse) -> dict[str, Any]:
    """Return the attributes that ZenML gives the streams of a step, besides those of its run."""
    from zenml.utils.logging_utils import get_step_log_metadata

    if "pipeline_run" not in inspect.signature(get_step_log_metadata).parameters:
        return get_step_log_metadata(step)
    found = cast(Callable[..., dict[str, Any]], get_step_log_metadata)(step, run)
    return named({name: value for name, value in found.items() if name.startswith("step.")})


def named(attributes: dict[str, Any]) -> dict[str, Any]:
    """Return a stream's attributes with the names of newer releases, besides those that ZenML's own log stores use."""
    if "pipeline.run.id" not in attributes and "step.run.id" not in attributes:
        return attributes
    return attributes | {f"zenml.{name}": value for name, value in attributes.items() if "." in name}


# Writing

Dispatch = Callable[..., None]


def wrap_dispatch(wrap: Callable[[Dispatch], Dispatch]) -> None:
    """Replace the function through which ZenML hands each record to the active logging context.

    Args:
        wrap: Returns the new function for the old one, which is called with a record and its metadata or None.
    """
    from zenml.utils.logging_utils import LoggingContext

    name = "dispatch" if hasattr(LoggingContext, "dispatch") else "emit"
    old = getattr(LoggingContext, name)
    new = wrap(old if "metadata" in inspect.signature(old).parameters else lambda record, _: old(record))
    if new is not old:
        setattr(LoggingContext, name, staticmethod(new))


SecretValues = Callable[[Any], dict[str, str]]


def wrap_secret_values(wrap: Callable[[SecretValues], SecretValues]) -> None:
    """Replace the property through which ZenML itself, and steps, get the values of a secret.

    Args:
        wrap: Returns the new function for the old one, which is called with a `SecretResponse`.
    """
    from zenml.models import SecretResponse

    response: Any = SecretResponse
    response.secret_values = property(wrap(response.secret_values.fget))
