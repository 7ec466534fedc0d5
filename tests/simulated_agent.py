"""An agent as a living process sees it: locks, positions and accounts, written step by step, and killed in between."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from composite_logstore.event import LogEvent
from composite_logstore.spool.account import ChildAccount
from composite_logstore.spool.folder import Spool, process_folders
from composite_logstore.spool.lock import AGENT, FolderLock
from composite_logstore.spool.private_folder import PrivateFolder

EMPTY = ChildAccount(0, 0, "healthy", 0, 0, 0, 0, 0, 0, {}, {}, {}, None)


class SimulatedAgent:
    """Works in a spool directory from the moment when it is made.

    Attributes:
        holds: What each child's backend holds, of all agents.
        spools: The folders that it delivers.
    """

    def __init__(
        self,
        component: Path,
        holds: dict[str, list[LogEvent]],
        wants: Callable[[str, LogEvent], bool] = lambda child, event: True,
    ) -> None:
        """Begin.

        Args:
            component: The folder of the log store.
            holds: What each child's backend holds.
            wants: Whether a child gets an event.
        """
        self.holds = holds
        self.spools: list[Spool] = []
        self._component = component
        self._wants = wants
        self._counts: dict[tuple[Path, str], ChildAccount] = {}
        with PrivateFolder.make(component.parent / AGENT) as folder:
            lock = FolderLock.acquire(folder, is_own=True)
        assert lock is not None
        self._lock = lock

    def look(self) -> None:
        """Tail the folders that nobody delivers."""
        for folder in process_folders(self._component):
            spool = None
            with suppress(FileNotFoundError):
                spool = Spool.tail(folder)
            if spool is not None:
                self.spools.append(spool)
                self._begin(spool)

    def _begin(self, spool: Spool) -> None:
        account = spool.account()
        for child in spool.children:
            position = spool.acknowledged(child)
            counts = account.get(child, EMPTY._replace(since=position, before=position))
            gap = [event for event in self._events(spool, counts.before) if event.number < position]
            delivered = counts.delivered + sum(self._wants(child, event) for event in gap)
            counts = counts._replace(delivered=delivered, before=max(position, counts.before))
            self._counts[spool.folder, child] = counts

    @staticmethod
    def _events(spool: Spool, first: int) -> list[LogEvent]:
        return list(Spool.look(spool.folder).reader.read(first - 1, float("inf")))

    def deliver(self, child: str, most: int = 1_000, killed: str = "") -> None:
        """Export one batch of each folder to a child, unless it is killed: after the `export` or the `position`."""
        for spool in self.spools:
            counts = self._counts[spool.folder, child]
            events = self._events(spool, counts.before)
            batch = [event for event in events if self._wants(child, event)][:most]
            before = batch[-1].number + 1 if len(batch) == most else max((e.number + 1 for e in events), default=0)
            self.holds[child] += batch
            if killed == "export":
                break
            before = max(before, counts.before)
            spool.acknowledge(child, before)
            self._counts[spool.folder, child] = counts._replace(before=before, delivered=counts.delivered + len(batch))
        if killed:
            self.kill()

    def account(self, *children: str, **changes: object) -> None:
        """Write the accounts: of these children, of all if none is given."""
        for spool in self.spools:
            account = {child: self._counts[spool.folder, child] for child in children or spool.children}
            spool.write_account({child: counts._replace(**changes) for child, counts in account.items()})  # type: ignore[arg-type]

    def work(self) -> None:
        """Do everything that there is to do."""
        self.look()
        for child in self.holds:
            self.deliver(child)
        self.account()

    def kill(self) -> None:
        """End as by SIGKILL: the locks are free, and nothing is written."""
        for spool in self.spools:
            spool.abandon()
        self.spools = []
        self._lock.release()

    def end(self) -> None:
        """End in order."""
        self.account()
        self.kill()
