"""`composite-logstore verify`: whether the children of a log store hold the same events."""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import IO, Any
from uuid import UUID

import click
import orjson

from composite_logstore.catalog.stores import NoAnswer, RegisteredStore, RunStream, find_store, mistake, open_child
from composite_logstore.cli.console import output_option, say, say_json, show_table, warn
from composite_logstore.cli.report import write_report
from composite_logstore.config import ChildConfig
from composite_logstore.operations.selection import (
    Bars,
    Selection,
    collector_of,
    log_stores_of,
    selection_options,
    state_folder,
)
from composite_logstore.parity.compare import compare
from composite_logstore.parity.result import StreamParity
from composite_logstore.parity.scan import Source
from composite_logstore.parity.summary import ParitySummary
from composite_logstore.spool.lock import lock_file

_SHOWN = 20


@click.command()
@click.argument("store")
@selection_options
@click.option("--child", "children", metavar="NAME", multiple=True, help="Only this child. Can be given several times.")
@click.option("--strict", is_flag=True, help="Events that a child holds more than once are differences too.")
@click.option("--anew", is_flag=True, help="Begin anew where an earlier verify was interrupted.")
@click.option("--html", metavar="FILE", type=click.Path(dir_okay=False, writable=True), help="Write a report.")
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
    """Prove that the children of STORE hold the same events.

    Each stream is compared by the identity of its events, in every enabled child that can be read. Interrupted, the
    same command goes on from there.

    Exits with 0 if they do, with 1 if there are differences, with 2 if it was called wrongly, and with 3 if something
    could not be compared.
    """
    selection = Selection.of(run, since, until, everything)
    registered = find_store(store)
    chosen = _choose(registered, children)
    ids = log_stores_of(registered, chosen)
    summary = ParitySummary(registered.name, [child.name for child in chosen])
    began = time.monotonic()
    sources: list[Source] = []
    is_interrupted = False
    # Two hours ago is another time when the same command is given again.
    meant = [run, since is not None, until is not None, everything]
    key = orjson.dumps([meant, [child.model_dump(mode="json") for child in chosen]])
    name = f"{registered.store.id}-{hashlib.sha256(key).hexdigest()[:16]}"
    try:
        with _progress(name, anew) as (before, file), Bars("verify") as bars:
            if before:
                warn(f"Goes on where an earlier verify was interrupted: {len(before):,} streams were compared then.")
            sources = [open_child(child) for child in chosen]
            for stream in selection.streams(set(ids), bars):
                result = before.get(str(stream.logs.id))
                if result is None:
                    result = compare_stream(stream, _meant(stream, sources, ids), bars)
                    if result.was_compared and not stream.run_in_progress:
                        file.write(orjson.dumps(result.as_dict(), option=orjson.OPT_NON_STR_KEYS) + b"\n")
                        file.flush()
                summary.add(result)
    except KeyboardInterrupt:
        is_interrupted = True
    finally:
        for source in sources:
            source.close()
    summary.seconds = time.monotonic() - began
    if html:
        write_report(Path(html), summary)
    if output == "json":
        say_json({**summary.as_dict(), "interrupted": is_interrupted})
    else:
        _show(summary, strict)
        if html:
            say(f"Report: {html}", style="info")
    if is_interrupted:
        warn("Interrupted. The same command goes on from there.")
        sys.exit(3)
    if summary.differences or (strict and summary.duplicated):
        sys.exit(1)
    if summary.not_compared or not summary.streams:
        sys.exit(3)


def _choose(registered: RegisteredStore, names: tuple[str, ...]) -> list[ChildConfig]:
    """Return the children to compare.

    Raises:
        click.BadParameter: There is no such child, or it cannot be read.
        NoAnswer: There is none that can be read.
    """
    chosen = [registered.child(name, "--child") for name in dict.fromkeys(names)]
    for child in chosen:
        if why := child.unreadable:
            raise mistake("--child", f"child '{child.name}': {why}")
    chosen = chosen or [child for child in registered.config.enabled_children if not child.unreadable]
    if not chosen:
        raise NoAnswer(f"log store '{registered.name}' has no enabled child that can be read.")
    return chosen


