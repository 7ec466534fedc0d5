"""The differences between a log store's children, added up over all streams."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from composite_logstore.parity.result import DELAYS_SECONDS, ChildParity, Counts, Difference, StreamParity

NAMED = 500
"""How many of the events that differ a summary names."""
_WORST = 20


@dataclass
class ChildSummary(Counts):
    """One child in all streams. The attributes are those of `ChildParity`, added up."""

    streams: int = 0
    delays: list[int] = field(default_factory=lambda: [0] * (len(DELAYS_SECONDS) + 1))
    held: Counter[int] = field(default_factory=Counter)
    most: Counter[int] = field(default_factory=Counter)

    def add(self, child: ChildParity, most: Counter[int]) -> None:
        """Add a stream.

        Args:
            child: What the child holds of it.
            most: A minute → the most events of it that any child holds.
        """
        self.streams += 1
        self.count(child)
        for place, number in enumerate(child.delays):
            self.delays[place] += number
        self.held.update(child.minutes)
        self.most.update(most)


class ParitySummary:
    """What was found in all streams that were compared.

    Attributes:
        log_store: The log store's name.
        children: A child's name → what was found.
        streams: How many streams were looked at.
        named: The streams' labels and the events that were named, the first ones.
        worst: The streams with the most differences: their number, label, child.
        not_compared: A stream's label, a child's name, and why it was not compared.
        seconds: How long it took.
    """

    def __init__(self, log_store: str = "", children: Iterable[str] = ()) -> None:
        """Create an empty summary for these children of a log store."""
        self.begin(log_store, children)
        self.streams = 0
        self.named: list[tuple[str, Difference]] = []
        self.worst: list[tuple[int, str, str]] = []
        self.not_compared: list[tuple[str, str, str]] = []
        self.seconds = 0.0

    def begin(self, log_store: str, children: Iterable[str]) -> None:
        """Name the log store and the children that are compared."""
        self.log_store = log_store
        self.children = {name: ChildSummary() for name in children}

    @property
    def differences(self) -> int:
        """How many events are not as they should be."""
        return sum(child.differences for child in self.children.values())

    @property
    def duplicated(self) -> int:
        """How many copies there are."""
        return sum(child.duplicated for child in self.children.values())

    @property
    def arriving(self) -> int:
        """How many events may yet arrive."""
        return sum(child.arriving for child in self.children.values())

    def add(self, result: StreamParity) -> None:
        """Add a stream."""
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

    def as_dict(self) -> dict[str, Any]:
        """Return it in plain values."""
        return {
            "log_store": self.log_store,
            "parity": not self.differences and not self.not_compared and self.streams > 0,
            "streams": self.streams,
            "differences": self.differences,
            "seconds": round(self.seconds, 3),
            "children": {
                name: {key: value for key, value in asdict(child).items() if key not in ("delays", "held", "most")}
                for name, child in self.children.items()
            },
            "events": [{"stream": label, **asdict(named), "child": named.child} for label, named in self.named],
            "not_compared": [{"stream": label, "child": name, "why": why} for label, name, why in self.not_compared],
        }
