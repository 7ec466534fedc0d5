"""What ZenML knows, for the commands: a log store, its children, and the log streams of runs."""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from typing import TYPE_CHECKING, Any, cast
from uuid import UUID

import click

from composite_logstore.cli.console import Failed
from composite_logstore.config import ChildConfig, CompositeLogStoreConfig
from composite_logstore.inert import paragraph

if TYPE_CHECKING:
    from zenml.models import ComponentResponse, LogsResponse, PipelineRunResponse, StepRunResponse

    from composite_logstore.log_store import CompositeLogStore
    from composite_logstore.parity.scan import Source

FLAVOR = "composite"

_RUNS_PER_PAGE = 50
_STEPS_PER_PAGE = 100


class NoAnswer(Failed):
    """There is no answer, neither a good nor a bad one: ZenML, or a backend, could not be asked."""

    exit_code = 3


def mistake(what: str, text: str) -> click.BadParameter:
    """Return the error of an argument or option that is wrong.

    Args:
        what: The argument or option, as it is called in the usage.
        text: What is wrong with it, and what would be right.
    """
    return click.BadParameter(paragraph(text), param_hint=f"'{what}'")


def nearest(name: str, known: Iterable[str]) -> str:
    """Return what to add to the words that there is no such name: the nearest one, or those that there are."""
    found = difflib.get_close_matches(name, sorted(known), n=1)
    return f" (did you mean '{found[0]}'?)" if found else f"; there are: {', '.join(sorted(known)) or 'none'}"


@contextmanager
def asking_zenml() -> Iterator[None]:
    """Say in words why ZenML cannot be asked.

    Raises:
        NoAnswer: It cannot.
    """
    from zenml.exceptions import AuthorizationException

    try:
        yield
    except click.ClickException:
        raise
    except AuthorizationException:
        raise NoAnswer("ZenML does not let you in here, or no longer: log in with `zenml login`.") from None
    except Exception as error:
        # No more than its name: its words may hold what is in a URL.
        raise NoAnswer(f"ZenML cannot be asked ({type(error).__name__}); `zenml status` says more.") from error


# Log stores


@dataclass(frozen=True)
class RegisteredStore:
    """A composite log store that is registered in ZenML.

    Attributes:
        store: The log store.
        model: What ZenML has registered.
    """

    store: CompositeLogStore
    model: ComponentResponse

    @property
    def name(self) -> str:
        """Its name."""
        return self.store.name

    @property
    def config(self) -> CompositeLogStoreConfig:
        """Its settings."""
        return self.store.config

    def child(self, name: str, what: str = "CHILD") -> ChildConfig:
        """Return the child of that name.

        Args:
            name: The name.
            what: The argument or option that has it, as it is called in the usage.

        Raises:
            click.BadParameter: There is none.
        """
        known = {child.name: child for child in self.config.children}
        if name not in known:
            raise mistake(what, f"log store '{self.name}' has no child '{name}'{nearest(name, known)}")
        return known[name]

    def reading_from(self, name: str) -> CompositeLogStore:
        """Return the log store as one that reads from this child alone, be it enabled or not."""
        children = [child.model_copy(update={"enabled": True}) for child in self.config.children if child.name == name]
        config = self.config.model_copy(update={"primary": name, "fetch_fallback": [], "children": children})
        store = self.store
        return type(store)(
            name=store.name,
            id=store.id,
            config=config,
            flavor=store.flavor,
            type=store.type,
            user=store.user,
            created=store.created,
            updated=store.updated,
        )


def find_store(name_or_id: str, what: str = "STORE") -> RegisteredStore:
    """Return the composite log store of that name or id in ZenML's active configuration.

    Args:
        name_or_id: Its name or id.
        what: The argument or option that has it, as it is called in the usage.

    Raises:
        click.BadParameter: There is none, or it is of another flavor.
        NoAnswer: ZenML cannot be asked, or the log store's settings cannot be read here.
    """
    with asking_zenml():
        from zenml.client import Client
        from zenml.enums import StackComponentType
        from zenml.utils.pagination_utils import depaginate

        models = depaginate(Client().list_stack_components, type=StackComponentType.LOG_STORE, hydrate=True)
        is_local = Client().zen_store.is_local_store()
    for model in models:
        if name_or_id in (model.name, str(model.id)):
            return load_store(model, what)
    known = [model.name for model in models if model.flavor_name == FLAVOR]
    where = " ZenML's active configuration is this machine's own; `zenml login` takes another." if is_local else ""
    raise mistake(what, f"there is no log store '{name_or_id}'{nearest(name_or_id, known)}.{where}")


