"""The steps through which each batch passes on its way to one child's backend, in the child's worker.

A batch may be processed any number of times, since exports are retried and batches are split. So `Processor.process`
leaves no trace, and only `Processor.commit` does, once the backend has answered for good:

- what `process` does to an event depends on the event, on the settings, and on what was committed before;
- `commit` follows `process` at most once for each event, in the order of the journal.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from composite_logstore.backend import RetryableError
from composite_logstore.event import LogEvent, Stream, stripped
from composite_logstore.inert import described


@dataclass
class Processed:
    """A batch on its way through the steps.

    Attributes:
        events: The events that are exported, as the child gets them.
        withheld: A reason → how many events of the batch are not exported.
        redacted: The name of a redaction → how many of the exported events it has changed.
        notes: A step → what it wants to remember once the batch is committed.
    """

    events: list[LogEvent]
    withheld: Counter[str] = field(default_factory=Counter)
    redacted: Counter[str] = field(default_factory=Counter)
    notes: dict[Step, Any] = field(default_factory=dict)


class Step:
    """One step of a processor.

    Attributes:
        remembers: Whether what it does to an event depends on the events before.
    """

    remembers: ClassVar[bool] = False

    def process(self, batch: Processed) -> None:
        """Withhold some events of the batch or change them, and count that in it."""
        raise NotImplementedError

    def commit(self, batch: Processed) -> None:
        """Note that this processed batch was exported, or had nothing to export."""

    def wants(self, event: LogEvent) -> bool:
        """Return whether the child gets an event, as far as that depends on the event alone."""
        return True

    def note_held(self, event: LogEvent) -> None:
        """Note an event that the child got in another way, such as from another process."""

    def last_of(self, stream: Stream) -> list[LogEvent]:
        """Forget a stream that has ended.

        Returns:
            Those of its withheld events that are exported after all.
        """
        return []


class Processor:
    """All steps of one child, in their order. Only the child's worker uses it."""

    def __init__(self, steps: Sequence[Step] = ()) -> None:
        """Process batches in these steps."""
        self._steps = tuple(steps)

    def then(self, step: Step | None) -> Processor:
        """Return a processor with a further step, if there is one."""
        return Processor((*self._steps, step)) if step else self

    @property
    def changes_nothing(self) -> bool:
        """Whether the child gets every event as it is."""
        return not self._steps

    @property
    def remembers(self) -> bool:
        """Whether what it does to an event depends on the events before."""
        return any(step.remembers for step in self._steps)

    def process(self, events: list[LogEvent]) -> Processed:
        """Return what is to be exported of a batch. It changes neither the batch nor the processor.

        Raises:
            RetryableError: A step failed, or ZenML cannot be asked which secrets to mask. Nothing may leave then, and
                the backend is not the cause.
        """
        batch = Processed(events)
        for step in self._steps:
            _process(step, batch)
        return batch

    def commit(self, batch: Processed) -> None:
        """Note that a processed batch was exported, or had nothing to export."""
        for step in self._steps:
            step.commit(batch)

    def note_held(self, event: LogEvent) -> None:
        """Note an event that the child got in another way, such as from another process."""
        for step in self._steps:
            step.note_held(event)

    def last_of(self, stream: Stream) -> list[LogEvent]:
        """Forget a stream that has ended.

        Returns:
            Those of its withheld events that are exported after all, as the child gets them.

        Raises:
            RetryableError: As `process` does.
        """
        last: list[LogEvent] = []
        for step in self._steps:
            batch = Processed(last)
            _process(step, batch)
            last = batch.events + step.last_of(stream)
        return last

    def wants(self, event: LogEvent) -> bool:
        """Return whether the child gets an event, as far as that depends on the event alone."""
        return all(step.wants(event) for step in self._steps)


def _process(step: Step, batch: Processed) -> None:
    try:
        step.process(batch)
    except RetryableError:
        raise
    except Exception as error:
        text = f"the child's rules, redaction or budget cannot be applied: {described(error)}"
        raise RetryableError(text, smaller_may_pass=True) from error


class StripEscapes(Step):
    """Removes the escape sequences of terminals."""

    def process(self, batch: Processed) -> None:
        """Remove them from each event."""
        batch.events = list(map(stripped, batch.events))
