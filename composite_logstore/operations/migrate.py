"""Moves a stack from one log store to another, stage by stage, while its pipelines run."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NoReturn, cast
from uuid import uuid5

import composite_logstore
from composite_logstore.catalog.errors import ArgumentError, NoAnswerError, asking_zenml, nearest
from composite_logstore.catalog.runs import RunStream, find_run, streams_of_run
from composite_logstore.catalog.stores import FLAVOR, RegisteredStore, explain
from composite_logstore.child_config import ChildConfig
from composite_logstore.config import CompositeLogStoreConfig
from composite_logstore.names import command, counted
from composite_logstore.operations.check import check_children, logs_of_checks
from composite_logstore.operations.copying import copy_streams
from composite_logstore.operations.move import (
    EARLIER,
    Move,
    MoveStoppedError,
    MoveWaitingError,
    component_of,
    earlier_child,
)
from composite_logstore.operations.pipeline_launch import refuse_second
from composite_logstore.operations.progress import ProgressCallback, Reporter
from composite_logstore.operations.promote import Confirm, excluded, settings_to_promote
from composite_logstore.operations.verify import Comparison
from composite_logstore.parity.result import BackfillStoppedError, Copied, StreamParity
from composite_logstore.parity.summary import ParitySummary
from composite_logstore.zenml import fetch_page

if TYPE_CHECKING:
    from zenml.models import ComponentResponse

ARRIVAL_SECONDS = 60.0
"""How long the last events of a run that has just ended may take to arrive before they count as missing."""

LOOK_SECONDS = 2.0
"""How long to wait before looking again."""


def migrate(
    move: Move,
    *,
    wait_seconds: float = 0.0,
    stop_after: str | None = None,
    dry_run: bool = False,
    confirm: Confirm | None = None,
    progress: ProgressCallback | None = None,
) -> Iterator[tuple[Stage, str]]:
    """Do the stages of a move that are not done, and yield each with a description of what it did.

    Whenever it stops, another call continues from there.

    Examples:
        >>> move = find_move("prod", {"name": "s3", "type": "artifact", "artifact_store": "bucket"})
        >>> [stage.name for stage, done in migrate(move, stop_after="switch")]
        ['build', 'check', 'switch']

    Args:
        move: The move, from `find_move`.
        wait_seconds: How long to wait for runs to end or to begin, if a stage needs that.
        stop_after: The name of the last stage to do.
        dry_run: Whether to make all checks, to write no more than the test events of the stage `check`, and to yield
            what each stage would do.
        confirm: Is asked before each stage that changes something.
        progress: Is told how far each stage is.

    Raises:
        ArgumentError: There is no stage `stop_after`, or the settings of the child to move to are wrong.
        MoveStoppedError: Somebody has to act first, or the answer was no.
        MoveWaitingError: The same; runs have to end or to begin first.
        NoAnswerError: ZenML or a child cannot be reached.
    """
    names = [stage.name for stage in STAGES]
    if stop_after is not None and stop_after not in names:
        raise ArgumentError("stop_after", f"there is no stage '{stop_after}'{nearest(stop_after, names)}")
    if dry_run:
        return _rehearsed_stages(move, stop_after, progress)
    return _stages(move, wait_seconds, stop_after, confirm, progress)


def _rehearsed_stages(
    move: Move, stop_after: str | None, progress: ProgressCallback | None
) -> Iterator[tuple[Stage, str]]:
    move, report = replace(move), Reporter(progress)
    for stage in STAGES:
        if not stage.is_done(move):
            yield stage, stage.rehearse(move, report) if stage.rehearse else f"would {stage.text(move, stage.plan)}"
        if stage.name == stop_after:
            return


def _stages(
    move: Move,
    wait_seconds: float,
    stop_after: str | None,
    confirm: Confirm | None,
    progress: ProgressCallback | None,
) -> Iterator[tuple[Stage, str]]:
    ends = time.monotonic() + wait_seconds
    for stage in STAGES:
        if not stage.is_done(move):
            if confirm and stage.asks and not confirm(f"Next: {stage.text(move, stage.plan)}. Continue?"):
                raise MoveStoppedError("you answered no")
            report = Reporter(progress)
            told = ""
            while True:
                try:
                    text = stage.do(move, report)
                    break
                except MoveWaitingError as error:
                    if time.monotonic() >= ends:
                        raise
                    if error.message != told:
                        report.wait(f"{stage.name}: {error.message}. Waiting ...")
                    told = error.message
                    time.sleep(LOOK_SECONDS)
            yield stage, text
        if stage.name == stop_after:
            return


# The stages. Each is done again when a move continues, unless ZenML says that it is done.


def _build(move: Move, report: Reporter) -> str:
    """Register the composite log store, or add the child to the log store that the stack has."""
    from zenml.enums import StackComponentType

    assert move.settings is not None
    if move.found is not None:
        children = [*move.found.raw_children, move.settings]
        # From now on runs log to the child, so it has to work.
        _check_children(move, [move.checked(children).child(move.to)], report)
        move.found.update({"children": children})
        move.refresh()
        return f"added child '{move.to}' to log store '{move.name}'"
    settings, description = _first_settings(move)
    with asking_zenml():
        from zenml.client import Client

        client = Client()
        _register_flavor()
        try:
            client.create_stack_component(move.name, FLAVOR, StackComponentType.LOG_STORE, settings)
        except ValueError as error:
            raise ArgumentError("to", explain(error)) from None
    move.refresh()
    return f"registered {description}"


def _first_settings(move: Move) -> tuple[dict[str, Any], str]:
    """Return the settings of the log store to register, checked, and a description of it."""
    assert move.settings is not None
    earlier, source = earlier_child(move.stack)
    children = [earlier, move.settings]
    move.checked(children)
    before = component_of(move.stack, "log_store")
    primary = EARLIER if before is None or _is_readable(before) else move.to
    description = f"log store '{move.name}': child '{EARLIER}' is {source}, child '{move.to}' is new"
    if primary != EARLIER:
        description += f" and the primary, because '{EARLIER}' cannot be read; its events are not copied"
    return {"primary": primary, "children": children}, description


def _rehearse_build(move: Move, report: Reporter) -> str:
    """Continue as if the log store were registered, or had the child."""
    assert move.settings is not None
    settings: dict[str, Any]
    if move.found is not None:
        settings = {"children": [*move.found.raw_children, move.settings]}
        _check_children(move, [move.checked(settings["children"]).child(move.to)], report)
        move.found.check_update(settings)
        settings = {**dict(move.found.config), **settings}
        done = f"would add child '{move.to}' to log store '{move.name}'"
    else:
        settings, description = _first_settings(move)
        done = f"would register {description}"
    move.found, move.is_rehearsed = _as_if_registered(move, settings), True
    return done


def _as_if_registered(move: Move, settings: dict[str, Any]) -> RegisteredStore:
    """Return the log store with these settings as ZenML would return it."""
    from zenml.enums import StackComponentType
    from zenml.utils.time_utils import utc_now

    from composite_logstore.log_store import CompositeLogStore

    now = utc_now()
    # Always the same, so that the test events of all dry runs are one stream.
    id = move.found.id if move.found else uuid5(move.stack.id, move.name)
    store = CompositeLogStore(
        name=move.name,
        id=id,
        config=CompositeLogStoreConfig(**settings),
        flavor=FLAVOR,
        type=StackComponentType.LOG_STORE,
        user=None,
        created=now,
        updated=now,
    )
    # A registered component has many more fields; no stage needs them.
    model = SimpleNamespace(id=id, name=move.name, configuration=settings, created=now, updated=now)
    return RegisteredStore(store, cast("ComponentResponse", model))


def _register_flavor() -> None:
    from zenml.client import Client
    from zenml.enums import StackComponentType
    from zenml.utils import source_utils

    client = Client()
    try:
        client.get_flavor_by_name_and_type(FLAVOR, StackComponentType.LOG_STORE)
    except KeyError:
        # Otherwise ZenML stores the path of the class relative to the program that runs.
        source_utils.set_custom_source_root(str(Path(composite_logstore.__file__).parents[1]))
        try:
            client.create_flavor("composite_logstore.CompositeLogStoreFlavor", StackComponentType.LOG_STORE)
        finally:
            source_utils.set_custom_source_root(None)


def _is_readable(log_store: ComponentResponse) -> bool:
    """Return whether logs can be read from a log store; ZenML's `otel` says that they cannot."""
    from zenml.log_stores import BaseLogStore
    from zenml.stack import StackComponent

    with asking_zenml():
        try:
            loaded = StackComponent.from_model(log_store)
        except ImportError as error:
            # An integration of ZenML is missing here.
            raise NoAnswerError(
                f"log store '{log_store.name}' cannot be loaded here ({type(error).__name__}): "
                "install the package of its flavor"
            ) from error
    assert isinstance(loaded, BaseLogStore)
    try:
        fetch_page(loaded, logs_of_checks(log_store.id), limit=1)
    except NotImplementedError:
        return False
    except Exception:
        # The stage `check` reports whatever is wrong with it.
        return True
    return True


