"""How a log store's children are on this machine now, across all of its processes."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from composite_logstore import clock
from composite_logstore.catalog.errors import ArgumentError
from composite_logstore.delivery.states import State
from composite_logstore.delivery.status import RATE_SECONDS
from composite_logstore.operations.inventory import (
    IN_USE,
    Backlog,
    LogStore,
    backlog_in,
    inventory,
    processes_in,
    reason_of,
)
from composite_logstore.spool.status_files import Said, read_statuses

_LOOK_SECONDS = 10.0
"""How often to look at the folders of dead processes, in seconds: reading them takes long, and little changes there."""
_WORST = [State.HEALTHY.value, State.RETRYING.value, State.UNAVAILABLE.value]
_NUMBER = Field(ge=0)


class _ChildSaid(BaseModel):
    """What a process says of one child. Somebody else may have written it, so each field is checked."""

    model_config = ConfigDict(extra="ignore", strict=True)

    state: str = Field(pattern=f"^({'|'.join(_WORST)})$")
    delivered: int = _NUMBER
    rejected: int = _NUMBER
    dropped: int = _NUMBER
    withheld: int = _NUMBER
    redacted: int = _NUMBER
    pending: int = _NUMBER
    delivered_since: int = _NUMBER
    oldest: int | None = None
    last_error: str | None = Field(default=None, max_length=1_000)


class _ProcessSaid(BaseModel):
    """What a process says."""

    model_config = ConfigDict(extra="ignore", strict=True)

    pid: int
    host: str = Field(max_length=300)
    began: float
    written: float
    since: float
    recovered: list[str] = Field(max_length=1_000)
    children: dict[str, _ChildSaid]


@dataclass
class ProcessStatus:
    """One process of a log store.

    Attributes:
        writer: Its writer, 15 hexadecimal digits.
        is_alive: Whether it is alive.
        pid: Its process id, as it sees it; None if it has said nothing that can be read.
        host: The name of its machine or container, empty if unknown.
        began: When it began to log, in seconds since the epoch, None if unknown.
        written: When it last said how its children are, in seconds since the epoch, None if unknown.
    """

    writer: str
    is_alive: bool
    pid: int | None = None
    host: str = ""
    began: float | None = None
    written: float | None = None


@dataclass
class ChildStatus:
    """One child, as all living processes of this machine together see it.

    Attributes:
        name: The child's name.
        state: The worst state that a process sees: `healthy`, `retrying` or `unavailable`; None if no process lives.
        processes: How many living processes deliver to it.
        rate: How many events they have delivered in each of the last seconds.
        pending: How many events wait for it, in living processes and in the folders of dead ones.
        oldest: When the oldest of them was logged, in seconds since the epoch; None if none waits, or it is unknown.
        delivered: How many events the living processes have delivered, each since it began.
        withheld: How many they have withheld.
        redacted: How many they have redacted.
        rejected: How many its backend has rejected.
        dropped: How many were lost.
        last_error: The last problem of a process, of one in the worst state if that has any; None if there was none.
    """

    name: str
    state: str | None = None
    processes: int = 0
    rate: float = 0.0
    pending: int = 0
    oldest: float | None = None
    delivered: int = 0
    withheld: int = 0
    redacted: int = 0
    rejected: int = 0
    dropped: int = 0
    last_error: str | None = None

    def waits_since(self, oldest: float) -> None:
        """Note when an event was logged that waits for the child."""
        self.oldest = oldest if self.oldest is None else min(self.oldest, oldest)


@dataclass
class StoreStatus:
    """A log store on this machine.

    Attributes:
        store: The log store.
        children: Its children: those that are configured, in their order, and then those that processes still have.
        processes: Its processes; the dead ones are named for a day.
        unknown: Why the numbers are incomplete, as sentences without full stops.
    """

    store: LogStore
    children: list[ChildStatus] = field(default_factory=list)
    processes: list[ProcessStatus] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)


def status(store: str) -> StoreStatus:
    """Return how the children of a log store are on this machine now.

    Running processes write that down about once a second, unless `durability` is `memory`.

    Examples:
        >>> [(child.name, child.state, child.pending) for child in status("logs").children]
        [('archive', None, 0), ('live', None, 3)]

    Args:
        store: The log store's name or id. Without ZenML, its id.

    Raises:
        ArgumentError: There is no such log store, or nothing of it on this machine.
    """
    return Watch(store).look()


class Watch:
    """Looks at a log store on this machine again and again."""

    def __init__(self, store: str) -> None:
        """Find the log store.

        Args:
            store: Its name or id. Without ZenML, its id.

        Raises:
            ArgumentError: There is no such log store, or nothing of it on this machine.
        """
        here = inventory()
        try:
            self._folders = here.select([store], ())
        except ArgumentError as error:
            raise ArgumentError("store", str(error)) from None
        self._zenml_error = here.zenml_error
        # With a folder that is read now, if there are several.
        self._store = next(iter(self._folders.values()))
        # A folder → when it was read, and what was found.
        self._seen: dict[Path, tuple[float, Backlog | None]] = {}
        self._clock = clock.current

    def look(self) -> StoreStatus:
        """Return how the children are now."""
        result = StoreStatus(self._store)
        if self._zenml_error:
            result.unknown.append(f"ZenML cannot be reached ({self._zenml_error}), which has the settings")
        children = {child.name: ChildStatus(child.name) for child in self._store.children.values() if child.enabled}
        now = self._clock.time()
        silent = 0
        for home in self._folders:
            said, why = _said(home)
            if why:
                result.unknown.append(why)
            known = {one.writer for one in said if one.is_alive}
            for one in said:
                process, read = _process(one)
                result.processes.append(process)
                if read is not None and one.is_alive:
                    _add(children, read, now)
                    known.update(read.recovered)
            for backlog in self._others_in(home, known):
                silent += backlog.barred == IN_USE
                _add_left(children, backlog)
                if not backlog.is_readable:
                    result.unknown.append(f"{backlog.folder} {backlog.barred}")
        config = self._store.config
        if config is not None and config.durability == "memory":
            result.unknown.append("'durability' is 'memory', so running processes write down nothing that can be shown")
        if silent:
            number = "a running process has" if silent == 1 else f"{silent} running processes have"
            result.unknown.append(f"{number} not said yet how the children are, or an earlier version of this package")
        result.children = list(children.values())
        return result

    def _others_in(self, home: Path, known: set[str]) -> list[Backlog]:
        """Return what waits in those folders of a log store's processes that no living process reports on.

        They are read only now and then: that takes long, little changes there, and a look at the lock of a folder is in
        the way of a process that wants to recover it.

        Args:
            home: The log store's folder.
            known: The writers of living processes, and the folders that they deliver.
        """
        now = self._clock.now()
        others = []
        for folder in processes_in(home):
            if folder.name in known or folder.name.partition("-")[0] in known:
                continue
            if now - self._seen.get(folder, (-inf, None))[0] >= _LOOK_SECONDS:
                self._seen[folder] = now, backlog_in(home, self._store, folder)
            backlog = self._seen[folder][1]
            if backlog is not None:
                others.append(backlog)
        return others


def _said(home: Path) -> tuple[list[Said], str]:
    """Return what the processes of a log store's folder say, and why that is unknown, empty if it is not."""
    try:
        return read_statuses(home), ""
    except OSError as error:
        return [], f"{home}: what processes say cannot be read: {reason_of(error)}"


