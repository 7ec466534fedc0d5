"""When events have to go to disk, so that with `durability: spill` each is there within a second of the clock.

`emit` does not pay for noting the time of each event. Instead the keeper notes at each tick which number the next event
will have, so an event is no older than the last tick before it. On a busy machine the keeper may be late itself. So the
schedule measures how late ticks are, and has events written so much earlier.
"""

from __future__ import annotations

from collections import deque
from math import inf

TICK_SECONDS = 0.1
_TICKS = 8
"""After how many ticks an event is due: 0.8 s, which leaves 0.2 s for a late tick."""
_STEPS = 2
_STEPS_TO_FOLDER = 30
"""In how many steps the keeper gives up the GIL before an event is on disk, in a folder and without one yet. Each step
may take as long as a tick is late."""
_LEAST_SECONDS = 0.1
"""The age below which no event is due."""
_LATE_SECONDS = 0.9
"""The age at which the keeper is too late, so that any thread that numbers events writes them."""
_SHORTEST_SECONDS = 0.005


class Schedule:
    """Which events are due. The journal's lock guards every call but `woken`.

    Attributes:
        due: The number below which all events are due.
    """

    def __init__(self) -> None:
        self.due = 0
        # Times, and the number that the next event had then. Infinity is a time that is not known yet.
        self._known: deque[tuple[float, int]] = deque([(inf, 0)])
        self._next_tick = inf
        self._lateness = 0.0

    def rest(self, next_number: int) -> None:
        """Note that no event waits. The time is not known again until `woken`, or until a tick sees an event.

        Args:
            next_number: The number that the next event will have.
        """
        self._known = deque([(inf, next_number)])
        self._next_tick = inf

    def woken(self, now: float) -> None:
        """Note that the first event since a `rest` has just been logged.

        Needs no lock: a tick never leaves the deque empty, nor removes an item without a time, and each access is one C
        call. If `rest` replaces the deque at the same time, the event counts as new at the tick that it causes
        (test_spilling_in_time.py::test_ages_start_anew_after_a_pause).

        Args:
            now: The time in seconds.
        """
        known = self._known
        if known[0][0] == inf:
            known[0] = now, known[0][1]

    def age(self, now: float) -> float:
        """Return the greatest age, in seconds, that an event may have that is not due.

        Args:
            now: The time in seconds.
        """
        return now - self._known[0][0]

    def is_late(self, now: float) -> bool:
        """Say whether the oldest event should be on disk already.

        Args:
            now: The time in seconds.
        """
        return self.age(now) >= _LATE_SECONDS

    def tick(self, next_number: int, now: float, has_folder: bool) -> float:
        """Find out which events are due.

        Args:
            next_number: The number that the next event will have.
            now: The time in seconds.
            has_folder: Whether the spool has a folder. To make one takes many steps.

        Returns:
            After how many seconds to do so again.
        """
        late = max(0.0, now - self._next_tick)
        # The next tick may be as late as any that was late recently.
        self._lateness = max(late, 0.99 * self._lateness)
        steps = _STEPS if has_folder else _STEPS_TO_FOLDER
        seconds = max(_LEAST_SECONDS, _TICKS * TICK_SECONDS - steps * self._lateness)
        if next_number > self._known[0][1]:
            self.woken(now)
        if now - self._known[-1][0] >= TICK_SECONDS / 2:
            self._known.append((now, next_number))
        while self._known[0][0] <= now - seconds:
            if len(self._known) == 1:
                self._known.append((now, next_number))
            self._known.popleft()
            self.demand(self._known[0][1])
        wait = min(max(_SHORTEST_SECONDS, seconds - self.age(now)), TICK_SECONDS)
        self._next_tick = now + wait
        return wait

    def demand(self, before: int) -> None:
        """Have all events below a number be due."""
        self.due = max(self.due, before)
