"""A ZenML whose stacks move to other log stores with `migrate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.commands import Commands, Done
from tests.servers.datadog import API_KEY, APPLICATION_KEY, Datadog
from tests.servers.zenml_server import ZenML

ROOT = Path(__file__).parents[1]

FIT = """
import logging
from zenml import pipeline, step

logger = logging.getLogger("train")

@step(enable_cache=False)
def train() -> None:
    for epoch in range(5):
        logger.warning("epoch %s", epoch)

@pipeline
def fit() -> None:
    train()
"""

BEGIN = """
from importlib import import_module

# Events arrive soon here.
import_module("composite_logstore.operations.migrate").ARRIVAL_SECONDS = 4


def run(stack, name):
    from fit import fit
    from zenml.stack import stack as stacks
    # As in a process of its own.
    stacks._STACK_CACHE.clear()
    client.activate_stack(stack)
    fit.with_options(run_name=name)()


def make_stack(name, log_store=None):
    parts = {Type.ORCHESTRATOR: "default", Type.ARTIFACT_STORE: "default"}
    client.create_stack(name, {**parts, **({Type.LOG_STORE: log_store} if log_store else {})})
"""


class House(Commands):
    """A ZenML with an artifact store `disk` to move to.

    Attributes:
        disk: Where that is.
    """

    def __init__(self, zenml: ZenML) -> None:
        zenml.env["PYTHONPATH"] = f"{ROOT}:{ROOT / 'backends'}"
        super().__init__(zenml)
        self.disk = zenml.directory / "disk"
        (zenml.directory / "fit.py").write_text(FIT)
        self.do(BEGIN)
        self.do(f"client.create_stack_component('disk', 'local', Type.ARTIFACT_STORE, {{'path': '{self.disk}'}})")

    def migrate(self, *arguments: str, input: str = "") -> Done:
        """Run the command."""
        return self.command("migrate", *arguments, input=input)

    def move(self, stack: str, *arguments: str, to: Any = "disk", code: int = 0) -> dict[str, Any]:
        """Run the command without questions, and return the JSON that it prints."""
        to = to if isinstance(to, str) else json.dumps(to)
        done = self.migrate(stack, "--to", to, *arguments, "--yes", "--output", "json")
        assert done.returncode == code, done
        return dict(json.loads(done.stdout))

    def messages(self, run: str, *options: str) -> list[str]:
        """Return the messages that `logs` shows of a run's step."""
        done = self.command("logs", run, "--source", "step", "--search", "epoch", "--output", "json", *options)
        return [json.loads(line)["message"] for line in done.stdout.splitlines()]

    def archived(self, run: str) -> Path:
        """Return the file in `disk` with the logs of a run's step."""
        done = self.command("logs", run, "--source", "step", "--output", "json")
        return self.disk / "logs" / (json.loads(done.stdout.splitlines()[0])["logs_id"] + ".log")

    def make_datadog_store(self, name: str, datadog: Datadog) -> None:
        """Register ZenML's own log store for Datadog."""
        # It can only search a real site.
        self.do(
            "from zenml.log_stores.datadog import datadog_log_store; import requests; post = requests.post\n"
            "datadog_log_store.requests.post = lambda url, **settings: post(url.replace("
            f"'https://api.datadoghq.com', {datadog.url!r}), **settings)"
        )
        settings = {"endpoint": datadog.settings["endpoint"], "api_key": API_KEY, "application_key": APPLICATION_KEY}
        self.do(f"client.create_stack_component({name!r}, 'datadog', Type.LOG_STORE, {settings!r})")


def names(found: dict[str, Any]) -> list[str]:
    """Return the stages that a move has done."""
    return [one["stage"] for one in found["done"]]