def _add_left(children: dict[str, ChildStatus], backlog: Backlog) -> None:
    """Add what a dead process has left to the children."""
    for part in backlog.parts:
        if part.events:
            child = children.setdefault(part.child, ChildStatus(part.child))
            child.pending += part.events
            child.waits_since(part.oldest / 1e9)


def _process(said: Said) -> tuple[ProcessStatus, _ProcessSaid | None]:
    try:
        read = _ProcessSaid.model_validate(said.status)
    except ValueError:
        return ProcessStatus(said.writer, said.is_alive), None
    return ProcessStatus(said.writer, said.is_alive, read.pid, read.host, read.began, read.written), read


def _add(children: dict[str, ChildStatus], process: _ProcessSaid, now: float) -> None:
    """Add what a living process says to the children."""
    # A process says nothing while nothing happens.
    is_recent = now - process.written < RATE_SECONDS
    seconds = max(1.0, now - process.since)
    for name, said in process.children.items():
        child = children.setdefault(name, ChildStatus(name))
        child.processes += 1
        child.rate += said.delivered_since / seconds if is_recent else 0.0
        for number in ("pending", "delivered", "withheld", "redacted", "rejected", "dropped"):
            setattr(child, number, getattr(child, number) + getattr(said, number))
        if said.oldest is not None:
            child.waits_since(said.oldest / 1e9)
        if child.state is None or _WORST.index(said.state) > _WORST.index(child.state):
            child.state, child.last_error = said.state, said.last_error
        child.last_error = child.last_error or said.last_error
