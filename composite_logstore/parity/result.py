"""What a comparison of children found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    pass

from composite_logstore.delivery.account import count_reason

NAMED = 50
"""How many events are named of each kind of difference of a child in a stream."""

DELAYS_SECONDS = (0.1, 0.5, 1, 2, 5, 10, 30, 60, 300, 3600)
"""The bounds of the classes that delays are counted in."""

Tell: TypeAlias = Callable[[int], None]
"""Told how many more records were read."""


@dataclass
class Difference:
    """One event in which children differ.

    Attributes:
        kind: `missing`, `duplicated`, `out of order` or `different`.
        child: Where.
        writer: The event's writer.
        sequence: Its number among the writer's events of the stream.
        uid: Its `log.record.uid`, if it could be read anywhere.
        time_unix_nano: When it was logged, the same.
        message: The beginning of what it says, the same.
        detail: What differs.
    """

    kind: str
    child: str
    writer: str
    sequence: int
    uid: str = ""
    time_unix_nano: int = 0
    message: str = ""
    detail: str = ""


@dataclass
class Counts:
    """How many events a child holds and lacks.

    Attributes:
        events: The events that it holds, copies left out.
        missing: How many it lacks which another holds, or which nobody holds although later ones of their writer are
            there.
        arriving: How many it lacks at the end of a stream that is still being written.
        duplicated: How many copies it holds besides.
        out_of_order: How many come after later ones of their writer, although it keeps their order.
        different: How many say something else than in the first child that holds them.
    """

    events: int = 0
    missing: int = 0
    arriving: int = 0
    duplicated: int = 0
    out_of_order: int = 0
    different: int = 0

    @property
    def differences(self) -> int:
        """How many events are not as they should be. A copy is one that `fetch()` leaves out: it is none of them."""
        return self.missing + self.out_of_order + self.different

    def count(self, other: Counts) -> None:
        """Add those of another stream."""
        for counted in fields(Counts):
            setattr(self, counted.name, getattr(self, counted.name) + getattr(other, counted.name))


@dataclass
class ChildParity(Counts):
    """What one child holds of a stream.

    Attributes:
        error: Why it could not be read to the end, empty if it could.
        excuse: Why it could be read and yet not be compared, empty if it could.
        minutes: A minute since the epoch → the events that it holds of it.
        delays: For each class of delay, in the order of `DELAYS_SECONDS`, the events that took so long; empty where
            it is not known when they arrived.
    """

    error: str = ""
    excuse: str = ""
    minutes: dict[int, int] = field(default_factory=dict)
    delays: list[int] = field(default_factory=list)


@dataclass
class StreamParity:
    """What became of the comparison of one stream.

    Attributes:
        logs_id: The stream.
        label: What to call it.
        children: A child's name → what it holds.
        differences: Some of the events that differ, the first ones of each kind.
    """

    logs_id: str
    label: str
    children: dict[str, ChildParity]
    differences: list[Difference] = field(default_factory=list)

    @property
    def was_compared(self) -> bool:
        """Whether every child could be read and compared."""
        return not any(child.error or child.excuse for child in self.children.values())

    def as_dict(self) -> dict[str, Any]:
        """Return it in plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> StreamParity:
        """Return it again, from JSON too."""
        children = {name: ChildParity(**child) for name, child in values["children"].items()}
        for child in children.values():
            child.minutes = {int(minute): number for minute, number in child.minutes.items()}
        return cls(
            values["logs_id"], values["label"], children, [Difference(**named) for named in values["differences"]]
        )


class BackfillStoppedError(Exception):
    """A backfill cannot continue. The message says why, and how to mend it."""


@dataclass
class Copied:
    """What became of the events of one stream, or of several, in a backfill.

    Attributes:
        copied: How many events were sent and accepted.
        there: How many the child had already.
        unwanted: How many the child does not get by its settings.
        unidentified: How many entries do not say which events they are, in streams of which the child has events: it
            may have these, too.
        too_old: How many its backend would refuse for their age.
        rejected: A reason → how many the child rejected for it.
        absent: How many streams the source did not have.
    """

    copied: int = 0
    there: int = 0
    unwanted: int = 0
    unidentified: int = 0
    too_old: int = 0
    rejected: dict[str, int] = field(default_factory=dict)
    absent: int = 0

    def add(self, other: Copied) -> None:
        """Add the events of another stream."""
        self.copied += other.copied
        self.there += other.there
        self.unwanted += other.unwanted
        self.unidentified += other.unidentified
        self.too_old += other.too_old
        self.absent += other.absent
        for reason, number in other.rejected.items():
            count_reason(self.rejected, reason, number)