def load_store(model: ComponentResponse, what: str = "STORE") -> RegisteredStore:
    """Return the composite log store that ZenML has registered so.

    Args:
        model: What ZenML has registered.
        what: The argument or option that names it, as it is called in the usage.

    Raises:
        click.BadParameter: It is of another flavor.
        NoAnswer: It cannot be loaded here.
    """
    if model.flavor_name != FLAVOR:
        raise mistake(what, f"log store '{model.name}' is of flavor '{model.flavor_name}'; name one of '{FLAVOR}'")
    from zenml.stack import StackComponent

    try:
        return RegisteredStore(cast("CompositeLogStore", StackComponent.from_model(model)), model)
    except ValueError as error:
        # Another version has written them.
        raise NoAnswer(f"the settings of log store '{model.name}' cannot be read here: {in_words(error)}") from None
    except Exception as error:
        raise NoAnswer(f"log store '{model.name}' cannot be loaded here ({type(error).__name__})") from error


def in_words(error: ValueError) -> str:
    """Return what is wrong with a log store's settings: the words name child, field and fix, and repeat no value."""
    from pydantic import ValidationError

    if not isinstance(error, ValidationError):
        return str(error)
    details = error.errors(include_url=False, include_input=False, include_context=False)
    return "; ".join(detail["msg"].removeprefix("Value error, ") for detail in details)


def open_child(child: ChildConfig) -> Source:
    """Return the child, to be read.

    Raises:
        NoAnswer: It cannot be opened.
    """
    from composite_logstore.backend import UnavailableError
    from composite_logstore.parity.scan import open_source

    try:
        return open_source(child)
    except (UnavailableError, ImportError) as error:
        raise NoAnswer(f"child '{child.name}' cannot be read: {error}") from error


# Runs and their streams


@dataclass(frozen=True)
class RunStream:
    """A log stream, and the run or step whose it is.

    Attributes:
        logs: The stream, as ZenML knows it.
        run_id: The run.
        run_name: Its name.
        step_name: The step's name, empty for a stream of the run itself.
        run_in_progress: Whether the run had not ended when ZenML was asked.
        in_progress: Whether the run or step whose it is had not ended then.
    """

    logs: LogsResponse
    run_id: UUID
    run_name: str
    step_name: str = ""
    run_in_progress: bool = False
    in_progress: bool = False

    @property
    def label(self) -> str:
        """What to call it within its run: `trainer/step`, `client`."""
        return f"{self.step_name}/{self.logs.source}" if self.step_name else self.logs.source


def find_run(name_or_id: str, what: str = "RUN") -> PipelineRunResponse:
    """Return the run of that name or id, in the active project if it is a name.

    Raises:
        click.BadParameter: There is none, or more than one.
        NoAnswer: ZenML cannot be asked.
    """
    from zenml.exceptions import ZenKeyError

    with asking_zenml():
        from zenml.client import Client

        try:
            return Client().get_pipeline_run(name_or_id, allow_name_prefix_match=False)
        except ZenKeyError:
            raise mistake(what, f"there is more than one run '{name_or_id}'; give the run's id") from None
        except (KeyError, ValueError):
            page = Client().list_pipeline_runs(size=_RUNS_PER_PAGE)
            close = difflib.get_close_matches(name_or_id, [run.name for run in page.items], n=1)
            hint = f" (did you mean '{close[0]}'?)" if close else "; `zenml pipeline runs list` shows what there is"
            raise mistake(what, f"there is no run '{name_or_id}'{hint}") from None


def streams_of_run(
    run: PipelineRunResponse, step: str | None = None, source: str | None = None, store_id: UUID | None = None
) -> Iterator[RunStream]:
    """Yield the streams of a run: its own, then its steps', retried ones too, in the order in which they began.

    Args:
        run: The run.
        step: Only those of the steps of this name.
        source: Only those with this source.
        store_id: Only those that this log store collected.

    Raises:
        NoAnswer: ZenML cannot be asked.
    """
    for stream in _streams_of_runs([run], step):
        if _is_wanted(stream.logs, source, store_id):
            yield stream


