"""Stores with simulated backends, for tests that need neither network nor time."""

from __future__ import annotations

import logging
import threading
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

from zenml.enums import StackComponentType
from zenml.models import LogsResponse
from zenml.utils.logging_utils import LoggingContext

from composite_logstore import ChildConfig, CompositeLogStore, CompositeLogStoreConfig, zenml
from composite_logstore.delivery import writers
from composite_logstore.event import WRITER
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
    return zenml.make_logs(id or uuid4(), source, LONG_AGO, project_id=uuid4(), log_store_id=store.id)


class Context(LoggingContext):
    """A logging context of a log store that no stack has."""

    def __init__(self, store: CompositeLogStore, source: str = "step") -> None:
        self.log_model = make_logs(store, source)
        self._lock = threading.RLock()  # type: ignore[assignment]
        self._disabled = False
        self._log_store = store
        self._metadata: dict[str, Any] = {}
        self._origin = None
        self._name = str(self.log_model.id)
        self._block_on_exit = True
        self._step_names_token = None


def dispatch(record: logging.LogRecord) -> None:
    """Hand a record to the active logging context, as ZenML's handlers do."""
    getattr(LoggingContext, "dispatch", LoggingContext.emit)(record)  # type: ignore[call-arg]


def folders_of_processes(spools: Path) -> list[Path]:
    """Return the folders that processes have in the folders of log stores."""
    return [path for path in spools.glob("*/*") if WRITER.fullmatch(path.name.partition("-")[0])]


def process_dies(clock: SimulatedClock) -> None:
    """Do what SIGKILL does to the only simulated process: its threads stop, its locks go."""
    clock.kill()
    writers._writers.clear()
    release_all()


def assert_accounts_add_up(stats: dict[str, dict[str, Any]]) -> None:
    for name, child in stats.items():
        parts = [child[key] for key in ("delivered", "rejected", "dropped", "withheld", "pending")]
        assert child["accepted"] == sum(parts), f"{name}: {child}"
        assert min(parts) >= 0, f"{name}: {child}"
        assert sum(child["rejected_reasons"].values()) == child["rejected"] >= child["rejected_not_kept"] >= 0
        assert sum(child["withheld_reasons"].values()) == child["withheld"]


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
