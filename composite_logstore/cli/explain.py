"""`composite-logstore explain`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from composite_logstore import operations
from composite_logstore.cli.console import (
    Command,
    console,
    output_option,
    say,
    say_json,
    show_table,
    status,
    warn,
)
from composite_logstore.names import counted

if TYPE_CHECKING:
    from composite_logstore.operations import Effect, Explanation

_WIDTH = 80
"""How wide a line is where there is no terminal."""

_OTHERS = 50
"""How much of a line the columns before the example take."""

_MOST_LINE_BYTES = 1024 * 1024
"""How many bytes are taken as one line at most."""


@click.command(
    cls=Command,
    examples=[
        "explain logs live --run train-1",
        "explain logs live --run train-1 --children children.json",
        "explain logs live --children children.json --output json",
    ],
)
@click.argument("store")
@click.argument("child")
@click.option("--run", metavar="NAME|ID", help="Use events of this run, read from the primary; otherwise stdin.")
@click.option(
    "--children", metavar="FILE", type=click.Path(), help="Use the settings in this file, before they are registered."
)
@output_option
def explain(store: str, child: str, run: str | None, children: str | None, output: str) -> None:
    """Explain what a child's rules do to events.

    Nothing is sent. Without '--run', each line of stdin counts as a line that a step prints. Lines of
    'composite-logstore logs --output json' keep their level, logger, step and time. At most 10,000 events are looked
    at. FILE is a file as 'validate' takes it; with it and without '--run' nothing asks ZenML, so STORE need not exist
    yet. What CHILD redacts is shown masked. Its 'budget' is not computed.

    Exit code: 0, 1 if there are no events, 2 for wrong usage, 3 if ZenML or the primary cannot be reached.
    """
    settings = _read(children) if children is not None else None
    if run is None and sys.stdin.isatty():
        raise click.UsageError("Name a run with '--run', or give lines on stdin.")
    with status("Reading ..."):
        lines = _lines() if run is None else None
        found = operations.explain(store, child, run=run, lines=lines, children=settings)
    if output == "json":
        saved = {"saved_events": round(found.saved_events, 4), "saved_bytes": round(found.saved_bytes, 4)}
        say_json({**asdict(found), **saved})
    else:
        _show(found, run)
    if not found.events:
        sys.exit(1)


def _read(file: str) -> Any:
    from composite_logstore.operations.settings_file import read_settings

    try:
        return read_settings(file)
    except ValueError as error:
        raise operations.ArgumentError("children", str(error)) from None


def _lines() -> Iterator[str]:
    while line := sys.stdin.buffer.readline(_MOST_LINE_BYTES):
        yield line.decode("utf-8", "replace")


def _show(found: Explanation, run: str | None) -> None:
    if not found.events:
        warn(f"The primary has no events of run '{run}'." if run is not None else "There are no lines.")
    else:
        rows = [_row("sent", "", found.sent)]
        rows += [_row("withheld", effect.rule, effect) for effect in found.withheld]
        rows += [_row("redacted", effect.rule, effect) for effect in found.redacted]
        show_table(["What", "By", "Events", "Size", "Example"], rows, numbers=["Events", "Size"])
        say(
            f"Of {counted(found.events, 'event')}, {_size(found.bytes)}, child '{found.child}' gets "
            f"{found.sent.events:,}, {_size(found.sent.bytes)}.\n"
        )
        say(f"Saved: {found.saved_events:.0%} of the events, {found.saved_bytes:.0%} of the bytes.")
        if not found.is_whole:
            say("There are more events than these: only a sample is looked at.")
    for note in found.notes:
        say(f"{note}.", style="info")


def _row(what: str, rule: str, effect: Effect) -> tuple[str, ...]:
    width = console().width if console().is_terminal else _WIDTH
    most = max(16, width - _OTHERS)
    example = effect.examples[0] if effect.examples else ""
    if len(example) > most:
        example = f"{example[: most - 1].rstrip('…')}…"
    return what, rule, f"{effect.events:,}", _size(effect.bytes), example


def _size(number: int) -> str:
    if number >= 1_000_000:
        return f"{number / 1e6:.1f} MB"
    return f"{number / 1e3:.1f} kB" if number >= 1_000 else f"{number} B"
