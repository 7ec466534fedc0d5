"""How many events one export may have, so that whatever bounds a request on its way is kept to.

Proxies, links and backends have bounds that nobody is told of. So batches behave like TCP's window: half as large after
one that was too large, and larger by a small step with each that gets through. Nothing here does I/O or knows the time.
"""

from __future__ import annotations

from math import inf

_STEPS = 16
"""In how many steps a batch would grow from nothing to the size that has failed. So of ten exports one fails."""

_ATTEMPTS = 2
"""How often a batch breaks off in a row before its size is taken for the cause: once is chance."""


class BatchSize:
    """How many events the next export may have, and what the last ones say about it."""

    def __init__(self, most: int) -> None:
        """Begin with the most that is set."""
        self._most = most
        self._limit = float(most)
        # The size that has failed last, infinity if none has since it got through.
        self._failed = inf
        # Whether anything has got through since the limit was lowered.
        self._has_passed = True
        self._broken_off = 0

    @property
    def limit(self) -> int:
        """The most events of one export at present."""
        return int(self._limit)

    def taken(self, size: int) -> None:
        """Note that an export of so many events got through. Only one that used the limit raises it."""
        self._broken_off = 0
        self._has_passed = True
        if size >= self._failed:
            self._failed = inf
        if size >= self.limit:
            # Where no size is known to fail, as after an outage, there is nothing to approach with care.
            step = self._limit if self._failed == inf else self._failed / _STEPS
            self._limit = min(self._most, self._limit + step)

    def broken_off(self, size: int) -> bool:
        """Note that an export of so many events timed out or broke off, and say whether the next one is smaller."""
        self._broken_off += 1
        if self._has_passed and size < self._failed and self._broken_off < _ATTEMPTS:
            return False
        self.too_large(size)
        return size > 1

    def too_large(self, size: int) -> None:
        """Note that so many events are too many."""
        self._failed = size
        self._limit = max(1.0, size / 2)
        self._has_passed = False
