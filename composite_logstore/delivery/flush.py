"""How long a flush waits for each child."""

from __future__ import annotations

from math import inf

from composite_logstore.delivery.delivery import Delivery
from composite_logstore.delivery.states import State


class Flush:
    """Decides how long a flush waits: as long as children make progress, and not for unavailable ones.

    Like a delivery it has no clock. The journal's lock guards every call.
    """

    def __init__(self, deliveries: list[Delivery], before: int, now: float, timeout: float, limit: float) -> None:
        """Begin a flush, and tell the deliveries not to wait for fuller batches.

        Args:
            deliveries: The deliveries to wait for.
            before: The flush waits for events with numbers below this.
            now: The time in seconds.
            timeout: How long to wait for a child that makes no progress, in seconds.
            limit: How long to wait in total, in seconds.
        """
        self._before = before
        self._timeout = timeout
        self._end = now + limit
        # The deliveries that it waits for → how many events they had acknowledged, and since when.
        self._waiting = {delivery: (delivery.acknowledged, now) for delivery in deliveries}
        for delivery in deliveries:
            delivery.flush(before)

    def wait(self, now: float) -> float:
        """Return how many seconds to wait at most before the next call; 0 when the flush is over."""
        seconds = inf
        for delivery, (acknowledged, since) in list(self._waiting.items()):
            delivery.watch(now)
            if delivery.acknowledged > acknowledged:
                since = now
                self._waiting[delivery] = (delivery.acknowledged, now)
            left = since + self._timeout - now
            if delivery.oldest >= self._before or delivery.state is State.UNAVAILABLE:
                del self._waiting[delivery]
            elif left <= 0:
                delivery.give_up()
                del self._waiting[delivery]
            else:
                seconds = min(seconds, left)
        if not self._waiting or now >= self._end:
            return 0.0
        return min(seconds, self._end - now)