def _meant(stream: RunStream, sources: list[Source], ids: dict[UUID | None, str]) -> list[Source]:
    # What the composite collected never came to an earlier log store that is there to be read alone.
    collected_by = ids[collector_of(stream)]
    return [source for source in sources if collected_by or source.config.enabled or source.name not in ids.values()]


def compare_stream(stream: RunStream, sources: list[Source], bars: Bars) -> StreamParity:
    """Compare what children hold of a stream."""
    return compare(stream.logs, f"{stream.run_name} {stream.label}", sources, stream.run_in_progress, bars.tell)


def compare_with_primary(registered: RegisteredStore, child: str) -> ParitySummary:
    """Compare a child with the primary, in all runs of the active project.

    Args:
        registered: The log store.
        child: The child's name.

    Raises:
        NoAnswer: ZenML cannot be asked, or one of them cannot be read.
    """
    chosen = _choose(registered, (registered.config.primary, child))
    ids = log_stores_of(registered, chosen)
    summary = ParitySummary(registered.name, [one.name for one in chosen])
    sources = []
    try:
        with Bars("verify") as bars:
            for one in chosen:
                sources.append(open_child(one))
            for stream in Selection(None, None, None).streams(set(ids), bars):
                summary.add(compare_stream(stream, _meant(stream, sources, ids), bars))
    finally:
        for source in sources:
            source.close()
    return summary


@contextmanager
def _progress(name: str, is_anew: bool) -> Iterator[tuple[dict[str, StreamParity], IO[bytes]]]:
    """Give what an earlier verify had compared before it was interrupted, and a file to note more in.

    Raises:
        NoAnswer: The same verify runs already.
    """
    folder = state_folder("verify")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.jsonl"
    with open(path, "a+b") as file:
        if not lock_file(file.fileno()):
            raise NoAnswer("the same verify runs already on this machine; wait for it, or stop it")
        if is_anew:
            file.truncate(0)
        file.seek(0)
        before = {}
        for line in file.read().splitlines():
            try:
                result = StreamParity.from_dict(orjson.loads(line))
            except (ValueError, KeyError, TypeError):
                # The last line of a process that was killed.
                continue
            before[result.logs_id] = result
        if before:
            file.write(b"\n")
        yield before, file
        # Not if it was interrupted.
        path.unlink()


def _show(summary: ParitySummary, strict: bool) -> None:
    numbers = ["Streams", "Events", "Missing", "Arriving", "Duplicated", "Out of order", "Different"]
    rows: list[list[str]] = []
    for name, child in summary.children.items():
        counts = (child.missing, child.arriving, child.duplicated, child.out_of_order, child.different)
        rows.append([name, f"{child.streams:,}", f"{child.events:,}", *(f"{count:,}" for count in counts)])
    show_table(["Child", *numbers], rows, numbers)
    if summary.named:
        say("")
        shown = summary.named[:_SHOWN]
        show_table(
            ["Stream", "Kind", "Child", "Event", "Message", "Detail"],
            [
                [label, named.kind, named.child, _event(named), named.message[:100], named.detail]
                for label, named in shown
            ],
        )
        if summary.differences + summary.duplicated > len(shown):
            say("There are more: --html and --output json name them.")
    for label, child_name, why in summary.not_compared[:_SHOWN]:
        warn(f"{label}: child '{child_name}' was not compared: {why}")
    if len(summary.not_compared) > _SHOWN:
        warn(f"{len(summary.not_compared) - _SHOWN:,} more were not compared.")
    if summary.arriving:
        say(f"{summary.arriving:,} events at the end of streams that are still written may yet arrive.")
    is_different = summary.differences or (strict and summary.duplicated)
    if is_different:
        say("Differences were found.", style="error")
    elif summary.not_compared:
        say("No differences were found, but not everything could be compared.", style="warning")
    elif not summary.streams:
        say("There was nothing to compare.", style="warning")
    elif len(summary.children) == 1:
        say("No holes were found. With one child there is nothing to compare it with.", style="success")
    else:
        say(f"Parity: {_words(summary)}.", style="success")


def _words(summary: ParitySummary) -> str:
    events = max((child.events for child in summary.children.values()), default=0)
    return f"{summary.streams:,} streams, {events:,} events, {summary.seconds:.1f} s"


def _event(named: Any) -> str:
    return named.uid or f"{named.writer}/{named.sequence}"
