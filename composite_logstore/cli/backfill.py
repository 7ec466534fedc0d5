"""`composite-logstore backfill`: copies to one child what it lacks and another has."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import lru_cache
from typing import Any
from uuid import UUID

import click

from composite_logstore.backend import UnavailableError
from composite_logstore.backfilling import (
    REMEMBERED_SECONDS,
    Backfill,
    BackfillRunsError,
    BackfillStoppedError,
    Copied,
    Ledger,
    Tell,
    open_ledger,
)
from composite_logstore.cli.as_pipeline import copy_as_pipeline, refuse_second
from composite_logstore.cli.console import say, say_json, warn
from composite_logstore.cli.selection import (
    Bars,
    Selection,
    collector_of,
    log_stores_of,
    selection_options,
    state_folder,
)
from composite_logstore.cli.stores import NoAnswer, RegisteredStore, RunStream, asking_zenml, find_store, mistake
from composite_logstore.config import ChildConfig
from composite_logstore.event import Stream
from composite_logstore.scanning import Source, open_source


@click.command()
@click.argument("store")
@click.option("--from", "from_", metavar="CHILD", required=True, help="The child to copy from.")
@click.option("--to", metavar="CHILD", required=True, help="The child to copy to.")
@selection_options
@click.option("--rate", type=click.FloatRange(min=0, min_open=True), help="The most events in a second.")
@click.option("--anew", is_flag=True, help="Forget what earlier backfills have sent.")
@click.option("--pipeline", "as_pipeline", is_flag=True, help="As a ZenML pipeline on the active stack.")
@click.option("--slices", type=click.IntRange(1, 1000), help="How many steps the pipeline shares it among.")
@click.option("--output", type=click.Choice(["text", "json"]), default="text")
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
            with _ledger(registered, target, False):
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


@dataclass
class Totals(Copied):
    """What became of all streams. The other attributes are those of `Copied`, added up.

    Attributes:
        streams: The streams that were looked at.
        in_progress: Those that were left out, since their run is in progress.
    """

    streams: int = 0
    in_progress: int = 0

    @property
    def left_out(self) -> int:
        """How much the child still lacks. Where nothing is found of any stream, it is not known."""
        nowhere = self.absent if self.absent == self.streams else 0
        return self.too_old + sum(self.rejected.values()) + self.in_progress + nowhere

    def add(self, other: Copied) -> None:
        """Add a stream's, or those of other streams."""
        super().add(other)
        if isinstance(other, Totals):
            self.streams += other.streams
            self.in_progress += other.in_progress

    def as_dict(self) -> dict[str, Any]:
        """Return it in plain values."""
        return asdict(self)


def ended(
    streams: Iterable[RunStream], ids: dict[UUID | None, str], source: ChildConfig, totals: Totals
) -> Iterator[RunStream]:
    """Yield those of some streams that can be copied now, and count them.

    Args:
        streams: The streams.
        ids: The log stores whose streams the source may hold, as `log_stores_of` gives them.
        source: The child to copy from.
        totals: They are counted here.
    """
    for stream in streams:
        collector = collector_of(stream)
        # What the composite collected never came to an earlier log store that is there to be read alone.
        if collector not in ids or (not ids[collector] and not source.enabled and source.name in ids.values()):
            continue
        if stream.run_in_progress:
            totals.in_progress += 1
            continue
        totals.streams += 1
        yield stream


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
    if target.min_level or target.progress == "latest":
        warn(f"What the 'min_level' or 'progress' of child '{target.name}' keeps from it is not copied.")


