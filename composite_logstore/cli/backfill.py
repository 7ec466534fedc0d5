"""`composite-logstore backfill`: copies to one child what it lacks and another has."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
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
    open_ledger,
)
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
    output: str,
) -> None:
    """Copy to one child of STORE what it lacks and another has, with the original identity and times.

    Runs that are in progress are left out: what they log is on its way. Interrupted, the same command goes on from
    there; once more, it copies nothing twice.

    Exits with 0 if the child lacks nothing any more, with 1 if something could not be copied, with 2 if it was called
    wrongly, and with 3 if it was stopped before its end.
    """
    selection = Selection.of(run, since, until, everything)
    registered = find_store(store)
    source, target = registered.child(from_, "--from"), registered.child(to, "--to")
    if source.name == target.name:
        raise mistake("--to", "a child cannot be copied to itself; name another")
    if why := source.unreadable:
        raise mistake("--from", f"child '{source.name}': {why}")
    _warn_before(source, target)
    result = Copied()
    numbers = {"streams": 0, "in_progress": 0}
    began = time.monotonic()
    stopped = ""
    ids = log_stores_of(registered, [source])

    def ended(bars: Bars) -> Iterator[RunStream]:
        for stream in selection.streams(set(ids), bars):
            # What the composite collected never came to an earlier log store that is there to be read alone.
            collected_by = ids[collector_of(stream)]
            if not collected_by and not source.enabled and source.name in ids.values():
                continue
            if stream.run_in_progress:
                numbers["in_progress"] += 1
                continue
            numbers["streams"] += 1
            yield stream

    try:
        copy_streams(registered, source, target, ended, result, rate, anew)
    except KeyboardInterrupt:
        stopped = "Interrupted"
    except BackfillStoppedError as error:
        stopped = f"Stopped: {error}"
    seconds = time.monotonic() - began
    left_out = result.too_old + sum(result.rejected.values()) + numbers["in_progress"]
    if output == "json":
        values: dict[str, Any] = {**vars(result), **numbers, "seconds": round(seconds, 3), "stopped": stopped}
        say_json({"log_store": registered.name, "from": source.name, "to": target.name, **values})
    else:
        _show(result, numbers, seconds, target)
    if stopped:
        warn(f"{stopped.rstrip('.')}. The same command goes on from there.")
        sys.exit(3)
    if left_out:
        sys.exit(1)


def _warn_before(source: ChildConfig, target: ChildConfig) -> None:
    """Say what will not be as one might think, before it is so."""
    if target.oldest_seconds is not None:
        oldest = datetime.fromtimestamp(time.time() - target.oldest_seconds, timezone.utc)
        warn(
            f"The backend of child '{target.name}' takes nothing older than {target.oldest_seconds / 3600:g} h: what "
            f"was logged before {oldest:%Y-%m-%d %H:%M} UTC is left out, and counted."
        )
    if target.unreadable:
        warn(
            f"Child '{target.name}' cannot be read, so what it has is not known: it gets all that '{source.name}' has, "
            f"but for what earlier backfills on this machine have sent. What it has already it gets again, with the "
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
    since = 0.0 if target.unreadable else time.time() - REMEMBERED_SECONDS
    closing: list[Callable[[], None]] = []
    try:
        with (
            open_ledger(state_folder("backfill"), registered.store.id, target.name, since, is_anew) as ledger,
            Bars("backfill") as bars,
        ):
            reading = _open(source)
            closing.append(reading.close)
            there = None if target.unreadable else _open(target)
            if there:
                closing.append(there.close)
            if ledger.is_resumed:
                warn("Goes on where an earlier backfill was interrupted.")
            copying = _create(reading, target, there, ledger, rate, bars)
            closing.append(copying.close)
            for stream in streams(bars):
                result.add(copying.copy(stream.logs, stream_of(stream, registered)))
            ledger.complete()
    except BackfillRunsError as error:
        raise NoAnswer(str(error)) from None
    finally:
        for close in reversed(closing):
            close()


def _open(child: ChildConfig) -> Source:
    try:
        return open_source(child)
    except (UnavailableError, ImportError) as error:
        raise NoAnswer(f"child '{child.name}' cannot be read: {error}") from error


def _create(reading: Source, target: ChildConfig, there: Source | None, ledger: Any, rate: Any, bars: Bars) -> Backfill:
    try:
        return Backfill(reading, target, there, ledger, rate, bars.tell)
    except (UnavailableError, ImportError) as error:
        raise NoAnswer(f"child '{target.name}' cannot be written to: {error}") from error


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


def _show(result: Copied, numbers: dict[str, int], seconds: float, target: ChildConfig) -> None:
    rate = result.copied / seconds if seconds else 0
    say(
        f"{result.copied:,} events of {numbers['streams']:,} streams copied to '{target.name}' in {seconds:.1f} s "
        f"({rate:,.0f}/s); {result.there:,} were there."
    )
    if result.unwanted:
        say(f"{result.unwanted:,} are not meant for it.")
    if result.too_old:
        say(f"{result.too_old:,} are too old for its backend.", style="warning")
    for reason, number in result.rejected.items():
        say(f"{number:,} were rejected: {reason}.", style="warning")
    if numbers["in_progress"]:
        say(f"{numbers['in_progress']:,} streams of runs in progress were left out: run it again when they have ended.")