def streams_of_project(
    store_id: UUID | None = None,
    since: datetime | None = None,
    until: datetime | None = None,
    source: str | None = None,
    stack_id: UUID | None = None,
) -> Iterator[RunStream]:
    """Yield the streams of all runs of the active project, the oldest runs first, or of those within a range of time.

    It asks ZenML page by page and keeps one page: there may be thousands of runs. The streams of a page's runs come
    before those of their steps. Runs that begin meanwhile come at the end.

    Args:
        store_id: Only the streams that this log store collected.
        since: Only those of runs that had not ended by then.
        until: Only those of runs that had begun by then.
        source: Only those with this source.
        stack_id: Only those of runs on this stack.

    Raises:
        NoAnswer: ZenML cannot be asked.
    """
    for runs in _pages_of_runs(_filters(since, until, stack_id)):
        for stream in _streams_of_runs(runs):
            if _is_wanted(stream.logs, source, store_id):
                yield stream


def runs_of_project(since: datetime | None = None, until: datetime | None = None) -> Iterator[PipelineRunResponse]:
    """Yield the runs whose streams `streams_of_project` goes through.

    Raises:
        NoAnswer: ZenML cannot be asked.
    """
    for runs in _pages_of_runs(_filters(since, until, None)):
        yield from runs


def count_runs(since: datetime | None = None, until: datetime | None = None, stack_id: UUID | None = None) -> int:
    """Return how many runs `streams_of_project` goes through at present, for a progress bar.

    Raises:
        NoAnswer: ZenML cannot be asked.
    """
    with asking_zenml():
        from zenml.client import Client

        filters = _filters(since, until, stack_id)
        return sum(int(Client().list_pipeline_runs(size=1, **wanted).total) for wanted in filters)


def _is_wanted(logs: LogsResponse, source: str | None, store_id: UUID | None) -> bool:
    return source in (None, logs.source) and store_id in (None, logs.log_store_id)


def _filters(since: datetime | None, until: datetime | None, stack_id: UUID | None) -> list[dict[str, Any]]:
    """Return what to ask ZenML for, one after the other.

    A run is updated when it ends, so one that had not ended by `since` was updated after it, or is in progress still:
    those first, so that a run which ends meanwhile comes twice rather than never.
    """
    begun: dict[str, Any] = {"created": f"lte:{_second(until)}"} if until else {}
    if stack_id is not None:
        begun["stack_id"] = stack_id
    if since is None:
        return [begun]
    time = _second(since)
    return [{**begun, "updated": f"lt:{time}", "in_progress": True}, {**begun, "updated": f"gte:{time}"}]


def _second(time: datetime) -> str:
    from zenml.constants import FILTERING_DATETIME_FORMAT

    # ZenML has times of UTC, without saying so.
    return time.astimezone(timezone.utc).strftime(FILTERING_DATETIME_FORMAT)


def _pages_of_runs(filters: list[dict[str, Any]]) -> Iterator[list[PipelineRunResponse]]:
    from zenml.client import Client

    in_progress: set[UUID] = set()
    for wanted in filters:
        number, last = 1, 1
        while number <= last:
            with asking_zenml():
                # Oldest first: what begins meanwhile moves no page.
                page = Client().list_pipeline_runs(sort_by="asc:created", page=number, size=_RUNS_PER_PAGE, **wanted)
            yield [run for run in page.items if run.id not in in_progress]
            if "in_progress" in wanted:
                in_progress.update(run.id for run in page.items)
            number, last = number + 1, page.total_pages


def _streams_of_runs(runs: Collection[PipelineRunResponse], step: str | None = None) -> Iterator[RunStream]:
    if step is None:
        for run in runs:
            for logs in run.log_collection or []:
                yield RunStream(logs, run.id, run.name, run_in_progress=run.in_progress, in_progress=run.in_progress)
    by_id = {run.id: run for run in runs}
    for run_step in _steps_of(by_id, step):
        run = by_id[run_step.pipeline_run_id]
        for logs in run_step.log_collection or []:
            is_open = not run_step.status.is_finished
            yield RunStream(logs, run.id, run.name, run_step.name, run.in_progress, is_open)


def _steps_of(runs: dict[UUID, PipelineRunResponse], name: str | None) -> Iterator[StepRunResponse]:
    """Yield the steps of runs, all of one project."""
    from zenml.client import Client

    if not runs:
        return
    ask = partial(
        Client().list_run_steps,
        sort_by="asc:created",
        size=_STEPS_PER_PAGE,
        pipeline_run_id="oneof:" + json.dumps([str(id) for id in runs]),
        project=next(iter(runs.values())).project_id,
        name=f"equals:{name}" if name is not None else None,
        # Which run a step belongs to would otherwise be asked for each.
        hydrate=True,
    )
    number, last = 1, 1
    while number <= last:
        with asking_zenml():
            page = ask(page=number)
        yield from page.items
        number, last = number + 1, page.total_pages
