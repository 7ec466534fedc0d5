"""The sending half of a backfill: events collected into batches, exported in order, retried, and noted in the ledger.

A batch has events of one writer. Batches are exported one after the other on a thread of its own, while the next
events are read. As soon as one batch fails for good, none that follows is exported: it would be out of order.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from zenml.logger import get_logger

from composite_logstore import secret_references
from composite_logstore.backend import Copier, ExportError, RetryableError, Scanned
from composite_logstore.delivery.account import count_reason
from composite_logstore.delivery.backoff import Backoff, Decision, ExportPolicy
from composite_logstore.event import LogEvent, Stream
from composite_logstore.parity.ledger import Ledger
from composite_logstore.parity.result import BackfillStoppedError, Copied
from composite_logstore.service import quietly

if TYPE_CHECKING:
    from composite_logstore.child_config import ChildConfig

logger = get_logger(__name__)

GIVE_UP_SECONDS = 60.0
"""How long one batch is retried."""

# Nobody waits for a backfill, and fuller batches than live ones cost less: so many times the usual size. All batches
# that are being filled may together have so many times the bytes of the largest.
_LARGER = 4
_QUEUED = 2


@dataclass(slots=True)
class _Batch:
    """Events of one writer, to be exported at once.

    Attributes:
        writer: Their writer.
        is_scanned: Whether the records are as they were scanned, rather than events.
        sequences: Their numbers.
        records: The events, or the records as they were scanned.
        size: About how many bytes they have.
    """

    writer: str
    is_scanned: bool
    sequences: list[int] = field(default_factory=list)
    records: list[Any] = field(default_factory=list)
    size: int = 0

    def halves(self) -> tuple[_Batch, _Batch]:
        """Return the batch in two halves."""
        middle = len(self.records) // 2
        first = _Batch(self.writer, self.is_scanned, self.sequences[:middle], self.records[:middle])
        return first, _Batch(self.writer, self.is_scanned, self.sequences[middle:], self.records[middle:])


@dataclass
class Sender:
    """Exports events to one child. One thread uses it, for one stream after the other.

    Attributes:
        target: The settings of the child.
        ledger: Where to note what was sent.
        rate: The most events in a second; as many as the child takes if not given.
        clock: The time in seconds, from a clock that never goes back.
        sleep: Waits for so many seconds.
        dry_run: Whether to count events as sent without sending them.
    """

    target: ChildConfig
    ledger: Ledger
    rate: float | None = None
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    dry_run: bool = False

    def __post_init__(self) -> None:
        """Create the exporter.

        Raises:
            UnavailableError: Something is missing that the user can provide, such as a secret.
            ImportError: A package that the exporter needs is not installed.
        """
        target = self.target
        self._free_at = self.clock()
        config = secret_references.resolve(target)
        self._processor = config.create_processor()
        self._exporter = config.create_exporter()
        batch_size = target.max_export_batch_size or min(target.max_batch_size, _LARGER * target.default_batch_size)
        if self.rate:
            batch_size = max(1, min(batch_size, int(self.rate)))
        first, longest = target.retry_initial_interval_millis / 1000, target.retry_max_interval_millis / 1000
        # A batch is tried for a minute: one that may be retried at once would be sent a hundred times.
        backoff = Backoff(first, longest, may_shorten=False)
        self._policy = ExportPolicy(batch_size, backoff)
        # The batches that are being filled: one for each writer.
        self._waiting: dict[str, _Batch] = {}
        self._waiting_size = 0
        self._pool = ThreadPoolExecutor(1, "backfill")
        # The exports under way, in their order: the pool has one thread.
        self._exports: deque[Future[None]] = deque()
        self._has_stopped = False

    def close(self) -> None:
        """Wait for the export under way, and release connections."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        quietly(logger.debug, "closing an exporter failed: %s", self._exporter.close)

    def takes_scanned(self, scan_format: str) -> bool:
        """Return whether records of this format can be exported as they were scanned, without being decoded."""
        return (
            self._processor.changes_nothing
            and isinstance(self._exporter, Copier)
            and self._exporter.scan_format == scan_format
        )

    def begin(self, stream: Stream, result: Copied) -> None:
        """Begin with a stream; the one before was ended or dropped.

        Args:
            stream: The stream, with the attributes that its events get.
            result: What to count in. The sender's thread counts what is copied and rejected, and nothing else does.
        """
        self._stream = stream
        self._result = result

    def add(self, writer: str, sequence: int, event: LogEvent) -> None:
        """Add an event to its writer's batch, as the child gets it, unless the child's settings withhold it.

        Raises:
            BackfillStoppedError: The child does not take an earlier batch, ZenML cannot be asked which secrets to mask,
                or the event cannot be processed.
        """
        try:
            processed = self._processor.process([event])
        except RetryableError as error:
            raise self._stopped(str(error)) from error
        # Batches are retried as they are, so what was processed is processed for good.
        self._processor.commit(processed)
        if not processed.events:
            self._result.unwanted += 1
            return
        self._put_event(writer, sequence, processed.events[0])

    @property
    def remembers(self) -> bool:
        """Whether what becomes of an event depends on the events before, also on those that the child has already."""
        return self._processor.remembers

    def note_held(self, event: LogEvent) -> None:
        """Note an event that the child has already."""
        self._processor.note_held(event)

    def add_scanned(self, chunk: Scanned) -> None:
        """Add records as they were scanned.

        Raises:
            BackfillStoppedError: The child does not take an earlier batch.
        """
        count, size = len(chunk.contents), sum(map(len, chunk.contents))
        most = max(1, min(self._policy.limit, count * self.target.max_batch_bytes // max(1, size)))
        for begin in range(0, count, most):
            contents = chunk.contents[begin : begin + most]
            self._put(chunk.writer, True, chunk.sequences[begin : begin + most], contents, sum(map(len, contents)))

    def end(self) -> None:
        """End the stream: export all that was added, and events that count the repeats which no event has counted.

        Raises:
            BackfillStoppedError: The child does not take a batch, or those events cannot be processed.
        """
        self._export_all()
        try:
            last = self._processor.last_of(self._stream)
        except RetryableError as error:
            raise self._stopped(str(error)) from error
        if last:
            self._forget()
        for event in last:
            self._put_event(event.writer, event.sequence, event)
        self._result.unwanted -= len(last)
        self._export_all()
        self._end_stream()

    def finish(self) -> None:
        """Export all that was added, and let the exporter forget which events of the stream it has written.

        Raises:
            BackfillStoppedError: The child does not take a batch, or its exporter does not forget.
        """
        self._export_all()
        self._forget()

    def _export_all(self) -> None:
        for writer in list(self._waiting):
            self._send(writer)
        while self._exports:
            self._exports.popleft().result()

    def _forget(self) -> None:
        """Let the exporter forget which events of the stream it has written, or it would leave out some that follow."""
        try:
            if not self.dry_run:
                self._exporter.end_stream(self._stream)
        except Exception as error:
            raise self._stopped(f"its exporter raised {type(error).__name__}") from error

    def drop(self) -> None:
        """Export no more of the stream, after an error."""
        quietly(logger.debug, "ending a stream failed: %s", self._processor.last_of, self._stream)
        self._waiting.clear()
        self._waiting_size = 0
        for export in self._exports:
            export.cancel()
        wait(self._exports)
        self._exports.clear()
        self._end_stream()

    def _end_stream(self) -> None:
        if not self.dry_run:
            quietly(logger.debug, "ending a stream failed: %s", self._exporter.end_stream, self._stream)

    def _stopped(self, why: str) -> BackfillStoppedError:
        return BackfillStoppedError(f"child '{self.target.name}' takes no events: {why}")

    def _put_event(self, writer: str, sequence: int, event: LogEvent) -> None:
        self._put(writer, False, [sequence], [event], event.size)

    def _put(self, writer: str, is_scanned: bool, sequences: Any, records: Any, size: int) -> None:
        """Add records to their writer's batch; first export a batch that leaves no room for them."""
        most = self.target.max_batch_bytes
        if self._waiting_size > _LARGER * most:
            self._send(max(self._waiting, key=lambda name: self._waiting[name].size))
        batch = self._waiting.get(writer)
        if batch is not None:
            is_full = len(batch.records) + len(records) > self._policy.limit or batch.size + size > most
            if is_full or batch.is_scanned != is_scanned:
                self._send(writer)
                batch = None
        if batch is None:
            batch = self._waiting[writer] = _Batch(writer, is_scanned)
        batch.sequences += sequences
        batch.records += records
        batch.size += size
        self._waiting_size += size

    def _send(self, writer: str) -> None:
        """Have a writer's batch exported, while the next events are read."""
        batch = self._waiting.pop(writer)
        self._waiting_size -= batch.size
        while len(self._exports) >= _QUEUED:
            self._exports.popleft().result()
        if self.rate and not self.dry_run:
            now = self.clock()
            if self._free_at > now:
                self.sleep(self._free_at - now)
            self._free_at = max(self._free_at, now) + len(batch.records) / self.rate
        self._exports.append(self._pool.submit(self._export_in_turn, batch))

    def _export_in_turn(self, batch: _Batch) -> None:
        if self._has_stopped:
            return
        try:
            self._export(batch)
        except BaseException:
            self._has_stopped = True
            raise

    def _export(self, batch: _Batch) -> None:
        """Export a batch, with retries and in halves if necessary, and note it in the ledger.

        Raises:
            BackfillStoppedError: The child is unavailable, rejects everything, or has failed for too long.
        """
        count = len(batch.records)
        self._policy.start_again()
        give_up_at = self.clock() + GIVE_UP_SECONDS
        while count <= self._policy.limit:
            try:
                self._deliver(batch)
            except Exception as error:
                decision = self._policy.failed(error, count)
                if decision.rejected is not None:
                    self._count_rejected(batch, decision)
                if self._is_over(decision, count, give_up_at):
                    # The text of an unknown exception may contain anything, such as a key.
                    is_known = isinstance(error, ExportError)
                    why = decision.message if is_known else f"its exporter raised {type(error).__name__}"
                    raise self._stopped(why) from error
                if decision.rejected is not None:
                    return
                if not decision.wait:
                    break
                self.sleep(decision.wait)
            else:
                self._policy.succeeded(count)
                self._result.copied += count
                self._note(batch)
                return
        for half in batch.halves():
            self._export(half)

    def _count_rejected(self, batch: _Batch, decision: Decision) -> None:
        rejected = decision.rejected or 0
        self._result.copied += len(batch.records) - rejected
        count_reason(self._result.rejected, decision.reason, rejected)
        if not decision.rejected_in_a_row:
            # Otherwise the child may reject everything, and the next backfill tries these events again.
            self._note(batch)

    def _is_over(self, decision: Decision, count: int, give_up_at: float) -> bool:
        """Return whether no retry can help, or the child has failed for too long."""
        # A rejected batch of several events is not retried at its size, but in halves.
        is_retried = decision.wait > 0 and decision.rejected is None and count <= self._policy.limit
        return decision.is_hopeless or (is_retried and self.clock() + decision.wait > give_up_at)

    def _note(self, batch: _Batch) -> None:
        self.ledger.note(str(self._stream.id), batch.writer, batch.sequences)

    def _deliver(self, batch: _Batch) -> None:
        if self.dry_run:
            return
        if batch.is_scanned and isinstance(self._exporter, Copier):
            scanned = Scanned(batch.writer, batch.sequences, (), batch.records, None, None)
            self._exporter.export_scanned(self._stream, scanned)
        else:
            self._exporter.export(batch.records)