def copy_streams(
    registered: RegisteredStore,
    source: ChildConfig,
    target: ChildConfig,
    streams: Callable[[Bars], Iterable[RunStream]],
    result: Copied,
    rate: float | None = None,
    is_anew: bool = False,
) -> None:
    """Copy what one child lacks of some streams and another has.

    Args:
        registered: The log store.
        source: The child to copy from.
        target: The child to copy to.
        streams: Gives the streams, and tells the bars of them.
        result: What became of the events is added here, as it happens.
        rate: The most events in a second.
        is_anew: Whether to forget what earlier backfills have sent.

    Raises:
        BackfillStoppedError: A child cannot be read, or the other does not take any more.
        NoAnswer: ZenML cannot be asked, a child cannot be opened, or another backfill copies to it.
    """
    with _ledger(registered, target, is_anew) as ledger, Bars("backfill") as bars:
        if ledger.is_resumed:
            warn("Goes on where an earlier backfill was interrupted.")
        copy_with(ledger, registered, source, target, streams(bars), result, rate, bars.tell)
        ledger.complete()


@contextmanager
def _ledger(registered: RegisteredStore, target: ChildConfig, is_anew: bool) -> Iterator[Ledger]:
    since = 0.0 if target.unreadable else time.time() - REMEMBERED_SECONDS
    try:
        with open_ledger(state_folder("backfill"), registered.store.id, target.name, since, is_anew) as ledger:
            yield ledger
    except BackfillRunsError as error:
        raise NoAnswer(str(error)) from None


def copy_with(
    ledger: Ledger,
    registered: RegisteredStore,
    source: ChildConfig,
    target: ChildConfig,
    streams: Iterable[RunStream],
    result: Copied,
    rate: float | None,
    tell: Tell,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Copy as `copy_streams` does, with a ledger that is open.

    Args:
        ledger: What was sent earlier.
        registered: The log store.
        source: The child to copy from.
        target: The child to copy to.
        streams: The streams.
        result: What became of the events is added here, as it happens.
        rate: The most events in a second.
        tell: Told how many more events were looked at.
        sleep: Waits for so many seconds.

    Raises:
        BackfillStoppedError: A child cannot be read, or the other does not take any more.
        NoAnswer: ZenML cannot be asked, or a child cannot be opened.
    """
    closing: list[Callable[[], None]] = []
    try:
        reading = _open(source)
        closing.append(reading.close)
        there = None if target.unreadable else _open(target)
        if there:
            closing.append(there.close)
        try:
            copying = Backfill(reading, target, there, ledger, rate, tell, time.monotonic, sleep)
        except (UnavailableError, ImportError) as error:
            raise NoAnswer(f"child '{target.name}' cannot be written to: {error}") from error
        closing.append(copying.close)
        for stream in streams:
            copying.copy(stream.logs, stream_of(stream, registered), result)
    finally:
        for close in reversed(closing):
            close()


def _open(child: ChildConfig) -> Source:
    try:
        return open_source(child)
    except (UnavailableError, ImportError) as error:
        raise NoAnswer(f"child '{child.name}' cannot be read: {error}") from error


def stream_of(stream: RunStream, registered: RegisteredStore) -> Stream:
    """Return the stream with the attributes that ZenML and the log store gave its events."""
    logs = stream.logs
    attributes, artifact_store_id = _of_run(stream.run_id)
    metadata = {
        **attributes,
        "zenml.log.id": str(logs.id),
        "zenml.log.source": logs.source,
        "zenml.log_store.id": str(registered.store.id),
        "zenml.log_store.name": registered.name,
    }
    if logs.step_run_id and stream.step_name:
        metadata |= {"zenml.step.run.id": str(logs.step_run_id), "zenml.step.run.name": stream.step_name}
    return Stream(logs.id, metadata, logs.artifact_store_id or artifact_store_id)


@lru_cache(maxsize=100)
def _of_run(run_id: UUID) -> tuple[dict[str, Any], UUID | None]:
    with asking_zenml():
        from zenml.client import Client
        from zenml.enums import StackComponentType
        from zenml.utils.logging_utils import get_run_log_metadata

        run = Client().get_pipeline_run(run_id)
        found = run.stack.components.get(StackComponentType.ARTIFACT_STORE) if run.stack else None
        return get_run_log_metadata(run), found[0].id if found else None


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
