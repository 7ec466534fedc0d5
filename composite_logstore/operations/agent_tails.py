"""The living processes of a log store whose events the agent delivers while they log."""

from __future__ import annotations

import resource
from collections.abc import Callable, Mapping
from contextlib import suppress
from math import inf
from pathlib import Path

from composite_logstore.child_config import ChildConfig
from composite_logstore.clock import Clock
from composite_logstore.delivery.recovery import Recovery
from composite_logstore.delivery.tailing import MOST_BYTES, TailedJournal
from composite_logstore.inert import described
from composite_logstore.operations.inventory import reason_of
from composite_logstore.spool.folder import Spool
from composite_logstore.spool.lock import is_alive
from composite_logstore.spool.private_folder import fix_of

PENDING_SECONDS = 0.05
"""How often the agent looks at a process whose events wait, in seconds, if there are few."""
_PENDING_PART = 0.0005
"""The same for each of them, if there are many."""
_TAKEN_SECONDS = 1.0
"""After how many seconds to ask again for a folder that its process delivers itself."""
_AGAIN_SECONDS = 60.0
"""After how many seconds to try a folder again that could not be used."""
_IDLE_SECONDS = 10.0
"""After how many idle seconds a folder is given back if others wait."""
_LOOKS_AT_IDLE = 4
"""At every which look at an idle process to find out, too, whether it is dead, or has begun another segment."""
_MEMORY_BYTES = 64 * 1024 * 1024
"""How many bytes of events of all processes wait for a child in memory, about."""
_LEAST_BYTES = 128 * 1024
_FILES = 4
"""How many descriptors each folder needs."""
_MOST_TAILED = 10_000
_OTHER_FILES = 256
"""How many descriptors are left for connections, and for dead processes."""


