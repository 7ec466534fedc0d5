"""The agent: one long-running process of a machine that delivers for others.

It tails the spools of living processes that let it deliver (`delivery.lock` in their folders), and delivers what dead
processes leave, at once. It is independent of all of them: nothing in a pipeline starts it. They share only the spool,
whose locks decide which process delivers a folder. So an agent may be killed at any instant, and another process of the
same log store that finds a dead one's folder first delivers it instead.

A process's death frees its lock. There is no portable way to be told: a blocking `flock` would take a thread for each
process, does not return in time on NFS, and cannot be interrupted. So the agent tries each lock four times a second.
The files stay open, so a look costs a microsecond or two for each process
(docs/agent.md has the measured processor time).
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from math import inf
from pathlib import Path
from typing import NamedTuple
from uuid import UUID

from composite_logstore import clock
from composite_logstore.catalog.errors import ArgumentError, OperationError, nearest
from composite_logstore.catalog.reach import check_server, why_unreached
from composite_logstore.clock import Clock
from composite_logstore.config import CompositeLogStoreConfig
from composite_logstore.delivery.account import ChildStats
from composite_logstore.delivery.budgets import Budgets
from composite_logstore.delivery.recovery import Recovery
from composite_logstore.delivery.states import State
from composite_logstore.operations.agent_tails import Tails, most_tailed
from composite_logstore.operations.inventory import LogStore, reason_of, registered, uuid_of
from composite_logstore.service import Service, Wait
from composite_logstore.spool.folder import process_folders
from composite_logstore.spool.lock import FolderLock, Watch
from composite_logstore.spool.private_folder import CLOCK_STEP_SECONDS, PrivateFolder, UntrustedError, fix_of
from composite_logstore.spool.settings import SpoolSettings, spool_folder, spool_root

LOOK_SECONDS = 0.25
"""How often the agent looks for processes that have died, in seconds."""
SETTINGS_SECONDS = 15.0
"""How often the agent asks ZenML for the log stores' settings, in seconds."""
UNKNOWN_SECONDS = 5.0
"""How often it asks while there is a folder of a log store that it does not know, in seconds."""
BEGUN_SECONDS = 1.0
"""How often it asks at most because a process has begun, whose settings may be newer, in seconds."""
END_SECONDS = 5.0
"""How long the end waits for exports that are under way, in seconds."""
ALIVE_SECONDS = 30.0
"""After how many seconds without a look the agent does not count as alive."""
_FOLDER = "agent"
_OUTCOMES = ("delivered", "rejected", "dropped", "withheld")
_TELL_SECONDS = 1.0
"""How often to find out whether a child has a problem, in seconds."""
_LOCK_SECONDS = 1.0
"""For how long to try to lock the directory: processes try it for a moment to find out whether there is an agent."""


class Delivered(NamedTuple):
    """What the agent has done for one child since it began.

    Attributes:
        store: The log store.
        child: The child's name.
        outcomes: `delivered`, `rejected`, `dropped` and `withheld` → how many events.
        pending: How many events wait, of living processes that it delivers for and of dead ones.
        state: The child's state: `healthy`, `retrying` or `unavailable`.
        last_error: The last problem of the child, empty if there was none.
    """

    store: LogStore
    child: str
    outcomes: Counter[str]
    pending: int
    state: str
    last_error: str


