"""The events that backends have rejected and that this machine keeps: looks at them, sends them again, purges them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from uuid import UUID

from composite_logstore.catalog.errors import ArgumentError, NoAnswerError, OperationError, nearest
from composite_logstore.child_config import ChildConfig
from composite_logstore.operations.drain import why_not_delivered
from composite_logstore.operations.inventory import LogStore, inventory, obstacle, reason_of
from composite_logstore.operations.resending import Resending, Retried, is_meant
from composite_logstore.spool.format import RejectedEvent
from composite_logstore.spool.rejected import KeptLine, RejectedFolder


@dataclass
class RejectedEvents:
    """The rejected events of one child on this machine.

    Attributes:
        child: The name that the child had.
        events: How many there are.
        uncertain: How many of them the backend may have taken: it did not say which ones it rejected.
        damaged: How many cannot be read.
        discarded: How many older ones had to make room since the last purge.
        bytes: How many bytes they have on disk.
        reasons: A reason → how many events were rejected for it.
        streams: The streams that they belong to.
        oldest: When the first of them was rejected, in nanoseconds since the epoch; 0 if there is none.
        obstacle: Why they cannot be sent again with the present settings, empty if they can.
    """

    child: str
    events: int = 0
    uncertain: int = 0
    damaged: int = 0
    discarded: int = 0
    bytes: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    streams: set[UUID] = field(default_factory=set)
    oldest: int = 0
    obstacle: str = ""

    def count(self, line: KeptLine) -> None:
        """Count the event of a line."""
        if line.rejected is None:
            self.damaged += 1
            return
        self.events += 1
        self.uncertain += not line.rejected.is_certain
        self.reasons[line.rejected.reason] += 1
        self.streams.add(line.rejected.event.stream.id)
        self.oldest = min(self.oldest or line.rejected.time_unix_nano, line.rejected.time_unix_nano)


def list_rejected(store: str, child: str | None = None) -> list[RejectedEvents]:
    """Count the rejected events that this machine keeps.

    Examples:
        >>> [(one.child, one.events, dict(one.reasons)) for one in list_rejected("logs")]
        [('live', 2, {'too old': 2})]

    Args:
        store: The name or id of the log store.
        child: Only those of this child, which may have been renamed or removed.

    Raises:
        ArgumentError: There is no such log store or child.
        OperationError: The folder cannot be read.
    """
    here = _find(store, child)
    found = []
    for folder, name in here.parts:
        with _readable(folder):
            one = RejectedEvents(name, discarded=folder.discarded(name), bytes=folder.size(name))
            for line in folder.read(name):
                one.count(line)
        one.obstacle = obstacle(here.store, name)
        found.append(one)
    return found


def show_rejected(store: str, child: str | None = None) -> Iterator[tuple[str, RejectedEvent]]:
    """Yield the rejected events that this machine keeps, each after the name that its child had, oldest first.

    Examples:
        >>> [(child, one.event.message, one.reason) for child, one in show_rejected("logs")]
        [('live', 'one', 'too old'), ('live', 'two', 'too old')]

    Args:
        store: The name or id of the log store.
        child: Only those of this child, which may have been renamed or removed.

    Raises:
        ArgumentError: There is no such log store or child.
        OperationError: The folder cannot be read.
    """
    for folder, name in _find(store, child).parts:
        with _readable(folder):
            for line in folder.read(name):
                if line.rejected is not None:
                    yield name, line.rejected


def why_not_kept(store: str) -> str:
    """Return why a log store keeps no rejected events now, empty if it keeps them, or if its settings are unknown.

    Examples:
        >>> why_not_kept("logs")
        "'durability' is 'memory'"

    Args:
        store: The name or id of the log store.

    Raises:
        ArgumentError: There is no such log store.
    """
    config = _find(store, None).store.config
    if config is not None and config.durability == "memory":
        return "'durability' is 'memory'"
    if config is not None and not config.rejected_max_bytes:
        return "'rejected_max_bytes' is 0"
    return ""


def retry_rejected(
    store: str,
    child: str | None = None,
    to: str | None = None,
    *,
    uncertain: bool = False,
    dry_run: bool = False,
    progress: Callable[[Retried], None] | None = None,
    result: list[Retried] | None = None,
) -> list[Retried]:
    """Send rejected events again, with the present settings of their child.

    Events that the backend takes are removed; events that it rejects again are kept with the new reason. Gives up on a
    child as soon as it is unavailable, after 30 s in which it answers nothing for good, or if it rejects ten events in
    a row. After an interruption the next call continues; the events of the last export may then arrive twice.

    Examples:
        >>> [(one.child, one.delivered, one.remaining) for one in retry_rejected("logs")]
        [('live', 2, 0)]

    Args:
        store: The name or id of the log store.
        child: Only the events of this child, which may have been renamed or removed.
        to: Send them through this child of the same log store instead.
        uncertain: Whether to send events, too, that the backend may have taken.
        dry_run: Whether to make all checks and send nothing; `delivered` then says how many events would be sent.
        progress: Is told how far it is.
        result: Receives the result, and holds the result so far if the call is interrupted.

    Raises:
        ArgumentError: There is no such log store or child, or `to` is disabled or given without `child`.
        NoAnswerError: Another process sends or purges these events.
        OperationError: ZenML, which has the settings and secrets, cannot be reached, or the folder cannot be read.
    """
    if to is not None and child is None:
        raise ArgumentError("to", "it needs a child: name the one whose events to send through it")
    here = _find(store, child)
    if here.zenml_error:
        raise OperationError(
            f"ZenML cannot be reached ({here.zenml_error}; `zenml status` says more), and a retry needs its settings "
            f"and secrets."
        )
    taker = here.taker(to) if to is not None else None
    result = [] if result is None else result
    for folder, name in here.parts:
        one = Retried(name)
        result.append(one)
        with _readable(folder), folder.alone():
            config = taker or here.store.children.get(name)
            one.obstacle = "" if taker else obstacle(here.store, name)
            if config is not None and not one.obstacle:
                one.taker = config.name
                if dry_run:
                    one.delivered = sum(is_meant(line, uncertain) for line in folder.read(name))
                    one.obstacle = why_not_delivered(config)
                else:
                    Resending(here.store, config, folder, one, progress or (lambda retried: None)).send(uncertain)
            one.remaining = sum(1 for _ in folder.read(name))
    return result


def purge_rejected(store: str, child: str | None = None) -> None:
    """Delete rejected events for good, damaged ones too.

    Examples:
        >>> purge_rejected("logs", "live")
        >>> list_rejected("logs")
        []

    Args:
        store: The name or id of the log store.
        child: Only those of this child, which may have been renamed or removed.

    Raises:
        ArgumentError: There is no such log store or child.
        NoAnswerError: Another process sends or purges these events.
        OperationError: The folder cannot be read.
    """
    here = _find(store, child)
    for folder, name in here.parts:
        with _readable(folder), folder.alone():
            folder.purge(name)


# Finding them


@dataclass
class _Found:
    """The rejected events of a log store.

    Attributes:
        store: The log store.
        parts: Its folders on this machine, each with the name of a child that has rejected events there.
        zenml_error: Why ZenML could not be reached, empty if it could.
    """

    store: LogStore
    parts: list[tuple[RejectedFolder, str]]
    zenml_error: str

    def taker(self, name: str) -> ChildConfig:
        """Return the settings of the child that takes the events of another one.

        Raises:
            ArgumentError: There is none, or it is disabled.
        """
        known = self.store.children
        if name not in known:
            raise ArgumentError("to", f"log store '{self.store.label}' has no child '{name}'{nearest(name, known)}")
        if not known[name].enabled:
            raise ArgumentError("to", f"child '{name}' of log store '{self.store.label}' is disabled; enable it")
        return known[name]


def _find(store: str, child: str | None) -> _Found:
    here = inventory()
    try:
        homes = here.select([store], ())
    except ArgumentError as error:
        raise ArgumentError("store", error.message) from None
    found = next(iter(homes.values()))
    parts = []
    for home in homes:
        folder = RejectedFolder(home)
        with _readable(folder):
            parts += [(folder, name) for name in folder.children()]
    if child is not None:
        known = {*found.children, *(name for _, name in parts)}
        if child not in known:
            raise ArgumentError("child", f"there is no child '{child}'{nearest(child, known)}")
        parts = [(folder, name) for folder, name in parts if name == child]
    return _Found(found, parts, here.zenml_error)


@contextmanager
def _readable(folder: RejectedFolder) -> Iterator[None]:
    """Turn an error of a folder into a message for people.

    Raises:
        NoAnswerError: Another process works on it.
        OperationError: It cannot be used.
    """
    try:
        yield
    except BlockingIOError:
        raise NoAnswerError(
            f"another process works on the rejected events in {folder.path} now; try again when it has ended"
        ) from None
    except OSError as error:
        fix = getattr(error, "fix", "")
        where = error.filename or folder.path
        raise OperationError(f"{where} cannot be used: {reason_of(error)}{f'; {fix}' if fix else ''}") from error
