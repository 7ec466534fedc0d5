"""`composite-logstore backfill`."""

from __future__ import annotations

import sys
import time
from datetime import datetime
from typing import Any

import click

from composite_logstore import operations
from composite_logstore.cli.console import Command, output_option, say, say_json, warn
from composite_logstore.cli.options import selected, selection_options
from composite_logstore.cli.progress import Bars
from composite_logstore.operations.copying import Totals
from composite_logstore.operations.pipeline_launch import MOST_SLICES
from composite_logstore.parity.result import BackfillStoppedError


@click.command(cls=Command, short_help="Copy missing events from one child to another.")
@click.argument("store")
@click.option("--from", "source", metavar="CHILD", required=True, help="The child to copy from.")
@click.option("--to", "target", metavar="CHILD", required=True, help="The child to copy to.")
@selection_options
@click.option("--rate", type=click.FloatRange(min=0, min_open=True), help="The most events per second.")
@click.option("--anew", is_flag=True, help="Forget what earlier backfills have sent.")
@click.option("--pipeline", is_flag=True, help="Run as a ZenML pipeline on the active stack.")
@click.option("--slices", type=click.IntRange(1, MOST_SLICES), help="How many steps of the pipeline share the work.")
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
    output: str,
) -> None:
    """Copy missing events from one child to another, keeping IDs and timestamps.

    Skips runs in progress: their events are still on the way. If interrupted, the same command resumes; no event is
    copied twice.

    Exit code: 0 if no event is missing any more, 1 if something could not be copied, 2 for wrong usage, 3 if the
    backfill was stopped early.
    """
    selection = selected(run, since, until, everything)
    if slices and not pipeline:
        raise click.UsageError("'--slices' needs '--pipeline'.")
    totals = Totals()
    began = time.monotonic()
    stopped = ""
    try:
        # ZenML prints while its pipeline runs.
        with Bars("backfill", is_shown=not pipeline) as bars:
            operations.backfill(
                store,
                source,
                target,
                selection,
                rate=rate,
                anew=anew,
                pipeline=pipeline,
                slices=slices,
                progress=bars.show,
                totals=totals,
            )
    except KeyboardInterrupt:
        if not totals.log_store:
            # Nothing has been copied: the log store was still looked up.
            raise
        stopped = "Interrupted"
    except BackfillStoppedError as error:
        stopped = f"Stopped: {error.message}"
    seconds = time.monotonic() - began
    if output == "json":
        values: dict[str, Any] = {**totals.as_dict(), "seconds": round(seconds, 3), "stopped": stopped}
        say_json({"log_store": totals.log_store, "from": source, "to": target, **values})
    else:
        _show(totals, seconds, target)
    if stopped:
        warn(f"{stopped.rstrip('.')}. Run the same command again to resume.")
        sys.exit(3)
    if totals.left_out:
        sys.exit(1)


def _show(result: Totals, seconds: float, target: str) -> None:
    rate = result.copied / seconds if seconds else 0
    say(
        f"{result.copied:,} events of {result.streams:,} streams copied to '{target}' in {seconds:.1f} s "
        f"({rate:,.0f}/s); {result.there:,} were already there."
    )
    if result.unwanted:
        say(f"{result.unwanted:,} events are filtered out by 'min_level' or 'progress'.")
    if result.unidentified:
        say(f"{result.unidentified:,} events without an ID were skipped, since the child may already hold them.")
    if result.absent:
        say(f"{result.absent:,} streams have no events in the source.")
    if result.too_old:
        say(f"{result.too_old:,} events are too old for the backend.", style="warning")
    for reason, number in result.rejected.items():
        say(f"{number:,} events were rejected: {reason}.", style="warning")
    if result.in_progress:
        say(f"{result.in_progress:,} streams of runs in progress were skipped; run the command again after their end.")
