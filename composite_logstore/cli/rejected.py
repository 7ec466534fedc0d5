"""`composite-logstore rejected`."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from itertools import islice
from typing import TYPE_CHECKING, Any

import click
from rich.filesize import decimal

from composite_logstore import operations
from composite_logstore.cli.console import (
    NOTHING_CHANGED,
    Command,
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
from composite_logstore.names import command, counted

if TYPE_CHECKING:
    from composite_logstore.operations import RejectedEvents, Retried
    from composite_logstore.spool.format import RejectedEvent


@click.group()
def rejected() -> None:
    """Manage events that a backend has rejected."""


# Showing


def _at(time_unix_nano: int) -> str:
    return datetime.fromtimestamp(time_unix_nano / 1e9, tz=timezone.utc).isoformat(timespec="seconds")


def _show(found: Iterable[RejectedEvents]) -> None:
    """Show a table of rejected events: a row for each child and reason."""
    rows = []
    for one in found:
        child, size, since = one.child, decimal(one.bytes), _at(one.oldest) if one.oldest else ""
        for reason, number in one.reasons.most_common() or [("", 0)]:
            rows.append([child, f"{number:,}", since, size, reason])
            child = size = since = ""
    if rows:
        show_table(["Child", "Events", "Since", "On disk", "Reason"], rows, ["Events", "On disk"])
    for one in found:
        if one.uncertain:
            say(
                f"Child '{one.child}': {one.uncertain:,} of them may have been taken: the backend did not say which "
                "ones it rejected. '--uncertain' sends these, too."
            )
        if one.damaged:
            say(f"Child '{one.child}': {counted(one.damaged, 'line')} cannot be read.")
        if one.discarded:
            say(f"Child '{one.child}': {counted(one.discarded, 'older event')} had to make room for newer ones.")
        if one.obstacle:
            say(f"Child '{one.child}': {one.obstacle}.")


def _listed(one: RejectedEvents) -> dict[str, Any]:
    """Return rejected events as plain values, with times in seconds since the epoch."""
    return {
        "child": one.child,
        "events": one.events,
        "uncertain": one.uncertain,
        "damaged": one.damaged,
        "discarded": one.discarded,
        "bytes": one.bytes,
        "streams": len(one.streams),
        "oldest": one.oldest / 1e9 if one.oldest else None,
        "reasons": dict(one.reasons),
        "obstacle": one.obstacle,
    }


def _warn_of_none_kept(store: str) -> None:
    if why := operations.why_not_kept(store):
        warn(f"Rejected events of log store '{store}' are not kept: {why}.")


def _say_none(child: str | None) -> None:
    say(f"No rejected events{f' of child {child!r}' if child else ''} on this machine.")


# The commands


_store = click.argument("store")
_child = click.argument("child", required=False)


@rejected.command("list", cls=Command, examples=["rejected list logs", "rejected list logs live --output json"])
@_store
@_child
@output_option
def list_(store: str, child: str | None, output: str) -> None:
    """List rejected events by child and reason.

    Of all children of STORE, or of CHILD alone.

    Exit code: 0, or 2 for wrong usage.
    """
    with status("Reading rejected events ..."):
        found = operations.list_rejected(store, child)
    if output == "json":
        why = operations.why_not_kept(store)
        say_json({"children": list(map(_listed, found)), "not_kept": why})
        return
    _warn_of_none_kept(store)
    _show(found)
    if not found:
        _say_none(child)


@rejected.command(cls=Command, examples=["rejected show logs", "rejected show logs live --limit 1"])
@_store
@_child
@click.option(
    "--limit", metavar="NUMBER", type=click.IntRange(1), default=20, show_default=True, help="The most events to show."
)
@output_option
def show(store: str, child: str | None, limit: int, output: str) -> None:
    """Show rejected events with all their fields and the backend's reason, oldest first.

    Of all children of STORE, or of CHILD alone.

    Exit code: 0, or 2 for wrong usage.
    """
    found = operations.show_rejected(store, child)
    shown = list(islice(found, limit))
    is_more = next(found, None) is not None
    if output == "json":
        say_json({"events": [_fields(name, one) for name, one in shown], "is_complete": not is_more})
        return
    for name, one in shown:
        _show_event(name, one)
    if not shown:
        _warn_of_none_kept(store)
        _say_none(child)
    if is_more:
        say(f"There are more than these {limit:,}: raise '--limit'.", style="info")


def _show_event(child: str, one: RejectedEvent) -> None:
    """Show an event: one line for each field, with further lines of a text below it."""
    among = "" if one.is_certain else f" ({one.number:,} of {one.among:,}, not known which)"
    say(f"Rejected by child '{child}' at {_at(one.time_unix_nano)}{among}: {one.reason}", style="bold")
    for name, value in _event_fields(one).items():
        if value not in (None, "", {}, False):
            say(f"  {name}: {value}")


def _fields(child: str, one: RejectedEvent) -> dict[str, Any]:
    """Return a rejected event as plain values, with the time of the rejection in seconds since the epoch."""
    return {
        "child": child,
        "reason": one.reason,
        "rejected": one.time_unix_nano / 1e9,
        "is_certain": one.is_certain,
        "number": one.number,
        "among": one.among,
        "event": _event_fields(one),
    }


def _event_fields(one: RejectedEvent) -> dict[str, Any]:
    event = one.event
    fields = event._asdict()
    del fields["stream"]
    error, trace = event.exception, event.trace
    return {
        "uid": event.uid,
        "stream": str(event.stream.id),
        **fields,
        "exception": error._asdict() if error else None,
        "trace": {**trace._asdict(), "trace_id": f"{trace.trace_id:032x}", "span_id": f"{trace.span_id:016x}"}
        if trace
        else None,
        "stream_attributes": event.stream.attributes,
    }


@rejected.command(cls=Command, examples=["rejected retry logs", "rejected retry logs old --to new"])
@_store
@_child
@click.option("--to", metavar="CHILD", help="Send them through this child of the same log store.")
@click.option("--uncertain", is_flag=True, help="Send events, too, that the backend may have taken.")
@dry_run_option
@output_option
def retry(store: str, child: str | None, to: str | None, uncertain: bool, dry_run: bool, output: str) -> None:
    """Send rejected events again, with the present settings.

    Of all children of STORE, or of CHILD alone, even if it was renamed or removed.

    Events that are taken are removed; events that are rejected again stay, with the new reason. Gives up on a child as
    soon as it is unavailable, after 30 s without an answer, or if it rejects ten events in a row. If interrupted, the
    same command resumes.

    Exit code: 0 if no rejected events remain, or would after '--dry-run', 1 if some do, 2 for wrong usage, 3 if another
    process works on them.
    """
    if to and not child:
        raise click.UsageError("'--to' needs CHILD: name the child whose events to send through it.")
    result: list[Retried] = []
    is_interrupted = False
    try:
        with status("Sending rejected events ..."):
            operations.retry_rejected(store, child, to, uncertain=uncertain, dry_run=dry_run, result=result)
    except KeyboardInterrupt:
        is_interrupted = True
    remain = is_interrupted or any(_remain(one, dry_run) for one in result)
    if output == "json":
        say_json(
            {"dry_run": dry_run, "interrupted": is_interrupted, "children": [_retried(one) for one in result]},
        )
        sys.exit(int(remain))
    for one in result:
        _say_retried(one, dry_run)
    if not result and not is_interrupted:
        _say_none(child)
    if is_interrupted:
        warn("Interrupted. Run the same command again to resume.")
    elif dry_run:
        say(NOTHING_CHANGED)
    sys.exit(int(remain))


def _remain(one: Retried, dry_run: bool) -> bool:
    return bool(one.obstacle or one.remaining > one.delivered) if dry_run else one.remaining > 0


def _retried(one: Retried) -> dict[str, Any]:
    return {
        "child": one.child,
        "to": one.taker or None,
        "delivered": one.delivered,
        "rejected": dict(one.rejected),
        "withheld": dict(one.withheld),
        "remaining": one.remaining,
        "obstacle": one.obstacle,
    }


def _say_retried(one: Retried, dry_run: bool) -> None:
    through = f" through '{one.taker}'" if one.taker and one.taker != one.child else ""
    if dry_run:
        if not one.obstacle:
            say(f"{counted(one.delivered, 'event')} of child '{one.child}' would be sent{through}.")
    else:
        parts = [f"{counted(one.delivered, 'event')} of child '{one.child}' delivered{through}"]
        parts += [f"{number:,} rejected again ({reason})" for reason, number in one.rejected.items()]
        parts += [f"{number:,} withheld ({reason})" for reason, number in one.withheld.items()]
        say(f"{', '.join(parts)}.")
    left = one.remaining - (one.delivered if dry_run else 0)
    if one.obstacle or left > 0:
        why = f": {one.obstacle}" if one.obstacle else ""
        left = one.remaining if one.obstacle else left
        say(f"Child '{one.child}': {counted(left, 'rejected event')} remain{'s' if left == 1 else ''}{why}.")


@rejected.command(cls=Command, examples=["rejected purge logs live", "rejected purge logs --dry-run"])
@_store
@_child
@dry_run_option
@yes_option
@output_option
def purge(store: str, child: str | None, dry_run: bool, yes: bool, output: str) -> None:
    """Delete rejected events for good.

    Of all children of STORE, or of CHILD alone, even if it was renamed or removed.

    Shows which events would be lost, and asks.

    Exit code: 0 if none remain, or after '--dry-run', 1 if some do or you answered no, 2 for wrong usage, 3 if another
    process works on them.
    """
    found = operations.list_rejected(store, child)
    is_json = output == "json"
    if not is_json:
        _show(found)
    if found and not dry_run:
        if not yes:
            ask(f"Lost for good: {_loss(found)}. Purge it?", abort=True)
        operations.purge_rejected(store, child)
    if is_json:
        say_json({"dry_run": dry_run, "purged": list(map(_listed, found))})
    elif not found:
        _say_none(child)
    elif dry_run:
        say(f"Would be lost for good: {_loss(found)}.")
        say(NOTHING_CHANGED)
    else:
        say(f"Purged: {_loss(found)}.")
        say(f"More may be rejected: {command('rejected', 'list', store)}", style="info")


def _loss(found: Sequence[RejectedEvents]) -> str:
    parts = [f"{counted(one.events, 'rejected event')} of child '{one.child}'" for one in found]
    if damaged := sum(one.damaged for one in found):
        parts.append(f"{counted(damaged, 'line')} that cannot be read")
    return ", ".join(parts)
