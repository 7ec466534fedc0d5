"""`composite-logstore status`."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from composite_logstore import operations
from composite_logstore.cli.console import Command, View, age, output_option, say_json, show_in_turn

if TYPE_CHECKING:
    from composite_logstore.operations import ChildStatus, StoreStatus

_SECONDS = 1.0
"""How often `--watch` looks again: processes say how their children are as often."""

_NUMBERS = ["Rate", "Backlog", "Oldest", "Withheld", "Redacted", "Rejected", "Dropped"]


@click.command(cls=Command, examples=["status logs", "status logs --watch", "status logs --output json"])
@click.argument("store")
@click.option("--watch", is_flag=True, help="Look again every second until Ctrl-C. JSON is one line each time.")
@output_option
def status(store: str, watch: bool, output: str) -> None:
    """Show how the children are on this machine now.

    STORE is its name or id. The numbers are those of all its running processes together, and of the events that dead
    processes have left. Running processes write them down about once a second, unless 'durability' is 'memory'.

    Exit code: 0, 2 for wrong usage, 130 after Ctrl-C.
    """
    look = operations.Watch(store).look
    try:
        if output == "json":
            for _ in _rounds(watch):
                say_json(_as_json(look()))
            return
        show_in_turn((_view(look()) for _ in _rounds(watch)), in_place=watch)
    except KeyboardInterrupt:
        sys.exit(130)


def _rounds(watch: bool) -> Iterator[None]:
    yield
    while watch:
        time.sleep(_SECONDS)
        yield


def _as_json(found: StoreStatus) -> dict[str, Any]:
    return {
        "log_store": {"id": str(found.store.id), "name": found.store.name},
        "time": time.time(),
        "children": [asdict(child) for child in found.children],
        "processes": [asdict(process) for process in found.processes],
        "unknown": found.unknown,
    }


def _view(found: StoreStatus) -> View:
    rows = [_row(child) for child in found.children]
    alive = sum(process.is_alive for process in found.processes)
    lines = [
        f"{'1 running process' if alive == 1 else f'{alive} running processes'} of log store '{found.store.label}'."
    ]
    for process in found.processes:
        if not process.is_alive:
            who = (
                f"Process {process.pid} on {process.host}" if process.pid else f"The process of writer {process.writer}"
            )
            when = f" {age(time.time() - process.written)} ago" if process.written else ""
            lines.append(f"{who} has died{when}.")
    lines += [f"{why}." for why in found.unknown]
    lines += [f"child '{child.name}': {child.last_error.rstrip('.')}." for child in found.children if child.last_error]
    return View(["Child", "State", *_NUMBERS], rows, _NUMBERS, lines)


def _row(child: ChildStatus) -> list[str]:
    counts = (child.withheld, child.redacted, child.rejected, child.dropped)
    return [
        child.name,
        child.state or "no process",
        f"{child.rate:,.0f}/s" if child.rate >= 10 or not child.rate else f"{child.rate:.1f}/s",
        f"{child.pending:,}",
        age(time.time() - child.oldest) if child.oldest is not None else "",
        *(f"{number:,}" for number in counts),
    ]
