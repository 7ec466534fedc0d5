"""A simulated backend, for tests that need neither network nor time."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Any, ClassVar
from uuid import UUID, uuid4

from zenml.enums import LoggingLevels, StackComponentType
from zenml.models import LogEntry, LogsResponse
from zenml.models.v2.core.logs import LogsResponseBody

from composite_logstore import (
    ChildConfig,
    CompositeLogStore,
    CompositeLogStoreConfig,
    Event,
    LogEvent,
    Page,
    PageRequest,
    ReadEntry,
    Stream,
)

LONG_AGO = datetime(2026, 1, 1, tzinfo=timezone.utc)


class Backend:
    """What a simulated backend holds, and how it behaves.

    Attributes:
        received: The events, as they arrived.
        faults: What the next exports raise, in order; None lets one through.
        gate: While it is not set, an export does not return.
    """

    def __init__(self) -> None:
        self.received: list[LogEvent] = []
        self.batches: list[list[LogEvent]] = []
        self.ended: list[Stream] = []
        self.faults: list[BaseException | None] = []
        self.always: BaseException | None = None
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.closed = 0
        self._arrived = threading.Condition()

    def export(self, batch: Sequence[LogEvent]) -> int:
        self.entered.set()
        self.gate.wait()
        fault = self.faults.pop(0) if self.faults else self.always
        if fault is not None:
            raise fault
        with self._arrived:
            self.batches.append(list(batch))
            self.received += batch
            self._arrived.notify_all()
        return 0

    def wait_for(self, count: int) -> None:
        """Wait until so many events have arrived."""
        with self._arrived:
            assert self._arrived.wait_for(lambda: len(self.received) >= count, timeout=5)

    def end_stream(self, stream: Stream) -> None:
        self.ended.append(stream)

    def close(self) -> None:
        with self._arrived:
            self.closed += 1
            self._arrived.notify_all()

    def wait_for_close(self) -> None:
        """Wait until the exporter has been closed."""
        with self._arrived:
            assert self._arrived.wait_for(lambda: self.closed, timeout=5)

    @property
    def messages(self) -> list[str]:
        return [event.message for event in self.received]


class SimulatedReader:
    """Reads from a list: the token is a place in it."""

    max_page_size = 1000
    in_order = True

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def read(self, request: PageRequest) -> Page:
        if self._backend.always is not None:
            raise self._backend.always
        events = [event for event in self._backend.received if event.stream.id == request.logs.id]
        if request.direction == "newer":
            first = int(request.token or 0)
            last = min(first + request.limit, len(events))
        else:
            last = len(events) if request.token is None else int(request.token)
            first = max(0, last - request.limit)
        entries = [read_entry(event) for event in events[first:last]]
        return Page(entries, older=str(first) if first else None, newer=str(last) if entries else None)

    def close(self) -> None:
        pass


class SimulatedChildConfig(ChildConfig):
    """A child of a simulated backend, found by its name in `backends`."""

    readable: ClassVar[bool] = True
    backends: ClassVar[dict[str, Backend]] = {}

    def create_exporter(self) -> Backend:
        return self.backends[self.name]

    def create_reader(self) -> SimulatedReader:
        return SimulatedReader(self.backends[self.name])


def read_entry(event: LogEvent) -> ReadEntry:
    entry = LogEntry(
        id=UUID(event.uid),
        message=event.text,
        level=LoggingLevels(event.level // 10 * 10),
        timestamp=datetime.fromtimestamp(event.time_unix_nano / 1e9, tz=timezone.utc),
    )
    return ReadEntry(entry, Event(event.writer, event.sequence))


def make_child(name: str, backend: Backend | None = None, **settings: Any) -> SimulatedChildConfig:
    """Return a child whose batches wait for nothing, with its backend."""
    SimulatedChildConfig.backends[name] = backend or Backend()
    return SimulatedChildConfig(**{"name": name, "type": "simulated", "schedule_delay_millis": 0, **settings})


def make_store(
    *children: ChildConfig, id: UUID | None = None, primary: str | None = None, **settings: Any
) -> CompositeLogStore:
    """Return a store with these children, the first of which is the primary."""
    return CompositeLogStore(
        name="logs",
        id=id or uuid4(),
        config=CompositeLogStoreConfig(
            primary=primary or children[0].name,
            children=list(children),
            **{"flush_timeout_millis": 200, "flush_limit_millis": 2000, **settings},
        ),
        flavor="composite",
        type=StackComponentType.LOG_STORE,
        user=None,
        created=LONG_AGO,
        updated=LONG_AGO,
    )


def make_logs(store: CompositeLogStore, source: str = "step", id: UUID | None = None) -> LogsResponse:
    """Return a stream as ZenML's server would describe it."""
    return LogsResponse(
        id=id or uuid4(),
        body=LogsResponseBody(
            created=LONG_AGO, updated=LONG_AGO, project_id=uuid4(), source=source, log_store_id=store.id
        ),
    )


def assert_accounts_add_up(stats: dict[str, dict[str, Any]]) -> None:
    for name, child in stats.items():
        parts = child["delivered"] + child["rejected"] + child["dropped"] + child["pending"]
        assert child["accepted"] == parts, f"{name}: {child}"
        assert all(child[key] >= 0 for key in ("delivered", "rejected", "dropped", "pending")), f"{name}: {child}"
        assert sum(child["rejected_reasons"].values()) == child["rejected"]
