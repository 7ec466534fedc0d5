"""The results of a comparison of children, and of a backfill, in one stream."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import TypeAlias

from composite_logstore.delivery.account import count_reason
from composite_logstore.inert import InertError

NAMED = 50
"""The most events that are named for each kind of difference, child and stream."""

DELAYS_SECONDS = (0.1, 0.5, 1, 2, 5, 10, 30, 60, 300, 3600)
"""The upper bounds of the classes in which delays are counted, in seconds."""

Tell: TypeAlias = Callable[[int], None]
"""A callback for progress: gets the number of records that were read since the last call."""


@dataclass
class Difference:
    """One event in which children differ.

    Attributes:
        kind: `missing`, `duplicated`, `out of order` or `different`.
        child: The child that differs.
        writer: The event's writer.
        sequence: Its number among the writer's events of the stream.
        uid: Its `log.record.uid`; empty if no child could show the event.
        time_unix_nano: When it was logged, in nanoseconds since the epoch; 0 if no child could show it.
        message: The beginning of its message; empty if no child could show it.
        detail: The difference in words.
    """

    kind: str
    child: str
    writer: str
    sequence: int
    uid: str = ""
    time_unix_nano: int = 0
    message: str = ""
    detail: str = ""

    @property
    def event(self) -> str:
        """The event's ID, or what is known of it."""
        return self.uid or f"{self.writer}/{self.sequence}"


def _add_numbers(total: Counts | Copied, other: Counts | Copied) -> None:
    """Add all numbers of a result to those of another."""
    for counted in fields(other):
        if isinstance(number := getattr(other, counted.name), int):
            setattr(total, counted.name, getattr(total, counted.name) + number)


@dataclass
class Counts:
    """How many events a child holds, and how many differ from those of other children.

    Attributes:
        events: The events that the child holds, without duplicates.
        missing: The events that it is missing although another child holds them, or although later events of their
            writer arrived.
        over_budget: How many of the missing events its budget may have withheld: its log says that it was used up then.
        arriving: The events that it is missing at the end of a stream that is still being written.
        excluded: The events that another child holds and that this one does not get, by its settings.
        duplicated: How often it holds an event once more.
        out_of_order: The events that lie behind later ones of their writer, in a child that keeps the order.
        different: The events whose content differs from that in the first child that holds them.
    """

    events: int = 0
    missing: int = 0
    over_budget: int = 0
    arriving: int = 0
    excluded: int = 0
    duplicated: int = 0
    out_of_order: int = 0
    different: int = 0

    @property
    def differences(self) -> int:
        """How many events are wrong. Duplicates are not counted: `fetch()` leaves them out."""
        return self.missing + self.out_of_order + self.different

    def count(self, other: Counts) -> None:
        """Add the counts of another stream."""
        _add_numbers(self, other)


@dataclass
class ChildParity(Counts):
    """What one child holds of a stream.

    Attributes:
        error: Why the child could not be read to the end; empty if it could.
        excuse: Why the child could be read but not compared; empty if it could be compared.
        minutes: A minute since the epoch → how many events the child holds of that minute.
        delays: How many events took how long to arrive, by the classes of `DELAYS_SECONDS` and one more for longer
            delays; empty where the child does not know when events arrived.
    """

    error: str = ""
    excuse: str = ""
    minutes: dict[int, int] = field(default_factory=dict)
    delays: list[int] = field(default_factory=list)


@dataclass
class StreamParity:
    """The result of comparing one stream.

    Attributes:
        logs_id: The stream's ID.
        label: The stream's name in reports.
        children: A child's name → what it holds.
        differences: The first events of each kind of difference.
    """

    logs_id: str
    label: str
    children: dict[str, ChildParity]
    differences: list[Difference] = field(default_factory=list)

    @property
    def was_compared(self) -> bool:
        """Whether all children could be read and compared."""
        return not any(child.error or child.excuse for child in self.children.values())


class BackfillStoppedError(InertError):
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
        """Add the events of another stream, or of others."""
        _add_numbers(self, other)
        for reason, number in other.rejected.items():
            count_reason(self.rejected, reason, number)
