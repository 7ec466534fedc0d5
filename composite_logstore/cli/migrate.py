"""`composite-logstore migrate`: moves a stack from one log store to another, stage by stage."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import click
import orjson

from composite_logstore.catalog.stores import FLAVOR, asking_zenml, mistake, nearest
from composite_logstore.cli.console import ask, output_option, say, say_json, show_table, warn
from composite_logstore.cli.options import Moment
from composite_logstore.operations.migrate import (
    EARLIER,
    LOOK_SECONDS,
    STAGES,
    Move,
    Stage,
    Stopped,
    Waiting,
    component_of,
    earlier_child,
    raw_children,
    undo,
)


@click.command()
@click.argument("stack")
@click.option(
    "--to",
    metavar="CHILD|JSON|@FILE",
    required=True,
    help="The child to move to: its name if the log store has it, or else its settings as JSON, or a file with them.",
)
@click.option("--name", help="The name of the log store that is registered.  [default: STACK-logs]")
@click.option("--since", type=Moment(), help="Leave runs behind that had ended by then: 2h, 3d, 2026-01-31.")
@click.option(
    "--wait", type=click.FloatRange(min=0), default=0, metavar="SECONDS", help="How long to wait for runs, if need be."
)
@click.option(
    "--stop-after", type=click.Choice([stage.name for stage in STAGES]), help="Do not go on after this stage."
)
@click.option("--status", is_flag=True, help="Only say how far the move has come.")
@click.option("--undo", "is_undo", is_flag=True, help="Take back the last stage that has changed something.")
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@output_option
def migrate(
    stack: str,
    to: str,
    name: str | None,
    since: datetime | None,
    wait: float,
    stop_after: str | None,
    status: bool,
    is_undo: bool,
    yes: bool,
    output: str,
) -> None:
    """Move the logs of STACK to another backend, stage by stage, while its pipelines run.

    A composite log store is built around the log store that the stack has; runs log to both; what was logged before
    is copied; when the new child has all, logs are read from there, and the earlier one is retired. Before each stage
    that changes something it asks. Whenever it stops, the same command goes on from there.

    Exits with 0 if the move is done, or as far as it was asked for, with 1 if somebody has to do something first, with
    2 if it was called wrongly, and with 3 if ZenML or a child cannot be asked, or it was interrupted.
    """
    move = _find(stack, to, name, since)
    tell = say if output == "text" else _silent
    done: list[dict[str, str]] = []
    stopped, code = "", 0
    try:
        if is_undo:
            what = move.last_change or "nothing"
            _ask(f"Take back what stage '{what}' has changed?", yes or move.last_change is None)
            text = undo(move)
            move.refresh()
            done.append({"stage": what, "what": f"taken back: {text}"})
            tell(f"Taken back: {what}: {text}.")
        elif not status:
            for stage, text in _go_on(move, wait, stop_after, yes, tell):
                done.append({"stage": stage.name, "what": text})
                tell(f"{stage.name}: {text}.")
                if stage.back:
                    tell(f"    To undo: {stage.text(move, stage.back)}")
    except Stopped as error:
        stopped, code = str(error), 1
    except KeyboardInterrupt:
        stopped, code = "interrupted", 3
    # What this command has just done need not be told again.
    just = () if is_undo else [one["stage"] for one in done]
    following = next((stage for stage in STAGES if not stage.is_done(move) and stage.name not in just), None)
    if output == "json":
        say_json(_as_json(move, done, stopped, following))
    else:
        _show(move, stopped, following, status)
    sys.exit(code)


def _find(stack: str, to: str, name: str | None, since: datetime | None) -> Move:
    """Return the move, as far as it has come.

    Raises:
        click.BadParameter: There is no such stack or child, or the log store of that name is another one.
        NoAnswer: ZenML cannot be asked.
    """
    child, settings = _parse_target(to)
    with asking_zenml():
        from zenml.client import Client
        from zenml.constants import DEFAULT_STACK_AND_COMPONENT_NAME

        client = Client()
        try:
            model = client.get_stack(stack, allow_name_prefix_match=False)
        except (KeyError, ValueError):
            known = [known.name for known in client.list_stacks(size=100).items]
            raise mistake("STACK", f"there is no stack '{stack}'{nearest(stack, known)}") from None
    if model.name == DEFAULT_STACK_AND_COMPONENT_NAME:
        raise mistake(
            "STACK",
            f"ZenML's own stack '{model.name}' cannot be changed; copy it with `zenml stack copy {model.name} NAME`, "
            f"and move that",
        )
    has = component_of(model, "log_store")
    is_composite = has is not None and has.flavor_name == FLAVOR
    if name is not None and is_composite and has is not None and name != has.name:
        raise mistake(
            "--name", f"stack '{stack}' has log store '{has.name}' already, of flavor '{FLAVOR}'; leave it out"
        )
    own = has.name if has is not None and is_composite else f"{model.name}-logs"
    move = Move(model, name or own, child, settings, since)
    move.refresh()
    _must_fit(move)
    return move


def _must_fit(move: Move) -> None:
    """See to it that the log store, if there is one, is the one of this move.

    Raises:
        click.BadParameter: It is not.
    """
    if move.found is None:
        if move.settings is None:
            raise mistake("--to", f"there is no child '{move.to}' yet; give its settings as JSON, or '@file.json'")
        return
    raw = {child.get("name"): child for child in raw_children(move.found)}
    if move.to not in raw and move.settings is None:
        raise mistake("--to", f"log store '{move.name}' has no child '{move.to}'{nearest(move.to, map(str, raw))}")
    if move.to in raw and not _has(raw[move.to], move.settings or {}):
        raise mistake(
            "--to",
            f"log store '{move.name}' has a child '{move.to}' with other settings; give '--to {move.to}' to move to "
            f"that one, or another name",
        )
    if not move.is_switched and (not _has(raw.get(EARLIER, {}), earlier_child(move.stack)[0]) or move.is_watched):
        raise mistake("--name", f"there is a log store '{move.name}', which is not of this move; give another name")
    if not move.is_built:
        return
    if why := move.target.unreadable:
        raise mistake("--to", f"child '{move.to}': {why}")
    if not move.target.enabled:
        raise mistake("--to", f"child '{move.to}' of log store '{move.name}' is disabled; enable it, or name another")


def _has(registered: dict[str, Any], settings: dict[str, Any]) -> bool:
    """Return whether a child has these settings; ZenML has the default values of the others, too."""
    return all(registered.get(key) == value for key, value in settings.items())


def _parse_target(to: str) -> tuple[str, dict[str, Any] | None]:
    """Return the child's name, and its settings if these were given."""
    if not to.startswith(("@", "{")):
        return to, None
    where = "it"
    try:
        if to.startswith("@"):
            where = f"'{to[1:]}'"
            to = Path(to[1:]).read_text()
        settings = orjson.loads(to)
    except OSError as error:
        raise mistake("--to", f"{where} cannot be read: {error.strerror}") from None
    except ValueError:
        raise mistake("--to", f"{where} is not valid JSON; give one child, such as {_EXAMPLE}") from None
    if not isinstance(settings, dict) or not isinstance(settings.get("name"), str):
        raise mistake("--to", f"{where} is no child with a 'name'; give one, such as {_EXAMPLE}")
    return settings["name"], settings


