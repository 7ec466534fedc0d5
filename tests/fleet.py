"""A fleet of runs as ZenML has them after they ran: made with its own client, database and logging contexts.

    python -m tests.fleet SETTINGS

makes them in ZenML's active configuration. SETTINGS is JSON: `children` and `primary` of the log store `logs`, `stores`
(a name → the flavor and settings of another artifact store), and `runs`: a list of lists of a stack (`stock` or `s`),
the run's name, its age in seconds, and the messages of its step. What a run logs goes through ZenML's handlers to the
log store of its stack. A run of age 0 stays in progress.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from contextlib import ExitStack
from datetime import timedelta
from typing import Any
from unittest import mock

from zenml import pipeline, step
from zenml.client import Client
from zenml.enums import ExecutionStatus, StackComponentType
from zenml.models import PipelineRunRequest, PipelineRunUpdate, StepRunRequest, StepRunUpdate
from zenml.utils.logging_utils import setup_logging_context
from zenml.utils.time_utils import utc_now

logger = logging.getLogger("train")


@step(enable_cache=False, enable_step_logs=False)
def train() -> None:
    pass


@pipeline(enable_pipeline_logs=False)
def fit() -> None:
    train()


def register(settings: dict[str, Any]) -> None:
    """Make the log store `logs`, the stack `s` that has it, and the stack `stock` that has ZenML's own."""
    kinds = StackComponentType
    client = Client()
    for name, (flavor, config) in settings["stores"].items():
        client.create_stack_component(name, flavor, kinds.ARTIFACT_STORE, config)
    client.create_flavor("composite_logstore.CompositeLogStoreFlavor", kinds.LOG_STORE)
    config = {"primary": settings["primary"], "children": settings["children"]}
    client.create_stack_component("logs", "composite", kinds.LOG_STORE, config)
    parts = {kinds.ORCHESTRATOR: "default", kinds.ARTIFACT_STORE: "default"}
    client.create_stack("stock", parts)
    client.create_stack("s", {**parts, kinds.LOG_STORE: "logs"})


def log(message: str, seconds_ago: float, number: int) -> None:
    record = logger.makeRecord(logger.name, logging.INFO, __file__, number, message, (), None)
    record.created = time.time() - seconds_ago + number * 0.001
    logger.handle(record)


def make_runs(stack: str, runs: list[tuple[str, float, list[str]]]) -> None:
    """Make runs of a stack. One is really run: the others are of its snapshot."""
    client = Client()
    client.activate_stack(stack)
    model = client.active_stack_model
    first = fit.with_options(run_name=f"first-{stack}")()
    assert first
    assert first.snapshot
    assert model.id
    with ExitStack() as open_until_the_end:
        for place, (name, age, messages) in enumerate(runs):
            began = utc_now() - timedelta(seconds=age)
            run, _ = client.zen_store.get_or_create_run(
                PipelineRunRequest(
                    project=client.active_project.id,
                    name=name,
                    snapshot=first.snapshot.id,
                    orchestrator_run_id=name,
                    start_time=began,
                    status=ExecutionStatus.RUNNING,
                )
            )
            if not place:
                # ZenML waits for the backends when the last stream ends.
                open_until_the_end.enter_context(setup_logging_context("client", pipeline_run=run))
            step_run = client.zen_store.create_run_step(
                StepRunRequest(
                    project=client.active_project.id,
                    name="train",
                    pipeline_run_id=run.id,
                    start_time=began,
                    status=ExecutionStatus.RUNNING,
                )
            )
            with setup_logging_context("step", pipeline_run=run, step_run=step_run):
                for number, message in enumerate(messages):
                    log(message, age, number)
            if age:
                end = utc_now()
                done = StepRunUpdate(status=ExecutionStatus.COMPLETED, end_time=end)
                client.zen_store.update_run_step(step_run.id, done)
                client.zen_store.update_run(run.id, PipelineRunUpdate(status=ExecutionStatus.COMPLETED, end_time=end))


if __name__ == "__main__":
    settings = json.loads(sys.argv[1])
    logger.setLevel(logging.INFO)
    register(settings)
    # What the runs say is not for the console.
    with mock.patch("zenml.logger.ZenMLConsoleHandler.emit"):
        for stack in ("stock", "s"):
            make_runs(stack, [tuple(run[1:]) for run in settings["runs"] if run[0] == stack])
