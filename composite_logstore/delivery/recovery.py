"""Recovery: finds the events that dead processes of the log store left on this machine, and delivers them."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from math import inf
from pathlib import Path
from uuid import UUID

from composite_logstore.child_config import ChildConfig
from composite_logstore.clock import Clock
from composite_logstore.delivery.account import ChildStats
from composite_logstore.delivery.budgets import Budgets
from composite_logstore.delivery.delivery import Delivery
from composite_logstore.delivery.last_words import add_last_words
from composite_logstore.delivery.progress_bars import Bar, bar_of, second_of
from composite_logstore.delivery.space import drop_oldest_segment
from composite_logstore.delivery.spilling import next_batch
from composite_logstore.delivery.states import Load, State
from composite_logstore.delivery.worker import Worker
from composite_logstore.event import LogEvent, Stream
from composite_logstore.inert import described, inert
from composite_logstore.names import counted
from composite_logstore.service import Service, Wait
from composite_logstore.spool.damage import Damage
from composite_logstore.spool.folder import Spool, process_folders
from composite_logstore.spool.format import Ended
from composite_logstore.spool.private_folder import fix_of
from composite_logstore.spool.reader import ForwardReader
from composite_logstore.spool.settings import SpoolSettings


class RecoveredJournal:
    """The journal of a dead process, read from its spool. It feeds workers like a live one, but gets no new events.

    Attributes:
        lock: Guards the journal and its deliveries.
        progress: Notified, under the lock, when a delivery has made progress.
        deliveries: One for each child that was configured in the dead process and is enabled now.
        spool: The folder of the dead process.
        is_given_back: Whether it is not delivered any more.
    """

    is_growing = False
    is_given_back = False

    def __init__(
        self,
        spool: Spool,
        children: Mapping[str, ChildConfig],
        clock: Clock,
        notify: Callable[[], None] = lambda: None,
        batch_bytes: int | None = None,
    ) -> None:
        """Count the events that the children have not acknowledged.

        Args:
            spool: The folder, which this process has locked.
            children: A child's name in the spool → the settings of the child that gets its events now.
            clock: The source of time and random numbers.
            notify: Called when a child has acknowledged all events.
            batch_bytes: About how many bytes of events one export may have; without it the child's own limit holds.
        """
        self.spool = spool
        self._clock = clock
        self._batch_bytes = batch_bytes
        self._notify = notify
        self.lock = threading.RLock()
        self.progress = clock.condition(self.lock)
        if spool.lock is not None and not spool.children:
            # The positions are lost. Duplicates are better than gaps.
            for name in children:
                spool.reset(name)
        self.children = {name: config for name, config in children.items() if name in spool.children}
        self._accepted = dict.fromkeys(self.children, 0)
        self._cursors = {name: ForwardReader(spool.reader) for name in self.children}
        self.deliveries = [self._delivery(name, clock) for name in self.children]
        self._count()

    def _delivery(self, name: str, clock: Clock) -> Delivery:
        config = self.children[name].model_copy(update={"name": name})
        before = self._acknowledged(name)

        def accepted() -> int:
            return self._accepted[name] + delivery.progress_bars.accepted

        delivery = Delivery(config, accepted, clock.random(name), True, before, self._batch_bytes)
        return delivery

    def _acknowledged(self, name: str) -> int:
        """Return the number below which a child has acknowledged all events."""
        return self.spool.acknowledged(name)

    def _count(self) -> None:
        """Count the accepted events of each child from its position on, and announce the ends of all streams."""
        lost = dict.fromkeys(self._accepted, 0)
        acknowledged = {delivery.name: self.spool.acknowledged(delivery.name) for delivery in self.deliveries}
        # The streams with events behind which there is no mark that they have ended.
        streams: set[Stream] = set()
        # A progress bar → the second and the number of its last update, since only the last of each second counts.
        latest: dict[Bar, tuple[int, int]] = {}
        last = -1
        for place, item in enumerate(chain(self.spool.reader.scan(), self._last_words())):
            if place % _AT_A_TIME == 0:
                # There may be many events to count: let other threads have the GIL.
                time.sleep(0)
            if isinstance(item, Damage):
                # It is not known which children wanted the events: count a loss too many rather than none.
                for name, before in acknowledged.items():
                    if last + 1 >= before:
                        self._accepted[name] += item.lines
                        lost[name] += item.lines
                continue
            if isinstance(item, Ended):
                streams.discard(item.stream)
                for delivery in self.deliveries:
                    delivery.end_stream(item.stream, last + 1)
                continue
            last = item.number
            streams.add(item.stream)
            for delivery in self.deliveries:
                if item.number >= acknowledged[delivery.name]:
                    self._accept(delivery, item, latest)
            if item.progress:
                latest[bar_of(item)] = second_of(item), item.number
        for delivery in self.deliveries:
            delivery.drop_spooled(lost[delivery.name], delivery.taken)
            for stream in streams:
                delivery.end_stream(stream, last + 1)

    def _last_words(self) -> Iterator[LogEvent]:
        """Yield the events that say that the process has died, once all of its own were read."""
        yield from add_last_words(self.spool, self._clock.time())

    def _accept(self, delivery: Delivery, event: LogEvent, latest: Mapping[Bar, tuple[int, int]]) -> None:
        """Count an event if the child gets it. A later update of the same second replaces an earlier one."""
        if event.progress:
            second, number = latest.get(bar_of(event), (None, None))
            if second == second_of(event) and number in delivery.progress_bars.in_spool:
                delivery.progress_bars.in_spool.discard(number)
                self._accepted[delivery.name] -= delivery.progress_bars.is_thinned
            delivery.progress_bars.in_spool.add(event.number)
        self._accepted[delivery.name] += delivery.wants(event) is not None

    @property
    def is_done(self) -> bool:
        """Whether all enabled children have acknowledged all events, or, once it is given back, export none."""
        with self.lock:
            if self.is_given_back:
                return not any(delivery.is_exporting for delivery in self.deliveries)
            return all(delivery.oldest == inf for delivery in self.deliveries)

    def needs(self, delivery: Delivery) -> bool:
        """Return whether a delivery has anything to do."""
        with self.lock:
            return delivery.oldest < inf

    def hand_out(self) -> None:
        """Do nothing: no new events arrive."""

    def wake_after(self, events: int, urgent: bool = False) -> bool:
        """Return False: no new events arrive."""
        return False

    def load(self, delivery: Delivery, load: Load) -> list[LogEvent]:
        """Read the events that a delivery asks for from the spool."""
        return next_batch(self._cursors[delivery.name], delivery, load)

    def acknowledge(self, delivery: Delivery) -> None:
        """Record on disk which events a delivery has acknowledged. Under the lock."""
        with contextlib.suppress(OSError):
            # If the folder has been removed, no events are left to deliver either.
            self.spool.acknowledge(delivery.name, min(delivery.oldest, self.spool.segments.last + 1))
            self.spool.segments.tidy()
        if delivery.oldest == inf:
            self._notify()

    def close(self) -> None:
        """Release the folder, and remove it if nothing in it waits. Under the lock."""
        self.spool.close()

    def drop_oldest(self) -> bool:
        """See `MakesRoom`."""
        has_dropped = False
        with self.lock, contextlib.suppress(OSError):
            has_dropped = drop_oldest_segment(self.spool, self.deliveries)
        self._notify()
        return has_dropped


_MOST_JOURNALS = 100
"""How many recovered journals are open at once: each needs two file descriptors."""
_AGAIN_SECONDS = 60.0
"""When to try again to recover a folder, in seconds."""
_LOOK_SECONDS = 0.1
"""How often to check whether the last exports have returned before the folders are given back, in seconds."""
_AT_A_TIME = 50
"""After how many events the count lets other threads have the GIL."""
_MOST_NAMED = 3
"""How many damaged files one warning names."""


class Recovery:
    """Delivers the events that dead processes of a log store left, beside the events of this process.

    Each child has one worker, which takes the dead processes in turn, the oldest first. So an unavailable child delays
    no other, and a thousand dead processes need no thousand threads and connections.

    Attributes:
        journals: The recovered journals that some child has not acknowledged, oldest first.
    """

    def __init__(
        self,
        log_store_id: UUID,
        children: Sequence[ChildConfig],
        spool: SpoolSettings | None,
        clock: Clock,
        warn: Callable[[str], None],
        note_problem: Callable[[str], None],
        batch_bytes: int | None,
        budgets: Budgets,
    ) -> None:
        """Prepare; nothing is started.

        Args:
            log_store_id: The log store's id.
            children: The enabled children.
            spool: Where the log store's folder is; None if it has none, so that there is nothing to recover.
            clock: The source of time and threads.
            warn: Called with a warning for the user.
            note_problem: Called with the problem that keeps the thread from its work.
            batch_bytes: As for a `RecoveredJournal`.
            budgets: The children's budgets.
        """
        self._batch_bytes = batch_bytes
        self._budgets = budgets
        self.journals: list[RecoveredJournal] = []
        self._log_store_id = log_store_id
        self._children = {child.name: child for child in children}
        self._clock = clock
        self._warn = warn
        self._lock = threading.RLock()
        self._workers: dict[str, Worker] = {}
        self._finished: dict[str, ChildStats] = {}
        self._warned_of: set[Path] = set()
        self._due = clock.signal()
        self._new_service = partial(Service, "composite-logstore recovery", self._step, clock, warn, note_problem)
        self._service = self._new_service()
        self._spool = spool
        component = spool.component if spool else None
        self._component = component
        self._has_started = False
        # The folders to look at: the component's folder lists the others. And those to look at again, and when.
        self._waiting: deque[Path] = deque()
        self._retries: deque[tuple[float, Path]] = deque()
        self._looking_at: Path | None = None
        self._taken: set[Path] = set()
        self._is_stopping = self._is_giving_back = False

    def start(self) -> None:
        """Start the thread that finds, recovers and delivers events until none is left. May be called again."""
        if not self._has_started and self._component is not None:
            self._waiting.append(self._component)
        self._has_started = True
        self._service.start()

    def look_again(self) -> None:
        """Look for processes that have died since this one began to look, such as those that a step has started."""
        if self._component is None or not self._has_started or self._is_stopping:
            return
        self.recover(self._component)

    def recover(self, folder: Path) -> None:
        """Deliver what is in the folder of a process that has died. The component's folder means all folders in it."""
        self._waiting.append(folder)
        self.keep_going()
        self._due.set()

    def deliver(self, journal: RecoveredJournal) -> None:
        """Have the children's workers deliver a journal, in turn with the others.

        Args:
            journal: The journal. It is closed once it is done.
        """
        with self._lock:
            self.journals.append(journal)
            for delivery in journal.deliveries:
                worker = self._workers.get(delivery.name)
                if worker is None:
                    config = self._children[delivery.name]
                    budget = self._budgets.of(config)
                    worker = Worker(self._log_store_id, config, self._clock, budget, self._spool, tells_state=False)
                    self._workers[delivery.name] = worker
                worker.take(delivery, journal)
                worker.wake(delivery)

    def wake(self, journal: RecoveredJournal) -> None:
        """Have the workers look at a journal that has new events."""
        for delivery in journal.deliveries:
            if worker := self._workers.get(delivery.name):
                worker.wake(delivery)

    def give_back(self, journal: RecoveredJournal) -> None:
        """Deliver a journal no more. It is closed once no export is under way: only then may another process begin."""
        with self._lock, journal.lock:
            journal.is_given_back = True
            for delivery in journal.deliveries:
                if worker := self._workers.get(delivery.name):
                    worker.let_go(delivery, at_once=True)
            if journal.is_done:
                self._close(journal)

    def look_soon(self) -> None:
        """Look whether a journal is done."""
        self._due.set()

    def keep_going(self) -> None:
        """Start the thread again if it has ended while a folder was handed to it."""
        has_work = bool(self._waiting or self.journals)
        if has_work and self._service.has_ended:
            self._service = self._new_service()
        if has_work:
            self._service.start()

    def has(self, folder: Path) -> bool:
        """Say whether it is about to recover a folder, delivers its events, or will try it again."""
        with self._lock:
            if folder == self._looking_at or any(folder == journal.spool.folder for journal in self.journals):
                return True
            # Once it was told to stop, it recovers no further folder.
            return not self._is_stopping and (
                folder in self._waiting or any(folder == other for _, other in self._retries)
            )

    def has_taken(self, folder: Path) -> bool:
        """Say whether it has taken a folder over. It has not if another process held the folder when it tried."""
        with self._lock:
            return folder in self._taken

    def forget(self, folders: set[Path]) -> None:
        """Forget all folders that it has taken over but these."""
        with self._lock:
            self._taken &= folders

    @property
    def is_over(self) -> bool:
        """Whether it was told to stop, and no export is under way and no folder locked any more."""
        return self._is_stopping and not self.journals and not self._service.is_running

    def _step(self) -> Wait | None:
        """Recover the folders that are due, up to the limit. Returns how to wait for the next step."""
        while (folder := self._next_folder()) is not None:
            try:
                if folder == self._component:
                    found = process_folders(folder)
                    self.forget({*found})
                    self._waiting.extend(found)
                else:
                    self._recover(folder)
            except Exception as error:  # one folder must not keep others from being recovered
                self._warn_of(folder, error)
                self._retries.append((self._clock.now() + _AGAIN_SECONDS, folder))
            except BaseException:
                # The thread survives it, and looks at the folder again.
                self._waiting.appendleft(folder)
                raise
        if self._is_stopping:
            return self._close_when_idle() if self._is_giving_back else None
        self._close_done()
        if not (self._waiting or self._retries or self.journals):
            return None
        is_full = not self._retries or self._has_enough
        return partial(self._due.wait, None if is_full else max(0.0, self._retries[0][0] - self._clock.now()))

    @property
    def _has_enough(self) -> bool:
        return sum(not journal.is_growing for journal in self.journals) >= _MOST_JOURNALS

    def _next_folder(self) -> Path | None:
        """Return the folder to look at now, None if there is none. New ones come before those that are tried again."""
        with self._lock:
            self._looking_at = None
            if self._is_stopping or self._has_enough:
                return None
            if self._waiting:
                self._looking_at = self._waiting.popleft()
            elif self._retries and self._clock.now() >= self._retries[0][0]:
                _, self._looking_at = self._retries.popleft()
            return self._looking_at

    def stop(self, at_once: bool = False) -> None:
        """Start no more deliveries. The remaining events stay on disk for the next process, or for another writer.

        Args:
            at_once: Whether to give the folders back as soon as the exports under way have returned.
        """
        self._is_giving_back = self._is_giving_back or at_once
        self._is_stopping = True
        for worker in list(self._workers.values()):
            worker.stop(at_once)
        if at_once:
            self.keep_going()
        self._due.set()

    def _close_when_idle(self) -> Wait | None:
        """Close all journals once no export is under way. Returns how to wait for that, None when it is done."""
        if any(worker.is_running for worker in self._workers.values()):
            return partial(self._due.wait, _LOOK_SECONDS)
        with self._lock:
            for journal in self.journals:
                with journal.lock:
                    journal.close()
            self.journals.clear()
        return None

    def stats(self) -> list[dict[str, ChildStats]]:
        """Return the accounts of the recovered journals: child → account."""
        with self._lock:
            journals, stats = list(self.journals), [dict(self._finished)]
        for journal in journals:
            with journal.lock:
                stats.append({delivery.name: delivery.stats() for delivery in journal.deliveries})
        return stats

    @property
    def folders(self) -> list[str]:
        """The names of the folders of dead processes that it delivers now."""
        return [journal.spool.folder.name for journal in list(self.journals) if not journal.is_growing]

    def troubles(self) -> list[tuple[str, State, str | None]]:
        """Return each child's name with its state and its last error, for each journal. Needs no lock."""
        return [(one.name, one.state, one.last_error) for journal in list(self.journals) for one in journal.deliveries]

    def oldest_times(self) -> list[tuple[str, int]]:
        """Return a child's name and when its oldest recovered event in memory was logged, for each that has one."""
        found = []
        for journal in list(self.journals):
            with journal.lock:
                times = [(delivery.name, delivery.oldest_time) for delivery in journal.deliveries]
            found += [(name, time) for name, time in times if time is not None]
        return found

    def _recover(self, folder: Path) -> None:
        spool = Spool.recover(folder)
        if spool is None:
            return
        try:
            journal = RecoveredJournal(spool, self._children, self._clock, self._due.set, self._batch_bytes)
            damages = spool.set_aside()
        except BaseException:
            spool.abandon()
            raise
        self._warn_of_damage(damages)
        self.deliver(journal)
        with self._lock:
            self._taken.add(folder)

    def set_aside(self, journal: RecoveredJournal) -> None:
        """Move damaged pieces out of the folder of a process that has died while its events were delivered."""
        self._warn_of_damage(journal.spool.set_aside())

    def _warn_of_damage(self, damages: Sequence[tuple[Damage, Path]]) -> None:
        if damages:
            self._warn(f"{_in_words(damages)} Intact events are delivered; damaged ones count as dropped.")

    def _warn_of(self, folder: Path, error: Exception) -> None:
        """Warn once for each folder that cannot be read."""
        if folder in self._warned_of:
            return
        self._warned_of.add(folder)
        why = getattr(error, "strerror", None) or described(error)
        self._warn(f"the spool {inert(str(folder), '')} cannot be read and stays as it is: {why}{fix_of(error)}.")

    def _close_done(self) -> None:
        """Close the journals without a backlog, and end the workers whose child has none."""
        for journal in [journal for journal in self.journals if journal.is_done]:
            with self._lock, journal.lock:
                self._close(journal)
        with self._lock:
            needed = {one.name for journal in self.journals for one in journal.deliveries if journal.needs(one)}
            for name in self._workers.keys() - needed:
                self._workers.pop(name).stop()

    def _close(self, journal: RecoveredJournal) -> None:
        """Close a journal, unless another thread has just done so. Under both locks."""
        if journal not in self.journals:
            return
        self.journals.remove(journal)
        for delivery in journal.deliveries:
            journal.acknowledge(delivery)
            stats = delivery.stats()
            before = self._finished.get(delivery.name)
            self._finished[delivery.name] = before.plus(stats) if before else stats
            if worker := self._workers.get(delivery.name):
                worker.let_go(delivery)
        journal.close()


def _in_words(found: Iterable[tuple[Damage, Path]]) -> str:
    """Return what to tell the user about damaged pieces and where they are kept."""
    files: dict[Path, list[tuple[Damage, Path]]] = {}
    for damage, aside in found:
        files.setdefault(damage.path, []).append((damage, aside))
    parts = []
    for path, damages in list(files.items())[:_MOST_NAMED]:
        first, aside = damages[0]
        kept = "" if aside == path else f", kept in {inert(str(aside), '')}"
        pieces = sum(damage.lines for damage, _ in damages)
        number = "" if first.length is None or not first.length else f"{counted(pieces, 'piece')} of "
        parts.append(f"{number}the spool's file {inert(str(path), '')} cannot be read ({first.why}){kept}")
    if len(files) > _MOST_NAMED:
        parts.append(f"{len(files) - _MOST_NAMED} more files beside it cannot be read")
    return "; ".join(parts) + "."
