"""Runs and their log streams, as ZenML has registered them."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from typing import TYPE_CHECKING, Any
from uuid import UUID

from composite_logstore.catalog.errors import ArgumentError, asking_zenml
from composite_logstore.names import did_you_mean

if TYPE_CHECKING:
    from zenml.models import LogsResponse, PipelineRunResponse, StepRunResponse

_RUNS_PER_PAGE = 50
_STEPS_PER_PAGE = 100


@dataclass(frozen=True)
class RunStream:
    """A log stream, and the run or step that it belongs to.

    Attributes:
        logs: The stream, as ZenML knows it.
        run_id: The run's id.
        run_name: The run's name.
        step_name: The step's name, empty for a stream of the run itself.
        run_in_progress: Whether the run was in progress when ZenML was asked.
        in_progress: Whether the step, or the run if the stream is the run's own, was in progress then.
    """

    logs: LogsResponse
    run_id: UUID
    run_name: str
    step_name: str = ""
    run_in_progress: bool = False
    in_progress: bool = False

    @property
    def label(self) -> str:
        """The stream's name within its run: `trainer/step`, `client`."""
        return f"{self.step_name}/{self.logs.source}" if self.step_name else self.logs.source

    @property
    def collector(self) -> UUID | None:
        """The id of the log store that collected the stream; ZenML's own log store goes by its artifact store's id."""
        return self.logs.log_store_id or self.logs.artifact_store_id


def find_run(name_or_id: str) -> PipelineRunResponse:
    """Return a run by its name or id; a name is looked up in the active project.

    Raises:
        ArgumentError: There is no such run, or more than one.
        NoAnswerError: ZenML cannot be reached.
    """
    from zenml.exceptions import ZenKeyError

    with asking_zenml():
        from zenml.client import Client

        try:
            return Client().get_pipeline_run(name_or_id, allow_name_prefix_match=False)
        except ZenKeyError:
            raise ArgumentError("run", f"there is more than one run '{name_or_id}'; give the run's id") from None
        except (KeyError, ValueError):
            page = Client().list_pipeline_runs(size=_RUNS_PER_PAGE)
            hint = did_you_mean(name_or_id, [run.name for run in page.items])
            hint = hint or "; `zenml pipeline runs list` shows all runs"
            raise ArgumentError("run", f"there is no run '{name_or_id}'{hint}") from None


def streams_of_run(run: PipelineRunResponse, step: str | None = None, source: str | None = None) -> Iterator[RunStream]:
    """Yield the streams of a run: its own, then those of its steps in the order in which these began, retries included.

    Args:
        run: The run.
        step: Only streams of steps with this name.
        source: Only streams with this source.

    Raises:
        NoAnswerError: ZenML cannot be reached.
    """
    for stream in _streams_of_runs([run], step):
        if source in (None, stream.logs.source):
            yield stream


def streams_of_project(
    since: datetime | None = None, until: datetime | None = None, stack_id: UUID | None = None
) -> Iterator[RunStream]:
    """Yield the streams of the active project's runs, oldest runs first.

    There may be thousands of runs: only one page of ZenML's answer is held at a time. Within a page the runs' own
    streams come before those of their steps. Runs that begin meanwhile come last.

    Args:
        since: Only runs still active at or after this time.
        until: Only runs that began at or before this time.
        stack_id: Only runs on this stack.

    Raises:
        NoAnswerError: ZenML cannot be reached.
    """
    for runs in _pages_of_runs(_filters(since, until, stack_id)):
        yield from _streams_of_runs(runs)


def runs_of_project(since: datetime | None = None, until: datetime | None = None) -> Iterator[PipelineRunResponse]:
    """Yield the runs whose streams `streams_of_project` yields.

    Raises:
        NoAnswerError: ZenML cannot be reached.
    """
    for runs in _pages_of_runs(_filters(since, until, None)):
        yield from runs


def count_runs(since: datetime | None = None, until: datetime | None = None, stack_id: UUID | None = None) -> int:
    """Return how many runs `streams_of_project` goes through at present, for a progress bar.

    Raises:
        NoAnswerError: ZenML cannot be reached.
    """
    with asking_zenml():
        from zenml.client import Client

        filters = _filters(since, until, stack_id)
        return sum(int(Client().list_pipeline_runs(size=1, **wanted).total) for wanted in filters)


def _filters(since: datetime | None, until: datetime | None, stack_id: UUID | None) -> list[dict[str, Any]]:
    """Return the filters to ask ZenML with, one after the other.

    ZenML updates a run when it ends, so a run that was active at `since` was updated after it or is still in progress.
    The runs in progress come first, so that a run which ends meanwhile is found twice rather than never.
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

    # ZenML's times are UTC without a zone.
    return time.astimezone(timezone.utc).strftime(FILTERING_DATETIME_FORMAT)


def _pages_of_runs(filters: list[dict[str, Any]]) -> Iterator[list[PipelineRunResponse]]:
    from zenml.client import Client

    in_progress: set[UUID] = set()
    for wanted in filters:
        number, last = 1, 1
        while number <= last:
            with asking_zenml():
                # Oldest first, so that runs which begin meanwhile do not shift the pages.
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
    """Yield the steps of runs that all belong to one project."""
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
        # Otherwise ZenML is asked once more for each step, for the run that it belongs to.
        hydrate=True,
    )
    number, last = 1, 1
    while number <= last:
        with asking_zenml():
            page = ask(page=number)
        yield from page.items
        number, last = number + 1, page.total_pages
