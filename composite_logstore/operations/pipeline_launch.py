"""A backfill as a ZenML pipeline: started on the active stack, watched to its end, and added up."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from types import FrameType
from typing import TYPE_CHECKING, Any

from composite_logstore.catalog.stores import NoAnswer, RegisteredStore, asking_zenml, find_run, mistake
from composite_logstore.cli.console import warn
from composite_logstore.config import ChildConfig
from composite_logstore.operations.selection import Selection

if TYPE_CHECKING:
    from zenml.models import PipelineRunResponse

    from composite_logstore.operations.backfill import Totals

SLICES = 10
"""As many steps as ZenML runs at once in one process."""

_POLL_SECONDS = 5.0


def copy_as_pipeline(
    registered: RegisteredStore,
    source: ChildConfig,
    target: ChildConfig,
    selection: Selection,
    how: tuple[int | None, float | None, bool],
    totals: Totals,
) -> str:
    """Run the pipeline, and wait for its end.

    Args:
        registered: The log store.
        source: The child to copy from.
        target: The child to copy to.
        selection: Which streams are meant.
        how: The number of slices, the most events in a second, and whether to forget what earlier pipelines sent.
        totals: What becomes of the streams is added to it.

    Returns:
        Why it was stopped, empty if it was not.

    Raises:
        click.BadParameter: The active stack cannot run it.
        NoAnswer: ZenML cannot be asked, the pipeline could not be started, or another one copies to the child.
    """
    from composite_logstore.log_store import pinned
    from composite_logstore.operations import backfill_pipeline

    slices, rate, anew = how
    with asking_zenml():
        from zenml.client import Client
        from zenml.config import DockerSettings

        stack = Client().active_stack
    if not stack.orchestrator.supports_dynamic_pipelines:
        raise mistake(
            "--pipeline",
            f"orchestrator '{stack.orchestrator.name}' of the active stack '{stack.name}' cannot run it, since it is a "
            f"dynamic pipeline; set another stack, or leave '--pipeline' out",
        )
    values: dict[str, Any] = {
        "store": str(registered.store.id),
        "source": source.name,
        "target": target.name,
        "run": str(find_run(selection.run, "--run").id) if selection.run else None,
        "since": selection.since.isoformat() if selection.since else None,
        "until": selection.until.isoformat() if selection.until else None,
        "slices": slices or SLICES,
        "rate": rate,
        "anew": anew,
    }
    settings: dict[str, Any] = {}
    if stack.orchestrator.flavor != "local":
        # Its steps are in an installed package: nothing of the folder that this was called in has to go along.
        settings["docker"] = DockerSettings(
            requirements=sorted(registered.store.requirements | pinned(source.requirements | target.requirements)),
            allow_including_files_in_images=False,
            allow_download_from_code_repository=False,
            allow_download_from_artifact_store=False,
        )
    name = f"backfill-{registered.name}-{target.name}-{datetime.now(timezone.utc):%Y%m%d-%H%M%S-%f}"
    failure = ""
    was_interrupted = False
    with _interruptible(backfill_pipeline.interrupted), _stdout_to_stderr(), _as_installed():
        try:
            warn(f"Runs as pipeline run '{name}' on stack '{stack.name}'.")
            backfill_pipeline.backfill_pipeline.with_options(run_name=name, settings=settings)(**values)
            run = _wait(name)
        except KeyboardInterrupt:
            was_interrupted = True
            run = _find(name)
        except Exception as error:
            # Its words may hold what is in a URL. ZenML has printed them.
            failure = type(error).__name__
            run = _find(name)
    if run is None:
        if was_interrupted:
            return "Interrupted"
        raise NoAnswer(f"the pipeline could not be started ({failure}); what ZenML printed says more.")
    return _gather(run, totals, was_interrupted)


def refuse_second(registered: RegisteredStore, target: ChildConfig) -> None:
    """Refuse if such a pipeline copies to the child already.

    Copies in a process of this machine are known by the ledger's lock. A pipeline that was killed stays in progress
    for ZenML, so nothing is concluded from those that run in the process that started them.

    Raises:
        NoAnswer: One does.
    """
    from composite_logstore.operations.backfill_pipeline import PIPELINE

    with asking_zenml():
        from zenml.client import Client
        from zenml.enums import StackComponentType
        from zenml.utils.pagination_utils import depaginate

        try:
            pipeline = Client().get_pipeline(PIPELINE)
        except KeyError:
            return
        runs = depaginate(Client().list_pipeline_runs, pipeline_id=pipeline.id, in_progress=True, hydrate=True)
    for run in runs:
        orchestrators = run.stack.components.get(StackComponentType.ORCHESTRATOR) if run.stack else None
        is_here = orchestrators is not None and orchestrators[0].flavor_name == "local"
        values = run.config.parameters or {}
        is_same = values.get("store") == str(registered.store.id) and values.get("target") == target.name
        if is_same and not is_here:
            raise NoAnswer(
                f"pipeline run '{run.name}' copies to child '{target.name}' already; wait for it, or stop it with "
                f"`zenml pipeline runs stop {run.id}`."
            )


def _find(name: str) -> PipelineRunResponse | None:
    with asking_zenml():
        from zenml.client import Client

        try:
            return Client().get_pipeline_run(name, allow_name_prefix_match=False)
        except KeyError:
            return None


def _wait(name: str) -> PipelineRunResponse | None:
    """Wait for the end of a run: not every orchestrator does."""
    while (run := _find(name)) is not None and not run.status.is_finished:
        time.sleep(_POLL_SECONDS)
    return run


def _gather(run: PipelineRunResponse, totals: Totals, was_interrupted: bool) -> str:
    """Add up what the slices have done, and return why they did not do all."""
    from composite_logstore.operations.backfill import Totals
    from composite_logstore.operations.backfill_pipeline import RESULT

    with asking_zenml():
        from zenml.client import Client
        from zenml.utils.pagination_utils import depaginate

        steps = depaginate(Client().list_run_steps, pipeline_run_id=run.id, exclude_retried=True, hydrate=True)
    slices, done, why = 0, 0, ""
    for step in steps:
        told: Any = step.run_metadata.get(RESULT) or {}
        slices = max(slices, told.get("slices", 0))
        if "copied" in told:
            totals.add(Totals(**{name: told[name] for name in Totals().as_dict()}))
        if step.status.is_successful:
            done += "copied" in told
        else:
            why = why or told.get("stopped") or f"step '{step.name}' has ended as '{step.status.value}'"
    if not run.status.is_finished:
        return (
            f"No longer watched, but pipeline run '{run.name}' goes on; wait for its end, or stop it with "
            f"`zenml pipeline runs stop {run.id}`"
        )
    if slices and done == slices:
        return ""
    if was_interrupted:
        return "Interrupted"
    if not slices:
        return f"Stopped: {why or 'no slice has begun'}"
    return f"Stopped: {slices - done:,} of {slices:,} slices have not come to their end: {why or 'they never began'}"


@contextmanager
def _interruptible(interrupted: threading.Event) -> Iterator[None]:
    """Have a Ctrl-C end the slices that run in threads of this process, too."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        interrupted.set()
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        interrupted.clear()


@contextmanager
def _as_installed() -> Iterator[None]:
    """Have ZenML take the pipeline for a module of a package, not for a file in the folder of the main program."""
    from zenml.constants import ENV_ZENML_CUSTOM_SOURCE_ROOT
    from zenml.utils import source_utils

    with tempfile.TemporaryDirectory() as empty:
        source_utils.set_custom_source_root(empty)
        try:
            yield
        finally:
            source_utils.set_custom_source_root(os.getenv(ENV_ZENML_CUSTOM_SOURCE_ROOT))


@contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Keep what ZenML prints while a pipeline runs out of the command's own output."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)
