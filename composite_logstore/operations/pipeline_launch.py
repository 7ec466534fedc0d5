"""Launches a backfill as a ZenML pipeline on the active stack, waits for its end, and adds up its slices."""

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

from composite_logstore.catalog.errors import ArgumentError, NoAnswerError, asking_zenml
from composite_logstore.catalog.runs import find_run
from composite_logstore.catalog.stores import RegisteredStore
from composite_logstore.child_config import ChildConfig
from composite_logstore.names import counted
from composite_logstore.operations.copying import Totals
from composite_logstore.operations.progress import Reporter
from composite_logstore.operations.selection import Selection
from composite_logstore.parity.result import BackfillStoppedError

if TYPE_CHECKING:
    from zenml.models import PipelineRunResponse
    from zenml.stack import Stack

SLICES = 10
"""As many steps as ZenML runs at once in one process."""

MOST_SLICES = 1000

_POLL_SECONDS = 5.0


def copy_as_pipeline(
    registered: RegisteredStore,
    source: ChildConfig,
    target: ChildConfig,
    selection: Selection,
    totals: Totals,
    report: Reporter,
    *,
    slices: int | None = None,
    rate: float | None = None,
    anew: bool = False,
) -> None:
    """Run the pipeline, and wait for its end.

    Args:
        registered: The log store.
        source: The child to copy from.
        target: The child to copy to.
        selection: The streams to copy.
        totals: Where to add up the results of the slices.
        report: Is told the name of the pipeline run.
        slices: The most slices, `SLICES` if not given.
        rate: The most events per second, all slices together.
        anew: Whether to forget what earlier pipelines have sent.

    Raises:
        ArgumentError: The active stack cannot run the pipeline.
        NoAnswerError: ZenML cannot be reached, or the pipeline did not start.
        BackfillStoppedError: Not all slices have succeeded.
        KeyboardInterrupt: It was interrupted, and no slice is still running.
    """
    from zenml.config import DockerSettings

    from composite_logstore.log_store import pinned
    from composite_logstore.operations import backfill_pipeline

    stack = suitable_stack()
    values: dict[str, Any] = {
        "store": str(registered.id),
        "source": source.name,
        "target": target.name,
        "run": str(find_run(selection.run).id) if selection.run else None,
        "since": selection.since.isoformat() if selection.since else None,
        "until": selection.until.isoformat() if selection.until else None,
        "slices": slices or SLICES,
        "rate": rate,
        "anew": anew,
    }
    settings: dict[str, Any] = {}
    if stack.orchestrator.flavor != "local":
        # The steps are in an installed package, so the images need no files of the current folder.
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
            report.notice(f"Running as pipeline run '{name}' on stack '{stack.name}'.")
            backfill_pipeline.backfill_pipeline.with_options(run_name=name, settings=settings)(**values)
            run = _wait(name)
        except KeyboardInterrupt:
            was_interrupted = True
            run = _find(name)
        except Exception as error:
            # Only the error's class: its message may contain a URL with a secret. ZenML has printed the message.
            failure = type(error).__name__
            run = _find(name)
    if run is None:
        if was_interrupted:
            raise KeyboardInterrupt
        raise NoAnswerError(f"the pipeline did not start ({failure}); see ZenML's output above.")
    _gather(run, totals, was_interrupted)


def suitable_stack() -> Stack:
    """Return the active stack, if it can run the pipeline.

    Raises:
        ArgumentError: It cannot.
        NoAnswerError: ZenML cannot be reached.
    """
    with asking_zenml():
        from zenml.client import Client

        stack = Client().active_stack
    if not stack.orchestrator.supports_dynamic_pipelines:
        raise ArgumentError(
            "pipeline",
            f"orchestrator '{stack.orchestrator.name}' of the active stack '{stack.name}' cannot run dynamic "
            f"pipelines; set another stack, or copy without a pipeline",
        )
    return stack


def refuse_second(registered: RegisteredStore, target: ChildConfig) -> None:
    """Refuse to copy if such a pipeline already copies to the child.

    Backfills on this machine are kept apart by the ledger's lock. ZenML shows a pipeline that was killed as in
    progress forever, so pipelines with a local orchestrator, which run in the process that started them, do not count.

    Raises:
        NoAnswerError: A pipeline copies to the child, or ZenML cannot be reached.
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
        is_same = values.get("store") == str(registered.id) and values.get("target") == target.name
        if is_same and not is_here:
            raise NoAnswerError(
                f"pipeline run '{run.name}' already copies to child '{target.name}'; wait for it, or stop it with "
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
    """Wait for the end of a run, since not every orchestrator does."""
    while (run := _find(name)) is not None and not run.status.is_finished:
        time.sleep(_POLL_SECONDS)
    return run


def _gather(run: PipelineRunResponse, totals: Totals, was_interrupted: bool) -> None:
    """Add up the results of the slices.

    Raises:
        BackfillStoppedError: Not all slices have succeeded.
        KeyboardInterrupt: The same, because of an interrupt.
    """
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
            why = why or told.get("stopped") or f"step '{step.name}' ended with status '{step.status.value}'"
    if not run.status.is_finished:
        raise BackfillStoppedError(
            f"pipeline run '{run.name}' continues unwatched; wait for its end, or stop it with "
            f"`zenml pipeline runs stop {run.id}`"
        )
    if slices and done == slices:
        return
    if was_interrupted:
        raise KeyboardInterrupt
    if not slices:
        raise BackfillStoppedError(why or "no slice has begun")
    raise BackfillStoppedError(
        f"{slices - done:,} of {counted(slices, 'slice')} did not finish: {why or 'they never began'}"
    )


@contextmanager
def _interruptible(interrupted: threading.Event) -> Iterator[None]:
    """Let Ctrl-C also end the slices that run in threads of this process."""
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
    """Let ZenML see the pipeline as a module of a package, not as a file in the folder of the main program."""
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
    """Send ZenML's output while a pipeline runs to stderr, since stdout is for the command's own output."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)
