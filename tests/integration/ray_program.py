"""A pipeline whose steps let Ray work: tasks and actors that join, and workers that join by way of a hook of Ray's.

    ray_program.py REPORT

It writes into the report, as JSON, what the archive has of each step, and which process was which.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

import ray
from zenml import pipeline, step
from zenml.client import Client
from zenml.enums import StackComponentType

import composite_logstore
from tests.integration.joining_program import archived
from tests.patience import PATIENCE_SECONDS

RANKS = 2
ATTEMPTS = 5

report: dict[str, Any] = {}
actors: list[Any] = []


def start_ray(**options: Any) -> None:
    """Start Ray, which gives its own processes 30 s for that, however busy the machine is."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, **options)
            return
        except Exception:
            ray.shutdown()
            if attempt == ATTEMPTS:
                raise


def say(what: str) -> int:
    print("printed", end=" ")
    print(what)
    print("on stderr", what, file=sys.stderr)
    logging.getLogger("worker").warning("logged %s", what)
    return os.getpid()


@ray.remote
def task() -> int:
    composite_logstore.join()
    return say("in a task")


@ray.remote
def unaware() -> int:
    return say("by way of the hook")


@ray.remote
class Actor:
    def __init__(self, rank: int) -> None:
        # As Ray Train does.
        os.environ["RANK"] = str(rank)
        composite_logstore.join()

    def work(self, what: str) -> int:
        return say(what)


@step(enable_cache=False)
def first() -> None:
    start_ray()
    actors.extend(Actor.remote(rank) for rank in range(RANKS))
    report["actors"] = ray.get([actor.work.remote("one") for actor in actors])
    report["task"] = ray.get(task.remote())


@step(enable_cache=False)
def second() -> None:
    # The actors have outlived the first step.
    report["actors again"] = ray.get([actor.work.remote("two") for actor in actors])
    ray.shutdown()


@step(enable_cache=False)
def third() -> None:
    start_ray(runtime_env={"worker_process_setup_hook": "composite_logstore.join"})
    report["hooked"] = ray.get(unaware.remote())
    ray.shutdown()


@pipeline(enable_cache=False)
def training() -> None:
    first()
    second(after=["first"])
    third(after=["second"])


def main() -> None:
    client = Client()
    client.create_flavor("composite_logstore.CompositeLogStoreFlavor", StackComponentType.LOG_STORE)
    settings = {"primary": "archive", "children": [{"name": "archive", "type": "artifact"}]}
    client.create_stack_component("logs", "composite", StackComponentType.LOG_STORE, settings)
    components: dict[StackComponentType, Any] = {
        StackComponentType.ORCHESTRATOR: "default",
        StackComponentType.ARTIFACT_STORE: "default",
        StackComponentType.LOG_STORE: "logs",
    }
    client.create_stack("logging", components)
    client.activate_stack("logging")
    run = training()
    assert run is not None
    folder = Path(client.active_stack.artifact_store.path, "logs")
    end = time.monotonic() + PATIENCE_SECONDS
    # The step's process delivers what Ray's workers have left, which Ray has killed.
    while time.monotonic() < end:
        report["steps"] = archived(client, run.id, folder)
        messages = [entry["message"] for found in report["steps"].values() for entry in found["entries"]]
        if sum(message.startswith("logged") for message in messages) == 2 * RANKS + 2:
            break
        time.sleep(0.2)
    Path(sys.argv[1]).write_text(json.dumps(report))


if __name__ == "__main__":
    main()