def most_tailed() -> int:
    """Return of how many processes the agent can deliver at once, by the descriptors that it may have."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return _MOST_TAILED
    return min(_MOST_TAILED, max(1, (limit - _OTHER_FILES) // _FILES))


class _Tail:
    def __init__(self, journal: TailedJournal, now: float) -> None:
        self.journal = journal
        self.looks = 0
        self.grew_at = now
        self.is_quiet = False


class Tails:
    """The living processes of one log store whose events are delivered."""

    def __init__(self, clock: Clock, warn_once: Callable[[str], None]) -> None:
        """Begin with none.

        Args:
            clock: The source of time.
            warn_once: Called with a warning for people that is worth one line, however often it is given.
        """
        self._clock = clock
        self._warn_once = warn_once
        self._recovery: Recovery | None = None
        self._children: dict[str, ChildConfig] = {}
        self._tails: dict[Path, _Tail] = {}
        # The folders whose delivery is to be asked for, and when.
        self._asks: dict[Path, float] = {}
        # Those for which there was no room, the one that has waited longest first.
        self._waiting: dict[Path, None] = {}
        self._sharing = -1
        # Those that need to be looked at before the next look at all of them.
        self._busy: dict[Path, _Tail] = {}

    def __len__(self) -> int:
        """Return of how many living processes it delivers."""
        return len(self._tails)

    @property
    def is_waiting(self) -> bool:
        """Whether a process waits, since there are too many at once."""
        return bool(self._waiting)

    def use(self, recovery: Recovery | None, children: Mapping[str, ChildConfig]) -> None:
        """Deliver with these settings from now on. Stopping the earlier recovery gives its folders back.

        Args:
            recovery: Has the workers that deliver.
            children: The names of the enabled children → their settings.
        """
        self._recovery = recovery
        self._children = dict(children)
        self._tails.clear()
        self._busy.clear()
        self._asks.clear()
        self._waiting.clear()

    def forget(self, folders: set[Path]) -> None:
        """Forget all folders but these."""
        for gone in (self._asks.keys() | self._waiting.keys()) - folders:
            self._asks.pop(gone, None)
            self._waiting.pop(gone, None)
        for gone in self._tails.keys() - folders:
            self._give_back(gone)

    def wait_no_more(self, folder: Path) -> None:
        """Keep no place in the row for a process that is dead: no other would be taken before it."""
        self._waiting.pop(folder, None)

    def has(self, folder: Path) -> bool:
        """Say whether it delivers the events of a folder."""
        return folder in self._tails

    def take(self, folder: Path, has_room: Callable[[], bool]) -> None:
        """Deliver the events of a living process, if it lets the agent do so.

        Args:
            folder: The process's folder.
            has_room: Returns whether there may be one more.
        """
        now = self._clock.now()
        if self._recovery is None or now < self._asks.get(folder, -inf):
            return
        if not has_room() or (self._waiting and folder != next(iter(self._waiting))):
            self._waiting.setdefault(folder)
            return
        self._waiting.pop(folder, None)
        try:
            spool = Spool.tail(folder)
            self._asks[folder] = now + _TAKEN_SECONDS
            if spool is None:
                return
            try:
                journal = TailedJournal(spool, self._children, self._clock, self._recovery.look_soon)
            except BaseException:
                spool.abandon()
                raise
        except FileNotFoundError:
            # Its process lets nobody else deliver.
            self._asks[folder] = now + _AGAIN_SECONDS
        except Exception as error:
            self._failed(folder, error)
        else:
            if not journal.deliveries:
                spool.abandon()
                self._asks[folder] = inf
                return
            journal.most_bytes = self._share
            self._recovery.deliver(journal)
            self._tails[folder] = _Tail(journal, now)

    def look(self, folder: Path, has_died: Callable[[Path], bool]) -> None:
        """Look at a process whose events are delivered: at one that is idle, mostly with a single call of the system.

        Args:
            folder: The process's folder.
            has_died: Returns whether the process is dead.
        """
        tail = self._tails[folder]
        tail.looks += 1
        if tail.is_quiet:
            is_thorough = not tail.looks % _LOOKS_AT_IDLE
            if not self._has_grown(tail, is_thorough) and not (is_thorough and has_died(folder)):
                return
        self._look(folder, tail, has_died(folder))

    def _has_grown(self, tail: _Tail, with_folder: bool) -> bool:
        try:
            return tail.journal.has_grown(with_folder)
        except OSError:
            # A further look finds out what is wrong.
            return True

    def go_on(self) -> float:
        """Look at the processes that need it soon. Returns after how many seconds to call again."""
        pause = inf
        for folder, tail in list(self._busy.items()):
            pause = min(pause, self._look(folder, tail, False))
        return pause

    def _look(self, folder: Path, tail: _Tail, has_died: bool) -> float:
        """Read and hand out new events. Returns after how many seconds to do so again."""
        journal, recovery, now = tail.journal, self._recovery, self._clock.now()
        if recovery is None:
            return inf
        try:
            # A look at the lock says it not for certain, and nothing would be read any more of a process that lives.
            has_died = has_died and not is_alive(folder)
            pause = journal.grow(has_died)
            is_idle = journal.is_idle
            is_due = not is_idle and journal.heed_due()
            if journal.should_wake() or is_due:
                recovery.wake(journal)
            if has_died and pause == inf and journal.process_died():
                self._forget(folder)
                recovery.set_aside(journal)
                # The entry that says that the process has died is a new event.
                recovery.wake(journal)
                return inf
            self._note(journal)
        except FileNotFoundError:
            # The folder, or the lock of its delivery, was taken away.
            self._give_back(folder)
            return inf
        except Exception as error:
            self._give_back(folder)
            self._failed(folder, error)
            return inf
        if pause < inf:
            tail.grew_at = now
        tail.is_quiet = pause == inf and is_idle and not journal.has_news
        if tail.is_quiet:
            self._busy.pop(folder, None)
            return inf
        self._busy[folder] = tail
        return min(pause, max(PENDING_SECONDS, _PENDING_PART * len(self._busy)))

    def _note(self, journal: TailedJournal) -> None:
        try:
            journal.note()
        except FileNotFoundError:
            raise
        except OSError as error:
            # Such as a full disk. The events are delivered all the same.
            self._warn_once(f"what is delivered cannot be noted in {journal.spool.folder}: {reason_of(error)}.")

    def share_memory(self, processes: int) -> None:
        """Bound the events in memory.

        Args:
            processes: How many processes of all log stores are delivered.
        """
        if processes == self._sharing:
            return
        self._sharing = processes
        for tail in self._tails.values():
            tail.journal.most_bytes = self._share

    @property
    def _share(self) -> int:
        return min(MOST_BYTES, max(_LEAST_BYTES, _MEMORY_BYTES // max(1, self._sharing)))

    def make_room(self) -> None:
        """Give the folders back that have been idle, so that others can be taken in turn."""
        now = self._clock.now()
        for folder, tail in list(self._tails.items()):
            if tail.is_quiet and now - tail.grew_at > _IDLE_SECONDS:
                self._give_back(folder)
                self._asks[folder] = now + _TAKEN_SECONDS

    def note_all(self) -> None:
        """Write what has become of the events, at the end of the agent, even if exports are still under way."""
        for tail in self._tails.values():
            with suppress(OSError):
                tail.journal.note(at_once=True)

    def _give_back(self, folder: Path) -> None:
        tail = self._tails[folder]
        self._forget(folder)
        if self._recovery is not None:
            self._recovery.give_back(tail.journal)

    def _forget(self, folder: Path) -> None:
        self._tails.pop(folder, None)
        self._busy.pop(folder, None)

    def _failed(self, folder: Path, error: Exception) -> None:
        self._asks[folder] = self._clock.now() + _AGAIN_SECONDS
        why = reason_of(error) if isinstance(error, OSError) else described(error)
        self._warn_once(f"what the process of {folder} logs cannot be delivered while it runs: {why}{fix_of(error)}.")
