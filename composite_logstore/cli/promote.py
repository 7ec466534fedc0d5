"""`composite-logstore promote`."""

from __future__ import annotations

from functools import partial
from typing import Any

import click

from composite_logstore import operations
from composite_logstore.cli.console import Command, output_option, say, say_json
from composite_logstore.cli.progress import Bars
from composite_logstore.operations.promote import Promotion, PromotionRefusedError


@click.command(cls=Command)
@click.argument("store")
@click.argument("child")
@click.option("--force", is_flag=True, help="Do not compare CHILD with the primary first.")
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@output_option
def promote(store: str, child: str, force: bool, yes: bool, output: str) -> None:
    """Make a child the primary, from which logs are read.

    Refuses if CHILD does not hold all events that the primary holds, unless you force it. Nothing else changes: every
    child keeps receiving its events, also from runs in progress. Prints the command that goes back.

    Exit code: 0 if CHILD is the primary, 1 if it was refused or you answered no, 2 for wrong usage, 3 if ZenML cannot
    be reached.
    """
    try:
        with Bars("verify") as bars:
            confirm = None if yes else partial(bars.ask, abort=True)
            result = operations.promote(store, child, force=force, confirm=confirm, progress=bars.show)
    except PromotionRefusedError as error:
        if output == "json":
            say_json(_as_json(error.promotion))
        raise operations.OperationError(f"{error.message}: add '--force'.") from None
    if output == "json":
        say_json(_as_json(result))
    elif result.primary == result.before:
        say(f"Child '{result.primary}' is already the primary of log store '{result.store.name}'.")
    else:
        if result.verdict is not None:
            say(f"Verified: {result.verdict.reason}.")
        say(f"Child '{child}' is now the primary of log store '{result.store.name}'; it was '{result.before}'.")
        say(f"To go back: {_way_back(result)}")


def _way_back(result: Promotion) -> str:
    return f"composite-logstore promote {result.store.name} {result.before} --force"


def _as_json(result: Promotion) -> dict[str, Any]:
    return {
        "log_store": {"id": str(result.store.id), "name": result.store.name},
        "primary": result.primary,
        "before": result.before,
        "verdict": result.verdict._asdict() if result.verdict else None,
        "to_go_back": _way_back(result) if result.primary != result.before else None,
    }
