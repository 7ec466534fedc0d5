"""`composite-logstore check`."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from composite_logstore import operations
from composite_logstore.cli.console import Command, output_option, say, say_json, show_table, status

if TYPE_CHECKING:
    from composite_logstore.operations.check import Finding, StoreCheck


@click.command(cls=Command, examples=["check logs", "check logs --child live --output json", "check logs --fix"])
@click.argument("store")
@click.option(
    "--child", "children", metavar="NAME", multiple=True, help="Only this child, even if disabled. Can be repeated."
)
@click.option("--fix", is_flag=True, help="Create what is missing in a backend, such as an index template.")
@output_option
def check(store: str, children: tuple[str, ...], fix: bool, output: str) -> None:
    """Check that the children of a log store work.

    For each child: its settings and secrets, whether a test event can be written and read back, how far the backend's
    clock is off, and how long it took. The test events go to a stream of their own, which belongs to no run.

    Exit code: 0 if all children work, 1 if one does not, 2 for wrong usage, 3 if ZenML cannot be reached.
    """
    with status("Checking the children ..."):
        result = operations.check(store, children, fix)
    if output == "json":
        say_json(_as_json(result))
    else:
        _show(result)
    if not result.is_healthy:
        sys.exit(1)


def _as_json(result: StoreCheck) -> dict[str, Any]:
    config = result.store.config
    return {
        "log_store": {"id": str(result.store.id), "name": result.store.name, "primary": config.primary},
        "healthy": result.is_healthy,
        "spool": asdict(result.spool) if result.spool else None,
        "children": [
            {
                "name": one.child.name,
                "type": one.child.type,
                "enabled": one.child.enabled,
                "primary": one.child.name == config.primary,
                "healthy": one.is_healthy,
                "findings": [asdict(finding) for finding in one.findings],
            }
            for one in result.children
        ],
    }


def _show(result: StoreCheck) -> None:
    from composite_logstore.operations.check import STEPS

    found, checks = result.store, result.children
    rows = []
    for one in checks:
        by_step = {finding.what: finding for finding in one.findings}
        name = one.child.name + (" (primary)" if one.child.name == found.config.primary else "")
        rows.append([name, one.child.type, *(_cell(by_step.get(step)) for step in STEPS)])
    show_table(["Child", "Type", *(step.capitalize() for step in STEPS)], rows)
    for one in checks:
        for finding in one.findings:
            _show_trouble(f"{one.child.name}, {finding.what}", finding)
    if result.spool:
        _show_trouble("spool", result.spool)
    broken = [one.child.name for one in checks if not one.is_healthy]
    if broken:
        do = "does" if len(broken) == 1 else "do"
        say(f"Log store '{found.name}': {len(broken)} of {len(checks)} children {do} not work: {', '.join(broken)}.")
    else:
        say(f"Log store '{found.name}': {'all children work' if len(checks) > 1 else 'the child works'}.")


def _show_trouble(where: str, finding: Finding) -> None:
    if finding.result == "fixed":
        say(f"{where}: {finding.message}.")
    if finding.result in ("problem", "warning"):
        style = "error" if finding.result == "problem" else "warning"
        say(f"{where}: {finding.message}.", style)
        if finding.advice:
            say(f"  What to do: {finding.advice}.")


def _cell(finding: Finding | None) -> str:
    if finding is None:
        return ""
    if finding.result == "unknown":
        return "-" if finding.what != "read" else "cannot be read"
    if finding.result != "ok":
        return finding.result
    if finding.what in ("write", "read"):
        return f"{finding.seconds * 1000:,.0f} ms"
    return "ok"
