"""Delivers the events that dead processes of a log store left on this machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import TypeAlias
from uuid import UUID

from composite_logstore import clock, secret_references
from composite_logstore.backend import UnavailableError
from composite_logstore.catalog.errors import ArgumentError, OperationError, nearest
from composite_logstore.child_config import ChildConfig
from composite_logstore.delivery.account import ChildStats
from composite_logstore.delivery.budgets import Budgets
from composite_logstore.delivery.delivery import Delivery
from composite_logstore.delivery.flush import Flush
from composite_logstore.delivery.recovery import RecoveredJournal
from composite_logstore.delivery.worker import Worker
from composite_logstore.names import quoted
from composite_logstore.operations.inventory import (
    Backlog,
    ChildBacklog,
    LogStore,
    backlogs,
    children_in,
    children_of,
    inventory,
    processes_in,
    reason_of,
    why_unusable,
)
from composite_logstore.spool.folder import Spool
from composite_logstore.spool.settings import spool_settings

GIVE_UP_SECONDS = 30.0
"""How long to wait for a child that makes no progress."""
_END_SECONDS = 5.0
"""How long to wait at the end for exports that have not returned."""
_TELL_SECONDS = 0.2

Tell: TypeAlias = Callable[[LogStore, dict[str, ChildStats]], None]
"""Is told how the children of a log store stand, several times a second; without children when a folder begins."""


@dataclass(frozen=True)
class Plan:
    """What draining would do with the events that wait for one child in one folder.

    Attributes:
        backlog: The folder.
        part: What waits there for the child.
        taker: The name of the child that would take them, empty if none would.
        obstacle: Why they would stay, empty if they would be delivered.
    """

    backlog: Backlog
    part: ChildBacklog
    taker: str = ""
    obstacle: str = ""


class Drained:
    """The result of draining.

    Attributes:
        folders: The folders that were drained, and their log stores.
        plans: After a dry run, what would be done.
    """

    def __init__(self) -> None:
        self.folders: dict[Path, LogStore] = {}
        self.plans: list[Plan] = []
        self._children: Sequence[str] = ()
        self._drains: dict[Path, _Drain] = {}

    def begin(self, folders: dict[Path, LogStore], children: Sequence[str], drains: Mapping[Path, _Drain]) -> None:
        """Note what is drained."""
        self.folders, self._children, self._drains = folders, children, dict(drains)

    @property
    def accounts(self) -> Iterator[tuple[LogStore, str, ChildStats]]:
        """A log store, the name that a child had when the events were logged, and what became of them."""
        for drain in dict.fromkeys(self._drains.values()):
            for child, account in drain.accounts.items():
                yield drain.store, child, account

    def remaining(self) -> list[Backlog]:
        """Read the folders again, and return the backlogs that still hold events."""
        return [backlog for backlog in backlogs(self.folders, self._children) if backlog.holds_events]

    def error(self, backlog: Backlog, child: str) -> str:
        """Return why events still wait for a child, empty if draining did not find out."""
        return self._drains[backlog.home].errors.get((backlog.folder, child), "")


def drain(
    stores: Sequence[str] = (),
    children: Sequence[str] = (),
    to: str | None = None,
    *,
    dry_run: bool = False,
    progress: Tell | None = None,
    notice: Callable[[str], None] | None = None,
    result: Drained | None = None,
) -> Drained:
    """Deliver the events that dead processes left on this machine. Running processes deliver their own events.

    Gives up on a child after 30 s without progress, or as soon as it is unavailable. Each export is recorded on disk,
    so that after an interruption the next call continues from there.

    Examples:
        >>> drained = drain(["logs"])
        >>> [(child, account.delivered) for store, child, account in drained.accounts]
        [('live', 3)]
        >>> drained.remaining()
        []

    Args:
        stores: The names or ids of the log stores; all if empty.
        children: Only what waits for these children, which may have been renamed or removed; for all if empty.
        to: Deliver through this child of the same log store instead.
        dry_run: Whether to make all checks, deliver nothing, and say in `plans` what would be done.
        progress: Is told how the children stand.
        notice: Is told sentences for people, such as which events `to` filters out.
        result: Receives the result, and holds the result so far if the call is interrupted.

    Raises:
        ArgumentError: There is no such log store or child, or `to` is disabled or given without `children`.
        OperationError: ZenML, which has the settings and secrets, cannot be reached.
    """
    if to is not None and not children:
        raise ArgumentError("to", "it needs children: name those whose events to deliver through it")
    here = inventory()
    if here.zenml_error:
        raise OperationError(
            f"ZenML cannot be reached ({here.zenml_error}; `zenml status` says more), and draining needs its settings "
            f"and secrets."
        )
    folders = here.select(stores, children)
    # A log store may have more than one folder.
    by_id = {store.id: store for store in folders.values()}
    takers = {id: _takers(store, folders, children, to) for id, store in by_id.items()}
    for id, store in by_id.items():
        taker = next(iter(takers[id].values()), None)
        if to and taker and not taker.wants_all and notice:
            notice(
                f"{store.label}: events that {quoted(taker.excluded_by)} of child '{to}' excludes are not delivered, "
                f"and are lost for {quoted(takers[id])}."
            )
    drains = {id: _Drain(store, takers[id]) for id, store in by_id.items()}
    result = Drained() if result is None else result
    result.begin(folders, children, {home: drains[store.id] for home, store in folders.items()})
    if dry_run:
        result.plans += _plans(folders, children, takers)
        return result
    for home, store in folders.items():
        for folder in processes_in(home):
            drains[store.id].deliver(folder, progress)
    return result


def _takers(
    store: LogStore, folders: Mapping[Path, LogStore], children: Sequence[str], to: str | None
) -> dict[str, ChildConfig]:
    """Return which child takes the events of which: a name in the folders → the child's settings.

    Raises:
        ArgumentError: The child `to` does not exist or is disabled.
    """
    known = store.children
    if to is None:
        return {name: child for name, child in known.items() if child.enabled and (not children or name in children)}
    present = {name for home, other in folders.items() if other.id == store.id for name in children_in(home)}
    names = present & set(children)
    if not names or store.config is None:
        return {}
    if to not in known:
        raise ArgumentError("to", f"log store '{store.label}' has no child '{to}'{nearest(to, known)}")
    if not known[to].enabled:
        raise ArgumentError("to", f"child '{to}' of log store '{store.label}' is disabled; enable it, or name another")
    return dict.fromkeys(sorted(names), known[to])


def _plans(
    folders: dict[Path, LogStore], children: Sequence[str], takers: Mapping[UUID, Mapping[str, ChildConfig]]
) -> Iterator[Plan]:
    """Yield what would be done, folder by folder.

    Args:
        folders: The folders.
        children: Only what waits for these children; for all if empty.
        takers: A log store's id → which child takes the events of which.
    """
    obstacles: dict[tuple[UUID, str], str] = {}
    for backlog in backlogs(folders, children):
        barred = backlog.barred or _why_unusable(backlog.folder)
        for part in backlog.parts:
            taker = takers[backlog.store.id].get(part.child)
            if barred or taker is None:
                yield Plan(backlog, part, obstacle=barred or part.why)
                continue
            key = backlog.store.id, taker.name
            if key not in obstacles:
                obstacles[key] = why_not_delivered(taker)
            yield Plan(backlog, part, taker.name, obstacles[key])


def _why_unusable(folder: Path) -> str:
    try:
        return why_unusable(folder)
    except Exception as error:  # a folder that cannot be used must not hide the others
        return f"the folder cannot be used: {reason_of(error)}"


def why_not_delivered(child: ChildConfig) -> str:
    """Return why a child could not even begin to deliver, empty if it could."""
    try:
        secret_references.resolve(child).create_exporter().close()
    except (UnavailableError, ImportError) as error:
        return str(error)
    except Exception as error:
        # The text of an unknown exception may contain anything, such as a key.
        return f"its exporter raised {type(error).__name__}"
    return ""


class _Worker(Worker):
    def _tell(self, news: list[str]) -> None:
        """Print nothing: the result says what became of the events, and why some still wait."""


class _Drain:
    """Delivers one log store's folders, one after the other. After each export its progress is on disk.

    Attributes:
        store: The log store.
        accounts: The name that a child had when the events were logged → what became of them.
        errors: A folder and a child's name there → why events still wait for the child.
    """

    def __init__(self, store: LogStore, children: Mapping[str, ChildConfig]) -> None:
        """Prepare to drain.

        Args:
            store: The log store.
            children: A child's name in the folders → the settings of the child that takes its events.
        """
        self.accounts: dict[str, ChildStats] = {}
        self.errors: dict[tuple[Path, str], str] = {}
        self.store = store
        self._children = children
        self._clock = clock.current
        # A child's name → why it gets no more events.
        self._given_up: dict[str, str] = {}

    def deliver(self, folder: Path, tell: Tell | None) -> None:
        """Deliver the events of one process, as far as the backends accept them.

        Leaves the folder alone if a running process uses it, or if it cannot be used.

        Args:
            folder: The folder.
            tell: Is told how the children stand.
        """
        if not self._children:
            return
        if tell:
            tell(self.store, {})
        try:
            spool = Spool.recover(folder)
            if spool is not None:
                self._deliver(spool, tell)
        except Exception as error:  # a folder that cannot be used must not stop the others
            for name in self._children:
                self.errors[folder, name] = f"the folder cannot be used: {reason_of(error)}"

    def _deliver(self, spool: Spool, tell: Tell | None) -> None:
        for name in set(children_of(spool, self.store)) - set(spool.children):
            spool.reset(name)
        wanted = {name: config for name, config in self._children.items() if name in spool.children}
        for name, config in wanted.items():
            if config.name in self._given_up:
                self.errors[spool.folder, name] = self._given_up[config.name]
        followers = _followers(spool, {n: config for n, config in wanted.items() if config.name not in self._given_up})
        journal = RecoveredJournal(spool, {name: wanted[name] for name in followers}, self._clock)
        spool.set_aside()
        children = [child for child in self.store.children.values() if child.enabled]
        budgets = Budgets(self.store.id, children, spool.folder.parent, self._clock)
        settings = spool_settings(self.store.id, self.store.config) if self.store.config else None
        workers = []
        for delivery in journal.deliveries:
            config = wanted[delivery.name]
            worker = _Worker(self.store.id, config, self._clock, budgets.of(config), settings)
            worker.take(delivery, journal)
            workers.append(worker)
        try:
            self._wait(journal, workers, tell)
        finally:
            self._stop(journal, workers)
            with journal.lock:
                for delivery in journal.deliveries:
                    # The events after its last one are for other children.
                    before = min(delivery.oldest, spool.segments.last + 1)
                    for name in (delivery.name, *followers[delivery.name]):
                        spool.acknowledge(name, max(spool.acknowledged(name), before))
                    self._note(spool.folder, delivery, wanted[delivery.name])
                # An export that hangs may still return, so this process keeps the folder locked until its end.
                if all(worker.has_ended for worker in workers):
                    spool.close()

    def _wait(self, journal: RecoveredJournal, workers: Sequence[Worker], tell: Tell | None) -> None:
        before = int(journal.spool.segments.last) + 1
        with journal.lock:
            flush = Flush(journal.deliveries, before, self._clock.now(), GIVE_UP_SECONDS, inf)
        for worker in workers:
            worker.wake()
        with journal.lock:
            seconds = inf
            while seconds > 0:
                seconds = flush.wait(self._clock.now())
                if tell:
                    tell(self.store, {delivery.name: delivery.stats() for delivery in journal.deliveries})
                if seconds:
                    journal.progress.wait(min(seconds, _TELL_SECONDS))

    def _stop(self, journal: RecoveredJournal, workers: Sequence[Worker]) -> None:
        with journal.lock:
            for worker, delivery in zip(workers, journal.deliveries, strict=True):
                worker.stop(at_once=delivery.oldest < inf)
            end = self._clock.now() + _END_SECONDS
            while not all(worker.has_ended for worker in workers) and self._clock.now() < end:
                journal.progress.wait(end - self._clock.now())

    def _note(self, folder: Path, delivery: Delivery, config: ChildConfig) -> None:
        stats = delivery.stats()
        before = self.accounts.get(delivery.name)
        self.accounts[delivery.name] = before.plus(stats) if before else stats
        if stats.pending and stats.last_error:
            self.errors[folder, delivery.name] = self._given_up[config.name] = stats.last_error


def _followers(spool: Spool, children: Mapping[str, ChildConfig]) -> dict[str, list[str]]:
    """Return the children whose events to deliver, each with the children that this delivers for as well.

    If one child takes the events of several, it gets those of the one that is furthest behind: these contain all events
    that wait for the others, or for the child itself.
    """
    takers: dict[str, list[str]] = {}
    for name, config in children.items():
        takers.setdefault(config.name, []).append(name)
    found = {}
    for taker, names in takers.items():
        first = min(names, key=spool.acknowledged)
        also = {taker} & set(spool.children) - set(names)
        found[first] = [
            name for name in (*names, *also) if name != first and spool.acknowledged(name) >= spool.acknowledged(first)
        ]
    return found