def _check(move: Move, report: Reporter) -> str:
    """Check both children, before any run depends on them."""
    _check_children(move, [move.source, move.target], report)
    move.was_checked = True
    return f"children '{move.source.name}' and '{move.to}' work"


def _check_children(move: Move, children: list[ChildConfig], report: Reporter) -> None:
    with report.checking(child.name for child in children):
        checks = check_children(move.log_store, children, move.artifact_store.id)
    for one in checks:
        is_read = one.child.name in (move.to, move.log_store.config.primary)
        needed = [finding for finding in one.findings if is_read or finding.what != "read"]
        problem = next((finding for finding in needed if finding.result == "problem"), None)
        if problem is not None:
            raise MoveStoppedError(
                f"child '{one.child.name}' does not work: {problem.what}: {problem.message}"
                f"{f'; {problem.advice}' if problem.advice else ''}"
            )


def _switch(move: Move, report: Reporter) -> str:
    """Give the stack the log store."""
    move.update_stack([move.log_store.id])
    return f"stack '{move.stack.name}' has log store '{move.name}': runs that begin now log to both children"


def _watch(move: Move, report: Reporter) -> str:
    """See one run whose events have all reached both children."""
    with _Comparison(move, report) as comparison:
        # Runs that ended before the log store had both children cannot qualify.
        first = next((stream for stream in move.streams(report, move.both_since) if move.is_of_both(stream)), None)
        if first is None:
            raise MoveWaitingError(
                f"no run has logged to both children and ended yet; run a pipeline on stack '{move.stack.name}'"
            )
        events = 0
        # Steps in a process that loaded its log store before the switch may still log to the earlier one.
        for stream in filter(move.is_live, streams_of_run(find_run(str(first.run_id)))):
            result = comparison.compare(stream)
            for name, child in result.children.items():
                # Events without ids in the source prove nothing about the target.
                if why := child.error or (child.excuse if name == move.to else ""):
                    raise MoveStoppedError(
                        f"run '{stream.run_name}', {stream.label}: child '{name}' could not be compared: "
                        f"{why.rstrip('.')}"
                    )
            if missing := result.children[move.to].differences:
                between = (move.name, "--from", move.source.name, "--to", move.to)
                copies = command("backfill", *between, "--run", stream.run_name)
                raise MoveStoppedError(
                    f"child '{move.to}' is missing {counted(missing, 'event')} of run '{stream.run_name}', "
                    f"{stream.label}; find out why. `{copies}` copies them"
                )
            events += result.children[move.to].events
    return f"child '{move.to}' has all {counted(events, 'event')} of run '{first.run_name}'"


