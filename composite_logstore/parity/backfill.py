"""Backfill: one child's events copied to another that lacks them, with their identity and their times.

What was sent is noted on disk after each export, so a copy that was interrupted goes on where it ended, and a child
that cannot be read gets nothing twice.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from zenml.exceptions import DoesNotExistException, LogStoreError

from composite_logstore import secret_references
from composite_logstore.backend import (
    BACKFILLED,
    Copier,
    Exporter,
    Scanned,
    UnavailableError,
)
from composite_logstore.delivery.account import count_reason
from composite_logstore.delivery.backoff import Backoff, Decision, ExportPolicy
from composite_logstore.delivery.states import Outcome
from composite_logstore.event import Stream
from composite_logstore.parity.holding import Holding
from composite_logstore.parity.intervals import Intervals
from composite_logstore.parity.ledger import Ledger
from composite_logstore.parity.result import Tell
from composite_logstore.parity.scan import PAGES, Source, as_event, foreign_writer

if TYPE_CHECKING:
    from zenml.models import LogsResponse

    from composite_logstore.config import ChildConfig


GIVE_UP_SECONDS = 60.0
"""How long one batch is tried again."""

_LARGER = 4
_QUEUED = 2


class BackfillStoppedError(Exception):
    """The copy cannot go on. The message says why, and what would mend it."""


@dataclass
class Copied:
    """What became of a stream, or of several.

    Attributes:
        copied: The events that were sent, and taken.
        there: Those that were there already.
        unwanted: Those that are not meant for the child.
        unidentified: Those that do not say which events they are, of streams that the child has events of: it may have
            these, too.
        too_old: Those that its backend would refuse for their age.
        rejected: Those that it refused: a reason → a number.
        absent: The streams of which there was nothing to copy from.
    """

    copied: int = 0
    there: int = 0
    unwanted: int = 0
    unidentified: int = 0
    too_old: int = 0
    rejected: dict[str, int] = field(default_factory=dict)
    absent: int = 0

    def add(self, other: Copied) -> None:
        """Add another stream's."""
        self.copied += other.copied
        self.there += other.there
        self.unwanted += other.unwanted
        self.unidentified += other.unidentified
        self.too_old += other.too_old
        self.absent += other.absent
        for reason, number in other.rejected.items():
            count_reason(self.rejected, reason, number)


@dataclass(slots=True)
class _Batch:
    """Events of one writer, to be exported at once.

    Attributes:
        stream: Their stream.
        writer: Who numbered them.
        is_scanned: Whether they are there as they were scanned.
        sequences: Their numbers.
        records: The events, or what was scanned of them.
        size: About how many bytes they have.
    """

    stream: Stream
    writer: str
    is_scanned: bool
    sequences: list[int] = field(default_factory=list)
    records: list[Any] = field(default_factory=list)
    size: int = 0

    def halves(self) -> tuple[_Batch, _Batch]:
        """Return it in two."""
        middle = len(self.records) // 2
        one, other = (
            _Batch(self.stream, self.writer, self.is_scanned, self.sequences[part], self.records[part])
            for part in (slice(middle), slice(middle, None))
        )
        return one, other


