"""Sets of numbers that lie close together, such as the numbers of the events that a child holds of one writer."""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeAlias

Interval: TypeAlias = tuple[int, int]
"""The first and the last number of an interval, both inclusive."""


class Intervals:
    """A set of numbers from 0 to 2^62, kept as disjoint intervals: a stream without losses is one of them."""

    __slots__ = ("_firsts", "_lasts")

    def __init__(self, intervals: Iterable[Interval] = ()) -> None:
        self._firsts = array("q")
        self._lasts = array("q")
        for first, last in intervals:
            self.add(first, last)

    def add(self, first: int, last: int) -> None:
        """Add all numbers from `first` to `last`."""
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
        # All intervals that it touches become one.
        begin = bisect_right(lasts, first - 2)
        end = bisect_right(firsts, last + 1)
        if begin < end:
            first, last = min(first, firsts[begin]), max(last, lasts[end - 1])
        firsts[begin:end] = array("q", [first])
        lasts[begin:end] = array("q", [last])

    def update(self, numbers: Sequence[int]) -> None:
        """Add numbers, in any order, at least one. The numbers of a range follow each other."""
        if isinstance(numbers, range):
            self.add(numbers[0], numbers[-1])
        else:
            for number in numbers:
                self.add(number, number)

    def has(self, first: int, last: int) -> bool:
        """Return whether the set contains all numbers from `first` to `last`."""
        place = bisect_right(self._firsts, first) - 1
        return place >= 0 and last <= self._lasts[place]

    def touches(self, first: int, last: int) -> bool:
        """Return whether the set contains any number from `first` to `last`."""
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
        """The number of intervals."""
        return len(self._firsts)

    @property
    def last(self) -> int:
        """The highest number; -1 if the set is empty."""
        return self._lasts[-1] if self._lasts else -1

    def __or__(self, other: Intervals) -> Intervals:
        return Intervals(sorted([*self, *other]))

    def __sub__(self, other: Intervals) -> Intervals:
        return Intervals(gap for first, last in self for gap in other._gaps(first, last))

    def _gaps(self, first: int, last: int) -> Iterator[Interval]:
        """Yield the intervals of numbers from `first` to `last` that the set does not contain."""
        place = bisect_left(self._lasts, first)
        while place < len(self._firsts) and self._firsts[place] <= last:
            if first < self._firsts[place]:
                yield first, self._firsts[place] - 1
            first = self._lasts[place] + 1
            place += 1
        if first <= last:
            yield first, last
