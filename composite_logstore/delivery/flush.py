"""How long a flush waits for each child."""

from __future__ import annotations

from math import inf

from composite_logstore.delivery.delivery import Delivery
from composite_logstore.delivery.states import State


class Flush:
    """How long a flush waits: on for children that make progress, not at all for unavailable ones.

    Like a delivery it has no clock.
    """

    def __init__(self, deliveries: list[Delivery], before: int, now: float, timeout: float, limit: float) -> None:
        """Begin.

        Args:
            deliveries: The children.
            before: Events with numbers below this are to be settled.
            now: The time in seconds.
            timeout: How long to wait for a child that makes no progress, in seconds.
            limit: How long to wait at all, in seconds.
        """
        self._before = before
        self._timeout = timeout
        self._end = now + limit
        self._waiting = {delivery.name: delivery for delivery in deliveries}
        self._progress = {delivery.name: (delivery.acknowledged, now) for delivery in deliveries}
        for delivery in deliveries:
            delivery.flush(before)

    def wait(self, now: float) -> float:
        """Return for how many seconds at most to wait before asking again; 0 when it is over."""
        seconds = inf
        for name, delivery in list(self._waiting.items()):
            delivery.watch(now)
            settled, since = self._progress[name]
            if delivery.acknowledged > settled:
                since = now
                self._progress[name] = (delivery.acknowledged, now)
            left = since + self._timeout - now
            if delivery.oldest >= self._before or delivery.state is State.UNAVAILABLE:
                del self._waiting[name]
            elif left <= 0:
                delivery.give_up()
                del self._waiting[name]
            else:
                seconds = min(seconds, left)
        if not self._waiting or now >= self._end:
            return 0.0
        return min(seconds, self._end - now)
