"""Types of options, and options that several commands share."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from composite_logstore.inert import paragraph

if TYPE_CHECKING:
    from composite_logstore.operations import Selection

_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}

Command = TypeVar("Command", bound=Callable[..., Any])


class Moment(click.ParamType):  # type: ignore[type-arg, unused-ignore]
    """A point in time: ISO 8601, local time unless it names a zone, or how long ago it was, such as `90m`."""

    name = "time"

    def convert(self, value: str | datetime, param: click.Parameter | None, context: click.Context | None) -> datetime:
        """Return the point in time."""
        if isinstance(value, datetime):
            return value
        try:
            if match := re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhdw])", value.strip()):
                return datetime.now(timezone.utc) - timedelta(**{_UNITS[match[2]]: float(match[1])})
            # Python 3.10 does not know `Z`.
            return datetime.fromisoformat(re.sub("[zZ]$", "+00:00", value.strip())).astimezone(timezone.utc)
        except (ValueError, OverflowError, OSError):
            self.fail("give a time such as '2026-05-01T12:30', or how long ago it was: '30s', '90m', '2h', '7d'")


class NewFile(click.Path):
    """A file to write, in a folder that exists: a command finds out before its work that it does not."""

    def __init__(self) -> None:
        super().__init__(dir_okay=False, writable=True)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the path of the file."""
        folder = Path(value).absolute().parent
        if not os.access(folder, os.W_OK | os.X_OK):
            self.fail(paragraph(f"a file in '{folder}' cannot be written; name a folder that exists"), param, ctx)
        return str(super().convert(value, param, ctx))


class Level(click.ParamType):  # type: ignore[type-arg, unused-ignore]
    """A log level, by name or number."""

    name = "level"

    def convert(self, value: str, param: click.Parameter | None, context: click.Context | None) -> str:
        """Return the value unchanged if it is a level."""
        from composite_logstore.zenml import LogsEntriesFilter

        try:
            LogsEntriesFilter(level=value)  # type: ignore[arg-type]  # it accepts names
        except ValueError:
            self.fail("it is no log level; give one of DEBUG, INFO, WARN, ERROR, CRITICAL, or its number")
        return value


def selection_options(command: Command) -> Command:
    """Add the options that select streams."""
    for option in (
        click.option("--all", "everything", is_flag=True, help="All runs of the active project."),
        click.option("--until", type=Moment(), help="Only runs that began at or before this time."),
        click.option(
            "--since", type=Moment(), help="Only runs still active at or after this time: 2h, 3d, 2026-01-31."
        ),
        click.option("--run", "run", metavar="NAME|ID", help="Only this run."),
    ):
        command = option(command)
    return command


def selected(run: str | None, since: datetime | None, until: datetime | None, everything: bool) -> Selection:
    """Return what the options select.

    Raises:
        click.UsageError: They are missing, or contradict each other.
    """
    if sum([bool(run), bool(since or until), everything]) != 1:
        raise click.UsageError("Select streams with '--run', with '--since' and '--until', or with '--all'.")
    from composite_logstore.operations import Selection

    return Selection(run, since, until)
