"""`composite-logstore promote`."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import click

from composite_logstore import operations
from composite_logstore.cli.console import (
    NOTHING_CHANGED,
    Command,
    dry_run_option,
    output_option,
    say,
    say_json,
    yes_option,
)
from composite_logstore.names import command

if TYPE_CHECKING:
    from composite_logstore.operations import Promotion


@click.command(cls=Command, examples=["promote logs live --dry-run", "promote logs live"])
@click.argument("store")
@click.argument("child")
@click.option("--force", is_flag=True, help="Do not compare CHILD with the primary first.")
@dry_run_option
@yes_option
@output_option
def promote(store: str, child: str, force: bool, dry_run: bool, yes: bool, output: str) -> None:
    """Make a child the primary, from which logs are read.

    Refuses if CHILD does not hold all events that the primary holds, or if the primary cannot be read, unless you force
    it. Nothing else changes: every child keeps receiving its events, also from runs in progress. Prints the command
    that goes back.

    Exit code: 0 if CHILD is the primary, or would be after '--dry-run', 1 if it was refused or you answered no, 2 for
    wrong usage, 3 if ZenML cannot be reached.
    """
    from composite_logstore.cli.progress import Bars

    try:
        with Bars("verify") as bars:
            confirm = None if yes else partial(bars.ask, abort=True)
            result = operations.promote(store, child, force=force, dry_run=dry_run, confirm=confirm, progress=bars.show)
    except operations.PromotionRefusedError as error:
        if output == "json":
            say_json(_as_json(error.promotion))
        anyway = command("promote", store, child, "--force")
        raise operations.OperationError(f"{error.message}:\n{anyway}") from None
    if output == "json":
        say_json(_as_json(result))
    elif result.primary == result.before:
        say(f"Child '{result.primary}' is already the primary of log store '{result.store.name}'.")
    else:
        if result.verdict is not None:
            say(f"Verified: {result.verdict.reason}.")
        name = result.store.name
        if dry_run:
            say(f"Child '{child}' would become the primary of log store '{name}'; it is '{result.before}'.")
            say(NOTHING_CHANGED)
            return
        say(f"Child '{child}' is now the primary of log store '{name}'; it was '{result.before}'.")
        say(f"To go back: {_way_back(result)}", style="info")


def _way_back(result: Promotion) -> str:
    return command("promote", result.store.name, result.before, "--force")


def _as_json(result: Promotion) -> dict[str, Any]:
    return {
        "log_store": {"id": str(result.store.id), "name": result.store.name},
        "dry_run": result.dry_run,
        "primary": result.primary,
        "before": result.before,
        "verdict": result.verdict._asdict() if result.verdict else None,
        "to_go_back": _way_back(result) if result.primary != result.before else None,
    }
