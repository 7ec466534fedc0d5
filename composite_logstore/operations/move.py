"""A stack that moves from one log store to another, and how far the move is.

Nothing but ZenML's stack and log store record how far a move is. So it can be continued from any machine, and changes
that somebody makes by hand count.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from composite_logstore.artifact_store import open_artifact_store
from composite_logstore.catalog.errors import ArgumentError, OperationError, asking_zenml, nearest
from composite_logstore.catalog.runs import RunStream, count_runs, streams_of_project
from composite_logstore.catalog.stores import FLAVOR, RegisteredStore, explain, load_store
from composite_logstore.child_config import ChildConfig
from composite_logstore.config import CompositeLogStoreConfig
from composite_logstore.names import command
from composite_logstore.operations.progress import Reporter

if TYPE_CHECKING:
    from zenml.models import ComponentResponse, StackResponse

EARLIER = "earlier"
"""The name of the child that a composite gets for the log store which the stack had before."""


class MoveStoppedError(OperationError):
    """The move stops until somebody acts. The message says why, and what to do; it has no full stop."""


class MoveWaitingError(MoveStoppedError):
    """The move can continue when runs in progress have ended, or when a run has begun at all."""


@dataclass
class Move:
    """A stack, the log store that it gets, and the two children between which it moves.

    Attributes:
        stack: The stack, as ZenML knows it.
        name: The name of the composite log store.
        to: The name of the child to move to.
        settings: The settings of that child, None if the log store already has it.
        since: Runs that ended before this time are not moved; None moves all runs.
        found: The log store, None until it is registered.
        was_checked: Whether the children have been checked.
        is_rehearsed: Whether `found` is not registered like this, as during a dry run.
        facts: Results of stages, for programs.
    """

    stack: StackResponse
    name: str
    to: str
    settings: dict[str, Any] | None
    since: datetime | None
    found: RegisteredStore | None = None
    was_checked: bool = False
    is_rehearsed: bool = False
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def log_store(self) -> RegisteredStore:
        """The composite log store, once it is registered."""
        assert self.found is not None
        return self.found

    @property
    def target(self) -> ChildConfig:
        """The child to move to."""
        return self.log_store.child(self.to, "to")

    @property
    def source(self) -> ChildConfig:
        """The child to move from: the primary, or the first other child once the target is the primary.

        Raises:
            ArgumentError: There is only one child.
        """
        config = self.log_store.config
        if config.primary != self.to:
            return self.log_store.child(config.primary)
        others = [child for child in config.children if child.name != self.to]
        if not others:
            raise ArgumentError(
                "to", f"log store '{self.name}' has no child besides '{self.to}'; there is nothing to move"
            )
        return others[0]

    @property
    def is_built(self) -> bool:
        """Whether the log store is registered, with both children."""
        return self.found is not None and self.to in {child.name for child in self.found.config.children}

    @property
    def is_switched(self) -> bool:
        """Whether the stack has the log store."""
        component = component_of(self.stack, "log_store")
        return self.found is not None and component is not None and component.id == self.found.id

    @property
    def is_promoted(self) -> bool:
        """Whether the target is the primary."""
        return self.is_built and self.log_store.config.primary == self.to

    @property
    def is_watched(self) -> bool:
        """Whether the target is the primary, and the source can be read or is disabled."""
        return self.is_retired or (self.is_promoted and not self.source.unreadable)

    @property
    def is_retired(self) -> bool:
        """Whether the source no longer receives events."""
        return self.is_promoted and not self.source.enabled

    @property
    def last_change(self) -> str | None:
        """The name of the last stage that has changed something and can be undone."""
        if self.is_retired:
            return "retire"
        if self.is_promoted and not self.source.unreadable:
            return "promote"
        return "switch" if self.is_switched and self.source.name == EARLIER else None

    @property
    def artifact_store(self) -> ComponentResponse:
        """The stack's artifact store."""
        found = component_of(self.stack, "artifact_store")
        assert found is not None
        return found

    def command(self, *options: str, to: str | None = None) -> str:
        """Return a command that continues this move, as somebody types it.

        Args:
            options: Further options.
            to: How to name the child to move to, if its name is not enough: the log store does not have it yet.
        """
        name = () if self.is_switched or self.name == default_name(self.stack) else ("--name", self.name)
        since = ("--since", self.since.isoformat()) if self.since else ()
        return command("migrate", self.stack.name, "--to", to or self.to, *name, *since, *options)

    def refresh(self) -> None:
        """Ask ZenML again for the stack and the log store."""
        from zenml.enums import StackComponentType

        with asking_zenml():
            from zenml.client import Client

            client = Client()
            self.stack = client.get_stack(self.stack.id)
            models = client.list_stack_components(name=self.name, type=StackComponentType.LOG_STORE, hydrate=True).items
        self.found = load_store(models[0], "name") if models else None

    def update_stack(self, log_stores: Sequence[Any]) -> None:
        """Give the stack these log stores: one, or none.

        Raises:
            MoveStoppedError: ZenML does not allow it.
            NoAnswerError: ZenML cannot be reached.
        """
        from zenml.enums import StackComponentType
        from zenml.exceptions import IllegalOperationError

        with asking_zenml():
            from zenml.client import Client

            try:
                Client().update_stack(self.stack.id, component_updates={StackComponentType.LOG_STORE: list(log_stores)})
            except IllegalOperationError:
                raise MoveStoppedError(
                    f"ZenML does not allow you to update stack '{self.stack.name}'; ask its owner"
                ) from None
        self.refresh()

    def children_with(self, name: str, enabled: bool) -> list[dict[str, Any]]:
        """Return the children's settings, with one child enabled or disabled."""
        children = self.log_store.raw_children
        return [{**child, "enabled": enabled} if child.get("name") == name else child for child in children]

    def checked(self, children: list[dict[str, Any]]) -> CompositeLogStoreConfig:
        """Return settings with these children, checked as when a log store is registered and when a run begins.

        Raises:
            ArgumentError: The settings are not valid.
        """
        try:
            config = CompositeLogStoreConfig(primary=self.to, children=children)  # type: ignore[arg-type]  # parsed
            assert config.is_valid
            config.child(self.to).check()
            twice = config.doubled(open_artifact_store(self.artifact_store))
        except ValueError as error:
            raise ArgumentError("to", explain(error)) from None
        if twice:
            raise ArgumentError("to", twice)
        return config

    # Its streams

    def streams(self, report: Reporter, since: datetime | None = None) -> Iterator[RunStream]:
        """Yield the streams of the stack's runs, oldest runs first.

        Args:
            report: Is told of each stream.
            since: Only runs still active at or after this time; without it, those of the move.

        Raises:
            NoAnswerError: ZenML cannot be reached.
        """
        since = since or self.since
        report.expect(count_runs(since, stack_id=self.stack.id))
        for stream in streams_of_project(since=since, stack_id=self.stack.id):
            report.begin(stream)
            yield stream

    def is_live(self, stream: RunStream) -> bool:
        """Return whether the composite collected the stream."""
        return stream.collector == self.log_store.id

    def is_of_both(self, stream: RunStream) -> bool:
        """Return whether a stream has ended that both children received from its beginning."""
        return not stream.run_in_progress and self._began_with_both(stream)

    def is_left_open(self, stream: RunStream) -> bool:
        """Return whether a stream is in progress that the target does not receive from its beginning."""
        return stream.run_in_progress and not self._began_with_both(stream)

    @property
    def both_since(self) -> datetime:
        """The time at which the log store got both children."""
        model = self.log_store.model
        return (model.created if self.source.name == EARLIER else model.updated).replace(tzinfo=timezone.utc)

    def _began_with_both(self, stream: RunStream) -> bool:
        return self.is_live(stream) and stream.logs.created.replace(tzinfo=timezone.utc) >= self.both_since


