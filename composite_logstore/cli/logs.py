"""`composite-logstore logs`."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from composite_logstore import operations
from composite_logstore.cli.console import Command, console, is_quiet, say, warn
from composite_logstore.cli.download import FormatOrFile, download
from composite_logstore.cli.options import Level, Moment
from composite_logstore.inert import inert, inert_json, paragraph
from composite_logstore.names import command, counted, quoted

if TYPE_CHECKING:
    from composite_logstore.catalog.runs import RunStream
    from composite_logstore.operations import Tail
    from composite_logstore.zenml import LogEntry


@click.command(
    cls=Command,
    examples=[
        "logs train-1 --step fit --follow",
        "logs train-1 --level WARNING --since 90m",
        "logs train-1 --from live --output json",
        "logs train-1 prod --from s3",
        "logs train-1 --output train-1.log.gz",
    ],
)
@click.argument("run")
@click.argument("store", required=False)
@click.option("--step", metavar="NAME", help="Only the logs of this step.")
@click.option("--source", metavar="NAME", help="Only streams with this source, such as 'step' or 'client'.")
@click.option("--from", "child", metavar="CHILD", help="Read from this child instead of the primary.")
@click.option("--follow", "-f", is_flag=True, help="Show new logs until the run has ended.")
@click.option("--since", type=Moment(), help="Only logs at or after this time, or this long ago, such as '90m'.")
@click.option("--until", type=Moment(), help="Only logs at or before this time.")
@click.option("--level", type=Level(), help="Only this level and above.")
@click.option("--search", metavar="TEXT", help="Only logs that contain this text; the backend decides how it matches.")
@click.option(
    "--rank",
    "ranks",
    type=click.IntRange(min=0),
    multiple=True,
    help="Only processes of a distributed training with this rank. Can be repeated.",
)
@click.option("--raw", "colours", is_flag=True, help="Keep the colours of messages.")
@click.option(
    "--output",
    type=FormatOrFile(),
    metavar="text|json|FILE",
    default="text",
    show_default=True,
    help="The format, or a file for the whole log: run.log, run.log.gz, or run.jsonl for JSON.",
)
@click.option("--force", is_flag=True, help="Replace the file if it is there.")
def logs(
    run: str,
    store: str | None,
    step: str | None,
    source: str | None,
    child: str | None,
    follow: bool,
    since: datetime | None,
    until: datetime | None,
    level: str | None,
    search: str | None,
    ranks: tuple[int, ...],
    colours: bool,
    output: str | Path,
    force: bool,
) -> None:
    """Show the logs of a run, or of one of its steps.

    RUN is the name or id of the run. Logs are sorted by time, and read from the log store that collected them, or from
    STORE, which may hold copies. Control characters are escaped, and the further lines of a message are indented. With
    '--output json' each entry is a line of JSON. With '--output FILE' the file gets all logs once they are complete.

    Exit code: 0 if logs were shown, or a run was followed to its end, 1 if there are none, 2 for wrong usage, 3 if
    ZenML or the backend cannot be reached, 130 after Ctrl-C.
    """
    from composite_logstore.zenml import LogsEntriesFilter

    is_json = output == "json" or (
        isinstance(output, Path) and not {".json", ".jsonl"}.isdisjoint(output.suffixes[-2:])
    )
    if colours and is_json:
        raise click.UsageError("'--raw' is for people; JSON always contains the original messages.")
    if follow and until:
        raise click.UsageError("'--follow' and '--until' exclude each other; give one.")
    if follow and isinstance(output, Path):
        raise click.UsageError("'--follow' shows logs as they arrive; leave it out to write them to a file.")
    if force and not isinstance(output, Path):
        raise click.UsageError("'--force' replaces a file; name it with '--output'.")
    wanted = LogsEntriesFilter(search=search, level=level, since=since, until=until)  # type: ignore[arg-type]
    try:
        with download(output, force) if isinstance(output, Path) else nullcontext() as file:
            found = operations.tail(
                run, step=step, source=source, child=child, store=store, wanted=wanted, ranks=ranks, notice=warn
            )
            is_watched = follow and found.run.in_progress
            for of, entry in found.entries(follow):
                try:
                    line = _as_json(of, entry) if is_json else _as_text(of, entry, found.streams > 1, colours)
                    if file is not None:
                        file.write(line if colours else click.unstyle(line))
                    else:
                        # With `--raw` a pipe gets the colours too.
                        click.echo(line, color=True if colours else None)
                except (ValueError, OverflowError) as error:
                    # Such as a time of the year 1, or a character that the output's encoding does not have.
                    raise operations.NoAnswerError(f"an entry cannot be shown: {error}") from None
            if file is not None:
                file.is_complete = found.shown > 0
    except KeyboardInterrupt:
        sys.exit(130)
    if file is not None and file.is_complete and not is_quiet():
        say(f"'{file.path}' has {counted(found.shown, 'entry')}.")
    again = [option for name, value in (("--step", step), ("--source", source)) if value for option in (name, value)]
    _end(found, is_watched, command("logs", run, *([store] if store else []), *again), store)


def _end(found: Tail, is_watched: bool, again: str, store: str | None) -> None:
    """Say which streams were not shown and where they are, and exit with 1 if nothing was shown.

    Args:
        found: What was found.
        is_watched: Whether the run was watched from before its end: then nothing may be all that there is.
        again: The command without a child to read from, and without filters.
        store: The log store that was named.
    """
    missing = found.missing
    if missing:
        warn(f"Nothing found for {', '.join(sorted(missing))}: {next(iter(missing.values()))}")
    if found.unread:
        warn(f"Not read: {', '.join(sorted(found.unread))}: {next(iter(found.unread.values()))}")
    if not found.streams and not found.unread:
        warn(f"Run '{found.run.name}' has no such logs.")
    if found.streams and (missing or not found.shown):
        _say_where(found, again, store)
    if len(missing) == found.streams or not (found.shown or is_watched):
        sys.exit(1)


def _say_where(found: Tail, again: str, store: str | None) -> None:
    """Say which child was asked for the logs that were not found, and which ones have them."""
    with console(stderr=True).status("Asking the other children ..."):
        where = found.whereabouts()
    if where.is_silent:
        warn(f"Nothing was logged: the logs of run '{found.run.name}' that you asked for are empty.")
        return
    asked = where.asked[:1].upper() + where.asked[1:]
    if where.is_filtered:
        warn(f"{asked} has logs of run '{found.run.name}', but none that you asked for.")
        return
    warn(f"{asked} was asked, and has {'not all' if found.shown else 'no such'} logs of run '{found.run.name}'.")
    if where.holders:
        warn(f"Child {quoted(where.holders)} has:\n{again} --from {where.holders[0]}")
        return
    if where.without:
        warn(f"Nor has child {quoted(where.without)}.")
    for name, why in where.troubles.items():
        warn(f"Child '{name}' cannot be read: {why.rstrip('.')}.")
    if store is None:
        warn(f"Another log store may hold copies. This command reads it:\n{command('logs', found.run.name, 'STORE')}")


def _as_text(of: RunStream, entry: LogEntry, is_labelled: bool, colours: bool) -> str:
    level = entry.level.name if entry.level else ""
    time = entry.timestamp.astimezone().strftime("%Y-%m-%d %H:%M:%S.%f")[:-3] if entry.timestamp else ""
    rank = operations.rank_of(entry)
    labels = [inert(of.label, "")] * is_labelled + [f"rank {rank}"] * (rank is not None)
    label = f" [{' '.join(labels)}]" if labels else ""
    message = paragraph(entry.message, colours)
    return f"{click.style(time, dim=True)} {click.style(f'{level:8}', fg=_COLOURS.get(level))}{label} {message}"


_COLOURS = {"DEBUG": "blue", "WARN": "yellow", "ERROR": "red", "CRITICAL": "red"}


def _as_json(of: RunStream, entry: LogEntry) -> str:
    return inert_json(
        {
            "timestamp": entry.timestamp.isoformat() if entry.timestamp else None,
            "level": entry.level.name if entry.level else None,
            "message": entry.message,
            "rank": operations.rank_of(entry),
            "logger": entry.name,
            "file": entry.filename,
            "line": entry.lineno,
            "id": str(entry.id),
            "run": of.run_name,
            "step": of.step_name or None,
            "source": of.logs.source,
            "logs_id": str(of.logs.id),
        }
    )
