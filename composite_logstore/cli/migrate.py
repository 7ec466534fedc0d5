"""`composite-logstore migrate`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import orjson

from composite_logstore import operations
from composite_logstore.cli.console import (
    NOTHING_CHANGED,
    Command,
    Unanswered,
    ask,
    dry_run_option,
    output_option,
    say,
    say_json,
    show_table,
    warn,
    yes_option,
)
from composite_logstore.cli.options import Moment
from composite_logstore.inert import paragraph
from composite_logstore.names import command

if TYPE_CHECKING:
    from composite_logstore.operations import Move
    from composite_logstore.operations.migrate import Stage

_STAGES = ("build", "check", "switch", "watch", "backfill", "verify", "promote", "retire")

_GIVEN = "composite_logstore.cli.migrate.to"
"""Where the context of the command keeps `--to` as it was given."""
_EXAMPLE = '{"name": "s3", "type": "artifact", "artifact_store": "bucket"}'


class Target(click.ParamType):  # type: ignore[type-arg, unused-ignore]
    """The child to move to: its name, its settings as JSON, or `@` and a file with them."""

    name = "child"

    def convert(
        self, value: str | dict[str, Any], param: click.Parameter | None, ctx: click.Context | None
    ) -> str | dict[str, Any]:
        """Return the name or the settings."""
        if isinstance(value, dict):
            return value
        if ctx is not None:
            ctx.meta[_GIVEN] = value
        if not value.startswith(("@", "{")):
            return value
        where = "it"
        try:
            if value.startswith("@"):
                where = f"'{value[1:]}'"
                value = Path(value[1:]).read_text()
            settings = orjson.loads(value)
        except OSError as error:
            self.fail(paragraph(f"{where} cannot be read: {error.strerror}"), param, ctx)
        except ValueError:
            self.fail(paragraph(f"{where} is not valid JSON; give one child, such as {_EXAMPLE}"), param, ctx)
        if not isinstance(settings, dict) or not isinstance(settings.get("name"), str):
            self.fail(paragraph(f"{where} is no child with a 'name'; give one, such as {_EXAMPLE}"), param, ctx)
        return settings


@click.command(
    cls=Command,
    examples=[
        "migrate production --to @s3.json --status",
        "migrate production --to s3 --wait 3600",
        "migrate production --to s3 --undo",
    ],
)
@click.argument("stack")
@click.option(
    "--to",
    type=Target(),
    metavar="CHILD|JSON|@FILE",
    required=True,
    help="The child to move to: its name if the log store has it, or else its settings as JSON, or a file with them.",
)
@click.option("--name", help="The name of the log store to register.  [default: STACK-logs]")
@click.option("--since", type=Moment(), help="Leave runs behind that ended before this time: 2h, 3d, 2026-01-31.")
@click.option(
    "--wait",
    type=click.FloatRange(min=0),
    default=0,
    metavar="SECONDS",
    help="How long to wait for runs to end or to begin, if a stage needs that.",
)
@click.option("--stop-after", type=click.Choice(_STAGES), help="Stop after this stage.")
@click.option("--status", is_flag=True, help="Show how far the move is, and change nothing.")
@click.option("--undo", "is_undo", is_flag=True, help="Undo the last stage that changed something.")
@dry_run_option
@yes_option
@output_option
@click.pass_context
def migrate(
    context: click.Context,
    stack: str,
    to: str | dict[str, Any],
    name: str | None,
    since: datetime | None,
    wait: float,
    stop_after: str | None,
    status: bool,
    is_undo: bool,
    dry_run: bool,
    yes: bool,
    output: str,
) -> None:
    """Move the logs of a stack to another backend.

    Works stage by stage, while pipelines run: registers a composite log store around the stack's present log store,
    lets runs log to both, copies earlier events, and, when no event is missing from the new child, reads logs from
    there and retires the earlier log store. Asks before each stage that changes something. Whenever it stops, it prints
    the command that continues from there.

    Exit code: 0 if the move is done as far as you asked for, 1 if you have to act first, 2 for wrong usage, 3 if ZenML
    or a child cannot be reached, or the command was interrupted.
    """
    from composite_logstore.operations.migrate import STAGES, undo_command

    if (status and (is_undo or dry_run)) or (is_undo and stop_after):
        raise click.UsageError("Give only one of '--status', '--undo', and '--dry-run' or '--stop-after'.")
    move = operations.find_move(stack, to, name=name, since=since)
    tell = say if output == "text" else _silent
    done: list[dict[str, str]] = []
    stopped, code = "", 0
    try:
        if is_undo:
            done.append(_undo(move, dry_run, yes, tell))
        elif not status:
            _advance(move, wait, stop_after, dry_run, yes, tell, done)
    except operations.MoveStoppedError as error:
        stopped, code = error.message, 1
    except Unanswered as error:
        stopped, code = error.message.rstrip("."), 1
    except KeyboardInterrupt:
        stopped, code = "interrupted", 3
    # The stages that this command has just done need not be shown as next.
    just = () if is_undo or dry_run else [one["stage"] for one in done]
    following = next((stage for stage in STAGES if not stage.is_done(move) and stage.name not in just), None)
    options = ("--wait", f"{wait:g}") if wait else ()
    again = (
        move.command(*options, to=None if move.is_built else _shown(context.meta[_GIVEN], move)) if following else ""
    )
    if output == "json":
        values = _as_json(move, done, stopped, following)
        say_json({**values, "next_command": again or None, "dry_run": dry_run})
    else:
        _show(move, stopped, following, again, status)
        if is_undo and not dry_run and not stopped and (stage := move.last_change):
            say(f"To undo stage '{stage}' as well:\n{undo_command(move)}", style="info")
        if dry_run:
            say(NOTHING_CHANGED)
    sys.exit(code)


def _shown(given: str, move: Move) -> str:
    """Return `--to` as it was given, unless it contains a secret in clear text."""
    from composite_logstore import secret_references
    from composite_logstore.config import CompositeLogStoreConfig

    if not given.startswith("{"):
        return given
    try:
        child = CompositeLogStoreConfig(primary=move.to, children=[move.settings]).child(move.to)  # type: ignore[list-item]  # parsed
        is_clear = any(secret_references.clear_text_fields(child))
    except ValueError:
        is_clear = True
    return "@FILE" if is_clear else given


def _silent(text: str, style: str = "") -> None:
    """Print nothing."""


def _undo(move: Move, dry_run: bool, yes: bool, tell: Callable[..., None]) -> dict[str, str]:
    stage = move.last_change or "nothing"
    if move.last_change and not yes and not dry_run and not ask(f"Undo stage '{stage}'?"):
        raise operations.MoveStoppedError("you answered no")
    text = operations.undo(move, dry_run=dry_run)
    tell(f"{'Would be undone' if dry_run else 'Undone'}: {stage}: {text}.")
    return {"stage": stage, "what": f"{'would be undone' if dry_run else 'undone'}: {text}"}


def _advance(
    move: Move,
    wait: float,
    stop_after: str | None,
    dry_run: bool,
    yes: bool,
    tell: Callable[..., None],
    done: list[dict[str, str]],
) -> None:
    from composite_logstore.cli.progress import Bars

    with Bars("migrate", say=tell) as bars:
        confirm = None if yes else bars.ask
        stages = operations.migrate(
            move,
            wait_seconds=wait,
            stop_after=stop_after,
            dry_run=dry_run,
            confirm=confirm,
            progress=bars.show,
        )
        for stage, text in stages:
            done.append({"stage": stage.name, "what": text})
            bars.stop()
            tell(f"{stage.name}: {text}.")
            if stage.back and not dry_run:
                tell(f"    To undo: {stage.text(move, stage.back)}", "info")


def _as_json(move: Move, done: list[dict[str, str]], stopped: str, following: Stage | None) -> dict[str, Any]:
    from composite_logstore.operations.migrate import STAGES

    log_store = {"id": str(move.found.id), "name": move.name} if move.found else None
    return {
        "stack": {"id": str(move.stack.id), "name": move.stack.name},
        "log_store": log_store,
        "from": move.source.name if move.is_built else None,
        "to": move.to,
        "done": done,
        "stages": {stage.name: stage.is_done(move) for stage in STAGES},
        "next": following.name if following else None,
        "stopped": stopped,
        **move.facts,
    }


def _show(move: Move, stopped: str, following: Stage | None, again: str, has_asked: bool) -> None:
    if has_asked:
        from composite_logstore.operations.migrate import STAGES

        rows = []
        for stage in STAGES:
            mark = "done" if stage.is_done(move) else "next" if stage is following else ""
            rows.append([stage.name, mark, stage.text(move, stage.plan), stage.text(move, stage.back)])
        show_table(["Stage", "", "What", "To undo"], rows)
    if stopped:
        warn(f"Stopped: {stopped}.")
    if following is not None:
        say(f"Next: {following.name}: {following.text(move, following.plan)}:\n{again}", style="info")
        return
    say(f"Stack '{move.stack.name}' has moved to child '{move.to}' of log store '{move.name}'.", style="success")
    say(
        "ZenML's dashboard still reads runs from before the switch where they were collected, so keep that log store. "
        f"`{command('logs', 'RUN', move.name)}` shows the copies.",
        style="info",
    )
