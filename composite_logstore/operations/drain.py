"""Delivers what dead processes of a log store have left, without a process of the log store."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import inf
from pathlib import Path
from typing import TypeAlias

from composite_logstore import clock
from composite_logstore.config import ChildConfig
from composite_logstore.delivery.account import ChildStats
from composite_logstore.delivery.delivery import Delivery
from composite_logstore.delivery.flush import Flush
from composite_logstore.delivery.recovery import RecoveredJournal
from composite_logstore.delivery.worker import Worker
from composite_logstore.operations.inventory import LogStore, children_of
from composite_logstore.spool.folder import Spool

GIVE_UP_SECONDS = 30.0
"""How long to wait for a child that makes no progress."""
_END_SECONDS = 5.0
"""How long to wait for the exports that are under way when all the rest is over."""
_TELL_SECONDS = 0.2

Tell: TypeAlias = Callable[[dict[str, ChildStats]], None]


class _Worker(Worker):
    def _tell(self, news: list[str]) -> None:
        """Say nothing: the command says at its end what became of the events, and why some are still there."""


class Drain:
    """Delivers one log store's folders, one after the other. What it has got done is on disk after each export.

    Attributes:
        store: The log store.
        accounts: What became of the events, by the name that a child had when they were logged.
        errors: A folder and a child's name there → why the child's part is still there.
    """

    def __init__(self, store: LogStore, children: Mapping[str, ChildConfig]) -> None:
        """Begin with nothing.

        Args:
            store: The log store.
            children: A child's name in the folders → the settings of the child that takes its part.
        """
        self.accounts: dict[str, ChildStats] = {}
        self.errors: dict[tuple[Path, str], str] = {}
        self.store = store
        self._children = children
        self._clock = clock.current
        # A child's name → why no more is asked of it.
        self._given_up: dict[str, str] = {}

    def deliver(self, folder: Path, tell: Tell) -> None:
        """Deliver what a process has left, as far as its backends take it.

        A folder that a running process has, or that cannot be used, is left alone.

        Args:
            folder: The folder.
            tell: Told how its parts stand, several times a second.
        """
        if not self._children:
            return
        try:
            spool = Spool.recover(folder)
            if spool is not None:
                self._deliver(spool, tell)
        except Exception as error:  # whatever is in there, the others are not to suffer from it
            # Of what is no error of the system's, its words may hold what was logged.
            why = (error.strerror or str(error)) if isinstance(error, OSError) else type(error).__name__
            for name in self._children:
                self.errors[folder, name] = f"the folder cannot be used: {why}"

    def _deliver(self, spool: Spool, tell: Tell) -> None:
        for name in set(children_of(spool, self.store)) - set(spool.children):
            spool.reset(name)
        wanted = {name: config for name, config in self._children.items() if name in spool.children}
        for name, config in wanted.items():
            if config.name in self._given_up:
                self.errors[spool.folder, name] = self._given_up[config.name]
        followers = _followers(spool, {n: config for n, config in wanted.items() if config.name not in self._given_up})
        journal = RecoveredJournal(spool, {name: wanted[name] for name in followers}, self._clock)
        spool.set_aside()
        workers = [
            _Worker(self.store.id, wanted[delivery.name], delivery, journal, self._clock)
            for delivery in journal.deliveries
        ]
        try:
            self._wait(journal, workers, tell)
        finally:
            self._stop(journal, workers)
            with journal.lock:
                for delivery in journal.deliveries:
                    # Behind its last event there may be others that are not meant for it.
                    before = min(delivery.oldest, spool.segments.last + 1)
                    for name in (delivery.name, *followers[delivery.name]):
                        spool.acknowledge(name, max(spool.acknowledged(name), before))
                    self._note(spool.folder, delivery, wanted[delivery.name])
                # An export that hangs may yet return: the folder is ours as long as this process lives.
                if all(worker.has_ended for worker in workers):
                    spool.close()

    def _wait(self, journal: RecoveredJournal, workers: Sequence[Worker], tell: Tell) -> None:
        before = int(journal.spool.segments.last) + 1
        with journal.lock:
            flush = Flush(journal.deliveries, before, self._clock.now(), GIVE_UP_SECONDS, inf)
        for worker in workers:
            worker.wake()
        with journal.lock:
            seconds = inf
            while seconds > 0:
                seconds = flush.wait(self._clock.now())
                tell({delivery.name: delivery.stats() for delivery in journal.deliveries})
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
    """Return which children's parts to deliver, each with those whose parts are delivered thereby.

    Where one child takes the parts of several, that of the one furthest behind has what the others lack too, and what
    the child itself lacks.
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
