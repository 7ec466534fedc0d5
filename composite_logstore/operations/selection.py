"""Which streams a command means: those of a run, of a range of time, or all; and the bar while it goes through them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

import click
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from composite_logstore.catalog.stores import (
    RegisteredStore,
    RunStream,
    asking_zenml,
    count_runs,
    find_run,
    streams_of_project,
    streams_of_run,
)
from composite_logstore.cli.console import console
from composite_logstore.cli.options import Moment
from composite_logstore.config import ChildConfig
from composite_logstore.inert import inert
from composite_logstore.spool.settings import spool_root

Command = TypeVar("Command", bound=Callable[..., Any])


def selection_options(command: Command) -> Command:
    """Add the options that say which streams are meant."""
    for option in (
        click.option("--all", "everything", is_flag=True, help="All runs of the active project."),
        click.option("--until", type=Moment(), help="Only runs that had begun by then."),
        click.option("--since", type=Moment(), help="Only runs that had not ended by then: 2h, 3d, 2026-01-31."),
        click.option("--run", "run", metavar="NAME|ID", help="Only this run."),
    ):
        command = option(command)
    return command


@dataclass(frozen=True)
class Selection:
    """Which streams are meant.

    Attributes:
        run: The name or id of a run, if only that one is meant.
        since: Since when, if only a range of time is.
        until: Until when, the same.
    """

    run: str | None
    since: datetime | None
    until: datetime | None

    @classmethod
    def of(cls, run: str | None, since: datetime | None, until: datetime | None, everything: bool) -> Selection:
        """Check that exactly one of them was given.

        Raises:
            click.UsageError: It is not so.
        """
        given = [bool(run), bool(since or until), everything]
        if sum(given) != 1:
            raise click.UsageError("Say which streams are meant: '--run', '--since' and '--until', or '--all'.")
        return cls(run, since, until)

    def streams(self, ids: set[UUID | None], bars: Bars) -> Iterator[RunStream]:
        """Yield the streams that these log stores collected.

        Raises:
            click.BadParameter: There is no such run.
            NoAnswer: ZenML cannot be asked.
        """
        if self.run is not None:
            found = streams_of_run(find_run(self.run, "--run"))
        else:
            bars.expect(count_runs(self.since, self.until))
            found = streams_of_project(since=self.since, until=self.until)
        for stream in found:
            bars.at(stream)
            if collector_of(stream) in ids:
                yield stream


def collector_of(stream: RunStream) -> UUID | None:
    """Return the id of the log store that collected a stream; ZenML's own in an artifact store goes by that's id."""
    return stream.logs.log_store_id or stream.logs.artifact_store_id


def log_stores_of(store: RegisteredStore, children: list[ChildConfig]) -> dict[UUID | None, str]:
    """Return which log stores collected streams that these children may hold: the composite, and earlier ones.

    Returns:
        A log store's id → the name of the child that it is, empty for the composite itself.
    """
    found: dict[UUID | None, str] = {store.store.id: ""}
    for child in children:
        component = getattr(child, "component", None)
        if isinstance(component, str):
            with asking_zenml():
                from zenml.client import Client
                from zenml.enums import StackComponentType

                for kind in (StackComponentType.LOG_STORE, StackComponentType.ARTIFACT_STORE):
                    try:
                        model = Client().get_stack_component(kind, component, allow_name_prefix_match=False)
                    except (KeyError, ValueError):
                        continue
                    found.setdefault(model.id, child.name)
    return found


def state_folder(command: str) -> Path:
    """Return where a command notes how far it has come."""
    return spool_root(None).parent / command


class Bars(Progress):
    """A bar over runs, with the events that were looked at and how many there are in a second."""

    def __init__(self, what: str) -> None:
        out = console(stderr=True)
        columns: tuple[ProgressColumn, ...] = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            _Events(),
            TimeRemainingColumn(),
        )
        super().__init__(*columns, console=out, transient=True, disable=not out.is_terminal)
        self.events = 0
        self._runs: set[UUID] = set()
        self._bar = self.add_task(what, total=None, events=0)

    def expect(self, runs: int) -> None:
        """Say how many runs there are."""
        self.update(self._bar, total=runs)

    def at(self, stream: RunStream) -> None:
        """Say which stream is next."""
        self.update(self._bar, completed=len(self._runs), description=inert(f"{stream.run_name} {stream.label}", ""))
        self._runs.add(stream.run_id)

    def tell(self, number: int) -> None:
        """Say how many more events were looked at."""
        self.events += number
        self.update(self._bar, events=self.events)


class _Events(ProgressColumn):
    def render(self, task: Task) -> Text:
        events = task.fields["events"]
        rate = events / task.elapsed if task.elapsed else 0
        return Text(f"{events:,} events, {rate:,.0f}/s")