class Agent:
    """Delivers what the processes that write to a spool directory log or, once dead, leave.

    One thread calls `begin`, then `look` again and again, and `end` at last. The other methods may be called by others.

    Attributes:
        directory: The spool directory.
        zenml_error: Why ZenML could not be reached when it was last asked, empty if it could.
        knows_settings: Whether ZenML has said once which log stores there are.
    """

    def __init__(
        self,
        directory: str | None = None,
        stores: Sequence[str] = (),
        *,
        warn: Callable[[str], None],
        tell: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Prepare; nothing is started, no file touched.

        Args:
            directory: The directory that has a folder for each log store; the one below ZenML's configuration folder
                if not given.
            stores: The names or ids of the log stores whose events are delivered; all if empty.
            warn: Called with a warning for people, from any thread.
            tell: Called with a line of information for people.
        """
        self.directory = spool_root(directory)
        self.zenml_error = ""
        self.knows_settings = False
        self._is_default = directory is None
        self._stores = stores
        self._warn = warn
        self._tell = tell
        self._clock: Clock = clock.current
        self._lock: FolderLock | None = None
        self._looked_at = self._clock.now()
        # Written by the thread that asks ZenML, in one step.
        self._known: dict[UUID, LogStore] = {}
        self._settings_due = self._clock.signal()
        self._asked_at = self._clock.now()
        self._asking = Service("composite-logstore settings", self._ask_again, self._clock, warn, lambda why: None)
        self._is_ending = False
        # Whether a process has begun since ZenML was asked.
        self._has_begun = False
        self._homes: dict[UUID, _Home] = {}
        self._warned_of: set[str] = set()

    # The life of the agent

    def begin(self) -> None:
        """Lock the directory, and ask ZenML for the settings. Without an answer it continues to ask.

        Raises:
            OperationError: Another agent works in the directory, or it cannot be used.
            ArgumentError: ZenML has no such log store.
        """
        self._lock = self._locked()
        try:
            self._ask()
            unknown = self._unknown()
            if unknown and self.knows_settings:
                names = [store.label for store in registered()]
                raise ArgumentError("stores", f"there is no log store '{unknown[0]}'{nearest(unknown[0], names)}")
        except BaseException:
            self._let_go()
            raise
        self._asking.start()

    def _locked(self) -> FolderLock:
        folder = self.directory / _FOLDER
        lock, end, pause = None, self._clock.now() + _LOCK_SECONDS, self._clock.signal()
        try:
            with PrivateFolder.make(folder) as opened:
                while (lock := FolderLock.acquire(opened, is_own=True)) is None and self._clock.now() < end:
                    pause.wait(_LOCK_SECONDS / 20)
        except OSError as error:
            raise OperationError(f"the folder {folder} cannot be used and locked: {_why(error)}") from error
        if lock is None:
            raise OperationError(f"another agent works in {self.directory} already: it holds the lock in {folder}")
        return lock

    def look(self) -> None:
        """Look once at all processes, and have their events delivered. Call it every `LOOK_SECONDS`."""
        known, homes = self._known, self._found()
        for id in homes - self._homes.keys():
            self._homes[id] = _Home(self.directory / str(id), self._clock, self._warn, self._tell)
        most = most_tailed()
        for id, home in self._homes.items():
            home.use(known.get(id))
            home.look(lambda: self._tailed < most)
        is_waiting = any(home.tails.is_waiting for home in self._homes.values())
        for home in self._homes.values():
            if is_waiting:
                home.tails.make_room()
            home.tails.share_memory(self._tailed)
        self.go_on()
        self._has_begun |= any(home.has_begun for home in self._homes.values())
        self._ask_soon(is_unknown=not self._stores and any(id not in known for id in homes))
        self._looked_at = self._clock.now()

    @property
    def _tailed(self) -> int:
        """Of how many living processes it delivers the events."""
        return sum(len(home.tails) for home in self._homes.values())

    def go_on(self) -> float:
        """Look at those living processes again that log just now, until they need no look for a moment.

        Returns:
            After how many seconds to call it again, infinity if `look` suffices.
        """
        end = self._clock.now() + LOOK_SECONDS
        pause = 0.0
        while not pause and self._clock.now() < end:
            pause = min((home.tails.go_on() for home in self._homes.values()), default=inf)
        return pause

    def run(self, ended: threading.Event) -> None:
        """Look until it is to end.

        Args:
            ended: Is set when it is to end.
        """
        pause = LOOK_SECONDS
        while not ended.wait(min(pause, LOOK_SECONDS)):
            if self._clock.now() - self._looked_at >= LOOK_SECONDS:
                self.look()
            pause = self.go_on()

    def end(self) -> None:
        """Stop delivering, wait for exports that are under way, and release all folders. Other events stay there."""
        self._is_ending = True
        self._settings_due.set()
        for home in self._homes.values():
            home.stop()
        end = self._clock.now() + END_SECONDS
        pause = self._clock.signal()
        while not all(home.is_over for home in self._homes.values()) and self._clock.now() < end:
            pause.wait(0.05)
        self._let_go()

    def _let_go(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    # For probes

    @property
    def is_alive(self) -> bool:
        """Whether it has looked for dead processes in the last `ALIVE_SECONDS`."""
        return self._clock.now() - self._looked_at < ALIVE_SECONDS

    @property
    def processes(self) -> list[tuple[LogStore, int, int]]:
        """For each log store: how many processes run, and of how many dead ones it delivers events."""
        return [(home.store, *home.processes) for home in list(self._homes.values()) if home.store is not None]

    @property
    def delivered(self) -> list[Delivered]:
        """What it has done for each child since it began."""
        return [one for home in list(self._homes.values()) for one in home.delivered()]

    # The settings

    def _found(self) -> set[UUID]:
        """Return the ids of the log stores that have a folder here."""
        try:
            names = os.listdir(self.directory)
        except OSError:
            return set()
        return {id for name in names if (id := uuid_of(name)) is not None}

    def _ask_soon(self, is_unknown: bool) -> None:
        """Have ZenML asked, if its settings may be others, but not again and again."""
        seconds = self._clock.now() - self._asked_at
        if self.knows_settings and (
            (self._has_begun and seconds > BEGUN_SECONDS) or (is_unknown and seconds > UNKNOWN_SECONDS)
        ):
            self._has_begun = False
            self._settings_due.set()

    def _ask_again(self) -> Wait | None:
        if self._is_ending:
            return None
        if self._clock.now() - self._asked_at > BEGUN_SECONDS:
            self._ask()
        return partial(self._settings_due.wait, SETTINGS_SECONDS)

    def _ask(self) -> None:
        """Ask ZenML for the log stores. If it does not answer, those of the last answer stay."""
        self._asked_at = self._clock.now()
        try:
            check_server()
            stores = registered()
        except Exception as error:
            before, self.zenml_error = self.zenml_error, why_unreached(error)
            if not before:
                kept = "the settings that are known stay in use" if self.knows_settings else "nothing is delivered yet"
                self._warn(f"ZenML cannot be reached ({self.zenml_error}): {kept}, and it is asked again.")
            return
        if self.zenml_error:
            self.zenml_error = ""
            self._warn("ZenML can be reached again.")
        self._known = {
            store.id: store for store in stores if not self._stores or {store.label, str(store.id)} & {*self._stores}
        }
        self.knows_settings = True
        for store in self._known.values():
            self._warn_of(store)

    def _unknown(self) -> list[str]:
        known = {key for store in self._known.values() for key in (store.label, str(store.id))}
        return [name for name in self._stores if name not in known]

    def _warn_of(self, store: LogStore) -> None:
        """Warn once of a log store whose events this agent does not see, or cannot deliver."""
        text = ""
        if store.config is None:
            text = f"log store '{store.label}': {store.why}; its events are not delivered."
        elif self._is_default or self._stores:
            folder = spool_folder(store.id, store.config)
            if folder.parent != self.directory:
                text = (
                    f"log store '{store.label}' has its spool in {folder.parent}: an agent of its own is needed there."
                )
        if text and text not in self._warned_of:
            self._warned_of.add(text)
            self._warn(text)


class _Work(NamedTuple):
    """What a home delivers with, and has delivered. Probes read it from other threads, so it is replaced as a whole.

    Attributes:
        recovery: Delivers with the present settings, None if there are none.
        outcomes: A child's name → what was delivered with earlier settings.
    """

    recovery: Recovery | None
    outcomes: dict[str, Counter[str]]

    def accounts(self) -> list[tuple[str, ChildStats]]:
        """Return a child's name and its account, for each process."""
        found = self.recovery.stats() if self.recovery is not None else []
        return [one for accounts in found for one in accounts.items()]

    def outcomes_with(self, accounts: Iterable[tuple[str, ChildStats]]) -> dict[str, Counter[str]]:
        """Return the outcomes with those of the accounts added."""
        outcomes = {name: Counter(counts) for name, counts in self.outcomes.items()}
        for name, account in accounts:
            outcomes.setdefault(name, Counter()).update({key: getattr(account, key) for key in _OUTCOMES})
        return outcomes


class _Home:
    """The folder of one log store: notices the deaths of its processes, and has their events delivered."""

    def __init__(self, home: Path, clock: Clock, warn: Callable[[str], None], tell: Callable[[str], None]) -> None:
        self.store: LogStore | None = None
        self._home = home
        self._clock = clock
        self._warn = warn
        self._tell = tell
        self._work = _Work(None, {})
        self._config: CompositeLogStoreConfig | None = None
        # Recoveries with earlier settings, until their exports have returned.
        self._former: list[Recovery] = []
        self._folders: list[Path] = []
        # Whether the last look has found a process that was not there before.
        self.has_begun = False
        self._changed_ns = -1
        self._watches: dict[Path, Watch] = {}
        self.tails = Tails(clock, self._warn_once)
        # The folders of which it has told that it delivers them, and those in which the rest has to wait.
        self._told: set[Path] = set()
        self._resting: set[Path] = set()
        self._problems: set[str] = set()
        self._last_error = ""
        self._tell_at = -inf

    def use(self, store: LogStore | None) -> None:
        """Deliver with these settings from now on, None if the log store is unknown. Does nothing if they are used."""
        config = store.config if store else None
        if store is not None:
            self.store = store
        if config == self._config and (config is None) == (self._recovery is None):
            return
        self._stop_recovery()
        self._config = config
        self.tails.use(None, {})
        self._told.clear()
        self._resting.clear()
        if store is None or config is None:
            return
        children = config.enabled_children
        recovery = Recovery(
            store.id,
            children,
            SpoolSettings(self._home, False, config.spool_max_bytes, config.rejected_max_bytes),
            self._clock,
            lambda text: self._warn(f"log store '{store.label}': {text}"),
            self._note_problem,
            None,
            Budgets(store.id, children, self._home, self._clock),
        )
        self._work = self._work._replace(recovery=recovery)
        self.tails.use(recovery, {child.name: child for child in children})

    def _note_problem(self, why: str) -> None:
        self._last_error = why

    def look(self, has_room: Callable[[], bool]) -> None:
        """Look at each process once.

        Args:
            has_room: Returns whether one more living process may be delivered.
        """
        self._former = [recovery for recovery in self._former if not recovery.is_over]
        folders = self._listed()
        for gone in self._watches.keys() - {*folders}:
            self._watches.pop(gone).close()
        recovery = self._recovery
        if recovery is None:
            return
        for folder in folders:
            if self.tails.has(folder):
                self.tails.look(folder, self._has_died)
                continue
            # Exports with earlier settings may still be under way, and the folder locked.
            if folder in self._resting or any(one.has(folder) for one in (recovery, *self._former)):
                continue
            if not self._has_died(folder):
                self._told.discard(folder)
                self.tails.take(folder, has_room)
                continue
            self.tails.wait_no_more(folder)
            if recovery.has_taken(folder):
                # Nothing in it is for a child that the log store has now. It is read again when the settings change.
                self._resting.add(folder)
                continue
            if folder not in self._told:
                self._told.add(folder)
                self._tell(
                    f"log store '{self.store.label if self.store else ''}': delivers what {folder.name} has left."
                )
            # If another process holds the folder at that moment, the next look tries again.
            recovery.recover(folder)
        recovery.keep_going()
        self._tell_states()

    def _listed(self) -> list[Path]:
        """Return the folders of all processes. They are listed again only if some may have come or gone."""
        self.has_begun = False
        try:
            changed = os.stat(self._home).st_mtime_ns
            if changed != self._changed_ns or time.time() - changed / 1e9 < CLOCK_STEP_SECONDS:
                # The same objects as before: a path is looked up faster in a dictionary that has this very one.
                known = {folder: folder for folder in self._folders}
                self._folders = [known.get(folder, folder) for folder in process_folders(self._home)]
                self._changed_ns = changed
                self.has_begun = not known.keys() >= {*self._folders}
                self.tails.forget({*self._folders})
                if self._recovery is not None:
                    self._recovery.forget({*self._folders})
                self._told &= {*self._folders}
                self._resting &= {*self._folders}
        except OSError as error:
            # Once it is there again, it need not have changed.
            self._folders, self._changed_ns = [], -1
            if not isinstance(error, FileNotFoundError):
                self._warn_once(f"the folder {self._home} cannot be read: {_why(error)}.")
        return self._folders

    def _has_died(self, folder: Path) -> bool:
        try:
            watch = self._watches.get(folder)
            if watch is None:
                watch = self._watches[folder] = Watch(folder)
            if not watch.has_died():
                return False
        except (FileNotFoundError, UntrustedError):
            # Recovery finds out what is wrong, and says it.
            pass
        except OSError as error:
            # Too many open files, for example. That says nothing about the process.
            self._warn_once(f"it cannot be seen whether the process of {folder} has ended: {_why(error)}.")
            return False
        with suppress(KeyError):
            # The process that recovers the folder may make another lock.
            self._watches.pop(folder).close()
        return True

    def _warn_once(self, text: str) -> None:
        if text not in self._problems and len(self._problems) < 100:
            self._problems.add(text)
            self._warn(text)

    def _tell_states(self) -> None:
        """Warn once when a child's problem begins, and once when it ends."""
        if self._recovery is None or self._config is None or self._clock.now() < self._tell_at:
            return
        self._tell_at = self._clock.now() + _TELL_SECONDS
        worst: dict[str, tuple[State, str | None]] = {
            child.name: (State.HEALTHY, None) for child in self._config.enabled_children
        }
        for child, state, error in self._recovery.troubles():
            if _RANK[state] > _RANK[worst[child][0]]:
                worst[child] = state, error
        for child, (state, error) in worst.items():
            key = f"child '{child}'"
            is_well = state is State.HEALTHY
            label = self.store.label if self.store else ""
            if is_well and key in self._problems:
                self._problems.discard(key)
                self._warn(f"log store '{label}': {key}: backend available again.")
            elif not is_well and key not in self._problems:
                self._problems.add(key)
                self._warn(
                    f"log store '{label}': {key}: backend unavailable: {error}; events stay in the spool "
                    f"and will be retried."
                )

    @property
    def _recovery(self) -> Recovery | None:
        return self._work.recovery

    @property
    def processes(self) -> tuple[int, int]:
        """How many processes run, and of how many dead ones events are delivered."""
        recovery = self._recovery
        return len(self._watches), len(recovery.folders) if recovery else 0

    def delivered(self) -> list[Delivered]:
        """Return what was done for each child since the agent began."""
        if self.store is None:
            return []
        work = self._work
        accounts = work.accounts()
        pending: Counter[str] = Counter()
        # The account of a child, among those of all processes, in which it fares worst.
        worst: dict[str, ChildStats] = {}
        for name, account in accounts:
            pending[name] += account.pending
            if name not in worst or _RANK[State(account.state)] > _RANK[State(worst[name].state)]:
                worst[name] = account
        return [
            Delivered(
                self.store,
                name,
                counts,
                pending[name],
                worst[name].state if name in worst else State.HEALTHY.value,
                (worst[name].last_error if name in worst else None) or self._last_error,
            )
            for name, counts in sorted(work.outcomes_with(accounts).items())
        ]

    def stop(self) -> None:
        """Stop delivering, and watch no process any more."""
        self.tails.note_all()
        self._stop_recovery()
        for watch in self._watches.values():
            watch.close()
        self._watches.clear()

    def _stop_recovery(self) -> None:
        work = self._work
        if work.recovery is not None:
            work.recovery.stop(at_once=True)
            self._former.append(work.recovery)
            self._work = _Work(None, work.outcomes_with(work.accounts()))

    @property
    def is_over(self) -> bool:
        """Whether no export is under way, once it was stopped."""
        return all(recovery.is_over for recovery in self._former)


_RANK = {State.HEALTHY: 0, State.RETRYING: 1, State.UNAVAILABLE: 2}


def _why(error: OSError) -> str:
    return f"{reason_of(error)}{fix_of(error)}"
