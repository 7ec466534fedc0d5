"""Deliveries, backfills and scans limit the values in a backend's errors in the same way."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from composite_logstore import LogEvent, PageRequest, RejectedError, RetryableError
from composite_logstore.backend import Page
from composite_logstore.delivery.backoff import LONGEST_RETRY_AFTER
from composite_logstore.delivery.delivery import Delivery
from composite_logstore.delivery.states import Export, Wait
from composite_logstore.event import Stream
from composite_logstore.parity.backfill import Backfill
from composite_logstore.parity.ledger import open_ledger
from composite_logstore.parity.result import BackfillStoppedError, Copied
from composite_logstore.parity.scan import PageScanner, open_source
from composite_logstore.parity.sender import Sender
from composite_logstore.testing import SimulatedBackend, make_logs, make_stream
from composite_logstore.zenml import LogStoreRateLimitError
from tests.artifact_stores import FolderArchive
from tests.events import make_events
from tests.simulation import make_child

EVENTS = 8
NAN, INF = float("nan"), float("inf")


class Account(NamedTuple):
    """How many events were delivered and rejected."""

    delivered: int
    rejected: dict[str, int]


def delivered(backend: SimulatedBackend, events: Sequence[LogEvent]) -> Account:
    """Deliver the events to the backend."""
    delivery = Delivery(make_child("b", backend), lambda: len(events), rand=lambda: 1.0)
    delivery.queue.extend(events)
    now = 0.0
    while delivery.pending:
        action = delivery.next(now)
        if isinstance(action, Wait):
            assert action.seconds is not None
            now += action.seconds
            continue
        assert isinstance(action, Export)
        try:
            delivery.exported(backend.export(action.batch))
        except Exception as error:
            delivery.failed(error, now)
    stats = delivery.stats()
    assert stats.rejected == sum(stats.rejected_reasons.values())
    return Account(stats.delivered, stats.rejected_reasons)


class Copying:
    """A backfill of events from an archive to a simulated backend, in simulated time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stream: Stream = make_stream()
        self.waits: list[float] = []

    def __call__(self, backend: SimulatedBackend, events: int = EVENTS) -> Copied:
        archive = FolderArchive(name="a", type="artifact", root=str(self.folder), is_file=True)
        exporter = archive.create_exporter()
        exporter.export(make_events([str(number) for number in range(events)], self.stream))
        exporter.close()
        child = make_child("b", backend)
        with (
            open_ledger(self.folder, self.stream.id, "b", time.time() - 3600) as ledger,
            closing(Sender(child, ledger, clock=lambda: sum(self.waits), sleep=self.sleep)) as sender,
        ):
            return Backfill(open_source(archive), None, sender).copy(make_logs(self.stream), self.stream)

    def sleep(self, seconds: float) -> None:
        assert 0 < seconds < INF
        self.waits.append(seconds)


@pytest.fixture
def copying(tmp_path: Path) -> Copying:
    return Copying(tmp_path)


class Backend(SimulatedBackend):
    """Raises an error for the batch with the first event, and takes the other events."""

    def __init__(self, error: Callable[[], Exception]) -> None:
        super().__init__()
        self._error = error

    def export(self, batch: Sequence[LogEvent]) -> int:
        if any(event.sequence == 0 for event in batch):
            self.received += batch[1:]
            raise self._error()
        return super().export(batch)


class Unspeakable(RejectedError):
    def __str__(self) -> str:
        raise RuntimeError("no words")


class Bare(RejectedError):
    def __init__(self) -> None:
        Exception.__init__(self, "bare")


ALONE = Account(EVENTS - 1, {"no": 1})
REJECTED: list[tuple[str, Callable[[], Exception], Account]] = [
    ("one", lambda: RejectedError("no", 1), ALONE),
    ("not known which", lambda: RejectedError("no"), ALONE),
    ("none", lambda: RejectedError("no", 0), Account(EVENTS, {})),
    ("less than none", lambda: RejectedError("no", -1), Account(EVENTS, {})),
    ("more than there are", lambda: RejectedError("no", 10**30), Account(0, {"no": EVENTS})),
    ("a text", lambda: RejectedError("no", "2"), ALONE),  # type: ignore[arg-type]
    ("a fraction", lambda: RejectedError("no", 1.5), ALONE),  # type: ignore[arg-type]
    ("no number", lambda: RejectedError("no", NAN), ALONE),  # type: ignore[arg-type]
    ("a list", lambda: RejectedError("no", [1]), ALONE),  # type: ignore[arg-type]
    ("what cannot be said", lambda: Unspeakable("no", 1), Account(EVENTS - 1, {"<Unspeakable>": 1})),
    ("no count at all", Bare, Account(EVENTS - 1, {"bare": 1})),
]