def _rehearse_watch(move: Move, report: Reporter) -> str:
    if move.is_rehearsed or not move.is_switched:
        return "would wait for a run that logs to both children, and compare it"
    return _watch(move, report)


def _backfill(move: Move, report: Reporter, dry_run: bool = False) -> str:
    """Copy missing events, and make sure that no run is left that logs to the earlier log store alone."""
    source, target = move.source, move.target
    refuse_second(move.log_store, target)
    result = Copied()
    open_runs: dict[Any, str] = {}

    def ended() -> Iterator[RunStream]:
        for stream in move.streams(report):
            if move.is_left_open(stream):
                open_runs[stream.run_id] = stream.run_name
            if not stream.run_in_progress:
                yield stream

    try:
        copy_streams(move.log_store, source, target, ended(), result, report, dry_run=dry_run)
    except BackfillStoppedError as error:
        raise MoveStoppedError(error.message) from error
    move.facts["backfill"] = {**vars(result), "in_progress": len(open_runs)}
    copied, held = ("would copy", "holds") if dry_run else ("copied", "held")
    done = f"{copied} {counted(result.copied, 'event')} to child '{target.name}', which {held} {result.there:,} already"
    if result.too_old:
        raise MoveStoppedError(
            f"{done}; too old for its backend: {result.too_old:,}. '--since' leaves old runs where they are, and "
            f"they can still be read there"
        )
    if result.rejected:
        reason, number = next(iter(result.rejected.items()))
        raise MoveStoppedError(f"{done}; {number:,} were rejected: {reason}")
    if dry_run and result.unwanted:
        # The stage `verify` would find it.
        _refuse_rule(move, result.unwanted, result.copied + result.there)
    if open_runs:
        name, others = next(iter(open_runs.values())), len(open_runs) - 1
        more = f" (and {others:,} more)" if others else ""
        done += f"; run '{name}'{more} began before the switch and is still in progress"
        if not dry_run:
            raise MoveWaitingError(done)
    return done


