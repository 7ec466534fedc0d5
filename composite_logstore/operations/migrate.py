"""The stages of `composite-logstore migrate`: what each does, whether it was done, and how to take it back.

How far the move has come is not written down anywhere: ZenML's stack and log store say it. So it can be gone on with
from any machine, and what somebody does by hand counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

import composite_logstore
from composite_logstore.artifact_store import open_artifact_store
from composite_logstore.catalog.stores import (
    FLAVOR,
    RegisteredStore,
    RunStream,
    asking_zenml,
    count_runs,
    find_run,
    in_words,
    load_store,
    mistake,
    open_child,
    streams_of_project,
    streams_of_run,
)
from composite_logstore.cli.check import logs_of_checks, try_out
from composite_logstore.cli.promote import settings_to_promote, update_settings
from composite_logstore.cli.verify import compare_stream
from composite_logstore.config import ChildConfig, CompositeLogStoreConfig
from composite_logstore.operations.backfill import copy_streams
from composite_logstore.operations.pipeline_launch import refuse_second
from composite_logstore.operations.selection import Bars, collector_of
from composite_logstore.parity.backfill import BackfillStoppedError, Copied
from composite_logstore.parity.result import StreamParity
from composite_logstore.parity.scan import Source
from composite_logstore.parity.summary import ParitySummary

if TYPE_CHECKING:
    from zenml.models import ComponentResponse, StackResponse

EARLIER = "earlier"
"""The name of the child that a composite gets for the log store which the stack had before."""

SETTLE_SECONDS = 60.0
"""How long the last events of a run that has just ended may be under way, before they count as missing."""

LOOK_SECONDS = 2.0
"""How long to wait before looking again whether what was awaited has come."""


class Stopped(Exception):  # nothing is wrong: somebody has to do something
    """The move cannot go on by itself. The message says why, and what to do."""


class Waiting(Stopped):
    """It can go on when runs have ended that are in progress, or have begun at all."""


@dataclass
class Move:
    """A stack, the log store that it gets, and the two children between which it moves.

    Attributes:
        stack: The stack, as ZenML knows it.
        name: The name of the composite log store.
        to: The name of the child to move to.
        settings: The settings of that child, None if it is one of the log store's already.
        since: Runs that had ended by then stay behind; None if all are moved.
        found: The log store, None if there is none yet.
        was_checked: Whether the children have been tried out.
        facts: What was found out, for programs.
    """

    stack: StackResponse
    name: str
    to: str
    settings: dict[str, Any] | None
    since: datetime | None
    found: RegisteredStore | None = None
    was_checked: bool = False
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def log_store(self) -> RegisteredStore:
        """The composite log store, once there is one."""
        assert self.found is not None
        return self.found

    @property
    def target(self) -> ChildConfig:
        """The child to move to."""
        return self.log_store.child(self.to, "--to")

    @property
    def source(self) -> ChildConfig:
        """The child to move from: the primary, or the first other one once the target is the primary.

        Raises:
            click.BadParameter: There is only one child.
        """
        config = self.log_store.config
        if config.primary != self.to:
            return self.log_store.child(config.primary)
        others = [child for child in config.children if child.name != self.to]
        if not others:
            raise mistake(
                "--to", f"log store '{self.name}' has no other child than '{self.to}'; there is nothing to move"
            )
        return others[0]

    @property
    def is_built(self) -> bool:
        """Whether there is a log store with both children."""
        return self.found is not None and self.to in {child.name for child in self.found.config.children}

    @property
    def is_switched(self) -> bool:
        """Whether the stack has the log store."""
        component = component_of(self.stack, "log_store")
        return self.found is not None and component is not None and component.id == self.found.store.id

    @property
    def is_promoted(self) -> bool:
        """Whether the child is the primary."""
        return self.is_built and self.log_store.config.primary == self.to

    @property
    def is_watched(self) -> bool:
        """Whether a run has come to both children, or one that cannot be compared has had the time for it."""
        return self.is_retired or (self.is_promoted and not self.source.unreadable)

    @property
    def is_retired(self) -> bool:
        """Whether nothing is sent to the child any more that was moved from."""
        return self.is_promoted and not self.source.enabled

    @property
    def last_change(self) -> str | None:
        """The last stage that has changed something and can be taken back, None if there is none."""
        if self.is_retired:
            return "retire"
        if self.is_promoted and not self.source.unreadable:
            return "promote"
        return "switch" if self.is_switched and self.source.name == EARLIER else None

    def refresh(self) -> None:
        """Ask ZenML again for the stack and the log store."""
        from zenml.enums import StackComponentType

        with asking_zenml():
            from zenml.client import Client

            client = Client()
            self.stack = client.get_stack(self.stack.id)
            models = client.list_stack_components(name=self.name, type=StackComponentType.LOG_STORE, hydrate=True).items
        self.found = load_store(models[0], "--name") if models else None

    def streams(self, bars: Bars, since: datetime | None = None) -> Iterator[RunStream]:
        """Yield the streams of the stack's runs, the oldest runs first.

        Args:
            bars: Told of each.
            since: Runs that had ended by then are left out, in the place of those that stay behind.

        Raises:
            NoAnswer: ZenML cannot be asked.
        """
        since = since or self.since
        bars.expect(count_runs(since, stack_id=self.stack.id))
        for stream in streams_of_project(since=since, stack_id=self.stack.id):
            bars.at(stream)
            yield stream

    def is_live(self, stream: RunStream) -> bool:
        """Return whether the composite collected the stream."""
        return collector_of(stream) == self.log_store.store.id

    def is_of_both(self, stream: RunStream) -> bool:
        """Return whether a stream has ended that both children got from its beginning."""
        return not stream.run_in_progress and self._began_with_both(stream)

    def is_left_open(self, stream: RunStream) -> bool:
        """Return whether a stream is in progress that the target does not get, or not from its beginning."""
        return stream.run_in_progress and not self._began_with_both(stream)

    @property
    def both_since(self) -> datetime:
        """Since when the log store has had both children."""
        model = self.log_store.model
        return (model.created if self.source.name == EARLIER else model.updated).replace(tzinfo=timezone.utc)

    def _began_with_both(self, stream: RunStream) -> bool:
        return self.is_live(stream) and stream.logs.created.replace(tzinfo=timezone.utc) >= self.both_since


def component_of(stack: StackResponse, kind: str) -> ComponentResponse | None:
    """Return the first component of that type, `log_store` or `artifact_store`."""
    from zenml.enums import StackComponentType

    found = stack.components.get(StackComponentType(kind))
    return found[0] if found else None


def earlier_child(stack: StackResponse) -> tuple[dict[str, Any], str]:
    """Return the child that stands for the log store which a stack has, and what that is in words."""
    before, artifact_store = component_of(stack, "log_store"), component_of(stack, "artifact_store")
    if before is not None:
        return {"name": EARLIER, "type": "component", "component": str(before.id)}, f"log store '{before.name}'"
    assert artifact_store is not None
    # It reads what ZenML's own log store has written there, too.
    child = {"name": EARLIER, "type": "artifact", "artifact_store": str(artifact_store.id)}
    return child, f"an archive in artifact store '{artifact_store.name}', where ZenML's own log store has written"


# What is done at each stage. Each is done again where the move goes on, unless ZenML says that it was done.


def build(move: Move) -> str:
    """Register the composite log store, or give the one that the stack has the child."""
    from zenml.enums import StackComponentType

    assert move.settings is not None
    if move.found is not None:
        children = [*raw_children(move.found), move.settings]
        # Runs would log to it from now on.
        _must_work(move, [_valid(move, children).child(move.to)])
        update_settings(move.found, {"children": children})
        move.refresh()
        return f"log store '{move.name}' has the child '{move.to}' now"
    earlier, what = earlier_child(move.stack)
    _valid(move, [earlier, move.settings])
    before = component_of(move.stack, "log_store")
    primary = EARLIER if before is None or _is_readable(before) else move.to
    with asking_zenml():
        from zenml.client import Client

        client = Client()
        _register_flavor()
        settings: Any = {"primary": primary, "children": [earlier, move.settings]}
        try:
            client.create_stack_component(move.name, FLAVOR, StackComponentType.LOG_STORE, settings)
        except ValueError as error:
            raise mistake("--to", in_words(error)) from None
    move.refresh()
    done = f"log store '{move.name}' is registered: child '{EARLIER}' is {what}, child '{move.to}' is new"
    if primary != EARLIER:
        done += f", and is read. What '{EARLIER}' has cannot be read, so it is not copied"
    return done


def _register_flavor() -> None:
    from zenml.client import Client
    from zenml.enums import StackComponentType
    from zenml.utils import source_utils

    client = Client()
    try:
        client.get_flavor_by_name_and_type(FLAVOR, StackComponentType.LOG_STORE)
    except KeyError:
        # ZenML would note where the class is relative to whatever program this is.
        source_utils.set_custom_source_root(str(Path(composite_logstore.__file__).parents[1]))
        try:
            client.create_flavor("composite_logstore.CompositeLogStoreFlavor", StackComponentType.LOG_STORE)
        finally:
            source_utils.set_custom_source_root(None)


def check(move: Move) -> str:
    """Try out both children, before any run depends on them."""
    _must_work(move, [move.source, move.target])
    move.was_checked = True
    return f"children '{move.source.name}' and '{move.to}' work"


def _must_work(move: Move, children: list[ChildConfig]) -> None:
    artifact_store = component_of(move.stack, "artifact_store")
    assert artifact_store is not None
    for one in try_out(move.log_store, children, artifact_store.id):
        is_read = one.child.name in (move.to, move.log_store.config.primary)
        needed = [finding for finding in one.findings if is_read or finding.what != "read"]
        problem = next((finding for finding in needed if finding.result == "problem"), None)
        if problem is not None:
            raise Stopped(
                f"child '{one.child.name}' does not work: {problem.what}: {problem.message}"
                f"{f'; {problem.advice}' if problem.advice else ''}"
            )


def switch(move: Move) -> str:
    """Give the stack the log store."""
    _update_stack(move, [move.log_store.store.id])
    return f"stack '{move.stack.name}' has log store '{move.name}': runs that begin now log to both children"


def watch(move: Move) -> str:
    """See one run that both children have all of."""
    with Bars("watch") as bars, _Comparing(move, bars) as comparing:
        # Runs that had ended before both were there need not be gone through.
        first = next((stream for stream in move.streams(bars, move.both_since) if move.is_of_both(stream)), None)
        if first is None:
            raise Waiting(
                f"no run has logged to both children and ended yet; run a pipeline on stack '{move.stack.name}'"
            )
        events = 0
        # In a process that had its log store before the switch, steps may have the earlier one still.
        for stream in filter(move.is_live, streams_of_run(find_run(str(first.run_id)))):
            result = comparing.compare(stream)
            if lacks := _lacks(result, move.to):
                raise Stopped(
                    f"child '{move.to}' lacks {lacks} events of run '{stream.run_name}', {stream.label}: see why. "
                    f"`composite-logstore backfill {move.name} --from {move.source.name} --to {move.to} --run "
                    f"{stream.run_name}` copies them"
                )
            events += result.children[move.to].events
    return f"run '{first.run_name}' has come to child '{move.to}', all of its {events:,} events"


def backfill(move: Move) -> str:
    """Copy what the child lacks, and see to it that nothing more is written past it."""
    source, target = move.source, move.target
    refuse_second(move.log_store, target)
    result = Copied()
    open_runs: dict[Any, str] = {}

    def ended(bars: Bars) -> Iterator[RunStream]:
        for stream in move.streams(bars):
            if move.is_left_open(stream):
                open_runs[stream.run_id] = stream.run_name
            if not stream.run_in_progress:
                yield stream

    try:
        copy_streams(move.log_store, source, target, ended, result)
    except BackfillStoppedError as error:
        raise Stopped(str(error)) from error
    move.facts["backfill"] = {**vars(result), "in_progress": len(open_runs)}
    done = f"{result.copied:,} events were copied to child '{target.name}', {result.there:,} were there"
    if result.too_old:
        raise Stopped(
            f"{done}; {result.too_old:,} are too old for its backend. '--since' leaves old runs behind, where they can "
            f"be read as before"
        )
    if result.rejected:
        reason, number = next(iter(result.rejected.items()))
        raise Stopped(f"{done}; {number:,} were rejected: {reason}")
    if open_runs:
        name, others = next(iter(open_runs.values())), len(open_runs) - 1
        more = f", and so are {others:,} others that did" if others else ""
        raise Waiting(f"{done}; run '{name}', which began before, is still in progress{more}")
    return done


def verify(move: Move) -> str:
    """Prove that the child has all."""
    summary = ParitySummary(move.name, [move.source.name, move.to])
    elsewhere = 0
    with Bars("verify") as bars, _Comparing(move, bars) as comparing:
        for stream in move.streams(bars):
            result = comparing.compare(stream)
            # Whoever does not say which events it has says nothing against the other.
            source = result.children.get(move.source.name)
            if source is not None and source.excuse:
                del result.children[move.source.name]
            summary.add(result)
            if not move.is_live(stream) and not any(child.events for child in result.children.values()):
                elsewhere += 1
    child = summary.children[move.to]
    move.facts["verify"] = summary.as_dict()
    if lacks := child.differences:
        raise Stopped(
            f"child '{move.to}' lacks {lacks:,} events, or has them otherwise; `composite-logstore verify {move.name} "
            f"--all --child {move.source.name} --child {move.to}` names them"
        )
    if summary.not_compared:
        label, name, why = summary.not_compared[0]
        raise Stopped(f"not everything could be compared: child '{name}', {label}: {why.rstrip('.')}")
    done = f"child '{move.to}' has all {child.events:,} events of {summary.streams:,} streams"
    if elsewhere:
        done += f"; {elsewhere:,} streams of other log stores, or without events, are not among them"
    return done


def promote(move: Move) -> str:
    """Have logs read from the child."""
    before = move.source.name
    update_settings(move.log_store, settings_to_promote(move.log_store, move.to))
    move.refresh()
    return f"logs are read from child '{move.to}' now, no longer from '{before}'"


def retire(move: Move) -> str:
    """Send nothing more to the child that was moved from. It stays among the children, to be read."""
    source = move.source
    fallback = [name for name in move.log_store.config.fetch_fallback if name != source.name]
    children = _enabled(move, source.name, False)
    update_settings(move.log_store, {"children": children, "fetch_fallback": fallback})
    move.refresh()
    return f"child '{source.name}' is disabled: runs that begin now log to '{move.to}' and no longer there"


@dataclass(frozen=True)
class Stage:
    """One stage of the move. `{stack}`, `{store}` and `{to}` in its texts are the names.

    Attributes:
        name: Its name.
        do: Does it, and returns what was done.
        is_done: Whether ZenML says that it was done.
        plan: What it is for.
        back: How to take it back, empty if it changes nothing.
        asks: Whether to ask before.
    """

    name: str
    do: Callable[[Move], str]
    is_done: Callable[[Move], bool]
    plan: str
    back: str = ""
    asks: bool = False

    def text(self, move: Move, template: str) -> str:
        """Return one of its texts, with the names."""
        return template.format(stack=move.stack.name, store=move.name, to=move.to)


_UNDO = "composite-logstore migrate {stack} --to {to} --undo"

STAGES = (
    Stage(
        "build",
        build,
        lambda move: move.is_built,
        "register log store '{store}' with the earlier log store and '{to}' as children",
        "zenml log-store delete {store}, as long as no run has logged to it",
        True,
    ),
    Stage("check", check, lambda move: move.is_switched or move.was_checked, "try out both children"),
    Stage(
        "switch",
        switch,
        lambda move: move.is_switched,
        "give stack '{stack}' log store '{store}'",
        _UNDO,
        True,
    ),
    Stage("watch", watch, lambda move: move.is_watched, "see a run come to both children"),
    Stage(
        "backfill",
        backfill,
        lambda move: move.is_promoted,
        "copy what '{to}' lacks",
        "nothing reads from '{to}' yet: what was copied does no harm",
        True,
    ),
    Stage("verify", verify, lambda move: move.is_promoted, "prove that '{to}' has all"),
    Stage("promote", promote, lambda move: move.is_promoted, "read logs from '{to}'", _UNDO, True),
    Stage("retire", retire, lambda move: move.is_retired, "send nothing more to the other child", _UNDO, True),
)


def undo(move: Move) -> str:
    """Take back the last change, and return what was done.

    Raises:
        Stopped: There is none.
    """
    if move.last_change is None:
        raise Stopped("there is nothing to take back: nothing of this stack was changed")
    name = move.source.name
    if move.last_change == "retire":
        update_settings(move.log_store, {"children": _enabled(move, name, True)})
        return (
            f"child '{name}' is enabled again. What was logged meanwhile it lacks: `composite-logstore backfill "
            f"{move.name} --from {move.to} --to {name} --all` copies that"
        )
    if move.last_change == "promote":
        update_settings(move.log_store, settings_to_promote(move.log_store, name))
        return f"logs are read from child '{name}' again"
    raw = next(child for child in raw_children(move.log_store) if child.get("name") == EARLIER)
    _update_stack(move, [raw["component"]] if raw.get("type") == "component" else [])
    return (
        f"stack '{move.stack.name}' has the log store that it had. Runs that logged to '{move.name}' are still read "
        f"there, so keep it"
    )


def _enabled(move: Move, name: str, enabled: bool) -> list[dict[str, Any]]:
    """Return the children's settings, with that child enabled or disabled."""
    children = raw_children(move.log_store)
    return [{**child, "enabled": enabled} if child.get("name") == name else child for child in children]


