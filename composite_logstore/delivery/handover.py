"""Who delivers a process's events, the process itself or the machine's agent, and how they hand over to each other.

    here ──an agent works──▶ leaving ──no export is under way──▶ away
      ▲                         │                                 │
      └───────── an export does not return ───────────────────────┤
      └───────── no agent works, or none takes the delivery ──────┘

- *here*: this process's workers deliver, and it holds `delivery.lock`.
- *leaving*: the workers start no further export.
- *away*: an agent delivers what is on disk, and says in the positions and in the account how far it is. This process
  has no worker.

With `delivery: agent` a process is away from its first event on, with `auto` while an agent works. Only the holder of
`delivery.lock` delivers, and writes positions and account. So process and agent never deliver at once, even if they
are wrong about each other, and each begins where the other has ended.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from math import inf
from typing import Literal

from composite_logstore.clock import Clock
from composite_logstore.delivery.account import NOTHING, ChildStats
from composite_logstore.delivery.delivery import Delivery
from composite_logstore.delivery.flush import Flush
from composite_logstore.delivery.journal import Journal
from composite_logstore.delivery.own_folder import OwnFolder
from composite_logstore.delivery.spilling import Spilling
from composite_logstore.delivery.states import State
from composite_logstore.delivery.worker import Worker
from composite_logstore.service import patiently
from composite_logstore.spool.account import ChildAccount
from composite_logstore.spool.folder import Spool
from composite_logstore.spool.lock import agent_works
from composite_logstore.spool.reader import ForwardReader

LOOK_SECONDS = 1.0
"""How often a process looks whether an agent works."""
OFFER_SECONDS = 10.0
"""How long the delivery is offered to an agent. One that does not take it has other log stores, or no settings yet."""
AGAIN_SECONDS = 60.0
"""When to offer it again."""
STILL_SECONDS = 30.0
"""After how long without any progress an agent counts as stopped, while events wait: beyond a child's own delay."""
_POLL_SECONDS = 0.02
"""How often a flush looks how far the agent is."""
_FEW = 200
"""How many events may be counted under the journal's lock."""
_MOST_ROUNDS = 5

NO_AGENT = "no agent delivers: start `composite-logstore agent`, or set 'delivery' to 'auto'"
STOPPED = "the agent makes no progress"
NOT_ITS_CHILD = "the agent's settings have no such child"


class _Elsewhere:
    """What agents have done for one child.

    Attributes:
        counted: Of the events below this number it is known what became of them.
        known: The account that was read last, None if there was none.
        problem: The problem that was told last, empty if there is none.
    """

    def __init__(self) -> None:
        self.counted = 0
        self.known: ChildAccount | None = None
        self.problem = ""
        # What earlier accounts said that the present one does not include.
        self._earlier = NOTHING

    @property
    def stats(self) -> ChildStats:
        """The account of all events that agents have dealt with; no other object than `NOTHING` if there are none."""
        if self.known is None:
            return self._earlier
        stats = ChildStats.of_agents(self.known)
        return stats if self._earlier is NOTHING else self._earlier.plus(stats)

    def begin_anew(self) -> None:
        """Expect an account that does not include the present one."""
        self._earlier, self.known = self.stats, None

    def add_delivered(self, events: int) -> None:
        """Count events that the child has acknowledged, as no account says."""
        if events:
            self._earlier = self._earlier.plus(replace(NOTHING, accepted=events, delivered=events))


