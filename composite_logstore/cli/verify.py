"""`composite-logstore verify`."""

from __future__ import annotations

import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from composite_logstore import operations
from composite_logstore.cli.console import Command, output_option, resume, say, say_json, show_table, warn
from composite_logstore.cli.options import NewFile, selected, selection_options
from composite_logstore.names import counted

if TYPE_CHECKING:
    from composite_logstore.operations import ParitySummary

_SHOWN = 20


@click.command(cls=Command, examples=["verify logs --run train-1", "verify logs --since 7d --html report.html"])
@click.argument("store")
@selection_options
@click.option("--child", "children", metavar="NAME", multiple=True, help="Only this child. Can be repeated.")
@click.option("--strict", is_flag=True, help="Treat events that a child holds more than once as differences.")
@click.option("--anew", is_flag=True, help="Discard saved progress and start over.")
@click.option("--html", metavar="FILE", type=NewFile(), help="Write an HTML report.")
@output_option
def verify(
    store: str,
    run: str | None,
    since: datetime | None,
    until: datetime | None,
    everything: bool,
    children: tuple[str, ...],
    strict: bool,
    anew: bool,
    html: str | None,
    output: str,
) -> None:
    """Verify that all children hold the same events.

    Compares the IDs of the events of each stream, in every enabled child that can be read. If interrupted, the same
    command resumes.

    Exit code: 0 if the children hold the same events, 1 if there are differences, 2 for wrong usage, 3 if something
    could not be compared, 4 if nothing differs but that events are missing which a budget may have withheld.
    """
    from composite_logstore.cli.progress import Bars

    selection = selected(run, since, until, everything)
    summary = operations.ParitySummary()
    is_interrupted = False
    try:
        with Bars("verify") as bars:
            operations.verify(store, selection, children, anew=anew, progress=bars.show, summary=summary)
    except KeyboardInterrupt:
        if not summary.log_store:
            # Nothing has been compared: the log store was still looked up.
            raise
        is_interrupted = True
    if html:
        from composite_logstore.cli.report import write_report

        try:
            write_report(Path(html), summary)
        except OSError as error:
            # The result is worth more than the report.
            warn(f"The report cannot be written to '{html}': {error.strerror or error}")
            html = None
    if output == "json":
        say_json({**summary.as_dict(), "interrupted": is_interrupted})
    else:
        _show(summary, strict)
        if html:
            say(f"Report: {html}", style="info")
    if is_interrupted:
        warn(f"Interrupted. {resume(anew)}")
        sys.exit(3)
    if _is_different(summary, strict):
        sys.exit(1)
    if summary.not_compared or not summary.streams:
        sys.exit(3)
    if summary.over_budget:
        sys.exit(4)


def _is_different(summary: ParitySummary, strict: bool) -> bool:
    """Return whether there are differences that no budget explains."""
    return summary.differences > summary.over_budget or (strict and summary.duplicated > 0)


def _show(summary: ParitySummary, strict: bool) -> None:
    from composite_logstore.cli.report import columns, counts

    numbers = columns(summary)
    show_table(["Child", *numbers], counts(summary), numbers)
    if summary.named:
        say("")
        shown = summary.named[:_SHOWN]
        show_table(
            ["Stream", "Kind", "Child", "Event", "Message", "Detail"],
            [
                [label, named.kind, named.child, named.event, named.message[:100], named.detail]
                for label, named in shown
            ],
        )
        if summary.differences + summary.duplicated > len(shown):
            say("There are more; --html and --output json name up to 500.")
    for label, child_name, why in summary.not_compared[:_SHOWN]:
        warn(f"{label}: child '{child_name}' could not be compared: {why}")
    if len(summary.not_compared) > _SHOWN:
        warn(f"{len(summary.not_compared) - _SHOWN:,} more could not be compared.")
    for hint in summary.hints:
        warn(f"{hint}.")
    if summary.arriving:
        say(f"{counted(summary.arriving, 'event')} at the end of streams in progress may still arrive.")
    if _is_different(summary, strict):
        say("Differences were found.", style="error")
    elif summary.not_compared:
        say("No differences were found, but not everything could be compared.", style="warning")
    elif not summary.streams:
        say("There was nothing to compare.", style="warning")
    elif summary.over_budget:
        say("No differences were found but events that a budget may have withheld.", style="warning")
    elif len(summary.children) == 1:
        say("No gaps were found. With one child there is nothing to compare it with.", style="success")
    else:
        say(f"Parity: {_words(summary)}.", style="success")


def _words(summary: ParitySummary) -> str:
    events = max((child.events for child in summary.children.values()), default=0)
    return f"{counted(summary.streams, 'stream')}, {counted(events, 'event')}, {summary.seconds:.1f} s"