def default_name(stack: StackResponse) -> str:
    """Return the name of the log store that a stack gets, if no other is given."""
    return f"{stack.name}-logs"


def component_of(stack: StackResponse, kind: str) -> ComponentResponse | None:
    """Return a stack's first component of a type, `log_store` or `artifact_store`."""
    from zenml.enums import StackComponentType

    found = stack.components.get(StackComponentType(kind))
    return found[0] if found else None


def earlier_child(stack: StackResponse) -> tuple[dict[str, Any], str]:
    """Return the settings of the child that stands for a stack's present log store, and a description of it."""
    before, artifact_store = component_of(stack, "log_store"), component_of(stack, "artifact_store")
    if before is not None:
        return {"name": EARLIER, "type": "component", "component": str(before.id)}, f"log store '{before.name}'"
    assert artifact_store is not None
    # It also reads what ZenML's own log store has written there.
    child = {"name": EARLIER, "type": "artifact", "artifact_store": str(artifact_store.id)}
    return child, f"an archive in artifact store '{artifact_store.name}', next to the logs of ZenML's own log store"


# Finding a move


def find_move(stack: str, to: str | dict[str, Any], *, name: str | None = None, since: datetime | None = None) -> Move:
    """Find out how far the move of a stack is. It changes nothing.

    Examples:
        >>> move = find_move("prod", {"name": "s3", "type": "artifact", "artifact_store": "bucket"})
        >>> move.is_switched
        False

    Args:
        stack: The stack's name or id.
        to: The child to move to: its name if the log store has it, or else its settings.
        name: The name of the log store to register; `STACK-logs` if not given.
        since: Leave runs behind that ended before this time.

    Raises:
        ArgumentError: There is no such stack or child, or the log store of that name belongs to something else.
        NoAnswerError: ZenML cannot be reached.
    """
    child, settings = (to, None) if isinstance(to, str) else (to.get("name"), to)
    if not isinstance(child, str):
        raise ArgumentError("to", "the child's settings have no 'name'")
    with asking_zenml():
        from zenml.client import Client
        from zenml.constants import DEFAULT_STACK_AND_COMPONENT_NAME

        client = Client()
        try:
            model = client.get_stack(stack, allow_name_prefix_match=False)
        except (KeyError, ValueError):
            known = [known.name for known in client.list_stacks(size=100).items]
            raise ArgumentError("stack", f"there is no stack '{stack}'{nearest(stack, known)}") from None
    if model.name == DEFAULT_STACK_AND_COMPONENT_NAME:
        raise ArgumentError(
            "stack",
            f"ZenML's own stack '{model.name}' cannot be changed; copy it with `zenml stack copy {model.name} NAME`, "
            f"and move the copy",
        )
    has = component_of(model, "log_store")
    own = has.name if has is not None and has.flavor_name == FLAVOR else None
    if own is not None and name not in (None, own):
        raise ArgumentError(
            "name", f"stack '{stack}' already has log store '{own}' of flavor '{FLAVOR}'; leave the name out"
        )
    move = Move(model, name or own or default_name(model), child, settings, since)
    move.refresh()
    if move.found is None:
        if settings is None:
            raise ArgumentError("to", f"there is no child '{child}' yet; give its settings as JSON, or '@file.json'")
    else:
        _check_log_store(move)
    return move


