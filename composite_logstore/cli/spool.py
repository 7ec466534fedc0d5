"""`composite-logstore spool`."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar, cast

import click
from rich.filesize import decimal

from composite_logstore import operations
from composite_logstore.cli.console import (
    NOTHING_CHANGED,
    Command,
    age,
    ask,
    dry_run_option,
    output_option,
    say,
    say_json,
    show_table,
    status,
    warn,
    yes_option,
)
from composite_logstore.names import counted, quoted

if TYPE_CHECKING:
    from uuid import UUID

    from composite_logstore.delivery.account import ChildStats
    from composite_logstore.operations import Drained, Inventory
    from composite_logstore.operations.inventory import Backlog, ChildBacklog, LogStore

Why: TypeAlias = "Callable[[Backlog, ChildBacklog | None], str]"


@click.group()
def spool() -> None:
    """Manage undelivered events on this machine."""


# Reading


_Function = TypeVar("_Function", bound=Callable[..., Any])


def _stores_argument(function: _Function) -> _Function:
    """Add the log stores that a command works on: arguments, or the option of the same meaning."""

    @wraps(function)
    def with_stores(*args: Any, components: tuple[str, ...], stores: tuple[str, ...], **kwargs: Any) -> Any:
        return function(*args, stores=(*stores, *components), **kwargs)

    argument = click.argument("stores", metavar="[STORE]...", nargs=-1)
    option = click.option("--component", "components", metavar="STORE", multiple=True, help="As STORE.")
    return cast("_Function", argument(option(with_stores)))


def _look_around() -> Inventory:
    here = operations.inventory()
    if here.zenml_error:
        warn(
            f"ZenML cannot be reached ({here.zenml_error}; `zenml status` says more): log stores below ZenML's "
            f"configuration folder are shown by their ids, others are not found."
        )
    return here


def _read(folders: dict[Path, LogStore], children: Sequence[str] = ()) -> list[Backlog]:
    with status("Reading undelivered events ..."):
        return operations.backlogs(folders, children)


# Showing


def _as_json(found: Iterable[Backlog], why: Why) -> list[dict[str, Any]]:
    """Return backlogs as plain values, with times in seconds since the epoch."""
    return [
        {
            "log_store": {"id": str(backlog.store.id), "name": backlog.store.name},
            "process": backlog.process or None,
            "folder": str(backlog.folder),
            "bytes": backlog.bytes,
            "damaged": backlog.damaged,
            "why": why(backlog, None),
            "children": [
                {
                    "name": part.child,
                    "streams": len(part.streams),
                    "events": part.events,
                    "oldest": part.oldest / 1e9,
                    "why": why(backlog, part),
                }
                for part in backlog.parts
            ],
        }
        for backlog in found
    ]


def _set_aside(homes: Iterable[Path]) -> list[str]:
    """Return the files with pieces that could not be read."""
    from composite_logstore.spool.damage import damaged

    return [str(file) for home in homes for file in damaged(home)]


def _show(found: Iterable[Backlog], why: Why) -> None:
    """Show a table of backlogs: a row for each child, and one for a folder without."""
    rows = []
    for backlog in found:
        of_process, on_disk = [backlog.store.label, backlog.process], decimal(backlog.bytes)
        for part in backlog.parts:
            counts = [f"{len(part.streams):,}", f"{part.events:,}", on_disk, age(time.time() - part.oldest / 1e9)]
            rows.append([*of_process, part.child, *counts, why(backlog, part)])
            of_process, on_disk = ["", ""], ""
        if not backlog.parts:
            rows.append([*of_process, "", "", "", on_disk, "", why(backlog, None)])
    numbers = ["Streams", "Events", "On disk", "Age"]
    if rows:
        show_table(["Log store", "Process", "Child", *numbers, "Why"], rows, numbers)


def _show_damaged(homes: Iterable[Path]) -> list[Path]:
    """Say where the pieces that could not be read are kept, and return them."""
    from composite_logstore.spool.damage import damaged

    pieces = []
    for home in homes:
        if files := damaged(home):
            size = decimal(sum(map(_size, files)))
            say(f"Could not be read, and kept aside: {counted(len(files), 'file')} ({size}) in {files[0].parent}")
            pieces += files
    return pieces


def _size(file: Path) -> int:
    try:
        return file.lstat().st_size
    except OSError:
        return 0


def _say_none(zenml_error: str, of: str = "", where: str = "") -> None:
    """Say that no events wait, as far as that is known.

    Raises:
        NoAnswerError: ZenML, which knows further folders, cannot be reached.
    """
    if zenml_error:
        from composite_logstore.spool.settings import spool_root

        raise operations.NoAnswerError(
            f"No undelivered events{of} in {spool_root(None)}. Whether there are any in other folders is unknown "
            f"without ZenML."
        )
    say(f"No undelivered events{of}{where}.")


def _end(remaining: Sequence[Backlog], children: Sequence[str], why: Why, zenml_error: str = "") -> None:
    """Show the events that are still undelivered, and exit with 1 if there are any."""
    of = f" for child {quoted(children)}" if children else ""
    if not remaining:
        _say_none(zenml_error, of)
        return
    say(f"Undelivered events{of}:")
    _show(remaining, why)
    sys.exit(1)


# The commands


@spool.command("list", cls=Command, examples=["spool list", "spool list logs --output json"])
@_stores_argument
@output_option
def list_(stores: tuple[str, ...], output: str) -> None:
    """List undelivered events, and why they wait.

    Of all log stores, or of each STORE that you name.

    Exit code: 0, or 3 if ZenML cannot be reached and nothing was found without it.
    """
    here = _look_around()
    folders = here.select(stores, ())
    found = _read(folders)

    def why(backlog: Backlog, part: ChildBacklog | None) -> str:
        return backlog.barred or _reason(backlog, part)

    if output == "json":
        aside = _set_aside(folders)
        say_json({"zenml_error": here.zenml_error, "backlogs": _as_json(found, why), "set_aside": aside})
        if here.zenml_error and not stores and not found and not aside:
            sys.exit(3)
        return
    _show(found, why)
    for home in dict.fromkeys(backlog.home for backlog in found):
        say(f"{here.folders[home].label}: {home}", style="info")
    for backlog in found:
        if backlog.damaged:
            say(
                f"{counted(backlog.damaged, 'piece')} of {backlog.folder} cannot be read. The intact events can be "
                f"delivered."
            )
    if not _show_damaged(folders) and not found:
        # The folder of a log store that was given by its id is known.
        _say_none("" if stores else here.zenml_error, where="" if stores else " on this machine")


def _reason(backlog: Backlog, part: ChildBacklog | None) -> str:
    return backlog.unattended or (part.why if part else "nothing waits there")


@spool.command(cls=Command, examples=["spool drain", "spool drain logs", "spool drain logs --child old --to new"])
@_stores_argument
@click.option(
    "--child",
    "children",
    metavar="NAME",
    multiple=True,
    help="Only events for this child, even if it was renamed or removed. Can be repeated.",
)
@click.option("--to", metavar="CHILD", help="Deliver them through this child of the same log store.")
@dry_run_option
@output_option
def drain(stores: tuple[str, ...], children: tuple[str, ...], to: str | None, dry_run: bool, output: str) -> None:
    """Deliver undelivered events.

    Of all log stores, or of each STORE that you name.

    Running processes deliver their own events. Gives up on a child after 30 s without progress, or as soon as it is
    unavailable. If interrupted, the same command resumes.

    Exit code: 0 if no undelivered events remain, or would after '--dry-run', 1 if some do, 2 for wrong usage.
    """
    if to and not children:
        raise click.UsageError("'--to' needs '--child': name the child whose events to deliver through it.")
    from composite_logstore.cli.progress import DrainBars

    result = operations.Drained()
    is_interrupted = False
    try:
        with DrainBars() as bars:
            operations.drain(stores, children, to, dry_run=dry_run, progress=bars.show, notice=warn, result=result)
    except KeyboardInterrupt:
        if not result.folders:
            # Nothing has been delivered: the folders were still looked up.
            raise
        is_interrupted = True
    if output == "json":
        sys.exit(_say_drained(result, dry_run, is_interrupted))
    if dry_run and not is_interrupted:
        _show_plans(result)
        return
    for store, child, account in result.accounts:
        if account.accepted > account.pending:
            say(f"{store.label}: {_account(child, account, to)}.")
    if is_interrupted:
        warn("Interrupted. The progress is saved on disk: run the same command again to resume.")
        sys.exit(1)
    _show_damaged(result.folders)
    _end(result.remaining(), children, partial(_why_left, result))


def _why_left(result: Drained, backlog: Backlog, part: ChildBacklog | None) -> str:
    error = result.error(backlog, part.child) if part else ""
    return error or backlog.barred or (part.why if part else "")


def _planned(result: Drained) -> tuple[list[Backlog], Why]:
    """Return what a drain would work on, and what it would do with it."""
    plans = {(plan.backlog.folder, plan.part.child): plan for plan in result.plans}

    def what(backlog: Backlog, part: ChildBacklog | None) -> str:
        if part is None:
            return ""
        plan = plans[backlog.folder, part.child]
        through = f" through '{plan.taker}'" if plan.taker != part.child else ""
        return plan.obstacle or f"would be delivered{through}"

    # A folder with several children is one backlog.
    return list({plan.backlog.folder: plan.backlog for plan in result.plans}.values()), what


def _say_drained(result: Drained, dry_run: bool, is_interrupted: bool) -> int:
    """Print the result of a drain as JSON, and return the exit code."""
    accounts = [
        {
            "log_store": {"id": str(store.id), "name": store.name},
            "child": child,
            "delivered": account.delivered,
            "rejected": account.rejected_reasons,
            "withheld": account.withheld_reasons,
            "unreadable": account.dropped,
        }
        for store, child, account in result.accounts
        if account.accepted > account.pending
    ]
    is_plan = dry_run and not is_interrupted
    found, why = _planned(result) if is_plan else (result.remaining(), partial(_why_left, result))
    say_json(
        {
            "dry_run": dry_run,
            "interrupted": is_interrupted,
            "accounts": accounts,
            "backlogs": _as_json(found, why),
            "set_aside": _set_aside(result.folders),
        }
    )
    is_left = any(plan.obstacle for plan in result.plans) if is_plan else bool(found)
    return int(is_left or is_interrupted)


def _show_plans(result: Drained) -> None:
    """Show what a drain would do, and exit with 1 if it would leave events behind."""
    if not result.plans:
        say("No undelivered events.")
        return
    _show(*_planned(result))
    say(NOTHING_CHANGED)
    if any(plan.obstacle for plan in result.plans):
        sys.exit(1)


def _account(child: str, account: ChildStats, to: str | None) -> str:
    delivered = f"{counted(account.delivered, 'event')} of child '{child}' delivered" + (
        f" through '{to}'" if to else ""
    )
    rejected = [f"{number:,} rejected ({reason})" for reason, number in account.rejected_reasons.items()]
    withheld = [f"{number:,} withheld ({reason})" for reason, number in account.withheld_reasons.items()]
    unreadable = [f"{counted(account.dropped, 'piece')} could not be read"] if account.dropped else []
    return ", ".join([delivered, *rejected, *withheld, *unreadable])


@spool.command("purge", cls=Command, examples=["spool purge --dry-run", "spool purge logs --child old"])
@_stores_argument
@click.option(
    "--child",
    "children",
    metavar="NAME",
    multiple=True,
    help="Only events for this child; those for other children stay. Can be repeated.",
)
@dry_run_option
@yes_option
@output_option
def purge_(stores: tuple[str, ...], children: tuple[str, ...], dry_run: bool, yes: bool, output: str) -> None:
    """Delete undelivered events without delivering them.

    Of all log stores, or of each STORE that you name.

    Shows which events would be lost, and asks. Leaves events of running processes alone.

    Exit code: 0 if no undelivered events remain, or would after '--dry-run', 1 if some do, 2 for wrong usage, 3 if
    ZenML cannot be reached and nothing was found without it.
    """
    here = _look_around()
    folders = here.select(stores, children)
    everything = _read(folders, children)
    found = [one for one in everything if not one.barred and (one.parts or not children)]
    loses = any(backlog.parts or backlog.damaged for backlog in found)
    is_json = output == "json"
    if not is_json:
        _show(found, _reason)
        if loses:
            say(f"{'Would be lost' if dry_run else 'Lost'} for good: {_loss(found, children)}.")
    if dry_run:
        errors = operations.purge(found, children, dry_run=True)
        remaining = [one for one in everything if one.holds_events and (one.barred or one.folder in errors)]
    else:
        if loses and not yes:
            ask(f"Lost for good: {_loss(found, children)}. Purge it?" if is_json else "Purge it?", abort=True)
        errors = operations.purge(found, children)
        _purge_set_aside(folders, children, yes, is_json)
        remaining = [backlog for backlog in _read(folders, children) if backlog.holds_events]

    def why(backlog: Backlog, part: ChildBacklog | None) -> str:
        return errors.get(backlog.folder) or backlog.barred or (part.why if part else "")

    # The folder of a log store that was given by its id is known.
    zenml_error = "" if stores else here.zenml_error
    if is_json:
        purged = [one for one in found if one.folder not in errors]
        values = {"dry_run": dry_run, "purged": _as_json(purged, _reason), "backlogs": _as_json(remaining, why)}
        say_json({**values, "set_aside": _set_aside(folders), "zenml_error": here.zenml_error})
        sys.exit(1 if remaining else 3 if zenml_error and not dry_run else 0)
    if not dry_run:
        _end(remaining, children, why, zenml_error)
        return
    if remaining:
        say("These would remain:")
        _show(remaining, why)
    say(NOTHING_CHANGED)
    if remaining:
        sys.exit(1)


def _purge_set_aside(folders: Iterable[Path], children: Sequence[str], yes: bool, is_json: bool) -> None:
    """Delete the pieces that could not be read and are kept aside, after a question."""
    if children:
        return
    pieces = [Path(file) for file in _set_aside(folders)] if is_json else _show_damaged(folders)
    text = f"{counted(len(pieces), 'file')} could not be read. " if is_json else ""
    if pieces and (yes or ask(f"{text}Delete this too?")):
        for piece in pieces:
            _delete(piece)


def _delete(piece: Path) -> None:
    from composite_logstore.spool.damage import remove_damaged

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
        f"{counted(number, 'event')} of {counted(len(streams[child]), 'stream')} for child '{child}'"
        for child, number in events.items()
    ]
    if pieces := sum(backlog.damaged for backlog in found):
        lost.append(f"{counted(pieces, 'piece')} that cannot be read")
    if not children:
        lost.append(f"{decimal(sum(backlog.bytes for backlog in found))} on disk")
    return ", ".join(lost)