def _refuse_rule(move: Move, invisible: int, visible: int) -> NoReturn:
    """Stop the move, because a rule of the target excludes events that nobody would see any more."""
    raise MoveStoppedError(
        f"{excluded(move.target, invisible, visible + invisible)}; set it to let all events through, or promote the "
        f"child all the same: `{command('promote', move.name, move.to, '--force')}`"
    )


def _rehearse_verify(move: Move, report: Reporter) -> str:
    if move.is_rehearsed or move.facts["backfill"]["copied"]:
        return f"would verify that no event is missing from '{move.to}'"
    return _verify(move, report)


def _verify(move: Move, report: Reporter) -> str:
    """Verify that no event is missing from the target."""
    summary = ParitySummary(move.name, [move.source.name, move.to])
    elsewhere = 0
    with _Comparison(move, report) as comparison:
        for stream in move.streams(report):
            result = comparison.compare(stream)
            # Events without ids in the source prove nothing about the target.
            source = result.children.get(move.source.name)
            if source is not None and source.excuse:
                del result.children[move.source.name]
            summary.add(result)
            if not move.is_live(stream) and not any(child.events for child in result.children.values()):
                elsewhere += 1
            if summary.not_compared:
                # A child that cannot be read would take its time for each further stream, too.
                break
    child = summary.children[move.to]
    move.facts["verify"] = summary.as_dict()
    if child.differences:
        names = command("verify", move.name, "--all", "--child", move.source.name, "--child", move.to)
        differing = counted(child.differences, "event")
        raise MoveStoppedError(f"missing from child '{move.to}', or different there: {differing}; `{names}` names them")
    if summary.not_compared:
        raise MoveStoppedError(summary.why_not_compared())
    if child.excluded:
        _refuse_rule(move, child.excluded, child.events)
    done = f"child '{move.to}' holds all {counted(child.events, 'event')} of {counted(summary.streams, 'stream')}"
    if elsewhere:
        done += f"; not counted: {counted(elsewhere, 'stream')} of other log stores, or without events"
    return done


def _promote(move: Move, report: Reporter) -> str:
    """Make the target the primary."""
    before = move.source.name
    move.log_store.update(settings_to_promote(move.log_store, move.to))
    move.refresh()
    return f"logs are now read from child '{move.to}' instead of '{before}'"


def _rehearse_promote(move: Move, report: Reporter) -> str:
    move.log_store.check_update(settings_to_promote(move.log_store, move.to))
    return f"would read logs from child '{move.to}' instead of '{move.source.name}'"


def _retire(move: Move, report: Reporter) -> str:
    """Disable the source. It stays among the children, to be read."""
    source = move.source
    move.log_store.update(_settings_to_retire(move))
    move.refresh()
    return f"child '{source.name}' is disabled: runs that begin now log to '{move.to}' alone"


def _rehearse_retire(move: Move, report: Reporter) -> str:
    move.log_store.check_update({"primary": move.to, **_settings_to_retire(move)})
    return f"would disable child '{move.source.name}': runs that begin then log to '{move.to}' alone"


def _settings_to_retire(move: Move) -> dict[str, Any]:
    source = move.source.name
    fallback = [name for name in move.log_store.config.fetch_fallback if name not in (source, move.to)]
    return {"children": move.children_with(source, enabled=False), "fetch_fallback": fallback}


