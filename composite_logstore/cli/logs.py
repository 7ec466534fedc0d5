"""`composite-logstore logs`."""

from __future__ import annotations

import sys
from datetime import datetime
from typing import TYPE_CHECKING

import click

from composite_logstore import operations
from composite_logstore.catalog.runs import RunStream
from composite_logstore.cli.console import Command, output_option, say_json, warn
from composite_logstore.cli.options import Level, Moment
from composite_logstore.inert import inert, paragraph
from composite_logstore.operations.tail import Tail

if TYPE_CHECKING:
    from zenml.models import LogEntry


@click.command(cls=Command)
@click.argument("run")
@click.option("--step", metavar="NAME", help="Only the logs of this step.")
@click.option("--source", metavar="NAME", help="Only streams with this source, such as 'step' or 'client'.")
@click.option("--from", "child", metavar="CHILD", help="Read from this child instead of the primary.")
@click.option(
    "--store", metavar="STORE", help="Read from this log store, which may hold copies, whichever collected the logs."
)
@click.option("--follow", "-f", is_flag=True, help="Show new logs until the run has ended.")
@click.option("--since", type=Moment(), help="Only logs at or after this time, or this long ago, such as '90m'.")
@click.option("--until", type=Moment(), help="Only logs at or before this time.")
@click.option("--level", type=Level(), help="Only this level and above.")
@click.option("--search", metavar="TEXT", help="Only logs that contain this text; the backend decides how it matches.")
@click.option("--raw", "colours", is_flag=True, help="Keep the colours of messages.")
@output_option
def logs(
    run: str,
    step: str | None,
    source: str | None,
    child: str | None,
    store: str | None,
    follow: bool,
    since: datetime | None,
    until: datetime | None,
    level: str | None,
    search: str | None,
    colours: bool,
    output: str,
) -> None:
    """Show the logs of a run, or of one of its steps.

    RUN is the name or id of the run. Logs are sorted by time, and read from the log store that collected them. Control
    characters are escaped, and the further lines of a message are indented. With '--output json' each entry is a line
    of JSON.

    Exit code: 0 if logs were shown, 1 if the log store has none, 2 for wrong usage, 3 if ZenML or the backend cannot
    be reached, 130 after Ctrl-C.
    """
    from zenml.models import LogsEntriesFilter

    if colours and output == "json":
        raise click.UsageError("'--raw' is for people; '--output json' always contains the original messages.")
    if follow and until:
        raise click.UsageError("'--follow' and '--until' exclude each other; give one.")
    wanted = LogsEntriesFilter(search=search, level=level, since=since, until=until)  # type: ignore[arg-type]
    try:
        found = operations.tail(run, step=step, source=source, child=child, store=store, wanted=wanted, notice=warn)
        for of, entry in found.entries(follow):
            try:
                if output == "json":
                    _say_as_json(of, entry)
                else:
                    _say(of, entry, found.streams > 1, colours)
            except (ValueError, OverflowError) as error:
                # Such as a time of the year 1, or a character that the output's encoding does not have.
                raise operations.NoAnswerError(f"an entry cannot be shown: {error}") from None
    except KeyboardInterrupt:
        sys.exit(130)
    _end(found)


def _end(found: Tail) -> None:
    """Name the streams that were not shown, and exit with 1 if no stream was."""
    missing = found.missing
    if missing:
        warn(f"Nothing found for {', '.join(sorted(missing))}: {next(iter(missing.values()))}")
    if found.unread:
        warn(f"Not read: {', '.join(sorted(found.unread))}: {next(iter(found.unread.values()))}")
    if not found.streams and not found.unread:
        warn(f"Run '{found.run.name}' has no such logs.")
    if len(missing) == found.streams:
        sys.exit(1)


def _say(of: RunStream, entry: LogEntry, is_labelled: bool, colours: bool) -> None:
    level = entry.level.name if entry.level else ""
    time = entry.timestamp.astimezone().strftime("%Y-%m-%d %H:%M:%S.%f")[:-3] if entry.timestamp else ""
    label = f" [{inert(of.label, '')}]" if is_labelled else ""
    message = paragraph(entry.message, colours)
    click.echo(
        f"{click.style(time, dim=True)} {click.style(f'{level:8}', fg=_COLOURS.get(level))}{label} {message}",
        # With `--raw` a pipe gets the colours too.
        color=True if colours else None,
    )


_COLOURS = {"DEBUG": "blue", "WARN": "yellow", "ERROR": "red", "CRITICAL": "red"}


def _say_as_json(of: RunStream, entry: LogEntry) -> None:
    say_json(
        {
            "timestamp": entry.timestamp.isoformat() if entry.timestamp else None,
            "level": entry.level.name if entry.level else None,
            "message": entry.message,
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