class _Comparing:
    """Compares streams of the two children, with patience for what is under way."""

    def __init__(self, move: Move, bars: Bars) -> None:
        self._move = move
        self._bars = bars
        self._sources: list[Source] = []
        self._patience_ends = time.monotonic() + SETTLE_SECONDS

    def __enter__(self) -> _Comparing:
        for child in (self._move.source, self._move.target):
            if not child.unreadable:
                self._sources.append(open_child(child))
        return self

    def __exit__(self, *exception: object) -> None:
        for source in self._sources:
            source.close()

    def compare(self, stream: RunStream) -> StreamParity:
        """Compare a stream; once more after a while if the target lacks events, for they may be under way."""
        while True:
            result = compare_stream(stream, self._sources, self._bars)
            if not _lacks(result, self._move.to) or time.monotonic() > self._patience_ends:
                return result
            time.sleep(LOOK_SECONDS)


def _lacks(result: StreamParity, name: str) -> int:
    return result.children[name].differences


def raw_children(found: RegisteredStore) -> list[dict[str, Any]]:
    """Return the children's settings as ZenML has them, with the references to secrets."""
    children = found.model.configuration["children"]
    return [dict(child) for child in (orjson.loads(children) if isinstance(children, str) else children)]


def _update_stack(move: Move, log_store: Sequence[Any]) -> None:
    from zenml.enums import StackComponentType
    from zenml.exceptions import IllegalOperationError

    with asking_zenml():
        from zenml.client import Client

        try:
            Client().update_stack(move.stack.id, component_updates={StackComponentType.LOG_STORE: list(log_store)})
        except IllegalOperationError:
            raise Stopped(f"ZenML does not let you update stack '{move.stack.name}'; ask who may") from None
    move.refresh()


def _is_readable(log_store: ComponentResponse) -> bool:
    """Return whether logs can be read from a log store: ZenML's `otel` says that nothing can be."""
    from zenml.log_stores import BaseLogStore
    from zenml.stack import StackComponent

    with asking_zenml():
        loaded = StackComponent.from_model(log_store)
    assert isinstance(loaded, BaseLogStore)
    try:
        loaded.fetch(logs_of_checks(log_store.id), limit=1)
    except NotImplementedError:
        return False
    except Exception:
        # Whatever is wrong with it, `check` says it.
        return True
    return True


def _valid(move: Move, children: list[dict[str, Any]]) -> CompositeLogStoreConfig:
    """Return settings, checked as ZenML does it where a log store is registered and where a run begins.

    Raises:
        click.BadParameter: They are not valid.
    """
    artifact_store = component_of(move.stack, "artifact_store")
    assert artifact_store is not None
    try:
        config = CompositeLogStoreConfig(primary=move.to, children=children)  # type: ignore[arg-type]  # parsed there
        assert config.is_valid
        config.child(move.to).check()
        if twice := config.doubled(open_artifact_store(artifact_store)):
            raise mistake("--to", twice)
        return config
    except ValueError as error:
        raise mistake("--to", in_words(error)) from None
