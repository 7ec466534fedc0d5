"""Stores with simulated backends, for tests that need neither network nor time."""

from __future__ import annotations

import logging
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

from zenml.enums import StackComponentType
from zenml.models import LogsResponse
from zenml.models.v2.core.logs import LogsResponseBody

from composite_logstore import ChildConfig, CompositeLogStore, CompositeLogStoreConfig
from composite_logstore.delivery import writers
from composite_logstore.spool.lock import release_all
from composite_logstore.testing import SimulatedBackend, SimulatedChildConfig, SimulatedClock

LONG_AGO = datetime(2026, 1, 1, tzinfo=timezone.utc)


def make_child(name: str, backend: SimulatedBackend | None = None, **settings: Any) -> SimulatedChildConfig:
    """Return a child whose batches wait for nothing, with its backend."""
    SimulatedChildConfig.backends[name] = backend or SimulatedBackend()
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
            **{"flush_timeout_millis": 60_000, "flush_limit_millis": 60_000, "durability": "memory", **settings},
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


def process_dies(clock: SimulatedClock) -> None:
    """Do what SIGKILL does to the only simulated process: its threads stop, its locks go."""
    clock.kill()
    writers._writers.clear()
    release_all()


def assert_accounts_add_up(stats: dict[str, dict[str, Any]]) -> None:
    for name, child in stats.items():
        parts = child["delivered"] + child["rejected"] + child["dropped"] + child["pending"]
        assert child["accepted"] == parts, f"{name}: {child}"
        assert all(child[key] >= 0 for key in ("delivered", "rejected", "dropped", "pending")), f"{name}: {child}"
        assert sum(child["rejected_reasons"].values()) == child["rejected"]


class Machine:
    """A machine with a disk, on which one process of a log store runs after another."""

    def __init__(self, clock: SimulatedClock, disk: Path, durability: str, **children: dict[str, Any]) -> None:
        self.clock = clock
        self.disk = disk
        self.id: UUID = uuid4()
        self.durability = durability
        self.children = children
        self.backends = {name: SimulatedBackend() for name in children}
        self.logs = None

    def start(self, **settings: Any) -> CompositeLogStore:
        self.store = make_store(
            *(make_child(name, self.backends[name], **child) for name, child in self.children.items()),
            id=self.id,
            durability=self.durability,
            spool_directory=str(self.disk),
            **{"flush_timeout_millis": 5_000, "flush_limit_millis": 30_000, **settings},
        )
        self.origin = self.store.register_origin("step", make_logs(self.store), {})
        return self.store

    def log(self, *messages: str) -> None:
        for message in messages:
            self.store.emit(self.origin, logging.LogRecord("train", 20, "/code/train.py", 1, message, (), None))

    def die(self) -> None:
        """Kill the process."""
        process_dies(self.clock)
