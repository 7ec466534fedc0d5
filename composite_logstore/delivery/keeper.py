"""The two threads of a writer's spool: one writes waiting events in time, the other does slow housekeeping."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from composite_logstore.clock import Clock
from composite_logstore.delivery.handover import Handover
from composite_logstore.delivery.journal import Journal
from composite_logstore.delivery.recovery import Recovery
from composite_logstore.delivery.schedule import TICK_SECONDS
from composite_logstore.delivery.spilling import Spilling
from composite_logstore.delivery.status import REPORT_SECONDS
from composite_logstore.service import Service, Wait, patiently
from composite_logstore.spool.folder import Standing
from composite_logstore.spool.settings import spool_problem

_LOOK_SECONDS = 1.0
"""How often the keeper looks after the spool's folder while nothing is logged, and events wait there."""


class Keeper:
    """Writes events to the spool in time, and looks after its folder. Does nothing for a journal without a spool."""

    def __init__(
        self,
        journal: Journal,
        handover: Handover,
        recovery: Recovery,
        clock: Clock,
        service: Callable[..., Service],
        warn: Callable[[str], None],
        report: Callable[[], None],
    ) -> None:
        """Prepare; nothing is started.

        Args:
            journal: The journal.
            handover: Decides who delivers. The keeper has it look.
            recovery: Delivers the backlog of dead processes in the same folder. The keeper starts it.
            clock: Where time comes from.
            service: Makes a service of a thread's name and its step.
            warn: Tells the user that the spool cannot be used, and that it can again.
            report: Writes how the children are, for `composite-logstore status`.
        """
        self._journal = journal
        self._handover = handover
        self._recovery = recovery
        self._clock = clock
        self._warn = warn
        self._report_status = report
        # When the next report is due, and whether events were logged since the last one.
        self._report_at: float | None = None
        self._is_reported = True
        self._must_report = False
        self._writing = service("composite-logstore spool", self._write, longest_pause=TICK_SECONDS)
        self._writing_due = clock.signal()
        self._housekeeping = service("composite-logstore housekeeping", self._keep_house)
        self._housekeeping_due = clock.signal()
        self._has_ended = False
        self._seen = -1
        self._error: Exception | None = None
        self._has_told_of_unstorable = False

    def wake(self) -> bool:
        """Wake the thread that writes. Returns whether it runs, or need not. Never raises."""
        spilling = self._journal.spilling
        if spilling is None:
            return True
        spilling.schedule.woken(self._clock.now())
        self._writing_due.set()
        if self._writing.start():
            return True
        # Without the thread, no event may wait: write all of them now.
        with suppress(Exception), self._journal.lock:
            self._journal.hand_out()
            spilling.write()
        return False

    def keep_house(self) -> None:
        """Wake the thread that does slow work."""
        self._housekeeping_due.set()
        if not self._housekeeping.start():
            self._keep_house()

    def write_rest(self) -> bool:
        """Write all undelivered events to disk. Returns whether they are there."""
        if self._journal.spilling is None:
            return False
        with self._journal.lock:
            self._journal.spilling.write_rest()
            self._journal.hand_out()
            return self._journal.spilling.folder.error is None

    def stop(self) -> None:
        """Write nothing more. `let_go` follows once the journal's workers are told to stop."""
        self._has_ended = True

    def let_go(self) -> None:
        """End both threads, and give back the folder and its lock."""
        self._writing_due.set()
        self._housekeeping_due.set()
        if not self._housekeeping.is_running:
            self._keep_house()

    def _write(self) -> Wait | None:
        """Write events to disk that have waited too long."""
        spilling = self._journal.spilling
        if spilling is None or self._has_ended:
            return None
        folder = spilling.folder
        if not self._handover.is_away:
            self._recovery.start()
        with patiently(self._journal.lock):
            spilling.try_again()
            number = self._journal.next_number
            seconds = spilling.tick(number)
            is_idle = not spilling.unwritten and self._seen == number and not self._journal.wake_after(1)
            self._seen = number
            if is_idle:
                spilling.schedule.rest(number)
            # Due events first: everything else may take longer.
            is_more = spilling.write_due()
            folder.refresh()
            if not folder.is_away:
                # An agent knows better how far the children are, even while this process takes the delivery back.
                folder.acknowledge_all()
            is_needed = folder.is_needed
        while is_more:
            # Let another thread that waits for the lock go first.
            time.sleep(0)
            with patiently(self._journal.lock):
                is_more = spilling.write_due()
        self._report(spilling)
        self._is_reported = self._is_reported and is_idle
        is_due = self._is_report_due()
        if folder.spool is not None or is_due or self._handover.is_due():
            self.keep_house()
        if is_idle:
            may_sleep = self._is_reported and not is_needed and not self._recovery.journals
            return partial(self._writing_due.wait, None if may_sleep else _LOOK_SECONDS)
        # Not the signal that each event gives: events must not make the ticks come faster.
        return partial(self._clock.signal().wait, seconds)

    def _is_report_due(self) -> bool:
        """Return whether to report the children's status now: once a second, but not in a process's first second."""
        now = self._clock.now()
        if self._report_at is None:
            self._report_at = now + REPORT_SECONDS
        if now < self._report_at:
            return False
        self._report_at = now + REPORT_SECONDS
        self._must_report = self._is_reported = True
        return True

    def _keep_house(self) -> Wait | None:
        """Do the work that may take the disk long, so that no event has to wait for it."""
        spilling = self._journal.spilling
        if spilling is not None and self._has_ended:
            with self._journal.lock:
                spilling.release()
            return None
        if self._must_report:
            self._must_report = False
            with suppress(OSError):
                # Nobody's events depend on it.
                self._report_status()
        self._handover.look()
        if spilling is not None:
            folder = spilling.folder
            folder.maintain()
            if folder.space.is_exceeded:
                with patiently(self._journal.lock):
                    folder.make_room()
            standing = folder.standing()
            if standing is not Standing.IN_PLACE:
                with patiently(self._journal.lock):
                    folder.mend(standing)
                if spilling.unwritten:
                    # Events have to be written once more, at once.
                    self._writing_due.set()
        return self._housekeeping_due.wait

    def _report(self, spilling: Spilling) -> None:
        """Warn once when events no longer get to disk, once when they do again, and once of an event that never can."""
        if spilling.unstorable is not None and not self._has_told_of_unstorable:
            self._has_told_of_unstorable = True
            self._warn(f"an event cannot be written to disk, and waits in memory alone: {spilling.unstorable}.")
        error, settings = spilling.folder.error, spilling.folder.settings
        if error and not self._error:
            self._warn(f"{spool_problem(error, settings)}. Until then events wait in memory alone.")
        elif self._error and not error:
            self._warn(f"the spool in {settings.component} can be used again.")
        self._error = error