class Backfill:
    """Copies streams from one child to another, one after the other. Used by one thread."""

    def __init__(
        self,
        source: Source,
        target: ChildConfig,
        there: Source | None,
        ledger: Ledger,
        rate: float | None = None,
        tell: Tell = lambda number: None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Create the exporter.

        Args:
            source: Where to copy from.
            target: The settings of the child to copy to.
            there: The same child, to be read; None if it cannot be.
            ledger: What was sent earlier.
            rate: The most events in a second.
            tell: Told how many more events were looked at.
            clock: The time in seconds since some moment.
            sleep: Waits for so many seconds.

        Raises:
            UnavailableError: A secret, or something else that somebody can mend, is missing.
            ImportError: What the exporter needs is not installed.
        """
        self._source = source
        self._target = target
        self._there = there
        self._ledger = ledger
        self._rate = rate
        self._tell = tell
        self._clock = clock
        self._sleep = sleep
        self._free_at = clock()
        config = secret_references.resolve(target)
        self._exporter: Exporter = config.create_exporter()
        # Nobody waits for a copy: fuller batches than live ones cost less.
        batch_size = target.max_export_batch_size or min(target.max_batch_size, _LARGER * target.default_batch_size)
        if rate:
            batch_size = max(1, min(batch_size, int(rate)))
        backoff = Backoff(target.retry_initial_interval_millis / 1000, target.retry_max_interval_millis / 1000)
        self._policy = ExportPolicy(batch_size, backoff)
        # What both have in the same format need not be understood, if all of it is meant for the child.
        self._copier: Copier | None = None
        if (
            isinstance(self._exporter, Copier)
            and self._exporter.scan_format == source.scanner.scan_format
            and target.wants_all
            and target.oldest_seconds is None
        ):
            self._copier = self._exporter
        # A writer → what is yet to be exported of its events.
        self._waiting: dict[str, _Batch] = {}
        self._waiting_size = 0
        self._pool = ThreadPoolExecutor(1, "backfill")
        self._exports: set[Future[None]] = set()
        self._has_stopped = False

    def close(self) -> None:
        """Wait for the export under way, and release connections."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._exporter.close()

    def copy(self, logs: LogsResponse, stream: Stream, result: Copied | None = None) -> Copied:
        """Copy what the child lacks of a stream.

        Args:
            logs: The stream, as ZenML knows it.
            stream: The same, with the attributes that its events get.
            result: What to count in: so it is known what became of some events if this raises.

        Returns:
            What became of its events.

        Raises:
            BackfillStoppedError: A child cannot be read, or the other does not take any more.
        """
        logs_id = str(logs.id)
        result = Copied() if result is None else result
        if self._ledger.is_resumed and logs_id in self._ledger.finished:
            return result
        there = self._held(logs, stream)
        try:
            self._copy(logs, stream, there, result)
        except BaseException:
            self._waiting.clear()
            self._waiting_size = 0
            for export in self._exports:
                export.cancel()
            wait(self._exports)
            self._exports.clear()
            raise
        finally:
            self._exporter.end_stream(stream)
        self._ledger.finish(logs_id)
        return result

    def _held(self, logs: LogsResponse, stream: Stream) -> dict[str, Intervals]:
        """Return what the child has, or will have as soon as it can be found."""
        held: dict[str, Intervals] = {}
        if self._there is not None:
            holding = Holding(self._there, stream)
            try:
                holding.scan(logs, lambda number: None)
            except DoesNotExistException:
                pass
            except Exception as error:
                raise BackfillStoppedError(_read_in_vain(self._there.name, error)) from error
            held = dict(holding.numbers)
            foreign = foreign_writer(logs.id)
            if holding.foreign and not held.keys() - {foreign} and self._there.scanner.scan_format == PAGES:
                # What it has may be all of it, or nothing.
                raise BackfillStoppedError(
                    f"child '{self._there.name}' has entries of this stream that do not say which events they are: "
                    f"what it lacks cannot be known. Copy to another child"
                )
        if self._there is not None and self._there.in_order:
            # What was sent there can be found at once, unless somebody has lost it.
            return held
        for writer in self._ledger.writers(str(logs.id)):
            held[writer] = held.get(writer, Intervals()) | self._ledger.sent(str(logs.id), writer)
        return held

    def _copy(self, logs: LogsResponse, stream: Stream, there: dict[str, Intervals], result: Copied) -> None:
        highest: dict[str, int] = {writer: held.last for writer, held in there.items()}
        # A writer → the last of its events that the exporter got, or will get, and remembers.
        reached: dict[str, int] = {}
        is_in_order = self._there is not None and self._there.in_order
        most = self._target.max_batch_bytes
        oldest = 0
        if self._target.oldest_seconds is not None:
            oldest = time.time_ns() - int(self._target.oldest_seconds * 1e9)
        foreign, ordinal = foreign_writer(logs.id), 0
        has_own = self._source.scanner.scan_format == PAGES and bool(there.keys() - {foreign})
        for chunk in self._chunks(logs, result):
            size = len(chunk.contents)
            if has_own and not chunk.writer:
                self._tell(size)
                result.unidentified += size
                continue
            writer, first = chunk.writer or foreign, ordinal
            sequences = chunk.sequences
            if not chunk.writer:
                sequences = range(ordinal, ordinal + size)
                ordinal += size
            held = there.setdefault(writer, Intervals())
            self._tell(size)
            if isinstance(sequences, range) and held.has(sequences[0], sequences[-1]):
                result.there += size
                continue
            if self._copier and self._can_be_copied(chunk, held, highest.get(writer, -1)):
                held.add(sequences[0], sequences[-1])
                highest[writer] = reached[writer] = sequences[-1]
                self._add_scanned(chunk, stream, result)
                continue
            batch: _Batch | None = None
            for place, sequence in enumerate(sequences):
                if sequence in held:
                    result.there += 1
                    continue
                event = as_event(self._source.scanner, chunk.contents[place], stream, first + place)
                if event is None:
                    continue
                held.add(sequence, sequence)
                if not event.time_unix_nano:
                    # Another program's line without a time: that of its stream.
                    event = event._replace(time_unix_nano=_created(logs))
                if not self._target.expects(event.level, event.progress):
                    result.unwanted += 1
                    continue
                if event.time_unix_nano < oldest:
                    result.too_old += 1
                    continue
                if sequence < reached.get(writer, -1):
                    # It comes after later ones: the exporter would take it for one that it has written.
                    self._send_all(result)
                    batch = None
                    self._exporter.end_stream(stream)
                    reached.clear()
                reached[writer] = sequence
                if sequence > highest.get(writer, -1):
                    highest[writer] = sequence
                elif is_in_order:
                    event = event._replace(metadata={**event.metadata, BACKFILLED: True})
                length = 512 + len(event.message)
                if batch is None or len(batch.records) >= self._policy.limit or batch.size + length > most:
                    batch = self._batch_for(stream, writer, False, 1, length, result)
                batch.size += length
                self._waiting_size += length
                batch.sequences.append(sequence)
                batch.records.append(event)
        self._send_all(result)

    def _chunks(self, logs: LogsResponse, result: Copied) -> Iterator[Scanned]:
        try:
            yield from self._source.scanner.scan(logs)
        except DoesNotExistException:
            result.absent += 1
        except Exception as error:
            raise BackfillStoppedError(_read_in_vain(self._source.name, error)) from error

    def _can_be_copied(self, chunk: Scanned, held: Intervals, highest: int) -> bool:
        """Return whether records can go out as they are: events without a gap, none of them there, none late."""
        sequences = chunk.sequences
        return (
            bool(chunk.writer)
            and isinstance(sequences, range)
            and sequences[0] > highest
            and not held.touches(sequences[0], sequences[-1])
        )

    def _add_scanned(self, chunk: Scanned, stream: Stream, result: Copied) -> None:
        """Have records exported as they are, in pieces that the child takes."""
        count, length = len(chunk.contents), sum(map(len, chunk.contents))
        most = max(1, min(self._policy.limit, count * self._target.max_batch_bytes // max(1, length)))
        for begin in range(0, count, most):
            contents = chunk.contents[begin : begin + most]
            length = sum(map(len, contents))
            batch = self._batch_for(stream, chunk.writer, True, len(contents), length, result)
            batch.size += length
            self._waiting_size += length
            batch.sequences += chunk.sequences[begin : begin + most]
            batch.records += contents

    def _batch_for(
        self, stream: Stream, writer: str, is_scanned: bool, count: int, length: int, result: Copied
    ) -> _Batch:
        """Return the batch that so many more events go into, of so many bytes; have exported what leaves no room."""
        most = self._target.max_batch_bytes
        if self._waiting_size > _LARGER * most:
            self._send(max(self._waiting, key=lambda writer: self._waiting[writer].size), result)
        batch = self._waiting.get(writer)
        if batch is not None:
            is_full = len(batch.records) + count > self._policy.limit or batch.size + length > most
            if is_full or batch.is_scanned != is_scanned:
                self._send(writer, result)
                batch = None
        if batch is None:
            batch = self._waiting[writer] = _Batch(stream, writer, is_scanned)
        return batch

    def _send(self, writer: str, result: Copied) -> None:
        """Have a writer's events exported, while the next ones are read."""
        batch = self._waiting.pop(writer)
        self._waiting_size -= batch.size
        while len(self._exports) >= _QUEUED:
            self._settle()
        if self._rate:
            now = self._clock()
            if self._free_at > now:
                self._sleep(self._free_at - now)
            self._free_at = max(self._free_at, now) + len(batch.records) / self._rate
        self._exports.add(self._pool.submit(self._export_in_turn, batch, result))

    def _send_all(self, result: Copied) -> None:
        """Have exported what waits, and wait for it."""
        for writer in list(self._waiting):
            self._send(writer, result)
        while self._exports:
            self._settle()

    def _settle(self) -> None:
        """Wait for an export to end, and raise if it failed for good."""
        done, self._exports = wait(self._exports, return_when=FIRST_COMPLETED)
        for export in done:
            export.result()

    def _export_in_turn(self, batch: _Batch, result: Copied) -> None:
        # What comes after a batch that did not go through would be out of order.
        if self._has_stopped:
            return
        try:
            self._export(batch, result)
        except BaseException:
            self._has_stopped = True
            raise

    def _export(self, batch: _Batch, result: Copied) -> None:
        """Export a batch, with retries and in halves if necessary, and note it in the ledger.

        Raises:
            BackfillStoppedError: The child is unavailable, rejects everything, or has failed for too long.
        """
        count = len(batch.records)
        self._policy.start_again()
        give_up_at = self._clock() + GIVE_UP_SECONDS
        while count <= self._policy.limit:
            try:
                self._deliver(batch)
            except Exception as error:
                decision = self._policy.failed(error, count)
                if decision.rejected is not None:
                    self._count_rejected(batch, decision, result)
                if self._is_over(decision, count, give_up_at):
                    why = decision.message
                    raise BackfillStoppedError(f"child '{self._target.name}' takes no events: {why}") from error
                if decision.rejected is not None:
                    return
                if not decision.wait:
                    break
                self._sleep(decision.wait)
            else:
                self._policy.succeeded(count)
                result.copied += count
                self._note(batch)
                return
        for half in batch.halves():
            self._export(half, result)

    def _count_rejected(self, batch: _Batch, decision: Decision, result: Copied) -> None:
        rejected = decision.rejected or 0
        result.add(Copied(copied=len(batch.records) - rejected, rejected={decision.reason: rejected}))
        if not decision.rejected_in_a_row:
            # Otherwise the child may reject everything, and the next backfill tries these events again.
            self._note(batch)

    def _is_over(self, decision: Decision, count: int, give_up_at: float) -> bool:
        """Return whether no retry can help: the child is unavailable, rejects everything or has failed for too long."""
        if decision.outcome in (Outcome.REFUSED, Outcome.REJECTED_ALL):
            return True
        is_same_size = decision.rejected is None and count <= self._policy.limit
        return is_same_size and self._clock() + decision.wait > give_up_at

    def _note(self, batch: _Batch) -> None:
        self._ledger.note(str(batch.stream.id), batch.writer, batch.sequences)

    def _deliver(self, batch: _Batch) -> None:
        if self._copier and batch.is_scanned:
            scanned = Scanned(batch.writer, batch.sequences, (), batch.records, None, None)
            self._copier.export_scanned(batch.stream, scanned)
        else:
            self._exporter.export(batch.records)


def _created(logs: LogsResponse) -> int:
    from zenml.utils.time_utils import to_utc_timezone

    return int(to_utc_timezone(logs.created).timestamp() * 1e6) * 1000


def _read_in_vain(name: str, error: Exception) -> str:
    is_known = isinstance(error, LogStoreError | UnavailableError | ValueError)
    return f"child '{name}' could not be read: {error if is_known else type(error).__name__}"
