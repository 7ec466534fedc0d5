"""`composite-logstore spool`."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from uuid import UUID

import click
from rich.filesize import decimal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from composite_logstore import operations
from composite_logstore.cli.console import Command, console, say, show_table, warn
from composite_logstore.delivery.account import ChildStats
from composite_logstore.inert import inert
from composite_logstore.names import quoted
from composite_logstore.operations.drain import Drained
from composite_logstore.operations.inventory import Backlog, ChildBacklog, Inventory, LogStore, backlogs, purge
from composite_logstore.spool.damage import damaged, remove_damaged

Why = Callable[[Backlog, ChildBacklog | None], str]


@click.group()
def spool() -> None:
    """Manage undelivered events on this machine."""


# Reading


_component_option = click.option(
    "--component", "stores", metavar="NAME|ID", multiple=True, help="Only this log store. Can be repeated."
)


def _look_around() -> Inventory:
    here = operations.inventory()
    if here.zenml_error:
        warn(
            f"ZenML cannot be reached ({here.zenml_error}; `zenml status` says more): log stores below ZenML's "
            f"configuration folder are shown by their ids, others are not found."
        )
    return here


def _read(folders: dict[Path, LogStore], children: Sequence[str] = ()) -> list[Backlog]:
    with console().status("Reading undelivered events ..."):
        return backlogs(folders, children)


# Showing


def _show(found: Iterable[Backlog], why: Why) -> None:
    """Show a table of backlogs: a row for each child, and one for a folder without."""
    rows = []
    for backlog in found:
        of_process, on_disk = [backlog.store.label, backlog.process], decimal(backlog.bytes)
        for part in backlog.parts:
            numbers = [f"{len(part.streams):,}", f"{part.events:,}", on_disk, _age(part.oldest)]
            rows.append([*of_process, part.child, *numbers, why(backlog, part)])
            of_process, on_disk = ["", ""], ""
        if not backlog.parts:
            rows.append([*of_process, "", "", "", on_disk, "", why(backlog, None)])
    counted = ["Streams", "Events", "On disk", "Age"]
    if rows:
        show_table(["Log store", "Process", "Child", *counted, "Why"], rows, counted)


def _age(time_unix_nano: float) -> str:
    seconds = max(0.0, time.time() - time_unix_nano / 1e9)
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds // size:.0f} {unit}"
    return f"{seconds:.0f} s"


def _number(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _show_damaged(homes: Iterable[Path]) -> list[Path]:
    """Say where the pieces that could not be read are kept, and return them."""
    pieces = []
    for home in homes:
        if files := damaged(home):
            size = decimal(sum(map(_size, files)))
            say(f"Could not be read, and kept aside: {_number(len(files), 'file')} ({size}) in {files[0].parent}")
            pieces += files
    return pieces


def _size(file: Path) -> int:
    try:
        return file.lstat().st_size
    except OSError:
        return 0


def _end(remaining: Sequence[Backlog], children: Sequence[str], why: Why) -> None:
    """Show the events that are still undelivered, and exit with 1 if there are any."""
    of = f" for child {quoted(children)}" if children else ""
    if not remaining:
        say(f"No undelivered events{of}.")
        return
    say(f"Undelivered events{of}:")
    _show(remaining, why)
    sys.exit(1)


# The commands


@spool.command("list", cls=Command)
def list_() -> None:
    """List undelivered events, and why they wait."""
    here = _look_around()
    found = _read(here.folders)
    _show(found, lambda backlog, part: backlog.barred or _reason(backlog, part))
    for home in dict.fromkeys(backlog.home for backlog in found):
        say(f"{here.folders[home].label}: {home}", style="info")
    for backlog in found:
        if backlog.damaged:
            say(
                f"{_number(backlog.damaged, 'piece')} of {backlog.folder} cannot be read. The intact events can be "
                f"delivered."
            )
    if not _show_damaged(here.folders) and not found:
        say("No undelivered events on this machine.")


def _reason(backlog: Backlog, part: ChildBacklog | None) -> str:
    return backlog.unattended or (part.why if part else "nothing waits there")


@spool.command(cls=Command)
@_component_option
@click.option(
    "--child",
    "children",
    metavar="NAME",
    multiple=True,
    help="Only events for this child, even if it was renamed or removed. Can be repeated.",
)
@click.option("--to", metavar="CHILD", help="Deliver them through this child of the same log store.")
def drain(stores: tuple[str, ...], children: tuple[str, ...], to: str | None) -> None:
    """Deliver undelivered events.

    Running processes deliver their own events. Gives up on a child after 30 s without progress, or as soon as it is
    unavailable. If interrupted, the same command resumes.

    Exit code: 0 if no undelivered events remain, 1 if some do, 2 for wrong usage.
    """
    if to and not children:
        raise click.UsageError("'--to' needs '--child': name the child whose events to deliver through it.")
    result = Drained()
    is_interrupted = False
    try:
        with _Bars() as bars:
            operations.drain(stores, children, to, progress=bars.show, notice=warn, result=result)
    except KeyboardInterrupt:
        if not result.folders:
            # Nothing has been delivered: the folders were still looked up.
            raise
        is_interrupted = True
    for store, child, account in result.accounts:
        if account.accepted > account.pending:
            say(f"{store.label}: {_account(child, account, to)}.")
    if is_interrupted:
        warn("Interrupted. The progress is saved on disk: run the same command again to resume.")
        sys.exit(1)
    _show_damaged(result.folders)

    def why(backlog: Backlog, part: ChildBacklog | None) -> str:
        error = result.error(backlog, part.child) if part else ""
        return error or backlog.barred or (part.why if part else "")

    _end(result.remaining(), children, why)


def _account(child: str, account: ChildStats, to: str | None) -> str:
    delivered = f"{_number(account.delivered, 'event')} of child '{child}' delivered" + (
        f" through '{to}'" if to else ""
    )
    rejected = [f"{number:,} rejected ({reason})" for reason, number in account.rejected_reasons.items()]
    unreadable = [f"{_number(account.dropped, 'piece')} could not be read"] if account.dropped else []
    return ", ".join([delivered, *rejected, *unreadable])


class _Bars(Progress):
    """A bar for each child in the folder that is being drained."""

    def __init__(self) -> None:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        out = console()
        super().__init__(*columns, console=out, transient=True, disable=not out.is_terminal)
        self._shown: dict[str, TaskID] = {}

    def show(self, store: LogStore, accounts: dict[str, ChildStats]) -> None:
        """Show how the children stand. It is the operation's `progress` callback."""
        if not accounts:
            for task in self._shown.values():
                self.remove_task(task)
            self._shown.clear()
        for child, account in accounts.items():
            if child not in self._shown:
                self._shown[child] = self.add_task(inert(f"{store.label}: {child}", ""), total=account.accepted)
            self.update(self._shown[child], completed=account.accepted - account.pending)


