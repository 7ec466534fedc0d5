"""How many events one export may have, where proxies, links and backends limit requests without saying so.

The size of a batch behaves like TCP's window: it is halved after a batch that was too large, and grows by a small step
with each batch that gets through. Nothing here does I/O or knows the time.
"""

from __future__ import annotations

from math import inf

_STEPS = 16
"""A step is this fraction of the size that has failed last. So about one export in ten fails."""

_ATTEMPTS = 2
"""How many exports of a batch have to break off in a row before its size counts as the cause: one may be chance."""


class BatchSize:
    """Learns from each export how many events the next one may have."""

    def __init__(self, most: int) -> None:
        """Begin with the largest size that the settings allow."""
        self._most = most
        self._limit = float(most)
        # The smallest size that is known to fail, infinity if that is not known.
        self._failed = inf
        # Whether any batch has got through since the limit was lowered.
        self._has_passed = True
        self._broken_off = 0

    @property
    def limit(self) -> int:
        """The most events of one export at present."""
        return int(self._limit)

    def taken(self, size: int) -> None:
        """Note that an export of so many events got through. It raises the limit only if it used all of it."""
        self._broken_off = 0
        self._has_passed = True
        if size >= self._failed:
            self._failed = inf
        if size >= self.limit:
            # Where no size is known to fail, as after an outage, the limit doubles.
            step = self._limit if self._failed == inf else self._failed / _STEPS
            self._limit = min(self._most, self._limit + step)

    def broken_off(self, size: int) -> bool:
        """Note that an export of so many events timed out or broke off. Returns whether the next one is smaller."""
        self._broken_off += 1
        if self._has_passed and size < self._failed and self._broken_off < _ATTEMPTS:
            return False
        self.too_large(size)
        return size > 1

    def too_large(self, size: int) -> None:
        """Note that so many events are too many: the next export has half of them."""
        self._failed = size
        self._limit = max(1.0, size / 2)
        self._has_passed = False
