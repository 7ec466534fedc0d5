"""The differences between a log store's children, added up over all streams."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from composite_logstore.parity.result import DELAYS_SECONDS, ChildParity, Counts, Difference, StreamParity

NAMED = 500
"""The most differing events that a summary names."""
_WORST = 20


@dataclass
class ChildSummary(Counts):
    """The result of one child in all streams. The attributes are those of `ChildParity`, added up."""

    streams: int = 0
    delays: list[int] = field(default_factory=lambda: [0] * (len(DELAYS_SECONDS) + 1))
    held: Counter[int] = field(default_factory=Counter)
    most: Counter[int] = field(default_factory=Counter)

    def add(self, child: ChildParity, most: Counter[int]) -> None:
        """Add a stream.

        Args:
            child: The child's result for the stream.
            most: A minute → the largest number of the stream's events that any child holds.
        """
        self.streams += 1
        self.count(child)
        for place, number in enumerate(child.delays):
            self.delays[place] += number
        self.held.update(child.minutes)
        self.most.update(most)


class ParitySummary:
    """The result of comparing streams.

    Attributes:
        log_store: The log store's name.
        children: A child's name → its result.
        streams: The number of streams.
        named: The first events that differ, each with the label of its stream.
        worst: The streams with the most differences: the number of differences, the stream's label, the child's name.
        not_compared: A stream's label, a child's name, and why the child could not be compared.
        seconds: How long the comparison took.
        hints: Why children may be missing events: known limits of their backends.
    """

    def __init__(self, log_store: str = "", children: Iterable[str] = ()) -> None:
        """Create an empty summary for these children of a log store."""
        self.begin(log_store, children)
        self.streams = 0
        self.named: list[tuple[str, Difference]] = []
        self.worst: list[tuple[int, str, str]] = []
        self.not_compared: list[tuple[str, str, str]] = []
        self.seconds = 0.0
        self.hints: list[str] = []

    def begin(self, log_store: str, children: Iterable[str]) -> None:
        """Name the log store and the children that are compared."""
        self.log_store = log_store
        self.children = {name: ChildSummary() for name in children}

    @property
    def differences(self) -> int:
        """The number of events that are missing, out of order or different."""
        return sum(child.differences for child in self.children.values())

    @property
    def over_budget(self) -> int:
        """How many of the differences are missing events that a budget may have withheld."""
        return sum(child.over_budget for child in self.children.values())

    @property
    def duplicated(self) -> int:
        """The number of duplicates."""
        return sum(child.duplicated for child in self.children.values())

    @property
    def arriving(self) -> int:
        """The number of missing events that may still arrive."""
        return sum(child.arriving for child in self.children.values())

    def add(self, result: StreamParity) -> None:
        """Add the result of a stream."""
        self.streams += 1
        compared = {name: child for name, child in result.children.items() if not child.error and not child.excuse}
        most: Counter[int] = Counter()
        for child in compared.values():
            most |= Counter(child.minutes)
        for name, child in result.children.items():
            if why := child.error or child.excuse:
                self.not_compared.append((result.label, name, why))
                continue
            self.children[name].add(child, most)
            if child.differences:
                self.worst.append((child.differences, result.label, name))
        self.worst = sorted(self.worst, key=lambda row: -row[0])[:_WORST]
        room = max(0, NAMED - len(self.named))
        self.named += [(result.label, named) for named in result.differences[:room]]

    def why_not_compared(self) -> str:
        """Return why not everything could be compared, by the first example; the text has no full stop."""
        label, name, why = self.not_compared[0]
        return f"not everything could be compared: child '{name}', {label}: {why.rstrip('.')}"

    def as_dict(self) -> dict[str, Any]:
        """Return the summary as plain values."""
        return {
            "log_store": self.log_store,
            "parity": not self.differences and not self.not_compared and self.streams > 0,
            "streams": self.streams,
            "differences": self.differences,
            "over_budget": self.over_budget,
            "seconds": round(self.seconds, 3),
            "children": {
                name: {key: value for key, value in asdict(child).items() if key not in ("delays", "held", "most")}
                for name, child in self.children.items()
            },
            "events": [{"stream": label, **asdict(named), "child": named.child} for label, named in self.named],
            "not_compared": [{"stream": label, "child": name, "why": why} for label, name, why in self.not_compared],
            "hints": self.hints,
        }
