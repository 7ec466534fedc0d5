"""`composite-logstore collector-config`."""

from __future__ import annotations

import click

from composite_logstore import operations
from composite_logstore.cli.console import Command, is_quiet, say_json, say_yaml, warn


@click.command(
    "collector-config",
    cls=Command,
    examples=["collector-config logs > collector.yaml", "collector-config logs --log-store > logs.json"],
)
@click.argument("store")
@click.option(
    "--endpoint",
    metavar="URL",
    default="http://localhost:4318",
    show_default=True,
    help="Where log stores reach the Collector over HTTP.",
)
@click.option(
    "--log-store", is_flag=True, help="Print the settings of the log store that sends to the Collector instead."
)
def collector_config(store: str, endpoint: str, log_store: bool) -> None:
    """Configure a Collector that does the same centrally.

    With it the Collector does centrally what the children of STORE do: one pipeline for each, with a queue on disk and
    the child's limits, filters and retries. Secrets become references to environment variables, which the comments
    explain. The comments also say what the Collector does otherwise, and which children stay with the log store.

    Exit code: 0 if it was written, 1 if no child can move to the Collector, 2 for wrong usage, 3 if ZenML cannot be
    reached.
    """
    result = operations.collector_config(store, endpoint)
    if log_store:
        say_json(result.log_store, indent=2)
    else:
        say_yaml(result.to_yaml())
    if not is_quiet():
        for name, why in result.staying.items():
            warn(f"Child '{name}' stays with the log store: {why}.")
