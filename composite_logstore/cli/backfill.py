"""`composite-logstore backfill`: copies to one child what it lacks and another has."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from typing import Any

import click

from composite_logstore.catalog.stores import RunStream, find_store, mistake
from composite_logstore.cli.console import output_option, say, say_json, warn
from composite_logstore.config import ChildConfig
from composite_logstore.operations.backfill import Totals, copy_streams, ended, ledger_of
from composite_logstore.operations.pipeline_launch import copy_as_pipeline, refuse_second
from composite_logstore.operations.selection import Bars, Selection, log_stores_of, selection_options
from composite_logstore.parity.backfill import BackfillStoppedError


@click.command()
@click.argument("store")
@click.option("--from", "from_", metavar="CHILD", required=True, help="The child to copy from.")
@click.option("--to", metavar="CHILD", required=True, help="The child to copy to.")
@selection_options
@click.option("--rate", type=click.FloatRange(min=0, min_open=True), help="The most events in a second.")
@click.option("--anew", is_flag=True, help="Forget what earlier backfills have sent.")
@click.option("--pipeline", "as_pipeline", is_flag=True, help="As a ZenML pipeline on the active stack.")
@click.option("--slices", type=click.IntRange(1, 1000), help="How many steps the pipeline shares it among.")
@output_option
def backfill(
    store: str,
    from_: str,
    to: str,
    run: str | None,
    since: datetime | None,
    until: datetime | None,
    everything: bool,
    rate: float | None,
    anew: bool,
    as_pipeline: bool,
    slices: int | None,
    output: str,
) -> None:
    """Copy to one child of STORE what it lacks and another has, with the original identity and times.

    Runs that are in progress are left out: what they log is on its way. Interrupted, the same command goes on from
    there; once more, it copies nothing twice.

    Exits with 0 if the child lacks nothing any more, with 1 if something could not be copied, with 2 if it was called
    wrongly, and with 3 if it was stopped before its end.
    """
    selection = Selection.of(run, since, until, everything)
    if slices and not as_pipeline:
        raise click.UsageError("'--slices' goes with '--pipeline'.")
    registered = find_store(store)
    source, target = registered.child(from_, "--from"), registered.child(to, "--to")
    if source.name == target.name:
        raise mistake("--to", "a child cannot be copied to itself; name another")
    if why := source.unreadable:
        raise mistake("--from", f"child '{source.name}': {why}")
    refuse_second(registered, target)
    _warn_before(source, target, as_pipeline)
    totals = Totals()
    began = time.monotonic()
    stopped = ""
    try:
        if as_pipeline:
            # Nobody else on this machine copies to the child meanwhile.
            with ledger_of(registered, target, False):
                stopped = copy_as_pipeline(registered, source, target, selection, (slices, rate, anew), totals)
        else:
            ids = log_stores_of(registered, [source])

            def streams(bars: Bars) -> Iterator[RunStream]:
                return ended(selection.streams(set(ids), bars), ids, source, totals)

            copy_streams(registered, source, target, streams, totals, rate, anew)
    except KeyboardInterrupt:
        stopped = "Interrupted"
    except BackfillStoppedError as error:
        stopped = f"Stopped: {error}"
    seconds = time.monotonic() - began
    if output == "json":
        values: dict[str, Any] = {**totals.as_dict(), "seconds": round(seconds, 3), "stopped": stopped}
        say_json({"log_store": registered.name, "from": source.name, "to": target.name, **values})
    else:
        _show(totals, seconds, target)
    if stopped:
        warn(f"{stopped.rstrip('.')}. The same command goes on from there.")
        sys.exit(3)
    if totals.left_out:
        sys.exit(1)


def _warn_before(source: ChildConfig, target: ChildConfig, as_pipeline: bool) -> None:
    """Say what will not be as one might think, before it is so."""
    if target.oldest_seconds is not None:
        oldest = datetime.fromtimestamp(time.time() - target.oldest_seconds, timezone.utc)
        warn(
            f"The backend of child '{target.name}' takes nothing older than {target.oldest_seconds / 3600:g} h: what "
            f"was logged before {oldest:%Y-%m-%d %H:%M} UTC is left out, and counted."
        )
    if target.unreadable:
        known = "as a pipeline" if as_pipeline else "on this machine"
        warn(
            f"Child '{target.name}' cannot be read, so what it has is not known: it gets all that '{source.name}' has, "
            f"but for what earlier backfills {known} have sent. What it has already it gets again, with the "
            f"same log.record.uid."
        )
    if not target.wants_all:
        warn(f"What the 'min_level' or 'progress' of child '{target.name}' keeps from it is not copied.")


def _show(result: Totals, seconds: float, target: ChildConfig) -> None:
    rate = result.copied / seconds if seconds else 0
    say(
        f"{result.copied:,} events of {result.streams:,} streams copied to '{target.name}' in {seconds:.1f} s "
        f"({rate:,.0f}/s); {result.there:,} were there."
    )
    if result.unwanted:
        say(f"{result.unwanted:,} are not meant for it.")
    if result.unidentified:
        say(f"{result.unidentified:,} were left out: they do not say which events they are, and it may have them.")
    if result.absent:
        say(f"Of {result.absent:,} streams nothing was found to copy from.")
    if result.too_old:
        say(f"{result.too_old:,} are too old for its backend.", style="warning")
    for reason, number in result.rejected.items():
        say(f"{number:,} were rejected: {reason}.", style="warning")
    if result.in_progress:
        say(f"{result.in_progress:,} streams of runs in progress were left out: run it again when they have ended.")