_EXAMPLE = '{"name": "s3", "type": "artifact", "artifact_store": "bucket"}'


def _silent(text: str) -> None:
    """Say nothing."""


def _ask(question: str, yes: bool) -> None:
    if not yes and not ask(question):
        raise Stopped("the question was answered with no")


def _go_on(
    move: Move, wait: float, stop_after: str | None, yes: bool, tell: Callable[[str], None]
) -> Iterator[tuple[Stage, str]]:
    """Do the stages that are left, and yield what was done."""
    ends = time.monotonic() + wait
    for stage in STAGES:
        if not stage.is_done(move):
            if stage.asks:
                plan = stage.text(move, stage.plan)
                _ask(f"Next: {plan}. Go on?", yes)
            told = ""
            while True:
                try:
                    text = stage.do(move)
                    break
                except Waiting as error:
                    if time.monotonic() >= ends:
                        raise
                    if str(error) != told:
                        tell(f"{stage.name}: {error}. Waiting ...")
                    told = str(error)
                    time.sleep(LOOK_SECONDS)
            yield stage, text
        if stage.name == stop_after:
            return


def _as_json(move: Move, done: list[dict[str, str]], stopped: str, following: Stage | None) -> dict[str, Any]:
    log_store = {"id": str(move.found.store.id), "name": move.name} if move.found else None
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


def _show(move: Move, stopped: str, following: Stage | None, has_asked: bool) -> None:
    if has_asked:
        rows = []
        for stage in STAGES:
            mark = "done" if stage.is_done(move) else "next" if stage is following else ""
            rows.append([stage.name, mark, stage.text(move, stage.plan), stage.text(move, stage.back)])
        show_table(["Stage", "", "What", "To undo"], rows)
    if stopped:
        warn(f"Stopped: {stopped}.")
    if following is not None:
        say(f"Next: {following.name}: {following.text(move, following.plan)}. The same command goes on from here.")
        return
    say(f"Stack '{move.stack.name}' has moved to child '{move.to}' of log store '{move.name}'.", style="success")
    say(
        "ZenML's dashboard goes on reading runs from before the switch where they were collected, so keep that. "
        f"`composite-logstore logs RUN --store {move.name}` shows the copies."
    )
