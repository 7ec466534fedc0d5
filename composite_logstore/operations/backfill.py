"""Copying of streams from one child to another, for the commands that do so, and for the pipeline."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any
from uuid import UUID

from composite_logstore.backend import UnavailableError
from composite_logstore.catalog.stores import NoAnswer, RegisteredStore, RunStream, asking_zenml, open_child
from composite_logstore.cli.console import warn
from composite_logstore.config import ChildConfig
from composite_logstore.event import Stream
from composite_logstore.operations.selection import Bars, collector_of, state_folder
from composite_logstore.parity.backfill import Backfill, Copied
from composite_logstore.parity.ledger import REMEMBERED_SECONDS, BackfillRunsError, Ledger, open_ledger
from composite_logstore.parity.result import Tell


@dataclass
class Totals(Copied):
    """What became of all streams. The other attributes are those of `Copied`, added up.

    Attributes:
        streams: The streams that were looked at.
        in_progress: Those that were left out, since their run is in progress.
    """

    streams: int = 0
    in_progress: int = 0

    @property
    def left_out(self) -> int:
        """How much the child still lacks. Where nothing is found of any stream, it is not known."""
        nowhere = self.absent if self.absent == self.streams else 0
        return self.too_old + sum(self.rejected.values()) + self.in_progress + nowhere

    def add(self, other: Copied) -> None:
        """Add a stream's, or those of other streams."""
        super().add(other)
        if isinstance(other, Totals):
            self.streams += other.streams
            self.in_progress += other.in_progress

    def as_dict(self) -> dict[str, Any]:
        """Return it in plain values."""
        return asdict(self)


def ended(
    streams: Iterable[RunStream], ids: dict[UUID | None, str], source: ChildConfig, totals: Totals
) -> Iterator[RunStream]:
    """Yield those of some streams that can be copied now, and count them.

    Args:
        streams: The streams.
        ids: The log stores whose streams the source may hold, as `log_stores_of` gives them.
        source: The child to copy from.
        totals: They are counted here.
    """
    for stream in streams:
        collector = collector_of(stream)
        # What the composite collected never came to an earlier log store that is there to be read alone.
        if collector not in ids or (not ids[collector] and not source.enabled and source.name in ids.values()):
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
    streams: Callable[[Bars], Iterable[RunStream]],
    result: Copied,
    rate: float | None = None,
    is_anew: bool = False,
) -> None:
    """Copy what one child lacks of some streams and another has.

    Args:
        registered: The log store.
        source: The child to copy from.
        target: The child to copy to.
        streams: Gives the streams, and tells the bars of them.
        result: What became of the events is added here, as it happens.
        rate: The most events in a second.
        is_anew: Whether to forget what earlier backfills have sent.

    Raises:
        BackfillStoppedError: A child cannot be read, or the other does not take any more.
        NoAnswer: ZenML cannot be asked, a child cannot be opened, or another backfill copies to it.
    """
    with ledger_of(registered, target, is_anew) as ledger, Bars("backfill") as bars:
        if ledger.is_resumed:
            warn("Goes on where an earlier backfill was interrupted.")
        copy_with(ledger, registered, source, target, streams(bars), result, rate, bars.tell)
        ledger.complete()


@contextmanager
def ledger_of(registered: RegisteredStore, target: ChildConfig, is_anew: bool) -> Iterator[Ledger]:
    """Give the ledger of a child, which nobody else on this machine has meanwhile.

    Raises:
        NoAnswer: Another backfill has it.
    """
    since = 0.0 if target.unreadable else time.time() - REMEMBERED_SECONDS
    try:
        with open_ledger(state_folder("backfill"), registered.store.id, target.name, since, is_anew) as ledger:
            yield ledger
    except BackfillRunsError as error:
        raise NoAnswer(str(error)) from None


def copy_with(
    ledger: Ledger,
    registered: RegisteredStore,
    source: ChildConfig,
    target: ChildConfig,
    streams: Iterable[RunStream],
    result: Copied,
    rate: float | None,
    tell: Tell,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Copy as `copy_streams` does, with a ledger that is open.

    Args:
        ledger: What was sent earlier.
        registered: The log store.
        source: The child to copy from.
        target: The child to copy to.
        streams: The streams.
        result: What became of the events is added here, as it happens.
        rate: The most events in a second.
        tell: Told how many more events were looked at.
        sleep: Waits for so many seconds.

    Raises:
        BackfillStoppedError: A child cannot be read, or the other does not take any more.
        NoAnswer: ZenML cannot be asked, or a child cannot be opened.
    """
    closing: list[Callable[[], None]] = []
    try:
        reading = open_child(source)
        closing.append(reading.close)
        there = None if target.unreadable else open_child(target)
        if there:
            closing.append(there.close)
        try:
            copying = Backfill(reading, target, there, ledger, rate, tell, time.monotonic, sleep)
        except (UnavailableError, ImportError) as error:
            raise NoAnswer(f"child '{target.name}' cannot be written to: {error}") from error
        closing.append(copying.close)
        for stream in streams:
            copying.copy(stream.logs, stream_of(stream, registered), result)
    finally:
        for close in reversed(closing):
            close()


def stream_of(stream: RunStream, registered: RegisteredStore) -> Stream:
    """Return the stream with the attributes that ZenML and the log store gave its events."""
    logs = stream.logs
    attributes, artifact_store_id = _of_run(stream.run_id)
    metadata = {
        **attributes,
        "zenml.log.id": str(logs.id),
        "zenml.log.source": logs.source,
        "zenml.log_store.id": str(registered.store.id),
        "zenml.log_store.name": registered.name,
    }
    if logs.step_run_id and stream.step_name:
        metadata |= {"zenml.step.run.id": str(logs.step_run_id), "zenml.step.run.name": stream.step_name}
    return Stream(logs.id, metadata, logs.artifact_store_id or artifact_store_id)


@lru_cache(maxsize=100)
def _of_run(run_id: UUID) -> tuple[dict[str, Any], UUID | None]:
    with asking_zenml():
        from zenml.client import Client
        from zenml.enums import StackComponentType
        from zenml.utils.logging_utils import get_run_log_metadata

        run = Client().get_pipeline_run(run_id)
        found = run.stack.components.get(StackComponentType.ARTIFACT_STORE) if run.stack else None
        return get_run_log_metadata(run), found[0].id if found else None