@spool.command("purge", cls=Command)
@_component_option
@click.option(
    "--child",
    "children",
    metavar="NAME",
    multiple=True,
    help="Only events for this child; those for other children stay. Can be repeated.",
)
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
def purge_(stores: tuple[str, ...], children: tuple[str, ...], yes: bool) -> None:
    """Delete undelivered events without delivering them.

    Shows which events would be lost, and asks. Leaves events of running processes alone.

    Exit code: 0 if no undelivered events remain, 1 if some do, 2 for wrong usage.
    """
    folders = _look_around().select(stores, children)
    found = [one for one in _read(folders, children) if not one.barred and (one.parts or not children)]
    _show(found, _reason)
    if any(backlog.parts or backlog.damaged for backlog in found):
        say(f"Lost for good: {_loss(found, children)}.")
        if not yes:
            click.confirm("Purge it?", abort=True)
    errors = purge(found, children)
    if not children and (pieces := _show_damaged(folders)) and (yes or click.confirm("Delete this too?")):
        for piece in pieces:
            _delete(piece)
    remaining = [backlog for backlog in _read(folders, children) if backlog.holds_events]
    _end(remaining, children, lambda one, part: errors.get(one.folder) or one.barred or (part.why if part else ""))


def _delete(piece: Path) -> None:
    try:
        remove_damaged(piece.parent.parent, piece.name)
    except OSError as error:
        warn(f"{piece} cannot be deleted: {error.strerror or error}")


def _loss(found: Sequence[Backlog], children: Sequence[str]) -> str:
    events: Counter[str] = Counter()
    streams: dict[str, set[UUID]] = {}
    for backlog in found:
        for part in backlog.parts:
            events[part.child] += part.events
            streams.setdefault(part.child, set()).update(part.streams)
    lost = [
        f"{_number(number, 'event')} of {_number(len(streams[child]), 'stream')} for child '{child}'"
        for child, number in events.items()
    ]
    if pieces := sum(backlog.damaged for backlog in found):
        lost.append(f"{_number(pieces, 'piece')} that cannot be read")
    if not children:
        lost.append(f"{decimal(sum(backlog.bytes for backlog in found))} on disk")
    return ", ".join(lost)
