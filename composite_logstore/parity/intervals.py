"""Sets of numbers that lie close together: what a child holds of a writer's events."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from typing import TypeAlias

Interval: TypeAlias = tuple[int, int]
"""A first and a last number, both in it."""


class Intervals:
    """A set of numbers from 0 to 2^62, as intervals: a stream without a loss is one, whatever its length."""

    __slots__ = ("_firsts", "_lasts")

    def __init__(self, intervals: Iterable[Interval] = ()) -> None:
        self._firsts = array("q")
        self._lasts = array("q")
        for first, last in intervals:
            self.add(first, last)

    def add(self, first: int, last: int) -> None:
        """Add the numbers from one to another."""
        firsts, lasts = self._firsts, self._lasts
        if not lasts or first > lasts[-1] + 1:
            firsts.append(first)
            lasts.append(last)
            return
        if first == lasts[-1] + 1:
            lasts[-1] = last
            return
        if last == firsts[0] - 1:
            firsts[0] = first
            return
        # The intervals that it touches become one.
        begin = bisect_right(lasts, first - 2)
        end = bisect_right(firsts, last + 1)
        if begin < end:
            first, last = min(first, firsts[begin]), max(last, lasts[end - 1])
        firsts[begin:end] = array("q", [first])
        lasts[begin:end] = array("q", [last])

    def has(self, first: int, last: int) -> bool:
        """Return whether all the numbers from one to another are in it."""
        place = bisect_right(self._firsts, first) - 1
        return place >= 0 and last <= self._lasts[place]

    def touches(self, first: int, last: int) -> bool:
        """Return whether any of the numbers from one to another is in it."""
        place = bisect_right(self._firsts, last) - 1
        return place >= 0 and first <= self._lasts[place]

    def __contains__(self, number: int) -> bool:
        return self.has(number, number)

    def __iter__(self) -> Iterator[Interval]:
        return iter(zip(self._firsts, self._lasts, strict=True))

    def __len__(self) -> int:
        return sum(self._lasts) - sum(self._firsts) + len(self._firsts)

    def __bool__(self) -> bool:
        return bool(self._firsts)

    @property
    def count(self) -> int:
        """How many intervals it consists of."""
        return len(self._firsts)

    @property
    def last(self) -> int:
        """The highest number, -1 if there is none."""
        return self._lasts[-1] if self._lasts else -1

    def __or__(self, other: Intervals) -> Intervals:
        return Intervals(sorted([*self, *other]))

    def __sub__(self, other: Intervals) -> Intervals:
        left = Intervals()
        firsts, lasts = other._firsts, other._lasts
        place = 0
        for first, last in self:
            while place < len(lasts) and lasts[place] < first:
                place += 1
            at = place
            while first <= last:
                if at == len(firsts) or firsts[at] > last:
                    left.add(first, last)
                    break
                if firsts[at] > first:
                    left.add(first, firsts[at] - 1)
                first = lasts[at] + 1
                at += 1
        return left