class Handover:
    """Decides who delivers. Does nothing without a spool, or with `delivery: process`.

    Attributes:
        workers: The threads that deliver here, one for each child; none while an agent delivers.
        is_away: Whether an agent delivers.
    """

    def __init__(
        self,
        mode: Literal["process", "agent", "auto"],
        journal: Journal,
        clock: Clock,
        new_worker: Callable[[int], Worker],
        warn: Callable[[str], None],
    ) -> None:
        """Prepare; no worker is started.

        Args:
            mode: The setting `delivery`.
            journal: The journal.
            clock: The source of time.
            new_worker: Returns a new worker for a child, by its place, which drives the journal's delivery.
            warn: Warns the user.
        """
        self._mode = mode if journal.spilling else "process"
        self._journal = journal
        self._clock = clock
        self._new_worker = new_worker
        self._warn = warn
        self.is_away = False
        # Only one thread looks at a time. The others need not wait for it, nor does a signal handler.
        self._looking = threading.Lock()
        self._has_begun = self._mode == "process"
        # Before it is decided, no thread may start one.
        self.workers = self._new_workers() if self._has_begun else []
        self._look_at = -inf
        self._has_stopped = False
        # When the present offer began, and when the next one may begin.
        self._offered_at = self._offer_at = -inf
        self._left_at: float | None = None
        # Since when events wait without any progress, infinity if they do not.
        self._still_since = inf
        self._spool: Spool | None = None
        self._elsewhere = {delivery.name: _Elsewhere() for delivery in journal.deliveries}

    def _new_workers(self) -> list[Worker]:
        return [self._new_worker(place) for place in range(len(self._journal.deliveries))]

    @property
    def _spilling(self) -> Spilling:
        assert self._journal.spilling
        return self._journal.spilling

    @property
    def _folder(self) -> OwnFolder:
        return self._spilling.folder

    @property
    def _agent_works(self) -> bool:
        return agent_works(self._folder.settings.component.parent)

    # Looking

    def begin(self) -> None:
        """Decide who delivers at first. Called with the first event, before any worker is started. Never raises.

        Another thread that logs meanwhile finds no worker to wake: the thread that decides wakes them.
        """
        if self._has_begun:
            return
        with self._alone() as is_alone:
            if not is_alone or self._has_begun:
                return
            if self._mode == "agent" or self._agent_works:
                with self._journal.lock:
                    self._go()
            if not self.is_away:
                self.workers = self._new_workers()
            self._has_begun = True

    def is_due(self) -> bool:
        """Return whether to call `look`, which may take the disk long."""
        is_able = self._mode != "process" and self._has_begun and not self._has_stopped
        return is_able and self._clock.now() >= self._look_at

    def look_soon(self) -> None:
        """Have `look` be due now, even if the last one was just before."""
        self._look_at = -inf

    def look(self) -> None:
        """Hand over if it is time to, or take back, which may take the disk long. Needs no lock."""
        if not self.is_due():
            return
        with self._alone() as is_alone:
            if is_alone:
                self._look_at = self._clock.now() + LOOK_SECONDS
                if self.is_away:
                    self._look_from_away()
                else:
                    self._look_from_here()
        if self.is_away:
            self.follow()

    def stop(self) -> None:
        """Have the workers end as soon as their deliveries only wait, and hand over no more."""
        self._has_stopped = True
        for worker in self.workers:
            worker.stop()

    @contextmanager
    def _alone(self) -> Iterator[bool]:
        is_alone = self._looking.acquire(blocking=False)
        try:
            yield is_alone
        finally:
            if is_alone:
                self._looking.release()

    # From here to away

    def _look_from_here(self) -> None:
        now = self._clock.now()
        works = now >= self._offer_at and self._agent_works
        if self._left_at is not None and now - self._left_at > OFFER_SECONDS:
            # An export does not return. The other children must not wait for it.
            works, self._offer_at = False, now + AGAIN_SECONDS
        if not works:
            self._stay()
            return
        if self._left_at is None:
            self._left_at = now
            for worker in self.workers:
                worker.stop(at_once=True)
        if any(worker.is_running for worker in self.workers):
            # It looks again soon.
            self.look_soon()
            return
        self._write_all()
        if self._folder.error is not None and self._spilling.unwritten:
            # Nothing can be written to disk, so this process continues to deliver from memory.
            self._offer_at = now + AGAIN_SECONDS
            self._stay()
            return
        with patiently(self._journal.lock):
            if self._can_go:
                self._go()

    def _stay(self) -> None:
        """Continue to deliver here: replace the workers that have stopped in order to hand over."""
        self._left_at = None
        for place, worker in enumerate(self.workers):
            if worker.is_stopping and not worker.is_running:
                self.workers[place] = self._new_worker(place)
                self.workers[place].wake()

    def _write_all(self) -> None:
        """Write what waits in memory, some of it at a time: `emit` must not wait long."""
        is_more = True
        while is_more:
            with patiently(self._journal.lock):
                self._journal.hand_out()
                self._spilling.try_again()
                is_more = self._spilling.write(most=_FEW)

    @property
    def _can_go(self) -> bool:
        """Whether all events that are not acknowledged are on disk, or about to be. Under the lock."""
        self._journal.hand_out()
        oldest = min(delivery.oldest for delivery in self._journal.deliveries)
        return self._folder.error is None and oldest > self._spilling.only_in_memory

    def _go(self) -> None:
        """Hand over. Under the lock."""
        self._journal.hand_out()
        spool = self._spool = self._folder.spool
        self._folder.acknowledge_all()
        for delivery in self._journal.deliveries:
            elsewhere = self._elsewhere[delivery.name]
            elsewhere.counted = int(min(delivery.oldest, self._journal.next_number))
        if spool is not None:
            if not self._has_said_how_far(spool):
                return
            spool.give_delivery()
        self._journal.hand_over()
        self._journal.progress.notify_all()
        self.workers = []
        self._left_at = None
        self.is_away = True
        self._offered_at = self._clock.now()
        self._still_since = inf

    def _has_said_how_far(self, spool: Spool) -> bool:
        """Write the account as of now, if agents have written one: the next agent continues it."""
        account = {
            delivery.name: known._replace(before=spool.acknowledged(delivery.name), state=delivery.state.value)
            for delivery in self._journal.deliveries
            if (known := self._elsewhere[delivery.name].known) is not None
        }
        try:
            if account:
                spool.write_account(account)
        except OSError:
            return False
        for name, child in account.items():
            self._elsewhere[name].known = child
        return True

    # While away

    def follow(self) -> None:
        """Take over how far the agent is: into the deliveries, and so into the accounts. Needs no lock."""
        if not self.is_away:
            return
        news: list[str] = []
        with self._alone() as is_alone:
            if is_alone and self.is_away:
                news = self._followed()
        for line in news:
            self._warn(line)

    def _followed(self) -> list[str]:
        spool = self._folder.spool
        if spool is not self._spool:
            self._begin_folder(spool)
        if spool is None:
            return []
        try:
            # The agent writes them in the other order.
            account = spool.account()
            positions = {name: spool.acknowledged(name) for name in self._elsewhere}
        except OSError:
            return []
        changed = {name for name in account.keys() & self._elsewhere if self._has_noted(spool, name, account[name])}
        with patiently(self._journal.lock):
            if spool is not self._folder.spool:
                return []
            return self._take_over(spool, account, positions, changed)

    def _begin_folder(self, spool: Spool | None) -> None:
        """Expect the accounts of another folder: there was none before, or it was taken away."""
        self._spool = spool
        self._offered_at = self._clock.now()
        for delivery in self._journal.deliveries:
            elsewhere = self._elsewhere[delivery.name]
            elsewhere.begin_anew()
            elsewhere.counted = max(elsewhere.counted, delivery.taken + 1)

    def _has_noted(self, spool: Spool, name: str, child: ChildAccount) -> bool:
        """Note an account. Returns whether it says anything new."""
        elsewhere = self._elsewhere[name]
        if child == elsewhere.known:
            return False
        if elsewhere.known is None or child.since != elsewhere.known.since:
            # An account was lost, or an agent was killed before it wrote its first one.
            elsewhere.begin_anew()
            elsewhere.add_delivered(self._wanted(spool, name, elsewhere.counted, child.since))
        elsewhere.known = child
        elsewhere.counted = max(elsewhere.counted, child.before)
        return True

    def _wanted(self, spool: Spool, name: str, first: int, before: int) -> int:
        """Return how many of the events on disk a child gets, from one number on and below another."""
        if first >= before:
            return 0
        delivery = next(delivery for delivery in self._journal.deliveries if delivery.name == name)
        with suppress(OSError):
            return sum(delivery.wants(event) is not None for event in spool.reader.read(first - 1, before))
        return 0

    def _take_over(
        self, spool: Spool, account: dict[str, ChildAccount], positions: dict[str, int], changed: set[str]
    ) -> list[str]:
        """Note how far the agent is, and free what no child needs. Under the lock. Returns warnings."""
        now = self._clock.now()
        deliveries = self._journal.deliveries
        freed = inf
        for delivery in deliveries:
            elsewhere = self._elsewhere[delivery.name]
            # What no account counts stays on disk, so that it can still be counted.
            before = min(positions[delivery.name], elsewhere.counted)
            freed = min(freed, before)
            has_all = elsewhere.known is not None and before > spool.segments.last and not self._spilling.unwritten
            delivery.follow(before, elsewhere.stats, 0 if has_all else None)
        spool.segments.free(freed)
        is_still = not changed and any(delivery.pending for delivery in deliveries)
        self._still_since = min(self._still_since, now) if is_still else inf
        still_seconds = now - self._still_since
        for delivery in deliveries:
            if delivery.name in changed:
                child = account[delivery.name]
                delivery.state, delivery.last_error = State(child.state), child.last_error
            elif not delivery.pending:
                delivery.state = State.HEALTHY
            elif changed and delivery.name not in account:
                self._give_up([delivery], NOT_ITS_CHILD)
            elif still_seconds > STILL_SECONDS + delivery.delay and delivery.state is State.HEALTHY:
                self._give_up([delivery], STOPPED)
        return [line for delivery in deliveries for line in self._news(delivery)]

    def _give_up(self, deliveries: Sequence[Delivery], why: str) -> None:
        """Have flushes wait for these children no more. Under the lock."""
        for delivery in deliveries:
            if delivery.pending:
                delivery.last_error = why
                delivery.give_up()

    def _news(self, delivery: Delivery) -> list[str]:
        elsewhere = self._elsewhere[delivery.name]
        problem = "" if delivery.state is State.HEALTHY else delivery.last_error or delivery.state.value
        before, elsewhere.problem = elsewhere.problem, problem
        if problem and not before:
            return [f"child '{delivery.name}': events are not delivered: {problem}; they wait on disk."]
        return [f"child '{delivery.name}': events are delivered again."] if before and not problem else []

    def demand(self) -> None:
        """Have the agent deliver all events captured by now without waiting for fuller batches."""
        with self._journal.lock:
            self._journal.hand_out()
            self._spilling.try_again()
            self._spilling.write()
            spool = self._folder.spool
            if spool is not None:
                # Events that no child gets have numbers, and are not there.
                spool.demand(int(spool.segments.last) + 1)
        if self._mode == "agent" and not self._agent_works:
            with self._journal.lock:
                self._give_up(self._journal.deliveries, NO_AGENT)

    def wait(self, flush: Flush) -> bool:
        """Wait for the agent as a flush waits for workers.

        Returns:
            False if this process delivers again before the flush is over.
        """
        pause = self._clock.signal()
        while self.is_away:
            self.follow()
            with self._journal.lock:
                seconds = flush.wait(self._clock.now())
            if seconds <= 0:
                return True
            pause.wait(min(seconds, _POLL_SECONDS))
        return False

    # From away to here

    def _look_from_away(self) -> None:
        now = self._clock.now()
        works = self._agent_works
        spool = self._folder.spool
        if spool is not self._spool:
            self._begin_folder(spool)
        # An agent does not get events that cannot be written. This process may deliver them from memory.
        is_stuck = self._mode == "auto" and self._folder.error is not None
        if works and not is_stuck and (spool is None or now - self._offered_at < OFFER_SECONDS):
            self._offered_at = max(self._offered_at, now if spool is None else -inf)
            return
        with suppress(OSError):
            if spool is not None and not spool.take_delivery():
                self._offered_at = now
            elif self._mode == "auto":
                if works:
                    self._offer_at = now + AGAIN_SECONDS
                self._take_back(spool)
            else:
                if spool is not None:
                    spool.give_delivery()
                with patiently(self._journal.lock):
                    self._give_up(self._journal.deliveries, NO_AGENT)

    def _take_back(self, spool: Spool | None) -> None:
        """Deliver here again, beginning with what is on disk. This process holds the lock of the delivery."""
        try:
            positions, uncounted = self._positions(spool)
            backlog = _Backlog(self._journal.deliveries, positions)
            if spool is not None:
                # Most of it without the journal's lock: `emit` must not wait.
                for _ in range(_MOST_ROUNDS):
                    if backlog.count(spool) <= _FEW:
                        break
                    self._write_all()
            with patiently(self._journal.lock):
                self._journal.hand_out()
                self._spilling.try_again()
                self._spilling.write()
                if spool is not self._folder.spool:
                    # It was taken away meanwhile, or this process has just made one. The next look decides about that.
                    return
                if spool is not None:
                    backlog.count(spool)
                self._journal.take_back()
                for delivery in self._journal.deliveries:
                    name = delivery.name
                    elsewhere = self._elsewhere[name]
                    elsewhere.add_delivered(uncounted[name])
                    elsewhere.counted = positions[name]
                    delivery.follow(positions[name], elsewhere.stats, backlog.counts[name])
                    delivery.state, delivery.last_error = State.HEALTHY, None
                self.workers = self._new_workers()
                self.is_away = False
                self._journal.progress.notify_all()
        finally:
            if self.is_away and spool is not None:
                spool.give_delivery()
        for worker in self.workers:
            worker.wake()

    def _positions(self, spool: Spool | None) -> tuple[dict[str, int], dict[str, int]]:
        """Return each child's position, and how many events before it were acknowledged and are in no account.

        If this process does not take the delivery back after all, the next agent counts those.
        """
        if spool is None:
            positions = {delivery.name: delivery.taken + 1 for delivery in self._journal.deliveries}
            return positions, dict.fromkeys(positions, 0)
        account = spool.account()
        positions, uncounted = {}, {}
        for name, elsewhere in self._elsewhere.items():
            if name in account:
                self._has_noted(spool, name, account[name])
            positions[name] = max(spool.acknowledged(name), elsewhere.counted)
            uncounted[name] = self._wanted(spool, name, elsewhere.counted, positions[name])
        return positions, uncounted


class _Backlog:
    """Counts the events on disk that wait for each child.

    Attributes:
        positions: The number with which each child begins.
        counts: How many events from that number on wait for it.
    """

    def __init__(self, deliveries: Sequence[Delivery], positions: dict[str, int]) -> None:
        self.positions = positions
        self.counts = dict.fromkeys(positions, 0)
        self._deliveries = deliveries
        self._after = min(positions.values(), default=0) - 1
        self._reader: ForwardReader | None = None
        for delivery in deliveries:
            delivery.progress_bars.forget()

    def count(self, spool: Spool) -> int:
        """Count the events that are there and are not counted yet. Returns how many numbers there were.

        Raises:
            OSError: The spool cannot be read now.
        """
        first = self._after
        if spool.segments.last <= first:
            return 0
        self._reader = self._reader or ForwardReader(spool.reader)
        for event in self._reader.read(self._after, spool.segments.last + 1):
            self._after = event.number
            for delivery in self._deliveries:
                if event.number >= self.positions[delivery.name]:
                    is_thinned = event.progress and delivery.progress_bars.is_thinned
                    more = delivery.progress_bars.find(event) if is_thinned else 1
                    self.counts[delivery.name] += more if delivery.wants(event) is not None else 0
        return self._after - first
