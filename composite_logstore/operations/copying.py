"""Copies the events of streams from one child to another, in this process; the command and the pipeline use it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any
from uuid import UUID

from composite_logstore import zenml
from composite_logstore.backend import UnavailableError
from composite_logstore.catalog.errors import NoAnswerError, asking_zenml
from composite_logstore.catalog.runs import RunStream
from composite_logstore.catalog.stores import RegisteredStore, may_hold, open_child
from composite_logstore.child_config import ChildConfig
from composite_logstore.event import Stream
from composite_logstore.operations.progress import Reporter
from composite_logstore.operations.selection import state_folder
from composite_logstore.parity.backfill import Backfill
from composite_logstore.parity.ledger import REMEMBERED_SECONDS, BackfillRunsError, Ledger, open_ledger
from composite_logstore.parity.result import Copied
from composite_logstore.parity.sender import Sender


@dataclass
class Totals(Copied):
    """The result of a backfill. The other attributes are those of `Copied`, added up.

    Attributes:
        log_store: The log store's name.
        streams: The number of streams that were worked on.
        in_progress: The number of streams that were skipped because their run is in progress.
    """

    log_store: str = ""
    streams: int = 0
    in_progress: int = 0

    @property
    def left_out(self) -> int:
        """The number of events and streams that are still missing from the child, as far as it is known."""
        nowhere = self.absent if self.absent == self.streams else 0
        return self.too_old + sum(self.rejected.values()) + self.in_progress + nowhere

    def as_dict(self) -> dict[str, Any]:
        """Return the counts as plain values."""
        return {name: value for name, value in asdict(self).items() if name != "log_store"}


def ended(
    streams: Iterable[RunStream], ids: dict[UUID | None, str], source: ChildConfig, totals: Totals
) -> Iterator[RunStream]:
    """Yield the streams that can be copied now, and count them.

    Args:
        streams: The streams.
        ids: The log stores whose streams the source may hold, as `collectors` returns them.
        source: The child to copy from.
        totals: Where to count them.
    """
    for stream in streams:
        if stream.collector not in ids or not may_hold(source, stream.collector, ids):
            continue
        if stream.run_in_progress:
            totals.in_progress += 1
            continue
        totals.streams += 1
        yield stream


def copy_streams(
    registered: RegisteredStore,
    source: ChildConfig,
    target: ChildConfig,
    streams: Iterable[RunStream],
    result: Copied,
    report: Reporter,
    rate: float | None = None,
    is_anew: bool = False,
    dry_run: bool = False,
) -> None:
    """Copy the events of some streams that are missing from a child, in this process.

    Args:
        registered: The log store.
        source: The child to copy from.
        target: The child to copy to.
        streams: The streams.
        result: Where to add up what became of the events, as it happens.
        report: Is told how far it is.
        rate: The most events per second.
        is_anew: Whether to forget what earlier backfills have sent.
        dry_run: Whether to count events as copied without copying them.

    Raises:
        BackfillStoppedError: A child became unavailable.
        NoAnswerError: ZenML or a child cannot be reached, or another backfill copies to the same child.
    """
    with ledger_of(registered, target, is_anew, dry_run) as ledger:
        if ledger.is_resumed:
            report.notice("Resuming an interrupted backfill.")
        copy_with(ledger, registered, source, target, streams, result, rate, report.count, dry_run=dry_run)
        ledger.complete()


@contextmanager
def ledger_of(
    registered: RegisteredStore, target: ChildConfig, is_anew: bool, dry_run: bool = False
) -> Iterator[Ledger]:
    """Give the ledger of a child, locked against other processes on this machine.

    Raises:
        NoAnswerError: Another backfill holds the lock.
    """
    since = 0.0 if target.unreadable else time.time() - REMEMBERED_SECONDS
    try:
        with open_ledger(state_folder("backfill"), registered.id, target.name, since, is_anew, dry_run) as ledger:
            yield ledger
    except BackfillRunsError as error:
        raise NoAnswerError(str(error)) from None


def copy_with(
    ledger: Ledger,
    registered: RegisteredStore,
    source: ChildConfig,
    target: ChildConfig,
    streams: Iterable[RunStream],
    result: Copied,
    rate: float | None,
    tell: Callable[[int], None],
    sleep: Callable[[float], None] = time.sleep,
    dry_run: bool = False,
) -> None:
    """Copy as `copy_streams` does, with a ledger that is open; tell how many more events were read.

    Raises:
        BackfillStoppedError: A child became unavailable.
        NoAnswerError: ZenML or a child cannot be reached.
    """
    with ExitStack() as opened:
        reading = opened.enter_context(closing(open_child(source)))
        there = None if target.unreadable else opened.enter_context(closing(open_child(target)))
        try:
            sender = Sender(target, ledger, rate, sleep=sleep, dry_run=dry_run)
        except (UnavailableError, ImportError) as error:
            raise NoAnswerError(f"child '{target.name}' cannot be written to: {error}") from error
        except Exception as error:
            # Its text may contain anything, such as a key.
            why = f"its exporter raised {type(error).__name__}"
            raise NoAnswerError(f"child '{target.name}' cannot be written to: {why}") from error
        opened.enter_context(closing(sender))
        copying = Backfill(reading, there, sender, tell)
        for stream in streams:
            copying.copy(stream.logs, stream_of(stream, registered), result)


def stream_of(stream: RunStream, registered: RegisteredStore) -> Stream:
    """Return a stream with the attributes that ZenML and the log store gave its events."""
    logs = stream.logs
    attributes, artifact_store_id = _attributes_of_run(stream.run_id)
    metadata = {
        **attributes,
        "zenml.log.id": str(logs.id),
        "zenml.log.source": logs.source,
        "zenml.log_store.id": str(registered.id),
        "zenml.log_store.name": registered.name,
    }
    if logs.step_run_id and stream.step_name:
        metadata |= {"zenml.step.run.id": str(logs.step_run_id), "zenml.step.run.name": stream.step_name}
    return Stream(logs.id, metadata, logs.artifact_store_id or artifact_store_id)


@lru_cache(maxsize=100)
def _attributes_of_run(run_id: UUID) -> tuple[dict[str, Any], UUID | None]:
    with asking_zenml():
        from zenml.client import Client
        from zenml.enums import StackComponentType

        run = Client().get_pipeline_run(run_id)
        found = run.stack.components.get(StackComponentType.ARTIFACT_STORE) if run.stack else None
        return zenml.run_attributes(run), found[0].id if found else None