@pytest.mark.parametrize(("error", "account"), [case[1:] for case in REJECTED], ids=[case[0] for case in REJECTED])
def test_a_backfill_counts_rejected_events_as_a_delivery_does(
    copying: Copying, error: Callable[[], Exception], account: Account
) -> None:
    assert delivered(Backend(error), make_events([str(number) for number in range(EVENTS)])) == account
    copied = copying(Backend(error))
    assert Account(copied.copied, copied.rejected) == account


def test_the_number_of_reasons_is_limited_for_deliveries_and_backfills(copying: Copying) -> None:
    class Wordy(SimulatedBackend):
        def export(self, batch: Sequence[LogEvent]) -> int:
            raise RejectedError(f"event {batch[0].sequence} is bad", len(batch) if len(batch) == 1 else None)

    events = make_events([str(number) for number in range(100)])
    for account in (delivered(Wordy(), events), Account(0, copying(Wordy(), 100).rejected)):
        assert len(account.rejected) <= 21
        assert sum(account.rejected.values()) == 100


# What is asked for → how long is waited: a child's first interval is half a second, and an hour is the most.
ASKED: list[tuple[Any, float]] = [
    (None, 0.5),
    (2, 2.0),
    (0, 0.5),
    (1e-9, 0.5),
    (-5, 0.5),
    (-INF, 0.5),
    (NAN, 0.5),
    ("2", 0.5),
    ([2], 0.5),
    (INF, LONGEST_RETRY_AFTER),
    (10**400, LONGEST_RETRY_AFTER),
    (365 * 86400, LONGEST_RETRY_AFTER),
]


@pytest.mark.parametrize(("asked_for", "seconds"), ASKED, ids=lambda value: str(value)[:12])
def test_a_delivery_and_a_backfill_wait_equally_long(copying: Copying, asked_for: Any, seconds: float) -> None:
    error = RetryableError("busy", asked_for)
    delivery = Delivery(make_child("b"), lambda: 1, rand=lambda: 1.0)
    delivery.queue.extend(make_events(["a"]))
    assert isinstance(delivery.next(0), Export)
    delivery.failed(error, 0)
    assert delivery.next(0) == Wait(seconds)

    backend = SimulatedBackend()
    backend.faults = [error]
    if seconds == LONGEST_RETRY_AFTER:
        # Longer than a backfill tries.
        with pytest.raises(BackfillStoppedError, match="child 'b' takes no events: busy"):
            copying(backend)
        assert copying.waits == []
    else:
        assert copying(backend).copied == EVENTS
        assert copying.waits == [seconds]


def test_a_backend_that_asks_for_retries_at_once_is_not_flooded(copying: Copying) -> None:
    backend = SimulatedBackend()
    backend.fault = RetryableError("busy", 1e-9)
    with pytest.raises(BackfillStoppedError, match="busy"):
        copying(backend)
    assert backend.exports < 20


@pytest.mark.parametrize(
    ("asked_for", "seconds"),
    [(None, 2), (5, 5), (0, 2), (-5, 2), (NAN, 2), ("7", 2), (INF, 120), (10**400, 120), (10**9, 120)],
    ids=lambda value: str(value)[:12],
)
def test_a_scan_limits_the_wait_that_a_backend_asks_for(asked_for: Any, seconds: float) -> None:
    waits: list[float] = []

    class Busy:
        max_page_size, in_order = 10, False

        def read(self, request: PageRequest) -> Page:
            if not waits:
                raise LogStoreRateLimitError("busy", retry_after=asked_for)
            return Page()

        def close(self) -> None:
            pass

    assert list(PageScanner(Busy(), waits.append).scan(make_logs(make_stream()))) == []
    assert waits == [seconds]


@pytest.mark.parametrize(
    ("asked_for", "seconds"), [(1, [1, 1, 1]), (0.5, [0.5] * 3), (0, [2, 4, 8]), (None, [2, 4, 8])]
)
def test_a_scan_that_is_limited_again_and_again_gives_up(asked_for: Any, seconds: list[float]) -> None:
    waits: list[float] = []

    class Busy:
        max_page_size, in_order = 10, False

        def read(self, request: PageRequest) -> Page:
            raise LogStoreRateLimitError("busy", retry_after=asked_for)

        def close(self) -> None:
            pass

    with pytest.raises(LogStoreRateLimitError):
        list(PageScanner(Busy(), waits.append).scan(make_logs(make_stream())))
    assert waits == seconds