@dataclass(frozen=True)
class Stage:
    """One stage of a move.

    In its texts `{stack}`, `{store}` and `{to}` stand for the names, `{undo}` for the command that undoes it, and
    `{argument}` for the log store's name in another command.

    Attributes:
        name: The stage's name.
        do: Does the stage, and returns what it did.
        is_done: Whether ZenML shows that the stage is done.
        plan: What the stage does.
        back: How to undo the stage, empty if it changes nothing.
        asks: Whether to ask before the stage.
        rehearse: Makes the checks of the stage in a dry run, and returns what it would do. None if it has no checks.
    """

    name: str
    do: Callable[[Move, Reporter], str]
    is_done: Callable[[Move], bool]
    plan: str
    back: str = ""
    asks: bool = False
    rehearse: Callable[[Move, Reporter], str] | None = None

    def text(self, move: Move, template: str) -> str:
        """Return one of the stage's texts, with the names filled in."""
        undo = undo_command(move) if "{undo}" in template else ""
        names = {"stack": move.stack.name, "store": move.name, "to": move.to, "argument": shlex.quote(move.name)}
        return template.format(**names, undo=undo)


def undo_command(move: Move) -> str:
    """Return the command that undoes the last stage that changed something."""
    return replace(move, since=None).command("--undo")


STAGES = (
    Stage(
        "build",
        _build,
        lambda move: move.is_built,
        "register log store '{store}' with the earlier log store and '{to}' as children",
        "zenml log-store delete {argument}, as long as no run has logged to it",
        True,
        _rehearse_build,
    ),
    Stage("check", _check, lambda move: move.is_switched or move.was_checked, "check both children", rehearse=_check),
    Stage("switch", _switch, lambda move: move.is_switched, "give stack '{stack}' log store '{store}'", "{undo}", True),
    Stage("watch", _watch, lambda move: move.is_watched, "see a run reach both children", rehearse=_rehearse_watch),
    Stage(
        "backfill",
        _backfill,
        lambda move: move.is_promoted,
        "copy missing events to '{to}'",
        "nothing reads from '{to}' yet, so the copies do no harm",
        True,
        partial(_backfill, dry_run=True),
    ),
    Stage(
        "verify",
        _verify,
        lambda move: move.is_promoted,
        "verify that no event is missing from '{to}'",
        rehearse=_rehearse_verify,
    ),
    Stage(
        "promote", _promote, lambda move: move.is_promoted, "read logs from '{to}'", "{undo}", True, _rehearse_promote
    ),
    Stage("retire", _retire, lambda move: move.is_retired, "disable the other child", "{undo}", True, _rehearse_retire),
)


def undo(move: Move, *, dry_run: bool = False) -> str:
    """Undo the last stage that changed something, and return what was undone.

    Examples:
        >>> undo(find_move("prod", "s3"))
        "logs are read from child 'earlier' again"

    Args:
        move: The move, from `find_move`.
        dry_run: Whether to make all checks, and to return what would be undone.

    Raises:
        MoveStoppedError: Nothing was changed.
        NoAnswerError: ZenML cannot be reached.
    """
    stage = move.last_change
    if stage is None:
        raise MoveStoppedError("there is nothing to undo: this stack has not been changed")
    name = move.source.name
    settings: dict[str, Any] = {}
    if stage == "retire":
        settings = {"children": move.children_with(name, enabled=True)}
        text = (
            f"child '{name}' is enabled again. Events that were logged meanwhile are missing from it: "
            f"`{command('backfill', move.name, '--from', move.to, '--to', name, '--all')}` copies them"
        )
    elif stage == "promote":
        settings = settings_to_promote(move.log_store, name)
        text = f"logs are read from child '{name}' again"
    else:
        text = (
            f"stack '{move.stack.name}' has its earlier log store again. Runs that logged to '{move.name}' are still "
            f"read there, so keep it"
        )
    if dry_run:
        move.log_store.check_update(settings)
        return text
    if settings:
        move.log_store.update(settings)
    else:
        raw = next(child for child in move.log_store.raw_children if child.get("name") == EARLIER)
        move.update_stack([raw["component"]] if raw.get("type") == "component" else [])
    move.refresh()
    return text


class _Comparison(Comparison):
    """Compares streams of a move's two children, and waits for events that are on their way."""

    def __init__(self, move: Move, report: Reporter) -> None:
        children = [child for child in (move.source, move.target) if not child.unreadable]
        super().__init__(move.log_store, children, report)
        self._to = move.to
        self._patience_ends = time.monotonic() + ARRIVAL_SECONDS

    def compare(self, stream: RunStream) -> StreamParity:
        """Compare a stream; again after a while if events are missing from the target, for they may be on their way."""
        while True:
            result = super().compare(stream)
            if not result.children[self._to].differences or time.monotonic() > self._patience_ends:
                return result
            time.sleep(LOOK_SECONDS)