def _check_log_store(move: Move) -> None:
    """Check that the log store belongs to this move.

    Raises:
        ArgumentError: It does not.
    """
    raw = {child.get("name"): child for child in move.log_store.raw_children}
    if move.to not in raw and move.settings is None:
        raise ArgumentError("to", f"log store '{move.name}' has no child '{move.to}'{nearest(move.to, map(str, raw))}")
    if move.to in raw and not _has(raw[move.to], move.settings or {}):
        raise ArgumentError(
            "to",
            f"log store '{move.name}' has a child '{move.to}' with other settings; give '--to {move.to}' to move to "
            f"that child, or choose another name",
        )
    if not move.is_switched and (not _has(raw.get(EARLIER, {}), earlier_child(move.stack)[0]) or move.is_watched):
        raise ArgumentError(
            "name", f"log store '{move.name}' exists and does not belong to this move; give another name"
        )
    if not move.is_built:
        return
    if why := move.target.unreadable:
        raise ArgumentError("to", f"child '{move.to}': {why}")
    if not move.target.enabled:
        raise ArgumentError(
            "to", f"child '{move.to}' of log store '{move.name}' is disabled; enable it, or name another"
        )


def _has(registered: dict[str, Any], settings: dict[str, Any]) -> bool:
    """Return whether a registered child has these settings; ZenML adds the defaults of all others."""
    return all(registered.get(key) == value for key, value in settings.items())
