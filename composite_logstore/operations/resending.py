"""Sends the rejected events of one child again, batch by batch, and removes those that the backend takes."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from operator import attrgetter

from zenml.logger import get_logger

from composite_logstore import clock, secret_references
from composite_logstore.backend import BACKFILLED, Exporter, ExportError, UnavailableError
from composite_logstore.child_config import ChildConfig
from composite_logstore.delivery.backoff import Backoff, Decision, ExportPolicy, rejection
from composite_logstore.delivery.budgets import Budgets
from composite_logstore.delivery.states import Outcome
from composite_logstore.event import LogEvent, Stream
from composite_logstore.operations.inventory import LogStore
from composite_logstore.processing.budget import NOTICE, REASON
from composite_logstore.processing.processor import Processed, Processor
from composite_logstore.service import quietly
from composite_logstore.spool.format import RejectedEvent
from composite_logstore.spool.rejected import KeptLine, RejectedFolder

logger = get_logger(__name__)

GIVE_UP_SECONDS = 30.0
"""How long to wait for a child that takes nothing."""


@dataclass
class Retried:
    """What became of the rejected events of one child when they were sent again.

    Attributes:
        child: The name that the child had.
        taker: The name of the child that they were sent to, empty if they were not sent.
        delivered: How many the backend has taken.
        rejected: A reason → how many it has rejected again. They are kept with this reason.
        withheld: A reason → how many the child's settings keep from its backend. They stay as they are.
        remaining: How many rejected events of the child there are now, with damaged ones and those rejected meanwhile.
        obstacle: Why the others remain, empty if they were sent.
    """

    child: str
    taker: str = ""
    delivered: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    withheld: Counter[str] = field(default_factory=Counter)
    remaining: int = 0
    obstacle: str = ""


def is_meant(line: KeptLine, uncertain: bool) -> bool:
    """Return whether the event of a line is to be sent again.

    Args:
        line: The line.
        uncertain: Whether to send events, too, that the backend may have taken.
    """
    return line.rejected is not None and (uncertain or line.rejected.is_certain)


class _StoppedError(Exception):
    """The child takes no more events now. The message says why."""


@dataclass
class _Events:
    """The events of one writer, in their order.

    Attributes:
        lines: The number of an event → its lines: a killed process may leave more than one.
    """

    lines: dict[int, list[KeptLine]]

    def event(self, number: int) -> LogEvent:
        """Return an event as it was logged."""
        rejected = self.lines[number][-1].rejected
        assert rejected is not None
        return rejected.event


class Resending:
    """Sends the events of one child. As a delivery does, it makes them batches, processes these, and splits them."""

    def __init__(
        self,
        store: LogStore,
        config: ChildConfig,
        folder: RejectedFolder,
        result: Retried,
        tell: Callable[[Retried], None],
    ) -> None:
        """Prepare; nothing is sent.

        Args:
            store: The log store.
            config: The settings of the child that gets the events, references to secrets unresolved.
            folder: The events.
            result: What to count in.
            tell: Is told the result so far, after each export.
        """
        self._config = config
        self._folder = folder
        self._result = result
        self._tell = tell
        self._clock = clock.current
        first, longest = config.retry_initial_interval_millis / 1000, config.retry_max_interval_millis / 1000
        self._policy = ExportPolicy(config.batch_size, Backoff(first, longest, may_shorten=False))
        children = [child for child in store.children.values() if child.enabled]
        self._budget = Budgets(store.id, children, folder.path.parent, self._clock).of(config)
        self._processor = Processor()
        self._exporter: Exporter | None = None
        self._streams: dict[Stream, None] = {}
        # A writer → the highest number that the exporter was given.
        self._reached: dict[str, int] = {}
        self._pause = self._clock.signal()
        self._give_up_at = 0.0

    def send(self, uncertain: bool) -> None:
        """Send the events that are there now, until all are answered for, or the child takes no more.

        Args:
            uncertain: Whether to send events, too, that the backend may have taken.
        """
        self._give_up_at = self._clock.now() + GIVE_UP_SECONDS
        try:
            for _, found in groupby(self._folder.read(self._result.child), attrgetter("file")):
                self._send_file([line for line in found if is_meant(line, uncertain)])
        except _StoppedError as error:
            self._result.obstacle = str(error)
        finally:
            self._close()

    def _send_file(self, lines: Iterable[KeptLine]) -> None:
        writers: dict[str, dict[int, list[KeptLine]]] = {}
        for line in lines:
            assert line.rejected is not None
            event = line.rejected.event
            writers.setdefault(event.writer, {}).setdefault(event.number, []).append(line)
        for writer, found in writers.items():
            if self._exporter is None:
                self._create()
            if min(found) <= self._reached.get(writer, -1):
                # The exporter would take an earlier event of a writer for one that it has sent.
                self._close()
                self._create()
            self._reached[writer] = max(found)
            self._send_in_order(_Events(found))

    def _send_in_order(self, events: _Events) -> None:
        """Send the events of one writer, in batches as large as the backend takes."""
        waiting = [sorted(events.lines)]
        while waiting:
            batch = waiting.pop()
            most = self._most(events, batch)
            if len(batch) > most:
                waiting.append(batch[most:])
            waiting += self._export(events, batch[:most])
            self._tell(self._result)

    def _most(self, events: _Events, batch: Sequence[int]) -> int:
        """Return how many events from the beginning of a batch one export may have."""
        size = 0
        for place, number in enumerate(batch[: self._policy.limit]):
            size += events.event(number).size
            if size > self._config.max_batch_bytes:
                return max(1, place)
        return min(len(batch), self._policy.limit)

    def _export(self, events: _Events, batch: list[int]) -> list[list[int]]:
        """Export a batch, and settle what the backend answers. Returns the pieces to send again, the last one first.

        Raises:
            _StoppedError: The child takes no more events now.
        """
        processed: Processed | None = None
        error: Exception | None = None
        try:
            processed = self._process([events.event(number) for number in batch])
            if processed.events and self._exporter is not None:
                self._exporter.export(processed.events)
        except Exception as raised:
            error = raised
        if error is None:
            assert processed is not None
            if processed.events:
                self._policy.succeeded(len(batch))
            self._settle(events, processed, [])
            return []
        sent = len(processed.events) if processed else len(batch)
        decision = self._policy.failed(error, len(batch), sent=sent)
        found = rejection(error, processed.events) if processed else None
        if processed and decision.rejected is not None:
            again = []
            if found is not None:
                now, among = time.time_ns(), len(found.events)
                again = [
                    RejectedEvent(events.event(one.number), found.reason, now, found.number, among)
                    for one in found.events
                ]
                self._result.rejected[found.reason] += found.number
            self._settle(events, processed, again)
        if self._is_over(decision):
            # The text of an unknown exception may contain anything, such as a key.
            is_known = isinstance(error, ExportError)
            raise _StoppedError(decision.message if is_known else f"its exporter raised {type(error).__name__}")
        if decision.rejected is not None:
            return []
        if decision.outcome is Outcome.ANSWERED:
            middle = len(batch) // 2
            return [batch[middle:], batch[:middle]]
        self._pause.wait(decision.wait)
        return [batch]

    def _create(self) -> None:
        """Create the exporter.

        Raises:
            _StoppedError: It cannot be created.
        """
        try:
            config = secret_references.resolve(self._config)
            self._processor = config.create_processor().then(self._budget)
            self._exporter = config.create_exporter()
        except (UnavailableError, ImportError) as error:
            raise _StoppedError(str(error)) from error
        except Exception as error:
            raise _StoppedError(f"its exporter raised {type(error).__name__}") from error

    def _process(self, events: Sequence[LogEvent]) -> Processed:
        """Return a batch as the child gets it, marked: it comes after later events of its writer.

        Raises:
            RetryableError: It cannot be processed.
        """
        self._streams.update(dict.fromkeys(event.stream for event in events))
        wanted = [
            event._replace(metadata={**event.metadata, BACKFILLED: True})
            for event in events
            if self._config.wants(event.level, bool(event.progress))
        ]
        processed = self._processor.process(wanted)
        if len(wanted) < len(events):
            processed.withheld["below 'min_level'"] += len(events) - len(wanted)
        # Events over the budget stay here and can be sent later, so no notice in the log stands in for one of them.
        sent = [event for event in processed.events if NOTICE not in event.attributes]
        if len(sent) < len(processed.events):
            processed.withheld[REASON] += len(processed.events) - len(sent)
            processed.events = sent
        return processed

    def _settle(self, events: _Events, processed: Processed, again: Sequence[RejectedEvent]) -> None:
        """Keep what was rejected again, and remove all that was sent.

        Args:
            events: The events of the writer.
            processed: The batch.
            again: The events that the backend has rejected again.
        """
        self._give_up_at = self._clock.now() + GIVE_UP_SECONDS
        self._processor.commit(processed)
        self._result.withheld += processed.withheld
        sent = [event.number for event in processed.events]
        rejected = again[0].number if again else 0
        self._result.delivered += max(0, len(sent) - rejected)
        if again and self._folder.keep(self._result.child, again).error is not None:
            # Their lines stay, with the reason of before.
            sent = [number for number in sent if number not in {one.event.number for one in again}]
        self._folder.remove([line for number in sent for line in events.lines.get(number, ())])

    def _is_over(self, decision: Decision) -> bool:
        """Return whether no retry can help, or the child has failed for too long."""
        return decision.is_hopeless or (decision.wait > 0 and self._clock.now() + decision.wait > self._give_up_at)

    def _close(self) -> None:
        """End all streams, and release connections; the next batch opens them again."""
        exporter, self._exporter = self._exporter, None
        self._reached.clear()
        if exporter is None:
            return
        for stream in self._streams:
            quietly(logger.debug, "ending a stream failed: %s", exporter.end_stream, stream)
        self._streams.clear()
        quietly(logger.debug, "closing an exporter failed: %s", exporter.close)
