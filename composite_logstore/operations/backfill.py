"""Copies missing events from one child of a log store to another, with their IDs and timestamps."""

from __future__ import annotations

import time
from datetime import datetime, timezone

from composite_logstore.catalog.errors import ArgumentError
from composite_logstore.catalog.stores import collectors, find_store
from composite_logstore.child_config import ChildConfig
from composite_logstore.names import quoted
from composite_logstore.operations.copying import Totals, copy_streams, ended, ledger_of
from composite_logstore.operations.pipeline_launch import MOST_SLICES, copy_as_pipeline, refuse_second, suitable_stack
from composite_logstore.operations.progress import ProgressCallback, Reporter
from composite_logstore.operations.selection import Selection


def backfill(
    store: str,
    source: str,
    target: str,
    selection: Selection | None = None,
    *,
    rate: float | None = None,
    anew: bool = False,
    pipeline: bool = False,
    slices: int | None = None,
    dry_run: bool = False,
    progress: ProgressCallback | None = None,
    totals: Totals | None = None,
) -> Totals:
    """Copy the events that are missing from one child and that another holds; they keep their IDs and timestamps.

    Skips runs in progress, since their events are still on the way. If it is interrupted, the next call resumes; no
    event is copied twice.

    Examples:
        >>> totals = backfill("logs", "archive", "live", Selection(run="train-1"))
        >>> totals.copied, totals.there
        (3, 0)

    Args:
        store: The log store's name or id.
        source: The name of the child to copy from.
        target: The name of the child to copy to.
        selection: The streams to copy; all streams of the active project if not given.
        rate: The most events per second, unlimited if not given.
        anew: Whether to forget what earlier backfills have sent.
        pipeline: Whether to run as a ZenML pipeline on the active stack, rather than in this process.
        slices: How many steps of the pipeline share the work, 10 if not given.
        dry_run: Whether to make all checks and count what would be copied, here even with `pipeline`, and copy nothing.
        progress: Is told how far the backfill is.
        totals: Receives the result, and holds the result so far if the call is interrupted.

    Raises:
        ArgumentError: There is no such log store, child or run; the source cannot be read; the active stack cannot
            run the pipeline; `slices` are given without it; or a number is out of its range.
        NoAnswerError: ZenML or a child cannot be reached, or another backfill copies to the same child.
        BackfillStoppedError: A child became unavailable, or the pipeline failed.
    """
    if rate is not None and not rate > 0:
        raise ArgumentError("rate", "it must be above 0; leave it out to copy without a limit")
    if slices is not None and not pipeline:
        raise ArgumentError("slices", "only a pipeline has slices; copy as a pipeline, or leave them out")
    if slices is not None and not 1 <= slices <= MOST_SLICES:
        raise ArgumentError("slices", f"give a number from 1 to {MOST_SLICES}")
    selection = selection or Selection()
    found = find_store(store)
    from_, to = found.child(source, "source"), found.child(target, "target")
    if source == target:
        raise ArgumentError("target", "a child cannot be copied to itself; name another")
    found.readable_child(source, "source")
    refuse_second(found, to)
    report = Reporter(progress)
    _warn_before(from_, to, pipeline, report)
    totals = Totals() if totals is None else totals
    totals.log_store = found.name
    if pipeline and dry_run:
        suitable_stack()
    elif pipeline:
        # The ledger keeps other backfills on this machine away from the child.
        with ledger_of(found, to, False):
            copy_as_pipeline(found, from_, to, selection, totals, report, slices=slices, rate=rate, anew=anew)
    if dry_run or not pipeline:
        ids = collectors(found, [from_])
        streams = ended(selection.streams(ids, report), ids, from_, totals)
        copy_streams(found, from_, to, streams, totals, report, rate, anew, dry_run)
    return totals


def _warn_before(source: ChildConfig, target: ChildConfig, as_pipeline: bool, report: Reporter) -> None:
    """Say in advance what the backfill will not do although people may expect it."""
    if target.oldest_seconds is not None:
        oldest = datetime.fromtimestamp(time.time() - target.oldest_seconds, timezone.utc)
        report.notice(
            f"The backend of child '{target.name}' accepts nothing older than {target.oldest_seconds / 3600:g} h: "
            f"events from before {oldest:%Y-%m-%d %H:%M} UTC are skipped and counted."
        )
    if target.known_losses:
        report.notice(f"{target.known_losses}. Run 'verify' afterwards to see what child '{target.name}' has.")
    if target.unreadable:
        known = "as a pipeline" if as_pipeline else "on this machine"
        report.notice(
            f"Child '{target.name}' cannot be read, so its events are unknown: it receives all events of "
            f"'{source.name}', except those that earlier backfills {known} have sent. Events that it already holds "
            f"arrive again with the same log.record.uid."
        )
    if not target.wants_all:
        excluding = [name for name in target.excluded_by if name != "budget"]
        if excluding:
            report.notice(f"Events that {quoted(excluding)} of child '{target.name}' excludes are not copied.")
        if target.budget is not None:
            report.notice(f"What is copied is not charged to 'budget' of child '{target.name}'.")
