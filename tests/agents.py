"""Agents on a simulated machine, for tests that need neither network nor time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from composite_logstore import CompositeLogStoreConfig, UnavailableError
from composite_logstore.event import LogEvent, Stream
from composite_logstore.operations.agent import LOOK_SECONDS, Agent
from composite_logstore.operations.inventory import LogStore
from composite_logstore.spool.folder import Spool
from composite_logstore.testing import SimulatedClock
from tests.events import make_events, make_stream
from tests.simulation import Machine, folders_of_processes, make_child


class Place(Machine):
    """A machine whose log store is registered, and on which agents run.

    Attributes:
        said: What agents have warned of.
        told: What agents have told people.
        trouble: What ZenML raises, if anything.
        settings: Changes of the children's settings in ZenML.
        asked: How often ZenML was asked for them.
    """

    def __init__(self, clock: SimulatedClock, disk: Path) -> None:
        super().__init__(clock, disk, "write_ahead", archive={}, live={})
        self.said: list[str] = []
        self.told: list[str] = []
        self.trouble: Exception | None = None
        self.settings: dict[str, dict[str, Any]] = {}
        self.is_registered = True
        self.asked = 0

    def registered(self) -> list[LogStore]:
        self.asked += 1
        if self.trouble:
            raise self.trouble
        if not self.is_registered:
            return []
        children = [make_child(name, self.backends[name], **self.settings.get(name, {})) for name in self.children]
        config = CompositeLogStoreConfig(
            primary="archive",
            children=children,  # type: ignore[arg-type]
            durability="write_ahead",
            spool_directory=str(self.disk),
        )
        return [LogStore(self.id, "logs", config)]

    def leave(self, *messages: str) -> None:
        """Have a process log and die while no backend answers."""
        faults = {name: backend.fault for name, backend in self.backends.items()}
        for backend in self.backends.values():
            backend.fault = UnavailableError("gone")
        self.start()
        self.log(*messages)
        self.die()
        for name, fault in faults.items():
            self.backends[name].fault = fault

    def agent(self, *stores: str) -> Agent:
        agent = Agent(str(self.disk), stores, warn=self.said.append, tell=self.told.append)
        agent.begin()
        return agent

    def work(self, agent: Agent, seconds: float) -> None:
        for _ in range(round(seconds / LOOK_SECONDS)):
            agent.look()
            self.clock.advance(LOOK_SECONDS)

    def delivered(self, child: str) -> list[str]:
        return self.backends[child].messages

    @property
    def folders(self) -> list[Path]:
        return folders_of_processes(self.disk)


class Living:
    """A living process that lets agents deliver, as far as its folder shows it.

    Attributes:
        spool: Its folder.
        next: The number of its next event.
    """

    def __init__(self, place: Place, writer: str = "0123456789abcde", stream: Stream | None = None) -> None:
        self.spool = Spool.create(place.disk / str(place.id), writer, place.children, is_shared=True)
        self.spool.give_delivery()
        self._writer = writer
        self._stream = stream or make_stream()
        self.next = 0

    def log(self, *messages: str, **changes: Any) -> list[LogEvent]:
        events = make_events(messages, self._stream, self.next, self._writer, **changes)
        self.write(events)
        return events

    def write(self, events: Sequence[LogEvent]) -> None:
        for event in events:
            self.spool.segments.append(event, lambda size: True)
            self.next = event.number + 1

    def flush(self) -> None:
        self.spool.demand(self.next)

    def account(self, child: str, name: str) -> Any:
        """Return what the account says of a child."""
        return getattr(self.spool.account()[child], name)

    def position(self, child: str) -> int:
        return self.spool.acknowledged(child)

    def die(self) -> None:
        """Do what SIGKILL does to the process."""
        assert self.spool.lock is not None
        self.spool.lock.release()
        self.spool.give_delivery()
