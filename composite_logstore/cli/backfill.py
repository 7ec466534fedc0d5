"""`composite-logstore backfill`."""

from __future__ import annotations

import sys
import time
from datetime import datetime
from typing import TYPE_CHECKING, Any

import click

from composite_logstore import operations
from composite_logstore.cli.console import (
    NOTHING_CHANGED,
    Command,
    dry_run_option,
    output_option,
    resume,
    say,
    say_json,
    warn,
)
from composite_logstore.cli.options import selected, selection_options
from composite_logstore.names import counted

if TYPE_CHECKING:
    from composite_logstore.operations import Totals


@click.command(
    cls=Command,
    short_help="Copy missing events from one child to another.",
    examples=[
        "backfill logs --from archive --to live --since 7d",
        "backfill logs --from archive --to bucket --all --dry-run",
        "backfill logs --from archive --to bucket --all --pipeline",
    ],
)
@click.argument("store")
@click.option("--from", "source", metavar="CHILD", required=True, help="The child to copy from.")
@click.option("--to", "target", metavar="CHILD", required=True, help="The child to copy to.")
@selection_options
@click.option("--rate", type=click.FloatRange(min=0, min_open=True), help="The most events per second.")
@click.option("--anew", is_flag=True, help="Forget what earlier backfills have sent.")
@click.option("--pipeline", is_flag=True, help="Run as a ZenML pipeline on the active stack.")
@click.option("--slices", type=click.IntRange(min=1), help="How many steps of the pipeline share the work.")
@dry_run_option
@output_option
def backfill(
    store: str,
    source: str,
    target: str,
    run: str | None,
    since: datetime | None,
    until: datetime | None,
    everything: bool,
    rate: float | None,
    anew: bool,
    pipeline: bool,
    slices: int | None,
    dry_run: bool,
    output: str,
) -> None:
    """Copy missing events from one child to another, keeping IDs and timestamps.

    Skips runs in progress: their events are still on the way. If interrupted, the same command resumes; no event is
    copied twice.

    Exit code: 0 if no event is missing any more, or would be after '--dry-run', 1 if something could not be copied, 2
    for wrong usage, 3 if the backfill was stopped early.
    """
    from composite_logstore.cli.progress import Bars

    selection = selected(run, since, until, everything)
    if slices and not pipeline:
        raise click.UsageError("'--slices' needs '--pipeline'.")
    totals = operations.Totals()
    began = time.monotonic()
    stopped = ""
    try:
        # ZenML prints while its pipeline runs.
        with Bars("backfill", is_shown=dry_run or not pipeline) as bars:
            operations.backfill(
                store,
                source,
                target,
                selection,
                rate=rate,
                anew=anew,
                pipeline=pipeline,
                slices=slices,
                dry_run=dry_run,
                progress=bars.show,
                totals=totals,
            )
    except KeyboardInterrupt:
        if not totals.log_store:
            # Nothing has been copied: the log store was still looked up.
            raise
        stopped = "Interrupted"
    except operations.BackfillStoppedError as error:
        stopped = f"Stopped: {error.message}"
    seconds = time.monotonic() - began
    if output == "json":
        values: dict[str, Any] = {**totals.as_dict(), "seconds": round(seconds, 3), "stopped": stopped}
        say_json({"log_store": totals.log_store, "from": source, "to": target, "dry_run": dry_run, **values})
    else:
        _show(totals, seconds, target, dry_run)
    if stopped:
        warn(f"{stopped.rstrip('.')}. {resume(anew)}")
        sys.exit(3)
    if totals.left_out:
        sys.exit(1)


def _show(result: Totals, seconds: float, target: str, dry_run: bool) -> None:
    copied = f"{counted(result.copied, 'event')} of {counted(result.streams, 'stream')}"
    there = f"already there: {result.there:,}"
    if dry_run:
        say(f"{copied} would be copied to '{target}'; {there}.")
        say(NOTHING_CHANGED)
    else:
        rate = result.copied / seconds if seconds else 0
        say(f"{copied} copied to '{target}' in {seconds:.1f} s ({rate:,.0f}/s); {there}.")
    if result.unwanted:
        say(f"Excluded by the settings of child '{target}': {counted(result.unwanted, 'event')}.")
    if result.unidentified:
        unidentified = counted(result.unidentified, "event")
        say(f"Skipped, since the child may already hold them: {unidentified} without an ID.")
    if result.absent:
        say(f"Without events in the source: {counted(result.absent, 'stream')}.")
    if result.too_old:
        say(f"Too old for the backend: {counted(result.too_old, 'event')}.", style="warning")
    for reason, number in result.rejected.items():
        say(f"Rejected: {counted(number, 'event')}: {reason}.", style="warning")
    if result.in_progress:
        in_progress = counted(result.in_progress, "stream")
        say(f"Skipped: {in_progress} of runs in progress; run the command again after their end.")
