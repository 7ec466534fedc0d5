"""`composite-logstore spool`: what processes could not deliver, and left on this machine."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple
from uuid import UUID

import click
from rich.filesize import decimal
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from composite_logstore.catalog.errors import ArgumentError, nearest
from composite_logstore.cli.console import Command, Failed, console, say, show_table, warn
from composite_logstore.config import ChildConfig
from composite_logstore.delivery.account import ChildStats
from composite_logstore.inert import inert
from composite_logstore.operations.drain import Drain
from composite_logstore.operations.inventory import (
    Left,
    LogStore,
    Part,
    children_of,
    folders,
    left_in,
    processes_in,
    registered,
)
from composite_logstore.spool.damage import damaged, remove_damaged
from composite_logstore.spool.folder import Spool

Why = Callable[[Left, Part | None], str]


@click.group()
def spool() -> None:
    """See to what processes of log stores could not deliver, and left on this machine."""


# What is here, and what of it is meant

_component_option = click.option(
    "--component", metavar="NAME|ID", multiple=True, help="Only this log store. Can be given several times."
)


class Here(NamedTuple):
    """The folders that log stores may have on this machine, and whether ZenML could be asked for them."""

    folders: dict[Path, LogStore]
    zenml_answers: bool


def _look_around() -> Here:
    try:
        stores = registered()
    except Exception as error:
        # No more than its name: its words may hold what is in a URL.
        warn(
            f"ZenML cannot be asked which log stores there are ({type(error).__name__}; `zenml status` says more): "
            "those below ZenML's configuration folder go by their ids, others are not found."
        )
        return Here(folders([], "ZenML cannot be asked"), False)
    return Here(folders(stores, "the log store is no longer registered"), True)


def _choose(here: Here, components: Sequence[str], children: Sequence[str]) -> dict[Path, LogStore]:
    """Return the folders of the log stores that are meant.

    Raises:
        ArgumentError: There is no such log store, or no such child.
    """
    chosen = here.folders
    if components:
        known = {key: store.id for store in chosen.values() for key in (store.label, str(store.id))}
        for name in components:
            if name not in known:
                hint = "" if here.zenml_answers else "; without ZenML, name it by its id"
                raise ArgumentError("component", f"there is no log store '{name}'{nearest(name, known)}{hint}")
        ids = {known[name] for name in components}
        chosen = {home: store for home, store in chosen.items() if store.id in ids}
    names = {name for home, store in chosen.items() for name in {*store.children, *_children_in(home)}}
    for name in children:
        if name not in names:
            raise ArgumentError("children", f"there is no child '{name}'{nearest(name, names)}")
    return chosen


def _children_in(home: Path) -> set[str]:
    """Return the names of the children that something may be left for."""
    names = set()
    for folder in processes_in(home):
        with suppress(OSError):
            names.update(Spool.look(folder).children)
    return names


def _find(chosen: Mapping[Path, LogStore], children: Sequence[str] = ()) -> list[Left]:
    """Look at all that is left, and there at what waits for the children that are meant."""
    with console().status("Reading what is left ..."):
        found = [left for home, store in chosen.items() for left in left_in(home, store)]
    for left in found:
        left.parts = [part for part in left.parts if part.events and (not children or part.child in children)]
    return found


# In words


def _show(found: Iterable[Left], why: Why) -> None:
    """Show a table of what is left: a row for each part, and one for a folder without."""
    rows = []
    for left in found:
        of_process, on_disk = [left.store.label, left.process], decimal(left.bytes)
        for part in left.parts:
            numbers = [f"{len(part.streams):,}", f"{part.events:,}", on_disk, _age(part.oldest)]
            rows.append([*of_process, part.child, *numbers, why(left, part)])
            of_process, on_disk = ["", ""], ""
        if not left.parts:
            rows.append([*of_process, "", "", "", on_disk, "", why(left, None)])
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


def _quoted(children: Iterable[str]) -> str:
    return ", ".join(f"'{child}'" for child in children)


def _say_what_is_aside(homes: Iterable[Path]) -> list[Path]:
    """Say where the pieces are that could not be read, and return them."""
    pieces = []
    for home in homes:
        if files := damaged(home):
            size = decimal(sum(map(_size, files)))
            say(f"Could not be read, and is kept aside: {_number(len(files), 'file')} ({size}) in {files[0].parent}")
            pieces += files
    return pieces


def _size(file: Path) -> int:
    try:
        return file.lstat().st_size
    except OSError:
        return 0


def _end(chosen: Mapping[Path, LogStore], children: Sequence[str], why: Why) -> None:
    """Say what is left of what was meant, and exit with 1 if something is."""
    left = [left for left in _find(chosen, children) if left.holds_events]
    of = f" for child {_quoted(children)}" if children else ""
    if not left:
        say(f"Nothing is left{of}.")
        return
    say(f"What is left{of}:")
    _show(left, why)
    sys.exit(1)


# The commands


@spool.command("list", cls=Command)
def list_() -> None:
    """List what is left, for which child, and why it is still there."""
    here = _look_around()
    found = _find(here.folders)
    _show(found, lambda left, part: left.barred or left.unattended or (part.why if part else "nothing waits there"))
    for home in dict.fromkeys(left.home for left in found):
        say(f"{here.folders[home].label}: {home}", style="info")
    for left in found:
        if left.damaged:
            say(f"{_number(left.damaged, 'piece')} of {left.folder} cannot be read. What is intact can be delivered.")
    if not _say_what_is_aside(here.folders) and not found:
        say("Nothing is left on this machine.")


@spool.command(cls=Command)
@_component_option
@click.option(
    "--child",
    "children",
    metavar="NAME",
    multiple=True,
    help="Only what waits for this child, even if it was renamed or removed. Can be given several times.",
)
@click.option("--to", metavar="CHILD", help="Deliver that through this child of the same log store.")
def drain(component: tuple[str, ...], children: tuple[str, ...], to: str | None) -> None:
    """Deliver what is left.

    What running processes have is left to them. A child is waited for as long as it makes progress, otherwise for 30
    seconds, and no longer once it is unavailable. Whatever interrupts it, the same command goes on from there.

    Exits with 0 if nothing is left, with 1 if something is, and with 2 if it was called wrongly.
    """
    if to and not children:
        raise click.UsageError("'--to' needs '--child': say whose part is to be delivered through it.")
    here = _look_around()
    if not here.zenml_answers:
        raise Failed("draining needs ZenML, which has the children's settings and secrets.")
    chosen = _choose(here, component, children)
    # A log store may have more than one folder.
    stores = {store.id: store for store in chosen.values()}
    drains = {id: Drain(store, _takers(store, chosen, children, to)) for id, store in stores.items()}
    is_interrupted = False
    try:
        with _Bars() as bars:
            for home, store in chosen.items():
                for folder in processes_in(home):
                    drains[store.id].deliver(folder, bars.of(store))
    except KeyboardInterrupt:
        is_interrupted = True
    for draining in drains.values():
        for child, account in draining.accounts.items():
            if account.accepted > account.pending:
                say(f"{draining.store.label}: {_account(child, account, to)}.")
    if is_interrupted:
        warn("Interrupted. How far it got is noted on disk: the same command goes on from there.")
        sys.exit(1)
    _say_what_is_aside(chosen)

    def why(left: Left, part: Part | None) -> str:
        error = drains[left.store.id].errors.get((left.folder, part.child)) if part else None
        return error or left.barred or (part.why if part else "")

    _end(chosen, children, why)


def _takers(
    store: LogStore, chosen: Mapping[Path, LogStore], children: Sequence[str], to: str | None
) -> dict[str, ChildConfig]:
    """Return which child takes what waits for which.

    Raises:
        ArgumentError: The child that is to take it cannot.
    """
    known = store.children
    if to is None:
        return {name: child for name, child in known.items() if child.enabled and (not children or name in children)}
    left_for = {name for home, other in chosen.items() if other.id == store.id for name in _children_in(home)}
    names = left_for & set(children)
    if not names or store.config is None:
        return {}
    if to not in known:
        raise ArgumentError("to", f"log store '{store.label}' has no child '{to}'{nearest(to, known)}")
    if not known[to].enabled:
        raise ArgumentError("to", f"child '{to}' of log store '{store.label}' is disabled; enable it, or name another")
    if not known[to].wants_all:
        warn(
            f"{store.label}: what the 'min_level' or 'progress' of child '{to}' keeps from it is not delivered to it, "
            f"and is gone for child {_quoted(sorted(names))}."
        )
    return dict.fromkeys(sorted(names), known[to])


def _account(child: str, account: ChildStats, to: str | None) -> str:
    delivered = f"{_number(account.delivered, 'event')} of child '{child}' delivered" + (
        f" through '{to}'" if to else ""
    )
    rejected = [f"{number:,} rejected ({reason})" for reason, number in account.rejected_reasons.items()]
    unreadable = [f"{_number(account.dropped, 'piece')} could not be read"] if account.dropped else []
    return ", ".join([delivered, *rejected, *unreadable])


class _Bars(Progress):
    """A bar for each child in the folder that is being delivered."""

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

    def of(self, store: LogStore) -> Callable[[dict[str, ChildStats]], None]:
        """Return what shows how a folder of the log store stands, and begin anew."""
        for task in self._shown.values():
            self.remove_task(task)
        self._shown.clear()

        def show(accounts: dict[str, ChildStats]) -> None:
            for child, account in accounts.items():
                if child not in self._shown:
                    self._shown[child] = self.add_task(inert(f"{store.label}: {child}", ""), total=account.accepted)
                self.update(self._shown[child], completed=account.accepted - account.pending)

        return show


@spool.command(cls=Command)
@_component_option
@click.option(
    "--child",
    "children",
    metavar="NAME",
    multiple=True,
    help="Only what waits for this child; what others wait for stays. Can be given several times.",
)
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
def purge(component: tuple[str, ...], children: tuple[str, ...], yes: bool) -> None:
    """Delete what is left, undelivered.

    Says what would be lost, and asks. What running processes have is left to them.

    Exits with 0 if nothing is left, with 1 if something is, and with 2 if it was called wrongly.
    """
    chosen = _choose(_look_around(), component, children)
    found = [left for left in _find(chosen, children) if not left.barred and (left.parts or not children)]
    _show(found, lambda left, part: left.unattended or (part.why if part else "nothing waits there"))
    if any(left.parts or left.damaged for left in found):
        say(f"Lost for good: {_loss(found, children)}.")
        if not yes:
            click.confirm("Purge it?", abort=True)
    errors: dict[Path, str] = {}
    for left in found:
        try:
            _purge(left, children)
        except Exception as error:  # whatever is in there, the others are not to suffer from it
            errors[left.folder] = f"cannot be purged: {getattr(error, 'strerror', None) or type(error).__name__}"
    if not children and (pieces := _say_what_is_aside(chosen)) and (yes or click.confirm("Delete this too?")):
        for piece in pieces:
            _delete(piece)
    _end(chosen, children, lambda left, part: errors.get(left.folder) or left.barred or (part.why if part else ""))


def _delete(piece: Path) -> None:
    try:
        remove_damaged(piece.parent.parent, piece.name)
    except OSError as error:
        warn(f"{piece} cannot be deleted: {error.strerror or error}")


def _loss(found: Sequence[Left], children: Sequence[str]) -> str:
    events: Counter[str] = Counter()
    streams: dict[str, set[UUID]] = {}
    for left in found:
        for part in left.parts:
            events[part.child] += part.events
            streams.setdefault(part.child, set()).update(part.streams)
    lost = [
        f"{_number(number, 'event')} of {_number(len(streams[child]), 'stream')} for child '{child}'"
        for child, number in events.items()
    ]
    if pieces := sum(left.damaged for left in found):
        lost.append(f"{_number(pieces, 'piece')} that cannot be read")
    if not children:
        lost.append(f"{decimal(sum(left.bytes for left in found))} on disk")
    return ", ".join(lost)


def _purge(left: Left, children: Sequence[str]) -> None:
    """Delete what a dead process has left for some children, or for all."""
    process = Spool.recover(left.folder)
    if process is None:
        # Somebody delivers it now.
        return
    for name in set(children_of(process, left.store)) - set(process.children):
        process.reset(name)
    for _ in process.reader.scan():
        # Then it is known where it ends.
        pass
    process.set_aside()
    for child in process.children:
        if not children or child in children:
            process.acknowledge(child, max(process.segments.last + 1, process.acknowledged(child)))
    process.close()
